"""The command `stretchysnake inspect`: what a run would do, without running it."""

import argparse
import json

from stretchysnake_jax import config as config_lib
from stretchysnake_jax import flops, models
from stretchysnake_jax.buckets import training_buckets
from stretchysnake_jax.config import ConfigError, StretchConfig
from stretchysnake_jax.evaluate import parse_numbers
from stretchysnake_jax.validation import validate


def buckets_table(model, stretch) -> str:
    """The buckets of a variant as text: scale, chance, tokens and operations of each."""
    lines = [
        "frames      size   patch    grid  tokens  chance   GFLOPs   GFLOPs",
        "                                                published     full",
    ]
    for bucket, chance in training_buckets(stretch, model):
        count = flops.count(model, bucket)
        size = f"{bucket.height}x{bucket.width}"
        patch, grid = ("x".join(map(str, pair)) for pair in (bucket.patch, bucket.grid))
        lines.append(
            f"{bucket.frames:>6}{size:>10}{patch:>8}{grid:>8}{bucket.tokens(model.tubelet):>8}"
            f"{100 * chance:>7.1f}%{count['published'] / 1e9:>9.2f}{count['full'] / 1e9:>9.2f}"
        )
    return "\n".join(lines)


def print_costs(config, device: str | None, implementations: str | None) -> None:
    """Prints what a config's training step takes; turns what is wrong into one sentence."""
    from stretchysnake_bench.aot import AotUnavailable
    from stretchysnake_kernels.dispatch import Unsupported
    from stretchysnake_kernels.selective_scan.api import IMPLEMENTATIONS

    from stretchysnake_jax.compile_report import report

    validate(config)
    names = implementations.split(",") if implementations else [None]
    for name in names:
        if name is not None and name not in IMPLEMENTATIONS:
            hint = config_lib.nearest(name, IMPLEMENTATIONS)
            raise ConfigError(f"--implementations has {name!r}: {hint}")
    try:
        table = report(config, device, names)
    except (ValueError, AotUnavailable, Unsupported) as error:
        raise ConfigError(str(error)) from error
    print(table)
    print(
        f"\nOne training step on each device of {device or 'this machine'}, {config.train.dtype}, "
        f"train.remat = {config.train.remat}. compile: seconds, programs\nthat an earlier bucket "
        "brought not counted. TFLOP: of all devices, a multiply-add is two, nothing computed\n"
        "again. GiB: state, the clips as the trunk takes them, and temporary memory, activations "
        "included, by\nimplementation of the scan. fits: into 90 % of the device's memory, and the "
        "batch that does by proportion."
    )


def main(argv: list[str]) -> int:
    """The command `stretchysnake inspect`."""
    if argv[:1] == ["run"]:
        from stretchysnake_jax.curves import main_run

        return main_run(argv[1:])
    parser = argparse.ArgumentParser(
        prog="stretchysnake inspect",
        description="buckets: the scales of a variant, or of a config. config: every field of a "
        "config file, resolved. compile: what the training step of a config file takes, per "
        "bucket, from compiling it. run: curves of runs, see 'stretchysnake inspect run --help'.",
    )
    parser.add_argument("what", choices=("buckets", "config", "compile", "run"))
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a config file, with --config.FIELD")
    parser.add_argument("--variant", help=", ".join(config_lib.VARIANTS))
    parser.add_argument("--model", help=f"{', '.join(models.PRESETS)} (default middle)")
    parser.add_argument("--frames", help="frame counts drawn, such as 4,8,16")
    parser.add_argument("--sizes", help="sizes drawn, such as 98,224")
    parser.add_argument(
        "--device",
        help="compile: a GPU that need not be there, such as h100 or a100 (default: this machine)",
    )
    parser.add_argument(
        "--implementations",
        help="compile: of the selective scan, such as pallas,xla (default: the one that would run)",
    )
    if "-h" in argv or "--help" in argv:
        parser.parse_args(["--help"])
    config = None
    if any(word.split("=")[0].split(".")[0] == "--config" for word in argv):
        from stretchysnake_jax.cli import parse_config

        config, argv = parse_config(argv)
    args = parser.parse_args(argv)
    if args.what != "buckets" and config is None:
        raise ConfigError("--config is missing: it takes a config file, such as configs/k400.py")
    if args.what == "compile":
        print_costs(config, args.device, args.implementations)
        return 0
    if args.what == "config":
        print(json.dumps(config_lib.to_dict(config), indent=2))
        return 0
    stretch = config.stretch if config else StretchConfig()
    model = config.model if config and not args.model else models.preset(args.model or "middle")
    if args.variant:
        if args.variant not in config_lib.VARIANTS:
            hint = config_lib.nearest(args.variant, config_lib.VARIANTS)
            raise ConfigError(f"--variant is {args.variant!r}: {hint}")
        stretch.variant = args.variant
    for name in ("frames", "sizes"):
        if getattr(args, name):
            setattr(stretch, name, tuple(parse_numbers(getattr(args, name), f"--{name}")))
    print(buckets_table(model, stretch))
    print(
        "\nGFLOPs of one clip, one multiply-add = one operation. published: projections, patches "
        "and\nhead alone, as the papers count; full: also convolutions, step sizes, and 9 "
        "operations per\nscan element."
    )
    return 0
