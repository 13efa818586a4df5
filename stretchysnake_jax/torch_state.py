"""Finds VideoMamba's tensors in what a PyTorch checkpoint holds, and reports what it left out."""

import collections
import dataclasses

import numpy as np

from stretchysnake_jax.config import ModelConfig
from stretchysnake_jax.torch_file import CheckpointError
from stretchysnake_jax.torch_layout import check, infer, inflate_kernel, key_shapes, to_params
from stretchysnake_jax.validation import validate_model

# Keys of published files that are no part of the encoder, and why.
_IGNORED = {
    "distill_head.": "the head of self-distillation, dropped after training",
    "clip_decoder.": "the decoder of masked pretraining, dropped after training",
    "pool_norm.": "the pooling of the multi-modal model",
}
_CONTAINERS = ("model", "module", "state_dict")
_AVERAGES = ("model_ema", "state_dict_ema")


@dataclasses.dataclass
class Report:
    """What was found in a PyTorch checkpoint, and what became of the keys that weren't used."""

    layout: str = "a flat state dict"
    prefix: str = ""  # stripped from every key
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)  # key -> why
    notes: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as sentences, every ignored key named."""
        by_reason = collections.defaultdict(list)
        for key, reason in self.ignored.items():
            by_reason[reason].append(key)
        prefix = f", prefix {self.prefix!r}" if self.prefix else ""
        ignored = [
            f"not used ({reason}; {len(keys)}): {', '.join(keys)}"
            for reason, keys in by_reason.items()
        ]
        return [f"layout: {self.layout}{prefix}", *self.notes, *ignored]


def find_state(tree, average: bool = False) -> tuple[dict, Report]:
    """Finds the state dict in what a checkpoint holds.

    Args:
      tree: what `torch_file.read` returned.
      average: take the moving average of the weights (model_ema), not the weights.

    Returns:
      (the state dict with its keys as they are, a report to go on with).

    Raises:
      CheckpointError: there is none.
    """
    if not isinstance(tree, dict):
        raise CheckpointError(f"it holds a {type(tree).__name__}, not a state dict")

    def holds_tensors(value) -> bool:
        return isinstance(value, dict) and any(isinstance(v, np.ndarray) for v in value.values())

    averages = [name for name in _AVERAGES if holds_tensors(tree.get(name))]
    names = [name for name in _CONTAINERS if holds_tensors(tree.get(name))]
    if average and not averages:
        raise CheckpointError("it holds no moving average (model_ema) of the weights")
    if average:
        names = averages
    if not names and holds_tensors(tree):
        return tree, Report()
    if not names:
        held = ", ".join(str(key) for key in list(tree)[:8])
        raise CheckpointError(
            f"it holds no state dict, neither itself nor under {', '.join(_CONTAINERS)}; "
            f"it holds: {held or 'nothing'}"
        )
    report = Report(layout=f"a state dict under {names[0]!r}")
    others = [str(key) for key in tree if key != names[0]]
    if others:
        report.notes.append(f"beside it, not used: {', '.join(others)}")
    if averages and not average:
        report.notes.append(f"{averages[0]} is a moving average of the weights: --ema takes it")
    return tree[names[0]], report


def _find_prefix(state: dict) -> str:
    """What stands in front of every key of the encoder, such as "module." or "backbone."."""
    for anchor in ("cls_token", "pos_embed", "patch_embed.proj.weight", "norm_f.weight"):
        found = [key for key in state if f".{key}".endswith(f".{anchor}")]
        if len(found) > 1:
            raise CheckpointError(f"it holds several encoders: {', '.join(found)}")
        if found:
            return found[0].removesuffix(anchor)
    raise CheckpointError(
        "it holds no VideoMamba: cls_token, pos_embed, patch_embed.proj.weight and norm_f.weight "
        f"are missing; its keys begin with {', '.join(list(state)[:5])}"
    )


def _select(state: dict, report: Report) -> dict:
    """The encoder's tensors by their plain names; what is left out goes into the report."""
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError("its state dict has keys that aren't strings")
    prefix = report.prefix = _find_prefix(state)
    chosen = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) and prefix.endswith("vision_encoder."):
            report.ignored[key] = "no part of the vision encoder"
            continue
        if not key.startswith(prefix) and prefix + key in state:
            raise CheckpointError(f"it holds both {key} and {prefix}{key}")
        reasons = [reason for start, reason in _IGNORED.items() if name.startswith(start)]
        if reasons:
            report.ignored[key] = reasons[0]
        else:
            chosen[name] = value
    if "norm.weight" in chosen and "norm_f.weight" not in chosen:
        chosen["norm_f.weight"] = chosen.pop("norm.weight")
        report.notes.append("norm.weight, of masked pretraining, is taken as norm_f.weight")
    return chosen


def _fit_head(chosen: dict, report: Report, num_classes: int | None) -> None:
    """Keeps the head of the file, or makes a new one of zeros if the caller says how large."""
    names = ("head.weight", "head.bias")
    old = chosen.get("head.weight")
    if num_classes is None and not any(name in chosen for name in names):
        raise CheckpointError(
            "head.weight and head.bias are missing, as after masked pretraining: "
            "--num-classes N (num_classes=N) makes a new head of zeros"
        )
    if num_classes is None or (old is not None and np.shape(old)[:1] == (num_classes,)):
        return
    for name in names:
        if chosen.pop(name, None) is not None:
            reason = f"the head is replaced by one for {num_classes} classes"
            report.ignored[report.prefix + name] = reason
    dim = np.shape(chosen.get("cls_token", np.zeros(1)))[-1]
    chosen["head.weight"] = np.zeros((num_classes, dim), np.float32)
    chosen["head.bias"] = np.zeros(num_classes, np.float32)
    report.notes.append(f"the head, for {num_classes} classes, is new: zeros, to be trained")


def from_state_dict(
    state: dict,
    *,
    frames: int | None = None,
    tubelet: int | None = None,
    inflate: str = "center",
    size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    allow_unused: bool = False,
    report: Report | None = None,
) -> tuple[ModelConfig, dict, Report]:
    """Turns a PyTorch state dict into our parameters.

    Args:
      state: key -> array, with or without a prefix such as "module.".
      frames: of an image checkpoint: makes a video model for so many frames, with a temporal table
        of zeros. None: an image stays an image model.
      tubelet: of an image checkpoint with `frames`: frames per token, 1 unless given.
      inflate: how the image's patch kernel goes to `tubelet` frames, see `inflate_kernel`.
      size: (height, width) in pixels, for a spatial table that isn't square; None: the landscape
        rectangle nearest to a square, with a note in the report.
      num_classes: makes a new head of zeros where the file has none, or one of another size.
      allow_unused: puts unknown keys into the report instead of refusing the file.
      report: of `find_state`.

    Returns:
      (config, params, report): what a checkpoint doesn't hold (pooling, normalisation) is in
      `config` as published; params are nested dicts of float32 arrays.

    Raises:
      CheckpointError: keys that are missing, unknown or of another shape, each by name; or an
        option that doesn't go with the file.
    """
    report = report or Report()
    chosen = _select(state, report)
    _fit_head(chosen, report, num_classes)
    config = infer(chosen, size)
    rows, columns = config.grid
    if size is None and rows != columns:
        report.notes.append(
            f"pos_embed has {rows * columns} patches, no square number: taken as a grid of "
            f"{rows}x{columns}, input {config.size[0]}x{config.size[1]}; --size H,W says otherwise"
        )
    own = (config.frames, config.tubelet)
    video = config.frames is not None
    if video and (frames or own[0], tubelet or own[1]) != own:
        raise CheckpointError(
            f"it is a video model of {own[0]} frames, tubelet {own[1]}: --frames and --tubelet are "
            "for image checkpoints (a video model takes any frame count when it runs)"
        )
    if not video and tubelet is not None and frames is None:
        raise CheckpointError("--tubelet makes a video model of an image one: give --frames too")
    shapes = key_shapes(config)
    check("the file doesn't fit", shapes, chosen, allow_unused)
    report.ignored |= {name: "unknown" for name in chosen if name not in shapes}
    params = to_params(config, chosen)
    if frames is not None and not video:
        config.frames, config.tubelet = frames, tubelet or 1
        validate_model(config)
        embed = params["patch_embed"]
        embed["kernel"] = inflate_kernel(embed["kernel"], config.tubelet, inflate)
        table = np.zeros((frames // config.tubelet, config.dim), np.float32)
        params["temporal_pos_embed"] = table
        report.notes.append(
            f"inflated from an image model ({inflate}): {frames} frames, tubelet "
            f"{config.tubelet}, temporal table of zeros"
        )
    validate_model(config)
    return config, params, report
