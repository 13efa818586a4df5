"""The study's figures: heat maps, accuracy against GFLOPs, retrieval across scales."""

import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from stretchysnake_jax import plots
from stretchysnake_jax.whole_file import whole_file

STYLES = {"own": "-", "kernel": "--", "resized": ":"}
_PANELS = 4  # of a picture
# Models that have the same colour in every picture, those of matplotlib's tab10 in its order.
_KNOWN = ("vanilla", "static_tokens", "temporal", "stretchy_plus", "spatial")


def draw(out: pathlib.Path, sheets: dict, retrieval: list[dict]) -> list[pathlib.Path]:
    """Draws all figures; returns their paths.

    Args:
      out: the folder.
      sheets: of `study_report.make_lines`.
      retrieval: of `study_report.retrieval_lines`.
    """
    paths = []
    for sheet, lines in sheets.items():
        lines = [line for line in lines if line.seeds]
        for first in range(0, len(lines), _PANELS):
            panels = [(line.title, mean_grid(line)) for line in lines[first : first + _PANELS]]
            paths.append(out / f"heat_{sheet}_{first // _PANELS + 1}.png")
            plots.heat_maps(paths[-1], panels)
            shrink(paths[-1])
        if lines:
            paths.append(out / f"curves_{sheet}.png")
            curves(paths[-1], sheet, lines)
            shrink(paths[-1])
    if retrieval:
        paths.append(out / "retrieval.png")
        matrices(paths[-1], retrieval)
        shrink(paths[-1])
    return paths


def shrink(path) -> None:
    """Writes a picture again at most 1,700 pixels wide and with 256 colours: it is committed."""
    with Image.open(path) as image, whole_file(path) as part:
        image = image.convert("RGB")
        image.thumbnail((1700, 1700), Image.Resampling.LANCZOS)
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(part, format="png", optimize=True)


def mean_grid(line) -> list[dict]:
    """The cells of a line as rows for `plots.heat_maps`, top1 a share, the mean over seeds."""
    return [
        {"frames": t, "height": size, "width": size, "trained": bool(cell["trained"])}
        | {"top1": float(np.mean([cell["top1"][seed] for seed in line.seeds])) / 100}
        for (t, size), cell in line.cells.items()
    ]


def choose_colours(models) -> dict:
    """A colour for each model, the same in every picture for those of `_KNOWN`; 25 at most."""
    ten, twenty = (matplotlib.colormaps[name].colors for name in ("tab10", "tab20b"))
    others = [model for model in dict.fromkeys(models) if model not in _KNOWN]
    free = (*ten[len(_KNOWN) :], *twenty[::3], *twenty[1::3], *twenty[2::3])
    return dict(zip(_KNOWN, ten, strict=False)) | dict(zip(others, free, strict=False))


def curves(path, title: str, lines: list) -> None:
    """Draws what each line reaches within a budget of GFLOPs, mean over seeds.

    A colour is a model; the controls of one are dashed (kernel) and dotted (video resized).

    Args:
      path: the PNG to write, whole or not at all.
      title: of the picture.
      lines: of a sheet, `study_report.Line`.
    """
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axis = figure.subplots()
    colours = choose_colours(line.model for line in lines)
    most = max(cell["gflops"] for line in lines for cell in line.cells.values())
    for line in lines:
        points = sorted(
            (cell["gflops"], np.mean([cell["top1"][seed] for seed in line.seeds]))
            for cell in line.cells.values()
        )
        x, y = (np.array(part) for part in zip(*points, strict=True))
        y = np.maximum.accumulate(y)
        style = {
            "color": colours[line.model],
            "ls": STYLES[line.test],
            "lw": 1.6,
            "label": line.title,
        }
        axis.step([*x, most], [*y, y[-1]], where="post", **style)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("GFLOPs of a clip, full count, a multiply-add is one (log scale)")
    axis.set_ylabel("best top-1 within them, %")
    axis.set_title(f"{title}: mean over seeds of the best cell", fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def matrices(path, found: list[dict]) -> None:
    """Draws R@1 by scale of gallery (rows) and query (columns), a panel per model and test.

    Args:
      path: the PNG to write, whole or not at all.
      found: rows of `study_report.retrieval_lines`.
    """
    names = list(dict.fromkeys((r["model"], r["test"]) for r in found))
    across = min(_PANELS, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(1 + 2.9 * across, 0.4 + 2.9 * down), dpi=110, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes = axes[: len(names)]
    for axis, name in zip(axes, names, strict=True):
        own = [r for r in found if (r["model"], r["test"]) == name]
        scales = list(dict.fromkeys(r["query"] for r in own))
        values = np.full((len(scales), len(scales)), np.nan)
        for row in own:
            i, j = scales.index(row["gallery"]), scales.index(row["query"])
            values[i, j] = row["mean"]
            ink = {"ha": "center", "va": "center", "color": "w" if values[i, j] < 60 else "k"}
            axis.text(j, i, f"{values[i, j]:.0f}", **ink)
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=100)
        axis.set_xticks(range(len(scales)), scales, fontsize=8)
        axis.set_yticks(range(len(scales)), scales, fontsize=8)
        axis.set_title(", ".join(name), fontsize=9)
    axes[0].set_ylabel("gallery, frames x size")
    axes[0].set_xlabel("query, frames x size")
    figure.colorbar(image, ax=list(axes), label="R@1, %", shrink=0.8)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
