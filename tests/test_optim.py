"""Weight decay groups and the learning rate."""

import json
import pathlib

import jax
import numpy as np

from stretchysnake_jax import convert, models, optim
from stretchysnake_jax.config import OptimConfig

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def test_weight_decay_groups_are_those_of_the_original():
    groups = json.loads((GOLDENS / "recipe.json").read_text())["param_groups_tiny24_default_0.75"]
    config = models.preset("tiny")
    shapes = jax.eval_shape(lambda key: models.init(config, key)[1], jax.random.key(0))
    mask = optim.decay_mask(shapes)
    marked = jax.tree.map(lambda s, m: np.full(s.shape, np.float32(m)), shapes, mask)
    state = convert.to_state_dict(config, marked)
    assert set(state) <= set(groups) or set(groups) <= set(state)
    for name, group in groups.items():
        assert bool(state[name].reshape(-1)[0]) == (group["weight_decay"] > 0), name


def test_learning_rate_warms_up_and_falls_to_the_final_rate():
    config = OptimConfig(learning_rate=1e-3, final_learning_rate=1e-5, warmup=0.1)
    rate = optim.make_schedule(config, 1000)
    np.testing.assert_allclose([float(rate(0)), float(rate(100))], [1e-5, 1e-3], rtol=1e-5)
    middle = 1e-5 + (1e-3 - 1e-5) / 2
    np.testing.assert_allclose(float(rate(550)), middle, rtol=1e-5)
    np.testing.assert_allclose(float(rate(1000)), 1e-5, rtol=1e-5)


def test_decay_and_clipping_act():
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    config = OptimConfig(learning_rate=0.1, warmup=0.0, weight_decay=0.5, clip_norm=1.0)
    optimizer = optim.make_optimizer(config, 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5, rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], 0)
