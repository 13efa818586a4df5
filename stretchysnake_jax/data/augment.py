"""Augmentation of a training clip: everything is drawn once and applied to every frame alike.

RandAugment, colour jitter and the geometry work on one frame after the other while it is decoded,
as uint8, BGR as OpenCV has it; random erasing works on the finished clip. The operations follow
Pillow's definitions, those of one value by tables.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable

import cv2
import numpy as np

from stretchysnake_jax.config import DataConfig, parse_rand_augment
from stretchysnake_jax.data import transforms

MAX_MAGNITUDE = 10
APPLIED = 0.5  # chance of every operation that RandAugment drew
FILL = 128  # the grey that comes in from outside of a moved frame
ERASE_AREA = (0.02, 1 / 3)  # of the box / the frame
ERASE_RATIO = (0.3, 1 / 0.3)  # height / width of the box
_GREY = np.arange(256)
_DOWN = -0.5  # makes OpenCV, which rounds, round down as Pillow does
_BGR_TO_GREY = np.array([0.114, 0.587, 0.299])  # ITU-R 601-2, as Pillow's "L"
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's SMOOTH
# The noise of an erased box is normal in the encoder's input: ImageNet's mean and deviation, RGB.
_NOISE_MEAN, _NOISE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Operation = Callable[[np.ndarray], np.ndarray]  # uint8 (h, w, 3) BGR -> the same shape


# Operations. Each function takes its level and returns what is done to a frame.


def _table(values) -> Operation:
    """Looks every value up in a table of 256 (or one per channel, (256, 3))."""
    table = np.clip(values, 0, 255).astype(np.uint8)
    table = table.reshape(1, 256, -1) if table.ndim == 2 else table
    return functools.partial(cv2.LUT, lut=table)


def _histograms(frame) -> list[np.ndarray]:
    return [cv2.calcHist([frame], [c], None, [256], [0, 256]).ravel() for c in range(3)]


def _auto_contrast(frame):
    """Stretches every channel of the frame to 0..255."""
    tables = np.tile(_GREY[:, None], 3).astype(float)
    for c, counts in enumerate(_histograms(frame)):
        low, *_, high = np.repeat(np.flatnonzero(counts), 2)
        if low < high:
            scale = 255 / (high - low)
            tables[:, c] = np.trunc(_GREY * scale - low * scale)
    return _table(tables)(frame)


def _equalize(frame):
    """Makes the histogram of every channel of the frame as flat as it gets."""
    tables = np.tile(_GREY[:, None], 3)
    for c, counts in enumerate(_histograms(frame)):
        counts = counts.astype(np.int64)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        if step:
            tables[:, c] = (step // 2 + np.cumsum(counts) - counts) // step
    return _table(tables)(frame)


def _blend_tables(low, factor: float):
    """Between an even grey `low` (0) and the frame (1), or beyond; rounded down as Pillow does."""
    return np.float32(low) + np.float32(factor) * (_GREY - low).astype(np.float32)


def _brightness(factor: float) -> Operation:
    return _table(_blend_tables(0, factor))


def _contrast(factor: float) -> Operation:
    def apply(frame):
        mean = int(cv2.mean(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY))[0] + 0.5)
        return _table(_blend_tables(mean, factor))(frame)

    return apply


def _saturation(factor: float) -> Operation:
    matrix = factor * np.eye(3) + (1 - factor) * _BGR_TO_GREY
    matrix = np.column_stack([matrix, [_DOWN] * 3]).astype(np.float32)
    return functools.partial(cv2.transform, m=matrix)


def _hue(turns: float) -> Operation:
    shift = np.stack([_GREY + round(turns * 256), _GREY, _GREY], 1)
    shift[:, 0] %= 256

    def apply(frame):
        hsv = cv2.cvtColor(frame, cv2.COLOR_BGR2HSV_FULL)
        return cv2.cvtColor(_table(shift)(hsv), cv2.COLOR_HSV2BGR_FULL)

    return apply


def _sharpness(factor: float) -> Operation:
    kernel = (1 - factor) * _SMOOTH
    kernel[1, 1] += factor

    def apply(frame):
        out = cv2.filter2D(frame, -1, kernel, delta=_DOWN)
        out[[0, -1]], out[:, [0, -1]] = frame[[0, -1]], frame[:, [0, -1]]  # Pillow leaves the rim
        return out

    return apply


def _posterize(bits: int) -> Operation:
    return _table(_GREY & ~(2 ** (8 - bits) - 1))


def _solarize(threshold: int) -> Operation:
    return _table(np.where(threshold > _GREY, _GREY, 255 - _GREY))


def _solarize_add(add: int) -> Operation:
    return _table(np.where(_GREY < 128, _GREY + add, _GREY))


def _affine(matrix, about_centre: bool = False) -> Operation:
    """Takes every pixel from the place `matrix` @ (x, y), in coordinates of the pixels' corners.

    Args:
      matrix: (2, 2).
      about_centre: the origin is the frame's centre, not its corner.
    """
    matrix = np.array(matrix, float)

    def apply(frame):
        size = np.array(frame.shape[1::-1])
        # OpenCV counts from the centre of the first pixel, half a pixel from its corner.
        origin = size / 2 - 0.5 if about_centre else np.full(2, -0.5)
        return cv2.warpAffine(
            frame,
            np.column_stack([matrix, origin - matrix @ origin]),
            size.tolist(),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=[FILL] * 3,
        )

    return apply


def _translate(down: float, right: float) -> Operation:
    """Takes every pixel from further down and right by shares of the size, in whole pixels."""

    def apply(frame):
        height, width = frame.shape[:2]
        y, x = round(down * height), round(right * width)
        kept = frame[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
        out = np.full_like(frame, FILL)
        top, left = max(-y, 0), max(-x, 0)
        out[top : top + kept.shape[0], left : left + kept.shape[1]] = kept
        return out

    return apply


def _rotate(degrees: float) -> Operation:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _affine([[cos, -sin], [sin, cos]], about_centre=True)


# name -> (what the level makes, the level from magnitude / MAX_MAGNITUDE and a sign of +-1), in
# timm's order. "Increasing": a larger magnitude always changes more.
OPERATIONS = {
    "AutoContrast": (lambda _: _auto_contrast, None),
    "Equalize": (lambda _: _equalize, None),
    "Invert": (lambda _: _table(255 - _GREY), None),
    "Rotate": (_rotate, lambda m, sign: sign * m * 30.0),
    "PosterizeIncreasing": (_posterize, lambda m, sign: 4 - int(m * 4)),
    "SolarizeIncreasing": (_solarize, lambda m, sign: 256 - int(m * 256)),
    "SolarizeAdd": (_solarize_add, lambda m, sign: int(m * 110)),
    "ColorIncreasing": (_saturation, lambda m, sign: 1.0 + sign * m * 0.9),
    "ContrastIncreasing": (_contrast, lambda m, sign: 1.0 + sign * m * 0.9),
    "BrightnessIncreasing": (_brightness, lambda m, sign: 1.0 + sign * m * 0.9),
    "SharpnessIncreasing": (_sharpness, lambda m, sign: 1.0 + sign * m * 0.9),
    "ShearX": (lambda s: _affine([[1, s], [0, 1]]), lambda m, sign: sign * m * 0.3),
    "ShearY": (lambda s: _affine([[1, 0], [s, 1]]), lambda m, sign: sign * m * 0.3),
    "TranslateXRel": (lambda share: _translate(0, share), lambda m, sign: sign * m * 0.45),
    "TranslateYRel": (lambda share: _translate(share, 0), lambda m, sign: sign * m * 0.45),
}


def level(name: str, magnitude: float, sign: int = 1) -> float | None:
    """The level of an operation: degrees, bits, a threshold, a factor or a share of the size.

    Args:
      name: a key of OPERATIONS.
      magnitude: 0..10.
      sign: 1 or -1, the direction of the operations that have two.

    Returns:
      The level; None for operations without one.
    """
    found = OPERATIONS[name][1]
    return found(magnitude / MAX_MAGNITUDE, sign) if found else None


def make_operation(name: str, value: float | None) -> Operation:
    """The operation `name` at a level: frame -> frame, uint8 (h, w, 3), BGR."""
    return OPERATIONS[name][0](value)


# Draws.


def draw_rand_augment(text: str, rng: np.random.Generator) -> list[Operation]:
    """RandAugment as VideoMamba uses it: the same operations at the same levels for all frames.

    Operations are drawn with replacement; each is applied with chance 1/2 at a level that is normal
    about the magnitude, within 0..10 (Cubuk et al. 2020, with timm's levels).

    Args:
      text: see `config.parse_rand_augment`.
      rng: of the sample.
    """
    magnitude, count, deviation = parse_rand_augment(text)
    names, operations = list(OPERATIONS), []
    for _ in range(count):
        name, applied = names[rng.integers(len(names))], rng.random() < APPLIED
        strength = np.clip(rng.normal(magnitude, deviation), 0, MAX_MAGNITUDE)
        sign = 1 if rng.random() < 0.5 else -1
        if applied:
            operations.append(make_operation(name, level(name, float(strength), sign)))
    return operations


def draw_colour_jitter(ranges: tuple[float, ...], rng: np.random.Generator) -> list[Operation]:
    """Brightness, contrast, saturation and hue by random factors in random order.

    Args:
      ranges: how far each may go, as of `DataConfig.colour_jitter`.
      rng: of the sample.
    """
    factors = [rng.uniform(max(0.0, 1 - r), 1 + r) for r in ranges[:3]]
    values = [*factors, rng.uniform(-ranges[3], ranges[3])]
    makers = (_brightness, _contrast, _saturation, _hue)
    return [makers[i](values[i]) for i in rng.permutation(4) if ranges[i]]


def draw_erase_box(height: int, width: int, rng: np.random.Generator):
    """The box of random erasing (Zhong et al. 2020), the same in all frames.

    Returns:
      (top, left, height, width), or None if a hundred draws gave none that fits.
    """
    for _ in range(100):
        area = rng.uniform(*ERASE_AREA) * height * width
        ratio = math.exp(rng.uniform(*np.log(ERASE_RATIO)))
        high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < high < height and 0 < wide < width:
            top = rng.integers(height - high, endpoint=True)
            left = rng.integers(width - wide, endpoint=True)
            return int(top), int(left), high, wide
    return None


@functools.cache
def _noise_table() -> np.ndarray:
    """256 equally likely values of the noise, uint8 (256, 3), RGB, cut off at black and white."""
    share = [statistics.NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]
    values = np.array(_NOISE_MEAN) + np.outer(share, _NOISE_STD)
    return np.clip(np.round(255 * values), 0, 255).astype(np.uint8)


def erase(video: np.ndarray, box: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    """Fills a box of every frame with noise of its own, in place.

    Args:
      video: uint8 (frames, height, width, 3), RGB.
      box: (top, left, height, width).
      rng: of the noise.
    """
    top, left, high, wide = box
    frames = len(video)
    noise = rng.integers(256, size=(frames * high, wide, 3), dtype=np.uint8)
    noise = cv2.LUT(noise, _noise_table()[None])
    video[:, top : top + high, left : left + wide] = noise.reshape(frames, high, wide, 3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to a clip, drawn once.

    Attributes:
      geometry: box, size and flip, after the operations.
      operations: on whole frames, in order.
      erase_box: (top, left, height, width) in the finished frames, or None.
      rng: of the noise in the box.
    """

    geometry: transforms.Geometry
    operations: tuple[Operation, ...] = ()
    erase_box: tuple[int, int, int, int] | None = None
    rng: np.random.Generator | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        return self.geometry.shape

    def frame(self, frame: np.ndarray) -> np.ndarray:
        """Augments a frame: uint8 (h, w, 3), BGR -> (height, width, 3)."""
        return self.geometry(self._operate(frame))

    def write(self, frame: np.ndarray, out: np.ndarray) -> None:
        """The same, written into `out`, uint8 (height, width, 3), as RGB."""
        self.geometry.write(self._operate(frame), out)

    def _operate(self, frame):
        for operation in self.operations:
            frame = operation(frame)
        return frame

    def finish(self, video: np.ndarray) -> None:
        """Erases, in place, in the finished frames: uint8 (frames, height, width, 3), RGB."""
        if self.erase_box:
            erase(video, self.erase_box, self.rng)


def draw(
    config: DataConfig,
    height: int,
    width: int,
    flip: bool,
    rngs: Callable[[str], np.random.Generator],
) -> Augmentation:
    """Draws the augmentation of a training clip.

    Args:
      config: resolved.
      height, width: pixels that come out.
      flip: the clip may be mirrored: its data set has no left and right.
      rngs: "geometry", "colour" or "erase" -> the sample's generator for it, so that one of them
        doesn't change what the others draw.

    Returns:
      The `Augmentation`.
    """
    geometry = transforms.train_geometry(
        height,
        width,
        config.resize,
        config.crop_area if config.resize == "random_resized" else config.crop_scale,
        config.flip if flip else 0.0,
        rngs("geometry"),
    )
    operations, box, noise = [], None, None
    if config.rand_augment or config.colour_jitter:
        rng = rngs("colour")
        if config.rand_augment:
            operations += draw_rand_augment(config.rand_augment, rng)
        if config.colour_jitter:
            operations += draw_colour_jitter(config.colour_jitter, rng)
    if config.erase:
        noise = rngs("erase")
        if noise.random() < config.erase:
            box = draw_erase_box(height, width, noise)
    return Augmentation(geometry, tuple(operations), box, noise)
