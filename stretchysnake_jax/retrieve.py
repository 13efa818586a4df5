"""The command `stretchysnake retrieve`: how well clips find others of their class by features."""

import argparse
import csv
import dataclasses
import functools
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from stretchysnake_jax import model as model_lib
from stretchysnake_jax import retrieval
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import source, transforms
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.embed import POOLINGS, embed, find_clips, run_of
from stretchysnake_jax.evaluate import add_views, parse_views
from stretchysnake_jax.grid import clip_names
from stretchysnake_jax.whole_file import whole_file

NEIGHBOURS = 5  # on the contact sheet
_COLOURS = {"query": "0.35", "same class": "limegreen", "another class": "red"}
_SHARES = {"R@1": "r1", "R@5": "r5", "R@10": "r10", "mAP": "map"}
_HEIGHT = 120  # of a picture on the sheet, pixels


def parse_cells(text: str, model: model_lib.Model, what: str) -> list[Bucket]:
    """Reads "8x112,16x224x128", frames x size or x height x width; ConfigError names `what`."""
    cells = []
    for word in text.split(","):
        numbers = word.strip().lower().split("x")
        if len(numbers) not in (2, 3) or not all(n.isdecimal() and int(n) for n in numbers):
            raise ConfigError(
                f"{what} holds {word!r}: it takes FRAMESxSIZE or FRAMESxHEIGHTxWIDTH, such as "
                "8x112 or 16x224x128"
            )
        frames, height, width = (int(n) for n in (*numbers, numbers[-1])[:3])
        cells.append(model.stretch(frames=frames, size=(height, width)).bucket)
    return list(dict.fromkeys(cells))


def embed_sides(
    model: model_lib.Model,
    sides: list[tuple[ClipList, list[Bucket]]],
    progress: Progress,
    **settings,
) -> tuple[list[tuple[np.ndarray, ClipList]], dict[str, str]]:
    """Features of lists, each at some scales, averaged as of `retrieval.average_scales`.

    Args:
      model: loaded.
      sides: (the list, its scales) each; what two of them share is computed once.
      progress: shows how far it is.
      settings: of `embed.embed`.

    Returns:
      ((float32 (clips, dim), the clips that could be read at all of the scales) of each, the reason
      by the path of the others).
    """
    jobs = {(id(clips), cell): clips for clips, cells in sides for cell in cells}
    clock, before, found = Clock(sum(map(len, jobs.values()))), 0, {}
    for (key, cell), clips in jobs.items():

        def on_batch(done, before=before, cell=cell):
            clock.advance(before + done)
            text = f"features at {cell}: {clock.done}/{clock.total} clips, {clock.left} left"
            progress.show(text)

        found[key, cell] = embed(model, clips, cell, on_batch=on_batch, **settings)
        before += len(clips)
    results = []
    for clips, cells in sides:
        parts = [found[id(clips), cell] for cell in cells]
        ids = functools.reduce(np.intersect1d, [part.clips for part in parts])
        rows = [part.values[np.isin(part.clips, ids)] for part in parts]
        results.append((retrieval.average_scales(rows), clips.select(ids)))
    return results, {path: why for part in found.values() for path, why in part.unreadable}


def write(
    path, ranking: retrieval.Ranking, query: ClipList, gallery: ClipList, about: dict
) -> tuple[dict, list[dict]]:
    """Writes PATH.csv, a row per query, and PATH.json: `about`, summary and classes.

    Returns:
      (the summary, a row per class) as written.
    """
    found, classes = retrieval.summary(ranking), []
    query_names, gallery_names = clip_names(query), clip_names(gallery)
    with whole_file(f"{path}.csv") as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        columns = ["clip", "class", "rank", "average_precision"]
        table.writerow([*columns, "nearest", "nearest_class", "similarity"])
        for i, name in enumerate(query_names):
            row = [name, query.classes[query.labels[i]], ranking.rank[i] or ""]
            row.append("" if ranking.rank[i] == 0 else round(float(ranking.precision[i]), 6))
            near = ranking.nearest[i, 0]
            if near >= 0:
                row += [gallery_names[near], gallery.classes[gallery.labels[near]]]
                row.append(round(float(ranking.likeness[i, 0]), 6))
            table.writerow(row)
    for label in np.unique(query.labels[ranking.rank > 0]):
        own = np.flatnonzero((query.labels == label) & (ranking.rank > 0))
        part = retrieval.Ranking(
            *(getattr(ranking, field.name)[own] for field in dataclasses.fields(ranking))
        )
        classes.append({"class": query.classes[label], **retrieval.summary(part)})
    with whole_file(f"{path}.json") as part:
        part.write_text(json.dumps(about | found | {"classes": classes}, indent=1) + "\n")
    return found, classes


def draw_sheet(
    path, title: str, ranking: retrieval.Ranking, query: ClipList, gallery: ClipList, count: int
) -> None:
    """Draws queries, spread evenly over their list, each with its nearest clips in a row.

    A clip is shown by the frame in its middle, framed in green if it is of the query's class and
    in red if not.

    Args:
      path: the PNG to write, whole or not at all.
      title: of the picture.
      ranking: of the gallery.
      query, gallery: the clips.
      count: of queries.
    """
    chosen = np.unique(np.linspace(0, len(query) - 1, count).astype(int))
    columns = 1 + min(NEIGHBOURS, ranking.nearest.shape[1])
    size = 1.75 * columns + 0.2, 1.75 * len(chosen) + 1.1
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06)
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, i in zip(axes, chosen, strict=True):
        label = query.labels[i]
        _show(row[0], query, i, query.classes[label], "query")
        for place, axis in enumerate(row[1:]):
            near = ranking.nearest[i, place]
            if near < 0:
                axis.set_axis_off()
                continue
            kind = "same class" if gallery.labels[near] == label else "another class"
            name = gallery.classes[gallery.labels[near]]
            _show(axis, gallery, near, name, kind, f"{ranking.likeness[i, place]:.3f}")
    figure.suptitle(f"{title}\nqueries (left) and their nearest clips, cosine below", fontsize=10)
    kinds = [Patch(fc="none", ec=colour, lw=3, label=kind) for kind, colour in _COLOURS.items()]
    figure.legend(handles=kinds, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def _show(axis, clips: ClipList, i: int, name: str, kind: str, below: str = "") -> None:
    def scale(frame):
        height, width = frame.shape[:2]
        return transforms.resize(frame, _HEIGHT, max(1, round(_HEIGHT * width / height)))

    try:
        choose, window = (lambda n: np.array([n // 2])), clips.window(i)
        axis.imshow(source.read_clip(clips.paths[i], choose, scale, window)[0][0])
    except source.UnreadableVideo:  # of a damaged file other frames may have been read before
        text = {"ha": "center", "va": "center", "fontsize": 8, "transform": axis.transAxes}
        axis.text(0.5, 0.5, "this frame is\nunreadable", **text)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(color=_COLOURS[kind], linewidth=4)
    name = name if len(name) <= 24 else f"{name[:23]}…"
    axis.set_title(name, fontsize=8, parse_math=False)
    axis.set_xlabel(below, fontsize=8)


def main(argv: list[str]) -> int:
    """The command `stretchysnake retrieve`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake retrieve",
        description="Finds for every query clip the nearest clips of a gallery by the cosine of "
        "their features: R@1, 5, 10 and mAP, a table per query, and a contact sheet.",
    )
    parser.add_argument("--workdir", required=True, help="a trained run, a .pth or a .npz file")
    for name, default in (("query", "test"), ("gallery", "train")):
        text = f"train, val, test, or a list file; default: {default}"
        parser.add_argument(f"--{name}", default=default, metavar="SPLIT|FILE", help=text)
    parser.add_argument(
        "--allow-absolute", action="store_true", help="entries of list files may lead out"
    )
    parser.add_argument(
        "--cells", help="scales such as 8x112; of several the features are averaged; default: base"
    )
    parser.add_argument("--gallery-cells", help="scales of the gallery; default: those of --cells")
    parser.add_argument(
        "--pooling", choices=POOLINGS, default="cls", help="cls (default): what the head sees"
    )
    parser.add_argument("--checkpoint", default="latest", help="latest (default), best or a step")
    parser.add_argument("--batch-size", type=int, default=8, help="views per batch (default 8)")
    add_views(parser)
    parser.add_argument("--name", default="retrieval", help="of the files (default retrieval)")
    parser.add_argument("--sheet", type=int, default=8, help="queries on the sheet (default 8)")
    args = parser.parse_args(argv)
    for name, value, least in (("batch-size", args.batch_size, 1), ("sheet", args.sheet, 0)):
        if value < least:
            raise ConfigError(f"--{name} is {value}: it takes a number >= {least}")
    workdir, progress = pathlib.Path(args.workdir), Progress()
    model = model_lib.load(workdir, checkpoint=args.checkpoint)
    base = [model.stretch().bucket]
    query_cells = parse_cells(args.cells, model, "--cells") if args.cells else base
    gallery_cells = query_cells
    if args.gallery_cells:
        gallery_cells = parse_cells(args.gallery_cells, model, "--gallery-cells")
    views = parse_views(args, run_of(model).data)
    gallery = find_clips(model, args.gallery, None, args.allow_absolute, progress.say)
    query = gallery
    if args.query != args.gallery:
        query = find_clips(model, args.query, gallery.classes, args.allow_absolute, progress.say)
    settings = {"pooling": args.pooling, "batch_size": args.batch_size, "views": views}
    lists = [(query, query_cells), (gallery, gallery_cells)]
    sides, unreadable = embed_sides(model, lists, progress, **settings)
    (queries, query), (features, gallery) = sides
    # The query itself, known by path and window, is no neighbour of it.
    _, ids = np.unique(clip_names(query) + clip_names(gallery), return_inverse=True)
    count = progress.counter("ranking: queries")
    ranking = retrieval.rank(
        queries,
        features,
        query.labels,
        gallery.labels,
        query_ids=ids[: len(query)],
        gallery_ids=ids[len(query) :],
        on_block=lambda done: count(done, len(query)),
    )
    progress.close()
    for path, reason in unreadable.items():
        progress.say(f"unreadable, left out: {path}: {reason}")
    about = {"query": args.query, "gallery": args.gallery, "gallery_clips": len(gallery)}
    about |= {"cells": [str(cell) for cell in query_cells]}
    about |= {"gallery_cells": [str(cell) for cell in gallery_cells], "pooling": args.pooling}
    about |= {"views": list(views), "step": model.step, "unreadable": [*unreadable.items()]}
    where = (workdir if workdir.is_dir() else workdir.parent) / args.name
    found, classes = write(where, ranking, query, gallery, about)
    files = [f"{where}.csv", f"{where}.json"]
    if args.sheet:
        files.append(f"{where}.png")
        shares = ", ".join(f"{n} {100 * found[key]:.1f} %" for n, key in _SHARES.items())
        title = f"{_title(about, found)}: {shares}"
        draw_sheet(files[-1], title, ranking, query, gallery, args.sheet)
    print(f"{_title(about, found)}\n\n{table(found, classes)}\n\nwritten: {', '.join(files)}")
    return 0


def _title(about: dict, found: dict) -> str:
    """What was searched for what, in a line."""
    sides = [" + ".join(about[name]) for name in ("cells", "gallery_cells")]
    scales = f"at {sides[0]}" if sides[0] == sides[1] else f"at {sides[0]} among {sides[1]}"
    query, gallery = (pathlib.Path(about[name]).name for name in ("query", "gallery"))
    return (
        f"{found['queries']} queries of {query} in {about['gallery_clips']} clips of {gallery}, "
        f"{scales}"
    )


def table(found: dict, classes: list[dict]) -> str:
    """Summary and classes as text, shares in %."""
    width = max(len(row["class"]) for row in classes) + 2
    lines = [f"{'class':<{width}}queries" + "".join(f"{name:>7}" for name in _SHARES)]
    for row in [*classes, {"class": "all", **found}]:
        shares = "".join(f"{100 * row[key]:>7.1f}" for key in _SHARES.values())
        lines.append(f"{row['class']:<{width}}{row['queries']:>7}{shares}")
    if found["unmatched"]:
        lines.append(f"{found['unmatched']} more have no clip of their class in the gallery")
    return "\n".join(lines)
