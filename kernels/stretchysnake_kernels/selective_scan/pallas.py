"""The selective scan as Pallas kernels for NVIDIA GPUs, lowered through Triton.

A thread keeps all states of one channel in registers and walks the tokens one by one: the work per
token is then close to the exponentials that it cannot do without. pallas_forward.py and
pallas_backward.py hold the kernels; this file chooses how to launch them.
"""

import contextlib
import contextvars
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import (
    fused,
    pallas_backward,
    pallas_forward,
    pallas_math,
    pallas_plan,
)

OLDEST = (8, 0)  # compute capability; XLA compiles Triton for no older GPU
MOST_CHUNKS = 64  # a chunk joins the summaries of all those before it
LEAST_SPANS = 4  # of a chunk, so that joining is short beside walking


class Target(NamedTuple):
    """What to compile for.

    Attributes:
      capability: compute capability, such as (9, 0).
      multiprocessors: their number.
      interpret: whether to run the kernels as plain JAX on any device, instead.
    """

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    interpret: bool = False


class Pass(NamedTuple):
    """What a pass wants.

    Attributes:
      unroll: state size -> tokens per turn of the loop; more would need more registers.
      overhead: work of the chunk-parallel mode, relative to the sequential one.
      resident: warps per quarter of a multiprocessor that hide each other's waits.
    """

    unroll: dict[int, int]
    overhead: float
    resident: int


FORWARD = Pass({8: 8, 16: 4, 32: 2}, overhead=1.7, resident=4)
BACKWARD = Pass({8: 1, 16: 2, 32: 1}, overhead=1.2, resident=2)

_target = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compile_for(target: Target):
    """While it lasts, calls are traced for `target` instead of the default device.

    For compiling without the GPU, and for tests.
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def interpret():
    """While it lasts, calls are traced to run as plain JAX, on any device. Slow; for tests."""
    return compile_for(Target(interpret=True))


def find_target() -> Target:
    """Returns what to compile for: that of `compile_for`, else the default device.

    Raises:
      Unsupported: the device is no GPU that the kernels run on, or this JAX cannot compile them.
    """
    target = _target.get()
    if target is None:
        device = jax.local_devices()[0]
        if jax.default_backend() != "gpu":
            raise Unsupported(f"runs on GPUs, the default device is a {jax.default_backend()}")
        capability = str(device.compute_capability)
        if not capability.replace(".", "", 1).isdigit():
            raise Unsupported(f"runs on NVIDIA GPUs, the default device is a {device.device_kind}")
        capability = tuple(int(part) for part in capability.split("."))
        target = Target(capability, device.core_count)
    if target.capability < OLDEST:
        need, have = (".".join(map(str, version)) for version in (OLDEST, target.capability))
        raise Unsupported(f"takes compute capability {need} and up, the GPU has {have}")
    pallas_math.modules()
    return target


def choose_chunks(
    warps: int, length: int, span: int, multiprocessors: int, overhead: float, resident: int
) -> int:
    """Returns into how many chunks to cut a sequence so that the GPU is busy.

    Args:
      warps: that run side by side without cutting.
      length: tokens of the sequence.
      span: tokens, of which a chunk takes a multiple.
      multiprocessors: of the GPU; each runs four warps at once.
      overhead: work of the chunk-parallel mode, relative to the sequential one.
      resident: warps wanted per quarter of a multiprocessor.
    """
    quarters = 4 * multiprocessors
    if warps * overhead >= quarters:
        return 1
    wanted = -(-resident * quarters // warps)
    return max(1, min(wanted, length // (LEAST_SPANS * span), MOST_CHUNKS))


def _make_plan(operands, softplus, reverse, which, target, chunks):
    directions, videos, length, channels = operands.x.shape
    states = operands.decay.shape[1]
    span = 4 * states  # states of 4 bytes: a byte per token and channel; also whole turns
    if chunks is None:
        warps = directions * videos * channels // pallas_math.CHANNELS
        chunks = choose_chunks(
            warps, length, span, target.multiprocessors, which.overhead, which.resident
        )
    return pallas_plan.Plan(
        reverse=reverse,
        videos=videos,
        length=length,
        channels=channels,
        states=states,
        chunk=math.ceil(length / chunks / span) * span,
        span=span,
        unroll=which.unroll[states],
        softplus=softplus,
        math=pallas_math.PORTABLE if target.interpret else pallas_math.PTX,
        interpret=target.interpret,
    )


def _forward(target, chunks, operands, *, softplus, reverse, save):
    plan = _make_plan(operands, softplus, reverse, FORWARD, target, chunks)
    decay = pallas_math.group_states(operands.decay)
    start = pallas_math.group_states(operands.start)
    summary = None
    if plan.chunks > 1:
        summary = pallas_forward.summarise(operands, decay, plan=plan)
    y, ends, *saved = pallas_forward.scan(operands, decay, start, summary, plan=plan, save=save)
    return y, pallas_math.ungroup_states(ends[:, :, -1]), tuple(saved)


def _backward(target, chunks, operands, checkpoints, d_y, d_last, *, softplus, reverse):
    plan = _make_plan(operands, softplus, reverse, BACKWARD, target, chunks)
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
    per_video = operands.x.shape[0], operands.x.shape[1], -1
    # Every block of channels has its own sums.
    d_B, d_C = pallas_math.ungroup_sums(jnp.sum(sums, axis=2), plan.states)
    return fused.Operands(
        x=d_x,
        delta=d_delta,
        decay=pallas_math.ungroup_states(jnp.sum(d_A, axis=2)),
        B=d_B,
        C=d_C,
        D=jnp.sum(d_D, axis=2).reshape(per_video),
        z=d_z[0] if d_z else None,
        bias=jnp.sum(d_bias, axis=2).reshape(per_video),
        start=pallas_math.ungroup_states(d_start[:, :, 0]),
    )


@functools.cache  # a traced function is found again by its kernels
def _make_kernels(target, chunks):
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks is {chunks}, takes 1 or more")
    return fused.Kernels(
        forward=functools.partial(_forward, target, chunks),
        backward=functools.partial(_backward, target, chunks),
        states=(8, 16, 32),
        channels=pallas_math.CHANNELS,
        dtypes=("float32", "bfloat16", "float16"),
        check=lambda operands, reverse: None,  # find_target has checked what there is to check
    )


def selective_scan(*args, chunks: int | None = None, **kwargs):
    """Computes what `api.selective_scan` documents.

    Args:
      *args: as every backend takes them.
      chunks: into how many parts to cut a sequence, which then run side by side; None: as many as
        `choose_chunks` says.
      **kwargs: as every backend takes them.

    Raises:
      Unsupported: a dtype, state size or device that the kernels do not take.
    """
    return fused.selective_scan(_make_kernels(find_target(), chunks), *args, **kwargs)


def bidirectional_selective_scan(*args, chunks: int | None = None, **kwargs):
    """Computes what `api.bidirectional_selective_scan` documents, both directions in one launch.

    Args:
      *args: as every backend takes them.
      chunks: as for `selective_scan`.
      **kwargs: as every backend takes them.

    Raises:
      Unsupported: a dtype, state size or device that the kernels do not take.
    """
    return fused.bidirectional_selective_scan(_make_kernels(find_target(), chunks), *args, **kwargs)
