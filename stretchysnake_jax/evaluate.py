"""The command `stretchysnake evaluate`: a trained model over a grid of frame counts and sizes."""

import argparse
import dataclasses
import pathlib

from stretchysnake_jax import config as config_lib
from stretchysnake_jax import grid, plots
from stretchysnake_jax import model as model_lib
from stretchysnake_jax.buckets import training_buckets
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.data.lists import read_list


def parse_numbers(text: str, what: str) -> list[int]:
    """Reads "4,8,16" -> [4, 8, 16]; raises ConfigError naming `what`."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{what} is {text!r}: it takes whole numbers such as 4,8,16")
    return numbers


def parse_sizes(text: str, what: str = "--sizes") -> list[tuple[int, int]]:
    """Reads "56,84x112" -> [(56, 56), (84, 112)], heights first; ConfigError names `what`."""
    sizes = []
    for part in text.split(","):
        numbers = part.lower().split("x")
        if len(numbers) > 2 or not all(n.strip().isdigit() and int(n) > 0 for n in numbers):
            raise ConfigError(f"{what} holds {part!r}: it takes pixels such as 56,84 or 84x112")
        sizes.append((int(numbers[0]), int(numbers[-1])))
    return sizes


def add_views(parser: argparse.ArgumentParser) -> None:
    """Adds --clips and --crops."""
    for name, where in (("clips", "time"), ("crops", "space, along the long side")):
        text = f"views of a clip in {where}; default: data.test_{name} of the run"
        parser.add_argument(f"--{name}", type=int, help=text)


def parse_views(args: argparse.Namespace, data: config_lib.DataConfig) -> tuple[int, int]:
    """(test clips, test crops) of `add_views`, or else of the run.

    Raises:
      ConfigError: none, or several where the run's sampling or resizing has one.
    """
    asked = (args.clips, args.crops)
    clips, crops = (
        own if given is None else given
        for given, own in zip(asked, (data.test_clips, data.test_crops), strict=True)
    )
    for name, value in (("clips", clips), ("crops", crops)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}: it takes a number >= 1")
    data = config_lib.resolve(data)
    if crops > 1 and data.resize == "squash":
        raise ConfigError(f"--crops is {crops} but the run squashes whole frames: it takes 1")
    if clips > 1 and data.sampling == "uniform":
        raise ConfigError(
            f"--clips is {clips} but the run samples uniformly over the whole clip: it takes 1"
        )
    return clips, crops


def run(
    workdir,
    frames: list[int],
    sizes: list[tuple[int, int]],
    *,
    checkpoint: str = "latest",
    variant: str | None = None,
    methods: dict | None = None,
    clips=None,
    name: str = "grid",
    batch_size: int = 8,
    views: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> list[dict]:
    """Evaluates a workdir's model and writes NAME.csv, NAME.json and NAME.png into it.

    NAME.partial.csv and .json grow with every cell, so an interruption loses one cell at most.

    Args:
      workdir: of the run.
      frames, sizes: the grid.
      checkpoint: "latest", "best" or a step.
      variant: under whose patch rule the model is run; None: the one it was trained with.
      methods: replaces methods of interpolation: kernel, spatial, temporal.
      clips: a `ClipList`; None: the run's test list, or its validation list.
      name: of the files.
      batch_size: views per batch.
      views: (test clips, test crops) of every clip, their probabilities averaged.
      progress: shows the state of things.

    Returns:
      The rows, see `grid.evaluate_grid`.
    """
    progress, workdir = progress or Progress(), pathlib.Path(workdir)
    model = model_lib.load(workdir, checkpoint=checkpoint, variant=variant)
    stretch = dataclasses.replace(model.methods)
    for weight, method in (methods or {}).items():
        if method not in config_lib.METHODS:
            hint = config_lib.nearest(method, config_lib.METHODS)
            raise ConfigError(f"the {weight} method is {method!r}: {hint}")
        setattr(stretch, f"{weight}_method", method)
    if clips is None:
        data, classes = model.run.data, model.classes
        clips = load_clips(data, "test", classes, optional=True, say=progress.say)
        if clips is None:
            clips = load_clips(data, "val", classes, say=progress.say)
    cells = grid.make_cells(model.run, stretch, frames, sizes)
    clock = Clock(len(cells) * len(clips))

    def on_batch(done):
        clock.advance(done)
        cell = cells[min(done - 1, clock.total - 1) // len(clips)]
        progress.show(f"evaluating {name}: {cell}, {done}/{clock.total} clips, {clock.left} left")

    # Cells that are done survive an interruption; a finished table is replaced by a whole one.
    partial = workdir / f"{name}.partial"
    rows = grid.evaluate_grid(
        model.run,
        model.params,
        clips,
        cells,
        stretch,
        batch_size=batch_size,
        views=views,
        on_cell=lambda rows: grid.write(rows, partial),
        on_batch=on_batch,
    )
    progress.close()
    grid.write(rows, workdir / name)
    for suffix in (".csv", ".json"):
        partial.with_name(partial.name + suffix).unlink()
    title = f"{workdir.name}: {stretch.variant}, kernel {stretch.kernel_method}"
    plots.heat_maps(workdir / f"{name}.png", [(title, rows)])
    bad = {path: reason for row in rows for path, reason in row["unreadable"]}
    for path, reason in bad.items():
        progress.say(f"unreadable, left out: {path}: {reason}")
    return rows


def main(argv: list[str]) -> int:
    """The command `stretchysnake evaluate`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake evaluate",
        description="Top-1, top-5, loss and cost at every (frames, size), the weights interpolated "
        "for each. Writes a table, CSV, JSON and a heat map into the workdir.",
    )
    parser.add_argument("--workdir", required=True, help="of a trained run")
    parser.add_argument("--frames", help="frame counts, such as 4,8,16; default: those trained on")
    parser.add_argument("--sizes", help="pixels, such as 56,84,112 or 84x112; default: as trained")
    parser.add_argument("--checkpoint", default="latest", help="latest (default), best or a step")
    parser.add_argument("--split", choices=("test", "val", "train"), help="default: test, or val")
    parser.add_argument("--list", help="another list file instead of a split")
    parser.add_argument(
        "--allow-absolute", action="store_true", help="its entries may lead out of its folder"
    )
    parser.add_argument(
        "--variant", help="run the model under this variant's patch rule, such as static_tokens"
    )
    for weight in ("kernel", "spatial", "temporal"):
        methods = ", ".join(config_lib.METHODS)
        parser.add_argument(f"--{weight}-method", help=f"of interpolation: {methods}")
    parser.add_argument("--batch-size", type=int, default=8, help="views per batch (default 8)")
    add_views(parser)
    parser.add_argument("--name", default="grid", help="of the files written (default grid)")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size is {args.batch_size}: it takes a number >= 1")
    run_config = config_lib.load(pathlib.Path(args.workdir) / "config.json")
    trained = [bucket for bucket, _ in training_buckets(run_config.stretch, run_config.model)]
    frames = (
        parse_numbers(args.frames, "--frames")
        if args.frames
        else sorted({b.frames for b in trained})
    )
    sizes = (
        parse_sizes(args.sizes) if args.sizes else sorted({(b.height, b.width) for b in trained})
    )
    names = pathlib.Path(args.workdir) / "classes.txt"
    classes = names.read_text().splitlines() if names.exists() else None
    clips = None
    if args.list:
        absolute = args.allow_absolute or run_config.data.allow_absolute
        clips = read_list(args.list, classes=classes, allow_absolute=absolute)
    elif args.split:
        clips = load_clips(run_config.data, args.split, classes, optional=True, say=Progress().say)
        if clips is None:
            raise ConfigError(f"the run has no {args.split} list: give one with --list")
    methods = {
        weight: method
        for weight in ("kernel", "spatial", "temporal")
        if (method := getattr(args, f"{weight}_method"))
    }
    rows = run(
        args.workdir,
        frames,
        sizes,
        checkpoint=args.checkpoint,
        variant=args.variant,
        methods=methods,
        clips=clips,
        name=args.name,
        batch_size=args.batch_size,
        views=parse_views(args, run_config.data),
    )
    print(f"top-1 in %, {rows[0]['clips']} clips (* trained at this scale)\n")
    print(grid.table(rows))
    print()
    for what, trained_cells in (("unseen", False), ("trained", True)):
        if any(row["trained"] == trained_cells for row in rows):
            mean = 100 * grid.mean_top1(rows, trained=trained_cells)
            print(f"mean over {what} cells {mean:.1f} %")
    where = pathlib.Path(args.workdir) / args.name
    print(f"written: {where}.csv, {where}.json, {where}.png")
    return 0
