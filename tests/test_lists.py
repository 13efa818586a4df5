"""Tests of the list files."""

import numpy as np
import pytest

from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import lists


@pytest.fixture
def read(tmp_path):
    """Writes a list file (and classes.txt) and reads it."""

    def write_and_read(text, classes_txt=None, **options):
        path = tmp_path / "list.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if classes_txt is not None:
            (tmp_path / "classes.txt").write_text(classes_txt)
        clips = lists.read_list(path, **options)
        folder = options.get("root") or str(tmp_path)
        return [p.removeprefix(folder + "/") for p in clips.paths], clips.labels, clips.classes

    return write_and_read


@pytest.mark.parametrize(
    ("text", "paths", "labels"),
    [
        ("a.mp4 0\nb/c.avi 2\n", ["a.mp4", "b/c.avi"], [0, 2]),
        ("a.mp4,0\nb/c.avi,2\n", ["a.mp4", "b/c.avi"], [0, 2]),
        ("a.mp4\t0\nb/c.avi\t2", ["a.mp4", "b/c.avi"], [0, 2]),
        ("a b.mp4 0\nc  d e.mp4 1\n", ["a b.mp4", "c  d e.mp4"], [0, 1]),
        ("a b.mp4, 0\nc d.mp4,1\n", ["a b.mp4", "c d.mp4"], [0, 1]),
        ("a, b.mp4 0\nc.mp4 1\n", ["a, b.mp4", "c.mp4"], [0, 1]),
        ("a, b.mp4\t0\nc d.mp4\t1\n", ["a, b.mp4", "c d.mp4"], [0, 1]),
        ('"a, b.mp4",0\nc.mp4,"1"\n', ["a, b.mp4", "c.mp4"], [0, 1]),
        ('"clip 12" 0\nclip.mp4 1\n', ["clip 12", "clip.mp4"], [0, 1]),
        ("\ufeff# note\r\n\r\na.mp4 0 \r\n  b#1.mp4 1\r\n", ["a.mp4", "b#1.mp4"], [0, 1]),
        ("vidéo ü.mp4 0\na[1]!;~.mp4 1\n", ["vidéo ü.mp4", "a[1]!;~.mp4"], [0, 1]),
        ("a.mp4 1 12.5\nb c.mp4 0 7\n", ["a.mp4", "b c.mp4"], [1, 0]),  # path label duration
        ("a.mp4,0,12.5\nb.mp4,1,3.0\n", ["a.mp4", "b.mp4"], [0, 1]),
        ("x/v_1 120 0\nx/v_2 99 1\n", ["x/v_1", "x/v_2"], [0, 1]),  # path frames label
        ("# columns: path frames label\na.mp4 120 0\nb 1.mp4 99 1", ["a.mp4", "b 1.mp4"], [0, 1]),
        ("# columns: path label duration\na.mp4,1,56\nb.mp4,0,7\n", ["a.mp4", "b.mp4"], [1, 0]),
    ],
)
def test_delimiters_and_quirks(read, text, paths, labels):
    got_paths, got_labels, classes = read(text)
    assert got_paths == paths
    assert got_labels.tolist() == labels and got_labels.dtype == np.int32
    assert classes == [str(i) for i in range(max(labels) + 1)]


def test_root(read):
    assert read("a.mp4 0\n", root="/data/videos")[0] == ["a.mp4"]


def test_entries_stay_below_the_root(read):
    inside = "x/../a.mp4 0\n/data/videos/b.mp4 1\n"
    assert read(inside, root="/data/videos")[0] == ["a.mp4", "b.mp4"]
    for entry in ("../a.mp4", "/abs/a.mp4", "x/../../videos2/a.mp4"):
        with pytest.raises(lists.ListError) as error:
            read(f"b.mp4 1\n{entry} 0\n", root="/data/videos")
        for word in ("line 2", entry, "/data/videos", "data.allow_absolute"):
            assert word in str(error.value)
    allowed = read("../a.mp4 0\n/abs/a.mp4 0\n", root="/data/videos", allow_absolute=True)
    assert allowed[0] == ["/data/a.mp4", "/abs/a.mp4"]


def test_windows_and_groups(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# columns: path start end group label\na b.mp4 1.5 3 g1 0\nc.mp4 0 inf g2 1\n")
    clips = lists.read_list(path)
    assert clips.windows.tolist() == [[1.5, 3], [0, np.inf]] and clips.unit == "seconds"
    assert clips.groups == ["g1", "g2"]
    assert clips.window(0) == (1.5, 3.0, "seconds")
    path.write_text("# columns: path label start_frame end_frame\na.mp4,0,5,9\n")
    assert lists.read_list(path).window(0) == (5.0, 9.0, "frames")
    path.write_text("a.mp4 0\n")
    assert lists.read_list(path).window(0) is None


@pytest.mark.parametrize(
    ("text", "flip"),
    [
        ("a.mp4 walk\n", True),
        ("a.mp4 swipe_left\n", False),
        ("a.mp4,Turning to the Right\n", False),
        ("a.mp4 leftovers\n", True),
        ("# flip: no\na.mp4 walk\n", False),
        ("# flip: yes\na.mp4 swipe_left\n", True),
    ],
)
def test_flip(tmp_path, text, flip):
    (tmp_path / "list.txt").write_text(text)
    assert lists.read_list(tmp_path / "list.txt").flip is flip


def test_written_lists_are_read_back(tmp_path):
    root = tmp_path / "videos"
    names = [" lead.mp4", "#1.mp4", 'a "b".mp4', "x, y/z 12", '"q".mp4', "é[1].mp4", "../out.mp4"]
    clips = lists.ClipList(
        paths=[str(root / name) for name in names],
        labels=np.arange(7, dtype=np.int32),
        classes=[f"class {i}" for i in range(7)],
        windows=np.array([[0.25, 1 / 3 + i] for i in range(6)] + [[7, np.inf]]),
        flip=False,
        groups=[f"g {i}" for i in range(7)],
    )
    lists.write_list(tmp_path / "list.txt", clips, str(root))
    lists.write_classes(tmp_path / "classes.txt", clips.classes)
    back = lists.read_list(tmp_path / "list.txt", str(root), allow_absolute=True)
    assert [p.removeprefix(f"{root}/") for p in back.paths[:6]] == names[:6]
    assert back.paths[6] == str(tmp_path / "out.mp4")
    assert (back.labels == clips.labels).all() and back.classes == clips.classes
    np.testing.assert_allclose(back.windows, clips.windows, rtol=1e-9)
    assert back.flip is False and back.groups == clips.groups and back.unit == "seconds"
    clips.paths[0] = str(root / "a\nb.mp4")
    with pytest.raises(lists.ListError, match="line break"):
        lists.write_list(tmp_path / "list.txt", clips, str(root))
    assert len(lists.read_list(tmp_path / "list.txt", allow_absolute=True)) == 7


def test_select():
    clips = lists.ClipList(["a", "b", "c"], np.array([0, 1, 0], np.int32), ["x", "y"])
    clips.windows, clips.groups = np.array([[0, 1], [2, 3], [4, 5.0]]), ["g", "h", "i"]
    picked = clips.select([2, 1])
    assert picked.paths == ["c", "b"] and picked.labels.tolist() == [0, 1]
    assert picked.windows.tolist() == [[4, 5], [2, 3]] and picked.groups == ["i", "h"]


def test_class_names_without_classes_file(read):
    _, labels, classes = read("a.mp4,walk\nb.mp4,air drumming\nc.mp4,walk\n")
    assert classes == ["air drumming", "walk"] and labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("text", ["a.mp4 walk\nb.mp4 bend\n", "a.mp4 1\nb.mp4 0\n"])
def test_classes_file(read, text):
    _, labels, classes = read(text, classes_txt="bend\r\nwalk\njump\n\n")
    assert classes == ["bend", "walk", "jump"] and labels.tolist() == [1, 0]


def test_classes_of_another_list(read):
    _, labels, classes = read("a.mp4 walk\n", classes=["bend", "jump", "walk"])
    assert classes == ["bend", "jump", "walk"] and labels.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "classes_txt", "words"),
    [
        ("", None, ["list.txt", "lists no clip"]),
        ("# only this\n", None, ["lists no clip"]),
        ("a.mp4 0\nb.mp4\n", None, ["line 2", "path label", "found 1"]),
        ("a.mp4,0\nb.mp4 1\n", None, ["line 2", "comma", "found 1"]),
        ("a.mp4,0,12.5\nb.mp4,0\n", None, ["line 1", "found 3"]),
        ("a.mp4 120 0\nb.mp4 99 1\n", None, ["line 1", "found 3", "a.mp4 120 0", "# columns:"]),
        ("# columns: path labl\na.mp4 0\n", None, ["line 1", "'labl'", "did you mean 'label'"]),
        ("# columns: path start label\na 1 0\n", None, ["line 1", "start and end"]),
        ("# columns: label path\na.mp4 0\n", None, ["line 1", "path first"]),
        ("# columns: path start end label\na 1 0\n", None, ["line 2", "4 fields", "found 3"]),
        ("# columns: path start end label\na 3 2 0\n", None, ["line 2", "'3' to '2'", "seconds"]),
        ("# columns: path start end label\na x 2 0\n", None, ["line 2", "'x' to '2'"]),
        ("# flip: maybe\na.mp4 0\n", None, ["line 1", "'maybe'", "yes or no"]),
        ("path,label\na.mp4,0\n", None, ["line 1", "'label'", "whole number", "header"]),
        ("a.mp4 0\n\nb.mp4 -1\n", None, ["line 3", "'-1'", "whole number"]),
        ("a.mp4 1.5\n", None, ["line 1", "'1.5'", "whole number"]),
        ("a.mp4 123456789\n", None, ["line 1", "'123456789'"]),
        ("a.mp4 " + 5000 * "1", None, ["line 1", "whole number"]),
        ("a.mp4 0\nb.mp4 2\n", "x\ny\n", ["line 2", "'2'", "2 classes", "classes.txt"]),
        ("a.mp4 x\nb.mp4 z\n", "x\ny\n", ["line 2", "'z'", "classes.txt"]),
        ("a.mp4 0\n", "x\ny\nx\n", ["classes.txt", "'x'", "2 times"]),
        ("a.mp4 0\n", "\n", ["classes.txt", "no class"]),
        (b"a\xff.mp4 0\n", None, ["list.txt", "UTF-8"]),
    ],
)
def test_errors_say_where_and_what(read, text, classes_txt, words):
    with pytest.raises(lists.ListError) as error:
        read(text, classes_txt)
    assert isinstance(error.value, ConfigError)
    for word in words:
        assert word in str(error.value)


def test_no_such_list(tmp_path):
    with pytest.raises(lists.ListError, match=r"no list file .*gone\.txt"):
        lists.read_list(tmp_path / "gone.txt")
    with pytest.raises(lists.ListError, match="can't be read"):
        lists.read_list(tmp_path)
