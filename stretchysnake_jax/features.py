"""The command `stretchysnake features`: embeddings of clips, frames or tokens as a file."""

import argparse
import dataclasses
import io
import json
import math
import os
import pathlib
import tempfile
import zipfile

import numpy as np

from stretchysnake_jax import model as model_lib
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import SPLITS, ConfigError
from stretchysnake_jax.data import pipeline, show
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.embed import POOLINGS, find_clips, make_forward, run_of
from stretchysnake_jax.evaluate import add_views, parse_scale, parse_views
from stretchysnake_jax.grid import clip_names
from stretchysnake_jax.whole_file import whole_file

SUFFIXES = (".npz", ".arrayrecord")


@dataclasses.dataclass(frozen=True)
class Features:
    """What a file of features holds, a row per clip.

    Attributes:
      values: float32 (clips, dim) per clip, (clips, steps, dim) per frame, or (clips, steps, rows,
        columns, dim) per token. Of frames and tokens several views stay apart, in an axis after the
        clips.
      labels: class indices, int32 (clips,).
      paths: of the videos, folders of frames or records.
      windows: the part of its video that a clip is, as of `ClipList`; None: whole videos.
      classes: their names.
      about: workdir, step, what ("cls", "mean", "frame" or "token"), frames, height, width, patch,
        views (clips, crops), and the unit of the windows.
    """

    values: np.ndarray
    labels: np.ndarray
    paths: list[str]
    windows: np.ndarray | None
    classes: list[str]
    about: dict


def stream(
    model: model_lib.Model,
    clips: ClipList,
    bucket: Bucket,
    what: str,
    batch_size: int = 8,
    *,
    views: tuple[int, int] = (1, 1),
    unreadable: dict | None = None,
    on_batch=None,
):
    """Computes features clip by clip; no more than a batch is held.

    Args:
      model, clips, bucket: as of `embed.embed`.
      what: as of `embed.make_forward`.
      batch_size: views per batch.
      views: (test clips, test crops) of every clip. Features of clips are averaged over them; of
        frames and tokens they get an axis of their own, NaN for a view that can't be read.
      unreadable: gets the reason by the path of every clip that can't be read.
      on_batch: called with the number of clips done after every batch.

    Yields:
      (index in the list, float32 features), the clips that can be read in their order.

    Raises:
      TooManyUnreadable: there is none.
    """
    unreadable = {} if unreadable is None else unreadable
    forward, each, seen, found = make_forward(model, bucket, what), math.prod(views), {}, 0
    data = run_of(model).data
    with pipeline.eval_batches(data, clips, bucket, batch_size, views=views) as batches:
        for number, batch in enumerate(batches):
            values = np.asarray(forward(model.params, batch["video"], bucket))
            for i in np.flatnonzero(batch["clip"] >= 0):
                view = (number * batch_size + i) % each
                if batch["mask"][i]:
                    seen[view] = values[i]
                if view == each - 1 and seen:
                    found += 1
                    yield int(batch["clip"][i]), _merge(seen, each, what)
                    seen = {}
            unreadable |= dict(batch["unreadable"])
            if on_batch:
                on_batch(min(len(clips), (number + 1) * batch_size // each))
    if not found:
        path, reason = next(iter(unreadable.items()), ("the list", "it is empty"))
        raise pipeline.TooManyUnreadable(f"no clip could be read; {path}: {reason}")


def _merge(seen: dict[int, np.ndarray], views: int, what: str) -> np.ndarray:
    if what in POOLINGS:
        return np.mean([*seen.values()], 0, dtype=np.float64).astype(np.float32)
    if views == 1:
        return seen[0]
    nothing = np.full_like(next(iter(seen.values())), np.nan)
    return np.stack([seen.get(view, nothing) for view in range(views)])


def write(path, rows, clips: ClipList, about: dict) -> tuple[int, ...]:
    """Writes features, whole or not at all.

    A .npz holds features, labels, paths, classes, about (JSON), and windows if the list has them. A
    .arrayrecord holds a record per clip, a line of JSON (path, label, window) and then its array
    as `numpy.save` writes it, and as the last record JSON: classes, about.

    Args:
      path: ends in one of SUFFIXES.
      rows: what `stream` yields.
      clips: the list.
      about: see `Features`.

    Returns:
      The shape of all features together.
    """
    write = _write_npz if pathlib.Path(path).suffix == ".npz" else _write_records
    with whole_file(path) as part:
        return write(part, rows, clips, about)


def _write_npz(part, rows, clips, about):
    # How many clips can be read is known in the end, and tokens may be more than memory holds.
    with tempfile.TemporaryFile(dir=part.parent) as file:
        ids, shape = [], ()
        for clip, value in rows:
            ids.append(clip)
            shape = value.shape
            file.write(np.ascontiguousarray(value, np.float32))
        file.flush()
        values = np.memmap(file, np.float32, "r", shape=(len(ids), *shape))
        kept = clips.select(ids)
        arrays = {} if kept.windows is None else {"windows": kept.windows}
        arrays |= {"labels": kept.labels, "paths": np.array(kept.paths)}
        arrays |= {"classes": np.array(kept.classes), "about": np.array(json.dumps(about))}
        with part.open("wb") as out:
            np.savez(out, features=values, **arrays)
        return values.shape


def _write_records(part, rows, clips, about):
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    writer, shape = ArrayRecordWriter(str(part), "group_size:1,uncompressed"), (0,)
    for count, (clip, value) in enumerate(rows, 1):
        window = None if clips.windows is None else clips.windows[clip].tolist()
        head = {"path": clips.paths[clip], "label": int(clips.labels[clip]), "window": window}
        body = io.BytesIO()
        np.save(body, np.asarray(value, np.float32))
        writer.write(json.dumps(head).encode() + b"\n" + body.getvalue())
        if not writer.ok():
            break
        shape = (count, *value.shape)
    try:
        writer.write(json.dumps({"classes": clips.classes, "about": about}).encode())
        writer.close()
        # Some errors are told by nothing but a file that holds no record.
        whole = ArrayRecordReader(str(part)).num_records() == shape[0] + 1
    except RuntimeError:  # ArrayRecord's
        whole = False
    if not whole:
        raise OSError(f"{part} can't be written as a whole: is the disk full?")
    return shape


def read(path) -> Features:
    """Reads a file that `write` wrote.

    Raises:
      ConfigError: it isn't there, or is no file of features.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ConfigError(f"there is no file {path}")
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_records(path)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no file of 'stretchysnake features'") from error


def _read_npz(path):
    with np.load(path) as file:
        windows = file.get("windows")
        paths, classes = file["paths"].tolist(), file["classes"].tolist()
        about = json.loads(file["about"].item())
        return Features(file["features"], file["labels"], paths, windows, classes, about)


def _read_records(path):
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        *records, last = reader.read([*range(reader.num_records())])
        reader.close()
    except RuntimeError as error:  # ArrayRecord's
        raise ValueError(str(error)) from error
    pairs = [record.split(b"\n", 1) for record in records]
    heads = [json.loads(head) for head, _ in pairs]
    values = np.stack([np.load(io.BytesIO(body)) for _, body in pairs])
    windows = [head["window"] for head in heads]
    return Features(
        values,
        np.array([head["label"] for head in heads], np.int32),
        [head["path"] for head in heads],
        None if windows[0] is None else np.array(windows),
        **json.loads(last),
    )


def token_maps(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components of tokens as red, green and blue.

    The components are those of all tokens given, as in DINOv2 (Oquab et al., 2023, figure 1). Each
    is stretched from its 1st to its 99th percentile, its sign being such that its largest weight is
    positive.

    Args:
      tokens: (clips, steps, rows, columns, dim), dim >= 3.

    Returns:
      (uint8 (clips, steps, rows, columns, 3), the components' shares of the variance, (3,)).
    """
    x = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    x = x - x.mean(0)
    variances, axes = np.linalg.eigh(x.T @ x)  # rising
    axes = axes[:, :-4:-1]
    largest = np.take_along_axis(axes, abs(axes).argmax(0)[None], 0)
    x = x @ (axes * np.where(largest < 0, -1, 1))
    low, high = np.percentile(x, (1, 99), axis=0)
    x = np.clip((x - low) / np.maximum(high - low, 1e-12), 0, 1)
    shares = variances[:-4:-1] / max(variances.sum(), 1e-300)
    return np.rint(255 * x).astype(np.uint8).reshape(*tokens.shape[:-1], 3), shares


def draw_maps(path, model: model_lib.Model, clips: ClipList, bucket: Bucket, count: int) -> int:
    """Draws clips of a list, spread evenly, each above the maps of its tokens.

    Args:
      path: of the PNG.
      model, bucket: encoder and scale.
      clips: the list.
      count: of clips.

    Returns:
      How many could be read and are shown.
    """
    chosen = clips.select(np.unique(np.linspace(0, len(clips) - 1, count).astype(int)))
    forward, videos, tokens, ids = make_forward(model, bucket, "token"), [], [], []
    with pipeline.eval_batches(run_of(model).data, chosen, bucket, 1) as batches:
        for batch in batches:
            if batch["mask"][0]:
                ids.append(int(batch["clip"][0]))
                videos.append(batch["video"][0])
                tokens.append(np.asarray(forward(model.params, batch["video"], bucket))[0])
    strips, tubelet = [], model.config.tubelet
    if ids:
        maps, shares = token_maps(np.stack(tokens))
        percent = ", ".join(f"{100 * share:.0f}" for share in shares)
        rows, columns = bucket.grid
        under = f"{rows}x{columns} tokens of a frame"
        legend = ": principal components 1, 2, 3 of all tokens on this sheet as red, green, blue: "
        legend += f"{percent} % of the variance"
        high, wide = bucket.patch
        spare = bucket.height - rows * high, bucket.width - columns * wide
        for i, video, picture in zip(ids, videos, maps, strict=True):
            name = f"{bucket}   {chosen.classes[chosen.labels[i]]}   {clip_names(chosen)[i]}"
            # As large as the frame, so that tokens lie below their pixels.
            picture = picture.repeat(high, 1).repeat(wide, 2)
            picture = np.pad(
                picture, [(0, 0), (0, spare[0]), (0, spare[1]), (0, 0)], constant_values=255
            )
            strips += [(name, video[tubelet // 2 :: tubelet]), (under + legend, picture)]
            legend = ""
    show.draw(strips, path)
    return len(ids)


def main(argv: list[str]) -> int:
    """The command `stretchysnake features`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake features",
        description="Writes a trained model's embeddings of a list, with paths, labels and class "
        "names, and pictures of its tokens. Clips that can't be read are named and left out.",
    )
    parser.add_argument("--workdir", required=True, help="a trained run, a .pth or a .npz file")
    parser.add_argument("--split", choices=SPLITS, default="test", help="of the run; default: test")
    parser.add_argument("--list", help="a list file instead of a split")
    parser.add_argument(
        "--allow-absolute", action="store_true", help="its entries may lead out of its folder"
    )
    parser.add_argument(
        "--per", choices=("clip", "frame", "token"), default="clip", help="default: clip"
    )
    parser.add_argument(
        "--pooling", choices=POOLINGS, help="per clip: cls (default), what the head sees; or mean"
    )
    parser.add_argument("--frames", help="frames of a clip; default: the base scale's")
    parser.add_argument("--size", help="pixels, such as 112 or 112x196; default: likewise")
    parser.add_argument("--checkpoint", default="latest", help="latest (default), best or a step")
    parser.add_argument("--batch-size", type=int, default=8, help="views per batch (default 8)")
    add_views(parser)
    parser.add_argument("--out", help=".npz or .arrayrecord; default: features.npz in the workdir")
    parser.add_argument(
        "--maps", type=int, default=0, metavar="N", help="draw token maps of N clips, OUT_maps.png"
    )
    args = parser.parse_args(argv)
    for name, value, least in (("batch-size", args.batch_size, 1), ("maps", args.maps, 0)):
        if value < least:
            raise ConfigError(f"--{name} is {value}: it takes a number >= {least}")
    if args.pooling and args.per != "clip":
        raise ConfigError(f"--pooling is {args.pooling} but --per is {args.per}: it takes clip")
    workdir = pathlib.Path(args.workdir)
    out = pathlib.Path(
        args.out or (workdir if workdir.is_dir() else workdir.parent) / "features.npz"
    )
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out is {str(out)!r}: it takes a file in {' or '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out is {str(out)!r} but there is no folder {out.parent}")
    frames, size = parse_scale(args, "features are of one scale")
    model, progress = model_lib.load(workdir, checkpoint=args.checkpoint), Progress()
    bucket = model.stretch(frames=frames, size=size).bucket
    views = parse_views(args, run_of(model).data)
    clips = find_clips(model, args.list or args.split, None, args.allow_absolute, progress.say)
    what = (args.pooling or "cls") if args.per == "clip" else args.per
    about = {"workdir": os.path.abspath(workdir), "step": model.step, "what": what}
    about |= {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    about |= {"patch": bucket.patch, "views": views, "unit": clips.unit}
    clock, unreadable = Clock(len(clips)), {}

    def on_batch(done):
        clock.advance(done)
        progress.show(f"features at {bucket}: {done}/{len(clips)} clips, {clock.left} left")

    rows = stream(
        model,
        clips,
        bucket,
        what,
        args.batch_size,
        views=views,
        unreadable=unreadable,
        on_batch=on_batch,
    )
    shape = write(out, rows, clips, about)
    progress.close()
    for path, reason in unreadable.items():
        progress.say(f"unreadable, left out: {path}: {reason}")
    axes = {"clip": ["dim"], "frame": ["steps", "dim"]}.get(args.per)
    axes = axes or ["steps", "rows", "columns", "dim"]
    axes = ["clips", *["views"] * (len(shape) > len(axes) + 1), *axes]
    print(f"{out}: float32 {shape} ({', '.join(axes)}) at {bucket}")
    if args.maps:
        maps = out.with_name(f"{out.stem}_maps.png")
        print(f"{maps}: token maps of {draw_maps(maps, model, clips, bucket, args.maps)} clips")
    return 0
