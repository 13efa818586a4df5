"""The training and evaluation steps: compilations, the execution plan, masks, and the loss."""

import collections
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stretchysnake_jax import compile as compile_lib
from stretchysnake_jax import models
from stretchysnake_jax.buckets import make_bucket, training_buckets
from stretchysnake_jax.step import (
    EvalStep,
    TrainStep,
    fit,
    init_state,
    make_targets,
)


def make_batch(bucket, n=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, bucket.frames, bucket.height, bucket.width, 3)
    return {
        "video": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, 6, n).astype(np.int32),
        "mask": np.ones(n, np.float32),
    }


def test_one_compilation_per_bucket_and_none_on_return(tiny_config):
    tiny_config.stretch.frames = (1, 2)
    buckets = [b for b, _ in training_buckets(tiny_config.stretch, tiny_config.model)]
    assert len(buckets) == 6
    step, state = TrainStep(tiny_config, 10), init_state(tiny_config, 10)
    for bucket in buckets:
        state, _ = step(state, make_batch(bucket), bucket)
    assert set(step.stem.traces.values()) == {1} and len(step.stem.traces) == 6
    # static_tokens shares one trunk among all sizes: two frame counts, two trunks.
    assert set(step.traces.values()) == {1} and len(step.traces) == 2
    before = step.compilations
    for bucket in [*buckets, *reversed(buckets)]:
        state, _ = step(state, make_batch(bucket, seed=1), bucket)
    assert step.compilations == before == 8
    assert int(state["step"]) == 18


@pytest.mark.parametrize("variant", ["static_tokens", "flexivit"])
def test_the_plan_equals_weight_interpolation(tiny_config, variant):
    tiny_config.model.drop_path = 0.0
    tiny_config.stretch.variant = variant
    bucket = make_bucket(variant, 1, (24, 24), tiny_config.model)
    assert bucket.patch != tiny_config.model.patch
    state, batch = init_state(tiny_config, 10), make_batch(bucket)
    params = jax.tree.map(jnp.copy, state["params"])
    apply = models.make_apply(tiny_config.model)

    def by_definition(params):
        video = models.normalise(jnp.asarray(batch["video"]), tiny_config.model.normalise)
        logits = apply(fit(params, bucket, tiny_config.stretch), video)
        targets = make_targets(batch["label"], 6, 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean()

    loss, grads = jax.jit(jax.value_and_grad(by_definition))(params)
    _, metrics = TrainStep(tiny_config, 10)(state, batch, bucket)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)


def test_evaluation_equals_the_definition(tiny_config):
    _, params = models.init(tiny_config.model, jax.random.key(0))
    predict = EvalStep(tiny_config.model, tiny_config.stretch, "float32")
    for size in ((8, 8), (24, 20)):
        bucket = make_bucket("static_tokens", 2, size, tiny_config.model)
        video = make_batch(bucket)["video"]
        apply = jax.jit(models.make_apply(tiny_config.model))
        wanted = apply(
            fit(params, bucket, tiny_config.stretch), models.normalise(jnp.asarray(video), "clip")
        )
        np.testing.assert_allclose(predict(params, video, bucket), wanted, atol=1e-5)


def test_a_masked_clip_neither_teaches_nor_counts(tiny_config):
    tiny_config.model.drop_path = 0.0
    bucket = make_bucket("static_tokens", 2, (16, 16), tiny_config.model)
    batch = make_batch(bucket)
    batch["mask"][1] = 0
    other = {k: v.copy() for k, v in batch.items()}
    other["video"][1], other["label"][1] = 255 - other["video"][1], 5 - other["label"][1]
    step, outcomes = TrainStep(tiny_config, 10), []
    for b in (batch, other):
        state, metrics = step(init_state(tiny_config, 10), b, bucket)
        outcomes.append((float(metrics["loss"]), state["params"]))
    assert outcomes[0][0] == outcomes[1][0]
    same = jax.tree.map(np.array_equal, outcomes[0][1], outcomes[1][1])
    assert jax.tree.all(same)
    batch["mask"][:] = 0
    _, metrics = step(init_state(tiny_config, 10), batch, bucket)
    assert float(metrics["loss"]) == 0 and np.isfinite(float(metrics["grad_norm"]))


def test_targets_against_a_plain_computation():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5)), np.array([0, 3, 4, 1])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = np.full((4, 5), 0.1 / 5)
    target[np.arange(4), labels] += 0.9
    got = optax.softmax_cross_entropy(
        jnp.asarray(logits, jnp.float32), make_targets(labels, 5, 0.1)
    )
    np.testing.assert_allclose(got, -(target * np.log(p)).sum(1), rtol=1e-5)


def test_gradients_reach_every_base_parameter(tiny_config):
    bucket = make_bucket("static_tokens", 1, (24, 24), tiny_config.model)
    state = init_state(tiny_config, 10)
    before = jax.tree.map(np.array, state["params"])
    step = TrainStep(tiny_config, 10)
    for seed in range(3):
        state, _ = step(state, make_batch(bucket, seed=seed), bucket)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, state["params"])
    for path, changed in jax.tree.leaves_with_path(moved):
        assert changed, jax.tree_util.keystr(path)


def test_training_learns_a_small_batch_by_heart(tiny_config):
    tiny_config.model.drop_path = 0.0
    tiny_config.optim.label_smoothing = 0.0
    bucket = make_bucket("static_tokens", 2, (16, 16), tiny_config.model)
    step, state, batch = TrainStep(tiny_config, 60), init_state(tiny_config, 60), make_batch(bucket)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, bucket)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 < 1 < losses[0]


@pytest.mark.slow
def test_bfloat16_training_follows_float32(tiny_config):
    bucket = make_bucket("static_tokens", 2, (16, 16), tiny_config.model)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        tiny_config.train.dtype = dtype
        state, metrics = TrainStep(tiny_config, 5)(
            init_state(tiny_config, 5), make_batch(bucket), bucket
        )
        losses[dtype] = float(metrics["loss"])
        assert {x.dtype for x in jax.tree.leaves(state["params"])} == {np.dtype("float32")}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)
    assert losses["bfloat16"] != losses["float32"]


@pytest.mark.slow
def test_layers_in_a_loop_and_unrolled_give_the_same(tiny_config):
    tiny_config.model.depth, tiny_config.model.drop_path = 3, 0.5
    bucket = make_bucket("static_tokens", 2, (16, 16), tiny_config.model)
    found, lengths = {}, {}
    for layers in ("loop", "unrolled"):
        tiny_config.train.layers = layers
        step = TrainStep(tiny_config, 5)
        lengths[layers] = len(step.compile(bucket, 3)["trunk"].run.as_text())
        _, metrics = step(init_state(tiny_config, 5), make_batch(bucket), bucket)
        found[layers] = [float(metrics[name]) for name in ("loss", "grad_norm")]
    assert found["loop"] == pytest.approx(found["unrolled"], rel=1e-5)
    assert lengths["unrolled"] > 1.2 * lengths["loop"]


@pytest.mark.slow
def test_recomputation_saves_memory_and_changes_nothing(tiny_config):
    tiny_config.model.depth = 4
    bucket = make_bucket("static_tokens", 2, (16, 16), tiny_config.model)
    found = {}
    for how in ("none", "block", "matmuls"):
        tiny_config.train.remat = how
        step, batch = TrainStep(tiny_config, 5), make_batch(bucket, n=16)
        temporary = step.compile(bucket, 16)["trunk"].temporary
        _, metrics = step(init_state(tiny_config, 5), batch, bucket)
        found[how] = temporary, float(metrics["loss"]), float(metrics["grad_norm"])
    for how in ("block", "matmuls"):
        assert found[how][0] < 0.75 * found["none"][0]
        assert found[how][1:] == pytest.approx(found["none"][1:], rel=1e-5)


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_it(tiny_config):
    tiny_config.model.drop_path = 0.0
    bucket = make_bucket("static_tokens", 2, (16, 16), tiny_config.model)
    batch, found = make_batch(bucket, n=6), []
    batch["mask"][[0, 5]] = 0
    for parts in (1, 3):
        tiny_config.train.accumulate = parts
        _, metrics = TrainStep(tiny_config, 5)(init_state(tiny_config, 5), batch, bucket)
        found.append([float(metrics[name]) for name in ("loss", "top1", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_run_compiles_nothing_but_what_was_planned(tiny_config):
    step, state = TrainStep(tiny_config, 10), init_state(tiny_config, 10)
    planned, other = (
        make_bucket("static_tokens", 2, (size, size), tiny_config.model) for size in (8, 16)
    )
    step.ahead = {(planned, 3)}
    state, _ = step(state, make_batch(planned), planned)
    with pytest.raises(RuntimeError, match="2x16x16/4 weren't to be compiled ahead"):
        step(state, make_batch(other), other)


def test_unseen_resolutions_share_programs(tiny_config):
    """Patches of 5 to 8 pixels lie in cells of 6 or 8: a program each, and one trunk."""
    predict = EvalStep(tiny_config.model, tiny_config.stretch, "float32", exact={(2, 2)})
    _, params = models.init(tiny_config.model, jax.random.key(0))
    for size in (20, 21, 24, 25, 30, 31):
        bucket = make_bucket("static_tokens", 2, (size, size), tiny_config.model)
        predict(params, make_batch(bucket)["video"], bucket)
    assert predict.stem.traces.total() == 2 and predict.trunk._cache_size() == 1


def test_compiling_ahead_asks_for_each_program_once(tiny_config):
    calls = collections.Counter()

    @jax.jit
    def function(x):
        calls["traced"] += 1
        time.sleep(0.2)
        return x + 1

    programs, shape = compile_lib.Programs(), jax.ShapeDtypeStruct((3,), jnp.float32)
    with compile_lib.Ahead([lambda: programs.get("f", function, shape)] * 4, threads=4) as ahead:
        found = ahead.wait()
    assert calls["traced"] == 1 and len(programs) == 1 and len(set(map(id, found))) == 1
    np.testing.assert_array_equal(found[0].run(np.zeros(3, np.float32)), 1)
    assert found[0].seconds >= 0.2 and found[0].arguments == 12


def test_what_goes_wrong_in_a_thread_is_raised(tiny_config):
    def fail():
        raise MemoryError("too large")

    with compile_lib.Ahead([fail]) as ahead, pytest.raises(MemoryError, match="too large"):
        ahead.wait()


def test_ema_follows_the_weights(tiny_config):
    tiny_config.optim.ema = 0.9
    bucket = make_bucket("static_tokens", 2, (16, 16), tiny_config.model)
    step, state = TrainStep(tiny_config, 10), init_state(tiny_config, 10)
    first = jax.tree.map(np.array, state["params"])
    state, _ = step(state, make_batch(bucket), bucket)
    for path, ema in jax.tree.leaves_with_path(state["ema"]):
        old, new = first, state["params"]
        for key in path:
            old, new = old[key.key], new[key.key]
        np.testing.assert_allclose(ema, 0.1 * old + 0.9 * np.asarray(new), atol=1e-6)
