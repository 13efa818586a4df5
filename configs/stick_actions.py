"""The demo: a micro model on Stick Actions-10, rendered under runs/data on first use.

    stretchysnake train --config configs/stick_actions.py --workdir runs/stick
    stretchysnake train --config configs/stick_actions.py:debug --workdir runs/debug   # seconds
    stretchysnake train --config configs/stick_actions.py:attention --workdir runs/vit

Clips are 2, 4 or 8 frames spread evenly over the video and 28, 56 or 112 pixels square; the token
grid stays 7x7. `--config.stretch.variant=vanilla` trains on 4 frames at 56 pixels alone. The
argument "attention" is the transformer of equal size: 3 ViT blocks instead of 4 Mamba blocks.
"""

from stretchysnake_jax.config import (
    Config,
    DataConfig,
    OptimConfig,
    StickActionsConfig,
    StretchConfig,
    TrainConfig,
    attention_twin,
    preset,
)


def get_config(arg: str = "") -> Config:
    """`arg` is "", "debug" or "attention"."""
    config = Config(
        name="stick_actions",
        model=preset("micro", frames=4, num_classes=10),
        stretch=StretchConfig(
            variant="static_tokens",
            frames=(2, 4, 8),
            sizes=(28, 56, 112),
            flexivit_size=56,
            patches=(4, 7, 8, 14, 28),
            # From scratch, a kernel whose tokens keep their size learns twice as fast.
            kernel_method="area",
            short_first=0.45,
        ),
        data=DataConfig(
            stick_actions=StickActionsConfig(path="runs/data/stick_actions"),
            batch_size=8,
            crop_scale=0.85,
            threads=2,
        ),
        optim=OptimConfig(
            learning_rate=2e-3, final_learning_rate=4e-5, b2=0.98, clip_norm=1.0, warmup=0.05
        ),
        train=TrainConfig(steps=2100, log_every=20, checkpoint_every=500),
    )
    if arg == "debug":
        config.data.stick_actions = StickActionsConfig(
            path="runs/data/stick_actions_debug",
            train_subjects=2,
            val_subjects=1,
            test_subjects=1,
            takes=1,
        )
        config.stretch.frames = (2,)  # one frame count, one trunk to compile
        config.train.steps = 6
        config.train.log_every = 1
    elif arg == "attention":
        config.name, config.model = "stick_actions_attention", attention_twin(config.model)
        config.model.heads = 4  # ViT's 64 channels a head would leave one
    elif arg:
        raise ValueError(
            f"unknown argument {arg!r} of configs/stick_actions.py: it takes debug or attention"
        )
    return config
