"""Fixtures that several test files use."""

import cv2
import numpy as np
import pytest

# Files of `video_folder`: name -> (fourcc, frames, width, height).
VIDEOS = {
    "a.mp4": ("mp4v", 20, 64, 48),
    "b.avi": ("MJPG", 12, 64, 48),
    "c d.mp4": ("mp4v", 9, 48, 64),
    "e.webm": ("VP90", 15, 64, 48),
    "f.avi": ("MJPG", 3, 80, 48),
    "g.mp4": ("mp4v", 16, 64, 48),
}


def grey_levels(n):
    """The grey level of every frame of a video of `video_folder`."""
    return 12 * np.arange(n)


def write_grey_video(path, fourcc, n, width, height):
    """Writes a video of `n` even frames whose grey level tells their number; returns its bytes."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 25, (width, height))
    assert writer.isOpened()
    for level in grey_levels(n):
        writer.write(np.full((height, width, 3), level, np.uint8))
    writer.release()
    return path.read_bytes()


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory):
    """A folder of small videos of several codecs, with a list `clips.txt` (labels 0..5)."""
    folder = tmp_path_factory.mktemp("videos")
    for name, spec in VIDEOS.items():
        write_grey_video(folder / name, *spec)
    lines = [f"{name} {label}\n" for label, name in enumerate(VIDEOS)]
    (folder / "clips.txt").write_text("".join(lines))
    return folder
