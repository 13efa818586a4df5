"""The demo's words, and (slow) its quick form from end to end."""

import csv

import pytest

from stretchysnake_jax import cli, demo, grid, worker


def make_rows(trained, top1):
    return [
        {"frames": t, "height": s, "width": s, "top1": top1(t, s), "trained": (t, s) in trained}
        for t in (3, 4, 8)
        for s in (28, 56)
    ]


def test_the_verdict_compares_unseen_scales():
    rows = {
        "vanilla": make_rows({(4, 56)}, lambda t, s: 0.8 if s == 56 else 0.1),
        "static_tokens": make_rows({(4, 28), (4, 56), (8, 28), (8, 56)}, lambda t, s: 0.9),
        "control": make_rows({(4, 56)}, lambda t, s: 0.85),
    }
    text = demo.verdict(rows, quick=False)
    assert "+45 points from vanilla" in text and "2 scales" in text
    assert "-5 points from static_tokens" in text and "resizing the kernel does most of it" in text
    rows["control"] = make_rows({(4, 56)}, lambda t, s: 0.3)
    assert "adds what resizing alone does not" in demo.verdict(rows, quick=False)
    quick = demo.verdict(rows, quick=True)
    assert "numbers to mean anything" in quick and "points" not in quick


@pytest.mark.parametrize(
    "lines, share",
    [
        ([], 0.0),
        (["step 450/1800  4x56x56/8  loss 1  5s left"], 0.75 * 0.25),
        (["done: 1800 steps", "evaluating grid: 4x56x56/8, 10/20 clips, 3s left"], 0.815),
        (["done: 1800 steps", "evaluating grid: 4x56x56/8, 20/20 clips, 0s left"], 0.88),
    ],
)
def test_the_share_of_work_is_read_from_the_log(tmp_path, lines, share):
    log = tmp_path / "x.log"
    log.write_text("\n".join(lines))
    assert demo.state_of(log)[1] == pytest.approx(share)
    assert "left" in demo.overview({"x": log}, 10.0, quick=False)


def test_cores_are_shared():
    parts = worker.share_cores(2)
    assert len(parts) == 2 and not parts[0] & parts[1]


def test_both_models_differ_in_the_variant_alone(tmp_path):
    a, b = (demo.demo_config(name, tmp_path, quick=False) for name in demo.MODELS)
    b.name, b.stretch.variant = a.name, a.stretch.variant
    assert a == b


@pytest.mark.slow
def test_the_quick_demo_runs_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--quick", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "numbers to mean anything" in text and "Pictures:" in text
    for name in ("vanilla/grid", "static_tokens/grid", "vanilla/control"):
        with (out / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == list(grid.COLUMNS) and len(rows) == 6
        assert (out / f"{name}.json").exists() and (out / f"{name}.png").exists()
    assert (out / "demo.png").exists() and (out / "difference.png").exists()
    assert len(list((out / "data" / "videos").rglob("*.mp4"))) == 70
