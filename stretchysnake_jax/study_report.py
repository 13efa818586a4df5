"""What the rows of the study say: means and intervals over seeds, as Markdown and CSV.

A sheet is one set of test clips: a setting of Stick Actions-10, or Weizmann zero-shot or
fine-tuned. A line is a model under a test, its own or a control. All shares are in %.
"""

import csv
import dataclasses
import math
import pathlib

import numpy as np
from scipy import stats

from stretchysnake_jax.study_plan import NEED_WEIZMANN, PARTS
from stretchysnake_jax.whole_file import whole_file

# A model that was trained at one scale: with its controls, what flexible training has to beat.
FIXED = ("vanilla", "vanilla_small", "vanilla_large", "vanilla_long")
# Sheets of their own, and the models of base that stand in them.
_BESIDE = {"kernels": ("static_tokens",), "tables": ("static_tokens", "spatial")}
TESTS = {"own": "", "kernel": ", kernel PI-resized", "resized": ", video resized"}


@dataclasses.dataclass
class Line:
    """A model under a test, over the places of the grid.

    Attributes:
      model, test: its name.
      cells: by (frames, size): top1 (%, by seed), gflops, where and trained.
      lacking: the places that it can't run.
    """

    model: str
    test: str
    cells: dict = dataclasses.field(default_factory=dict)
    lacking: set = dataclasses.field(default_factory=set)

    @property
    def title(self) -> str:
        """Its name in words."""
        return self.model + TESTS[self.test]

    @property
    def seeds(self) -> list[int]:
        """Those that have every cell."""
        found = [set(cell["top1"]) for cell in self.cells.values()]
        return sorted(set.intersection(*found)) if found else []

    def mean(self, seed: int, *places: str) -> float:
        """Mean top-1 of a seed over the cells at these places, see `study_plan.where`; or NaN."""
        found = [c["top1"][seed] for c in self.cells.values() if c["where"] in places]
        return float(np.mean(found)) if found else math.nan


def interval(values) -> tuple[float, float]:
    """Mean, and half of the 95 % interval of the mean by Student's t; NaN of fewer than two."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return (float(values.mean()) if len(values) else math.nan), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def sheets_of(row: dict) -> list[str]:
    """The sheets of a row: its setting, or its part where that has clips or a question of its own.

    The base's models that others differ from in a method stand among these, too.
    """
    part = row["part"]
    if PARTS[part].kind in NEED_WEIZMANN or part in _BESIDE:
        return [part]
    also = [sheet for sheet, models in _BESIDE.items() if row["model"] in models]
    return [row["setting"], *(also if part == "base" else [])]


def make_lines(rows: list[dict]) -> dict[str, list[Line]]:
    """The lines of every sheet; folds are one list of clips."""
    sheets, counts, parts = {}, {}, {row["part"] for row in rows}
    for row in rows:
        if PARTS[row["part"]].kind in ("methods", "retrieval"):
            continue
        for sheet in sheets_of(row):
            if sheet in _BESIDE and sheet not in parts:
                continue
            name, at = (row["model"], row["test"]), (row["frames"], row["size"])
            line = sheets.setdefault(sheet, {}).setdefault(name, Line(*name))
            if row["top1"] is None:
                line.lacking.add(at)
                continue
            known = {key: row[key] for key in ("gflops", "where", "trained")}
            cell = line.cells.setdefault(at, known | {"top1": {}})
            counted = counts.setdefault((sheet, *name, *at, row["seed"]), [0.0, 0])
            counted[0] += row["top1"] * row["clips"]
            counted[1] += row["clips"]
            cell["top1"][row["seed"]] = 100 * counted[0] / counted[1]
    return {sheet: list(lines.values()) for sheet, lines in sheets.items()}


def summarise(line: Line) -> dict[str, tuple[float, float]]:
    """(mean, half) over seeds of what a line is worth.

    trained, between, beyond, unseen (the last two): means over these places, where flexible models
    were trained; best and worst: cells; spread: from the best to the worst cell; fall: from the
    best trained cell to the mean unseen one.
    """
    found = {}
    for seed in line.seeds:
        values = [cell["top1"][seed] for cell in line.cells.values()]
        trained = [c["top1"][seed] for c in line.cells.values() if c["where"] == "trained"]
        unseen = line.mean(seed, "between", "beyond")
        one = {where: line.mean(seed, where) for where in ("trained", "between", "beyond")}
        one |= {"unseen": unseen, "best": max(values), "worst": min(values)}
        one["spread"] = one["best"] - one["worst"]
        one["fall"] = max(trained) - unseen if trained else math.nan
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: interval(values) for name, values in found.items()}


def make_budgets(lines: list[Line]) -> list[float]:
    """GFLOPs that are compared: what static_tokens takes at its largest size with each number of
    frames, and below these what vanilla's fixed patch takes at its smallest size. Where
    static_tokens is lacking the first line stands for it."""
    cells = {line.model: line.cells for line in reversed(lines) if line.test == "own"}
    known = cells.get("static_tokens", lines[0].cells)
    frames = sorted({t for t, _ in known})
    found = [max(c["gflops"] for (t, _), c in known.items() if t == n) for n in frames]
    fixed = cells.get("vanilla", {})
    smallest = min((size for _, size in fixed), default=None)
    least = [c["gflops"] for (_, size), c in fixed.items() if size == smallest]
    return sorted({cost for cost in least if cost < found[0] / 1.01}) + found


def best_within(line: Line, budget: float) -> tuple[int, int] | None:
    """The place of the highest mean over seeds within a budget of GFLOPs; of equals the cheapest.

    It is chosen on the test clips, for every line alike.
    """
    seeds = line.seeds
    can = [at for at, c in line.cells.items() if seeds and c["gflops"] <= budget * (1 + 1e-9)]

    def worth(at):
        cell = line.cells[at]
        return np.mean([cell["top1"][seed] for seed in seeds]), -cell["gflops"]

    return max(can, key=worth, default=None)


def differences(lines: list[Line]) -> list[dict]:
    """Mean over unseen cells, line by line, minus that of reference lines; pairs of one seed.

    References of a line, all with its kind of blocks: fixed-scale models, every control,
    static_tokens, and the model that its name goes on from ("spatial" of "spatial_grid_pi"). At a
    place of the grid a model whose grid of tokens stays and a control take the same GFLOPs, give or
    take the patch embedding, so these are differences at equal cost.
    """
    found = []
    for line in lines:
        blocks, name = _split(line.model)
        for other in lines:
            kind, reference = _split(other.model)
            wanted = reference in (*FIXED, "static_tokens") or other.test != "own"
            wanted |= name.startswith(f"{reference}_")
            seeds = sorted(set(line.seeds) & set(other.seeds))
            if not (wanted and seeds and kind == blocks) or other is line or line.test != "own":
                continue
            pairs = [
                line.mean(s, "between", "beyond") - other.mean(s, "between", "beyond")
                for s in seeds
            ]
            mean, half = interval(pairs)
            row = {"line": line.title, "minus": other.title, "mean": mean, "half": half}
            found.append(row | {"seeds": len(seeds)})
    return found


def _split(model: str) -> tuple[str, str]:
    """("vit_", "vanilla") of "vit_vanilla": what tells its blocks, and the rest."""
    blocks = "vit_" if model.startswith("vit_") else ""
    return blocks, model.removeprefix(blocks)


def shown_differences(found: list[dict]) -> list[dict]:
    """Of every line those to models as they were trained, and to the hardest to beat of fixed-scale
    models and their controls ("the best control"); the CSV has all."""
    shown = []
    for name in dict.fromkeys(row["line"] for row in found):
        own = [row for row in found if row["line"] == name]
        shown += [row for row in own if "," not in row["minus"]]
        fixed = {row["minus"]: _split(row["minus"].split(",")[0])[1] for row in own}
        if controls := [row for row in own if fixed[row["minus"]] in FIXED]:
            hardest = min(controls, key=lambda row: row["mean"])
            shown.append(hardest | {"minus": f"the best control: {hardest['minus']}"})
    return shown


def duels(lines: list[Line]) -> list[dict]:
    """Within every budget the best flexible model against the best of all fixed-scale ones.

    Flexible ones count as they were trained, fixed-scale ones with all their controls;
    transformers, and controls of models that are flexible in time, are left aside. Pairs of one
    seed. Either best is chosen on the test clips, the flexible one among more lines.
    """
    flexible = [x for x in lines if x.model not in FIXED and x.test == "own"]
    flexible = [x for x in flexible if not x.model.startswith("vit_")]
    fixed, found = [x for x in lines if x.model in FIXED], []
    for budget in make_budgets(lines):
        best = []
        for side in (flexible, fixed):
            can = [(line, at) for line in side if (at := best_within(line, budget))]
            best.append(max(can, key=lambda x: _mean_at(*x), default=None))
        if None in best:
            continue
        (a, at_a), (b, at_b) = best
        seeds = sorted(set(a.seeds) & set(b.seeds))
        pairs = [a.cells[at_a]["top1"][s] - b.cells[at_b]["top1"][s] for s in seeds]
        mean, half = interval(pairs)
        row = {"budget": budget, "flexible": a.title, "at": _scale(at_a), "control": b.title}
        found.append(row | {"control_at": _scale(at_b), "mean": mean, "half": half,
                            "seeds": len(seeds)})  # fmt: skip
    return found


def _mean_at(line: Line, at) -> float:
    return float(np.mean([line.cells[at]["top1"][seed] for seed in line.seeds]))


def _scale(at) -> str:
    return "x".join(map(str, at))


def method_lines(rows: list[dict]) -> list[dict]:
    """Mean top-1 of every (model, weight, method) over the cells in which the weight is resized,
    which are those in which not all methods give the same loss, and over those not trained on."""
    rows = [row for row in rows if PARTS[row["part"]].kind == "methods"]
    losses, groups = {}, {}
    for row in rows:
        losses.setdefault(_resizing(row), set()).add(row["loss"])
    for row in rows:
        if len(losses[_resizing(row)]) > 1:
            seeds = groups.setdefault((row["model"], *row["test"].split(":")), {})
            seeds.setdefault(row["seed"], []).append(row)
    found = []
    for (model, weight, method), seeds in groups.items():
        every = [100 * np.mean([r["top1"] for r in own]) for own in seeds.values()]
        new = [[r["top1"] for r in own if not r["trained"]] for own in seeds.values()]
        unseen = [100 * np.mean(values) if values else math.nan for values in new]
        row = {"model": model, "weight": weight, "method": method, "seeds": len(seeds)}
        for name, values in (("resized", every), ("unseen", unseen)):
            row[name], row[f"{name}_half"] = interval(values)
        found.append(row)
    return found


def _resizing(row: dict) -> tuple:
    """What all methods are tried on: a weight of a checkpoint at a place."""
    weight = row["test"].split(":")[0]
    return row["model"], row["seed"], weight, row["frames"], row["size"]


def retrieval_lines(rows: list[dict]) -> list[dict]:
    """R@1 of every (model, test, gallery, query)."""
    groups = {}
    for row in rows:
        if PARTS[row["part"]].kind == "retrieval":
            key = row["model"], row["test"], row["gallery"], _scale((row["frames"], row["size"]))
            groups.setdefault(key, []).append(100 * row["top1"])
    names = ("model", "test", "gallery", "query")
    return [
        dict(zip(names, key, strict=True))
        | dict(zip(("mean", "half", "seeds"), (*interval(values), len(values)), strict=True))
        for key, values in groups.items()
    ]


def text_of(mean: float, half: float = math.nan, sign: bool = False) -> str:
    """ "83.1 ± 2.2"; "-" for what isn't known."""
    if math.isnan(mean):
        return "-"
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return text if math.isnan(half) else f"{text} ± {half:.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def write_csv(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """Writes rows of equal keys, numbers rounded, NaN blank; whole or not at all."""
    with whole_file(path) as part, part.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({
                k: ("" if math.isnan(v) else f"{v:.5g}") if isinstance(v, float) else v
                for k, v in row.items()
            })  # fmt: skip
    return path


def write(out: pathlib.Path, rows: list[dict]) -> list[pathlib.Path]:
    """Writes tables.md, the CSV of each of its tables, and the figures; returns the paths."""
    from stretchysnake_jax import study_figures

    sheets, text, tables = make_lines(rows), ["# Tables of the study", ""], {}
    text += ["Written by `stretchysnake study --report` from study.csv. Top-1 in %, mean over "
             "seeds ± half of the 95 % interval (Student's t).", ""]  # fmt: skip
    for sheet, lines in sheets.items():
        text += [f"## {sheet}", "", *_sheet_text(sheet, lines, tables)]
    if found := method_lines(rows):
        tables["methods"] = found
        text += ["## Methods tried on checkpoints of base, one weight at a time", ""]
        head = ["model", "weight", "method", "cells where it is resized", "and not trained on",
                "seeds"]  # fmt: skip
        text += [markdown(head, [
            [r["model"], r["weight"], r["method"], text_of(r["resized"], r["resized_half"]),
             text_of(r["unseen"], r["unseen_half"]), str(r["seeds"])] for r in found
        ]), ""]  # fmt: skip
    if found := retrieval_lines(rows):
        tables["retrieval"] = found
        text += ["## Retrieval: R@1, test clips among training clips", ""]
        for model, test in dict.fromkeys((r["model"], r["test"]) for r in found):
            own = [r for r in found if (r["model"], r["test"]) == (model, test)]
            queries = list(dict.fromkeys(r["query"] for r in own))
            values = {(r["gallery"], r["query"]): text_of(r["mean"], r["half"]) for r in own}
            body = [[g, *(values[g, q] for q in queries)]
                    for g in dict.fromkeys(r["gallery"] for r in own)]  # fmt: skip
            text += [f"{model}{TESTS[test]}", ""]
            text += [markdown(["gallery \\ query", *queries], body), ""]
    path = out / "tables.md"
    with whole_file(path) as part:
        part.write_text("\n".join(text))
    paths = [write_csv(out / f"{name}.csv", found) for name, found in tables.items() if found]
    return [path, *paths, *study_figures.draw(out, sheets, tables.get("retrieval", []))]


def _sheet_text(sheet: str, lines: list[Line], tables: dict) -> list[str]:
    """The Markdown of a sheet; adds its rows to the tables means, budgets, differences, duels."""
    names = ("trained", "between", "beyond", "unseen", "best", "worst", "spread", "fall")
    body, budgets = [], make_budgets(lines) if any(line.cells for line in lines) else []
    for line in lines:
        found, row = summarise(line), {"sheet": sheet, "model": line.model, "test": line.test}
        row |= {"seeds": len(line.seeds), "lacking": len(line.lacking)}
        for name in names:
            row[name], row[f"{name}_half"] = found.get(name, (math.nan, math.nan))
        tables.setdefault("means", []).append(row)
        title = line.title + (f" ({len(line.lacking)} cells can't run)" if line.lacking else "")
        body.append([title, *(text_of(row[n], row[f"{n}_half"]) for n in names), str(row["seeds"])])
    text = [markdown(["mean over cells", *names, "seeds"], body), ""]
    body = []
    for line in lines:
        shown = [line.title]
        for budget in budgets:
            at = best_within(line, budget)
            mean, half = math.nan, math.nan
            if at:
                mean, half = interval([line.cells[at]["top1"][s] for s in line.seeds])
            shown.append(f"{text_of(mean, half)} ({_scale(at)})" if at else "-")
            tables.setdefault("budgets", []).append(
                {"sheet": sheet, "model": line.model, "test": line.test, "budget": budget,
                 "at": _scale(at) if at else "", "mean": mean, "half": half}
            )  # fmt: skip
        body.append(shown)
    head = ["best within GFLOPs", *(f"{budget:.3g}" for budget in budgets)]
    text += [markdown(head, body), ""]
    if found := duels(lines):
        tables["duels"] = tables.get("duels", []) + [{"sheet": sheet} | row for row in found]
        head = ["GFLOPs", "best flexible", "at", "best fixed or control", "at", "difference"]
        text += [markdown(head, [
            [f"{r['budget']:.3g}", r["flexible"], r["at"], r["control"], r["control_at"],
             text_of(r["mean"], r["half"], True)] for r in found
        ]), ""]  # fmt: skip
    if found := differences(lines):
        tables["differences"] = tables.get("differences", []) + [
            {"sheet": sheet} | row for row in found
        ]
        head = ["unseen cells", "minus", "difference", "seeds"]
        text += [markdown(head, [
            [r["line"], r["minus"], text_of(r["mean"], r["half"], True), str(r["seeds"])]
            for r in shown_differences(found)
        ]), ""]  # fmt: skip
    return text
