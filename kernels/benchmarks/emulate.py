"""Runs functions of JAX on a machine without a GPU, their GPU kernels as compiled for one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.extend import core as jax_core
from stretchysnake_bench.aot import CompiledKernel, find_kernels, inner_jaxprs, is_kernel, kernel_of
from stretchysnake_bench.ptx_emulator import Report

# Primitives that only wrap a function.
WRAPPERS = {"jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call"}
WRAPPERS |= {"custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One launch of a kernel in the emulator.

    Attributes:
      kernel: what was launched.
      report: what it did.
      sizes: bytes of the arrays of `report.arrays`.
    """

    kernel: CompiledKernel
    report: Report
    sizes: list[int]


def emulate(
    function: Callable,
    *args,
    target: str = "8.0",
    approx: Mapping[str, Callable] | None = None,
    order: str = "lockstep",
) -> tuple[object, list[Run]]:
    """Computes `function(*args)`, its kernels as compiled for `target` and the rest by JAX.

    Kernels inside of loops and branches of JAX (scan, while, cond) are not reached.

    Args:
      function: a function of arrays that calls `pallas_call` (Triton) or `jax_triton.triton_call`.
      *args: trees of arrays.
      target: as for `compile_for`.
      approx: as for `Kernel.run`.
      order: as for `Kernel.run`.

    Returns:
      The outputs, where memory that a kernel should have written and did not is NaN (or -1), and
      the launches in their order.

    Raises:
      AotUnavailable, ValueError, jax.errors.JaxRuntimeError: as for `compile_for`.
      PtxError: as for `Kernel.run`.
      NotImplementedError: a kernel inside of a loop or branch of JAX.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    runs: list[Run] = []

    def launch(eqn, values):
        kernel, parameters = kernel_of(eqn, target)
        inputs = [np.asarray(value) for value in values]
        outputs = [_unwritten(var.aval) for var in eqn.outvars]
        for source, sink in dict(eqn.params["input_output_aliases"]).items():
            outputs[sink][...] = inputs[source]
            inputs[source] = outputs[sink]  # one buffer, two names
        arrays = iter(inputs + outputs)
        given = [next(arrays) if p is None else p for p in parameters]
        report = kernel.parsed.run(
            given,
            kernel.grid,
            shared_bytes=kernel.shared_bytes,
            approx=approx,
            order=order,
        )
        unique = {id(value): value for value in given if isinstance(value, np.ndarray)}
        runs.append(Run(kernel, report, [value.nbytes for value in unique.values()]))
        return [jax.numpy.asarray(output) for output in outputs]

    leaves = [jax.numpy.asarray(leaf) for leaf in jax.tree.leaves(args)]
    flat = _evaluate(closed.jaxpr, closed.consts, leaves, launch)
    return jax.tree.unflatten(jax.tree.structure(shape), flat), runs


def _unwritten(aval) -> np.ndarray:
    """An array of ones in every bit, which is NaN in every floating type."""
    array = np.empty(aval.shape, aval.dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array


def _evaluate(jaxpr, consts, args, launch) -> Sequence:
    """Evaluates a jaxpr, with `launch(eqn, values)` in the place of the GPU kernels."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def read(var):
        return var.val if isinstance(var, jax_core.Literal) else values[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if is_kernel(eqn):
            outputs = launch(eqn, inputs)
        elif any(map(find_kernels, inner_jaxprs(eqn))):
            if eqn.primitive.name not in WRAPPERS:
                raise NotImplementedError(
                    f"a kernel inside of {eqn.primitive.name} cannot be emulated"
                )
            (body,) = inner_jaxprs(eqn)
            closed = isinstance(body, jax_core.ClosedJaxpr)
            body, constants = (body.jaxpr, body.consts) if closed else (body, [])
            outputs = _evaluate(body, constants, inputs, launch)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]
