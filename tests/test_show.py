"""Tests of `stretchysnake data show`."""

import cv2
import numpy as np
import pytest
from conftest import TINY_CONFIG, VIDEOS

from stretchysnake_jax import cli
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import show


def test_sheet_of_a_config(tiny_config_file, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    words = ["data", "show", "--config", str(tiny_config_file), "--clips", "3"]
    assert cli.main([*words, "--out", str(out)]) == 0
    assert "3 clips of train at 2x8x8/2, 2x16x16/4, 2x24x24/6" in capsys.readouterr().out
    sheet = cv2.imread(str(out))
    assert sheet.shape == (3 * 3 * 172, show.STRIP[0], 3)  # a strip per clip and bucket
    assert cli.main([*words, "--split", "val", "--buckets", "4x16x24", "--out", str(out)]) == 0
    sheet = cv2.imread(str(out))
    assert sheet.shape == (3 * 172, show.STRIP[0], 3)
    first = sheet[172 - 120 : 172 - 20]  # the frames of the first clip get brighter
    levels = [first[:, 50 + 223 * i].mean() for i in range(4)]
    assert (np.diff(levels) > 20).all()


def test_strips_are_what_the_loader_gives(tiny_config, video_folder):
    from stretchysnake_jax.data import lists

    clips = lists.read_list(video_folder / "clips.txt")
    buckets = show.choose_buckets(tiny_config, "2x8,2x24")
    tiny_config.data.recipe = "videomamba"
    tiny_config.data.resize = tiny_config.data.flip = None
    strips, unreadable = show.load_strips(tiny_config, clips, [0, 4], buckets, seed=0)
    again, _ = show.load_strips(tiny_config, clips, [0, 4], buckets, seed=0)
    assert not unreadable and len(strips) == 4
    assert [video.shape for _, video in strips] == 2 * [(2, 8, 8, 3), (2, 24, 24, 3)]
    assert "e.webm" not in strips[0][0] and list(VIDEOS)[4] in strips[2][0]
    for (_, one), (_, other) in zip(strips, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_unreadable_clips_are_named(video_folder, tmp_path, capsys):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "clips.txt").write_text(f"{video_folder}/a.mp4 0\nempty.mp4 5\n")
    text = TINY_CONFIG.replace("{folder}", str(tmp_path))
    text = text.replace("threads=2", "threads=2, allow_absolute=True")
    (tmp_path / "c.py").write_text(text)
    words = ["data", "show", "--config", str(tmp_path / "c.py"), "--buckets", "2x8"]
    assert cli.main([*words, "--out", str(tmp_path / "sheet.png")]) == 1
    assert "empty.mp4: the file is empty" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "words, text",
    [
        (["--clips", "0"], "--clips is 0: it takes a number >= 1"),
        (["--buckets", "8"], "--buckets has '8': it takes FRAMESxSIZE"),
        (["--buckets", "2x0"], "--buckets has '2x0'"),
        (["--split", "test"], "data.test is empty"),
    ],
)
def test_bad_words(tiny_config_file, words, text, capsys):
    assert cli.main(["data", "show", "--config", str(tiny_config_file), *words]) == 2
    assert text in capsys.readouterr().err


def test_no_config(capsys):
    assert cli.main(["data", "show"]) == 2
    assert "--config is missing" in capsys.readouterr().err


def test_too_many_strips(tmp_path):
    strip = ("a title", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match="take fewer clips"):
        show.draw([strip] * 400, tmp_path / "sheet.png")
    with pytest.raises(ConfigError, match="nothing to show"):
        show.draw([], tmp_path / "sheet.png")
