"""Shrinking frames as OpenCV's INTER_AREA does, several times as fast, with the same pixels.

The C++ beside this file is optional: built where there is a compiler, used where the processor has
AVX2 and this OpenCV gives the same pixels. Callers take OpenCV where it is not, see `shrink`.
"""

import ctypes
import functools
import hashlib
import importlib.util
import pathlib

import cv2
import numpy as np

SOURCE = pathlib.Path(__file__).with_name("area_resize.cpp")
AGAIN = "install the package again (pip install -e . in a clone) with a C++ compiler at hand"
_MOST = 1 << 16  # pixels per cell up to which the sum of a cell is exact in float32
# (height, width) before and after: cells of broken, of whole and of both kinds of sizes.
_CHECKED = [((240, 320), (112, 112)), ((144, 180), (96, 112)), ((256, 340), (224, 224))]
_CHECKED += [((90, 120), (30, 30)), ((90, 123), (30, 80)), ((57, 71), (57, 2)), ((9, 7), (1, 1))]


class Unavailable(Exception):
    """The C++ can't be used; the text says why."""


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the library, once it was found to give OpenCV's pixels.

    Raises:
      Unavailable: it was not built, or from another source; or this processor or this OpenCV is
        none that it is made for.
    """
    built = importlib.util.find_spec("stretchysnake_jax.data._area_resize")
    if built is None:
        raise Unavailable(f"the C++ area resize is not built; {AGAIN}")
    try:
        loaded = ctypes.CDLL(built.origin)
    except OSError as error:
        raise Unavailable(f"the C++ area resize does not load ({error}); {AGAIN}") from error
    loaded.stretchysnake_source_hash.restype = ctypes.c_char_p
    source = SOURCE.read_bytes() if SOURCE.is_file() else b""
    digest = hashlib.sha256(source).hexdigest()[:16]
    if loaded.stretchysnake_source_hash().decode() != digest:
        raise Unavailable(f"the C++ area resize was built from another source; {AGAIN}")
    loaded.stretchysnake_usable.restype = ctypes.c_bool
    if not loaded.stretchysnake_usable():
        raise Unavailable("the C++ area resize takes a processor with AVX2")
    image = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    loaded.stretchysnake_area_resize.argtypes = [*image, *image, ctypes.c_bool, ctypes.c_bool]
    loaded.stretchysnake_area_resize.restype = ctypes.c_bool
    rng = np.random.default_rng(0)
    for before, after in _CHECKED:
        frame = rng.integers(256, size=(*before, 3), dtype=np.uint8)
        out = np.empty((*after, 3), np.uint8)
        _call(loaded, frame, out, False, False)
        if not np.array_equal(out, cv2.resize(frame, after[::-1], interpolation=cv2.INTER_AREA)):
            raise Unavailable(f"OpenCV {cv2.__version__} here gives other pixels than the C++")
    return loaded


@functools.cache
def _found() -> ctypes.CDLL | None:
    try:
        return library()
    except Unavailable:
        return None


def shrink(frame: np.ndarray, out: np.ndarray, swap: bool = False, flip: bool = False) -> bool:
    """Shrinks a frame, where that can be done here: bit-equal to cv2.resize with INTER_AREA.

    Args:
      frame: uint8 (h, w, 3); may be a part of a larger one.
      out: uint8 (height, width, 3), overwritten, not overlapping `frame`.
      swap: turn the order of the channels round, BGR to RGB.
      flip: mirror left and right.

    Returns:
      Whether it was done. False: the C++ can't be used, an axis grows or none shrinks, or OpenCV
      has something faster (both halved); nothing was written.
    """
    loaded = _found()
    if loaded is None or not (_is_image(frame) and _is_image(out) and out.flags.writeable):
        return False
    (high, wide, _), (height, width, _) = frame.shape, out.shape
    if not (0 < height <= high and 0 < width <= wide and high * wide <= _MOST * height * width):
        return False
    if (high, wide) in ((height, width), (2 * height, 2 * width)):
        return False
    return _call(loaded, frame, out, swap, flip)


def _is_image(array) -> bool:
    """Whether its pixels lie side by side, the rows one after the other."""
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        return False
    row, pixel, channel = array.strides
    return pixel == 3 and channel == 1 and row >= 3 * array.shape[1]


def _call(loaded, frame, out, swap, flip):
    image = [(a.ctypes.data, a.strides[0], *a.shape[:2]) for a in (frame, out)]
    return loaded.stretchysnake_area_resize(*image[0], *image[1], swap, flip)
