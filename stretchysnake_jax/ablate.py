"""The command `stretchysnake ablate`: variants, methods of interpolation and scales in one table.

With --workdir the methods are tried on one checkpoint without training; with --config the variants
are trained first, one after the other. A cell that is done is never done again.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import operator
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from stretchysnake_jax import ablation, evaluate, grid, model, models, outputs
from stretchysnake_jax import config as config_lib
from stretchysnake_jax import run as run_lib
from stretchysnake_jax.ablation import OWN, SCORES, Table, claim
from stretchysnake_jax.buckets import Bucket, make_bucket, training_buckets
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.compile import keep_programs
from stretchysnake_jax.config import Config, ConfigError, StretchConfig
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.step import fit
from stretchysnake_jax.train import TrainingError, train

WEIGHTS = ("all", *grid.METHODS_OF)
PER_RUN = {"stretch.variant", "train.seed"}  # fields that are axes of the table


@dataclasses.dataclass
class Run:
    """A model of the table.

    Attributes:
      name: of the run.
      variant: whose patch rule gives the buckets.
      seed: of its training.
      tests: the (weights, method) it is evaluated with.
      workdir, config: where and how it is trained, or
      loaded: the model itself, which is only evaluated.
      reason: why it has no scores at all.
    """

    name: str
    variant: str
    seed: int
    tests: list[tuple[str, str]]
    workdir: pathlib.Path | None = None
    config: Config | None = None
    loaded: model.Model | None = None
    reason: str = ""


def methods_of(stretch: StretchConfig, pair: tuple[str, str]) -> dict[str, str]:
    """Method by weight: those of `stretch`, with that of a (weights, method) in their place."""
    own = {w: getattr(stretch, f"{w}_method") for w in grid.METHODS_OF}
    weights, method = pair
    if pair == OWN:
        return own
    return own | dict.fromkeys(grid.METHODS_OF if weights == "all" else (weights,), method)


def methods_used(methods: dict[str, str], buckets, config: config_lib.ModelConfig) -> tuple:
    """The (weight, method) that matter: of weights that have another shape in one of `buckets`."""
    resized = {
        "kernel": any(b.patch != config.patch for b in buckets),
        "spatial": any(b.grid != config.grid for b in buckets),
        "temporal": any(b.frames != config.frames for b in buckets),
    }
    return tuple((w, m) for w, m in methods.items() if resized[w])


def plan_training(base: Config, variants, pairs, seeds, each: bool, out) -> list[Run]:
    """The runs to train: one per variant and seed, or with `each` per (weights, method) too.

    Methods that change nothing in the training of a variant share a run. A variant that can't be
    trained has a reason.
    """
    runs = {}
    for variant in variants:
        for seed in seeds:
            for pair in pairs if each else pairs[:1]:
                config = copy.deepcopy(base)
                config.stretch.variant, config.train.seed = variant, seed
                methods, reason = methods_of(base.stretch, pair), ""
                for weight, method in methods.items():
                    setattr(config.stretch, f"{weight}_method", method)
                try:
                    buckets = [b for b, _ in training_buckets(config.stretch, config.model)]
                except ConfigError as error:
                    buckets, reason = [], str(error)
                key = variant, seed, methods_used(methods, buckets, config.model)
                name = "-".join([variant, *(pair if pair != OWN else ()), str(seed)])
                config.name = name
                run = Run(name, variant, seed, [], out / "runs" / name, config, reason=reason)
                runs.setdefault(key, run).tests.extend([pair] if each else pairs)
    return list(runs.values())


def find_cells(variant: str, frames, sizes, config) -> dict[tuple, Bucket | str]:
    """(frames, height, width) -> its bucket, or why the variant has none."""
    cells = {}
    for t in frames:
        for size in sizes:
            try:
                cells[t, *size] = make_bucket(variant, t, size, config)
            except ConfigError as error:
                cells[t, *size] = str(error)
    return cells


def make_step(config: Config):
    """step(parameters fitted to a bucket, several, (B, T, H, W, 3), bucket) -> (B, several,
    classes).

    Weights are resized outside, so a scale is compiled once for all methods, variants and seeds.
    """
    apply = models.make_apply(config.model, config.train.dtype)

    @jax.jit
    def forward(params, video):
        return apply(params, models.normalise(video, config.model.normalise))

    return lambda fitted, video, bucket: jnp.stack([forward(p, video) for p in fitted], 1)


def evaluate_cell(step, loaded: model.Model, clips, bucket, pairs, batch_size, views, on_batch):
    """Scores of a model at one scale with several (weights, method); every clip is read once.

    Pairs whose weights keep their shape at this scale are the same model and are computed once.

    Returns:
      (a dict of SCORES and clips for every pair, (path, reason) of unreadable clips).
    """
    used = {}
    for pair in pairs:
        methods = methods_of(loaded.run.stretch, pair)
        used[pair] = methods_used(methods, [bucket], loaded.config)
    fitted = {}
    for key in dict.fromkeys(used.values()):
        stretch = StretchConfig(**{f"{weight}_method": method for weight, method in key})
        fitted[key] = fit(loaded.params, bucket, stretch)
    found = outputs.compute(
        step,
        list(fitted.values()),
        loaded.run.data,
        clips,
        bucket,
        batch_size,
        views=views,
        on_batch=on_batch,
    )
    scores = {
        key: outputs.summary(dataclasses.replace(found, values=found.values[:, i]))
        | {"clips": len(found.labels)}
        for i, key in enumerate(fitted)
    }
    return [scores[used[pair]] for pair in pairs], found.unreadable


def do_run(run: Run, cells: dict, clips, table: Table, step, batch_size, views, progress) -> int:
    """Trains a run if it has rows left to do, and adds them; returns the status of `train`."""
    todo = {}
    for where, bucket in cells.items():
        place = dict(zip(("frames", "height", "width"), where, strict=True))
        names = {"variant": run.variant, "seed": run.seed, "run": run.name, **place}
        rows = [names | {"weights": weights, "method": method} for weights, method in run.tests]
        if rows := [row for row in rows if row not in table]:
            todo[where] = bucket, rows
    if not todo:
        return 0
    can_run = any(not isinstance(bucket, str) for bucket, _ in todo.values())
    if run.config is not None and can_run and not run.reason:
        try:
            if status := train(run.config, run.workdir, progress):
                return status
        except TrainingError as error:  # a finding about the variant: the others go on
            run.reason = str(error)
            progress.say(f"{run.name}: {run.reason}")
    blank = dict.fromkeys(("patch", "trained", *SCORES, "gflops", "clips", "steps"))
    left = {}
    for where, (bucket, rows) in todo.items():
        if reason := run.reason or (bucket if isinstance(bucket, str) else ""):
            table.add([row | blank | {"reason": reason} for row in rows])
        else:
            left[where] = bucket, rows
    if not left:
        return 0
    loaded = run.loaded or model.load(run.workdir)
    trained = {b for b, _ in training_buckets(loaded.run.stretch, loaded.config)}
    clock, unreadable = Clock(len(left) * len(clips)), {}
    for number, (bucket, rows) in enumerate(left.values()):

        def on_batch(done, number=number, bucket=bucket):
            clock.advance(number * len(clips) + done)
            text = f"evaluating {run.name}: {bucket}, {clock.done}/{clock.total} clips"
            progress.show(f"{text}, {clock.left} left")

        pairs = [(row["weights"], row["method"]) for row in rows]
        scores, bad = evaluate_cell(step, loaded, clips, bucket, pairs, batch_size, views, on_batch)
        unreadable |= dict(bad)
        known = {
            **grid.place(bucket),
            "trained": bucket in trained,
            "gflops": grid.gflops(loaded.run, bucket, math.prod(views)),
            "steps": loaded.step,
            "reason": "",
        }
        table.add([row | known | score for row, score in zip(rows, scores, strict=True)])
    progress.close()
    for path, reason in unreadable.items():
        progress.say(f"unreadable, left out: {path}: {reason}")
    return 0


def digest(*parts: bytes) -> str:
    """A short name of some bytes."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def parse_choices(text: str, what: str, known: tuple[str, ...]) -> list[str]:
    """Reads "a,b" -> ["a", "b"], each once; raises ConfigError unless all are among `known`."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        config_lib.check_choice(what, word, known)
    return words


def parse_seeds(text: str) -> list[int]:
    """Reads "0,1" -> [0, 1]."""
    words = text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise ConfigError(f"--seeds is {text!r}: it takes whole numbers such as 0,1")
    return list(dict.fromkeys(map(int, words)))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake ablate",
        description="Variants x methods of interpolation x weights x scales as one table: of one "
        "checkpoint without training (--workdir), or of models trained for it (--config). "
        "Interrupted, the same command goes on; cells that are done are skipped.",
        epilog="--config.FIELD=VALUE overrides a field of the config.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", help="trains every variant and seed from it")
    add("--workdir", help="of a trained run, which is only evaluated")
    add("--out", help="folder of the results; default: WORKDIR/ablation")
    add("--variants", help=f"of {', '.join(config_lib.VARIANTS)}; default: the run's or config's")
    add("--methods", help=f"of {', '.join(config_lib.METHODS)}, beside those of the run")
    add("--weights", help=f"that get them, of {', '.join(WEIGHTS)} (default all of these)")
    add(
        "--train-each",
        action="store_true",
        help="trains with every method, too, instead of trying them on the same weights",
    )
    add("--steps", type=int, help="of training; default: as the config says")
    add("--seeds", help="such as 0,1; default: the config's")
    add("--frames", help="frame counts, such as 4,8,16; default: those trained on")
    add("--sizes", help="pixels, such as 56,84 or 84x112; default: those trained on")
    add("--checkpoint", default="latest", help="of WORKDIR: latest (default), best or a step")
    add("--split", choices=("test", "val", "train"), help="default: test, or val")
    add("--batch-size", type=int, default=8, help="views per batch (default 8)")
    evaluate.add_views(parser)
    return parser


def plan(args: argparse.Namespace, base: Config | None, progress: Progress):
    """What a command line asks for.

    Returns:
      (its folder, runs, cells by variant, clips, the configuration, settings for `claim`).
    """
    config, loaded, classes = base, None, None
    if base is None:
        if not pathlib.Path(args.workdir).is_dir():
            raise ConfigError(f"no workdir of a run at {args.workdir}")
        loaded = model.load(args.workdir, checkpoint=args.checkpoint)
        config, classes = loaded.run, loaded.classes
    else:
        if args.steps is not None:
            base.train.steps, base.train.epochs = args.steps, 0.0
        config, clips, _ = run_lib.prepare(base, progress)
        classes = clips.classes
    out = pathlib.Path(args.out or pathlib.Path(args.workdir) / "ablation")
    own = config.stretch.variant
    variants, methods, weights = (
        parse_choices(text, f"--{name}", known) if text else default
        for name, text, known, default in (
            ("variants", args.variants, config_lib.VARIANTS, [own]),
            ("methods", args.methods, config_lib.METHODS, []),
            ("weights", args.weights, WEIGHTS, list(WEIGHTS)),
        )
    )
    seeds = parse_seeds(args.seeds) if args.seeds else [config.train.seed]
    pairs = [OWN, *((w, m) for w in weights for m in methods)]
    if loaded:
        name = pathlib.Path(args.workdir).resolve().name
        runs = [Run(name, v, config.train.seed, pairs, loaded=loaded) for v in variants]
    else:
        runs = plan_training(config, variants, pairs, seeds, args.train_each, out)
    known = []
    if not (args.frames and args.sizes):
        known = [b for b, _ in training_buckets(config.stretch, config.model)]
    frames = sorted({b.frames for b in known})
    frames = evaluate.parse_numbers(args.frames, "--frames") if args.frames else frames
    sizes = sorted({(b.height, b.width) for b in known})
    sizes = evaluate.parse_sizes(args.sizes) if args.sizes else sizes
    cells = {v: find_cells(v, frames, sizes, config.model) for v in variants}
    clips = None
    for split in [args.split] if args.split else ["test", "val"]:
        clips = clips or load_clips(config.data, split, classes, optional=True, say=progress.say)
    if clips is None:
        raise ConfigError(f"there is no {args.split or 'test or validation'} list to evaluate on")
    fields = [n for n in config_lib.field_names(config) if n not in {*run_lib.FREE, *PER_RUN}]
    listed = json.dumps([grid.clip_names(clips), clips.labels.tolist()]).encode()
    arrays = [np.asarray(x).tobytes() for x in jax.tree.leaves(loaded.params)] if loaded else []
    settings = {name: operator.attrgetter(name)(config) for name in fields} | {
        "checkpoint": loaded and f"step {loaded.step}, {digest(*arrays)}",
        "list of clips": digest(listed),
        "views": evaluate.parse_views(args, config.data),
        "--train-each": args.train_each,
        "axes": {
            "variants": variants,
            "seeds": [] if loaded else seeds,
            "weights": weights if methods else [],
            "methods": methods,
            "frames": frames,
            "sizes": sizes,
        },
    }
    return out, runs, cells, clips, config, settings


def main(argv: list[str]) -> int:
    """The command `stretchysnake ablate`."""
    from stretchysnake_jax.cli import parse_config

    parser, base = make_parser(), None
    if any(word.startswith("--config") for word in argv):
        base, argv = parse_config(argv)
    args, progress = parser.parse_args(argv), Progress()
    if (base is None) == (args.workdir is None):
        raise ConfigError("it takes one of --workdir (evaluates a run) and --config (trains)")
    if base and not args.out:
        raise ConfigError("--out is missing: it takes the folder of the results")
    for name in ("steps", "seeds", "train_each"):
        if base is None and getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} is for training: it goes with --config")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size is {args.batch_size}: it takes a number >= 1")
    out, runs, cells, clips, config, settings = plan(args, base, progress)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, settings)
    keep_programs(config.train.compilation_cache)
    blank = {(v, b): None for v in cells for b in cells[v].values() if isinstance(b, str)}
    blank |= {(run.variant, run.reason): None for run in runs if run.reason}
    for variant, reason in blank:
        progress.say(f"left blank, {variant}: {reason}")
    results, step = Table(out / "ablation"), make_step(config)
    for number, run in enumerate(runs):
        progress.say(f"model {number + 1} of {len(runs)}: {run.variant}, {run.name}")
        if status := do_run(
            run,
            cells[run.variant],
            clips,
            results,
            step,
            args.batch_size,
            settings["views"],
            progress,
        ):
            return status
    lines, name = ablation.summarise(results.rows)
    print(ablation.table(lines, name))
    title = f"{config.name}, {len(clips)} clips" if base else f"{runs[0].name}, {len(clips)} clips"
    paths = ablation.draw(out, results.rows, title)
    done = f"{len(results.rows) - results.found} rows done, {results.found} were there"
    print(f"\n{done}\nwritten: {out}/ablation.csv, .json, {', '.join(map(str, paths))}")
    return 0
