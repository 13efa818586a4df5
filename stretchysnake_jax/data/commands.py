"""The command `stretchysnake data`: check, show and prepare clips, make the embedded data set,
measure its baselines."""

import argparse
import dataclasses
import os
import pathlib
import re

from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import SPLITS, ConfigError, DataConfig, StickActionsConfig


def main(argv: list[str]) -> int:
    """Runs `stretchysnake data check`, `show`, `prepare`, `measure`, `make` or `baselines`."""
    parser = argparse.ArgumentParser(prog="stretchysnake data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser(
        "make",
        help="render Stick Actions-10",
        description="Renders Stick Actions-10: mp4 files, train.txt, val.txt and test.txt by "
        "subject, classes.txt. Interrupted, the same command continues.",
    )
    make.add_argument("path", help="a new folder")
    default = StickActionsConfig()
    for name, text in (
        ("train_subjects", "people in the training split"),
        ("val_subjects", "in the validation split"),
        ("test_subjects", "in the test split"),
        ("takes", "clips per person and class"),
        ("size", "pixels of a side"),
        ("detail", "level 0 to 3: 1, 4, 9 or 16 small scenes in a picture"),
        ("timing", "level 0 to 3: classes that differ in timing, ever quicker"),
        ("seed", "everything follows from it"),
    ):
        flag = "--" + name.replace("_", "-")
        value = getattr(default, name)
        make.add_argument(flag, type=int, default=value, help=f"{text} (default {value})")
    make.add_argument("--workers", type=int, help="processes (default: one per core)")
    baselines = commands.add_parser(
        "baselines",
        help="chance, length, colour, single frame, motion",
        description="Test accuracy without a video model: chance, clip length and size, colour, "
        "one frame, and a simple motion feature, each with kernel ridge regression.",
    )
    baselines.add_argument("path", help="a folder with train.txt, val.txt and test.txt")
    baselines.add_argument("--test-list", help="test on another list file")
    add_check(commands)
    add_show(commands)
    add_prepare(commands)
    config = None
    if argv[:1] in (["check"], ["show"]) and any(word.split("=")[0] == "--config" for word in argv):
        from stretchysnake_jax.cli import parse_config

        config, argv = parse_config(argv)
    args, extra = parser.parse_known_args(argv)
    if extra and args.command != "prepare":
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if args.command == "prepare":
        return prepare(args, extra)
    if args.command == "measure":
        return measure(args)
    if args.command == "check":
        return check(args, config)
    if args.command == "show":
        from stretchysnake_jax.data import show

        return show.run(args, config)
    if args.command == "baselines":
        from stretchysnake_jax.data import baselines as baselines_lib

        for name, accuracy in baselines_lib.run(args.path, args.test_list).items():
            print(f"{name:<8}{100 * accuracy:6.1f} %")
        return 0

    from stretchysnake_jax.data import stick_actions

    settings = {k: v for k, v in vars(args).items() if k not in ("command", "path")}
    progress = Progress(every=5.0)
    try:
        made = stick_actions.make(
            args.path, **settings, progress=progress.counter("rendered clips")
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    progress.close()
    counts = ", ".join(f"{split} {n}" for split, n in made["clips"].items())
    print(
        f"{args.path}: {counts} clips of {len(stick_actions.CLASSES)} classes, 'path label' lists"
    )
    return 0


def add_place(parser) -> None:
    """Adds the words that say how a data set is split and what its lists may name."""
    parser.add_argument("--fold", type=int, default=1, help="way to split the data set (default 1)")
    parser.add_argument(
        "--allow-absolute", action="store_true", help="list entries may lead out of the root"
    )


def add_check(commands) -> None:
    """Adds the words of `stretchysnake data check`."""
    parser = commands.add_parser(
        "check",
        help="are the clips there, readable, long enough",
        description="Per split: clips listed, missing, unreadable and too short, histograms of "
        "classes and durations, and what splits share. Decodes the first frame of every clip. The "
        "exit status is 1 if a clip is missing or unreadable, or if splits share videos or groups; "
        "damaged files, short clips and counts other than the published ones leave it 0.",
    )
    parser.add_argument("lists", nargs="*", metavar="LIST", help="list files, or a folder of clips")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="the data of a config file")
    parser.add_argument("--dataset", help="a data set by name, such as ucf101")
    parser.add_argument("--videos", default="", metavar="DIR", help="root of the videos")
    parser.add_argument("--annotations", default="", metavar="DIR", help="default: that root")
    add_place(parser)
    parser.add_argument("--frames", type=int, default=1, help="shorter clips are reported")
    parser.add_argument("--full", action="store_true", help="decode whole files: finds all damage")
    parser.add_argument("--workers", type=int, help="threads (default: one per core)")
    parser.add_argument("--plot", metavar="FILE", help="draw the histograms as a PNG")
    parser.add_argument(
        "--write",
        metavar="DIR",
        help="write lists of the clips that can be read, classes.txt and left_out.txt",
    )


def check(args, config) -> int:
    """Runs `stretchysnake data check`; `config` is that of --config, or None."""
    from stretchysnake_jax.data import check as check_lib

    for name in ("frames", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}: it takes a number >= 1")
    if sum(map(bool, (args.lists, args.dataset, config))) != 1:
        raise ConfigError("data check takes one of: list files or a folder, --dataset, --config")
    progress, reports = Progress(every=5.0), {}
    data = DataConfig(
        dataset=args.dataset or "",
        root=args.videos,
        annotations=args.annotations,
        fold=args.fold,
        allow_absolute=args.allow_absolute,
    )
    if config:
        data = config.data
    published = {}
    if args.lists:
        splits, sources = read_lists(args.lists, data)
    else:
        splits, sources, published = read_splits(data, progress)
    for name, clips in splits.items():
        show = progress.counter(f"{name}: files")
        reports[name] = check_lib.check_clips(clips, args.frames, args.full, args.workers, show)
    progress.close()
    for name, report in reports.items():
        print(check_lib.text(name, report, args.frames, published.get(name)))
    shared = check_lib.overlaps(reports)
    for sentence in shared:
        print(sentence)
    if args.plot:
        check_lib.plot(args.plot, reports)
        print(f"written: {args.plot}")
    if args.write:
        folders = [str(pathlib.Path(path).absolute().parent) for path in sources]
        folders = [path for path in args.lists if os.path.isdir(path)] or folders
        root = os.path.abspath(data.root or os.path.commonpath(folders))
        written = check_lib.write(args.write, reports, root, sources)
        print(
            f"written: {', '.join(written)}, with classes.txt and left_out.txt; data.root: {root}"
        )
    broken = any(report.missing or report.unreadable for report in reports.values())
    return int(broken or bool(shared))


def read_lists(paths: list[str], data: DataConfig) -> tuple[dict, list[str]]:
    """The clips of list files and folders by name, and the list files."""
    from stretchysnake_jax.data.datasets import folders
    from stretchysnake_jax.data.lists import read_list

    splits = {}
    for path in paths:
        name = pathlib.Path(path).stem or "clips"
        if name in splits:
            raise ConfigError(f"two lists are called {name}: check them one by one")
        if os.path.isdir(path):
            splits[name] = folders.read_tree(path, loose=True)
        else:
            splits[name] = read_list(path, data.root, None, data.allow_absolute)
    # Lists of numbers know classes up to their largest only.
    classes = max((clips.classes for clips in splits.values()), key=len)
    for name, clips in splits.items():
        if clips.classes == classes[: len(clips.classes)]:
            splits[name] = dataclasses.replace(clips, classes=classes)
    return splits, [path for path in paths if not os.path.isdir(path)]


def read_splits(data: DataConfig, progress: Progress) -> tuple[dict, list[str], dict]:
    """The clips of the splits of a run by name, its list files, and published numbers of clips."""
    from stretchysnake_jax.data import datasets
    from stretchysnake_jax.data.lists import read_list

    if data.stick_actions.path:
        folder = pathlib.Path(data.stick_actions.path)
        lists = {name: str(folder / f"{name}.txt") for name in SPLITS}
        data = dataclasses.replace(data, dataset="", root="", **lists)
    dataset = datasets.find_dataset(data.dataset) if data.dataset else None
    splits, sources, published, classes = {}, [], {}, None
    for name in SPLITS:
        path = getattr(data, name)
        if path:
            splits[name] = read_list(path, data.root, classes, data.allow_absolute)
            sources.append(path)
        elif dataset and name in dataset.sizes:
            place = data.dataset, data.root, data.annotations, name, data.fold
            try:
                splits[name] = datasets.read_dataset(*place, classes)
            except datasets.NoSplit as error:
                progress.say(f"{name}: not checked: {error}")
                continue
            published[name] = dataset.size(name, data.fold)
        else:
            continue
        classes = splits[name].classes
    if not splits:
        raise ConfigError(f"{data.dataset} has no split that can be checked")
    return splits, sources, published


def add_show(commands) -> None:
    """Adds the words of `stretchysnake data show`."""
    parser = commands.add_parser(
        "show",
        help="a contact sheet of what the model sees",
        description="Draws clips of a split at several scales, as the loader gives them to the "
        "model, as a PNG. Mixup and cutmix come later, on the device. The exit status is 1 if a "
        "clip is unreadable.",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="such as configs/k400.py")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--clips", type=int, default=4, help="spread over the list (default 4)")
    parser.add_argument(
        "--buckets",
        metavar="LIST",
        help="FRAMESxSIZE or FRAMESxHEIGHTxWIDTH, such as 8x112,16x224x128 (default: the trained "
        "ones with the fewest, a middling number of, and the most pixels)",
    )
    parser.add_argument("--out", default="sheet.png", help="the PNG (default sheet.png)")


def add_prepare(commands) -> None:
    """Adds the words of `stretchysnake data prepare` and `data measure`."""
    parser = commands.add_parser(
        "prepare",
        help="decode clips once, store them small and fast to read",
        description="Decodes every clip once, shrinks it and stores its frames in ArrayRecord "
        "files, with lists of them: train.txt, val.txt, test.txt, classes.txt, which train like "
        "any other (--config.data.train=DST/train.txt). Killed or interrupted, the same command "
        "goes on with the files that aren't finished. Clips that can't be read are printed, left "
        "out and listed in left_out.txt; delete the file named beside one there and run again to "
        "try it again.",
        epilog="Many machines: start one --shard each, 0/n to n-1/n, with the same SRC and a DST "
        "that they share (or copy the folders into one). The one that finds all files there writes "
        "the lists; if none did, run the command once without --shard, which only writes what "
        "lacks. The exit status is 1 if the lists leave clips out, 2 if nothing could be done.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a list file, a folder with train.txt, val.txt, test.txt (or .csv), a folder of class "
        "folders (or of train, val, test with class folders), a data set's videos (--dataset), or "
        "a config file (FILE.py[:ARG], with --config.data... to change it)",
    )
    parser.add_argument("folder", metavar="DST", help="a new folder, or one to go on with")
    parser.add_argument("--dataset", default="", help="SRC is this data set, such as ucf101")
    parser.add_argument("--annotations", default="", metavar="DIR", help="of it; default: SRC")
    parser.add_argument("--videos", default="", metavar="DIR", help="root of the videos of lists")
    add_place(parser)
    parser.add_argument(
        "--size", type=int, default=256, help="short side, never grown (default 256)"
    )
    parser.add_argument(
        "--format",
        default="jpeg",
        help="jpeg: reads fastest (default); video: MPEG-4, a third of the disk (docs/data.md)",
    )
    parser.add_argument("--quality", type=int, default=85, help="of JPEGs, 1 to 100 (default 85)")
    parser.add_argument("--every", type=int, default=1, help="keep one of N frames (default 1)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="share of this machine")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser = commands.add_parser(
        "measure",
        help="what data prepare would save for a clip",
        description="Prepares a video in several sizes and formats and prints bytes, the mean "
        "difference of pixels (0-255, at 224x224) and the time to read 16 frames, against the "
        "original: read in turns with one thread, processor time, median of nine.",
    )
    parser.add_argument("video", metavar="CLIP", help="a video")


def prepare(args, words: list[str]) -> int:
    """Runs `stretchysnake data prepare`; `words` are overrides of a config."""
    from stretchysnake_jax.data import prepare as prepare_lib
    from stretchysnake_jax.data.record_writer import Settings

    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    shard = shard and (int(shard[1]), int(shard[2]))
    if not shard or shard[0] >= shard[1]:
        raise ConfigError(f"--shard is {args.shard!r}: it takes I/N, I from 0 to N - 1")
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}: it takes a number >= 1")
    settings = Settings(args.size, args.format, args.quality, args.every)
    progress = Progress(every=5.0)
    splits = read_source(args, words, progress)
    show = progress.counter("clips")
    made = prepare_lib.prepare(splits, args.folder, settings, shard, args.workers, show)
    progress.close()
    for path, reason in made.unreadable.items():
        print(f"{path}: {reason}")
    for path in made.missing[:20]:
        print(f"{path}: it is missing")
    print(
        f"{args.folder}: {made.frames} frames of this share, {made.bytes / 1e6:.1f} MB, "
        f"{len(made.unreadable)} clips unreadable, {len(made.missing)} missing"
    )
    if made.lacking:
        print(f"{made.lacking} of {made.files} files lack yet: no lists are written")
        return 0
    for name, (path, count) in made.lists.items():
        print(f"{path}: {count} of {len(splits[name]) + len(splits[name].missing)} clips")
    listed = sum(count for _, count in made.lists.values())
    return int(listed < sum(len(clips) + len(clips.missing) for clips in splits.values()))


def read_source(args, words: list[str], progress: Progress) -> dict:
    """The splits that SRC of `data prepare` means."""

    data = DataConfig(
        dataset=args.dataset,
        root=args.source if args.dataset else args.videos,
        annotations=args.annotations,
        fold=args.fold,
        allow_absolute=args.allow_absolute,
    )
    if re.search(r"\.py(:.*)?$", args.source):
        from stretchysnake_jax.cli import parse_config

        config, words = parse_config(["--config", args.source, *words])
        data = config.data
    elif not args.dataset:
        lists = [args.source]
        if os.path.isdir(args.source):
            names = [f"{name}{end}" for name in SPLITS for end in (".txt", ".csv")]
            lists = [os.path.join(args.source, name) for name in names]
            lists = [path for path in lists if os.path.isfile(path)]
        if lists and not words:
            return read_lists(lists, data)[0]
        data = dataclasses.replace(data, dataset="folders", root=args.source)
    if words:
        raise ConfigError(f"data prepare takes no {' '.join(words)!r}: see --help")
    return read_splits(data, progress)[0]


def measure(args) -> int:
    """Runs `stretchysnake data measure`."""
    from stretchysnake_jax.data import prepare as prepare_lib
    from stretchysnake_jax.data.decode import UnreadableVideo

    try:
        rows = prepare_lib.measure(os.path.abspath(args.video))
    except UnreadableVideo as error:
        raise ConfigError(str(error)) from error
    sides = list(rows[0].milliseconds)
    columns = "".join(f"{f'{side}x{side}':>12}{'faster':>9}" for side in sides)
    print(f"{'':<16}{'MB':>8}{'of it':>8}{'error':>8}{columns}")
    for row in rows:
        line = f"{row.name:<16}{row.bytes / 1e6:>8.2f}{row.bytes / rows[0].bytes:>8.2f}"
        line += f"{row.error:>8.2f}"
        for side in sides:
            took = row.milliseconds[side]
            line += f"{took:>9.1f} ms{rows[0].milliseconds[side] / took:>8.1f}x"
        print(line)
    return 0
