"""Times the selective scan and one model block on the CPU, beside PyTorch and the machine's floor.

Everything is interleaved in one process: each round runs every contender once, so that what else
the machine does hits all alike. Ratios are the less flattering of those of the medians and of the
minima, because threads that wait for each other (those of PyTorch and of the floor) lose most on a
busy machine. The bars are those the project holds itself to on two AVX-512 cores: one set for the
plain JAX implementation, a higher one for the native.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from stretchysnake_bench import floor, mixer
from stretchysnake_bench.machine import Others, Progress, cores, describe_machine
from stretchysnake_kernels import configure_cpu, selective_scan
from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan.api import IMPLEMENTATIONS
from stretchysnake_kernels.selective_scan.arg_specs import ARG_SPECS, ArgSpec, make_args

SPECS = {spec.name: spec for spec in ARG_SPECS if spec.bench}
WARM_UPS = 2  # the first call after idle takes half as long again
BUSY = 0.05  # share of the machine that others may use before the ratios stop to mean much
BRIEF = 0.25  # seconds; what takes less is run once more before it is timed
PATIENCE = 5.0  # seconds; a contender that takes longer once it is warm runs one round only
FORWARD, BACK = "forward", "forward+backward"
FLOOR = "C++ floor"
# implementation -> (what, pass, contender) -> {shape: bar}. Contenders: at least so many times our
# time. Floor: our time is at most so many times the floor's.
BARS = {
    "xla": {
        ("scan", FORWARD, "torch loop"): {"S": 4.5, "M": 4.5, "XL": 4.5, "L": 12},
        ("scan", BACK, "torch loop"): {"S": 3.5, "M": 3.5, "XL": 3.5, "L": 12},
        ("scan", FORWARD, "mamba-ssm ref"): {"S": 20},
        ("scan", FORWARD, "mambapy"): {"S": 45},
        ("scan", BACK, "mambapy"): {"S": 25},
        ("scan", FORWARD, FLOOR): {"S": 2.5, "M": 2.5, "XL": 2.5, "L": 3.5},
        ("scan", BACK, FLOOR): {"S": 4, "M": 4, "XL": 4, "L": 5},
        ("block", BACK, "torch loop"): {"M": 3.5},
        ("block", BACK, "mambapy"): {"M": 25},
    },
    "native": {
        ("scan", FORWARD, "torch loop"): {"S": 10, "M": 10, "XL": 10, "L": 40},
        ("scan", BACK, "torch loop"): {"S": 10, "M": 10, "XL": 10, "L": 40},
        ("scan", FORWARD, "mamba-ssm ref"): {"S": 40},
        ("scan", FORWARD, "mambapy"): {"S": 100},
        ("scan", BACK, "mambapy"): {"S": 80},
        ("scan", FORWARD, FLOOR): {"S": 1.2, "M": 1.2, "XL": 1.2, "L": 1.2},
        ("scan", BACK, FLOOR): {"S": 1.2, "M": 1.2, "XL": 1.2, "L": 1.2},
        ("block", BACK, "torch loop"): {"M": 6},
        ("block", BACK, "mambapy"): {"M": 45},
    },
}
MEMORY_BAR = {"xla": 6, "native": 1}  # temporary memory of forward+backward, in sizes of x
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


def jax_jobs(what: str, name: str, function: Callable, args, d_y: np.ndarray) -> list[Job]:
    """Compiles `function(args, name)` and its gradients with respect to all of `args`."""
    function = functools.partial(function, implementation=name)
    args, d_y = jax.tree.map(jax.numpy.asarray, (args, d_y))

    def forward_and_back(args, d_y):
        y, pullback = jax.vjp(function, args)
        return y, pullback(d_y)

    forward = jax.jit(function).lower(args).compile()
    both = jax.jit(forward_and_back).lower(args, d_y).compile()

    def temporary(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    return [
        Job(what, FORWARD, name, lambda: wait(forward(args)), temporary(forward)),
        Job(what, BACK, name, lambda: wait(both(args, d_y))[0], temporary(both)),
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
        lower = floor.Floor(args, d_y, threads=cores())
    except floor.Unavailable as reason:
        say(f"{FLOOR}: not measured, {reason}.")
        return []

    def run(method):
        method()
        return lower.y

    return [
        Job("scan", FORWARD, FLOOR, lambda: run(lower.forward)),
        Job("scan", BACK, FLOOR, lambda: run(lower.forward_and_back)),
    ]


def our_scan(args, implementation):
    return selective_scan(**args, delta_softplus=True, implementation=implementation)


def our_block(args, implementation):
    return mixer.mixer(args, args["u"], implementation)


def make_jobs(what: str, spec: ArgSpec, ours: Sequence[str], quick: bool, say) -> list[Job]:
    """Builds every contender of one shape: of the scan, or of the block that holds two scans."""
    rng = np.random.default_rng(1)
    if what == "scan":
        args, function = make_args(spec), our_scan
        d_y = rng.normal(size=args["x"].shape).astype(np.float32)
    else:
        width, function = spec.channels // 2, our_block
        u = rng.normal(size=(spec.batch, spec.length, width)).astype(np.float32)
        args = mixer.make_params(width, spec.channels, spec.state) | {"u": u}
        d_y = rng.normal(size=u.shape).astype(np.float32)
    jobs = []
    for name in ours:
        jobs += jax_jobs(what, name, function, args, d_y)
    jobs += torch_jobs(what, spec, args, d_y, quick, say)
    return jobs + floor_jobs(args, d_y, say) if what == "scan" else jobs


def measure(jobs: list[Job], rounds: int, progress, say) -> None:
    """Runs all jobs in turn, `rounds` times after the warm-ups; fills their `seconds`.

    Raises:
      RuntimeError: a contender computes something else than the others.
    """
    slow, reference, seconds_of = set(), None, {}
    for turn in range(WARM_UPS + rounds):
        for job in jobs:
            if id(job) in slow and turn != WARM_UPS:
                continue
            if turn >= WARM_UPS and seconds_of[id(job)] < BRIEF:
                # The threads of the contender before this one spin for some 20 ms after their work.
                job.run()
            start = time.perf_counter()
            y = job.run()
            seconds = time.perf_counter() - start
            seconds_of[id(job)] = seconds
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


def table_rows(spec: ArgSpec, jobs: list[Job], ours: Sequence[str]) -> list[dict]:
    """Returns a row for each job's times, then one for each of our implementations and a peer."""
    rows = []
    for step in (FORWARD, BACK):
        here = {job.name: job for job in jobs if job.step == step}
        for job in here.values():
            median = float(np.median(job.seconds))
            row = {"what": job.what, "shape": spec.name, "pass": step, "name": job.name}
            row |= {"min_ms": 1e3 * min(job.seconds), "median_ms": 1e3 * median}
            row |= {"rounds": len(job.seconds), "memory_bytes": job.memory}
            if job.what == "scan":
                row["bytes_per_second"] = scan_bytes(spec, step) / median
            rows.append(row)
        for mine in (here[name] for name in ours):
            peers = [job for name, job in here.items() if name not in ours]
            rows += [ratio_row(spec, mine, peer) for peer in peers]
            if mine.what == "scan" and step == BACK:
                rows += memory_rows(spec, mine, here.get("torch loop"))
    return rows


def ratio_row(spec: ArgSpec, mine: Job, peer: Job) -> dict:
    """Compares one of our implementations with a peer, or with the floor."""
    ratios = (
        np.median(peer.seconds) / np.median(mine.seconds),
        min(peer.seconds) / min(mine.seconds),
    )
    bar = BARS.get(mine.name, {}).get((mine.what, mine.step, peer.name), {}).get(spec.name)
    row = {"what": mine.what, "shape": spec.name, "pass": mine.step}
    if peer.name == FLOOR:
        row |= {"name": f"{mine.name} / {FLOOR}", "ratio": float(1 / min(ratios))}
        return judge(row, bar, "at most")
    row |= {"name": f"{peer.name} / {mine.name}", "ratio": float(min(ratios))}
    return judge(row, bar, "at least")


def memory_rows(spec: ArgSpec, mine: Job, torch_loop: Job | None) -> list[dict]:
    """Compares our temporary memory with the size of x, and with what the torch loop keeps."""
    row = {"what": "scan", "shape": spec.name, "pass": BACK}
    whole = row | {"name": f"{mine.name}: memory / x", "ratio": mine.memory / (4 * spec.elements)}
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


def format_row(row: dict) -> str:
    """Returns one line of the table."""
    cells = [f"{row['what']:5} {row['shape']:3} {row['pass']:16} {row['name']:23}"]
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
    f"{'what':5} {'':3} {'pass':16} {'':23} {'min ms':>9} {'median ms':>9} {'GB/s':>6} "
    f"{'MiB':>8} {'ratio':>8} bar"
)


def bytes_per_token(name: str, length: int) -> float:
    """Returns the temporary bytes per token of forward+backward, from the compiled program."""
    args = make_args(ArgSpec("", 1, length, 384))
    return jax_jobs("scan", name, our_scan, args, args["x"])[1].memory / length


def usable(names: Sequence[str], say) -> list[str]:
    """Returns those of our implementations that run here, and says why the others do not."""
    args, left = make_args(ArgSpec("", 1, 8, 32)), []
    for name in names:
        try:
            jax.eval_shape(functools.partial(our_scan, implementation=name), args)
            left.append(name)
        except Unsupported as reason:
            say(f"{name}: not measured, {reason}.")
    return left


def main(argv: Sequence[str]) -> int:
    """Runs `stretchysnake bench scan`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="stretchysnake bench scan", description=__doc__)
    parser.add_argument("--shapes", default="S,M,L,XL", help=f"of {', '.join(SPECS)}")
    parser.add_argument(
        "--implementations",
        help=f"ours to time, of {', '.join(IMPLEMENTATIONS)}; default: all but the reference",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after 2 warm-ups")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="a small shape, for seconds")
    options = parser.parse_args(argv)
    names = ["XS"] if options.quick else options.shapes.split(",")
    unknown = [name for name in names if name not in SPECS]
    if unknown:
        parser.error(f"--shapes has {', '.join(unknown)}, takes some of {', '.join(SPECS)}")
    wanted = options.implementations or ",".join(n for n in IMPLEMENTATIONS if n != "reference")
    unknown = [name for name in wanted.split(",") if name not in IMPLEMENTATIONS]
    if unknown:
        takes = ", ".join(IMPLEMENTATIONS)
        parser.error(f"--implementations has {', '.join(unknown)}, takes some of {takes}")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, takes at least 1")

    if options.json and not options.json.parent.is_dir():  # not after minutes of measuring
        parser.error(f"--json is {options.json}, but there is no folder {options.json.parent}")

    setup = configure_cpu()
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['versions']}")
    print(f"allocator tuned: {setup.allocator}, vector width asked: {setup.vector_width}")
    for note in setup.notes:
        print(note)

    ours = usable(wanted.split(","), print)
    if not ours:
        print("None of the implementations runs here.", file=sys.stderr)
        return 1

    # The block holds two scans and the matrix products around them.
    parts = [("scan", SPECS[name]) for name in names]
    parts += [("block", SPECS[name]) for name in names if name in ("XS", "M")]
    progress = Progress([spec.elements * (1 if what == "scan" else 3) for what, spec in parts])
    rows = []
    for what, spec in parts:
        sizes = (spec.batch, spec.length, spec.channels, spec.state)
        print(f"\n{what} {spec.name}: batch, length, channels, state = {sizes}, float32")
        progress.next_part(f"{what} {spec.name}")
        jobs = make_jobs(what, spec, ours, options.quick, print)
        others = Others()
        measure(jobs, options.rounds, progress, print)
        share = others.share()
        print(HEADER)
        rows += (fresh := [row | {"others_share": share} for row in table_rows(spec, jobs, ours)])
        print("\n".join(map(format_row, fresh)))
        if share is not None and share > BUSY:
            print(f"Other processes used {share:.0%} of the machine meanwhile: measure again.")

    growth = {name: {n: bytes_per_token(name, n) for n in (1024, 8192)} for name in ours}
    print("\nTemporary memory of the scan's forward+backward, per token of 384 channels:")
    for name, sizes in growth.items():
        for length, size in sizes.items():
            print(
                f"  {name:9} {length:5} tokens: {size:6.0f} bytes, {size / (4 * 384):.2f} times x"
            )
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
