"""The command `stretchysnake data show`: a contact sheet of clips as the model sees them."""

import dataclasses
import pathlib

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stretchysnake_jax.buckets import Bucket, make_bucket, training_buckets
from stretchysnake_jax.config import Config, ConfigError, resolve
from stretchysnake_jax.data import datasets, pipeline
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.whole_file import whole_file

FRAMES_SHOWN = 8  # of a clip, spread evenly; more would be too small to see
STRIP = 1200, 150  # width and height of a clip's strip, pixels
_TITLE = 22  # height of a title, pixels
_DPI = 100


def run(args, config: Config | None) -> int:
    """Runs `stretchysnake data show`; `config` is that of --config."""
    if config is None:
        raise ConfigError("--config is missing: it takes a config file, such as configs/k400.py")
    if args.clips < 1:
        raise ConfigError(f"--clips is {args.clips}: it takes a number >= 1")
    data = config.data
    if data.stick_actions.path:
        listed = pathlib.Path(data.stick_actions.path) / f"{args.split}.txt"
        data = dataclasses.replace(data, **{args.split: str(listed)})
    clips = datasets.load_clips(data, args.split, say=print)
    buckets = choose_buckets(config, args.buckets)
    chosen = np.unique(np.linspace(0, len(clips) - 1, args.clips).astype(int))
    seed = config.train.seed if args.split == "train" else None
    strips, unreadable = load_strips(config, clips, chosen, buckets, seed)
    draw(strips, args.out)
    names = ", ".join(map(str, buckets))
    print(f"{args.out}: {len(chosen)} clips of {args.split} at {names}")
    for path, reason in unreadable.items():
        print(f"unreadable: {path}: {reason}")
    return int(bool(unreadable))


def choose_buckets(config: Config, text: str | None) -> list[Bucket]:
    """The scales of a sheet, by `--buckets` or from those that are trained.

    Raises:
      ConfigError: words that name no scale, or one that the variant can't have.
    """
    if text is None:
        trained = [bucket for bucket, _ in training_buckets(config.stretch, config.model)]
        trained.sort(key=lambda b: (b.frames * b.height * b.width, b.frames))
        places = {0, len(trained) // 2, len(trained) - 1}
        return [trained[i] for i in sorted(places)]
    buckets = []
    for word in text.split(","):
        numbers = word.strip().split("x")
        if len(numbers) not in (2, 3) or not all(n.isdecimal() and int(n) for n in numbers):
            raise ConfigError(
                f"--buckets has {word!r}: it takes FRAMESxSIZE or FRAMESxHEIGHTxWIDTH, such as "
                "8x112 or 16x224x128"
            )
        frames, height, *width = map(int, numbers)
        size = height, width[0] if width else height
        buckets.append(make_bucket(config.stretch.variant, frames, size, config.model))
    return buckets


def load_strips(
    config: Config, clips: ClipList, chosen, buckets: list[Bucket], seed: int | None
) -> tuple[list[tuple[str, np.ndarray]], dict[str, str]]:
    """Loads clips at every scale.

    Args:
      config: the experiment.
      clips: a list.
      chosen: indices of the clips.
      buckets: the scales.
      seed: of the augmentation: the clips are the first samples of a run; None: evaluation.

    Returns:
      ((title, uint8 (frames, height, width, 3)) for every clip and scale, scales innermost; path ->
      reason of the unreadable ones, which are left out).
    """
    load = pipeline.LoadBatch(config.data, clips, tuple(buckets), seed)
    rows = np.arange(len(chosen)) * (1 if seed is None else resolve(config.data).repeats)
    ids = np.asarray(chosen, np.int32)
    strips, unreadable = [], {}
    for i, clip in enumerate(chosen):
        name = clips.classes[clips.labels[clip]]
        for which, bucket in enumerate(buckets):
            batch = load((0, which, ids[i : i + 1], rows[i : i + 1]))
            unreadable |= dict(batch["unreadable"])
            if batch["mask"][0]:
                strips.append((f"{bucket}   {name}   {clips.paths[clip]}", batch["video"][0]))
    return strips, unreadable


def draw(strips: list[tuple[str, np.ndarray]], path) -> None:
    """Draws titled strips of frames below each other into a PNG, whole or not at all.

    Args:
      strips: (title, uint8 (frames, height, width, 3), RGB) each.
      path: of the PNG.

    Raises:
      ConfigError: there is nothing to draw.
    """
    if not strips:
        raise ConfigError("no clip could be read, so there is nothing to show")
    width, height = STRIP[0], (STRIP[1] + _TITLE) * len(strips)
    if height >= 1 << 16:
        raise ConfigError(
            f"{len(strips)} strips are more than a picture holds: take fewer clips or buckets"
        )
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    for i, (title, video) in enumerate(strips):
        top = height - i * (STRIP[1] + _TITLE)
        shown, picture = _strip(video)
        if shown < len(video):
            title = f"{title}   ({shown} of {len(video)} frames)"
        figure.text(4 / width, (top - 16) / height, title, fontsize=8, parse_math=False)
        figure.figimage(picture, 0, top - _TITLE - picture.shape[0], origin="upper")
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def _strip(video: np.ndarray) -> tuple[int, np.ndarray]:
    """Frames beside each other: how many, and uint8 (height, width, 3) of at most STRIP."""
    shown = min(len(video), FRAMES_SHOWN)
    frames = video[np.linspace(0, len(video) - 1, shown).astype(int)]
    high, wide = frames.shape[1:3]
    scale = min((STRIP[1] - 4) / high, (STRIP[0] / shown - 4) / wide)
    size = max(1, int(wide * scale)), max(1, int(high * scale))
    # Enlarged pixels stay squares: what the model gets is to be seen.
    how = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
    frames = [cv2.resize(frame, size, interpolation=how) for frame in frames]
    gap = [(0, 0), (0, 4), (0, 0)]
    return shown, np.hstack([np.pad(frame, gap, constant_values=255) for frame in frames])
