"""The Triton kernels, compiled for GPUs that are not there and run in the emulator."""

import functools
import importlib
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stretchysnake_bench import aot, emulate
from stretchysnake_bench.ptx_emulator import worst_case
from stretchysnake_kernels import dispatch
from stretchysnake_kernels.selective_scan import api, fused, gpu, reference, triton
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

ORDER = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
MISSING = aot.missing_packages()
if MISSING is None and importlib.util.find_spec("jax_triton") is None:
    MISSING = "needs jax-triton (pip install 'stretchysnake-jax[gpu]')"
compiled = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
FORWARD, BOTH = (False,), (False, True)


def target_of(target):
    return gpu.Target(tuple(int(part) for part in target.split(".")))


def kernels(target, **options):
    """The two passes, launched for `target` with gpu.Options, in one chunk unless they say else."""
    return triton.make_kernels(target_of(target), gpu.Options(**({"chunks": 1} | options)))


def run_scan(scan, args, reverse, **options):
    """(y, last state) of one direction, or (y,) of both; `scan` takes one direction, or Kernels."""
    if isinstance(scan, fused.Kernels):
        call = functools.partial(fused.selective_scan, scan)
        if reverse == BOTH:
            call = functools.partial(fused.bidirectional_selective_scan, scan)
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


def emulated(args, cotangents, reverse, target, approx=None, launch=None, **options):
    scan = kernels(target, **launch or {})
    scan = functools.partial(outputs_and_gradients, scan, reverse=reverse, **options)
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
        *[
            pytest.param(*case, marks=slow)
            for case in (
                (197, 16, "float32", BOTH, "9.0"),
                (131, 32, "float32", (True,), "8.0"),
                (37, 32, "float16", BOTH, "9.0"),
                (37, 8, "float16", (True,), "7.5"),
                (69, 16, "bfloat16", BOTH, "7.5"),
                (37, 32, "float32", FORWARD, "7.5"),
            )
        ],
    ],
)
def test_matches_float64(length, state, dtype, reverse, target):
    args, cotangents = draw(length, state, dtype, reverse)
    got, _ = emulated(args, cotangents, reverse, target, delta_softplus=True)
    want = exact(args, cotangents, reverse, delta_softplus=True)
    assert_parity(got, want, TOLERANCES[dtype])


def launch_options(chunks, warps, unrolls):
    forward, backward = (gpu.Launch(unroll, warps) for unroll in unrolls)
    return {"chunks": chunks, "forward": forward, "backward": backward}


@compiled
@pytest.mark.parametrize(
    ("length", "state", "channels", "reverse", "chunks", "warps", "unrolls", "target"),
    [
        pytest.param(*case, marks=slow)
        for case in (
            (69, 8, 64, (True,), 3, 1, (8, 2), "9.0"),
            # The last chunk is shorter and ends with odd tokens; warps share programs, blocks
            # differ.
            (69, 8, 128, BOTH, 2, 2, (4, 4), "8.0"),
            (200, 16, 40, BOTH, 2, 1, (8, 2), "9.0"),
            (200, 16, 64, FORWARD, 99, 2, (8, 2), "8.0"),
            (69, 16, 128, BOTH, 1, 4, (8, 1), "9.0"),
            (37, 8, 96, FORWARD, 1, 4, (8, 2), "8.0"),  # no 4 warps in 96 channels: 1
            (300, 32, 64, BOTH, 2, 2, (4, 1), "8.0"),
            (69, 8, 64, BOTH, 2, 2, (4, 2), "7.5"),
        )
    ],
)
def test_other_launches_match_float64(
    length, state, channels, reverse, chunks, warps, unrolls, target
):
    args, cotangents = draw(length, state, "float32", reverse, channels=channels, batch=1)
    launch = launch_options(chunks, warps, unrolls)
    got, runs = emulated(args, cotangents, reverse, target, launch=launch, delta_softplus=True)
    want = exact(args, cotangents, reverse, delta_softplus=True)
    assert_parity(got, want, TOLERANCES["float32"])
    assert len(runs) == (4 if chunks > 1 else 2)
    shared = max(w for w in (1, 2, 4) if w <= warps and -(-channels // 32) % w == 0)
    assert {run.kernel.threads for run in runs} == {32 * shared}


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


def call_door(args):
    names = ORDER[:-1]
    call = functools.partial(api.selective_scan, delta_softplus=True, implementation="triton")
    return call(*[args.get(name) for name in names])


def loss(args):
    return jnp.sum(call_door(args) ** 2)


def layers(args):
    def body(x, _):
        return call_door(args | {"x": x}), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(body), args["x"], None, length=3)[0])


@compiled
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(jax.grad(layers), id="scan over checkpoint"),
        pytest.param(jax.grad(lambda args: loss(args | {"B": args["C"]})), id="some", marks=slow),
        pytest.param(lambda args: jax.linearize(loss, args)[0], id="linearize", marks=slow),
        pytest.param(
            jax.vmap(jax.grad(loss), in_axes=({n: 0 for n in ORDER[:-1]},)), id="vmap", marks=slow
        ),
    ],
)
def test_compiles_inside_of_other_functions(function, request):
    args, _ = draw(37, 8, "float32", FORWARD, channels=32, batch=1)
    del args["initial_state"]
    if request.node.callspec.id == "vmap":
        args = {name: np.stack([value, value]) for name, value in args.items()}
    with gpu.compile_for(target_of("9.0")):
        program = aot.compile_for(function, args, target="9.0")
    assert "triton_kernel_call" in program.hlo


@compiled
def test_runs_outside_of_jit():
    if jax.default_backend() != "cpu":
        pytest.skip("expects to be refused by the CPU")
    args, _ = draw(3, 8, "float32", FORWARD, channels=32, batch=1)
    del args["initial_state"]
    with (
        gpu.compile_for(target_of("9.0")),
        pytest.raises(NotImplementedError, match="for platform cpu"),
    ):
        call_door(args)


@pytest.mark.parametrize(
    ("platform", "capability", "message"),
    [
        ("cpu", None, "runs on GPUs, the default device is a cpu"),
        ("gpu", "gfx942", "runs on NVIDIA GPUs, the default device is a Some GPU"),
        ("gpu", "7.0", "takes compute capability 7.5 and up, the GPU has 7.0"),
        ("gpu", "9.0", r"needs jax-triton \(pip install 'stretchysnake-jax\[gpu\]'\): not there"),
    ],
)
def test_says_why_it_cannot_run(monkeypatch, platform, capability, message):
    real = importlib.import_module

    def import_module(name, *args):
        if name in ("triton", "jax_triton"):
            raise ImportError("not there")
        return real(name, *args)

    device = types.SimpleNamespace(
        compute_capability=capability, device_kind="Some GPU", core_count=132
    )
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(importlib, "import_module", import_module)
    args = draw(3, 8, "float32", FORWARD)[0]
    with pytest.raises(dispatch.Unsupported, match=message):
        triton.selective_scan(*args.values(), delta_softplus=True, reverse=False)


def test_cannot_be_interpreted():
    args = draw(3, 8, "float32", FORWARD)[0]
    with gpu.interpret(), pytest.raises(dispatch.Unsupported, match="cannot be interpreted$"):
        triton.selective_scan(*args.values(), delta_softplus=True, reverse=False)


@compiled
def test_unroll_must_divide_a_span():
    args = draw(3, 8, "float32", FORWARD)[0]
    with (
        gpu.compile_for(target_of("9.0")),
        gpu.options(forward=gpu.Launch(unroll=5)),
        pytest.raises(ValueError, match="^unroll is 5, takes a divisor of 32"),
    ):
        triton.selective_scan(*args.values(), delta_softplus=True, reverse=False)


@compiled
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
    with gpu.compile_for(target_of("9.0")), pytest.raises(dispatch.Unsupported, match=message):
        triton.selective_scan(*args.values(), delta_softplus=True, reverse=False)
