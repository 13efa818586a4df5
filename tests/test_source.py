"""Tests of clips in files, folders of frames and records, and of parts of videos."""

import dataclasses
import json
import os

import cv2
import numpy as np
import pytest
from conftest import VIDEOS, grey_levels

from stretchysnake_jax.config import DataConfig
from stretchysnake_jax.data import datasets, frames, records, sampling, source
from stretchysnake_jax.data.decode import UnreadableVideo
from stretchysnake_jax.data.lists import ListError


def everything(n):
    return np.arange(n)


def levels(video):
    """The grey level of every frame."""
    return video.reshape(len(video), -1).mean(1)


def encoded(i, suffix=".png", size=(24, 32)):
    """An even image whose grey level tells its number; red is 50 more."""
    image = np.full((*size, 3), 10 * i, np.uint8)
    image[..., 2] += 50
    return cv2.imencode(suffix, image)[1].tobytes()


@pytest.fixture
def folder(tmp_path):
    """A folder of twelve frames, with optical flow and a thumbnail beside them."""
    path = tmp_path / "clip [1]"
    path.mkdir()
    for i in range(12):
        (path / f"img_{i + 1}.png").write_bytes(encoded(i))
        (path / f"flow_x_{i + 1:05d}.jpg").write_bytes(encoded(20))
    (path / "thumbnail.png").write_bytes(encoded(20))
    return path


def test_folder_of_frames(folder):
    video, n = source.read_clip(str(folder), everything)
    assert n == 12 and video.shape == (12, 24, 32, 3) and video.dtype == np.uint8
    assert video[:, 0, 0].tolist() == [[10 * i + 50, 10 * i, 10 * i] for i in range(12)]  # RGB
    video, _ = source.read_clip(str(folder), lambda n: np.array([1, 1, 9]), lambda f: f[:2])
    assert video.shape == (3, 2, 32, 3) and video[:, 0, 0, 1].tolist() == [10, 10, 90]
    wanted = sampling.uniform(12, 16)
    assert len(source.read_clip(str(folder), lambda n: sampling.uniform(n, 16))[0]) == len(wanted)


def test_folder_with_a_bad_frame(folder):
    (folder / "img_3.png").write_bytes(b"")
    (folder / "img_4.png").write_bytes(b"no image")
    for index, name in ((2, "img_3.png"), (3, "img_4.png")):
        with pytest.raises(UnreadableVideo) as error:
            source.read_clip(str(folder), lambda n, i=index: np.array([i]))
        assert error.value.path == str(folder) and name in error.value.reason
    assert source.read_clip(str(folder), lambda n: np.array([4]))[1] == 12
    (folder / "img_5.png").write_bytes(encoded(4, size=(48, 64)))  # brought to the first's size
    assert source.read_clip(str(folder), lambda n: np.array([0, 4]))[0].shape == (2, 24, 32, 3)


def test_folders_that_are_no_clip(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableVideo, match="a folder without frames"):
        source.read_clip(str(tmp_path / "empty"), everything)
    (folder / "second_1.png").write_bytes(encoded(1))
    with pytest.raises(
        UnreadableVideo, match=r"more than one sequence .*img_1\.png, second_1\.png"
    ):
        source.read_clip(str(folder), everything)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("v2_f10.jpg", "v2_f9.JPG", "v2_f0100.jpeg", ".v2_f1.jpg"):
        (tmp_path / name).write_bytes(b"x")
    assert frames.frame_files(tmp_path) == ["v2_f9.JPG", "v2_f10.jpg", "v2_f0100.jpeg"]


def test_windows(video_folder):
    path, count = str(video_folder / "a.mp4"), VIDEOS["a.mp4"][1]  # 20 frames, 25 per second
    for window, first, end in (
        ((5, 9, "frames"), 5, 9),
        ((5, np.inf, "frames"), 5, count),
        ((0.2, 0.4, "seconds"), 5, 11),
        ((0.28, 0.32, "seconds"), 7, 9),  # 7.000000000000001 frames
        ((0.79, 9, "seconds"), 19, count),
        ((0, np.inf, "seconds"), 0, count),
    ):
        video, n = source.read_clip(path, everything, window=window)
        assert n == end - first == len(video), window
        assert np.abs(levels(video) - grey_levels(count)[first:end]).max() < 6, window
    assert source.frame_span((3.0, 3.0, "frames"), 9, 1.0) == (3, 4)  # never empty
    assert source.frame_span((3.0, 5.0, "seconds"), 200, 29.97) == (89, 150)
    with pytest.raises(UnreadableVideo, match="starts at 20 frames, behind the end .* 20 frames"):
        source.read_clip(path, everything, window=(20, 25, "frames"))
    with pytest.raises(UnreadableVideo, match="starts at 1 seconds"):
        source.read_clip(path, everything, window=(1, 2, "seconds"))


def test_long_videos_are_cut_into_windows(video_folder, tmp_path):
    text = "a.mp4 0\nb.avi 1\nnone.mp4 2\n"  # 0.8 s, 0.48 s, not there
    (video_folder / "long.txt").write_text(text)
    data = DataConfig(train=str(video_folder / "long.txt"), window=0.4, window_stride=0.25)
    clips = datasets.load_clips(data, "train")
    names = [os.path.basename(path) for path in clips.paths]
    assert names == ["a.mp4"] * 3 + ["b.avi"] * 2 + ["none.mp4"]
    assert clips.labels.tolist() == [0] * 3 + [1] * 2 + [2] and clips.unit == "seconds"
    expected = [(0, 0.4), (0.25, 0.65), (0.5, 0.8), (0, 0.4), (0.25, 0.48), (0, np.inf)]
    np.testing.assert_allclose(clips.windows, expected)
    video, n = source.read_clip(clips.paths[1], everything, window=clips.window(1))
    assert n == 11 and np.abs(levels(video) - grey_levels(20)[6:17]).max() < 6
    again = source.slide(clips.select([1]), 0.2, 0.2)  # parts of parts
    np.testing.assert_allclose(again.windows, [(0.25, 0.45), (0.45, 0.65)])
    frames = dataclasses.replace(clips, unit="frames")
    with pytest.raises(ListError, match="cuts by seconds"):
        source.slide(frames, 1, 1)


def test_windows_of_what_has_no_frame_rate(folder, tmp_path):
    video, n = source.read_clip(str(folder), everything, window=(2, 4, "frames"))
    assert n == 2 and video[:, 0, 0, 1].tolist() == [20, 30]
    with pytest.raises(UnreadableVideo, match="nothing says its frame rate"):
        source.read_clip(str(folder), everything, window=(0, 1, "seconds"))
    (tmp_path / "empty.mp4").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, reason in (
        ("empty.mp4", "the file is empty"),
        ("gone.mp4", "no such file"),
        ("pipe.mp4", "not a regular file"),
    ):
        with pytest.raises(UnreadableVideo, match=reason):
            source.read_clip(str(tmp_path / name), everything, window=(0, 1, "seconds"))


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def message(field, payload):
    return varint(field << 3 | 2) + varint(len(payload)) + payload


def example(**features):
    """A serialised tf.train.Example of lists of bytes and of ints."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            feature = message(1, b"".join(message(1, v) for v in values))
        else:
            feature = message(3, message(1, b"".join(varint(v % (1 << 64)) for v in values)))
        entries += message(1, message(1, name.encode()) + message(2, feature))
    return message(1, entries)


def test_parse_example():
    features = dict(video=[b"\xff\xd8a", b""], label=[3], big=[-1, 300, 1 << 40])
    assert records.parse_example(example(**features)) == features
    unpacked = message(
        1, message(1, message(1, b"n") + message(2, message(3, b"\x08\x07\x08\x05")))
    )
    assert records.parse_example(unpacked) == {"n": [7, 5]}
    floats = message(1, message(1, message(1, b"f") + message(2, message(2, b"\x0a\x04abcd"))))
    assert records.parse_example(floats + message(7, b"more")) == {}
    for broken in (example(**features)[:-3], b"\xff" * 40, b"\x0b", b"\x08\x01"):
        with pytest.raises(ValueError, match="no tf.train.Example"):
            records.parse_example(broken)


def test_parse_example_as_protobuf_writes_it():
    example_pb2 = pytest.importorskip("tensorflow_datasets.proto.tf_example_generated_pb2")
    made = example_pb2.Example()
    made.features.feature["label"].int64_list.value.extend([5, -2])
    made.features.feature["video"].bytes_list.value.extend([b"a" * 300, b"b"])
    parsed = records.parse_example(made.SerializeToString())
    assert parsed == {"label": [5, -2], "video": [b"a" * 300, b"b"]}


@pytest.fixture
def tfds(tmp_path, video_folder):
    """A data set as TFDS writes it: frames, an encoded file, and raw pixels as it shouldn't be."""
    writer_module = pytest.importorskip("array_record.python.array_record_module")
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    rows = [
        example(video=[encoded(i, ".jpg") for i in range(5)], label=[1]),
        example(video=[(video_folder / "a.mp4").read_bytes()], label=[0], path=[b"a.mp4"]),
        example(**{"video": [b"x"], "video/shape": [1, 2], "label": [1]}),
    ]
    for shard, part in enumerate((rows[:2], rows[2:])):
        name = f"mine-train.array_record-{shard:05d}-of-00002"
        writer = writer_module.ArrayRecordWriter(str(folder / name), "group_size:1")
        for row in part:
            writer.write(row)
        writer.close()
    split = {"name": "train", "shardLengths": ["2", "1"], "numBytes": "1"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "mine", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "label.labels.txt").write_text("jump\nwalk\n")
    return folder


def test_tfds(tfds, tmp_path):
    clips = datasets.read_dataset("tfds", str(tmp_path))
    assert clips.classes == ["jump", "walk"] and clips.labels.tolist() == [1, 0, 1]
    assert clips.paths[1] == str(tfds / "mine-train.array_record-00000-of-00002#1")
    video, n = source.read_clip(clips.paths[0], everything)
    assert n == 5 and np.abs(video[:, 0, 0, 1] - 10.0 * np.arange(5)).max() < 6
    video, n = source.read_clip(clips.paths[1], everything)
    assert n == 20 and np.abs(levels(video) - grey_levels(20)).max() < 6
    with pytest.raises(UnreadableVideo, match="raw pixels") as error:
        source.read_clip(clips.paths[2], everything)
    assert error.value.path == clips.paths[2]
    with pytest.raises(UnreadableVideo, match="can't be read"):
        source.read_clip(clips.paths[0].replace("#0", "#7"), everything)
    with pytest.raises(UnreadableVideo, match="no such file"):
        source.read_clip(str(tfds / "gone.array_record#0"), everything)
    with pytest.raises(datasets.NoSplit, match="has the splits train, no val"):
        datasets.read_dataset("tfds", str(tmp_path), split="val")


def test_tfds_that_is_not_whole(tfds, tmp_path):
    os.remove(tfds / "mine-train.array_record-00001-of-00002")
    clips = datasets.read_dataset("tfds", str(tmp_path))
    assert len(clips) == 2
    assert clips.missing == [str(tfds / "mine-train.array_record-00001-of-00002#0")]
    (tfds / "label.labels.txt").write_text("jump\n")
    with pytest.raises(ListError, match="a label is 1"):
        datasets.read_dataset("tfds", str(tmp_path))
    info = json.loads((tfds / "dataset_info.json").read_text())
    (tfds / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ListError, match="tfrecord files, which only TensorFlow reads"):
        datasets.read_dataset("tfds", str(tmp_path))
    (tfds / "dataset_info.json").unlink()
    with pytest.raises(ListError, match=r"holds 0 files dataset_info\.json"):
        datasets.read_dataset("tfds", str(tmp_path))


def test_aspect_ratios(clips):
    found = source.aspect_ratios(clips)
    shapes = [width / height for _, _, width, height in VIDEOS.values()]
    assert list(found[:6]) == shapes
    assert found[6] == np.median(shapes)  # broken.mp4
    assert list(source.aspect_ratios(clips.select([6]))) == [1.0]
