"""Kinetics-400 with VideoMamba-Middle, the StretchySnake paper's recipe; any of the five variants.

    stretchysnake train --config configs/k400.py --workdir runs/k400 \
        --config.data.train=k400/train.txt --config.data.val=k400/val.txt \
        --config.train.init_from=videomamba_m16_k400_mask_pt_f8_res224.npz
    ... --config configs/k400.py:flex_all ...

The argument is the variant (static_tokens unless given), or debug. Clips are whole videos, sampled
evenly and squashed to a square, without flips or crops, as in the release; batch sizes are its own
per GPU. The paper starts from masked pretraining (`stretchysnake convert FILE.pth FILE.npz
--num-classes 400`) and trains 12 epochs; vanilla VideoMamba trains 50.

`--config.data.recipe=videomamba` takes VideoMamba's augmentation instead (docs/data.md): two copies
of each clip in a batch, so an even batch size, and mixup and cutmix. The release leaves these two
on by default, as `--config.data.mixup=0.8 --config.data.cutmix=1.0` does without the rest.

The release's optimiser file isn't public: its layer decay of 0.75 is taken to act as in VideoMamba,
which it builds on. Patch embedding, class token and spatial table then learn at 0.75^33 = 8e-5 of
the rate, so they all but stand still; `--config.optim.layer_decay=1` lets them go.
configs/finetune.py has VideoMamba's own runs.
"""

from stretchysnake_jax.config import (
    Config,
    DataConfig,
    OptimConfig,
    StretchConfig,
    TrainConfig,
    preset,
)

BATCH_SIZE = {
    "vanilla": 8,
    "temporal": 8,
    "spatial": 2,
    "flexivit": 3,
    "flex_all": 2,
    "static_tokens": 4,
}


def get_config(arg: str = "static_tokens") -> Config:
    """`arg` is a variant or "debug"."""
    variant = "static_tokens" if arg in ("", "debug") else arg
    if variant not in BATCH_SIZE:
        raise ValueError(f"unknown argument {arg!r}: it takes debug, {', '.join(BATCH_SIZE)}")
    config = Config(
        name=f"k400 {variant}",
        model=preset("middle", frames=64, num_classes=400, drop_path=0.4),
        stretch=StretchConfig(variant=variant, frames=(8, 16, 32, 64)),
        data=DataConfig(
            train="k400/train.txt",
            val="k400/val.txt",
            batch_size=BATCH_SIZE[variant],
            recipe="plain",
            threads=8,
            prefetch=8,
        ),
        # Peak 1e-3 times clips / 128, 1e-6 likewise at both ends, 5 epochs of warm-up, and layer
        # decay as VideoMamba's release has it; decay 0.05 and smoothing 0.1 are the defaults.
        optim=OptimConfig(recipe="stretchysnake"),
        train=TrainConfig(
            epochs=12.0,
            dtype="bfloat16",
            log_every=50,
            eval_every=20000,
            checkpoint_every=5000,
        ),
    )
    if variant == "vanilla":
        config.model.frames = 16
        config.train.epochs, config.optim.warmup = 50.0, 5 / 50  # 5 epochs, too
    if arg == "debug":
        config.model.dim, config.model.depth, config.model.frames = 32, 2, 4
        config.stretch.frames, config.stretch.sizes = (2, 4), (98, 126)
        config.train.epochs, config.train.steps = 0.0, 6
    return config
