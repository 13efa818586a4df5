"""The Mosaic GPU kernel, simulated on the CPU and compiled for GPUs that are not there."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stretchysnake_bench import aot
from stretchysnake_kernels import dispatch
from stretchysnake_kernels.selective_scan import gpu, mosaic_gpu, reference
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

TILE = mosaic_gpu.TILE
ORDER = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def in_order(args):
    return [args.get(name) for name in ORDER]


def exact(args, **options):
    """y and the last state in float64."""
    with jax.enable_x64(True):
        wide = [v if v is None else jnp.asarray(v, jnp.float64) for v in in_order(args)]
        return [np.asarray(v) for v in reference.selective_scan(*wide, **options)]


def simulated(args, *, detect_races=False, **options):
    """y and the last state from the kernel, simulated."""
    with mosaic_gpu.interpret(detect_races=detect_races):
        args = [v if v is None else jnp.asarray(v) for v in in_order(args)]
        scan = jax.jit(functools.partial(mosaic_gpu.selective_scan, **options))
        return jax.block_until_ready(scan(*args))


def assert_close(got, want, tolerance):
    """Asserts a relative error below `tolerance`, in the Euclidean norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("length", "state", "dtype", "reverse"),
    [
        (1, 8, "float32", False),
        (TILE, 32, "float16", True),
        (TILE + 1, 16, "float32", False),
        (37, 16, "bfloat16", True),
        (64, 8, "float32", True),
        pytest.param(1, 16, "float32", True, marks=pytest.mark.slow),
        pytest.param(TILE - 1, 16, "float32", True, marks=pytest.mark.slow),
        pytest.param(2 * TILE, 16, "float32", False, marks=pytest.mark.slow),
        pytest.param(37, 32, "float32", False, marks=pytest.mark.slow),
        pytest.param(64, 16, "bfloat16", False, marks=pytest.mark.slow),
        pytest.param(197, 16, "float32", True, marks=pytest.mark.slow),
    ],
)
def test_matches_float64(length, state, dtype, reverse):
    args = make_args(ArgSpec("", 1, length, 128, state), dtype=jnp.dtype(dtype))
    start = np.random.default_rng(1).normal(size=(1, 128, state)).astype(dtype)
    options = dict(delta_softplus=True, reverse=reverse)
    y, last = simulated(args | {"initial_state": start}, **options)
    want_y, want_last = exact(args | {"initial_state": start}, **options)
    assert y.dtype == dtype
    assert last.dtype == "float32"
    assert_close(y, want_y, {"float32": 2e-6, "float16": 5e-4, "bfloat16": 2.5e-3}[dtype])
    assert_close(last, want_last, 2e-6)


def test_several_blocks_and_videos_without_gate_skip_bias_and_softplus():
    args = make_args(ArgSpec("", 2, 5, 130, 3))  # both sizes are padded inside
    args = {name: args[name] for name in ("x", "A", "B", "C")} | {"delta": np.abs(args["delta"])}
    options = dict(delta_softplus=False, reverse=True)
    for got, want in zip(simulated(args, **options), exact(args, **options), strict=True):
        assert_close(got, want, 2e-6)


@pytest.fixture
def both_directions():
    """Arguments of a bidirectional scan over two and a half tiles, and its result in float64."""
    spec = ArgSpec("", 1, 2 * TILE + TILE // 2, 128, 8)
    each = [make_args(spec, seed) for seed in (0, 1)]
    args = {name: np.stack([one[name] for one in each]) for name in each[0]}
    args["z"] = each[0]["z"]
    want = sum(
        exact(one | {"z": args["z"]}, delta_softplus=True, reverse=reverse)[0]
        for one, reverse in zip(each, (False, True), strict=True)
    )
    return [jnp.asarray(args[name]) for name in ORDER[:-1]], want


def test_both_directions_in_one_launch_without_races(both_directions, capfd):
    args, want = both_directions
    with mosaic_gpu.interpret(detect_races=True):
        scan = functools.partial(mosaic_gpu.bidirectional_selective_scan, delta_softplus=True)
        assert str(jax.make_jaxpr(scan)(*args)).count("name=selective_scan") == 1
        got = np.asarray(jax.jit(scan)(*args))
    assert_close(got, want, 2e-6)
    assert "RACE DETECTED" not in capfd.readouterr().out


def assert_caught(capfd):
    """Asserts that the race detector complains about a scan over two tiles."""
    args = make_args(ArgSpec("", 1, 2 * TILE, 128, 8))
    try:
        simulated(args, detect_races=True, delta_softplus=True, reverse=False)
        complaint = capfd.readouterr().out
    except jax.errors.JaxRuntimeError as error:  # JAX 0.12; 0.10 prints
        complaint = str(error)
    assert "RACE DETECTED" in complaint


def test_a_missing_wait_is_caught(monkeypatch, capfd):
    monkeypatch.setattr(mosaic_gpu.modules()[1], "barrier_wait", lambda barrier: None)
    assert_caught(capfd)


def test_a_fetch_into_the_tile_that_is_worked_on_is_caught(monkeypatch, capfd):
    plgpu = mosaic_gpu.modules()[1]
    copy = plgpu.copy_gmem_to_smem

    def copy_to_first_slot(source, target, barrier):
        copy(source, target.ref.at[0], barrier)

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", copy_to_first_slot)
    assert_caught(capfd)


def test_extreme_values():
    """Steps of 1e-4 and of 50, decay rates up to 1000."""
    rng = np.random.default_rng(0)
    args = make_args(ArgSpec("", 1, TILE + 3, 128, 8))
    args["delta"] = np.where(rng.random(args["delta"].shape) < 0.5, -9.2, 50).astype(np.float32)
    args["delta_bias"] = np.zeros(128, np.float32)
    args["A"] = -np.logspace(-3, 3, 128 * 8).reshape(128, 8).astype(np.float32)
    options = dict(delta_softplus=True, reverse=False)
    got, want = simulated(args, **options), exact(args, **options)
    for mine, exactly in zip(got, want, strict=True):
        assert np.isfinite(mine).all()
        assert_close(mine, exactly, 2e-6)


def test_the_gradient_is_that_of_the_triton_kernels():
    args = make_args(ArgSpec("", 1, 5, 32, 8))

    def loss(scan, args):
        y, last = scan(*in_order(args), delta_softplus=True, reverse=True)
        return jnp.sum(jnp.sin(y)) + jnp.sum(last**2)

    def gradient(scan):
        return jax.jit(jax.grad(functools.partial(loss, scan)))(args)

    with mosaic_gpu.interpret():
        traced = str(
            jax.make_jaxpr(jax.grad(functools.partial(loss, mosaic_gpu.selective_scan)))(args)
        )
        assert traced.count("pallas_call[") == 2
        got = gradient(mosaic_gpu.selective_scan)
    for name, want in gradient(reference.selective_scan).items():
        assert_close(got[name], want, 5e-6)


@pytest.mark.parametrize("capability", [(7, 0), (8, 9), (12, 0)])
def test_other_gpus_are_refused(capability):
    args = make_args(ArgSpec("", 1, 3, 8))
    have = ".".join(map(str, capability))
    refused = pytest.raises(dispatch.Unsupported, match=f"takes compute .*, the GPU has {have}")
    with gpu.compile_for(gpu.Target(capability)), refused:
        mosaic_gpu.selective_scan(*in_order(args), delta_softplus=True, reverse=False)


def test_refusals_name_what_was_got():
    args = [
        None if v is None else jnp.asarray(v) for v in in_order(make_args(ArgSpec("", 1, 3, 8)))
    ]
    options = dict(delta_softplus=True, reverse=False)
    if jax.default_backend() == "cpu":
        with pytest.raises(dispatch.Unsupported, match="runs on GPUs, the default device is a cpu"):
            mosaic_gpu.selective_scan(*args, **options)
    with mosaic_gpu.interpret(), jax.enable_x64(True):
        wide = [v if v is None else v.astype(jnp.float64) for v in args]
        with pytest.raises(dispatch.Unsupported, match="or float16, x is float64"):
            mosaic_gpu.selective_scan(*wide, **options)
        many = make_args(ArgSpec("", 1, 3, 8, 33))
        with pytest.raises(dispatch.Unsupported, match="takes up to 32 states, got 33"):
            mosaic_gpu.selective_scan(*in_order(many), **options)


COMPILE = """if True:
    import json, sys
    from stretchysnake_bench import aot, sass
    import jax, jax.numpy as jnp
    from stretchysnake_kernels.selective_scan import fused, mosaic_gpu
    target, states, dtype, length = sys.argv[1:]
    states, length, channels, reverse = int(states), int(length), 1152, (False, True)
    wide, narrow = (2, 8, length, channels), (2, 8, length, states)
    shapes = dict(
        x=wide, delta=wide, decay=(2, states, channels), B=narrow, C=narrow, D=(2, channels),
        z=(1, *wide[1:]), bias=(2, channels), start=(2, 8, states, channels),
    )
    operands = fused.Operands(**{
        name: jax.ShapeDtypeStruct(shape, dtype if name in ("x", "delta", "z") else "float32")
        for name, shape in shapes.items()
    })
    def run(operands):
        return mosaic_gpu.scan(operands, softplus=True, reverse=reverse)
    (ptx,) = aot.compile_for(run, operands, target=target).mosaic.values()
    found = sass.measure(ptx)
    print(json.dumps(dict(
        registers=found.registers, spills=found.spill_stores + found.spill_loads + found.stack,
        loop=found.main_loop.instructions, ptx=ptx,
    )))
"""


@pytest.mark.skipif(aot.missing_packages() is not None, reason=str(aot.missing_packages()))
@pytest.mark.skipif(not aot.TOOLKIT, reason="needs a CUDA toolkit: no ptxas on the path")
@pytest.mark.parametrize(
    ("target", "states", "dtype", "length", "registers", "instructions"),
    [
        ("9.0", 16, "bfloat16", 1569, 110, 135),
        pytest.param("9.0", 8, "bfloat16", 1569, 110, 90, marks=pytest.mark.slow),
        pytest.param("9.0", 16, "bfloat16", 1568, 110, 135, marks=pytest.mark.slow),
        pytest.param("9.0", 16, "float32", 1569, 110, 135, marks=pytest.mark.slow),
        pytest.param("9.0", 16, "float16", 1569, 110, 135, marks=pytest.mark.slow),
        pytest.param("9.0", 32, "bfloat16", 1569, 168, 230, marks=pytest.mark.slow),
        pytest.param("10.0", 16, "bfloat16", 1569, 110, 165, marks=pytest.mark.slow),
    ],
)
def test_resources(target, states, dtype, length, registers, instructions):
    # Mosaic GPU compiles a program once in a process, whatever the target: one process for each.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, target, str(states), dtype, str(length)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    tokens, loop = mosaic_gpu.UNROLL[states], found["loop"]
    assert found["spills"] == 0
    assert found["registers"] <= registers
    assert sum(loop.values()) <= instructions * tokens  # of a warp, for 32 channels
    assert loop["MUFU"] == (states + 4) * tokens
    assert not {"SHFL", "BAR", "LDL", "STL", "LDG"} & set(loop)
    assert not re.search(r"^\s*(atom|red)\.", found["ptx"], re.MULTILINE)
