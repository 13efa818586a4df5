"""Weizmann with the camera on the person: where it looks, and what is written."""

import numpy as np
import pytest

from stretchysnake_jax import study_weizmann
from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import decode
from stretchysnake_jax.data.video_file import write_video


def wall(columns, rows=(49, 119)) -> np.ndarray:
    """A noisy wall, 180 x 144 pixels, with a dark block from the given columns on, 10 wide."""
    rng = np.random.default_rng(0)
    still = rng.integers(120, 160, (144, 180, 3), np.uint8)
    video = np.tile(still, (len(columns), 1, 1, 1))
    for frame, left in zip(video, columns, strict=True):
        frame[slice(*rows), max(0, left) : left + 10] = 20
    return video


def test_the_camera_goes_along_with_the_person():
    columns = range(-4, 176, 3)
    video = wall(columns)
    found = study_weizmann.follow(video)
    side, top = study_weizmann.SIDE, study_weizmann.TOP
    assert found.shape == (60, side, side, 3) and found.dtype == np.uint8
    dark = found[5:-5].max(-1) < 60
    middles = [np.nonzero(frame.any(0))[0].mean() for frame in dark]
    assert np.abs(np.array(middles) - side / 2).max() < 4
    assert all(np.flatnonzero(frame.any(1)).tolist() == list(range(49 - top, 119 - top))
               for frame in dark)  # fmt: skip
    # An arm that goes up and down moves no camera, and without anything that moves it stays.
    arm = wall([80 + i % 8 for i in range(40)], (40, 60))
    assert len(np.unique(study_weizmann.centres(arm))) == 1
    assert abs(study_weizmann.centres(arm)[0] - 88) < 8
    assert study_weizmann.centres(wall([50] * 9)).tolist() == [90] * 9


def test_followed_videos_are_lossless_and_kept(tmp_path):
    source, out = tmp_path / "weizmann", tmp_path / "out"
    (source / "run").mkdir(parents=True)
    path, video = source / "run" / "ido_run.avi", wall(range(0, 170, 10))
    write_video(path, video, 25, "FFV1")
    study_weizmann.prepare(str(source), out, Progress())
    written = out / "run" / "ido_run.avi"
    read, count = decode.read_clip(written, np.arange)
    np.testing.assert_array_equal(read, study_weizmann.follow(video))
    assert count == len(video)
    before = written.stat().st_mtime_ns
    study_weizmann.prepare(str(source), out, Progress())
    assert written.stat().st_mtime_ns == before
    (source / "run" / "ira_run.avi").write_bytes(b"no video")
    with pytest.raises(decode.UnreadableVideo, match=r"ira_run\.avi"):
        study_weizmann.prepare(str(source), out, Progress())
    write_video(source / "run" / "ira_run.avi", video[:, :96], 25, "FFV1")
    with pytest.raises(ConfigError, match="ira_run.avi has 96 rows"):
        study_weizmann.prepare(str(source), out, Progress())
    assert len(list(out.rglob("*.avi"))) == 1


@pytest.mark.parametrize("codec", ["none", "mp4v"])
def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, codec):
    folder = tmp_path / "there"
    path = (folder if codec == "none" else tmp_path / "not_there") / "a.mp4"
    folder.mkdir()
    with pytest.raises(
        OSError, match=f"can't write {codec} video to .*a.tmp.mp4: is the disk full"
    ):
        write_video(path, wall([1, 2]), 25, codec)
    assert not list(folder.iterdir())
