"""The PTX emulator: every family of instructions against numpy, faults, traffic, branches."""

import math

import ml_dtypes
import numpy as np
import pytest
from stretchysnake_bench.ptx_emulator import Kernel, worst_case
from stretchysnake_bench.ptx_memory import PtxError, SharedTraffic, Traffic

BF16 = ml_dtypes.bfloat16
REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}
HEADER = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry test({parameters})
.reqntid {threads}, 1, 1
{{
  .reg .pred %p<9>;
  .reg .b16 %h<20>;
  .reg .b32 %r<60>;
  .reg .b64 %d<30>;
  {loads}
  mov.u32 %r0, %tid.x;   // the thread
  mov.u32 %r1, %ctaid.x;
  {body}
  ret;
}}
"""


def make(body, pointers=1, threads=32):
    """A kernel whose pointers are in %d0, %d1, ..., the thread in %r0 and the program in %r1."""
    return Kernel(
        HEADER.format(
            body=body,
            threads=threads,
            parameters=",\n".join(
                f".param .u64 .ptr .global .align 1 test_param_{k}" for k in range(pointers)
            ),
            loads="".join(f"ld.param.u64 %d{k}, [test_param_{k}];\n" for k in range(pointers)),
        )
    )


def elementwise(instruction, inputs, out_dtype):
    """Runs an instruction, in which {0} is the result and {1} ... the sources, on 32 threads."""
    names, body = [], ""
    for k, array in enumerate(inputs):
        name = f"{REGISTERS[array.itemsize]}{10 + k}"
        body += f"mad.wide.u32 %d20, %r0, {array.itemsize}, %d{k};\n"
        body += f"ld.global.b{8 * array.itemsize} {name}, [%d20];\n"
        names.append(name)
    out = np.zeros(32, out_dtype)
    result = f"{REGISTERS[out.itemsize]}9"
    body += instruction.format(result, *names) + ";\n"
    body += f"mad.wide.u32 %d20, %r0, {out.itemsize}, %d{len(inputs)};\n"
    body += f"st.global.b{8 * out.itemsize} [%d20], {result};"
    make(body, pointers=len(inputs) + 1).run([*inputs, out], (1,))
    return out


def numbers(dtype, seed=0, low=-4.0, high=4.0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, 32, dtype, endpoint=True)
    return rng.uniform(low, high, 32).astype(dtype)


def wrap(value, dtype):
    """Python integers, of any size, as their lowest bits."""
    bits = 8 * np.dtype(dtype).itemsize
    raw = [int(v) % (1 << bits) for v in value]
    return np.array(raw, f"u{bits // 8}").view(dtype)


def big(array):
    return array.astype(object)


INTEGER_CASES = [
    ("add.s32 {0}, {1}, {2}", np.int32, np.int32, lambda a, b: a + b),
    ("add.s64 {0}, {1}, {2}", np.int64, np.int64, lambda a, b: a + b),
    ("sub.s16 {0}, {1}, {2}", np.int16, np.int16, lambda a, b: a - b),
    ("mul.lo.s32 {0}, {1}, {2}", np.int32, np.int32, lambda a, b: a * b),
    ("mul.lo.s64 {0}, {1}, {2}", np.int64, np.int64, lambda a, b: a * b),
    ("mul.wide.s32 {0}, {1}, {2}", np.int32, np.int64, lambda a, b: a * b),
    ("mul.wide.u32 {0}, {1}, {2}", np.uint32, np.uint64, lambda a, b: a * b),
    ("mul.hi.u32 {0}, {1}, {2}", np.uint32, np.uint32, lambda a, b: (a * b) >> 32),
    ("mul.hi.s64 {0}, {1}, {2}", np.int64, np.int64, lambda a, b: (a * b) >> 64),
    ("mad.lo.s32 {0}, {1}, {2}, 7", np.int32, np.int32, lambda a, b: a * b + 7),
    ("min.s32 {0}, {1}, {2}", np.int32, np.int32, np.minimum),
    ("max.u32 {0}, {1}, {2}", np.uint32, np.uint32, np.maximum),
    ("and.b32 {0}, {1}, {2}", np.uint32, np.uint32, lambda a, b: a & b),
    ("or.b64 {0}, {1}, {2}", np.uint64, np.uint64, lambda a, b: a | b),
    ("xor.b32 {0}, {1}, {2}", np.uint32, np.uint32, lambda a, b: a ^ b),
    (
        "lop3.b32 {0}, {1}, {2}, 12, 0xe8",
        np.uint32,
        np.uint32,
        lambda a, b: a & b | a & 12 | b & 12,
    ),
    ("div.s32 {0}, {1}, -7", np.int32, np.int32, lambda a, b: [math.trunc(x / -7) for x in a]),
    ("rem.s32 {0}, {1}, -7", np.int32, np.int32, lambda a, b: [int(math.fmod(x, 7)) for x in a]),
    ("shl.b32 {0}, {1}, 3", np.uint32, np.uint32, lambda a, b: a << 3),
    ("shl.b64 {0}, {1}, 70", np.uint64, np.uint64, lambda a, b: a * 0),
    ("shr.u32 {0}, {1}, 5", np.uint32, np.uint32, lambda a, b: a >> 5),
    ("shr.s32 {0}, {1}, 40", np.int32, np.int32, lambda a, b: a >> 31),
    ("not.b32 {0}, {1}", np.uint32, np.uint32, lambda a, b: ~a),
    ("neg.s32 {0}, {1}", np.int32, np.int32, lambda a, b: -a),
    ("popc.b32 {0}, {1}", np.uint32, np.uint32, lambda a, b: [x.bit_count() for x in a]),
    ("bfe.u32 {0}, {1}, 16, 5", np.uint32, np.uint32, lambda a, b: a >> 16 & 31),
    ("bfe.s32 {0}, {1}, 16, 16", np.int32, np.int32, lambda a, b: a >> 16),
    (
        "prmt.b32 {0}, {1}, {2}, 0x5410",
        np.uint32,
        np.uint32,
        lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    ),
    ("cvt.s64.s32 {0}, {1}", np.int32, np.int64, lambda a, b: a),
    ("cvt.u64.u32 {0}, {1}", np.uint32, np.uint64, lambda a, b: a),
    ("cvt.u16.u32 {0}, {1}", np.uint32, np.uint16, lambda a, b: a),
    ("cvt.s32.s8 {0}, {1}", np.uint32, np.int32, lambda a, b: (a & 255 ^ 128) - 128),
]


@pytest.mark.parametrize(("instruction", "kind", "out", "want"), INTEGER_CASES, ids=lambda v: v)
def test_integers(instruction, kind, out, want):
    a, b = numbers(kind, 1), numbers(kind, 2)
    expected = wrap(want(big(a), big(b)), out)
    np.testing.assert_array_equal(elementwise(instruction, [a, b], out), expected)


FLOAT_CASES = [
    ("add.rn.f32 {0}, {1}, {2}", np.float32, lambda a, b: a + b),
    ("sub.f32 {0}, {1}, {2}", np.float32, lambda a, b: a - b),
    ("mul.rn.f32 {0}, {1}, {2}", np.float32, lambda a, b: a * b),
    ("fma.rn.f32 {0}, {1}, {2}, 0f3F000000", np.float32, lambda a, b: a * b + 0.5),
    ("fma.rn.f32 {0}, {1}, {2}, 0.5", np.float32, lambda a, b: a * b + 0.5),
    ("div.rn.f32 {0}, {1}, {2}", np.float32, lambda a, b: a / b),
    ("div.full.f32 {0}, {1}, {2}", np.float32, lambda a, b: a / b),
    ("min.f32 {0}, {1}, {2}", np.float32, np.minimum),
    ("max.NaN.f32 {0}, {1}, {2}", np.float32, np.maximum),
    ("max.f32 {0}, {1}, {2}, 0f3F000000", np.float32, lambda a, b: np.maximum(a, b).clip(0.5)),
    ("add.sat.f32 {0}, {1}, {2}", np.float32, lambda a, b: (a + b).clip(0, 1)),
    ("cvt.sat.f32.f32 {0}, {1}", np.float32, lambda a, b: a.clip(0, 1)),
    ("copysign.f32 {0}, {1}, {2}", np.float32, lambda a, b: np.copysign(b, a)),
    ("abs.f32 {0}, {1}", np.float32, lambda a, b: np.abs(a)),
    ("neg.f32 {0}, {1}", np.float32, lambda a, b: -a),
    ("ex2.approx.ftz.f32 {0}, {1}", np.float32, lambda a, b: np.exp2(a)),
    ("tanh.approx.f32 {0}, {1}", np.float32, lambda a, b: np.tanh(a)),
    ("sin.approx.f32 {0}, {1}", np.float32, lambda a, b: np.sin(a)),
    ("rcp.approx.ftz.f32 {0}, {1}", np.float32, lambda a, b: 1 / a),
    ("add.f64 {0}, {1}, {2}", np.float64, lambda a, b: a + b),
    ("fma.rn.f64 {0}, {1}, {2}, {1}", np.float64, lambda a, b: a * b + a),
    ("add.f16 {0}, {1}, {2}", np.float16, lambda a, b: a + b),
    ("mul.bf16 {0}, {1}, {2}", BF16, lambda a, b: a * b),
    ("fma.rn.bf16 {0}, {1}, {2}, {1}", BF16, lambda a, b: a * b + a),
]


@pytest.mark.parametrize(("instruction", "kind", "want"), FLOAT_CASES, ids=lambda v: v)
def test_floats(instruction, kind, want):
    a, b = numbers(kind, 1), numbers(kind, 2)
    got = elementwise(instruction, [a, b], kind).astype(np.float64)
    exact = want(a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(got, exact, rtol=float(ml_dtypes.finfo(kind).eps) / 2 * 1.001)


def test_logarithms_and_roots():
    a = numbers(np.float32, 1, 0.1, 9.0)
    for name, want in (("lg2", np.log2), ("rsqrt", lambda v: v**-0.5), ("sqrt", np.sqrt)):
        got = elementwise(f"{name}.approx.f32 {{0}}, {{1}}", [a], np.float32)
        np.testing.assert_allclose(got, want(a.astype(np.float64)), rtol=1e-7, atol=1e-8)


def test_ftz_flushes_subnormal_numbers_and_only_it():
    a = np.full(32, -130, np.float32)
    assert (elementwise("ex2.approx.ftz.f32 {0}, {1}", [a], np.float32) == 0).all()
    assert (elementwise("ex2.approx.f32 {0}, {1}", [a], np.float32) == 2.0**-130).all()
    small = np.full(32, 2.0**-130, np.float32)
    assert (elementwise("add.rn.ftz.f32 {0}, {1}, {1}", [small], np.float32) == 0).all()
    assert (elementwise("add.rn.f32 {0}, {1}, {1}", [small], np.float32) == 2.0**-129).all()


def test_fma_rounds_once():
    a = np.full(32, 1 + 2.0**-12, np.float32)
    got = elementwise("fma.rn.f32 {0}, {1}, {1}, 0fBF801000", [a], np.float32)  # -(1 + 2^-11)
    assert (got == 2.0**-24).all()


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    a, b = numbers(np.float32, 1), numbers(np.float32, 2)
    exact = a.astype(np.float64) * b
    got = elementwise(f"mul.{mode}.f32 {{0}}, {{1}}, {{2}}", [a, b], np.float32)
    error = got.astype(np.float64) - exact
    towards = {"rz": -np.sign(exact), "rm": -1, "rp": 1}[mode]
    assert (error * towards >= 0).all()
    assert (np.abs(error) < np.spacing(np.abs(got))).all()
    assert (got != (a * b)).any()


def test_packed_numbers():
    a, b = numbers(np.float32, 1), numbers(np.float32, 2)
    pair = elementwise("cvt.rn.bf16x2.f32 {0}, {1}, {2}", [a, b], np.uint32)
    np.testing.assert_array_equal(pair.view(BF16)[0::2], b.astype(BF16))  # the low half is second
    np.testing.assert_array_equal(pair.view(BF16)[1::2], a.astype(BF16))
    doubled = elementwise("add.rn.bf16x2 {0}, {1}, {1}", [pair], np.uint32)
    np.testing.assert_array_equal(doubled.view(BF16), pair.view(BF16) + pair.view(BF16))
    wide = np.stack([a, b], axis=1).reshape(-1).view(np.uint64)
    doubled = elementwise("add.rn.f32x2 {0}, {1}, {1}", [wide], np.uint64).view(np.float32)
    np.testing.assert_array_equal(doubled[0::2], 2 * a)
    mixed = elementwise("add.rn.f32.bf16 {0}, {1}, {2}", [a.astype(BF16), b], np.float32)
    np.testing.assert_array_equal(mixed, a.astype(BF16).astype(np.float32) + b)


def test_moves_split_and_join_registers():
    a = numbers(np.uint32, 1)
    swap = "{{ .reg .b16 lo, hi; mov.b32 {{lo, hi}}, {1}; mov.b32 {0}, {{hi, lo}}; }}"
    got = elementwise(swap.rstrip(" }") + "; }}", [a], np.uint32)
    np.testing.assert_array_equal(got, a >> 16 | a << 16)
    half = "{{ .reg .b32 hi; mov.b64 {{_, hi}}, {1}; mov.b64 {0}, {{hi, hi}}; }}"
    got = elementwise(half.rstrip(" }") + "; }}", [numbers(np.uint64, 3)], np.uint64)
    high = numbers(np.uint64, 3) >> np.uint64(32)
    np.testing.assert_array_equal(got, high | high << np.uint64(32))


CONVERSIONS = [
    ("cvt.rn.bf16.f32", np.float32, BF16, lambda a: a.astype(BF16)),
    ("cvt.rn.f16.f32", np.float32, np.float16, lambda a: a.astype(np.float16)),
    ("cvt.f32.bf16", BF16, np.float32, lambda a: a.astype(np.float32)),
    ("cvt.f32.f16", np.float16, np.float32, lambda a: a.astype(np.float32)),
    ("cvt.rn.f32.s32", np.int32, np.float32, lambda a: a.astype(np.float32)),
    ("cvt.rzi.s32.f32", np.float32, np.int32, lambda a: np.trunc(a).astype(np.int32)),
    ("cvt.rni.f32.f32", np.float32, np.float32, np.rint),
    ("cvt.rmi.f32.f32", np.float32, np.float32, np.floor),
]


@pytest.mark.parametrize(("instruction", "kind", "out", "want"), CONVERSIONS, ids=lambda v: v)
def test_conversions(instruction, kind, out, want):
    a = numbers(kind, 1)
    np.testing.assert_array_equal(elementwise(f"{instruction} {{0}}, {{1}}", [a], out), want(a))


def test_conversions_to_integers_saturate():
    a = np.array([1e20, -1e20, np.nan, 2147483520.0] * 8, np.float32)
    got = elementwise("cvt.rzi.s32.f32 {0}, {1}", [a], np.int32)
    assert got[:4].tolist() == [2**31 - 1, -(2**31), 0, 2147483520]


def test_tf32_keeps_ten_bits():
    a = np.array([1 + 2.0**-10, 1 + 2.0**-11, 1 + 2.0**-12, -3.0] * 8, np.float32)
    got = elementwise("cvt.rna.tf32.f32 {0}, {1}", [a], np.float32)
    assert got[:4].tolist() == [1 + 2.0**-10, 1 + 2.0**-10, 1, -3]


@pytest.mark.parametrize(
    ("relation", "want"),
    [
        ("lt.f32", [True, False, False, False]),
        ("ltu.f32", [True, False, False, True]),
        ("ge.f32", [False, True, True, False]),
        ("eq.f32", [False, True, False, False]),
        ("ne.f32", [True, False, True, False]),
        ("neu.f32", [True, False, True, True]),
        ("nan.f32", [False, False, False, True]),
        ("num.f32", [True, True, True, False]),
        ("lt.s32", [True, False, False, False]),
        ("lo.u32", [True, False, False, False]),
    ],
)
def test_comparisons(relation, want):
    a = np.array([1, 2, 3, np.nan] * 8, np.float32)
    b = np.full(32, 2, np.float32)
    text = f"setp.{relation} %p1|%p2, {{1}}, {{2}}; selp.b32 {{0}}, 1, 0, %p1"
    got = elementwise(text, [a, b], np.int32)
    assert got[:4].astype(bool).tolist() == want
    text = f"setp.{relation} %p1|%p2, {{1}}, {{2}}; not.pred %p3, %p2; selp.b32 {{0}}, 1, 0, %p3"
    np.testing.assert_array_equal(elementwise(text, [a, b], np.int32), got)


def test_comparisons_combine_with_a_predicate():
    a = np.arange(32, dtype=np.int32)
    text = (
        "setp.lt.s32 %p1, {1}, 20; setp.ge.and.s32 %p2, {1}, 10, %p1;"
        "setp.ge.or.s32 %p3, {1}, 30, !%p1; xor.pred %p4, %p2, %p3; selp.b32 {0}, 1, 0, %p4"
    )
    np.testing.assert_array_equal(elementwise(text, [a], np.int32), a >= 10)


def test_vectors_predicates_and_hints():
    source = numbers(np.float32).repeat(4) + np.arange(128, dtype=np.float32)
    sink = np.full(128, np.nan, np.float32)
    body = """
    mad.wide.u32 %d2, %r0, 16, %d0;
    mad.wide.u32 %d3, %r0, 16, %d1;
    setp.lt.u32 %p1, %r0, 24;
    mov.u32 %r10, 0x0; mov.u32 %r11, 0x0; mov.u32 %r12, 0x0; mov.u32 %r13, 0x0;
    @%p1 ld.global.nc.L1::no_allocate.L2::128B.v4.b32 { %r10, %r11, %r12, %r13 }, [ %d2 + 0 ];
    st.global.cs.v2.b32 [%d3], { %r10, %r11 };
    @!%p1 st.global.v2.b32 [%d3+8], {%r12, %r13};
    """
    make(body, 2).run([source, sink], (1,))
    want = np.full((32, 4), np.nan, np.float32)
    want[:24, :2], want[24:] = source.reshape(32, 4)[:24, :2], 0
    np.testing.assert_array_equal(sink.reshape(32, 4), want)


def test_narrow_loads_extend_into_wide_registers():
    source = np.arange(-16, 16, dtype=np.int8)
    for kind, want in (("s8", source), ("u8", source.view(np.uint8))):
        sink = np.zeros(32, np.int32)
        body = f"""
        cvt.u64.u32 %d2, %r0; add.s64 %d2, %d2, %d0; ld.global.{kind} %r2, [%d2];
        mad.wide.u32 %d3, %r0, 4, %d1; st.global.b32 [%d3], %r2;"""
        make(body, 2).run([source, sink], (1,))
        np.testing.assert_array_equal(sink, want)


@pytest.mark.parametrize(
    ("mode", "step", "clamp", "source"),
    [
        ("bfly", 5, 31, [k ^ 5 for k in range(32)]),
        ("up", 3, 0, [k - 3 if k >= 3 else k for k in range(32)]),
        ("down", 4, 31, [k + 4 if k + 4 < 32 else k for k in range(32)]),
        ("idx", 7, 31, [7] * 32),
        ("bfly", 1, 31, [k ^ 1 for k in range(32)]),
        ("idx", 2, 8 + (24 << 8), [k & 24 | 2 for k in range(32)]),  # groups of eight
    ],
)
def test_shuffles(mode, step, clamp, source):
    a = numbers(np.uint32)
    text = f"shfl.sync.{mode}.b32 {{0}}|%p1, {{1}}, {step}, {clamp}, -1"
    if mode == "idx" and clamp != 31:
        text = f"shfl.sync.idx.b32 {{0}}, {{1}}, {step}, 0x181f, 0xffffffff"
    np.testing.assert_array_equal(elementwise(text, [a], np.uint32), a[source])


def matrix_kernel(kind, depth):
    """One warp multiplies a (16, depth) by (8, depth) transposed, through shared memory."""
    registers = depth // 8
    a = ", ".join(f"%r{20 + k}" for k in range(2 * registers))
    b = ", ".join(f"%r{30 + k}" for k in range(registers))
    # ldmatrix: lanes give the rows of the 8x8 blocks (rows 0-7, 8-15, then the next columns).
    loads_b = f"ldmatrix.sync.aligned.m8n8.x{registers}.shared.b16 {{{b}}}, [%r8+{32 * depth}];"
    return f"""
    cvta.to.global.u64 %d3, %d0; cvta.to.global.u64 %d4, %d1;
    mov.u32 %r2, smem;
    // every thread copies {depth // 2} numbers of a and {depth // 4} of b
    mul.lo.s32 %r3, %r0, {depth}; cvt.u64.u32 %d5, %r3; add.s64 %d3, %d3, %d5;
    add.s32 %r4, %r2, %r3;
    mul.lo.s32 %r5, %r0, {depth // 2}; cvt.u64.u32 %d6, %r5; add.s64 %d4, %d4, %d6;
    add.s32 %r6, %r2, %r5;
    {copy("%d3", "%r4", depth)}
    {copy("%d4", "%r6", depth // 2, 32 * depth)}
    bar.sync 0;
    and.b32 %r7, %r0, 15; mul.lo.s32 %r7, %r7, {2 * depth}; shr.u32 %r9, %r0, 4;
    shl.b32 %r9, %r9, 4; add.s32 %r7, %r7, %r9; add.s32 %r7, %r7, %r2;
    ldmatrix.sync.aligned.m8n8.x{2 * registers}.shared.b16 {{{a}}}, [%r7];
    and.b32 %r8, %r0, 7; mul.lo.s32 %r8, %r8, {2 * depth}; shr.u32 %r9, %r0, 3; and.b32 %r9, %r9, 1;
    shl.b32 %r9, %r9, 4; add.s32 %r8, %r8, %r9; add.s32 %r8, %r8, %r2;
    {loads_b}
    mov.b32 %r40, 0f3F800000; mov.b32 %r41, %r40; mov.b32 %r42, %r40; mov.b32 %r43, %r40;
    mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32
      {{%r40, %r41, %r42, %r43}}, {{{a}}}, {{{b}}}, {{%r40, %r41, %r42, %r43}};
    shr.u32 %r10, %r0, 2; and.b32 %r11, %r0, 3; shl.b32 %r10, %r10, 5; shl.b32 %r11, %r11, 3;
    add.s32 %r10, %r10, %r11; cvt.u64.u32 %d7, %r10; add.s64 %d7, %d7, %d2;
    st.global.v2.b32 [%d7], {{%r40, %r41}};
    st.global.v2.b32 [%d7+256], {{%r42, %r43}};
    """


def copy(source, sink, size, offset=0):
    return "".join(
        f"ld.global.b32 %r50, [{source}+{k}]; st.shared.b32 [{sink}+{offset + k}], %r50;\n"
        for k in range(0, size, 4)
    )


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", BF16), ("f16", np.float16)])
@pytest.mark.parametrize("depth", [8, 16])
def test_matrix_products(kind, dtype, depth):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(16, depth)).astype(dtype), rng.normal(size=(8, depth)).astype(dtype)
    out = np.full((16, 8), np.nan, np.float32)
    report = make(matrix_kernel(kind, depth), 3).run([a, b, out], (1,), shared_bytes=48 * depth)
    exact = a.astype(np.float64) @ b.astype(np.float64).T + 1
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-6)
    assert report.instructions[f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"] == 1


def test_matrix_product_in_tf32_drops_thirteen_bits():
    # A lane reads a(g, t), a(g+8, t), a(g, t+4), a(g+8, t+4), b(t, g), b(t+4, g) from memory.
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(8, 8)).astype(np.float32)
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    fragments = np.stack(
        [a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4], b[t, g], b[t + 4, g], 0 * g, 0 * g], 1
    ).astype(np.float32)
    out = np.zeros((32, 4), np.float32)
    body = """
    mad.wide.u32 %d2, %r0, 32, %d0; mad.wide.u32 %d3, %r0, 16, %d1;
    ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d2];
    ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%d2+16];
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r10, %r11, %r12, %r13},
      {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%r8, %r8, %r8, %r8};
    st.global.v4.b32 [%d3], {%r10, %r11, %r12, %r13};"""
    make(body, 2).run([fragments, out], (1,))

    def cut(value):
        return (value.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)

    exact = cut(a) @ cut(b)
    want = np.stack(
        [exact[g, 2 * t], exact[g, 2 * t + 1], exact[g + 8, 2 * t], exact[g + 8, 2 * t + 1]], 1
    )
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)


def test_matrices_are_stored_and_loaded_transposed():
    a = numbers(np.uint32)  # an 8x8 matrix of 16-bit numbers, two a lane
    text = (
        "mov.u32 %r2, smem; and.b32 %r3, %r0, 7; shl.b32 %r3, %r3, 4; add.s32 %r2, %r2, %r3;"
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {{{1}}};"
        "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {{{0}}}, [%r2]"
    )
    body = f"""
    mad.wide.u32 %d2, %r0, 4, %d0; mad.wide.u32 %d3, %r0, 4, %d1; ld.global.b32 %r10, [%d2];
    {text.format("%r9", "%r10")}; st.global.b32 [%d3], %r9;"""
    out = np.zeros(32, np.uint32)
    make(body, 2).run([a, out], (1,), shared_bytes=128)
    np.testing.assert_array_equal(
        out.view(np.uint16).reshape(8, 8), a.view(np.uint16).reshape(8, 8).T
    )


SUM = """
  mov.b32 %r5, 0f00000000; mov.u32 %r4, 0;
  mul.wide.u32 %d4, %r1, 4; add.s64 %d4, %d4, %d0; ld.global.b32 %r3, [%d4];  // trips
$L_loop:
  setp.ge.s32 %p1, %r4, %r3;
  @%p1 bra $L_done;
  add.rn.f32 %r5, %r5, 0f3F800000; add.s32 %r4, %r4, 1;
  bra.uni $L_loop;
$L_done:
  mad.lo.s32 %r6, %r1, 32, %r0; mad.wide.u32 %d5, %r6, 4, %d1; st.global.b32 [%d5], %r5;
"""


@pytest.mark.parametrize("trips", [[3, 3, 3], [5, 0, 2]], ids=["uniform", "by program"])
def test_loops(trips):
    out = np.zeros((3, 32), np.float32)
    report = make(SUM, 2).run([np.array(trips, np.int32), out], (3,))
    np.testing.assert_array_equal(out, np.array(trips, np.float32)[:, None].repeat(32, 1))
    assert report.instructions["add.rn.f32"] == sum(trips)
    assert report.instructions["setp.ge.s32"] == sum(trips) + 3


def test_threads_of_a_warp_part_and_meet_again():
    body = """
    mad.wide.u32 %d2, %r0, 4, %d0;
    and.b32 %r3, %r0, 1; setp.eq.s32 %p1, %r3, 0; mov.u32 %r4, 100;
    @%p1 bra $L_even;
    add.s32 %r4, %r4, 1;
    bra.uni $L_join;
$L_even:
    add.s32 %r4, %r4, 2;
$L_join:
    shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;   // needs the whole warp
    st.global.b32 [%d2], %r5;"""
    out = np.zeros(32, np.int32)
    make(body).run([out], (1,))
    assert out.tolist() == [101, 102] * 16


# Each of four warps writes its number, and adds that of the next warp to the sum of the last round.
EXCHANGE = """
  shr.u32 %r2, %r0, 5; add.s32 %r3, %r2, 1; and.b32 %r3, %r3, 3;
  shl.b32 %r4, %r2, 2; shl.b32 %r5, %r3, 2; mov.u32 %r10, smem;
  add.s32 %r4, %r4, %r10; add.s32 %r5, %r5, %r10; mov.u32 %r6, %r2; mov.u32 %r8, 0;
$L_again:
  st.shared.b32 [%r4], %r6;
  {first}
  ld.shared.b32 %r7, [%r5];
  {second}
  add.s32 %r6, %r7, 10; add.s32 %r8, %r8, 1; setp.lt.s32 %p1, %r8, 3;
  @%p1 bra $L_again;
  mad.wide.u32 %d2, %r0, 4, %d0; st.global.b32 [%d2], %r6;
"""


def exchange(first, second, order):
    out = np.zeros(128, np.int32)
    kernel = make(EXCHANGE.format(first=first, second=second), threads=128)
    kernel.run([out], (1,), shared_bytes=16, order=order)
    return out[::32].tolist()


@pytest.mark.parametrize("order", ["lockstep", "ascending", "descending"])
def test_barriers(order):
    assert exchange("bar.sync 0;", "barrier.sync.aligned 0;", order) == [33, 30, 31, 32]


def test_a_missing_barrier_shows_in_the_order_of_the_warps():
    right = exchange("bar.sync 0;", "bar.sync 0;", "lockstep")
    assert exchange("", "", "lockstep") == right  # hidden
    assert exchange("", "", "ascending") != right
    assert exchange("bar.sync 0;", "", "descending") != right


def test_exited_threads_hold_no_barrier_up():
    body = """
    setp.ge.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;
    mad.wide.u32 %d2, %r0, 4, %d0; st.global.b32 [%d2], %r0;"""
    out = np.full(64, -1, np.int32)
    make(body, threads=64).run([out], (1,))
    assert out.tolist() == [*range(32), *[-1] * 32]


def asynchronous_copy(wait):
    body = f"""
    mov.u32 %r2, smem; shl.b32 %r3, %r0, 4; add.s32 %r2, %r2, %r3;
    mad.wide.u32 %d2, %r0, 16, %d0; mad.wide.u32 %d3, %r0, 4, %d1;
    setp.lt.u32 %p1, %r0, 16; selp.b32 %r5, 16, 0, %p1;
    cp.async.cg.shared.global.L2::128B [ %r2 + 0 ], [ %d2 + 0 ], 0x10, %r5;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r4, [%r2+4]; st.global.b32 [%d3], %r4;"""
    out = np.zeros(32, np.float32)
    source = np.arange(64, dtype=np.float32)  # 16 threads' worth: the others must not read
    make(body, 2).run([source, out], (1,), shared_bytes=512)
    return out


def test_asynchronous_copies_land_when_they_are_waited_for():
    want = np.where(np.arange(32) < 16, 4 * np.arange(32) + 1, 0)
    np.testing.assert_array_equal(asynchronous_copy("cp.async.wait_group 0x0;"), want)
    np.testing.assert_array_equal(asynchronous_copy("cp.async.wait_all;"), want)
    assert np.isnan(asynchronous_copy("")).all()
    assert np.isnan(asynchronous_copy("cp.async.wait_group 1;")).all()


def test_special_registers_and_scalars():
    text = HEADER.format(
        body="""
        mad.lo.s32 %r4, %r2, 10, %r1; mov.u32 %r5, %ctaid.z; mad.lo.s32 %r4, %r5, 100, %r4;
        mov.u32 %r6, %nctaid.x; mad.lo.s32 %r4, %r6, 1000, %r4;
        mov.u32 %r6, %ctaid.y; mad.lo.s32 %r7, %r5, 3, %r6; mad.lo.s32 %r7, %r7, 2, %r1;
        mad.wide.u32 %d1, %r7, 4, %d0; cvt.rn.f32.s32 %r4, %r4; add.f32 %r4, %r4, %r3;
        st.global.b32 [%d1], %r4;""",
        threads=32,
        parameters=".param .u64 out, .param .u32 shift, .param .f32 half",
        loads="ld.param.u64 %d0, [out]; ld.param.u32 %r20, [shift]; ld.param.f32 %r3, [half];"
        "mov.u32 %r2, %ctaid.y; add.s32 %r2, %r2, %r20;",
    )
    out = np.zeros((4, 3, 2), np.float32)
    Kernel(text).run([out, 5, 0.5], (2, 3, 4))
    z, y, x = np.indices(out.shape)
    np.testing.assert_array_equal(out, 2000 + 100 * z + 10 * (y + 5) + x + 0.5)


def test_unset_registers_and_shared_memory_are_nan():
    body = "mov.u32 %r3, smem; ld.shared.b32 %r4, [%r3]; {} st.global.b32 [%d0], {};"
    out = np.zeros(1, np.float32)
    make(body.format("", "%r4")).run([out], (1,), shared_bytes=4)
    assert np.isnan(out[0])
    make(body.format("add.f32 %r5, %r6, 0f3F800000;", "%r5")).run([out], (1,), shared_bytes=4)
    assert np.isnan(out[0])


def test_traffic_of_a_known_pattern():
    # Two programs: every thread reads 4 bytes of its own and 16 that its warp shares; every other
    # thread writes 2 bytes.
    body = """
    mad.lo.s32 %r2, %r1, 32, %r0; mad.wide.u32 %d3, %r2, 4, %d0; ld.global.b32 %r3, [%d3];
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d1+32];
    cvt.u16.u32 %h1, %r3; mad.wide.u32 %d4, %r2, 2, %d2; and.b32 %r8, %r0, 1;
    setp.eq.s32 %p1, %r8, 0; @%p1 st.global.b16 [%d4], %h1;"""
    own, shared = np.zeros(64, np.float32), np.zeros(16, np.float32)
    out = np.zeros(64, np.uint16)
    report = make(body, 3).run([own, shared, out], (2,))
    assert report.arrays == [
        Traffic(read=256, unique_read=256, requested_read=256),
        Traffic(read=64 * 16, unique_read=32, requested_read=2 * 32),
        Traffic(written=64, unique_written=128, requested_written=128),
    ]
    assert report.shared == SharedTraffic()


@pytest.mark.parametrize(
    ("stride", "width", "passes"),
    [(4, 4, 1), (8, 4, 2), (128, 4, 32), (0, 4, 1), (16, 16, 4), (8, 8, 2), (2, 2, 1)],
)
def test_bank_conflicts(stride, width, passes):
    vector = {2: "b16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[width]
    registers = {2: "%h1", 4: "%r4", 8: "{%r4, %r5}", 16: "{%r4, %r5, %r6, %r7}"}[width]
    body = f"mov.u32 %r2, smem; mad.lo.s32 %r3, %r0, {stride}, %r2;"
    body += f"ld.shared.{vector} {registers}, [%r3];"
    report = make(body).run([np.zeros(1)], (3,), shared_bytes=4096)
    ideal = max(1, width // 4)
    assert report.shared == SharedTraffic(3, 3 * passes, 3 * (passes - ideal))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("unit", "bound"), [("ex2", 2**-22), ("rcp", 2**-23), ("tanh", 2**-11), ("rsqrt", 2**-22.9)]
)
def test_worst_units_are_off_by_their_bound(unit, bound, sign):
    a = numbers(np.float32, 1, 0.5, 4.0)
    body = f"mad.wide.u32 %d2, %r0, 4, %d0; ld.global.b32 %r3, [%d2]; {unit}.approx.f32 %r3, %r3;"
    kernel = make(body + "st.global.b32 [%d2], %r3;")
    exact, worst = a.copy(), a.copy()
    kernel.run([exact], (1,))
    kernel.run([worst], (1,), approx=worst_case(sign))
    error = worst.astype(np.float64) / exact - 1
    np.testing.assert_allclose(error, sign * bound, atol=2**-23)  # rounding to float32
    assert (error * sign > 0).any()


def test_worst_logarithm_and_sine():
    a = np.array([0.25, 0.999, 1.0, 1.5, 64.0] + [1.0] * 27)
    error = worst_case()["lg2"](a) - np.log2(a)
    np.testing.assert_allclose(error[:5] * 2**22, [2, 1, 1, 1, 6], rtol=1e-6)
    error = worst_case(-1)["sin"](np.array([6.0, 7.0])) - np.sin([6.0, 7.0])
    np.testing.assert_allclose(error, [-(2**-20.5), -(2**-14.7)], rtol=1e-6)


FAULTS = [
    ("ld.global.b32 %r3, [%d0+128];", "128 bytes after the start of array 0, which has 128"),
    ("ld.global.b32 %r3, [%d0+-4];", "outside of every array"),
    ("mad.wide.u32 %d2, %r0, 8, %d0; ld.global.b32 %r3, [%d2];", r"program (0, 0, 0) thread 16"),
    ("ld.global.b32 %r3, [%d0+2];", "not a multiple of 4"),
    ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%d0+8];", "not a multiple of 16"),
    ("mov.u64 %d2, 0; ld.global.b32 %r3, [%d2];", "outside of every array"),
    ("cvt.u32.u64 %r3, %d0; cvt.u64.u32 %d2, %r3; ld.global.b32 %r3, [%d2];", "outside of every"),
    ("mov.u32 %r3, smem; ld.shared.b32 %r4, [%r3+64];", "outside of its 64 bytes"),
    ("mov.u32 %r3, smem; st.shared.b32 [%r3+6], %r0;", "not a multiple of 4 of shared memory"),
    ("st.global.b32 [%d0], %r0;", "different values at one address"),
    ("st.global.b32 [%d1], %r1;", "array 1, read-only"),
    (
        "setp.lt.u32 %p1, %r0, 9; @%p1 bra $L_x; add.s32 %r2, %r0, 1; bra.uni $L_y; $L_x: "
        "shfl.sync.idx.b32 %r2, %r0, 0, 31, -1; $L_y: ret;",
        "by a part of a warp",
    ),
    ("$L_x: bra.uni $L_x;", "no end after"),
]


@pytest.mark.parametrize(("body", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_faults_are_caught(body, message):
    fixed = np.zeros(32, np.float32)
    fixed.flags.writeable = False
    with pytest.raises(PtxError, match="test: .*") as caught:
        make(body, 2).run(
            [np.zeros(32, np.float32), fixed], (1,), shared_bytes=64, max_instructions=1000
        )
    assert message in str(caught.value)


def test_addresses_of_idle_threads_are_not_checked():
    body = """
    mad.wide.u32 %d2, %r0, 4, %d0; setp.lt.u32 %p1, %r0, 8;
    @%p1 ld.global.b32 %r3, [%d2]; @%p1 st.global.b32 [%d2], %r0;"""
    out = np.zeros(8, np.int32)
    make(body).run([out], (1,))
    assert out.tolist() == list(range(8))


@pytest.mark.parametrize(
    "text",
    [
        "wgmma.fence.sync.aligned;",
        "atom.global.add.f32 %r3, [%d0], %r3;",
        "add.rz.bf16 %h3, %h3, %h3;",
        "max.s32 %r3, %r3, %r3, %r3;",
        "add.f32 %r3, %r3;",
        "cvt.rz.bf16.f32 %h1, %r3;",
        "ld.b32 %r3, [%d0];",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r3}, {%r4}, {%r5}, {%r6};",
        "mad.wide.s32 %r3;",
    ],
)
def test_an_unknown_instruction_is_named(text):
    with pytest.raises(PtxError, match="test: the emulator does not know the instruction") as e:
        make(text)
    assert text.rstrip(";") in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("add.s32 %r3, %nowhere, 1;", "cannot read %nowhere"),
        ("add.s32 nowhere, %r3, 1;", "cannot write nowhere"),
        ("add.s64 %d3, %r3, 1;", "%r3 is too narrow"),
        ("bra $L_nowhere;", "there is no label $L_nowhere"),
    ],
)
def test_texts_that_make_no_sense(text, message):
    with pytest.raises(PtxError) as caught:
        make(text)
    assert message in str(caught.value)


def test_arguments_that_do_not_fit():
    kernel, out = make("add.s32 %r3, %r0, 1;"), np.zeros(32, np.float32)
    for arguments, grid, options, message in (
        ([out, out], (1,), {}, "got 2 arguments for 1 parameters"),
        ([out.reshape(4, 8).T], (1,), {}, "array 0 is not C-contiguous"),
        ([out], (1, 0), {}, "has no program"),
        ([out], (1,), {"order": "random"}, "order must be one of"),
        ([out], (1,), {"approx": {"exp": np.exp}}, "approx has ['exp']"),
    ):
        with pytest.raises(ValueError, match="test: ") as caught:
            kernel.run(arguments, grid, **options)
        assert message in str(caught.value)
    with pytest.raises(PtxError, match="'other' is not one of \\['test'\\]"):
        Kernel(HEADER.format(body="", threads=32, parameters="", loads=""), "other")
    with pytest.raises(PtxError, match="48, 1, 1\\) threads are no multiple of a warp"):
        make("", threads=48)
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 2"):
        worst_case(2)


def test_one_array_under_two_names():
    body = "mad.wide.u32 %d2, %r0, 4, %d0; ld.global.b32 %r3, [%d2]; add.s32 %r3, %r3, 1;"
    body += "mad.wide.u32 %d2, %r0, 4, %d1; st.global.b32 [%d2], %r3;"
    array = np.arange(32, dtype=np.int32)
    report = make(body, 2).run([array, array], (1,))
    assert array.tolist() == list(range(1, 33))
    assert report.arrays[0] is report.arrays[1]
