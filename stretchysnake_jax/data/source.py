"""One door to a clip, whatever it lies in: a video file, a folder of frames, or a record."""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable

import cv2
import numpy as np

from stretchysnake_jax.data import decode, frames, records, sampling
from stretchysnake_jax.data.decode import UnreadableVideo
from stretchysnake_jax.data.index import FrameCounts, open_counts
from stretchysnake_jax.data.lists import ClipList, ListError

Window = tuple[float, float, str]  # see `ClipList.window`


def read_clip(
    path: str,
    choose: Callable[[int], np.ndarray],
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    window: Window | None = None,
    counts: FrameCounts | None = None,
) -> tuple[np.ndarray, int]:
    """Reads the wanted frames of a clip.

    Args:
      path: a video file, a folder of frames, or the address of a record.
      choose, transform: as of `decode.read_clip`; `choose` counts from the start of the window.
      window: the part of the video that is the clip, see `frame_span`. None: all of it.
      counts: of video files, as of `decode.read_clip`.

    Returns:
      The frames, RGB, uint8 (len(choose(n)), h, w, 3), and n, the frames of the clip.

    Raises:
      UnreadableVideo: a frame can't be read, or the window lies behind the end of the video.
    """
    read = functools.partial(decode.read_clip, counts=counts)
    if records.is_address(path):
        read = records.read_record
    elif os.path.isdir(path):
        read = frames.read_folder
    if window is None:
        return read(path, choose, transform)
    rate = frame_rate(path) if window[2] == "seconds" else 1.0

    def choose_inside(n):
        first, end = frame_span(window, n, rate)
        return first + choose(end - first)

    got, n = read(path, choose_inside, transform)
    first, end = frame_span(window, n, rate)
    if window[0] * rate >= n:  # checked here, where n is the true count
        raise UnreadableVideo(
            path,
            f"the clip starts at {window[0]:g} {window[2]}, behind the end of the video, which has "
            f"{n} frames",
        )
    return got, end - first


def frame_span(window: Window, n: int, rate: float) -> tuple[int, int]:
    """The frames of a window: the first, and the one after the last; at least one.

    Args:
      window: (start, end, unit); the end may be inf. Of seconds the frame shown at the end belongs
        to it, as in VideoMamba's trimmed clips, of frames the end does not.
      n: frames of the video.
      rate: frames per unit of the window.
    """
    # Rounded first: 0.28 s at 25 per second come out as 7.000000000000001 frames.
    start, end = (math.floor(round(min(n, edge * rate), 6)) for edge in window[:2])
    first, count = sampling.window(n, start, end - (window[2] == "frames"))
    return first, first + count


def slide(clips: ClipList, length: float, stride: float, threads: int = 8) -> ClipList:
    """Cuts long clips into windows, as VideoMamba does for LVU, COIN and Breakfast.

    Opens every video once. One that can't be read stays a single clip, to be reported where it is
    read.

    Args:
      clips: the list; its windows, if any, are in seconds.
      length, stride: of the windows, seconds, see `sampling.sliding_windows`.
      threads: that open videos.

    Raises:
      ListError: the clips are parts of their videos in frames.
    """
    if clips.windows is not None and clips.unit != "seconds":
        raise ListError("data.window cuts by seconds, but the parts of this list are in frames")
    counts = open_counts(clips.index) if clips.index else None

    def cut(i):
        start, end, _ = clips.window(i) or (0.0, math.inf, "seconds")
        try:
            end = min(end, _duration(clips.paths[i], counts))
        except UnreadableVideo:
            return [(start, math.inf)]
        pieces = sampling.sliding_windows(max(end - start, 0.0), length, stride)
        return [(start + a, start + b) for a, b in pieces]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pieces = list(pool.map(cut, range(len(clips))))
    ids = [i for i, found in enumerate(pieces) for _ in found]
    windows = np.array([piece for found in pieces for piece in found], np.float64)
    missing = clips.missing
    return dataclasses.replace(clips.select(ids), windows=windows, unit="seconds", missing=missing)


def _duration(path: str, counts: FrameCounts | None) -> float:
    """Seconds of a video, by its header unless its frames were counted."""
    _, n = read_clip(path, lambda n: np.zeros(1, np.int64), lambda frame: frame[:1, :1])
    known = counts.get(os.path.abspath(path)) if counts is not None else None
    return (known or n) / frame_rate(path)


def aspect_ratios(clips: ClipList, threads: int = 8) -> np.ndarray:
    """Width / height of every clip as it is shown, rotation applied: reads its first frame.

    Args:
      clips: the list.
      threads: that read.

    Returns:
      float64 (clips,). Clips that can't be read, which are reported where that is tried, have the
      median of the others; 1 if there are none.
    """
    counts = open_counts(clips.index) if clips.index else None

    def look(path):
        try:
            frames, _ = read_clip(path, lambda n: np.zeros(1, np.int64), counts=counts)
        except UnreadableVideo:
            return math.nan
        return frames.shape[2] / frames.shape[1]

    paths = list(dict.fromkeys(clips.paths))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = dict(zip(paths, pool.map(look, paths), strict=True))
    ratios = np.array([found[path] for path in clips.paths], np.float64)
    known = ratios[~np.isnan(ratios)]
    return np.where(np.isnan(ratios), np.median(known) if len(known) else 1.0, ratios)


@functools.lru_cache(maxsize=1 << 16)
def frame_rate(path: str) -> float:
    """Frames per second by the header of a video; its mean where the rate varies.

    Raises:
      UnreadableVideo: the file can't be read, or nothing says the rate, as with a folder of frames.
    """
    decode.set_up_opencv()
    rate = 0.0
    if records.is_address(path):
        rate = records.frame_rate(path) or 0.0
    elif os.path.isfile(path):
        capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
        rate = capture.get(cv2.CAP_PROP_FPS)
        capture.release()
    if rate <= 0 and not os.path.isdir(path) and not records.is_address(path):
        decode.read_clip(path, lambda n: np.zeros(1, np.int64))  # says what is wrong with it
    if not 0 < rate < 1000:
        raise UnreadableVideo(path, "nothing says its frame rate, so times can't be found in it")
    return rate
