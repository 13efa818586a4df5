"""Tests of frame sampling against the golden indices of VideoMamba."""

import json
import pathlib

import numpy as np
import pytest

from stretchysnake_jax.config import SAMPLINGS, ConfigError
from stretchysnake_jax.data import sampling

GOLDEN = json.loads((pathlib.Path(__file__).parent / "goldens" / "sampling.json").read_text())


def test_sparse_golden():
    for case in GOLDEN["kinetics_sparse"]:
        n, frames = case["len"], case["T"]
        if case["mode"] == "val":
            got = sampling.sparse(n, frames)
        else:
            got = sampling.sparse_view(n, frames, case["chunk"], case["num_segment"])
        assert got.tolist() == case["idx"], case


@pytest.mark.parametrize("case", GOLDEN["kinetics_sparse_train_ranges"], ids=str)
def test_sparse_train_covers_the_golden_ranges(case):
    rng = np.random.default_rng(0)
    n, ranges = case["len"], np.array(case["inclusive_ranges"])
    draws = np.array([sampling.sparse(n, case["T"], rng) for _ in range(400)])
    low, high = np.minimum(ranges, case["then_min"]).T
    assert (draws >= low).all() and (draws <= high).all()
    narrow = high - low < 20  # both ends come up in 400 draws, save one case in 10^8
    assert (draws.min(0) == low)[narrow].all() and (draws.max(0) == high)[narrow].all()


def test_dense_golden():
    for case in GOLDEN["kinetics_dense"]:
        n, frames, stride = case["len"], case["T"], case["stride"]
        if case["mode"] == "val":
            got = sampling.dense(n, frames, stride, end=(n - frames * stride) // 2)
        else:
            got = sampling.dense_view(n, frames, stride, case["chunk"], case["num_segment"])
        assert got.tolist() == case["idx"], case


def test_ssv2_golden():
    for case in GOLDEN["ssv2_video"] + GOLDEN["ssv2_rawframes"]:
        n, frames = case["len"], case["T"]
        if case["mode"] == "test":
            got = sampling.segment_view(n, frames, case["chunk"], case["num_segment"])
        elif case in GOLDEN["ssv2_video"]:
            got = sampling.segment_view(n, frames, 0, 1)
        else:
            got = sampling.segment(n, frames)
        assert got.tolist() == case["idx"], case


@pytest.mark.parametrize("case", GOLDEN["mask_pretrain_segments"], ids=lambda c: str(c["len"]))
def test_segment_draws_within_the_golden_segments(case):
    rng, n, frames = np.random.default_rng(0), case["len"], case["num_segments"]
    draws = np.array([sampling.segment(n, frames, rng) for _ in range(200)])
    starts = np.array(case["one_based_offsets_with_zero_jitter"]) - 1
    high = case["randint_highs"] or [1]
    assert (draws >= starts).all() and (draws < starts + high).all()
    if high[0] < 20:  # every place comes up in 200 draws
        assert (draws.min(0) == starts).all() and (draws.max(0) == starts + high[0] - 1).all()


def test_trimmed_golden():
    for case in GOLDEN["lvu_indices"]:
        first, count = sampling.window(case["len"], case["start"], case["end"])
        view = (case["chunk"], 4) if case["mode"] == "test" else (0, 1)
        got = first + sampling.sparse_view(count, case["T"], *view)
        assert got.tolist() == case["idx"], case
    durations = GOLDEN["lvu_windows"]["durations"]
    for case in GOLDEN["lvu_windows"]["cases"]:
        got = [
            [i, start, end]
            for i, duration in enumerate(durations)
            for start, end in sampling.sliding_windows(
                duration, case["trimmed"], case["time_stride"]
            )
        ]
        assert got == case["windows"]


def test_window_stays_inside():
    assert sampling.window(10, 2, 5) == (2, 4)
    assert sampling.window(10, -3, 99) == (0, 10)
    assert sampling.window(10, 50, 60) == (9, 1)


@pytest.mark.parametrize("n", [40, 65, 100])
def test_dense_draws_every_start(n):
    """Clips of 32 frames of the video that end before the last one, as VideoMamba draws them."""
    draws = [
        sampling.choose("dense", n, 8, stride=4, rng=np.random.default_rng(seed))
        for seed in range(1000)
    ]
    assert {d[0] for d in draws} == set(range(n - 32))
    assert all(30 <= d[-1] - d[0] <= 32 and d[-1] < n for d in draws)


def test_a_single_dense_view_is_the_centre():
    assert sampling.dense_view(100, 8, 8, 0, 1).tolist() == list(range(18, 82, 8))
    assert sampling.dense_view(64, 8, 8, 0, 1).tolist() == list(range(0, 64, 8))


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 50, 1001])
@pytest.mark.parametrize("frames", [1, 4, 8, 64])
def test_indices_are_sorted_and_inside(name, n, frames):
    views = 1 if name == "uniform" else 4
    ways = [{"rng": np.random.default_rng(seed)} for seed in range(5)]
    ways += [{}] + [{"view": view, "views": views} for view in range(views)]
    for way in ways:
        got = sampling.choose(name, n, frames, stride=3, **way)
        assert got.shape == (frames,) and got.dtype == np.int64
        assert (np.diff(got) >= 0).all() and got[0] >= 0 and got[-1] < n


def test_choose_refuses():
    with pytest.raises(ConfigError, match="did you mean 'sparse'"):
        sampling.choose("sparce", 10, 4)
    with pytest.raises(ConfigError, match="4 test clips of 'uniform' sampling: it takes 1"):
        sampling.choose("uniform", 10, 4, views=4)


def test_uniform():
    assert sampling.uniform(10, 4).tolist() == [0, 3, 6, 9]
    assert sampling.uniform(12, 4).tolist() == [0, 3, 7, 11]
    assert sampling.uniform(2, 4).tolist() == [0, 0, 0, 1]
    assert sampling.uniform(5, 1).tolist() == [0]
