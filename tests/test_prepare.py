"""Tests of `stretchysnake data prepare` and `data measure`, and of reading what they write."""

import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import VIDEOS, grey_levels, write_grey_video

from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.cli import main
from stretchysnake_jax.config import ConfigError, DataConfig
from stretchysnake_jax.data import check, pipeline, prepare, records, sampling, source
from stretchysnake_jax.data.decode import UnreadableVideo
from stretchysnake_jax.data.lists import read_list
from stretchysnake_jax.data.record_writer import FORMATS, Settings


def everything(n):
    return np.arange(n)


def levels(video):
    """The grey level of every frame."""
    return video.reshape(len(video), -1).mean(1)


def listed(folder, text, name="train"):
    (folder / f"{name}.txt").write_text(text)
    return {name: read_list(folder / f"{name}.txt")}


@pytest.fixture
def folder(video_folder, tmp_path):
    """The videos of `VIDEOS` in a folder of their own."""
    root = tmp_path / "videos [1]"
    root.mkdir()
    for name in (*VIDEOS, "clips.txt"):  # other tests leave more there
        shutil.copy(video_folder / name, root)
    return root


@pytest.fixture
def many(tmp_path):
    """A folder of two class folders of 35 videos each, every one in a file of its own or shared."""
    for i in range(70):
        place = tmp_path / "many" / "xy"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        write_grey_video(place / f"{i:02d}.avi", "MJPG", 4 + i % 5, 32, 24)
    return tmp_path / "many"


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_frame_comes_back(folder, tmp_path, kind):
    splits = {"clips": read_list(folder / "clips.txt")}
    made = prepare.prepare(splits, tmp_path / "out", Settings(32, kind), workers=1)
    assert made.lists == {"clips": (str(tmp_path / "out" / "clips.txt"), len(VIDEOS))}
    assert made.frames == sum(n for _, n, _, _ in VIDEOS.values()) and made.bytes > 1000
    clips = read_list(tmp_path / "out" / "clips.txt")
    assert clips.labels.tolist() == list(range(len(VIDEOS))) and clips.windows is None
    for address, (name, (_, n, width, height)) in zip(clips.paths, VIDEOS.items(), strict=True):
        video, count = source.read_clip(address, everything)
        unit = 2 if kind == "video" else 1  # mp4v takes even sides
        shape = tuple(unit * round(32 * s / min(height, width) / unit) for s in (height, width))
        assert count == n and video.shape[1:3] == shape, name
        assert np.abs(levels(video) - grey_levels(n)).max() < 8, name
        assert source.frame_rate(address) == 25
        clip = json.loads(records._read_bytes(address).partition(b"\n")[2])
        assert clip["path"] == str(folder / name) and clip["decoded"] == n
        assert clip["label"] == str(list(VIDEOS).index(name)) and clip["size"] == list(shape)
    picked, _ = source.read_clip(clips.paths[0], lambda n: np.array([1, 1, 9]), lambda f: f[:2])
    assert picked.shape[:2] == (3, 2) and np.abs(levels(picked) - [12, 12, 108]).max() < 8
    inside, n = source.read_clip(clips.paths[0], everything, window=(0.2, 0.36, "seconds"))
    assert n == 5 and np.abs(levels(inside) - grey_levels(20)[5:10]).max() < 8
    assert (check.check_clips(clips).seconds == check.check_clips(splits["clips"]).seconds).all()


def test_parts_of_a_longer_video(tmp_path, monkeypatch):
    n = 2 * FORMATS["video"] + 7
    path = str(tmp_path / "long.avi")
    write_grey_video(tmp_path / "long.avi", "MJPG", n, 32, 32)
    original, _ = source.read_clip(path, everything)
    read, real = [], records._read_bytes
    for kind, per_part in FORMATS.items():
        splits = listed(tmp_path, "long.avi 0\n", kind)
        prepare.prepare(splits, tmp_path / f"{kind} out", Settings(format=kind), workers=1)
        address = read_list(tmp_path / f"{kind} out" / f"{kind}.txt").paths[0]
        assert np.abs(source.read_clip(address, everything)[0] - original.astype(int)).mean() < 4
        with monkeypatch.context() as patch:
            patch.setattr(records, "_read_bytes", lambda a, i=None: read.append(i) or real(a, i))
            got, count = source.read_clip(address, lambda n: np.array([3, 3, 130, n - 1]))
        assert count == n and np.abs(got - original[[3, 3, 130, n - 1]].astype(int)).mean() < 4
        wanted = sorted({i // per_part for i in (3, 130, n - 1)})
        assert read == [None, *wanted], "other parts than the wanted frames' are read"
        read.clear()


def test_windows_groups_and_flip_are_kept(folder, tmp_path):
    text = "# columns: path start end group label\n# flip: no\n"
    text += "a.mp4 0 0.16 g1 1\na.mp4 0.4 inf g1 0\nb.avi 0.08 9 g2 1\n"
    splits = listed(folder, text) | listed(folder, text.rpartition("b.avi")[0], "val")
    made = prepare.prepare(splits, tmp_path / "out", workers=1)
    assert made.frames == 5 + 10 + 10  # those of both splits once
    got, val = (read_list(tmp_path / "out" / f"{name}.txt") for name in ("train", "val"))
    assert (got.labels.tolist(), got.groups, got.flip) == ([1, 0, 1], ["g1", "g1", "g2"], False)
    assert val.paths == got.paths[:2]
    for i, address in enumerate(got.paths):
        original, n = source.read_clip(
            splits["train"].paths[i], everything, window=splits["train"].window(i)
        )
        video, count = source.read_clip(address, everything)
        assert count == n and np.abs(levels(video) - levels(original)).max() < 2


def test_every_nth_frame(folder, tmp_path):
    splits = listed(folder, "a.mp4 0\nf.avi 0\n")
    prepare.prepare(splits, tmp_path / "out", Settings(every=3), workers=1)
    clips = read_list(tmp_path / "out" / "train.txt")
    video, n = source.read_clip(clips.paths[0], everything)
    assert n == 7 and np.abs(levels(video) - grey_levels(20)[::3]).max() < 6
    assert source.frame_rate(clips.paths[0]) == pytest.approx(25 / 3)
    assert source.read_clip(clips.paths[1], everything)[1] == 1
    clip = json.loads(records._read_bytes(clips.paths[0]).partition(b"\n")[2])
    assert clip["decoded"] == 20 and clip["every"] == 3


def test_wrong_headers_and_folders_of_frames(folder, tmp_path):
    """A file whose header says too much is decoded twice, its frames are stored once."""
    data = (folder / "b.avi").read_bytes()
    (folder / "cut.avi").write_bytes(data[: len(data) * 3 // 4])
    true = source.read_clip(str(folder / "cut.avi"), everything)[1]
    assert true < VIDEOS["b.avi"][1]
    import cv2

    (folder / "frames").mkdir()
    for i in range(4):
        cv2.imwrite(str(folder / "frames" / f"{i}.png"), np.full((20, 30, 3), 50 * i, np.uint8))
    text = "# columns: path start_frame end_frame label\n"
    text += f"cut.avi 0 inf 0\ncut.avi 2 {true + 5} 0\nframes 1 9 0\n"
    made = prepare.prepare(listed(folder, text), tmp_path / "out", Settings(), workers=1)
    assert made.frames == true + (true - 2) + 3 and not made.unreadable
    clips = read_list(tmp_path / "out" / "train.txt")
    for i, expected in enumerate((grey_levels(true), grey_levels(true)[2:], [50, 100, 150])):
        assert np.abs(levels(source.read_clip(clips.paths[i], everything)[0]) - expected).max() < 6
    with pytest.raises(UnreadableVideo, match="nothing says its frame rate"):
        source.frame_rate(clips.paths[2])


def test_batches_are_those_of_the_originals(folder, tmp_path):
    clips = read_list(folder / "clips.txt")
    prepare.prepare({"clips": clips}, tmp_path / "out", workers=1)
    config, bucket = DataConfig(threads=1), Bucket(4, 24, 24, (8, 8))
    batches = [
        list(pipeline.eval_batches(config, one, bucket, 3))
        for one in (clips, read_list(tmp_path / "out" / "clips.txt"))
    ]
    assert len(batches[0]) == len(batches[1]) == 2
    for original, prepared in zip(*batches, strict=True):
        assert (original["label"] == prepared["label"]).all() and prepared["mask"].all()
        assert np.abs(original["video"] - prepared["video"].astype(int)).mean() < 3


def test_shares_add_up_to_the_whole(many, tmp_path):
    splits = {"train": prepared_source(many)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    made = prepare.prepare(splits, whole, workers=1)
    assert made.files == 35 and made.lacking == 0  # two clips per file
    first = prepare.prepare(splits, parts, shard=(1, 2), workers=1)
    assert first.lacking == 18 and not first.lists and not (parts / "train.txt").exists()
    second = prepare.prepare(splits, parts, shard=(0, 2), workers=1)
    assert second.lacking == 0 and second.frames + first.frames == made.frames
    assert file_bytes(parts) == file_bytes(whole)


def prepared_source(folder):
    from stretchysnake_jax.data.datasets import folders

    return folders.read_tree(folder)


def test_processes_write_the_same(many, tmp_path):
    splits, seen = {"train": prepared_source(many)}, []
    prepare.prepare(splits, tmp_path / "one", workers=1)
    prepare.prepare(splits, tmp_path / "two", workers=2, progress=lambda *x: seen.append(x))
    assert seen[-1] == (70, 70) and len(seen) == 35 and not multiprocessing.active_children()
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "two")


def start(words, **options):
    command = [sys.executable, "-m", "stretchysnake_jax.cli", "data", "prepare", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_killed_it_goes_on(many, tmp_path):
    out = tmp_path / "out"
    process = start([many, out, "--workers", "2"], stdout=subprocess.DEVNULL)
    while len(list(out.glob("*.array_record"))) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.stderr.read()  # until the last worker is gone: they end with their parent
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert 3 <= len(finished) < 35 and not (out / "train.txt").exists()
    assert all(records.read_contents(path) for path in finished)
    (out / f"{min(finished).name}.123.part").write_bytes(b"what a killed process leaves")
    assert main(["data", "prepare", str(many), str(out), "--workers", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    prepare.prepare({"train": prepared_source(many)}, tmp_path / "whole", workers=1)
    assert file_bytes(out) == file_bytes(tmp_path / "whole")


def test_a_worker_killed(many, tmp_path):
    def kill(done, total):
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(prepare.WorkerDied, match="maybe for lack of memory") as error:
        prepare.prepare({"train": prepared_source(many)}, tmp_path / "out", None, (0, 1), 2, kill)
    assert error.value.plain and not multiprocessing.active_children()


def test_full_disk(folder, tmp_path):
    """A limit on the size of files stands for it."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))

    words = [folder / "clips.txt", tmp_path / "out", "--workers", "1"]
    process = start(words, stdout=subprocess.PIPE, preexec_fn=limit)
    out, error = process.communicate()
    assert process.returncode == 2 and not out
    assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
    assert "can't be written: File too large: is the disk full?" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prepare.json"]


def test_command(folder, tmp_path, capsys):
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "train.txt").write_text("a.mp4 0\nempty.mp4 1\nc d.mp4 1\ngone.mp4 1\n")
    (folder / "test.csv").write_text("b.avi,0\n")
    (folder / "classes.txt").write_text("left turn\njump\n")
    out = tmp_path / "out"
    words = ["data", "prepare", str(folder), str(out), "--workers", "1", "--size", "24"]
    for _ in range(2):  # the second time nothing is decoded
        assert main(words) == 1
        shown = capsys.readouterr().out
        assert f"{folder / 'empty.mp4'}: the file is empty" in shown
        assert f"{folder / 'gone.mp4'}: there is no such file" in shown
        assert f"{out / 'train.txt'}: 2 of 4 clips" in shown and "2 clips unreadable" in shown
    left_out = (out / "left_out.txt").read_text()
    assert "empty.mp4: the file is empty (clips-00001-of-00005.array_record)\n" in left_out
    clips = read_list(out / "train.txt")
    assert clips.classes == ["left turn", "jump"] and not clips.flip
    assert len(read_list(out / "test.txt")) == 1
    assert main(["data", "check", str(out / "train.txt"), "--full"]) == 0
    # Repaired and its file deleted, a clip is tried again.
    shutil.copy(folder / "a.mp4", folder / "empty.mp4")
    (out / "clips-00001-of-00005.array_record").unlink()
    assert main(words) == 1 and len(read_list(out / "train.txt")) == 3


def test_sources(folder, tmp_path, tiny_config_file, capsys):
    tree = tmp_path / "tree"
    (tree / "jump").mkdir(parents=True)
    shutil.copy(folder / "a.mp4", tree / "jump" / "eli_jump.mp4")
    quick = ["--workers", "1", "--size", "16"]
    for i, words in enumerate(
        (
            [str(folder / "clips.txt"), "--shard", "0/1"],
            [str(tree)],
            [str(tree), "--dataset", "folders"],
            [str(tiny_config_file), "--config.data.val=", "--format=video"],
        )
    ):
        out = tmp_path / str(i)
        assert main(["data", "prepare", words[0], *quick, str(out), *words[1:]]) == 0, words
        name = "clips" if i == 0 else "train"
        assert len(read_list(out / f"{name}.txt")) == (1 if i in (1, 2) else len(VIDEOS)), words
        assert (name == "train") != (out / "clips.txt").exists()
    # What was prepared can be prepared again.
    assert main(["data", "prepare", str(tmp_path / "1"), str(tmp_path / "again"), *quick]) == 0
    again = read_list(tmp_path / "again" / "train.txt")
    assert source.read_clip(again.paths[0], sampling_of_two)[1] == 20
    assert again.classes == ["jump"]


def sampling_of_two(n):
    return sampling.uniform(n, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "8"], "the size is 8: it takes 16 to 16384"),
        (["--quality", "0"], "the quality is 0: it takes 1 to 100"),
        (["--every", "0"], "the every is 0"),
        (["--format", "gif"], "the format is 'gif': it takes jpeg or video"),
        (["--shard", "2/2"], "--shard is '2/2': it takes I/N"),
        (["--workers", "0"], "--workers is 0"),
        (["--sizes"], "takes no '--sizes'"),
        (["--config.data.val="], "takes no '--config.data.val='"),
        (["--dataset", "ucf1"], "did you mean 'ucf101'"),
    ],
)
def test_bad_words(folder, tmp_path, capsys, words, message):
    assert main(["data", "prepare", str(folder / "clips.txt"), str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_folders_that_are_not_ours(folder, tmp_path):
    splits = listed(folder, "a.mp4 0\n")
    out = tmp_path / "out"
    prepare.prepare(splits, out, workers=1)
    for others, settings, message in (
        (splits, Settings(size=64), "was prepared with size 256, not 64: it takes the same"),
        (splits, Settings(format="video"), "with format jpeg, not video"),
        (listed(folder, "a.mp4 0\nb.avi 0\n"), None, "was prepared from other lists"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare.prepare(others, out, settings, workers=1)
    with pytest.raises(ConfigError, match="holds something else: it takes a new folder"):
        prepare.prepare(splits, folder, workers=1)
    with pytest.raises(OSError, match=r"a\.mp4/out can't be written: Not a directory"):
        prepare.prepare(splits, folder / "a.mp4" / "out", workers=1)
    file = next(out.glob("*.array_record"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="is no whole ArrayRecord file: delete it and run again"):
        prepare.prepare(splits, out, workers=1)
    (out / "prepare.json").write_text("{")
    with pytest.raises(ConfigError, match=r"prepare\.json is damaged"):
        prepare.prepare(splits, out, workers=1)
    unlike = splits | {"val": read_list(folder / "clips.txt", classes=list("abcdef"))}
    with pytest.raises(ConfigError, match="the classes of train, val differ"):
        prepare.prepare(unlike, tmp_path / "new", workers=1)


def test_records_that_cannot_be_read(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    file = str(tmp_path / "x.array_record")
    clip = {"version": 1, "first": 0, "per_part": 1, "frames": 1, "rate": None}
    rows = [b"no image", records.CLIP + json.dumps(clip).encode()]
    rows.append(records.CLIP + json.dumps(clip | {"version": 99}).encode())
    rows.append(records.CLIP + b"{")
    writer = ArrayRecordWriter(file, "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()
    for index, message in (
        (1, "frame 0 is no image"),
        (2, "prepared in form 99, this version reads up to 1: install a newer one"),
        (3, "the record can't be read"),
        (4, "the record can't be read"),
    ):
        with pytest.raises(UnreadableVideo, match=message) as error:
            source.read_clip(f"{file}#{index}", everything)
        assert error.value.path == f"{file}#{index}"
    with pytest.raises(ValueError, match="was not written by stretchysnake data prepare"):
        records.read_contents(file)


def test_measure(folder, capsys):
    rows = prepare.measure(str(folder / "a.mp4"), (16,), rounds=1)
    assert [row.name for row in rows][:2] == ["original", "jpeg 75, 256"] and len(rows) == 11
    assert all(row.milliseconds[16] > 0 and row.bytes > 100 and row.error < 4 for row in rows)
    assert rows[0].error == 0 < rows[1].bytes < rows[4].bytes
    assert main(["data", "measure", str(folder / "a.mp4")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12
    pathlib.Path(folder / "a.mp4").write_bytes(b"")
    assert main(["data", "measure", str(folder / "a.mp4")]) == 2
    assert "the file is empty" in capsys.readouterr().err
