"""The transformer of equal size: its blocks against float64 NumPy, and all that the encoder does.

The cases on a mesh run in a process of their own with eight virtual devices, which is this file as
a program.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stretchysnake_jax
from stretchysnake_jax import config as config_lib
from stretchysnake_jax import (
    convert,
    flops,
    models,
    optim,
    sharding,
    step_bench,
    step_scaling,
    torch_layout,
    validation,
)
from stretchysnake_jax.buckets import Bucket, make_bucket
from stretchysnake_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    StretchConfig,
    TrainConfig,
    attention_twin,
    preset,
)
from stretchysnake_jax.models import attention
from stretchysnake_jax.step import TrainStep, fit, init_state, make_targets
from stretchysnake_jax.step_contenders import OURS, Case

MODEL = ModelConfig(
    dim=16,
    depth=2,
    blocks="attention",
    heads=2,
    mlp_ratio=3.0,
    patch=(4, 4),
    size=(12, 12),
    frames=2,
    num_classes=6,
    temporal_init_std=0.5,
)


def leaves(params):
    return {
        jax.tree_util.keystr(k, simple=True, separator="."): v
        for k, v in jax.tree.leaves_with_path(params)
    }


def shapes_of(model):
    return jax.eval_shape(lambda key: models.init(model, key)[1], jax.random.key(0))


# The encoder once more, in NumPy and float64, one token and one head at a time.


def layer_norm64(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu64(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def encode64(params, tokens, heads):
    """The blocks on tokens (B, L, dim)."""
    x = tokens
    for i in range(len(params["layers"]["norm1"]["scale"])):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        normed, out = layer_norm64(x, p["norm1"]), np.zeros_like(x)
        q, k, v = np.split(normed @ p["attn"]["qkv"]["kernel"] + p["attn"]["qkv"]["bias"], 3, -1)
        width = x.shape[-1] // heads
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = np.exp(q[..., own] @ k[..., own].swapaxes(1, 2) / math.sqrt(width))
            out[..., own] = scores / scores.sum(-1, keepdims=True) @ v[..., own]
        x = x + out @ p["attn"]["proj"]["kernel"] + p["attn"]["proj"]["bias"]
        fc1, fc2 = p["mlp"]["fc1"], p["mlp"]["fc2"]
        hidden = gelu64(layer_norm64(x, p["norm2"]) @ fc1["kernel"] + fc1["bias"])
        x = x + hidden @ fc2["kernel"] + fc2["bias"]
    return x


def logits64(params, video, heads):
    """The whole encoder, pooling by the class token."""
    kernel, pos = params["patch_embed"]["kernel"], params["pos_embed"]
    (rows, columns), (_, ph, pw, _, dim) = pos["grid"].shape[:2], kernel.shape
    tokens = [np.broadcast_to(params["cls_token"] + pos["cls"], (len(video), dim))]
    for t in range(video.shape[1]):
        for i in range(rows):
            for j in range(columns):
                cell = video[:, t, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]
                token = np.einsum("bhwc,hwcd->bd", cell, kernel[0]) + params["patch_embed"]["bias"]
                tokens.append(token + pos["grid"][i, j] + params["temporal_pos_embed"][t])
    x = encode64(params, np.stack(tokens, 1), heads)[:, 0]
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * params["norm"]["scale"]
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def draw(model, seed=0):
    """Parameters in which no bias is 0 and no score small, and as float64."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype("f4"), shapes_of(model))
    return params, jax.tree.map(lambda x: x.astype(np.float64), params)


def build(model, params, **options):
    """The module of plain parameters, for what `apply` doesn't offer."""
    graph, _ = nnx.split(
        nnx.eval_shape(lambda: models._build(model, jnp.float32, jax.random.key(0), **options))
    )
    return nnx.merge(graph, nnx.State(jax.tree.map(jnp.asarray, params)))


@pytest.mark.parametrize("frames, size", [(1, (4, 4)), (3, (8, 12))], ids=["2", "19"])
def test_forward_and_every_gradient_equal_numpy_in_float64(frames, size):
    model = dataclasses.replace(MODEL, frames=frames, size=size)
    params, exact = draw(model)
    rng = np.random.default_rng(1)
    video, weight = rng.normal(size=(2, frames, *size, 3)), rng.normal(size=(2, 6))
    apply = models.make_apply(model)

    def loss(params, video):
        logits = apply(params, video)
        return (logits * weight).sum(), logits

    (_, logits), (grads, d_video) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        params, video.astype("f4")
    )
    video = video.astype("f4").astype(np.float64)
    np.testing.assert_allclose(logits, logits64(exact, video, model.heads), rtol=2e-4, atol=2e-5)

    def slope(point, direction, run, h=1e-5):
        ends = [run(point + sign * h * direction) for sign in (1, -1)]
        return ((ends[0] - ends[1]) * weight).sum() / (2 * h)

    wanted, flat = {}, leaves(exact)
    for name, leaf in flat.items():
        direction = rng.normal(size=leaf.shape)

        def run(moved, name=name):
            values = [moved if other == name else leaf for other, leaf in flat.items()]
            tree = jax.tree.unflatten(jax.tree.structure(exact), values)
            return logits64(tree, video, model.heads)

        wanted[name] = slope(leaf, direction, run), float((leaves(grads)[name] * direction).sum())
    assert len(wanted) == 21
    direction = rng.normal(size=video.shape)
    wanted["video"] = (
        slope(video, direction, lambda moved: logits64(exact, moved, model.heads)),
        float((d_video * direction).sum()),
    )
    largest = max(abs(exact) for exact, _ in wanted.values())
    for name, (right, got) in wanted.items():
        assert got == pytest.approx(right, rel=1e-3, abs=1e-4 * largest), name


@pytest.mark.parametrize("length", [1, 7])
def test_any_number_of_tokens(length):
    params, exact = draw(MODEL)
    tokens = np.random.default_rng(1).normal(size=(2, length, 16)).astype("f4")
    got = build(MODEL, params).encode(jnp.asarray(tokens))
    wanted = encode64(exact, tokens.astype(np.float64), MODEL.heads)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)


def test_without_tables_tokens_are_a_set():
    params, _ = draw(MODEL)
    for tables in (params["pos_embed"], params):
        for name in ("grid", "temporal_pos_embed"):
            if name in tables:
                tables[name] = np.zeros_like(tables[name])
    rng = np.random.default_rng(2)
    cells, order = rng.normal(size=(2, 18, 4, 4, 3)).astype("f4"), rng.permutation(18)

    def video(cells):
        return cells.reshape(2, 2, 3, 3, 4, 4, 3).swapaxes(3, 4).reshape(2, 2, 12, 12, 3)

    apply = jax.jit(lambda video: models.make_apply(MODEL)(params, video, output="tokens"))
    straight, mixed = apply(video(cells)), apply(video(cells[:, order]))
    np.testing.assert_allclose(mixed[:, 1:], straight[:, 1:][:, order], atol=1e-5)
    np.testing.assert_allclose(mixed[:, 0], straight[:, 0], atol=1e-5)
    assert np.abs(mixed - straight).max() > 0.1


@pytest.mark.slow
def test_a_loop_with_remat_gives_the_same_as_unrolled_blocks():
    model = dataclasses.replace(MODEL, drop_path=0.5)
    params, _ = draw(model)
    video = jax.random.normal(jax.random.key(2), (2, 2, 12, 12, 3))
    results = []
    for layers, remat in (("unrolled", "none"), ("loop", "matmuls")):
        apply = models.make_apply(model, layers=layers, remat=remat)
        grad = jax.jit(jax.grad(lambda p, apply=apply: apply(p, video, jax.random.key(5)).sum()))
        results.append(leaves(grad(params)))
    for name, wanted in results[0].items():
        atol = 1e-5 * max(1, np.abs(wanted).max())
        np.testing.assert_allclose(results[1][name], wanted, atol=atol, err_msg=name)


def test_drop_path_acts_on_either_branch_apart():
    model = dataclasses.replace(MODEL, drop_path=0.5)  # 0 in the first block, 0.5 in the second
    params, _ = draw(model)
    tokens = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 5, 16)), (64, 5, 16))
    out = build(model, params).encode(tokens, jax.random.key(1))
    kinds, counts = np.unique(np.round(out[:, 0, 0], 4), return_counts=True)
    assert len(kinds) == 4 and counts.min() > 5  # attention there or not, times the MLP


@pytest.mark.slow
def test_bfloat16_has_a_float32_softmax_and_stays_near_float32():
    _, params = models.init(dataclasses.replace(MODEL, pooling="mean"), jax.random.key(0))
    video = jax.random.normal(jax.random.key(2), (2, 2, 12, 12, 3))
    half = models.make_apply(MODEL, "bfloat16")
    text = str(jax.make_jaxpr(half)(params, video))
    assert set(re.findall(r":(\w+)\[[\d,]*\] = exp ", text)) == {"f32"}
    assert "bf16[" in text
    got, wanted = jax.jit(half)(params, video), jax.jit(models.make_apply(MODEL))(params, video)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, atol=0.02)


def test_initialisation_is_that_of_a_vit():
    _, params = models.init(dataclasses.replace(MODEL, dim=64, heads=None), jax.random.key(0))
    found = leaves(params["layers"])
    assert len(found) == 12
    for name, x in found.items():
        if name.endswith("kernel"):
            assert np.std(x) == pytest.approx(0.02, rel=0.05) and abs(np.mean(x)) < 1e-3, name
        else:
            assert (x == (1 if name.endswith("scale") else 0)).all(), name
    decayed = leaves(optim.decay_mask(params)["layers"])
    assert {name for name, yes in decayed.items() if yes} == {
        name for name in found if name.endswith("kernel")
    }


def test_initialisation_follows_the_model_where_it_says_so():
    # A width of 64 learns nothing from N(0, 0.02); the micro preset begins by the inputs' count.
    model = dataclasses.replace(MODEL, dim=64, heads=None, linear_init_std=None)
    _, params = models.init(model, jax.random.key(0))
    for name, x in leaves(params["layers"]).items():
        if name.endswith("kernel"):
            bound = x.shape[-2] ** -0.5
            assert 0.95 * bound < np.abs(x).max() <= bound, name
            assert np.std(x) == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_sizes_and_operations_of_published_transformers():
    # timm's deit_*_patch16_224: parameters, GMACs (norms and softmax counted). Our last norm has
    # no bias.
    for dim, number, gmacs in ((192, 5_717_416, 1.26), (768, 86_567_656, 17.58)):
        model = ModelConfig(dim=dim, depth=12, frames=None, num_classes=1000, blocks="attention")
        assert models.count(shapes_of(model)) == number - dim
        count = flops.count(model, Bucket(1, 224, 224, (16, 16)))
        assert count["published"] == count["full"]
        assert count["full"] / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("name", config_lib.PRESETS)
def test_the_twin_has_as_many_parameters(name):
    model = preset(name, frames=None if name == "base" else 4, num_classes=10)
    twin = attention_twin(model)
    numbers = []
    for config in (model, twin):
        shapes = shapes_of(config)
        numbers.append(models.count(shapes))
        own = models.count(shapes["layers"]) / config.depth
        assert own == config_lib.block_parameters(config)
    assert numbers[1] == pytest.approx(numbers[0], rel=0.1) and twin.blocks == "attention"
    assert dataclasses.replace(twin, blocks="mamba", depth=model.depth) == model


def test_what_cannot_be_built_is_refused_by_name():
    for fields, words in (
        ({"blocks": "atention"}, "model.blocks is 'atention': did you mean 'attention'"),
        ({"heads": 3}, "model.heads is 3: it takes a number that divides model.dim, 16"),
        ({"heads": 0}, "model.heads is 0"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio is 0.0: it takes a number > 0"),
        ({"dim": 200, "heads": None}, "model.heads is None: it takes a number that divides"),
    ):
        with pytest.raises(ConfigError) as error:
            models.init(dataclasses.replace(MODEL, **fields), jax.random.key(0))
        assert words in str(error.value)


def test_a_config_from_before_still_means_mamba():
    values = config_lib.to_dict(preset("micro"))
    for name in ("blocks", "heads", "mlp_ratio"):
        del values[name]
    assert config_lib.from_dict(ModelConfig, values) == preset("micro")
    assert set(shapes_of(preset("micro"))["layers"]) == {"norm", "mixer"}


def test_what_attention_runs_on(monkeypatch):
    def choose(dtype=jnp.bfloat16, width=64, mesh=None):
        return attention.choose_implementation(dtype, width, mesh)

    assert choose() == "xla"  # here
    device = type("Device", (), {"compute_capability": "9.0"})()
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    assert choose() == "xla"  # traced for a GPU that is elsewhere
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert choose() == "cudnn"
    assert {choose(jnp.float32), choose(width=12), choose(width=256)} == {"xla"}
    meshes = [type("Mesh", (), {"shape": {"sequence": n}})() for n in (1, 2)]
    assert [choose(mesh=mesh) for mesh in meshes] == ["cudnn", "xla"]
    for capability in ("7.5", "gfx90a"):
        device.compute_capability = capability
        assert choose() == "xla"


# Training.


def make_config() -> Config:
    return Config(
        model=dataclasses.replace(MODEL, depth=1),
        stretch=StretchConfig(frames=(2,), sizes=(9, 12, 15)),
        data=DataConfig(batch_size=16),
    )


def make_batch(size, seed=0):
    video = np.random.default_rng(seed).integers(0, 256, (16, 2, size, size, 3), np.uint8)
    label = np.arange(16, dtype=np.int32) % 6
    return {"video": video, "label": label, "mask": np.ones(16, np.float32)}


def train_steps(config, mesh=None):
    """Losses and gradient norms of two steps at two resolutions."""
    step, state, numbers = TrainStep(config, 20, mesh), init_state(config, 20, mesh), []
    for size in (9, 12):
        bucket, batch = (
            make_bucket("static_tokens", 2, (size, size), config.model),
            make_batch(size),
        )
        batch = batch if mesh is None else sharding.place(mesh, batch)
        state, metrics = step(state, batch, bucket)
        numbers += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return numbers


def test_a_step_by_the_plan_equals_the_definition_and_is_traced_once():
    config = make_config()
    step, state = TrainStep(config, 20), init_state(config, 20)
    for size in (9, 12, 15, 9, 12):
        bucket = make_bucket("static_tokens", 2, (size, size), config.model)
        batch, params = make_batch(size), state["params"]

        def loss(params, batch=batch, bucket=bucket):
            video = models.normalise(jnp.asarray(batch["video"]), config.model.normalise)
            fitted = fit(params, bucket, config.stretch)
            logits = models.make_apply(config.model)(fitted, video)
            targets = make_targets(batch["label"], 6, config.optim.label_smoothing)
            return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

        wanted = float(loss(params))
        state, metrics = step(state, batch, bucket)
        assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-5)
    assert set(step.traces.values()) == {1} and len(step.traces) == 1  # one frame count
    assert set(step.stem.traces.values()) == {1} and len(step.stem.traces) == 3


def test_a_run_trains_and_is_loaded(tiny_config, tmp_path):
    from stretchysnake_jax.train import train

    tiny_config.model = dataclasses.replace(tiny_config.model, blocks="attention", heads=2)
    tiny_config.train = dataclasses.replace(tiny_config.train, steps=2)
    assert train(tiny_config, tmp_path / "run") == 0
    model = stretchysnake_jax.load(tmp_path / "run")
    assert model.config.blocks == "attention" and "attn" in model.params["layers"]
    assert model.logits(np.zeros((2, 2, 24, 24, 3), np.uint8)).shape == (2, 6)


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention") / "report.json"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    paths = os.pathsep.join(sys.path)
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, path], env=env, check=True)
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_mesh_gives_the_losses_of_one_device(on_meshes):
    assert set(on_meshes) == {"one", *map(str, MESHES)}
    for shape in MESHES:  # 19 tokens: no sequence axis divides them
        assert on_meshes[str(shape)] == pytest.approx(on_meshes["one"], rel=1e-5), shape


MESHES = [(4, 2, 1), (2, 1, 4)]  # (data, fsdp, sequence)


def test_files_of_our_own_hold_it_and_pytorch_layout_refuses_it(tmp_path):
    params, _ = draw(MODEL)
    convert.save(tmp_path / "a.npz", MODEL, params)
    config, loaded = convert.load(tmp_path / "a.npz")
    assert config == MODEL
    for name, array in leaves(loaded).items():
        np.testing.assert_array_equal(array, leaves(params)[name])
    state = convert.to_state_dict(MODEL, params)
    assert state["layers.1.attn.qkv.weight"].shape == (48, 16)
    again = leaves(torch_layout.to_params(MODEL, state))
    for name, array in leaves(params).items():
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(ConfigError, match="model.blocks is 'attention': PyTorch's VideoMamba has"):
        convert.save_torch(tmp_path / "a.pth", MODEL, params)
    assert not (tmp_path / "a.pth").exists() and convert.preset_name(MODEL) is None
    with pytest.raises(ConfigError, match="model.heads is 3"):
        validation.validate_model(dataclasses.replace(MODEL, heads=3))


# `stretchysnake bench step --scaling --blocks mamba,attention`.


def scaling_case(frames=8):
    model = preset("tiny", depth=3)
    train = TrainConfig(steps=1)
    config = Config(model=model, data=DataConfig(train="-", batch_size=1), train=train)
    return Case(config, make_bucket("vanilla", frames, (224, 224), model), 1)


def test_scaling_leaves_attention_out_where_it_takes_too_much():
    said, both = [], ["mamba", "attention"]
    case = scaling_case(16)  # 3,137 tokens
    names = [OURS, step_scaling.ATTENTION]
    assert step_scaling.scaling_names(case, both, said.append) == names and not said
    assert step_scaling.scaling_names(scaling_case(32), both, said.append) == [OURS]
    assert "6,273 tokens would take about 8.5 GB, 6 are allowed" in said[0]
    assert step_scaling.case_of(OURS, case) is case
    twin = step_scaling.case_of(step_scaling.ATTENTION, case).config.model
    assert (twin.blocks, twin.depth, twin.num_heads) == ("attention", 2, 3)
    assert step_bench.step_flops(step_scaling.case_of(step_scaling.ATTENTION, case)) == (
        pytest.approx(6 * flops.count(twin, case.bucket)["full"])
    )


def test_both_kinds_of_blocks_are_fitted_apart(tmp_path):
    def row(name, n, power):
        value = float(n) ** power
        known = {"min_ms": value, "cpu_ms": value, "peak": 1e6 * n, "temporaries": value}
        return {"name": name, "tokens": n, **known}

    tokens = [200 * 2**k for k in range(6)]
    rows = [row(name, n, power) for n in tokens for name, power in ((OURS, 1), ("other", 2))]
    fits = step_scaling.exponents(rows)
    slopes = {(f["name"], f["of"]): f["exponent"] for f in fits if f["from"] == 200}
    assert slopes[OURS, "XLA temp"] == pytest.approx(1) and slopes["other", "time"] == (
        pytest.approx(2)
    )
    step_scaling.plot(tmp_path / "a.png", rows, fits, "a")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--scaling --blocks conv", "--blocks is 'conv': it takes: mamba, attention"),
        ("--blocks attention", "--blocks goes with --scaling"),
    ],
)
def test_bad_blocks_are_refused_in_one_sentence(words, message, capsys):
    from stretchysnake_jax import cli

    try:
        assert cli.main(["bench", "step", *words.split()]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    report = {"one": train_steps(make_config())}
    for shape in MESHES:
        report[str(shape)] = train_steps(make_config(), sharding.make_mesh(MeshConfig(*shape)))
    with open(sys.argv[1], "w") as file:
        json.dump(report, file)
