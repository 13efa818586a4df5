"""Variants, patches and the schedule against the tables of the paper and its release."""

import hashlib

import numpy as np
import pytest

from stretchysnake_jax import buckets, flops, models
from stretchysnake_jax.config import (
    VARIANTS,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    StretchConfig,
    TrainConfig,
)

MIDDLE = models.preset("middle")


def sizes_and_patches(variant):
    found = buckets.training_buckets(StretchConfig(variant=variant), MIDDLE)
    return {(b.height, b.patch[0]) for b, _ in found}


@pytest.mark.parametrize(
    "variant, expected",
    [
        ("vanilla", {(224, 16)}),
        ("temporal", {(224, 16)}),
        ("spatial", {(96, 16), (128, 16), (224, 16), (384, 16)}),
        ("flexivit", {(240, p) for p in (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)}),
        (
            "flex_all",
            {(96, p) for p in (12, 16, 24, 32, 48)}
            | {(128, p) for p in (16, 32)}
            | {(224, p) for p in (14, 16, 28, 32)}
            | {(384, p) for p in (16, 24, 32, 48)},
        ),
        ("static_tokens", {(98, 7), (126, 9), (224, 16), (392, 28)}),
    ],
)
def test_variants_have_the_sets_of_the_paper(variant, expected):
    assert sizes_and_patches(variant) == expected
    found = buckets.training_buckets(StretchConfig(variant=variant), MIDDLE)
    frames = {b.frames for b, _ in found}
    assert frames == ({8} if variant == "vanilla" else {8, 16, 32, 64})
    assert sum(chance for _, chance in found) == pytest.approx(1)


@pytest.mark.parametrize(
    "variant, tokens_per_frame",
    [("spatial", 218), ("flexivit", 272.6), ("flex_all", 116.8), ("static_tokens", 196)],
)
def test_mean_tokens_per_frame(variant, tokens_per_frame):
    # Section 1.2 of the method's specification measures these on the released sampler.
    found = buckets.training_buckets(StretchConfig(variant=variant, frames=(8,)), MIDDLE)
    mean = sum(chance * (b.tokens() - 1) / 8 for b, chance in found)
    assert mean == pytest.approx(tokens_per_frame, abs=0.06)


@pytest.mark.parametrize("size", [98, 112, 126, 128, 192, 224, 288, 384, 392, 448])
def test_static_tokens_keep_the_grid(size):
    bucket = buckets.make_bucket("static_tokens", 8, (size, size), MIDDLE)
    assert bucket.grid == (14, 14) and bucket.patch == (size // 14, size // 14)


def test_static_tokens_refuse_another_grid_and_name_the_nearest_sizes():
    with pytest.raises(ConfigError, match="height 96 .* grid of 14.* 89 and 98"):
        buckets.make_bucket("static_tokens", 8, (96, 224), MIDDLE)
    for size in (89, 98):
        assert buckets.static_patch((size, size), (14, 14))


def test_static_tokens_take_rectangles():
    bucket = buckets.make_bucket("static_tokens", 8, (112, 196), MIDDLE)
    assert bucket.patch == (8, 14) and bucket.grid == (14, 14)


@pytest.mark.parametrize("variant, unit", [("static_tokens", 14), ("vanilla", 16)])
@pytest.mark.parametrize("ratio", [9 / 16, 3 / 4, 1.0, 1.25, 4 / 3, 16 / 9])
@pytest.mark.parametrize("side", [112, 224, 448])
def test_native_sizes_have_the_shape_and_the_pixels(variant, unit, ratio, side):
    height, width = buckets.native_size(variant, (side, side), ratio, MIDDLE)
    assert height % unit == 0 and width % unit == 0
    # Either side is at most half a unit from the exact one.
    assert abs(height - side / ratio**0.5) <= unit / 2 + 1e-9
    assert abs(width - side * ratio**0.5) <= unit / 2 + 1e-9
    bucket = buckets.make_bucket(variant, 8, (height, width), MIDDLE)
    assert (bucket.grid == (14, 14)) == (
        variant == "static_tokens" or (height, width) == (224, 224)
    )


def test_native_sizes_by_hand():
    # 224 / sqrt(4/3) = 193.99 = 13.86 x 14, 224 x sqrt(4/3) = 258.65 = 18.48 x 14.
    assert buckets.native_size("static_tokens", (224, 224), 4 / 3, MIDDLE) == (196, 252)
    # 12.12 x 16 and 16.17 x 16.
    assert buckets.native_size("vanilla", (224, 224), 4 / 3, MIDDLE) == (192, 256)
    assert buckets.native_size("static_tokens", (14, 14), 10.0, MIDDLE) == (14, 42)


def test_training_draws_the_ratios():
    stretch = StretchConfig(frames=(8,), sizes=(112, 224), ratios=(1.0, 4 / 3))
    found = dict(buckets.training_buckets(stretch, MIDDLE))
    assert {(b.height, b.width) for b in found} == {
        (112, 112), (98, 126), (224, 224), (196, 252)
    }  # fmt: skip
    assert set(found.values()) == {0.25}
    assert {b.patch for b in found} == {(8, 8), (7, 9), (16, 16), (14, 18)}


def test_flexible_variants_use_the_test_patches_of_the_release():
    table = {96: 7, 98: 7, 112: 8, 128: 9, 192: 14, 224: 16, 288: 21, 384: 27, 448: 32}
    for size, patch in table.items():
        for variant in ("flexivit", "flex_all"):
            assert buckets.test_patch(variant, (size, size), MIDDLE) == (patch, patch)
        assert buckets.test_patch("vanilla", (size, size), MIDDLE) == (16, 16)


def test_buckets_refuse_what_does_not_fit():
    model = models.preset("tiny", tubelet=2)
    with pytest.raises(ConfigError, match="7 frames .* tubelets of 2.* nearest is 6"):
        buckets.make_bucket("vanilla", 7, (224, 224), model)
    with pytest.raises(ConfigError, match="holds no patch of 16x16"):
        buckets.make_bucket("vanilla", 8, (8, 224), model)
    with pytest.raises(ConfigError, match="no patch of flex_all divides"):
        buckets.training_buckets(StretchConfig(variant="flex_all", sizes=(101,)), MIDDLE)


def test_schedule_is_a_function_of_seed_and_step():
    stretch = StretchConfig()
    long = buckets.make_schedule(stretch, MIDDLE, 300, seed=3)
    short = buckets.make_schedule(stretch, MIDDLE, 100, seed=3)
    assert [long[i] for i in range(100)] == [short[i] for i in range(100)]
    other = buckets.make_schedule(stretch, MIDDLE, 300, seed=4)
    assert not np.array_equal(long.which, other.which)
    assert len(long) == 300


def test_schedule_draws_every_bucket_about_as_often_as_its_chance():
    stretch = StretchConfig(variant="flex_all")
    schedule = buckets.make_schedule(stretch, MIDDLE, 20000, seed=0)
    chances = dict(buckets.training_buckets(stretch, MIDDLE))
    counts = np.bincount(schedule.which, minlength=len(chances)) / 20000
    for bucket, share in zip(schedule.buckets, counts, strict=True):
        assert share == pytest.approx(chances[bucket], abs=0.006)


def test_short_first_begins_with_the_fewest_frames():
    schedule = buckets.make_schedule(StretchConfig(short_first=0.5), MIDDLE, 400, seed=0)
    assert {schedule[i].frames for i in range(200)} == {8}
    assert {schedule[i].height for i in range(200)} == {98, 126, 224, 392}
    assert {schedule[i].frames for i in range(200, 400)} == {8, 16, 32, 64}


CURRICULUM = StretchConfig(variant="static_tokens", curriculum=0.5)


def test_a_curriculum_lets_the_buckets_in_from_cheap_to_dear():
    schedule = buckets.make_schedule(CURRICULUM, MIDDLE, 6000, seed=0)
    cost = [(b.tokens(), b.frames * b.height * b.width) for b in schedule.buckets]
    order = sorted(range(16), key=cost.__getitem__)
    first = [int(np.flatnonzero(schedule.which == i)[0]) for i in order]
    assert first == sorted(first) and first[0] == 0
    for rank, step in enumerate(first[1:], 1):  # stage `rank` begins at step 200 rank
        assert 200 * rank <= step < 200 * rank + 100
    names = [str(schedule.buckets[i]) for i in order]
    assert names[:2] == ["8x98x98/7", "8x126x126/9"] and names[-1] == "64x392x392/28"
    counts = np.bincount(schedule.which[:3000], minlength=16)[order]
    assert counts[0] > 2 * counts[7] > 2 * counts[-1] == 0  # the last comes in at the end
    later = np.bincount(schedule.which[3000:], minlength=16) / 3000
    np.testing.assert_allclose(later, 1 / 16, atol=0.015)


def test_after_the_curriculum_the_draws_are_the_usual_ones():
    plain = buckets.make_schedule(StretchConfig(variant="flex_all"), MIDDLE, 900, seed=5)
    stretch = StretchConfig(variant="flex_all", curriculum=0.4)
    schedule = buckets.make_schedule(stretch, MIDDLE, 900, seed=5)
    np.testing.assert_array_equal(schedule.which[360:], plain.which[360:])
    assert not np.array_equal(schedule.which[:360], plain.which[:360])
    again = buckets.make_schedule(stretch, MIDDLE, 900, seed=5)
    np.testing.assert_array_equal(again.which, schedule.which)


def test_a_curriculum_orders_by_tokens_before_pixels():
    stretch = StretchConfig(variant="spatial", frames=(8, 16), sizes=(96, 384), curriculum=1.0)
    schedule = buckets.make_schedule(stretch, MIDDLE, 3000, seed=1)
    # 8x384 has eight times the tokens of 16x96; 16x384 would come in with step 3000
    stages = [{str(schedule[i]) for i in range(n, n + 1000)} for n in (0, 1000, 2000)]
    order = ["8x96x96/16", "16x96x96/16", "8x384x384/16"]
    assert stages == [set(order[:1]), set(order[:2]), set(order)]


def test_a_single_bucket_needs_no_curriculum():
    stretch = StretchConfig(variant="vanilla", curriculum=0.5)
    assert set(buckets.make_schedule(stretch, MIDDLE, 10, seed=0).which) == {0}


def test_epochs_end_where_they_should_under_a_curriculum():
    config = Config(
        model=MIDDLE,
        stretch=StretchConfig(variant="spatial", curriculum=0.6),
        data=DataConfig(train="x.txt", tokens_per_batch=40000),
        train=TrainConfig(epochs=20.0, seed=2),
    )
    schedule = buckets.make_run_schedule(config, 200)
    assert min(schedule.batch_sizes) < max(schedule.batch_sizes)
    assert schedule.offsets[-1] >= 4000
    config.train = TrainConfig(steps=len(schedule) - 1, seed=2)
    assert buckets.make_run_schedule(config, 200).offsets[-1] < 4000


DIGESTS = {0.0: "0059efa88d877a50", 0.45: "82d5be87c2bdf4b4"}


@pytest.mark.parametrize("short_first", DIGESTS)
def test_schedules_stay_as_runs_were_begun_with_them(short_first):
    # The demo's, which a run that goes on depends on.
    stretch = StretchConfig(frames=(2, 4, 8), sizes=(28, 56, 112), short_first=short_first)
    model = models.preset("micro", frames=4)
    which = buckets.make_schedule(stretch, model, 2100, seed=0).which
    digest = hashlib.sha256(which.astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == DIGESTS[short_first]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "vanilla"])
def test_the_teacher_is_the_largest_scale(variant):
    stretch = StretchConfig(variant=variant, distill=1.0)
    teacher = buckets.find_teacher(stretch, MIDDLE)
    every = [b for b, _ in buckets.training_buckets(stretch, MIDDLE)]
    for name in ("frames", "height", "width"):
        assert getattr(teacher, name) == max(getattr(b, name) for b in every)
    same = [b for b in every if (b.frames, b.height) == (teacher.frames, teacher.height)]
    assert teacher.tokens() == max(b.tokens() for b in same)
    schedule = buckets.make_schedule(stretch, MIDDLE, 3000, seed=0)
    assert schedule.teacher == teacher and set(schedule.buckets) == set(every) - {teacher}
    assert set(schedule.which) == set(range(len(every) - 1))
    assert set(schedule.loaded.buckets) == {teacher}
    np.testing.assert_array_equal(schedule.loaded.which, schedule.which)


def test_distillation_takes_several_scales():
    stretch = StretchConfig(frames=(8,), sizes=(98,), distill=1.0)
    with pytest.raises(ConfigError, match=r"takes several scales, but there is only 8x98x98/7"):
        buckets.make_schedule(stretch, MIDDLE, 10, seed=0)
    plain = buckets.make_schedule(StretchConfig(), MIDDLE, 10, seed=0)
    assert plain.teacher is None and plain.loaded is plain


def test_a_token_budget_counts_the_teacher():
    config = Config(
        model=MIDDLE,
        stretch=StretchConfig(frames=(8, 64), sizes=(98, 224), distill=0.5),
        data=DataConfig(train="x.txt", tokens_per_batch=100000),
        train=TrainConfig(steps=4),
    )
    schedule = buckets.make_run_schedule(config, 10)
    assert [str(b) for b in schedule.buckets] == ["8x98x98/7", "8x224x224/16", "64x98x98/7"]
    eight, long = 1 + 8 * 196, 1 + 64 * 196
    wanted = (100000 // (eight + long), 100000 // (eight + long), 100000 // (2 * long))
    assert schedule.batch_sizes == wanted == schedule.loaded.batch_sizes


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_a_schedule(variant):
    assert len(buckets.make_schedule(StretchConfig(variant=variant), MIDDLE, 10, seed=0)) == 10


@pytest.mark.parametrize(
    "name, frames, size, published, linear, scan",
    [  # GMACs of a view, from the tables of VideoMamba and of its specification
        ("tiny", 8, 224, 8.6, 10.3, 4.2),
        ("small", 8, 224, 33.8, 38.6, 8.3),
        ("middle", 8, 224, 100.6, 113.1, 16.7),
        ("middle", 64, 384, 2365, None, None),
        ("tiny", 16, 288, 28.3, None, None),
    ],
)
def test_operation_counts(name, frames, size, published, linear, scan):
    bucket = buckets.Bucket(frames, size, size, (16, 16))
    count = flops.count(models.preset(name), bucket)
    assert count["published"] / 1e9 == pytest.approx(published, rel=0.006)
    if linear:
        assert count["full"] / 1e9 == pytest.approx(linear + scan, rel=0.006)


def test_tokens_count_tubelets_and_the_class_token():
    bucket = buckets.Bucket(8, 224, 112, (16, 16))
    assert bucket.tokens() == 1 + 8 * 14 * 7 and bucket.tokens(2) == 1 + 4 * 14 * 7
    assert str(bucket) == "8x224x112/16" and str(buckets.Bucket(1, 4, 8, (2, 4))) == "1x4x8/2x4"


def test_the_model_grid_is_that_of_its_size():
    assert ModelConfig(size=(32, 48)).grid == (2, 3)
