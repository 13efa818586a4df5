"""The Pallas kernels as compiled for a GPU: what their PTX computes, and what the assembler gives.

The PTX runs in the emulator; nothing here needs a GPU, only the packages of the extra [aot].
"""

import functools

import jax
import numpy as np
import pytest
from stretchysnake_bench import aot, emulate, sass
from stretchysnake_kernels.selective_scan import gpu, pallas, reference
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
pytestmark = pytest.mark.skipif(
    aot.missing_packages() is not None, reason=str(aot.missing_packages())
)


def make_case(length):
    rng = np.random.default_rng(0)
    args = make_args(ArgSpec("", 1, length, 32, 16))
    args["initial_state"] = rng.normal(size=(1, 32, 16)).astype("f")
    return args, (rng.normal(size=args["x"].shape).astype("f"), args["initial_state"][:, ::-1])


def run(scan, reverse, args, cotangents):
    def outputs(args):
        return scan(*map(args.get, NAMES), delta_softplus=True, reverse=reverse)

    values, pullback = jax.vjp(outputs, args)
    return values, pullback(cotangents)[0]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("target", ["8.0", "9.0"])
@pytest.mark.parametrize("length", [1, 37])
def test_ptx_computes_the_reference(length, target, reverse):
    args, cotangents = make_case(length)
    capability = tuple(int(part) for part in target.split("."))
    with gpu.compile_for(gpu.Target(capability)):
        call = functools.partial(run, pallas.selective_scan, reverse)
        got, _ = emulate.emulate(call, args, cotangents, target=target)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda value: np.asarray(value, np.float64), (args, cotangents))
        want = jax.tree.map(np.asarray, run(reference.selective_scan, reverse, *wide))
    for part, tolerance in ((0, 2e-6), (1, 5e-6)):
        for mine, exact in zip(
            jax.tree.leaves(got[part]), jax.tree.leaves(want[part]), strict=True
        ):
            error = np.linalg.norm(np.asarray(mine, np.float64) - exact) / np.linalg.norm(exact)
            assert error <= tolerance


@pytest.mark.parametrize("target", ["8.0", "9.0"])
def test_nothing_spills_and_nothing_is_atomic(target):
    args, cotangents = make_case(64)
    capability = tuple(int(part) for part in target.split("."))
    with gpu.compile_for(gpu.Target(capability)):
        kernels = aot.kernels_of(
            functools.partial(run, pallas.selective_scan, False), args, cotangents, target=target
        )
    assert len(kernels) == 2
    for kernel in kernels:
        resources = sass.measure(kernel)
        assert resources.spill_stores == resources.spill_loads == 0
        assert resources.registers <= 255
        assert "atom." not in kernel.ptx and "red." not in kernel.ptx
