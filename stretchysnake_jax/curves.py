"""The command `stretchysnake inspect run`: the curves of runs as a picture, and what they say."""

import argparse
import itertools
import pathlib

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.summary import (
    Run,
    end_losses,
    parse_bucket,
    scale_name,
    smooth,
    step_seconds,
    summary,
)
from stretchysnake_jax.whole_file import whole_file

WIDTH = 15.0  # of a picture, inches
ALL = "all buckets"
COLOURS = matplotlib.color_sequences["tab10"]
# Small panels, drawn if a run has the field: field -> (axis, factor)
PANELS = {
    "learning_rate": ("learning rate", 1),
    "grad_norm": ("gradient norm, log scale", 1),
    "data_wait_share": ("waiting for data, %", 100),
    "clips_per_s": ("clips/s", 1),
    "tokens_per_s": ("tokens/s", 1),
    "compiled": ("compilations", 1),
}


def make_figure(runs: list[Run]) -> Figure:
    """Draws the curves of one run, or of several to compare.

    Of one run: what was logged faintly, a moving average over it, and the loss of every bucket. Of
    several: a colour for each, and the loss by frame count. Last, of each run, maps of its buckets:
    the loss at the end and the time of a step.
    """
    fields = [name for name in PANELS if any(len(run.column(name)[0]) for run in runs)]
    groups, mapped = group_buckets(runs), [run for run in runs if len(run.buckets) > 1]
    small_rows, columns = -(-len(fields) // 3), min(4, len(groups))
    group_rows = -(-len(groups) // columns) if groups else 0
    heights = [3.6] + [2.3 * small_rows] * bool(fields) + [2.9 * group_rows + 0.5] * bool(groups)
    heights += [1.2 + 0.33 * len({parse_bucket(b)[0] for b in run.buckets}) for run in mapped]
    title = 0.4 if len(runs) == 1 else 0.3 * -(-len(runs) // 4) + 0.1
    figure = Figure(figsize=(WIDTH, sum(heights) + title), dpi=110, layout="constrained")
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    loss, top1 = next(parts).subplots(1, 2)
    _draw_with_validation(loss, runs, ("loss", "val_loss"), 1, "loss")
    _draw_with_validation(top1, runs, ("top1", "val_top1"), 100, "top-1, %")
    if fields:
        axes = next(parts).subplots(small_rows, 3, squeeze=False).flat
        for axis, field in itertools.zip_longest(axes, fields):
            if field:
                _draw_field(axis, runs, field)
            else:
                axis.remove()
    if groups:
        _draw_groups(next(parts), (group_rows, columns), groups)
    _draw_maps(parts, mapped, named=len(runs) > 1)
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    else:
        lines = [Line2D([], [], color=_colour(i), lw=3) for i in range(len(runs))]
        names = [run.name for run in runs]
        figure.legend(lines, names, loc="outside upper center", ncols=4, frameon=False)
    return figure


def group_buckets(runs: list[Run]) -> list[tuple[str, list[tuple]]]:
    """Which losses go into which panel, so that few lines tell many buckets apart.

    Returns:
      (title, lines) of each panel, a line being (label, colour, steps, losses); none for one
      bucket. Of one run a panel has a frame count, a line for each scale, and one of all buckets;
      of several a panel has a line for each run. Where there is one frame count, or one scale, the
      other tells the buckets apart.
    """
    names = sorted({name for run in runs for name in run.buckets}, key=parse_bucket)
    frames = {name: f"{parse_bucket(name)[0]} frames" for name in names}
    scales = {name: scale_name(name) for name in names}
    order = sorted(names, key=lambda name: parse_bucket(name)[1:])
    if len(names) == 1:
        return []
    by_frames = len(set(frames.values())) > 1

    def lines(run, chosen):
        return run.column("loss", [line for line in run.steps if line["bucket"] in chosen])

    if len(runs) > 1:
        panel = frames if by_frames else scales
        members = {title: [n for n in names if panel[n] == title] for title in panel.values()}
        return [
            (title, [("", _colour(i), *lines(run, chosen)) for i, run in enumerate(runs)])
            for title, chosen in members.items()
        ]
    if by_frames and len(set(scales.values())) > 1:
        panel, label = frames, scales
    else:  # one panel
        common = set(scales.values()) if by_frames else set(frames.values())
        title = f"size/patch {common.pop()}" if by_frames else common.pop()
        panel, label = dict.fromkeys(names, title), frames if by_frames else scales
    labels = list(dict.fromkeys(label[name] for name in (names if label is frames else order)))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(labels)))
    found: dict[str, list[tuple]] = {title: [] for title in panel.values()}
    for name in order:
        colour = colours[labels.index(label[name])]
        found[panel[name]].append((label[name], colour, *lines(runs[0], {name})))
    for panel_lines in found.values():
        panel_lines.append((ALL, "black", *lines(runs[0], set(names))))
    return list(found.items())


def _colour(index: int):
    return COLOURS[index % len(COLOURS)]


def _number(value: float, _=None) -> str:
    """A number on an axis in few characters: 43k, 1.2M, 0.002."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def _curve(axis, steps, values, colour, *, raw=True, share=0.04, width=1.6) -> np.ndarray:
    """Draws values faintly and their moving average; returns the average."""
    average = smooth(values, share)
    if raw:
        axis.plot(steps, values, color=colour, alpha=0.22, lw=0.6, zorder=1)
    marker = "o" if len(values) == 1 else None  # one point makes no line
    axis.plot(steps, average, color=colour, lw=width, marker=marker, ms=3, zorder=2)
    return average


def _finish(axis, label: str, shown, raw=(), *, zero=False, logs=False) -> None:
    """Labels an axis, and bounds it so that a few outliers don't flatten the curves.

    Args:
      axis: a panel.
      label: of its y axis, with the unit.
      shown: values that must be seen.
      raw: values of which the outermost percent may lie outside.
      zero: the axis begins at 0.
      logs: the values are decimal logarithms; so their average is one of orders of magnitude.
    """
    bounds = [v for values in shown if len(values) for v in (values.min(), values.max())]
    bounds += [v for values in raw if len(values) for v in np.percentile(values, (0.5, 99.5))]
    low, high = (min(bounds), max(bounds)) if bounds else (0.0, 1.0)
    low = 0.0 if zero else low
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    low, high = low if zero else low - margin, high + margin
    axis.set_ylim(low, high)
    axis.yaxis.set_major_formatter(FuncFormatter(_number))
    if logs:
        powers = np.arange(np.floor(low), np.ceil(high))
        ticks = [power + np.log10(digit) for power in powers for digit in (1, 1.5, 2, 3, 5, 7)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 8:
            ticks = [tick for tick in ticks if tick in powers]
        axis.yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 1 else MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _number(float(f"{10**v:.2g}"))))
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(_number))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_with_validation(axis, runs: list[Run], fields, factor: float, label: str) -> None:
    """A measure of training and of validation, over the steps."""
    shown, raw = [], []
    validated = False
    for index, run in enumerate(runs):
        steps, values = run.column(fields[0])
        raw.append(factor * values)
        shown.append(_curve(axis, steps, factor * values, _colour(index)))
        steps, values = run.column(fields[1], run.validations)
        shown.append(factor * values)
        colour = "black" if len(runs) == 1 else _colour(index)
        style = {"mec": colour, "mfc": "white", "ms": 5, "lw": 1.0, "zorder": 3}
        axis.plot(steps, factor * values, color=colour, ls=":", marker="o", **style)
        validated |= len(values) > 0
    _finish(axis, label, shown, raw, zero=factor == 100)
    colour = _colour(0) if len(runs) == 1 else "grey"
    style = {"mec": "black" if len(runs) == 1 else "grey", "mfc": "white", "ms": 5}
    kinds = [
        (Line2D([], [], color=colour, alpha=0.35, lw=0.8), "as logged"),
        (Line2D([], [], color=colour, lw=1.6), "moving average"),
    ]
    if validated:
        kinds.append(
            (Line2D([], [], color=style["mec"], ls=":", marker="o", **style), "validation")
        )
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    axis.legend(*zip(*kinds, strict=True), ncols=3, frameon=False, fontsize=9, **place)


def _draw_field(axis, runs: list[Run], field: str) -> None:
    """A field of the steps in a panel of its own."""
    label, factor = PANELS[field]
    logs, exact = field == "grad_norm", field in ("learning_rate", "compiled")
    shown, raw = [], []
    for index, run in enumerate(runs):
        steps, values = run.column(field)
        values = np.log10(np.maximum(values, 1e-12)) if logs else factor * values
        share = 0.0 if exact else 0.04
        shown.append(_curve(axis, steps, values, _colour(index), raw=not exact, share=share))
        raw.append(values[:0] if exact else values)
    _finish(axis, label, shown, raw, zero=not logs, logs=logs)
    if field == "compiled":
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _draw_groups(part, shape, groups) -> None:
    """The panels of `group_buckets`, all on the same axes, with one legend."""
    axes = part.subplots(*shape, squeeze=False)
    few = len(groups[0][1]) <= 5
    shown, raw, labels = [], [], {}
    for axis, (title, lines) in zip(axes.flat, groups, strict=False):
        for label, colour, steps, values in lines:
            logs = np.log10(np.maximum(values, 1e-12))
            if label == ALL:
                axis.plot(steps, smooth(logs, 0.12), color=colour, ls=":", lw=1.3, zorder=3)
                continue
            shown.append(_curve(axis, steps, logs, colour, raw=few, share=0.12, width=1.3))
            raw.append(logs if few else logs[:0])
            if label:
                labels[label] = colour
        axis.set_title(title, fontsize=10)
    steps = np.concatenate([line[2] for _, lines in groups for line in lines])
    for index, axis in enumerate(axes.flat):
        if index < len(groups):
            _finish(axis, "" if index % shape[1] else "loss, log scale", shown, raw, logs=True)
            margin = 0.03 * np.ptp(steps) or 0.5
            axis.set_xlim(steps.min() - margin, steps.max() + margin)
        else:
            axis.remove()
    if labels:
        lines = [Line2D([], [], color=colour, lw=2.5) for colour in labels.values()]
        lines, labels = [*lines, Line2D([], [], color="black", ls=":")], [*labels, ALL]
        place = {"loc": "outside right upper", "ncols": -(-len(labels) // 14), "frameon": False}
        part.legend(lines, labels, title="size/patch" if len(groups) > 1 else None, **place)


def _draw_maps(parts, runs: list[Run], named: bool) -> None:
    """The buckets of each run, frame counts by scales: the loss at the end, the time of a step.

    Args:
      parts: a part of the picture for each run.
      runs: with more than one bucket each; a colour means the same for all.
      named: the titles name the run.
    """
    # (title, colours, norm, values of each run)
    kinds = [
        ("mean loss of the last fifth of the steps", "viridis", Normalize, map(end_losses, runs)),
        ("median seconds of a step", "cividis", LogNorm, map(step_seconds, runs)),
    ]
    axes = [part.subplots(1, 2) for part, _ in zip(parts, runs, strict=True)]
    for column, (title, colours, norm, cells) in enumerate(kinds):
        cells = list(cells)
        known = [value for of_run in cells for value in of_run.values()]
        for row, (run, of_run) in enumerate(zip(runs, cells, strict=True)):
            axis = axes[row][column]
            if of_run:
                _draw_map(axis, run, of_run, colours, norm(min(known), max(known)))
                axis.set_title(f"{run.name}: {title}" if named else title, fontsize=10)
            else:
                axis.remove()


def _draw_map(axis, run: Run, cells: dict[str, float], colours: str, norm) -> None:
    """A cell with its number for each bucket of a run."""
    names = sorted(run.buckets, key=lambda name: parse_bucket(name)[1:])
    scales = list(dict.fromkeys(map(scale_name, names)))
    frames = sorted({parse_bucket(name)[0] for name in names})
    values = np.full((len(frames), len(scales)), np.nan)
    for name, value in cells.items():
        values[frames.index(parse_bucket(name)[0]), scales.index(scale_name(name))] = value
    image = axis.imshow(values, aspect="auto", cmap=colours, norm=norm)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            text = f"{value:#.3g}" if value < 100 else f"{value:.0f}"
            size = 9 if len(scales) <= 12 else 7
            axis.text(j, i, text, ha="center", va="center", color=ink, fontsize=size)
    turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(scales) > 8 else {}
    axis.set_xticks(range(len(scales)), scales, fontsize=9, **turn)
    axis.set_yticks(range(len(frames)), map(str, frames), fontsize=9)
    axis.set_xlabel("size/patch, pixels")
    axis.set_ylabel("frames")


def main_run(argv: list[str]) -> int:
    """The command `stretchysnake inspect run`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake inspect run",
        description="Draws the curves of a run, finished or not, from its metrics, and says what "
        "they show; several runs are compared.",
    )
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="a run's workdir")
    parser.add_argument(
        "--out", metavar="FILE.png", help="default: DIR/curves.png, of several runs curves.png"
    )
    args = parser.parse_args(argv)
    folders = [pathlib.Path(name) for name in args.workdirs]
    out = pathlib.Path(args.out or (folders[0] if len(folders) == 1 else ".") / "curves.png")
    if out.suffix != ".png":
        raise ConfigError(f"--out is {args.out!r}: it takes the name of a .png file")
    short = [folder.absolute().name for folder in folders]
    names = short if len(set(short)) == len(short) else args.workdirs
    runs = [Run(folder, name) for folder, name in zip(folders, names, strict=True)]
    print("\n\n".join(map(summary, runs)))
    figure = make_figure(runs)
    with whole_file(out) as part:
        figure.savefig(part, format="png")
    print(f"\ncurves: {out}")
    return 0
