"""The GPU kernels on a GPU, against the reference in float64 on the CPU.

Nothing here can run without a GPU but the smallest case of each test, with the Pallas kernels as
plain JAX ("interpreted"): that tries the test, not the kernel. `stretchysnake bench gpu` runs this
file, the tests marked gpu.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from stretchysnake_bench.contenders import GPU_KERNELS
from stretchysnake_kernels import bidirectional_selective_scan, dispatch, selective_scan
from stretchysnake_kernels.selective_scan import gpu, reference
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
WEIGHTS = ("A", "D", "delta_bias", "initial_state")  # float32, whatever x's dtype
# Relative errors in the 2-norm: of the outputs, the gradients, and the gradients of B and C.
TOLERANCES = {
    "float32": (2e-6, 5e-6, 5e-6),
    "bfloat16": (2.5e-3, 2.5e-3, 3e-3),
    "float16": (5e-4, 5e-4, 1e-3),
}
INTERPRETED = "interpreted"


def cases(names, *values, smallest, marks=()):
    """Marks a test: every GPU implementation with all `values` on a GPU, `smallest` interpreted,
    the latter with `marks`."""
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    smallest = smallest if isinstance(smallest, tuple) else (smallest,)
    return pytest.mark.parametrize(
        f"implementation, {names}",
        [
            *(pytest.param(i, *v, marks=pytest.mark.gpu) for v in values for i in GPU_KERNELS),
            pytest.param(INTERPRETED, *smallest, marks=marks),
        ],
    )


@contextlib.contextmanager
def running(implementation, chunks=None):
    """While it lasts, an implementation can be called; gives its name. Skips the test elsewhere."""
    if implementation != INTERPRETED and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, JAX's default device is a {jax.default_backend()}")
    mode = gpu.interpret() if implementation == INTERPRETED else contextlib.nullcontext()
    with mode, gpu.options(chunks=chunks):
        try:
            yield "pallas" if implementation == INTERPRETED else implementation
        except dispatch.Unsupported as reason:
            pytest.skip(str(reason))


def draw(length, *, direction="forward", dtype="float32", batch=2, channels=64, states=16):
    """Arguments, and cotangents of all outputs."""
    spec, rng = ArgSpec("", batch, length, channels, states), np.random.default_rng(1)
    args, state = make_args(spec), (batch, channels, states)
    cotangents = [rng.normal(size=args["x"].shape)]
    if direction == "both":
        other = make_args(spec, seed=2)
        args = {k: v if k == "z" else np.stack([v, other[k]]) for k, v in args.items()}
    else:
        args["initial_state"] = rng.normal(size=state)
        cotangents.append(rng.normal(size=state).astype("f"))
    cotangents[0] = cotangents[0].astype(jnp.dtype(dtype))
    args = {k: v.astype("f" if k in WEIGHTS else jnp.dtype(dtype)) for k, v in args.items()}
    return args, tuple(cotangents)


def make_scan(direction, implementation):
    """Returns args -> outputs, as a tuple."""
    options = dict(delta_softplus=True, implementation=implementation)

    def scan(args):
        if direction == "both":
            return (bidirectional_selective_scan(**args, **options),)
        reverse = direction == "reverse"
        return selective_scan(**args, reverse=reverse, return_last_state=True, **options)

    return scan


def with_gradients(scan):
    """Returns (args, cotangents) -> (outputs, gradients by name), jitted."""
    # Without a GPU the time is compilation.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    @functools.partial(jax.jit, compiler_options=quick)
    def run(args, cotangents):
        outputs, pullback = jax.vjp(scan, args)
        return outputs, pullback(cotangents)[0]

    return run


def exact(args, cotangents, direction="forward"):
    """Outputs and gradients of the reference in float64, computed on the CPU."""

    def one(args, reverse):
        values = (args.get(name) for name in NAMES)
        return reference.selective_scan(*values, delta_softplus=True, reverse=reverse)

    def scan(args):
        if direction != "both":
            return one(args, direction == "reverse")
        ways = [{k: v if k == "z" else v[i] for k, v in args.items()} for i in range(2)]
        return (one(ways[0], False)[0] + one(ways[1], True)[0],)

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = jax.tree.map(lambda value: np.asarray(value, np.float64), (args, cotangents))
        return jax.tree.map(np.asarray, with_gradients(scan)(*wide))


def assert_same(got, want, dtype="float32"):
    """Asserts outputs and gradients to the tolerances of a dtype."""
    of_outputs, of_gradients, of_sums = TOLERANCES[dtype]
    checks = [("output", g, w, of_outputs) for g, w in zip(got[0], want[0], strict=True)]
    assert got[1].keys() == want[1].keys()
    for name, value in got[1].items():
        tolerance = of_sums if name in "BC" else of_gradients
        checks.append((f"gradient of {name}", value, want[1][name], tolerance))
    for name, value, expected, tolerance in checks:
        value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
        assert value.shape == expected.shape, name
        error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
        assert error <= tolerance, f"{name}: {error}"  # NaN fails


SMALL = dict(batch=1, channels=32, states=8)


@cases(
    "length, direction, dtype, sizes",
    (1569, "both", "bfloat16", {}),
    (1569, "forward", "float32", {}),
    (1, "reverse", "float32", {}),
    (7, "forward", "float32", {"states": 8}),
    (37, "both", "float32", {"channels": 40}),  # padded
    (37, "reverse", "float16", {"states": 32}),
    (1569, "both", "float32", {"channels": 128}),
    smallest=(7, "both", "float32", SMALL),
)
def test_outputs_and_all_gradients(implementation, length, direction, dtype, sizes):
    args, cotangents = draw(length, direction=direction, dtype=dtype, **sizes)
    with running(implementation) as name:
        got = with_gradients(make_scan(direction, name))(args, cotangents)
    assert_same(got, exact(args, cotangents, direction), dtype)


@cases(
    "length, chunks, sizes",
    (1569, 7, {}),
    (300, 1, {}),
    smallest=(70, 2, SMALL),
    marks=pytest.mark.slow,  # test_pallas_scan.py has chunks side by side, too
)
def test_chunks(implementation, length, chunks, sizes):
    args, cotangents = draw(length, direction="both", **sizes)
    with running(implementation, chunks) as name:
        got = with_gradients(make_scan("both", name))(args, cotangents)
    assert_same(got, exact(args, cotangents, "both"))


@cases("length, sizes", (1569, {"dtype": "bfloat16"}), smallest=(3, SMALL))
def test_two_runs_give_the_same_bits(implementation, length, sizes):
    args, cotangents = draw(length, direction="both", **sizes)
    with running(implementation) as name:
        run = with_gradients(make_scan("both", name))
        first, second = (jax.tree.map(np.asarray, run(args, cotangents)) for _ in range(2))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


def mapped(scan):
    """The scan of one video at a time, by vmap over the batch."""

    def one(tokens, weights):
        args = {k: v[None] for k, v in tokens.items()} | weights
        return jax.tree.map(lambda value: value[0], scan(args))

    def run(args):
        weights = {name: args[name] for name in ("A", "D", "delta_bias")}
        tokens = {k: v for k, v in args.items() if k not in weights}
        return jax.vmap(one, (0, None))(tokens, weights)

    return run


def sharded(scan):
    """The scan inside of shard_map, the batch over the one device of a mesh."""
    mesh = jax.make_mesh(
        (1,), ("data",), devices=jax.local_devices()[:1], axis_types=(jax.sharding.AxisType.Auto,)
    )

    def run(args):
        specs = {name: P() if name in ("A", "D", "delta_bias") else P("data") for name in args}
        return jax.shard_map(scan, mesh=mesh, in_specs=(specs,), out_specs=P("data"))(args)

    return run


@cases(
    "transform, length, sizes",
    (mapped, 37, {}),
    (sharded, 37, {}),
    (jax.checkpoint, 37, {}),
    smallest=(mapped, 3, SMALL),
)
def test_under_transformations(implementation, transform, length, sizes):
    args, cotangents = draw(length, **sizes)
    with running(implementation) as name:
        got = with_gradients(transform(make_scan("forward", name)))(args, cotangents)
    assert_same(got, exact(args, cotangents))


LARGE = dict(batch=8, channels=384, dtype="bfloat16")


@cases("length, sizes", (1569, LARGE), smallest=(256, SMALL))
def test_no_array_of_all_states_is_kept(implementation, length, sizes):
    args, cotangents = draw(length, direction="both", **sizes)
    with running(implementation) as name:
        run = with_gradients(make_scan("both", name)).lower(args, cotangents).compile()
    states = 4 * args["x"].size * args["A"].shape[-1]  # bytes
    share = 4 if implementation == INTERPRETED else 1 / 2  # interpreted, a kernel copies arrays
    assert run.memory_analysis().temp_size_in_bytes <= share * states


def primitives(jaxpr):
    """Names of all primitives of a jaxpr, inner ones included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for leaf in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda value: hasattr(value, "eqns")
        ):
            if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"):
                found |= primitives(leaf)
    return found


@pytest.mark.parametrize(
    "implementation", [pytest.param("default", marks=pytest.mark.gpu), INTERPRETED]
)
def test_the_default_is_a_kernel(implementation):
    args, _ = draw(7, **SMALL)
    with running(implementation):
        found = primitives(jax.make_jaxpr(make_scan("forward", None))(args))
    assert found & {"pallas_call", "triton_kernel_call"}


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("default", marks=pytest.mark.gpu),
        pytest.param(INTERPRETED, marks=pytest.mark.slow),
    ],
)
def test_a_training_step(implementation, tiny_config):
    from stretchysnake_jax.buckets import make_bucket
    from stretchysnake_jax.step import TrainStep, init_state

    tiny_config.model.drop_path = 0.0
    bucket = make_bucket("static_tokens", 1, (8, 8), tiny_config.model)
    rng = np.random.default_rng(0)
    batch = {
        "video": rng.integers(0, 256, (2, bucket.frames, 8, 8, 3), np.uint8),
        "label": np.array([1, 4], np.int32),
        "mask": np.ones(2, np.float32),
    }

    def step():
        state, metrics = TrainStep(tiny_config, 10)(init_state(tiny_config, 10), batch, bucket)
        return state, float(metrics["loss"]), float(metrics["grad_norm"])

    with running(implementation):
        state, *got = step()
    with dispatch.prefer("xla"):
        _, *want = step()
    assert int(state["step"]) == 1
    np.testing.assert_allclose(got, want, rtol=1e-2)  # a GPU multiplies matrices in tf32
