"""Searches how to launch the GPU kernels of the selective scan on the GPU at hand.

For each implementation, pass and state size: first the unroll, then with the best one the warps of
a program, by the time of both directions in one call, as the encoder makes it. A candidate must
compute what the default computes, to rounding, before it is timed; one that the compiler refuses,
or whose registers spill, is left out. The default stays unless a candidate takes 2 % less time, by
the medians of interleaved rounds. The result goes into <device kind>.json, which
`stretchysnake_kernels.selective_scan.gpu` reads.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from stretchysnake_bench import contenders
from stretchysnake_bench.contenders import BACK, BOTH, FORWARD, Problem, first_line
from stretchysnake_bench.machine import NO_TIME, Budget, Progress, write_json
from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import gpu
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec

TUNABLE = ("pallas", "triton")  # implementations with launch options
STEPS = {"forward": FORWARD, "backward": BACK}  # pass -> what is timed to tune it
UNROLLS = (1, 2, 4, 8, 16)
WARPS = (1, 2, 4)
WORTH = 0.98  # of the default's time: a candidate that takes more is not worth a file
ROUNDS = 5
# Relative error in the 2-norm between two launches of one kernel: another order of the same sums.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
# XLA then refuses a kernel whose registers spill.
NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


# A file holds for these versions of them.
COMPILERS = ("jax", "jaxlib", "jax_cuda13_plugin", "jax_triton", "triton")


class NotWritable(Exception):
    """The folder of tuning files takes none; the message says what to do."""


class Program(NamedTuple):
    """A pass on all shapes, launched in one way.

    Attributes:
      text: lowered; launches with the same text are the same.
      runs: one function per shape; each computes, waits, and returns the outputs.
      calls: how often each run computes its pass.
    """

    text: str
    runs: list[Callable]
    calls: list[int]


def time_rounds(programs: Sequence[Program], rounds: int) -> list[list[list[float]]]:
    """Times all programs in turn: seconds per call, [program][shape][round]."""
    seconds = [[[] for _ in program.runs] for program in programs]
    for turn in range(1 + rounds):
        for program, mine in zip(programs, seconds, strict=True):
            for run, calls, times in zip(program.runs, program.calls, mine, strict=True):
                start = time.perf_counter()
                run()
                if turn:  # the first one warms up
                    times.append((time.perf_counter() - start) / calls)
    return seconds


def build(problems: Sequence[Problem], backend: str, which: str, **chosen) -> Program:
    """Compiles a pass on all shapes, launched as `chosen` (see `gpu.options`).

    Raises:
      Exception: whatever the kernel or the compiler has against it.
    """
    step, texts, runs, counts = STEPS[which], [], [], []
    for problem in problems:
        args, d_y = jax.tree.map(jnp.asarray, contenders.make_problem(problem))
        function = functools.partial(contenders.OURS[problem.what], implementation=backend)
        operands = (args,)
        if step == BACK:
            function, operands = contenders.both_passes(function), (args, d_y)
        calls = contenders.calls_per_sample(problem, step, backend)
        with gpu.options(**chosen), untuned():
            lowered = jax.jit(contenders.repeated(function, calls)).lower(*operands)
        on_gpu = jax.default_backend() == "gpu"
        compiled = lowered.compile(NO_SPILLS if on_gpu and chosen else None)
        texts.append(lowered.as_text())
        runs.append(lambda c=compiled, o=operands: jax.block_until_ready(c(*o)))
        counts.append(calls)
    return Program("".join(texts), runs, counts)


@contextlib.contextmanager
def untuned():
    """While it lasts, no tuning file counts: the default is that of the code."""
    target = gpu.find_target((0, 0))
    with gpu.compile_for(target._replace(kind=None)):
        yield


def error_of(outputs, expected) -> float:
    """Returns the largest relative error of an array, in the 2-norm; infinite where one is NaN."""
    worst = 0.0
    for got, want in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


@dataclasses.dataclass
class Search:
    """The search for one entry of a tuning file.

    Attributes:
      make: makes a Program from the options of a launch: `launch=None` is the default.
      tolerance: largest error against the default's results.
      clock: as `time_rounds`.
      tried: called after each candidate.
      budget: when it is over, no further candidate is built.
    """

    make: Callable[..., Program]
    tolerance: float
    clock: Callable = time_rounds
    tried: Callable = lambda: None
    budget: Budget = dataclasses.field(default_factory=Budget)

    def run(self) -> dict:
        """Returns "launch" (None: the default stays), "speedup" and what was "tried"."""
        default = self.make(None)
        expected = [run() for run in default.runs]
        records, seen = [], {default.text: "the default"}
        best, gain, usual = None, 1.0, None
        unroll = None  # the best one so far, worth a file or not
        for stage in ("unroll", "warps"):
            ready, spilled = [], None
            for launch in self._candidates(stage, unroll):
                record = launch._asdict()
                records.append(record)
                program = None
                if spilled is None:
                    program = self._check(launch, expected, seen, record)
                else:  # more of it needs more registers, and minutes of the compiler
                    record["skipped"] = f"{stage} {spilled} spills already"
                self.tried()
                if spilled is None and "spilling" in record.get("skipped", ""):
                    spilled = record[stage]
                if record.get("same_as") == "the default":
                    usual = record
                if program is not None:
                    ready.append((launch, record, program))
            if usual is not None and unroll is None:
                unroll = usual["unroll"], 1.0
            times = self.clock([default, *(program for *_, program in ready)], ROUNDS)
            for (launch, record, _), seconds in zip(ready, times[1:], strict=True):
                record["milliseconds"] = [1e3 * float(np.median(s)) for s in seconds]
                record["share"] = share = relative(seconds, times[0])
                if unroll is None or share < unroll[1]:
                    unroll = launch.unroll, share
                if share <= WORTH and share < gain:
                    best, gain = launch, share
            if usual is not None:
                usual["milliseconds"] = [1e3 * float(np.median(s)) for s in times[0]]
        return {"launch": best and best._asdict(), "speedup": 1 / gain, "tried": records}

    def _candidates(self, stage, unroll):
        if stage == "unroll":
            return [gpu.Launch(count, 1) for count in UNROLLS]
        return [] if unroll is None else [gpu.Launch(unroll[0], count) for count in WARPS[1:]]

    def _check(self, launch, expected, seen, record) -> Program | None:
        """Builds and runs a candidate; returns None, and the reason in `record`, if it is out."""
        if self.budget.over():
            record["skipped"] = NO_TIME
            return None
        try:
            program = self.make(launch)
            if program.text in seen:
                record["same_as"] = seen[program.text]
                return None
            seen[program.text] = f"unroll {launch.unroll}, {launch.warps} warps"
            error = max(
                error_of(run(), want) for run, want in zip(program.runs, expected, strict=True)
            )
        except Exception as reason:  # whatever the compiler or the GPU has against it
            record["skipped"] = first_line(reason)
            return None
        if error > self.tolerance:
            record["skipped"] = f"its results are off by {error:.1e}"
            return None
        return program


def relative(seconds: Sequence[Sequence[float]], default: Sequence[Sequence[float]]) -> float:
    """Returns the time of a candidate as a share of the default's: medians, mean over shapes."""
    shares = [np.median(mine) / np.median(own) for mine, own in zip(seconds, default, strict=True)]
    return float(np.exp(np.mean(np.log(shares))))


def compare_chunks(problem: Problem, backend: str, which: str, multiprocessors: int, clock) -> dict:
    """Times the number of chunks that the rule chooses, one chunk, and twice as many.

    Returns:
      "rule", the number, and "milliseconds" by number; or "skipped", the reason.
    """
    spec = problem.spec
    module = importlib.import_module(f"stretchysnake_kernels.selective_scan.{backend}")
    rule = getattr(module, which.upper(), None)
    if not hasattr(rule, "overhead"):
        return {"skipped": "this implementation has no rule for chunks"}
    warps = contenders.PASSES_OVER[problem.what] * spec.batch * -(-spec.channels // 32)
    chosen = gpu.choose_chunks(
        warps, spec.length, 4 * spec.state, multiprocessors, rule.overhead, rule.resident
    )
    # In the backward pass's time the forward pass has as many chunks, too.
    numbers = sorted({1, chosen, 2 * chosen})
    try:
        programs = [build([problem], backend, which, chunks=number) for number in numbers]
        times = clock(programs, ROUNDS)
    except Exception as reason:  # as for a candidate
        return {"skipped": first_line(reason)}
    return {
        "shape": spec.name,
        "rule": chosen,
        "milliseconds": {
            number: 1e3 * float(np.median(seconds[0]))
            for number, seconds in zip(numbers, times, strict=True)
        },
    }


def tuning_folder() -> pathlib.Path:
    """Returns the folder for tuning files, made if need be.

    Raises:
      NotWritable: it can't be.
    """
    folder = pathlib.Path(os.environ.get(gpu.TUNING_VARIABLE) or gpu.TUNING)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise NotWritable(
            f"{folder} takes no tuning file: set {gpu.TUNING_VARIABLE} to a folder of yours"
        )
    return folder


def write_tuning(path: pathlib.Path, kind: str, versions: dict, measured: Sequence[dict]) -> dict:
    """Adds entries to a device kind's file, whole or not at all, and forgets what was read before.

    Entries of other keys stay if they were measured with the same versions.

    Returns:
      What is in the file now.
    """
    kept = []
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        old = json.loads(path.read_text())
        if old["versions"] == versions:
            own = {entry["key"] for entry in measured}
            kept = [entry for entry in old["measured"] if entry["key"] not in own]
    measured = [*kept, *measured]
    launches = {entry["key"]: entry["launch"] for entry in measured if entry["launch"]}
    value = {"device": kind, "versions": versions, "launches": launches, "measured": measured}
    write_json(path, value)
    gpu.read_tuning.cache_clear()
    return value


def tune(
    backends: Sequence[str],
    specs: Sequence[ArgSpec],
    dtype: str,
    *,
    multiprocessors: int,
    clock: Callable = time_rounds,
    budget: Budget | None = None,
    say: Callable = print,
) -> tuple[list[dict], list[dict]]:
    """Searches for all `backends`, both passes, and each state size of `specs`.

    Returns:
      One entry per key: "key", "shapes", "launch", "speedup", "tried", "chunks"; and what was not
      tuned: "what", "reason".
    """
    budget = budget or Budget()
    states = sorted({spec.state for spec in specs})
    keys = [(b, w, n) for b in backends for n in states for w in STEPS]
    count = len(UNROLLS) + len(WARPS) - 1
    progress = Progress([1] * len(keys))
    entries, failures = [], []

    def failed(key, reason):
        failures.append({"what": key, "reason": reason})
        say(f"{key}: not tuned, {reason}")

    for backend, which, state in keys:
        key = gpu.tuning_key(backend, which, state, dtype)
        problems = [Problem(BOTH, spec, dtype) for spec in specs if spec.state == state]
        progress.next_part(f"tune {key}")
        if budget.over():
            failed(key, NO_TIME)
            continue
        done = iter(range(1, count + 1))

        def make(launch, problems=problems, backend=backend, which=which):
            chosen = {} if launch is None else {which: launch}
            return build(problems, backend, which, **chosen)

        search = Search(
            make,
            TOLERANCE[dtype],
            clock,
            tried=lambda done=done: progress(next(done), count),
            budget=budget,
        )
        try:
            found = search.run()
        except Exception as reason:  # the default does not run: the next kernel may
            failed(key, first_line(reason))
            continue
        entry = {"key": key, "shapes": [problem.spec.name for problem in problems]} | found
        longest = max(problems, key=lambda problem: problem.spec.length)
        entry["chunks"] = {"skipped": NO_TIME}
        if not budget.over():
            entry["chunks"] = compare_chunks(longest, backend, which, multiprocessors, clock)
        report(entry, say)
        entries.append(entry)
    return entries, failures


def report(entry: dict, say: Callable) -> None:
    """Says what was found for one key."""
    launch = entry["launch"]
    kept = "the default stays" if launch is None else f"{launch}, {entry['speedup']:.2f}x as fast"
    say(f"{entry['key']}: {kept}")
    for record in entry["tried"]:
        name = f"  unroll {record['unroll']:2}, {record['warps']} warps:"
        if "skipped" in record:
            say(f"{name} skipped, {record['skipped']}")
        elif "milliseconds" in record:
            same = " (the default)" if "same_as" in record else ""
            say(f"{name} {', '.join(f'{ms:.4f}' for ms in record['milliseconds'])} ms{same}")
        else:
            say(f"{name} the same program as {record['same_as']}")
    chunks = entry["chunks"]
    if "skipped" in chunks:
        say(f"  chunks: {chunks['skipped']}")
    else:
        times = ", ".join(f"{n}: {ms:.4f} ms" for n, ms in chunks["milliseconds"].items())
        say(f"  chunks at {chunks['shape']}: {times}; the rule takes {chunks['rule']}")


def main(options, machine: dict, budget: Budget, specs: Sequence[ArgSpec]) -> int:
    """Runs `stretchysnake bench scan --tune`; returns the exit status."""
    device = machine["device"]
    try:
        if device["platform"] != "gpu":
            raise Unsupported(f"tuning needs a GPU, the default device is a {device['platform']}")
        folder = tuning_folder()  # not after minutes of measuring
    except (Unsupported, NotWritable) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    print(f"Tuning for {device['kind']}, with {machine['versions']}")
    if options.states:
        specs = [dataclasses.replace(spec, state=n) for n in options.states for spec in specs]
    backends = [name for name in options.implementations if name in TUNABLE]
    entries, failures = tune(
        backends,
        specs,
        options.dtype or "bfloat16",
        multiprocessors=device["multiprocessors"],
        budget=budget,
    )
    if not entries:
        print("error: nothing could be tuned, and nothing was written", file=sys.stderr)
        return 1
    path = folder / gpu.tuning_file(device["kind"])
    versions = {name: v for name, v in machine["versions"].items() if name in COMPILERS}
    value = write_tuning(path, device["kind"], versions, entries)
    print(f"Wrote {path}")
    if options.json:
        result = {"machine": machine, "file": str(path), "tuning": value, "failures": failures}
        write_json(options.json, result)
    return 0
