"""Clips decoded once, shrunk and stored so that few of their frames can be read fast.

The clips of all lists, each once, are cut into files of a fixed number of clips. A file is written
under another name, synced and renamed when it is whole, so what is there under its own name is
finished, whoever wrote it and whatever was killed. When all files are there, lists are written that
name their records.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np

from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import records, sampling, source, transforms
from stretchysnake_jax.data.lists import ClipList, write_classes, write_list
from stretchysnake_jax.data.record_writer import Settings, write_file
from stretchysnake_jax.whole_file import whole_file

_CLIPS_PER_FILE, _FILES = 32, 64  # small sets get fewer clips per file, so that all cores work
_MARKER = "prepare.json"


@dataclasses.dataclass
class Prepared:
    """What there is after a call of `prepare`.

    Attributes:
      files: that all clips need.
      lacking: how many of them are not there yet; 0: the lists are written.
      lists: split -> (path of its list, clips in it); splits without any have no list.
      unreadable: path -> why, of the clips in the files of this share.
      missing: clips that the annotations name and the disk doesn't hold.
      bytes: of the clips in the files of this share.
      frames: the same, stored frames.
    """

    files: int
    lacking: int
    lists: dict[str, tuple[str, int]]
    unreadable: dict[str, str]
    missing: list[str]
    bytes: int
    frames: int


class WorkerDied(RuntimeError):
    """A process was killed from outside."""

    plain = True  # the message is for the user, without a traceback


def prepare(
    splits: dict[str, ClipList],
    folder,
    settings: Settings | None = None,
    shard: tuple[int, int] = (0, 1),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Prepares the clips of some lists; may be killed and called again.

    Args:
      splits: name -> clips, all with the same classes.
      folder: where to; made if it isn't there.
      settings: how clips are stored; None: the defaults.
      shard: (i, n): only every n-th file from the i-th on, for n machines that share the folder, or
        whose folders are copied together. The files are the same for every n. One call at a time
        may work on a share.
      workers: processes; None: one per core, 1: this one. Several import the main module: guard it
        with `if __name__ == "__main__":`.
      progress: called with (clips done, clips in all) of the share.

    Returns:
      The `Prepared`. Lists, classes.txt and left_out.txt are written by the call that finds all
      files there. They keep the order, classes, groups and flip of the originals; windows are whole
      clips now.

    Raises:
      ConfigError: the folder holds something else, or the splits' classes differ.
      OSError: the disk is full or the folder can't be written.
      WorkerDied: a process was killed.
    """
    settings, folder = settings or Settings(), pathlib.Path(folder).absolute()
    if len({tuple(clips.classes) for clips in splits.values()}) > 1:
        raise ConfigError(f"the classes of {', '.join(splits)} differ")
    clips = _distinct(splits)
    _claim(folder, splits, settings)
    size = max(1, min(_CLIPS_PER_FILE, math.ceil(len(clips) / _FILES)))
    starts = range(0, len(clips), size)
    files = [
        folder / f"clips-{i:05d}-of-{len(starts):05d}.array_record" for i in range(len(starts))
    ]
    share = range(shard[0], len(files), shard[1])
    for i in share:  # what a killed call left behind
        for part in folder.glob(f"{files[i].name}.*.part"):
            part.unlink(missing_ok=True)
    jobs = {str(files[i]): clips[starts[i] : starts[i] + size] for i in share}
    total = sum(map(len, jobs.values()))
    jobs = {file: job for file, job in jobs.items() if not os.path.exists(file)}
    done = total - sum(map(len, jobs.values()))
    with contextlib.closing(_write_all(jobs, settings, workers or os.cpu_count() or 1)) as written:
        for count in written:
            done += count
            if progress:
                progress(done, total)
    mine = [clip for i in share for clip in _contents(files[i])]
    lacking = sum(not file.exists() for file in files)
    return Prepared(
        files=len(files),
        lacking=lacking,
        lists={} if lacking else _write_lists(folder, splits, files),
        unreadable={clip["path"]: clip["wrong"] for clip in mine if clip["wrong"]},
        missing=list(dict.fromkeys(path for clips in splits.values() for path in clips.missing)),
        bytes=sum(clip["bytes"] for clip in mine),
        frames=sum(clip["frames"] for clip in mine),
    )


def _distinct(splits) -> list[tuple]:
    """(path, window, class) of every clip of the splits, once; other splits may list it too."""
    found = {}
    for clips in splits.values():
        for i, path in enumerate(clips.paths):
            found.setdefault((path, clips.window(i)), clips.classes[clips.labels[i]])
    return [(*key, label) for key, label in found.items()]


def _claim(folder, splits, settings) -> None:
    """Marks the folder as that of this preparation; raises ConfigError if it is another's."""
    digest = hashlib.sha256()
    for name, clips in splits.items():
        windows = None if clips.windows is None else [clips.unit, clips.windows.tolist()]
        row = [name, clips.paths, clips.labels.tolist(), clips.classes, windows]
        digest.update(json.dumps([*row, clips.flip, clips.groups]).encode())
    note = {"version": records.VERSION, "lists": digest.hexdigest(), **vars(settings)}
    marker = folder / _MARKER
    try:
        found = json.loads(marker.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{marker} is damaged: {folder} can't be gone on with") from error
    except (FileNotFoundError, NotADirectoryError):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(not path.name.startswith((_MARKER, ".")) for path in folder.iterdir()):
                raise ConfigError(f"{folder} holds something else: it takes a new folder") from None
            with whole_file(marker) as part:
                part.write_text(json.dumps(note, indent=1) + "\n")
        except OSError as error:
            raise OSError(f"{folder} can't be written: {error.strerror or error}") from error
        return
    for name, value in note.items():
        if found.get(name) == value:
            continue
        what = f"with {name} {found.get(name)}, not {value}"
        if name == "lists":
            what = "from other lists, or before clips were added"
        raise ConfigError(f"{folder} was prepared {what}: it takes the same again or a new folder")


def _write_all(jobs: dict[str, list], settings: Settings, workers: int):
    """Writes the files; yields the number of clips of each when it is finished."""
    if min(workers, len(jobs)) < 2:
        for file, clips in jobs.items():
            yield write_file(file, clips, settings)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork after JAX has started may deadlock
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), spawn, initializer=_start_worker
    )
    futures = []
    try:
        futures += [pool.submit(write_file, file, clips, settings) for file, clips in jobs.items()]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise WorkerDied(
            "a process was killed, maybe for lack of memory: the same command goes on where this "
            "one stopped, with fewer --workers it needs less"
        ) from error
    finally:
        # After an error nobody waits for the others: what they write is begun anew next time.
        if any(not future.done() for future in futures):
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Lets a process end with its parent, however that ends, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _contents(file) -> list[dict]:
    """The contents of a finished file."""
    try:
        return records.read_contents(file)
    except ValueError as error:
        raise ConfigError(f"{error}: delete it and run again") from error


def _write_lists(folder, splits, files) -> dict[str, tuple[str, int]]:
    """Writes lists, classes.txt and left_out.txt; returns split -> (list, clips)."""
    addresses, wrong = {}, {}
    for file in files:
        for clip in _contents(file):
            key = clip["path"], clip["window"] and tuple(clip["window"])
            if clip["wrong"]:
                wrong[key] = f"{clip['path']}: {clip['wrong']} ({file.name})\n"
            else:
                addresses[key] = f"{file}#{clip['record']}"
    written, left_out = {}, list(dict.fromkeys(wrong.values()))
    for name, clips in splits.items():
        keys = [(path, clips.window(i)) for i, path in enumerate(clips.paths)]
        kept = [i for i, key in enumerate(keys) if key in addresses]
        left_out += [f"{path}: it is missing\n" for path in clips.missing]
        if kept:
            ready = clips.select(kept)
            ready.paths, ready.windows = [addresses[keys[i]] for i in kept], None
            write_list(folder / f"{name}.txt", ready, str(folder))
            written[name] = str(folder / f"{name}.txt"), len(kept)
    write_classes(folder / "classes.txt", next(iter(splits.values())).classes)
    with whole_file(folder / "left_out.txt") as part:
        part.write_text("".join(left_out), encoding="utf-8")
    return written


@dataclasses.dataclass
class Measured:
    """How one way to store a clip does.

    Attributes:
      name: such as "jpeg 90, 256"; "original" is the clip as it is.
      bytes: of what is stored.
      error: mean difference of its pixels at 224x224 from the original's, 0-255.
      milliseconds: side of a square -> processor time to read 16 frames, median of the rounds:
        other work on the machine disturbs it less than the time that passes.
    """

    name: str
    bytes: int
    error: float
    milliseconds: dict[int, float]


def measure(path, sides: tuple[int, ...] = (112, 224), rounds: int = 9) -> list[Measured]:
    """Measures how fast a video is read as it is and prepared in several ways.

    16 frames spread over the clip are read and brought to a square, all ways in turn in every
    round, in one thread.

    Args:
      path: the video.
      sides: of the squares, pixels.
      rounds: repetitions.

    Returns:
      The original, then the ways.

    Raises:
      UnreadableVideo: the video can't be read.
    """

    def read(address, side):
        start = time.process_time()
        geometry = transforms.eval_geometry(side, side, "crop")
        frames, _ = source.read_clip(address, lambda n: sampling.uniform(n, 16), geometry)
        return frames, 1e3 * (time.process_time() - start)

    rows = [Measured("original", os.path.getsize(path), 0.0, {})]
    addresses, original = [path], read(path, 224)[0].astype(int)
    ways = [(size, "jpeg", quality) for size in (256, 128) for quality in (75, 85, 90, 95)]
    ways += [(size, "video", 85) for size in (256, 128)]
    with tempfile.TemporaryDirectory() as folder:
        for size, kind, quality in ways:
            file = os.path.join(folder, f"{len(rows)}.array_record")
            write_file(file, [(path, None, "")], Settings(size, kind, quality))
            clip = _contents(file)[0]
            addresses.append(f"{file}#{clip['record']}")
            error = float(np.abs(read(addresses[-1], 224)[0] - original).mean())
            name = f"{kind} {quality}" if kind == "jpeg" else kind
            rows.append(Measured(f"{name}, {size}", clip["bytes"], error, {}))
        for side in sides:
            took = [[] for _ in rows]
            for _ in range(rounds):
                for times, address in zip(took, addresses, strict=True):
                    times.append(read(address, side)[1])
            for row, times in zip(rows, took, strict=True):
                row.milliseconds[side] = float(np.median(times))
    return rows
