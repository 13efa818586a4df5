"""Builds floor.cpp with the user's compiler and calls it: how fast this CPU can run the scan."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import numpy as np

SOURCE = pathlib.Path(__file__).with_name("floor.cpp")
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
STATES = 16
CHUNK = 32
# The order of the C++ functions' inputs and gradients.
INPUTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")


class Unavailable(Exception):
    """The floor cannot be measured here; the message says why in one line."""


def cache_folder() -> pathlib.Path:
    """Returns the folder of built libraries: the user's cache, or a temporary one if unwritable."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(base) / "stretchysnake"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return pathlib.Path(tempfile.mkdtemp(prefix="stretchysnake-"))


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the built library; it is compiled once per source, compiler flags and CPU.

    Raises:
      Unavailable: no compiler, or it failed.
    """
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")
    compiler = compiler or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("no C++ compiler (g++, clang++ or $CXX) found")
    try:  # -march=native: a library built on one CPU may not run on another
        cpu = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        cpu = "".join(line for line in cpu.splitlines() if line.startswith(("flags", "model name")))
    except OSError:
        cpu = platform.processor()
    key = hashlib.sha256(
        b"\0".join([SOURCE.read_bytes(), compiler.encode(), " ".join(FLAGS).encode(), cpu.encode()])
    ).hexdigest()[:16]
    path = cache_folder() / f"floor-{key}.so"
    if not path.exists():
        # Built under another name: two processes may build at once, and half a file must not load.
        building = path.with_suffix(f".{os.getpid()}.so")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(building)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise Unavailable(f"{compiler} failed: {reason}")
        building.replace(path)
    return ctypes.CDLL(str(path))


class Floor:
    """The scan of one set of arguments, forward and with gradients.

    Args:
      args: x, delta, A, B, C, D, z, delta_bias by name, float32, state 16.
      d_y: (batch, length, channels) float32, cotangent of y.
      threads: how many to use.

    Raises:
      Unavailable: no library, or sizes that it does not take.
    """

    def __init__(self, args: dict[str, np.ndarray], d_y: np.ndarray, threads: int):
        self._library = library()
        width = self._library.floor_vector_width()
        self._sizes = [ctypes.c_int64(size) for size in args["x"].shape]
        batch, length, channels = args["x"].shape
        if args["A"].shape[1] != STATES or channels % width:
            raise Unavailable(f"takes {STATES} states and channels in multiples of {width}")
        self._args = [np.ascontiguousarray(args[name], np.float32) for name in INPUTS]
        self._d_y = np.ascontiguousarray(d_y, np.float32)
        self._threads = threads
        self._checkpoints = np.empty((batch, -(-length // CHUNK), STATES, channels), np.float32)
        self.y = np.empty_like(self._args[0])
        self.gradients = {
            name: np.empty_like(v) for name, v in zip(INPUTS, self._args, strict=True)
        }

    def forward(self, save: bool = False) -> None:
        """Fills `y`; with `save` also the checkpoints of the gradient."""
        self._library.floor_forward(
            *self._sizes,
            _pointers(self._args),
            _pointer(self.y),
            _pointer(self._checkpoints) if save else None,
            self._threads,
        )

    def forward_and_back(self) -> None:
        """Fills `y` and `gradients`."""
        self.forward(save=True)
        self._library.floor_backward(
            *self._sizes,
            _pointers(self._args),
            _pointer(self._checkpoints),
            _pointer(self._d_y),
            _pointers(self.gradients.values()),
            self._threads,
        )


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _pointers(arrays) -> ctypes.Array:
    arrays = list(arrays)
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
