"""The table of an ablation: its rows on disk, what they say on average, and pictures."""

import json
import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stretchysnake_jax import grid, plots
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.whole_file import whole_file

KEY = ("variant", "weights", "method", "frames", "height", "width", "seed")
SCORES = ("top1", "top5", "mean_class", "loss")
COLUMNS = (*KEY[:-1], "patch", "seed", "trained", *SCORES, "gflops", "clips", "steps", "run")
COLUMNS += ("reason",)
OWN = ("all", "own")  # (weights, method): those of the run itself
COLOURS = {"all": "#33507d", "kernel": "#c7632f", "spatial": "#3f8f5f", "temporal": "#8a5aa8"}


class Table:
    """The rows that are done, in PATH.csv and PATH.json, which are whole after every `add`."""

    def __init__(self, path: pathlib.Path):
        self.path, file = path, path.with_suffix(".json")
        self.rows = json.loads(file.read_text()) if file.exists() else []
        self.found = len(self.rows)
        self._keys = {_key(row) for row in self.rows}

    def __contains__(self, row: dict) -> bool:
        return _key(row) in self._keys

    def add(self, rows: list[dict]) -> None:
        """Appends rows with the keys of COLUMNS."""
        self.rows += rows
        self._keys |= {_key(row) for row in rows}
        grid.write_table(self.rows, self.path, COLUMNS)


def _key(row):
    return tuple(row[name] for name in KEY)


def claim(out: pathlib.Path, settings: dict) -> None:
    """Writes what an ablation is made of; its axes may have grown since it was begun.

    Args:
      out: its folder.
      settings: "axes" by name, lists; and whatever may not change, by name.

    Raises:
      ConfigError: the folder holds an ablation with other settings; names the first.
    """
    path, settings = out / "settings.json", json.loads(json.dumps(settings))
    if path.exists():
        old = json.loads(path.read_text())
        for name in dict.fromkeys((*settings, *old)):
            then, now = old.get(name), settings.get(name)
            if name != "axes" and then != now:
                raise ConfigError(
                    f"{out} holds an ablation with another setting: {name} is {then!r} there and "
                    f"{now!r} now; take a new --out"
                )
        for name, values in old["axes"].items():
            if lost := [value for value in values if value not in settings["axes"][name]]:
                raise ConfigError(
                    f"{out} holds an ablation with more {name}: {lost} too; name those as well, or "
                    "take a new --out"
                )
    with whole_file(path) as part:
        part.write_text(json.dumps(settings, indent=1) + "\n")


def common_cells(rows: list[dict]) -> tuple[set, str]:
    """The cells on which variants are compared, (frames, height, width), and what to call them.

    Those that every model which has scores can run and none was trained on; if there is none, all
    that every model can run.
    """
    found, trained = {}, set()
    for row in rows:
        place = row["frames"], row["height"], row["width"]
        if row["top1"] is not None:
            found.setdefault((row["variant"], row["seed"]), set()).add(place)
            trained |= {place} if row["trained"] else set()
    common = set.intersection(*found.values()) if found else set()
    unseen = common - trained
    name = f"{len(unseen)} cells unseen by all" if unseen else f"all {len(common)} common cells"
    return unseen or common, name


def summarise(rows: list[dict]) -> tuple[list[dict], str]:
    """Mean top-1 of every (variant, weights, method).

    Returns:
      (dicts of these, of common: the mean over `common_cells`, and trained: over the cells trained
      on, a value per seed each, NaN where there is none; what the common cells are called).
    """
    common, name = common_cells(rows)
    groups = {}
    for row in rows:
        key = row["variant"], row["weights"], row["method"]
        seeds = groups.setdefault(key, {}).setdefault(row["seed"], [])
        if row["top1"] is not None:
            seeds.append(row)
    found = []
    for key, seeds in groups.items():
        line = dict(zip(("variant", "weights", "method"), key, strict=True))
        line["common"] = [grid.mean_top1(kept, among=common) for kept in seeds.values()]
        line["trained"] = [grid.mean_top1(kept, trained=True) for kept in seeds.values()]
        found.append(line)
    return found, name


def table(lines: list[dict], name: str) -> str:
    """Lines of `summarise` as text, mean over seeds, the range of seeds behind it."""
    text = [f"{'variant':<15}{'weights':<10}{'method':<10}{'top-1':>7}{'seeds':>15}{'trained':>9}"]
    for line in lines:
        values = [100 * value for value in line["common"]]
        spread = f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else ""
        means = [100 * float(np.mean(line[key])) for key in ("common", "trained")]
        means = ["-" if np.isnan(mean) else f"{mean:.1f}" for mean in means]
        text.append(
            f"{line['variant']:<15}{line['weights']:<10}{line['method']:<10}{means[0]:>7}"
            f"{spread:>15}{means[1]:>9}"
        )
    return "\n".join([*text, f"top-1 in %, mean over {name}; trained: over the cells trained on"])


def mean_grid(rows: list[dict], variant: str, pair: tuple[str, str]) -> list[dict]:
    """The rows of a variant and (weights, method), top-1 averaged over seeds; None: no score."""
    cells = {}
    for row in rows:
        if (row["variant"], row["weights"], row["method"]) == (variant, *pair):
            cells.setdefault((row["frames"], row["height"], row["width"]), []).append(row)
    found = []
    for same in cells.values():
        values = [row["top1"] for row in same if row["top1"] is not None]
        found.append(same[0] | {"top1": float(np.mean(values)) if values else None})
    return found


def draw(out: pathlib.Path, rows: list[dict], title: str) -> list:
    """Draws the pictures of an ablation that have something to show; returns their paths."""
    lines, name = summarise(rows)
    paths = [out / "ablation.png"]
    bars(paths[0], title, lines, f"mean top-1 over {name}, %")
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    pairs = list(dict.fromkeys((row["weights"], row["method"]) for row in rows))
    pairs = [pair for pair in pairs if pair[0] == "all"]
    sheets = {}
    if len(variants) > 1 or len(pairs) == 1:
        sheets["grids"] = [(f"{v}, as trained", v, OWN) for v in variants]
    if len(pairs) > 1:
        names = {p: "as trained" if p == OWN else p[1] for p in pairs}
        sheets |= {f"grids_{v}": [(f"{v}, {names[p]}", v, p) for p in pairs] for v in variants}
    for sheet, panels in sheets.items():
        maps = [(text, mean_grid(rows, variant, pair)) for text, variant, pair in panels]
        if all(kept for _, kept in maps):
            paths.append(out / f"{sheet}.png")
            plots.heat_maps(paths[-1], maps)
    return paths


def bars(path, title: str, lines: list[dict], label: str) -> None:
    """Draws a bar per (weights, method), a panel per variant; of one method, a bar per variant.

    Seeds are dots. Where there are other methods than the run's own, the dashed line is the mean
    over the cells trained on with its own, and a diamond that of another method where it differs.
    Weights for which every method gives the same, as they are never resized, have one bar.

    Args:
      path: the PNG to write, whole or not at all.
      title: of the picture.
      lines: of `summarise`.
      label: what a bar is.
    """
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    several = any((line["weights"], line["method"]) != OWN for line in lines)
    if several:
        lines = _merge_same(lines)
    panels = [[x for x in lines if x["variant"] == v] for v in variants] if several else [lines]
    seeds = any(len(line["common"]) > 1 for line in lines)
    size = max(7.0, 2.2 + 3.8 * len(panels)), 1.9 + 0.27 * max(map(len, panels))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    diamond = {"ls": "", "marker": "D", "ms": 6, "mfc": "white", "mec": "orangered", "mew": 1.5}
    dashed, dot = (
        {"color": "orangered", "ls": "--", "lw": 1.4},
        {"ls": "", "marker": "o", "ms": 3.5},
    )
    legend = {}
    for axis, panel in zip(axes, panels, strict=True):
        at, names, group, line_at = 0.0, {}, panel[0]["weights"], None
        for line in panel:
            own = several and (line["weights"], line["method"]) == OWN
            # A gap before every group, and after the bar of the run's own methods.
            at += 0.6 * (line["weights"] != group or (several and at == 1))
            group = line["weights"]
            names[at] = f"{group}: {line['method']}" if several else line["variant"]
            names[at] = "as trained" if own else names[at]
            mean, trained = (100 * np.mean(line[key]) for key in ("common", "trained"))
            axis.barh(at, mean, 0.8, color="0.35" if own else COLOURS[group], alpha=0.85)
            if not np.isnan(mean):
                axis.text(1, at, f"{mean:.0f}", va="center", fontsize=8, color="white")
            else:
                axis.text(1, at, "no scores", va="center", fontsize=8, color="0.4")
            if seeds:
                dots = [100 * value for value in line["common"]]
                axis.plot(dots, [at] * len(dots), color="black", zorder=5, **dot)
                legend["a seed"] = Line2D([], [], color="black", **dot)
            if own:
                line_at = trained
                axis.axvline(trained, zorder=0, **dashed)
                legend["cells trained on, methods as trained"] = Line2D([], [], **dashed)
            elif line_at is None or abs(trained - line_at) > 1e-6:
                axis.plot(trained, at, zorder=4, **diamond)
                legend["cells trained on, this " + ("method" if several else "variant")] = Line2D(
                    [], [], **diamond
                )
            at += 1
        axis.set_yticks(list(names), names.values(), fontsize=9)
        axis.set_ylim(at - 0.4, -0.6)
        axis.set_xlim(0, 100)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if several and len(panels) > 1:
            axis.set_title(panel[0]["variant"], fontsize=10)
    figure.suptitle(f"{title}\nbars: {label}", fontsize=10)
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 9}
    figure.legend(legend.values(), legend.keys(), **place)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def _merge_same(lines):
    """One line per variant, "any method", of weights under which all are as the run's own."""
    own = {line["variant"]: line for line in lines if (line["weights"], line["method"]) == OWN}
    keys = "common", "trained"
    other = {
        line["weights"]
        for line in lines
        for key in keys
        if not np.array_equal(line[key], own[line["variant"]][key], equal_nan=True)
    }
    found = {}
    for line in lines:
        same = line["weights"] not in other and line is not own[line["variant"]]
        line = line | {"method": "any method"} if same else line
        found[line["variant"], line["weights"], line["method"]] = line
    return list(found.values())
