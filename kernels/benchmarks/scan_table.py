"""The table of `stretchysnake bench scan`: times, rates, memory, ratios, and the project's bars.

Ratios are the less flattering of those of the medians and of the minima, because threads that wait
for each other (those of PyTorch and of the floor) lose most on a busy machine. The bars are those
the project holds itself to on two AVX-512 cores: one set for the plain JAX implementation, a higher
one for the native. There are none for GPUs: nothing has been measured on one.
"""

from collections.abc import Sequence

import numpy as np
from stretchysnake_bench.contenders import BACK, BLOCK, BOTH, FLOOR, FORWARD, SCAN, Job, Problem
from stretchysnake_bench.roofline import Device

# implementation -> (what, pass, contender) -> {shape: bar}. Contenders: at least so many times our
# time. Floor: our time is at most so many times the floor's.
BARS = {
    "xla": {
        (SCAN, FORWARD, "torch loop"): {"S": 4.5, "M": 4.5, "XL": 4.5, "L": 12},
        (SCAN, BACK, "torch loop"): {"S": 3.5, "M": 3.5, "XL": 3.5, "L": 12},
        (SCAN, FORWARD, "mamba-ssm ref"): {"S": 20},
        (SCAN, FORWARD, "mambapy"): {"S": 45},
        (SCAN, BACK, "mambapy"): {"S": 25},
        (SCAN, FORWARD, FLOOR): {"S": 2.5, "M": 2.5, "XL": 2.5, "L": 3.5},
        (SCAN, BACK, FLOOR): {"S": 4, "M": 4, "XL": 4, "L": 5},
        (BLOCK, BACK, "torch loop"): {"M": 3.5},
        (BLOCK, BACK, "mambapy"): {"M": 25},
    },
    "native": {
        (SCAN, FORWARD, "torch loop"): {"S": 10, "M": 10, "XL": 10, "L": 40},
        (SCAN, BACK, "torch loop"): {"S": 10, "M": 10, "XL": 10, "L": 40},
        (SCAN, FORWARD, "mamba-ssm ref"): {"S": 40},
        (SCAN, FORWARD, "mambapy"): {"S": 100},
        (SCAN, BACK, "mambapy"): {"S": 80},
        (SCAN, FORWARD, FLOOR): {"S": 1.2, "M": 1.2, "XL": 1.2, "L": 1.2},
        (SCAN, BACK, FLOOR): {"S": 1.2, "M": 1.2, "XL": 1.2, "L": 1.2},
        (BLOCK, BACK, "torch loop"): {"M": 6},
        (BLOCK, BACK, "mambapy"): {"M": 45},
    },
}
MEMORY_BAR = {"xla": 6, "native": 1}  # temporary memory of forward+backward, in sizes of x
MEMORY_SHARE_BAR = 1 / 8  # of what the torch loop keeps for its backward


def table_rows(
    problem: Problem,
    jobs: Sequence[Job],
    ours: Sequence[str],
    bars: bool = True,
    device: Device | None = None,
    expected: dict | None = None,
) -> list[dict]:
    """Returns a row for each job's times, then one for each of our implementations and a peer.

    Args:
      problem: what was computed.
      jobs: all with seconds.
      ours: names of our implementations.
      bars: whether to hold the ratios against them.
      device: of the roofline; None: no shares of it.
      expected: (pass, implementation) -> prediction.Expected.
    """
    rows, expected = [], expected or {}
    for step in (FORWARD, BACK):
        here = {job.name: job for job in jobs if job.step == step}
        rows += [
            time_row(problem, job, device, expected.get((step, job.name))) for job in here.values()
        ]
        for mine in (here[name] for name in ours if name in here):
            peers = [job for name, job in here.items() if name not in ours]
            rows += [ratio_row(problem, mine, peer, bars) for peer in peers]
            if bars and mine.what == SCAN and step == BACK:
                rows += memory_rows(problem, mine, here.get("torch loop"))
    return rows


def time_row(problem: Problem, job: Job, device: Device | None, expected) -> dict:
    """Returns what was measured of a job, and its share of what the device and the model allow."""
    median = float(np.median(job.seconds))
    row = {"what": job.what, "shape": problem.spec.name, "dtype": problem.dtype, "pass": job.step}
    row |= {"name": job.name, "min_ms": 1e3 * min(job.seconds), "median_ms": 1e3 * median}
    row |= {"rounds": len(job.seconds), "calls": job.calls, "memory_bytes": job.memory}
    if job.what in (SCAN, BOTH):
        row["bytes_per_second"] = problem.bytes(job.step) / median
        row["elements_per_second"] = problem.elements / median
        if device is not None:
            row["hbm_share"] = problem.bytes(job.step) / device.bandwidth / median
    if expected is not None:
        row |= {"model_ms": 1e3 * expected.seconds, "bound_ms": 1e3 * expected.bound_seconds}
        row |= {"bound": expected.bound, "bound_share": expected.bound_seconds / median}
        row |= {"registers": expected.registers, "spilled_bytes": expected.spills}
    return row


def ratio_row(problem: Problem, mine: Job, peer: Job, bars: bool) -> dict:
    """Compares one of our implementations with a peer, or with the floor."""
    ratios = (
        np.median(peer.seconds) / np.median(mine.seconds),
        min(peer.seconds) / min(mine.seconds),
    )
    shape = problem.spec.name
    bar = BARS.get(mine.name, {}).get((mine.what, mine.step, peer.name), {}).get(shape)
    row = {"what": mine.what, "shape": shape, "dtype": problem.dtype, "pass": mine.step}
    bar = bar if bars else None
    if peer.name == FLOOR:
        row |= {"name": f"{mine.name} / {FLOOR}", "ratio": float(1 / min(ratios))}
        return judge(row, bar, "at most")
    row |= {"name": f"{peer.name} / {mine.name}", "ratio": float(min(ratios))}
    return judge(row, bar, "at least")


def memory_rows(problem: Problem, mine: Job, torch_loop: Job | None) -> list[dict]:
    """Compares our temporary memory with the size of x, and with what the torch loop keeps."""
    row = {"what": SCAN, "shape": problem.spec.name, "dtype": problem.dtype, "pass": BACK}
    size = mine.memory / (4 * problem.elements)
    whole = row | {"name": f"{mine.name}: memory / x", "ratio": size}
    rows = [judge(whole, MEMORY_BAR.get(mine.name), "at most")]
    if torch_loop is not None:
        share = {"name": f"{mine.name}: memory / torch", "ratio": mine.memory / torch_loop.memory}
        rows.append(judge(row | share, MEMORY_SHARE_BAR, "at most"))
    return rows


def judge(row: dict, bar: float | None, bar_is: str) -> dict:
    """Adds the bar and whether it holds, where there is one."""
    if bar is None:
        return row
    holds = row["ratio"] >= bar if bar_is == "at least" else row["ratio"] <= bar
    return row | {"bar": bar, "bar_is": bar_is, "holds": bool(holds)}


# Title, width, row -> text or None, of the columns with numbers; those of GPUs only come last.
COLUMNS = (
    ("min ms", 9, lambda row: milliseconds(row.get("min_ms"))),
    ("median ms", 9, lambda row: milliseconds(row.get("median_ms"))),
    ("GB/s", 7, lambda row: scaled(row.get("bytes_per_second"), 1e9, ".2f")),
    ("Gel/s", 7, lambda row: scaled(row.get("elements_per_second"), 1e9, ".3f")),
    ("MiB", 8, lambda row: scaled(row.get("memory_bytes"), 2**20, ".0f")),
)
GPU_COLUMNS = (
    ("of HBM", 7, lambda row: percent(row.get("hbm_share"))),
    ("model ms", 9, lambda row: milliseconds(row.get("model_ms"))),
    ("of bound", 8, lambda row: percent(row.get("bound_share"))),
)


def milliseconds(value: float | None) -> str | None:
    """Returns three digits or more."""
    return None if value is None else f"{value:.1f}" if value >= 10 else f"{value:.4f}"


def scaled(value: float | None, unit: float, form: str) -> str | None:
    """Returns a number in a unit, as text."""
    return None if value is None else f"{value / unit:{form}}"


def percent(value: float | None) -> str | None:
    """Returns a share as text."""
    return None if value is None else f"{value:.0%}"


def columns(on_gpu: bool) -> tuple:
    """Returns the columns of the table."""
    return COLUMNS + GPU_COLUMNS if on_gpu else COLUMNS


def header(on_gpu: bool) -> str:
    """Returns the first line of the table."""
    cells = [f"{title:>{width}}" for title, width, _ in columns(on_gpu)]
    return " ".join([f"{'what':5} {'':3} {'pass':16} {'':23}", *cells, f"{'ratio':>8} bar"])


def format_row(row: dict, on_gpu: bool = False) -> str:
    """Returns one line of the table."""
    cells = [f"{row['what']:5} {row['shape']:3} {row['pass']:16} {row['name']:23}"]
    cells += [f"{text(row) or '':>{width}}" for _, width, text in columns(on_gpu)]
    if "ratio" in row:
        cells.append(f"{row['ratio']:7.2f}x")
    if row.get("bar") is not None:
        sign = ">=" if row["bar_is"] == "at least" else "<="
        cells.append(f"{sign} {row['bar']:<6.4g} {'pass' if row['holds'] else 'MISS'}")
    return " ".join(cells).rstrip()
