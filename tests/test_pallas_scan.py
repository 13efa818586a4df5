"""The Pallas kernels, run as plain JAX on the CPU, against the reference in float64.

What the compiled kernels compute is tested in test_gpu_kernels.py, on the PTX.
"""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import gpu, pallas, reference
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
# Relative error of a whole array, in the 2-norm.
FORWARD, GRADIENT = 2e-6, 5e-6
UNROLL = pallas.FORWARD.unroll[8]


def make_case(spec, seed=0, **change):
    """Arguments of a spec with an initial state, and cotangents of both outputs."""
    rng = np.random.default_rng(seed + 1)
    state = (spec.batch, spec.channels, spec.state)
    args = make_args(spec, seed) | {"initial_state": rng.normal(size=state)}
    args = {name: np.asarray(change.get(name, lambda v: v)(v), "f") for name, v in args.items()}
    d_y = rng.normal(size=args["x"].shape).astype("f")
    return args, (d_y, rng.normal(size=state).astype("f"))


def scan_and_gradients(scan, args, cotangents):
    """Returns the outputs of scan(args) and the gradient of every argument, under jit."""

    # The tests' time is compilation.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(args, cotangents):
        outputs, pullback = jax.vjp(scan, args)
        return outputs, pullback(cotangents)[0]

    return jax.tree.map(np.asarray, run(args, cotangents))


def interpreted(args, cotangents, chosen=None, **options):
    """`scan_and_gradients` of the kernels, launched as `chosen`."""

    def scan(args):
        with gpu.interpret(), gpu.options(**chosen or {}):
            return pallas.selective_scan(*map(args.get, NAMES), **options)

    return scan_and_gradients(scan, args, cotangents)


def exact(args, cotangents, **options):
    """`scan_and_gradients` of the reference in float64."""
    wide = functools.partial(jax.tree.map, lambda value: np.asarray(value, np.float64))

    def scan(args):
        return reference.selective_scan(*map(args.get, NAMES), **options)

    with jax.enable_x64(True):
        return scan_and_gradients(scan, wide(args), wide(cotangents))


def assert_close(got, want, tolerance, name):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    assert np.isfinite(got).all(), name
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    assert error <= tolerance, f"{name}: {error}"


def assert_same(got, want, forward=FORWARD, gradient=GRADIENT):
    for name, value, expected in zip(("y", "last_state"), got[0], want[0], strict=True):
        assert_close(value, expected, forward, name)
    assert got[1].keys() == want[1].keys()
    for name, value in got[1].items():
        assert_close(value, want[1][name], gradient, f"gradient of {name}")


def assert_exact(args, cotangents, *, delta_softplus=True, reverse=False, **chosen):
    options = dict(delta_softplus=delta_softplus, reverse=reverse)
    got = interpreted(args, cotangents, chosen, **options)
    assert_same(got, exact(args, cotangents, **options))


@pytest.mark.parametrize("length", [1, UNROLL, 37])
def test_lengths(length):
    assert_exact(*make_case(ArgSpec("", 2, length, 32, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("length", [UNROLL - 1, UNROLL + 1, 64, 150])
@pytest.mark.parametrize("reverse", [False, True])
def test_more_lengths(length, reverse):
    assert_exact(*make_case(ArgSpec("", 1, length, 64, 16)), reverse=reverse)


def test_odd_channels_and_states_from_the_end():
    assert_exact(*make_case(ArgSpec("", 1, 70, 40, 13)), reverse=True)


def test_many_states():
    assert_exact(*make_case(ArgSpec("", 1, 5, 32, 32)))


@pytest.mark.parametrize(
    "kept", [(), pytest.param(("D", "initial_state"), marks=pytest.mark.slow)], ids="+".join
)
def test_optional_arguments_and_negative_steps(kept):
    args, cotangents = make_case(ArgSpec("", 1, 20, 32, 8), delta=lambda v: 0.1 * v)
    args = {name: args[name] for name in ("x", "delta", "A", "B", "C", *kept)}
    assert_exact(args, cotangents, delta_softplus=False)


@pytest.mark.parametrize(
    "change",
    [
        {"delta": lambda v: 50 + v, "A": lambda v: 200 * v},  # all of the past is forgotten
        {"delta": lambda v: v - 9, "delta_bias": lambda v: 0 * v, "z": lambda v: 1e4 * v},
        pytest.param({"delta": lambda v: v - 1e4}, marks=pytest.mark.slow),
        pytest.param({"delta": lambda v: v + 1e4}, marks=pytest.mark.slow),
        pytest.param({"x": lambda v: 1e-30 * v}, marks=pytest.mark.slow),
    ],
    ids=["large steps", "small steps", "no steps", "huge steps", "small inputs"],
)
def test_extreme_values(change):
    assert_exact(*make_case(ArgSpec("", 1, 20, 32, 8), **change))


@pytest.mark.parametrize(
    "dtype, rounding",
    [("bfloat16", 2.5e-3), pytest.param("float16", 3e-4, marks=pytest.mark.slow)],
)
def test_half_precision(dtype, rounding):
    args, cotangents = make_case(ArgSpec("", 1, 20, 32, 8))
    args = {name: jnp.asarray(value, dtype) for name, value in args.items()}
    cotangents = jnp.asarray(cotangents[0], dtype), cotangents[1]
    got = interpreted(args, cotangents, delta_softplus=True, reverse=False)
    assert got[0][0].dtype == dtype and got[0][1].dtype == jnp.float32
    want = exact(args, cotangents, delta_softplus=True, reverse=False)
    assert_same(got, want, forward=rounding, gradient=rounding)
    assert_close(got[0][1], want[0][1], FORWARD, "last_state")  # the state stays float32


def make_two(spec):
    """Arguments of a call in both directions, which share the gate, and a cotangent."""
    (first, (d_y, _)), (second, _) = make_case(spec), make_case(spec, seed=7)
    args = {name: np.stack([first[name], second[name]]) for name in NAMES[:-1] if name != "z"}
    return args | {"z": first["z"]}, d_y


@pytest.mark.parametrize("chunks", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_both_directions_in_one_launch(chunks):
    args, d_y = make_two(ArgSpec("", 1, 75, 32, 8))

    def together(args):
        with gpu.interpret(), gpu.options(chunks=chunks):
            return pallas.bidirectional_selective_scan(
                *map(args.get, NAMES[:-1]), delta_softplus=True
            )

    def apart(args):
        def one(direction):
            own = [args[name] if name == "z" else args[name][direction] for name in NAMES[:-1]]
            options = dict(delta_softplus=True, reverse=direction == 1)
            return reference.selective_scan(*own, None, **options)[0]

        return one(0) + one(1)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda value: np.asarray(value, np.float64), (args, d_y))
        want = scan_and_gradients(apart, *wide)
    y, gradients = scan_and_gradients(together, args, d_y)
    assert_close(y, want[0], FORWARD, "y")
    for name, gradient in gradients.items():
        assert_close(gradient, want[1][name], GRADIENT, f"gradient of {name}")


def test_chunks_side_by_side_give_the_same():
    # Three chunks, the last one shorter and with tokens left over from the turns.
    args, cotangents = make_case(ArgSpec("", 1, 85, 32, 8))
    assert_exact(args, cotangents, chunks=3)


@pytest.mark.parametrize(
    "forward, backward, chunks",
    [(2, 4, None), pytest.param(4, 2, 3, marks=pytest.mark.slow)],
)
def test_programs_of_several_warps_give_the_same(forward, backward, chunks):
    """The passes share the saved states, whatever the warps of each."""
    forward, backward = gpu.Launch(2, forward), gpu.Launch(1, backward)
    case = make_case(ArgSpec("", 1, 75, 128, 8))
    assert_exact(*case, forward=forward, backward=backward, chunks=chunks)


def grids(channels, warps):
    """Returns the grid of the forward and of the backward kernel."""
    args, cotangents = make_case(ArgSpec("", 1, 3, channels, 8))
    launch = gpu.Launch(1, warps)

    def scan(args):
        with gpu.interpret(), gpu.options(forward=launch, backward=launch):
            scan = functools.partial(pallas.selective_scan, delta_softplus=True, reverse=False)
            return scan(*map(args.get, NAMES))

    traced = jax.make_jaxpr(lambda args, d: jax.vjp(scan, args)[1](d))(args, cotangents)
    return re.findall(r"grid=\((\d+),\)", str(traced))


@pytest.mark.parametrize(
    "channels, warps, programs",
    [(128, 4, "1"), (128, 1, "4"), (192, 4, "3"), (96, 8, "3"), (100, 4, "1")],
)
def test_blocks_of_channels_divide_them(channels, warps, programs):
    assert grids(channels, warps) == [programs] * 2


@pytest.mark.slow
def test_more_chunks_than_spans():
    args, cotangents = make_case(ArgSpec("", 2, 150, 32, 8))
    assert_exact(args, cotangents, chunks=99, reverse=True)


@pytest.mark.slow
def test_vmap_joins_the_batch():
    cases = [make_case(ArgSpec("", 2, 20, 32, 8), seed)[0] for seed in range(3)]
    args = jax.tree.map(lambda *leaves: np.stack(leaves), *cases)

    def loss(args):
        with gpu.interpret():
            y, _ = pallas.selective_scan(*map(args.get, NAMES), delta_softplus=True, reverse=False)
        return jnp.sum(jnp.sin(y))

    got = jax.jit(jax.vmap(jax.grad(loss)))(args)
    one = jax.jit(jax.grad(loss))
    for i, case in enumerate(cases):
        for name, gradient in one(case).items():
            assert_close(got[name][i], gradient, 1e-6, name)


def test_gradients_are_deterministic_and_need_little_memory():
    """Between the passes lie the arguments and at most a byte per element."""
    args, _ = make_case(ArgSpec("", 1, 1000, 32, 16))
    args = jax.tree.map(jnp.asarray, args)

    def kept(args):
        with gpu.interpret():
            scan = functools.partial(pallas.selective_scan, delta_softplus=True, reverse=False)
            return jax.vjp(lambda args: scan(*map(args.get, NAMES))[0], args)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, args))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    arguments = sum(value.nbytes for value in args.values())
    assert total <= arguments + args["x"].size


# The calling side


@pytest.mark.parametrize(
    "warps, length, want",
    [
        (528, 50177, 1),  # the GPU is full
        (72, 50177, 30),  # one long video: four warps for each of 528 quarters
        (72, 800, 3),  # no chunk shorter than four spans
        (72, 64, 1),
        (1, 10**6, 64),  # as many as can be joined
    ],
)
def test_choose_chunks(warps, length, want):
    chosen = gpu.choose_chunks(warps, length, 66, 132, overhead=1.7, resident=4)
    assert chosen == want


def test_unsupported_devices_say_so():
    args, _ = make_case(ArgSpec("", 1, 3, 32, 8))
    scan = functools.partial(pallas.selective_scan, delta_softplus=True, reverse=False)
    with pytest.raises(Unsupported, match="^runs on GPUs, the default device is a cpu$"):
        scan(*map(args.get, NAMES))
    with (
        gpu.compile_for(gpu.Target(capability=(7, 0))),
        pytest.raises(Unsupported, match="^takes compute capability 8.0 and up, the GPU has 7.0$"),
    ):
        scan(*map(args.get, NAMES))


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"chunks": 0}, "^chunks is 0, takes 1 or more$"),
        ({"backward": gpu.Launch(unroll=-1)}, "^unroll is -1, takes 1 or more$"),
    ],
)
def test_options_are_checked(chosen, message):
    with pytest.raises(ValueError, match=message):
        gpu.options(**chosen)


@pytest.mark.parametrize(
    "launch, message",
    [
        (gpu.Launch(3), "^unroll is 3, takes a divisor of 32"),
        (gpu.Launch(1, warps=3), r"^warps is 3, takes one of \(1, 2, 4, 8\)"),
    ],
)
def test_launches_are_checked(launch, message):
    args, _ = make_case(ArgSpec("", 1, 3, 32, 8))
    scan = functools.partial(pallas.selective_scan, delta_softplus=True, reverse=False)
    with (
        gpu.interpret(),
        gpu.options(forward=launch),
        pytest.raises(ValueError, match=message),
    ):
        scan(*map(args.get, NAMES))


def test_importing_the_package_imports_no_pallas():
    code = "import sys, stretchysnake_kernels; assert 'jax.experimental.pallas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
