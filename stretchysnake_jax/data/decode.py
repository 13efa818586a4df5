"""Reading chosen frames of a video file with OpenCV.

Only sequential reading is exact for every container (seeking isn't for variable frame rates,
MPEG-PS and TS), and the frame count of a header is only a hint. So frames are grabbed one after
the other, only the wanted ones are converted, and a file that ends before its header says is read
once more with its true count.
"""

import collections
import functools
import os
import stat
import sys
from collections.abc import Callable

import cv2
import numpy as np

from stretchysnake_jax.data.index import FrameCounts

MAX_HEADER_COUNT = 10_000_000  # a larger one is nonsense: over four days of video
# Grabs that may fail in a row before the file counts as ended: behind a damaged frame there are
# often good ones. At a true end each of them costs microseconds.
PATIENCE = 8
# One decoder thread per file: the loader already decodes clips side by side, and damaged files then
# decode the same way every time. No hardware decoder, for the same answer on every machine.
OPEN = [cv2.CAP_PROP_N_THREADS, 1, cv2.CAP_PROP_HW_ACCELERATION, cv2.VIDEO_ACCELERATION_NONE]


class UnreadableVideo(Exception):
    """A file that gives no frames.

    Attributes:
      path: the file.
      reason: why, in one sentence that names the way out where there is one.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@functools.cache
def set_up_opencv() -> None:
    """Prepares OpenCV in this process, once: single-threaded, and silent about damaged files.

    What OpenCV and FFmpeg would print names no file; `UnreadableVideo` does. OPENCV_LOG_LEVEL and
    OPENCV_FFMPEG_LOGLEVEL, if set, bring the messages back.
    """
    cv2.setNumThreads(0)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)


def read_clip(
    path: str | os.PathLike,
    choose: Callable[[int], np.ndarray],
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    counts: FrameCounts | None = None,
) -> tuple[np.ndarray, int]:
    """Reads the wanted frames of a video.

    Args:
      path: the file.
      choose: the indices wanted of a video of n frames: n -> sorted, may repeat, 0..n-1. It is
        called again if n turns out to be another, so it must be a pure function.
      transform: applied to every frame read, uint8 (h, w, 3) -> (h', w', 3), before the next one is
        decoded, so that no two full-size frames are held. It sees the channels in the order BGR.
        If it has a method `write`, see `to_rgb`, that is called instead.
      counts: true frame counts of earlier reads, and where new ones go. They save a read that would
        contradict the header, and change nothing else.

    Returns:
      The frames, RGB, uint8 (len(choose(n)), h', w', 3), upright if the file is marked as rotated,
      and n. n is the header's count, unless the file contradicted it. Should the frame size change
      in mid-stream, OpenCV scales the frames to the first size.

    Raises:
      UnreadableVideo: no frame could be decoded.
      ValueError: `choose` asks for a frame behind the end.
    """
    set_up_opencv()
    path = os.path.abspath(path)  # "a:b.mp4" would be taken for the address of a protocol
    _check_file(path)
    indexed = counts.get(path) if counts is not None else None
    known = None  # the true count, once the header's is found wrong
    try:
        while True:
            with _Capture(path) as capture:
                count = known or capture.header_count()
                wanted = choose(count) if count else None
                if indexed and not known and _contradicts(indexed, count, wanted):
                    known = count = indexed
                    wanted = choose(count)
                if count:
                    doubt = not known and not indexed
                    frames, true = _read(capture, wanted, count, transform, doubt)
                    if frames is not None:
                        if counts is not None and doubt and count <= len(wanted):
                            counts.learn(path, count)  # it was counted to the end
                        return frames, count
                else:
                    true = capture.count()
                if true == 0:
                    raise UnreadableVideo(path, _no_frames(capture.codec()))
                if known is not None and true >= known:  # or it would be read for ever
                    raise ValueError(f"choose({known}) asks {path} for frame {int(wanted[-1])}")
                if counts is not None and not capture.unconverted:
                    counts.learn(path, true)
                known = true
    except cv2.error as error:
        reason = f"OpenCV can't read it: {error.err or error}"
        raise UnreadableVideo(path, " ".join(reason.split())) from error


def to_rgb(frame: np.ndarray, transform=None, out: np.ndarray | None = None) -> np.ndarray:
    """Transforms a frame and turns BGR into RGB.

    Args:
      frame: uint8 (h, w, 3), BGR.
      transform: as of `read_clip`; either a function or an object such as `transforms.Geometry`,
        whose `shape` is (h', w') and whose `write(frame, out)` does both at once.
      out: where the result belongs, uint8 (h', w', 3); None: in an array of its own.

    Returns:
      `out`, or the array.
    """
    if hasattr(transform, "write"):
        out = np.empty((*transform.shape, 3), np.uint8) if out is None else out
        transform.write(frame, out)
        return out
    rgb = cv2.cvtColor(frame if transform is None else transform(frame), cv2.COLOR_BGR2RGB)
    if out is None:
        return rgb
    out[:] = rgb
    return out


def _contradicts(true: int, count: int, wanted) -> bool:
    """Whether a read by the header's `count` would be found wrong, `true` being right."""
    if not count:
        return True
    return int(wanted[-1]) >= true or (count <= len(wanted) and count != true)


def _read(capture, wanted, count, transform, doubt):
    """Reads `wanted`: (frames, count), or (None, true count) if `count` turned out wrong."""
    clip, filled, passed = None, 0, 0
    for index, repeats in collections.Counter(wanted.tolist()).items():
        passed += capture.skip(index + 1 - passed)
        frame = capture.retrieve() if passed > index else None
        if frame is None:
            return None, min(passed, index)
        if clip is None:
            first = to_rgb(frame, transform)
            clip = np.empty((len(wanted), *first.shape), np.uint8)
            clip[0] = first
        else:
            to_rgb(frame, transform, clip[filled])
        if repeats > 1:
            clip[filled + 1 : filled + repeats] = clip[filled]
        filled += repeats
    # A header's count too small to fill the clip may be wrong (concatenated MPEG streams say 1).
    # Either the file is short, and counting costs little, or it has to be counted.
    if doubt and count <= len(wanted):
        true = passed + capture.count()
        if true != count:
            return None, true
    return clip, count


class _Capture:
    """A video file while it is read, as a context manager.

    Attributes:
      unconverted: a frame that was grabbed could not be converted, so the file ended for the reader
        earlier than it does by counting.
    """

    def __init__(self, path):
        self.unconverted = False
        self._capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, OPEN)
        if not self._capture.isOpened():
            raise UnreadableVideo(path, _why_not_opened(path))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._capture.release()

    def header_count(self) -> int:
        """The number of frames that the header claims; 0 if that is no plausible number."""
        claim = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        return int(claim) if 1 <= claim <= MAX_HEADER_COUNT else 0

    def codec(self) -> str:
        """The four characters that name the codec."""
        fourcc = int(self._capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
        text = fourcc.to_bytes(4, "little").decode("latin-1")
        return "".join(c if c.isalnum() else "?" for c in text)

    def skip(self, frames: int) -> int:
        """Moves past the next `frames` that can be decoded; returns how many there were."""
        grab = self._capture.grab
        for done in range(frames):
            # The first try apart: a generator per frame costs 3 % of decoding a small video.
            if not grab() and not any(grab() for _ in range(PATIENCE - 1)):
                return done
        return frames

    def count(self) -> int:
        """The number of frames that are left; uses them up."""
        return self.skip(sys.maxsize)

    def retrieve(self):
        """The last frame that was passed, BGR; None if it can't be converted."""
        ok, frame = self._capture.retrieve()
        self.unconverted |= not ok
        return frame if ok else None


def _check_file(path) -> None:
    """Raises UnreadableVideo for whatever isn't a file with something in it."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise UnreadableVideo(path, "there is no such file") from None
    except (OSError, ValueError) as error:
        raise UnreadableVideo(path, _no_access(error)) from error
    if stat.S_ISDIR(found.st_mode):
        raise UnreadableVideo(path, "it is a folder, not a video file")
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableVideo(path, "it is not a regular file")
    if not found.st_size:
        raise UnreadableVideo(path, "the file is empty")


def _no_access(error) -> str:
    """Says why the system gave no access to a file."""
    return f"the file can't be opened: {getattr(error, 'strerror', None) or error}"


def _why_not_opened(path) -> str:
    """Says why OpenCV found no video in a file. Only MP4 and QuickTime are looked into."""
    try:
        boxes = _top_boxes(path)
    except OSError as error:
        return _no_access(error)
    if "ftyp" in boxes and "moov" not in boxes:
        return "the file is cut off (an MP4 without its index): copy or download it again"
    if "moov" in boxes:
        start, size = boxes["moov"]
        with open(path, "rb") as file:
            file.seek(start)
            if b"vide" not in file.read(min(size, 1 << 26)):
                return "it holds no video stream, only sound or data"
    return "it is not a video that can be decoded: damaged, only sound, or another kind of file"


def _top_boxes(path) -> dict[str, tuple[int, int]]:
    """The top-level boxes of an MP4 file by name: (offset, size). Empty for other files."""
    boxes: dict[str, tuple[int, int]] = {}
    end = os.path.getsize(path)
    with open(path, "rb") as file:
        start = 0
        while start + 8 <= end and len(boxes) < 64:
            file.seek(start)
            head = file.read(16)
            size = int.from_bytes(head[:4], "big")
            if size == 1:  # a 64-bit size follows the name
                size = int.from_bytes(head[8:16], "big")
            if size == 0:  # up to the end
                size = end - start
            if size < 8 or (start == 0 and head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide")):
                break
            boxes.setdefault(head[4:8].decode("latin-1"), (start, size))
            start += size
    return boxes


def _no_frames(codec: str) -> str:
    """Says why a file that opened gave no frame."""
    way_out = "re-encode it: ffmpeg -i IN -c:v libx264 OUT.mp4"
    if codec.upper() == "AV01":
        return f"it is AV1 video, which this decoder can't read; {way_out}"
    return (
        f"none of its frames (codec {codec}) can be decoded: the file is cut off or damaged, "
        f"or the codec is one that this decoder can't read; if it plays elsewhere, {way_out}"
    )
