"""Mixup and cutmix on the device: every clip is mixed with its partner, the batch in reverse.

As VideoMamba and timm do it in their batch mode: one weight, and for cutmix one box, for the whole
batch and all frames.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from stretchysnake_jax.config import DataConfig, resolve
from stretchysnake_jax.sharding import BATCH

CUTMIX_SHARE = 0.5  # chance of cutmix where both are on
_STREAM = 0x6D6978  # keeps these draws apart from those of the encoder


def cutmix_box(lam, row, column, height: int, width: int):
    """The box that the partner fills, and the weight that it leaves.

    Args:
      lam: the weight drawn, 0..1; the box has 1 - lam of the area before it is cut at the edges.
      row, column: its centre.
      height, width: of the frames, pixels.

    Returns:
      ((top, bottom, left, right), lam corrected to the area that is left), scalars.
    """
    side = jnp.sqrt(1 - lam)
    edges = []
    for centre, length in ((row, height), (column, width)):
        half = (length * side).astype(jnp.int32) // 2
        edges += [jnp.clip(centre - half, 0, length), jnp.clip(centre + half, 0, length)]
    top, bottom, left, right = edges
    return tuple(edges), 1 - (bottom - top) * (right - left) / (height * width)


def draw(key, mixup: float, cutmix: float, height: int, width: int):
    """Draws how a batch is mixed.

    Args:
      key: of the step.
      mixup, cutmix: alphas of the Beta(alpha, alpha) that the weight comes from; 0: off.
      height, width: of the frames, pixels.

    Returns:
      (weight of a clip's own pixels, float32 (height, width); of its own label, a scalar).
    """
    coin, beta, row, column = jax.random.split(key, 4)
    share = CUTMIX_SHARE if mixup and cutmix else float(bool(cutmix))
    boxed = jax.random.uniform(coin) < share
    alpha = jnp.where(boxed, cutmix or 1.0, mixup or 1.0)
    lam = jax.random.beta(beta, alpha, alpha)
    centre = jax.random.randint(row, (), 0, height), jax.random.randint(column, (), 0, width)
    (top, bottom, left, right), corrected = cutmix_box(lam, *centre, height, width)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    pixels = jnp.where(boxed, jnp.where(inside, 0.0, 1.0), lam)
    return pixels, jnp.where(boxed, corrected, lam)


class Mixer:
    """mixer(video, mask, step) -> (video, weight), compiled once per shape.

    A clip whose partner was unreadable stays as it is, with weight 1.

    Attributes:
      function: what it calls, jitted.
      traces: how often each shape was traced.
    """

    def __init__(self, data: DataConfig, seed: int, mesh=None):
        self.traces = collections.Counter()
        data = resolve(data)
        spread = {"out_shardings": NamedSharding(mesh, BATCH)} if mesh else {}

        @functools.partial(jax.jit, **spread)
        def mixer(video, mask, step):
            self.traces[video.shape] += 1  # runs while tracing only
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)
            pixels, weight = draw(key, data.mixup, data.cutmix, *video.shape[2:4])
            alone = mask[::-1] == 0
            pixels = jnp.where(alone[:, None, None], 1.0, pixels)[:, None, :, :, None]
            own, partner = video.astype(jnp.float32), video[::-1].astype(jnp.float32)
            mixed = partner + pixels * (own - partner)
            # Back to bytes: half a grey level is lost, and the rest of the step stays as it is.
            return jnp.round(mixed).astype(jnp.uint8), jnp.where(alone, 1.0, weight)

        self.function = mixer

    def __call__(self, video, mask, step):
        """Mixes a batch.

        Args:
          video: uint8 (B, T, H, W, 3).
          mask: float32 (B,), 0 where the clip was unreadable.
          step: int, keys the draws.

        Returns:
          (mixed video, uint8; weight of every clip's own label, float32 (B,), the partner's label
          has the rest).
        """
        return self.function(video, mask, step)


def make_mixer(data: DataConfig, seed: int, mesh=None) -> Mixer | None:
    """The mixer of a run, or None if mixup and cutmix are off."""
    data = resolve(data)
    return Mixer(data, seed, mesh) if data.mixup or data.cutmix else None


def mixed_targets(targets, weight):
    """Targets of mixed clips: weight of the own ones, the rest of the partner's, (B, classes)."""
    return weight[:, None] * targets + (1 - weight[:, None]) * targets[::-1]
