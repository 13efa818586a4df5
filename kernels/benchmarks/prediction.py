"""What the cost model of roofline.py expects of the GPU kernels that a function calls."""

import collections
import dataclasses
import math
from collections.abc import Callable

from stretchysnake_bench import aot, sass
from stretchysnake_bench.roofline import Device, pipe_clocks, predict


class NoPrediction(Exception):
    """The model has nothing to say about a call; the message says why in one line."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the model says of all kernels of a call, which run one after the other.

    Attributes:
      seconds: to expect.
      bound_seconds: no kernels of these instructions that move these bytes are faster.
      bound: what that is: the name of a pipe, or "HBM".
      registers: of a thread, the most of any kernel.
      spills: bytes stored to and loaded from local memory, of a thread, all kernels.
    """

    seconds: float
    bound_seconds: float
    bound: str
    registers: int
    spills: int


def count_per_token(resources: sass.Resources, name: str, states: int) -> dict[str, float]:
    """Returns mnemonic -> how many instructions a token takes, all walks over it added up.

    How many tokens a turn of a loop handles follows from its accesses of x's width. The forward
    pass stores y. The backward pass (its kernels are named gradient) stores d_x, d_delta, d_z and,
    in float32, the sums of B and C; a walk that only recomputes states loads x and delta. The
    kernels that sum chunks up (named summary) load x and delta, backwards delta, d_y and z.
    Loops over chunks have none of these, and those over the tokens that are left after whole turns
    do the same as another loop, a token at a time: both are left out.

    Args:
      resources: of a kernel with a gate.
      name: of the kernel.
      states: its state size.
    """
    gradient, summary = "gradient" in name, "summary" in name
    half = any("U16" in opcode for loop in resources.loops for opcode in loop.opcodes)
    walks = {}
    for loop in resources.loops:
        stores, loads = (_accesses(loop, kind, half) for kind in ("STG", "LDG"))
        if stores:
            sums = 0 if half else max(1, states // 16)
            tokens = stores / (3 + sums if gradient else 1)
        elif gradient or summary:
            tokens = loads / (3 if gradient and summary else 2)
        else:
            continue
        key = tokens, loop.total
        if tokens and key > walks.get(bool(stores), ((0, 0),))[0]:
            walks[bool(stores)] = key, loop
    count = collections.Counter()
    for (tokens, _), loop in walks.values():
        for mnemonic, times in loop.instructions.items():
            count[mnemonic] += times / tokens
    return dict(count)


def _accesses(loop, kind, half):
    """How many accesses of one number of x a loop makes."""
    return sum(
        times
        for opcode, times in loop.opcodes.items()
        if opcode.startswith(kind)
        and ("U16" in opcode if half else not {"64", "128", "U16"} & set(opcode.split(".")))
    )


def expect(
    function: Callable,
    args: tuple,
    *,
    device: Device,
    states: int,
    elements: int,
    bytes_moved: int,
    compile_kernels: Callable = aot.kernels_of,
) -> Expected:
    """Predicts the time of the kernels that `function(*args)` calls, XLA's own left out.

    Args:
      function: of arrays; traced, never run.
      args: trees of arrays or of `jax.ShapeDtypeStruct`.
      device: the GPU.
      states: state size of the kernels.
      elements: batch * length * channels * directions; every kernel walks all of them.
      bytes_moved: to and from HBM, by all kernels.
      compile_kernels: as `aot.kernels_of`.

    Raises:
      NoPrediction: packages are missing, or the kernels are not of the kind that the model knows.
    """
    if reason := aot.missing_packages():
        raise NoPrediction(reason)
    try:
        kernels = compile_kernels(function, *args, target=device.capability)
    except (NotImplementedError, ValueError) as error:
        raise NoPrediction(str(error)) from error
    if not kernels:
        raise NoPrediction("it calls no Triton kernel")
    seconds = bound_seconds = spills = registers = 0
    slowest = collections.Counter()
    for kernel in kernels:
        resources = sass.measure(kernel)
        clocks = pipe_clocks(count_per_token(resources, kernel.name, states), device)
        if not any(clocks.values()):
            raise NoPrediction(f"{kernel.name} has no loop over tokens")
        warps = math.prod(kernel.grid) * kernel.threads // 32
        one = predict(device, clocks, elements, 0, warps, resources.registers)
        seconds += one.seconds
        bound_seconds += one.pipe_seconds
        slowest[one.bound] += one.pipe_seconds
        spills += resources.spill_stores + resources.spill_loads
        registers = max(registers, resources.registers)
    memory, bound = bytes_moved / device.bandwidth, slowest.most_common(1)[0][0]
    if memory > bound_seconds:
        bound = "HBM"
    return Expected(max(seconds, memory), max(bound_seconds, memory), bound, registers, int(spills))
