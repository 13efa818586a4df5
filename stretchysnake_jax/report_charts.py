"""The pictures of a report: lines and points as SVG, heat maps and confusions as tables.

Every value is written into the page, in a label that the page's script shows where one points.
"""

import base64
import dataclasses
import json
import math

import cv2
import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from stretchysnake_jax.grid import has_patches, pareto_front, scale_name, scale_of
from stretchysnake_jax.report_page import Html, element, join, scroll, table

# Of a chart, in units that are about a pixel on a phone and on a desktop.
WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 400, 22, 206
POINTS = 200  # of a line; more could not be told apart
NAMED = 25  # classes of which a confusion is a table with numbers
MISTAKES = 12  # listed below a confusion


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
      name: in the legend and in the label.
      steps, values: (n,) each.
      hue: of its colour, degrees.
      dots: marks its points.
      dashed: not solid.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    hue: float
    dots: bool = False
    dashed: bool = False

    @property
    def kind(self) -> str:
        """Class of its marks."""
        return "dashed" if self.dashed else "solid"

    @property
    def style(self) -> str:
        """Style of its marks."""
        return f"--hue:{self.hue:.0f}"


def hues(count: int, last: float = 25) -> list[float]:
    """Colours of things that have an order, from blue through green to the last, orange."""
    return list(np.linspace(250, last, count)) if count > 1 else [215.0]


def line_chart(
    title: str, unit: str, lines: list[Line], *, zero: bool = False, among: list[Line] | None = None
) -> Html:
    """Lines over the steps of a run.

    Args:
      title: above the chart.
      unit: of the values, such as "top-1, %".
      lines: what is drawn; those without a value are left out.
      zero: the axis of the values begins at 0.
      among: all lines that the axes have room for, so that charts side by side have the same.
    """
    lines = [_thin(line) for line in lines if len(line.steps)]
    steps = np.concatenate([line.steps for line in among or lines])
    values = np.concatenate([line.values for line in among or lines])
    margin = 0 if np.ptp(steps) else 1
    across = _Axis(steps.min() - margin, steps.max() + margin, LEFT, RIGHT, whole=True)
    low, high = (0.0 if zero else values.min()), values.max()
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    up = _Axis(low - room * (not zero), high + room, BOTTOM, TOP)
    marks = []
    for line in lines:
        at = [(across(x), up(y)) for x, y in zip(line.steps, line.values, strict=True)]
        if len(at) > 1:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            kind = f"line {line.kind}"
            marks.append(element("polyline", points=points, class_=kind, style=line.style))
        if line.dots or len(at) == 1:
            place = {"class_": "dot", "style": line.style, "r": 3}
            marks += [element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", **place) for x, y in at]
    data = {"width": WIDTH, "left": LEFT, "right": RIGHT, "low": across.low, "high": across.high}
    data["lines"] = [
        {"name": line.name, "x": line.steps.astype(int).tolist(), "y": _short(line.values)}
        for line in lines
    ]
    svg = element(
        "svg",
        element("title", f"{title}: {unit} over steps"),
        *_axes(across, up, "step", unit),
        *marks,
        element("line", y1=TOP, y2=BOTTOM, class_="cross"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="lines",
        data_chart=json.dumps(data, separators=(",", ":")),
    )
    keys = [_key(line.name, f"key {line.kind}", line.style) for line in lines]
    legend = element("ul", *keys, class_="legend") if len(lines) > 1 else ""
    return element("figure", element("figcaption", title), svg, legend)


def cost_chart(rows: list[dict]) -> Html:
    """Top-1 against GFLOPs: a dot per cell of a grid, and the line of `grid.pareto_front`."""
    front, patches = pareto_front(rows), has_patches(rows)
    frames = sorted({row["frames"] for row in rows})
    colour = dict(zip(frames, hues(len(frames), 90), strict=True))
    costs = np.log10([max(row["gflops"], 1e-12) for row in rows])
    tops = 100 * np.array([row["top1"] for row in rows])
    across = _Axis(costs.min() - 0.1, costs.max() + 0.1, LEFT, RIGHT, logs=True)
    room = 0.08 * np.ptp(tops) or 2.0
    up = _Axis(max(0.0, tops.min() - room), min(104.0, tops.max() + room), BOTTOM, TOP)
    places = [(across(x), up(y)) for x, y in zip(costs, tops, strict=True)]
    steps, last = [], None
    for row in front:
        x, y = places[rows.index(row)]
        steps += [f"{x:.1f},{last:.1f}"] if last is not None else []
        steps.append(f"{x:.1f},{y:.1f}")
        last = y
    steps.append(f"{max(x for x, _ in places):.1f},{last:.1f}")
    dots = [
        element(
            "circle",
            cx=f"{x:.1f}",
            cy=f"{y:.1f}",
            r=6,
            class_="dot tip framed" if row["trained"] else "dot tip",
            style=f"--hue:{colour[row['frames']]:.0f}",
            aria_label=cell_label(row) + (", on the Pareto front" if row in front else ""),
            role="img",
        )
        for row, (x, y) in zip(rows, places, strict=True)
    ]
    texts, taken = [], []
    for row in reversed(front):  # the best come first; what would lie on a label is left out
        x, y = places[rows.index(row)]
        if all(abs(x - a) > 60 or abs(y - b) > 13 for a, b in taken):
            name = f"{row['frames']}x{scale_name(scale_of(row, patches))}"
            left = x > LEFT + 60
            place = {"x": f"{x - 9 if left else x + 9:.1f}", "y": f"{max(y - 6, TOP - 2):.1f}"}
            texts.append(element("text", name, text_anchor="end" if left else "start", **place))
            taken.append((x, y))
    svg = element(
        "svg",
        element("title", "top-1 against GFLOPs, a dot per cell, and the Pareto front"),
        *_axes(across, up, "GFLOPs of a clip (log scale)", "top-1, %"),
        element("polyline", points=" ".join(steps), class_="front"),
        *dots,
        *texts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="group",
    )
    keys = [_key(name_frames(t), "key round", f"--hue:{colour[t]:.0f}") for t in frames]
    keys += [_key("trained there", "key round ring"), _key("Pareto front", "key front")]
    title = element("figcaption", "Accuracy against cost")
    return element("figure", title, svg, element("ul", *keys, class_="legend"), class_="wide")


def heat_map(rows: list[dict]) -> Html:
    """A grid's top-1, %: frame counts by sizes; trained cells have a frame."""
    patches = has_patches(rows)
    cells = {(row["frames"], scale_of(row, patches)): row for row in rows}
    scales = sorted({scale for _, scale in cells})
    colours = matplotlib.colormaps["viridis"]
    lines = []
    for frames in sorted({frames for frames, _ in cells}):
        line = [element("th", frames, scope="row")]
        for scale in scales:
            row = cells.get((frames, scale))
            if row is None:
                line.append(element("td", class_="none"))
                continue
            style = _paint(colours(row["top1"]))
            kind = "tip framed" if row["trained"] else "tip"
            text = f"{100 * row['top1']:.1f}"
            line.append(element("td", text, class_=kind, style=style, aria_label=cell_label(row)))
        lines.append(element("tr", *line))
    corner = "frames \\ size/patch" if patches else "frames \\ size"
    head = [element("th", name, scope="col") for name in (corner, *map(scale_name, scales))]
    key = element("span", class_="key framed")
    caption = element("caption", "Top-1, %; sizes in pixels. ", key, "trained there")
    parts = caption, element("thead", element("tr", *head)), element("tbody", *lines)
    return scroll(element("table", *parts, class_="map"))


def locate(row: dict) -> tuple[int, int, int]:
    """What a cell of a grid is known by: frames, height, width."""
    return row["frames"], row["height"], row["width"]


def name_cell(row: dict) -> str:
    """The scale of a cell of a grid, in words."""
    size = f"{row['height']}x{row['width']}"
    return f"{name_frames(row['frames'])} of {size}, patch {row['patch']}"


def name_frames(count: int) -> str:
    """So many frames, in words."""
    return f"{count} frame{'s' * (count != 1)}"


def cell_label(row: dict) -> str:
    """What a cell of a grid measured, in a line."""
    return (
        f"{name_cell(row)}: top-1 {100 * row['top1']:.1f} %, "
        f"top-5 {100 * row['top5']:.1f} %, mean class {100 * row['mean_class']:.1f} %, loss "
        f"{row['loss']:.3f}, {row['gflops']:.3g} GFLOPs, {row['clips_per_s']:.3g} clips/s, "
        + ("trained there" if row["trained"] else "not trained there")
    )


def confusion_map(counts: np.ndarray, classes: list[str]) -> Html:
    """Which classes were taken for which, in % of a class's clips, and the most frequent mistakes.

    Up to 25 classes are a table, more a picture of a pixel per pair, its darkness the root of the
    share.

    Args:
      counts: clips, class by guess, (classes, classes).
      classes: their names.
    """
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    if len(classes) <= NAMED:
        lines = []
        for i, name in enumerate(classes):
            line = [element("th", _cut(name), scope="row")]
            for j, guess in enumerate(classes):
                label = f"{name} taken for {guess}: {counts[i, j]} of {totals[i, 0]} clips"
                if not counts[i, j]:
                    line.append(element("td", class_="none tip", aria_label=label))
                    continue
                text = f"{100 * shares[i, j]:.0f}" if shares[i, j] >= 0.005 else "<1"
                kind = "part tip strong" if shares[i, j] > 0.5 else "part tip"
                style = f"--share:{0.1 + 0.9 * shares[i, j]:.2f}"
                line.append(element("td", text, class_=kind, style=style, aria_label=label))
            lines.append(element("tr", *line))
        heads = [element("th", _cut(name), scope="col") for name in ("class \\ guess", *classes)]
        parts = element("thead", element("tr", *heads)), element("tbody", *lines)
        shown = scroll(element("table", *parts, class_="map confusion"))
    else:
        pixels = (255 * matplotlib.colormaps["Blues"](np.sqrt(shares))[..., 2::-1]).astype(np.uint8)
        alt = f"confusion of {len(classes)} classes, a row per class, a column per guess"
        shown = element("img", src=data_uri(pixels, ".png"), alt=alt, class_="matrix")
    wrong = shares * (1 - np.eye(len(classes)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [divmod(int(k), len(classes)) for k in order if wrong.flat[k] > 0]
    if not pairs:
        return shown
    rows = [
        (classes[i], classes[j], f"{100 * wrong[i, j]:.0f}", f"{counts[i, j]} of {totals[i, 0]}")
        for i, j in pairs
    ]
    head = ("class", "taken for", "% of its clips", "clips")
    caption = "The most frequent mistakes"
    return join([shown, table(head, rows, caption=caption, class_="words")])


def data_uri(pixels: np.ndarray, suffix: str) -> str:
    """A picture, uint8 BGR (height, width, 3), as a data: URI; the suffix names its format."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 80] if suffix == ".jpg" else []
    _, data = cv2.imencode(suffix, pixels, quality)
    kind = {".jpg": "jpeg", ".png": "png"}[suffix]
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"


class _Axis:
    """Places of values along one side of a chart.

    Args:
      low, high: the values at its ends.
      begin, end: the places of those.
      logs: the values are decimal logarithms.
      whole: only whole numbers have a mark.
    """

    def __init__(self, low, high, begin, end, *, logs: bool = False, whole: bool = False):
        self.low, self.high = float(low), float(high)
        self.begin, self.end, self.logs, self.whole = begin, end, logs, whole

    def __call__(self, value) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.0
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of the round values."""
        if self.logs:
            found = LogLocator(subs=(1, 2, 5)).tick_values(10**self.low, 10**self.high)
            pairs = [(math.log10(value), value) for value in found]
        else:
            locator = MaxNLocator(5, integer=self.whole)
            pairs = [(v, v) for v in locator.tick_values(self.low, self.high)]
        inside = [(at, v) for at, v in pairs if self.low - 1e-9 <= at <= self.high + 1e-9]
        return [(self(at), _number(v)) for at, v in inside]


def _number(value: float) -> str:
    """A number on an axis in few characters: 1.2M, 40k, 2,000, 0.05, 2.5e-4."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def _axes(across: _Axis, up: _Axis, below: str, above: str) -> list[Html]:
    """Grid lines, numbers and names of the axes."""
    marks = []
    for y, text in up.ticks():
        marks.append(
            element("line", x1=LEFT, x2=RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid")
        )
        marks.append(element("text", text, x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for x, text in across.ticks():
        marks.append(
            element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=BOTTOM, y2=BOTTOM + 4, class_="axis")
        )
        marks.append(element("text", text, x=f"{x:.1f}", y=BOTTOM + 18, text_anchor="middle"))
    marks.append(element("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    marks.append(element("text", below, x=(LEFT + RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"))
    marks.append(element("text", above, x=4, y=12))
    return marks


def _key(name: str, class_: str, style: str | None = None) -> Html:
    """An entry of a legend."""
    return element("li", element("span", class_=class_, style=style), name)


def _thin(line: Line) -> Line:
    """The line by at most POINTS points."""
    kept = np.unique(np.linspace(0, len(line.steps) - 1, POINTS).astype(int))
    return dataclasses.replace(line, steps=line.steps[kept], values=line.values[kept])


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _cut(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def _paint(colour) -> str:
    """A style of this background, (red, green, blue, ...) 0..1, and ink that is read on it."""
    ink = "#000" if np.dot(colour[:3], (0.3, 0.59, 0.11)) > 0.5 else "#fff"
    return f"background:{matplotlib.colors.to_hex(colour)};color:{ink}"
