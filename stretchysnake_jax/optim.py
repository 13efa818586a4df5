"""The optimiser: AdamW with warm-up and cosine decay, and which parameters are decayed."""

import jax
import optax

from stretchysnake_jax.config import OptimConfig

# Blocks are stacked, so "1-D" is told by name: no decay on biases, norms, D, the class token and
# the position tables; A_log is decayed, as in VideoMamba's released training.
NOT_DECAYED = ("bias", "scale", "D", "cls_token", "cls", "grid", "temporal_pos_embed")


def decay_mask(params) -> dict:
    """True for every parameter that weight decay applies to; the structure of `params`."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def make_schedule(config: OptimConfig, steps: int):
    """Learning rate by step: linear warm-up to the peak, then a half cosine to the final rate."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.final_learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=int(config.warmup * steps),
        decay_steps=max(steps, 1),
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW for a run of `steps` steps."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
