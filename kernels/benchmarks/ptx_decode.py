"""How the PTX emulator reads an instruction: types, operands, and the table of opcodes.

Registers hold unsigned integers of their declared width (bool for predicates), one per thread, and
are replaced, never changed in place. A packed type such as bf16x2 is the same register seen as
twice as many numbers.
"""

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np

WARP = 32
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# name -> (bits of the register, dtype of the numbers in it)
TYPES = {
    "pred": (1, np.bool_),
    "f16": (16, np.float16),
    "bf16": (16, ml_dtypes.bfloat16),
    "f32": (32, np.float32),
    "tf32": (32, np.float32),
    "f64": (64, np.float64),
    "f16x2": (32, np.float16),
    "bf16x2": (32, ml_dtypes.bfloat16),
    "f32x2": (64, np.float32),
}
for _bits, _dtype in UNSIGNED.items():
    TYPES |= {f"b{_bits}": (_bits, _dtype), f"u{_bits}": (_bits, _dtype)}
    TYPES[f"s{_bits}"] = (_bits, np.dtype(f"i{_bits // 8}").type)
SPECIAL_REGISTERS = ["%laneid", "%warpid"] + [
    f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
]
_BUILDERS: dict[str, tuple[Callable, frozenset[str]]] = {}


class PtxError(ValueError):
    """A PTX text that cannot be run, or a kernel that does what a GPU would not allow."""


def is_float(type_: str) -> bool:
    return "f" in type_


class Instruction:
    """One instruction: the words of its opcode, and access to its operands."""

    def __init__(self, kernel, opcode: str, operands: list[str], text: str):
        self.kernel, self.operands, self.text = kernel, operands, text
        self.name, *words = opcode.split(".")
        self.types = [word for word in words if word in TYPES]
        self.modifiers = [word for word in words if word not in TYPES]

    def error(self, what: str) -> PtxError:
        return PtxError(f"{self.kernel.name}: {what} '{self.text}'")

    def unknown(self) -> PtxError:
        return self.error("the emulator does not know the instruction")

    def is_barrier(self) -> bool:
        """Whether all warps of the program meet here."""
        words = set(self.modifiers)
        return (
            self.name in ("bar", "barrier")
            and "sync" in words
            and words
            <= {
                "sync",
                "cta",
                "aligned",
            }
        )

    def reader(self, operand: str, type_: str) -> Callable:
        """Returns machine -> the operand's numbers, (threads,) or more for packed types."""
        bits, dtype = TYPES[type_]
        slot = self._slot(operand, type_)
        have = np.dtype(self.kernel.slots[slot])
        if bits == 1 or have.itemsize * 8 == bits:
            return lambda machine: machine.registers[slot].view(dtype)
        if (bits != 1 and have.kind == "b") or have.itemsize * 8 < bits:
            raise self.error(f"{operand} is too narrow in")
        narrow = UNSIGNED[bits]
        return lambda machine: machine.registers[slot].astype(narrow).view(dtype)

    def _slot(self, operand, type_):
        if operand in self.kernel.names:
            return self.kernel.names[operand]
        bits, dtype = TYPES[type_]
        address = self.kernel.symbol(operand)
        if address is not None:
            return self.kernel.constant(address, bits)
        if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", operand):
            wide = 32 if match[1] in "fF" else 64
            if wide == bits:
                return self.kernel.constant(int(match[2], 16), bits)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return self.kernel.constant(int(operand.rstrip("U"), 0), max(bits, 8))
        elif is_float(type_) and re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", operand):
            raw = np.full(bits // 8 // np.dtype(dtype).itemsize, float(operand), dtype)
            return self.kernel.constant(int(raw.view(UNSIGNED[bits])[0]), bits)
        raise self.error(f"cannot read {operand} in")

    def writer(self, operand: str) -> Callable:
        """Returns (machine, numbers) -> None, which sets a register in the active threads."""
        if operand == "_":
            return lambda machine, value: None
        if operand not in self.kernel.names:
            raise self.error(f"cannot write {operand} in")
        slot = self.kernel.names[operand]
        dtype = np.dtype(self.kernel.slots[slot])

        def write(machine, value):
            if value.nbytes == machine.size * dtype.itemsize:
                value = value.view(dtype)
            else:  # a narrow integer in a wide register: signed types extend their sign
                value = value.astype(dtype)
            if machine.mask is not None:
                value = np.where(machine.mask, value, machine.registers[slot])
            machine.registers[slot] = value

        return write

    def predicate(self, operand: str, negated: bool = False) -> Callable:
        """Returns machine -> (threads,) bool."""
        read = self.reader(operand, "pred")
        return (lambda machine: ~read(machine)) if negated else read

    def elements(self, operand: str) -> list[str]:
        """Splits {a, b}; any other operand is a list of one."""
        return [part.strip() for part in operand.strip("{} ").split(",")]

    def address(self, operand: str) -> Callable:
        """Returns machine -> (threads,) int64 of an operand such as [%rd1+16]."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if match is None:
            raise self.error(f"cannot read {operand} in")
        slot = self.kernel.names.get(match[1])
        narrow = slot is not None and self.kernel.slots[slot] is np.uint32
        read = self.reader(match[1], "u32" if narrow else "u64")
        offset = int(match[2] or "0", 0)
        return lambda machine: read(machine).astype(np.int64) + offset


def builds(names: str, modifiers: str = ""):
    """Registers a builder: a function of an `Instruction` that returns `execute(machine)`.

    Args:
      names: the opcodes' first words.
      modifiers: the other words that it takes, types left out.
    """

    def register(builder):
        for name in names.split():
            _BUILDERS[name] = builder, frozenset(modifiers.split())
        return builder

    return register


def build(instruction: Instruction) -> Callable:
    """Returns `execute(machine)` of an instruction that neither branches nor is a barrier.

    Raises:
      PtxError: the emulator does not know the opcode, or one of its words or operands.
    """
    if instruction.name not in _BUILDERS:
        raise instruction.unknown()
    builder, known = _BUILDERS[instruction.name]
    # Hints to the caches (L1::evict_last and so on) change no value.
    if any(m not in known and not re.match(r"L[12]::", m) for m in instruction.modifiers):
        raise instruction.unknown()
    try:
        return builder(instruction)
    except (IndexError, KeyError):
        raise instruction.unknown() from None
