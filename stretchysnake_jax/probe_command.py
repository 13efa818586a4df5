"""The command `stretchysnake probe`: how well a frozen model's features tell classes apart."""

import argparse
import dataclasses
import math
import pathlib

import numpy as np

from stretchysnake_jax import config as config_lib
from stretchysnake_jax import model as model_lib
from stretchysnake_jax import outputs, probe, probe_report
from stretchysnake_jax import run as run_lib
from stretchysnake_jax.cli import parse_config
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import Config, ConfigError
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.data.lists import ClipList, read_list
from stretchysnake_jax.embed import POOLINGS, embed, run_of
from stretchysnake_jax.evaluate import parse_numbers, parse_scale, parse_views


def find_splits(read, missing: str = "give --train and --test") -> tuple[dict[str, ClipList], str]:
    """The lists of train, val and test.

    Args:
      read: (split, class names or None) -> `ClipList`, or None where there is none.
      missing: what the user may do where there is no list to report on.

    Returns:
      (lists by "train", "test" and, unless a part of train has to do, "val", the name of the split
      that the result is reported on). Without a test list that is the validation list, and a part
      of train chooses.

    Raises:
      ConfigError: there is no list to report on.
    """
    train = read("train", None)
    found = {split: read(split, train.classes) for split in ("val", "test")}
    reported = "test" if found["test"] else "val"
    if not found[reported]:
        raise ConfigError(f"there is neither a test nor a validation list to report on: {missing}")
    lists = {"train": train, "test": found[reported]}
    if reported == "test" and found["val"]:
        lists["val"] = found["val"]
    return lists, reported


def run_linear(train, val, whole, classes: int, strengths, progress):
    """The sweep, and the probe of the best strength fitted to `whole`.

    Args:
      train, val, whole: (features (n, D), labels (n,)) each.
      classes: number of classes.
      strengths: see `probe.sweep_linear`.
      progress: shows the state of things.

    Returns:
      (rows of the sweep, the chosen one's index, a function features -> log-probabilities).
    """
    count = progress.counter("fitting: strengths")
    rows, probes = probe.sweep_linear(
        train, val, classes, strengths, lambda done: count(done, len(strengths))
    )
    progress.close()
    choice = probe.best(rows)
    c = rows[choice]["c"]
    chosen = probes[choice] if whole is train else probe.fit_linear(*whole, classes, c)
    if not chosen.converged:
        steps = f"after {chosen.iterations} steps"
        progress.say(f"c {c:g}: not converged, gradient {chosen.gradient:.1e} {steps}")
    if len(rows) > 1 and choice in (0, len(rows) - 1):
        progress.say(f"c {c:g} is at an end of those tried: try others beyond it with --c")
    return rows, choice, chosen.log_probabilities


def run_knn(train, val, whole, classes: int, ks, temperatures):
    """The sweep, and the votes of `whole` with the best pair; else as `run_linear`."""
    rows = probe.sweep_neighbours(train, val, classes, ks, temperatures)
    choice = probe.best(rows)
    k, temperature = rows[choice]["k"], rows[choice]["temperature"]

    def predict(features):
        near, ids = probe.neighbours(features, whole[0], k)
        return probe.vote(near, whole[1][ids], classes, k, temperature)

    return rows, choice, predict


def parse_values(text: str, what: str) -> list[float]:
    """Reads "0.01,0.1,1" -> [0.01, 0.1, 1.0]; raises ConfigError naming `what`."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or not all(0 < v < math.inf for v in values):
        raise ConfigError(f"{what} is {text!r}: it takes numbers > 0 such as 0.01,0.1,1")
    return sorted(set(values))


def find_bucket(args, model: model_lib.Model):
    """The scale of --frames and --size, or of the model."""
    frames, size = parse_scale(args, "a probe sees clips at one scale")
    return model.stretch(frames=frames, size=size).bucket


def read_data(args, model: model_lib.Model, config: Config | None, progress):
    """What is probed: (the `DataConfig` to read it with, a function for `find_splits`)."""
    if args.train or args.val or args.test:
        if config or not (args.train and args.test):
            raise ConfigError(
                "list files are --train and --test, and --val if there is one; they stand alone, "
                "without --data-config"
            )
        data = run_of(model).data
        absolute = args.allow_absolute or data.allow_absolute

        def read(split, classes):
            path = getattr(args, split)
            return read_list(path, "", classes, absolute) if path else None

        return data, read
    if config:
        data = run_lib.prepare(config, progress)[0].data
    elif model.run:
        data = model.run.data
    else:
        raise ConfigError(f"{args.workdir} is no run: give --data-config, or --train and --test")

    def load(split, classes):
        optional = split != "train"
        return load_clips(data, split, classes, optional=optional, say=progress.say)

    return data, load


def compute_features(args, model, bucket, data, lists, progress):
    """Features of the lists: `Outputs` by name."""
    model = dataclasses.replace(model, run=dataclasses.replace(run_of(model), data=data))
    clock, before, found = Clock(sum(map(len, lists.values()))), 0, {}
    for name, clips in lists.items():

        def on_batch(done, name=name, before=before):
            clock.advance(before + done)
            progress.show(f"features of {name}: {clock.done}/{clock.total}, {clock.left} left")

        found[name] = embed(
            model,
            clips,
            bucket,
            pooling=args.pooling,
            batch_size=args.batch_size,
            views=(args.clips, args.crops),
            on_batch=on_batch,
        )
        before += len(clips)
    progress.close()
    return found


def take_data_config(argv: list[str]) -> tuple[Config | None, list[str]]:
    """Takes `--data-config FILE[:ARG]` and `--data-config.a.b=VALUE` out of a command line.

    Returns:
      (the config, or None, and the words left over).
    """
    words, rest, given = [], [], iter(argv)
    for word in given:
        if word.split("=")[0].split(".")[0] == "--data-config":
            whole = word if "=" in word else f"{word}={next(given, '')}"
            words.append(whole.replace("--data-config", "--config", 1))
        else:
            rest.append(word)
    if not words:
        return None, rest
    try:
        return parse_config(words)[0], rest
    except ConfigError as error:
        raise ConfigError(str(error).replace("--config", "--data-config")) from error


def make_parser() -> argparse.ArgumentParser:
    """The command line, but for --data-config."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake probe",
        description="Trains a classifier on the frozen features of a model: its setting is chosen "
        "on the validation split, the result is of the test split. Without a validation split a "
        "part of the training split chooses, whole groups where they are known; without a test "
        "split the result is of the validation split.",
    )
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--workdir", required=True, help="a trained run, a .pth or a .npz file")
    add("--checkpoint", default="latest", help="latest (default), best or a step")
    add("--frames", help="frames of a clip; default: the base of the model")
    add("--size", help="pixels, such as 112 or 112x196; default: likewise")
    add("--variant", help="run the model under this variant's patch rule, such as static_tokens")
    add("--pooling", choices=POOLINGS, default=POOLINGS[0], help=f"default {POOLINGS[0]}")
    for split in config_lib.SPLITS:
        add(f"--{split}", metavar="LIST", help=f"the {split} list file, instead of the run's data")
    add("--allow-absolute", action="store_true", help="entries may lead out of their folders")
    text = "the data of another config, with --data-config.a.b=VALUE, instead of the run's"
    add("--data-config", metavar="FILE[:ARG]", help=text)
    text = "share of train that chooses where there is no val (default 0.2)"
    add("--hold-out", type=float, default=0.2, help=text)
    text = "what the reported classifier learns from (default train)"
    add("--refit", choices=("train", "train+val"), default="train", help=text)
    add("--batch-size", type=int, default=8, help="views per batch (default 8)")
    add("--clips", type=int, default=1, help="views of a clip in time (default 1)")
    add("--crops", type=int, default=1, help="views of a clip in space (default 1)")
    add("--seed", type=int, default=0, help="of the part of train that chooses")
    add("--name", help="of the files written (default probe_linear, probe_knn)")
    kinds = parser.add_subparsers(dest="probe", required=True)
    text = "logistic regression on standardised features, L2, by L-BFGS"
    # Unabbreviated: a shortened --data-config would pass by `take_data_config`.
    made = {"parents": [common], "allow_abbrev": False}
    linear = kinds.add_parser("linear", help=text, description=text, **made)
    text = "inverse strengths of the penalty; default: the powers of ten from 1e-6 to 1e4"
    linear.add_argument("--c", help=text)
    text = "votes of the k nearest neighbours by cosine, weighted by exp(similarity / temperature)"
    knn = kinds.add_parser("knn", help=text, description=text, **made)
    for name, values in (("k", probe.NEIGHBOURS), ("temperature", probe.TEMPERATURES)):
        text = f"those tried; default: {','.join(map(str, values))}"
        knn.add_argument(f"--{name}", help=text)
    return parser


def main(argv: list[str]) -> int:
    """The command `stretchysnake probe`."""
    config, rest = take_data_config(argv)
    args, progress = make_parser().parse_args(rest), Progress()
    linear = args.probe == "linear"
    config_lib.require(args.batch_size >= 1, "--batch-size", args.batch_size, "a number >= 1")
    config_lib.require(0 < args.hold_out < 1, "--hold-out", args.hold_out, "above 0, below 1")
    config_lib.require(args.seed >= 0, "--seed", args.seed, "a whole number >= 0")
    if linear:
        settings = (parse_values(args.c, "--c") if args.c else probe.STRENGTHS,)
    else:
        ks = parse_numbers(args.k, "--k") if args.k else probe.NEIGHBOURS
        temperatures = probe.TEMPERATURES
        if args.temperature:
            temperatures = parse_values(args.temperature, "--temperature")
        settings = ks, temperatures
    model = model_lib.load(args.workdir, checkpoint=args.checkpoint, variant=args.variant)
    bucket = find_bucket(args, model)
    data, read = read_data(args, model, config, progress)
    parse_views(args, data)
    lists, reported = find_splits(read)
    # 1. Who chooses, and who learns in the end.
    names, held = lists["train"].classes, None
    if "val" not in lists:
        known = lists["train"].labels, lists["train"].groups
        held = probe.hold_out(*known, args.hold_out, args.seed)
    found = compute_features(args, model, bucket, data, lists, progress)
    unreadable = dict(pair for split in found.values() for pair in split.unreadable)
    for path, reason in unreadable.items():
        progress.say(f"unreadable, left out: {path}: {reason}")
    splits = {name: (split.values, split.labels) for name, split in found.items()}
    train = whole = splits["train"]
    if held is not None:
        held = held[found["train"].clips]
        if not 0 < held.sum() < len(held):
            raise ConfigError("too few clips of train can be read to hold a part of them out")
        train, val = ([part[rows] for part in whole] for rows in (~held, held))
        chosen_on = f"{held.sum()} of the {len(held)} clips of train"
    else:
        val, chosen_on = splits["val"], "val"
        if args.refit == "train+val":
            whole = [np.concatenate(parts) for parts in zip(whole, val, strict=True)]
    # 2. The sweep, and the result.
    if linear:
        chosen = run_linear(train, val, whole, len(names), *settings, progress)
    else:
        chosen = run_knn(train, val, whole, len(names), *settings)
    rows, choice, predict = chosen
    features, labels = splits["test"]
    chances = predict(features)
    result = probe.scores(chances, labels)
    table = probe_report.class_table(chances, labels, names)
    if not linear:
        del result["loss"]  # infinite where no neighbour is of the clip's class
    counts = outputs.confusion(labels, chances.argmax(1), len(names))
    # 3. What is written and said.
    report = {
        "probe": args.probe,
        "model": str(args.workdir),
        "step": model.step,
        "variant": model.methods.variant,
        **dataclasses.asdict(bucket),
        "pooling": args.pooling,
        "views": [args.clips, args.crops],
        "features": features.shape[1],
        "clips": {name: len(split.labels) for name, split in found.items()},
        "reported_on": reported,
        "chosen_on": chosen_on,
        "refit": args.refit,
        "chosen": rows[choice],
        "choice": choice,
        "result": result,
        "sweep": rows,
        "classes": table,
        "confusion": counts.tolist(),
        "unreadable": [*unreadable.items()],
    }
    where = pathlib.Path(args.workdir)
    where = (where if where.is_dir() else where.parent) / (args.name or f"probe_{args.probe}")
    probe_report.write(where, report)
    print(probe_report.text(report, f"{reported}, {len(labels)} clips, {bucket}"))
    print(f"written: {where}.json, .sweep.csv, .classes.csv, .png")
    return 0
