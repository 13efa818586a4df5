"""What only the C++ kernels have: sets of instructions, how they are found, their memory."""

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from stretchysnake_kernels import dispatch, selective_scan
from stretchysnake_kernels.selective_scan import api, native
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

try:
    native.library()
    missing = None
except dispatch.Unsupported as reason:
    missing = str(reason)
built = pytest.mark.skipif(missing is not None, reason=str(missing))


def gradients(args, implementation):
    """y and all gradients of one call."""

    @jax.jit
    def run(args):
        scan = functools.partial(
            selective_scan, delta_softplus=True, return_last_state=True, reverse=True
        )
        (y, last), pullback = jax.vjp(lambda a: scan(**a, implementation=implementation), args)
        return y, pullback((y, last))[0]

    return run(args)


@built
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state", [8, 16, 32])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 197])
def test_matches_xla(length, state, dtype):
    args = make_args(ArgSpec("", 3, length, 48, state))
    args = {name: jnp.asarray(value, dtype) for name, value in args.items()}
    got, want = gradients(args, "native"), gradients(args, "xla")
    tolerance = 5e-6 if dtype == "float32" else 2**-7
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == theirs.dtype
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        assert np.abs(mine - theirs).max() <= tolerance * np.abs(theirs).max()


@built
def test_every_set_of_instructions_gives_the_same_numbers():
    # The set is chosen when the process first scans: one process for each.
    code = """if True:
        import json, numpy as np
        from stretchysnake_kernels.selective_scan import native
        from tests.test_native import gradients
        from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args
        import jax
        leaves = jax.tree.leaves(gradients(make_args(ArgSpec("", 2, 45, 32, 16)), "native"))
        print(json.dumps([native.instructions(), [np.asarray(leaf).tolist() for leaf in leaves]]))
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    results = {}
    for wanted in ("plain", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"STRETCHYSNAKE_NATIVE": wanted},
            cwd=root,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        name, leaves = json.loads(done.stdout.splitlines()[-1])
        results[name] = [np.array(leaf) for leaf in leaves]
    assert "plain" in results
    for leaves in results.values():
        for mine, plain in zip(leaves, results["plain"], strict=True):
            assert np.abs(mine - plain).max() <= 2e-6 * np.abs(plain).max()


@built
def test_nothing_but_checkpoints_is_kept():
    spec = ArgSpec("", 2, 4096, 64)
    args = make_args(spec)

    def temporary(length):
        cut = {n: v[:, :length] if v.ndim == 3 else v for n, v in args.items()}
        compiled = jax.jit(
            jax.grad(
                lambda a: selective_scan(**a, delta_softplus=True, implementation="native").sum()
            )
        )
        memory = compiled.lower(cut).compile().memory_analysis()
        return memory.temp_size_in_bytes / cut["x"].nbytes

    assert temporary(4096) == pytest.approx(temporary(2048), rel=0.1)
    assert temporary(4096) <= 2.5  # y, its cotangent, checkpoints of half the size of x


@built
def test_inside_shard_map_over_the_batch():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    args = make_args(ArgSpec("", 4, 20, 16))
    names = list(args)
    specs = tuple(P("data") if args[name].ndim == 3 else P() for name in names)

    def loss(*values):
        y = selective_scan(
            **dict(zip(names, values, strict=True)), delta_softplus=True, implementation="native"
        )
        return jax.lax.psum(jnp.sum(jnp.sin(y)), "data")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    everything = tuple(range(len(names)))
    got = jax.jit(jax.grad(sharded, everything))(*args.values())

    def plain(*values):
        args = dict(zip(names, values, strict=True))
        y = selective_scan(**args, delta_softplus=True, implementation="xla")
        return jnp.sum(jnp.sin(y))

    for mine, want in zip(got, jax.grad(plain, everything)(*args.values()), strict=True):
        assert np.abs(mine - want).max() <= 1e-5 * np.abs(want).max()


@built
def test_it_is_the_default_on_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setitem(
        api.IMPLEMENTATIONS,
        "native",
        lambda *a, **k: asked.append(1) or native.selective_scan(*a, **k),
    )
    selective_scan(**make_args(ArgSpec("", 1, 3, 16)))
    assert asked


@pytest.fixture
def fresh(monkeypatch):
    """Forgets the library that is loaded, before and after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@built
def test_a_library_of_other_sources_is_refused(fresh, monkeypatch, tmp_path):
    changed = shutil.copytree(native.SOURCES, tmp_path / "native_cpp")
    (changed / "scan.cpp").write_text("// changed since")
    monkeypatch.setattr(native, "SOURCES", changed)
    args = make_args(ArgSpec("", 1, 3, 16))
    with pytest.raises(dispatch.Unsupported, match="built from other sources; install the package"):
        selective_scan(**args, implementation="native")
    assert selective_scan(**args).shape == (1, 3, 16)  # the default goes on with the next one


def test_without_a_library_the_default_is_plain_jax(fresh, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args = make_args(ArgSpec("", 1, 3, 16))
    with pytest.raises(dispatch.Unsupported, match="the C\\+\\+ kernels are not built; install"):
        selective_scan(**args, implementation="native")
    assert selective_scan(**args).shape == (1, 3, 16)


def test_a_library_that_does_not_load_says_why(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(OSError):
        ctypes.CDLL(str(broken))
    spec = type("Spec", (), {"origin": str(broken)})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(dispatch.Unsupported, match="do not load"):
        selective_scan(**make_args(ArgSpec("", 1, 3, 16)), implementation="native")
