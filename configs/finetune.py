"""VideoMamba's fine-tuning at 224 pixels, run by run, from a converted checkpoint.

    stretchysnake convert videomamba_m16_in1k_res224.pth m16_in1k.npz --frames 8
    stretchysnake train --config configs/finetune.py:kinetics400_middle_f16 --workdir runs/m16 \
        --config.train.init_from=m16_in1k.npz --config.data.root=kinetics400

The argument is DATASET_MODEL_fFRAMES: kinetics400, ssv2, coin or breakfast_vis4mer; tiny, small,
middle, or middle_mask, which starts from masked pretraining; and a frame count of the table below.
With debug it is a run of six steps on lists of your own. The numbers are those of the release's
scripts (OpenGVLab/VideoMamba, videomamba/video_sm/exp), which fine-tune from the ImageNet weights
on Kinetics and Something-Something, and on Breakfast and COIN from the Kinetics weights of as many
frames. Position tables are stretched to the frame count, and a head for other classes starts anew.

`--config.stretch.variant=static_tokens` fine-tunes at all the scales of the paper instead, and
`--config.optim.layer_decay_form=intended` lets the patch embedding learn as layer decay means it.
"""

from stretchysnake_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    OptimConfig,
    StretchConfig,
    TrainConfig,
    nearest,
    preset,
)

# (data set, model): clips of a step by frames (GPUs x batch of the script; each comes twice on top
# of that), base learning rate of 256 clips by frames or for all, epochs (5 of them warm-up), rate
# of drop path, layer decay (0.75 where the script leaves it at the default).
LARGE = {8: 512, 16: 512, 32: 256, 64: 256}
HALVED = {8: 512, 16: 256, 32: 128, 64: 64}
SMALL = {8: 512, 16: 512, 32: 256, 64: 128}
LONG, LONG_SMALL, LONG_MIDDLE = {32: 256, 64: 256}, {32: 256, 64: 128}, {32: 64, 64: 32}
RUNS = {
    ("kinetics400", "tiny"): (LARGE, 2e-4, 70, 0.1, 0.75),
    ("kinetics400", "small"): (SMALL, 2e-4, 50, 0.35, 0.75),
    ("kinetics400", "middle"): (HALVED, {8: 2e-4, 16: 1e-4, 32: 1e-4, 64: 1e-4}, 50, 0.8, 0.75),
    ("kinetics400", "middle_mask"): (HALVED, 1e-4, 45, 0.4, 0.8),
    ("ssv2", "tiny"): ({8: 512, 16: 512}, 4e-4, 35, 0.1, 0.75),
    ("ssv2", "small"): ({8: 512, 16: 512}, 4e-4, 30, 0.35, 0.75),
    ("ssv2", "middle"): ({8: 512, 16: 256}, 4e-4, 30, 0.8, 0.75),
    ("ssv2", "middle_mask"): ({8: 512, 16: 256}, 1e-4, 30, 0.4, 0.8),
    ("breakfast_vis4mer", "tiny"): (LONG, 2e-4, 70, 0.1, 0.75),
    ("breakfast_vis4mer", "small"): (LONG_SMALL, 2e-4, 50, 0.4, 0.75),
    ("breakfast_vis4mer", "middle"): (LONG_MIDDLE, 2e-4, 50, 0.8, 0.8),
    ("breakfast_vis4mer", "middle_mask"): (LONG_MIDDLE, 2e-4, 45, 0.4, 0.8),
    ("coin", "tiny"): (LONG, 2e-4, 40, 0.1, 0.75),
    ("coin", "small"): (LONG_SMALL, 2e-4, 35, 0.4, 0.75),
    ("coin", "middle"): (LONG_MIDDLE, 2e-4, 30, 0.8, 0.8),
    ("coin", "middle_mask"): (LONG_MIDDLE, 2e-4, 30, 0.4, 0.8),
}
CLASSES = {"kinetics400": 400, "ssv2": 174, "breakfast_vis4mer": 10, "coin": 180}
# Times 3 crops. COIN's script for middle_mask and 64 frames has 4, the published figure is of 10.
TEST_CLIPS = {"kinetics400": 4, "ssv2": 2, "breakfast_vis4mer": 4, "coin": 10}


def get_config(arg: str = "kinetics400_middle_f16") -> Config:
    """`arg` is such as "kinetics400_middle_f16", or "debug"."""
    wanted = {"": "kinetics400_middle_f16", "debug": "kinetics400_tiny_f8"}.get(arg, arg)
    runs = {f"{run[0]}_{run[1]}_f{f}": (*run, f) for run, of in RUNS.items() for f in of[0]}
    if wanted not in runs:
        raise ConfigError(f"configs/finetune.py has no {arg!r}: {nearest(arg, ['debug', *runs])}")
    dataset, model, frames = runs[wanted]
    clips, rate, epochs, drop_path, layer_decay = RUNS[dataset, model]
    tiny, size = model == "tiny", model.removesuffix("_mask")
    config = Config(
        name=f"fine-tune {wanted}",
        model=preset(size, frames=frames, num_classes=CLASSES[dataset], drop_path=drop_path),
        stretch=StretchConfig(variant="vanilla"),
        data=DataConfig(
            dataset=dataset,
            root=dataset,
            recipe="videomamba",
            batch_size=2 * clips[frames],  # data.repeats is 2
            sampling="ssv2" if dataset == "ssv2" else "sparse",
            flip=0.0 if dataset == "ssv2" else 0.5,  # left and right matter there
            rand_augment="rand-m5-n2-mstd0.25-inc1" if tiny else "rand-m7-n4-mstd0.5-inc1",
            test_clips=TEST_CLIPS[dataset],
            test_crops=3,
            threads=8,
            prefetch=8,
        ),
        # Both rates are of 256 clips and follow data.batch_size; so does the warm-up's first,
        # which is the final one.
        optim=OptimConfig(
            recipe="videomamba",
            learning_rate=rate[frames] if isinstance(rate, dict) else rate,
            final_learning_rate=1e-6,
            warmup=5 / epochs,
            weight_decay=0.1 if tiny else 0.05,
            layer_decay=layer_decay,
        ),
        train=TrainConfig(
            epochs=float(epochs), dtype="bfloat16", log_every=50, checkpoint_every=2000
        ),
    )
    start = "in1k" if dataset in ("kinetics400", "ssv2") else f"k400_f{frames}"
    if model == "middle_mask":
        start = {"kinetics400": "k400_mask_pt_f8", "ssv2": "ssv2_mask_pt_f8"}.get(
            dataset, f"k400_mask_ft_f{frames}"
        )
    config.train.init_from = f"videomamba_{size[0]}16_{start}_res224.npz"
    if arg == "debug":
        config.model.dim, config.model.depth = 32, 2
        config.data = DataConfig(train="train.txt", recipe="videomamba")
        config.train = TrainConfig(steps=6, log_every=1)
    return config
