"""Writing files of prepared clips, which `records` reads.

A file holds, per clip, the records of its parts, an encoded image each or a short video, and then
the record that describes it, JSON:

    version   of this form
    first     the record of its first part; the others follow
    per_part  frames in a part, but for the last
    frames    that are stored
    rate      of those, per second; null if nothing says it
    size      [height, width]
    path, window, label, every, decoded   where it comes from: its file, the part of it (null: all),
              the class by the first list that has it, every how many frames one was kept, and the
              frames of the clip before that, counted

and in the end a record of all its clips: path, window, record, frames, bytes, or what is wrong.
"""

import dataclasses
import json
import os
import pathlib
import tempfile

import cv2
import numpy as np

from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import decode, records, source, transforms
from stretchysnake_jax.whole_file import whole_file

# Frames of a part: a larger one is smaller on disk and slower to read a few frames from.
FORMATS = {"jpeg": 1, "video": 100}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How clips are stored.

    Attributes:
      size: short side in pixels; smaller clips are not grown.
      format: one of `FORMATS`: "jpeg", or "video", MPEG-4 part 2 as OpenCV writes it.
      quality: of JPEGs, 1 to 100.
      every: one of so many frames is kept.

    Raises:
      ConfigError: a value out of range.
    """

    size: int = 256
    format: str = "jpeg"
    quality: int = 85
    every: int = 1

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ConfigError(f"the format is {self.format!r}: it takes {' or '.join(FORMATS)}")
        for name, low, high in (("size", 16, 16384), ("quality", 1, 100), ("every", 1, 1000)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"the {name} is {value}: it takes {low} to {high}")


def write_file(file: str, clips: list[tuple], settings: Settings) -> int:
    """Writes one file, as a whole or not at all.

    Args:
      file: its path.
      clips: (path, window or None, class) of each.
      settings: how clips are stored.

    Returns:
      The number of clips, unreadable ones counted.

    Raises:
      OSError: it can't be written, such as on a full disk.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    decode.set_up_opencv()
    try:
        with whole_file(file) as part:
            # What is stored is compressed already.
            out = _Records(ArrayRecordWriter(str(part), "group_size:1,uncompressed"))
            try:
                contents = [_write_clip(out, *clip, settings) for clip in clips]
                out.write(records.CONTENTS + json.dumps(contents).encode())
            finally:
                out.close()
            with open(part, "rb") as written:
                os.fsync(written.fileno())
            # The writer tells some errors late, and a file without an end counts no record.
            if ArrayRecordReader(str(part)).num_records() != out.count:
                raise RuntimeError("it came out incomplete")
    except RuntimeError as error:  # ArrayRecord's
        reason = str(error).split(";")[0].rpartition(": ")[2]
        raise OSError(f"{file} can't be written: {reason}: is the disk full?") from error
    return len(clips)


class _Records:
    """A file of records that counts them and their bytes."""

    def __init__(self, writer):
        self._writer, self.count, self.bytes = writer, 0, 0

    def write(self, data: bytes) -> None:
        self._writer.write(data)
        if not self._writer.ok():
            raise RuntimeError("writing failed")
        self.count, self.bytes = self.count + 1, self.bytes + len(data)

    def close(self) -> None:
        self._writer.close()


def _write_clip(out, path, window, label, settings) -> dict:
    """Writes the records of one clip; returns its entry in the contents of the file."""
    entry = {"path": path, "window": window, "record": None, "frames": 0, "bytes": 0}
    before = out.bytes
    parts = _Parts(out, settings)
    try:
        n = parts.read(path, window)
    except decode.UnreadableVideo as error:
        return entry | {"wrong": error.reason}
    try:
        rate = source.frame_rate(path) / settings.every
    except decode.UnreadableVideo:  # a folder of frames has none
        rate = None
    clip = {"version": records.VERSION, "first": parts.first, "per_part": parts.per_part}
    clip |= {"frames": parts.frames, "rate": rate, "size": parts.size}
    clip |= {"path": path, "window": window, "label": label, "every": settings.every, "decoded": n}
    out.write(records.CLIP + json.dumps(clip).encode())
    entry |= {"record": out.count - 1, "frames": parts.frames, "bytes": out.bytes - before}
    return entry | {"wrong": None}


class _Parts:
    """The parts of one clip, written while it is decoded: no more than a frame is held, and the
    bytes of a part.

    Attributes:
      first: the record of the first part.
      per_part: frames in a part.
      frames: written so far.
      size: [height, width]; None before the first frame.
    """

    def __init__(self, out: _Records, settings: Settings):
        self._out, self._settings = out, settings
        self.per_part, self.size = FORMATS[settings.format], None
        self._restart()

    def _restart(self):
        self.first, self.frames, self._video = self._out.count, 0, None

    def read(self, path, window) -> int:
        """Reads a clip and writes its parts; returns its number of frames, skipped ones counted."""
        every, seen = self._settings.every, 0  # frames in this reading

        def choose(n):
            # The clip is read once more if its header was wrong. What is written already is right,
            # unless the place of a window was derived from the header.
            nonlocal seen
            seen = 0
            if window:
                self._restart()
            return np.arange(n)  # skipped ones too, so that they are counted

        def keep(frame):
            nonlocal seen
            if seen == self.frames * every:
                self._write(frame)
            seen += 1
            return frame[:1, :1]

        with tempfile.TemporaryDirectory() as folder:
            self._file = os.path.join(folder, "part.mp4")
            _, n = source.read_clip(path, choose, keep, window)
            self._end_video()
        if self.frames != -(-seen // every):
            reason = f"read twice, it gave fewer frames the second time, {seen}"
            raise decode.UnreadableVideo(path, reason)
        return n

    def _write(self, frame):
        if self.size is None:
            self.size = self._target(*frame.shape[:2])
        if list(frame.shape[:2]) != self.size:
            frame = transforms.resize(frame, *self.size)
        self.frames += 1
        if self._settings.format == "jpeg":
            quality = [cv2.IMWRITE_JPEG_QUALITY, self._settings.quality]
            self._out.write(cv2.imencode(".jpg", frame, quality)[1].tobytes())
            return
        if self._video is None:
            # The rate doesn't matter, and not every one can be written.
            codec = cv2.VideoWriter_fourcc(*"mp4v")
            self._video = cv2.VideoWriter(self._file, cv2.CAP_FFMPEG, codec, 25.0, self.size[::-1])
            self._in_video = 0
        self._video.write(np.ascontiguousarray(frame))
        self._in_video += 1
        if self._in_video == self.per_part:
            self._end_video()

    def _end_video(self):
        if self._video is None:
            return
        self._video.release()
        self._video = None
        # OpenCV reports no error: what it wrote is looked at.
        if cv2.VideoCapture(self._file).get(cv2.CAP_PROP_FRAME_COUNT) != self._in_video:
            raise OSError(f"OpenCV can't write mp4v video to {self._file}: is the disk full?")
        self._out.write(pathlib.Path(self._file).read_bytes())

    def _target(self, height: int, width: int) -> list[int]:
        """Height and width of what is stored."""
        scale = min(1.0, self._settings.size / min(height, width))
        if self._settings.format == "jpeg":
            return [round(height * scale), round(width * scale)]
        return [max(2, 2 * round(side * scale / 2)) for side in (height, width)]  # mp4v takes even
