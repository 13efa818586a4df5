"""Every implementation of the causal convolution against numpy, golden arrays and float64."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stretchysnake_kernels import bidirectional_causal_conv1d, causal_conv1d, dispatch
from stretchysnake_kernels.causal_conv1d import api
from stretchysnake_kernels.causal_conv1d.arg_specs import ARG_SPECS, make_args

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "causal_conv1d.npz"
GOLDEN_CASES = sorted({name.rsplit("_", 1)[0] for name in np.load(GOLDENS) if name.endswith("_y")})
SPECS = {spec.name: spec for spec in ARG_SPECS if not spec.bench}
TOLERANCE = 5e-6  # of the largest entry of each array

# Whatever runs on this platform; a backend for another one says so and is left out.
implementations = pytest.mark.parametrize("implementation", sorted(api.IMPLEMENTATIONS))
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def assert_close(got, want, tolerance=TOLERANCE, name=""):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    assert np.isfinite(got).all(), name
    np.testing.assert_array_less(
        np.abs(got - want).max(), tolerance * np.abs(want).max() + 1e-37, err_msg=name
    )


def taken(**args):
    """Calls one implementation, or skips the test with the reason why it does not take the call."""
    try:
        return causal_conv1d(**args)
    except dispatch.Unsupported as reason:
        pytest.skip(str(reason))


def run(args, cotangent, **options):
    """Returns y and the gradient of every argument, under jit."""

    # The tests' time is compilation; the reference is about its numbers, not its machine code.
    fast = {"xla_backend_optimization_level": 0}
    fast = fast if options["implementation"] == "reference" else None

    @functools.partial(jax.jit, compiler_options=fast)
    def forward_and_back(args, cotangent):
        y, pullback = jax.vjp(lambda args: taken(**args, **options), args)
        return y, pullback(cotangent)[0]

    return forward_and_back(args, cotangent)


def cotangent_of(x):
    return np.random.default_rng(7).normal(size=x.shape).astype(x.dtype)


@functools.cache
def exact(name, activation, reverse):
    args = make_args(SPECS[name], dtype=np.float64)
    with jax.enable_x64(True):
        options = dict(activation=activation, reverse=reverse, implementation="reference")
        return jax.tree.map(np.asarray, run(args, cotangent_of(args["x"]), **options))


def numpy_convolution(x, weight, bias, reverse):
    """The definition, as loops over tokens and taps."""
    y = np.zeros_like(x) + bias
    length, width = x.shape[1], weight.shape[0]
    for t in range(length):
        for lag in range(width):
            source = t + lag if reverse else t - lag
            if 0 <= source < length:
                y[:, t] += weight[width - 1 - lag] * x[:, source]
    return y


@directions
@pytest.mark.parametrize("name", SPECS)
def test_reference_is_the_definition(name, reverse):
    args = make_args(SPECS[name], dtype=np.float64)
    y = numpy_convolution(**args, reverse=reverse)
    assert_close(exact(name, "silu", reverse)[0], y / (1 + np.exp(-y)), 1e-13)


def test_reference_gradients_are_finite_differences():
    args = make_args(SPECS["odd"], dtype=np.float64)
    cotangent = cotangent_of(args["x"])
    rng = np.random.default_rng(0)
    for name, gradient in exact("odd", "silu", False)[1].items():
        direction = rng.normal(size=gradient.shape)

        def loss(step, name=name, direction=direction):
            moved = args | {name: args[name] + step * direction}
            y = numpy_convolution(**moved, reverse=False)
            return (cotangent * y / (1 + np.exp(-y))).sum()

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-7, err_msg=name)


@implementations
@directions
@pytest.mark.parametrize("name, activation", [*((name, "silu") for name in SPECS), ("odd", None)])
def test_matches_float64(implementation, name, activation, reverse):
    args = make_args(SPECS[name])
    y, gradients = run(
        args,
        cotangent_of(args["x"].astype(np.float64)).astype(np.float32),
        activation=activation,
        reverse=reverse,
        implementation=implementation,
    )
    want_y, want = exact(name, activation, reverse)
    assert_close(y, want_y)
    for key, gradient in gradients.items():
        assert_close(gradient, want[key], name=key)


@implementations
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_matches_goldens(implementation, case):
    golden = np.load(GOLDENS)

    def ours(key):  # the file holds (batch, channels, length) and (channels, width)
        value = golden[f"{case}_{key}"]
        return value if value.ndim == 1 else np.swapaxes(value, -1, -2)

    names = {"x": "x", "weight": "w", "bias": "b"}
    names = {name: key for name, key in names.items() if f"{case}_{key}" in golden}
    activation = None if case.endswith("none") else "silu"
    y, gradients = run(
        {name: ours(key) for name, key in names.items()},
        ours("ct"),
        activation=activation,
        implementation=implementation,
    )
    assert_close(y, ours("y"))
    for name, key in names.items():
        assert_close(gradients[name], ours("g_" + key), name=name)


@implementations
def test_reverse_is_the_flipped_convolution(implementation):
    args = make_args(SPECS["odd"])
    y = taken(**args, activation="silu", reverse=True, implementation=implementation)
    flipped = args | {"x": args["x"][:, ::-1]}
    want = taken(**flipped, activation="silu", implementation=implementation)[:, ::-1]
    assert_close(y, want, 1e-6)


@implementations
@pytest.mark.parametrize("dtype, rounding", [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_rounds_once(implementation, dtype, rounding):
    args = make_args(SPECS["typical"])
    x = jnp.asarray(args["x"], dtype)
    y = taken(**args | {"x": x}, implementation=implementation)
    assert y.dtype == dtype
    want = numpy_convolution(np.asarray(x, np.float32), args["weight"], args["bias"], False)
    assert_close(y, want, rounding)


@implementations
def test_vmap_and_one_trace(implementation):
    traces = []

    @jax.jit
    def gradient(args):
        traces.append(1)
        convolve = functools.partial(taken, activation="silu", implementation=implementation)
        return jax.vmap(jax.grad(lambda args: jnp.sin(convolve(**args)).sum()))(args)

    each = [make_args(SPECS["odd"], seed) for seed in range(2)]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    got = gradient(together)
    gradient(jax.tree.map(lambda leaf: leaf[::-1], together))
    assert len(traces) == 1
    for index, args in enumerate(each):
        y = taken(**args, activation="silu", implementation=implementation)
        _, want = run(args, jnp.cos(y), activation="silu", implementation=implementation)
        for name, value in want.items():
            assert_close(got[name][index], value, name=name)


def test_float64_stays_float64():
    args = make_args(SPECS["odd"], dtype=np.float64)
    with jax.enable_x64(True):
        y = causal_conv1d(**args)
        assert y.dtype == np.float64
    assert_close(y, exact("odd", None, False)[0], 1e-13)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": np.ones((3, 37), "f")}, ValueError, r"x has shape \(3, 37\), takes \(batch, length"),
        ({"x": np.ones((3, 0, 7), "f")}, ValueError, "empty length axis, takes length >= 1"),
        ({"x": np.ones((3, 37, 7), "i")}, TypeError, "x has dtype int32, takes float32 or"),
        ({"weight": np.ones((7, 3), "f")}, ValueError, r"weight has shape .*= \(width, 7\)"),
        ({"weight": np.ones((3, 7), "e")}, TypeError, "weight has dtype float16, takes float32"),
        (
            {"bias": np.ones((1, 7), "f")},
            ValueError,
            r"bias has shape \(1, 7\), takes \(channels\)",
        ),
        ({"bias": 0.0}, TypeError, r"bias must be an array of shape \(channels\), got float"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu', takes None or 'silu'"),
        ({"implementation": "cuda"}, ValueError, r"'cuda', takes one of \['pallas', 'reference', "),
    ],
)
def test_errors_name_the_argument(change, error, words):
    with pytest.raises(error, match=words) as caught:
        causal_conv1d(**make_args(SPECS["odd"]) | change)
    assert str(caught.value).startswith("causal_conv1d: ")


# Both directions


def make_two():
    """Arguments of a call in both directions, and a cotangent."""
    first, second = make_args(SPECS["odd"]), make_args(SPECS["odd"], seed=1)
    args = {name: np.stack([first[name], second[name]]) for name in ("weight", "bias")}
    d_y = np.random.default_rng(7).normal(size=(2, *first["x"].shape)).astype("f")
    return args | {"x": first["x"]}, d_y


def two_calls(x, weight, bias=None, **options):
    biases = (None, None) if bias is None else bias
    calls = zip(weight, biases, (False, True), strict=True)
    return jnp.stack([causal_conv1d(x, w, b, reverse=r, **options) for w, b, r in calls])


@pytest.mark.parametrize("implementation", sorted(api.BIDIRECTIONAL))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_both_directions_are_two_calls(implementation, bias):
    args, d_y = make_two()
    if not bias:
        del args["bias"]

    def outputs(op):
        @jax.jit
        def run(args):
            y, pullback = jax.vjp(lambda args: op(**args, **options), args)
            return y, pullback(d_y)[0]

        options = dict(activation="silu", implementation=implementation)
        try:
            return jax.tree.map(np.asarray, run(args))
        except dispatch.Unsupported as reason:
            pytest.skip(str(reason))

    got, want = outputs(bidirectional_causal_conv1d), outputs(two_calls)
    assert_close(got[0], want[0], 1e-6)
    for name, gradient in got[1].items():
        assert_close(gradient, want[1][name], 1e-6, name)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weight": np.ones((3, 7), "f")}, r"weight has shape \(3, 7\), takes \(directions, width"),
        ({"bias": np.ones(7, "f")}, r"bias has shape \(7,\), takes \(directions, channels\) = "),
        (
            {"weight": np.ones((1, 3, 7), "f"), "bias": None},
            r"weight has shape \(1, 3, 7\), takes 2 directions, forward and backward, first",
        ),
    ],
)
def test_errors_of_both_directions_name_the_argument(change, words):
    args, _ = make_two()
    with pytest.raises(ValueError, match="^bidirectional_causal_conv1d: " + words):
        bidirectional_causal_conv1d(**args | change)
