"""Ahead-of-time compilation without a GPU, and the emulator on what it gives."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from stretchysnake_bench import aot, emulate, sass
from stretchysnake_bench.ptx_emulator import worst_case

MISSING = aot.missing_packages()
needs_compiler = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry steps(.param .u64 out)
.reqntid 32
{
  .reg .pred %p1; .reg .b32 %r<4>; .reg .f32 %f<3>; .reg .b64 %d<3>;
  ld.param.u64 %d1, [out];
  mov.u32 %r1, %tid.x; mov.u32 %r2, 0; mov.f32 %f1, 0f3F800000;
$L_again:
  ex2.approx.ftz.f32 %f2, %f1; fma.rn.f32 %f1, %f2, %f2, %f1;
  add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, %r1;
  @%p1 bra $L_again;
  mad.wide.u32 %d2, %r1, 4, %d1; st.global.f32 [%d2], %f1;
  ret;
}
"""


def walk(x, y):
    """A recurrence with a carry, over rows of 32, with a second kernel that fills y's place."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    def decay(x_ref, out_ref):
        def step(t, h):
            h = jnp.exp2(-jnp.abs(x_ref[t, :])) * h + x_ref[t, :]
            out_ref[t, :] = h
            return h

        lax.fori_loop(0, x_ref.shape[0], step, jnp.zeros(32, jnp.float32))

    def add_rows(x_ref, y_ref, out_ref):
        out_ref[...] = y_ref[...] + jnp.sum(x_ref[...], axis=0)

    one = plgpu.CompilerParams(num_warps=1)
    row = pl.BlockSpec((x.shape[0], 32), lambda i: (0, i))
    h = pl.pallas_call(
        decay,
        grid=(x.shape[1] // 32,),
        in_specs=[row],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=one,
        name="decay",
    )(x)
    total = pl.pallas_call(
        add_rows,
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        input_output_aliases={1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=2),
        name="add_rows",
    )(h[:16], y)
    return {"h": h, "total": 2 * total}


def numpy_walk(x, y):
    x, h, rows = x.astype(np.float64), 0, []
    for row in x:
        h = np.exp2(-np.abs(row)) * h + row
        rows.append(h)
    return np.stack(rows), 2 * (y + np.sum(rows[:16], axis=0))


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    return rng.normal(size=(37, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)


@needs_compiler
@pytest.mark.parametrize("target", ["8.0", "9.0"])
def test_kernels_are_emulated_inside_of_a_jax_function(operands, target):
    h, total = numpy_walk(*operands)

    @jax.jit
    def function(x, y):
        return jax.checkpoint(walk)(x + 0, y)

    got, runs = emulate.emulate(function, *operands, target=target)
    np.testing.assert_allclose(got["h"], h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["total"], total, rtol=1e-5, atol=1e-5)
    assert [run.kernel.name for run in runs] == ["decay", "add_rows"]
    decay, add_rows = (run.kernel for run in runs)
    assert (decay.grid, decay.threads, add_rows.threads) == ((2, 1, 1), 32, 64)
    # Each row is read once and written once, in whole sectors.
    read, written = runs[0].report.arrays
    assert read.unique_read == read.requested_read == written.unique_written == operands[0].nbytes
    assert read.written == written.read == 0
    for order in ("ascending", "descending"):  # two warps, one sum
        again, _ = emulate.emulate(function, *operands, target=target, order=order)
        np.testing.assert_array_equal(again["total"], got["total"])


@needs_compiler
def test_worst_units_show_in_the_output(operands):
    exact, _ = emulate.emulate(walk, *operands)
    worst, _ = emulate.emulate(walk, *operands, approx=worst_case(1))
    error = np.abs(worst["h"] - exact["h"]).max()
    assert 0 < error < 1e-5


@needs_compiler
def test_kernels_and_their_resources(operands):
    decay, add_rows = aot.kernels_of(walk, *operands, target="8.0")
    assert decay.parsed.name == "decay"
    assert decay.from_pallas
    assert add_rows.shared_bytes >= 8  # two warps add up through shared memory
    got = sass.measure(decay)
    assert 8 <= got.registers <= 64
    assert (got.spill_stores, got.spill_loads, got.stack, got.static_shared) == (0, 0, 0, 0)
    assert len(got.loops) >= 1
    body = got.main_loop.instructions
    assert body["MUFU"] >= 1
    assert body["LDG"] == body["STG"] >= 1
    assert body["BAR"] == body["SHFL"] == 0
    assert "BAR" in sass.measure(add_rows).sass


@needs_compiler
def test_a_whole_program(operands):
    def step(x, y):
        def layer(h, _):
            return jnp.tanh(walk(h, y)["h"] @ jnp.ones((64, 64), h.dtype)), None

        return lax.scan(layer, x, None, length=3)[0].sum() + y.sum()

    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in operands]
    program = aot.compile_for(step, *shapes, target="h100")
    assert program.argument_bytes == sum(array.nbytes for array in operands)
    assert program.output_bytes == 4
    assert operands[0].nbytes <= program.temp_bytes < 10**6
    assert [kernel.name for kernel in program.pallas_kernels()] == ["decay"]
    assert any(not kernel.from_pallas for kernel in program.kernels)
    assert program.mosaic == {}
    assert "while" in program.hlo
    assert [k.name for k in aot.kernels_of(step, *shapes)] == ["decay", "add_rows"]
    with pytest.raises(NotImplementedError, match="a kernel inside of scan cannot be emulated"):
        emulate.emulate(step, *operands)


@needs_compiler
@pytest.mark.parametrize("target", [t for t in aot.TARGETS if t not in ("7.5", "8.0", "9.0")])
def test_every_target_compiles(operands, target):
    kernel = aot.kernels_of(walk, *operands, target=target)[0]
    assert f".target sm_{target.replace('.', '')}" in kernel.ptx
    assert sass.measure(kernel).spill_stores == 0


@needs_compiler
def test_xla_refuses_triton_before_ampere(operands):
    with pytest.raises(Exception, match="Ampere"):
        aot.kernels_of(walk, *operands, target="7.5")
    assert aot.compile_for(jnp.sin, operands[1], target="t4").output_bytes == operands[1].nbytes


@needs_compiler
def test_targets_are_named(operands):
    with pytest.raises(ValueError, match=r"target is '3.0', takes one of 7.5 \(t4\), 8.0 \(a100\)"):
        aot.compile_for(jnp.sin, operands[1], target="3.0")


@needs_compiler
def test_triton_kernels(operands):
    pytest.importorskip("jax_triton")
    import jax_triton
    import triton
    import triton.language as tl

    @triton.jit
    def scale(x_ptr, factor, out_ptr, size: tl.constexpr):
        i = tl.program_id(0) * size + tl.arange(0, size)
        tl.store(out_ptr + i, tl.load(x_ptr + i) * factor)

    out = jax.ShapeDtypeStruct((64,), jnp.float32)
    name = "out_type" if jax_triton.__version_info__ >= (0, 4) else "out_shape"
    function = functools.partial(
        jax_triton.triton_call, kernel=scale, grid=(2,), num_warps=1, size=32, **{name: out}
    )
    got, (run,) = emulate.emulate(lambda y: function(y, -2.5), operands[1], target="8.9")
    np.testing.assert_array_equal(got, -2.5 * operands[1])
    assert run.kernel.grid == (2, 1, 1)
    assert ".target sm_89" in run.kernel.ptx


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_resources_of_a_ptx_text():
    got = sass.measure(PTX)
    assert 4 <= got.registers <= 32
    body = got.main_loop.instructions
    assert body["MUFU"] == body["FFMA"] >= 1  # the assembler unrolls
    assert 2 * body["MUFU"] < got.main_loop.total <= 10 * body["MUFU"]
    with pytest.raises(RuntimeError, match="ptxas.*nonsense"):
        sass.measure(PTX.replace("ex2.approx.ftz.f32", "nonsense.f32"))
    with pytest.raises(ValueError, match="no .target line"):
        sass.measure("")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    aot.target_device.cache_clear()
    with pytest.raises(aot.AotUnavailable, match="needs jax-cuda13-plugin.*pip install .*aot"):
        aot.compile_for(jnp.sin, 1.0)
    with pytest.raises(aot.AotUnavailable, match="triton: pip install"):
        sass.measure(PTX)
