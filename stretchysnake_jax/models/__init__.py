"""`init` and `make_apply`: the only place that knows how NNX modules become plain parameters."""

import jax
import jax.numpy as jnp
from flax import nnx

from stretchysnake_jax.config import PRESETS, ModelConfig, preset
from stretchysnake_jax.models.videomamba import VideoMamba, normalise

__all__ = ["PRESETS", "count", "init", "make_apply", "normalise", "preset"]


def _build(config: ModelConfig, dtype, key, **options) -> VideoMamba:
    return VideoMamba(config, dtype, nnx.Rngs(params=key), **options)


def make_apply(
    config: ModelConfig,
    dtype: str = "float32",
    mesh=None,
    remat: str = "none",
    layers: str = "auto",
):
    """The encoder as a pure function of plain parameters.

    Args:
      config: the encoder.
      dtype: of the computation, "float32" or "bfloat16".
      mesh: the devices that batch and tokens are spread over, see `sharding`; None: one device.
      remat: what the gradient computes again instead of keeping it, one of `config.REMAT`.
      layers: how the compiled program runs the blocks, one of `config.LAYERS`.

    Returns:
      apply(params, video, key=None, output="logits"), see `VideoMamba.__call__`. `params` may be
      interpolated to another scale.
    """
    graph, _ = nnx.split(
        nnx.eval_shape(
            lambda: _build(
                config,
                jnp.dtype(dtype),
                jax.random.key(0),
                mesh=mesh,
                remat=remat,
                layers=layers,
            )
        )
    )

    def apply(params, video, key=None, output="logits"):
        return nnx.merge(graph, nnx.State(params))(video, key, output)

    return apply


def init(config: ModelConfig, key, dtype: str = "float32"):
    """Makes an encoder.

    Args:
      config: the encoder.
      key: a jax.random key for the initial weights.
      dtype: of the computation.

    Returns:
      (apply, params): see `make_apply`; params are nested dicts of float32 arrays, the blocks'
      stacked along a leading axis.
    """

    @jax.jit
    def draw(key):
        return nnx.to_pure_dict(nnx.state(_build(config, jnp.float32, key), nnx.Param))

    return make_apply(config, dtype), draw(key)


def count(params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
