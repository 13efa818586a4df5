"""Video files that are there as a whole or not at all."""

import pathlib

import cv2
import numpy as np


def write_video(path, video: np.ndarray, rate: float, codec: str = "mp4v") -> None:
    """Writes a video file; a failure leaves none, nor a part of one.

    Args:
      path: the file; its suffix says the container.
      video: RGB, uint8 (T, H, W, 3).
      rate: frames per second.
      codec: four letters, such as the lossless "FFV1", which takes ".avi" or ".mkv".

    Raises:
      OSError: OpenCV can't write it, or not all of it.
    """
    path = pathlib.Path(path)
    part = path.with_suffix(f".tmp{path.suffix}")  # OpenCV goes by the suffix
    height, width = video.shape[1:3]
    code = cv2.VideoWriter_fourcc(*codec)
    writer = cv2.VideoWriter(str(part), cv2.CAP_FFMPEG, code, rate, (width, height))
    try:
        written = writer.isOpened() and all(
            writer.write(frame[..., ::-1].copy()) is not False for frame in video
        )
        writer.release()  # a full disk shows only now, as a file without its index
        if not written or cv2.VideoCapture(str(part)).get(cv2.CAP_PROP_FRAME_COUNT) != len(video):
            raise OSError(f"OpenCV can't write {codec} video to {part}: is the disk full?")
        part.replace(path)
    finally:
        writer.release()
        part.unlink(missing_ok=True)
