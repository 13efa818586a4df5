"""Every implementation of the selective scan against float64, golden arrays and itself."""

import functools
import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from stretchysnake_kernels import bidirectional_selective_scan, dispatch, selective_scan
from stretchysnake_kernels.selective_scan import api
from stretchysnake_kernels.selective_scan.arg_specs import ARG_SPECS, ArgSpec, make_args

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SPECS = {spec.name: spec for spec in ARG_SPECS if not spec.bench}
# Whatever runs on this platform; a backend for another one says so and is left out.
IMPLEMENTATIONS = sorted(api.IMPLEMENTATIONS)
TOLERANCE = 5e-6  # of the largest entry of each array

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def compiler_options(implementation):
    """The tests' time is compilation; the reference is about its numbers, not its machine code."""
    return {"xla_backend_optimization_level": 0} if implementation == "reference" else None


def assert_close(got, want, tolerance=TOLERANCE, name=""):
    """Asserts a largest error below `tolerance` times the largest entry of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    assert np.isfinite(got).all(), name
    np.testing.assert_array_less(
        np.abs(got - want).max(), tolerance * np.abs(want).max() + 1e-37, err_msg=name
    )


def full_args(spec, seed=0):
    """Arguments of a spec with an initial state, and cotangents of both outputs."""
    rng = np.random.default_rng(seed + 1)
    state = (spec.batch, spec.channels, spec.state)
    args = make_args(spec, seed) | {"initial_state": rng.normal(size=state).astype(np.float32)}
    d_y = rng.normal(size=args["x"].shape).astype(np.float32)
    return args, (d_y, rng.normal(size=state).astype(np.float32))


def taken(scan, **args):
    """Calls one implementation, or skips the test with the reason why it does not take the call."""
    try:
        return scan(**args)
    except dispatch.Unsupported as reason:
        pytest.skip(str(reason))


def scan_and_gradients(args, cotangents, **options):
    """Returns (y, last_state) and the gradient of every argument, under jit."""
    return make_scan_and_gradients(tuple(options.items()))(args, cotangents)


@functools.cache  # one jitted function per set of options, so that equal shapes compile once
def make_scan_and_gradients(options):
    options = dict(options)

    def scan(args):
        return taken(selective_scan, **args, return_last_state=True, **options)

    @functools.partial(jax.jit, compiler_options=compiler_options(options["implementation"]))
    def run(args, cotangents):
        outputs, pullback = jax.vjp(scan, args)
        return outputs, pullback(cotangents)[0]

    return run


def exact(args, cotangents, **options):
    """`scan_and_gradients` of the reference in float64."""
    wide = functools.partial(jax.tree.map, lambda value: np.asarray(value, np.float64))
    with jax.enable_x64(True):
        run = scan_and_gradients(
            wide(args), wide(cotangents), implementation="reference", **options
        )
        return jax.tree.map(np.asarray, run)


def assert_same(got, want, tolerance=TOLERANCE):
    (y, last_state), gradients = got
    assert_close(y, want[0][0], tolerance, "y")
    assert_close(last_state, want[0][1], tolerance, "last_state")
    assert gradients.keys() == want[1].keys()
    for name, gradient in gradients.items():
        assert_close(gradient, want[1][name], tolerance, f"gradient of {name}")


@functools.cache
def exact_spec(name, reverse):
    args, cotangents = full_args(SPECS[name])
    return exact(args, cotangents, delta_softplus=True, reverse=reverse)


def numpy_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, reverse):
    """The definition, as loops over numbers and in another order of operations than JAX's."""
    dt = np.logaddexp(0, delta + delta_bias)
    y = np.zeros_like(x)
    state = initial_state.copy()
    batch, length, channels = x.shape
    for b in range(batch):
        for d in range(channels):
            for t in reversed(range(length)) if reverse else range(length):
                state[b, d] *= np.exp(dt[b, t, d] * A[d])
                state[b, d] += dt[b, t, d] * B[b, t] * x[b, t, d]
                y[b, t, d] = C[b, t] @ state[b, d] + D[d] * x[b, t, d]
    return y * z / (1 + np.exp(-z)), state


# The reference itself


@directions
def test_reference_is_the_definition(reverse):
    args, _ = full_args(SPECS["odd"])
    args = {name: value.astype(np.float64) for name, value in args.items()}
    want = numpy_scan(**args, reverse=reverse)
    with jax.enable_x64(True):
        got = selective_scan(
            **args,
            delta_softplus=True,
            reverse=reverse,
            return_last_state=True,
            implementation="reference",
        )
    for name, value, expected in zip(("y", "last_state"), got, want, strict=True):
        assert value.dtype == np.float64
        assert_close(value, expected, 1e-13, name)


@directions
def test_reference_gradients_are_finite_differences(reverse):
    args, cotangents = full_args(ArgSpec("tiny", 2, 4, 3, 2))
    args = {name: value.astype(np.float64) for name, value in args.items()}
    _, gradients = exact(args, cotangents, delta_softplus=True, reverse=reverse)
    rng = np.random.default_rng(0)
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)

        def loss(step, name=name, direction=direction):
            moved = args | {name: args[name] + step * direction}
            outputs = numpy_scan(**moved, reverse=reverse)
            return sum((c * out).sum() for c, out in zip(cotangents, outputs, strict=True))

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, err_msg=name)


# Every implementation


@implementations
@directions
@pytest.mark.parametrize("name", SPECS)
def test_matches_float64(implementation, name, reverse):
    args, cotangents = full_args(SPECS[name])
    got = scan_and_gradients(
        args, cotangents, delta_softplus=True, reverse=reverse, implementation=implementation
    )
    assert_same(got, exact_spec(name, reverse))


@implementations
@pytest.mark.parametrize("file", sorted(path.name for path in GOLDENS.glob("scan_*.npz")))
def test_matches_goldens(implementation, file):
    golden = dict(np.load(GOLDENS / file))
    tokens_last = {"u", "delta", "B", "C", "z", "out", "out64", "cotangent_out"}

    def ours(key):  # the files hold (batch, width, length)
        value = golden[key]
        return np.swapaxes(value, 1, 2) if key.removeprefix("g_") in tokens_last else value

    keys = [key.removeprefix("g_") for key in golden if key.startswith("g_")]
    rename = {"u": "x"}
    args = {rename.get(key, key): ours(key) for key in keys}
    state_cotangent = golden["cotangent_state"]
    for prefix, weight in (("g_", 0.0), ("gs_", 1.0)):
        cotangents = ours("cotangent_out"), weight * state_cotangent
        (y, last_state), gradients = scan_and_gradients(
            args, cotangents, delta_softplus=True, implementation=implementation
        )
        assert_close(y, ours("out64"), name="y")
        assert_close(last_state, golden["last_state64"], name="last_state")
        for key in keys:
            golden["g_" + key] = golden[prefix + key]
            assert_close(gradients[rename.get(key, key)], ours("g_" + key), name=prefix + key)


@implementations
@pytest.mark.parametrize(
    "kept", [("D", "initial_state"), ("z",), ("delta_bias",), ()], ids="+".join
)
def test_optional_arguments(implementation, kept):
    args, cotangents = full_args(SPECS["odd"])
    args = {name: args[name] for name in ("x", "delta", "A", "B", "C", *kept)}
    got = scan_and_gradients(args, cotangents, delta_softplus=True, implementation=implementation)
    assert_same(got, exact(args, cotangents, delta_softplus=True))


@implementations
def test_without_softplus_steps_may_be_negative(implementation):
    args, cotangents = full_args(SPECS["odd"])
    args["delta"] = 0.1 * args["delta"]
    args.pop("delta_bias")
    got = scan_and_gradients(args, cotangents, implementation=implementation)
    assert_same(got, exact(args, cotangents))


@implementations
def test_reverse_is_the_flipped_scan(implementation):
    args, _ = full_args(SPECS["odd"])
    options = dict(delta_softplus=True, return_last_state=True, implementation=implementation)
    y, last_state = taken(selective_scan, **args, reverse=True, **options)
    flipped = {name: args[name][:, ::-1] for name in ("x", "delta", "B", "C", "z")}
    y_flipped, last_flipped = selective_scan(**args | flipped, **options)
    assert_close(y, y_flipped[:, ::-1], 1e-6, "y")
    assert_close(last_state, last_flipped, 1e-6, "last_state")


@implementations
@directions
def test_two_parts_make_the_whole(implementation, reverse):
    args, cotangents = full_args(SPECS["odd"])
    options = dict(
        delta_softplus=True, reverse=reverse, return_last_state=True, implementation=implementation
    )

    cut = 30  # inside a chunk

    def part(args, start, stop):
        along = {name: args[name][:, start:stop] for name in ("x", "delta", "B", "C", "z")}
        return args | along

    def in_two(args):
        length = args["x"].shape[1]
        first, second = (0, cut), (cut, length)
        if reverse:
            first, second = second, first
        y1, state = taken(selective_scan, **part(args, *first), **options)
        y2, state = selective_scan(**part(args, *second) | {"initial_state": state}, **options)
        return jnp.concatenate((y2, y1) if reverse else (y1, y2), axis=1), state

    # Gradients cross the cut through the last state of one part and the initial state of the other.
    outputs, pullback = jax.vjp(jax.jit(in_two), args)
    assert_same((outputs, pullback(cotangents)[0]), exact_spec("odd", reverse))


# (what to change in the arguments, tolerance of that case). Steps of 1e4 forget all of the past;
# steps of e^-60 see nothing; a zero A never forgets.
EXTREMES = {
    "huge steps": (lambda a: a | {"delta": a["delta"] + 1e4}, 1e-5),
    "large steps": (lambda a: a | {"delta": 40 * np.abs(a["delta"])}, 1e-5),
    "tiny steps": (lambda a: a | {"delta": a["delta"] - 60}, 1e-5),
    "no steps": (lambda a: a | {"delta": a["delta"] - 1e4}, 1e-5),
    "A is zero": (lambda a: a | {"A": 0 * a["A"]}, 1e-5),
    "gate open and shut": (lambda a: a | {"z": 1e4 * a["z"]}, 1e-5),
    "inputs of 1e4": (lambda a: a | {"x": 1e4 * a["x"]}, 1e-5),
    "inputs of 1e-30": (lambda a: a | {"x": 1e-30 * a["x"]}, 1e-5),
}


@implementations
@pytest.mark.parametrize("name", ["odd", "whole_chunks"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_values(implementation, name, extreme):
    change, tolerance = EXTREMES[extreme]
    args, cotangents = full_args(SPECS[name])
    args = {k: v.astype(np.float32) for k, v in change(args).items()}
    got = scan_and_gradients(args, cotangents, delta_softplus=True, implementation=implementation)
    assert_same(got, exact(args, cotangents, delta_softplus=True), tolerance)


@implementations
@pytest.mark.parametrize("dtype, rounding", [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision(implementation, dtype, rounding):
    args, cotangents = full_args(SPECS["chunk_plus_one"])
    args = {name: jnp.asarray(value, dtype) for name, value in args.items()}
    cotangents = jnp.asarray(cotangents[0], dtype), cotangents[1]
    got = scan_and_gradients(args, cotangents, delta_softplus=True, implementation=implementation)
    assert got[0][0].dtype == dtype and got[0][1].dtype == jnp.float32
    assert all(gradient.dtype == dtype for gradient in got[1].values())
    # Rounded once, on output: the state is float32 inside.
    want = exact(args, cotangents, delta_softplus=True)
    assert_same(got, want, 2 * rounding)
    assert_close(got[0][1], want[0][1], name="last_state")


def test_weights_may_stay_float32_beside_half_inputs():
    args, _ = full_args(SPECS["odd"])
    for name in ("x", "delta", "B", "C", "z"):
        args[name] = jnp.asarray(args[name], jnp.bfloat16)
    gradients = jax.eval_shape(
        jax.grad(lambda args: selective_scan(**args, delta_softplus=True).sum()), args
    )
    assert {name: g.dtype for name, g in gradients.items()} == {
        name: jnp.asarray(value).dtype for name, value in args.items()
    }


# Transformations


@implementations
def test_vmap_over_videos_and_over_models(implementation):
    spec = SPECS["odd"]
    args = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(full_args(spec, s)[0] for s in range(3))
    )

    def loss(args):
        y = taken(selective_scan, **args, delta_softplus=True, implementation=implementation)
        return jnp.sum(jnp.sin(y)), y

    run = jax.grad(loss, has_aux=True)
    one, many = jax.jit(run), jax.jit(jax.vmap(run))
    got, got_y = many(args)
    for index in range(3):
        want, want_y = one(jax.tree.map(lambda leaf, index=index: leaf[index], args))
        assert_close(got_y[index], want_y, name="y")
        for name, gradient in want.items():
            assert_close(got[name][index], gradient, name=name)


@implementations
def test_traced_once_and_exported(implementation):
    traces = []

    @jax.jit
    def run(args):
        traces.append(1)
        options = dict(delta_softplus=True, implementation=implementation)
        scan = functools.partial(taken, selective_scan, **options)
        return jax.grad(lambda args: jax.checkpoint(scan)(**args).sum())(args)

    args, other = full_args(SPECS["odd"])[0], full_args(SPECS["odd"], seed=5)[0]
    want = run(args)
    run(other)
    assert len(traces) == 1
    exported = jax.export.export(run, disabled_checks=api.export_checks())(args)
    for name, gradient in exported.call(args).items():
        assert_close(gradient, want[name], 1e-6, name)


def test_gradient_memory_grows_with_tokens_only():
    def temporary(length, state):
        spec = ArgSpec("", 2, length, 32, state)
        args, cotangents = full_args(spec)

        def run(args, cotangents):
            scan = functools.partial(selective_scan, delta_softplus=True, implementation="xla")
            return jax.vjp(lambda args: scan(**args), args)[1](cotangents)

        compiled = jax.jit(run).lower(args, cotangents[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes / args["x"].nbytes

    short, long, wide = temporary(2048, 4), temporary(8192, 4), temporary(8192, 20)
    assert long < short < 6
    assert wide < 6  # the state of every token alone would be 20 times x


# The door


def test_default_takes_float64_to_the_reference():
    args, _ = full_args(SPECS["odd"])
    with jax.enable_x64(True):
        args = {name: jnp.asarray(value, jnp.float64) for name, value in args.items()}
        assert selective_scan(**args).dtype == jnp.float64
        with pytest.raises(dispatch.Unsupported, match="xla: computes in float32, x is float64"):
            selective_scan(**args, implementation="xla")
        y = selective_scan(**args, implementation=["xla", "reference"])
        assert y.dtype == jnp.float64


def test_unsupported_names_every_reason(monkeypatch):
    def refuses(*args, **kwargs):
        raise dispatch.Unsupported("state 3 is not 16")

    monkeypatch.setitem(api.IMPLEMENTATIONS, "picky", refuses)
    args, _ = full_args(SPECS["odd"])
    with jax.enable_x64(True):
        args = {name: jnp.asarray(value, jnp.float64) for name, value in args.items()}
        with pytest.raises(
            dispatch.Unsupported, match=r"picky: state 3 is not 16; xla: computes in float32"
        ):
            selective_scan(**args, implementation=("picky", "xla"))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": [1.0]}, TypeError, r"x must be an array of shape \(batch, length, channels\).*list"),
        ({"x": np.ones((2, 3), "f")}, ValueError, r"x has shape \(2, 3\), takes \(batch, length"),
        (
            {"x": np.ones((2, 37, 7), "i")},
            TypeError,
            "x has dtype int32, takes float32 or bfloat16",
        ),
        ({"delta": np.ones((2, 37, 7), "i")}, TypeError, "delta has dtype int32, takes float32$"),
        ({"delta": np.ones((2, 36, 7), "f")}, ValueError, r"delta has shape .*= \(2, 37, 7\)"),
        ({"A": np.ones((8, 3), "f")}, ValueError, r"A has shape \(8, 3\).*= \(7, state\)"),
        ({"B": np.ones((2, 37, 4), "f")}, ValueError, r"B has shape \(2, 37, 4\).*= \(2, 37, 3\)"),
        ({"C": np.ones((2, 37, 3), "e")}, TypeError, "C has dtype float16, takes float32"),
        ({"D": np.ones((2, 7), "f")}, ValueError, r"D has shape \(2, 7\), takes \(channels\)"),
        ({"z": np.ones((2, 37, 1), "f")}, ValueError, "z has shape"),
        ({"delta_bias": np.ones(6, "f")}, ValueError, r"delta_bias has shape \(6,\).*= \(7\)"),
        ({"initial_state": np.ones((2, 3, 7), "f")}, ValueError, r"initial_state.*= \(2, 7, 3\)"),
        ({"x": np.ones((2, 0, 7), "f")}, ValueError, "empty length axis, takes length >= 1"),
        ({"x": np.ones((0, 37, 7), "f")}, ValueError, "empty batch axis, takes batch >= 1"),
        ({"implementation": "xls"}, ValueError, "unknown implementation 'xls'.*mean 'xla'"),
        ({"implementation": ["xla", "referense"]}, ValueError, "mean 'reference'"),
        ({"implementation": []}, ValueError, "implementation is an empty list"),
        ({"implementation": 3}, TypeError, "implementation must be None, a name or a list"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    args, _ = full_args(SPECS["odd"])
    with pytest.raises(error, match=words) as caught:
        selective_scan(**args | change)
    assert str(caught.value).startswith("selective_scan: ")
    assert "\n" not in str(caught.value)


def test_a_platform_can_be_traced_for_and_a_backend_preferred(monkeypatch):
    args = {name: jnp.asarray(value) for name, value in make_args(SPECS["odd"]).items()}
    tried = []

    def note(name):
        def scan(*args, **kwargs):
            tried.append(name)
            return args[0], None

        return scan

    for name in api.IMPLEMENTATIONS:
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, note(name))
    selective_scan(**args)
    with dispatch.trace_for("gpu"):
        assert dispatch.platform() == "gpu"
        selective_scan(**args)
        with dispatch.prefer("another op's", "xla"):
            selective_scan(**args)
            selective_scan(**args, implementation="reference")
        with dispatch.prefer("another op's"):
            selective_scan(**args)
    first = [api.DEFAULT_ORDER[platform][0] for platform in (jax.default_backend(), "gpu")]
    assert tried == [*first, "xla", "reference", first[1]]


# Both directions


def both_args(spec):
    """Arguments of a bidirectional call, as numpy arrays, and a cotangent of its output."""
    one, other = full_args(spec)[0], full_args(spec, seed=7)[0]
    args = {name: np.stack([one[name], other[name]]) for name in one if name != "initial_state"}
    args["z"] = one["z"]
    return args, np.random.default_rng(3).normal(size=one["x"].shape).astype(np.float32)


def two_scans(delta_softplus, implementation, **args):
    """The definition of the bidirectional scan."""

    def way(index):
        own = {n: v if n == "z" else v[index] for n, v in args.items()}
        options = dict(delta_softplus=delta_softplus, implementation=implementation)
        return selective_scan(**own, **options, reverse=bool(index))

    return way(0) + way(1)


@implementations
@pytest.mark.parametrize("name", ["one_token", "chunk_plus_one", "odd"])
@pytest.mark.parametrize("kept", [("D", "z", "delta_bias"), ()], ids=["all", "bare"])
def test_bidirectional_is_two_scans(implementation, name, kept):
    args, d_y = both_args(SPECS[name])
    args = {key: args[key] for key in ("x", "delta", "A", "B", "C", *kept)}

    def run(scan, args, d_y, **options):
        def call(args):
            return taken(scan, **args, delta_softplus=True, **options)

        @functools.partial(jax.jit, compiler_options=compiler_options(options["implementation"]))
        def y_and_gradients(args, d_y):
            y, pullback = jax.vjp(call, args)
            return y, pullback(d_y)[0]

        return y_and_gradients(args, d_y)

    y, gradients = run(bidirectional_selective_scan, args, d_y, implementation=implementation)
    with jax.enable_x64(True):
        wide = {key: np.asarray(value, np.float64) for key, value in args.items()}
        want, want_gradients = run(two_scans, wide, d_y.astype(float), implementation="reference")
    assert_close(y, want, name="y")
    for key, gradient in gradients.items():
        assert_close(gradient, want_gradients[key], name=f"gradient of {key}")


def test_bidirectional_names_a_wrong_axis():
    args, _ = both_args(SPECS["odd"])
    with pytest.raises(ValueError, match=r"x has shape \(3, 2, 37, 7\), takes 2 directions"):
        bidirectional_selective_scan(
            **{n: v if n == "z" else np.concatenate([v, v[:1]]) for n, v in args.items()}
        )
    with pytest.raises(ValueError, match=r"z has shape \(2, 2, 37, 7\), takes \(batch, length"):
        bidirectional_selective_scan(**args | {"z": np.stack([args["z"]] * 2)})
