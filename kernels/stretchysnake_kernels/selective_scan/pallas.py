"""The selective scan as Pallas kernels for NVIDIA GPUs, lowered through Triton.

A thread keeps all states of one channel in registers and walks the tokens one by one: the work per
token is then close to the exponentials that it cannot do without. pallas_forward.py and
pallas_backward.py hold the kernels; this file chooses how to launch them.
"""

import dataclasses
import functools

import jax.numpy as jnp

from stretchysnake_kernels.selective_scan import (
    fused,
    gpu,
    pallas_backward,
    pallas_forward,
    pallas_math,
    pallas_plan,
)

OLDEST = (8, 0)  # compute capability; XLA compiles Triton for no older GPU
SUMMARY_UNROLL = {8: 8, 16: 8, 32: 1}  # as `gpu.Pass.unroll`, of the forward pass' smaller kernel
FORWARD = gpu.Pass("pallas", "forward", {8: 8, 16: 4, 32: 1}, overhead=1.7, resident=4)
BACKWARD = gpu.Pass("pallas", "backward", {8: 2, 16: 2, 32: 1}, overhead=1.2, resident=2)


def find_target() -> gpu.Target:
    """Returns what to compile for.

    Raises:
      Unsupported: the device is no GPU that the kernels run on, or this JAX cannot compile them.
    """
    target = gpu.find_target(OLDEST)
    pallas_math.modules()
    return target


def _make_plan(operands, softplus, reverse, which, target, options):
    return pallas_plan.Plan(
        **vars(gpu.lay_out(operands, which, target, options)),
        reverse=reverse,
        videos=operands.x.shape[1],
        softplus=softplus,
        math=pallas_math.PORTABLE if target.interpret else pallas_math.PTX,
        interpret=target.interpret,
    )


def _forward(target, options, operands, *, softplus, reverse, save):
    plan = _make_plan(operands, softplus, reverse, FORWARD, target, options)
    decay = pallas_math.group_states(operands.decay)
    start = pallas_math.group_states(operands.start)
    summary = None
    if plan.chunks > 1:
        smaller = dataclasses.replace(plan, unroll=SUMMARY_UNROLL[plan.states])
        summary = pallas_forward.summarise(operands, decay, plan=smaller)
    y, ends, *saved = pallas_forward.scan(operands, decay, start, summary, plan=plan, save=save)
    return y, pallas_math.ungroup_states(ends[:, :, -1]), tuple(saved)


def _backward(target, options, operands, checkpoints, d_y, d_last, *, softplus, reverse):
    plan = _make_plan(operands, softplus, reverse, BACKWARD, target, options)
    decay = pallas_math.group_states(operands.decay)
    start = pallas_math.group_states(operands.start)
    d_last = pallas_math.group_states(d_last.astype(jnp.float32))
    d_y = d_y.astype(operands.x.dtype)
    summary = None
    if plan.chunks > 1:
        summary = pallas_backward.summarise(operands, decay, d_y, plan=plan)
    saved = checkpoints[0] if checkpoints else None
    d_x, d_delta, *d_z, d_A, d_D, d_bias, d_start, sums = pallas_backward.gradients(
        operands, decay, start, saved, d_y, d_last, summary, plan=plan
    )
    d_B, d_C = pallas_math.ungroup_sums(sums, plan.states)
    return fused.Operands(
        x=d_x,
        delta=d_delta,
        decay=pallas_math.ungroup_states(jnp.sum(d_A, axis=2)),
        B=d_B,
        C=d_C,
        D=jnp.sum(d_D, axis=2),
        z=d_z[0] if d_z else None,
        bias=jnp.sum(d_bias, axis=2),
        start=pallas_math.ungroup_states(d_start[:, :, 0]),
    )


@functools.cache  # a traced function is found again by its kernels
def make_kernels(target: gpu.Target, options: gpu.Options) -> fused.Kernels:
    """Returns the kernels for a device."""
    return fused.Kernels(
        forward=functools.partial(_forward, target, options),
        backward=functools.partial(_backward, target, options),
        channels=gpu.WARP,
    )


selective_scan, bidirectional_selective_scan = fused.backend(
    lambda: make_kernels(find_target(), gpu.find_options())
)
