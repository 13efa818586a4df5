"""Checkpoints of VideoMamba from PyTorch to ours and back; `stretchysnake convert`.

Three kinds of files: PyTorch's .pth; our .npz; and .safetensors, which has PyTorch's names and
layout and our configuration beside them. torch isn't needed for either direction, and nothing that
a file holds is run.
"""

import argparse
import json
import logging
import pathlib
import zipfile
import zlib

import numpy as np

from stretchysnake_jax import torch_file
from stretchysnake_jax.config import (
    METHODS,
    PRESETS,
    VARIANTS,
    ConfigError,
    ModelConfig,
    StretchConfig,
    check_choice,
    from_dict,
    to_dict,
)
from stretchysnake_jax.torch_file import CheckpointError, UnsafeCheckpoint
from stretchysnake_jax.torch_layout import (
    check,
    flatten,
    key_shapes,
    nest,
    param_shapes,
    to_params,
    to_state_dict,
)
from stretchysnake_jax.torch_state import Report, find_state, from_state_dict
from stretchysnake_jax.validation import validate_model
from stretchysnake_jax.whole_file import whole_file

__all__ = [
    "CheckpointError",
    "Report",
    "UnsafeCheckpoint",
    "from_state_dict",
    "load",
    "load_safetensors",
    "load_videomamba",
    "param_shapes",
    "preset_name",
    "read_safetensors",
    "save",
    "save_safetensors",
    "save_torch",
    "to_state_dict",
]

log = logging.getLogger(__name__)

# What a .safetensors file says of a `StretchConfig`.
_STRETCH = ("variant", "kernel_method", "spatial_method", "temporal_method")

HELP = """\
Turns a PyTorch checkpoint of VideoMamba into ours, and back.

  stretchysnake convert videomamba_t16_k400_f8_res224.pth tiny.npz
  stretchysnake convert videomamba_t16_in1k_res224.pth tiny.npz --frames 8
  stretchysnake convert --to-torch runs/k400 tiny.pth
  stretchysnake convert runs/k400 tiny.safetensors

Every published layout is read: a flat state dict; one under 'model' or 'module'; keys that begin
with module., backbone., encoder. or vision_encoder.; a whole training checkpoint. All sizes are
inferred. torch isn't needed, and nothing that the file holds is run: a file that asks for more
than tensors and plain data is refused. A missing, unknown or mis-shaped key is an error that names
it. What is left out on purpose is listed."""


def _read_torch(path, *, ema: bool = False, **options) -> tuple[ModelConfig, dict, Report]:
    path = pathlib.Path(path)
    tree = read_safetensors(path)[0] if path.suffix == ".safetensors" else torch_file.read(path)
    try:
        state, report = find_state(tree, ema)
        return from_state_dict(state, report=report, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be converted: {error}") from error


def load_videomamba(path, **options) -> tuple[ModelConfig, dict]:
    """Loads a PyTorch checkpoint of VideoMamba, in any published layout, without torch.

    What wasn't used of the file, and why, is logged as warnings.

    Args:
      path: of the .pth or .pt file; or of a .safetensors file that holds such a state dict.
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
    """Writes a flat state dict that torch.load reads, with weights_only=True too; whole or not.

    Raises:
      CheckpointError: params that aren't of `config`.
      ConfigError: a model with attention blocks.
    """
    if config.blocks != "mamba":
        raise ConfigError(
            f"model.blocks is {config.blocks!r}: PyTorch's VideoMamba has no such blocks, so the "
            "weights can be written as .npz or .safetensors alone"
        )
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


def _safetensors():
    """The package; raises ConfigError that says which extra brings it."""
    try:
        import safetensors.numpy

        return safetensors
    except ImportError as error:
        raise ConfigError(
            ".safetensors files take the package safetensors, which isn't installed: "
            "pip install 'stretchysnake-jax[export]'"
        ) from error


def save_safetensors(
    path,
    config: ModelConfig,
    params: dict,
    classes: list[str] | None = None,
    stretch: StretchConfig | None = None,
) -> None:
    """Writes a .safetensors file: float32 tensors as PyTorch names and lays them out; whole or not.

    Its metadata hold JSON: config, and classes and stretch where they are given.

    Args:
      path: of the file.
      config: the encoder.
      params: its parameters.
      classes: their names.
      stretch: variant and methods of interpolation; the rest of it isn't written.

    Raises:
      CheckpointError: params that aren't of `config`.
      ConfigError: the package safetensors isn't installed.
    """
    metadata = {"format": "pt", "config": json.dumps(to_dict(config))}
    if classes is not None:
        metadata["classes"] = json.dumps(classes)
    if stretch is not None:
        metadata["stretch"] = json.dumps({name: getattr(stretch, name) for name in _STRETCH})
    state = {
        name: np.ascontiguousarray(array, np.float32)
        for name, array in to_state_dict(config, params).items()
    }
    package = _safetensors()
    with whole_file(path) as part:
        package.numpy.save_file(state, part, metadata)


def read_safetensors(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors, half precision as float32, and the metadata of any .safetensors file.

    Raises:
      CheckpointError: no such file, or none of that format.
      ConfigError: the package safetensors isn't installed.
    """
    if not pathlib.Path(path).exists():
        raise CheckpointError(f"there is no file {path}")
    package = _safetensors()
    try:
        with package.safe_open(path, framework="numpy") as file:
            state = {name: file.get_tensor(name) for name in list(file.keys())}
            metadata = file.metadata() or {}
    except (package.SafetensorError, OSError, TypeError) as error:
        raise CheckpointError(f"{path} is no readable .safetensors file: {error}") from error
    halves = ("bfloat16", "float16")
    return {k: v.astype("f4") if v.dtype.name in halves else v for k, v in state.items()}, metadata


def load_safetensors(path) -> tuple[ModelConfig, dict, list[str] | None, StretchConfig | None]:
    """Reads a .safetensors file; one that isn't ours as `load_videomamba` does.

    Returns:
      (config, params, classes, stretch) as `save_safetensors` takes them; None for what the file
      doesn't say.

    Raises:
      CheckpointError: no such file, or one with missing, unknown or mis-shaped keys.
      ConfigError: the package safetensors isn't installed.
    """
    state, metadata = read_safetensors(path)
    if "config" not in metadata:
        return *load_videomamba(path), None, None
    try:
        names = ("config", "classes", "stretch")
        about = {name: json.loads(metadata.get(name, "null")) for name in names}
        config = from_dict(ModelConfig, about["config"])
        validate_model(config)
        stretch = about["stretch"] and from_dict(StretchConfig, about["stretch"])
        for name in _STRETCH if stretch else ():
            check_choice(name, getattr(stretch, name), VARIANTS if name == "variant" else METHODS)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no weight file of ours: {error}") from error
    try:
        check("it doesn't fit its configuration", key_shapes(config), state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, to_params(config, state), about["classes"], stretch


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
    text = (
        "a .pth or .pt file, a .npz or .safetensors file of this command, or the workdir of a run"
    )
    add("source", help=text)
    add("target", help="the file to write: .npz or .safetensors, or .pth with --to-torch")
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


def _read(source: pathlib.Path, options: dict):
    """(config, params, classes, stretch, lines of the report) of whatever `source` is."""
    ours = source.is_dir() or source.suffix == ".npz"
    if source.suffix == ".safetensors":
        ours = "config" in read_safetensors(source)[1]
    if not ours:
        config, params, report = _read_torch(source, **options)
        return config, params, None, None, report.lines()
    defaults = vars(_parser().parse_args(["source", "target"]))
    for name, value in options.items():
        if value != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')} is for a .pth source, not {source}")
    if source.is_dir():
        from stretchysnake_jax import model  # only here: it needs JAX and imports this module

        run = model.load(source)
        lines = [f"layout: the workdir of a run, step {run.step}"]
        return run.config, run.params, run.classes, run.methods, lines
    lines = ["layout: a weight file of ours"]
    if source.suffix == ".safetensors":
        return *load_safetensors(source), lines
    return *load(source), None, None, lines


def preset_name(config: ModelConfig) -> str | None:
    """The preset of this width, depth and patch, or None; no preset has attention blocks."""
    if config.blocks != "mamba":
        return None
    shape = {"dim": config.dim, "depth": config.depth, "patch": config.patch}
    for name, fields in PRESETS.items():
        if shape == {key: fields.get(key, getattr(ModelConfig(), key)) for key in shape}:
            return name
    return None


def _describe(config: ModelConfig, params: dict) -> list[str]:
    """What was inferred, in words."""
    count = sum(np.size(array) for array in flatten(params).values())
    frames = "an image model"
    if config.frames is not None:
        frames = f"{config.frames} frames, tubelet {config.tubelet}"
    sizes = f"state {config.state}, expand {config.expand}, dt rank {config.rank}, convolution "
    sizes += f"{config.conv_width}"
    if config.blocks == "attention":
        sizes = f"attention blocks, heads {config.num_heads}, MLP ratio {config.mlp_ratio:g}"
    return [
        f"model: {preset_name(config) or 'no preset'}, {count:,} parameters",
        f"sizes: dim {config.dim}, depth {config.depth}, {sizes}",
        f"input: {frames}, {config.size[0]}x{config.size[1]} pixels, "
        f"patch {config.patch[0]}x{config.patch[1]}, {config.num_classes} classes",
        f"pooling: {config.pooling}, normalisation: {config.normalise} (a .pth file holds neither)",
    ]


def main(argv: list[str] | None = None) -> int:
    """The command; errors are raised, and `cli` turns them into a sentence and an exit status."""
    options = vars(_parser().parse_args(argv))
    source, target = (pathlib.Path(options.pop(name)) for name in ("source", "target"))
    to_torch = options.pop("to_torch")
    takes = (".pth", ".pt") if to_torch else (".npz", ".safetensors")
    if target.suffix not in takes:
        hint = "" if to_torch else " (--to-torch writes .pth)"
        raise ConfigError(f"the target is {target}: it takes a name in {' or '.join(takes)}{hint}")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent} to write {target.name} into")
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"source and target are the same file, {source}")
    config, params, classes, stretch, lines = _read(source, options)
    print("\n".join([*_describe(config, params), *lines]))
    if target.suffix == ".safetensors":
        save_safetensors(target, config, params, classes, stretch)
    else:
        (save_torch if to_torch else save)(target, config, params)
    print(f"wrote {target}")
    return 0
