"""The encoder against the numbers of the original implementation, forward and gradients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stretchysnake_kernels import dispatch

from stretchysnake_jax import convert, models
from stretchysnake_jax.config import ConfigError, ModelConfig
from stretchysnake_jax.models.mamba import BidirectionalMixer
from stretchysnake_jax.models.videomamba import NORM_EPS, Block, drop_path

GOLDENS = pathlib.Path(__file__).parent / "goldens"
VIDEO = GOLDENS / "video_micro_nonsquare_grads"


def leaves(params):
    return {jax.tree_util.keystr(k, simple=True): v for k, v in jax.tree.leaves_with_path(params)}


@pytest.fixture(scope="module")
def golden():
    config, params = convert.load_videomamba(f"{VIDEO}.pth", size=(32, 48))
    arrays = np.load(f"{VIDEO}.npz")
    video = jnp.asarray(arrays["input"].transpose(0, 2, 3, 4, 1))  # (B, 3, T, H, W) there
    return config, jax.tree.map(jnp.asarray, params), video, arrays


def test_the_golden_model_is_recognised(golden):
    config, params, *_ = golden
    assert (config.dim, config.depth, config.frames, config.size) == (48, 2, 3, (32, 48))
    assert config.num_classes == 7 and config.grid == (2, 3)
    shapes = jax.eval_shape(lambda key: models.init(config, key)[1], jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)


def test_forward_equals_the_original(golden):
    config, params, video, arrays = golden
    apply = jax.jit(models.make_apply(config), static_argnames="output")
    np.testing.assert_allclose(apply(params, video), arrays["logits64"], atol=2e-5)
    features = apply(params, video, output="features")
    np.testing.assert_allclose(features, arrays["features64"], atol=2e-5)
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: models._build(config, jnp.float32, jax.random.key(0)))
    )
    module = nnx.merge(graph, nnx.State(params))
    patches = module.patch_embed(video)  # (B, T, rows, columns, C); (B, C, T, h, w) there
    wanted = arrays["patch_embed"].transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(patches, wanted, atol=2e-5)
    np.testing.assert_allclose(module.embed(video), arrays["tokens"], atol=2e-5)
    tokens = apply(params, video, output="tokens")
    assert tokens.shape == arrays["tokens"].shape
    np.testing.assert_allclose(tokens[:, 0], features, atol=1e-6)
    first = jax.tree.map(lambda x: x[0], params["layers"])
    block_graph, _ = nnx.split(
        nnx.eval_shape(lambda: Block(config, jnp.float32, nnx.Rngs(params=0)))
    )
    block = nnx.merge(block_graph, nnx.State(first))
    normed = block.norm(arrays["tokens"])
    np.testing.assert_allclose(normed, arrays["block0_normed"], atol=2e-5)
    hidden = block(jnp.asarray(arrays["tokens"]))
    np.testing.assert_allclose(hidden, arrays["block0_hidden"], atol=2e-5)


def test_every_gradient_equals_the_original(golden):
    config, params, video, _ = golden
    bwd = np.load(f"{VIDEO}_bwd.npz")
    apply = models.make_apply(config)

    def loss(params, video):
        return -(bwd["soft_target"] * jax.nn.log_softmax(apply(params, video))).sum(-1).mean()

    value, (grads, d_video) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, video)
    assert float(value) == pytest.approx(float(bwd["loss"]), rel=1e-5)
    wanted = bwd["d_input"].transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(d_video, wanted, atol=5e-5 * np.abs(wanted).max())
    ours = convert.to_state_dict(config, jax.tree.map(np.asarray, grads))
    names = [name for name in bwd.files if name.startswith("d_") and name != "d_input"]
    assert len(names) == 42 and {f"d_{name}" for name in ours} == set(names)
    for name in names:
        wanted = bwd[name]
        got = ours[name[2:]].reshape(wanted.shape)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(got, wanted, atol=5e-5 * max(scale, 1e-12), err_msg=name)


def test_the_mixer_equals_the_original():
    golden = np.load(GOLDENS / "bimamba_mixer_L5.npz")
    config = ModelConfig(dim=24, depth=1)
    mixer_graph, _ = nnx.split(
        nnx.eval_shape(lambda: BidirectionalMixer(config, jnp.float32, nnx.Rngs(params=0)))
    )

    def direction(suffix, p):
        return {
            "conv": {
                "kernel": p[f"conv1d{suffix}.weight"][:, 0].T,
                "bias": p[f"conv1d{suffix}.bias"],
            },
            "x_proj": {"kernel": p[f"x_proj{suffix}.weight"].T},
            "dt_proj": {
                "kernel": p[f"dt_proj{suffix}.weight"].T,
                "bias": p[f"dt_proj{suffix}.bias"],
            },
            "A_log": p["A_log" if not suffix else "A_b_log"],
            "D": p[f"D{suffix}"],
        }

    def tree(prefix):
        p = {k[len(prefix) :]: golden[k] for k in golden.files if k.startswith(prefix)}
        return {
            "in_proj": {"kernel": p["in_proj.weight"].T},
            "out_proj": {"kernel": p["out_proj.weight"].T},
            "forward": direction("", p),
            "backward": direction("_b", p),
        }

    params = jax.tree.map(jnp.asarray, tree("p_"))
    # x of the goldens also has entries named g_x and p_...; only parameters are in tree().
    run = jax.jit(lambda params, x: nnx.merge(mixer_graph, nnx.State(params))(x))
    y, pull = jax.vjp(run, params, jnp.asarray(golden["x"]))
    np.testing.assert_allclose(y, golden["y"], atol=5e-6 * np.abs(golden["y"]).max())
    grads, d_x = jax.jit(pull)(jnp.asarray(golden["cotangent"]))
    np.testing.assert_allclose(d_x, golden["g_x"], atol=5e-5 * np.abs(golden["g_x"]).max())
    wanted = leaves(tree("g_"))
    for name, got in leaves(grads).items():
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(got, wanted[name], atol=5e-5 * scale, err_msg=name)


def test_the_norm_equals_the_fused_add_and_norm():
    golden = np.load(GOLDENS / "rms_norm_fused_add.npz")

    def norm(x, dtype):
        module = nnx.RMSNorm(24, epsilon=NORM_EPS, dtype=dtype, rngs=nnx.Rngs(0))
        module.scale[...] = jnp.asarray(golden["weight"])
        return module(jnp.asarray(x))

    for case, residual in (("nores", 0), ("res", golden["residual"])):
        stream = golden["x"] + residual
        np.testing.assert_allclose(norm(stream, jnp.float32), golden[f"fp32_{case}_y"], atol=2e-6)
    small = norm(golden["small_x"], jnp.float32)
    np.testing.assert_allclose(small, golden["small_y"], rtol=1e-5)
    assert np.abs(small - golden["small_y_if_eps_1e-6_WRONG"]).max() > 1e-2
    x = golden["x"].astype(jnp.bfloat16).astype(np.float32)
    got = norm(x + golden["residual"], jnp.bfloat16).astype(np.float32)
    np.testing.assert_allclose(got, golden["bf16_res32_y"], atol=0.02)


@pytest.mark.parametrize("name", ["tiny", "small", "middle", "base"])
def test_parameter_counts(name):
    wanted = json.loads((GOLDENS / "param_counts.json").read_text())
    wanted = wanted[name if name != "base" else "base (image only)"]

    def count(config):
        return models.count(jax.eval_shape(lambda k: models.init(config, k)[1], jax.random.key(0)))

    for what, number in wanted.items():
        kind, *fields = what.split()
        fields = {k: int(v) for k, v in (f.split("=") for f in fields)}
        frames = fields.get("T") if kind == "video" else None
        config = models.preset(name, frames=frames, num_classes=fields["nc"])
        assert count(config) == number, what


def test_initialisation_follows_the_original():
    wanted = json.loads((GOLDENS / "init_stats_video_tiny.json").read_text())
    config = models.preset("tiny")
    _, params = models.init(config, jax.random.key(0))
    ours = convert.to_state_dict(config, jax.tree.map(np.asarray, params))
    assert set(wanted) <= set(ours)  # two layers stand for all
    for name, stats in wanted.items():
        x = np.asarray(ours[name], np.float64)
        assert list(x.shape) == stats["shape"], name
        spread = max(stats["std"], 1e-12)
        # Four standard errors of a mean, and 5 % (more for small tensors) of a deviation.
        assert abs(x.mean() - stats["mean"]) <= 6 * spread / x.size**0.5 + 1e-9, name
        assert abs(x.std() - stats["std"]) <= spread * (0.05 + 4 / x.size**0.5) + 1e-9, name
        assert np.abs(x).max() <= 1.4 * max(abs(stats["min"]), abs(stats["max"])) + 1e-9, name


def test_mamba_step_sizes_start_between_a_thousandth_and_a_tenth():
    config = models.preset("micro", num_classes=3, frames=2)
    _, params = models.init(config, jax.random.key(1))
    for direction in ("forward", "backward"):
        dt = jax.nn.softplus(params["layers"]["mixer"][direction]["dt_proj"]["bias"])
        assert 0.9e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.11


@pytest.fixture(scope="module")
def micro():
    config = models.preset("micro", frames=4, size=(16, 24), num_classes=5, depth=2, drop_path=0.5)
    apply, params = models.init(config, jax.random.key(0))
    return config, jax.jit(apply, static_argnames="output"), params


def test_mean_pooling_is_the_mean_of_the_residual_stream(micro):
    config, apply, params = micro
    video = jax.random.normal(jax.random.key(2), (2, 4, 16, 24, 3))
    features = apply(params, video, output="features")
    assert features.shape == (2, 64)
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: models._build(config, jnp.float32, jax.random.key(0)))
    )
    module = nnx.merge(graph, nnx.State(params))
    stream = module.encode(module.embed(video))
    np.testing.assert_allclose(features, module.norm(stream.mean(1)), atol=1e-6)


def test_scanned_layers_equal_unrolled_ones(micro):
    config, apply, params = micro
    video = jax.random.normal(jax.random.key(2), (2, 4, 16, 24, 3))
    for key in (None, jax.random.key(5)):
        unrolled = apply(params, video, key)
        with dispatch.trace_for("gpu"), dispatch.prefer("xla"):
            scanned = jax.jit(models.make_apply(config))(params, video, key)
        np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    out = np.asarray(drop_path(x, jnp.float32(0.25), jax.random.key(0)))
    per_sample = out.reshape(4000, -1)
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert (per_sample.min(1) == per_sample.max(1)).all()
    assert out.mean() == pytest.approx(1, abs=0.04)


def test_drop_path_acts_in_training_only(micro):
    _, apply, params = micro
    video = jax.random.normal(jax.random.key(2), (2, 4, 16, 24, 3))
    still = apply(params, video)
    np.testing.assert_array_equal(still, apply(params, video))
    assert np.abs(apply(params, video, jax.random.key(1)) - still).max() > 1e-3


def test_bfloat16_stays_near_float32(micro):
    config, apply, params = micro
    video = jax.random.normal(jax.random.key(2), (2, 4, 16, 24, 3))
    half = jax.jit(models.make_apply(config, "bfloat16"))(params, video)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, apply(params, video), atol=0.05)


def test_tubelets_and_images():
    config = models.preset("micro", frames=4, tubelet=2, num_classes=3, depth=1)
    apply, params = models.init(config, jax.random.key(0))
    run = jax.eval_shape  # shapes alone: the numbers are others' business
    assert run(apply, params, jnp.zeros((1, 4, 56, 56, 3))).shape == (1, 3)
    image = models.preset("micro", frames=None, num_classes=3, depth=1)
    apply, params = models.init(image, jax.random.key(0))
    assert "temporal_pos_embed" not in params
    assert run(apply, params, jnp.zeros((1, 1, 56, 56, 3))).shape == (1, 3)


def test_a_video_of_another_scale_is_refused(micro):
    _, apply, params = micro
    with pytest.raises(ValueError, match="grid of 2x2 patches .* table has 2x3"):
        apply(params, jnp.zeros((1, 4, 16, 16, 3)))
    with pytest.raises(ValueError, match="3 time steps but the temporal table has 4"):
        apply(params, jnp.zeros((1, 3, 16, 24, 3)))
    with pytest.raises(ValueError, match="output is 'logit'"):
        apply(params, jnp.zeros((1, 4, 16, 24, 3)), output="logit")


def test_presets_refuse_unknown_names():
    with pytest.raises(ConfigError, match="unknown model 'midle': did you mean 'middle'"):
        models.preset("midle")
    with pytest.raises(ConfigError, match="unknown field model.frame: did you mean 'frames'"):
        models.preset("tiny", frame=3)


def test_normalise():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    out = models.normalise(jnp.asarray(video), "imagenet")
    wanted = (video / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    out = models.normalise(jnp.asarray(video), "clip")
    np.testing.assert_allclose(out.mean((1, 2, 3)), 0, atol=1e-5)
    flat = models.normalise(jnp.full((1, 2, 4, 4, 3), 99, jnp.uint8), "clip")
    np.testing.assert_array_equal(flat, 0)
