"""The command `stretchysnake compare`: two evaluated grids, cell by cell and clip by clip."""

import argparse
import pathlib
import zipfile

import numpy as np

from stretchysnake_jax import grid, plots
from stretchysnake_jax.config import ConfigError

COLUMNS = ("frames", "height", "width", "patch_a", "patch_b", "top1_a", "top1_b", "difference")
COLUMNS += ("low", "high", "clips", "significant")
RESAMPLES, LEVEL = 2000, 0.95


def bootstrap(
    values: np.ndarray, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean (Efron, 1979).

    Args:
      values: one per clip, (clips,).
      resamples: how often as many clips are drawn anew, with replacement.
      level: of confidence.
      seed: of the draws.

    Returns:
      (low, high).
    """
    # Clips of one value are alike: how often each value is drawn is multinomial.
    found, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(values), counts / len(values), resamples)
    tail = 50 * (1 - level)
    low, high = np.percentile(drawn @ found / len(values), (tail, 100 - tail))
    return float(low), float(high)


def read(path: pathlib.Path) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Reads a grid.

    Returns:
      (rows, the names of its clips, sorted (clips,), the ranks of their classes (cells, clips)).

    Raises:
      ConfigError: it isn't there, or doesn't say which clips were right.
    """
    rows = grid.read(path)
    try:
        with np.load(path.with_name(f"{path.name}.npz")) as file:
            names, ranks = file["clips"], file["ranks"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        names, ranks = np.empty(0), np.empty((0, 0))
    if ranks.shape != (len(rows), len(names)):
        raise ConfigError(
            f"{path}.npz does not say which clips were right in {path}.json: run 'stretchysnake "
            f"evaluate --workdir {path.parent} --name {path.name}' again"
        )
    order = np.argsort(names, kind="stable")
    return rows, names[order], ranks[:, order]


def compare(path_a: pathlib.Path, path_b: pathlib.Path) -> tuple[list[dict], list[str], dict]:
    """Compares the cells that two grids have in common: B minus A.

    Cells are the same by frames and size, whatever the patch, as variants differ in it; where a
    grid has several patches at a size, by the patch too. Only clips that both could read count.

    Returns:
      (a row per cell with the keys of COLUMNS, and top1 = difference; lines naming the cells that
      one grid has alone; difference, low and high of the mean over all cells in common).

    Raises:
      ConfigError: the grids are of different lists, or have no cell in common.
    """
    (rows_a, names, ranks_a), (rows_b, names_b, ranks_b) = read(path_a), read(path_b)
    if not np.array_equal(names, names_b):
        first = [
            f": {alone[0]} is in {path} alone"
            for path, alone in (
                (path_a, np.setdiff1d(names, names_b)),
                (path_b, np.setdiff1d(names_b, names)),
            )
            if len(alone)
        ]
        raise ConfigError(
            f"{path_a} has {len(names)} clips and {path_b} {len(names_b)}, and they are not the "
            f"same{first[0] if first else ''}; evaluate both with one --list"
        )
    patches = grid.has_patches(rows_a) or grid.has_patches(rows_b)
    cells_a, cells_b = (
        {(row["frames"], grid.scale_of(row, patches)): i for i, row in enumerate(rows)}
        for rows in (rows_a, rows_b)
    )
    alone = [
        f"only in {path}: {frames}x{grid.scale_name(scale)}"
        for path, cells, other in ((path_a, cells_a, cells_b), (path_b, cells_b, cells_a))
        for frames, scale in cells
        if (frames, scale) not in other
    ]
    common = [key for key in cells_a if key in cells_b]
    if not common:
        raise ConfigError(f"{path_a} and {path_b} have no cell in common; " + "; ".join(alone))
    found, total, everywhere = [], np.zeros(len(names)), np.ones(len(names), bool)
    for key in common:
        a, b = ranks_a[cells_a[key]], ranks_b[cells_b[key]]
        row_a, row_b = rows_a[cells_a[key]], rows_b[cells_b[key]]
        both = (a > 0) & (b > 0)
        if not both.any():
            where = f"{key[0]}x{grid.scale_name(key[1])}"
            raise ConfigError(f"{path_a} and {path_b} have read no clip in common at {where}")
        change = (b == 1).astype(int) - (a == 1)
        low, high = bootstrap(change[both])
        total += change
        everywhere &= both
        difference = float(change[both].mean())
        found.append(
            {
                **{name: row_a[name] for name in ("frames", "height", "width")},
                **{"patch": row_a["patch"], "patch_a": row_a["patch"], "patch_b": row_b["patch"]},
                "top1_a": float((a[both] == 1).mean()),
                "top1_b": float((b[both] == 1).mean()),
                "top1": difference,
                "difference": difference,
                "low": low,
                "high": high,
                "clips": int(both.sum()),
                "significant": low > 0 or high < 0,
            }
        )
    mean = {"difference": float("nan"), "low": float("nan"), "high": float("nan")}
    if everywhere.any():
        # Draws whole clips: how a clip fares at one scale tells much of how it does at another.
        values = total[everywhere] / len(common)
        low, high = bootstrap(values)
        mean = {"difference": float(values.mean()), "low": low, "high": high}
    return found, alone, mean


def table(rows: list[dict]) -> str:
    """Rows of `compare` as text, in % and points; * = the interval excludes 0."""
    lines = [f"{'frames':>6}{'size':>10}{'A':>8}{'B':>8}{'B - A':>9}    {LEVEL:.0%} interval"]
    patches = grid.has_patches(rows)
    for row in rows:
        scale = grid.scale_name(grid.scale_of(row, patches))
        low, high = (f"{100 * row[name]:+.1f}" for name in ("low", "high"))
        lines.append(
            f"{row['frames']:>6}{scale:>10}{100 * row['top1_a']:>8.1f}{100 * row['top1_b']:>8.1f}"
            f"{100 * row['difference']:>+9.1f}{'*' if row['significant'] else ' '}   "
            f"{low} to {high}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """The command `stretchysnake compare`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake compare",
        description="The difference of top-1 of two evaluated grids, B minus A, per cell, with an "
        f"interval of {LEVEL:.0%} confidence by a paired bootstrap over the clips.",
    )
    parser.add_argument("run_a", metavar="RUN_A", help="a workdir that was evaluated")
    parser.add_argument("run_b", metavar="RUN_B", help="another, or the same with --name-b")
    parser.add_argument("--name", default="grid", help="of the grids (default grid)")
    parser.add_argument("--name-b", help="of RUN_B's grid; default: as --name")
    parser.add_argument(
        "--out", default="compare", help="of the files written, without suffix (default compare)"
    )
    args = parser.parse_args(argv)
    path_a = pathlib.Path(args.run_a) / args.name
    path_b = pathlib.Path(args.run_b) / (args.name_b or args.name)
    if path_a.resolve() == path_b.resolve():
        raise ConfigError(f"both grids are {path_a}: name another run, or a grid with --name-b")
    rows, alone, mean = compare(path_a, path_b)
    print(f"A: {path_a}\nB: {path_b}\ntop-1 in %, {rows[0]['clips']} clips (* not 0)\n")
    print(table(rows))
    print(f"\nmean over {len(rows)} cells: {100 * mean['difference']:+.1f} points", end="")
    print(f", {100 * mean['low']:+.1f} to {100 * mean['high']:+.1f}")
    for line in alone:
        print(line)
    grid.write_table(rows, args.out, COLUMNS)
    title = f"{_short(path_b, path_a)} minus {_short(path_a, path_b)}"
    frame = ("significant", f"the {LEVEL:.0%} interval excludes 0")
    plots.heat_maps(f"{args.out}.png", [(title, rows)], difference=True, frame=frame)
    print(f"written: {args.out}.csv, {args.out}.json, {args.out}.png")
    return 0


def _short(path: pathlib.Path, other: pathlib.Path) -> str:
    """A grid's name in a title: its run's, and its own where that is what differs."""
    run = path.parent.resolve().name
    return run if path.name == other.name else f"{run}/{path.name}"
