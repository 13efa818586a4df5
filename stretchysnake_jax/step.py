"""The training step and the evaluation step: normalise, interpolate, encode, loss, update.

The interpolation is outside the encoder and inside the loss, so gradients reach the base
parameters.

Execution plan: the patch kernel isn't resized to the video's patches; the video's patches are
projected onto the base kernel with the adjoint (`interpolation.project_pixels`), which gives the
same tokens. A step is then two compiled functions: a small stem per bucket, and a trunk per
(frames, grid), so static_tokens compiles one trunk per frame count and any resolution reuses it.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import optax

from stretchysnake_jax import mix, models, optim
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import Config, ModelConfig, StretchConfig
from stretchysnake_jax.interpolation import interpolate, project_pixels


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


class Stem:
    """stem(video, bucket) -> (projected video, its bucket): normalises, projects onto base patches.

    Attributes:
      traces: how often each bucket was traced.
    """

    def __init__(self, model: ModelConfig, stretch: StretchConfig):
        self.traces = collections.Counter()
        self._base = model.patch

        @functools.partial(jax.jit, static_argnums=1)
        def project(video, bucket):
            self.traces[bucket] += 1  # runs while tracing only
            video = models.normalise(video, model.normalise)
            return project_pixels(video, bucket.patch, model.patch, stretch.kernel_method)

        self._project = project

    def projected(self, bucket: Bucket) -> Bucket:
        """The bucket of base patches that a bucket's videos are projected to."""
        rows, columns = bucket.grid
        return Bucket(bucket.frames, rows * self._base[0], columns * self._base[1], self._base)

    def __call__(self, video, bucket: Bucket):
        """Projects uint8 (B, T, H, W, 3) to float32 (B, T, rows * base, columns * base, 3)."""
        return self._project(video, bucket), self.projected(bucket)


def cross_entropy(logits, labels, smoothing: float, weight=None):
    """Cross entropy of each clip against labels with smoothing.

    Args:
      logits: (B, classes).
      labels: int (B,).
      smoothing: share of the target that is spread over all classes.
      weight: of the clip's own label if clips are mixed, float (B,), see `mix`; None: 1.

    Returns:
      (B,).
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    if weight is not None:
        targets = mix.mixed_targets(targets, weight)
    return optax.softmax_cross_entropy(logits, targets)


def init_state(config: Config, steps: int):
    """A fresh training state: params, opt_state, and the number of steps done (int32)."""
    _, params = models.init(config.model, jax.random.key(config.train.seed))
    opt_state = optim.make_optimizer(config.optim, steps).init(params)
    return {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}


class TrainStep:
    """step(state, batch, bucket) -> (state, metrics), compiled once per bucket.

    Attributes:
      mixer: mixes clips before anything else, see `mix`; None: off.
      stem: the `Stem`.
      trunk: trunk(state, batch with projected video, projected bucket), what `step` does after it.
      traces: how often the trunk was traced for each projected bucket; 1 for all that were met.
    """

    def __init__(self, config: Config, steps: int):
        self.mixer = mix.make_mixer(config.data, config.train.seed)
        self.stem = Stem(config.model, config.stretch)
        self.traces = collections.Counter()
        apply = models.make_apply(config.model, config.train.dtype)
        optimizer = optim.make_optimizer(config.optim, steps)
        seed = config.train.seed

        def loss_fn(params, batch, key, bucket):
            logits = apply(fit(params, bucket, config.stretch), batch["video"], key)
            smoothing, weight = config.optim.label_smoothing, batch.get("weight")
            losses = cross_entropy(logits, batch["label"], smoothing, weight)
            # Unreadable clips have mask 0: they neither teach nor count.
            clips = jnp.maximum(batch["mask"].sum(), 1.0)
            correct = (logits.argmax(-1) == batch["label"]) * batch["mask"]
            return (losses * batch["mask"]).sum() / clips, correct.sum() / clips

        @functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
        def train_step(state, batch, bucket):
            self.traces[bucket] += 1
            key = jax.random.fold_in(jax.random.key(seed), state["step"])
            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, top1), grads = grad_fn(state["params"], batch, key, bucket)
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            metrics = {"loss": loss, "top1": top1, "grad_norm": optax.tree.norm(grads)}
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

        self.trunk = train_step

    @property
    def compilations(self) -> int:
        """Compiled functions so far: mixers, stems and trunks."""
        mixers = self.mixer.traces.values() if self.mixer else ()
        return sum(mixers) + sum(self.stem.traces.values()) + sum(self.traces.values())

    def __call__(self, state, batch: dict, bucket: Bucket):
        """One update.

        Args:
          state: see `init_state`; its buffers are donated.
          batch: video uint8 (B, T, H, W, 3), label int32 (B,), mask float32 (B,).
          bucket: the batch's scale.

        Returns:
          (state, metrics): metrics are scalars: loss, top1 (0 to 1, by the clips' own labels, mixed
          or not) and grad_norm.
        """
        video = batch["video"]
        arrays = {"label": batch["label"], "mask": batch["mask"]}
        if self.mixer:
            video, arrays["weight"] = self.mixer(video, batch["mask"], state["step"])
        arrays["video"], bucket = self.stem(video, bucket)
        return self.trunk(state, arrays, bucket)


def make_eval_step(model: ModelConfig, stretch: StretchConfig, dtype: str = "float32"):
    """predict(params, video uint8 (B, T, H, W, 3), bucket) -> logits (B, classes) float32."""
    apply = models.make_apply(model, dtype)
    stem = Stem(model, stretch)

    @functools.partial(jax.jit, static_argnums=2)
    def trunk(params, video, bucket):
        return apply(fit(params, bucket, stretch), video)

    def eval_step(params, video, bucket):
        return trunk(params, *stem(video, bucket))

    return eval_step
