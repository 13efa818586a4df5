"""The command `stretchysnake demo`: the whole path on embedded data, from rendering to a verdict.

Renders Stick Actions-10, trains vanilla and static_tokens (same model, initial weights, steps and
clips) side by side, each on its share of the cores, evaluates both over a grid of frame counts and
sizes with scales never trained on, and with them the honest control: the vanilla checkpoint whose
kernel is resized at test time so that its grid stays.
"""

import argparse
import dataclasses
import multiprocessing
import pathlib
import re
import signal
import sys
import time

from stretchysnake_jax import worker
from stretchysnake_jax.clock import Progress, duration
from stretchysnake_jax.config import Config

FRAMES, SIZES = (3, 4, 16), (28, 35, 56, 84, 126)
QUICK_FRAMES, QUICK_SIZES = (2, 4, 6), (42, 56)
# Share of the time by the end of training, of the first grid and of the second, roughly.
STAGES = (0.75, 0.88, 1.0)
MODELS = ("vanilla", "static_tokens")
TITLES = {
    "vanilla": "vanilla, patch fixed",
    "static_tokens": "static_tokens",
    "control": "control: vanilla, kernel resized at test",
}
# The control keeps the grid as static_tokens does, by PI-resize of the trained kernel.
CONTROL = {"variant": "static_tokens", "methods": {"kernel": "pi"}}


def demo_config(variant: str, data: pathlib.Path, quick: bool) -> Config:
    """The recipe of configs/stick_actions.py for one variant, with the data under `data`."""
    from stretchysnake_configs import stick_actions

    config = stick_actions.get_config()
    config.name = f"demo {variant}"
    config.stretch.variant = variant
    config.data.stick_actions.path = str(data)
    config.train.log_every = 5
    config.train.keep = 1
    if quick:
        small = {"train_subjects": 4, "val_subjects": 1, "test_subjects": 2, "takes": 1}
        config.data.stick_actions = dataclasses.replace(config.data.stick_actions, **small)
        config.stretch.frames, config.stretch.sizes = (2, 4), (28, 56)
        config.train.steps, config.train.log_every = 40, 1
    return config


def work(config: Config, workdir: pathlib.Path, cores: set[int], runs: list, log, trained) -> None:
    """The process of one model: trains it, then runs evaluations; its words go to the file `log`.

    Args:
      config, workdir: of the training run.
      cores: those this process may use.
      runs: (name of a model, arguments of `evaluate.run`) each.
      log: the file.
      trained: an event by model, set when its training has ended, well or not.
    """

    def job(progress):
        from stretchysnake_jax import evaluate, train

        status = train.train(config, workdir, progress)
        trained[config.stretch.variant].set()
        for model, run in runs if status == 0 else ():
            if not trained[model].is_set():
                progress.say(f"waiting for {model}")
                trained[model].wait()
            evaluate.run(progress=progress, **run)
        return status

    try:
        status = worker.run(job, log, "a", cores)
    finally:
        trained[config.stretch.variant].set()
    sys.exit(status)


def state_of(log: pathlib.Path) -> tuple[str, float]:
    """The last line of a process's log, and roughly the share of its work that is done."""
    lines = log.read_text().splitlines() if log.exists() else []
    finished = sum(" clips, 0s left" in line for line in lines)
    count = re.search(r"(?<=step )(\d+)/(\d+)|(\d+)/(\d+)(?= clips)", lines[-1] if lines else "")
    share = int(count[1] or count[3]) / int(count[2] or count[4]) if count else 0.0
    stage = sum(line.startswith("done:") for line in lines) + finished
    ends = (0.0, *STAGES, 1.0)
    if lines and " clips, 0s left" in lines[-1]:
        share = 0.0  # the stage that ended is counted already
    if stage >= len(STAGES):
        return lines[-1], 1.0
    return lines[-1] if lines else "starting", ends[stage] + share * (ends[stage + 1] - ends[stage])


def overview(logs: dict[str, pathlib.Path], elapsed: float, quick: bool) -> str:
    """One line on all processes, with the time left: a guess at first, then from what is done."""
    states = {name: state_of(log) for name, log in logs.items()}
    share = min(share for _, share in states.values())
    guess = 50 if quick else 300
    left = max(guess - elapsed, 5) if share < 0.03 else elapsed / share * (1 - share)
    parts = [f"{name}: {text.split('  ')[0][:60]}" for name, (text, _) in states.items()]
    return f"{100 * share:3.0f} %, about {duration(left)} left | " + " | ".join(parts)


def run_all(out: pathlib.Path, quick: bool, progress: Progress) -> int:
    """Trains and evaluates both models in two processes; returns the worst exit status."""
    frames = list(QUICK_FRAMES if quick else FRAMES)
    sizes = [(s, s) for s in (QUICK_SIZES if quick else SIZES)]
    grid = {"frames": frames, "sizes": sizes, "batch_size": 10}
    vanilla, static = ({**grid, "workdir": out / name} for name in MODELS)
    # The control goes to the process of static_tokens, whose own grid is the cheaper one.
    runs = {
        "vanilla": [("vanilla", vanilla)],
        "static_tokens": [
            ("static_tokens", static),
            ("vanilla", {**vanilla, **CONTROL, "name": "control"}),
        ],
    }
    spawn = multiprocessing.get_context("spawn")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the processes like Ctrl-C
    trained = {name: spawn.Event() for name in MODELS}
    logs = {name: out / f"{name}.log" for name in MODELS}
    processes, start = {}, time.perf_counter()
    for name, cores in zip(MODELS, worker.share_cores(len(MODELS)), strict=True):
        config = demo_config(name, out / "data", quick)
        logs[name].unlink(missing_ok=True)
        arguments = (config, out / name, cores, runs[name], logs[name], trained)
        processes[name] = spawn.Process(target=work, args=arguments)
        processes[name].start()
    try:
        while any(p.is_alive() for p in processes.values()):
            time.sleep(0.5)
            for name, p in processes.items():
                if not p.is_alive():
                    trained[name].set()  # whoever waits for a dead one must not wait forever
            progress.show(overview(logs, time.perf_counter() - start, quick))
    except KeyboardInterrupt:
        for p in processes.values():
            p.terminate()  # SIGTERM: they save and leave
        raise
    finally:
        for p in processes.values():
            p.join()
        progress.close()
    for name, p in processes.items():
        if p.exitcode:
            progress.say(f"{name} failed: {state_of(logs[name])[0]}")
    return max(abs(p.exitcode or 0) for p in processes.values())


def verdict(rows: dict[str, list[dict]], quick: bool) -> str:
    """What the three grids show, in plain words.

    Args:
      rows: the grids of vanilla, static_tokens and control, over the same cells.
      quick: whether the numbers mean anything.
    """
    from stretchysnake_jax.grid import mean_top1

    def place(row):
        return row["frames"], row["height"], row["width"]

    cells = {place(r): r for r in rows["static_tokens"]}
    own = {place(r) for r in rows["vanilla"] if r["trained"]}
    trained = {k for k, r in cells.items() if r["trained"]} | own
    unseen = set(cells) - trained
    lines = [f"{'mean top-1, %':<44}{'unseen':>8}{'trained':>9}{'vanilla own':>13}"]
    mean = {}
    for name, title in TITLES.items():
        mean[name] = [100 * mean_top1(rows[name], among=c) for c in (unseen, trained, own)]
        values = "".join(f"{v:>{w}.1f}" for v, w in zip(mean[name], (8, 9, 13), strict=True))
        lines.append(f"{title:<44}{values}")
    fixed, flexible, control = (mean[n][0] for n in ("vanilla", "static_tokens", "control"))
    lines.append(
        f"\nunseen: {len(unseen)} scales that neither model was trained on; trained: "
        f"{len(trained)} that\none of them was trained on; vanilla own: the one of vanilla.\n"
    )
    if quick:
        lines.append(
            "This was --quick: far too few steps and clips for the numbers to mean anything but\n"
            "that every part works. Without --quick it takes about 6 minutes and they do."
        )
        return "\n".join(lines)
    lines.append(
        f"On unseen scales static_tokens is {flexible - fixed:+.0f} points from vanilla with its "
        "fixed\npatch, whose grid of tokens changes with the resolution."
    )
    lines.append(
        f"The control is {control - flexible:+.0f} points from static_tokens: the vanilla "
        "checkpoint, its\nkernel resized at test so that the grid of tokens stays."
    )
    if control > flexible - 10:
        lines.append(
            "So on figures as large and smooth as these resizing the kernel does most of it; what\n"
            "flexible training adds needs finer detail or timing to show."
        )
    else:
        lines.append("So flexible training adds what resizing alone does not.")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """The command `stretchysnake demo`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake demo",
        description="Renders the embedded data set, trains vanilla and static_tokens, evaluates "
        "both at scales never trained on, and says what it shows. About 6 minutes on 2 cores. "
        "Interrupted, the same command continues.",
    )
    parser.add_argument(
        "--out", help="where everything goes (default runs/demo, with --quick runs/demo-quick)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the same in about a minute, with numbers that mean little",
    )
    args = parser.parse_args(argv)
    start, progress = time.perf_counter(), Progress(every=5.0)
    out = pathlib.Path(args.out or ("runs/demo-quick" if args.quick else "runs/demo"))
    out.mkdir(parents=True, exist_ok=True)

    from stretchysnake_jax import run

    run.prepare(demo_config("vanilla", out / "data", args.quick), progress)
    status = run_all(out, args.quick, progress)
    if status:
        return status
    return summarise(out, args.quick, duration(time.perf_counter() - start))


def summarise(out: pathlib.Path, quick: bool, took: str) -> int:
    """Draws the pictures and prints the tables and the verdict from the files of the grids."""
    import json

    from stretchysnake_jax import grid, plots

    files = {
        "vanilla": out / "vanilla" / "grid.json",
        "static_tokens": out / "static_tokens" / "grid.json",
        "control": out / "vanilla" / "control.json",
    }
    rows = {name: json.loads(path.read_text()) for name, path in files.items()}
    plots.heat_maps(out / "demo.png", [(TITLES[name], rows[name]) for name in TITLES])
    difference = [
        {**a, "top1": a["top1"] - b["top1"]}
        for a, b in zip(rows["static_tokens"], rows["vanilla"], strict=True)
    ]
    plots.heat_maps(
        out / "difference.png", [("static_tokens minus vanilla", difference)], difference=True
    )
    for name, title in TITLES.items():
        print(f"\n{title}: top-1 in %, {rows[name][0]['clips']} clips (* trained at this scale)")
        print(grid.table(rows[name]))
    text = verdict(rows, quick)
    print(f"\n{text}\n\nTook {took}. Pictures: {out}/demo.png, {out}/difference.png")
    print(
        f"Tables: {out}/vanilla/grid.csv, {out}/static_tokens/grid.csv, {out}/vanilla/control.csv"
    )
    print("\nNext:")
    more = "--frames 2,5,12 --sizes 42,70 --name more"
    print(f"  stretchysnake evaluate --workdir {out}/static_tokens {more}")
    print(f"  stretchysnake predict --workdir {out}/static_tokens VIDEO...")
    print("  stretchysnake train --config configs/stick_actions.py --workdir runs/mine")
    (out / "summary.txt").write_text(text + "\n")
    return 0
