"""The causal convolution with its tokens spread over devices, for use inside `jax.shard_map`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels import dispatch
from stretchysnake_kernels.causal_conv1d.api import causal_conv1d


def sequence_parallel_causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis_name: str,
    activation: str | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Runs `causal_conv1d` over a length that is sharded over a mesh axis.

    For the body of a `jax.shard_map`: shard k of the axis holds the k-th stretch of the tokens. The
    values and gradients are those of `causal_conv1d` on the whole length. Each shard gets the
    width - 1 tokens that its kernel sees beyond its edge from its neighbour, or from several where
    a shard is shorter than that.

    Args:
      x: (batch, length, channels), this shard's tokens, otherwise as for `causal_conv1d`.
      weight: (width, channels), as for `causal_conv1d`, the same on every shard of the axis.
      bias: (channels,), as for `causal_conv1d`, the same on every shard of the axis.
      axis_name: the mesh axis that shards the length.
      activation: None or "silu".
      reverse: look at the current and the future tokens instead.
      implementation: as for `causal_conv1d`.

    Returns:
      (batch, length, channels) of this shard's tokens in x's dtype.

    Raises:
      ValueError: `axis_name` is no axis of a `jax.shard_map` around the call.
      TypeError, ValueError, dispatch.Unsupported: as `causal_conv1d`, in its words.
    """
    shards = dispatch.axis_size("sequence_parallel_causal_conv1d", axis_name)

    def convolve(x, weight, bias):
        return causal_conv1d(
            x,
            weight,
            bias,
            activation=activation,
            reverse=reverse,
            implementation=implementation,
        )

    # Refuses what the convolution would refuse, before anything here is computed from it.
    jax.eval_shape(convolve, x, weight, bias)
    length, halo = x.shape[1], weight.shape[0] - 1
    if shards == 1 or halo == 0:
        return convolve(x, weight, bias)
    pieces, missing, hops = [x], halo, 1
    while missing > 0:
        size = min(length, missing)
        edge = x[:, :size] if reverse else x[:, length - size :]
        # A shard that nobody sends to receives the zeros that lie beyond the first token.
        pairs = [(k + hops, k) if reverse else (k, k + hops) for k in range(shards - hops)]
        piece = lax.ppermute(edge, axis_name, pairs)
        pieces = [*pieces, piece] if reverse else [piece, *pieces]
        missing, hops = missing - size, hops + 1
    y = convolve(jnp.concatenate(pieces, axis=1), weight, bias)
    return y[:, :length] if reverse else y[:, halo:]
