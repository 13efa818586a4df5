"""The training loop. Read `train`: what is trained, where it starts, then step after step.

stretchysnake train --config configs/stick_actions.py --workdir runs/stick
"""

import argparse
import dataclasses
import hashlib
import json
import math
import pathlib
import signal
import sys

import jax
import numpy as np

from stretchysnake_jax import config as config_lib
from stretchysnake_jax import models
from stretchysnake_jax.buckets import make_bucket, make_run_schedule
from stretchysnake_jax.checkpoint import Checkpoints
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import Config, ConfigError
from stretchysnake_jax.data import decode, pipeline, stick_actions
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.grid import evaluate_bucket
from stretchysnake_jax.metrics import MetricsLog
from stretchysnake_jax.optim import make_schedule as make_learning_rate
from stretchysnake_jax.step import TrainStep, init_state, make_eval_step
from stretchysnake_jax.validation import validate

# Fields that may change when a run goes on: they change neither its numbers nor their order.
FREE = ("data.threads", "data.workers", "data.prefetch", "train.log_every", "train.eval_every")
FREE += ("train.checkpoint_every", "train.keep", "name")
FREE += ("data.max_unreadable", "data.allow_absolute", "data.test_clips", "data.test_crops")


class TrainingError(RuntimeError):
    """A run that can't go on; the message is for the user."""

    plain = True


def prepare(config: Config, progress: Progress) -> tuple[Config, ClipList, ClipList | None]:
    """Renders the embedded data if the config asks for it, and reads the lists.

    Returns:
      (config with absolute paths, training clips, validation clips or None).
    """
    validate(config)
    decode.set_up_opencv()
    data = config_lib.resolve(config.data)
    stick = data.stick_actions
    if stick.path:
        make = {k: v for k, v in dataclasses.asdict(stick).items() if k != "path"}
        try:
            stick_actions.make(
                stick.path, **make, progress=progress.counter(f"rendering {stick.path}: clips")
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        progress.close()
        for split in config_lib.SPLITS:
            setattr(data, split, str(pathlib.Path(stick.path) / f"{split}.txt"))
    for name in (*config_lib.SPLITS, "root", "annotations"):
        if getattr(data, name):
            setattr(data, name, str(pathlib.Path(getattr(data, name)).absolute()))
    config = dataclasses.replace(config, data=data)
    clips = load_clips(data, "train", say=progress.say)
    val = load_clips(data, "val", clips.classes, optional=True, say=progress.say)
    if len(clips.classes) != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes} but {data.train or data.dataset} has "
            f"{len(clips.classes)} classes: set it to {len(clips.classes)}"
        )
    return config, clips, val


def claim(workdir: pathlib.Path, config: Config, classes: list[str], begun: bool) -> None:
    """Writes the resolved config and the class names; checks the config of a run that has begun.

    Raises:
      ConfigError: the workdir belongs to a run with another config.
    """
    path = workdir / "config.json"
    if begun:
        old, new = config_lib.load(path), config
        old.data = config_lib.resolve(old.data)  # fields may have come after the run was begun
        for name in config_lib.field_names(new):
            if name not in FREE and _get(old, name) != _get(new, name):
                raise ConfigError(
                    f"{workdir} holds a run with another config: {name} is {_get(old, name)!r} "
                    f"there and {_get(new, name)!r} now; go on with its own or take a new workdir"
                )
    else:
        (workdir / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    config_lib.save(config, path)


def settle_batches(config: Config, workdir: pathlib.Path) -> Config:
    """The config with `data.batch_multiple` as the run began with it, on whatever it goes on.

    Were it the devices at hand, a run that goes on with another number of them would cut its row of
    clips into other batches.
    """
    data, path = config.data, workdir / "config.json"
    if not data.tokens_per_batch or data.batch_multiple:
        return config
    multiple = config_lib.load(path).data.batch_multiple if path.exists() else 0
    data = dataclasses.replace(data, batch_multiple=multiple or jax.device_count())
    return dataclasses.replace(config, data=data)


def on_device(batch: dict) -> dict:
    """Starts to send a batch to the accelerator; on a CPU it is already where it is used."""
    if jax.default_backend() == "cpu":
        return batch
    arrays = ("video", "label", "mask")
    return batch | jax.device_put({name: batch[name] for name in arrays})


def fingerprint(clips: ClipList) -> str:
    """A digest of a list: its paths, labels, classes and windows."""
    parts = [clips.paths, clips.labels.tolist(), clips.classes]
    if clips.windows is not None:
        parts += [clips.windows.tolist(), clips.unit]
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest()


def _get(config: Config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


class StopOnSignal:
    """Notes SIGINT and SIGTERM so that the loop can save and leave; a second one kills as usual."""

    def __enter__(self):
        self.signal = None
        self._before = {}
        try:
            for s in (signal.SIGINT, signal.SIGTERM):
                self._before[s] = signal.signal(s, self._note)
        except ValueError:  # not the main thread: whoever runs the loop there handles signals
            pass
        return self

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, self._before[number])

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)


def train(config: Config, workdir, progress: Progress | None = None) -> int:
    """Trains, from the beginning or from the newest checkpoint of the workdir.

    Args:
      config: the experiment.
      workdir: where config.json, classes.txt, metrics.jsonl and checkpoints/ go.
      progress: shows the state of things; standard error unless given.

    Returns:
      0 when all steps are done, 128 + the signal's number when a signal ended the run.

    Raises:
      ConfigError: the config can't be run.
      TrainingError: the loss is no longer finite.
      TooManyUnreadable: more clips are unreadable than `data.max_unreadable` allows.
    """
    progress, workdir = progress or Progress(), pathlib.Path(workdir)
    # 1. What is trained on what. The schedule follows from the config alone.
    config, clips, val = prepare(config, progress)
    cfg = config.train
    config = settle_batches(config, workdir)
    schedule = make_run_schedule(config, len(clips) * config.data.repeats)
    steps = len(schedule)
    train_step = TrainStep(config, steps)
    # 2. Where it starts: at a checkpoint, at given weights, or at the beginning.
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, cfg.keep)
    claim(workdir, config, clips.classes, begun=bool(checkpoints.steps))
    state, saved, digest = init_state(config, steps), {}, fingerprint(clips)
    if checkpoints.steps:
        state, saved = checkpoints.restore(state)
        if saved["clips"] != digest:
            name = config.data.train or config.data.dataset
            raise ConfigError(
                f"{name} has changed since {workdir} was begun: the run can't go on as it was; "
                "take a new workdir, with --config.train.init_from for its weights"
            )
        progress.say(f"continuing {workdir} at step {int(state['step'])} of {steps}")
    elif cfg.init_from:
        state["params"] = initial_params(config, state["params"], progress)
    start = int(state["step"])
    clock = Clock(steps, start, saved.get("elapsed", 0.0))
    tally = pipeline.UnreadableTally(saved.get("unreadable"))
    learning_rates = np.asarray(jax.vmap(make_learning_rate(config.optim, steps))(np.arange(steps)))
    eval_step = make_eval_step(config.model, config.stretch, cfg.dtype)
    log = MetricsLog(workdir / "metrics.jsonl", start)
    progress.say(
        f"{config.name}: {config.stretch.variant}, {models.count(state['params']):,} parameters, "
        f"{len(clips)} clips, {steps} steps, {len(schedule.buckets)} buckets"
    )

    def save(metrics=None):
        done = {"elapsed": clock.elapsed, "unreadable": tally.state(), "clips": digest}
        checkpoints.save(state, done, metrics)

    # 3. Step after step. Metrics are read one step late, so the device never waits for the host:
    # the next batch is loaded and sent to it while it is at the last one.
    pending, step, metrics = None, start, None
    batches = pipeline.train_batches(config.data, clips, schedule, seed=cfg.seed, start_step=start)
    with StopOnSignal() as stop, batches:
        for step in range(start + 1, steps + 1):
            before = clock.elapsed
            batch = on_device(next(batches))
            waited = clock.elapsed - before
            if metrics is None or metrics["loss"].is_ready():  # else the device was busy meanwhile
                clock.wait(waited)
            for path, reason in tally.add(batch):
                progress.say(f"unreadable, left out: {path}: {reason}")
            tally.check(len(clips), config.data.max_unreadable)
            bucket = schedule.buckets[batch["bucket"]]
            state, metrics = train_step(state, batch, bucket)
            stopping = stop.signal  # once a step: it may change at any moment
            due = step % cfg.checkpoint_every == 0 or step == steps or stopping
            if pending:
                report(pending, log, progress, clock, cfg.log_every, checkpoints, steps)
            clock.advance(step)
            pending = {"step": step, "bucket": str(bucket), **metrics}
            pending["learning_rate"] = float(learning_rates[step - 1])
            seconds, *span = clock.recent
            pending["clips_per_s"] = float(np.diff(schedule.offsets[span])[0] / seconds)
            pending |= {"data_wait": waited, "data_wait_share": clock.waiting}
            pending["unreadable"] = tally.count
            pending["compiled"] = train_step.compilations
            validate = step == steps or (cfg.eval_every and step % cfg.eval_every == 0)
            if due or validate:  # never save or rate what is no longer finite
                report(pending, log, progress, clock, cfg.log_every, checkpoints, steps, True)
                pending = None
            if validate and val and not stopping:
                save(validation(config, eval_step, state, val, step, log, progress))
            elif due:
                save()
            if stopping:
                break
    checkpoints.close()
    log.close()
    if step < steps:
        name = signal.Signals(stopping).name
        progress.say(f"{name}: saved step {step} of {steps}; start again to continue")
        return 128 + stopping
    compiled = train_step.compilations
    waiting = f", {100 * clock.waiting_in_all:.0f} % of the time waiting for data"
    line = f"done: {steps} steps in {workdir}, {compiled} compilations"
    progress.say(line + (waiting if steps > start else ""))
    return 0


def report(pending, log, progress, clock, every, checkpoints, steps, force=False) -> None:
    """Reads a step's metrics, writes them, and stops the run if they aren't finite."""
    line = {k: v.item() if hasattr(v, "item") else v for k, v in pending.items()}
    if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
        log.write(line)
        checkpoints.wait()
        good = f"step {checkpoints.steps[-1]}" if checkpoints.steps else "none yet"
        raise TrainingError(
            f"the loss is {line['loss']}, the gradient norm {line['grad_norm']} at step "
            f"{line['step']}, bucket {line['bucket']}; last good checkpoint: {good}. "
            "A smaller optim.learning_rate or optim.clip_norm = 1 often helps; try it in a new "
            "workdir"
        )
    if line["step"] % every == 0 or line["step"] in (1, steps):
        log.write(line)
    progress.show(
        f"step {line['step']}/{steps}  {line['bucket']:<14} loss {line['loss']:.3f}  "
        f"top-1 {100 * line['top1']:3.0f} %  {line['clips_per_s']:.1f} clips/s, "
        f"{100 * line['data_wait_share']:.0f} % waiting for data  {clock.left} left",
        force and line["step"] == steps,
    )


def validation(config: Config, eval_step, state, val: ClipList, step, log, progress) -> dict:
    """Accuracy on the validation list at the model's base scale."""
    model = config.model
    bucket = make_bucket(config.stretch.variant, model.frames, model.size, model)
    row = evaluate_bucket(eval_step, state["params"], config.data, val, bucket)
    tally = pipeline.UnreadableTally()
    for path, reason in tally.add(row):
        progress.say(f"unreadable, left out: {path}: {reason}")
    tally.check(len(val), config.data.max_unreadable)
    found = {"val_top1": row["top1"], "val_top5": row["top5"], "val_loss": row["loss"]}
    log.write({"step": step, "bucket": str(bucket), **found})
    progress.say(
        f"step {step}: validation at {bucket}: top-1 {100 * row['top1']:.1f} %, "
        f"loss {row['loss']:.3f}, {row['clips']} clips"
    )
    return found


def initial_params(config: Config, fresh: dict, progress: Progress) -> dict:
    """The parameters of `train.init_from`, fitted to the config's base scale.

    The head is kept if it has the right number of classes and drawn anew otherwise; everything else
    must have the same shape after interpolation.

    Raises:
      ConfigError: a parameter with another shape.
    """
    from stretchysnake_jax.model import load

    given = load(config.train.init_from)
    model = config.model
    fitted = given.stretch(frames=model.frames, size=model.size, patch=model.patch, method="paper")
    params = dict(fitted.fitted_params)
    if params["head"]["bias"].shape != fresh["head"]["bias"].shape:
        progress.say(
            f"{config.train.init_from} has {params['head']['bias'].size} classes, the config "
            f"{model.num_classes}: the head starts anew"
        )
        params["head"] = fresh["head"]

    def check(path, new, old):
        if new.shape != old.shape:
            raise ConfigError(
                f"{config.train.init_from}: {jax.tree_util.keystr(path)} has shape {new.shape}, "
                f"the config's model takes {old.shape}"
            )
        return jax.numpy.asarray(np.asarray(new), old.dtype)

    if jax.tree.structure(params) != jax.tree.structure(fresh):
        raise ConfigError(f"{config.train.init_from} holds another kind of model than the config's")
    return jax.tree.map_with_path(check, params, fresh)


def main(argv: list[str]) -> int:
    """The command `stretchysnake train`."""
    from stretchysnake_jax.cli import parse_config

    parser = argparse.ArgumentParser(
        prog="stretchysnake train",
        description="Trains a model. The same command in the same workdir continues the run.",
        epilog="--config.FIELD=VALUE overrides a field, such as --config.train.steps=1000 or "
        "--config.stretch.variant=flex_all; 'stretchysnake inspect config --config FILE' "
        "lists all.",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="such as configs/stick_actions.py")
    parser.add_argument("--workdir", required=True, help="where the run's files go")
    if not argv or "-h" in argv or "--help" in argv:
        parser.parse_args(["--help"])
    config, rest = parse_config(argv)
    return train(config, parser.parse_args(rest).workdir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
