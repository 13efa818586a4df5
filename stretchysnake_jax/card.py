"""The model card of `stretchysnake export`: README.md, what a model is and how to run it.

Nothing in it tells where anything lay: of paths only the last part is named.
"""

import pathlib

import stretchysnake_jax
from stretchysnake_jax import grid, models
from stretchysnake_jax import model as model_lib
from stretchysnake_jax.config import SPLITS, Config, ConfigError, DataConfig, resolve
from stretchysnake_jax.convert import preset_name
from stretchysnake_jax.data.datasets import load_clips

# In every card, so that one is told from another README.md.
MARK = "library_name: stretchysnake-jax"
MOST_CLASSES = 50  # that are listed by name

HEAD = """\
---
{mark}
license: {licence}
pipeline_tag: video-classification
tags:
- video-classification
- jax
- videomamba
- stretchysnake
{metrics}---

# {name}

{sentence}
"""

RUN = """\
## Run it with JAX alone

    import jax.export  # and the package flatbuffers

    with open("{file}", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    out = program.call(video)  # uint8 (batch, {shape}, 3), RGB, any batch
    out["probabilities"], out["features"]  # float32 (batch, {classes}) and (batch, {dim})

There is a program for each shape of clips: {files}.
`export.json` lists them, and the names of the classes in the order of the probabilities.

They were written by JAX {jax} for {platforms}. JAX
[promises](https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees) to run them
in releases up to 6 months newer and up to 3 weeks older. The scan in them is plain JAX, slower than
the kernels of stretchysnake-jax, most of all on GPUs.
"""

LOAD = """\
## Load it with stretchysnake-jax

    import stretchysnake_jax  # pip install 'stretchysnake-jax[export]'

    model = stretchysnake_jax.load("model.safetensors")
    model.predict(video)  # uint8 (batch, frames, height, width, 3), RGB, at the video's own scale
    model.stretch({scale}).features(video)  # of exactly this one

The tensors have VideoMamba's PyTorch names and layout; the metadata hold configuration and classes.
"""

LICENCE = """\
## Licence

The weights: {licence}. The data that they were trained on have terms of their own.
"""


def _table(rows: dict) -> str:
    """Two columns; rows whose value is None are left out."""
    lines = [f"| {key} | {value} |\n" for key, value in rows.items() if value is not None]
    return "| | |\n|---|---|\n" + "".join(lines)


def _side(pair) -> str:
    return "x".join(str(side) for side in pair)


def _model(model: model_lib.Model) -> str:
    config, methods = model.config, model.methods
    frames = "1 frame (an image model)" if config.frames is None else f"{config.frames} frames"
    encoder = f"VideoMamba, {preset_name(config) or 'a size of its own'}: {config.depth} blocks of "
    encoder += f"{config.dim} channels, state {config.state}"
    if config.blocks == "attention":
        encoder = f"transformer: {config.depth} ViT blocks of {config.dim} channels, "
        encoder += f"{config.num_heads} heads, MLP ratio {config.mlp_ratio:g}"
    return "## Model\n\n" + _table(
        {
            "encoder": encoder,
            "parameters": f"{models.count(model.params):,}",
            "variant": methods.variant,
            "base scale": f"{frames} of {_side(config.size)} pixels, patches of "
            f"{_side(config.patch)}, {config.tubelet} per token in time",
            "interpolation": f"patch kernel {methods.kernel_method}, spatial table "
            f"{methods.spatial_method}, temporal table {methods.temporal_method}",
            "pooling": config.pooling,
            "normalisation": f"{config.normalise} (done inside for uint8)",
            "classes": config.num_classes,
            "checkpoint": None if model.step is None else f"step {model.step}",
        }
    )


def data_name(data: DataConfig, split: str) -> str | None:
    """What a split's clips are, without where they lie; None: there is no such split."""
    listed = pathlib.PurePath(getattr(data, split)).name
    if data.stick_actions.path:
        stick = data.stick_actions
        levels = ""
        if stick.detail or stick.timing:
            levels = f", detail {stick.detail}, timing {stick.timing}"
        return f"Stick Actions-10, rendered, seed {stick.seed}{levels} ({listed or split})"
    if listed:
        return f"the list {listed}"
    return f"{data.dataset}, fold {data.fold} ({split})" if data.dataset else None


def _data(model: model_lib.Model) -> str:
    data, lines = model.run.data, []
    for split in SPLITS:
        name = data_name(data, split)
        try:
            clips = name and load_clips(data, split, model.classes, optional=True)
        except (ConfigError, OSError):  # the data need not be there to export what they taught
            lines.append(f"* {split}: {name}; not at hand when this card was made")
            continue
        if clips:
            lines.append(f"* {split}: {name}, {len(clips):,} clips")
    text = "## Data\n\n" + "".join(f"{line}\n" for line in lines)
    names = model.classes or []
    if 0 < len(names) <= MOST_CLASSES:
        text += f"\nClasses: {', '.join(names)}.\n"
    return text


def _training(config: Config) -> str:
    data, optim, train = resolve(config.data), resolve(config.optim), config.train
    stretch = config.stretch
    batch = f"{data.batch_size} clips"
    if data.tokens_per_batch:
        batch = f"up to {data.tokens_per_batch:,} tokens"
    start = pathlib.PurePath(train.init_from).name
    augment = {
        "flip": data.flip,
        "RandAugment": data.rand_augment,
        "colour jitter": data.colour_jitter,
        "erase": data.erase,
        "mixup": data.mixup,
        "cutmix": data.cutmix,
    }
    augment = ", ".join(f"{name} {value}" for name, value in augment.items() if value)
    return "## Training\n\n" + _table(
        {
            "length": f"{train.steps:,} steps" if train.steps else f"{train.epochs:g} epochs",
            "batch": batch,
            "frames": None if stretch.variant == "vanilla" else ", ".join(map(str, stretch.frames)),
            "sizes": ", ".join(map(str, stretch.sizes)) or "the variant's own",
            "optimiser": f"AdamW, rate {optim.learning_rate:g}, warm-up {optim.warmup:.3g} of the "
            f"steps, {optim.schedule} schedule, weight decay {optim.weight_decay:g}",
            "label smoothing": f"{optim.label_smoothing:g}",
            "drop path": f"{config.model.drop_path:g}",
            "moving average": f"{optim.ema:g}" if optim.ema else None,
            "sampling": f"{data.sampling}, frames resized by {data.resize}",
            "augmentation": augment or "none",
            "started from": start or None,
            "precision": train.dtype,
            "seed": train.seed,
        }
    )


def _results(rows: list[dict]) -> str:
    clips = sorted({row["clips"] for row in rows if "clips" in row})
    text = "## Results\n\n"
    if clips:
        text += f"Over {' or '.join(f'{n:,}' for n in clips)} clips. "
    text += "GFLOPs are of a clip with all its views, a multiply-add counted as one.\n\n"
    text += "| frames | size | patch | top-1, % | top-5, % | GFLOPs | trained at this scale |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for row in rows:
        size = grid.scale_name((row["height"], row["width"]))
        percent = [f"{100 * row[key]:.1f}" if key in row else "" for key in ("top1", "top5")]
        cells = [row["frames"], size, row["patch"], *percent, f"{row.get('gflops', 0):.3g}"]
        cells.append("yes" if row.get("trained") else "no")
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def make(
    model: model_lib.Model,
    about: dict,
    *,
    name: str | None = None,
    rows: list[dict] | None = None,
    licence: str = "apache-2.0",
) -> str:
    """The text of a card.

    Args:
      model: what was exported.
      about: what `export.json` holds.
      name: of the model; None: the run's.
      rows: of an evaluated grid, as of `grid.read`; None: the card has no results.
      licence: of the weights, in the hub's words.
    """
    run, config = model.run, model.config
    name = name or (run.name if run else "stretchysnake model")
    kind = "VideoMamba" if config.blocks == "mamba" else "transformer"
    sentence = f"A {kind} encoder (variant {model.methods.variant} of StretchySnake, "
    sentence += "arXiv 2510.16209)"
    sentence += ", trained" if run else ", converted"
    sentence += f" with stretchysnake-jax {stretchysnake_jax.__version__}."
    metrics = "metrics:\n- accuracy\n" if rows else ""
    parts = [
        HEAD.format(mark=MARK, licence=licence, metrics=metrics, name=name, sentence=sentence),
        _model(model),
    ]
    if run:
        parts += [_data(model), _training(run)]
    if rows:
        parts.append(_results(rows))
    programs = about["stablehlo"]
    if programs:
        first = programs[0]
        parts.append(
            RUN.format(
                file=first["file"],
                shape=f"{first['frames']}, {first['height']}, {first['width']}",
                classes=config.num_classes,
                dim=config.dim,
                files=", ".join(f"`{program['file']}`" for program in programs),
                jax=first["jax"],
                platforms=" and ".join(first["platforms"]),
            )
        )
    if about["safetensors"]:
        scale = f"frames={config.frames}, " * (config.frames is not None) + f"size={config.size}"
        parts.append(LOAD.format(scale=scale))
    parts.append(LICENCE.format(licence=licence))
    return "\n".join(parts)
