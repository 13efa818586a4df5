"""Readers of video files that `stretchysnake bench data` compares ours with.

Each reads the wanted frames as ours does, one decoder thread per file, frames in order and none
twice, and squashes them to the wanted size. Those of other packages are there if these are.
"""

import functools
import os
from collections.abc import Callable

import cv2
import numpy as np

from stretchysnake_jax.data import decode, source, transforms
from stretchysnake_jax.data.index import FrameCounts

# (path, sorted indices int (n,), side in pixels) -> uint8 (n, side, side, 3), RGB
Reader = Callable[[str, np.ndarray, int], np.ndarray]


def read_ours(path, wanted, side, counts: FrameCounts | None = None) -> np.ndarray:
    """`source.read_clip`, as the loader calls it."""
    geometry = transforms.Geometry(side, side, scale=None)
    return source.read_clip(path, lambda _: wanted, geometry, None, counts)[0]


def read_bare(path, wanted, side) -> np.ndarray:
    """OpenCV's decoding alone: grabs all frames up to the last wanted one, converts these; no more.

    Returns:
      The last frame as it is: the others would have to be held.
    """
    more = range(decode.PATIENCE - 1)  # behind a damaged frame, as ours
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, decode.OPEN)
    chosen, frame = set(wanted.tolist()), None
    for i in range(int(wanted[-1]) + 1):
        grabbed = capture.grab() or any(capture.grab() for _ in more)
        if grabbed and i in chosen:
            frame = capture.retrieve()[1]
    capture.release()
    return frame


def read_loop(path, wanted, side) -> np.ndarray:
    """The loop of OpenCV's tutorials: reads every frame, keeps the wanted ones."""
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, decode.OPEN)
    chosen, frames = set(wanted.tolist()), []
    for i in range(int(wanted[-1]) + 1):
        ok, frame = capture.read()
        if ok and i in chosen:
            frames.append(cv2.cvtColor(_shrink(frame, side), cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(frames)


def _read_pyav(path, wanted, side, fused=False):
    import av

    shrink = {"width": side, "height": side, "interpolation": "AREA"} if fused else {}
    chosen, frames = set(wanted.tolist()), []
    with av.open(path, metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(stream)):
            if i in chosen:
                frames.append(_shrink(frame.to_ndarray(format="rgb24", **shrink), side))
            if i == wanted[-1]:
                break
    return np.stack(frames)


def _read_decord(path, wanted, side, fused=False):
    import decord

    shrink = {"width": side, "height": side} if fused else {}
    reader = decord.VideoReader(path, num_threads=1, **shrink)
    return np.stack([_shrink(frame, side) for frame in reader.get_batch(wanted).asnumpy()])


def _read_torchcodec(path, wanted, side):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    frames = decoder.get_frames_at(indices=wanted.tolist()).data.numpy()
    return np.stack([_shrink(frame, side) for frame in frames])


def _shrink(frame, side):
    return transforms.resize(frame, side, side, fast=False)  # OpenCV's, as their users have it


# name -> (module, reader). "fused": frames are shrunk while their colours are converted, by another
# filter than ours: less work, and other pixels.
OTHERS: dict[str, tuple[str, Reader]] = {
    "pyav": ("av", _read_pyav),
    "decord": ("decord", _read_decord),
    "torchcodec": ("torchcodec.decoders", _read_torchcodec),
    "pyav fused": ("av", functools.partial(_read_pyav, fused=True)),
    "decord fused": ("decord", functools.partial(_read_decord, fused=True)),
}
