"""The index of frame counts: it saves reads, never changes what is read, and survives anything."""

import json
import multiprocessing
import os

import numpy as np
import pytest
from conftest import VIDEOS, write_grey_video

from stretchysnake_jax import cli
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import DataConfig
from stretchysnake_jax.data import decode, index, lists, pipeline, sampling


def claim_frames(data: bytes, claim: int) -> bytes:
    """An AVI whose header claims that many frames; without its own index, which tells the truth."""
    data = bytearray(data[: data.index(b"idx1")])
    for start in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        data[start : start + 4] = claim.to_bytes(4, "little")
    return bytes(data)


@pytest.fixture
def folder(tmp_path):
    """Videos that are right, cut off, claim too many, too few and no plausible number of frames."""
    avi = write_grey_video(tmp_path / "good.avi", "MJPG", 20, 64, 48)
    webm = write_grey_video(tmp_path / "cut.webm", "VP90", 20, 64, 48)
    (tmp_path / "cut.webm").write_bytes(webm[: len(webm) * 3 // 4])
    for claim in (1, 22, 500, 2**31 - 1):
        (tmp_path / f"claim{claim}.avi").write_bytes(claim_frames(avi, claim))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "list.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """The files that the decoder opens, in order."""
    seen = []
    real = decode._Capture.__init__

    def note(self, path):
        seen.append(os.path.basename(path))
        real(self, path)

    monkeypatch.setattr(decode._Capture, "__init__", note)
    return seen


def read(path, frames, counts=None):
    """Reads by a sampling that doesn't always touch the end of the file."""

    def choose(n):
        return sampling.sparse(n, frames, np.random.default_rng(frames))

    try:
        return decode.read_clip(path, choose, None, counts)
    except decode.UnreadableVideo as error:
        return str(error), 0


def test_results_are_equal_with_and_without(folder):
    counts = index.FrameCounts(folder / "i")
    for _ in range(2):  # while the index fills, and when it is full
        for path in sorted(folder.glob("*.*")):
            for frames in (1, 2, 8, 19, 32):
                want, got = read(path, frames), read(path, frames, counts)
                assert got[1] == want[1], (path, frames)
                np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("name", ["claim1.avi", "claim500.avi", "claim2147483647.avi", "cut.webm"])
def test_a_lying_header_costs_its_second_read_once(folder, opened, name):
    path, counts = str(folder / name), index.FrameCounts(folder / "i")
    decode.read_clip(path, lambda n: sampling.uniform(n, 8), None, counts)
    assert opened == [name] * 2
    decode.read_clip(path, lambda n: sampling.uniform(n, 8), None, counts)
    assert opened == [name] * 3
    counts.save()
    again = index.FrameCounts(folder / "i")
    decode.read_clip(path, lambda n: sampling.uniform(n, 8), None, again)
    assert opened == [name] * 4


def test_a_short_clip_is_not_counted_again(folder):
    counts = index.FrameCounts(folder / "i")
    path = str(folder / "good.avi")
    decode.read_clip(path, lambda n: sampling.uniform(n, 4), None, counts)
    assert counts.get(path) is None  # a read that shows nothing about the end keeps nothing
    decode.read_clip(path, lambda n: sampling.uniform(n, 32), None, counts)
    assert counts.get(path) == 20


def test_a_file_that_changed_is_not_believed(folder):
    counts, path = index.FrameCounts(folder / "i"), str(folder / "claim500.avi")
    counts.learn(path, 20)
    assert counts.get(path) == 20
    os.utime(path, ns=(1, 1))
    assert counts.get(path) is None
    counts.learn(path, 7)  # and a wrong entry is found out and replaced
    assert decode.read_clip(path, lambda n: sampling.uniform(n, 8), None, counts)[1] == 7
    counts.learn(path, 400)
    assert decode.read_clip(path, lambda n: sampling.uniform(n, 8), None, counts)[1] == 20
    assert counts.get(path) == 20
    counts.learn(str(folder / "gone.avi"), 3)
    assert counts.get(str(folder / "gone.avi")) is None


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", '{"other": 1}', '{"frame counts, 1": {"a": [1, 2]}}', "\ud800"]
)
def test_a_broken_index_is_built_anew_with_one_line(folder, capsys, text):
    path = folder / "i"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    counts = index.FrameCounts(path)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"{path} is no index" in line and "built anew" in line
    counts.learn(str(folder / "good.avi"), 20)
    counts.save()
    assert index.FrameCounts(path).get(str(folder / "good.avi")) == 20
    assert capsys.readouterr().err == ""


def _learn(path, names, barrier):
    counts = index.FrameCounts(path)
    barrier.wait()
    for name in names:
        counts.learn(name, 20)
    counts.save()


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path):
    names = [str(tmp_path / f"{i}.avi") for i in range(40)]
    for name in names:
        open(name, "w").close()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    parts = names[:30], names[10:40], names[::2]
    jobs = [context.Process(target=_learn, args=(tmp_path / "i", p, barrier)) for p in parts]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    found = index.FrameCounts(tmp_path / "i")
    known = {name for name in names if found.get(name) == 20}
    assert any(known >= set(part) for part in parts)  # the last one to write, at least
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_cannot_be_written_gets_its_index_in_the_cache(tmp_path, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    (data / "a.avi").write_bytes(b"x")
    (data / "b.avi").write_bytes(b"x")
    beside = index.open_counts(str(data / "list.txt.index"))
    beside.learn(str(data / "a.avi"), 5)
    beside.save()
    index._open.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(data)))
    counts = index.open_counts(str(data / "list.txt.index"))
    assert counts.get(str(data / "a.avi")) == 5
    before = (data / "list.txt.index").read_text()
    counts.learn(str(data / "b.avi"), 6)
    counts.save()
    assert (data / "list.txt.index").read_text() == before
    assert counts.path.parent == cache / "stretchysnake" and counts.path.exists()
    index._open.cache_clear()


def test_a_disk_that_is_full_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "_replace", full)
    counts = index.FrameCounts(tmp_path / "i")
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
        counts.learn(str(tmp_path / name), 3)
        counts.save()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said
    assert counts.get(str(tmp_path / "a")) == 3


def test_the_loader_builds_it_and_a_full_check_fills_it(folder, opened, capsys):
    clips = lists.read_list(folder / "list.txt")
    assert clips.index == str(folder / "list.txt.index")
    bucket = Bucket(8, 16, 16, (8, 8))
    config = DataConfig(threads=1, prefetch=1, sampling="uniform", resize="squash")
    for expected in (2, 1):
        with pipeline.eval_batches(config, clips, bucket, 2) as batches:
            videos = [batch["video"] for batch in batches]
        assert opened.count("claim500.avi") == expected
        opened.clear()
    known = json.loads((folder / "list.txt.index").read_text())["frame counts, 1"]
    assert str(folder / "claim500.avi") in known and str(folder / "good.avi") not in known
    (folder / "list.txt.index").unlink()
    index._open.cache_clear()
    assert cli.main(["data", "check", "--full", str(folder / "list.txt")]) == 1  # broken.mp4
    counts = index.FrameCounts(folder / "list.txt.index")
    paths = [path for path in clips.paths if "broken" not in path]
    assert all(counts.get(path) == 20 for path in paths if "cut" not in path)
    assert counts.get(str(folder / "cut.webm")) < 20
    with pipeline.eval_batches(config, clips, bucket, 2) as batches:
        for before, batch in zip(videos, batches, strict=True):
            np.testing.assert_array_equal(batch["video"], before)
    capsys.readouterr()


def test_all_videos_of_the_fixtures_are_read_alike(video_folder, tmp_path):
    counts = index.FrameCounts(tmp_path / "i")
    for name in VIDEOS:
        for _ in range(2):
            want, got = read(video_folder / name, 32), read(video_folder / name, 32, counts)
            np.testing.assert_array_equal(got[0], want[0])
