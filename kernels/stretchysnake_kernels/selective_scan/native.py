"""The selective scan in C++, called by XLA:CPU; there only where a compiler was when installing.

The kernels in native_cpp/ keep a channel's states in registers and use every core in one call,
where XLA runs a loop of small steps. They are optional: what is missing, and why, is the text of
`Unsupported`.
"""

import ctypes
import functools
import hashlib
import importlib.util
import pathlib

import jax
import jax.numpy as jnp

from stretchysnake_kernels import dispatch
from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import fused

SOURCES = pathlib.Path(__file__).with_name("native_cpp")
FORWARD, BACKWARD = "stretchysnake_scan_forward", "stretchysnake_scan_backward"
AGAIN = "install the package again (pip install -e . in a clone) with a C++ compiler at hand"


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the library, its two calls registered with JAX.

    Raises:
      Unsupported: it was not built, or from other sources, or for another JAX.
    """
    built = importlib.util.find_spec("stretchysnake_kernels.selective_scan._native")
    if built is None:
        raise Unsupported(f"the C++ kernels are not built; {AGAIN}")
    sources = sorted(SOURCES.glob("*.[ch]pp"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    try:
        loaded = ctypes.CDLL(built.origin)
    except OSError as error:
        raise Unsupported(f"the C++ kernels do not load ({error}); {AGAIN}") from error
    loaded.stretchysnake_source_hash.restype = ctypes.c_char_p
    loaded.stretchysnake_instructions.restype = ctypes.c_char_p
    if loaded.stretchysnake_source_hash().decode() != digest:
        raise Unsupported(f"the C++ kernels were built from other sources; {AGAIN}")
    try:
        for name in (FORWARD, BACKWARD):
            call = jax.ffi.pycapsule(getattr(loaded, name))
            jax.ffi.register_ffi_target(name, call, platform="cpu")
    except Exception as error:
        raise Unsupported(f"this JAX does not take the C++ kernels ({error}); {AGAIN}") from error
    return loaded


def instructions() -> str:
    """Returns the set of instructions in use: "avx512", "avx2" or "plain"."""
    return library().stretchysnake_instructions().decode()


def _check(operands, reverse):
    if dispatch.platform() != "cpu":
        raise Unsupported(f"runs on the CPU, the default device is a {dispatch.platform()}")
    library()


def _attributes(operands, softplus, reverse):
    return {
        "gated": operands.z is not None,
        "softplus": softplus,
        "first_reverse": reverse[0],
        "second_reverse": reverse[-1],
    }


def _inputs(operands):
    """The operands in order; without a gate, something small in its place."""
    z = operands.z
    return operands._replace(z=operands.D.astype(operands.x.dtype) if z is None else z)


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _forward(operands, *, softplus, reverse, save):
    directions, batch, length, channels = operands.x.shape
    states = operands.decay.shape[1]
    chunks = -(-length // library().stretchysnake_chunk())
    kept = (directions, batch, chunks, states * channels) if save else (directions, batch, 0, 0)
    like_x = _shape(*operands.x.shape, dtype=operands.x.dtype)
    call = jax.ffi.ffi_call(FORWARD, (like_x, _shape(*operands.start.shape), _shape(*kept)))
    y, last, checkpoints = call(
        *_inputs(operands), save=save, **_attributes(operands, softplus, reverse)
    )
    return y, last, (checkpoints,) if save else ()


def _backward(operands, checkpoints, d_y, d_last, *, softplus, reverse):
    directions, batch, _, channels = operands.x.shape
    states = operands.decay.shape[1]
    like_x = _shape(*operands.x.shape, dtype=operands.x.dtype)
    per_video = (directions, batch)
    gradients = fused.Operands(
        x=like_x,
        delta=like_x,
        decay=_shape(*per_video, states, channels),
        B=_shape(*operands.B.shape),
        C=_shape(*operands.C.shape),
        D=_shape(*per_video, channels),
        z=like_x if operands.z is not None else _shape(*per_video, 0, 0, dtype=like_x.dtype),
        bias=_shape(*per_video, channels),
        start=_shape(*operands.start.shape),
    )
    results = jax.ffi.ffi_call(BACKWARD, tuple(gradients))(
        *_inputs(operands),
        *checkpoints,
        d_y.astype(operands.x.dtype),
        d_last,
        **_attributes(operands, softplus, reverse),
    )
    results = fused.Operands(*results)
    return results if operands.z is not None else results._replace(z=None)


KERNELS = fused.Kernels(
    _forward, _backward, channels=16, dtypes=("float32", "bfloat16"), check=_check
)
selective_scan, bidirectional_selective_scan = fused.backend(lambda: KERNELS)
