"""The benchmark of the loader: what it measures adds up, and the command writes what it says."""

import json

import cv2
import numpy as np
import pytest
from conftest import VIDEOS

from stretchysnake_jax import cli
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import DataConfig, resolve
from stretchysnake_jax.data import bench, decode, frames, lists, pipeline, readers


@pytest.fixture(scope="module")
def clips(video_folder):
    return lists.read_list(video_folder / "clips.txt")


def test_stages_add_up_and_everything_is_put_back(clips):
    data = resolve(DataConfig(batch_size=6, recipe="videomamba", repeats=2))
    before = decode._Capture.skip, pipeline.LoadBatch.__call__, cv2.imdecode
    stages = bench.measure_stages(data, clips, Bucket(4, 32, 32, (8, 8)), 12)
    assert set(stages) == set(bench.STAGES) and all(time > 0 for time in stages.values())
    assert (decode._Capture.skip, pipeline.LoadBatch.__call__, cv2.imdecode) == before
    assert frames.cv2.imdecode is before[2]


def test_rate_counts_all_clips(clips):
    data = resolve(DataConfig(batch_size=2, threads=2, prefetch=2))
    assert bench.measure_loader(data, clips, Bucket(4, 32, 32, (8, 8)), 8) > 0


def test_types_are_told_by_suffix_codec_and_size(clips):
    types = bench.video_types(clips, 1)
    assert all(len(paths) == 1 for paths in types.values())
    assert {name.split()[0] for name in types} == {"avi", "mp4", "webm"}
    assert len(types) == 5 and "avi MJPG 80x48" in types


@pytest.mark.parametrize("name", VIDEOS)
def test_the_opencv_readers_give_our_frames(video_folder, name):
    path, n = str(video_folder / name), VIDEOS[name][1]
    wanted = np.unique(np.linspace(0, n - 1, 8).astype(int))
    ours = readers.read_ours(path, wanted, 16)
    assert ours.shape == (len(wanted), 16, 16, 3)
    np.testing.assert_array_equal(readers.read_loop(path, wanted, 16), ours)
    assert readers.read_bare(path, wanted, 16).shape[2] == 3


@pytest.mark.parametrize("name", readers.OTHERS)
def test_the_other_readers_give_our_frames(video_folder, name):
    module, reader = readers.OTHERS[name]
    pytest.importorskip(module, exc_type=ImportError)
    wanted = np.array([0, 3, 9, 19])
    got = reader(str(video_folder / "a.mp4"), wanted, 16)
    want = readers.read_ours(str(video_folder / "a.mp4"), wanted, 16)
    assert np.abs(got.astype(int) - want).mean() < bench.SAME


def test_a_file_that_readers_fail_on_is_left_out(video_folder):
    whole, damaged = str(video_folder / "a.mp4"), str(video_folder / "f.avi")

    def picky(path, wanted, side):
        if path == damaged:
            raise OSError("damaged")
        return readers.read_loop(path, wanted, side)

    def broken(path, wanted, side):
        raise OSError("no such codec")

    data, others = resolve(DataConfig()), {"picky": picky, "broken": broken}
    got = bench.compare_type([whole, damaged], others, data, 1, 0.01)
    assert got["files"] == [whole] and got["difference"] == {"picky": 0}
    assert got["failed"] == {"broken": "OSError: no such codec"}
    assert set(got["clips_per_s"]) == {"ours", "bare", "loop", "loader", "picky"}


def row(ours, loader, **others):
    rates = {"ours": ours, "bare": [10.0] * 3, "loop": [5.0] * 3, "loader": loader, **others}
    difference = {name: 0.1 for name in others} | {"wrong": 9.0}
    return {"clips_per_s": rates | {"wrong": [99.0] * 3}, "difference": difference}


def test_bars_take_the_fastest_reader_of_the_same_frames():
    measured = row([8.0, 9.0, 7.0], [9.5, 9.0, 9.0], pyav=[4.0] * 3, decord=[16.0, 9.0, 7.0])
    got = bench.judge(measured)
    assert got == {
        "loader_to_bare": 0.9,
        "loader_to_loop": 1.8,
        "ours_to_readers": 1.0,
        "ours_to_fused": None,
    }


def test_the_command(video_folder, tmp_path, capsys):
    (tmp_path / "broken.avi").write_bytes(b"no video")
    argv = ["bench", "data", "--quick", str(video_folder / "a.mp4"), str(tmp_path / "broken.avi")]
    assert cli.main([*argv, "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "bottleneck: " in text and "Memory of the loader: " in text
    assert "loader_to_bare >= 0.9" in text and "frames are shrunk by " in text
    found = json.loads((tmp_path / "out.json").read_text())
    assert [line["bucket"] for line in found["loader"]] == [str(b) for b in bench.BUCKETS]
    assert len(found["readers"]) == 1 and found["memory_bound"] > 0


def test_the_command_says_what_it_takes(tmp_path, capsys):
    assert cli.main(["bench", "data"]) == 2
    assert "takes video files, folders or lists" in capsys.readouterr().err
    (tmp_path / "broken.avi").write_bytes(b"no video")
    assert cli.main(["bench", "data", str(tmp_path / "broken.avi")]) == 2
    assert "none of the clips can be read" in capsys.readouterr().err


def test_the_command_with_a_config(tiny_config_file, capsys):
    argv = ["bench", "data", "--quick", "--config", str(tiny_config_file)]
    assert cli.main([*argv, "--config.data.tokens_per_batch=60"]) == 0
    text = capsys.readouterr().out
    assert "2x8x8/2" in text and "2x24x24/6" in text
