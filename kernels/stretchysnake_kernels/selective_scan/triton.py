"""The selective scan as Triton kernels, called through jax-triton, which is optional.

triton_forward.py and triton_backward.py hold the kernels; this file chooses how to launch them.
"""

import dataclasses
import functools
import importlib
import inspect
import math

import jax
import jax.numpy as jnp

from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import fused, gpu

OLDEST = (7, 5)  # compute capability; Triton compiles for no older GPU
TENSOR_CORES = (8, 0)  # from which on they take tf32
# Else Triton writes for the newest assembler, which comes with it, and JAX's may be older.
PTX_VERSION = 90  # of CUDA 13.0


FORWARD = gpu.Pass("triton", "forward", {8: 8, 16: 8, 32: 4}, overhead=1.7, resident=4)
BACKWARD = gpu.Pass("triton", "backward", {8: 2, 16: 2, 32: 1}, overhead=1.2, resident=2)


@dataclasses.dataclass(frozen=True)
class Plan(gpu.Layout):
    """The static side of a launch, which the kernels are compiled for.

    Attributes:
      reverse: one bool per direction.
      softplus: whether the step size goes through softplus.
      gated: whether there is a gate.
      tensor_cores: whether the GPU has those that add tf32 up.
      save: whether to keep the states between the spans.
      large: whether an array has 2^31 numbers or more.
    """

    reverse: tuple[bool, ...]
    softplus: bool
    gated: bool
    tensor_cores: bool
    save: bool = False
    large: bool = False

    @property
    def tiles(self):
        """Sums over channels are computed 16 together, of a gradient of B or C."""
        return -(-self.states // 16)


def find_target() -> gpu.Target:
    """Returns what to compile for.

    Raises:
      Unsupported: the device is no GPU that the kernels run on, or jax-triton is missing.
    """
    target = gpu.find_target(OLDEST)
    if target.interpret:
        raise Unsupported("runs on GPUs only and cannot be interpreted")
    try:
        for name in ("jax_triton", "triton"):
            importlib.import_module(name)
    except ImportError as error:
        install = "pip install 'stretchysnake-jax[gpu]'"
        raise Unsupported(f"needs jax-triton ({install}): {error}") from error
    return target


def _make_plan(operands, softplus, reverse, which, target, options):
    return Plan(
        **vars(gpu.lay_out(operands, which, target, options)),
        reverse=reverse,
        softplus=softplus,
        gated=operands.z is not None,
        tensor_cores=target.capability >= TENSOR_CORES,
    )


def _call(kernel, plan, target, inputs, outputs, chunks=None):
    """Launches a kernel in one program per block of channels and video, direction and chunk.

    Args:
      kernel: the Triton function.
      plan: the Plan.
      target: what to compile for.
      inputs: its first arguments.
      outputs: pairs (shape, dtype), the other ones but for the plan.
      chunks: how many to launch; None: all.

    Returns:
      The outputs.
    """
    directions, videos = inputs[0].shape[:2]
    shapes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs)
    largest = max(math.prod(array.shape) for array in (*inputs, *shapes))
    return _launch(
        *inputs,
        kernel=kernel,
        plan=dataclasses.replace(plan, large=largest >= 2**31),
        grid=(plan.channels // plan.block * videos, directions, chunks or plan.chunks),
        capability=10 * target.capability[0] + target.capability[1],
        shapes=shapes,
    )


# JAX 0.12 calls what jax-triton 0.4.1 says about dead code with one more argument than it takes.
# Inside of a jitted function JAX does not look for any in here: fused.py calls the kernels through
# custom_vmap. Everywhere else keep_unused says not to.
@functools.partial(
    jax.jit, static_argnames=("kernel", "plan", "grid", "capability", "shapes"), keep_unused=True
)
def _launch(*inputs, kernel, plan, grid, capability, shapes):
    """Calls jax-triton, of whichever version."""
    import jax_triton

    # Version 0.4 renamed the one and moved the other.
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        backend = {"enable_fp_fusion": True, "ptx_version": PTX_VERSION}
        own = {"out_type": shapes, "backend_options": backend}
    else:
        own = {"out_shape": shapes, "enable_fp_fusion": True}
    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        grid=grid,
        name=kernel.__name__,
        num_warps=plan.warps,
        num_stages=1,
        compute_capability=capability,
        plan=plan,
        **own,
    )


def _group(states):
    """Moves (..., states, channels) into (..., states / 4, channels, 4): for 128-bit reads."""
    *leading, size, channels = states.shape
    return jnp.swapaxes(states.reshape(*leading, size // 4, 4, channels), -1, -2)


def _ungroup(states):
    *leading, groups, channels, _ = states.shape
    return jnp.swapaxes(states, -1, -2).reshape(*leading, 4 * groups, channels)


def _inputs(operands):
    """The operands as the kernels take them; without a gate, something in its place."""
    z = operands.x if operands.z is None else operands.z
    return operands._replace(decay=_group(operands.decay), start=_group(operands.start), z=z)


def _states(plan, *leading):
    """Shape and dtype of states as `_group` returns them."""
    return (*leading, plan.states // 4, plan.channels, 4), jnp.float32


def _summary(plan, *leading):
    """Shapes and dtypes of what a kernel says of each chunk."""
    leading = (*leading, plan.chunks)
    return [_states(plan, *leading), ((*leading, plan.channels), jnp.float32)]


def _forward(target, options, operands, *, softplus, reverse, save):
    from stretchysnake_kernels.selective_scan import triton_forward

    plan = _make_plan(operands, softplus, reverse, FORWARD, target, options)
    call = functools.partial(_call, target=target)
    per_video = operands.x.shape[:2]
    given = _inputs(operands)
    summary = given.start, given.bias  # not read where there is one chunk
    if plan.chunks > 1:
        summary = call(
            triton_forward.selective_scan_summary,
            plan,
            inputs=(given.x, given.delta, given.decay, given.B, given.D, given.bias),
            outputs=_summary(plan, *per_video),
            chunks=plan.chunks - 1,
        )
    save = save and plan.spans > 1
    y, last, saved = call(
        triton_forward.selective_scan,
        dataclasses.replace(plan, save=save),
        inputs=(*given, *summary),
        outputs=[
            (operands.x.shape, operands.x.dtype),
            _states(plan, *per_video),
            _states(plan, *per_video, plan.spans - 1) if save else ((1,), jnp.float32),
        ],
    )
    return y, _ungroup(last), (saved,) if save else ()


def _backward(target, options, operands, checkpoints, d_y, d_last, *, softplus, reverse):
    from stretchysnake_kernels.selective_scan import triton_backward

    plan = _make_plan(operands, softplus, reverse, BACKWARD, target, options)
    call = functools.partial(_call, target=target)
    per_video = operands.x.shape[:2]
    given, d_y = _inputs(operands), d_y.astype(operands.x.dtype)
    summary = given.start, given.bias  # not read where there is one chunk
    if plan.chunks > 1:
        summary = call(
            triton_backward.selective_scan_gradient_summary,
            plan,
            inputs=(given.delta, given.decay, given.C, given.D, given.z, given.bias, d_y),
            outputs=_summary(plan, *per_video),
            chunks=plan.chunks - 1,
        )
    saved = checkpoints[0] if checkpoints else given.start  # not read where there is one span
    like_x = operands.x.shape, operands.x.dtype
    per_chunk = *per_video, plan.chunks
    vector = (*per_chunk, plan.channels), jnp.float32
    warps = plan.channels // gpu.WARP
    d_x, d_delta, d_z, d_A, d_D, d_bias, d_start, sums, _ = call(
        triton_backward.selective_scan_gradient,
        plan,
        inputs=(*given, saved, d_y, _group(d_last.astype(jnp.float32)), *summary),
        outputs=[
            like_x,
            like_x,
            like_x if plan.gated else ((1,), operands.x.dtype),
            _states(plan, *per_chunk),
            vector,
            vector,
            _states(plan, *per_video),
            ((*per_video, warps, plan.length, plan.tiles, 2, 4, 4), jnp.float32),
            ((*per_chunk, plan.slots, plan.states, plan.channels), jnp.float32),
        ],
    )
    # As the kernel deals them out: (..., tiles, B or C, 4, 4), transposed; 8 states fill half.
    sums = jnp.swapaxes(jnp.sum(sums, axis=2), -1, -2)[..., : plan.states // 4 // plan.tiles, :]
    d_B, d_C = (sums[..., i, :, :].reshape(operands.B.shape) for i in range(2))
    return fused.Operands(
        x=d_x,
        delta=d_delta,
        decay=_ungroup(jnp.sum(d_A, axis=2)),
        B=d_B,
        C=d_C,
        D=jnp.sum(d_D, axis=2),
        z=d_z if plan.gated else None,
        bias=jnp.sum(d_bias, axis=2),
        start=_ungroup(d_start),
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
