"""The optimiser: AdamW, its learning rate by step, batch and parameter, and the moving average.

The rate of an update is a product: the schedule's, times `batch_scale` of the step's batch, times
`layer_scales` of the parameter. Weight decay is multiplied by it too. The recipes, which say what
each of these is, are `config.OPTIM_RECIPES`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stretchysnake_jax.config import OptimConfig, resolve

# Blocks are stacked, so "1-D" is told by name: no decay on biases, norms, D, the class token and
# the position tables; A_log is decayed, as in VideoMamba's released training.
NOT_DECAYED = ("bias", "scale", "D", "cls_token", "cls", "grid", "temporal_pos_embed")
# What lies below the first block. The release's layer decay misses the temporal table.
EMBEDDINGS = ("patch_embed", "cls_token", "pos_embed", "temporal_pos_embed")


def decay_mask(params) -> dict:
    """True for every parameter that weight decay applies to; the structure of `params`."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def layer_scales(config: OptimConfig, params) -> dict:
    """The factors of layer decay on the learning rate, for a decay of r and K blocks.

    The embeddings have r^(K + 1), block i of 0..K-1 has r^(K - i), the final norm and the head 1
    (BEiT, arXiv 2106.08254). VideoMamba's release looks for the names of a ViT: with "published"
    the blocks and the temporal table have 1 too.

    Args:
      config: its layer decay.
      params: of an encoder, or their shapes.

    Returns:
      The structure of `params`: numbers, for the blocks' stacked parameters arrays (K, 1, ..., 1).
    """
    config = resolve(config)
    rate, published = config.layer_decay, config.layer_decay_form == "published"
    depth = jax.tree.leaves(params["layers"])[0].shape[0]

    def scale(path, x):
        top = path[0].key
        if top == "layers":
            steps = np.full(depth, 0) if published else depth - np.arange(depth)
            return (rate**steps).reshape(depth, *[1] * (x.ndim - 1))
        below = top in EMBEDDINGS and not (published and top == "temporal_pos_embed")
        return rate ** (depth + 1) if below else 1.0

    return jax.tree.map_with_path(scale, params)


def batch_scale(config: OptimConfig, batch_size):
    """The factor on the learning rate of a step with so many clips.

    Args:
      config: `scale_rate` and `base_batch`.
      batch_size: clips of the step, all hosts together, augmented copies counted; a number or an
        array.
    """
    config = resolve(config)
    power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[config.scale_rate]
    return (batch_size / config.base_batch) ** power


def make_schedule(config: OptimConfig, steps: int):
    """Learning rate by step: linear warm-up to the peak, then a half cosine to the final rate.

    With W steps of warm-up out of N and the schedule "cosine", step i of the warm-up has start +
    (peak - start) i / W. "videomamba" divides by W - 1, as the release does, so that steps W - 1
    and W have the peak both. From there step i has final + (peak - final) (1 + cos(pi (i - W) /
    (N - W))) / 2.

    Args:
      config: the rates, the share of warm-up and the schedule.
      steps: of the run.

    Returns:
      step (int, from 0) -> rate, before `batch_scale` and `layer_scales`.
    """
    config = resolve(config)
    peak, final = config.learning_rate, config.final_learning_rate
    start = final if config.warmup_learning_rate is None else config.warmup_learning_rate
    warmup = int(config.warmup * steps)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=start,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(steps, 1),
            end_value=final,
        )

    def rate(step):
        up = start + (peak - start) * step / max(warmup - 1, 1)
        # (1 + cos pi x) / 2 = sin(pi / 2 (1 - x))^2, which loses no digits near the end
        down = jnp.sin(jnp.pi / 2 * (steps - step) / max(steps - warmup, 1)) ** 2
        return jnp.where(step < warmup, up, final + (peak - final) * down)

    return rate


def _scale_by_layer(config: OptimConfig) -> optax.GradientTransformation:
    def scale(updates, params):
        del params
        scales = layer_scales(config, updates)
        return jax.tree.map(lambda u, s: u * jnp.asarray(s, u.dtype), updates, scales)

    return optax.stateless(scale)


def _scale_by_batch() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, rate_scale, **_):
        return jax.tree.map(lambda u: u * rate_scale, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW for a run of `steps` steps.

    Its `update` takes `rate_scale`, the `batch_scale` of the step, as a keyword: it has to be given
    unless `scale_rate` is "none", where it is left aside.
    """
    config = resolve(config)
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(adamw)
    if config.layer_decay != 1:
        parts.append(_scale_by_layer(config))
    if config.scale_rate != "none":
        parts.append(_scale_by_batch())
    return optax.chain(*parts) if len(parts) > 1 else adamw


def update_ema(ema, params, decay: float, step):
    """The moving average of the parameters after one more update.

    d ema + (1 - d) params with d = min(decay, (1 + step) / (10 + step)), as TensorFlow's
    ExponentialMovingAverage counts: the initial weights are soon forgotten.

    Args:
      ema: the average so far, the structure of `params`; the initial parameters before step 0.
      params: after the update.
      decay: `optim.ema`.
      step: of the update, from 0; may be traced.

    Returns:
      The new average.
    """
    share = jnp.maximum(1 - decay, 9 / (10 + step))  # 1 - d
    return jax.tree.map(lambda e, p: e + share.astype(e.dtype) * (p - e), ema, params)
