"""Pictures: heat maps of accuracy over frame counts and sizes."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stretchysnake_jax.whole_file import whole_file

matplotlib.use("Agg")


def heat_maps(path, panels: list[tuple[str, list[dict]]], *, difference: bool = False) -> None:
    """Draws grids of top-1 side by side on one scale; trained cells have a frame.

    Args:
      path: the PNG to write, whole or not at all.
      panels: (title, rows of a grid) each.
      difference: the rows' top1 are differences; the colours run from red through white to blue.
    """
    width = sum(1.6 + 0.75 * len(_sizes(rows)) for _, rows in panels) + 1.0
    height = 1.7 + 0.55 * max(len(_frames(rows)) for _, rows in panels)
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    limits = {"cmap": "RdBu", "vmin": -100, "vmax": 100} if difference else {}
    limits = limits or {"cmap": "viridis", "vmin": 0, "vmax": 100}
    for axis, (title, rows) in zip(axes, panels, strict=True):
        frames, sizes = _frames(rows), _sizes(rows)
        values = np.full((len(frames), len(sizes)), np.nan)
        for row in rows:
            i, j = frames.index(row["frames"]), sizes.index((row["height"], row["width"]))
            values[i, j] = 100 * row["top1"]
            dark = abs(values[i, j]) > 60 if difference else values[i, j] < 60
            text = f"{values[i, j]:+.0f}" if difference else f"{values[i, j]:.0f}"
            axis.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
            if row["trained"]:
                axis.add_patch(
                    Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, ec="orangered", lw=2)
                )
        image = axis.imshow(values, aspect="auto", **limits)
        names = [str(h) if h == w else f"{h}x{w}" for h, w in sizes]
        axis.set_xticks(range(len(sizes)), names)
        axis.set_yticks(range(len(frames)), [str(f) for f in frames])
        axis.set_xlabel("size, pixels")
        axis.set_ylabel("frames")
        axis.set_title(title, fontsize=10)
    label = "difference of top-1, points" if difference else "top-1, %"
    figure.colorbar(image, ax=list(axes), label=f"{label}   (framed: trained there)")
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def _frames(rows):
    return sorted({row["frames"] for row in rows})


def _sizes(rows):
    return sorted({(row["height"], row["width"]) for row in rows})
