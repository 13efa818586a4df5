"""Model presets, and `init`: the only place that knows how NNX modules become plain parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from stretchysnake_jax.config import ConfigError, ModelConfig, nearest
from stretchysnake_jax.models.videomamba import VideoMamba, normalise

__all__ = ["PRESETS", "count", "init", "make_apply", "normalise", "preset"]

# tiny, small, middle and base are the published VideoMamba models; micro is the demo's.
PRESETS = {
    "micro": {
        "dim": 64,
        "depth": 4,
        "state": 8,
        "patch": (8, 8),
        "size": (56, 56),
        "pooling": "mean",
        "dt_init": "mamba",
        "linear_init_std": None,
        "pos_init_std": 0.5,
        "temporal_init_std": 0.5,
        "normalise": "clip",
    },
    "tiny": {"dim": 192, "depth": 24},
    "small": {"dim": 384, "depth": 24},
    "middle": {"dim": 576, "depth": 32},
    "base": {"dim": 768, "depth": 24, "frames": None, "num_classes": 1000},  # images only
}


def preset(name: str, **changes) -> ModelConfig:
    """The configuration of a preset, with fields changed.

    Raises:
      ConfigError: an unknown preset or field.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}: {nearest(name, PRESETS)}")
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    for field in changes:
        if field not in fields:
            raise ConfigError(f"unknown field model.{field}: {nearest(field, fields)}")
    return ModelConfig(**{**PRESETS[name], **changes})


def _build(config: ModelConfig, dtype, key) -> VideoMamba:
    return VideoMamba(config, dtype, nnx.Rngs(params=key))


def make_apply(config: ModelConfig, dtype: str = "float32"):
    """The encoder as a pure function of plain parameters.

    Args:
      config: the encoder.
      dtype: of the computation, "float32" or "bfloat16".

    Returns:
      apply(params, video, key=None, output="logits"), see `VideoMamba.__call__`. `params` may be
      interpolated to another scale.
    """
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: _build(config, jnp.dtype(dtype), jax.random.key(0)))
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

    @functools.partial(jax.jit, static_argnums=())
    def draw(key):
        return nnx.to_pure_dict(nnx.state(_build(config, jnp.float32, key), nnx.Param))

    return make_apply(config, dtype), draw(key)


def count(params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
