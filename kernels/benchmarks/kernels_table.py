"""What the GPU kernels of the selective scan need, move and compute, without a GPU.

Compiles every kernel as XLA does for the GPUs asked for, reads registers, spills and loops from the
machine code, runs the compiled PTX in an emulator, counts its bytes, and compares outputs and
gradients with the float64 reference. Prints Markdown tables; exit status 1 where a gate does not
hold. Needs pip install 'stretchysnake-jax[aot]'.
"""

import argparse
import concurrent.futures
import importlib.metadata
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
from stretchysnake_bench import aot, proof
from stretchysnake_bench.machine import can_write, cores, write_json
from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import gpu

WHOLE = ("8.0", "9.0")  # everything; on other GPUs the resources of the forward kernels
GATES = f"""gates, of a warp for 32 elements (batch, token, channel), with 16 states:
  spills and atomics     none
  forward                registers <= {proof.FORWARD_REGISTERS} ({proof.EVEN_REGISTERS} at even
                         lengths), instructions <= {proof.FORWARD_INSTRUCTIONS}
                         ({proof.BOTH_INSTRUCTIONS} with both directions), MUFU <=
                         {proof.FORWARD_MUFU}, no shuffles, barriers or shared memory (but for
                         mosaic_gpu, whose inputs come through it)
  backward               registers <= {proof.BACKWARD_REGISTERS}, instructions <=
                         {proof.BACKWARD_INSTRUCTIONS}, MUFU <= {proof.BACKWARD_MUFU}, shuffles <=
                         {proof.BACKWARD_SHUFFLES}, checkpoints <= {proof.CHECKPOINTS} byte/element
  parity                 relative errors in the 2-norm: float32 outputs <= 2e-6, gradients <= 5e-6;
                         bfloat16 2.5e-3 (d_B, d_C 3e-3); with worst units {proof.WORST_UNITS}
  traffic                forward <= {proof.FORWARD_TRAFFIC} times the arrays, backward <=
                         {proof.BACKWARD_TRAFFIC} bytes/element"""
COLUMNS = {
    "resources": {
        "kernel": "{}",
        "registers": "{}",
        "spills": "{}",
        "instructions": "{:.0f}",
        "mufu": "{:.1f}",
        "shuffles": "{:.1f}",
        "shared": "{:.1f}",
        "checkpoints": "{:.2f}",
    },
    "traffic": {
        "kernel": "{}",
        "bytes_per_element": "{:.1f}",
        "times_least": "{:.3f}",
        "cached_per_element": "{:.0f}",
        "requested_per_element": "{:.0f}",
    },
    "parity": {"case": "{}", "outputs": "{:.1e}", "gradients": "{:.1e}", "sums": "{:.1e}"},
}
TITLES = {
    "resources": "Registers, spilled bytes and checkpoint bytes per element of a thread; "
    "instructions, MUFU, shuffles and shared memory accesses of a warp for 32 elements. bfloat16, "
    f"{proof.CHANNELS} channels, batch x length {proof.MIDDLE[0]} x {proof.MIDDLE[1]}, in chunks "
    f"{proof.LONG[0]} x {proof.LONG[1]}; both directions and 16 states unless said.",
    "traffic": "Bytes per element (batch, token, channel, direction): to and from HBM, how many "
    "times the bytes of the arrays that is, to and from what stays in the L2 cache, and requested "
    f"by the warps. bfloat16, {proof.TRAFFIC.length} tokens, {proof.TRAFFIC.channels} channels, "
    "both directions.",
    "parity": "Relative error in the 2-norm of the emulated PTX against the float64 reference: "
    "the worst of the outputs, of the gradients, and of d_B and d_C (sums over channels).",
}


def find_rows(part: str, implementation: str, target: str, quick: bool) -> list[dict]:
    """Returns the rows of one table for one implementation and GPU; an error is a row, too."""
    items = [None]
    if part == "resources":
        items = proof.launches(implementation, backward=target in WHOLE)
        items = items[:1] if quick else items
    elif part == "parity":
        items = [case for case in proof.CASES if not quick or case.title in proof.QUICK]
    rows = []
    for item in items:
        try:
            if part == "resources":
                rows.append(proof.measure_launch(implementation, item, target))
            elif part == "parity":
                rows.append(proof.check_case(implementation, item, target))
            else:
                rows += proof.measure_traffic(implementation, target)
        except Exception as error:  # of the compiler, assembler or emulator: the others still run
            title = getattr(item, "title", part)
            row = {"implementation": implementation, "target": target, "kernel": title}
            rows.append(row | {"case": title, "misses": [f"{type(error).__name__}: {error}"]})
    return rows


def plan(implementations: Sequence[str], targets: Sequence[str], say):
    """Returns the parts to do, (table, implementation, target), and says what cannot be."""
    parts = []
    if "mosaic_gpu" in implementations and not aot.TOOLKIT:
        say("mosaic_gpu: compiling it needs a CUDA toolkit, there is no ptxas on the path")
        implementations = [name for name in implementations if name != "mosaic_gpu"]
    for implementation in implementations:
        for target in targets:
            try:
                with gpu.compile_for(aot.find_gpu(target)):
                    call = proof.Case("", 8)
                    jax.eval_shape(lambda *a, c=call, i=implementation: proof.run(c, i, *a),
                                   *proof.draw(call))  # fmt: skip
            except Unsupported as reason:
                say(f"{implementation} on {target}: {reason}")
                continue
            parts.append(("resources", implementation, target))
            if target in WHOLE and implementation in proof.EMULATED:
                parts += [(part, implementation, target) for part in ("traffic", "parity")]
    return parts


def format_table(part: str, rows: Sequence[dict]) -> str:
    """Returns a Markdown table."""
    columns = {"implementation": "{}", "target": "{}"} | COLUMNS[part]
    lines = ["| " + " | ".join(columns).replace("_", " ") + " | holds |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in rows:
        cells = [form.format(row[name]) if name in row else "-" for name, form in columns.items()]
        verdict = "; ".join(row["misses"]).replace("\n", " ") or "yes"
        lines.append("| " + " | ".join(cells) + f" | {verdict} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs `stretchysnake bench kernels`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake bench kernels",
        description=__doc__,
        epilog=GATES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(f"{capability} ({name})" for capability, name in aot.TARGETS.items())
    parser.add_argument(
        "--targets",
        default="8.0,9.0",
        help=f"compute capabilities, of {known}, or all; default 8.0,9.0. On others than these the "
        "resources of the forward kernels only",
    )
    parser.add_argument(
        "--implementations", default=",".join(proof.MAKERS), help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="a few kernels and cases")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    options = parser.parse_args(argv)
    targets = list(aot.TARGETS) if options.targets == "all" else options.targets.split(",")
    for name, given, takes in (
        ("--targets", targets, aot.TARGETS),
        ("--implementations", options.implementations.split(","), proof.MAKERS),
    ):
        if unknown := [value for value in given if value not in takes]:
            parser.error(f"{name} has {', '.join(unknown)}, takes some of {', '.join(takes)}")
    can_write(parser, options.json)
    if reason := aot.missing_packages():
        print(reason, file=sys.stderr)
        return 1

    def say(text):
        print(text, file=sys.stderr)

    parts = plan(options.implementations.split(","), targets, say)
    rows = {part: [] for part in TITLES}
    start = time.perf_counter()
    # A process for each part: Mosaic compiles a program once in a process, whatever the target.
    with concurrent.futures.ProcessPoolExecutor(
        min(cores(), len(parts) or 1), multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        jobs = [pool.submit(find_rows, *part, options.quick) for part in parts]
        for done, _ in enumerate(concurrent.futures.as_completed(jobs), 1):
            left = (time.perf_counter() - start) / done * (len(jobs) - done)
            say(f"{done} of {len(jobs)} parts done, ~{left:.0f} s left")
        for (part, *_), job in zip(parts, jobs, strict=True):
            rows[part] += job.result()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "triton")}
    print(f"Generated by `stretchysnake bench kernels` with {versions}.")
    for part, title in TITLES.items():
        if rows[part]:
            print(f"\n{title}\n\n{format_table(part, rows[part])}")
    every = [row for part in rows.values() for row in part]
    missed = sum(bool(row["misses"]) for row in every)
    print(f"\nAll gates hold in {len(every) - missed} of {len(every)} rows.")
    if options.json:
        write_json(options.json, {"versions": versions} | rows)
    return 1 if missed or not every else 0
