"""Tests of the clip geometry and of the loader."""

import dataclasses
import json
import time

import cv2
import numpy as np
import pytest
from conftest import VIDEOS, grey_levels

from stretchysnake_jax.buckets import Bucket, Schedule
from stretchysnake_jax.config import ConfigError, DataConfig
from stretchysnake_jax.data import lists, pipeline, sampling, transforms

BUCKETS = (Bucket(4, 32, 32, (8, 8)), Bucket(8, 16, 24, (8, 8)))
CONFIG = DataConfig(batch_size=4, threads=2, prefetch=2, crop_scale=0.6)
STEPS = 10


@pytest.fixture(scope="module")
def schedule():
    """Ten steps that change between two buckets."""
    return Schedule(buckets=BUCKETS, which=np.arange(STEPS, dtype=np.int32) % 3 % 2)


def stream(config, clips, schedule, **options):
    options = {"seed": 5} | options
    with pipeline.train_batches(config, clips, schedule, **options) as batches:
        return list(batches)


def assert_same(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert type(one[key]) is type(value), key
            np.testing.assert_array_equal(one[key], value, err_msg=key)


# Geometry.


@pytest.mark.parametrize(
    ("bucket", "frame", "box"),
    [
        ((32, 32), (144, 180), (0, 18, 144, 144)),
        ((32, 32), (181, 144), (18, 0, 144, 144)),  # an odd rest: rounded down
        ((32, 64), (100, 100), (25, 0, 50, 100)),
        ((64, 32), (100, 100), (0, 25, 100, 50)),
        ((224, 224), (10, 30), (0, 10, 10, 10)),  # smaller than the bucket
        ((32, 32), (1, 1), (0, 0, 1, 1)),
    ],
)
def test_eval_takes_the_centre(bucket, frame, box):
    geometry = transforms.eval_geometry(*bucket, "crop")
    assert geometry.box(*frame) == box
    assert geometry(np.zeros((*frame, 3), np.uint8)).shape == (*bucket, 3)
    assert transforms.eval_geometry(*bucket, "squash").box(*frame) == (0, 0, *frame)


def test_train_boxes_reach_every_place_and_size():
    rng = np.random.default_rng(0)
    draws = [transforms.train_geometry(32, 32, "crop", 0.5, 0.5, rng) for _ in range(2000)]
    boxes = np.array([g.box(20, 24) for g in draws])
    assert (boxes[:, 2] == boxes[:, 3]).all()
    assert set(boxes[:, 2]) == set(range(10, 21))
    full = boxes[boxes[:, 2] == 20]
    assert set(full[:, 0]) == {0} and set(full[:, 1]) == {0, 1, 2, 3, 4}
    assert (boxes[:, 0] + boxes[:, 2]).max() == 20 and (boxes[:, 1] + boxes[:, 3]).max() == 24
    assert 0.4 < np.mean([g.flip for g in draws]) < 0.6


@pytest.mark.parametrize("chance", [0, 1])
def test_flip_of_certain_chance(chance):
    rng = np.random.default_rng(0)
    draws = [transforms.train_geometry(8, 8, "squash", 1, chance, rng) for _ in range(50)]
    assert all(g.flip == bool(chance) and g.scale is None for g in draws)


def test_geometry_pixels():
    frame = np.zeros((8, 16, 3), np.uint8)
    frame[:, 12:] = 200  # the right quarter
    whole = transforms.Geometry(4, 4, scale=None)(frame)
    assert (whole[0, :, 0] == [0, 0, 0, 200]).all()
    flipped = transforms.Geometry(4, 4, scale=None, flip=True)(frame)
    assert (flipped[0, :, 0] == [200, 0, 0, 0]).all()
    right = transforms.Geometry(4, 4, place=(0.5, 1.0))(frame)
    assert (right[0, :, 0] == [0, 0, 200, 200]).all()


@pytest.mark.parametrize("size", [(8, 8), (8, 96), (96, 8)])
def test_shrinking_averages(size):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2, ::2] = stripes[1::2, 1::2] = 200  # a chequerboard, gone in the mean
    small = transforms.resize(stripes, *size)
    assert small.shape == (*size, 3)
    assert (np.abs(small.astype(int) - 100) <= 1).all()


# Training batches.


def test_batches(clips, schedule):
    batches = stream(CONFIG, clips, schedule)
    assert [b["step"] for b in batches] == list(range(STEPS))
    for batch, which in zip(batches, schedule.which, strict=True):
        bucket = BUCKETS[which]
        assert batch["bucket"] == which
        assert batch["video"].shape == (4, bucket.frames, bucket.height, bucket.width, 3)
        assert batch["video"].dtype == np.uint8
        assert batch["label"].dtype == np.int32 and batch["mask"].dtype == np.float32
        assert (batch["label"] == clips.labels[batch["clip"]]).all()
        broken = batch["clip"] == 6
        assert (batch["mask"] == ~broken).all() and (batch["video"][broken] == 0).all()
        assert [p for p, _ in batch["unreadable"]] == [clips.paths[6]] * broken.sum()
    order = np.concatenate([b["clip"] for b in batches])
    epochs = order[:35].reshape(5, 7)
    assert (np.sort(epochs) == np.arange(7)).all()  # permutations
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_frames_are_drawn_within_the_segments(clips, schedule):
    seen = set()
    for batch in stream(CONFIG, clips, schedule):
        frames = BUCKETS[batch["bucket"]].frames
        for video, clip in zip(batch["video"], batch["clip"], strict=True):
            if clip == 6:
                continue
            n = list(VIDEOS.values())[clip][1]
            levels = video.mean((1, 2, 3))
            got = np.abs(levels[:, None] - grey_levels(n)).argmin(1)
            bounds = np.round((n - 1) / frames * np.arange(frames + 1))
            assert (bounds[:-1] <= got).all() and (got <= bounds[1:]).all()
            seen.add((clip, *got))
    assert len(seen) > 20  # not the same frames again and again


@pytest.mark.parametrize("change", [{"threads": 1, "prefetch": 1}, {"workers": 2}])
def test_stream_is_the_same_however_it_is_loaded(clips, schedule, change):
    want = stream(CONFIG, clips, schedule)
    assert_same(stream(dataclasses.replace(CONFIG, **change), clips, schedule), want)


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_the_global_batch(clips, schedule, count):
    want = stream(CONFIG, clips, schedule)
    hosts = [
        stream(CONFIG, clips, schedule, shard_index=i, shard_count=count) for i in range(count)
    ]
    for step, parts in enumerate(zip(*hosts, strict=True)):
        for key in ("video", "label", "mask", "clip"):
            np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), want[step][key])
        assert [u for p in parts for u in p["unreadable"]] == want[step]["unreadable"]


@pytest.mark.parametrize("start", [0, 1, 7, STEPS])
def test_resumes_exactly(clips, schedule, start):
    want = stream(CONFIG, clips, schedule)[start:]
    assert_same(stream(CONFIG, clips, schedule, start_step=start), want)


def test_seed_changes_the_stream(clips, schedule):
    one, other = (stream(CONFIG, clips, schedule, seed=s) for s in (1, 2))
    assert any((a["clip"] != b["clip"]).any() for a, b in zip(one, other, strict=True))


def test_batch_larger_than_the_list(clips, schedule):
    config = dataclasses.replace(CONFIG, batch_size=16)
    batch = stream(config, clips, schedule)[0]
    assert (np.bincount(batch["clip"], minlength=7) >= 2).all()


def test_uniform_sampling_and_squash_draw_only_flips(clips, schedule):
    config = dataclasses.replace(CONFIG, sampling="uniform", resize="squash", flip=0)
    batches = stream(config, clips, schedule)
    videos = {}
    for batch in batches:
        for video, clip in zip(batch["video"], batch["clip"], strict=True):
            first = videos.setdefault((batch["bucket"], clip), video)
            np.testing.assert_array_equal(video, first)


def test_samples_have_streams_of_their_own():
    draws = [pipeline.sample_rng(3, row, s).random(64) for row in range(20) for s in (0, 1)]
    assert len(np.unique(np.concatenate(draws))) == 20 * 2 * 64
    again = pipeline.sample_rng(3, 7, 1).random(64)
    np.testing.assert_array_equal(again, draws[15])


def test_bad_arguments(clips, schedule):
    with pytest.raises(ConfigError, match=r"data\.batch_size is 4: with 3 hosts"):
        pipeline.train_batches(CONFIG, clips, schedule, seed=0, shard_count=3)
    with pytest.raises(ConfigError, match="multiple of 2"):
        pipeline.eval_batches(CONFIG, clips, BUCKETS[0], 3, shard_count=2)
    with pytest.raises(ValueError, match="start_step"):
        pipeline.train_batches(CONFIG, clips, schedule, seed=0, start_step=STEPS + 1)


def test_closing_early(clips, schedule):
    batches = pipeline.train_batches(CONFIG, clips, schedule, seed=0)
    next(batches)
    start = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - start < 5
    with pytest.raises(ValueError, match="closed"):
        next(batches)


# Augmentation, repeats and recipes.

FULL = DataConfig(batch_size=4, threads=2, prefetch=2, recipe="videomamba", erase=1.0)


@pytest.mark.parametrize("change", [{"threads": 1, "prefetch": 1}, {"workers": 2}])
def test_augmented_stream_is_the_same_however_it_is_loaded(clips, schedule, change):
    config = dataclasses.replace(FULL, colour_jitter=(0.2, 0.2, 0.2, 0.1))
    want = stream(config, clips, schedule)
    assert_same(stream(dataclasses.replace(config, **change), clips, schedule), want)
    assert_same(stream(config, clips, schedule, start_step=6), want[6:])


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_augmented_batches(clips, schedule, count):
    """With 4 hosts, the two copies of a clip are made by different ones."""
    want = stream(FULL, clips, schedule)
    hosts = [stream(FULL, clips, schedule, shard_index=i, shard_count=count) for i in range(count)]
    for step, parts in enumerate(zip(*hosts, strict=True)):
        for key in ("video", "label", "mask", "clip"):
            np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), want[step][key])
        assert [u for p in parts for u in p["unreadable"]] == want[step]["unreadable"]


def test_repeats_show_the_same_frames_augmented_apart(clips, schedule):
    frames = dataclasses.replace(CONFIG, repeats=2, resize="squash", flip=0.0)
    batches = stream(FULL, clips, schedule)
    for batch, plain in zip(batches, stream(frames, clips, schedule), strict=True):
        assert (batch["clip"][0::2] == batch["clip"][1::2]).all()
        np.testing.assert_array_equal(plain["video"][0::2], plain["video"][1::2])
        read = batch["mask"][0::2] > 0
        copies = batch["video"][0::2][read], batch["video"][1::2][read]
        assert (copies[0] != copies[1]).any((1, 2, 3, 4)).all()
    order = np.concatenate([b["clip"][::2] for b in batches])
    assert sorted(order[:7]) == list(range(7))  # an epoch is the list, every clip twice


def test_copies_do_not_depend_on_how_many_there_are(clips):
    """The first sample is the same with one copy and with two."""
    element = (0, 0, np.array([0], np.int32), np.array([0]))
    one, two = (
        pipeline.LoadBatch(dataclasses.replace(FULL, repeats=n), clips, BUCKETS, 5)(element)
        for n in (1, 2)
    )
    np.testing.assert_array_equal(one["video"], two["video"])


def test_data_sets_that_know_left_from_right_are_not_flipped(clips, schedule):
    config = dataclasses.replace(CONFIG, sampling="uniform", resize="squash")
    never = dataclasses.replace(config, flip=0.0)
    turned = dataclasses.replace(clips, flip=False)
    assert_same(stream(config, turned, schedule), stream(never, turned, schedule))


@pytest.mark.parametrize("sampling_name", ["sparse", "dense", "ssv2"])
def test_views(clips, sampling_name):
    """Three clips in time by two crops in space of each video, crops innermost."""
    config = dataclasses.replace(CONFIG, sampling=sampling_name, stride=2)
    with pipeline.eval_batches(config, clips, BUCKETS[1], 4, views=(3, 2)) as batches:
        batches = list(batches)
    assert len(batches) == 11  # 7 * 6 views in fours
    video, clip = (np.concatenate([b[key] for b in batches]) for key in ("video", "clip"))
    assert clip[:42].tolist() == np.repeat(np.arange(7), 6).tolist() and (clip[42:] == -1).all()
    for i, (_, n, *_) in enumerate(VIDEOS.values()):
        for view in range(3):
            wanted = sampling.choose(sampling_name, n, 8, stride=2, view=view, views=3)
            for crop in range(2):
                got = video[6 * i + 2 * view + crop].mean((1, 2, 3))
                np.testing.assert_allclose(got, grey_levels(n)[wanted], atol=6)


def test_crops_lie_along_the_long_side(tmp_path):
    picture = np.zeros((32, 96, 3), np.uint8)
    picture[:, :32], picture[:, 32:64], picture[:, 64:] = 40, 120, 200
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 25, (96, 32))
    for _ in range(4):
        writer.write(picture)
    writer.release()
    (tmp_path / "list.txt").write_text("a.avi 0\n")
    clips = lists.read_list(tmp_path / "list.txt")
    with pipeline.eval_batches(CONFIG, clips, BUCKETS[0], 3, views=(1, 3)) as batches:
        video = next(batches)["video"]
    np.testing.assert_allclose(video.mean((1, 2, 3, 4)), [40, 120, 200], atol=2)
    assert video.std((1, 2, 3, 4)).max() < 3


def test_plain_recipe_is_the_papers_preprocessing(clips, schedule):
    """Whole frames, spread from the first to the last, nothing random."""
    plain = DataConfig(batch_size=4, threads=2, prefetch=2, recipe="plain")
    spelled = dataclasses.replace(CONFIG, sampling="uniform", resize="squash", flip=0.0)
    assert_same(stream(plain, clips, schedule), stream(spelled, clips, schedule))


# Evaluation batches.


@pytest.mark.parametrize("workers", [0, 1])
def test_eval_batches(clips, workers):
    config = dataclasses.replace(CONFIG, workers=workers)
    with pipeline.eval_batches(config, clips, BUCKETS[1], 4) as batches:
        first, last = batches
    assert first["clip"].tolist() == [0, 1, 2, 3] and last["clip"].tolist() == [4, 5, 6, -1]
    assert first["label"].tolist() == [0, 1, 2, 3] and last["label"].tolist() == [4, 5, 6, 0]
    assert first["mask"].tolist() == [1, 1, 1, 1] and last["mask"].tolist() == [1, 1, 0, 0]
    assert first["video"].shape == last["video"].shape == (4, 8, 16, 24, 3)
    assert (last["video"][2:] == 0).all()
    assert first["unreadable"] == [] and last["unreadable"][0][0] == clips.paths[6]
    for video, (_, n, *_) in zip(first["video"], VIDEOS.values(), strict=False):
        want = grey_levels(n)[sampling.sparse(n, 8)]
        np.testing.assert_allclose(video.mean((1, 2, 3)), want, atol=6)


def test_eval_hosts_share_the_batch(clips):
    with pipeline.eval_batches(CONFIG, clips, BUCKETS[0], 4) as batches:
        want = [b["clip"].tolist() for b in batches]
    parts = []
    for host in (0, 1):
        options = {"shard_index": host, "shard_count": 2}
        with pipeline.eval_batches(CONFIG, clips, BUCKETS[0], 4, **options) as batches:
            parts.append([b["clip"].tolist() for b in batches])
    assert [a + b for a, b in zip(*parts, strict=True)] == want


# The tally.


def test_tally():
    tally = pipeline.UnreadableTally()
    a, b = ("a.mp4", "the file is empty"), ("b.mp4", "there is no such file")
    assert tally.add({"unreadable": [a, a]}) == [a]
    assert tally.add({"unreadable": [a, b]}) == [b]
    assert tally.add({"unreadable": []}) == []
    assert tally.count == 2
    tally.check(total=40, max_share=0.05)
    with pytest.raises(pipeline.TooManyUnreadable, match=r"2 of 39 .* a\.mp4: the file is empty"):
        tally.check(total=39, max_share=0.05)
    restored = pipeline.UnreadableTally(json.loads(json.dumps(tally.state())))
    assert restored.count == 2 and restored.add({"unreadable": [b]}) == []


def test_opencv_is_single_threaded_where_it_decodes(clips):
    cv2.setNumThreads(2)
    pipeline.decode.set_up_opencv.cache_clear()
    with pipeline.eval_batches(CONFIG, clips, BUCKETS[0], 7) as batches:
        next(batches)
    assert cv2.getNumThreads() == 1
