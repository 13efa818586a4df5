"""The Triton kernels, compiled for GPUs that are not there and run in the emulator."""

import collections
import functools
import importlib
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stretchysnake_bench import aot, emulate, sass
from stretchysnake_bench.ptx_emulator import worst_case
from stretchysnake_kernels import dispatch
from stretchysnake_kernels.selective_scan import fused, reference, triton
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

ORDER = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
MISSING = aot.missing_packages()
if MISSING is None and importlib.util.find_spec("jax_triton") is None:
    MISSING = "needs jax-triton (pip install 'stretchysnake-jax[gpu]')"
compiled = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
KERNELS = triton.KERNELS._replace(check=lambda operands, reverse: None)
FORWARD, BOTH = (False,), (False, True)


def run_scan(scan, args, reverse, **options):
    """(y, last state) of one direction, or (y,) of both; `scan` takes one direction."""
    if scan is None:
        call = functools.partial(fused.selective_scan, KERNELS)
        if reverse == BOTH:
            call = functools.partial(fused.bidirectional_selective_scan, KERNELS)
            return (call(*[args.get(name) for name in ORDER[:-1]], **options),)
        return call(*[args.get(name) for name in ORDER], reverse=reverse[0], **options)
    if reverse == BOTH:
        one = [{name: v if name == "z" else v[i] for name, v in args.items()} for i in range(2)]
        return (sum(run_scan(scan, one[i], (reverse[i],), **options)[0] for i in range(2)),)
    return scan(*[args.get(name) for name in ORDER], reverse=reverse[0], **options)


def outputs_and_gradients(scan, args, cotangents, reverse, **options):
    outputs, pullback = jax.vjp(lambda a: run_scan(scan, a, reverse, **options), args)
    cotangents = [g.astype(y.dtype) for g, y in zip(cotangents, outputs, strict=False)]
    return outputs, pullback(tuple(cotangents))[0]


def draw(length, state, dtype, reverse, *, channels=40, batch=2, gated=True):
    """Arguments and cotangents; 40 channels are padded, with both directions doubled."""
    spec = ArgSpec("", batch, length, channels, state)
    args = make_args(spec, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(1)
    if reverse == BOTH:
        other = make_args(spec, seed=2, dtype=jnp.dtype(dtype))
        args = {n: v if n == "z" else np.stack([v, other[n]]) for n, v in args.items()}
    else:
        start = rng.normal(size=(batch, channels, state))
        args |= {"initial_state": start.astype(dtype)}
    if not gated:
        del args["z"]
    d_y = rng.normal(size=(batch, length, channels)).astype(dtype)
    return args, (d_y, rng.normal(size=(batch, channels, state)).astype(np.float32))


def exact(args, cotangents, reverse, **options):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (args, cotangents))
        run = outputs_and_gradients(reference.selective_scan, *wide, reverse, **options)
        return jax.tree.map(np.asarray, run)


def emulated(args, cotangents, reverse, target, approx=None, **options):
    scan = functools.partial(outputs_and_gradients, None, reverse=reverse, **options)
    return emulate.emulate(scan, args, cotangents, target=target, approx=approx)


def assert_parity(got, want, tolerances):
    """Relative errors in the Euclidean norm of (outputs, gradients by name)."""
    of_outputs, of_gradients, of_sums = tolerances
    checks = [("output", g, w, of_outputs) for g, w in zip(got[0], want[0], strict=True)]
    for name, g in got[1].items():
        checks.append((name, g, want[1][name], of_sums if name in "BC" else of_gradients))
    for name, g, w, tolerance in checks:
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert g.shape == w.shape, name
        error, size = np.linalg.norm(g - w), np.linalg.norm(w)
        assert error <= tolerance * size, (name, error, size)  # NaN fails


TOLERANCES = {
    "float32": (2e-6, 5e-6, 5e-6),
    "bfloat16": (2.5e-3, 2.5e-3, 3e-3),
    "float16": (5e-4, 5e-4, 1e-3),
}


@compiled
@pytest.mark.parametrize(
    ("length", "state", "dtype", "reverse", "target"),
    [
        (1, 8, "float32", (True,), "9.0"),
        (69, 16, "bfloat16", BOTH, "8.0"),  # two spans, and an odd token in each pass
        *[
            pytest.param(*case, marks=slow)
            for case in (
                (1, 16, "float32", BOTH, "8.0"),
                (7, 16, "float32", FORWARD, "9.0"),
                (8, 16, "float32", (True,), "8.0"),
                (37, 16, "float32", BOTH, "9.0"),
                (64, 16, "float32", FORWARD, "8.0"),
                (197, 16, "float32", BOTH, "9.0"),
                (63, 8, "float32", FORWARD, "8.0"),
                (37, 8, "bfloat16", (True,), "9.0"),
                (131, 32, "float32", (True,), "8.0"),
                (37, 32, "float16", BOTH, "9.0"),
            )
        ],
    ],
)
def test_matches_float64(length, state, dtype, reverse, target):
    args, cotangents = draw(length, state, dtype, reverse)
    got, _ = emulated(args, cotangents, reverse, target, delta_softplus=True)
    want = exact(args, cotangents, reverse, delta_softplus=True)
    assert_parity(got, want, TOLERANCES[dtype])


@compiled
@slow
@pytest.mark.parametrize("gated", [True, False])
def test_extreme_values_and_the_worst_approximations(gated):
    # dt from 1e-4 to 50, decays of -1e3: nothing remains of a state, and nothing overflows.
    args, cotangents = draw(37, 16, "float32", FORWARD, channels=32, gated=gated)
    args["delta"] = np.linspace(-9.2, 50, 32, dtype=np.float32) + 0 * args["delta"]
    args["delta_bias"] *= 0
    args["A"][:, ::3] = -1e3
    want = exact(args, cotangents, FORWARD, delta_softplus=True)
    got, _ = emulated(args, cotangents, FORWARD, "8.0", delta_softplus=True)
    assert_parity(got, want, TOLERANCES["float32"])
    for sign in (1, -1):
        units = worst_case(sign)
        got, _ = emulated(args, cotangents, FORWARD, "8.0", approx=units, delta_softplus=True)
        assert_parity(got, want, (5e-4, 5e-4, 5e-4))


@compiled
@slow
def test_without_softplus_skip_bias_and_start():
    args, cotangents = draw(37, 16, "float32", FORWARD)
    args = {name: args[name] for name in ("x", "delta", "A", "B", "C")}
    args["delta"] = abs(args["delta"])
    got, _ = emulated(args, cotangents, FORWARD, "8.0", delta_softplus=False)
    want = exact(args, cotangents, FORWARD, delta_softplus=False)
    assert_parity(got, want, TOLERANCES["float32"])


def operands(length, state, dtype, directions, channels=64, batch=1):
    """fused.Operands that are only shapes."""
    shape = jax.ShapeDtypeStruct
    tokens = (directions, batch, length)
    like_x = shape((*tokens, channels), dtype)
    narrow = shape((*tokens, state), jnp.float32)
    vector = shape((directions, channels), jnp.float32)
    return fused.Operands(
        x=like_x,
        delta=like_x,
        decay=shape((directions, state, channels), jnp.float32),
        B=narrow,
        C=narrow,
        D=vector,
        z=shape((1, batch, length, channels), dtype),
        bias=vector,
        start=shape((directions, batch, state, channels), jnp.float32),
    )


@compiled
@pytest.mark.parametrize(
    ("length", "state", "dtype", "reverse", "save", "target"),
    [
        (1569, 16, "bfloat16", BOTH, False, "9.0"),
        *[
            pytest.param(length, 16, "bfloat16", reverse, save, target, marks=slow)
            for length in (1568, 1569)
            for reverse in (FORWARD, BOTH)
            for save in (False, True)
            for target in ("8.0", "9.0")
        ],
        *[
            pytest.param(1569, 16, "float32", BOTH, False, target, marks=slow)
            for target in ("8.6", "8.9", "10.0", "12.0")
        ],
        pytest.param(1569, 8, "bfloat16", BOTH, False, "9.0", marks=slow),
        pytest.param(1569, 32, "bfloat16", BOTH, False, "9.0", marks=slow),
    ],
)
def test_resources_of_the_forward_kernel(length, state, dtype, reverse, save, target):
    run = functools.partial(triton.KERNELS.forward, softplus=True, reverse=reverse, save=save)
    (kernel,) = aot.kernels_of(run, operands(length, state, dtype, len(reverse)), target=target)
    measured = sass.measure(kernel)
    tokens = triton.FORWARD_UNROLL[state]
    per_token = {k: v / tokens for k, v in measured.main_loop.instructions.items()}
    assert measured.spill_stores == measured.spill_loads == kernel.shared_bytes == 0
    assert measured.registers <= 168
    assert per_token["MUFU"] <= state + 4
    assert not per_token.keys() & {"SHFL", "BAR", "LDS", "STS"}
    if state == 16:
        assert sum(per_token.values()) <= (165 if reverse != BOTH else 170)


@compiled
@slow
@pytest.mark.parametrize(
    ("state", "dtype", "reverse", "target"),
    [
        *[
            (16, dtype, reverse, target)
            for dtype in ("bfloat16", "float32")
            for reverse in (FORWARD, BOTH)
            for target in ("8.0", "9.0")
        ],
        (8, "bfloat16", BOTH, "9.0"),
        (32, "bfloat16", BOTH, "9.0"),
    ],
)
def test_resources_of_the_backward_kernel(state, dtype, reverse, target):
    def run(call, d_y, d_last):
        spans = -(-1569 // (4 * state))
        shape = (*call.start.shape[:2], spans - 1, state // 4, call.x.shape[3], 4)
        saved = jnp.zeros(shape)
        assert saved.nbytes <= call.x.size  # a byte per element
        return triton.KERNELS.backward(call, (saved,), d_y, d_last, softplus=True, reverse=reverse)

    call = operands(1569, state, dtype, len(reverse))
    (kernel,) = aot.kernels_of(run, call, call.x, call.start, target=target)
    measured = sass.measure(kernel)
    # Of each direction, the loop that fills the scratch memory and the one that walks back.
    loops = sorted(measured.loops, key=lambda loop: loop.total)[-2 * len(reverse) :]
    tokens = triton.BACKWARD_UNROLL[state] * len(reverse)
    count = sum((loop.instructions for loop in loops), collections.Counter())
    count = {name: times / tokens for name, times in count.items()}
    assert not count.keys() & {"LDS", "STS", "BAR"}
    if state == 32:  # some are spilled, nearly all of them outside of the loops
        assert count.get("LDL", 0) + count.get("STL", 0) <= 1
    else:
        assert measured.spill_stores == measured.spill_loads == 0
    assert measured.registers <= 255
    assert "atom" not in kernel.ptx
    assert "red." not in kernel.ptx
    assert count["SHFL"] <= 20
    if state == 16:
        assert sum(count.values()) <= 700
        assert count["MUFU"] <= 40


@compiled
@slow
def test_traffic():
    args, cotangents = draw(197, 16, "bfloat16", FORWARD, channels=128, batch=1)
    _, (forward, backward) = emulated(args, cotangents, FORWARD, "9.0", delta_softplus=True)

    def moved(run, left_out=()):
        arrays = [a for i, a in enumerate(run.report.arrays) if i not in left_out]
        return sum(a.unique_read + a.unique_written for a in arrays)

    elements = args["x"].size
    narrow = 2 * 4 * args["B"].size  # B and C, float32
    states = 4 * args["A"].size  # also the start and the last state, of one video
    saved = 4 * args["A"].size * (-(-197 // 64) - 1)
    least = 4 * 2 * elements + narrow + 3 * states + 2 * 4 * 128
    assert moved(forward) - saved <= 1.05 * least
    scratch = len(backward.report.arrays) - 1  # stays in the cache
    assert moved(backward, {scratch}) <= 24 * elements + 5 * states


@pytest.mark.parametrize(
    ("platform", "capability", "message"),
    [
        ("cpu", None, "runs on GPUs, the default device is a cpu"),
        ("gpu", "gfx942", "runs on NVIDIA GPUs, the default device is a Some GPU"),
        ("gpu", "7.5", "takes compute capability 8.0 and up, the GPU has 7.5"),
        ("gpu", "9.0", r"needs jax-triton \(pip install 'stretchysnake-jax\[gpu\]'\): not there"),
    ],
)
def test_says_why_it_cannot_run(monkeypatch, platform, capability, message):
    real = importlib.import_module

    def import_module(name, *args):
        if name in ("triton", "jax_triton"):
            raise ImportError("not there")
        return real(name, *args)

    device = types.SimpleNamespace(compute_capability=capability, device_kind="Some GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(importlib, "import_module", import_module)
    args = draw(3, 8, "float32", FORWARD)[0]
    with pytest.raises(dispatch.Unsupported, match=message):
        triton.selective_scan(*args.values(), delta_softplus=True, reverse=False)


@pytest.mark.parametrize(
    ("dtype", "state", "message"),
    [
        ("int32", 8, "takes float32 or bfloat16 or float16, x is int32"),
        ("float32", 40, "takes up to 32 states, got 40"),
    ],
)
def test_refuses_other_dtypes_and_more_states(dtype, state, message):
    args = draw(3, state, dtype, FORWARD)[0]
    args = {name: jnp.asarray(value) for name, value in args.items()}
    with pytest.raises(dispatch.Unsupported, match=message):
        triton.selective_scan(*args.values(), delta_softplus=True, reverse=False)
