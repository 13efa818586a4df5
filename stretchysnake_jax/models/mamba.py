"""The bidirectional Mamba-1 mixer of VideoMamba ("bimamba v2" of Vim).

Both directions share the input and output projections; each has its own convolution, step-size and
scan parameters. The backward direction needs no flipped copy: an anti-causal convolution and a scan
that walks from the end give the same numbers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from stretchysnake_kernels import bidirectional_causal_conv1d, bidirectional_selective_scan
from stretchysnake_kernels.causal_conv1d.sharded import sequence_parallel_causal_conv1d
from stretchysnake_kernels.selective_scan.sharded import sequence_parallel_selective_scan

from stretchysnake_jax.config import ModelConfig
from stretchysnake_jax.sharding import TOKENS, WHOLE


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

    def weights(self) -> dict:
        """The parameters as plain arrays, A as the scan takes it."""
        return {
            "conv_kernel": self.conv.kernel[...],
            "conv_bias": self.conv.bias[...],
            "x_proj": self.x_proj.kernel[...],
            "dt_proj": self.dt_proj.kernel[...],
            "dt_bias": self.dt_proj.bias[...],
            "A": -jnp.exp(self.A_log[...]),
            "D": self.D[...],
        }


def step_sizes(x, weights: dict):
    """The scan's inputs that depend on the tokens.

    Args:
      x: (2, batch, length, channels), what the convolutions of both directions gave.
      weights: of both directions, stacked.

    Returns:
      (delta, B, C): (2, batch, length, channels) before its bias, and twice (2, batch, length,
      state).
    """
    rank, state = weights["dt_proj"].shape[1], weights["A"].shape[-1]
    projected = jnp.einsum("gblc,gcr->gblr", x, weights["x_proj"].astype(x.dtype))
    dt, B, C = jnp.split(projected, (rank, rank + state), axis=-1)
    return jnp.einsum("gblr,grc->gblc", dt, weights["dt_proj"].astype(x.dtype)), B, C


def mix_tokens(x, z, weights: dict):
    """Convolution, step sizes and scan of both directions, summed.

    Args:
      x, z: (batch, length, channels), the halves of the input projection.
      weights: see `Direction.weights`, both directions stacked along a leading axis.

    Returns:
      (batch, length, channels).
    """
    kernel, bias = weights["conv_kernel"], weights["conv_bias"]
    x = bidirectional_causal_conv1d(x, kernel, bias, activation="silu")
    delta, B, C = step_sizes(x, weights)
    A, D, dt_bias = weights["A"], weights["D"], weights["dt_bias"]
    return bidirectional_selective_scan(x, delta, A, B, C, D, z, dt_bias, delta_softplus=True)


def mix_sharded_tokens(x, z, weights: dict, *, length: int):
    """`mix_tokens` inside `jax.shard_map`, the tokens spread over the mesh axis "sequence".

    Args:
      x, z, weights: as of `mix_tokens`; x and z are this device's tokens.
      length: of the whole sequence; what pads it to a multiple of the devices comes after it.
    """

    def one(direction):
        return jax.tree.map(lambda weight: weight[direction], weights)

    x = jnp.stack(
        [
            sequence_parallel_causal_conv1d(
                x,
                one(direction)["conv_kernel"],
                one(direction)["conv_bias"],
                activation="silu",
                axis_name="sequence",
                reverse=bool(direction),
            )
            for direction in (0, 1)
        ]
    )
    # Padding is zero before and after a block but for the convolution's bias, which must not reach
    # the backward scan: that one walks the padding first.
    place = lax.axis_index("sequence") * x.shape[2] + jnp.arange(x.shape[2])
    x = jnp.where((place < length)[:, None], x, jnp.zeros((), x.dtype))
    delta, B, C = step_sizes(x, weights)
    y = 0
    for direction in (0, 1):
        weight = one(direction)
        y += sequence_parallel_selective_scan(
            x[direction],
            delta[direction],
            weight["A"],
            B[direction],
            C[direction],
            weight["D"],
            z,
            weight["dt_bias"],
            delta_softplus=True,
            axis_name="sequence",
            reverse=bool(direction),
        )
    return y


class BidirectionalMixer(nnx.Module):
    """in_proj -> (forward + backward direction) -> out_proj; the directions are summed, not
    averaged."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        inner = config.inner
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

    def __call__(self, u, mesh=None, length: int | None = None):
        """Mixes tokens.

        Args:
          u: (batch, length, dim).
          mesh: the devices that batch and tokens are spread over; None: one device.
          length: tokens that count where the tokens are spread; what comes after is padding, zero.

        Returns:
          (batch, length, dim).
        """
        x, z = jnp.split(self.in_proj(u), 2, axis=-1)
        both = (direction.weights() for direction in (self.forward, self.backward))
        weights = jax.tree.map(lambda *pair: jnp.stack(pair), *both)
        mix = mix_tokens
        if mesh is not None:
            # Kernels of our own can't be cut up by XLA, so each device calls them on its part.
            if mesh.shape["sequence"] > 1:
                mix = functools.partial(mix_sharded_tokens, length=length)
            specs = (TOKENS, TOKENS, WHOLE)
            mix = jax.shard_map(mix, mesh=mesh, in_specs=specs, out_specs=TOKENS)
        return self.out_proj(mix(x, z, weights))
