"""Tests of frame sampling against the golden indices of VideoMamba."""

import json
import pathlib

import numpy as np
import pytest

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


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 50, 1001])
@pytest.mark.parametrize("frames", [1, 4, 8, 64])
def test_indices_are_sorted_and_inside(n, frames):
    rng = np.random.default_rng(1)
    for got in (
        sampling.sparse(n, frames),
        sampling.sparse(n, frames, rng),
        sampling.sparse_view(n, frames, 3, 4),
        sampling.uniform(n, frames),
    ):
        assert got.shape == (frames,) and got.dtype == np.int64
        assert (np.diff(got) >= 0).all() and got[0] >= 0 and got[-1] < n


def test_uniform():
    assert sampling.uniform(10, 4).tolist() == [0, 3, 6, 9]
    assert sampling.uniform(12, 4).tolist() == [0, 3, 7, 11]
    assert sampling.uniform(2, 4).tolist() == [0, 0, 0, 1]
    assert sampling.uniform(5, 1).tolist() == [0]
