"""What the fused kernels share: preparation of the arguments, the gradient rule, and vmap.

A fused kernel computes the whole operation, step size, skip and gate included, for one direction
or for both in one call. It comes as two functions on plain arrays, `Kernels`; all that JAX wants
besides is written here once:
* the gradient recomputes the states from checkpoints that the forward pass kept;
* sums over videos (of A, D and the bias) are left to XLA: the result is deterministic, and `vmap`
  can fold its axis into the batch;
* state sizes and channels that a kernel was not built for are padded with zeros, which is exact.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels.dispatch import Unsupported, vary_alike

LOG2_E = 1.4426950408889634


class Operands(NamedTuple):
    """A call as a kernel takes it; `directions` is 1 or 2, the second one sharing the gate.

    Attributes:
      x: (directions, batch, length, channels).
      delta: (directions, batch, length, channels), x's dtype.
      decay: (directions, state, channels) float32, A log2(e) transposed: exp(dt A) = 2^(dt decay).
      B: (directions, batch, length, state) float32.
      C: (directions, batch, length, state) float32.
      D: (directions, channels) float32.
      z: (1, batch, length, channels), x's dtype, or None.
      bias: (directions, channels) float32.
      start: (directions, batch, state, channels) float32, the state before the first token walked.
    """

    x: jax.Array
    delta: jax.Array
    decay: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array
    z: jax.Array | None
    bias: jax.Array
    start: jax.Array


# Without a batch axis; everything else of a call has it second.
WEIGHTS = ("decay", "D", "bias")


class Kernels(NamedTuple):
    """A fused implementation.

    Attributes:
      forward: (operands, *, softplus, reverse, save) -> (y like x, last state like start,
        checkpoints). `reverse` holds one bool per direction. Checkpoints are a tuple of arrays
        whose second axis is the batch, empty unless `save`.
      backward: (operands, checkpoints, d_y like x, d_last like start, *, softplus, reverse) ->
        gradients as Operands in float32 or x's dtype: of decay per video (directions, batch, state,
        channels), of D and bias per video (directions, batch, channels), of z per direction (like
        x), the others like the operand. That of `decay` is taken with respect to A, transposed.
      channels: what the number of channels must be a multiple of.
      states: state sizes the kernels are built for, ascending.
      dtypes: names of the dtypes of x they take.
      check: called with (operands, reverse) before anything is computed; raises Unsupported.
    """

    forward: Callable
    backward: Callable
    channels: int
    states: tuple[int, ...] = (8, 16, 32)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    check: Callable = lambda operands, reverse: None


def backend(find_kernels: Callable[[], Kernels]) -> tuple[Callable, Callable]:
    """Returns a backend's `selective_scan` and `bidirectional_selective_scan`.

    They compute what api.py documents under these names, and raise what the functions below do.

    Args:
      find_kernels: returns those to call on the default device, or raises Unsupported.
    """

    def one(*args, **kwargs):
        return selective_scan(find_kernels(), *args, **kwargs)

    def both(*args, **kwargs):
        return bidirectional_selective_scan(find_kernels(), *args, **kwargs)

    return one, both


def selective_scan(
    kernels, x, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse
):
    """Computes what `api.selective_scan` documents with `kernels`.

    Raises:
      Unsupported: a dtype, state size or device that the kernels do not take.
    """
    weights = (value if value is None else value[None] for value in (A, D, delta_bias))
    A, D, delta_bias = weights
    start = None if initial_state is None else jnp.swapaxes(initial_state[None], 2, 3)
    tokens = (value[None] for value in (x, delta, B, C))
    y, last = _run(kernels, *tokens, A, D, z, delta_bias, start, delta_softplus, (reverse,))
    return y[0], jnp.swapaxes(last[0], 1, 2)


def bidirectional_selective_scan(kernels, x, delta, A, B, C, D, z, delta_bias, *, delta_softplus):
    """Computes what `api.bidirectional_selective_scan` documents in one call of `kernels`.

    Raises:
      Unsupported: a dtype, state size or device that the kernels do not take.
    """
    reverse = (False, True)
    y, _ = _run(kernels, x, delta, B, C, A, D, z, delta_bias, None, delta_softplus, reverse)
    return y[0] + y[1]


def _run(kernels, x, delta, B, C, A, D, z, bias, start, softplus, reverse):
    """Pads and converts the arguments, calls the kernels, and cuts the padding off the results."""
    if x.dtype.name not in kernels.dtypes:
        raise Unsupported(f"takes {' or '.join(kernels.dtypes)}, x is {x.dtype.name}")
    directions, batch, _, channels = x.shape
    state = A.shape[2]
    if state > kernels.states[-1]:
        raise Unsupported(f"takes up to {kernels.states[-1]} states, got {state}")
    padded_state = next(size for size in kernels.states if size >= state)
    padded_channels = -(-channels // kernels.channels) * kernels.channels

    def pad(value, state_axis=None, channel_axis=None):
        widths = [(0, 0)] * value.ndim
        if state_axis is not None:
            widths[state_axis] = (0, padded_state - state)
        if channel_axis is not None:
            widths[channel_axis] = (0, padded_channels - channels)
        return value if not any(after for _, after in widths) else jnp.pad(value, widths)

    def weight(value):
        if value is None:
            return jnp.zeros((directions, padded_channels), jnp.float32)
        return pad(value.astype(jnp.float32), channel_axis=1)

    if start is None:
        start = jnp.zeros((directions, batch, state, channels), jnp.float32)
    operands = Operands(
        x=pad(x, channel_axis=3),
        delta=pad(delta, channel_axis=3),
        decay=pad(jnp.swapaxes(A.astype(jnp.float32) * LOG2_E, 1, 2), 1, 2),
        B=pad(B.astype(jnp.float32), 3),
        C=pad(C.astype(jnp.float32), 3),
        D=weight(D),
        z=None if z is None else pad(z[None], channel_axis=3),
        bias=weight(bias),
        start=pad(start.astype(jnp.float32), 2, 3),
    )
    operands = Operands(*vary_alike(*operands))
    kernels.check(operands, reverse)
    y, last = _scan(kernels, softplus, reverse, operands)
    return y[..., :channels], last[:, :, :state, :channels]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(kernels, softplus, reverse, operands):
    run = _folded(kernels.forward, softplus=softplus, reverse=reverse, save=False)
    y, last, _ = run(operands)
    return y, last


def _scan_forward(kernels, softplus, reverse, operands):
    run = _folded(kernels.forward, softplus=softplus, reverse=reverse, save=True)
    y, last, checkpoints = run(operands)
    return (y, last), (operands, checkpoints)


def _scan_backward(kernels, softplus, reverse, saved, cotangents):
    operands, checkpoints = saved
    d_y, d_last = cotangents
    run = _folded(kernels.backward, softplus=softplus, reverse=reverse)
    gradients = run(operands, checkpoints, d_y, d_last)
    # The kernels differentiate by A; what entered is A log2(e).
    d_decay = jnp.sum(gradients.decay, axis=1) / LOG2_E
    d_z = None
    if operands.z is not None:
        d_z = jnp.sum(gradients.z.astype(jnp.float32), axis=0, keepdims=True)
    gradients = gradients._replace(
        decay=d_decay, D=jnp.sum(gradients.D, axis=1), bias=jnp.sum(gradients.bias, axis=1), z=d_z
    )
    return (jax.tree.map(lambda value, like: value.astype(like.dtype), gradients, operands),)


_scan.defvjp(_scan_forward, _scan_backward)


def _folded(kernel, **static):
    """Returns kernel(..., **static) with a rule for vmap: the mapped axis joins the batch.

    Arrays are taken and returned with the batch second. Mapped weights cannot be folded: then the
    calls run one after the other.
    """

    @jax.custom_batching.custom_vmap
    def call(*args):
        return kernel(*args, **static)

    @call.def_vmap
    def mapped(size, in_batched, *args):
        def spread(value, batched):
            return value if batched else jnp.broadcast_to(value, (size, *value.shape))

        in_batched = tuple(in_batched)
        operands, is_mapped = args[0], in_batched[0]
        if any(getattr(is_mapped, name) for name in WEIGHTS):
            every = jax.tree.map(spread, args, in_batched)
            results = lax.map(lambda one: call(*one), every)
            return results, jax.tree.map(lambda _: True, results)

        def fold(value, batched):  # (size, directions, batch, ...) -> (directions, size batch, ...)
            value = jnp.moveaxis(spread(value, batched), 0, 1)
            return value.reshape(value.shape[0], size * value.shape[2], *value.shape[3:])

        def unfold(value):
            value = value.reshape(value.shape[0], size, -1, *value.shape[2:])
            return jnp.moveaxis(value, 1, 0)

        none = dict.fromkeys(WEIGHTS)
        folded = jax.tree.map(
            fold,
            (operands._replace(**none), *args[1:]),
            (is_mapped._replace(**none), *in_batched[1:]),
        )
        weights = {name: getattr(operands, name) for name in WEIGHTS}
        results = jax.tree.map(unfold, call(folded[0]._replace(**weights), *folded[1:]))
        return results, jax.tree.map(lambda _: True, results)

    def run(operands, *args):
        # What a foreign call returns varies over no mesh axis, as far as JAX can tell.
        return vary_alike(call(operands, *args), operands)[0]

    return run
