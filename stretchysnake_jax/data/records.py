"""Clips in ArrayRecord files: as `stretchysnake data prepare` writes them, and as TFDS does, read
without TFDS and without TensorFlow.

A clip has the address FILE#INDEX. In our own files it is a row of records that hold its frames,
parts, and one behind them that describes them, which the address names: `CLIP` and JSON. So a clip
is written while it is decoded, and of a long one only the wanted frames are read. The last record
of a file, `CONTENTS` and JSON, lists its clips.

In files of TFDS a clip is one record, a serialised tf.train.Example; the few rules of protocol
buffers that this message needs are spelled out here.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from stretchysnake_jax.data import decode, frames
from stretchysnake_jax.data.decode import UnreadableVideo

CLIP, CONTENTS = b"stretchysnake clip\n", b"stretchysnake contents\n"
VERSION = 1  # of our own files
_ADDRESS = re.compile(r"(.+\.array_?record.*)#(\d+)")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


def is_address(path) -> bool:
    """Whether a path names a record in an ArrayRecord file."""
    return _ADDRESS.fullmatch(os.fspath(path)) is not None


def read_example(address: str) -> dict[str, list]:
    """Reads the record of an address.

    Returns:
      Feature name -> its values: bytes, or ints.

    Raises:
      UnreadableVideo: there is no such file or record, or it is no tf.train.Example.
    """
    return _parse(parse_example, address, _read_bytes(address))


def _read_bytes(address: str, index: int | None = None) -> bytes:
    """The record of an address, or another one of its file."""
    file, named = _ADDRESS.fullmatch(address).groups()
    if not os.path.isfile(file):
        raise UnreadableVideo(address, "there is no such file")
    return _parse(
        lambda i: _open(file).read([i])[0], address, int(named) if index is None else index
    )


def _parse(read: Callable, address: str, data):
    """`read(data)`; what it raises becomes UnreadableVideo."""
    try:
        return read(data)
    except (RuntimeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnreadableVideo(address, f"the record can't be read: {reason}") from error


@functools.lru_cache(maxsize=64)
def _open(file: str):
    """The reader of a file, which threads may share. Small buffers: records are read one by one."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(file, options="readahead_buffer_size:0", file_reader_buffer_size=32768)


def read_record(
    address: str,
    choose: Callable[[int], np.ndarray],
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, int]:
    """Reads the wanted frames of a record; see `decode.read_clip`.

    In files of TFDS the feature "video" (or "image") is either encoded frames (the Video feature)
    or one encoded video file.

    Raises:
      UnreadableVideo: the record or a wanted frame can't be read.
    """
    data = _read_bytes(address)
    if data.startswith(CLIP):
        return _read_parts(address, _parse_clip(address, data), choose, transform)
    example = _parse(parse_example, address, data)
    values = example.get("video") or example.get("image") or []
    if not values or not isinstance(values[0], bytes):
        names = ", ".join(example)
        raise UnreadableVideo(address, f"the record holds no encoded video, only: {names}")
    if "video/shape" in example:
        raise UnreadableVideo(
            address,
            "the record holds raw pixels: prepare the data set again with encoded frames "
            "(tfds.features.Video) or the bytes of the files",
        )
    if len(values) > 1 or values[0].startswith((b"\xff\xd8", b"\x89PNG")):
        names = [f"{i} of the record" for i in range(len(values))]
        return frames.read_images(
            address, names, lambda i: np.frombuffer(values[i], np.uint8), choose, transform
        )
    return _read_video(address, values[0], choose, transform)


def _read_video(address, data: bytes, choose, transform) -> tuple[np.ndarray, int]:
    """Reads the wanted frames of an encoded video file."""
    # OpenCV reads files. A temporary one costs little beside decoding it.
    with tempfile.NamedTemporaryFile(suffix=".video") as file:
        file.write(data)
        file.flush()
        try:
            return decode.read_clip(file.name, choose, transform)
        except UnreadableVideo as error:
            raise UnreadableVideo(address, error.reason) from error


def _parse_clip(address: str, data: bytes) -> dict:
    """The description of a clip of our own, as `record_writer` documents it."""
    clip = _parse(json.loads, address, data[len(CLIP) :])
    if clip["version"] > VERSION:
        reason = f"it is prepared in form {clip['version']}, this version reads up to {VERSION}"
        raise UnreadableVideo(address, f"{reason}: install a newer one")
    return clip


def _read_parts(address: str, clip: dict, choose, transform) -> tuple[np.ndarray, int]:
    """Reads the wanted frames of a clip of our own; other parts than theirs are not touched."""
    count, per_part, first = clip["frames"], clip["per_part"], clip["first"]
    if per_part == 1:

        def load(i):
            return np.frombuffer(_read_bytes(address, first + i), np.uint8)

        return frames.read_images(address, range(count), load, choose, transform)
    wanted, got = choose(count), []
    for part in np.unique(wanted // per_part).tolist():
        inside = wanted[wanted // per_part == part] - part * per_part
        data = _read_bytes(address, first + part)
        got.append(_read_video(address, data, lambda n, inside=inside: inside, transform)[0])
    return np.concatenate(got), count


def frame_rate(address: str) -> float | None:
    """Frames per second of a clip of our own; None where that isn't known.

    Raises:
      UnreadableVideo: the record can't be read.
    """
    data = _read_bytes(address)
    return _parse_clip(address, data)["rate"] if data.startswith(CLIP) else None


def read_contents(file) -> list[dict]:
    """What the last record of one of our own files says about its clips, see `record_writer`.

    Raises:
      ValueError: the file is another or not whole.
    """
    try:
        # Not the reader that is kept: the file may have been made anew.
        reader = _open.__wrapped__(os.fspath(file))
        # A file that was cut off counts no record.
        data = reader.read([max(0, reader.num_records() - 1)])[0]
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{file} is no whole ArrayRecord file") from error
    if not data.startswith(CONTENTS):
        raise ValueError(f"{file} was not written by stretchysnake data prepare")
    return json.loads(data[len(CONTENTS) :])


def parse_example(data: bytes) -> dict[str, list]:
    """Parses a serialised tf.train.Example; features of floats are left out.

    Example { Features 1 { map 1 { string 1, Feature 2 { BytesList 1 | FloatList 2 | Int64List 3 }
    } } }, and the lists hold their values in field 1, numbers packed.

    Returns:
      Feature name -> its values: bytes, or ints.

    Raises:
      ValueError: it is no such message.
    """
    found: dict[str, list] = {}
    for features in _values(memoryview(data), 1):
        for entry in _values(features, 1):
            name = bytes(next(_values(entry, 1), b"")).decode()
            for feature in _values(entry, 2):
                for values in _values(feature, 1):
                    found[name] = [bytes(value) for value in _values(values, 1)]
                for values in _values(feature, 3):
                    found[name] = [_signed(x) for v in _values(values, 1) for x in _numbers(v)]
    return found


def _values(message, wanted: int) -> Iterator:
    """The values of one field of a message: memoryviews, or ints for single numbers."""
    if not isinstance(message, memoryview):
        raise ValueError("it is no tf.train.Example")
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind, size = key & 7, {_FIXED64: 8, _FIXED32: 4}.get(key & 7)
        if kind == _VARINT:
            value, position = _varint(message, position)
        else:
            if kind == _BYTES:
                size, position = _varint(message, position)
            if size is None or position + size > len(message):
                raise ValueError("it is no tf.train.Example")
            value, position = message[position : position + size], position + size
        if key >> 3 == wanted:
            yield value


def _numbers(value) -> Iterator[int]:
    """The numbers of a packed field, or the number of one that isn't."""
    if isinstance(value, int):
        yield value
        return
    position = 0
    while position < len(value):
        number, position = _varint(value, position)
        yield number


def _varint(message, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first: (number, position after it)."""
    number = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        number, position, shift = number | (byte & 127) << shift, position + 1, shift + 7
        if byte < 128:
            return number, position
    raise ValueError("it is no tf.train.Example")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
