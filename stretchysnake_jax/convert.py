"""Checkpoints of VideoMamba from PyTorch to ours and back; `stretchysnake convert`.

torch isn't needed for either direction, and nothing that a file holds is run.
"""

import argparse
import json
import logging
import pathlib
import zipfile
import zlib

import numpy as np

from stretchysnake_jax import torch_file
from stretchysnake_jax.config import PRESETS, ConfigError, ModelConfig, from_dict, to_dict
from stretchysnake_jax.torch_file import CheckpointError, UnsafeCheckpoint
from stretchysnake_jax.torch_layout import check, flatten, nest, param_shapes, to_state_dict
from stretchysnake_jax.torch_state import Report, find_state, from_state_dict
from stretchysnake_jax.validation import validate_model
from stretchysnake_jax.whole_file import whole_file

__all__ = [
    "CheckpointError",
    "Report",
    "UnsafeCheckpoint",
    "from_state_dict",
    "load",
    "load_videomamba",
    "param_shapes",
    "save",
    "save_torch",
    "to_state_dict",
]

log = logging.getLogger(__name__)

HELP = """\
Turns a PyTorch checkpoint of VideoMamba into ours, and back.

  stretchysnake convert videomamba_t16_k400_f8_res224.pth tiny.npz
  stretchysnake convert videomamba_t16_in1k_res224.pth tiny.npz --frames 8
  stretchysnake convert --to-torch runs/k400 tiny.pth

Every published layout is read: a flat state dict; one under 'model' or 'module'; keys that begin
with module., backbone., encoder. or vision_encoder.; a whole training checkpoint. All sizes are
inferred. torch isn't needed, and nothing that the file holds is run: a file that asks for more
than tensors and plain data is refused. A missing, unknown or mis-shaped key is an error that names
it. What is left out on purpose is listed."""


def _read_torch(path, *, ema: bool = False, **options) -> tuple[ModelConfig, dict, Report]:
    tree = torch_file.read(path)
    try:
        state, report = find_state(tree, ema)
        return from_state_dict(state, report=report, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be converted: {error}") from error


def load_videomamba(path, **options) -> tuple[ModelConfig, dict]:
    """Loads a PyTorch checkpoint of VideoMamba, in any published layout, without torch.

    What wasn't used of the file, and why, is logged as warnings.

    Args:
      path: of the .pth or .pt file.
      **options: frames, tubelet, inflate, size, num_classes and allow_unused as `from_state_dict`
        takes them; ema=True takes the moving average of a training checkpoint.

    Returns:
      (config, params): nested dicts of float32 arrays, the blocks' stacked along a leading axis.

    Raises:
      UnsafeCheckpoint: the file asks for more than tensors and plain data. Nothing was run.
      CheckpointError: no such file, no checkpoint, or one with missing, unknown or mis-shaped keys.
    """
    config, params, report = _read_torch(path, **options)
    if report.ignored or report.notes:
        log.warning("%s: %s", path, "; ".join(report.lines()))
    return config, params


def save_torch(path, config: ModelConfig, params: dict) -> None:
    """Writes a flat state dict that torch.load reads, with weights_only=True too; whole or not."""
    torch_file.write(path, to_state_dict(config, params))


def save(path, config: ModelConfig, params: dict) -> None:
    """Writes our weight file: a .npz of the flat, dotted names and `config` as JSON; whole or not.

    Raises:
      CheckpointError: params that aren't of `config`.
    """
    flat = {name: np.asarray(array) for name, array in flatten(params).items()}
    check("the parameters don't fit the configuration", flatten(param_shapes(config)), flat)
    flat = {name: array.astype(np.float32) for name, array in flat.items()}
    with whole_file(path) as part, part.open("wb") as stream:
        np.savez(stream, config=np.array(json.dumps(to_dict(config))), **flat)


def load(path) -> tuple[ModelConfig, dict]:
    """Reads what `save` wrote.

    Returns:
      (config, params): nested dicts of float32 arrays.

    Raises:
      CheckpointError: no such file, none of ours, or one with missing, unknown or mis-shaped keys.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            flat = {name: archive[name] for name in archive.files}
        config = from_dict(ModelConfig, json.loads(str(flat.pop("config"))))
        validate_model(config)
        check("it doesn't fit its configuration", flatten(param_shapes(config)), flat)
        return config, nest({name: array.astype(np.float32) for name, array in flat.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no weight file of ours: {error}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def _size(text: str) -> tuple[int, int]:
    height, width = text.replace("x", ",").split(",")
    return int(height), int(width)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "stretchysnake convert",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", help="a .pth or .pt file, a .npz file of this command, or the workdir of a run")
    add("target", help="the file to write: .npz, or .pth with --to-torch")
    add("--to-torch", action="store_true", help="write a flat state dict that torch.load reads")
    group = parser.add_argument_group("for a .pth source")
    add = group.add_argument
    add("--frames", type=int, metavar="N", help="make a video model of N frames of an image one")
    add("--tubelet", type=int, metavar="K", help="with --frames: frames per token (1)")
    text = "with --frames: the image's patch kernel on the middle frame of a tubelet, zeros on the "
    text += "others (center, the default, as published), or spread over all (mean)"
    add("--inflate", choices=("center", "mean"), default="center", help=text)
    text = "input height and width in pixels, for a spatial table that isn't square"
    add("--size", type=_size, metavar="H,W", help=text)
    text = "make a head of zeros for N classes where the file has none, or one of another size"
    add("--num-classes", type=int, metavar="N", help=text)
    add("--ema", action="store_true", help="take the moving average (model_ema) of the weights")
    add(
        "--allow-unused", action="store_true", help="list unknown keys instead of refusing the file"
    )
    return parser


def _read(source: pathlib.Path, options: dict) -> tuple[ModelConfig, dict, list[str]]:
    """(config, params, lines of the report) of whatever `source` is."""
    if not source.is_dir() and source.suffix != ".npz":
        config, params, report = _read_torch(source, **options)
        return config, params, report.lines()
    defaults = vars(_parser().parse_args(["source", "target"]))
    for name, value in options.items():
        if value != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')} is for a .pth source, not {source}")
    if source.is_dir():
        from stretchysnake_jax import model  # only here: it needs JAX and imports this module

        run = model.load(source)
        return run.config, run.params, [f"layout: the workdir of a run, step {run.step}"]
    return *load(source), ["layout: a weight file of ours"]


def _describe(config: ModelConfig, params: dict) -> list[str]:
    """What was inferred, in words."""
    shape = {"dim": config.dim, "depth": config.depth, "patch": config.patch}
    names = [
        name
        for name, fields in PRESETS.items()
        if shape == {key: fields.get(key, getattr(ModelConfig(), key)) for key in shape}
    ]
    count = sum(np.size(array) for array in flatten(params).values())
    frames = "an image model"
    if config.frames is not None:
        frames = f"{config.frames} frames, tubelet {config.tubelet}"
    return [
        f"model: {names[0] if names else 'no preset'}, {count:,} parameters",
        f"sizes: dim {config.dim}, depth {config.depth}, state {config.state}, "
        f"expand {config.expand}, dt rank {config.rank}, convolution {config.conv_width}",
        f"input: {frames}, {config.size[0]}x{config.size[1]} pixels, "
        f"patch {config.patch[0]}x{config.patch[1]}, {config.num_classes} classes",
        f"pooling: {config.pooling}, normalisation: {config.normalise} (a .pth file holds neither)",
    ]


def main(argv: list[str] | None = None) -> int:
    """The command; errors are raised, and `cli` turns them into a sentence and an exit status."""
    options = vars(_parser().parse_args(argv))
    source, target = (pathlib.Path(options.pop(name)) for name in ("source", "target"))
    to_torch = options.pop("to_torch")
    takes = (".pth", ".pt") if to_torch else (".npz",)
    if target.suffix not in takes:
        hint = "" if to_torch else " (--to-torch writes .pth)"
        raise ConfigError(f"the target is {target}: it takes a name in {' or '.join(takes)}{hint}")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent} to write {target.name} into")
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"source and target are the same file, {source}")
    config, params, lines = _read(source, options)
    print("\n".join([*_describe(config, params), *lines]))
    (save_torch if to_torch else save)(target, config, params)
    print(f"wrote {target}")
    return 0
