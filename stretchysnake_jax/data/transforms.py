"""Geometry of a clip: one box and one flip, drawn once and applied to every frame.

A draw is relative (a share of the frame), so it is made before the size of the frame is known.
"""

import dataclasses
import math

import cv2
import numpy as np

from stretchysnake_jax.data import area_resize

RATIO = (3 / 4, 4 / 3)  # width / height of a random-resized box, over that of what comes out
_TRIES = 10  # boxes drawn before the centre is taken


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How every frame of one clip is cut, resized and flipped.

    Attributes:
      height, width: pixels that come out.
      scale: side of the box / side of the largest box of the same aspect as (height, width) that
        fits the frame; None: the whole frame, squashed.
      place: (vertical, horizontal) place of the box, 0 top or left .. 1 bottom or right.
      flip: mirror left and right.
      view: (j, n): box j of n spread evenly over the room that is left, instead of `place`.
    """

    height: int
    width: int
    scale: float | None = 1.0
    place: tuple[float, float] = (0.5, 0.5)
    flip: bool = False
    view: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        return self.height, self.width

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The part of a (height, width) frame that is kept, as (top, left, height, width)."""
        if self.scale is None:
            return 0, 0, height, width
        fit = self.scale * min(height / self.height, width / self.width)
        high = min(height, max(1, round(fit * self.height)))
        wide = min(width, max(1, round(fit * self.width)))
        if self.view:
            j, last = self.view[0], self.view[1] - 1
            return (height - high) * j // last, (width - wide) * j // last, high, wide
        # ceil - 1 makes all d + 1 offsets equally likely and puts 0.5 at d // 2, the centre crop.
        top, left = (
            max(0, math.ceil(share * (d + 1)) - 1)
            for share, d in zip(self.place, (height - high, width - wide), strict=True)
        )
        return top, left, high, wide

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Applies the geometry to one frame.

        Args:
          frame: uint8 (h, w, 3).

        Returns:
          uint8 (height, width, 3); it may share memory with `frame`.
        """
        frame = resize(self._cut(frame), self.height, self.width)
        return cv2.flip(frame, 1) if self.flip else frame

    def write(self, frame: np.ndarray, out: np.ndarray) -> None:
        """Applies the geometry to one frame, BGR, and writes the result as RGB.

        Args:
          frame: uint8 (h, w, 3).
          out: uint8 (height, width, 3), overwritten.
        """
        cut = self._cut(frame)
        if area_resize.shrink(cut, out, swap=True, flip=self.flip):
            return
        cut = resize(cut, self.height, self.width)
        cv2.cvtColor(cv2.flip(cut, 1) if self.flip else cut, cv2.COLOR_BGR2RGB, dst=out)

    def _cut(self, frame):
        top, left, high, wide = self.box(*frame.shape[:2])
        return frame[top : top + high, left : left + wide]


@dataclasses.dataclass(frozen=True, eq=False)
class RandomResized(Geometry):
    """A box of random area and ratio, the "Inception crop" as torchvision draws it.

    Attributes:
      area: smallest box / frame, areas.
      draws: numbers 0..1 for area, ratio, top and left of every try, float (tries, 4). The first
        box that fits is taken; should none, the largest in the centre with an allowed ratio.
    """

    area: float = 0.08
    draws: np.ndarray | None = None

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The part of a (height, width) frame that is kept, as (top, left, height, width)."""
        low, high = (ratio * self.width / self.height for ratio in RATIO)
        for area, ratio, vertical, horizontal in self.draws:
            pixels = height * width * (self.area + (1 - self.area) * area)
            aspect = low * (high / low) ** ratio
            wide, tall = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < wide <= width and 0 < tall <= height:
                top, left = (
                    min(d, int(share * (d + 1)))
                    for share, d in ((vertical, height - tall), (horizontal, width - wide))
                )
                return top, left, tall, wide
        tall = min(height, max(1, round(width / low)))
        wide = min(width, max(1, round(height * high)))
        return (height - tall) // 2, (width - wide) // 2, tall, wide


def resize(frame: np.ndarray, height: int, width: int, fast: bool = True) -> np.ndarray:
    """Resizes a frame.

    An axis that shrinks is averaged over the pixels that fall together (INTER_AREA): linear
    interpolation would skip some of them, and fine detail would flicker from frame to frame. An
    axis that grows is interpolated linearly. OpenCV averages only if no axis grows, so there are
    two passes.

    Args:
      frame: uint8 (h, w, 3).
      height, width: pixels wanted.
      fast: whether `area_resize` may do it; the pixels are the same.

    Returns:
      uint8 (height, width, 3); `frame` itself if it has that size.
    """
    high, wide = frame.shape[:2]
    if high > height or wide > width:
        size = (min(wide, width), min(high, height))
        small = np.empty((*size[::-1], 3), np.uint8)
        if not (fast and area_resize.shrink(frame, small)):
            small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        frame = small
    if high < height or wide < width:
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    return frame


def train_geometry(
    height: int,
    width: int,
    mode: str,
    smallest: float,
    flip: float,
    rng: np.random.Generator,
) -> Geometry:
    """Draws the geometry of a training clip.

    Args:
      height, width: pixels that come out.
      mode: "crop": a box of random size and place; "random_resized": of random ratio, too;
        "squash": the whole frame.
      smallest: 0..1, smallest box / largest box, by their sides ("crop") or their areas
        ("random_resized").
      flip: chance of a horizontal flip.
      rng: its first four numbers are drawn whatever the mode.

    Returns:
      The `Geometry`.
    """
    scale, vertical, horizontal, coin = 1 - rng.random(4)  # each in (0, 1]
    if mode == "random_resized":
        draws = rng.random((_TRIES, 4))
        return RandomResized(height, width, flip=coin <= flip, area=smallest, draws=draws)
    return Geometry(
        height,
        width,
        scale=smallest + (1 - smallest) * scale if mode == "crop" else None,
        place=(vertical, horizontal),
        flip=coin <= flip,
    )


def eval_geometry(height: int, width: int, mode: str, crop: int = 0, crops: int = 1) -> Geometry:
    """The geometry of an evaluation clip.

    Args:
      height, width: pixels that come out.
      mode: "squash": the whole frame; else the largest box of the shape of what comes out.
      crop, crops: which of several boxes, spread evenly along the side that has room; a single one
        lies in the centre.

    Returns:
      The `Geometry`.
    """
    if mode == "squash":
        return Geometry(height, width, scale=None)
    return Geometry(height, width, view=(crop, crops) if crops > 1 else None)
