"""Pictures: heat maps of accuracy over frame counts and sizes."""

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from stretchysnake_jax.grid import has_patches, pareto_front, scale_name, scale_of
from stretchysnake_jax.whole_file import whole_file


def heat_maps(
    path,
    panels: list[tuple[str, list[dict]]],
    *,
    difference: bool = False,
    frame: tuple[str, str] = ("trained", "trained there"),
) -> None:
    """Draws grids of top-1 side by side, four in a row, on one scale; trained cells have a frame.

    Args:
      path: the PNG to write, whole or not at all.
      panels: (title, rows of a grid) each. Rows with low and high have them written below; a
        cell whose top1 is None stays blank.
      difference: the rows' top1 are differences; the colours run from red through white to blue.
      frame: the field of a row that says whether its cell has a frame, and what that means.
    """
    grids = [_columns(rows) for _, rows in panels]
    widths = [
        1.6 + max(0.75 * len(columns), 0.07 * len(title))
        for columns, (title, _) in zip(grids, panels, strict=True)
    ]
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    width = 1.0 + max(sum(widths[i : i + across]) for i in range(0, len(widths), across))
    height = down * max(2.9, 1.7 + 0.55 * max(len(_frames(rows)) for _, rows in panels))
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes = axes[: len(panels)]
    limits = {"cmap": "viridis", "vmin": 0, "vmax": 100}
    if difference:
        largest = max((100 * abs(row["top1"]) for _, rows in panels for row in rows), default=0)
        largest = min(100, max(10, 10 * np.ceil(largest / 10)))
        limits = {"cmap": "RdBu", "vmin": -largest, "vmax": largest}
    for axis, columns, (title, rows) in zip(axes, grids, panels, strict=True):
        frames, patches = _frames(rows), has_patches(rows)
        values = np.full((len(frames), len(columns)), np.nan)
        for row in rows:
            i, j = frames.index(row["frames"]), columns.index(scale_of(row, patches))
            if row["top1"] is None:
                continue
            values[i, j] = 100 * row["top1"]
            dark = abs(values[i, j]) > 0.6 * largest if difference else values[i, j] < 60
            text = f"{round(values[i, j]):+d}" if difference else f"{values[i, j]:.0f}"
            ink = {"ha": "center", "color": "white" if dark else "black"}
            between = "low" in row
            axis.text(j, i - 0.08 * between, text, va="bottom" if between else "center", **ink)
            if between:
                text = f"{round(100 * row['low']):+d} … {round(100 * row['high']):+d}"
                axis.text(j, i + 0.12, text, va="top", fontsize=6, **ink)
            if row[frame[0]]:
                axis.add_patch(
                    Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, ec="orangered", lw=2)
                )
        image = axis.imshow(values, aspect="auto", **limits)
        turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if patches else {}
        axis.set_xticks(range(len(columns)), map(scale_name, columns), **turn)
        axis.set_yticks(range(len(frames)), [str(f) for f in frames])
        axis.set_xlabel("size/patch, pixels" if patches else "size, pixels")
        axis.set_ylabel("frames")
        axis.set_title(title, fontsize=10)
    label = "difference of top-1, points" if difference else "top-1, %"
    figure.colorbar(image, ax=list(axes), label=f"{label}\n(framed: {frame[1]})")
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def cost_curve(path, title: str, rows: list[dict]) -> None:
    """Draws accuracy against GFLOPs, a point per cell, and the line of `grid.pareto_front`.

    Cells on the front are labelled TxS, frames by size in pixels, with the patch where a size has
    several, as far as there is room; a colour is a frame count, trained cells have a ring.

    Args:
      path: the PNG to write, whole or not at all.
      title: of the picture.
      rows: of a grid.
    """
    figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    axis = figure.subplots()
    frames, patches, front = _frames(rows), has_patches(rows), pareto_front(rows)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(frames)))
    for row in rows:
        colour = colours[frames.index(row["frames"])]
        edge = {"mec": "orangered", "mew": 2} if row["trained"] else {"mec": "white", "mew": 0.5}
        edge["zorder"] = 3 if row["trained"] else 2
        axis.plot(row["gflops"], 100 * row["top1"], "o", ms=8, color=colour, **edge)
    x, y = [r["gflops"] for r in front], [100 * r["top1"] for r in front]
    x, y = [*x, max(r["gflops"] for r in rows)], [*y, y[-1]]
    axis.step(x, y, where="post", color="0.4", lw=1.2, zorder=0)
    axis.set_xscale("log")
    axis.margins(x=0.18, y=0.12)
    axis.autoscale_view()
    texts = []
    for row in reversed(front):
        text = f"{row['frames']}x{scale_name(scale_of(row, patches))}"
        at = row["gflops"], 100 * row["top1"]
        # The best come first; a label that would lie on one of theirs is left out.
        place = axis.transAxes.inverted().transform(axis.transData.transform(at))
        if all(abs(place[0] - x) > 0.12 or abs(place[1] - y) > 0.04 for x, y in texts):
            axis.annotate(text, at, (-6, 6), textcoords="offset points", fontsize=8, ha="right")
            texts.append(place)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("GFLOPs of a clip, full count, a multiply-add is one (log scale)")
    axis.set_ylabel("top-1, %")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    kinds = [Line2D([], [], ls="", marker="o", ms=7, color=c) for c in colours]
    names = [f"{t} frames" for t in frames]
    kinds.append(Line2D([], [], ls="", marker="o", ms=7, color="0.85", mec="orangered", mew=2))
    kinds.append(Line2D([], [], color="0.4", lw=1.2))
    names += ["trained there", "Pareto front"]
    figure.legend(kinds, names, loc="outside right upper", frameon=False, fontsize=9)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def _frames(rows):
    return sorted({row["frames"] for row in rows})


def _columns(rows):
    patches = has_patches(rows)
    return sorted({scale_of(row, patches) for row in rows})


def confusion_matrix(path, counts: np.ndarray, classes: list[str]) -> None:
    """Draws which classes (rows) were taken for which (columns), in % of a row's clips.

    Up to 60 classes have their names on both sides and up to 25 their numbers in the cells; more
    have index numbers on the sides, and the most frequent mistakes by name beside the picture. A
    class without clips is a grey row.

    Args:
      path: the PNG to write, whole or not at all.
      counts: clips, (classes, classes).
      classes: their names.
    """
    n, totals = len(classes), counts.sum(1)
    shares = np.full(counts.shape, np.nan)
    np.divide(100.0 * counts, totals[:, None], out=shares, where=totals[:, None] > 0)
    names = [name if len(name) <= 28 else f"{name[:27]}…" for name in classes]
    side = 2.0 + 0.4 * n if n <= 25 else 3.0 + 0.15 * n if n <= 60 else 12.0
    room = 0.07 * max(map(len, names)) if n <= 60 else 0.5
    aside = 0 if n <= 60 else 3.6
    figure = Figure(figsize=(side + room + 1 + aside, side + room), dpi=130, layout="constrained")
    axis = figure.subplots() if not aside else figure.subplots(1, 2, width_ratios=[side, aside])
    if aside:
        axis, text = axis
        _list_mistakes(text, shares, names)
    axis.set_facecolor("0.8")
    # Many classes have small cells and rare mistakes: a root lifts them out of the white, and
    # blended with others a cell of few pixels would lose its colour.
    norm = PowerNorm(1.0 if n <= 25 else 0.5, 0, 100)
    image = axis.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    if n <= 60:
        size = 9 if n <= 25 else 7
        axis.set_xticks(range(n), names, rotation=90, fontsize=size)
        axis.set_yticks(range(n), names, fontsize=size)
    axis.set_xlabel("taken for" if n <= 60 else "taken for (index of the class)")
    axis.set_ylabel("class" if n <= 60 else "index of the class")
    for i, j in zip(*np.nonzero(counts), strict=True) if n <= 25 else ():
        colour = "white" if shares[i, j] > 55 else "black"
        number = f"{shares[i, j]:.0f}" if shares[i, j] >= 0.5 else "<1"
        axis.text(j, i, number, ha="center", va="center", fontsize=8, color=colour)
    right = 100 * counts.trace() / max(1, totals.sum())
    grey = "" if totals.all() else "; grey: no clips"
    axis.set_title(f"{totals.sum():,} clips, {right:.1f} % right{grey}", fontsize=10)
    figure.colorbar(image, ax=axis, label="% of the class's clips", shrink=0.8)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def _list_mistakes(axis, shares, names, most: int = 35) -> None:
    """Writes the largest cells off the diagonal of a confusion matrix, in %, as text."""
    wrong = np.nan_to_num(shares) * (1 - np.eye(len(names)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    cells = [divmod(int(k), len(names)) for k in order if wrong.flat[k] > 0]
    lines = [f"{wrong[i, j]:3.0f}  {names[i]} ({i})\n     as {names[j]} ({j})" for i, j in cells]
    head = "the most frequent mistakes, %\nof the class's clips\n\n"
    axis.text(0, 0.98, head + "\n".join(lines), va="top", fontsize=7.5, transform=axis.transAxes)
    axis.set_axis_off()
