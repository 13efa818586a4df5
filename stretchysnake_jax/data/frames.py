"""Clips whose frames are images of their own: files of a folder, or the bytes of a record."""

import collections
import os
import re
from collections.abc import Callable

import cv2
import numpy as np

from stretchysnake_jax.data.decode import UnreadableVideo, set_up_opencv, to_rgb

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def frame_files(folder) -> list[str]:
    """The names of the frames in a folder, in the order of their numbers.

    The number is the last one in a name, with or without leading zeros: img_00001.jpg, frame10.png.
    Optical flow beside the frames (flow_x_00001.jpg, as mmaction writes it) and images without a
    number (a thumbnail) are no frames.

    Raises:
      UnreadableVideo: there are none, or more than one sequence of them.
    """
    folder = os.fspath(folder)
    sequences = collections.defaultdict(list)
    for name in os.listdir(folder):
        stem, suffix = os.path.splitext(name)
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", stem)
        hidden = name.startswith((".", "flow_"))
        if match and suffix.lower() in IMAGE_SUFFIXES and not hidden:
            sequences[match[1], match[3]].append((int(match[2]), name))
    if not sequences:
        raise UnreadableVideo(folder, "it is a folder without frames (img_00001.jpg, ...)")
    if len(sequences) > 1:
        names = ", ".join(sorted(min(frames)[1] for frames in sequences.values())[:3])
        raise UnreadableVideo(
            folder, f"it holds more than one sequence of images ({names}): a clip has one"
        )
    return [name for _, name in sorted(next(iter(sequences.values())))]


def read_folder(
    path,
    choose: Callable[[int], np.ndarray],
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, int]:
    """Reads the wanted frames of a folder of images; see `decode.read_clip`.

    Raises:
      UnreadableVideo: there are no frames, or a wanted one can't be read.
    """
    path = os.path.abspath(path)
    try:
        names = frame_files(path)
    except OSError as error:
        raise UnreadableVideo(path, f"the folder can't be read: {error.strerror}") from error

    def load(i):
        try:
            return np.fromfile(os.path.join(path, names[i]), np.uint8)
        except OSError as error:
            reason = f"frame {names[i]} can't be opened: {error.strerror}"
            raise UnreadableVideo(path, reason) from error

    return read_images(path, names, load, choose, transform)


def read_images(path, names, load, choose, transform=None) -> tuple[np.ndarray, int]:
    """Reads the wanted ones of a sequence of encoded images.

    Args:
      path: of the clip, for messages.
      names: of the images, for messages.
      load: index -> the encoded image, uint8 (bytes,).
      choose, transform: as of `decode.read_clip`.

    Returns:
      As `decode.read_clip`. Images of another size than the first are brought to its size.

    Raises:
      UnreadableVideo: a wanted image can't be decoded.
    """
    set_up_opencv()
    wanted = choose(len(names))
    frames, size = {}, None
    for i in sorted(set(wanted.tolist())):
        data = load(i)
        frame = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
        if frame is None:
            raise UnreadableVideo(path, f"frame {names[i]} is no image that can be decoded")
        size = size or frame.shape[1::-1]
        if frame.shape[1::-1] != size:
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        frames[i] = to_rgb(frame, transform)
    return np.stack([frames[i] for i in wanted.tolist()]), len(names)
