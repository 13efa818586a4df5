"""The scan and the convolution with the length sharded over devices, against the whole length.

A process has the number of devices it started with: the cases run in one process of their own with
four virtual devices, which is this file as a program, and the tests read its report.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stretchysnake_kernels
from jax.sharding import PartitionSpec as P
from stretchysnake_kernels.causal_conv1d import api as conv_api
from stretchysnake_kernels.causal_conv1d import arg_specs as conv_specs
from stretchysnake_kernels.causal_conv1d.sharded import sequence_parallel_causal_conv1d
from stretchysnake_kernels.selective_scan import api as scan_api
from stretchysnake_kernels.selective_scan import arg_specs as scan_specs
from stretchysnake_kernels.selective_scan.sharded import sequence_parallel_selective_scan

LENGTH = {"length": 4}
BATCH_AND_LENGTH = {"batch": 2, "length": 2}
SCAN_SPEC = scan_specs.ArgSpec("", 2, 4 * 19, 5, 3)  # more than a chunk of tokens per shard
OVER_TOKENS = ("x", "delta", "B", "C", "z", "y")
OVER_BATCH = ("initial_state", "last_state")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
      spec: the size of the whole problem.
      mesh: axis name -> devices.
      change: what to do to the arguments of the spec; keys that it drops are not passed.
      options: passed to the operation, sharded or not.
      check_vma: whether JAX checks which values are the same on which shards.
      tolerance: largest error of an array, as a part of its largest entry.
      dtype: of the arguments.
    """

    spec: scan_specs.ArgSpec | conv_specs.ArgSpec = SCAN_SPEC
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: LENGTH)
    change: Callable[[dict], dict] = lambda args: args
    options: dict = dataclasses.field(default_factory=lambda: {"delta_softplus": True})
    check_vma: bool = True
    tolerance: float = 5e-6
    dtype: str = "float32"


def without(*names):
    return lambda args: {name: value for name, value in args.items() if name not in names}


def bare(args):
    """No optional argument; steps of both signs, as there is no softplus."""
    args = without("D", "z", "delta_bias", "initial_state")(args)
    return args | {"delta": 0.1 * args["delta"]}


def at_steps(low, high, decay):
    """Steps from `low` to `high`, and A scaled by `decay`."""

    def change(args):
        steps = low + (high - low) * np.abs(np.sin(args["delta"]))
        args = without("delta_bias")(args)
        return args | {"delta": steps, "A": decay * args["A"]}

    return change


def pad_shards(args):
    """Steps of exactly zero over two of the four shards: the state passes them unchanged."""
    delta = args["delta"].copy()
    delta[:, 19:57] = -1e4
    return args | {"delta": delta}


SCAN_CASES = {
    "every argument": Case(),
    "bare": Case(change=bare, options={}),
    "batch and length sharded": Case(mesh=BATCH_AND_LENGTH),
    "one shard": Case(mesh={"length": 1}),
    "one token per shard": Case(scan_specs.ArgSpec("", 2, 4, 5, 3)),
    "steps of 50, A of -1e3": Case(change=at_steps(45, 55, 500), options={}),
    "steps of 1e-4": Case(change=at_steps(5e-5, 2e-4, 1), options={}),
    "steps of 1e-4 and of 50": Case(change=at_steps(1e-4, 50, 1), options={}, tolerance=1e-5),
    "steps of 1e-4, A of -1e3": Case(change=at_steps(5e-5, 2e-4, 500), options={}),
    "steps below the smallest": Case(change=at_steps(1e-26, 1e-22, 1), options={}),
    "no steps": Case(change=pad_shards),
    "A is zero": Case(change=lambda args: args | {"A": 0 * args["A"]}),
    "unchecked": Case(mesh=BATCH_AND_LENGTH, check_vma=False),
    "default implementation": Case(options={"delta_softplus": True, "implementation": None}),
    "float64": Case(
        mesh=BATCH_AND_LENGTH,
        options={"delta_softplus": True, "implementation": "reference"},
        tolerance=1e-12,
        dtype="float64",
    ),
    "bfloat16": Case(dtype="bfloat16", tolerance=2**-7),
}
CONV_CASES = {
    "every argument": Case(conv_specs.ArgSpec("", 2, 4 * 9, 5), options={"activation": "silu"}),
    "bare": Case(conv_specs.ArgSpec("", 2, 4 * 9, 5), change=without("bias"), options={}),
    "batch and length sharded": Case(
        conv_specs.ArgSpec("", 2, 4 * 9, 5), BATCH_AND_LENGTH, options={"activation": "silu"}
    ),
    "unchecked": Case(conv_specs.ArgSpec("", 2, 4 * 9, 5), options={}, check_vma=False),
    "one tap": Case(conv_specs.ArgSpec("", 2, 4 * 2, 5, 1), options={}),
    "shards shorter than the kernel": Case(conv_specs.ArgSpec("", 2, 4 * 2, 5, 4), options={}),
    "one token per shard": Case(conv_specs.ArgSpec("", 2, 4, 5, 7), options={}),
    "reference": Case(
        conv_specs.ArgSpec("", 2, 4 * 9, 5),
        BATCH_AND_LENGTH,
        options={"implementation": "reference"},
    ),
}
CASES = {("scan", name): case for name, case in SCAN_CASES.items()}
CASES |= {("conv", name): case for name, case in CONV_CASES.items()}
NAMES = [f"{op}, {name}, {direction}" for op, name in CASES for direction in ("forward", "reverse")]
INSIDE = "gradient and remat inside shard_map"
FEW = (  # what the quick tests look at: compiling takes half a second and more for each
    "scan, every argument, forward",
    "scan, batch and length sharded, reverse",
    "scan, one token per shard, reverse",
    "conv, every argument, reverse",
    "conv, shards shorter than the kernel, forward",
    INSIDE,
)


# The process with four devices


def make_problem(op, case):
    """Returns the arguments of a case by name, and cotangents of the outputs by name."""
    rng = np.random.default_rng(1)
    if op == "conv":
        args = conv_specs.make_args(case.spec)
        outputs = {"y": args["x"].shape}
    else:
        state = (case.spec.batch, case.spec.channels, case.spec.state)
        args = scan_specs.make_args(case.spec) | {"initial_state": rng.normal(size=state)}
        outputs = {"y": args["x"].shape, "last_state": state}
    cotangents = {name: rng.normal(size=shape) for name, shape in outputs.items()}
    x_dtype = jnp.dtype(case.dtype)
    dtypes = {"y": x_dtype, "last_state": jnp.promote_types(x_dtype, jnp.float32)}
    return (
        {name: value.astype(x_dtype) for name, value in case.change(args).items()},
        {name: value.astype(dtypes[name]) for name, value in cotangents.items()},
    )


def run_whole(op, args, **options):
    """Returns the outputs by name."""
    if op == "conv":
        return {"y": conv_api.causal_conv1d(**args, **options)}
    y, last_state = scan_api.selective_scan(**args, **options, return_last_state=True)
    return {"y": y, "last_state": last_state}


def run_shard(op, args, **options):
    """Returns this shard's outputs by name; for the body of a shard_map."""
    if op == "conv":
        return {"y": sequence_parallel_causal_conv1d(**args, axis_name="length", **options)}
    y, last_state = sequence_parallel_selective_scan(
        **args, axis_name="length", **options, return_last_state=True
    )
    return {"y": y, "last_state": last_state}


def place(names, mesh):
    """Returns how the arrays of these names lie on the mesh."""
    batch = "batch" if "batch" in mesh.axis_names else None
    layouts = dict.fromkeys(OVER_TOKENS, P(batch, "length")) | dict.fromkeys(OVER_BATCH, P(batch))
    return {name: layouts.get(name, P()) for name in names}


# The process compiles one function per structure of arguments, most of its time.


@functools.cache
def make_exact(op, options):
    """Returns the jitted function that runs the reference on the whole length."""
    run = functools.partial(run_whole, op, **dict(options) | {"implementation": "reference"})
    level = {"xla_backend_optimization_level": 0}
    return jax.jit(functools.partial(outputs_and_gradients, run), compiler_options=level)


@functools.cache
def make_sharded(op, options, axes, check_vma, inside):
    """Returns the jitted function that runs the shards.

    The gradient is that of the whole shard_map; with `inside` it is taken in the body, as a train
    step of its own would, and recomputes the forward pass.
    """
    shape, auto = tuple(size for _, size in axes), jax.sharding.AxisType.Auto
    devices = jax.devices()[: np.prod(shape)]
    names = tuple(name for name, _ in axes)
    mesh = jax.make_mesh(shape, names, axis_types=(auto,) * len(shape), devices=devices)
    shard = functools.partial(run_shard, op, **{"implementation": "xla"} | dict(options))
    map_shards = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)

    def run(args, cotangents):
        layout, out_layout = place(args, mesh), place(cotangents, mesh)
        if inside:
            train = functools.partial(outputs_and_gradients, jax.checkpoint(shard))
            both = map_shards(train, in_specs=(layout, out_layout), out_specs=(out_layout, layout))
            return both(args, cotangents)
        sharded = map_shards(shard, in_specs=(layout,), out_specs=out_layout)
        return outputs_and_gradients(sharded, args, cotangents)

    return jax.jit(run)


def outputs_and_gradients(run, args, cotangents):
    outputs, pullback = jax.vjp(run, args)
    return outputs, pullback(cotangents)[0]


def measure(op, case, reverse, inside=False):
    """Returns the largest error of every output and gradient over its largest entry."""
    args, cotangents = make_problem(op, case)
    options = tuple((case.options | {"reverse": reverse}).items())
    with jax.enable_x64(True):
        wide = functools.partial(jax.tree.map, lambda value: np.asarray(value, np.float64))
        want = jax.tree.map(np.asarray, make_exact(op, options)(wide(args), wide(cotangents)))
    with jax.enable_x64(case.dtype == "float64"):
        run = make_sharded(op, options, tuple(case.mesh.items()), case.check_vma, inside)
        got = jax.tree.map(np.asarray, run(args, cotangents))
    errors = jax.tree.map(relative_error, got, want)
    return errors[0] | {f"gradient of {name}": error for name, error in errors[1].items()}


def relative_error(got, want):
    assert got.shape == want.shape
    error = np.abs(np.asarray(got, np.float64) - want).max()
    return float(error / (np.abs(want).max() or 1.0))


def write_report(path, names):
    """Writes, for every case of these names, its errors by array, or its traceback."""
    runs = {
        f"{op}, {name}, {direction}": (op, case, direction == "reverse")
        for (op, name), case in CASES.items()
        for direction in ("forward", "reverse")
    }
    runs[INSIDE] = ("scan", SCAN_CASES["batch and length sharded"], False, True)
    report = {}
    for name in names:
        try:
            report[name] = measure(*runs[name])
        except Exception:  # the test of this case shows it; the others still run
            report[name] = traceback.format_exc()
    pathlib.Path(path).write_text(json.dumps(report))


# The tests


def make_report(folder, names):
    path = folder / "report.json"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    kernels = str(pathlib.Path(stretchysnake_kernels.__file__).parents[1])
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": kernels}
    command = [sys.executable, __file__, str(path), *names]
    subprocess.run(command, env=os.environ | environment, check=True)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return make_report(tmp_path_factory.mktemp("sharded"), FEW)


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory):
    return make_report(tmp_path_factory.mktemp("sharded"), [*NAMES, INSIDE])


@pytest.mark.parametrize("name", FEW)
def test_equals_the_whole_length(report, name):
    check_errors(report, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, INSIDE])
def test_every_case_equals_the_whole_length(whole_report, name):
    check_errors(whole_report, name)


def check_errors(report, name):
    op, *rest = name.split(", ")
    case = CASES.get((op, ", ".join(rest[:-1])), Case())
    errors = report[name]
    assert isinstance(errors, dict), errors
    too_large = {array: error for array, error in errors.items() if not error < case.tolerance}
    assert not too_large


SHARDED = {"scan": sequence_parallel_selective_scan, "conv": sequence_parallel_causal_conv1d}


@pytest.mark.parametrize("op", SHARDED)
@pytest.mark.parametrize("axis_name", ["lenght", None])
def test_unknown_axis_is_refused(op, axis_name):
    run = SHARDED[op]
    args = without("initial_state")(make_problem(op, CASES[op, "every argument"])[0])
    words = f"^{run.__name__}: axis_name is {axis_name!r}, takes an axis of a jax.shard_map"
    mesh = jax.make_mesh((1,), ("length",), axis_types=(jax.sharding.AxisType.Auto,))
    bad = functools.partial(run, **args, axis_name=axis_name)
    with pytest.raises(ValueError, match=words):
        bad()
    with pytest.raises(ValueError, match=words):
        jax.shard_map(bad, mesh=mesh, in_specs=(), out_specs=P())()


@pytest.mark.parametrize(
    "op, change, error, words",
    [
        ("scan", {"x": [1.0]}, TypeError, "selective_scan: x must be an array"),
        ("scan", {"A": None}, TypeError, "selective_scan: A must be an array"),
        ("scan", {"C": np.ones((2, 5, 3), "f")}, ValueError, r"C has shape \(2, 5, 3\)"),
        ("scan", {"initial_state": np.ones((2, 3), "f")}, ValueError, "initial_state has shape"),
        ("scan", {"implementation": ["xls"]}, ValueError, "unknown implementation 'xls'"),
        ("scan", {"implementation": 3}, TypeError, "implementation must be None, a name or a list"),
        ("conv", {"x": [1.0]}, TypeError, "causal_conv1d: x must be an array"),
        ("conv", {"weight": np.ones(4, "f")}, ValueError, r"weight has shape \(4,\)"),
        ("conv", {"activation": "relu"}, ValueError, "activation is 'relu'"),
    ],
)
def test_bad_arguments_are_refused_in_the_words_of_the_unsharded(op, change, error, words):
    args, _ = make_problem(op, CASES[op, "every argument"])
    mesh = jax.make_mesh((1,), ("length",), axis_types=(jax.sharding.AxisType.Auto,))
    bad = functools.partial(SHARDED[op], **args | change, axis_name="length")
    with pytest.raises(error, match=words):
        jax.shard_map(bad, mesh=mesh, in_specs=(), out_specs=P())()


if __name__ == "__main__":
    write_report(sys.argv[1], sys.argv[2:])
