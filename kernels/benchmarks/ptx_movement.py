"""Instructions of the PTX emulator that move data: memory, lanes of a warp, matrix fragments.

Source of the semantics and of the fragments' layouts: NVIDIA's PTX ISA manual.
"""

import ml_dtypes
import numpy as np
from stretchysnake_bench.ptx_decode import TYPES, WARP, Instruction, builds

CACHING = "ca cg cs cv lu nc wb wt volatile relaxed weak gpu cta sys"
SPACES = {"global": "memory", "shared": "shared", "shared::cta": "shared"}


def _space(i: Instruction):
    """Returns machine -> the memory that an instruction names."""
    names = [SPACES[word] for word in i.modifiers if word in SPACES]
    if len(names) != 1:  # generic addresses are not modelled
        raise i.unknown()
    return lambda machine: getattr(machine, names[0])


def _active(machine, value):
    return value if machine.mask is None else value[machine.mask]


@builds("ld", f"global shared shared::cta param param::entry v2 v4 v8 {CACHING}")
def _load(i: Instruction):
    if {"param", "param::entry"} & set(i.modifiers):
        return _load_parameter(i)
    space, address = _space(i), i.address(i.operands[1])
    writers = [i.writer(part) for part in i.elements(i.operands[0])]
    bits, dtype = TYPES[i.types[0]]
    width, count = bits // 8, len(writers)

    def execute(machine):
        memory = space(machine)
        place = memory.index(_active(machine, address(machine)), width * count, False, i.text)
        # (count, active threads): one row per register
        values = memory.views[width][place // width + np.arange(count)[:, None]].view(dtype)
        if machine.mask is not None:
            everyone = np.zeros((count, machine.size), dtype)
            everyone[:, machine.mask] = values
            values = everyone
        for write, value in zip(writers, values, strict=True):
            write(machine, value)

    return execute


def _load_parameter(i):
    name = i.operands[1].strip("[] ")
    known = dict(i.kernel.parameters)
    if name not in known or TYPES[known[name]][0] != TYPES[i.types[0]][0]:
        raise i.unknown()
    write = i.writer(i.operands[0])
    return lambda machine: write(machine, machine.parameters[name])


@builds("st", f"global shared shared::cta v2 v4 v8 {CACHING}")
def _store(i: Instruction):
    space, address = _space(i), i.address(i.operands[0])
    readers = [i.reader(part, i.types[0]) for part in i.elements(i.operands[1])]
    width, count = TYPES[i.types[0]][0] // 8, len(readers)

    def execute(machine):
        memory = space(machine)
        place = memory.index(_active(machine, address(machine)), width * count, True, i.text)
        values = np.stack([_active(machine, read(machine)) for read in readers])
        _put(machine, memory.views[width], place // width + np.arange(count)[:, None], values, i)

    return execute


def _put(machine, view, index, values, i):
    """Stores, and raises where threads disagree about a value (the last one would win or not)."""
    values = values.view(view.dtype)
    view[index] = values
    if (view[index] != values).any():
        raise i.error("threads store different values at one address:")


@builds("cp", "async ca cg shared shared::cta global commit_group wait_group wait_all")
def _copy_async(i: Instruction):
    """cp.async: a copy lands where its group is waited for, so that a wait left out gives NaN."""
    words = [word for word in i.modifiers if not word.startswith("L2::")]
    if words == ["async", "commit_group"]:
        return lambda machine: machine.copies().append([])
    if words in (["async", "wait_group"], ["async", "wait_all"]):
        pending = int(i.operands[0], 0) + 1 if i.operands else 0

        def wait(machine):
            groups = machine.copies()
            done = len(groups) - pending
            for place, values in [copy for group in groups[: max(0, done)] for copy in group]:
                machine.shared.views[1][place] = values
            groups[: max(0, done)] = []
            if not groups:
                groups.append([])

        return wait
    if words[0] != "async" or words[1] not in ("ca", "cg") or words[3:] != ["global"]:
        raise i.unknown()
    to, source = (i.address(operand) for operand in i.operands[:2])
    size = int(i.operands[2], 0)
    given = i.reader(i.operands[3], "u32") if len(i.operands) > 3 else None

    def execute(machine):
        place = machine.shared.index(_active(machine, to(machine)), size, True, i.text)
        values = np.zeros((len(place), size), np.uint8)
        taken = np.full(len(place), True)
        if given is not None:  # 0 bytes from global memory: zeros are written
            amount = _active(machine, given(machine))
            if ((amount != 0) & (amount != size)).any():
                raise i.unknown()
            taken = amount != 0
        if taken.any():
            mask, machine.mask = machine.mask, _spread(machine, taken)
            try:
                address = _active(machine, source(machine))
                at = machine.memory.index(address, size, False, i.text)
            finally:
                machine.mask = mask
            values[taken] = machine.memory.views[1][at[:, None] + np.arange(size)]
        machine.copies()[-1].append((place[:, None] + np.arange(size), values))

    return execute


@builds("shfl", "sync up down bfly idx")
def _shuffle(i: Instruction):
    mode = i.modifiers[1]
    destination, _, valid = i.operands[0].partition("|")
    write = i.writer(destination.strip())
    write_valid = i.writer(valid.strip() or "_")
    value, step, clamp = (i.reader(operand, "b32") for operand in i.operands[1:4])
    lane = np.arange(WARP)

    def execute(machine):
        machine.check_whole_warps(i.text)
        rows = value(machine).reshape(-1, WARP)
        by = (step(machine) & 31).astype(np.int64).reshape(-1, WARP)
        limit = clamp(machine).astype(np.int64).reshape(-1, WARP)
        segment = limit >> 8 & 31
        first = lane & segment
        last = first | (limit & 31 & ~segment)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": first | (by & ~segment),
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        write(machine, np.take_along_axis(rows, source, axis=1).reshape(-1))
        write_valid(machine, inside.reshape(-1))

    return execute


@builds("bar fence membar", "warp sync proxy async acq_rel sc cta gpu sys gl shared::cta global")
@builds("griddepcontrol", "wait launch_dependents")
def _nothing(i: Instruction):
    """Warps are in step between branches, memory is in order, and kernels run one after another."""
    if i.name == "bar" and i.modifiers != ["warp", "sync"]:
        raise i.unknown()
    return lambda machine: None


@builds("ldmatrix stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def _matrices(i: Instruction):
    """8x8 matrices of 16-bit numbers; lane 8k+j holds the address of row j of matrix k."""
    loads = i.name == "ldmatrix"
    registers, where = i.operands if loads else i.operands[::-1]
    parts, address = i.elements(registers), i.address(where)
    access = [i.writer(part) if loads else i.reader(part, "b32") for part in parts]
    count, transposed = len(parts), "trans" in i.modifiers

    def execute(machine):
        machine.check_whole_warps(i.text)
        rows = _active(machine, address(machine)).reshape(-1, WARP)[:, : 8 * count]
        place = machine.shared.index(rows.reshape(-1), 16, not loads, i.text, lanes=8 * count)
        place = place.reshape(-1, count, 8, 1) // 2 + np.arange(8)
        view = machine.shared.views[2]
        if loads:
            tiles = view[place]
            tiles = np.swapaxes(tiles, 2, 3) if transposed else tiles
            for k, write in enumerate(access):
                value = np.ascontiguousarray(tiles[:, k]).reshape(-1).view(np.uint32)
                write(machine, _spread(machine, value))
            return
        tiles = [_active(machine, read(machine)).view(np.uint16) for read in access]
        tiles = np.stack([tile.reshape(-1, 8, 8) for tile in tiles], axis=1)
        _put(machine, view, place, np.swapaxes(tiles, 2, 3) if transposed else tiles, i)

    return execute


def _spread(machine, value):
    """Returns `value` of the active threads with zeros for the others."""
    if machine.mask is None:
        return value
    everyone = np.zeros(machine.size, value.dtype)
    everyone[machine.mask] = value
    return everyone


@builds("mma", "sync aligned m16n8k4 m16n8k8 m16n8k16 row col")
def _multiply_matrices(i: Instruction):
    """D = A B + C of 16xK and Kx8, exact products, summed in float64 and rounded once."""
    result, kind, other, addend = i.types
    if (result, addend) != ("f32", "f32") or kind != other or kind not in ("bf16", "f16", "tf32"):
        raise i.unknown()
    dtype = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "tf32": np.uint32}[kind]
    writers = [i.writer(part) for part in i.elements(i.operands[0])]
    a, b = ([i.reader(p, "b32") for p in i.elements(operand)] for operand in i.operands[1:3])
    c = [i.reader(part, "f32") for part in i.elements(i.operands[3])]
    pack = 1 if kind == "tf32" else 2  # numbers in a register
    depth = 4 * pack * len(b)
    if f"m16n8k{depth}" not in i.modifiers or len(a) != 2 * len(b) or len(c) != 4:
        raise i.unknown()
    group, member = np.divmod(np.arange(WARP), 4)

    def fragment(machine, read):  # (warps, lanes, numbers)
        raw = read(machine).view(dtype)
        if kind == "tf32":  # the unit sees the upper 19 bits
            raw = (raw & np.uint32(0xFFFFE000)).view(np.float32)
        return raw.astype(np.float64).reshape(-1, WARP, pack)

    def execute(machine):
        machine.check_whole_warps(i.text)
        warps = machine.size // WARP
        left, right = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        total = np.zeros((warps, 16, 8))
        for k, read in enumerate(a):
            numbers = fragment(machine, read)
            for e in range(pack):
                column = pack * member + 4 * pack * (k >> 1) + e
                left[:, group + 8 * (k & 1), column] = numbers[:, :, e]
        for k, read in enumerate(b):
            numbers = fragment(machine, read)
            for e in range(pack):
                right[:, pack * member + 4 * pack * k + e, group] = numbers[:, :, e]
        at = [(group + 8 * (k >> 1), 2 * member + (k & 1)) for k in range(4)]
        for (row, column), read in zip(at, c, strict=True):
            total[:, row, column] = read(machine).reshape(-1, WARP)
        total = (left @ right + total).astype(np.float32)
        for (row, column), write in zip(at, writers, strict=True):
            write(machine, np.ascontiguousarray(total[:, row, column]).reshape(-1))

    return execute
