"""The command `stretchysnake evaluate`: a trained model over a grid of frame counts and sizes."""

import argparse
import math
import pathlib

from stretchysnake_jax import config as config_lib
from stretchysnake_jax import efficiency, grid, plots
from stretchysnake_jax import model as model_lib
from stretchysnake_jax.buckets import Bucket, make_bucket, training_buckets
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import source
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


def parse_scale(args: argparse.Namespace, why: str) -> tuple[int | None, tuple[int, int] | None]:
    """One frame count and one (height, width) of --frames and --size; None: not given.

    Raises:
      ConfigError: several, which `why` explains, or none that can be read.
    """
    given = []
    for name, parse in (("--frames", parse_numbers), ("--size", parse_sizes)):
        text = getattr(args, name[2:])
        values = parse(text, name) if text else [None]
        if len(values) > 1:
            raise ConfigError(f"{name} names {len(values)} values: {why}")
        given.append(values[0])
    return given[0], given[1]


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


def parse_budget(value: float) -> float:
    """GFLOPs of --max-gflops; raises ConfigError unless it is a number above 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"--max-gflops is {value:g}: it takes GFLOPs above 0")
    return value


def load_model(
    workdir, checkpoint: str, variant: str | None, methods: dict | None
) -> model_lib.Model:
    """A workdir's model; `methods` replaces its methods of interpolation, by weight."""
    model = model_lib.load(workdir, checkpoint=checkpoint, variant=variant)
    for weight, method in (methods or {}).items():
        if method not in config_lib.METHODS:
            hint = config_lib.nearest(method, config_lib.METHODS)
            raise ConfigError(f"the {weight} method is {method!r}: {hint}")
        setattr(model.methods, f"{weight}_method", method)
    return model


def run(
    workdir,
    frames: list[int],
    sizes: list[tuple[int, int]],
    *,
    patches: list[tuple[int, int]] | None = None,
    max_gflops: float | None = None,
    checkpoint: str = "latest",
    variant: str | None = None,
    methods: dict | None = None,
    clips=None,
    name: str = "grid",
    batch_size: int = 8,
    views: tuple[int, int] = (1, 1),
    native_aspect: bool = False,
    progress: Progress | None = None,
) -> list[dict]:
    """Evaluates a workdir's model and writes files named NAME into it.

    NAME.csv, NAME.json and NAME.npz are the grid, see `grid.write`; NAME.png is its heat map and
    NAME_cost.png its curve of accuracy against GFLOPs; NAME_classes.csv and .json have the top-1 of
    every class, NAME_confusion.png shows the confusions of the best cell. NAME.partial.* grow with
    every cell, so an interruption loses one cell at most.

    Args:
      workdir: of the run.
      frames, sizes, patches: the grid, see `grid.make_cells`.
      max_gflops: cells of which a clip with all its views takes more are left out.
      checkpoint: "latest", "best" or a step.
      variant: under whose patch rule the model is run; None: the one it was trained with.
      methods: replaces methods of interpolation: kernel, spatial, temporal.
      clips: a `ClipList`; None: the run's test list, or its validation list.
      name: of the files.
      batch_size: views per batch.
      views: (test clips, test crops) of every clip, their probabilities averaged.
      native_aspect: every clip in its own shape, with about as many pixels as the cell's.
      progress: shows the state of things.

    Returns:
      The rows, see `grid.evaluate_grid`.
    """
    progress, workdir = progress or Progress(), pathlib.Path(workdir)
    model = load_model(workdir, checkpoint, variant, methods)
    stretch = model.methods
    if clips is None:
        data, classes = model.run.data, model.classes
        clips = load_clips(data, "test", classes, optional=True, say=progress.say)
        if clips is None:
            clips = load_clips(data, "val", classes, say=progress.say)
    cells = grid.make_cells(model.run, stretch, frames, sizes, patches)
    if max_gflops is not None:
        cells = _within(model.run, cells, views, max_gflops)
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
        ratios=source.aspect_ratios(clips) if native_aspect else None,
        on_cell=lambda rows: grid.write(rows, partial, clips),
        on_batch=on_batch,
    )
    progress.close()
    grid.write(rows, workdir / name, clips)
    for suffix in (".csv", ".json", ".npz"):
        partial.with_name(partial.name + suffix).unlink()
    title = f"{workdir.name}: {stretch.variant}, kernel {stretch.kernel_method}"
    plots.heat_maps(workdir / f"{name}.png", [(title, rows)])
    plots.cost_curve(workdir / f"{name}_cost.png", title, rows)
    table = grid.class_table(rows, clips)
    grid.write_table(table, workdir / f"{name}_classes", list(table[0]))
    counts = grid.confusion(grid.best(rows), clips)
    plots.confusion_matrix(workdir / f"{name}_confusion.png", counts, clips.classes)
    bad = {path: reason for row in rows for path, reason in row["unreadable"]}
    for path, reason in bad.items():
        progress.say(f"unreadable, left out: {path}: {reason}")
    return rows


def _within(config, cells: list[Bucket], views: tuple[int, int], limit: float) -> list[Bucket]:
    """The cells within a budget; ConfigError names the cheapest if there is none."""
    cost = {cell: grid.gflops(config, cell, math.prod(views)) for cell in cells}
    if min(cost.values()) > limit:
        cheapest = min(cost, key=cost.get)
        raise ConfigError(
            f"--max-gflops is {limit:g}, but the cheapest cell, {cheapest}, takes "
            f"{cost[cheapest]:.3g}: name fewer frames or smaller sizes"
        )
    return [cell for cell in cells if cost[cell] <= limit]


def report_costs(rows: list[dict]) -> str:
    """What every cell costs, as text; * = trained there."""
    lines = [f"{'scale':>17}   GFLOPs  published        XLA   memory   clips/s   top-1, %"]
    for row in rows:
        scale = grid.cell_name(row)
        xla = f"{row['xla_visible_gflops']:.3g}{'+' if row['xla_hidden'] else ' '}"
        lines.append(
            f"{scale:>17}{row['gflops']:>9.3g}{row['published_gflops']:>11.3g}{xla:>11}"
            f"{row['memory_mib']:>9.3g}{row['clips_per_s']:>10.3g}{100 * row['top1']:>10.1f}"
            f"{'*' if row['trained'] else ''}"
        )
    lines.append("GFLOPs of a clip, a multiply-add is one (for XLA two); MiB of a batch")
    hidden = sorted({name for row in rows for name in row["xla_hidden"]})
    if hidden:
        lines.append(f"+: more, but unknown; XLA doesn't count {', '.join(hidden)}")
    return "\n".join(lines)


def parse_reference(text: str, variant: str, model: config_lib.ModelConfig) -> Bucket:
    """The bucket of --efficiency: "base" for the model's base scale, or such as 16x224."""
    if text == "base":
        return make_bucket(variant, model.frames or 1, model.size, model)
    frames, _, size = text.partition("x")
    size = parse_sizes(size, "--efficiency")[0]
    return make_bucket(variant, parse_numbers(frames, "--efficiency")[0], size, model)


def run_efficiency(
    workdir, rows: list[dict], reference: Bucket, *, name: str, batch_size: int, **settings
) -> str:
    """Measures what the cells of a grid save; writes NAME_efficiency.csv and .json.

    Args:
      workdir: of the run.
      rows: of the grid.
      reference: the scale that they are compared with.
      name: of the files.
      batch_size: clips of a batch.
      settings: checkpoint, variant and methods as of `run`.

    Returns:
      The table as text.
    """
    model = load_model(workdir, **settings)
    variant = model.methods.variant
    cells = [
        make_bucket(
            variant, row["frames"], (row["height"], row["width"]), model.config, grid.patch_of(row)
        )
        for row in rows
    ]
    progress = Progress()
    found = efficiency.measure(
        model.run,
        model.params,
        cells,
        reference,
        model.methods,
        batch_size=batch_size,
        on_run=progress.counter("timing: runs"),
    )
    progress.close()
    path = pathlib.Path(workdir) / f"{name}_efficiency"
    grid.write_table(found, path, efficiency.COLUMNS)
    return (
        f"the forward pass against {reference}, batches of {batch_size} on {found[0]['device']}\n\n"
        f"{efficiency.table(found)}\n\nwritten: {path}.csv, {path}.json"
    )


def main(argv: list[str]) -> int:
    """The command `stretchysnake evaluate`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake evaluate",
        description="Top-1, top-5, loss and cost at every (frames, size, patch), the weights "
        "interpolated for each. Writes tables, a heat map and a curve of accuracy against cost "
        "into the workdir.",
    )
    parser.add_argument("--workdir", required=True, help="of a trained run")
    parser.add_argument("--frames", help="frame counts, such as 4,8,16; default: those trained on")
    parser.add_argument("--sizes", help="pixels, such as 56,84,112 or 84x112; default: as trained")
    parser.add_argument(
        "--patches",
        help="pixels, such as 4,8 or 4x8, under flexivit and flex_all; default: by size",
    )
    parser.add_argument(
        "--native-aspect",
        action="store_true",
        help="every clip in its own shape, of about as many pixels as the size: static_tokens then "
        "has rectangular patches, fixed patches a rectangular grid",
    )
    parser.add_argument(
        "--max-gflops",
        type=float,
        metavar="X",
        help="pick the best cell within X GFLOPs a clip on the validation list, report it on the "
        "test list",
    )
    parser.add_argument(
        "--efficiency",
        nargs="?",
        const="base",
        metavar="TxS",
        help="also time every cell against this scale, such as 16x224; default: the model's base",
    )
    parser.add_argument("--checkpoint", default="latest", help="latest (default), best or a step")
    parser.add_argument("--split", choices=("test", "val", "train"), help="default: test, or val")
    parser.add_argument("--list", help="another list file instead of a split")
    parser.add_argument(
        "--allow-absolute", action="store_true", help="its entries may lead out of its folder"
    )
    parser.add_argument(
        "--variant", help="run the model under this variant's patch rule, such as static_tokens"
    )
    for weight in grid.METHODS_OF:
        methods = ", ".join(config_lib.METHODS)
        parser.add_argument(f"--{weight}-method", help=f"of interpolation: {methods}")
    parser.add_argument("--batch-size", type=int, default=8, help="views per batch (default 8)")
    add_views(parser)
    parser.add_argument(
        "--name", help="of the files written (default grid, with --max-gflops budget)"
    )
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
    patches = parse_sizes(args.patches, "--patches") if args.patches else None
    args.name = args.name or ("grid" if args.max_gflops is None else "budget")
    variant = args.variant or run_config.stretch.variant
    reference = args.efficiency and parse_reference(args.efficiency, variant, run_config.model)
    names = pathlib.Path(args.workdir) / "classes.txt"
    classes = names.read_text().splitlines() if names.exists() else None

    def load_split(split):
        found = load_clips(run_config.data, split, classes, optional=True, say=Progress().say)
        if found is None:
            raise ConfigError(f"the run has no {split} list: give one with --list")
        return found

    clips, test, split = None, None, args.split
    if args.native_aspect and (patches or reference or args.max_gflops is not None):
        raise ConfigError(
            "--native-aspect gives clips scales of their own: it takes neither --patches nor "
            "--efficiency nor --max-gflops, which go by a cell's one scale"
        )
    if args.max_gflops is not None:
        parse_budget(args.max_gflops)
        if args.list or args.split:
            raise ConfigError(
                "--max-gflops picks on the validation list and reports on the test list: it takes "
                "neither --list nor --split"
            )
        split, test = "val", load_split("test")
    if args.list:
        absolute = args.allow_absolute or run_config.data.allow_absolute
        clips = read_list(args.list, classes=classes, allow_absolute=absolute)
    elif split:
        clips = load_split(split)
    methods = {
        weight: method
        for weight in grid.METHODS_OF
        if (method := getattr(args, f"{weight}_method"))
    }
    settings = {"checkpoint": args.checkpoint, "variant": args.variant, "methods": methods}
    batches = {"batch_size": args.batch_size, "views": parse_views(args, run_config.data)}
    rows = run(
        args.workdir,
        frames,
        sizes,
        patches=patches,
        max_gflops=args.max_gflops,
        clips=clips,
        name=args.name,
        native_aspect=args.native_aspect,
        **settings,
        **batches,
    )
    print(f"top-1 in %, {rows[0]['clips']} clips (* trained at this scale)\n")
    print(grid.table(rows))
    print()
    for what, trained_cells in (("unseen", False), ("trained", True)):
        if any(row["trained"] == trained_cells for row in rows):
            mean = 100 * grid.mean_top1(rows, trained=trained_cells)
            print(f"mean over {what} cells {mean:.1f} %")
    print(f"\n{report_costs(rows)}\n")
    for row in rows if args.native_aspect else ():
        shapes = ", ".join(f"{scale} ({n})" for scale, n in row["native"].items())
        print(f"{row['frames']}x{row['height']}x{row['width']}, clips by shape: {shapes}")
    where = pathlib.Path(args.workdir) / args.name
    ends = (".csv", ".json", ".npz", ".png", "_cost.png", "_classes.csv", "_confusion.png")
    print(f"written: {', '.join(f'{where}{end}' for end in ends)}")
    if test is not None:
        best = grid.best(rows)
        [row] = run(
            args.workdir,
            [best["frames"]],
            [(best["height"], best["width"])],
            patches=[grid.patch_of(best)] if patches else None,
            clips=test,
            name=f"{args.name}_test",
            **settings,
            **batches,
        )
        print(
            f"\nbest within {args.max_gflops:g} GFLOPs on the {best['clips']} validation clips: "
            f"{best['frames']} frames at {best['height']}x{best['width']}, patch {best['patch']}, "
            f"{best['gflops']:.3g} GFLOPs, top-1 {100 * best['top1']:.1f} %\n"
            f"on the {row['clips']} test clips: top-1 {100 * row['top1']:.1f} %, top-5 "
            f"{100 * row['top5']:.1f} %, mean of classes {100 * row['mean_class']:.1f} %"
        )
    if reference:
        batch = {"name": args.name, "batch_size": args.batch_size}
        print(f"\n{run_efficiency(args.workdir, rows, reference, **batch, **settings)}")
    return 0
