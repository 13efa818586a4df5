"""The selective scan in plain JAX, shaped for how XLA:CPU runs loops, with its own gradient.

What makes it fast there (each measured; the README of kernels/ tells how to measure again):
* The state is (batch, state, channels): the vector units run along channels. Tokens are read and
  written in place in (batch, length, channels) by dynamic slices; `lax.scan` would first transpose
  every operand to time-major. Walking backwards is then only another index.
* Sums over the state are written as one fused multiply-add per state: XLA turns the reduction of a
  product over a middle axis into a scalar loop.
* exp is a polynomial in base 2 where the state is large, because XLA splits a loop over cores only
  when its cost model sees arithmetic, and a library exponential does not count.
* The gradient stores the state once per chunk and recomputes the chunk, so memory stays linear in
  the tokens with a small factor, whatever the state size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels.dispatch import Unsupported, vary_alike

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Tokens per chunk; a state size above it raises it, so that checkpoints never outgrow x.
CHUNK = 16
# From this many numbers of state on, splitting the polynomial over two cores pays (at 6,000 it
# loses a factor of two to the hand-over).
SPLIT_STATE = 12288
# Taylor coefficients ln(2)^k / k! for k = 6 .. 0, the last one exactly 1: a decay close to one is
# raised to the length's power, so that an error of 1e-5 there would compound.
EXP2_TAYLOR = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, LN_2, 1.0)


def selective_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse):
    """Computes what `api.selective_scan` documents, in float32, with a gradient in reverse mode.

    Returns:
      y (batch, length, channels) in x's dtype, and the last state (batch, channels, state) float32.

    Raises:
      Unsupported: float64 input.
    """
    if x.dtype == jnp.float64:
        raise Unsupported("computes in float32, x is float64")
    return _scan((x, delta, A, B, C, D, z, delta_bias, initial_state), delta_softplus, reverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scan(args, delta_softplus, reverse):
    return _forward(args, delta_softplus, reverse, save=False)[0]


def _forward(args, delta_softplus, reverse, save):
    """Returns (y, last state), and what the gradient needs where `save` says so."""
    x, delta, A, B, C, D, z, delta_bias, initial_state = args
    dt = _step_size(delta, delta_bias, delta_softplus)
    if initial_state is None:
        start = jnp.zeros((x.shape[0], A.shape[1], x.shape[2]), jnp.float32)
        start, _ = vary_alike(start, x)
    else:
        start = jnp.swapaxes(initial_state.astype(jnp.float32), 1, 2)
    scanned, last, checkpoints = _walk(dt, x, _log2_decay(A), B, C, start, reverse, save)
    y = scanned
    if D is not None:
        y = y + x.astype(jnp.float32) * D.astype(jnp.float32)
    if z is not None:
        y = y * jax.nn.silu(z.astype(jnp.float32))
    outputs = y.astype(x.dtype), jnp.swapaxes(last, 1, 2)
    # Without a gate nothing in the gradient reads the scan's own output.
    return outputs, (args, dt, None if z is None else scanned, checkpoints)


def _backward(delta_softplus, reverse, saved, cotangents):
    """Returns the gradient of every argument, in its own dtype (None where it was None)."""
    args, dt, scanned, checkpoints = saved
    x, delta, A, B, C, D, z, delta_bias, initial_state = args
    d_y, d_last = cotangents
    d_y, x32 = d_y.astype(jnp.float32), x.astype(jnp.float32)
    d_z = d_D = d_bias = d_initial = None
    if z is not None:
        z32 = z.astype(jnp.float32)
        gate = jax.nn.sigmoid(z32)
        ungated = scanned if D is None else scanned + x32 * D.astype(jnp.float32)
        d_z = d_y * ungated * gate * (1 + z32 * (1 - gate))
        d_y = d_y * z32 * gate
    d_dt, d_x, d_A, d_B, d_C, d_start = _walk_back(
        dt, x, _log2_decay(A), B, C, d_y, jnp.swapaxes(d_last, 1, 2), checkpoints, reverse
    )
    if D is not None:
        d_x = d_x + d_y * D.astype(jnp.float32)
        d_D = jnp.sum(d_y * x32, axis=(0, 1))
    d_delta = d_dt
    if delta_softplus:
        # From delta, not as 1 - exp(-dt), which cancels where dt is small.
        biased = delta.astype(jnp.float32)
        if delta_bias is not None:
            biased = biased + delta_bias.astype(jnp.float32)
        d_delta = d_dt * jax.nn.sigmoid(biased)
    if delta_bias is not None:
        d_bias = jnp.sum(d_delta, axis=(0, 1))
    if initial_state is not None:
        d_initial = jnp.swapaxes(d_start, 1, 2)
    gradients = (d_x, d_delta, d_A.T, d_B, d_C, d_D, d_z, d_bias, d_initial)
    return (
        tuple(
            None if value is None else value.astype(arg.dtype)
            for value, arg in zip(gradients, args, strict=True)
        ),
    )


_scan.defvjp(functools.partial(_forward, save=True), _backward)


def _walk(dt, x, decay, B, C, state, reverse, save):
    """Walks the tokens forward in time (from the last one with `reverse`).

    Args:
      dt: (batch, length, channels) float32.
      x: (batch, length, channels).
      decay: (state, channels) float32, A log2(e) transposed.
      B: (batch, length, state).
      C: (batch, length, state).
      state: (batch, state, channels) float32, before the first token.
      reverse: whether the first token walked is the last one.
      save: whether to keep the state at each chunk's start.

    Returns:
      <h_t, C_t> (batch, length, channels) float32, the last state, and the checkpoints
      (chunks, batch, state, channels) or None.
    """
    length = x.shape[1]
    exp2 = _choose_exp2(state.size)

    def step(i, carry):
        h, y = carry
        t = length - 1 - i if reverse else i
        dt_t = _token(dt, t)
        h = exp2(dt_t[:, None] * decay) * h + _outer(_token(B, t), dt_t * _token(x, t))
        return h, _put(y, _sum_states(h, _token(C, t)), t, axis=1)

    y = _empty(x.shape, x)
    if not save:
        last, y = lax.fori_loop(0, length, step, (state, y))
        return y, last, None

    chunk = _chunk_length(length, state.shape[1])
    chunks = -(-length // chunk)

    def walk_chunk(c, carry):
        h, y, checkpoints = carry
        end = jnp.minimum(length, (c + 1) * chunk)
        checkpoints = _put(checkpoints, h, c, axis=0)
        return *lax.fori_loop(c * chunk, end, step, (h, y)), checkpoints

    checkpoints = _empty((chunks, *state.shape), x)
    last, y, checkpoints = lax.fori_loop(0, chunks, walk_chunk, (state, y, checkpoints))
    return y, last, checkpoints


def _walk_back(dt, x, decay, B, C, d_y, d_state, checkpoints, reverse):
    """Walks the tokens in the opposite order and gathers the gradients.

    Each chunk first recomputes its states from its checkpoint, then carries g, the gradient of the
    state, back through it:
      g_t = exp(dt_{t+1} A) g_{t+1} + dy_t C_t;   with k_t = exp(dt_t A) h_{t-1} the kept part,
      d_dt = sum_n g k A + sum_n g B x;   d_x = dt sum_n g B;   d_A += dt g k;
      d_B = sum_d g dt x;   d_C = sum_d h dy, h_t = k_t + dt_t x_t B_t.
    The kept part is what is recomputed and stored, not h: h - dt x B would cancel where a large
    step forgets the past.

    Args:
      dt, x, decay, B, C, reverse: as for `_walk`.
      d_y: (batch, length, channels) float32, gradient of <h_t, C_t>.
      d_state: (batch, state, channels) float32, gradient of the last state.
      checkpoints: (chunks, batch, state, channels) float32 of `_walk`.

    Returns:
      Gradients of dt, x, A (state, channels), B, C and the first state, float32.
    """
    length = x.shape[1]
    chunks, batch, states, channels = checkpoints.shape
    chunk = _chunk_length(length, states)
    exp2 = _choose_exp2(d_state.size)
    A = decay * LN_2

    def position(i):
        return length - 1 - i if reverse else i

    def inflow(i):  # dt x B of the i-th token walked
        t = position(i)
        return _outer(_token(B, t), _token(dt, t) * _token(x, t))

    def walk_chunk(c, carry):
        g, d_A, kept, d_dt, d_x, d_B, d_C = carry
        c = chunks - 1 - c
        first = c * chunk
        end = jnp.minimum(length, first + chunk)

        def keep(i, h, kept, d_C):
            t = position(i)
            k = exp2(_token(dt, t)[:, None] * decay) * h
            d_C = _put(d_C, _sum_channels(k, _token(d_y, t)), t, axis=1)
            return k, _put(kept, k, i - first, axis=0), d_C

        def recompute(i, carry):
            k, kept, d_C = carry
            return keep(i, k + inflow(i - 1), kept, d_C)

        start = lax.dynamic_index_in_dim(checkpoints, c, 0, False, allow_negative_indices=False)
        _, kept, d_C = lax.fori_loop(first + 1, end, recompute, keep(first, start, kept, d_C))

        def step(j, carry):
            g, d_A, d_dt, d_x, d_B = carry
            i = end - 1 - j
            t = position(i)
            dt_t, x_t, B_t = _token(dt, t), _token(x, t), _token(B, t)
            after = _token(dt, position(jnp.minimum(i + 1, length - 1)))
            after = jnp.where(i + 1 < length, after, 0.0)
            g = g * exp2(after[:, None] * decay) + _outer(_token(C, t), _token(d_y, t))
            d_B = _put(d_B, _sum_channels(g, dt_t * x_t), t, axis=1)
            along_B = _sum_states(g, B_t)

            def kept_state(n):
                at, one = (i - first, 0, n, 0), (1, batch, 1, channels)
                return lax.dynamic_slice(kept, at, one, allow_negative_indices=False)[0, :, 0]

            along_A = g[:, 0] * kept_state(0) * A[0]
            for n in range(1, states):
                along_A = along_A + g[:, n] * kept_state(n) * A[n]
            k = lax.dynamic_index_in_dim(kept, i - first, 0, False, allow_negative_indices=False)
            d_A = d_A + dt_t[:, None] * (g * k)
            d_dt = _put(d_dt, along_A + along_B * x_t, t, axis=1)
            return g, d_A, d_dt, _put(d_x, along_B * dt_t, t, axis=1), d_B

        g, d_A, d_dt, d_x, d_B = lax.fori_loop(0, end - first, step, (g, d_A, d_dt, d_x, d_B))
        return g, d_A, kept, d_dt, d_x, d_B, d_C

    carry = (
        d_state.astype(jnp.float32),
        jnp.zeros_like(d_state, jnp.float32),
        _empty((chunk, *d_state.shape), x),
        *(_empty(value.shape, x) for value in (dt, x, B, C)),
    )
    g, d_A, _, d_dt, d_x, d_B, d_C = lax.fori_loop(0, chunks, walk_chunk, carry)
    # d_C so far saw the kept part of the state only.
    x_dy = jnp.sum(dt * x.astype(jnp.float32) * d_y, axis=-1, keepdims=True)
    d_C = d_C + B.astype(jnp.float32) * x_dy
    d_start = g * exp2(_token(dt, position(0))[:, None] * decay)
    return d_dt, d_x, jnp.sum(d_A, axis=0), d_B, d_C, d_start


def _step_size(delta, delta_bias, delta_softplus):
    """Returns dt (batch, length, channels) in float32."""
    dt = delta.astype(jnp.float32)
    if delta_bias is not None:
        dt = dt + delta_bias.astype(jnp.float32)
    return _softplus(dt) if delta_softplus else dt


def _softplus(v):
    """Returns log(1 + e^v), accurate to float32 rounding on both tails.

    log1p is the odd series 2 (s + s^3/3 + ...) in s = e / (e + 2) <= 1/3, e = exp(-|v|): unlike
    the library's log1p it vectorises.
    """
    e = jnp.exp(-jnp.abs(v))
    s = e / (e + 2)
    square = s * s
    series = jnp.full_like(s, 2 / 13)
    for k in (11, 9, 7, 5, 3, 1):
        series = series * square + 2 / k
    return jnp.maximum(v, 0) + series * s


def _choose_exp2(state_size):
    """Returns the faster of two functions that compute 2^v for a state of this many numbers."""
    if state_size >= SPLIT_STATE:
        return _exp2_polynomial
    return lambda v: jnp.exp(v * LN_2)


def _exp2_polynomial(v):
    """Returns 2^v: a polynomial for the part in [-1/2, 1/2], the rest added to the exponent.

    Rounding by adding 1.5 * 2^23 is no way out of the conversion: XLA folds (v + c) - c into v.
    """
    # At the two bounds the exponent's bits are all zero (the result is 0) and all one (infinity).
    v = lax.clamp(jnp.float32(-127), v, jnp.float32(128))
    whole = lax.round(v, lax.RoundingMethod.TO_NEAREST_EVEN)
    part = v - whole
    power = jnp.full_like(part, EXP2_TAYLOR[0])
    for coefficient in EXP2_TAYLOR[1:]:
        power = power * part + coefficient
    bits = lax.bitcast_convert_type(power, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _log2_decay(A):
    """Returns A (channels, state) as (state, channels) times log2(e): exp(dt A) = 2^(dt out)."""
    return A.astype(jnp.float32).T * LOG2_E


def _chunk_length(length, states):
    return min(length, max(CHUNK, states))


def _empty(shape, like):
    """Returns a float32 buffer for a loop to fill, varying over mesh axes as `like` does."""
    return vary_alike(lax.empty(shape, jnp.float32), like)[0]


def _token(values, t):
    """Returns token t of (batch, length, width) as (batch, width) float32.

    The conversion happens here, token by token, so that half precision inputs need no float32 copy.
    """
    token = lax.dynamic_index_in_dim(values, t, 1, keepdims=False, allow_negative_indices=False)
    return token.astype(jnp.float32)


def _put(values, item, index, axis):
    """Writes `item` at `index` of `axis`; in place inside a loop."""
    start = [0] * values.ndim
    start[axis] = index
    item = jnp.expand_dims(item, axis)
    return lax.dynamic_update_slice(values, item, start, allow_negative_indices=False)


def _outer(over_states, over_channels):
    """(batch, state), (batch, channels) -> (batch, state, channels)."""
    return over_states[:, :, None] * over_channels[:, None, :]


def _sum_states(h, weights):
    """sum_n h[b, n, d] weights[b, n], one multiply-add per state."""
    total = h[:, 0] * weights[:, :1]
    for n in range(1, h.shape[1]):
        total = total + h[:, n] * weights[:, n : n + 1]
    return total


def _sum_channels(h, weights):
    """sum_d h[b, n, d] weights[b, d]."""
    return jnp.einsum("bnd,bd->bn", h, weights, precision=lax.Precision.HIGHEST)
