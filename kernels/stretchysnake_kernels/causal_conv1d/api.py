"""The one door to the causal convolution."""

from collections.abc import Sequence

import jax

from stretchysnake_kernels import dispatch
from stretchysnake_kernels.causal_conv1d import reference, xla

# A backend takes x, weight, bias by position, the two options by name, and returns y.
IMPLEMENTATIONS = {
    "xla": xla.causal_conv1d,
    "reference": reference.causal_conv1d,
}
# Tried in this order where the caller names no implementation.
DEFAULT_ORDER = {
    "cpu": ("xla", "reference"),
    "gpu": ("xla", "reference"),
    "tpu": ("xla", "reference"),
}


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Convolves each channel with its own short kernel over the current and the past tokens.

    y_t = activation(bias + sum_k weight[width - 1 - k] x_{t - k}), tokens before the first being
    zero: Mamba's convolution (Gu and Dao 2023), with the kernel stored taps first.

    Args:
      x: (batch, length, channels), float32, bfloat16, float16 or float64.
      weight: (width, channels), x's dtype or float32; weight[-1] multiplies the current token.
      bias: (channels,), x's dtype or float32. None: no bias.
      activation: None or "silu".
      reverse: look at the current and the future tokens instead. Equal to flipping x along the
        length, convolving, and flipping back, without the copies.
      implementation: None for the platform's default, a name in `IMPLEMENTATIONS`, or a list of
        names tried in order.

    Returns:
      (batch, length, channels) in x's dtype; summed in float32 (float64 for float64 x).

    Raises:
      TypeError: an argument is no array or has a dtype not listed above.
      ValueError: a shape that does not fit, an empty axis, an unknown activation or
        implementation.
      dispatch.Unsupported: no tried implementation takes the call; it says why, for each.
    """
    op, sizes = "causal_conv1d", {}
    x = dispatch.check_array(op, "x", x, "batch length channels", sizes, dispatch.FLOATS)
    dtypes = (x.dtype.name,) if x.dtype.name == "float64" else (x.dtype.name, "float32")
    weight = dispatch.check_array(op, "weight", weight, "width channels", sizes, dtypes)
    if bias is not None:
        bias = dispatch.check_array(op, "bias", bias, "channels", sizes, dtypes)
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}, takes None or 'silu'")
    return dispatch.call(
        op,
        IMPLEMENTATIONS,
        DEFAULT_ORDER,
        implementation,
        *(x, weight, bias),
        activation=activation,
        reverse=bool(reverse),
    )
