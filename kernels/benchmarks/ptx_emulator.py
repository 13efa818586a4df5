"""Runs compiled GPU kernels (PTX) in numpy: what users will execute, tested without a GPU.

    kernel = Kernel(ptx_text)
    report = kernel.run([x, out], grid=(2, 4), shared_bytes=2048)   # out is written in place

Every instruction is executed for all threads of the grid at once. Threads may branch apart: those
that are furthest behind run first, so that they meet again, and a barrier waits for the others. The
report counts instructions and memory traffic.

It covers the PTX that Triton makes of kernels without `wgmma`, `tcgen05`, bulk copies, atomics or
local memory; any other instruction is refused by name. Known differences to the machine: fma,
division, the approximate units and mma round a float64 result (`worst_case` gives the units the
errors that NVIDIA documents); NaN payloads, caches and time are not modelled. Races between the
warps of a program stay hidden in lockstep: run with the other two orders as well and compare.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

# The first two modules fill the table that `build` looks into.
from stretchysnake_bench import ptx_movement  # noqa: F401
from stretchysnake_bench.ptx_arithmetic import UNITS, worst_case  # noqa: F401
from stretchysnake_bench.ptx_decode import (
    SPECIAL_REGISTERS,
    TYPES,
    UNSIGNED,
    WARP,
    Instruction,
    PtxError,
    build,
)
from stretchysnake_bench.ptx_memory import GlobalMemory, SharedMemory, SharedTraffic, Traffic

ORDERS = ("lockstep", "ascending", "descending")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
LINE_DIRECTIVE = re.compile(r"^\s*\.(?:loc|file|section)\b[^\n]*", re.M)
SHARED_SYMBOL = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


@dataclasses.dataclass
class Report:
    """What a run did.

    Attributes:
      instructions: opcode -> how often a warp issued it, predicated-off ones included.
      arrays: traffic of each array given to `Kernel.run`, in their order (scalars left out).
      shared: traffic of the shared memory.
    """

    instructions: collections.Counter
    arrays: list[Traffic]
    shared: SharedTraffic


@dataclasses.dataclass
class _Block:
    """Instructions that run in one go; `end` is None, or the instruction that leaves the block."""

    code: list[Callable] = dataclasses.field(default_factory=list)
    opcodes: list[str] = dataclasses.field(default_factory=list)
    end: str | None = None  # "bra", "ret" or "bar"
    target: str | None = None
    guard: Callable | None = None  # machine -> which threads take the branch


class Kernel:
    """One entry point of a PTX text, parsed.

    Attributes:
      name: of the entry point.
      parameters: (name, type) of each parameter, such as ("scan_param_0", "u64").
      threads: (x, y, z) of a program.
      opcodes: opcode -> how often it stands in the text.
    """

    def __init__(self, ptx: str, entry: str | None = None):
        """Parses `ptx`.

        Args:
          ptx: the text of a PTX module.
          entry: name of the entry point; may be left out where there is only one.

        Raises:
          PtxError: no such entry point, or an instruction that the emulator does not know.
        """
        text = LINE_DIRECTIVE.sub("", COMMENT.sub(" ", ptx))
        entries = {match[1]: match for match in ENTRY.finditer(text)}
        if entry is None and len(entries) == 1:
            entry = next(iter(entries))
        if entry not in entries:
            raise PtxError(f"PTX: entry point {entry!r} is not one of {sorted(entries)}")
        match = entries[entry]
        self.name = entry
        self.parameters = [_parse_parameter(entry, p) for p in match[2].split(",") if p.strip()]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", match[3])
        if threads is None:
            raise PtxError(f"{entry}: the PTX does not say how many threads a program has")
        threads = [int(size) for size in threads[1].split(",")]
        self.threads = tuple([*threads, 1, 1][:3])
        if np.prod(self.threads) % WARP:
            raise PtxError(f"{entry}: {self.threads} threads are no multiple of a warp, {WARP}")
        self._symbols, self._static_shared = _place_shared(text)
        self.slots: list[type] = []  # dtype of each register
        self.names: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}  # (value, bits) -> register
        for name in SPECIAL_REGISTERS:
            self.names[name] = self._new_slot(32)
        self._blocks, self._labels = [_Block()], {}
        self._parse_body(_body(text, match.end()))
        self.opcodes = collections.Counter(o for block in self._blocks for o in block.opcodes)

    def _new_slot(self, bits: int) -> int:
        self.slots.append(np.bool_ if bits == 1 else UNSIGNED[bits])
        return len(self.slots) - 1

    def constant(self, value: int, bits: int) -> int:
        """Returns the register that holds `value` in all threads."""
        key = (value % (1 << bits), bits)
        if key not in self.constants:
            self.constants[key] = self._new_slot(bits)
        return self.constants[key]

    def symbol(self, name: str) -> int | None:
        """Returns the address of a name in shared memory, None for another name."""
        return self._symbols.get(name)

    def _parse_body(self, body: str):
        for statement in body.split(";"):
            # Inline assembly may open a scope: a name declared again is a new register from there.
            statement = statement.lstrip("{} \t\r\n").rstrip()
            while label := re.match(r"([$%\w]+):(?!:)[\s{}]*", statement):
                self._start_block()
                self._labels[label[1]] = len(self._blocks) - 1
                statement = statement[label.end() :]
            if statement.startswith(".reg"):
                self._declare(statement)
            elif statement and not statement.startswith("."):
                self._parse_instruction(statement)
        for block in self._blocks:
            if block.target is not None and block.target not in self._labels:
                raise PtxError(f"{self.name}: there is no label {block.target}")

    def _start_block(self):
        if self._blocks[-1].code or self._blocks[-1].end:
            self._blocks.append(_Block())

    def _declare(self, statement: str):
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
        if match is None or match[1] not in TYPES:
            raise PtxError(f"{self.name}: cannot read '{statement}'")
        bits = TYPES[match[1]][0]
        for name in match[2].split(","):
            name, _, count = name.strip().rstrip(">").partition("<")
            for full in [f"{name}{k}" for k in range(int(count))] if count else [name]:
                self.names[full] = self._new_slot(bits)

    def _parse_instruction(self, statement: str):
        guard = None
        if match := re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", statement, re.S):
            guard, statement = (match[2], bool(match[1])), match[3]
        opcode, *rest = statement.split(maxsplit=1)
        operands = [operand.strip() for operand in OPERAND.findall("".join(rest))]
        instruction = Instruction(self, opcode, operands, " ".join(statement.split()))
        taken = None if guard is None else instruction.predicate(*guard)
        block = self._blocks[-1]
        block.opcodes.append(opcode)
        if opcode in ("bra", "bra.uni"):
            block.end, block.target, block.guard = "bra", operands[0], taken
        elif opcode in ("ret", "exit"):
            block.end, block.guard = "ret", taken
        elif instruction.is_barrier():
            block.end = "bar"
        else:
            execute = build(instruction)
            block.code.append(execute if taken is None else _guarded(execute, taken))
            return
        self._blocks.append(_Block())

    def run(
        self,
        arguments: Sequence,
        grid: Sequence[int],
        *,
        shared_bytes: int = 0,
        approx: Mapping[str, Callable] | None = None,
        order: str = "lockstep",
        max_instructions: int = 20_000_000,
    ) -> Report:
        """Runs the kernel over the whole grid. Registers and shared memory start as NaN.

        Args:
          arguments: one per parameter: a C-contiguous numpy array for a pointer, a number for a
            scalar. Arrays are written in place; a store to one that isn't writeable raises.
            Pointers may be left out at the end (the scratch buffers that Triton does not use).
          grid: number of programs along x, y and z; the last ones may be left out.
          shared_bytes: size of the dynamic shared memory of a program, in bytes.
          approx: unit -> function that replaces it, of float64 arrays; see `worst_case`. Units:
            ex2, lg2, rcp, rsqrt, sqrt, tanh, sin, cos, div.
          order: "lockstep" runs all warps together; "ascending" and "descending" run the warps of
            a program one after another between barriers.
          max_instructions: of a warp, after which a kernel counts as hung.

        Returns:
          Counts of instructions and traffic.

        Raises:
          PtxError: an address out of every array or misaligned, a store to a read-only array,
            threads that store different values at one address at once, a warp that is not whole
            where it must be, or no end.
          ValueError: arguments that do not fit.
        """
        if order not in ORDERS:
            raise ValueError(f"{self.name}: order must be one of {ORDERS}, got {order!r}")
        if unknown := set(approx or {}) - set(UNITS):
            raise ValueError(f"{self.name}: approx has {sorted(unknown)}, takes {list(UNITS)}")
        grid = tuple([*map(int, grid), 1, 1][:3])
        machine = _Machine(self, arguments, grid, self._static_shared + shared_bytes, approx or {})
        with np.errstate(all="ignore"):
            hits = self._execute(machine, order, max_instructions)
        machine.memory.copy_back()
        counts = collections.Counter()
        for block, warps in zip(self._blocks, hits, strict=True):
            for opcode in block.opcodes:
                counts[opcode] += int(warps)
        return Report(counts, machine.memory.report(), machine.shared.traffic)

    def _execute(self, machine, order, max_instructions):
        """Runs the blocks until no thread is left; returns the warps that entered each block."""
        blocks, end = self._blocks, len(self._blocks)
        hits, steps = np.zeros(end, np.int64), 0
        where = np.zeros(machine.size, np.int32)  # the block of each thread
        waiting = np.zeros(machine.size, bool)  # at a barrier
        block = machine.choose(order, where, ~waiting)
        while block < end:
            here = blocks[block]
            for execute in here.code:
                execute(machine)
            hits[block] += machine.warps_active()
            steps += len(here.opcodes)
            if steps > max_instructions:
                raise PtxError(f"{self.name}: no end after {steps} instructions of a warp")
            target = block + 1
            if here.end in ("bra", "ret"):
                target = end if here.end == "ret" else self._labels[here.target]
            if here.guard is not None:
                taken = here.guard(machine)
                alike = taken if machine.mask is None else taken[machine.mask]
                if not alike.any():
                    target = block + 1
                elif not alike.all():
                    target = np.where(taken, target, block + 1)
            if machine.mask is None and isinstance(target, int):
                block = target  # all together; a barrier holds nobody up
                continue
            active = slice(None) if machine.mask is None else machine.mask
            where[active] = target if isinstance(target, int) else target[active]
            waiting[active] = here.end == "bar"
            live = where < end
            if not live.any():
                break
            if waiting[live].all():
                waiting[:] = False
            block = machine.choose(order, where, live & ~waiting)
        return hits


class _Machine:
    """The state of a run. `mask` says which threads execute, None means all."""

    def __init__(self, kernel, arguments, grid, shared_bytes, approx):
        threads, programs = int(np.prod(kernel.threads)), int(np.prod(grid))
        if programs < 1:
            raise ValueError(f"{kernel.name}: the grid {grid} has no program")
        self.name, self.grid, self.threads = kernel.name, grid, threads
        self.size = programs * threads
        self.mask = self._together = None
        self._copies: dict[bytes | None, list[list]] = {}
        self.units = dict(UNITS) | dict(approx)
        arguments = list(arguments)
        if len(arguments) > len(kernel.parameters):
            raise ValueError(
                f"{kernel.name}: got {len(arguments)} arguments for {len(kernel.parameters)} "
                "parameters"
            )
        arrays = [a for a in arguments if isinstance(a, np.ndarray) and a.ndim]
        self.memory = GlobalMemory(self, arrays)
        self.shared = SharedMemory(self, programs, threads, shared_bytes)
        addresses = iter([self.memory.starts[slot] for slot in self.memory.slots])
        self.parameters = {}
        for k, (name, type_) in enumerate(kernel.parameters):
            value = arguments[k] if k < len(arguments) else 0
            if isinstance(value, np.ndarray) and value.ndim:
                value = next(addresses)
            bits, dtype = TYPES[type_]
            raw = np.full(self.size, value, dtype).view(UNSIGNED[bits])
            self.parameters[name] = raw
        # The largest signed number is NaN in every floating type and no valid address.
        unset = {
            dtype: np.full(self.size, np.iinfo(dtype).max >> 1, dtype)
            for dtype in UNSIGNED.values()
        }
        unset[np.bool_] = np.zeros(self.size, bool)
        self.registers = [unset[dtype] for dtype in kernel.slots]
        for (value, bits), slot in kernel.constants.items():
            self.registers[slot] = np.full(self.size, value, UNSIGNED[bits])
        thread = np.tile(np.arange(threads), programs)
        program = np.repeat(np.arange(programs), threads)
        self.warp = thread // WARP
        for name, index, sizes in (("tid", thread, kernel.threads), ("ctaid", program, grid)):
            for axis, size in zip("xyz", sizes, strict=True):
                self._set(kernel, f"%{name}.{axis}", index % size)
                self._set(kernel, f"%n{name}.{axis}", size)
                index = index // size
        self._set(kernel, "%laneid", thread % WARP)
        self._set(kernel, "%warpid", self.warp)

    def _set(self, kernel, name, value):
        self.registers[kernel.names[name]] = np.full(self.size, value, np.uint32)

    def choose(self, order, where, runnable) -> int:
        """Sets `mask` to the threads to run next, those furthest behind; returns their block."""
        if order != "lockstep":
            warps = self.warp[runnable]
            runnable = runnable & (
                self.warp == (warps.min() if order == "ascending" else warps.max())
            )
        block = int(where[runnable].min())
        mask = runnable & (where == block)
        self.mask = self._together = None if mask.all() else mask
        return block

    def copies(self) -> list[list]:
        """Returns the groups of asynchronous copies of the threads that run, the last one open."""
        key = None if self._together is None else self._together.tobytes()
        return self._copies.setdefault(key, [[]])

    def warps_active(self) -> int:
        if self.mask is None:
            return self.size // WARP
        return int(self.mask.reshape(-1, WARP).any(axis=1).sum())

    def check_whole_warps(self, text):
        """Raises where an instruction that warps execute together misses some of their threads."""
        if self.mask is not None:
            lanes = self.mask.reshape(-1, WARP)
            if (lanes.any(axis=1) & ~lanes.all(axis=1)).any():
                raise PtxError(f"{self.name}: '{text}' by a part of a warp")

    def place(self, thread: int) -> str:
        """Says in words where a thread of the grid is."""
        program, thread = divmod(int(thread), self.threads)
        x, y, _ = self.grid
        return f"program ({program % x}, {program // x % y}, {program // (x * y)}) thread {thread}"


def _guarded(execute, taken):
    """Returns `execute` for the threads where the predicate holds."""

    def run(machine):
        before, holds = machine.mask, taken(machine)
        if before is not None:
            holds = holds & before
        if holds.any():
            machine.mask = None if holds.all() else holds
            execute(machine)
            machine.mask = before

    return run


def _parse_parameter(entry, text):
    match = re.match(r"\s*\.param\s+\.(\w+)(?:\s+\.\w+(?:\s+\d+)?)*\s+([\w$]+)\s*$", text)
    if match is None or match[1] not in TYPES:
        raise PtxError(f"{entry}: cannot take the parameter '{' '.join(text.split())}'")
    return match[2], match[1]


def _place_shared(text):
    """Returns name -> address of the arrays in shared memory, and the bytes of the static ones."""
    addresses, size, dynamic = {}, 0, []
    for alignment, name, length in SHARED_SYMBOL.findall(text):
        size = -(-size // int(alignment)) * int(alignment)
        if length:
            addresses[name] = size
            size += int(length)
        else:
            dynamic.append(name)
    size = -(-size // 128) * 128
    return addresses | dict.fromkeys(dynamic, size), size


def _body(text, start):
    """Returns what stands between the brace before `start` and the one that closes it."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()]
    raise PtxError("PTX: the text ends inside an entry point")
