"""Weizmann framed as the synthetic clips are: a camera that follows the person.

In Weizmann's 180 x 144 pixels a person is half as tall as in Stick Actions-10 and walks through the
picture, in Stick Actions-10 the camera goes along. All clips were taken from one place, so rows are
cut off alike, and columns follow what differs from the clip's median picture.
"""

import pathlib

import cv2
import numpy as np

from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import decode
from stretchysnake_jax.data.video_file import write_video

# People are 65 to 75 pixels tall and stand on about row 115. In these rows they are as tall (0.65
# of the picture) and stand as low (0.94) as the synthetic figures.
SIDE, TOP = 108, 14
DIFFERS = 25  # levels of 255, in any colour
SMALLEST = 30  # pixels that differ; fewer are noise
# Frames to each side that a position is smoothed over; the clips have 25 frames a second.
SMOOTH = 7
# Pixels of standard deviation, below which a person stays in place and so does the camera.
STILL = 15


def centres(video: np.ndarray) -> np.ndarray:
    """The column that the camera looks at.

    Args:
      video: uint8 (T, H, W, 3).

    Returns:
      float64 (T,): the middle of the largest thing that moves, smoothed; its median where it
      hardly moves; the middle of the picture where nothing does.
    """
    still = np.median(video, 0)
    found = np.full(len(video), np.nan)
    for i, frame in enumerate(video):
        moved = cv2.GaussianBlur(np.abs(frame - still).max(-1), (5, 5), 0) > DIFFERS
        _, _, boxes, _ = cv2.connectedComponentsWithStats(moved.astype(np.uint8))
        left, _, width, _, pixels = max(boxes[1:], key=lambda box: box[4], default=(0,) * 5)
        if pixels >= SMALLEST:
            found[i] = left + width / 2
    seen = np.flatnonzero(~np.isnan(found))
    if not len(seen):
        return np.full(len(video), video.shape[2] / 2)
    if found[seen].std() < STILL:
        return np.full(len(video), np.median(found[seen]))
    found = np.interp(np.arange(len(video)), seen, found[seen])
    for smooth in (np.median, np.mean):
        padded = np.pad(found, SMOOTH, mode="edge")
        found = smooth(np.lib.stride_tricks.sliding_window_view(padded, 2 * SMOOTH + 1), -1)
    return found


def follow(video: np.ndarray) -> np.ndarray:
    """Cuts the square around the person out of every frame.

    Args:
      video: uint8 (T, H, W, 3), H at least TOP + SIDE.

    Returns:
      uint8 (T, SIDE, SIDE, 3); beyond the picture its edge goes on.
    """
    half = SIDE // 2
    wide = np.pad(video[:, TOP : TOP + SIDE], ((0, 0), (0, 0), (half, half), (0, 0)), mode="edge")
    lefts = np.clip(np.round(centres(video)).astype(int), 0, video.shape[2])
    return np.stack([f[:, x : x + SIDE] for f, x in zip(wide, lefts, strict=True)])


def prepare(source: str, out: pathlib.Path, progress: Progress) -> None:
    """Writes every video of `source` followed, lossless, to the same place below `out`.

    What is there already is kept.

    Raises:
      UnreadableVideo: a video can't be read.
      ConfigError: it is too small.
      OSError: it can't be written.
    """
    paths = sorted(path for path in pathlib.Path(source).rglob("*") if path.suffix == ".avi")
    for number, path in enumerate(paths, 1):
        target = out / path.relative_to(source)
        if target.exists():
            continue
        video, _ = decode.read_clip(path, np.arange)
        if video.shape[1] < TOP + SIDE:
            raise ConfigError(
                f"{path} has {video.shape[1]} rows: following takes a video of Weizmann, at least "
                f"{TOP + SIDE} rows"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, follow(video), 25, "FFV1")
        progress.show(f"following: {number}/{len(paths)} videos of Weizmann")
