"""Two grids compared: intervals against exact ones and SciPy's, differences by hand, refusals."""

import csv
import json

import cv2
import numpy as np
import pytest
from scipy import stats

from stretchysnake_jax import cli, compare, grid
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data.lists import ClipList


def exact_cdf(values):
    """The sums that as many draws with replacement can have, and their distribution."""
    n = len(values)
    one = np.array([np.mean(values == v) for v in (-1, 0, 1)])
    chances = np.ones(1)
    for _ in range(n):
        chances = np.convolve(chances, one)
    return np.arange(-n, n + 1), chances.cumsum()


@pytest.mark.parametrize("counts", [(2, 9, 9), (30, 400, 70), (0, 12, 1)])
def test_the_interval_is_that_of_the_exact_distribution(counts):
    values = np.repeat([-1, 0, 1], counts)
    sums, cdf = exact_cdf(values)
    found = compare.bootstrap(values)
    assert found == compare.bootstrap(values) and found != compare.bootstrap(values, level=0.5)
    for end, tail in zip(found, (0.025, 0.975), strict=True):
        # 2,000 draws know a tail of 2.5 % to 0.35 % (one standard deviation).
        low, high = (sums[np.searchsorted(cdf, tail + d)] for d in (-0.014, 0.014))
        assert low <= len(values) * end <= high


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(3).normal(0.2, 1, 60)
    found = compare.bootstrap(values, resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    np.testing.assert_allclose(found, (theirs.low, theirs.high), atol=0.01)


def test_an_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        low <= 0.25 <= high
        for low, high in (
            compare.bootstrap(rng.choice([-1, 0, 1], 150, p=(0.1, 0.55, 0.35)), seed=i)
            for i in range(400)
        )
    ]
    assert 0.92 < np.mean(hits) < 0.98


def write_grid(path, ranks, names=None, patch="4"):
    """Writes a grid with a cell per item of `ranks`: (frames, size) -> ranks of the clips."""
    path.parent.mkdir(exist_ok=True)
    rows = []
    for (frames, size), found in ranks.items():
        row = dict.fromkeys(grid.COLUMNS, 0.0) | {"frames": frames, "height": size, "width": size}
        top1 = np.mean(np.array(found) == 1)
        row |= {"ranks": np.array(found), "guesses": np.array(found) - 1}
        rows.append(row | {"patch": patch, "top1": top1, "methods": {}})
    names = names or [f"{i}.mp4" for i in range(len(found))]
    grid.write(rows, path, ClipList(names, np.zeros(len(names), np.int32), ["x"]))


def test_differences_are_paired_by_the_clips_names(tmp_path):
    a, b = tmp_path / "a" / "grid", tmp_path / "b" / "grid"
    write_grid(a, {(2, 8): [1, 2, 1, 3], (2, 16): [1, 1, 1, 1]}, ["p", "q", "r", "s"])
    # The same clips in another order; "q" could not be read.
    write_grid(b, {(2, 8): [1, 1, 0, 1], (4, 8): [1, 1, 1, 1]}, ["s", "p", "q", "r"], patch="2")
    [row], alone, mean = compare.compare(a, b)
    assert (row["frames"], row["height"], row["patch_a"], row["patch_b"]) == (2, 8, "4", "2")
    assert row["clips"] == 3 and row["top1_a"] == pytest.approx(2 / 3) and row["top1_b"] == 1
    assert row["difference"] == pytest.approx(1 / 3)
    assert row["low"] == 0 and row["high"] == 1 and not row["significant"]
    assert mean == {key: row[key] for key in ("difference", "low", "high")}
    assert alone == [f"only in {a}: 2x16", f"only in {b}: 4x8"]


def test_the_mean_over_cells_draws_whole_clips(tmp_path):
    rng = np.random.default_rng(1)
    a, b = tmp_path / "a" / "grid", tmp_path / "b" / "grid"
    cells = [(2, 8), (2, 16), (4, 8)]
    first, second = (rng.integers(1, 3, (3, 30)) for _ in range(2))
    second[1] = second[0]
    write_grid(a, dict(zip(cells, first, strict=True)))
    write_grid(b, dict(zip(cells, second, strict=True)))
    rows, alone, mean = compare.compare(a, b)
    assert not alone and [r["clips"] for r in rows] == [30] * 3
    change = (second == 1).astype(float) - (first == 1)
    np.testing.assert_allclose([r["difference"] for r in rows], change.mean(1))
    draws = rng.integers(30, size=(20_000, 30))
    low, high = np.percentile(change.mean(0)[draws].mean(1), (2.5, 97.5))
    np.testing.assert_allclose([mean["low"], mean["high"]], [low, high], atol=0.02)


def test_several_patches_at_a_size_are_cells_of_their_own(tmp_path):
    rows = [{"frames": 2, "height": 8, "width": 8, "patch": p, "top1": 0.0} for p in ("2", "4x2")]
    assert grid.has_patches(rows) and not grid.has_patches(rows[:1])
    names = [grid.scale_name(grid.scale_of(row, True)) for row in rows]
    assert names == ["8/2", "8/4x2"]


def test_the_command(tmp_path, capsys):
    write_grid(tmp_path / "a" / "grid", {(2, 8): [2] * 12, (4, 8): [1, 2] * 6})
    write_grid(tmp_path / "b" / "grid", {(2, 8): [1] * 9 + [2] * 3, (4, 8): [2, 1] * 6})
    out = tmp_path / "change"
    argv = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "+75.0*" in text and "+0.0 " in text and "mean over 2 cells: +37.5 points" in text
    with open(f"{out}.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(compare.COLUMNS)
    assert [row["significant"] for row in rows] == ["True", "False"]
    assert len(json.loads((tmp_path / "change.json").read_text())) == 2
    assert cv2.imread(f"{out}.png").std() > 10


def test_what_can_not_be_compared_is_refused(tmp_path, capsys):
    a, b = tmp_path / "a" / "grid", tmp_path / "b" / "grid"
    write_grid(a, {(2, 8): [1, 1]})
    with pytest.raises(ConfigError, match="no grid at .*b/grid.json: run 'stretchysnake evaluate"):
        compare.compare(a, b)
    write_grid(b, {(2, 8): [1, 1, 2]})
    with pytest.raises(ConfigError, match="has 2 clips and .* 3, .*: 2.mp4 is in .*b/grid alone"):
        compare.compare(a, b)
    write_grid(b, {(2, 16): [1, 1]})
    with pytest.raises(ConfigError, match="no cell in common; only in .*a/grid: 2x8; only in"):
        compare.compare(a, b)
    write_grid(b, {(2, 8): [0, 1]})
    write_grid(a, {(2, 8): [1, 0]})
    with pytest.raises(ConfigError, match="no clip in common at 2x8"):
        compare.compare(a, b)
    b.with_name("grid.npz").unlink()
    with pytest.raises(ConfigError, match="b/grid.npz does not say which clips were right"):
        compare.compare(a, b)
    b.with_name("grid.json").write_text("{}")
    with pytest.raises(ConfigError, match="b/grid.json is no grid of this version"):
        compare.compare(a, b)
    assert cli.main(["compare", str(a.parent), str(a.parent)]) == 2
    assert "both grids are" in capsys.readouterr().err
