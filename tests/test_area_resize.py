"""The area resize in C++: OpenCV's pixels to the last bit, and OpenCV where it can't be used."""

import concurrent.futures
import ctypes
import itertools
import mmap
import sys

import cv2
import numpy as np
import pytest
from conftest import VIDEOS

from stretchysnake_jax.data import area_resize, decode, sampling, transforms

try:
    area_resize.library()
    missing = None
except area_resize.Unavailable as reason:
    missing = str(reason)
built = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture
def fresh():
    """Forgets the library that is loaded, before and after."""
    for cached in (area_resize.library, area_resize._found):
        cached.cache_clear()
    yield
    for cached in (area_resize.library, area_resize._found):
        cached.cache_clear()


def make_frame(rng, height, width, kind="noise"):
    """A part of a larger frame: noise, only black and white, or white."""
    frame = rng.integers(256, size=(height + 3, width + 5, 3), dtype=np.uint8)
    if kind != "noise":
        frame = np.where(frame < (128 if kind == "extremes" else 0), 0, 255).astype(np.uint8)
    return frame[1 : height + 1, 2 : width + 2]


def check(frame, height, width, swap=False, flip=False):
    """Compares with OpenCV; whether the C++ took it."""
    out = np.full((height, width, 3), 7, np.uint8)
    if not area_resize.shrink(frame, out, swap, flip):
        assert (out == 7).all()
        return False
    want = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    want = want[:, ::-1] if flip else want
    np.testing.assert_array_equal(out, want[..., ::-1] if swap else want)
    return True


@built
def test_every_small_size():
    rng = np.random.default_rng(0)
    taken = 0
    for high, wide in itertools.product(range(1, 9), repeat=2):
        frame = make_frame(rng, high, wide)
        for height, width in itertools.product(range(1, high + 1), range(1, wide + 1)):
            left_out = (high, wide) in ((height, width), (2 * height, 2 * width))
            assert check(frame, height, width) is not left_out
            taken += not left_out
    assert taken == 36 * 36 - 64 - 16


SIZES = {  # (height, width) before: those of videos, odd ones, thin ones
    (112, 112): [(240, 320), (144, 180), (256, 340), (720, 1280), (113, 112), (336, 448)],
    (224, 224): [(225, 631), (480, 640), (224, 301), (448, 672)],
    (1, 1): [(2, 3), (199, 251), (256, 256), (1, 9), (500, 1)],
    (33, 7): [(33, 50), (34, 8), (99, 21), (1000, 50), (66, 7)],
    (1, 119): [(3, 500), (119, 120), (2, 119)],
    (64, 1): [(65, 1000), (640, 1), (64, 3)],
}


@built
@pytest.mark.parametrize("kind", ["noise", "extremes", "white"])
@pytest.mark.parametrize("after", SIZES)
def test_sizes_of_all_kinds(after, kind):
    rng = np.random.default_rng(1)
    for before in SIZES[after]:
        frame = make_frame(rng, *before, kind)
        for swap, flip in itertools.product((False, True), repeat=2):
            assert check(frame, *after, swap, flip)


@built
def test_hundreds_of_random_sizes():
    rng = np.random.default_rng(2)
    for _ in range(400):
        high, wide = rng.integers(1, 300, 2)
        height, width = rng.integers(1, high + 1), rng.integers(1, wide + 1)
        if rng.random() < 0.3:  # whole pixels per cell
            height, width = rng.integers(1, 60, 2)
            high, wide = height * rng.integers(1, 9), width * rng.integers(1, 9)
        swap, flip = rng.random(2) < 0.5
        check(make_frame(rng, int(high), int(wide)), int(height), int(width), swap, flip)


@built
def test_threads_do_not_mix_their_sizes():
    rng = np.random.default_rng(3)
    jobs = [(make_frame(rng, 60 + i, 190 - i), 20 + i % 7, 30 + i % 5) for i in range(64)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda job: check(*job), jobs * 4))


@built
@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
@pytest.mark.parametrize("size", [(24, 32), (3, 5), (1, 2), (2, 1), (50, 11)])
def test_nothing_behind_the_frame_is_read(size):
    # The page behind the frame can't be read: a byte too far would end the process.
    pages = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    everything = np.frombuffer(pages, np.uint8)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    last = everything.ctypes.data + 3 * mmap.PAGESIZE
    assert protect(last, mmap.PAGESIZE, 0) == 0
    end = 3 * mmap.PAGESIZE
    everything[:end] = np.random.default_rng(4).integers(256, size=end)
    count = 3 * size[0] * size[1]
    frame = everything[end - count : end].reshape(*size, 3)
    for height, width in itertools.product({1, -(-size[0] // 2)}, range(1, size[1] + 1)):
        check(frame, height, width)
    assert protect(last, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@built
def test_what_it_does_not_take_is_left_to_opencv():
    frame = np.zeros((40, 60, 3), np.uint8)
    small = np.zeros((10, 11, 3), np.uint8)
    assert area_resize.shrink(frame, small)
    frozen = small.copy()
    frozen.flags.writeable = False
    for before, out in (
        (frame[:5], small),
        (frame[:, :5], small),
        (frame[:0], small),
        (frame[:, ::-1], small),
        (frame[::-1], small),
        (frame[:, ::2], small),
        (frame[..., :1], small),
        (frame.astype(np.float32), small),
        (frame, small.astype(np.int8)),
        (frame, small[:, :, ::-1]),
        (frame, small[:0]),
        (frame, frozen),
    ):
        assert not area_resize.shrink(before, out)


def geometries():
    rng = np.random.default_rng(5)
    for mode in ("squash", "crop", "random_resized"):
        for size in ((24, 24), (17, 40), (60, 90)):
            yield transforms.train_geometry(*size, mode, 0.3, 0.5, rng)
    yield transforms.Geometry(20, 20, scale=None, flip=True)
    yield transforms.Geometry(48, 80)  # as large as the frame


def test_a_geometry_writes_what_it_returns_with_and_without_it(fresh, monkeypatch):
    rng = np.random.default_rng(6)
    frame = rng.integers(256, size=(48, 80, 3), dtype=np.uint8)
    found = []
    for spec in ("built", None):
        if spec is None:
            area_resize.library.cache_clear()
            area_resize._found.cache_clear()
            monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        for geometry in geometries():
            out = np.empty((*geometry.shape, 3), np.uint8)
            geometry.write(frame, out)
            np.testing.assert_array_equal(out, geometry(frame)[..., ::-1])
            found.append(out)
    half = len(found) // 2
    for mine, want in zip(found[:half], found[half:], strict=True):
        np.testing.assert_array_equal(mine, want)


@pytest.mark.parametrize("name", VIDEOS)
def test_clips_are_the_same_without_it(video_folder, fresh, monkeypatch, name):
    geometry = transforms.Geometry(23, 31, scale=0.9, flip=True)

    def read():
        return decode.read_clip(video_folder / name, lambda n: sampling.uniform(n, 9), geometry)[0]

    mine = read()
    area_resize.library.cache_clear()
    area_resize._found.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    np.testing.assert_array_equal(mine, read())


def refused(match):
    with pytest.raises(area_resize.Unavailable, match=match):
        area_resize.library()
    frame = np.arange(40 * 60 * 3).astype(np.uint8).reshape(40, 60, 3)
    assert not area_resize.shrink(frame, np.empty((10, 11, 3), np.uint8))
    want = cv2.resize(frame, (11, 10), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(transforms.resize(frame, 10, 11), want)


def test_without_a_library(fresh, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("is not built; install the package again")


def test_a_library_that_does_not_load(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    spec = type("Spec", (), {"origin": str(broken)})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    refused("does not load")


@built
def test_a_library_of_another_source_is_refused(fresh, monkeypatch, tmp_path):
    changed = tmp_path / "area_resize.cpp"
    changed.write_text("// changed since")
    monkeypatch.setattr(area_resize, "SOURCE", changed)
    refused("built from another source; install the package again")


@built
def test_an_opencv_of_other_pixels_is_refused(fresh, monkeypatch):
    def resize(frame, size, interpolation, inner=cv2.resize):
        return inner(frame, size, interpolation=interpolation) ^ 1

    monkeypatch.setattr(cv2, "resize", resize)
    refused("gives other pixels")
