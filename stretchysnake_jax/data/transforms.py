"""Geometry of a clip: one box and one flip, drawn once and applied to every frame.

A draw is relative (a share of the frame), so it is made before the size of the frame is known.
"""

import dataclasses
import math

import cv2
import numpy as np


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How every frame of one clip is cut, resized and flipped.

    Attributes:
      height, width: pixels that come out.
      scale: side of the box / side of the largest box of the same aspect as (height, width) that
        fits the frame; None: the whole frame, squashed.
      place: (vertical, horizontal) place of the box, 0 top or left .. 1 bottom or right.
      flip: mirror left and right.
    """

    height: int
    width: int
    scale: float | None = 1.0
    place: tuple[float, float] = (0.5, 0.5)
    flip: bool = False

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The part of a (height, width) frame that is kept, as (top, left, height, width)."""
        if self.scale is None:
            return 0, 0, height, width
        fit = self.scale * min(height / self.height, width / self.width)
        high = min(height, max(1, round(fit * self.height)))
        wide = min(width, max(1, round(fit * self.width)))
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
        top, left, high, wide = self.box(*frame.shape[:2])
        frame = resize(frame[top : top + high, left : left + wide], self.height, self.width)
        return cv2.flip(frame, 1) if self.flip else frame


def resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a frame.

    An axis that shrinks is averaged over the pixels that fall together (INTER_AREA): linear
    interpolation would skip some of them, and fine detail would flicker from frame to frame. An
    axis that grows is interpolated linearly. OpenCV averages only if no axis grows, so there are
    two passes.

    Args:
      frame: uint8 (h, w, 3).
      height, width: pixels wanted.

    Returns:
      uint8 (height, width, 3); `frame` itself if it has that size.
    """
    high, wide = frame.shape[:2]
    if high > height or wide > width:
        size = (min(wide, width), min(high, height))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    if high < height or wide < width:
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    return frame


def train_geometry(
    height: int,
    width: int,
    mode: str,
    crop_scale: float,
    flip: float,
    rng: np.random.Generator,
) -> Geometry:
    """Draws the geometry of a training clip.

    Args:
      height, width: pixels that come out.
      mode: "crop": a box of random size and place; "squash": the whole frame.
      crop_scale: smallest box / largest box, 0..1.
      flip: chance of a horizontal flip.
      rng: always gives four numbers, whatever the mode.

    Returns:
      The `Geometry`.
    """
    scale, vertical, horizontal, coin = 1 - rng.random(4)  # each in (0, 1]
    return Geometry(
        height,
        width,
        scale=crop_scale + (1 - crop_scale) * scale if mode == "crop" else None,
        place=(vertical, horizontal),
        flip=coin <= flip,
    )


def eval_geometry(height: int, width: int, mode: str) -> Geometry:
    """The geometry of an evaluation clip: the centre ("crop") or the whole frame ("squash")."""
    return Geometry(height, width, scale=1.0 if mode == "crop" else None)
