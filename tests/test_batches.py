"""Batches by a budget of tokens, their shards and their resumption; odd paths; bounded memory."""

import dataclasses
import itertools
import os
import pathlib

import numpy as np
import pytest
from conftest import write_grey_video

from stretchysnake_jax import buckets as bucket_lib
from stretchysnake_jax.buckets import Bucket, Schedule
from stretchysnake_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    StretchConfig,
    TrainConfig,
)
from stretchysnake_jax.data import lists, pipeline
from stretchysnake_jax.validation import validate

MODEL = ModelConfig(patch=(8, 8), size=(16, 16), frames=4)
STRETCH = StretchConfig(variant="static_tokens", frames=(2, 4, 8), sizes=(16, 24, 32))


def budget(tokens=140, multiple=4, **data):
    """A run whose batches hold 12, 8 and 4 samples at 2, 4 and 8 frames."""
    data = {"train": "list.txt", "threads": 2, "prefetch": 2, "recipe": "videomamba"} | data
    return Config(
        model=MODEL,
        stretch=STRETCH,
        data=DataConfig(tokens_per_batch=tokens, batch_multiple=multiple, **data),
        train=TrainConfig(steps=8, seed=3),
    )


def stream(config, clips, start=0, host=0, hosts=1, **data):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    schedule = bucket_lib.make_run_schedule(config, len(clips))
    options = {"start_step": start, "shard_index": host, "shard_count": hosts}
    with pipeline.train_batches(config.data, clips, schedule, seed=3, **options) as batches:
        return list(batches)


@pytest.fixture(scope="module")
def unbroken(clips):
    """The batches of a run on one host without workers."""
    return stream(budget(), clips)


def assert_same(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            np.testing.assert_array_equal(one[key], value, err_msg=key)


def union(hosts):
    """The global batches of several hosts' streams."""
    for parts in zip(*hosts, strict=True):
        whole = {"step": parts[0]["step"], "bucket": parts[0]["bucket"]}
        for key in ("video", "label", "mask", "clip"):
            whole[key] = np.concatenate([part[key] for part in parts])
        whole["unreadable"] = [u for part in parts for u in part["unreadable"]]
        yield whole


# Sizes and schedule.


@pytest.mark.parametrize(
    "tokens, multiple, repeats, sizes",
    [
        (140, 4, 1, {2: 12, 4: 8, 8: 4}),
        (140, 0, 1, {2: 15, 4: 8, 8: 4}),
        (140, 1, 2, {2: 14, 4: 8, 8: 4}),
        (140, 4, 6, {2: 12, 4: 12, 8: 12}),
        (1, 8, 1, {2: 8, 4: 8, 8: 8}),
        (0, 4, 1, {2: 12, 4: 12, 8: 12}),
    ],
)
def test_batch_sizes(tokens, multiple, repeats, sizes):
    config = budget(tokens, multiple, repeats=repeats, batch_size=12)
    buckets = [bucket for bucket, _ in bucket_lib.training_buckets(STRETCH, MODEL)]
    got = bucket_lib.make_batch_sizes(config, buckets)
    assert {bucket.frames: size for bucket, size in zip(buckets, got, strict=True)} == sizes


def test_a_run_schedule_is_the_schedule_with_sizes():
    config = budget()
    got = bucket_lib.make_run_schedule(config, 7)
    plain = bucket_lib.make_schedule(STRETCH, MODEL, 8, seed=3)
    np.testing.assert_array_equal(got.which, plain.which)
    sizes = [got.batch_sizes[w] for w in got.which]
    np.testing.assert_array_equal(got.offsets, np.cumsum([0, *sizes]))


@pytest.mark.parametrize("short_first", [0.0, 0.5])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 25.0])
def test_epochs_count_the_real_samples(epochs, short_first):
    config = budget()
    config.stretch = dataclasses.replace(STRETCH, short_first=short_first)
    config.train = TrainConfig(epochs=epochs, seed=3)
    schedule = bucket_lib.make_run_schedule(config, 100)
    assert schedule.offsets[-1] >= 100 * epochs
    config.train = TrainConfig(steps=len(schedule) - 1, seed=3)
    assert bucket_lib.make_run_schedule(config, 100).offsets[-1] < 100 * epochs


def test_epochs_of_equal_batches():
    config = budget(tokens=0, batch_size=8, recipe="light")
    config.train = TrainConfig(epochs=1.5)
    assert len(bucket_lib.make_run_schedule(config, 30)) == 6
    assert bucket_lib.make_run_schedule(config, 30).batch_sizes == (8,) * 9


def test_bad_budgets():
    for name in ("tokens_per_batch", "batch_multiple"):
        config = budget(**{{"tokens_per_batch": "tokens"}.get(name, "multiple"): -1})
        with pytest.raises(ConfigError, match=rf"data\.{name} is -1: it takes a number >= 0"):
            validate(config)


# The stream.


def test_the_row_of_samples_is_cut_by_cumulative_sums(unbroken):
    sizes = [len(batch["clip"]) for batch in unbroken]
    assert len(set(sizes)) == 3 and set(sizes) == {12, 8, 4}
    row = np.concatenate([batch["clip"] for batch in unbroken])
    assert (row[::2] == row[1::2]).all()  # the copies of a clip
    row = row[::2]
    epochs = row[: len(row) // 7 * 7].reshape(-1, 7)
    assert (np.sort(epochs) == np.arange(7)).all()
    for batch in unbroken:
        broken = batch["clip"] == 6
        assert (batch["mask"] == ~broken).all() and (batch["video"][broken] == 0).all()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_every_batch(unbroken, clips, hosts):
    config = budget()
    parts = [stream(config, clips, host=i, hosts=hosts) for i in range(hosts)]
    assert_same(list(union(parts)), unbroken)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_stream_is_the_same_for_any_number_of_workers(unbroken, clips, workers):
    assert_same(stream(budget(), clips, workers=workers), unbroken)


@pytest.mark.parametrize("start", range(9))
def test_resumes_at_any_step_under_another_number_of_hosts(unbroken, clips, start):
    hosts = (1, 2, 4)[start % 3]
    parts = [
        stream(budget(), clips, start, host=i, hosts=hosts, threads=1, prefetch=1)
        for i in range(hosts)
    ]
    assert_same(list(union(parts)), unbroken[start:])


@pytest.mark.parametrize(
    "start, hosts, workers", [pytest.param(3, 2, 1, marks=pytest.mark.slow), (6, 1, 2)]
)
def test_resumes_under_other_hosts_and_workers(unbroken, clips, start, hosts, workers):
    config = budget()
    parts = [
        stream(config, clips, start, host=i, hosts=hosts, workers=workers) for i in range(hosts)
    ]
    assert_same(list(union(parts)), unbroken[start:])


def test_a_batch_that_hosts_cannot_share(clips):
    with pytest.raises(ConfigError, match=r"data\.tokens_per_batch is \d+: with 3 hosts it takes"):
        stream(budget(), clips, hosts=3)


# Paths.

NAMES = ["with space.avi", "ünïcödé 視頻.avi", "[b](r)a{c}k.avi", "h#sh;~&@!+.avi", "100%d?.avi"]


@pytest.mark.parametrize("workers", [0, 1])
def test_odd_paths(tmp_path, workers):
    data = write_grey_video(tmp_path / "v.avi", "MJPG", 12, 64, 48)
    folder = tmp_path / "a [folder] ü#"
    (folder / "sub dir").mkdir(parents=True)
    names = [*NAMES, *(f"sub dir/{name}" for name in NAMES)]
    for name in names:
        (folder / name).write_bytes(data)
    os.symlink(tmp_path / "v.avi", folder / "link.avi")
    os.symlink(folder / "sub dir", folder / "linked dir")
    names += ["link.avi", *(f"linked dir/{name}" for name in NAMES)]
    (folder / "list [1].txt").write_text("".join(f"{name}\t0\n" for name in names))
    clips = lists.read_list(folder / "list [1].txt")
    bucket = Bucket(16, 16, 16, (8, 8))  # more frames than there are: all get into the index
    config = DataConfig(threads=2, prefetch=2, workers=workers)
    for _ in range(2):
        with pipeline.eval_batches(config, clips, bucket, 4) as batches:
            batches = list(batches)
        assert not any(batch["unreadable"] for batch in batches)
        read = np.concatenate([batch["mask"] for batch in batches])
        assert read.sum() == len(names)
        videos = np.concatenate([batch["video"] for batch in batches])[: len(names)]
        assert (videos == videos[:1]).all()
    assert (folder / "list [1].txt.index").exists()


# Memory.


def resident() -> int:
    """Bytes of memory that this process occupies."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_nothing_grows_over_ten_thousand_clips(tmp_path):
    data = write_grey_video(tmp_path / "v.avi", "MJPG", 8, 64, 48)
    (tmp_path / "lie.avi").write_bytes(data[: data.index(b"idx1")])
    (tmp_path / "broken.avi").write_bytes(data[:100])
    (tmp_path / "list.txt").write_text("v.avi 0\nlie.avi 1\nbroken.avi 2\n" + "v.avi 3\n" * 7)
    clips = lists.read_list(tmp_path / "list.txt")
    bucket = Bucket(8, 64, 64, (8, 8))
    config = DataConfig(batch_size=20, threads=4, prefetch=4)
    schedule = Schedule((bucket,), np.zeros(500, np.int32))
    before, seen = resident(), {}
    with pipeline.train_batches(config, clips, schedule, seed=0) as batches:
        for batch in batches:
            seen[20 * (batch["step"] + 1)] = resident()
    growth = seen[10_000] - seen[2_000]
    assert growth < 8 << 20, f"{growth / 2**20:.1f} MiB more after 10,000 clips than after 2,000"
    bound = pipeline.memory_bound(config, (bucket,), (20,), pixels=64 * 48)
    assert max(seen.values()) - before < bound + (32 << 20)  # the libraries' own, loaded meanwhile


@pytest.mark.parametrize(
    "threads, prefetch, workers", list(itertools.product((1, 4), (1, 8), (0, 3)))
)
def test_memory_bound_counts_what_is_in_flight(threads, prefetch, workers):
    config = DataConfig(threads=threads, prefetch=prefetch, workers=workers)
    buckets, sizes = (Bucket(2, 8, 8, (4, 4)), Bucket(4, 8, 8, (4, 4))), (10, 6)
    got = pipeline.memory_bound(config, buckets, sizes, shard_count=2, pixels=1000)
    batch, sample = 6 * 768 // 2, 768
    ready = max(threads, prefetch)
    if workers:
        ready = workers * (ready + max(1, prefetch // workers))
    assert got == (ready + 2) * batch + max(1, workers) * threads * (2 * sample + 64_000)
