"""What the study's rows say: intervals, tables, differences, duels."""

import csv
import math

import pytest
from conftest import make_row

from stretchysnake_jax import study_report
from stretchysnake_jax.study_plan import Cell


def make_study(**more):
    """Rows by hand: 3 seeds, cells (2, 28) trained, (3, 28) between, (16, 28) beyond."""
    values = {
        ("vanilla", "own"): [(80, 20, 10), (82, 22, 12), (84, 24, 14)],
        ("vanilla", "resized"): [(80, 70, 60), (82, 70, 62), (84, 70, 64)],
        ("static_tokens", "own"): [(85, 80, 75), (84, 82, 74), (83, 84, 73)],
    }
    return [
        make_row(Cell("base", "base", model, seed), top1 / 100, test, frames)
        for (model, test), seeds in values.items()
        for seed, cells in enumerate(seeds)
        for frames, top1 in zip((2, 3, 16), cells, strict=True)
    ]


def test_intervals_are_those_of_student():
    assert study_report.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.302653 / math.sqrt(3)))
    mean, half = study_report.interval([5.0])
    assert mean == 5.0 and math.isnan(half)


def test_tables_say_what_the_rows_hold(tmp_path):
    [lines] = study_report.make_lines(make_study()).values()
    vanilla, _, static = lines
    found = study_report.summarise(vanilla)
    means = {name: mean for name, (mean, _) in found.items()}
    assert means == pytest.approx({"trained": 82, "between": 22, "beyond": 12, "unseen": 17,
                                   "best": 82, "worst": 12, "spread": 70, "fall": 65})  # fmt: skip
    assert found["unseen"][1] == pytest.approx(4.302653 * 2 / math.sqrt(3))
    # By seed 85 - 77.5, 84 - 78 and 83 - 78.5.
    fall = study_report.summarise(static)["fall"]
    assert fall == pytest.approx((6, 4.302653 * 1.5 / math.sqrt(3)))
    assert study_report.make_budgets(lines) == pytest.approx([0.2, 0.3, 1.6])
    assert study_report.best_within(static, 0.3) == (2, 28)
    assert study_report.best_within(static, 0.1) is None
    gaps = {
        (r["line"], r["minus"]): (r["mean"], r["half"]) for r in study_report.differences(lines)
    }
    assert gaps["static_tokens", "vanilla"][0] == pytest.approx(78 - 17)
    # By seed 77.5, 78 and 78.5 minus 65, 66 and 67.
    pairs = [12.5, 12.0, 11.5]
    assert gaps["static_tokens", "vanilla, video resized"] == pytest.approx(
        study_report.interval(pairs)
    )
    assert not any(minus == line for line, minus in gaps)
    shown = study_report.shown_differences(study_report.differences(lines))
    own = {row["minus"]: row["mean"] for row in shown if row["line"] == "static_tokens"}
    assert own == {"vanilla": pytest.approx(61),
                   "the best control: vanilla, video resized": pytest.approx(12)}  # fmt: skip
    duels = study_report.duels(lines)
    assert [d["mean"] for d in duels] == pytest.approx([2.0, 2.0, 2.0])
    assert duels[0]["control"] == "vanilla" and duels[2]["at"] == "2x28"
    paths = study_report.write(tmp_path, make_study())
    text = (tmp_path / "tables.md").read_text()
    assert "| static_tokens | 84.0 ± 2.5 | 82.0 ± 5.0 | 74.0 ± 2.5 | 78.0 ± 1.2 |" in text
    assert all(p.stat().st_size < 150_000 for p in paths)
    names = {"tables.md", "means.csv", "budgets.csv", "differences.csv", "duels.csv"}
    assert {p.name for p in paths} == {*names, "heat_base_1.png", "curves_base.png"}
    with (tmp_path / "means.csv").open() as file:
        assert float(next(csv.DictReader(file))["fall"]) == pytest.approx(65)


def test_folds_are_one_list_and_half_a_study_can_be_reported(tmp_path):
    rows = [make_row(Cell("weizmann", "base", "vanilla", seed, fold), top1, clips=clips)
            for seed in (0, 1) for fold, top1, clips in ((1, 1.0, 10), (2, 0.5, 5))]  # fmt: skip
    [line] = study_report.make_lines(rows)["weizmann"]
    assert line.cells[2, 28]["top1"] == pytest.approx({0: 1250 / 15, 1: 1250 / 15})
    reason = make_row(Cell("base", "base", "vanilla", 0), None, frames=16, reason="too small")
    rows += [reason | {"trained": None, "gflops": None, "clips": None}]
    study_report.write(tmp_path, rows)
    assert "vanilla (1 cells can't run)" in (tmp_path / "tables.md").read_text()


def test_methods_and_retrieval_have_tables(tmp_path):
    rows = [
        make_row(Cell("methods", "base", "vanilla", seed), top1, f"kernel:{method}", frames,
                 loss=loss, trained=t)
        for seed in (0, 1)
        for frames, top1, t in ((2, 0.9, 1), (4, 0.3, 0), (8, 1.0, 1))
        for method, loss in (("pi", 1.0), ("none", 2.0 if frames < 8 else 1.0))
    ]  # fmt: skip
    scales = ((2, 28), (4, 56))
    rows += [
        make_row(Cell("retrieval", "base", "vanilla", 0), (t + of[0]) / 10, "own", t, s,
                 gallery="x".join(map(str, of)))
        for t, s in scales for of in scales
    ]  # fmt: skip
    line, other = study_report.method_lines(rows)  # at 8 frames nothing is resized
    assert (line["resized"], line["unseen"], line["seeds"]) == (pytest.approx(60), 30, 2)
    assert other["method"] == "none"
    found = {(r["gallery"], r["query"]): r["mean"] for r in study_report.retrieval_lines(rows)}
    assert found == pytest.approx({("2x28", "2x28"): 40, ("2x28", "4x56"): 60,
                                   ("4x56", "2x28"): 60, ("4x56", "4x56"): 80})  # fmt: skip
    names = {path.name for path in study_report.write(tmp_path, rows)}
    assert names == {"tables.md", "methods.csv", "retrieval.csv", "retrieval.png"}


def test_references_have_the_same_blocks():
    names = ("vanilla", "static_tokens", "spatial", "spatial_grid_pi", "vit_vanilla",
             "vit_static_tokens")  # fmt: skip
    rows = [make_row(Cell("base", "base", name, 0), test=test) for name in names
            for test in ("own", "kernel") if test == "own" or name.endswith("vanilla")]  # fmt: skip
    [lines] = study_report.make_lines(rows).values()
    found = study_report.differences(lines)
    pairs = {}
    for row in found:
        pairs.setdefault(row["line"], set()).add(row["minus"])
    kernel = "vanilla, kernel PI-resized"
    assert pairs["vit_static_tokens"] == {"vit_vanilla", f"vit_{kernel}"}
    assert pairs["spatial_grid_pi"] == {"vanilla", kernel, "static_tokens", "spatial"}
    assert pairs["static_tokens"] == {"vanilla", kernel}
    shown = [r["minus"] for r in study_report.shown_differences(found)
             if r["line"] == "vit_static_tokens"]  # fmt: skip
    assert "vit_vanilla" in shown and shown[-1].startswith("the best control: vit_vanilla")


def test_budgets_reach_down_to_what_few_tokens_cost():
    costs = {("vanilla", 28): 0.05, ("vanilla", 56): 0.2,
             ("static_tokens", 28): 0.2, ("static_tokens", 56): 0.21}  # fmt: skip
    rows = [make_row(Cell("base", "base", model, 0), size=size, gflops=cost)
            for (model, size), cost in costs.items()]  # fmt: skip
    [lines] = study_report.make_lines(rows).values()
    assert study_report.make_budgets(lines) == [0.05, 0.21]
