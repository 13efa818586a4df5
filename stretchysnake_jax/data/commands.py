"""The command `stretchysnake data`: make the embedded data set, measure its baselines."""

import argparse

from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import ConfigError, StickActionsConfig


def main(argv: list[str]) -> int:
    """Runs `stretchysnake data make PATH` or `stretchysnake data baselines PATH`."""
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
        ("seed", "everything follows from it"),
    ):
        flag = "--" + name.replace("_", "-")
        value = getattr(default, name)
        make.add_argument(flag, type=int, default=value, help=f"{text} (default {value})")
    make.add_argument("--workers", type=int, help="processes (default: one per core)")
    baselines = commands.add_parser(
        "baselines",
        help="chance, length, single frame, motion",
        description="Test accuracy without a video model: chance, clip length and size, one frame, "
        "and a simple motion feature, each with kernel ridge regression.",
    )
    baselines.add_argument("path", help="a folder with train.txt, val.txt and test.txt")
    baselines.add_argument("--test-list", help="test on another list file")
    args = parser.parse_args(argv)
    if args.command == "baselines":
        from stretchysnake_jax.data import baselines as baselines_lib

        for name, accuracy in baselines_lib.run(args.path, args.test_list).items():
            print(f"{name:<8}{100 * accuracy:6.1f} %")
        return 0

    from stretchysnake_jax.data import stick_actions

    settings = {k: v for k, v in vars(args).items() if k not in ("command", "path")}
    progress, clock = Progress(every=5.0), Clock(1)

    def show(done, total):
        clock.total = total
        clock.advance(done)
        progress.show(f"rendered {done}/{total} clips, {clock.left} left", done == total)

    try:
        made = stick_actions.make(args.path, **settings, progress=show)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    progress.close()
    counts = ", ".join(f"{split} {n}" for split, n in made["clips"].items())
    print(
        f"{args.path}: {counts} clips of {len(stick_actions.CLASSES)} classes, 'path label' lists"
    )
    return 0
