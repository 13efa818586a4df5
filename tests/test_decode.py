"""Tests of the decoder on videos that are whole, odd, damaged or none at all."""

import base64
import pickle
import wave
import zlib

import cv2
import numpy as np
import pytest
from conftest import VIDEOS, grey_levels, write_grey_video

from stretchysnake_jax.data import decode, sampling

# One frame of AV1 in a WebM file: OpenCV opens it and reads nothing. zlib in base 64.
AV1 = """
eNqTcr2/eL5TWyOj03cg/tTI4vS5kcOpqaU8NSnXqb2Ryam1kUkiuCGdkQEEGM8I+s4u2eW7uzt4dYuo58q04DWNCyE8
sZB12UDeDd/dPUCeUMjh9OA1TYx6EK5M8O5sEHfbG4g5DJEMtAIgV23Sur6xmd/Jwbeh1yexLM3MSM8QiAyMwh1R+S6d
HQ4uEG0g519cB3Wdx/VGxuKjHaz7f+Se6p5rMKeRQWnrnObSvJSORoa21rB4xzDD5kZG5cfNLUxJUQwP2jY0OuxqNEhe
NKGRgYeBiwtoAtP67w3xDBygYLhRXLwg+UBD+olZrovbXf2c/V1cg1zaUR1SXLwp+UB3MsLK9BMLXRd3uIQGOYZ4+vu5
tE82MLACIz0DEwMIYJB33la67Hkjw+KFjQwMDTBre+MVOIz4BRimNwg4NDEwCDBoXPw1BRT+E3f3b25k2N4FjOePTYzd
HxqZAUWbmYQ=
"""


def everything(n):
    return np.arange(n)


def eight(n):
    return sampling.uniform(n, 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Raw bytes of small videos, 20 frames each, to be broken: extension -> bytes."""
    folder = tmp_path_factory.mktemp("made")
    codecs = {"mp4": "mp4v", "avi": "MJPG", "webm": "VP90", "mpg": "MPG1"}
    return {e: write_grey_video(folder / f"v.{e}", c, 20, 64, 48) for e, c in codecs.items()}


def save(tmp_path, name, data):
    (tmp_path / name).write_bytes(bytes(data))
    return tmp_path / name


def reason(path):
    with pytest.raises(decode.UnreadableVideo) as error:
        decode.read_clip(path, eight)
    assert error.value.path == str(path) and str(error.value).startswith(f"{path}: ")
    assert "\n" not in error.value.reason
    return error.value.reason


@pytest.mark.parametrize("name", VIDEOS)
def test_reads_the_wanted_frames(video_folder, name):
    _, n, width, height = VIDEOS[name]
    for choose in (everything, eight, lambda n: sampling.sparse(n, 4)):
        frames, count = decode.read_clip(video_folder / name, choose)
        wanted = choose(n)
        assert count == n and frames.dtype == np.uint8
        assert frames.shape == (len(wanted), height, width, 3)
        np.testing.assert_allclose(frames.mean((1, 2, 3)), grey_levels(n)[wanted], atol=6)


def test_channels_are_rgb(tmp_path):
    path = tmp_path / "red.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 250), np.uint8))  # OpenCV's order: blue, green, red
    writer.release()
    frames, _ = decode.read_clip(path, everything)
    assert frames[..., 0].min() > 200 and frames[..., 1:].max() < 50


def test_transform_sees_every_wanted_frame_once(video_folder):
    seen = []

    def shrink(frame):
        seen.append(frame.shape)
        return frame[::2, ::2]

    frames, _ = decode.read_clip(video_folder / "f.avi", eight, shrink)
    assert frames.shape == (8, 24, 40, 3) and seen == [(48, 80, 3)] * 3


def test_relative_name_with_a_colon(made, tmp_path, monkeypatch):
    save(tmp_path, "a:b 100%d.mp4", made["mp4"])
    monkeypatch.chdir(tmp_path)
    assert decode.read_clip("a:b 100%d.mp4", everything)[1] == 20


def test_truncated_file_gives_its_true_count(made, tmp_path):
    path = save(tmp_path, "cut.webm", made["webm"][: len(made["webm"]) * 3 // 4])
    calls = []

    def choose(n):
        calls.append(n)
        return sampling.uniform(n, 6)

    frames, count = decode.read_clip(path, choose)
    assert calls[0] == 20 and calls[-1] == count < 20
    wanted = sampling.uniform(count, 6)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), grey_levels(count)[wanted], atol=6)


@pytest.mark.parametrize("claim", [1, 500, 2**31 - 1])
def test_header_count_is_only_a_hint(made, tmp_path, claim):
    data = bytearray(made["avi"])
    data = data[: data.index(b"idx1")]  # the index tells the true count
    for start in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        data[start : start + 4] = claim.to_bytes(4, "little")
    frames, count = decode.read_clip(save(tmp_path, "lie.avi", data), eight)
    assert count == 20
    np.testing.assert_allclose(frames.mean((1, 2, 3)), grey_levels(20)[eight(20)], atol=6)


def test_joined_files_are_counted(made, tmp_path):
    # Their header claims a single frame.
    path = save(tmp_path, "two.mpg", 2 * made["mpg"])
    assert decode.read_clip(path, eight)[1] == 40


def test_goes_on_behind_a_damaged_frame(made, tmp_path):
    data = bytearray(made["mp4"])
    start = -1
    for _ in range(7):
        start = data.index(b"\0\0\1\xb6", start + 1)
    data[start : start + 4] = bytes(4)
    frames, count = decode.read_clip(save(tmp_path, "hole.mp4", data), everything)
    assert count == 19 and frames[-1].mean() > grey_levels(20)[17]


def test_a_frame_that_cannot_be_converted_ends_the_file(video_folder, monkeypatch):
    class Broken(decode._Capture):
        passed = 0

        def skip(self, frames):
            self.passed += frames
            return super().skip(frames)

        def retrieve(self):
            return super().retrieve() if self.passed <= 5 else None

    monkeypatch.setattr(decode, "_Capture", Broken)
    frames, count = decode.read_clip(video_folder / "a.mp4", lambda n: sampling.uniform(n, 64))
    assert count == 5 and len(frames) == 64


def test_rotation_is_applied(made, tmp_path):
    data = bytearray(made["mp4"])
    start = data.index(b"tkhd") + 44
    quarter_turn = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data[start : start + 36] = quarter_turn
    frames, _ = decode.read_clip(save(tmp_path, "turned.mp4", data), eight)
    assert frames.shape == (8, 64, 48, 3)


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    png = cv2.imencode(".png", np.full((48, 64, 3), 99, np.uint8))[1]
    frames, count = decode.read_clip(save(tmp_path, "picture.mp4", png), eight)
    assert count == 1 and frames.shape == (8, 48, 64, 3) and (frames == 99).all()


def test_missing_empty_and_folder(tmp_path):
    assert reason(tmp_path / "gone.mp4") == "there is no such file"
    assert reason(save(tmp_path, "empty.mp4", b"")) == "the file is empty"
    assert "folder" in reason(tmp_path)
    assert "can't be opened" in reason(tmp_path / ("x" * 300 + ".mp4"))


def test_no_right_to_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(decode, "_top_boxes", refuse)  # no file is closed to root
    path = save(tmp_path, "closed.mp4", b"a file")
    assert reason(path) == "the file can't be opened: Permission denied"


def test_not_a_video(made, tmp_path):
    assert "not a video" in reason(save(tmp_path, "text.mp4", b"this is not a video\n" * 9))
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1000))
    assert "only sound" in reason(tmp_path / "sound.mp4")
    only_sound = made["mp4"].replace(b"vide", b"soun")
    assert "no video stream" in reason(save(tmp_path, "soun.mp4", only_sound))


def test_truncated_mp4_says_so(made, tmp_path):
    cut = made["mp4"][: len(made["mp4"]) // 2]
    assert "cut off" in reason(save(tmp_path, "cut.mp4", cut))


def test_header_without_frames_names_the_codec(made, tmp_path):
    head = made["avi"][: made["avi"].index(b"movi") + 4]
    assert "MJPG" in reason(save(tmp_path, "head.avi", head))
    text = reason(save(tmp_path, "av1.webm", zlib.decompress(base64.b64decode(AV1))))
    assert "AV1" in text and "ffmpeg" in text


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(decode.UnreadableVideo("a.mp4", "it is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "it is empty", "a.mp4: it is empty")


def test_frames_behind_the_end_are_refused(video_folder):
    with pytest.raises(ValueError, match="asks .*a.mp4 for frame 20"):
        decode.read_clip(str(video_folder / "a.mp4"), lambda n: np.array([0, 20]))
