"""Tests of mixup and cutmix: boxes, targets, masks, and the training step that uses them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stretchysnake_jax import mix
from stretchysnake_jax.buckets import make_bucket
from stretchysnake_jax.config import DataConfig
from stretchysnake_jax.step import TrainStep, init_state, make_targets

GOLDEN = json.loads((pathlib.Path(__file__).parent / "goldens" / "recipe.json").read_text())


def make_video(n=4, frames=2, height=16, width=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, frames, height, width, 3), np.uint8)


@pytest.mark.parametrize("case", GOLDEN["cutmix_boxes"], ids=lambda c: f"{c['lam']} {c['cy']}")
def test_cutmix_boxes_golden(case):
    box, lam = jax.jit(mix.cutmix_box, static_argnums=(3, 4))(
        case["lam"], case["cy"], case["cx"], case["H"], case["W"]
    )
    assert [int(edge) for edge in box] == case["box"]
    assert float(lam) == pytest.approx(case["lam_corrected"], abs=1e-7)


def test_targets_golden():
    case = GOLDEN["mixup_target"]
    labels, classes = jnp.array(case["labels"]), case["num_classes"]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), case["smoothing"])
    weight = jnp.full(4, case["lam"])
    got = mix.mixed_targets(targets, weight)
    np.testing.assert_allclose(got, case["target"], atol=1e-7)
    got = make_targets(labels, classes, case["smoothing"], weight)
    np.testing.assert_allclose(got, case["target"], atol=1e-7)


def test_mixup_blends_with_the_batch_in_reverse():
    video, mixer = make_video(), mix.make_mixer(DataConfig(mixup=0.8), seed=1)
    for step in range(5):
        mixed, weight = mixer(video, np.ones(4, np.float32), step)
        lam = float(weight[0])
        assert (np.asarray(weight) == lam).all() and mixed.dtype == np.uint8
        wanted = lam * video + (1 - lam) * video[::-1].astype(float)
        assert np.abs(np.asarray(mixed) - wanted).max() <= 0.501


def test_cutmix_takes_one_box_of_the_partner():
    video, mixer = make_video(), mix.make_mixer(DataConfig(cutmix=1.0), seed=1)
    weights = []
    for step in range(20):
        mixed, weight = mixer(video, np.ones(4, np.float32), step)
        from_partner = (np.asarray(mixed) == video[::-1]).all(-1) & (video != video[::-1]).any(-1)
        np.testing.assert_array_equal(np.where(from_partner[..., None], video[::-1], video), mixed)
        box = from_partner.any((0, 1))  # the same in all clips and frames
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        if box.any():
            assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert float(weight[0]) == pytest.approx(1 - box.mean(), abs=1e-6)
        weights.append(float(weight[0]))
    assert len(set(weights)) > 10 and min(weights) < 0.6


def test_draws_follow_the_step_and_the_seed():
    video, ones = make_video(), np.ones(4, np.float32)
    data = DataConfig(recipe="videomamba")
    mixer, other = mix.make_mixer(data, seed=1), mix.make_mixer(data, seed=2)
    first = [float(mixer(video, ones, step)[1][0]) for step in range(6)]
    again = [float(mixer(video, ones, step)[1][0]) for step in range(6)]
    assert first == again and len(set(first)) == 6
    assert first != [float(other(video, ones, step)[1][0]) for step in range(6)]
    assert set(mixer.traces.values()) == {1}


def test_both_share_the_steps_and_the_weights_are_betas():
    def weight(key):
        pixels, weight = mix.draw(key, 0.8, 1.0, 64, 64)
        return pixels.std() > 0, weight, pixels.mean()

    boxed, weight, mean = jax.vmap(weight)(jax.random.split(jax.random.key(0), 4000))
    boxed = np.asarray(boxed)
    assert 0.45 < boxed.mean() < 0.53  # a box may be empty
    np.testing.assert_allclose(weight, mean, atol=1e-4)  # pixels and labels have the same share
    lam = np.asarray(weight)[~boxed]
    lam = lam[lam < 1]
    assert 0.47 < lam.mean() < 0.53
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # of Beta(0.8, 0.8)


def test_a_clip_with_an_unreadable_partner_stays_as_it_is():
    video, mixer = make_video(), mix.make_mixer(DataConfig(mixup=0.8), seed=1)
    mask = np.array([1, 1, 0, 1], np.float32)
    video[2] = 0
    mixed, weight = mixer(video, mask, 0)
    assert weight[1] == 1 and (np.asarray(weight) < 1).tolist() == [True, False, True, True]
    np.testing.assert_array_equal(mixed[1], video[1])


def test_off_by_default():
    assert mix.make_mixer(DataConfig(), 0) is None
    assert mix.make_mixer(DataConfig(recipe="plain"), 0) is None


def test_the_training_step_mixes(tiny_config):
    """The loss of a mixed batch is what the mixed clips and targets give."""
    tiny_config.model.drop_path = 0.0
    bucket = make_bucket("static_tokens", 2, (16, 16), tiny_config.model)
    rng = np.random.default_rng(0)
    batch = {
        "video": make_video(4, 2, 16, 16),
        "label": rng.integers(0, 6, 4).astype(np.int32),
        "mask": np.array([1, 1, 0, 1], np.float32),
    }
    batch["video"][2] = 0
    plain = TrainStep(tiny_config, 10)
    assert plain.mixer is None
    tiny_config.data.mixup = 0.8
    step, state = TrainStep(tiny_config, 10), init_state(tiny_config, 10)
    mixed, weight = step.mixer(batch["video"], batch["mask"], state["step"])
    arrays = {"label": batch["label"], "mask": batch["mask"], "weight": weight}
    arrays["video"], projected = step.stem(mixed, bucket)
    _, wanted = step.trunk(init_state(tiny_config, 10), arrays, projected)
    state, metrics = step(state, batch, bucket)
    assert float(metrics["loss"]) == float(wanted["loss"])
    assert step.compilations == 3
    # The partner of clip 1 is unreadable: what label 2 says can't matter, labels 0 and 3 do.
    losses = []
    for i in (2, 0):
        changed = dict(batch, label=batch["label"].copy())
        changed["label"][i] = (changed["label"][i] + 1) % 6
        losses.append(float(step(init_state(tiny_config, 10), changed, bucket)[1]["loss"]))
    assert losses[0] == float(metrics["loss"]) != losses[1]
    assert step.compilations == 3 and np.isfinite(float(metrics["grad_norm"]))
