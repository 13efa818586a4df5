"""The command `stretchysnake bench efficiency`: what low resolution and few frames save.

The paper's claim of speed at low resolution, counted and measured on this machine: a model with
patches of a fixed size has fewer tokens there, one whose patches follow the size has not.
"""

import argparse
import pathlib

import jax

from stretchysnake_jax import efficiency, models
from stretchysnake_jax.buckets import make_bucket
from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import (
    PRESETS,
    VARIANTS,
    Config,
    ConfigError,
    DataConfig,
    StretchConfig,
    TrainConfig,
    check_choice,
    preset,
)
from stretchysnake_jax.evaluate import parse_numbers, parse_reference, parse_sizes


def main(argv: list[str]) -> int:
    """The command `stretchysnake bench efficiency`."""
    from stretchysnake_bench import machine

    parser = argparse.ArgumentParser(
        prog="stretchysnake bench efficiency",
        description="Speed-up and GFLOPs saved of the forward pass at every scale, against one "
        "reference; untrained weights, all scales in turns. Of a trained run, with its accuracy: "
        "'stretchysnake evaluate --efficiency'.",
    )
    add = parser.add_argument
    add("--model", default="tiny", choices=[n for n in PRESETS if n != "base"])
    text = "patch rules compared, default: %(default)s"
    add("--variants", default="vanilla,static_tokens", help=text)
    add("--frames", default="4,8,16", help="default: %(default)s")
    add("--sizes", default="56,112,224", help="pixels, default: %(default)s")
    add("--reference", default="16x224", help="of the first variant, default: %(default)s")
    add("--batch", type=int, default=1, help="clips, default: %(default)s")
    add("--rounds", type=int, default=9, help="how often each is timed, default: %(default)s")
    add("--json", type=pathlib.Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    for name in ("batch", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}: it takes a number >= 1")
    variants = args.variants.split(",")
    for variant in variants:
        check_choice("--variants", variant, VARIANTS)
    machine.can_write(parser, args.json)
    config = Config(
        "bench",
        preset(args.model),
        stretch=StretchConfig(),
        data=DataConfig(train="-"),
        train=TrainConfig(steps=1),
    )
    reference = parse_reference(args.reference, variants[0], config.model)
    scales = [
        (t, size)
        for t in parse_numbers(args.frames, "--frames")
        for size in parse_sizes(args.sizes)
    ]
    cells = {v: [make_bucket(v, t, s, config.model) for t, s in scales] for v in variants}
    everything = [cell for found in cells.values() for cell in found]
    params, progress = models.init(config.model, jax.random.key(0))[1], Progress()
    rows = efficiency.measure(
        config,
        params,
        everything,
        reference,
        config.stretch,
        batch_size=args.batch,
        rounds=args.rounds,
        on_run=progress.counter("timing: runs"),
    )
    progress.close()
    described = machine.describe_machine()
    print(f"{described['cpu']}, {described['cores']} cores, {described['versions']}")
    print(f"{args.model}, the forward pass against {reference}, batches of {args.batch}")
    by_bucket = dict(zip(dict.fromkeys([reference, *everything]), rows, strict=True))
    for variant, buckets in cells.items():
        print(f"\n{variant}\n{efficiency.table([by_bucket[bucket] for bucket in buckets])}")
    if args.json:
        rows = [by_bucket[b] | {"variant": v} for v, found in cells.items() for b in found]
        machine.write_json(args.json, {"machine": described, "model": args.model, "rows": rows})
    return 0
