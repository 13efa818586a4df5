"""The command `stretchysnake bench compile`: what the plan of stem and trunk saves in compiling."""

import argparse
import pathlib
import time

import jax

from stretchysnake_jax.buckets import training_buckets
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.compile import compile_program
from stretchysnake_jax.config import (
    PRESETS,
    VARIANTS,
    Config,
    DataConfig,
    StretchConfig,
    TrainConfig,
    check_choice,
    preset,
)
from stretchysnake_jax.step import TrainStep
from stretchysnake_jax.validation import validate

PLANS = ("stem and trunk", "step per bucket")
LAYERS = ("loop", "unrolled")


def arrays_for(bucket, batch: int) -> dict:
    """Shapes of what a trunk takes of `batch` clips of a bucket."""
    numbers = {"label": "int32", "mask": "float32"}
    arrays = {name: jax.ShapeDtypeStruct((batch,), dtype) for name, dtype in numbers.items()}
    return arrays | {"video": jax.ShapeDtypeStruct((batch, *bucket.shape), "float32")}


def measure(config: Config, plan: str, tell) -> dict:
    """Compiles the training step of every bucket of a config, one after the other.

    Args:
      config: the experiment; all buckets have its batch size.
      plan: "stem and trunk", as `TrainStep` works, or "step per bucket": the patch kernel is
        interpolated to the bucket's patches inside the step, so that every bucket has its own.
      tell: called after each bucket.

    Returns:
      programs, seconds of all, longest of one bucket.
    """
    step, times, programs = TrainStep(config, 100), [], 0
    batch = config.data.batch_size
    for bucket, _ in training_buckets(config.stretch, config.model):
        start = time.perf_counter()
        if plan == PLANS[0]:
            step.compile(bucket, batch)
            programs = step.compilations
        else:
            compile_program(step.trunk, step.state, arrays_for(bucket, batch), bucket)
            programs += 1
        times.append(time.perf_counter() - start)
        tell()
    return {"programs": programs, "seconds": sum(times), "longest": max(times)}


def main(argv: list[str]) -> int:
    """Runs `stretchysnake bench compile`."""
    from stretchysnake_bench import machine

    parser = argparse.ArgumentParser(
        prog="stretchysnake bench compile",
        description="Seconds that compiling the training step of all buckets takes, one after "
        "another, with a small stem per bucket and a trunk per frame count and with a step per "
        "bucket that interpolates the patch kernel; the layers in a loop and unrolled.",
    )
    add = parser.add_argument
    add("--model", default="tiny", help=f"one of {', '.join(PRESETS)}; default: %(default)s")
    add("--variant", default="static_tokens", help="default: %(default)s")
    add("--frames", default="8,16,32,64", help="default: %(default)s")
    add("--sizes", help="pixels; default: the variant's own of the paper")
    add("--batch", type=int, default=1, help="clips; default: %(default)s")
    add("--json", type=pathlib.Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    check_choice("--variant", args.variant, VARIANTS)
    try:
        frames, sizes = (
            tuple(int(word) for word in (text or "").split(",") if word)
            for text in (args.frames, args.sizes)
        )
    except ValueError:
        parser.error("--frames and --sizes take numbers, such as 8,16")
    machine.can_write(parser, args.json)

    described = machine.describe_machine()
    print(f"{described['cpu']}, {described['cores']} cores, {described['versions']}")
    progress, rows, clock = Progress(), [], None
    for plan in PLANS:
        for layers in LAYERS:
            config = Config(
                "bench",
                preset(args.model),
                stretch=StretchConfig(variant=args.variant, frames=frames, sizes=sizes),
                data=DataConfig(train="-", batch_size=args.batch),
                train=TrainConfig(steps=1, layers=layers),
            )
            validate(config)
            buckets = len(training_buckets(config.stretch, config.model))
            clock = clock or Clock(buckets * len(PLANS) * len(LAYERS))

            def tell(clock=clock, words=f"{plan}, {layers}"):
                clock.advance(clock.done + 1)
                progress.show(f"{words}: {clock.done}/{clock.total} steps, {clock.left} left")

            rows.append({"plan": plan, "layers": layers, **measure(config, plan, tell)})
    progress.close()
    print(f"{args.model}, {args.variant}, {buckets} buckets, batch {args.batch}")
    print(f"{'plan':<18}{'layers':<10}{'programs':>9}{'seconds':>9}{'longest':>9}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['plan']:<18}{row['layers']:<10}{row['programs']:>9}{row['seconds']:>9.1f}"
            f"{row['longest']:>9.1f}{row['seconds'] / rows[0]['seconds']:>6.1f}x"
        )
    if args.json:
        machine.write_json(args.json, {"machine": described, "rows": rows})
    return 0
