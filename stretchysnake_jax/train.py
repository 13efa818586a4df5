"""The training loop. Read `train`: what is trained, where it starts, then step after step.

stretchysnake train --config configs/stick_actions.py --workdir runs/stick
"""

import argparse
import contextlib
import math
import pathlib
import signal
import sys

import jax
import numpy as np

from stretchysnake_jax import compile_report, distributed, models, outputs, run, sharding
from stretchysnake_jax.buckets import make_bucket, make_run_schedule, sample_offsets
from stretchysnake_jax.checkpoint import Checkpoints
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.compile import Ahead, keep_programs
from stretchysnake_jax.config import Config
from stretchysnake_jax.data import pipeline
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.metrics import Loggers
from stretchysnake_jax.optim import batch_scale
from stretchysnake_jax.optim import make_schedule as make_learning_rate
from stretchysnake_jax.profile import Profiler, parse_steps
from stretchysnake_jax.step import EvalStep, TrainStep, init_state


class TrainingError(RuntimeError):
    """A run that can't go on; the message is for the user."""

    plain = True


def on_device(batch: dict, mesh) -> dict:
    """Starts to send a batch to its devices; on a single CPU it is already where it is used."""
    arrays = {name: batch[name] for name in ("video", "label", "mask")}
    if mesh is not None:
        return batch | sharding.place(mesh, arrays)
    return batch if jax.default_backend() == "cpu" else batch | jax.device_put(arrays)


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


def train(config: Config, workdir, progress: Progress | None = None, profile=None) -> int:
    """Trains, from the beginning or from the newest checkpoint of the workdir.

    Every process of a job calls it; the first one writes and talks.

    Args:
      config: the experiment.
      workdir: where config.json, classes.txt, metrics.jsonl and checkpoints/ go; on a file system
        that all processes share.
      progress: shows the state of things; standard error unless given.
      profile: the first and the last step to trace, see `profile.Profiler`.

    Returns:
      0 when all steps are done, 128 + the signal's number when a signal ended the run.

    Raises:
      ConfigError: the config can't be run.
      TrainingError: the loss is no longer finite.
      CheckpointFailed: a checkpoint can't be written, or none can be read.
      TooManyUnreadable: more clips are unreadable than `data.max_unreadable` allows.
    """
    first, workdir = jax.process_index() == 0, pathlib.Path(workdir)
    progress = progress or Progress(every=10.0 if first else math.inf)
    say = progress.say if first else (lambda text: None)
    # 1. What is trained on what. The schedule follows from the config alone.
    config, clips, val = run.prepare(config, progress)
    cfg, mesh = config.train, sharding.make_mesh(config.mesh)
    config = run.settle_batches(config, workdir, sharding.batch_shards(mesh) * cfg.accumulate)
    share, mesh = sharding.host_share(mesh), mesh if mesh.size > 1 else None
    schedule = make_run_schedule(config, len(clips) * config.data.repeats)
    steps = len(schedule)
    # 2. Where it starts: at a checkpoint, at given weights, or at the beginning.
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, cfg.keep, say=say, keep_every=cfg.keep_every)
    run.claim(workdir, config, clips.classes, begun=bool(checkpoints.steps))
    state, saved, digests = init_state(config, steps, mesh), {}, run.fingerprints(clips, schedule)
    if checkpoints.steps:
        state, saved = checkpoints.restore(state)
        run.check_fingerprints(config, workdir, saved, digests)
        say(f"continuing {workdir} at step {int(state['step'])} of {steps}")
    elif cfg.init_from:
        state = run.start_from(config, state, say)
    start = int(state["step"])
    clock = Clock(steps, start, saved.get("elapsed", 0.0))
    tally = pipeline.UnreadableTally(saved.get("unreadable"))
    learning_rates = np.asarray(jax.vmap(make_learning_rate(config.optim, steps))(np.arange(steps)))
    learning_rates = learning_rates * batch_scale(config.optim, np.diff(schedule.offsets))
    lengths = [bucket.tokens(config.model.tubelet) for bucket in schedule.buckets]
    tokens = sample_offsets(schedule.which, np.multiply(lengths, schedule.batch_sizes))
    log = Loggers(config, workdir, start, say)
    profiler = Profiler(workdir, profile, say)
    say(
        f"{config.name}: {config.stretch.variant}, {models.count(state['params']):,} parameters, "
        f"{len(clips)} clips, {steps} steps, {len(schedule.buckets)} buckets"
        + (f", mesh {dict(mesh.shape)}" if mesh else "")
    )

    def save(metrics=None):
        samples = int(schedule.offsets[int(state["step"])])
        done = {"elapsed": clock.elapsed, "samples": samples, "unreadable": tally.state()}
        checkpoints.save(state, done | digests, metrics)

    # 3. Every program is compiled ahead, in threads, in the order in which the run meets it. The
    # loop waits for one that isn't ready; it compiles nothing.
    train_step = TrainStep(config, steps, mesh)
    eval_step = EvalStep(config.model, config.stretch, cfg.dtype, mesh=mesh)
    scale, val_batch = base_scale(config), eval_batch(mesh)
    jobs = compile_report.plan(config, train_step, schedule, start, workdir / "compile.json")
    if val:
        jobs.append(lambda: eval_step.compile(train_step.state["params"], scale, val_batch))

    # 4. Step after step. Metrics are read one step late, so the device never waits for the host:
    # the next batch is loaded and sent to it while it is at the last one.
    pending, step, metrics = None, start, None
    batches = pipeline.train_batches(
        config.data,
        clips,
        schedule.loaded,
        seed=cfg.seed,
        start_step=start,
        shard_index=share[0],
        shard_count=share[1],
    )
    with contextlib.ExitStack() as stack:
        for thing in (checkpoints, log, profiler, batches):
            stack.enter_context(contextlib.closing(thing))
        stop, ahead = stack.enter_context(StopOnSignal()), stack.enter_context(Ahead(jobs))
        for step in range(start + 1, steps + 1):
            profiler.step(step)
            before = clock.elapsed
            batch = on_device(next(batches), mesh)
            waited = clock.elapsed - before
            if metrics is None or metrics["loss"].is_ready():  # else the device was busy meanwhile
                clock.wait(waited)
            for path, reason in tally.add(batch):
                progress.say(f"unreadable, left out: {path}: {reason}")
            tally.check(len(clips), config.data.max_unreadable)
            bucket = schedule.buckets[batch["bucket"]]
            begun = clock.elapsed
            state, metrics = train_step(state, batch, bucket)
            ended = clock.elapsed if metrics["loss"].is_ready() else None
            # Once a step: a signal may come at any moment, and all processes stop at the same step.
            stopping = distributed.stop_agreed(stop.signal, step)
            due = step % cfg.checkpoint_every == 0 or step == steps or stopping
            if pending:
                report(pending, log, progress, clock, cfg.log_every, checkpoints, steps)
            clock.advance(step)
            pending = {"step": step, "bucket": str(bucket), **metrics}
            pending |= {"begun": begun, "ended": ended, **pace(schedule, tokens, step, clock)}
            pending["learning_rate"] = float(learning_rates[step - 1])
            pending |= {"data_wait": waited, "data_wait_share": clock.waiting}
            pending["unreadable"] = tally.count
            pending["compiled"] = train_step.compilations
            validate = step == steps or (cfg.eval_every and step % cfg.eval_every == 0)
            if due or validate:  # never save or rate what is no longer finite
                report(pending, log, progress, clock, cfg.log_every, checkpoints, steps, True)
                pending = None
            if validate and val and not stopping:
                params = state.get("ema", state["params"])
                found = outputs.compute(
                    eval_step, params, config.data, val, scale, val_batch, mesh=mesh
                )
                save(rate(found, config, val, scale, step, log, progress))
            elif due:
                save()
            checkpoints.check()
            if stopping:
                break
        else:
            ahead.wait()  # raises what went wrong in a thread
    if step < steps:
        name = signal.Signals(stopping).name
        say(f"{name}: saved step {step} of {steps}; start again to continue")
        return 128 + stopping
    compiled = train_step.compilations
    waiting = f", {100 * clock.waiting_in_all:.0f} % of the time waiting for data"
    line = f"done: {steps} steps in {workdir}, {compiled} compilations"
    say(line + (waiting if steps > start else ""))
    return 0


def base_scale(config: Config):
    """The bucket of the model's base scale, which validation uses."""
    return make_bucket(config.stretch.variant, config.model.frames, config.model.size, config.model)


def eval_batch(mesh) -> int:
    """Clips of a validation batch: 8, or the next number that the devices divide."""
    parts = sharding.batch_shards(mesh) if mesh else 1
    return -(-8 // parts) * parts


def pace(schedule, tokens, step: int, clock: Clock) -> dict:
    """Size of a step and recent speed, all devices together; `tokens` as offsets before steps."""
    seconds, *span = clock.recent
    return {
        "clips": int(schedule.offsets[step] - schedule.offsets[step - 1]),
        "tokens": int(tokens[step] - tokens[step - 1]),
        "clips_per_s": float(np.diff(schedule.offsets[span])[0] / seconds),
        "tokens_per_s": float(np.diff(tokens[span])[0] / seconds),
        "elapsed": clock.elapsed,
    }


def report(pending, log, progress, clock, every, checkpoints, steps, force=False) -> None:
    """Reads a step's metrics, writes them, and stops the run if they aren't finite."""
    line = {k: v.item() if hasattr(v, "item") else v for k, v in pending.items()}
    line["step_seconds"] = clock.took(line.pop("begun"), line.pop("ended"))
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


def rate(found, config: Config, val: ClipList, bucket, step, log, progress) -> dict:
    """Writes and says what a validation found; returns what the checkpoint is rated by."""
    tally = pipeline.UnreadableTally()
    for path, reason in tally.add({"unreadable": found.unreadable}):
        progress.say(f"unreadable, left out: {path}: {reason}")
    tally.check(len(val), config.data.max_unreadable)
    scores = outputs.summary(found)
    rated = {f"val_{name}": scores[name] for name in ("top1", "top5", "loss")}
    log.write({"step": step, "bucket": str(bucket), **rated})
    if jax.process_index() == 0:
        progress.say(
            f"step {step}: validation at {bucket}: top-1 {100 * scores['top1']:.1f} %, "
            f"loss {scores['loss']:.3f}, {len(found.labels)} clips"
        )
    return rated


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
    parser.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="START:END",
        help="trace these steps (default: five soon after the start) into WORKDIR/profile",
    )
    if not argv or "-h" in argv or "--help" in argv:
        parser.parse_args(["--help"])
    config, rest = parse_config(argv)
    args = parser.parse_args(rest)
    steps = None if args.profile is None else parse_steps(args.profile)
    distributed.start()
    with distributed.Watch():
        keep_programs(config.train.compilation_cache)
        return train(config, args.workdir, profile=steps)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
