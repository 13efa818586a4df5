"""The one door to the causal convolution, of one direction or of both."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from stretchysnake_kernels import dispatch
from stretchysnake_kernels.causal_conv1d import pallas, reference, xla


def _two_calls(convolve):
    """Makes the bidirectional convolution of a backend that knows one direction at a time."""

    def bidirectional(x, weight, bias, *, activation):
        def one(direction, reverse):
            own = None if bias is None else bias[direction]
            return convolve(x, weight[direction], own, activation=activation, reverse=reverse)

        return jnp.stack([one(0, False), one(1, True)])

    return bidirectional


# A backend takes x, weight, bias by position, the two options by name, and returns y.
IMPLEMENTATIONS = {
    "pallas": pallas.causal_conv1d,
    "xla": xla.causal_conv1d,
    "reference": reference.causal_conv1d,
}
# The same with a leading axis of directions on weight, bias and y.
BIDIRECTIONAL = {
    "pallas": pallas.bidirectional_causal_conv1d,
    "xla": _two_calls(xla.causal_conv1d),
    "reference": _two_calls(reference.causal_conv1d),
}
# Tried in this order where the caller names no implementation.
DEFAULT_ORDER = {
    "cpu": ("xla", "reference"),
    "gpu": ("pallas", "xla", "reference"),
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
    op = "causal_conv1d"
    args = _check(op, "", x, weight, bias, activation)
    return dispatch.call(
        op,
        IMPLEMENTATIONS,
        DEFAULT_ORDER,
        implementation,
        *args,
        activation=activation,
        reverse=bool(reverse),
    )


def bidirectional_causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Convolves the same tokens twice: over those before each, and over those after it.

    Equal to `causal_conv1d` with weight[0], and with weight[1] and reverse=True, stacked; a fused
    backend computes the gradient of both in one launch, without an array of its own in between.

    Args:
      x: (batch, length, channels), float32, bfloat16, float16 or float64.
      weight: (2, width, channels), x's dtype or float32; weight[:, -1] multiplies the current token
        in both directions.
      bias: (2, channels), x's dtype or float32. None: no bias.
      activation: None or "silu".
      implementation: as for `causal_conv1d`, a name in `BIDIRECTIONAL`.

    Returns:
      (2, batch, length, channels) in x's dtype; summed in float32 (float64 for float64 x).

    Raises:
      TypeError: an argument is no array or has a dtype not listed above.
      ValueError: a shape that does not fit, an empty axis, an unknown activation or
        implementation.
      dispatch.Unsupported: no tried implementation takes the call; it says why, for each.
    """
    op = "bidirectional_causal_conv1d"
    args = _check(op, "directions ", x, weight, bias, activation)
    if args[1].shape[0] != 2:
        raise ValueError(
            f"{op}: weight has shape {args[1].shape}, takes 2 directions, forward and backward, "
            "first"
        )
    return dispatch.call(
        op, BIDIRECTIONAL, DEFAULT_ORDER, implementation, *args, activation=activation
    )


def _check(op, directions, x, weight, bias, activation):
    """Returns x, weight and bias as JAX arrays, or raises one sentence."""
    sizes = {}
    x = dispatch.check_array(op, "x", x, "batch length channels", sizes, dispatch.FLOATS)
    dtypes = (x.dtype.name,) if x.dtype.name == "float64" else (x.dtype.name, "float32")
    axes = f"{directions}width channels"
    weight = dispatch.check_array(op, "weight", weight, axes, sizes, dtypes)
    if bias is not None:
        axes = f"{directions}channels"
        bias = dispatch.check_array(op, "bias", bias, axes, sizes, dtypes)
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}, takes None or 'silu'")
    return x, weight, bias
