"""What the GPU kernels of the scan need, move and compute, found out without a GPU.

Every kernel is compiled as XLA would on that GPU. The assembler tells registers, spills and the
machine code of the loops; an emulator runs the compiled PTX, counts the bytes and compares the
results with the float64 reference. `bench kernels --help` lists the gates.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from stretchysnake_bench import aot, emulate, sass
from stretchysnake_bench.prediction import count_per_token
from stretchysnake_bench.ptx_emulator import worst_case
from stretchysnake_kernels.selective_scan import api, fused, gpu, mosaic_gpu, pallas, triton
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

MAKERS = {
    "pallas": pallas.make_kernels,
    "triton": triton.make_kernels,
    "mosaic_gpu": mosaic_gpu.make_kernels,
}
# Those whose PTX the emulator runs; it knows no bulk copies.
EMULATED = ("pallas", "triton")
CHANNELS = 1152  # of VideoMamba-Middle's mixers
MIDDLE = 8, 1569  # videos of 8 frames of 224 x 224, and their tokens
LONG = 1, 50177  # one video of 64 frames of 448 x 448
ARGUMENTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

# What must hold, from the smallest to the largest claim. Instructions, MUFU and shuffles are those
# of a warp for 32 elements (batch, token, channel), with 16 states.
FORWARD_REGISTERS, EVEN_REGISTERS, BACKWARD_REGISTERS = 168, 110, 255
FORWARD_INSTRUCTIONS, BOTH_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 165, 170, 700
FORWARD_MUFU, BACKWARD_MUFU, BACKWARD_SHUFFLES = 20, 40, 20
FORWARD_TRAFFIC = 1.05  # times the bytes of the arrays
BACKWARD_TRAFFIC = 24  # bytes per element
CHECKPOINTS = 1  # byte per element
# dtype -> relative error in the 2-norm of outputs, gradients, and gradients of B and C.
PARITY = {
    "float32": (2e-6, 5e-6, 5e-6),
    "bfloat16": (2.5e-3, 2.5e-3, 3e-3),
    "float16": (3e-4, 5e-4, 1e-3),
}
WORST_UNITS = 5e-4  # with the largest errors that the approximate units may have


# 1. Resources


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel to look at, of a call with bfloat16 inputs, gate, skip, bias and softplus.

    Attributes:
      title: what the table calls it.
      gradient: whether it belongs to the backward pass.
      summary: whether it is the one that sums chunks up, else the one that walks.
      directions: 1 or 2.
      batch, length, states: sizes.
      save: whether the forward pass keeps checkpoints.
    """

    title: str
    gradient: bool = False
    summary: bool = False
    directions: int = 2
    batch: int = MIDDLE[0]
    length: int = MIDDLE[1]
    states: int = 16
    save: bool = False

    @property
    def reverse(self):
        return (False, True)[: self.directions]


LAUNCHES = (
    Launch("forward, one direction, even length", directions=1, length=1568),
    Launch("forward, one direction", directions=1),
    Launch("forward, even length", length=1568),
    Launch("forward"),
    Launch("forward, keeping checkpoints", save=True),
    Launch("forward, 8 states", states=8),
    Launch("forward, 32 states", states=32),
    Launch("forward in chunks: sums", summary=True, batch=LONG[0], length=LONG[1]),
    Launch("forward in chunks: scan", batch=LONG[0], length=LONG[1], save=True),
    Launch("backward, one direction, even length", gradient=True, directions=1, length=1568),
    Launch("backward, even length", gradient=True, length=1568),
    Launch("backward", gradient=True),
    Launch("backward, 8 states", gradient=True, states=8),
    Launch("backward, 32 states", gradient=True, states=32),
    Launch("backward in chunks: sums", gradient=True, summary=True, batch=LONG[0], length=LONG[1]),
    Launch("backward in chunks: scan", gradient=True, batch=LONG[0], length=LONG[1]),
)


def launches(implementation: str, backward: bool = True) -> list[Launch]:
    """Returns those of `LAUNCHES` that an implementation has kernels for."""
    if implementation == "mosaic_gpu":  # has neither chunks nor a gradient of its own
        backward = False
    return [
        launch
        for launch in LAUNCHES
        if (backward or not launch.gradient)
        and (implementation != "mosaic_gpu" or not (launch.save or launch.summary))
    ]


def compile_launch(implementation: str, launch: Launch, target: str):
    """Compiles one kernel.

    Returns:
      Its `aot.CompiledKernel` (of Mosaic the PTX only), and the bytes of its checkpoints.

    Raises:
      AotUnavailable, jax.errors.JaxRuntimeError: as `aot.compile_for`.
    """
    shape = jax.ShapeDtypeStruct
    tokens = launch.directions, launch.batch, launch.length
    wide = shape((*tokens, CHANNELS), jnp.bfloat16)
    narrow = shape((*tokens, launch.states), jnp.float32)
    vector = shape((launch.directions, CHANNELS), jnp.float32)
    operands = fused.Operands(
        x=wide,
        delta=wide,
        decay=shape((launch.directions, launch.states, CHANNELS), jnp.float32),
        B=narrow,
        C=narrow,
        D=vector,
        z=shape((1, *wide.shape[1:]), wide.dtype),
        bias=vector,
        start=shape((*tokens[:2], launch.states, CHANNELS), jnp.float32),
    )
    with gpu.compile_for(aot.find_gpu(target)):
        kernels = MAKERS[implementation](aot.find_gpu(target), gpu.Options())
        static = dict(softplus=True, reverse=launch.reverse)
        forward = functools.partial(kernels.forward, save=launch.save, **static)
        if implementation == "mosaic_gpu":
            (ptx,) = aot.compile_for(forward, operands, target=target).mosaic.values()
            return ptx, 0
        if not launch.gradient:
            checkpoints = jax.eval_shape(forward, operands)[2]
            found = aot.kernels_of(forward, operands, target=target)
        else:
            keep = functools.partial(kernels.forward, save=True, **static)
            checkpoints = jax.eval_shape(keep, operands)[2]
            backward = functools.partial(kernels.backward, **static)
            given = operands, checkpoints, operands.x, operands.start
            found = aot.kernels_of(backward, *given, target=target)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(checkpoints)]
    return found[0 if launch.summary else -1], sum(sizes)


def measure_launch(implementation: str, launch: Launch, target: str) -> dict:
    """Returns a row of the table of resources; `misses` names the gates that do not hold."""
    kernel, checkpoints = compile_launch(implementation, launch, target)
    ptx = kernel if isinstance(kernel, str) else kernel.ptx
    found = sass.measure(ptx)
    name = "_".join(["scan"] + ["gradient"] * launch.gradient + ["summary"] * launch.summary)
    count = count_per_token(found, name, launch.states)
    elements = launch.directions * launch.batch * launch.length * CHANNELS
    row = {
        "implementation": implementation,
        "target": target,
        "kernel": launch.title,
        "registers": found.registers,
        "spills": found.spill_stores + found.spill_loads,
        "instructions": sum(count.values()),
        "mufu": count.get("MUFU", 0),
        "shuffles": count.get("SHFL", 0),
        "shared": sum(count.get(name, 0) for name in ("LDS", "STS", "BAR")),
        "atomics": len(re.findall(r"^\s*(?:@!?%\w+\s+)?(?:atom|red)\.", ptx, re.MULTILINE)),
        "checkpoints": checkpoints / elements,
    }
    even = launch.length % 8 == 0
    limits = {"spills": 0, "atomics": 0, "checkpoints": CHECKPOINTS}
    if launch.gradient:
        limits |= {"registers": BACKWARD_REGISTERS}
    else:
        limits |= {"registers": EVEN_REGISTERS if even else FORWARD_REGISTERS}
        limits |= {"shuffles": 0} | ({"shared": 0} if implementation != "mosaic_gpu" else {})
    if launch.states == 16 and launch.gradient:
        limits |= {"instructions": BACKWARD_INSTRUCTIONS, "mufu": BACKWARD_MUFU}
        limits |= {"shuffles": BACKWARD_SHUFFLES}
    elif launch.states == 16:
        instructions = BOTH_INSTRUCTIONS if launch.directions == 2 else FORWARD_INSTRUCTIONS
        limits |= {"instructions": instructions, "mufu": FORWARD_MUFU}
    return row | {"misses": [f"{k} <= {v}" for k, v in limits.items() if not row[k] <= v]}


# 2. Parity and traffic, from running the PTX


@dataclasses.dataclass(frozen=True)
class Case:
    """A call to emulate, forward and gradients.

    Attributes:
      title: what the table calls it.
      length, batch, channels, states, dtype: of the arguments.
      directions: "forward", "reverse" or "both".
      chunks: as of `gpu.options`.
      values: "usual", "small steps" (dt near 1e-4), "large steps" (dt near 50) or "fast decay" (A
        near -1000).
      units: None for exact approximate units, else the sign of their worst errors.
    """

    title: str
    length: int
    batch: int = 1
    channels: int = 32
    states: int = 16
    dtype: str = "float32"
    directions: str = "forward"
    chunks: int | None = None
    values: str = "usual"
    units: int | None = None


CASES = (
    Case("length 1", 1),
    Case("length 1, both", 1, directions="both"),
    Case("length 3", 3, directions="reverse"),
    Case("length 4", 4),
    Case("length 7, reverse", 7, directions="reverse"),
    Case("length 8", 8),
    Case("length 37, both", 37, directions="both", channels=40, batch=2),
    Case("length 64, reverse", 64, directions="reverse"),
    Case("8 states", 69, states=8, directions="both"),
    Case("32 states", 69, states=32, directions="both"),
    Case("3 chunks", 300, chunks=3, directions="both"),
    Case("bfloat16", 69, dtype="bfloat16"),
    Case("float16", 69, dtype="float16", directions="reverse"),
    Case("dt near 1e-4", 37, values="small steps"),
    Case("dt near 50", 37, values="large steps"),
    Case("A near -1000", 37, values="fast decay"),
    Case("worst units, up", 69, units=1, directions="both"),
    Case("worst units, down", 69, units=-1, directions="both"),
    Case("Tiny, 8 frames, both", 1569, channels=384, directions="both"),
)
QUICK = ("length 1", "length 37, both", "bfloat16")


def draw(case: Case):
    """Returns the arguments of a case and the cotangents of what it returns."""
    rng = np.random.default_rng(7)
    spec = ArgSpec("", case.batch, case.length, case.channels, case.states)

    def one(seed):
        args = make_args(spec, seed)
        if case.values == "small steps":
            args["delta"] = args["delta"] * 0.1 - 9
        elif case.values == "large steps":
            args["delta"] = args["delta"] + 50
        elif case.values == "fast decay":
            args["A"] = args["A"] / case.states * 1000
        if case.values != "usual":
            args["delta_bias"] = args["delta_bias"] * 0
        return args

    args = one(0)
    like_state = (case.batch, case.channels, case.states)
    if case.directions == "both":
        other = one(1)
        args = {n: v if n == "z" else np.stack([v, other[n]]) for n, v in args.items()}
    else:
        args["initial_state"] = rng.normal(size=like_state)
    kept = ("A", "D", "delta_bias", "initial_state")  # of float32, whatever x's dtype
    args = {
        name: np.asarray(value, np.float32 if name in kept else jnp.dtype(case.dtype))
        for name, value in args.items()
    }
    d_y = rng.normal(size=(case.batch, case.length, case.channels))
    cotangents = (np.asarray(d_y, jnp.dtype(case.dtype)),)
    if case.directions != "both":
        cotangents += (rng.normal(size=like_state).astype(np.float32),)
    return args, cotangents


def run(case: Case, implementation: str, args: dict, cotangents: tuple):
    """Returns the outputs of a case as a tuple, and the gradient of every argument."""

    def outputs(args):
        given = [args[name] for name in ARGUMENTS[:-1]]
        options = dict(delta_softplus=True, implementation=implementation)
        if case.directions == "both":
            return (api.bidirectional_selective_scan(*given, **options),)
        options |= dict(initial_state=args["initial_state"], return_last_state=True)
        return api.selective_scan(*given, reverse=case.directions == "reverse", **options)

    values, pullback = jax.vjp(outputs, args)
    return values, pullback(cotangents)[0]


@functools.cache
def exact(case: Case):
    """Returns what `run` returns, of the reference in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda value: np.asarray(value, np.float64), draw(case))
        call = jax.jit(functools.partial(run, case, "reference"))
        return jax.tree.map(np.asarray, call(*wide))


def error(got, want) -> float:
    """Returns the relative error in the 2-norm; infinite where something is not finite."""
    got = np.asarray(got, np.float64)
    value = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300)
    return float(value) if np.isfinite(value) else float("inf")


def check_case(implementation: str, case: Case, target: str) -> dict:
    """Runs the compiled kernels of a case; returns a row of the table of parity.

    Raises:
      AotUnavailable, jax.errors.JaxRuntimeError, PtxError: as `emulate.emulate`.
    """
    args, cotangents = draw(case)
    chunks = {} if case.chunks is None else {"chunks": case.chunks}
    with gpu.compile_for(aot.find_gpu(target)), gpu.options(**chunks):
        (outputs, gradients), runs = emulate.emulate(
            functools.partial(run, case, implementation),
            args,
            cotangents,
            target=target,
            approx=None if case.units is None else worst_case(case.units),
        )
    want = exact(dataclasses.replace(case, units=None))
    limits = PARITY[case.dtype] if case.units is None else (WORST_UNITS,) * 3
    errors = {
        "outputs": max(map(error, outputs, want[0])),
        "gradients": max(error(g, want[1][n]) for n, g in gradients.items() if n not in "BC"),
        "sums": max(error(gradients[name], want[1][name]) for name in "BC"),
    }
    row = {"implementation": implementation, "target": target, "case": case.title} | errors
    misses = [f"{k} <= {v}" for (k, e), v in zip(errors.items(), limits, strict=True) if not e <= v]
    return row | {"launches": len(runs), "misses": misses}


TRAFFIC = Case("", 197, channels=128, dtype="bfloat16", directions="both")


def measure_traffic(implementation: str, target: str) -> list[dict]:
    """Returns the rows of the table of traffic: forward and backward, of one bidirectional call."""
    args, cotangents = draw(TRAFFIC)
    with gpu.compile_for(aot.find_gpu(target)):
        _, launched = emulate.emulate(
            functools.partial(run, TRAFFIC, implementation), args, cotangents, target=target
        )
    elements = args["x"].size
    rows = []
    for gradient, launch in enumerate(launched):
        arrays = list(launch.report.arrays)
        # The backward pass keeps states of a span in its last output, which stays in the L2 cache.
        cached = [arrays.pop()] if gradient else []
        least = sum(launch.sizes[: len(arrays)])
        moved = sum(a.unique_read + a.unique_written for a in arrays)
        row = {
            "implementation": implementation,
            "target": target,
            "kernel": "backward" if gradient else "forward, keeping checkpoints",
            "bytes_per_element": moved / elements,
            "times_least": moved / least,
            "cached_per_element": sum(a.read + a.written for a in cached) / elements,
            "requested_per_element": sum(a.requested_read + a.requested_written for a in arrays)
            / elements,
        }
        holds = moved <= FORWARD_TRAFFIC * least
        misses = [] if holds or gradient else [f"times_least <= {FORWARD_TRAFFIC}"]
        if gradient and row["bytes_per_element"] > BACKWARD_TRAFFIC:
            misses = [f"bytes_per_element <= {BACKWARD_TRAFFIC}"]
        rows.append(row | {"misses": misses})
    return rows
