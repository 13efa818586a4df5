"""Accuracy and cost of one model over a grid of frame counts and sizes."""

import collections
import csv
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from stretchysnake_jax import flops, outputs
from stretchysnake_jax.buckets import Bucket, make_bucket, native_size, training_buckets
from stretchysnake_jax.compile import compile_program
from stretchysnake_jax.config import Config, ConfigError, StretchConfig
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.step import EvalStep
from stretchysnake_jax.whole_file import whole_file

PER_CLIP = ("ranks", "guesses")  # arrays of a row, in the .npz only
METHODS_OF = ("kernel", "spatial", "temporal")
COLUMNS = ("frames", "height", "width", "patch", "top1", "top5", "mean_class", "loss", "gflops")
COLUMNS += ("published_gflops", "xla_gflops", "memory_mib", "clips_per_s", "trained")
SEVERAL_PATCHES = ("flexivit", "flex_all")  # variants that have more than one patch at a size


def make_cells(config: Config, stretch: StretchConfig, frames, sizes, patches=None) -> list[Bucket]:
    """The buckets of a grid, frames outermost, patches innermost.

    Args:
      config: the run's.
      stretch: the variant under which the model is evaluated.
      frames: frame counts.
      sizes: (height, width) pairs.
      patches: (height, width) pairs; None: the variant's own at each size.

    Raises:
      ConfigError: a cell that the variant can't run; raised before anything is computed.
    """
    if patches is not None and stretch.variant not in SEVERAL_PATCHES:
        raise ConfigError(
            f"patches are given, but {stretch.variant} has one patch at a size: they take a model "
            f"run as {' or '.join(SEVERAL_PATCHES)}"
        )
    return [
        make_bucket(stretch.variant, t, s, config.model, p)
        for t in frames
        for s in sizes
        for p in patches or [None]
    ]


def gflops(config: Config, bucket: Bucket, views: int = 1, convention: str = "full") -> float:
    """GFLOPs of a clip with all its views by one of the counts of `flops.count`."""
    return views * flops.count(config.model, bucket)[convention] / 1e9


def compiled_cost(eval_step: EvalStep, params, bucket: Bucket, batch_size: int) -> dict:
    """What XLA says of the forward pass of a cell: stem and trunk.

    XLA counts a multiply-add as two and adds all else that it computes. It can't see into kernels
    of our own, and counts the body of a loop once: then its count is unknown.

    Args:
      eval_step: compiled already for the cell's trunk or not.
      params: base parameters.
      bucket: the cell.
      batch_size: views per batch.

    Returns:
      xla_gflops: of one view; None: unknown.
      xla_visible_gflops: of what XLA does see, loops once.
      xla_hidden: what it doesn't: names of kernels, and "loop".
      memory_mib: arguments (parameters, video) and temporary memory of the larger program, for the
        whole batch, MiB.
    """
    projected = eval_step.stem.projected(bucket)
    video = jax.ShapeDtypeStruct((batch_size, *bucket.shape), jnp.uint8)
    stem = compile_program(eval_step.stem.project, video, bucket)
    video = jax.ShapeDtypeStruct((batch_size, *projected.shape), jnp.float32)
    trunk = compile_program(eval_step.trunk, params, video, projected)
    text = stem.run.as_text() + trunk.run.as_text()
    # Libraries that XLA calls itself, which it can count, have names such as __cublas$gemm.
    targets = set(re.findall(r'custom_call_target="([^"]+)"', text))
    hidden = sorted(t for t in targets if not t.startswith("__") or "triton" in t)
    hidden += ["loop"] * bool(re.search(r"\bwhile\(", text))
    visible = (stem.flops + trunk.flops) / batch_size / 1e9
    return {
        "xla_gflops": None if hidden else visible,
        "xla_visible_gflops": visible,
        "xla_hidden": hidden,
        "memory_mib": max(p.arguments + p.temporary for p in (stem, trunk)) / 2**20,
    }


def mean_cost(
    config: Config, eval_step: EvalStep, params, members: dict, batch_size: int, views: int
) -> dict:
    """What a clip costs on average where clips are seen at several scales.

    Args:
      config: the run's.
      eval_step, params, batch_size: as of `compiled_cost`.
      members: clips by scale.
      views: of a clip.

    Returns:
      gflops and published_gflops, see `gflops`, and the keys of `compiled_cost`; of all views.
    """
    costs = {
        scale: compiled_cost(eval_step, params, scale, batch_size)
        | {"gflops": gflops(config, scale)}
        | {"published_gflops": gflops(config, scale, convention="published")}
        for scale in members
    }
    total = sum(members.values())

    def mean(name):
        if any(cost[name] is None for cost in costs.values()):
            return None
        return sum(costs[scale][name] * n * views / total for scale, n in members.items())

    names = ("gflops", "published_gflops", "xla_gflops", "xla_visible_gflops")
    return {name: mean(name) for name in names} | {
        "xla_hidden": sorted({name for cost in costs.values() for name in cost["xla_hidden"]}),
        "memory_mib": max(cost["memory_mib"] for cost in costs.values()),
    }


def evaluate_grid(
    config: Config,
    params,
    clips: ClipList,
    cells: list[Bucket],
    stretch: StretchConfig,
    *,
    batch_size: int = 8,
    views: tuple[int, int] = (1, 1),
    ratios: np.ndarray | None = None,
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
      ratios: width / height of every clip, (clips,): each is seen in its own shape, see
        `buckets.native_size`. None: all in the cell's.
      on_cell: called with all rows so far after every cell.
      on_batch: called with the number of clips done in all cells so far.

    Returns:
      A row per cell with the keys of COLUMNS, and int32 (clips,): ranks, of every clip's own
      class, 0 where it was unreadable, and guesses, the class it was taken for, -1 there. gflops is
      the full count of `flops.count`; all counts are of a clip with all its views. Where clips have
      shapes of their own, counts are means over the clips, memory is the largest, a cell is trained
      if all its shapes are, and native is the number of clips by shape.
    """
    trained = {bucket for bucket, _ in training_buckets(config.stretch, config.model)}
    exact = {bucket.patch for bucket in trained}
    eval_step = EvalStep(config.model, stretch, config.train.dtype, exact=exact)
    each, rows = math.prod(views), []
    for number, bucket in enumerate(cells):
        before = number * len(clips)

        def done(n, before=before):
            if on_batch:
                on_batch(before + n)

        scales = [bucket] * len(clips)
        if ratios is not None:
            size = bucket.height, bucket.width
            shapes = [native_size(stretch.variant, size, r, config.model) for r in ratios]
            scales = [
                make_bucket(stretch.variant, bucket.frames, shape, config.model) for shape in shapes
            ]
        found = outputs.compute(
            eval_step,
            params,
            config.data,
            clips,
            scales,
            batch_size,
            views=views,
            on_batch=done,
        )
        ranks = np.zeros(len(clips), np.int32)
        ranks[found.clips] = outputs.ranks(found.values, found.labels)
        guesses = np.full(len(clips), -1, np.int32)
        guesses[found.clips] = found.values.argmax(1)
        members = collections.Counter(scales)
        cost = mean_cost(config, eval_step, params, members, batch_size, each)
        rows.append(
            {
                **place(bucket),
                **outputs.summary(found),
                **cost,
                "clips_per_s": found.clips_per_s / each,
                "trained": members.keys() <= trained,
                "clips": len(found.labels),
                "views": list(views),
                "methods": {w: getattr(stretch, f"{w}_method") for w in METHODS_OF},
                "unreadable": found.unreadable,
                "ranks": ranks,
                "guesses": guesses,
            }
        )
        if ratios is not None:
            rows[-1]["native"] = {str(scale): n for scale, n in sorted(members.items())}
        if on_cell:
            on_cell(rows)
    return rows


def place(bucket: Bucket) -> dict:
    """The first columns of a bucket's row: frames, height, width and patch, "8" or "8x16"."""
    patch = "x".join(str(p) for p in dict.fromkeys(bucket.patch))
    where = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    return where | {"patch": patch}


def cell_name(row: dict) -> str:
    """The scale of a row as `Bucket` prints it, such as "8x112x112/8"."""
    return f"{row['frames']}x{row['height']}x{row['width']}/{row['patch']}"


def patch_of(row: dict) -> tuple[int, int]:
    """The patch of a row, (height, width)."""
    sides = [int(side) for side in row["patch"].split("x")]
    return sides[0], sides[-1]


def write_table(rows: list[dict], path, columns) -> None:
    """Writes PATH.csv (with these columns) and PATH.json (everything), each whole or not at all."""
    with whole_file(f"{path}.csv") as part, part.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        for row in rows:
            table.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    with whole_file(f"{path}.json") as part:
        part.write_text(json.dumps(rows, indent=1) + "\n")


def write(rows: list[dict], path, clips: ClipList) -> None:
    """Writes a grid: PATH.csv and PATH.json as `write_table`, and PATH.npz.

    The last holds clips, the name of every clip of the list (see `clip_names`), labels (clips,),
    and int32 (cells, clips): ranks and guesses, see `evaluate_grid`.
    """
    arrays = {name: np.stack([row[name] for row in rows]) for name in PER_CLIP}
    arrays |= {"clips": np.array(clip_names(clips)), "labels": clips.labels}
    with whole_file(f"{path}.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    plain = [{k: v for k, v in row.items() if k not in PER_CLIP} for row in rows]
    write_table(plain, path, COLUMNS)


def confusion(row: dict, clips: ClipList) -> np.ndarray:
    """`outputs.confusion` of a cell's readable clips."""
    readable = row["guesses"] >= 0
    guesses = row["guesses"][readable]
    return outputs.confusion(clips.labels[readable], guesses, len(clips.classes))


def class_table(rows: list[dict], clips: ClipList) -> list[dict]:
    """A row per class: its name, its clips, and its share of right ones in every cell."""
    cells = {cell_name(row): confusion(row, clips) for row in rows}
    return [
        {"class": name, "clips": int((clips.labels == c).sum())}
        | {
            cell: float(counts[c, c] / counts[c].sum()) if counts[c].any() else None
            for cell, counts in cells.items()
        }
        for c, name in enumerate(clips.classes)
    ]


def clip_names(clips: ClipList) -> list[str]:
    """What tells the clips of a list apart: the path, and the part of the video if it is one."""
    names = []
    for i, path in enumerate(clips.paths):
        window = clips.window(i)
        names.append(path if window is None else "{} [{:g}, {:g}] {}".format(path, *window))
    return names


def read(path) -> list[dict]:
    """The rows of PATH.json.

    Raises:
      ConfigError: it isn't there, or is no grid.
    """
    path = pathlib.Path(path)
    file = path.with_name(f"{path.name}.json")
    if not file.exists():
        raise ConfigError(
            f"no grid at {file}: run 'stretchysnake evaluate --workdir {path.parent} --name "
            f"{path.name}' first"
        )
    try:
        rows = json.loads(file.read_text())
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and set(row) >= {*COLUMNS[:5], "methods"} for row in rows
    ):
        raise ConfigError(
            f"{file} is no grid of this version: run 'stretchysnake evaluate --workdir "
            f"{path.parent} --name {path.name}' again"
        )
    return rows


def best(rows: list[dict]) -> dict:
    """The cell of the highest top-1; of equal ones the cheapest."""
    return max(rows, key=lambda row: (row["top1"], -row["gflops"]))


def pareto_front(rows: list[dict]) -> list[dict]:
    """The cells that no other beats: none is at least as cheap and more accurate, or cheaper and as
    accurate. Cheapest first; of several that are equal in both, one."""
    front = []
    for row in sorted(rows, key=lambda row: (row["gflops"], -row["top1"])):
        if not front or row["top1"] > front[-1]["top1"]:
            front.append(row)
    return front


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


def scale_of(row: dict, patches: bool) -> tuple:
    """What makes a column of a grid: (height, width), and the patch where a size has several."""
    size = row["height"], row["width"]
    return (*size, patch_of(row)) if patches else size


def has_patches(rows: list[dict]) -> bool:
    """Whether a grid has several patches at one size."""
    patches = {}
    for row in rows:
        patches.setdefault((row["frames"], row["height"], row["width"]), set()).add(
            row.get("patch")
        )
    return any(len(found) > 1 for found in patches.values())


def scale_name(scale: tuple) -> str:
    """The name of a column, pixels: "56", "56x84", or "56/4" with a patch."""
    height, width, *patch = scale
    name = str(height) if height == width else f"{height}x{width}"
    return "/".join([name, *("x".join(map(str, dict.fromkeys(p))) for p in patch)])


def table(rows: list[dict], marks=None) -> str:
    """The grid as text: a line per frame count, a column per size, top-1 in %, * = trained there.

    A size that has several patches has as many columns.

    Args:
      rows: of a grid.
      marks: the trained cells, a set of (frames, height, width); the rows' own if None.
    """
    patches = has_patches(rows)
    cells = {(row["frames"], scale_of(row, patches)): row for row in rows}
    scales = list(dict.fromkeys(scale for _, scale in cells))
    names = [scale_name(scale) for scale in scales]
    width = max(8, 2 + max(map(len, names)))
    lines = ["frames  " + "".join(f"{n:>{width}}" for n in names)]
    for frames in dict.fromkeys(r["frames"] for r in rows):
        line = f"{frames:>6}  "
        for scale in scales:
            row = cells.get((frames, scale))
            star = row and (row["trained"] if marks is None else (frames, *scale[:2]) in marks)
            text = "" if row is None else f"{100 * row['top1']:.1f}{'*' if star else ' '}"
            line += f"{text:>{width}}"
        lines.append(line)
    return "\n".join(lines)
