"""Arithmetic of the PTX emulator: numbers, bits, comparisons, conversions.

Source of the semantics: NVIDIA's PTX ISA manual.
"""

import functools
from collections.abc import Callable

import numpy as np
from stretchysnake_bench.ptx_decode import TYPES, UNSIGNED, Instruction, builds, is_float

TINY = np.finfo(np.float32).tiny
TWO_PI = 2 * np.pi
# Approximate units: exact here, replaced by `Kernel.run(approx=...)`.
UNITS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "div": np.divide,
}


def worst_case(sign: int = 1) -> dict[str, Callable]:
    """Returns the approximate units with the largest errors that NVIDIA documents.

    Bounds of the float32 forms, from "Floating Point Instructions" of NVIDIA's PTX ISA manual: ex2
    and div two units in the last place, rcp one; rsqrt 2^-22.9, sqrt 2^-23, tanh 2^-11 relative;
    lg2 2^-22, absolute between 0.5 and 2; sin and cos 2^-20.5 absolute, 2^-14.7 beyond 2 pi.

    Args:
      sign: +1 or -1. All errors have it, so that they add up over a recurrence.

    Returns:
      name of the unit -> function of float64 arrays, for `Kernel.run(approx=...)`.
    """
    if sign not in (1, -1):
        raise ValueError(f"worst_case: sign must be 1 or -1, got {sign!r}")
    bounds = {"ex2": 2**-22, "rcp": 2**-23, "rsqrt": 2**-22.9, "sqrt": 2**-23, "tanh": 2**-11}
    bounds["div"] = 2**-22

    def relative(name):
        return lambda *args: UNITS[name](*args) * (1 + sign * bounds[name])

    def absolute(name):
        return lambda a: UNITS[name](a) + sign * np.where(np.abs(a) <= TWO_PI, 2**-20.5, 2**-14.7)

    def lg2(a):
        exact = np.log2(a)
        return exact + sign * 2**-22 * np.where((a > 0.5) & (a < 2), 1, np.abs(exact))

    units = {name: relative(name) for name in bounds}
    return units | {"lg2": lg2, "sin": absolute("sin"), "cos": absolute("cos")}


def _flush(value):
    """Sets subnormal float32 numbers to zero (.ftz)."""
    small = np.abs(value) < TINY
    return np.where(small, np.copysign(np.float32(0), value), value) if small.any() else value


def _shift_left(a, n):
    bits = a.itemsize * 8
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a, n):
    bits = a.itemsize * 8
    moved = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(n < bits, moved, 0).astype(a.dtype)


def _truncated_divide(a, b):
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


EXACT = {  # in the type itself
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "copysign": lambda sign, size: np.copysign(size, sign),
}
ROUNDED = {  # in float64, then rounded
    "fma": lambda a, b, c: a * b + c,
    "div": np.divide,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
}
INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "div": _truncated_divide,
    "rem": lambda a, b: a - _truncated_divide(a, b) * b,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "popc": np.bitwise_count,
}
SOURCES = dict.fromkeys(("add", "sub", "mul", "div", "rem", "and", "or", "xor", "copysign"), (2,))
SOURCES |= {"fma": (3,), "mad": (3,), "min": (2, 3), "max": (2, 3)}  # all others take one
# How the float32 nearest to a number is moved in the other rounding modes.
DIRECTED = {
    "rz": lambda near, exact: np.where(np.abs(near) > np.abs(exact), np.nextafter(near, 0), near),
    "rm": lambda near, exact: np.where(near > exact, np.nextafter(near, -np.inf), near),
    "rp": lambda near, exact: np.where(near < exact, np.nextafter(near, np.inf), near),
}


@builds(
    "add sub mul neg abs min max fma div rcp sqrt", "rn rz rm rp ftz sat approx full lo hi wide NaN"
)
@builds("ex2 lg2 rsqrt tanh sin cos", "approx ftz")
@builds("mad", "lo hi wide")
@builds("rem and or xor not popc copysign")
def _arithmetic(i: Instruction):
    if len(i.operands) - 1 not in SOURCES.get(i.name, (1,)):
        raise i.unknown()
    if not is_float(i.types[0]):
        return _integer(i, i.types[0])
    type_, words = i.types[0], set(i.modifiers)
    directed = next((DIRECTED[word] for word in i.modifiers if word in DIRECTED), None)
    approximate = bool(words & {"approx", "full"})
    known = approximate or i.name in EXACT or i.name in ROUNDED
    if words & {"lo", "hi", "wide"} or not known or (directed and type_ != "f32"):
        raise i.unknown()
    sources = [type_] * (len(i.operands) - 1)
    if len(i.types) == 2:  # add.f32.bf16: all but the addend have the second type
        sources[:-1] = [i.types[1]] * (len(sources) - 1)
    readers = [i.reader(o, t) for o, t in zip(i.operands[1:], sources, strict=True)]
    write, dtype = i.writer(i.operands[0]), TYPES[type_][1]
    function = (ROUNDED | EXACT).get(i.name)
    if i.name in ("min", "max"):
        extreme = getattr(np, f"{i.name}imum") if "NaN" in words else function

        def function(*values):
            return functools.reduce(extreme, values)

    flush = "ftz" in words and type_ == "f32"
    wide = np.float64 if approximate or directed or i.name in ROUNDED else dtype

    def execute(machine):
        values = [read(machine) for read in readers]
        if flush:
            values = [_flush(value) for value in values]
        values = [value.astype(wide, copy=False) for value in values]
        exact = (machine.units[i.name] if approximate else function)(*values)
        result = exact.astype(dtype, copy=False)
        if directed:
            result = directed(result, exact)
        if "sat" in words:
            result = np.fmin(np.fmax(result, dtype(0)), dtype(1))
        write(machine, _flush(result) if flush else result)

    return execute


def _integer(i, type_):
    """add, mul.lo, mad.wide, and, ... of integers and predicates."""
    write = i.writer(i.operands[0])
    if i.name not in ("mul", "mad"):
        readers, function = [i.reader(o, type_) for o in i.operands[1:]], INTEGER[i.name]
        if i.modifiers or len(readers) > 2:
            raise i.unknown()
        return lambda machine: write(machine, function(*[read(machine) for read in readers]))
    if len(i.modifiers) != 1:
        raise i.unknown()
    (part,) = i.modifiers
    bits, dtype = TYPES[type_]
    types = [type_, type_, f"{type_[0]}{2 * bits}" if part == "wide" else type_]
    readers = [i.reader(o, t) for o, t in zip(i.operands[1:], types, strict=i.name == "mad")]
    twice = np.dtype(f"{np.dtype(dtype).kind}{bits // 4}") if bits < 64 else np.dtype(object)

    def execute(machine):
        a, b, *addend = [read(machine) for read in readers]
        if part == "lo":
            product = a * b
        else:
            product = a.astype(twice) * b.astype(twice)
            product = product if part == "wide" else (product >> bits).astype(dtype)
        write(machine, product + addend[0] if addend else product)

    return execute


@builds("shl shr")
def _shift(i):
    write, value = i.writer(i.operands[0]), i.reader(i.operands[1], i.types[0])
    amount = i.reader(i.operands[2], "u32")
    function = _shift_left if i.name == "shl" else _shift_right
    return lambda machine: write(machine, function(value(machine), amount(machine)))


@builds("bfe")
def _bit_field_extract(i):
    if i.types[0] not in ("u32", "s32"):
        raise i.unknown()
    write, value = i.writer(i.operands[0]), i.reader(i.operands[1], i.types[0])
    position, length = (i.reader(operand, "u32") for operand in i.operands[2:])

    def execute(machine):
        at = (position(machine) & 255).astype(np.int64)
        size = np.minimum((length(machine) & 255).astype(np.int64), 32)
        moved = value(machine).astype(np.int64) >> np.minimum(at, 63)
        field = moved & ((1 << size) - 1)
        if i.types[0] == "s32":
            sign = field >> np.maximum(size - 1, 0) & 1
            field = field - (sign << size)
        write(machine, field.astype(np.uint32))

    return execute


@builds("lop3")
def _lookup_logic(i):
    write = i.writer(i.operands[0])
    readers = [i.reader(operand, "b32") for operand in i.operands[1:4]]
    table = int(i.operands[4], 0)

    def execute(machine):
        a, b, c = (read(machine) for read in readers)
        result = np.zeros_like(a)
        for case in range(8):
            if table >> case & 1:
                result |= (
                    (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
                )
        write(machine, result)

    return execute


@builds("prmt")
def _permute_bytes(i):
    if i.types != ["b32"]:
        raise i.unknown()
    write = i.writer(i.operands[0])
    low, high, selector = (i.reader(operand, "b32") for operand in i.operands[1:4])

    def execute(machine):
        source = low(machine).astype(np.uint64) | high(machine).astype(np.uint64) << np.uint64(32)
        choice, result = selector(machine).astype(np.uint64), np.zeros(machine.size, np.uint32)
        for k in range(4):
            nibble = choice >> np.uint64(4 * k) & np.uint64(15)
            byte = source >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
            byte = np.where(nibble >= 8, sign, byte)
            result |= (byte << np.uint64(8 * k)).astype(np.uint32)
        write(machine, result)

    return execute


@builds("mov cvta", "to global shared")
def _move(i):
    destination, source = i.operands
    if "shared" in i.modifiers:
        raise i.unknown()  # generic addresses of shared memory are not modelled
    bits = TYPES[i.types[0]][0]
    if destination.startswith("{"):
        parts = [i.writer(part) for part in i.elements(destination)]
        read, dtype = i.reader(source, i.types[0]), UNSIGNED[bits // len(parts)]

        def unpack(machine):
            columns = np.ascontiguousarray(read(machine).view(dtype).reshape(-1, len(parts)).T)
            for write, column in zip(parts, columns, strict=True):
                write(machine, column)

        return unpack
    write = i.writer(destination)
    if source.startswith("{"):
        elements = i.elements(source)
        readers = [i.reader(part, f"b{bits // len(elements)}") for part in elements]

        def pack(machine):
            columns = np.stack([read(machine) for read in readers], axis=1)
            write(machine, columns.reshape(-1).view(UNSIGNED[bits]))

        return pack
    read = i.reader(source, i.types[0])
    return lambda machine: write(machine, read(machine))


COMPARE = {
    **dict(eq=np.equal, ne=np.not_equal, lt=np.less, le=np.less_equal),
    **dict(gt=np.greater, ge=np.greater_equal),
    **dict(lo=np.less, ls=np.less_equal, hi=np.greater, hs=np.greater_equal),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@builds("setp", " ".join(COMPARE) + " equ neu ltu leu gtu geu and or xor ftz")
def _compare(i):
    relation, *rest = [word for word in i.modifiers if word != "ftz"]
    destinations = [i.writer(name.strip()) for name in i.operands[0].split("|")]
    a, b = (i.reader(operand, i.types[0]) for operand in i.operands[1:3])
    combine, third = None, None
    if rest:
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[rest[0]]
        third = i.predicate(i.operands[3].lstrip("!"), i.operands[3].startswith("!"))
    unordered = relation not in COMPARE
    function = COMPARE[relation.removesuffix("u") if unordered else relation]
    floating, flush = is_float(i.types[0]), "ftz" in i.modifiers

    def execute(machine):
        x, y = a(machine), b(machine)
        if flush:
            x, y = _flush(x), _flush(y)
        holds = function(x, y)
        if unordered:
            holds = holds | COMPARE["nan"](x, y)
        elif floating and relation == "ne":
            holds = holds & COMPARE["num"](x, y)
        for write, value in zip(destinations, (holds, ~holds), strict=False):
            write(machine, value if combine is None else combine(value, third(machine)))

    return execute


@builds("selp")
def _select(i):
    write = i.writer(i.operands[0])
    a, b = (i.reader(operand, i.types[0]) for operand in i.operands[1:3])
    which = i.predicate(i.operands[3])
    return lambda machine: write(machine, np.where(which(machine), a(machine), b(machine)))


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@builds("cvt", "rn rna rni rzi rmi rpi ftz sat")
def _convert(i):
    to, source = i.types
    dtype, words = TYPES[to][1], set(i.modifiers)
    write, readers = i.writer(i.operands[0]), [i.reader(o, source) for o in i.operands[1:]]
    rounding = next((ROUND[word] for word in i.modifiers if word in ROUND), None)
    if ("rna" in words) != (to == "tf32") or ("sat" in words and to != source):
        raise i.unknown()
    if is_float(source) and not is_float(to) and rounding is None:
        raise i.unknown()
    if len(readers) == 2:  # cvt.rn.bf16x2.f32 d, high, low

        def pack(machine):
            high, low = (read(machine).astype(dtype) for read in readers)
            write(machine, np.stack([low, high], axis=1).reshape(-1))

        return pack
    (read,) = readers

    def execute(machine):
        value = read(machine)
        if "ftz" in words and value.dtype == np.float32:
            value = _flush(value)
        if to == "tf32":  # 10 bits of mantissa, ties away from zero
            value = (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        elif not is_float(source):
            value = value.astype(dtype)
        elif is_float(to):
            value = (value if rounding is None else rounding(value)).astype(dtype)
            value = np.fmin(np.fmax(value, dtype(0)), dtype(1)) if "sat" in words else value
        else:  # saturates, NaN gives 0
            whole, limits = rounding(value.astype(np.float64)), np.iinfo(dtype)
            fits = (whole > limits.min) & (whole < limits.max)
            edge = np.where(whole > 0, limits.max, np.where(whole < 0, limits.min, 0))
            value = np.where(fits, np.where(fits, whole, 0).astype(dtype), edge.astype(dtype))
        write(machine, value)

    return execute
