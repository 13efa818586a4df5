"""The Weizmann actions: real people, ten classes, nine subjects, as class folders of .avi files.

    stretchysnake train --config configs/weizmann.py --config.data.root=PATH --workdir runs/weizmann

Subjects are apart: six train, one validates, two test; `--config.data.dataset=weizmann_loso` with
`--config.data.fold=1` to 9 leaves one out. `--config.train.init_from=runs/demo/static_tokens`
starts from the demo's weights, whose micro model this is.
"""

from stretchysnake_jax.config import (
    Config,
    DataConfig,
    OptimConfig,
    StretchConfig,
    TrainConfig,
    preset,
)


def get_config(arg: str = "") -> Config:
    """`arg` is "" or "debug"."""
    if arg not in ("", "debug"):
        raise ValueError(f"unknown argument {arg!r} of configs/weizmann.py: it takes debug")
    return Config(
        name="weizmann",
        model=preset("micro", frames=4, num_classes=10),
        stretch=StretchConfig(frames=(2, 4, 8), sizes=(28, 56, 112), kernel_method="area"),
        data=DataConfig(
            dataset="weizmann",
            root="weizmann",
            batch_size=8,
            crop_scale=0.8,
        ),
        optim=OptimConfig(learning_rate=1e-3, final_learning_rate=2e-5, b2=0.98, clip_norm=1.0),
        train=TrainConfig(steps=6 if arg == "debug" else 600, log_every=10),
    )
