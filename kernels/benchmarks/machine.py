"""What a benchmark says besides its numbers: the machine, what else runs on it, how far it is."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
import time
from collections.abc import Sequence


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Others:
    """Measures, from its making to `share()`, how much of the machine other processes used."""

    def __init__(self):
        self._start = self._read()

    def share(self) -> float | None:
        """Returns a fraction of all cores, or None where the system does not tell."""
        if self._start is None:
            return None
        total, busy, own = (b - a for a, b in zip(self._start, self._read(), strict=True))
        return max(0.0, busy - own) / total if total > 0 else 0.0

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds since boot of all cores: passed, busy (stolen by a host included), ours."""
        try:
            cpu = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:  # no Linux
            return None
        ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in cpu]
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], time.process_time()


def describe_machine() -> dict:
    """Returns what a reader needs to judge the numbers."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    versions = {}
    for package in ("jax", "torch", "mambapy"):
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    return {"cpu": cpu, "cores": cores(), "versions": versions}


class Progress:
    """Says how far a run is and how long the rest takes, on stderr.

    Args:
      weights: the expected share of each part of the run, in order.
    """

    def __init__(self, weights: Sequence[float]):
        self._weights, self._part, self._start = list(weights), -1, time.perf_counter()

    def next_part(self, title: str) -> None:
        self._part += 1
        self._title = title

    def __call__(self, done: int, rounds: int) -> None:
        finished = sum(self._weights[: self._part]) + self._weights[self._part] * done / rounds
        left = (time.perf_counter() - self._start) * (sum(self._weights) / finished - 1)
        print(f"{self._title}: round {done}/{rounds}, ~{left:.0f} s left", file=sys.stderr)
