"""The selective scan as its definition, one step at a time: to read and to test against."""

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels import dispatch


def selective_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse):
    """Computes what `api.selective_scan` documents; the state is float32, or float64 for float64 x.

    Returns:
      y (batch, length, channels) in x's dtype, and the last state (batch, channels, state).
    """
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    out_dtype = x.dtype
    x, dt, A, B, C = (value.astype(accumulate) for value in (x, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.astype(accumulate)
    if delta_softplus:
        dt = jax.nn.softplus(dt)
    batch, _, channels = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, channels, A.shape[1]), accumulate)
        initial_state, _ = dispatch.vary_alike(initial_state, x)

    def step(state, token):
        x_t, dt_t, B_t, C_t = token  # (batch, channels) twice, (batch, state) twice
        decay = jnp.exp(dt_t[:, :, None] * A)
        state = decay * state + (dt_t * x_t)[:, :, None] * B_t[:, None, :]
        return state, jnp.sum(state * C_t[:, None, :], axis=-1)

    time_major = [jnp.moveaxis(value, 1, 0) for value in (x, dt, B, C)]
    last_state, y = lax.scan(step, initial_state.astype(accumulate), time_major, reverse=reverse)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + x * D.astype(accumulate)
    if z is not None:
        y = y * jax.nn.silu(z.astype(accumulate))
    return y.astype(out_dtype), last_state
