"""The command `stretchysnake finetune`: a trained model on other data, its learning rate swept.

Trains the whole model once per learning rate and weight decay, chooses by the validation list and
reports on the test list. Every training is a run of its own that `train` goes on with.
"""

import argparse
import copy
import dataclasses
import pathlib

from stretchysnake_jax import config as config_lib
from stretchysnake_jax import model as model_lib
from stretchysnake_jax import outputs, probe, probe_report
from stretchysnake_jax import run as run_lib
from stretchysnake_jax.cli import parse_config
from stretchysnake_jax.clock import Progress
from stretchysnake_jax.compile import keep_programs
from stretchysnake_jax.config import Config, ConfigError
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.data.lists import ClipList, write_classes, write_list
from stretchysnake_jax.evaluate import add_views, parse_views
from stretchysnake_jax.probe_command import find_bucket, find_splits, parse_values
from stretchysnake_jax.step import EvalStep
from stretchysnake_jax.train import TrainingError, train

FACTORS = (0.1, 0.3, 1.0, 3.0)  # learning rates tried, in those of the config


def settle_lists(config: Config, share: float, out: pathlib.Path, progress: Progress):
    """Who learns, who chooses, and what is reported.

    A data set that lacks a validation or a test list gives up a part of train, which is written as
    lists of their own into `out`.

    Args:
      config: the experiment.
      share: of train that is held out then.
      out: the folder of the results.
      progress: shows the state of things.

    Returns:
      (the config, the clips that choose, the clips reported on, the name of their split, words on
      those that choose).

    Raises:
      ConfigError: there is neither a validation nor a test list.
    """
    config, train_clips, val = run_lib.prepare(config, progress)
    names = train_clips.classes
    test = load_clips(config.data, "test", names, optional=True, say=progress.say)
    have = {"train": train_clips, "val": val, "test": test}
    found, reported = find_splits(lambda split, _: have[split], "give data.test")
    if "val" in found:
        return config, val, test, reported, "val"
    held = probe.hold_out(train_clips.labels, train_clips.groups, share, config.train.seed)
    data = config.data
    lists = {
        name: train_clips.select([i for i, out_ in enumerate(held) if out_ == chosen])
        for name, chosen in (("train", False), ("val", True))
    }
    for name, clips in lists.items():
        write_list(out / f"{name}.txt", clips, data.root or str(out))
    write_classes(out / "classes.txt", names)
    paths = {name: str((out / f"{name}.txt").absolute()) for name in lists}
    # Lists with a root of their own each have clips elsewhere than beside the new ones.
    data = dataclasses.replace(data, **paths, allow_absolute=data.allow_absolute or not data.root)
    words = f"{held.sum()} of the {len(held)} clips of train"
    config = dataclasses.replace(config, data=data)
    return config, lists["val"], found["test"], reported, words


def make_runs(base: Config, rates: list[float], decays: list[float]) -> dict[str, Config]:
    """A config per learning rate and weight decay, by name.

    The final learning rate keeps its ratio to the highest.
    """
    runs = {}
    for rate in rates:
        for decay in decays:
            config, name = copy.deepcopy(base), f"lr{rate:g}_wd{decay:g}"
            optim = config.optim
            optim.final_learning_rate *= rate / optim.learning_rate
            optim.learning_rate, optim.weight_decay = rate, decay
            config.name = f"{base.name} {name}"
            runs[name] = config
    return runs


def compute(model: model_lib.Model, clips: ClipList, bucket, batch_size: int, views):
    """Log-probabilities of a trained run's clips, `Outputs`."""
    step = EvalStep(model.config, model.methods, model.run.train.dtype)
    data = model.run.data
    return outputs.compute(step, model.params, data, clips, bucket, batch_size, views=views)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake finetune",
        description="Trains a whole model on other data from trained weights, once per learning "
        "rate and weight decay; the validation list chooses, the result is of the test list. "
        "Interrupted, the same command goes on.",
        epilog="--config.train.init_from=RUN names the weights (a workdir, a .pth, .npz or "
        ".safetensors file); --config.FIELD=VALUE overrides any field of the config.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", help="data, recipe and length of a training")
    add("--out", required=True, help="folder of the runs and the results")
    factors = ", ".join(f"{x:g}" for x in FACTORS)
    add("--learning-rates", help=f"such as 1e-4,1e-3; default: {factors} times the config's")
    add("--weight-decays", help="such as 0.01,0.1; default: the config's")
    text = "share of train that chooses where val or test is missing (default 0.2)"
    add("--hold-out", type=float, default=0.2, help=text)
    add("--frames", help="frames of a clip in the evaluation; default: the base of the model")
    add("--size", help="pixels, such as 112 or 112x196; default: likewise")
    add("--batch-size", type=int, default=8, help="views per batch in the evaluation (default 8)")
    add_views(parser)
    return parser


def main(argv: list[str]) -> int:
    """The command `stretchysnake finetune`."""
    parser = make_parser()
    if not any(word.split("=")[0] == "--config" for word in argv):
        parser.parse_args(argv)
        raise ConfigError("--config is missing: it takes a sheet such as configs/weizmann.py")
    base, argv = parse_config(argv)
    args, progress = parser.parse_args(argv), Progress()
    config_lib.require(0 < args.hold_out < 1, "--hold-out", args.hold_out, "above 0, below 1")
    config_lib.require(args.batch_size >= 1, "--batch-size", args.batch_size, "a number >= 1")
    if not base.train.init_from:
        raise ConfigError(
            "train.init_from is '': it takes the weights to start from, a workdir or a .pth, .npz "
            "or .safetensors file"
        )
    base.optim = config_lib.resolve(base.optim)
    rates, decays = (
        parse_values(text, name) if text else default
        for text, name, default in (
            (args.learning_rates, "--learning-rates", None),
            (args.weight_decays, "--weight-decays", [base.optim.weight_decay]),
        )
    )
    rates = rates or [factor * base.optim.learning_rate for factor in FACTORS]
    scale = model_lib.Model(base.model, {}, base.stretch)
    bucket, views = find_bucket(args, scale), parse_views(args, base.data)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    keep_programs(base.train.compilation_cache)
    # 1. Train with every setting, and let the validation clips judge.
    base, val, test, reported, chosen_on = settle_lists(base, args.hold_out, out, progress)
    runs, rows, unreadable = make_runs(base, rates, decays), [], {}
    for number, (name, config) in enumerate(runs.items()):
        progress.say(f"run {number + 1} of {len(runs)}: {name}")
        row = {"learning_rate": config.optim.learning_rate}
        row |= {"weight_decay": config.optim.weight_decay}
        try:
            if status := train(config, out / name, progress):
                return status
        except TrainingError as error:  # a finding about this setting: the others go on
            progress.say(f"{name}: {error}")
            rows.append(row | dict.fromkeys(("top1", "top5", "mean_class", "loss")))
            continue
        found = compute(model_lib.load(out / name), val, bucket, args.batch_size, views)
        unreadable |= dict(found.unreadable)
        rows.append(row | outputs.summary(found))
    # 2. The best one on the clips that it is reported on.
    trained = [i for i, row in enumerate(rows) if row["top1"] is not None]
    if not trained:
        raise TrainingError(f"no setting could be trained: {', '.join(runs)}")
    choice = trained[probe.best([rows[i] for i in trained])]
    if len(rates) > 1 and rows[choice]["learning_rate"] in (min(rates), max(rates)):
        rate = rows[choice]["learning_rate"]
        progress.say(f"learning rate {rate:g} is at an end of those tried: try others beyond it")
    workdir = out / list(runs)[choice]
    model = model_lib.load(workdir)
    found = compute(model, test, bucket, args.batch_size, views)
    unreadable |= dict(found.unreadable)
    for path, reason in unreadable.items():
        progress.say(f"unreadable, left out: {path}: {reason}")
    report = {
        "init_from": base.train.init_from,
        "variant": base.stretch.variant,
        **dataclasses.asdict(bucket),
        "steps": model.step,
        "views": views,
        "clips": {"val": len(val), reported: len(found.labels)},
        "reported_on": reported,
        "chosen_on": chosen_on,
        "chosen": rows[choice],
        "choice": choice,
        "workdir": str(workdir),
        "result": outputs.summary(found),
        "sweep": rows,
        "classes": probe_report.class_table(found.values, found.labels, test.classes),
        "confusion": outputs.confusion(
            found.labels, found.values.argmax(1), len(test.classes)
        ).tolist(),
        "unreadable": [*unreadable.items()],
    }
    where = out / "finetune"
    probe_report.write(where, report)
    print(probe_report.text(report, f"{reported}, {len(found.labels)} clips, {bucket}"))
    print(f"the model: {workdir}\nwritten: {where}.json, .sweep.csv, .classes.csv, .png")
    return 0
