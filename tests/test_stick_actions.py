"""The embedded data set: reproducible, resumable, and only the motion tells the class."""

import hashlib
import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from stretchysnake_jax.data import baselines, lists, stick_actions, stick_motion

TINY = dict(train_subjects=2, val_subjects=1, test_subjects=1, takes=1, size=32, seed=3)
SPLITS = {"train": [0, 1], "val": [2], "test": [3]}


def read_folder(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished data set of 40 clips, and the calls of its progress function."""
    root, calls = tmp_path_factory.mktemp("tiny") / "set", []
    stick_actions.make(root, **TINY, workers=1, progress=lambda *call: calls.append(call))
    return root, calls


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny[0], tmp_path / "copy")


def test_files(tiny):
    root, calls = tiny
    assert calls == [(i, 40) for i in range(1, 41)]
    assert sorted(p.name for p in root.iterdir()) == sorted(
        ["train.txt", "val.txt", "test.txt", "classes.txt", "dataset.json", "videos"]
    )
    assert (root / "classes.txt").read_text().split() == list(stick_actions.CLASSES)
    assert (root / "train.txt").read_text().startswith("videos/train/bend/s000_t0.mp4 0\n")
    facts = json.loads((root / "dataset.json").read_text())
    assert facts["subjects"] == SPLITS and facts["clips"] == dict(train=20, val=10, test=10)
    assert (facts["seed"], facts["size"], facts["fps"]) == (3, 32, stick_actions.FPS)


@pytest.mark.parametrize("split", SPLITS)
def test_lists_and_videos(tiny, split):
    clips = lists.read_list(tiny[0] / f"{split}.txt")
    assert clips.classes == list(stick_actions.CLASSES)
    assert np.bincount(clips.labels).tolist() == [len(SPLITS[split])] * 10
    subjects = {int(path.rsplit("/s", 1)[1][:3]) for path in clips.paths}
    assert subjects == set(SPLITS[split])  # so the splits share no subject
    for path, label in zip(clips.paths[::3], clips.labels[::3], strict=True):
        assert f"/{split}/{stick_actions.CLASSES[label]}/" in path
        drawn = stick_actions.render_clip(label, int(path[-10:-7]), 0, seed=3, size=32)
        capture, frames = cv2.VideoCapture(path), []
        while (read := capture.read())[0]:
            frames.append(read[1][..., ::-1])
        assert np.shape(frames) == drawn.shape
        assert capture.get(cv2.CAP_PROP_FPS) == stick_actions.FPS
        # Right colours in the right order, as far as the codec keeps them.
        assert abs(np.float32(frames) - drawn).mean() < 12


def test_same_bytes_for_any_number_of_workers(tiny, tmp_path):
    stick_actions.make(tmp_path / "set", **TINY, workers=2)
    assert read_folder(tmp_path / "set") == read_folder(tiny[0])


def test_complete_folder_returns_at_once(copy):
    def fail(*_):
        raise AssertionError("nothing was left to render")

    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    stick_actions.make(copy, **TINY, workers=1, progress=fail)
    assert before == {p: p.stat().st_mtime_ns for p in copy.rglob("*")}


@pytest.mark.parametrize("name", ["videos/val/skip/s002_t0.mp4", "val.txt", "dataset.json"])
def test_missing_file_is_made_again(tiny, copy, name):
    # Without dataset.json a folder is ours only by the marker of the call that was cut off.
    (copy / "dataset.partial.json").write_bytes((copy / "dataset.json").read_bytes())
    (copy / name).unlink()
    stick_actions.make(copy, **TINY, workers=1)
    assert read_folder(copy) == read_folder(tiny[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_run_continues(tiny, tmp_path, workers):
    root, calls = tmp_path / "set", []

    def interrupt(done, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stick_actions.make(root, **TINY, workers=workers, progress=interrupt)
    assert not (root / "dataset.json").exists() and not (root / "train.txt").exists()
    with pytest.raises(ValueError, match="other settings"):
        stick_actions.make(root, **TINY | dict(seed=4))
    stick_actions.make(root, **TINY, workers=1, progress=lambda *call: calls.append(call))
    assert calls[0][0] > 7 and calls[-1] == (40, 40)
    assert read_folder(root) == read_folder(tiny[0])


@pytest.mark.parametrize(
    "other", [dict(seed=4), dict(size=34), dict(takes=2), dict(detail=1, size=64), dict(timing=2)]
)
def test_other_settings_are_refused(copy, other):
    before = read_folder(copy)
    with pytest.raises(ValueError, match=rf"other settings \(.*{next(iter(other))}"):
        stick_actions.make(copy, **TINY | other)
    assert read_folder(copy) == before


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("my.mp4 0\n")
    with pytest.raises(ValueError, match="holds something else"):
        stick_actions.make(tmp_path, **TINY)


@pytest.mark.parametrize(
    "bad",
    [dict(size=33), dict(size=16), dict(seed=-1), dict(takes=0), dict(detail=4), dict(timing=-1)],
)
def test_bad_arguments_leave_nothing(tmp_path, bad):
    with pytest.raises(ValueError):
        stick_actions.make(tmp_path / "set", **TINY | bad)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("clip", [(10, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_unknown_clip(clip):
    with pytest.raises(ValueError, match="there is no clip"):
        stick_actions.render_clip(*clip)


def test_length_does_not_depend_on_the_class():
    for subject, take in ((0, 0), (5, 2)):
        n = stick_actions.clip_length(subject, take)
        clips = [stick_actions.render_clip(k, subject, take, size=32) for k in range(10)]
        assert {clip.shape for clip in clips} == {(n, 32, 32, 3)}
    lengths = [stick_actions.clip_length(s, t) for s in range(60) for t in range(10)]
    assert (min(lengths), max(lengths)) == stick_actions.FRAMES
    assert np.mean(lengths) == pytest.approx(np.mean(stick_actions.FRAMES), abs=2)


@pytest.mark.parametrize("label", range(10))
def test_figure_moves_and_stays_in_the_picture(label):
    for subject in range(3):
        clip = stick_actions.render_clip(label, subject, 0, size=64).mean(-1)
        change = abs(clip[2:] - clip[:-2]) > 25
        assert change.any(0).mean() > 0.02  # something large moves
        assert change[:, :, :2].mean() + change[:, :, -2:].mean() < 0.05  # not over the edges


@pytest.mark.parametrize(
    "size, digest",
    [
        (32, "1b4938d3c816608267a3af1b5795ed56dd5a4ecb417fed001914d7c74843f0f6"),
        (128, "592d269758e59d5e2522f4d64804cc1ffdcd04cea00a5982ab1783488d0cab62"),
    ],
)
def test_level_0_is_what_it_was(size, digest):
    """The demo's figures rest on these pixels."""
    total = hashlib.sha256()
    for label in range(10):
        for subject, take, seed in ((0, 0, 0), (7, 1, 0), (3, 0, 5)):
            clip = stick_actions.render_clip(label, subject, take, seed=seed, size=size)
            total.update(clip.tobytes())
    assert total.hexdigest() == digest


def test_dataset_json_of_level_0_is_what_it_was(tiny):
    facts = json.loads((tiny[0] / "dataset.json").read_text())
    assert list(facts) == [
        "name", "version", "seed", "size", "fps", "frames", "takes", "subjects", "clips",
    ]  # fmt: skip
    assert facts["version"] == 2


@pytest.mark.parametrize("timing", [1, 2, 3])
def test_levels_of_timing(timing):
    """Five pairs; a pair differs in its variant alone, and in nothing else that can be seen."""
    names = stick_actions.classes(timing)
    assert len(set(names)) == 10
    for label in range(0, 10, 2):
        first, second = names[label : label + 2]
        assert first.split("_")[0] == second.split("_")[0] and first != second
        a, b = (stick_actions.render_clip(label + k, 4, 1, timing=timing) for k in (0, 1))
        assert a.shape == b.shape == (stick_actions.clip_length(4, 1), 128, 128, 3)
        assert (abs(a.astype(int) - b).max(-1) > 12).any()
        assert (a == stick_actions.render_clip(label, 4, 1, timing=timing)).all()


@pytest.mark.parametrize("detail, timing", [(1, 0), (2, 0), (3, 2)])
def test_levels_of_detail(detail, timing):
    """Rows of scenes: the first is the clip of level 0, and no two are the same."""
    clip = stick_actions.render_clip(8, 4, 1, detail=detail, timing=timing)
    assert clip.shape == (stick_actions.clip_length(4, 1), 128, 128, 3)
    edges = [128 * i // (detail + 1) for i in range(detail + 2)]
    side = -(-128 // (detail + 1))
    alone = stick_actions.prepare_clip(8, 4, 1, size=side, timing=timing)
    first = clip[5, : edges[1], : edges[1]]
    assert (first == stick_actions.draw_frame(alone, 5)[: edges[1], : edges[1]]).all()
    scenes = [clip[:, a : a + edges[1], b : b + edges[1]] for a in edges[:-1] for b in edges[:-1]]
    for i, scene in enumerate(scenes):
        assert abs(scene[2:].astype(int) - scene[:-2]).max() > 25  # something moves
        assert not any((scene == other).all() for other in scenes[:i])


@pytest.mark.parametrize("label", range(0, 10, 2))
def test_timing_pairs_pass_through_the_same_poses(label):
    """Over a clip the joints of both variants have nearly the same places, each as often."""
    rng_seed, seconds = [1, label], np.arange(2000) / 1000
    clips = [
        stick_motion.timed_motion(
            stick_motion.TIMING_CLASSES[label + k], 2, seconds, dict(elbow=9.0, lean=1.0),
            np.random.default_rng(rng_seed),
        )
        for k in (0, 1)
    ]  # fmt: skip
    differs = False
    for name in ("hip", "spread", "knee", "swing", "lift", "rise"):
        a, b = (np.sort(clip[name], -1) for clip in clips)
        assert abs(a - b).mean() <= 0.06 * np.ptp(a)
        differs |= abs(clips[0][name] - clips[1][name]).max() > max(0.5 * np.ptp(a), 0.1)
    assert differs


def test_levels_are_written_and_resumed(tmp_path):
    settings = TINY | dict(train_subjects=1, detail=3, size=128)
    stick_actions.make(tmp_path / "one", **settings, workers=1)
    facts = json.loads((tmp_path / "one" / "dataset.json").read_text())
    assert (facts["detail"], facts["timing"]) == (3, 0)
    names = (tmp_path / "one" / "classes.txt").read_text().split()
    assert names == list(stick_motion.CLASSES) and facts["version"] == 3
    before = read_folder(tmp_path / "one")
    (tmp_path / "one" / "videos/val/walk/s001_t0.mp4").unlink()
    stick_actions.make(tmp_path / "one", **settings, workers=2)
    assert read_folder(tmp_path / "one") == before
    with pytest.raises(ValueError, match="other settings \\(detail\\)"):
        stick_actions.make(tmp_path / "one", **settings | dict(detail=2))


@pytest.mark.parametrize("level", [dict(detail=4), dict(timing=-1), dict(detail=1.5)])
def test_unknown_level(level):
    with pytest.raises(ValueError, match="it takes a level, 0 to 3"):
        stick_actions.render_clip(0, 0, 0, **level)


@pytest.mark.slow
def test_detail_needs_resolution(tmp_path):
    """The action of a scene is told where limbs are resolved, and less where they aren't."""
    settings = dict(train_subjects=16, val_subjects=4, test_subjects=8, takes=1, detail=3)
    stick_actions.make(tmp_path / "set", **settings)
    small, large = (baselines.run(tmp_path / "set", side=side, rows=4) for side in (28, 112))
    assert large["motion"] > small["motion"] + 0.1


@pytest.mark.slow
def test_timing_needs_frames():
    """A frame tells the action and not its variant; sixteen tell both, at the highest level."""
    table = baselines.tell_timing(3, people=100)
    assert table[1] < 0.6 and table[16] > table[4] + 0.05


def test_import_is_light():
    """Renderers and loader workers import the module: it must not bring JAX along."""
    code = "import sys, stretchysnake_jax.data.stick_actions; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_baselines(tmp_path):
    """Length says nothing, one frame says less than the motion."""
    settings = dict(train_subjects=16, val_subjects=4, test_subjects=6, takes=1, size=64)
    stick_actions.make(tmp_path / "set", **settings)
    results = baselines.run(tmp_path / "set")
    assert list(results) == ["chance", "length", "colour", "frame", "motion"]
    assert results["chance"] == 0.1
    assert results["length"] <= 0.2 and results["colour"] <= 0.35
    assert results["motion"] > 0.7
    assert results["motion"] > results["frame"] + 0.15


def test_baselines_on_another_list(tiny):
    results = baselines.run(tiny[0], tiny[0] / "train.txt")
    assert results["frame"] == results["motion"] == 1  # it is the list they were trained on


def test_baselines_on_still_and_short_clips():
    for frames in (1, 2, 40):
        still = baselines.describe_motion(np.full((frames, 64, 64), 7, np.float32))
        assert still.shape == (318,) and np.isfinite(still).all()
