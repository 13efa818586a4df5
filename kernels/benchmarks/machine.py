"""What a benchmark says besides its numbers: the machine, what else runs on it, how far it is."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Sequence

PACKAGES = ("jax", "jaxlib", "jax_cuda13_plugin", "jax_triton", "triton", "torch", "mambapy")
PACKAGES += ("mamba_ssm",)
NO_TIME = "no time left"  # why something was left out when a Budget was over


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
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    return {"cpu": cpu, "cores": cores(), "versions": versions, "device": describe_device()}


def describe_device() -> dict:
    """Returns what JAX computes on: platform, kind and, of a GPU, what the kernels depend on.

    A platform that cannot start shows as the one that JAX falls back to. Starts JAX's backend.
    """
    import jax  # the backend must start after configure_cpu()

    device = jax.local_devices()[0]
    found = {"platform": jax.default_backend(), "kind": device.device_kind}
    if found["platform"] == "gpu":
        found["capability"] = str(device.compute_capability)
        found["multiprocessors"] = device.core_count
        found["memory_bytes"] = (device.memory_stats() or {}).get("bytes_limit")
    return found


def can_write(parser: argparse.ArgumentParser, path: pathlib.Path | None) -> None:
    """Ends the program with a sentence where --json can't become a file: now, not after minutes."""
    if path is not None and not path.parent.is_dir():
        parser.error(f"--json is {path}, but there is no folder {path.parent}")
    if path is not None and path.is_dir():
        parser.error(f"--json is {path}, a folder, takes the name of a file")


def write_json(path: pathlib.Path, value) -> None:
    """Writes a file that is there as a whole or stays as it was.

    Raises:
      OSError: the folder does not take it.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(value, indent=2) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Budget:
    """Time that a run may take.

    Args:
      seconds: from now on; None: without end.
    """

    def __init__(self, seconds: float | None = None):
        self._end = None if seconds is None else time.perf_counter() + seconds

    def left(self) -> float:
        """Returns seconds, negative ones once it is over."""
        return float("inf") if self._end is None else self._end - time.perf_counter()

    def over(self) -> bool:
        return self.left() <= 0


class Progress:
    """Says how far a run is and how long the rest takes, on stderr.

    Args:
      weights: the expected share of each part of the run, in order.
    """

    def __init__(self, weights: Sequence[float]):
        self._weights, self._part, self._start = list(weights), -1, time.perf_counter()

    def next_part(self, title: str) -> None:
        """Says which part comes next."""
        self._part += 1
        self._title = title

    def __call__(self, done: int, rounds: int) -> None:
        """Says that `done` of the part's rounds are done, and how long the rest may take."""
        finished = sum(self._weights[: self._part]) + self._weights[self._part] * done / rounds
        left = (time.perf_counter() - self._start) * (sum(self._weights) / finished - 1)
        print(f"{self._title}: round {done}/{rounds}, ~{left:.0f} s left", file=sys.stderr)
