"""Compiling ahead of time: every program once, in threads, with what it costs.

The training loop asks for programs that were compiled while it was at other things; it waits for
one that isn't ready, and never traces or compiles anything itself.
"""

import concurrent.futures
import dataclasses
import os
import threading
import time
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function.

    Attributes:
      run: calls it.
      seconds: that tracing and compiling took.
      flops: floating-point operations of a call by XLA's count, which knows nothing of kernels of
        our own; on one device.
      arguments, temporary: bytes of memory on one device.
    """

    run: Callable
    seconds: float
    flops: float
    arguments: int
    temporary: int


def compile_program(function, *args) -> Program:
    """Compiles a `jax.jit` function for arguments of which shapes will do, and runs nothing."""
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Program(
        compiled,
        seconds,
        cost.get("flops", 0.0),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )


class Programs:
    """Programs by key, each compiled once, whichever thread asks for it first."""

    def __init__(self):
        self._lock, self._futures = threading.Lock(), {}

    def get(self, key, function, *args) -> Program:
        """The program `key`; compiles `function` for `args` unless that was done before.

        A second thread that asks while the first compiles waits for it. What compiling raises,
        everyone who asks gets.
        """
        with self._lock:
            future = self._futures.get(key)
            first = future is None
            if first:
                future = self._futures[key] = concurrent.futures.Future()
        if first:
            try:
                future.set_result(compile_program(function, *args))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def __len__(self):
        return len(self._futures)


class Ahead:
    """Compiles in threads, in the order given; a context manager that ends them.

    Args:
      jobs: functions without arguments.
      threads: how many run at a time; 0: half of the cores, at least one and at most eight.
    """

    def __init__(self, jobs, threads: int = 0):
        threads = threads or min(8, max(1, (os.cpu_count() or 1) // 2))
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "compile")
        self._futures = [self._pool.submit(job) for job in jobs]

    def wait(self) -> list:
        """Waits for all of them; returns what they returned."""
        return [future.result() for future in self._futures]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(wait=True, cancel_futures=True)


def keep_programs(folder: str) -> None:
    """Keeps compiled programs in a folder for later processes, unless the user chose one.

    Not on CPUs: machines with other instructions may share the folder.

    Args:
      folder: created when needed; "": nothing is kept.
    """
    chosen = jax.config.jax_compilation_cache_dir
    if folder and not chosen and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
