"""Tests of `stretchysnake data check`."""

import shutil

import cv2
import numpy as np
import pytest
from conftest import VIDEOS

from stretchysnake_jax.cli import main
from stretchysnake_jax.data import check
from stretchysnake_jax.data.lists import ClipList, read_list


@pytest.fixture
def folder(video_folder, tmp_path):
    """Two classes: four readable videos, an empty one and one that is cut off."""
    root = tmp_path / "videos"
    for name, label in (("a.mp4", "x"), ("b.avi", "x"), ("c d.mp4", "y"), ("e.webm", "y")):
        (root / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(video_folder / name, root / label / name)
    (root / "y" / "empty.mp4").write_bytes(b"")
    data = (video_folder / "b.avi").read_bytes()
    (root / "x" / "cut.avi").write_bytes(data[: len(data) * 3 // 4])
    return root


def listed(root, entries, **fields):
    paths = [str(root / name) for name, _ in entries]
    labels = np.array([label for _, label in entries], np.int32)
    return ClipList(paths, labels, ["x", "y"], **fields)


def test_counts(folder):
    entries = [("x/a.mp4", 0), ("y/empty.mp4", 1), ("y/gone.mp4", 1), ("y/c d.mp4", 1)]
    clips = listed(folder, entries, missing=["/listed/elsewhere.mp4"])
    done = []
    report = check.check_clips(clips, frames=15, workers=2, on_file=lambda *n: done.append(n))
    assert done == [(i, 4) for i in (1, 2, 3, 4)]
    assert report.missing == ["/listed/elsewhere.mp4", str(folder / "y/gone.mp4")]
    assert report.unreadable == {str(folder / "y/empty.mp4"): "the file is empty"}
    assert report.short == [3]  # nine frames
    np.testing.assert_array_equal(report.frames, [20, np.nan, np.nan, 9])
    np.testing.assert_allclose(report.seconds, [0.8, np.nan, np.nan, 0.36])
    assert report.good.paths == [str(folder / "x/a.mp4"), str(folder / "y/c d.mp4")]
    text = check.text("train", report, 15, published=7)
    assert "5 clips listed, 3 found, 2 missing, 1 unreadable, 0 damaged, 1 shorter than 15" in text
    assert "published: 7 clips, -2 here" in text
    assert text.count("y/empty.mp4: the file is empty") == 1
    assert "2 classes of 1 to 1 clips" in text
    assert "0 to 1           2  ####" in text


def test_damage_is_found_by_decoding_all(folder):
    clips = listed(folder, [("x/cut.avi", 0), ("x/b.avi", 0)])
    report = check.check_clips(clips, full=True)
    reason = report.damaged[str(folder / "x/cut.avi")]
    assert f"its header says {VIDEOS['b.avi'][1]} frames" in reason and "cut off" in reason
    assert not report.unreadable and len(report.good) == 2


def test_windows(folder):
    entries = [("x/a.mp4", 0)] * 3 + [("y/c d.mp4", 1)]
    windows = np.array([[0, 0.16], [0.4, np.inf], [0, 9], [5, 6]])
    report = check.check_clips(listed(folder, entries, windows=windows), frames=6)
    np.testing.assert_array_equal(report.frames, [5, 10, 20, np.nan])
    assert report.short == [0]
    assert (
        "starts at 5 seconds, the video has 9 frames"
        in report.unreadable[str(folder / "y/c d.mp4")]
    )


def test_what_splits_share(folder):
    one = listed(folder, [("x/a.mp4", 0), ("x/b.avi", 0)], groups=["g1", "g2"])
    two = listed(folder, [("x/a.mp4", 0), ("y/c d.mp4", 1)], groups=["g3", "g2"])
    reports = {name: check.check_clips(clips) for name, clips in (("train", one), ("test", two))}
    videos, groups = check.overlaps(reports)
    assert videos == f"train and test share 1 videos, such as {folder / 'x/a.mp4'}"
    assert groups == "train and test share 1 groups, such as g2"
    assert check.overlaps({"train": reports["train"]}) == []


def test_many_classes_are_cut_short(folder):
    labels = np.array([0, 0, 5], np.int32)
    clips = ClipList([str(folder / "x/a.mp4")] * 3, labels, [f"class {i}" for i in range(50)])
    text = check.text("train", check.check_clips(clips), 1)
    assert "50 classes of 0 to 2 clips, median 0" in text and "    ..." in text
    assert "class 0        2  ####" in text and len(text.splitlines()) < 30


def test_command_on_lists(folder, tmp_path, capsys):
    (folder / "train.txt").write_text("x/a.mp4 0\ny/empty.mp4 1\ny/gone.mp4 1\ny/c d.mp4 1\n")
    (folder / "val.txt").write_text("x/b.avi 0\n")
    words = ["data", "check", str(folder / "train.txt"), str(folder / "val.txt")]
    plot = str(tmp_path / "h.png")
    assert main([*words, "--write", str(tmp_path / "clean"), "--plot", plot]) == 1
    out = capsys.readouterr().out
    assert "train: 4 clips listed, 3 found, 1 missing, 1 unreadable" in out
    assert out.count("gone.mp4: it is missing") == 1
    assert "val: 1 clips listed, 1 found" in out
    clean = read_list(tmp_path / "clean" / "train.txt", str(folder))
    assert clean.paths == [str(folder / "x/a.mp4"), str(folder / "y/c d.mp4")]
    assert clean.labels.tolist() == [0, 1] and clean.classes == ["0", "1"]
    assert (tmp_path / "clean" / "classes.txt").read_text() == "0\n1\n"
    left_out = (tmp_path / "clean" / "left_out.txt").read_text()
    assert "gone.mp4: it is missing" in left_out and "the file is empty" in left_out
    assert cv2.imread(plot).shape[0] > 200
    # The clean lists have nothing to complain about.
    shutil.copy(tmp_path / "clean" / "train.txt", folder / "clean.txt")
    assert main(["data", "check", str(folder / "clean.txt"), str(folder / "val.txt")]) == 0


def test_command_on_a_folder_and_a_data_set(folder, tmp_path, capsys):
    assert main(["data", "check", str(folder)]) == 1
    assert "videos: 6 clips listed, 6 found, 0 missing, 1 unreadable" in capsys.readouterr().out
    (folder / "y" / "empty.mp4").unlink()
    words = ["data", "check", "--dataset", "folders", "--videos", str(folder), "--frames", "12"]
    assert main([*words, "--full", "--workers", "1", "--write", str(tmp_path / "clean")]) == 0
    shown = capsys.readouterr()
    assert "train: 5 clips listed, 5 found, 0 missing, 0 unreadable, 1 damaged" in shown.out
    assert "val: not checked: " in shown.err
    assert len(read_list(tmp_path / "clean" / "train.txt", str(folder))) == 5
    (folder / "loose.mp4").write_bytes(b"")
    assert main(["data", "check", str(folder)]) == 1
    assert "loose.mp4: the file is empty" in capsys.readouterr().out


def test_command_on_a_config(tiny_config_file, capsys):
    assert main(["data", "check", "--config", str(tiny_config_file)]) == 1
    out = capsys.readouterr().out
    assert "train: 6 clips listed" in out and "train and val share 6 videos" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes one of"),
        (["LIST", "--dataset", "ucf101"], "takes one of"),
        (["LIST", "--frames", "0"], "--frames is 0"),
        (["LIST", "--workers", "-1"], "--workers is -1"),
        (["--dataset", "ucf", "--videos", "."], "did you mean 'ucf101'"),
        (["--dataset", "ucf101"], "data.root is empty"),
        (["gone.txt"], "there is no list file gone.txt"),
        (["LIST", "LIST"], "two lists are called train"),
        (["LIST", "--write", "HERE"], "would replace"),
    ],
)
def test_bad_words(folder, capsys, words, message):
    (folder / "train.txt").write_text("x/a.mp4 0\n")
    places = {"LIST": str(folder / "train.txt"), "HERE": str(folder)}
    assert main(["data", "check", *(places.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "train.txt").read_text() == "x/a.mp4 0\n"
