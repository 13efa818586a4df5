"""Times the selective scan and one model block on the CPU, beside PyTorch and the machine's floor.

Everything is interleaved in one process: each round runs every contender once, so that what else
the machine does hits all alike. Ratios are the less flattering of those of the medians and of the
minima, because threads that wait for each other (those of PyTorch and of the floor) lose most on a
busy machine. The bars are those the project holds itself to on two AVX-512 cores.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from stretchysnake_bench import floor, mixer
from stretchysnake_kernels import configure_cpu, selective_scan
from stretchysnake_kernels.selective_scan.arg_specs import ARG_SPECS, ArgSpec, make_args

SPECS = {spec.name: spec for spec in ARG_SPECS if spec.bench}
WARM_UPS = 2  # the first call after idle takes half as long again
BUSY = 0.05  # share of the machine that others may use before the ratios stop to mean much
PATIENCE = 5.0  # seconds; a contender that takes longer once it is warm runs one round only
FORWARD, BACK = "forward", "forward+backward"
OURS, FLOOR = "stretchysnake", "C++ floor"
# (what, pass, contender) -> {shape: bar}. Contenders: at least so many times our time. Floor: our
# time is at most so many times the floor's.
BARS = {
    ("scan", FORWARD, "torch loop"): {"S": 4.5, "M": 4.5, "XL": 4.5, "L": 12},
    ("scan", BACK, "torch loop"): {"S": 3.5, "M": 3.5, "XL": 3.5, "L": 12},
    ("scan", FORWARD, "mamba-ssm ref"): {"S": 20},
    ("scan", FORWARD, "mambapy"): {"S": 45},
    ("scan", BACK, "mambapy"): {"S": 25},
    ("scan", FORWARD, FLOOR): {"S": 2.5, "M": 2.5, "XL": 2.5, "L": 3.5},
    ("scan", BACK, FLOOR): {"S": 4, "M": 4, "XL": 4, "L": 5},
    ("block", BACK, "torch loop"): {"M": 3.5},
    ("block", BACK, "mambapy"): {"M": 25},
}
MEMORY_BAR = 6  # temporary memory of forward+backward, in sizes of x
MEMORY_SHARE_BAR = 1 / 8  # of what the torch loop keeps for its backward


@dataclasses.dataclass
class Job:
    """One contender of one pass: `run` computes, waits, and returns y for the comparison."""

    what: str
    step: str
    name: str
    run: Callable[[], np.ndarray]
    memory: int | None = None  # temporary bytes
    seconds: list[float] = dataclasses.field(default_factory=list)


def scan_bytes(spec: ArgSpec, step: str) -> int:
    """Returns the bytes that a scan must read and write in float32, each array once per pass."""
    wide, narrow = spec.elements, spec.batch * spec.length * spec.state
    forward = 4 * wide + 2 * narrow  # x, delta, z in, y out; B, C in
    backward = 7 * wide + 4 * narrow  # x, delta, z, dy in, three gradients out; B, C and theirs
    return 4 * (forward if step == FORWARD else forward + backward)


def jax_jobs(what: str, function: Callable, args, d_y: np.ndarray) -> list[Job]:
    """Compiles `function(args)` and its gradients with respect to all of `args`."""
    args, d_y = jax.tree.map(jax.numpy.asarray, (args, d_y))

    def forward_and_back(args, d_y):
        y, pullback = jax.vjp(function, args)
        return y, pullback(d_y)

    forward = jax.jit(function).lower(args).compile()
    both = jax.jit(forward_and_back).lower(args, d_y).compile()

    def temporary(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    return [
        Job(what, FORWARD, OURS, lambda: wait(forward(args)), temporary(forward)),
        Job(what, BACK, OURS, lambda: wait(both(args, d_y))[0], temporary(both)),
    ]


def wait(outputs):
    return jax.block_until_ready(outputs)


def torch_jobs(what: str, spec: ArgSpec, args, d_y: np.ndarray, quick: bool, say) -> list[Job]:
    """Returns the PyTorch contenders that are installed and can take this shape."""
    if importlib.util.find_spec("torch") is None:
        say("PyTorch is not installed: no comparison with it.")
        return []
    import torch
    from stretchysnake_bench import torch_peers as peers

    jobs, d_y = [], torch.tensor(d_y)
    for peer in peers.PEERS[:1] if quick else peers.PEERS:
        if importlib.util.find_spec(peer.needs) is None:
            say(f"{peer.name}: the package {peer.needs} is not installed.")
            continue
        if spec.length > peer.longest:
            say(
                f"{peer.name}: skipped at {what} {spec.name}, too slow above {peer.longest} tokens."
            )
            continue
        if what == "scan":
            tensors, function, more = peers.to_torch(args, peer.tokens_last), peer.scan, ()
        elif peer.tokens_last:
            continue
        else:
            tensors, function, more = peers.to_torch(args), peers.mixer, (peer.scan,)
            # The block's input is one more array that gets a gradient.
            function = _with_input(function)

        def forward(f=function, t=tensors, m=more, last=peer.tokens_last):
            y = peers.forward(f, t, *m).numpy()
            return np.swapaxes(y, 1, 2) if last else y

        jobs.append(Job(what, FORWARD, peer.name, forward))
        if peer.backward:

            def both(f=function, t=tensors, m=more):
                return peers.forward_and_back(f, t, d_y, *m)[0].detach().numpy()

            kept = peers.saved_bytes(function, tensors, *more)
            jobs.append(Job(what, BACK, peer.name, both, kept))
    return jobs


def _with_input(mixer_function):
    return lambda args, scan: mixer_function(args, args["u"], scan)


def floor_jobs(args, d_y: np.ndarray, say) -> list[Job]:
    """Returns the C++ contender, or says in one line why there is none."""
    try:
        machine = floor.Floor(args, d_y, threads=cores())
    except floor.Unavailable as reason:
        say(f"{FLOOR}: not measured, {reason}.")
        return []

    def run(method):
        method()
        return machine.y

    return [
        Job("scan", FORWARD, FLOOR, lambda: run(machine.forward)),
        Job("scan", BACK, FLOOR, lambda: run(machine.forward_and_back)),
    ]


def make_jobs(what: str, spec: ArgSpec, quick: bool, say) -> list[Job]:
    """Builds every contender of one shape: of the scan, or of the block that holds two scans."""
    rng = np.random.default_rng(1)
    if what == "scan":
        args = make_args(spec)
        d_y = rng.normal(size=args["x"].shape).astype(np.float32)
        ours = jax_jobs(what, lambda a: selective_scan(**a, delta_softplus=True), args, d_y)
        return ours + torch_jobs(what, spec, args, d_y, quick, say) + floor_jobs(args, d_y, say)
    width = spec.channels // 2
    u = rng.normal(size=(spec.batch, spec.length, width)).astype(np.float32)
    args = mixer.make_params(width, spec.channels, spec.state) | {"u": u}
    d_y = rng.normal(size=u.shape).astype(np.float32)
    ours = jax_jobs(what, lambda a: mixer.mixer(a, a["u"]), args, d_y)
    return ours + torch_jobs(what, spec, args, d_y, quick, say)


def measure(jobs: list[Job], rounds: int, progress, say) -> None:
    """Runs all jobs in turn, `rounds` times after the warm-ups; fills their `seconds`.

    Raises:
      RuntimeError: a contender computes something else than the others.
    """
    slow, reference = set(), None
    for turn in range(WARM_UPS + rounds):
        for job in jobs:
            if id(job) in slow and turn != WARM_UPS:
                continue
            start = time.perf_counter()
            y = job.run()
            seconds = time.perf_counter() - start
            if turn == 0:
                reference = np.asarray(y) if reference is None else reference
                error = np.abs(np.asarray(y) - reference).max() / np.abs(reference).max()
                if not error < 1e-4:
                    raise RuntimeError(f"{job.name} computes another {job.what}: error {error:.1e}")
            if turn == WARM_UPS - 1 and seconds > PATIENCE:  # the first call pays for new memory
                slow.add(id(job))
                say(f"{job.name}: {seconds:.0f} s per {job.what} {job.step}, measured once.")
            if turn >= WARM_UPS:
                job.seconds.append(seconds)
            del y
        progress(turn + 1, WARM_UPS + rounds)


def table_rows(spec: ArgSpec, jobs: list[Job]) -> list[dict]:
    """Returns one row per job, with its ratio to ours and the bar where the project has one."""
    rows = []
    ours = {job.step: job for job in jobs if job.name == OURS}
    for job in sorted(jobs, key=lambda job: job.step):  # stable: ours stays first
        best, median = min(job.seconds), float(np.median(job.seconds))
        mine = ours[job.step]
        ratios = (median / np.median(mine.seconds), best / min(mine.seconds))
        row = {
            "what": job.what,
            "shape": spec.name,
            "pass": job.step,
            "name": job.name,
            "min_ms": 1e3 * best,
            "median_ms": 1e3 * median,
            "rounds": len(job.seconds),
            "memory_bytes": job.memory,
        }
        bar = BARS.get((job.what, job.step, job.name), {}).get(spec.name)
        if job.what == "scan":
            row["bytes_per_second"] = scan_bytes(spec, job.step) / median
        if job.name == FLOOR:
            row |= {"ratio": float(1 / min(ratios)), "bar": bar, "bar_is": "at most"}
        elif job.name != OURS:
            row |= {"ratio": float(min(ratios)), "bar": bar, "bar_is": "at least"}
        rows.append(row)
        if job.what == "scan" and job.step == BACK and job.name in (OURS, "torch loop"):
            rows.append(memory_row(spec, job, mine))
    for row in rows:
        if row.get("bar") is not None:
            at_least = row["bar_is"] == "at least"
            row["holds"] = row["ratio"] >= row["bar"] if at_least else row["ratio"] <= row["bar"]
    return rows


def memory_row(spec: ArgSpec, job: Job, mine: Job) -> dict:
    """Compares our temporary memory with the size of x, or with what the torch loop keeps."""
    if job is mine:
        name, whole, bar = "memory / x", 4 * spec.elements, MEMORY_BAR
    else:
        name, whole, bar = "memory / torch loop's", job.memory, MEMORY_SHARE_BAR
    row = {"what": "scan", "shape": spec.name, "pass": BACK, "name": name}
    return row | {"ratio": mine.memory / whole, "bar": bar, "bar_is": "at most"}


def format_row(row: dict) -> str:
    """Returns one line of the table."""
    cells = [f"{row['what']:5} {row['shape']:3} {row['pass']:16} {row['name']:21}"]
    if "median_ms" in row:
        rate = row.get("bytes_per_second")
        memory = row["memory_bytes"]
        cells.append(f"{row['min_ms']:9.1f} {row['median_ms']:9.1f}")
        cells.append(f"{rate / 1e9:6.2f}" if rate else " " * 6)
        cells.append(f"{memory / 2**20:8.0f}" if memory is not None else " " * 8)
    else:
        cells.append(" " * 35)
    if "ratio" in row:
        cells.append(f"{row['ratio']:7.2f}x")
    if row.get("bar") is not None:
        sign = ">=" if row["bar_is"] == "at least" else "<="
        cells.append(f"{sign} {row['bar']:<6.4g} {'pass' if row['holds'] else 'MISS'}")
    return " ".join(cells).rstrip()


HEADER = (
    f"{'what':5} {'':3} {'pass':16} {'':21} {'min ms':>9} {'median ms':>9} {'GB/s':>6} "
    f"{'MiB':>8} {'ratio':>8} bar"
)


def bytes_per_token(length: int) -> float:
    """Returns the temporary bytes per token of forward+backward, from the compiled program."""
    spec = ArgSpec("", 1, length, 384)
    args = make_args(spec)
    both = jax_jobs("scan", lambda a: selective_scan(**a, delta_softplus=True), args, args["x"])[1]
    return both.memory / length


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


def main(argv: Sequence[str]) -> int:
    """Runs `stretchysnake bench scan`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="stretchysnake bench scan", description=__doc__)
    parser.add_argument("--shapes", default="S,M,L,XL", help=f"of {', '.join(SPECS)}")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after 2 warm-ups")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="a small shape, for seconds")
    options = parser.parse_args(argv)
    names = ["XS"] if options.quick else options.shapes.split(",")
    unknown = [name for name in names if name not in SPECS]
    if unknown:
        parser.error(f"--shapes has {', '.join(unknown)}, takes some of {', '.join(SPECS)}")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, takes at least 1")

    setup = configure_cpu()
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['versions']}")
    print(f"allocator tuned: {setup.allocator}, vector width asked: {setup.vector_width}")
    for note in setup.notes:
        print(note)

    # The block holds two scans and the matrix products around them.
    parts = [("scan", SPECS[name]) for name in names]
    parts += [("block", SPECS[name]) for name in names if name in ("XS", "M")]
    progress = Progress([spec.elements * (1 if what == "scan" else 3) for what, spec in parts])
    rows = []
    for what, spec in parts:
        sizes = (spec.batch, spec.length, spec.channels, spec.state)
        print(f"\n{what} {spec.name}: batch, length, channels, state = {sizes}, float32")
        progress.next_part(f"{what} {spec.name}")
        jobs = make_jobs(what, spec, options.quick, print)
        others = Others()
        measure(jobs, options.rounds, progress, print)
        share = others.share()
        print(HEADER)
        rows += (fresh := [row | {"others_share": share} for row in table_rows(spec, jobs)])
        print("\n".join(map(format_row, fresh)))
        if share is not None and share > BUSY:
            print(f"Other processes used {share:.0%} of the machine meanwhile: measure again.")

    growth = {length: bytes_per_token(length) for length in (1024, 8192)}
    print("\nTemporary memory of the scan's forward+backward, per token of 384 channels:")
    for length, size in growth.items():
        print(f"  {length:5} tokens: {size:6.0f} bytes per token, {size / (4 * 384):.2f} times x")
    missed = [row for row in rows if row.get("holds") is False]
    judged = [row for row in rows if "holds" in row]
    print(f"{len(judged) - len(missed)} of {len(judged)} bars hold.")
    for row in missed:
        print("MISSED", format_row(row))
    if options.json:
        result = {"machine": machine, "setup": dataclasses.asdict(setup), "rows": rows}
        result["bytes_per_token"] = growth
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0
