"""Which frames of a clip are read: pure functions (number of frames, clip length) -> indices."""

import math

import numpy as np

from stretchysnake_jax.config import SAMPLINGS, ConfigError, nearest


def choose(
    name: str,
    n: int,
    frames: int,
    *,
    stride: int = 4,
    rng: np.random.Generator | None = None,
    view: int = 0,
    views: int = 1,
) -> np.ndarray:
    """The frame indices of a clip by the name of the sampling, as `data.sampling` has it.

    Args:
      name: one of `config.SAMPLINGS`.
      n: frames the video has, >= 1.
      frames: frames wanted.
      stride: "dense" only: frames of the video per frame of the clip.
      rng: draws a training clip ("uniform" draws nothing); None: a test clip.
      view: which test clip, 0..views-1.
      views: how many test clips; a single one lies in the middle. "uniform" has one.

    Returns:
      Sorted indices 0..n-1, int64 (frames,).

    Raises:
      ConfigError: an unknown name, or several views of "uniform".
    """
    if name == "uniform":
        if views != 1:
            raise ConfigError(f"{views} test clips of 'uniform' sampling: it takes 1")
        return uniform(n, frames)
    if name == "sparse":
        return sparse_view(n, frames, view, views) if rng is None else sparse(n, frames, rng)
    if name == "dense":
        if rng is None:
            return dense_view(n, frames, stride, view, views)
        end = int(rng.integers(min(n - 1, frames * stride), n))  # n itself is never drawn
        return dense(n, frames, stride, end)
    if name == "ssv2":
        return segment_view(n, frames, view, views) if rng is None else segment(n, frames, rng)
    raise ConfigError(f"sampling is {name!r}: {nearest(name, SAMPLINGS)}")


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


def dense(n: int, frames: int, stride: int, end: int) -> np.ndarray:
    """A clip of about `frames * stride` frames of the video (VideoMamba's "Kinetics").

    VideoMamba draws `end` in training. In validation it takes (n - frames * stride) // 2, half a
    clip too early, and may then ask for frames before the first; `dense_view` is the centre.

    Args:
      n: frames the video has, >= 1.
      frames: frames wanted.
      stride: frames of the video per frame of the clip.
      end: the frame behind the clip; without a meaning if the video isn't longer than the clip: it
        is then read from its start, every `stride`-th frame or so, and its last frame repeated.

    Returns:
      Sorted indices up to n-1, int64 (frames,); from 0 on if `end` is at least frames * stride.
    """
    span = frames * stride
    if n > span:
        indices = np.clip(np.linspace(end - span, end, frames), end - span, end - 1)
    else:
        indices = np.full(frames, n - 1.0)
        points = n // stride
        indices[:points] = np.minimum(np.linspace(0, n, points), n - 1)
    return indices.astype(np.int64)


def dense_view(n: int, frames: int, stride: int, view: int, views: int) -> np.ndarray:
    """The indices of one of several test clips, every `stride`-th frame, spread over the video.

    Args:
      n: frames the video has, >= 1; one shorter than the clip repeats its last frame taken.
      frames: frames wanted.
      stride: frames of the video per frame of the clip.
      view: which clip, 0..views-1; the first starts the video, the last ends it.
      views: how many clips; a single one lies in the middle.

    Returns:
      Sorted indices 0..n-1, int64 (frames,).
    """
    room = max(n - frames * stride, 0)
    start = room // 2 if views == 1 else math.floor(view * (room / (views - 1)))
    indices = np.arange(start, n, stride)[:frames]
    return np.pad(indices, (0, frames - len(indices)), "edge").astype(np.int64)


def segment(n: int, frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """One frame of each of `frames` segments of n // frames frames (TSN; VideoMamba's "SSV2").

    Frames that are left over at the end are never read.

    Args:
      n: frames the video has, >= 1.
      frames: frames wanted.
      rng: draws the place inside every segment, and gives frame 0 throughout if n < frames; None:
        the middle, and all n frames behind repeats of the first if n < frames.

    Returns:
      Sorted indices 0..n-1, int64 (frames,).
    """
    length = n // frames
    if rng is None:
        if not length:
            return np.maximum(np.arange(frames) - (frames - n), 0)
        return np.arange(frames) * length + length // 2
    return np.arange(frames) * length + (rng.integers(length, size=frames) if length else 0)


def segment_view(n: int, frames: int, view: int, views: int) -> np.ndarray:
    """The indices of one of several test clips of SSv2: `frames` equal steps, shifted by a share.

    Args:
      n: frames the video has, >= 1.
      frames: frames wanted.
      view: which clip, 0..views-1; the first starts at frame 0.
      views: how many clips; a single one is the second of two, in the middle of the steps.

    Returns:
      Sorted indices 0..n-1, int64 (frames,).
    """
    if views == 1:
        view, views = 1, 2
    step = n / frames
    return np.floor(view * step / views + step * np.arange(frames)).astype(np.int64)


def window(n: int, start: int, end: int) -> tuple[int, int]:
    """The part of a video that a trimmed clip takes; a sampling of `count` frames goes into it.

    Args:
      n: frames the video has, >= 1.
      start, end: first and last frame; beyond the video they mean its last frame.

    Returns:
      (first, count): count >= 1 frames from `first` on.
    """
    first = min(max(start, 0), n - 1)
    return first, max(min(end, n - 1) - first + 1, 1)


def sliding_windows(duration: float, length: float, stride: float) -> list[tuple[float, float]]:
    """The trimmed clips of a long video, as in VideoMamba's LVU, COIN and Breakfast readers.

    Args:
      duration: of the video, seconds.
      length: of a window, seconds; a shorter video is one window.
      stride: from the start of a window to that of the next, seconds.

    Returns:
      (start, end) in seconds; a last window shorter than half of `length` is left out.
    """
    if duration < length:
        return [(0.0, float(duration))]
    starts = (i * stride for i in range(math.ceil(duration / stride)))
    cut = [(float(s), float(min(s + length, duration))) for s in starts]
    return [(start, end) for start, end in cut if end - start >= length / 2]


def _segment_length(n: int, frames: int) -> float:
    return max(0, (n - 1) / frames)


def _segment_bounds(n: int, frames: int) -> np.ndarray:
    return np.round(_segment_length(n, frames) * np.arange(frames + 1)).astype(np.int64)
