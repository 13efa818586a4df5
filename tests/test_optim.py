"""Learning rates, parameter groups and the moving average, against VideoMamba's own numbers."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stretchysnake_jax import convert, models, optim, validation
from stretchysnake_jax.config import (
    LAYER_DECAYS,
    OPTIM_RECIPES,
    Config,
    ConfigError,
    DataConfig,
    OptimConfig,
    TrainConfig,
    resolve,
)

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "recipe.json").read_text())
GROUPS = {
    "param_groups_tiny24_default_0.75": (models.preset("tiny"), 0.75),
    "param_groups_middle32_0.8": (models.preset("middle"), 0.8),
}


def shapes_of(config):
    return jax.eval_shape(lambda key: models.init(config, key)[1], jax.random.key(0))


def under_their_names(config, values):
    """Numbers per parameter (broadcast to its shape) under the names of the original."""
    full = jax.tree.map(lambda s, v: np.broadcast_to(v, s.shape), shapes_of(config), values)
    return {k: np.unique(v) for k, v in convert.to_state_dict(config, full).items()}


@pytest.mark.parametrize("name", GROUPS)
def test_weight_decay_groups_are_those_of_the_original(name):
    config, _ = GROUPS[name]
    mask = jax.tree.map(np.float32, optim.decay_mask(shapes_of(config)))
    found = under_their_names(config, mask)
    assert set(GOLDEN[name]) <= set(found)
    for parameter, group in GOLDEN[name].items():
        assert found[parameter] == [float(group["weight_decay"] > 0)], parameter
    tops = {k.split(".", 2)[2] for k in found if "layers." in k}
    assert tops == {k.split(".", 2)[2] for k in GOLDEN[name] if "layers." in k}


@pytest.mark.parametrize("name", GROUPS)
def test_published_layer_decay_has_the_scales_of_the_original(name):
    config, rate = GROUPS[name]
    decay = OptimConfig(layer_decay=rate, layer_decay_form="published")
    found = under_their_names(config, optim.layer_scales(decay, shapes_of(config)))
    for parameter, group in GOLDEN[name].items():
        np.testing.assert_allclose(found[parameter], [group["lr_scale"]], rtol=1e-6)
    assert found["layers.11.mixer.in_proj.weight"] == [1.0]


def test_intended_layer_decay_falls_block_by_block():
    config = models.preset("tiny")
    decay = OptimConfig(layer_decay=0.5, layer_decay_form="intended")
    found = under_their_names(config, optim.layer_scales(decay, shapes_of(config)))
    for name in ("patch_embed.proj.weight", "cls_token", "pos_embed", "temporal_pos_embedding"):
        assert found[name] == [0.5**25], name
    for i in range(24):
        for name in ("mixer.A_log", "mixer.conv1d_b.bias", "mixer.out_proj.weight", "norm.weight"):
            assert found[f"layers.{i}.{name}"] == [0.5 ** (24 - i)], (i, name)
    for name in ("norm_f.weight", "head.weight", "head.bias"):
        assert found[name] == [1.0], name


def golden_schedule(case):
    """(schedule, golden values) of an entry of `cosine_scheduler`."""
    steps = case["epochs"] * case["niter"]
    config = OptimConfig(
        learning_rate=case["base"],
        final_learning_rate=case["final"],
        warmup=case["warmup_epochs"] / case["epochs"],
        warmup_learning_rate=case["start"],
        schedule="videomamba",
    )
    return optim.make_schedule(config, steps), np.array(case["values"])


@pytest.mark.parametrize("case", GOLDEN["cosine_scheduler"], ids=lambda c: str(c["base"]))
def test_the_schedule_is_that_of_the_original(case):
    rate, wanted = golden_schedule(case)
    assert len(wanted) == case["epochs"] * case["niter"]
    got = jax.jit(jax.vmap(rate))(np.arange(len(wanted)))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.vmap(rate)(np.arange(len(wanted))), wanted, rtol=1e-13)


@pytest.mark.parametrize("epochs", [6, 10, 12, 30, 35, 40, 45, 50, 70])
def test_a_share_of_whole_epochs_is_the_right_number_of_steps(epochs):
    for per_epoch in (1, 7, 117, 963, 240435):
        for warm in (1, 2, 5):
            assert int(warm / epochs * (epochs * per_epoch)) == warm * per_epoch


def test_learning_rate_warms_up_and_falls_to_the_final_rate():
    config = OptimConfig(learning_rate=1e-3, final_learning_rate=1e-5, warmup=0.1)
    rate = optim.make_schedule(config, 1000)
    np.testing.assert_allclose([float(rate(0)), float(rate(100))], [1e-5, 1e-3], rtol=1e-5)
    middle = 1e-5 + (1e-3 - 1e-5) / 2
    np.testing.assert_allclose(float(rate(550)), middle, rtol=1e-5)
    np.testing.assert_allclose(float(rate(1000)), 1e-5, rtol=1e-5)


def test_both_schedules_start_where_they_are_told():
    for schedule in ("cosine", "videomamba"):
        rate = optim.make_schedule(
            OptimConfig(schedule=schedule, warmup=0.5, warmup_learning_rate=5e-4), 10
        )
        assert float(rate(0)) == pytest.approx(5e-4)
        assert float(rate(5)) == pytest.approx(1e-3)


def test_decay_and_clipping_act():
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    config = OptimConfig(learning_rate=0.1, warmup=0.0, weight_decay=0.5, clip_norm=1.0)
    optimizer = optim.make_optimizer(config, 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5, rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], 0)


def small_params(seed=0):
    config = models.preset(
        "tiny", dim=16, depth=3, patch=(4, 4), size=(8, 8), frames=2, num_classes=5
    )
    rng = np.random.default_rng(seed)
    draw = lambda s: rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
    return config, jax.tree.map(draw, shapes_of(config))


def test_nothing_set_is_plain_adamw_bit_for_bit():
    _, params = small_params()
    rate = optax.warmup_cosine_decay_schedule(1e-6, 1e-3, 2, 40, 1e-6)
    plain = optax.adamw(rate, weight_decay=0.05, mask=optim.decay_mask)
    ours = optim.make_optimizer(OptimConfig(), 40)
    states = [plain.init(params), ours.init(params)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for seed in range(1, 5):
        _, grads = small_params(seed)
        a, states[0] = plain.update(grads, states[0], params)
        b, states[1] = ours.update(grads, states[1], params, rate_scale=7.0)  # left aside
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("form", LAYER_DECAYS)
def test_whole_updates_are_those_of_torch(form):
    torch = pytest.importorskip("torch")
    model, params = small_params()
    config = OptimConfig(recipe="videomamba", layer_decay_form=form, weight_decay=0.1)
    steps, clips = 20, [512, 256, 1024] * 4
    optimizer = optim.make_optimizer(config, steps)
    update = jax.jit(
        lambda g, s, p, scale: optimizer.update(g, s, p, rate_scale=scale)  # one compilation
    )
    rates = optim.make_schedule(config, steps)
    scales = under_their_names(model, optim.layer_scales(config, params))
    decayed = under_their_names(model, jax.tree.map(np.float32, optim.decay_mask(params)))

    def export(tree):
        state = convert.to_state_dict(model, jax.tree.map(np.asarray, tree))
        return {k: torch.tensor(np.array(v)) for k, v in state.items()}

    theirs = export(params)
    # pos_embed is two parameters of ours with one factor; each layer is a slice of one.
    groups = [
        {"params": [p], "weight_decay": 0.1 * decayed[k][0], "scale": scales[k][0]}
        for k, p in theirs.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    state = optimizer.init(params)
    for step, batch in enumerate(clips):
        _, grads = small_params(seed=step + 1)
        updates, state = update(grads, state, params, optim.batch_scale(config, batch))
        params = optax.apply_updates(params, updates)
        for p, g in zip(theirs.values(), export(grads).values(), strict=True):
            p.grad = g
        for group in adamw.param_groups:
            group["lr"] = float(rates(step)) * batch / 256 * group["scale"]
        adamw.step()
    for name, ours in export(params).items():
        np.testing.assert_allclose(ours, theirs[name], rtol=2e-6, atol=2e-7, err_msg=name)


def test_batch_scale():
    linear = OptimConfig(scale_rate="linear", base_batch=256)
    assert optim.batch_scale(OptimConfig(), 64) == 1.0
    assert optim.batch_scale(linear, 1024) == 4.0
    root = OptimConfig(scale_rate="sqrt", base_batch=256)
    np.testing.assert_array_equal(optim.batch_scale(root, np.array([256, 1024, 64])), [1, 2, 0.5])
    optimizer, params = optim.make_optimizer(linear, 10), {"kernel": jnp.ones(2)}
    with pytest.raises(TypeError, match="rate_scale"):  # forgotten by the step
        optimizer.update(params, optimizer.init(params), params)


def test_recipes_fill_in_what_is_none():
    for recipe in OPTIM_RECIPES:
        config = OptimConfig(recipe=recipe)
        filled = resolve(config)
        assert resolve(filled) == filled
        left = {name for name, value in vars(filled).items() if value is None}
        assert left == {"warmup_learning_rate"}
    assert resolve(OptimConfig(recipe="videomamba", layer_decay=0.8)).layer_decay == 0.8
    light = resolve(OptimConfig())
    assert (light.learning_rate, light.warmup, light.scale_rate) == (1e-3, 0.05, "none")
    with pytest.raises(ConfigError, match=r"optim\.recipe .* did you mean 'videomamba'\?"):
        resolve(OptimConfig(recipe="videomama"))


def peak(config):
    """The largest learning rate of a run, batches taken into account."""
    rate = resolve(config.optim).learning_rate
    return rate * optim.batch_scale(config.optim, config.data.batch_size)


def sheet(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arg, published",  # the table of section 9 of VideoMamba's specification
    [
        ("kinetics400_tiny_f8", (512, 8e-4, 70, 0.1, 0.75, 0.1, (4, 3))),
        ("kinetics400_tiny_f64", (256, 4e-4, 70, 0.1, 0.75, 0.1, (4, 3))),
        ("kinetics400_small_f64", (128, 2e-4, 50, 0.35, 0.75, 0.05, (4, 3))),
        ("kinetics400_middle_f8", (512, 8e-4, 50, 0.8, 0.75, 0.05, (4, 3))),
        ("kinetics400_middle_f16", (256, 2e-4, 50, 0.8, 0.75, 0.05, (4, 3))),
        ("kinetics400_middle_f64", (64, 5e-5, 50, 0.8, 0.75, 0.05, (4, 3))),
        ("kinetics400_middle_mask_f8", (512, 4e-4, 45, 0.4, 0.8, 0.05, (4, 3))),
        ("kinetics400_middle_mask_f64", (64, 5e-5, 45, 0.4, 0.8, 0.05, (4, 3))),
        ("ssv2_tiny_f16", (512, 1.6e-3, 35, 0.1, 0.75, 0.1, (2, 3))),
        ("ssv2_middle_f16", (256, 8e-4, 30, 0.8, 0.75, 0.05, (2, 3))),
        ("ssv2_middle_mask_f16", (256, 2e-4, 30, 0.4, 0.8, 0.05, (2, 3))),
        ("breakfast_vis4mer_small_f64", (128, 2e-4, 50, 0.4, 0.75, 0.05, (4, 3))),
        ("coin_middle_mask_f32", (64, 1e-4, 30, 0.4, 0.8, 0.05, (10, 3))),
    ],
)
def test_fine_tuning_has_the_published_numbers(arg, published):
    config = sheet("finetune").get_config(arg)
    validation.validate(config)
    clips, rate, epochs, drop_path, layer_decay, weight_decay, views = published
    optimum = resolve(config.optim)
    assert config.data.batch_size == 2 * clips and resolve(config.data).repeats == 2
    assert peak(config) == pytest.approx(rate, rel=1e-12)
    assert config.train.epochs == epochs and optimum.warmup == 5 / epochs
    assert config.model.drop_path == drop_path
    assert (optimum.layer_decay, optimum.layer_decay_form) == (layer_decay, "published")
    assert optimum.weight_decay == weight_decay and optimum.schedule == "videomamba"
    assert (config.data.test_clips, config.data.test_crops) == views


@pytest.mark.parametrize(
    "arg, start",
    [
        ("", "m16_in1k"),
        ("ssv2_tiny_f8", "t16_in1k"),
        ("coin_small_f64", "s16_k400_f64"),
        ("kinetics400_middle_mask_f64", "m16_k400_mask_pt_f8"),
        ("ssv2_middle_mask_f16", "m16_ssv2_mask_pt_f8"),
        ("breakfast_vis4mer_middle_mask_f32", "m16_k400_mask_ft_f32"),
    ],
)
def test_fine_tuning_starts_from_the_published_checkpoint(arg, start):
    wanted = f"videomamba_{start}_res224.npz"
    assert sheet("finetune").get_config(arg).train.init_from == wanted


def test_every_fine_tuning_run_is_valid():
    module = sheet("finetune")
    for (dataset, model), (clips, *_) in module.RUNS.items():
        for frames in clips:
            config = module.get_config(f"{dataset}_{model}_f{frames}")
            validation.validate(config)
            assert config.model.frames == frames and config.data.dataset == dataset
    with pytest.raises(ConfigError, match="did you mean 'kinetics400_middle_f16'"):
        module.get_config("kinetics_middle_f16")


def test_the_papers_peak_follows_the_batch_of_each_variant():
    module = sheet("k400")
    for variant, clips in module.BATCH_SIZE.items():
        config = module.get_config(variant)
        assert peak(config) == pytest.approx(1e-3 * 2 * clips / 256, rel=1e-12)
        epochs = 50 if variant == "vanilla" else 12
        assert resolve(config.optim).warmup == 5 / epochs and config.train.epochs == epochs


def test_the_moving_average_forgets_the_start_and_then_decays():
    ema = {"a": jnp.zeros(3)}
    for step in range(8):
        ema = optim.update_ema(ema, {"a": jnp.ones(3)}, 0.4, step)
    left = np.prod([min(0.4, (1 + s) / (10 + s)) for s in range(8)])
    np.testing.assert_allclose(1 - ema["a"], left, rtol=1e-3)
    late = jax.jit(optim.update_ema)({"a": jnp.zeros(3)}, {"a": jnp.ones(3)}, 0.9999, 10**6)
    np.testing.assert_allclose(late["a"], 1e-4, rtol=1e-3)
    same = optim.update_ema({"a": jnp.full(3, 0.1)}, {"a": jnp.full(3, 0.1)}, 0.9, 5)
    np.testing.assert_array_equal(same["a"], np.float32(0.1))


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("recipe", "vit", "it takes: light, stretchysnake, videomamba"),
        ("learning_rate", 0.0, "a number > 0"),
        ("warmup", 1.0, "share of the steps"),
        ("warmup_learning_rate", -1.0, "a rate >= 0"),
        ("schedule", "cosin", "did you mean 'cosine'?"),
        ("scale_rate", "root", "it takes: none, linear, sqrt"),
        ("base_batch", 0, "a number of clips >= 1"),
        ("layer_decay", 0.0, "above 0, up to 1"),
        ("layer_decay_form", "fixed", "it takes: intended, published"),
        ("ema", 1.0, "up to 1"),
    ],
)
def test_what_cannot_run_is_refused_by_name(field, value, words):
    config = Config(data=DataConfig(train="x.txt"), train=TrainConfig(steps=1))
    setattr(config.optim, field, value)
    with pytest.raises(ConfigError) as error:
        validation.validate(config)
    assert f"optim.{field}" in str(error.value) and words in str(error.value)
