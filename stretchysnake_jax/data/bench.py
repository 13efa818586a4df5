"""The benchmark `stretchysnake bench data`: how fast clips are loaded, and what holds them up.

Two parts. The loader: clips per second at every bucket, and the time of one clip on one core by
stage. The readers: our reading of single files against that of other packages, and the whole loader
against bare decoding, in rounds that take turns, so that what else runs hits all alike.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import logging
import os
import pathlib
import tempfile
import time

import cv2
import numpy as np

from stretchysnake_jax.buckets import Bucket, Schedule, make_batch_sizes, make_schedule
from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import Config, ConfigError, DataConfig, resolve
from stretchysnake_jax.data import area_resize, augment, datasets, decode, pipeline, readers
from stretchysnake_jax.data.datasets import folders
from stretchysnake_jax.data.index import FrameCounts
from stretchysnake_jax.data.lists import VIDEO_SUFFIXES, ClipList, read_list

BUCKETS = (Bucket(8, 112, 112, (16, 16)), Bucket(16, 112, 112, (16, 16)))
BUCKETS += (Bucket(16, 224, 224, (16, 16)),)
FRAMES, SIDE = 16, 112  # of the comparison of readers
SAME = 2.0  # mean difference of pixels up to which two readers gave the same frames
STAGES = {
    "read": "finding and decompressing frames up to the last wanted one; 'stretchysnake data "
    "prepare' stores clips that are cheaper to read",
    "decode": "converting the wanted frames to RGB; smaller videos ('stretchysnake data prepare') "
    "cost less",
    "transform": "augmentation and resizing; smaller videos ('stretchysnake data prepare') or a "
    "lighter recipe cost less",
    "batch": "putting the frames together",
}
_GIB = 2**30
_LONG = 4096  # clips
_PAIR = 2  # clips of a batch of the loader that is compared: its threads all get enough of them


# The loader.


@contextlib.contextmanager
def stopwatch():
    """While it is open, times what `LoadBatch` does in this thread: yields stage -> seconds."""
    spent: dict[str, float] = collections.defaultdict(float)
    kept = []

    def watch(owner, name, stage):
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[stage] += time.perf_counter() - start

        kept.append((owner, name, inner))
        setattr(owner, name, timed)

    try:
        watch(decode._Capture, "__init__", "read")
        watch(decode._Capture, "skip", "read")
        watch(decode._Capture, "retrieve", "decode")
        watch(cv2, "imdecode", "decode")
        watch(augment.Augmentation, "write", "transform")
        watch(augment.Augmentation, "finish", "transform")
        watch(pipeline.LoadBatch, "__call__", "batch")
        yield spent
    finally:
        for owner, name, inner in kept:
            setattr(owner, name, inner)
        spent["batch"] -= sum(spent[stage] for stage in STAGES if stage != "batch")


def lengthen(clips: ClipList) -> ClipList:
    """The clips over and over: Grain's shuffle takes milliseconds a clip for the shortest lists."""
    return clips.select(np.resize(np.arange(len(clips)), max(len(clips), _LONG)))


def measure_stages(data: DataConfig, clips: ClipList, bucket: Bucket, samples: int) -> dict:
    """Milliseconds of one core per clip: stage -> time."""
    sizes = (data.batch_size,)
    steps = max(1, samples // data.batch_size)
    plan = pipeline.Plan(len(clips), np.zeros(steps, int), sizes, 0, repeats=data.repeats)
    load = pipeline.LoadBatch(data, clips, (bucket,), 0)
    load(plan[0])  # the first one opens the index and warms the file cache
    with stopwatch() as spent:
        for step in range(steps):
            load(plan[step])
    return {stage: 1e3 * spent[stage] / (steps * data.batch_size) for stage in STAGES}


def measure_loader(data: DataConfig, clips: ClipList, bucket: Bucket, samples: int) -> float:
    """Clips per second of the whole loader, without its start."""
    steps = data.threads + max(2, samples // data.batch_size)
    schedule = Schedule((bucket,), np.zeros(steps, np.int32), (data.batch_size,))
    with pipeline.train_batches(data, clips, schedule, seed=0) as batches:
        for _ in range(data.threads):
            next(batches)
        start = time.perf_counter()
        done = sum(len(batch["mask"]) for batch in batches)
        return done / (time.perf_counter() - start)


def make_loads(config: Config | None, data: DataConfig) -> list[tuple[Bucket, int]]:
    """What is measured: (scale, samples of a batch), as a run of `config` loads them."""
    if config is None:
        return [(bucket, data.batch_size) for bucket in BUCKETS]
    schedule = make_schedule(config.stretch, config.model, 0, 0)
    sizes = make_batch_sizes(dataclasses.replace(config, data=data), schedule.buckets)
    return list(dict.fromkeys(zip(schedule.loaded.buckets, sizes, strict=True)))


def bench_loader(loads, data: DataConfig, clips, quick: bool, progress) -> list:
    """A row of each of `make_loads`: clips per second, milliseconds per stage, the bottleneck."""
    rows, clips = [], lengthen(clips)
    samples = min(16 if quick else 64, 4 * len(clips))
    for bucket, size in loads:
        progress.show(f"loader: {bucket}, {len(rows) + 1} of {len(loads)}", force=True)
        here = dataclasses.replace(data, batch_size=size)
        stages = measure_stages(here, clips, bucket, max(size, samples))
        worst = max(stages, key=stages.get)
        rate = measure_loader(here, clips, bucket, max(size, samples))
        rows.append({"bucket": str(bucket), "batch_size": size, "clips_per_s": rate})
        rows[-1] |= {"ms_per_clip": stages, "bottleneck": worst}
    progress.close()
    return rows


def loader_text(rows: list, data: DataConfig) -> str:
    """The rows of `bench_loader` for people."""
    title = f"The loader: {data.threads} threads, {data.workers} workers, recipe {data.recipe}"
    lines = [title, f"{'bucket':<16}{'batch':>6}{'clips/s':>9}   ms of one core per clip:"]
    lines[-1] += "".join(f"{stage:>10}" for stage in STAGES)
    for row in rows:
        times = "".join(f"{row['ms_per_clip'][stage]:>10.2f}" for stage in STAGES)
        rate = f"{row['batch_size']:>6}{row['clips_per_s']:>9.1f}"
        lines.append(f"{row['bucket']:<16}{rate}{'':27}{times}")
    total = {stage: sum(row["ms_per_clip"][stage] for row in rows) for stage in STAGES}
    worst = max(total, key=total.get)
    share = total[worst] / sum(total.values())
    lines.append(f"bottleneck: {worst}, {share:.0%} of the time: {STAGES[worst]}")
    return "\n".join(lines)


# The readers.


def video_types(clips: ClipList, most: int) -> dict[str, list[str]]:
    """Clips that can be read, by type (suffix, codec, size): at most `most` of each."""
    types = collections.defaultdict(list)
    for path in dict.fromkeys(clips.paths):
        if os.path.isfile(path):
            with contextlib.suppress(decode.UnreadableVideo), decode._Capture(path) as capture:
                if capture.skip(1) and (frame := capture.retrieve()) is not None:
                    size = f"{frame.shape[1]}x{frame.shape[0]}"
                    types[f"{pathlib.Path(path).suffix[1:]} {capture.codec()} {size}"].append(path)
    return {name: paths[:most] for name, paths in sorted(types.items())}


def find_readers() -> tuple[dict[str, readers.Reader], dict[str, str]]:
    """The other packages' readers that work here, and why the others don't."""
    found, lacking = {}, {}
    for name, (module, reader) in readers.OTHERS.items():
        try:
            importlib.import_module(module)
            found[name] = reader
        except (ImportError, OSError, RuntimeError) as error:
            lacking[name] = (str(error).splitlines() or [type(error).__name__])[0]
    for module, quiet in (("av", "PANIC"), ("decord", "FATAL")):
        if module in found:
            package = importlib.import_module(module)
            package.logging.set_level(getattr(package.logging, quiet))
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    if "torchcodec" in found:  # side by side, threads of its own would only get in the way
        importlib.import_module("torch").set_num_threads(1)
    return found, lacking


def compare_type(paths, others, data: DataConfig, rounds: int, seconds: float) -> dict:
    """One type of video: every reader's clips per second and its difference from our pixels.

    Args:
      paths: its files.
      others: name -> reader.
      data: of the loader; its batches are of two clips here.
      rounds: in each, every reader reads the files several times.
      seconds: that a reader takes in a round, about; at least 16 clips are read.

    Returns:
      files, those that most of the readers can read; frames; clips_per_s and clips_per_cpu_s, name
      -> one per round ("ours", "bare", "loop", "loader", others); difference, name -> mean
      absolute one of the pixels; failed, name -> why.
    """
    with tempfile.TemporaryDirectory() as folder:
        counts = FrameCounts(pathlib.Path(folder) / "counts")
        ours = functools.partial(readers.read_ours, counts=counts)
        wanted, pictures = {}, {}
        for path in paths:
            # All frames are read once, as `data check --full` does: the true count.
            n = decode.read_clip(path, np.arange, lambda frame: frame[:1, :1], counts)[1]
            wanted[path] = np.unique(np.linspace(0, n - 1, FRAMES).astype(int))
            pictures[path] = ours(path, wanted[path], SIDE).astype(int)
        jobs = {"ours": ours, "bare": readers.read_bare, "loop": readers.read_loop}
        differs, failed = {name: {} for name in others}, {}
        for name, path in itertools.product(others, paths):
            try:
                picture = others[name](path, wanted[path], SIDE)
                differs[name][path] = np.abs(picture - pictures[path]).mean()
            except Exception as error:  # whatever another package raises over a damaged file
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        # A damaged file would take those that can't read it out of the comparison of the others.
        can = collections.Counter(path for read in differs.values() for path in read)
        paths = [path for path in paths if can[path] == max(can.values(), default=0)]
        difference = {}
        for name, read in differs.items():
            if all(path in read for path in paths):
                difference[name] = float(np.mean([read[path] for path in paths]))
                jobs[name] = others[name]
                failed.pop(name, None)
        start = time.perf_counter()
        for path in paths:
            ours(path, wanted[path], SIDE)
        wish = seconds * len(paths) / (time.perf_counter() - start)
        steps = int(np.clip(wish / _PAIR, 8, 128))
        counts.save()
        loader, files = make_loader(paths, data, steps, str(counts.path))
        jobs["loader"] = loader
        rates, cpu = collections.defaultdict(list), collections.defaultdict(list)
        with concurrent.futures.ThreadPoolExecutor(data.threads) as pool:
            for r in range(rounds):
                for name in list(jobs) if r % 2 else list(jobs)[::-1]:
                    start = time.perf_counter(), time.process_time()
                    if name == "loader":
                        loader()
                    else:
                        list(pool.map(lambda p, f=jobs[name]: f(p, wanted[p], SIDE), files))
                    rates[name].append(len(files) / (time.perf_counter() - start[0]))
                    cpu[name].append(len(files) / (time.process_time() - start[1]))
    frames = [int(wanted[path][-1]) + 1 for path in paths]
    return {"files": paths, "frames": max(frames)} | {
        "clips_per_s": dict(rates),
        "clips_per_cpu_s": dict(cpu),
        "difference": difference,
        "failed": failed,
    }


def make_loader(paths, data: DataConfig, steps: int, index: str):
    """loader() runs the whole loader, frames and size as of the readers; and the files it reads."""
    same = {"sampling": "uniform", "resize": "squash", "recipe": "light", "repeats": None}
    data = dataclasses.replace(data, **same, flip=None, rand_augment="", erase=0.0)
    data = dataclasses.replace(data, batch_size=_PAIR, colour_jitter=())
    clips = lengthen(ClipList(paths, np.zeros(len(paths), np.int32), ["0"], index=index))
    bucket = Bucket(FRAMES, SIDE, SIDE, (16, 16))
    schedule = Schedule((bucket,), np.zeros(steps, np.int32), (_PAIR,))
    plan = pipeline.Plan(len(clips), schedule.which, (_PAIR,), seed=0)
    files = [clips.paths[clip] for step in range(steps) for clip in plan[step][2]]

    def loader():
        with pipeline.train_batches(data, clips, schedule, seed=0) as batches:
            for _ in batches:
                pass

    return loader, files


def ratio(row: dict, name: str, other: str, by: str = "clips_per_s") -> float:
    """The median over the rounds of how much faster `name` is than `other`."""
    rates = row[by]
    return float(np.median(np.array(rates[name]) / np.array(rates[other])))


def judge(row: dict, by: str = "clips_per_s") -> dict:
    """The bars of a row: ours / the fastest reader of the same frames, and the loader / OpenCV."""
    same = [name for name, mean in row["difference"].items() if mean <= SAME]
    alike = [name for name in same if not name.endswith("fused")]
    bars = {f"loader_to_{name}": ratio(row, "loader", name, by) for name in ("bare", "loop")}
    for key, names in (("ours_to_readers", alike), ("ours_to_fused", set(same) - set(alike))):
        bars[key] = min((ratio(row, "ours", name, by) for name in names), default=None)
    return bars


def readers_text(rows: dict[str, dict], names, lacking) -> str:
    """The comparison for people."""
    lines = [
        f"Readers: {FRAMES} frames of {SIDE}x{SIDE}; clips/s of ours, ours / theirs by clock and",
        "by CPU time, which tells more on a busy machine. (x): not the same frames, mean "
        f"difference > {SAME:g}.",
        "Loader: all of it / OpenCV's bare decoding, / a loop that reads and resizes.",
        f"{'type':<22}{'frames':>6}{'ours':>7}"
        + "".join(f"{name:>15}" for name in names)
        + f"{'loader/bare':>13}{'loader/loop':>13}",
    ]

    def both(name, other, row):
        return f"{ratio(row, name, other):.2f} {ratio(row, name, other, 'clips_per_cpu_s'):.2f}"

    for kind, row in rows.items():
        cells = ""
        for name in names:
            text = "failed" if name in row["failed"] else both("ours", name, row)
            cells += f"{text + ' (x)' * (row['difference'].get(name, 0) > SAME):>15}"
        for name in ("bare", "loop"):
            cells += f"{both('loader', name, row):>13}"
        ours = float(np.median(row["clips_per_s"]["ours"]))
        lines.append(f"{kind:<22}{row['frames']:>6}{ours:>7.1f}{cells}")
    for key, least in (("ours_to_readers", 1.0), ("ours_to_fused", 1.0), ("loader_to_bare", 0.9)):
        said = []
        for bars, clock in (("bars", "the clock"), ("bars_cpu", "CPU time")):
            values = [row[bars][key] for row in rows.values() if row[bars][key] is not None]
            if values:
                holds = f"{sum(value >= least for value in values)} of {len(values)} types"
                said.append(f"{holds} by {clock} (least {min(values):.2f})")
        lines.append(f"{key} >= {least}: {', '.join(said) or 'nothing to compare with'}")
    lines += [f"{name} not measured: {why}" for name, why in lacking.items()]
    return "\n".join(lines)


# The command.


def _shrinker() -> str:
    """What resizes frames here, for people."""
    try:
        area_resize.library()
        return "the C++ area resize"
    except area_resize.Unavailable as reason:
        return f"OpenCV: {reason}"


def load_clips(paths: list[str]) -> ClipList:
    """The clips of files, folders and lists, labels of no meaning."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            found += folders.read_tree(path, loose=True).paths
        elif path.lower().endswith(VIDEO_SUFFIXES):
            found.append(os.path.abspath(path))
        else:
            found += read_list(path, allow_absolute=True).paths
    return ClipList(found, np.zeros(len(found), np.int32), ["0"])


def main(argv: list[str]) -> int:
    """The command `stretchysnake bench data`."""
    from stretchysnake_bench import machine

    config = None
    if any(word.split("=")[0] == "--config" for word in argv):
        from stretchysnake_jax.cli import parse_config

        config, argv = parse_config(argv)
    parser = argparse.ArgumentParser(
        prog="stretchysnake bench data",
        description="Clips per second of the loader by bucket, time by stage, the bottleneck, the "
        "memory; and our reader against PyAV, decord and torchcodec where they are installed.",
    )
    parser.add_argument("clips", nargs="*", metavar="CLIPS", help="videos, folders or lists")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="the data and scales of a config")
    parser.add_argument("--quick", action="store_true", help="fewer clips and rounds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all numbers")
    options = parser.parse_args(argv)
    machine.can_write(parser, options.json)
    if not options.clips and config is None:
        raise ConfigError("bench data takes video files, folders or lists, or --config")
    decode.set_up_opencv()
    data = resolve(config.data if config else DataConfig())
    if options.clips:
        clips = load_clips(options.clips)
    else:
        if data.stick_actions.path:
            train = str(pathlib.Path(data.stick_actions.path) / "train.txt")
            data = dataclasses.replace(data, train=train)
        clips = datasets.load_clips(data, "train", say=print)
    progress, others_load = Progress(every=5.0), machine.Others()
    types = video_types(clips, 1 if options.quick else 3)
    files = [path for paths in types.values() for path in paths]
    if options.clips:
        # What can't be read, and thousands of alike clips, would only take time.
        clips = ClipList(files, np.zeros(len(files), np.int32), ["0"])
    if not len(clips):
        raise ConfigError("none of the clips can be read: 'stretchysnake data check' says why")
    loads = make_loads(config, data)
    loader = bench_loader(loads, data, clips, options.quick, progress)
    print(loader_text(loader, data))
    print(f"frames are shrunk by {_shrinker()}")
    bound = pipeline.memory_bound(data, *zip(*loads, strict=True))
    print(f"\nMemory of the loader: {bound / _GIB:.2f} GiB at most for videos of 1920x1080:")
    print(inspect.getdoc(pipeline.memory_bound).split("\n\n")[1])
    found, lacking = find_readers()
    rows = {}
    for kind, paths in types.items():
        progress.show(f"readers: {kind}, {len(rows) + 1} of {len(types)}", force=True)
        rounds, seconds = (2, 0.2) if options.quick else (5, 0.5)
        rows[kind] = compare_type(paths, found, data, rounds, seconds)
        rows[kind]["bars"] = judge(rows[kind])
        rows[kind]["bars_cpu"] = judge(rows[kind], "clips_per_cpu_s")
    progress.close()
    print("\n" + readers_text(rows, found, lacking))
    share = others_load.share()
    if share is not None:
        print(f"{machine.cores()} cores; other processes used {share:.0%} of the machine meanwhile")
    if options.json:
        result = {"loader": loader, "readers": rows, "not_measured": lacking}
        result |= {"memory_bound": bound, "cores": machine.cores(), "others_share": share}
        machine.write_json(options.json, result)
        print(f"written: {options.json}")
    return 0
