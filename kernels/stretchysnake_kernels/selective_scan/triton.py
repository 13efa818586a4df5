"""The selective scan as Triton kernels, called through jax-triton, which is optional."""

import functools
import importlib
import inspect
import math

import jax
import jax.numpy as jnp

from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import fused

CHANNELS = 32  # of a program
OLDEST = 8.0  # compute capability; the sums over channels use tf32
# Tokens of a turn, by the number of states: as many as the registers hold.
FORWARD_UNROLL = {8: 8, 16: 8, 32: 4}
BACKWARD_UNROLL = {8: 2, 16: 2, 32: 1}


def _call(name, operands, outputs, **sizes):
    """Launches the kernel `name` of triton_kernels.py, in one program per block, video, direction.

    Args:
      name: of the kernel.
      operands: its inputs; the first one is x.
      outputs: pairs (shape, dtype).
      **sizes: its constants, but for those that x gives.
    """
    import jax_triton

    from stretchysnake_kernels.selective_scan import triton_kernels

    directions, batch, length, channels = operands[0].shape
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs]
    # jax-triton 0.4 renamed the one and moved the other.
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        options = {"out_type": shapes, "backend_options": {"enable_fp_fusion": True}}
    else:
        options = {"out_shape": shapes, "enable_fp_fusion": True}
    return jax_triton.triton_call(
        *operands,
        kernel=getattr(triton_kernels, name),
        grid=(channels // CHANNELS * batch, directions),
        name=f"selective_scan_{name}",
        num_warps=1,
        num_stages=1,
        LENGTH=length,
        ALL_CHANNELS=channels,
        LARGE=max(math.prod(array.shape) for array in (*operands, *shapes)) >= 2**31,
        **sizes,
        **options,
    )


def _span(states):
    """Tokens between two saved states: 4 states bytes of them are one byte per token."""
    return 4 * states


def _constants(operands, softplus, reverse):
    states = operands.decay.shape[1]
    return {
        "STATES": states,
        "SPAN": _span(states),
        "SOFTPLUS": softplus,
        "GATED": operands.z is not None,
        "FIRST_REVERSE": reverse[0],
        "SECOND_REVERSE": reverse[-1],
    }


def _group(states):
    """Moves (..., states, channels) into (..., states / 4, channels, 4): for 128-bit reads."""
    *leading, size, channels = states.shape
    return jnp.swapaxes(states.reshape(*leading, size // 4, 4, channels), -1, -2)


def _ungroup(states):
    *leading, groups, channels, _ = states.shape
    return jnp.swapaxes(states, -1, -2).reshape(*leading, 4 * groups, channels)


def _inputs(operands):
    """The operands in order, as the kernels take them; without a gate, something in its place."""
    z = operands.x if operands.z is None else operands.z
    return operands._replace(decay=_group(operands.decay), start=_group(operands.start), z=z)


def _forward(operands, *, softplus, reverse, save):
    directions, batch, length, channels = operands.x.shape
    states = operands.decay.shape[1]
    spans = -(-length // _span(states))
    save = save and spans > 1
    grouped = (directions, batch, states // 4, channels, 4)
    kept = (directions, batch, spans - 1, *grouped[2:]) if save else (1,)
    y, last, saved = _call(
        "forward",
        _inputs(operands),
        [
            (operands.x.shape, operands.x.dtype),
            (grouped, jnp.float32),
            (kept, jnp.float32),
        ],
        UNROLL=FORWARD_UNROLL[states],
        SAVE=save,
        **_constants(operands, softplus, reverse),
    )
    return y, _ungroup(last), (saved,) if save else ()


def _backward(operands, checkpoints, d_y, d_last, *, softplus, reverse):
    directions, batch, length, channels = operands.x.shape
    states = operands.decay.shape[1]
    blocks, unroll = channels // CHANNELS, BACKWARD_UNROLL[states]
    tiles = -(-states // 16)
    slots = min(_span(states), length) // unroll + length % unroll
    per_video = (directions, batch)
    outputs = {
        "x": (operands.x.shape, operands.x.dtype),
        "delta": (operands.x.shape, operands.x.dtype),
        "z": (operands.x.shape if operands.z is not None else (1,), operands.x.dtype),
        "A": ((*per_video, states // 4, channels, 4), jnp.float32),
        "D": ((*per_video, channels), jnp.float32),
        "bias": ((*per_video, channels), jnp.float32),
        "start": ((*per_video, states // 4, channels, 4), jnp.float32),
        "sums": ((*per_video, blocks, length, tiles, 2, 4, 4), jnp.float32),
        "scratch": ((*per_video, blocks, slots, states // 4, CHANNELS, 4), jnp.float32),
    }
    saved = checkpoints[0] if checkpoints else operands.start  # not read where there is one span
    results = _call(
        "backward",
        (*_inputs(operands), saved, d_y.astype(operands.x.dtype), _group(d_last)),
        outputs.values(),
        TILES=tiles,
        SLOTS=slots,
        UNROLL=unroll,
        **_constants(operands, softplus, reverse),
    )
    gradients = dict(zip(outputs, results, strict=True))
    # As the tensor cores deal them out: (..., tiles, B or C, 4, 4), transposed; 8 states fill half.
    sums = jnp.swapaxes(jnp.sum(gradients["sums"], axis=2), -1, -2)[..., : states // 4 // tiles, :]
    d_B, d_C = (sums[..., i, :, :].reshape(operands.B.shape) for i in range(2))
    return fused.Operands(
        x=gradients["x"],
        delta=gradients["delta"],
        decay=_ungroup(gradients["A"]),
        B=d_B,
        C=d_C,
        D=gradients["D"],
        z=gradients["z"] if operands.z is not None else None,
        bias=gradients["bias"],
        start=_ungroup(gradients["start"]),
    )


def _check(operands, reverse):
    platform = jax.default_backend()
    if platform != "gpu":
        raise Unsupported(f"runs on GPUs, the default device is a {platform}")
    device = jax.local_devices()[0]
    capability = str(device.compute_capability)
    if not capability.replace(".", "", 1).isdigit():
        raise Unsupported(f"runs on NVIDIA GPUs, the default device is a {device.device_kind}")
    if float(capability) < OLDEST:
        raise Unsupported(f"takes compute capability {OLDEST} and up, the GPU has {capability}")
    try:
        for name in ("jax_triton", "triton"):
            importlib.import_module(name)
    except ImportError as error:
        install = "pip install 'stretchysnake-jax[gpu]'"
        raise Unsupported(f"needs jax-triton ({install}): {error}") from error


KERNELS = fused.Kernels(
    forward=_forward,
    backward=_backward,
    states=(8, 16, 32),
    channels=CHANNELS,
    dtypes=("float32", "bfloat16", "float16"),
    check=_check,
)
selective_scan = functools.partial(fused.selective_scan, KERNELS)
bidirectional_selective_scan = functools.partial(fused.bidirectional_selective_scan, KERNELS)
