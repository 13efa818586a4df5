"""The Weizmann actions: real people, ten classes, nine subjects, as class folders of .avi files.

List files are "path label" per line; for a folder of classes this makes them, subjects apart:

    cd weizmann
    for f in */*.avi; do echo "$f ${f%%/*}"; done > all.txt
    grep -vE '(moshe|shahar|lyova)_' all.txt > train.txt
    grep lyova_ all.txt > val.txt
    grep -E '(moshe|shahar)_' all.txt > test.txt
    ls -d */ | tr -d / > classes.txt

    stretchysnake train --config configs/weizmann.py --config.data.train=weizmann/train.txt \
        --config.data.val=weizmann/val.txt --config.data.test=weizmann/test.txt \
        --config.train.init_from=runs/demo/static_tokens --workdir runs/weizmann

The model is the demo's micro model, so that it can start from the demo's weights.
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
            train="weizmann/train.txt",
            val="weizmann/val.txt",
            test="weizmann/test.txt",
            batch_size=8,
            crop_scale=0.8,
        ),
        optim=OptimConfig(learning_rate=1e-3, final_learning_rate=2e-5, b2=0.98, clip_norm=1.0),
        train=TrainConfig(steps=6 if arg == "debug" else 600, log_every=10),
    )
