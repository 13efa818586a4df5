"""The benchmark `stretchysnake bench step`: the training step beside PyTorch's, and how it grows.

Times are of whole steps: pixels in, parameters updated. All contenders of a bucket take turns, so
that what else the machine does hits all alike; compiling and warming up are not part of a time.
With --scaling the step is measured over token counts instead, and a power law is fitted.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
import time

import numpy as np

from stretchysnake_jax import flops
from stretchysnake_jax.buckets import Bucket, make_bucket
from stretchysnake_jax.clock import Progress, duration
from stretchysnake_jax.config import (
    BLOCKS,
    PRESETS,
    REMAT,
    Config,
    ConfigError,
    DataConfig,
    TrainConfig,
    attention_twin,
    check_choice,
    preset,
)
from stretchysnake_jax.step_contenders import (
    OURS,
    TORCH,
    Case,
    Contender,
    Failed,
    available_memory,
    save_weights,
)
from stretchysnake_jax.step_scaling import (
    ATTENTION,
    MOST,
    case_of,
    exponents,
    plot,
    scaling_buckets,
    scaling_names,
)
from stretchysnake_jax.validation import validate

SPEED_BAR, MEMORY_BAR = 3.5, 1 / 3  # of PyTorch's, for the preset tiny at 8x112, batch 8, on a CPU
EXPONENT_BAR = 1.05
SCALING_DEPTH = 2  # blocks of --scaling unless --depth says otherwise: every one costs the same
ENOUGH = 0.75  # share of the free memory that PyTorch's may take, the rest is for its backward
BUSY = 0.05  # share of the machine that others may use before the ratios stop to mean much
PAUSE = (
    0.05  # seconds before a turn: threads of the one before spin for some 20 ms after their work
)
# Multiply-adds per second of matrix products as the data sheets give them, dense, times two;
# (bfloat16, float32 by TF32 as JAX and cuDNN multiply it), in 1e12.
PEAKS = {
    "A100": (312, 156),
    "A10": (125, 62.5),
    "L4": (121, 60.5),
    "H100": (989, 494),
    "H100 PCIe": (756, 378),
    "H200": (989, 494),
    "B200": (2250, 1125),
}
COLUMNS = ("ms/step", "ms least", "CPU ms", "clips/s", "tokens/s", "GFLOP/s", "MFU", "peak MB")
COLUMNS += ("with comp.", "XLA temp", "compile s")


def step_flops(case: Case) -> float:
    """Floating-point operations of a training step, as MFU counts them.

    A multiply-add is two, the scan's nine per element (batch, length, channel, state) and direction
    are nine, backward is twice forward, and what is computed again for the gradient doesn't count.
    """
    model, scan = case.config.model, 0
    if model.blocks == "mamba":
        scan = 9 * 2 * model.depth * case.tokens * model.inner * model.state
    return 3 * case.batch * (2 * flops.count(model, case.bucket)["full"] - scan)


def find_peak(device: dict, dtype: str, products: list[float]) -> tuple[float | None, str]:
    """The floating-point operations per second that MFU is a share of, and whence it is known.

    Args:
      device: `machine.describe_device`.
      dtype: of the computation.
      products: those of the contenders' matrix products, on a CPU.
    """
    if device["platform"] == "cpu":
        if dtype != "float32" or not products:
            return None, "left blank: measured on CPUs in float32 only"
        return max(products), "of the fastest float32 matrix product measured here, 2048 x 2048"
    names = [name for name in PEAKS if re.search(rf"\b{name}\b", device["kind"])]
    if not names:
        return None, f"left blank: no data sheet of {device['kind']!r} at hand"
    name = max(names, key=len)
    return 1e12 * PEAKS[name][dtype == "float32"], f"of {name}'s data sheet, {dtype}"


def parse_bucket(text: str, model) -> Bucket:
    """The bucket of words such as 8x112, 8x112x160 or 8x112/8; the base patch unless given.

    Raises:
      ConfigError: other words, or sizes that don't fit the model.
    """
    match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?(?:/(\d+))?", text)
    if match is None:
        raise ConfigError(f"--buckets has {text!r}: it takes FRAMESxSIZE[/PATCH], such as 8x112/16")
    frames, height, width, patch = (int(n) if n else None for n in match.groups())
    patch = (patch, patch) if patch else None
    return make_bucket("vanilla", frames, (height, width or height), model, patch)


def measure(case: Case, names, rounds: int, progress: Progress, say) -> list[dict]:
    """Runs the contenders of a case in turns.

    Args:
      case: what they compute, see `case_of`.
      names: of `CONTENDERS`, and `ATTENTION`.
      rounds: timed steps of each.
      progress: shows how far it is.
      say: is told, in a sentence, of a contender that failed.

    Returns:
      A row for each that worked: name, seconds and cpu (lists, per step), loss of the first step,
      bytes: peak (while it was timed), peak_with_compiling, temporaries; compile_seconds, product.
    """
    running, rows = [], []
    try:
        for name in names:
            contender = Contender(OURS if name == ATTENTION else name, case_of(name, case))
            contender.name = name
            running.append(contender)
            progress.show(f"{case.bucket}: {name}: compiling and warming up", force=True)
            try:
                contender.warm_up()
            except Failed as reason:
                say(f"{name}: not measured at {case.bucket}, {reason}.")
                running.remove(contender)
                contender.__exit__()
        for turn in range(rounds):
            progress.show(f"{case.bucket}: round {turn + 1} of {rounds}", force=True)
            for contender in list(running):
                time.sleep(PAUSE)
                try:
                    contender.steps.append(contender.ask("step"))
                except Failed as reason:
                    say(f"{contender.name}: not measured at {case.bucket}, {reason}.")
                    running.remove(contender)
                    contender.__exit__()
        for contender in running:
            rows.append(make_row(contender))
    finally:
        for contender in running:
            contender.__exit__()
    return rows


def make_row(contender: Contender) -> dict:
    """What was measured of a contender; asks it for what is measured apart from the steps."""
    seconds = [answer["seconds"] for answer in contender.steps]
    row = {
        "name": contender.name,
        "seconds": seconds,
        "cpu": [answer["cpu"] for answer in contender.steps],
        "loss": contender.first["loss"],
        "peak": contender.steps[-1]["peak"],
        "peak_with_compiling": max(
            (a["peak"] for a in (contender.first, *contender.steps) if a["peak"] is not None),
            default=None,
        ),
    }
    return row | contender.loaded | contender.ask("product")


def complete(rows: list[dict], case: Case, device: dict, products: list[float]) -> str:
    """Adds rates and ratios to the rows of a case; returns what MFU is a share of.

    Args:
      rows: of `measure`.
      case: what they computed.
      device, products: as of `find_peak`.
    """
    dtype = case.config.train.dtype
    peak, whence = find_peak(device, dtype, products)
    other = next((row for row in rows if row["name"] == TORCH), None)
    for row in rows:
        median, least = float(np.median(row["seconds"])), min(row["seconds"])
        row |= {"bucket": str(case.bucket), "batch": case.batch, "tokens": case.tokens}
        row |= {"median_ms": 1e3 * median, "min_ms": 1e3 * least}
        row["cpu_ms"] = 1e3 * float(np.median(row["cpu"]))
        row |= {"clips_per_s": case.batch / median}
        row |= {"tokens_per_s": case.batch * case.tokens / median}
        row["flops_per_s"] = step_flops(case_of(row["name"], case)) / median
        row["mfu"] = None if peak is None else row["flops_per_s"] / peak
        if other is not None and row is not other:
            # The less flattering one: threads that wait for each other lose most on a busy machine.
            theirs = float(np.median(other["seconds"])), min(other["seconds"])
            row["speed_ratio"] = min(theirs[0] / median, theirs[1] / least)
            if row["peak"] and other["peak"]:
                row["memory_ratio"] = row["peak"] / other["peak"]
    return whence


def table(rows: list[dict]) -> str:
    """The rows for people."""
    lines = [f"{'bucket':<16}{'':<15}" + "".join(f"{name:>11}" for name in COLUMNS)]
    lines[0] += "   to PyTorch: speed, memory"

    def megabytes(size):
        return "" if size is None else f"{size / 1e6:.0f}"

    for row in rows:
        cells = [f"{row['median_ms']:.0f}", f"{row['min_ms']:.0f}", f"{row['cpu_ms']:.0f}"]
        cells += [f"{row['clips_per_s']:.2f}", f"{row['tokens_per_s']:.0f}"]
        cells += [f"{row['flops_per_s'] / 1e9:.1f}"]
        cells += ["" if row["mfu"] is None else f"{row['mfu']:.1%}", megabytes(row["peak"])]
        cells += [megabytes(row["peak_with_compiling"]), megabytes(row["temporaries"])]
        cells += [f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else ""]
        line = f"{row['bucket']:<16}{row['name']:<15}" + "".join(f"{c:>11}" for c in cells)
        if "speed_ratio" in row:
            line += f"   {row['speed_ratio']:.2f}x"
            line += f", {row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        lines.append(line)
    return "\n".join(lines)


def bars_text(row: dict) -> str:
    """Whether the project's bars hold for a row of ours that has ratios."""
    speed = row["speed_ratio"]
    words = "holds" if speed >= SPEED_BAR else "MISSED"
    text = f"{speed:.2f} times PyTorch's speed, the bar is {SPEED_BAR}: {words}"
    if "memory_ratio" in row:
        words = "holds" if row["memory_ratio"] <= MEMORY_BAR else "MISSED"
        text += f"; {row['memory_ratio']:.2f} of its peak memory, the bar is {MEMORY_BAR:.2f}: "
        text += words
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    from stretchysnake_bench.machine import can_write

    parser = argparse.ArgumentParser(prog="stretchysnake bench step", description=__doc__)
    add = parser.add_argument
    add("--model", default="tiny", help=f"one of {', '.join(PRESETS)}; default: tiny")
    add("--depth", type=int, help=f"blocks; default: the preset's, {SCALING_DEPTH} with --scaling")
    add("--buckets", default="8x112", help="FRAMESxSIZE[/PATCH],...; default: 8x112")
    add("--batch", type=int, help="clips; default: 8, 1 with --scaling")
    add("--rounds", type=int, default=3, help="timed steps of each after two that warm up")
    add("--dtype", default="float32", help="of our computation; PyTorch's is float32")
    add("--remat", default="none", help=f"of ours, one of {', '.join(REMAT)}; default: none")
    add("--accumulate", type=int, default=1, help="of ours: parts of a batch; default: 1")
    add("--scaling", action="store_true", help="our time and memory over token counts, fitted")
    text = "with --scaling: mamba (default), attention (the transformer of equal size), or both"
    add("--blocks", metavar="mamba,attention", help=text)
    add("--most-tokens", type=int, default=MOST, help="with --scaling")
    add("--json", type=pathlib.Path, help="also write the results to this file")
    add("--plot", type=pathlib.Path, help="with --scaling: draw them into this PNG")
    options = parser.parse_args(argv)
    for name in ("depth", "batch", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, takes at least 1")
    for name in ("plot", "blocks"):
        if getattr(options, name) is not None and not options.scaling:
            parser.error(f"--{name} goes with --scaling")
    options.blocks = (options.blocks or "mamba").split(",")
    can_write(parser, options.json)
    if options.plot is not None and not options.plot.parent.is_dir():
        parser.error(f"--plot is {options.plot}, but there is no folder {options.plot.parent}")
    return options


def contenders_for(case: Case, say) -> list[str]:
    """Ours, and PyTorch where it is installed, computes the same and finds the memory."""
    if case.config.train.dtype != "float32":
        say("The PyTorch model computes in float32: not measured beside another dtype.")
        return [OURS]
    if importlib.util.find_spec("torch") is None:
        say("PyTorch is not installed: ours alone.")
        return [OURS]
    from stretchysnake_bench.torch_model import kept_bytes

    needed, free = kept_bytes(case.config.model, case.batch, case.tokens), available_memory()
    if free is not None and needed > ENOUGH * free:
        say(
            f"PyTorch: not measured at {case.bucket}, it keeps {needed / 1e9:.3g} GB for the "
            f"gradients, {free / 1e9:.3g} are free: take fewer blocks (--depth) or clips (--batch)."
        )
        return [OURS]
    return [OURS, TORCH]


def others_share(others, start: float) -> float | None:
    """The share of the machine that processes took which aren't this one's contenders.

    Args:
      others: a `machine.Others`, which knows of this process alone.
      start: when it was made, of `time.perf_counter`.
    """
    if (share := others.share()) is None:
        return None
    ended = os.times()
    mine = (ended.children_user + ended.children_system) / (time.perf_counter() - start)
    return max(0.0, share - mine / (os.cpu_count() or 1))


def run_case(case: Case, options, progress: Progress, say) -> list[dict]:
    """Measures one bucket; returns the rows of `measure`."""
    if options.scaling:
        names = scaling_names(case, options.blocks, say)
    else:
        names = contenders_for(case, say)
    with tempfile.TemporaryDirectory(prefix="stretchysnake-bench-") as folder:
        if TORCH in names:
            case = dataclasses.replace(case, weights=str(pathlib.Path(folder) / "weights.npz"))
            save_weights(case, case.weights)
        rows = measure(case, names, options.rounds, progress, say)
    losses = [row["loss"] for row in rows]
    if TORCH in names and len(losses) > 1 and abs(losses[0] - losses[1]) > 1e-3 * abs(losses[1]):
        say(f"{case.bucket}: NOT THE SAME MODEL: the first losses are {losses}.")
    return rows


def main(argv: list[str]) -> int:
    """The command `stretchysnake bench step`."""
    from stretchysnake_bench import machine

    options = parse(argv)
    for kind in options.blocks:
        check_choice("--blocks", kind, BLOCKS)
    # Blocks all cost the same, so fewer tell how cost grows.
    depth = options.depth or (SCALING_DEPTH if options.scaling else None)
    model = preset(options.model, **({} if depth is None else {"depth": depth}))
    batch = options.batch or (1 if options.scaling else 8)
    train = TrainConfig(
        steps=1, dtype=options.dtype, remat=options.remat, accumulate=options.accumulate
    )
    # The step takes all scales alike; that of the variant only matters for schedules.
    config = Config("bench", model, data=DataConfig(train="-", batch_size=batch), train=train)
    validate(config)
    if options.scaling:
        buckets = scaling_buckets(model, options.most_tokens)
    else:
        buckets = [parse_bucket(word, model) for word in options.buckets.split(",")]

    described, others, start = machine.describe_machine(), machine.Others(), time.perf_counter()
    device = described["device"]
    print(f"{described['cpu']}, {described['cores']} cores, {described['versions']}")
    print(f"{options.model}, {model.depth} blocks, batch {batch}, {options.dtype}")
    if depth is not None and depth != PRESETS[options.model].get("depth"):
        print(f"The preset has {preset(options.model).depth} blocks.")
    if "attention" in options.blocks:
        print(f"{ATTENTION}: {attention_twin(model).depth} ViT blocks, as many parameters.")
    progress, cases, notes = Progress(), [], []

    def say(text):
        progress.close()
        print(text)
        notes.append(text)

    for bucket in buckets:
        case = Case(config, bucket, batch)
        cases.append((case, run_case(case, options, progress, say)))
    progress.close()
    rows = [row for _, found in cases for row in found]
    for case, found in cases:
        whence = complete(found, case, device, [row["product"] for row in rows])
    print(table(rows))
    print("MB: growth of resident memory while steps were timed, and with compiling; on a GPU, of")
    print("device memory. FLOPs: multiply-add 2, backward twice forward, no recomputation.")
    if rows:
        print(f"MFU: {whence}.")
    if (share := others_share(others, start)) is not None and share > BUSY:
        print(f"Other processes used {share:.0%} of the machine meanwhile: measure again.")
    result = {"machine": described, "model": options.model, "depth": model.depth, "batch": batch}
    result |= {"dtype": options.dtype, "remat": options.remat, "accumulate": options.accumulate}
    result |= {"rows": rows, "notes": notes, "others_share": share}
    result |= {"mfu_of": whence if rows else None, "bars": []}
    if options.scaling:
        result["exponents"] = fits = exponents(rows)
        for fit in fits:
            words = "holds" if fit["exponent"] <= EXPONENT_BAR else "MISSED"
            other = fit["name"] == ATTENTION
            who, bar = (f"{ATTENTION}: ", "") if other else ("", f" (bar {EXPONENT_BAR}: {words})")
            print(
                f"{who}{fit['of']} ~ tokens^{fit['exponent']:.3f} over {fit['points']} points from "
                f"{fit['from']:,} to {fit['to']:,} tokens{bar}"
            )
        if options.plot and rows:
            title = f"{options.model}, {model.depth} blocks, batch {batch}, {options.dtype}"
            plot(options.plot, rows, fits, title)
    for row in rows:
        reference = (options.model, options.depth, row["bucket"], batch) == (
            "tiny", None, "8x112x112/16", 8,
        )  # fmt: skip
        if reference and device["platform"] == "cpu" and "speed_ratio" in row:
            result["bars"].append(bars_text(row))
            print(result["bars"][-1])
    print(f"took {duration(time.perf_counter() - start)}")
    if options.json:
        machine.write_json(options.json, result)
    return 0 if any(row["name"] in (OURS, ATTENTION) for row in rows) else 1
