"""The one door to the selective scan, of one direction or of both."""

from collections.abc import Sequence

import jax
import jax.export

from stretchysnake_kernels import dispatch
from stretchysnake_kernels.selective_scan import mosaic_gpu, native, pallas, reference, triton, xla


def _two_calls(scan):
    """Makes the bidirectional scan of a backend that knows one direction at a time."""

    def bidirectional(x, delta, A, B, C, D, z, delta_bias, *, delta_softplus):
        def one(direction, reverse):
            own = [v if v is None else v[direction] for v in (x, delta, A, B, C, D, delta_bias)]
            y, _ = scan(*own[:6], z, own[6], None, delta_softplus=delta_softplus, reverse=reverse)
            return y

        return one(0, False) + one(1, True)

    return bidirectional


# A backend takes all arguments by position, the flags by name, and returns (y, last_state).
IMPLEMENTATIONS = {
    "pallas": pallas.selective_scan,
    "triton": triton.selective_scan,
    "mosaic_gpu": mosaic_gpu.selective_scan,
    "native": native.selective_scan,
    "xla": xla.selective_scan,
    "reference": reference.selective_scan,
}
# The same without an initial state, with a leading axis of directions; returns y, summed over them.
BIDIRECTIONAL = {
    "pallas": pallas.bidirectional_selective_scan,
    "triton": triton.bidirectional_selective_scan,
    "mosaic_gpu": mosaic_gpu.bidirectional_selective_scan,
    "native": native.bidirectional_selective_scan,
    "xla": _two_calls(xla.selective_scan),
    "reference": _two_calls(reference.selective_scan),
}
# Of Pallas and of jax-triton, in JAX 0.10 to 0.12.
TRITON_CALLS = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi", "triton_kernel_call")
# Tried in this order where the caller names no implementation.
DEFAULT_ORDER = {
    "cpu": ("native", "xla", "reference"),
    "gpu": ("pallas", "triton", "mosaic_gpu", "xla", "reference"),
    "tpu": ("xla", "reference"),
}


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: jax.Array | None = None,
    return_last_state: bool = False,
    implementation: str | Sequence[str] | None = None,
):
    """Runs the selective state-space model of Mamba over the tokens, skip and gate included.

    With dt = softplus(delta + delta_bias), per channel, from state h = initial_state:
      h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;   y_t = (<h_t, C_t> + D x_t) silu(z_t)
    (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    algorithm 2, with the Euler step for B that the published code takes.)

    Args:
      x: (batch, length, channels), float32, bfloat16, float16 or float64.
      delta: (batch, length, channels), x's dtype; the step size before bias and softplus.
      A: (channels, state), x's dtype or float32; negative in a stable model.
      B: (batch, length, state), x's dtype.
      C: (batch, length, state), x's dtype.
      D: (channels,), x's dtype or float32; the skip. None: no skip.
      z: (batch, length, channels), x's dtype; the gate. None: no gate.
      delta_bias: (channels,), x's dtype or float32. None: no bias.
      delta_softplus: whether the step size goes through softplus.
      reverse: walk from the last token to the first. Equal to flipping x, delta, B, C and z along
        the length, scanning, and flipping y back, without the copies.
      initial_state: (batch, channels, state), x's dtype or float32. None: zeros.
      return_last_state: also return the state after the last token walked (with `reverse`, the
        state after position 0).
      implementation: None for the platform's default, a name in `IMPLEMENTATIONS`, or a list of
        names tried in order.

    Returns:
      y (batch, length, channels) in x's dtype; with `return_last_state` the pair (y, last_state),
      last_state (batch, channels, state) in float32 (float64 for float64 x). The state is kept in
      that dtype throughout, whatever x's dtype.

    Raises:
      TypeError: an argument is no array or has a dtype not listed above.
      ValueError: a shape that does not fit, an empty axis, or an unknown implementation.
      dispatch.Unsupported: no tried implementation takes the call; it says why, for each.
    """
    op = "selective_scan"
    args = _check(op, "batch", x, delta, A, B, C, D, z, delta_bias, initial_state)
    y, last_state = dispatch.call(
        op,
        IMPLEMENTATIONS,
        DEFAULT_ORDER,
        implementation,
        *args,
        delta_softplus=bool(delta_softplus),
        reverse=bool(reverse),
    )
    return (y, last_state) if return_last_state else y


def bidirectional_selective_scan(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    delta_softplus: bool = False,
    implementation: str | Sequence[str] | None = None,
):
    """Runs two selective scans over the same tokens, one from each end, and adds their outputs.

    Equal to `selective_scan` of direction 0 plus, with reverse=True, that of direction 1, both with
    the gate z; a fused backend does it in one launch, without flipped copies.

    Args:
      x: (2, batch, length, channels), float32, bfloat16, float16 or float64.
      delta: (2, batch, length, channels), x's dtype; the step size before bias and softplus.
      A: (2, channels, state), x's dtype or float32.
      B: (2, batch, length, state), x's dtype.
      C: (2, batch, length, state), x's dtype.
      D: (2, channels), x's dtype or float32; the skip. None: no skip.
      z: (batch, length, channels), x's dtype; the gate of both directions. None: no gate.
      delta_bias: (2, channels), x's dtype or float32. None: no bias.
      delta_softplus: whether the step size goes through softplus.
      implementation: as for `selective_scan`, a name in `BIDIRECTIONAL`.

    Returns:
      y (batch, length, channels) in x's dtype.

    Raises:
      TypeError: an argument is no array or has a dtype not listed above.
      ValueError: a shape that does not fit, an empty axis, or an unknown implementation.
      dispatch.Unsupported: no tried implementation takes the call; it says why, for each.
    """
    op = "bidirectional_selective_scan"
    args = _check(op, "directions batch", x, delta, A, B, C, D, z, delta_bias, None)[:-1]
    if args[0].shape[0] != 2:
        raise ValueError(
            f"{op}: x has shape {args[0].shape}, takes 2 directions, forward and backward, first"
        )
    return dispatch.call(
        op,
        BIDIRECTIONAL,
        DEFAULT_ORDER,
        implementation,
        *args,
        delta_softplus=bool(delta_softplus),
    )


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Returns the `disabled_checks` of `jax.export.export` for programs that call the scan.

    JAX wants to be told that a program may hold custom calls whose names it does not vouch for: our
    C++ functions, and the Triton kernels of a GPU. It runs where this package (for the former) and
    a JAX that knows them (for the latter) are.
    """
    calls = (native.FORWARD, native.BACKWARD, *TRITON_CALLS)
    return [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]


def _check(op, leading, x, delta, A, B, C, D, z, delta_bias, initial_state):
    """Returns the arguments as JAX arrays or raises one sentence; `leading`: axes before length."""
    sizes = {}
    directions = leading.removesuffix("batch")
    x = dispatch.check_array(op, "x", x, f"{leading} length channels", sizes, dispatch.FLOATS)
    like_x = (x.dtype.name,)
    weight = (x.dtype.name,) if x.dtype.name == "float64" else (x.dtype.name, "float32")

    def check(name, value, axes, dtypes, optional=False):
        if optional and value is None:
            return None
        return dispatch.check_array(op, name, value, axes, sizes, dtypes)

    return (
        x,
        check("delta", delta, f"{leading} length channels", like_x),
        check("A", A, f"{directions}channels state", weight),
        check("B", B, f"{leading} length state", like_x),
        check("C", C, f"{leading} length state", like_x),
        check("D", D, f"{directions}channels", weight, optional=True),
        check("z", z, "batch length channels", like_x, optional=True),
        check("delta_bias", delta_bias, f"{directions}channels", weight, optional=True),
        check("initial_state", initial_state, "batch channels state", weight, optional=True),
    )
