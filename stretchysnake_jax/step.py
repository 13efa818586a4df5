"""The training step and the evaluation step: normalise, interpolate, encode, loss, update.

The interpolation is outside the encoder and inside the loss, so gradients reach the base
parameters. The bucket is a static argument: one compilation per bucket, none when a bucket returns.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import optax

from stretchysnake_jax import models, optim
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import Config, ModelConfig, StretchConfig
from stretchysnake_jax.interpolation import interpolate


def fit(params: dict, bucket: Bucket, stretch: StretchConfig) -> dict:
    """The parameters interpolated to a bucket with the methods of `stretch`."""
    return interpolate(
        params,
        frames=bucket.frames,
        grid=bucket.grid,
        patch=bucket.patch,
        kernel=stretch.kernel_method,
        spatial=stretch.spatial_method,
        temporal=stretch.temporal_method,
    )


def cross_entropy(logits, labels, smoothing: float):
    """Cross entropy of each clip against labels with smoothing: (B, classes), (B,) -> (B,)."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def init_state(config: Config, steps: int):
    """A fresh training state: params, opt_state, and the number of steps done (int32)."""
    _, params = models.init(config.model, jax.random.key(config.train.seed))
    opt_state = optim.make_optimizer(config.optim, steps).init(params)
    return {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}


class TrainStep:
    """step(state, batch, bucket) -> (state, metrics), compiled once per bucket.

    Attributes:
      traces: how often each bucket was traced; 1 for every bucket that was met.
    """

    def __init__(self, config: Config, steps: int):
        self.traces = collections.Counter()
        apply = models.make_apply(config.model, config.train.dtype)
        optimizer = optim.make_optimizer(config.optim, steps)
        seed = config.train.seed

        def loss_fn(params, batch, key, bucket):
            video = models.normalise(batch["video"], config.model.normalise)
            logits = apply(fit(params, bucket, config.stretch), video, key)
            losses = cross_entropy(logits, batch["label"], config.optim.label_smoothing)
            # Unreadable clips have mask 0: they neither teach nor count.
            clips = jnp.maximum(batch["mask"].sum(), 1.0)
            correct = (logits.argmax(-1) == batch["label"]) * batch["mask"]
            return (losses * batch["mask"]).sum() / clips, correct.sum() / clips

        @functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
        def train_step(state, batch, bucket):
            self.traces[bucket] += 1  # runs while tracing only
            key = jax.random.fold_in(jax.random.key(seed), state["step"])
            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, top1), grads = grad_fn(state["params"], batch, key, bucket)
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            metrics = {"loss": loss, "top1": top1, "grad_norm": optax.tree.norm(grads)}
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

        self._step = train_step

    def __call__(self, state, batch: dict, bucket: Bucket):
        """One update.

        Args:
          state: see `init_state`; its buffers are donated.
          batch: video uint8 (B, T, H, W, 3), label int32 (B,), mask float32 (B,).
          bucket: the batch's scale.

        Returns:
          (state, metrics): metrics are scalars: loss, top1 (0 to 1) and grad_norm.
        """
        arrays = {name: batch[name] for name in ("video", "label", "mask")}
        return self._step(state, arrays, bucket)


def make_eval_step(model: ModelConfig, stretch: StretchConfig, dtype: str = "float32"):
    """predict(params, video uint8 (B, T, H, W, 3), bucket) -> logits (B, classes) float32."""
    apply = models.make_apply(model, dtype)

    @functools.partial(jax.jit, static_argnums=2)
    def eval_step(params, video, bucket):
        video = models.normalise(video, model.normalise)
        return apply(fit(params, bucket, stretch), video)

    return eval_step
