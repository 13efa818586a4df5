"""Times the selective scan beside PyTorch, mamba-ssm and what the machine could do, or tunes it.

On the CPU one model block and a C++ floor are timed, too, and the ratios are held against the
project's bars. On a GPU the cost model's prediction stands beside the measured time. Compiling is
never part of a time. Everything is interleaved in one process: each round runs every contender
once, so that what else the machine does hits all alike.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
from stretchysnake_bench import contenders, roofline, scan_table, tune
from stretchysnake_bench.contenders import BACK, BLOCK, BOTH, FORWARD, GPU_KERNELS, SCAN, Problem
from stretchysnake_bench.machine import (
    NO_TIME,
    Budget,
    Others,
    Progress,
    can_write,
    describe_machine,
    write_json,
)
from stretchysnake_kernels import configure_cpu
from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan.api import IMPLEMENTATIONS
from stretchysnake_kernels.selective_scan.arg_specs import ARG_SPECS, ArgSpec, make_args

SPECS = {spec.name: spec for spec in ARG_SPECS if spec.bench}
DTYPES = ("float32", "bfloat16", "float16")
BUSY = 0.05  # share of the machine that others may use before the ratios stop to mean much


def bytes_per_token(name: str, length: int) -> float:
    """Returns the temporary bytes per token of forward+backward, from the compiled program."""
    problem = Problem(SCAN, ArgSpec("", 1, length, 384))
    args = make_args(problem.spec)
    return contenders.jax_jobs(problem, name, args, args["x"])[1].memory / length


def usable(names: Sequence[str], dtype: str, say) -> list[str]:
    """Returns those of our implementations that run here, and says why the others do not."""
    args, left = contenders.make_problem(Problem(SCAN, ArgSpec("", 1, 8, 32), dtype))[0], []
    for name in names:
        try:
            jax.eval_shape(functools.partial(contenders.our_scan, implementation=name), args)
            left.append(name)
        except Unsupported as reason:
            say(f"{name}: not measured, {reason}.")
    return left


def known_device(described: dict, say) -> roofline.Device | None:
    """Returns the cost model's figures for this GPU, or says that it has none.

    Says, too, where no machine code can be looked at.
    """
    from stretchysnake_bench import aot  # it prepares JAX for compiling without a GPU

    if reason := aot.missing_packages():
        say(f"No prediction: {reason}.")
    try:
        device = roofline.find_device(described["kind"])
    except ValueError as reason:
        say(f"No roofline and no prediction: {reason}.")
        return None
    return dataclasses.replace(
        device, cores=described["multiprocessors"], capability=described["capability"]
    )


def predictions(problem: Problem, ours: Sequence[str], device, budget: Budget, say) -> dict:
    """Returns (pass, implementation) -> prediction.Expected, and says what can't be predicted."""
    from stretchysnake_bench import aot, prediction

    args, d_y = contenders.make_problem(problem)
    found = {}
    if aot.missing_packages() is not None:  # as `known_device` has said
        return found
    for name in (name for name in ours if name in GPU_KERNELS):
        function = functools.partial(contenders.OURS[problem.what], implementation=name)
        passes = {FORWARD: (function, (args,))}
        passes[BACK] = (contenders.both_passes(function), (args, d_y))
        for step, (run, operands) in passes.items():
            if budget.over():
                say(f"{name} {step}: no prediction, no time left.")
                continue
            try:
                found[step, name] = prediction.expect(
                    run,
                    operands,
                    device=device,
                    states=problem.spec.state,
                    elements=problem.elements,
                    bytes_moved=problem.bytes(step),
                )
            except prediction.NoPrediction as reason:
                say(f"{name} {step}: no prediction, {reason}.")
            except Exception as error:  # of the compiler, say: what was measured stays
                say(f"{name} {step}: no prediction, {contenders.first_line(error)}.")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; the defaults that depend on the device stay None."""
    parser = argparse.ArgumentParser(prog="stretchysnake bench scan", description=__doc__)
    add = parser.add_argument
    add("--shapes", help=f"of {', '.join(SPECS)}; default: S,M,L,XL, with --tune M,L")
    names = ", ".join(IMPLEMENTATIONS)
    add("--implementations", help=f"ours to time, of {names}; default: all but the reference")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    add("--directions", help="1, 2 (both in one call) or 1,2; default: 1, on a GPU 1,2")
    add("--rounds", type=int, default=5, help="timed rounds after 2 warm-ups")
    add("--seconds", type=float, help="begin nothing new after so many")
    add("--json", type=pathlib.Path, help="also write the results to this file")
    add("--quick", action="store_true", help="a small shape, for seconds")
    add("--tune", action="store_true", help="search how to launch the GPU kernels, and keep it")
    add("--states", help="with --tune: state sizes, such as 8,16,32; default: the shapes' own")
    options = parser.parse_args(argv)

    def words(name, text, takes):
        found = text.split(",")
        if unknown := [word for word in found if word not in takes]:
            parser.error(f"--{name} has {', '.join(unknown)}, takes some of {', '.join(takes)}")
        return found

    options.shapes = options.shapes or ("M,L" if options.tune else "S,M,L,XL")
    options.shapes = ["XS"] if options.quick else words("shapes", options.shapes, SPECS)
    wanted = options.implementations or ",".join(n for n in IMPLEMENTATIONS if n != "reference")
    options.implementations = words("implementations", wanted, IMPLEMENTATIONS)
    if options.directions is not None:
        options.directions = words("directions", options.directions, ("1", "2"))
    if options.states is not None:
        options.states = [int(n) for n in words("states", options.states, ("8", "16", "32"))]
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, takes at least 1")
    can_write(parser, options.json)
    return options


def main(argv: Sequence[str]) -> int:
    """Runs `stretchysnake bench scan`; returns the exit status."""
    options = parse(argv)
    budget = Budget(options.seconds)
    # JAX shares the GPU with PyTorch: it must not take most of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    setup = configure_cpu()
    machine = describe_machine()
    device = machine["device"]
    on_gpu = device["platform"] == "gpu"
    if options.tune:
        return tune.main(options, machine, budget, [SPECS[name] for name in options.shapes])
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['versions']}")
    if on_gpu:
        print(f"Measured on {device['kind']}: {device}")
    else:
        print(f"allocator tuned: {setup.allocator}, vector width asked: {setup.vector_width}")
        for note in setup.notes:
            print(note)
    known = known_device(device, print) if on_gpu else None
    ours = usable(options.implementations, dtype, print)
    if not ours:
        print("None of the implementations runs here.", file=sys.stderr)
        return 1

    problems = make_problems(options, dtype, on_gpu)
    # The block holds two scans and the matrix products around them.
    progress = Progress([p.elements * (1.5 if p.what == BLOCK else 1) for p in problems])
    rows, failures = [], []
    for problem in problems:
        title = f"{problem.what} {problem.spec.name}"
        if budget.over():
            failures.append({"what": title, "reason": NO_TIME, "ours": True})
            continue
        progress.next_part(title)
        rows += run(problem, options, ours, known, budget, progress, failures)

    result = {"machine": machine, "setup": dataclasses.asdict(setup), "rows": rows}
    result["failures"] = failures
    if not on_gpu and not budget.over():
        result["bytes_per_token"] = memory_growth(ours)
    if not on_gpu:
        print_bars(rows)
    for failure in failures:
        print(f"NOT MEASURED {failure['what']}: {failure['reason']}")
    if options.json:
        write_json(options.json, result)
    # A peer may run out of memory; ours may not.
    return 1 if any(f["ours"] and f["reason"] != NO_TIME for f in failures) else 0


def make_problems(options: argparse.Namespace, dtype: str, on_gpu: bool) -> list[Problem]:
    """Returns what to measure, in order: scans, then on the CPU the blocks."""
    ways = options.directions or (["1", "2"] if on_gpu else ["1"])
    problems = [
        Problem(what, SPECS[name], dtype)
        for name in options.shapes
        for way, what in (("1", SCAN), ("2", BOTH))
        if way in ways
    ]
    if not on_gpu and dtype == "float32":
        problems += [Problem(BLOCK, SPECS[name]) for name in options.shapes if name in ("XS", "M")]
    return problems


def run(problem, options, ours, known, budget, progress, failures) -> list[dict]:
    """Measures one problem, prints its part of the table, and returns its rows."""
    spec, on_gpu = problem.spec, jax.default_backend() == "gpu"
    title = f"{problem.what} {spec.name}"

    def failed(name, reason):
        mine = name.split()[0] in ours
        failures.append({"what": f"{title} {name}", "reason": reason, "ours": mine})
        print(f"{name}: not measured, {reason}")

    sizes = (spec.batch, spec.length, spec.channels, spec.state)
    print(f"\n{title}: batch, length, channels, state = {sizes}, {problem.dtype}")
    if known is not None and problem.bytes(FORWARD) < known.cache:
        print(
            f"The arrays of a forward pass, {problem.bytes(FORWARD) / 1e6:.0f} MB, fit in the L2 "
            f"of {known.cache / 1e6:.0f} MB and stay there between calls: more than 100 % of HBM "
            "may be right."
        )
    jobs = contenders.make_jobs(problem, ours, options.quick, print, failed, budget)
    others = Others()
    jobs = contenders.measure(problem, jobs, options.rounds, progress, print, failed)
    share = others.share()
    expected = {} if known is None else predictions(problem, ours, known, budget, print)
    bars = not on_gpu and problem.dtype == "float32"
    rows = scan_table.table_rows(problem, jobs, ours, bars, known, expected)
    rows = [row | {"others_share": share} for row in rows]
    print(scan_table.header(on_gpu))
    print("\n".join(scan_table.format_row(row, on_gpu) for row in rows))
    if share is not None and share > BUSY:
        print(f"Other processes used {share:.0%} of the machine meanwhile: measure again.")
    return rows


def memory_growth(ours: Sequence[str]) -> dict[str, dict[int, float]]:
    """Returns and prints the temporary bytes per token at two lengths."""
    growth = {name: {n: bytes_per_token(name, n) for n in (1024, 8192)} for name in ours}
    print("\nTemporary memory of the scan's forward+backward, per token of 384 channels:")
    for name, sizes in growth.items():
        for length, size in sizes.items():
            print(
                f"  {name:9} {length:5} tokens: {size:6.0f} bytes, {size / (4 * 384):.2f} times x"
            )
    return growth


def print_bars(rows: Sequence[dict]) -> None:
    """Says how many bars hold, and which do not."""
    missed = [row for row in rows if row.get("holds") is False]
    judged = [row for row in rows if "holds" in row]
    print(f"{len(judged) - len(missed)} of {len(judged)} bars hold.")
    for row in missed:
        print("MISSED", scan_table.format_row(row))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
