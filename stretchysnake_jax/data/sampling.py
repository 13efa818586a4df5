"""Which frames of a clip are read: pure functions (number of frames, clip length) -> indices."""

import numpy as np


def sparse(n: int, frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """One frame of each of `frames` equal segments (VideoMamba's "Kinetics_sparse").

    Args:
      n: frames the video has, >= 1.
      frames: frames wanted; more than `n` repeats some.
      rng: draws the place inside every segment, both of its ends included; None: the middle.

    Returns:
      Sorted indices 0..n-1, int64 (frames,).
    """
    starts = _segment_bounds(n, frames)
    if rng is None:
        return sparse_view(n, frames, 0, 1)
    return np.minimum(rng.integers(starts[:-1], starts[1:], endpoint=True), n - 1)


def sparse_view(n: int, frames: int, view: int, views: int) -> np.ndarray:
    """The indices of one of several test clips: `sparse` with evenly spaced places in the segment.

    Args:
      n: frames the video has, >= 1.
      frames: frames wanted.
      view: which clip, 0..views-1.
      views: how many clips; a single one takes the middle, as `sparse` without `rng` does.

    Returns:
      Sorted indices 0..n-1, int64 (frames,).
    """
    offset = int(_segment_length(n, frames) / (views + 1) * (view + 1))
    return np.minimum(_segment_bounds(n, frames)[:-1] + offset, n - 1)


def uniform(n: int, frames: int) -> np.ndarray:
    """Frames spread evenly from the first to the last, the StretchySnake paper's own sampling.

    Args:
      n: frames the video has, >= 1.
      frames: frames wanted.

    Returns:
      Sorted indices 0..n-1, int64 (frames,): linspace, rounded down.
    """
    return np.linspace(0, n - 1, frames).astype(np.int64)


def _segment_length(n: int, frames: int) -> float:
    return max(0, (n - 1) / frames)


def _segment_bounds(n: int, frames: int) -> np.ndarray:
    return np.round(_segment_length(n, frames) * np.arange(frames + 1)).astype(np.int64)
