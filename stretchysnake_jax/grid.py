"""Accuracy and cost of one model over a grid of frame counts and sizes."""

import csv
import json

import numpy as np

from stretchysnake_jax import flops, outputs
from stretchysnake_jax.buckets import Bucket, make_bucket, training_buckets
from stretchysnake_jax.config import Config, StretchConfig
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.step import EvalStep
from stretchysnake_jax.whole_file import whole_file

COLUMNS = ("frames", "height", "width", "patch", "top1", "top5", "mean_class", "loss", "gflops")
COLUMNS += ("clips_per_s", "trained")


def make_cells(config: Config, stretch: StretchConfig, frames, sizes) -> list[Bucket]:
    """The buckets of a grid, frames outermost.

    Args:
      config: the run's.
      stretch: the variant under which the model is evaluated.
      frames: frame counts.
      sizes: (height, width) pairs.

    Raises:
      ConfigError: a cell that the variant can't run; raised before anything is computed.
    """
    return [make_bucket(stretch.variant, t, s, config.model) for t in frames for s in sizes]


def evaluate_grid(
    config: Config,
    params,
    clips: ClipList,
    cells: list[Bucket],
    stretch: StretchConfig,
    *,
    batch_size: int = 8,
    views: tuple[int, int] = (1, 1),
    on_cell=None,
    on_batch=None,
) -> list[dict]:
    """Evaluates every cell, the weights interpolated for each.

    Args:
      config: the run's: model, data, and the buckets it was trained on.
      params: base parameters.
      clips: the list.
      cells: the scales.
      stretch: the methods of interpolation.
      batch_size: views per batch.
      views: (test clips, test crops) of every clip.
      on_cell: called with all rows so far after every cell.
      on_batch: called with the number of clips done in all cells so far.

    Returns:
      A row per cell with the keys of COLUMNS; gflops is the full count of `flops.count`.
    """
    trained = {bucket for bucket, _ in training_buckets(config.stretch, config.model)}
    exact = {bucket.patch for bucket in trained}
    eval_step = EvalStep(config.model, stretch, config.train.dtype, exact=exact)
    rows = []
    for number, bucket in enumerate(cells):
        before = number * len(clips)

        def done(n, before=before):
            if on_batch:
                on_batch(before + n)

        found = outputs.compute(
            eval_step,
            params,
            config.data,
            clips,
            bucket,
            batch_size,
            views=views,
            on_batch=done,
        )
        rows.append(
            {
                "frames": bucket.frames,
                "height": bucket.height,
                "width": bucket.width,
                "patch": "x".join(str(p) for p in dict.fromkeys(bucket.patch)),
                **outputs.summary(found),
                "gflops": views[0] * views[1] * flops.count(config.model, bucket)["full"] / 1e9,
                "clips_per_s": found.clips_per_s / (views[0] * views[1]),
                "trained": bucket in trained,
                "clips": len(found.labels),
                "unreadable": found.unreadable,
            }
        )
        if on_cell:
            on_cell(rows)
    return rows


def write(rows: list[dict], path) -> None:
    """Writes PATH.csv (with COLUMNS) and PATH.json (everything), each whole or not at all."""
    with whole_file(f"{path}.csv") as part, part.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        table.writeheader()
        for row in rows:
            table.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    with whole_file(f"{path}.json") as part:
        part.write_text(json.dumps(rows, indent=1) + "\n")


def mean_top1(rows: list[dict], trained: bool | None = None, among=None) -> float:
    """Mean accuracy over cells.

    Args:
      rows: of a grid.
      trained: only trained (True) or unseen (False) cells.
      among: only cells whose (frames, height, width) is in it.

    Returns:
      A share; NaN if no cell is left.
    """
    kept = [
        row["top1"]
        for row in rows
        if (trained is None or row["trained"] == trained)
        and (among is None or (row["frames"], row["height"], row["width"]) in among)
    ]
    return float(np.mean(kept)) if kept else float("nan")


def table(rows: list[dict], marks=None) -> str:
    """The grid as text: a line per frame count, a column per size, top-1 in %, * = trained there.

    Args:
      rows: of a grid.
      marks: the trained cells, a set of (frames, height, width); the rows' own if None.
    """
    sizes = list(dict.fromkeys((r["height"], r["width"]) for r in rows))
    names = [str(h) if h == w else f"{h}x{w}" for h, w in sizes]
    lines = ["frames  " + "".join(f"{n:>8}" for n in names)]
    for frames in dict.fromkeys(r["frames"] for r in rows):
        line = f"{frames:>6}  "
        for height, width in sizes:
            row = next(
                (
                    r
                    for r in rows
                    if (r["frames"], r["height"], r["width"]) == (frames, height, width)
                ),
                None,
            )
            key = (frames, height, width)
            star = row and (row["trained"] if marks is None else key in marks)
            text = "" if row is None else f"{100 * row['top1']:.1f}{'*' if star else ' '}"
            line += f"{text:>8}"
        lines.append(line)
    return "\n".join(lines)
