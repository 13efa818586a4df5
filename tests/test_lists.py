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
        ("vidéo ü.mp4 0\n/abs/x.mp4 1\n", ["vidéo ü.mp4", "/abs/x.mp4"], [0, 1]),
    ],
)
def test_delimiters_and_quirks(read, text, paths, labels):
    got_paths, got_labels, classes = read(text)
    assert got_paths == paths
    assert got_labels.tolist() == labels and got_labels.dtype == np.int32
    assert classes == [str(i) for i in range(max(labels) + 1)]


def test_root(read):
    assert read("a.mp4 0\n", root="/data/videos")[0] == ["a.mp4"]


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
        ("a.mp4,0,12.5\n", None, ["line 1", "found 3"]),
        ("a.mp4 120 0\nb.mp4 99 1\n", None, ["line 1", "found 3", "a.mp4 120 0"]),
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
