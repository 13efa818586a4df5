"""The causal convolution as XLA's grouped convolution: the definition, in any float dtype."""

import jax
import jax.numpy as jnp
from jax import lax


def causal_conv1d(x, weight, bias, *, activation, reverse):
    """Computes what `api.causal_conv1d` documents, in float32 (float64 for float64 x)."""
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    past = weight.shape[0] - 1
    kernel = weight[::-1] if reverse else weight
    y = lax.conv_general_dilated(
        x.astype(accumulate),
        kernel[:, None, :].astype(accumulate),
        window_strides=(1,),
        padding=[(0, past) if reverse else (past, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=x.shape[-1],
        precision=lax.Precision.HIGHEST,
    )
    if bias is not None:
        y = y + bias.astype(accumulate)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype)
