"""The Pallas gradient of the causal convolution: as plain JAX on the CPU, as PTX, and on a GPU.

The tests of the PTX run it in the emulator and need the packages of the extra [aot], no GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from stretchysnake_bench import aot, emulate, sass
from stretchysnake_kernels import bidirectional_causal_conv1d, causal_conv1d
from stretchysnake_kernels.causal_conv1d import pallas
from stretchysnake_kernels.causal_conv1d.arg_specs import ArgSpec, make_args
from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import gpu

# Relative error of a whole array, in the 2-norm.
TOLERANCES = {"float32": 5e-6, "bfloat16": 3e-3, "float16": 4e-4}
DIRECTIONS = ("forward", "reverse", "both")
# The tests' time is compilation.
FAST = {"xla_backend_optimization_level": 0}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
compiled = pytest.mark.skipif(
    aot.missing_packages() is not None, reason=str(aot.missing_packages())
)


def make_case(
    length, directions="both", dtype="float32", *, batch=2, channels=40, width=4, scale=1
):
    """Returns (x, weight, bias) and a cotangent; weight and bias are float32."""
    rng = np.random.default_rng(1)
    spec = ArgSpec("", batch, length, channels, width)
    each = [make_args(spec, seed) for seed in range(2)]
    x, weight, bias = (np.stack([args[name] for args in each]) for name in each[0])
    d_y = rng.normal(size=x.shape)
    if directions != "both":
        weight, bias, d_y = weight[0], bias[0], d_y[0]
    return (jnp.asarray(x[0], dtype), scale * weight, bias), jnp.asarray(d_y, dtype)


def make_gradient(directions, activation="silu", implementation="pallas"):
    """Returns the function (args, d_y) -> (y, gradients of args)."""
    options = dict(activation=activation, implementation=implementation)
    op = functools.partial(bidirectional_causal_conv1d, **options)
    if directions != "both":
        op = functools.partial(causal_conv1d, reverse=directions == "reverse", **options)

    def gradient(args, d_y):
        y, pullback = jax.vjp(op, *args)
        return y, pullback(d_y)

    return gradient


def interpreted(gradient, *args):
    """Runs a function with its kernels as plain JAX."""
    with gpu.interpret():
        return jax.jit(gradient, compiler_options=FAST)(*args)


def assert_same(got, args, d_y, directions, activation="silu"):
    """Asserts that y and its gradients are those of the reference in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda value: np.asarray(value, np.float64), (args, d_y))
        gradient = make_gradient(directions, activation, "reference")
        want = jax.jit(gradient, compiler_options=FAST)(*wide)
        want = jax.tree.map(np.asarray, want)
    for i, (mine, exact) in enumerate(
        zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ):
        assert mine.shape == exact.shape
        error = np.linalg.norm(np.asarray(mine, np.float64) - exact) / np.linalg.norm(exact)
        assert error <= TOLERANCES[mine.dtype.name], f"array {i}: {error}"


# The algorithm


@pytest.mark.parametrize(
    "length, directions, dtype, options",
    [
        (1, "both", "float32", {}),
        (pallas.FEWEST + 1, "both", "bfloat16", {}),
        (37, "forward", "float32", {}),
        (13, "reverse", "float32", {"width": 8, "scale": 50}),
        slow(3, "both", "bfloat16", {}),
        slow(37, "reverse", "bfloat16", {}),
        slow(pallas.FEWEST + 1, "both", "float32", {}),
        slow(9, "both", "float32", {"width": 1}),
        slow(13, "both", "float32", {"width": 8, "scale": 50}),
        slow(37, "both", "float16", {}),
        slow(2, "both", "float32", {"width": 8}),
        slow(37, "reverse", "float32", {"width": 2, "channels": 128}),
    ],
)
def test_gradients(length, directions, dtype, options):
    args, d_y = make_case(length, directions, dtype, **options)
    assert_same(interpreted(make_gradient(directions), args, d_y), args, d_y, directions)


@pytest.mark.parametrize("directions", ["both", *map(slow, DIRECTIONS[:2])])
@pytest.mark.parametrize("chunks, width", [(3, 4), slow(99, 8)])
def test_chunks_give_the_same(chunks, width, directions):
    args, d_y = make_case(30, directions, width=width)
    with gpu.options(chunks=chunks):
        got = interpreted(make_gradient(directions), args, d_y)
    assert_same(got, args, d_y, directions)


def test_without_activation_and_bias():
    (x, weight, _), d_y = make_case(10, "reverse")
    got = interpreted(make_gradient("reverse", None), (x, weight), d_y)
    assert_same(got, (x, weight), d_y, "reverse", None)


def test_vmap_of_everything():
    cases = [make_case(9, "forward"), make_case(9, "forward", scale=2)]
    args, d_y = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    got = interpreted(jax.vmap(make_gradient("forward")), args, d_y)
    for i, case in enumerate(cases):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], got), *case, "forward")


@pytest.mark.parametrize("remat", [False, True])
def test_it_is_the_default_on_a_gpu_inside_shard_map(remat):
    """The mesh types of the kernel's results are right; JAX's interpreter does not keep them."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(*args):
        with gpu.compile_for(gpu.Target()):
            return jnp.sum(bidirectional_causal_conv1d(*args, activation="silu"))

    loss = jax.checkpoint(loss) if remat else loss
    specs = (P("data"), P(), P())
    inside = jax.shard_map(jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=specs, out_specs=specs)
    whole = jax.shard_map(
        lambda *args: jax.lax.psum(loss(*args), "data"), mesh=mesh, in_specs=specs, out_specs=P()
    )
    args, _ = make_case(9)
    for function in (inside, jax.grad(whole, (0, 1, 2))):
        (kernel,) = aot.find_kernels(jax.make_jaxpr(function)(*args).jaxpr)
        assert "causal_conv1d_gradient" in str(kernel.params)


def test_what_it_does_not_take():
    (x, weight, bias), _ = make_case(9)
    run = functools.partial(pallas.bidirectional_causal_conv1d, activation=None)
    with pytest.raises(Unsupported, match="^runs on GPUs, the default device is a cpu$"):
        run(x, weight, bias)
    with gpu.interpret(), pytest.raises(Unsupported, match="^takes up to 8 taps, got 9$"):
        run(x, jnp.ones((2, 9, 40)), bias)
    with (
        gpu.interpret(),
        jax.enable_x64(True),
        pytest.raises(Unsupported, match=r"^takes float32 or .*, x is float64$"),
    ):
        run(jnp.ones(x.shape, "float64"), weight, bias)
    with (
        gpu.compile_for(gpu.Target(capability=(7, 5))),
        pytest.raises(Unsupported, match="^takes compute capability 8.0 and up, the GPU has 7.5$"),
    ):
        run(x, weight, bias)


@pytest.mark.parametrize(
    "warps, length, want",
    [
        (144, 1569, 105),  # 15 chunks: 16 warps for each of 132 multiprocessors
        (18, 1569, pallas.FEWEST),
        (10**4, 50177, pallas.MOST),
    ],
)
def test_choose_chunk(warps, length, want):
    assert pallas.choose_chunk(warps, length, 132) == want


# The compiled kernel


@compiled
@pytest.mark.parametrize(
    "target, length, directions, dtype",
    [
        ("8.0", pallas.FEWEST + 1, "both", "float32"),
        ("9.0", 37, "both", "bfloat16"),
        ("9.0", 3, "reverse", "float32"),
        *(
            slow(target, length, directions, dtype)
            for target in ("8.0", "9.0")
            for length in (1, 3, pallas.FEWEST + 1, 37)
            for directions in DIRECTIONS
            for dtype in ("float32", "bfloat16")
        ),
    ],
)
def test_ptx_computes_the_reference(target, length, directions, dtype):
    args, d_y = make_case(length, directions, dtype)
    with gpu.compile_for(gpu.Target(tuple(map(int, target.split("."))))):
        got, _ = emulate.emulate(make_gradient(directions), args, d_y, target=target)
    assert_same(got, args, d_y, directions)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize(
    "directions, registers, instructions", [("both", 96, 56), ("forward", 72, 32)]
)
@pytest.mark.parametrize("target", ["9.0", slow("8.0")])
def test_resources_and_traffic(target, directions, registers, instructions):
    """Limits at the chunk length of batch 8 of VideoMamba-M: 0 spills, and bytes near the least."""
    length, channels = 216, pallas.CHANNELS
    args, d_y = make_case(length, directions, "bfloat16", batch=1, channels=channels)
    with gpu.compile_for(gpu.Target(tuple(map(int, target.split("."))))), gpu.options(chunks=2):
        _, (run,) = emulate.emulate(make_gradient(directions), args, d_y, target=target)
    resources = sass.measure(run.kernel)
    assert resources.spill_stores == resources.spill_loads == 0
    assert resources.registers <= registers
    # A turn handles two channels per thread.
    turn = resources.main_loop
    assert turn.total / turn.instructions["STG"] / 2 <= instructions
    assert not any(word in run.kernel.ptx for word in ("atom.", "red.", "shfl.", "bar.", ".shared"))
    size = 2 * length * channels
    least = (4 if directions == "both" else 3) * size
    moved = sum(array.unique_read + array.unique_written for array in run.report.arrays)
    *_, d_weight, d_bias = run.report.arrays
    read_again = d_weight.unique_written + d_bias.unique_written  # by XLA, which adds them up
    assert moved + read_again <= 1.12 * least


@compiled
def test_xla_fuses_the_forward_pass():
    """One kernel with nothing in between, which is why there is none of ours."""
    (x, weight, bias), _ = make_case(300, dtype="bfloat16", channels=64)
    op = functools.partial(bidirectional_causal_conv1d, activation="silu")
    with gpu.compile_for(gpu.Target()):
        program = aot.compile_for(op, x, weight, bias)
    assert len(program.kernels) == 1 and program.temp_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("length", [1, 1569])
def test_on_a_gpu(length, directions, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, JAX's default device is a {jax.default_backend()}")
    args, d_y = make_case(length, directions, dtype, channels=384)
    got = jax.jit(make_gradient(directions))(args, d_y)
    with jax.default_device(jax.devices("cpu")[0]):
        assert_same(got, *jax.device_get((args, d_y)), directions)
