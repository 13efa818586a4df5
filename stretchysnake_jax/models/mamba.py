"""The bidirectional Mamba-1 mixer of VideoMamba ("bimamba v2" of Vim).

Both directions share the input and output projections; each has its own convolution, step-size and
scan parameters. The backward direction needs no flipped copy: an anti-causal convolution and a scan
that walks from the end give the same numbers.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from stretchysnake_kernels import bidirectional_causal_conv1d, bidirectional_selective_scan

from stretchysnake_jax.config import ModelConfig


def uniform(bound: float):
    """An initialiser: uniform between -bound and bound."""

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw


def linear(inputs: int, outputs: int, std: float | None, dtype, rngs, bias=False) -> nnx.Linear:
    """A projection with weights N(0, std), or uniform within 1 / sqrt(inputs) if std is None."""
    kernel_init = uniform(inputs**-0.5) if std is None else jax.nn.initializers.normal(std)
    return nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=kernel_init, rngs=rngs
    )


def dt_bias(key, shape, dtype=jnp.float32):
    """Mamba's step-size bias: softplus(bias) is log-uniform in 1e-3 to 0.1, at least 1e-4."""
    low, high = jnp.log(1e-3), jnp.log(0.1)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus


class Conv(nnx.Module):
    """Parameters of a depthwise convolution: kernel (width, channels) and bias (channels,)."""

    def __init__(self, width: int, channels: int, rngs: nnx.Rngs):
        draw = uniform(width**-0.5)
        self.kernel = nnx.Param(draw(rngs.params(), (width, channels)))
        self.bias = nnx.Param(draw(rngs.params(), (channels,)))


class Direction(nnx.Module):
    """Parameters of one direction: convolution, step size and scan."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        inner, state, rank = config.inner, config.state, config.rank
        std = config.linear_init_std
        self.conv = Conv(config.conv_width, inner, rngs)
        self.x_proj = linear(inner, rank + 2 * state, std, dtype, rngs)
        if config.dt_init == "mamba":
            self.dt_proj = linear(rank, inner, None, dtype, rngs, bias=True)
            self.dt_proj.bias = nnx.Param(dt_bias(rngs.params(), (inner,)))
        else:
            # The release's general initialisation runs after Mamba's and sets this bias to 0.
            self.dt_proj = linear(rank, inner, std, dtype, rngs, bias=True)
        steps = jnp.arange(1, state + 1, dtype=jnp.float32)
        self.A_log = nnx.Param(jnp.log(jnp.broadcast_to(steps, (inner, state))))
        self.D = nnx.Param(jnp.ones((inner,)))


class BidirectionalMixer(nnx.Module):
    """in_proj -> (forward + backward direction) -> out_proj; the directions are summed, not
    averaged."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        inner = config.inner
        self.rank, self.state = config.rank, config.state
        self.in_proj = linear(config.dim, 2 * inner, config.linear_init_std, dtype, rngs)
        self.forward = Direction(config, dtype, rngs)
        self.backward = Direction(config, dtype, rngs)
        self.out_proj = nnx.Linear(
            inner,
            config.dim,
            use_bias=False,
            dtype=dtype,
            kernel_init=uniform((inner * config.depth) ** -0.5),
            rngs=rngs,
        )

    def __call__(self, u):
        """Mixes tokens (B, L, dim) -> (B, L, dim)."""
        x, z = jnp.split(self.in_proj(u), 2, axis=-1)

        def both(parameter):  # of the two directions, one behind the other
            return jnp.stack([parameter(self.forward), parameter(self.backward)])

        x = bidirectional_causal_conv1d(
            x,
            both(lambda direction: direction.conv.kernel[...]),
            both(lambda direction: direction.conv.bias[...]),
            activation="silu",
        )
        x_proj = both(lambda direction: direction.x_proj.kernel[...]).astype(x.dtype)
        dt, B, C = jnp.split(
            jnp.einsum("gblc,gcr->gblr", x, x_proj), (self.rank, self.rank + self.state), axis=-1
        )
        dt_proj = both(lambda direction: direction.dt_proj.kernel[...]).astype(x.dtype)
        y = bidirectional_selective_scan(
            x,
            jnp.einsum("gblr,grc->gblc", dt, dt_proj),  # its bias joins inside the scan
            -jnp.exp(both(lambda direction: direction.A_log[...])),
            B,
            C,
            both(lambda direction: direction.D[...]),
            z,
            both(lambda direction: direction.dt_proj.bias[...]),
            delta_softplus=True,
        )
        return self.out_proj(y)
