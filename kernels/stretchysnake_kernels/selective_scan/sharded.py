"""The selective scan with its tokens spread over devices, for use inside `jax.shard_map`.

A shard needs the state that the shards walked before it leave behind. The scan is linear in its
first state: walking a shard multiplies that state by exp(A sum_t dt_t) and adds what the shard's
own tokens leave. So every shard scans from zero, all exchange these two numbers per state (nothing
with an axis of tokens travels), and every shard scans again from its true first state.

The gradient walks the shards in the opposite order by a rule of its own: the gradient of a state
obeys such a recurrence too, so that one more forward scan yields what each shard adds to it.
Differentiating both scans instead would run the backward kernel twice, which costs 3 to 5 times as
much as a forward one, and keep what both need: 1.5 to 1.8 times the time and twice the memory.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels import dispatch
from stretchysnake_kernels.selective_scan.api import selective_scan

# The gradient divides by the step size; smaller ones count as this. exp(1e-20 A) is 1 for any A in
# use, and a quotient leaves float32 only for gradients above 1e18.
SMALLEST_STEP = 1e-20


def sequence_parallel_selective_scan(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    *,
    axis_name: str,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: jax.Array | None = None,
    return_last_state: bool = False,
    implementation: str | Sequence[str] | None = None,
):
    """Runs `selective_scan` over a length that is sharded over a mesh axis.

    For the body of a `jax.shard_map`: shard k of the axis holds the k-th stretch of the tokens. The
    values and gradients are those of `selective_scan` on the whole length. Other mesh axes may
    shard the batch or the channels.

    Args:
      x, delta, B, C, z: this shard's tokens, otherwise as for `selective_scan`.
      A, D, delta_bias: as for `selective_scan`, the same on every shard of the axis.
      axis_name: the mesh axis that shards the length.
      delta_softplus: as for `selective_scan`.
      reverse: walk from the last token of the last shard to the first token of the first shard.
      initial_state: (batch, channels, state), x's dtype or float32; the state before the first
        token of the whole walk, the same on every shard of the axis. None: zeros.
      return_last_state: also return the state after the last token of the whole walk.
      implementation: as for `selective_scan`.

    Returns:
      y (batch, length, channels) of this shard's tokens in x's dtype; with `return_last_state` the
      pair (y, last_state), last_state (batch, channels, state) in float32 (float64 for float64 x),
      the same on every shard of the axis.

    Raises:
      ValueError: `axis_name` is no axis of a `jax.shard_map` around the call.
      TypeError, ValueError, dispatch.Unsupported: as `selective_scan`, in its words.
    """
    shards = dispatch.axis_size("sequence_parallel_selective_scan", axis_name)
    if isinstance(implementation, list):
        implementation = tuple(implementation)  # options are compared and hashed
    options = _Options(axis_name, bool(delta_softplus), bool(reverse), implementation)
    args = (x, delta, A, B, C, D, z, delta_bias, initial_state)
    # Refuses what the scan would refuse, before anything here is computed from it.
    jax.eval_shape(functools.partial(_scan_shard, options=options), args)
    # Gradients of what is the same everywhere are summed over the shards by this cast.
    *args, rank = dispatch.vary_alike(*args, _rank(options))
    scan = _scan_shard if shards == 1 else _scan
    y, last_state = scan(tuple(args), options)
    if not return_last_state:
        return y
    # The sum of one state and zeros, which is how JAX knows that every shard holds the same.
    return y, lax.psum(jnp.where(rank == shards - 1, last_state, 0), axis_name)


class _Options(NamedTuple):
    axis_name: str
    delta_softplus: bool
    reverse: bool
    implementation: str | Sequence[str] | None


def _scan_shard(args, options):
    """Returns y and the last state of this shard by itself."""
    *args, initial_state = args
    return selective_scan(
        *args,
        delta_softplus=options.delta_softplus,
        reverse=options.reverse,
        initial_state=initial_state,
        return_last_state=True,
        implementation=options.implementation,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(args, options):
    """Returns y and the last state of this shard, the shards walked before it included."""
    return _scan_shard(_with_first_state(args, options), options)


def _forward(args, options):
    scan = functools.partial(_scan_shard, options=options)
    outputs, pullback = jax.vjp(scan, _with_first_state(args, options))
    return outputs, (args, pullback)


def _backward(options, saved, cotangents):
    args, pullback = saved
    d_y, d_last = cotangents
    decay = _total_decay(args, options)
    own = decay * d_last + _first_state_gradient(args, d_y, options)
    opposite = options._replace(reverse=not options.reverse)
    ((*gradients, d_first),) = pullback((d_y, d_last + _walk_shards(decay, own, opposite)))
    initial_state = args[-1]
    if initial_state is None:
        return ((*gradients, None),)
    d_initial = jnp.where(_rank(options) == 0, d_first, 0)
    return ((*gradients, d_initial.astype(initial_state.dtype)),)


_scan.defvjp(_forward, _backward)


def _with_first_state(args, options):
    """Returns the arguments with the shard's own first state in place of the whole walk's."""
    x, delta, A, B, C, _, _, delta_bias, initial_state = args
    start = jnp.zeros((x.shape[0], *A.shape), _state_dtype(x))
    if initial_state is not None:
        start = jnp.where(_rank(options) == 0, initial_state.astype(start.dtype), start)
    # Skip and gate do not touch the state.
    _, own = _scan_shard((x, delta, A, B, C, None, None, delta_bias, start), options)
    return *args[:-1], start + _walk_shards(_total_decay(args, options), own, options)


def _first_state_gradient(args, d_y, options):
    """Returns what d_y of this shard adds to the gradient of its first state.

    With d_t = dy_t silu(z_t), the gradient g_t of the state after token t obeys
      g_t = exp(dt_{t+1} A) g_{t+1} + d_t C_t,
    the recurrence of `selective_scan` in the opposite direction, the steps moved by one token, with
    C for B and d_t / dt_{t+1} for x. The step that the roll brings to the first token of that walk
    multiplies a state of zero: it may be any.
    """
    _, _, A, _, C, _, z, _, _ = args
    dt = _step_size(args, options)
    A, C, d_y = (value.astype(dt.dtype) for value in (A, C, d_y))
    if z is not None:
        d_y = d_y * jax.nn.silu(z.astype(dt.dtype))
    steps = jnp.roll(dt, 1 if options.reverse else -1, axis=1)
    steps = jnp.where(jnp.abs(steps) < SMALLEST_STEP, SMALLEST_STEP, steps)
    _, g = selective_scan(
        d_y / steps,
        steps,
        A,
        C,
        C,
        reverse=not options.reverse,
        return_last_state=True,
        implementation=options.implementation,
    )
    return jnp.exp(dt[:, -1 if options.reverse else 0, :, None] * A) * g


def _walk_shards(decay, own, options):
    """Returns the state that the shards walked before this one leave, from a state of zero.

    Args:
      decay: (batch, channels, state), what this shard multiplies the state by.
      own: (batch, channels, state), what it then adds.
      options: the mesh axis and the direction.
    """
    shards = lax.axis_size(options.axis_name)
    decays, owns = lax.all_gather((decay, own), options.axis_name)
    rank = _rank(options)
    state = jnp.zeros_like(own)
    for k in range(shards - 1):  # the last one has nobody after it
        shard = shards - 1 - k if options.reverse else k
        state = jnp.where(k < rank, decays[shard] * state + owns[shard], state)
    return state


def _rank(options):
    """Returns how many shards are walked before this one."""
    here = lax.axis_index(options.axis_name)
    return lax.axis_size(options.axis_name) - 1 - here if options.reverse else here


def _total_decay(args, options):
    """Returns what walking this shard multiplies a state by: (batch, channels, state)."""
    dt = _step_size(args, options)
    return jnp.exp(jnp.sum(dt, axis=1)[:, :, None] * args[2].astype(dt.dtype))


def _step_size(args, options):
    """Returns dt (batch, length, channels) in the state's dtype."""
    x, delta, _, _, _, _, _, delta_bias, _ = args
    dt = delta.astype(_state_dtype(x))
    if delta_bias is not None:
        dt = dt + delta_bias.astype(dt.dtype)
    return jax.nn.softplus(dt) if options.delta_softplus else dt


def _state_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)
