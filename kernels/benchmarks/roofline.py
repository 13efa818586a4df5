"""A cost model of scan kernels on NVIDIA GPUs: what a kernel may take, before it is measured.

    clocks = pipe_clocks(sass.measure(kernel).main_loop.instructions, find_device("H100"))
    print(predict(find_device("H100"), clocks / unroll, elements, bytes_moved, warps))

The unit is a warp's work on 32 elements (b, t, d): one d per lane, one token. An SM has four
quarters; each issues one instruction a clock and has pipes of its own. A loop cannot run faster
than its busiest pipe, memory no faster than HBM, and a quarter with one warp waits for latencies.
Time beyond that (caches, clocks that change, launch) isn't modelled.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

WARP = 32
QUARTERS = 4  # of an SM
QUARTER_REGISTERS = 65536 // QUARTERS
# Share of the issue slots that one warp, two, and more of a quarter fill in a loop of dependent
# arithmetic. An assumption, to be replaced where someone measures.
FILLED = (0.55, 0.80, 0.85)

# Lanes of a pipe in a quarter (CUDA C++ Programming Guide, "Arithmetic Instructions": results per
# clock and SM, over four). A warp instruction takes 32 over lanes clocks.
LANES = {"integer": 16, "special": 4, "memory": 8, "uniform": 16, "matrix": 2}
SINGLE_LANES = {"7.5": 16, "8.0": 16}  # float32; all later ones have 32
MNEMONICS = {
    "single": "FFMA FMUL FADD HFMA2 FHADD FFMA2 FMUL2 FADD2",
    "multiply": "IMAD",  # shares the float32 pipe's ports
    "integer": "IADD3 IADD SHF LOP3 ISETP FSETP SEL FSEL PRMT LEA FMNMX VIADD VIMNMX MOV SGXT "
    "FCHK I2FP POPC F2FP",
    "special": "MUFU F2F I2F F2I",
    "memory": "LDG STG LDS STS SHFL LDSM STSM LDL STL REDG RED ATOMG LDC S2R",
    "matrix": "HMMA",
}
PIPES = {mnemonic: pipe for pipe, words in MNEMONICS.items() for mnemonic in words.split()}


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
      name: whole words of JAX's device kind; the longest name that fits counts.
      capability: compute capability, such as "9.0".
      cores: SMs.
      clock: Hz, sustained.
      bandwidth: of HBM, bytes/s.
      cache: L2, bytes.
    """

    name: str
    capability: str
    cores: int
    clock: float
    bandwidth: float
    cache: float

    @property
    def quarters(self) -> int:
        return QUARTERS * self.cores


# NVIDIA's data sheets and architecture white papers.
DEVICES = (
    Device("T4", "7.5", 40, 1.590e9, 0.320e12, 4e6),
    Device("A100", "8.0", 108, 1.410e9, 2.039e12, 40e6),
    Device("A100-SXM4-40GB", "8.0", 108, 1.410e9, 1.555e12, 40e6),
    Device("A100-PCIE-40GB", "8.0", 108, 1.410e9, 1.555e12, 40e6),
    Device("A10", "8.6", 72, 1.695e9, 0.600e12, 6e6),
    Device("L4", "8.9", 58, 2.040e9, 0.300e12, 48e6),
    Device("RTX 4090", "8.9", 128, 2.520e9, 1.008e12, 72e6),
    Device("H100", "9.0", 132, 1.755e9, 3.352e12, 50e6),
    Device("H100 PCIe", "9.0", 114, 1.755e9, 2.039e12, 50e6),
    Device("H200", "9.0", 132, 1.755e9, 4.800e12, 50e6),
    Device("B200", "10.0", 148, 1.850e9, 8.000e12, 126e6),
    Device("RTX PRO 6000", "12.0", 188, 2.400e9, 1.792e12, 128e6),
)


def find_device(kind: str) -> Device:
    """Returns the entry for "H100", or for a device kind such as "NVIDIA H100 80GB HBM3".

    Raises:
      ValueError: none fits.
    """
    # Whole words: an L40 is no L4.
    found = [device for device in DEVICES if re.search(rf"\b{device.name}\b", kind)]
    if not found:
        known = ", ".join(device.name for device in DEVICES)
        raise ValueError(f"the cost model has no figures for {kind!r}, it has {known}")
    return max(found, key=lambda device: len(device.name))


def pipe_clocks(instructions: Mapping[str, float], device: Device) -> dict[str, float]:
    """Returns the clocks for which a warp keeps each pipe of its quarter busy.

    Args:
      instructions: mnemonic -> how many, such as `sass.Loop.instructions` (or a share of them).
      device: the GPU.

    Returns:
      pipe -> clocks; "issue" is the number of instructions. The largest is the bound.
    """
    clocks = dict.fromkeys(("issue", "single", "integer", "special", "memory", "uniform"), 0.0)
    clocks["matrix"] = 0.0
    single = WARP / SINGLE_LANES.get(device.capability, 32)
    for mnemonic, count in instructions.items():
        clocks["issue"] += count
        pipe = PIPES.get(mnemonic)
        if mnemonic.startswith("U"):
            pipe = "uniform"
        if pipe == "single":
            clocks["single"] += count * single
        elif pipe == "multiply":
            clocks["single"] += count * WARP / LANES["integer"]
        elif pipe is not None:
            clocks[pipe] += count * WARP / LANES[pipe]
    return clocks


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Times in seconds.

    Attributes:
      seconds: what to expect.
      pipe_seconds: with every quarter's busiest pipe always busy; no kernel of this loop is faster.
      memory_seconds: with HBM always busy; no kernel that moves these bytes is faster.
      bound: name of the busiest pipe.
    """

    seconds: float
    pipe_seconds: float
    memory_seconds: float
    bound: str

    def __str__(self):
        return (
            f"{1e6 * self.seconds:.0f} us (at least {1e6 * self.pipe_seconds:.0f} us of "
            f"{self.bound}, {1e6 * self.memory_seconds:.0f} us of HBM)"
        )


def predict(
    device: Device,
    clocks: Mapping[str, float],
    elements: float,
    bytes_moved: float,
    warps: int,
    registers: int = 0,
) -> Prediction:
    """Predicts the time of a launch.

    Args:
      device: the GPU.
      clocks: of `pipe_clocks`, for 32 elements.
      elements: batch * length * channels * directions.
      bytes_moved: to and from HBM.
      warps: of the whole grid; they walk equally many tokens.
      registers: of a thread, where they limit how many warps are resident; 0: they don't.

    Raises:
      ValueError: a size that is not positive, or more registers than a quarter has.
    """
    if elements <= 0 or warps <= 0 or not any(clocks.values()):
        raise ValueError(f"predict: {elements} elements in {warps} warps, takes positive numbers")
    bound = max(clocks, key=lambda pipe: clocks[pipe])
    units = elements / WARP
    pipe_seconds = units * clocks[bound] / device.quarters / device.clock
    memory_seconds = bytes_moved / device.bandwidth
    fullest = math.ceil(warps / device.quarters)
    resident = fullest
    if registers:
        resident = min(fullest, QUARTER_REGISTERS // (WARP * math.ceil(registers / 8) * 8))
        if not resident:
            raise ValueError(f"predict: {registers} registers a thread, a warp of 255 fits at most")
    filled = FILLED[min(resident, len(FILLED)) - 1]
    walk = units / warps * clocks[bound] * fullest / filled / device.clock
    return Prediction(max(walk, memory_seconds), pipe_seconds, memory_seconds, bound)
