"""Conversion: every published layout, every key accounted for, there and back, and the command."""

import json
import logging
import pathlib

import jax
import numpy as np
import pytest

from stretchysnake_jax import cli, convert, model, models, torch_file, torch_layout
from stretchysnake_jax.config import ConfigError, ModelConfig, StretchConfig
from stretchysnake_jax.convert import CheckpointError, from_state_dict, load_videomamba

GOLDENS = pathlib.Path(__file__).parent / "goldens"
LAYOUTS = ["flat", "module_ddp_prefix", "full_training", "bf16"]
SIZE = (32, 48)  # of the layouts: a grid of 2 x 3 patches
MICRO = ModelConfig(dim=48, depth=2, frames=3, size=SIZE, num_classes=7)


def micro_state() -> dict:
    """The flat state dict of the goldens."""
    return dict(torch_file.read(GOLDENS / "ckpt_layout_flat.pth"))


def zeros(name: str) -> dict:
    """A state dict of the names and shapes of a full-size model."""
    shapes = json.loads((GOLDENS / name).read_text())
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def assert_equal(ours, theirs):
    ours, theirs = torch_layout.flatten(ours), torch_layout.flatten(theirs)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.fixture
def micro_params():
    return from_state_dict(micro_state(), size=SIZE)[1]


# Layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout, micro_params):
    config, params = load_videomamba(GOLDENS / f"ckpt_layout_{layout}.pth", size=SIZE)
    assert config == MICRO
    if layout == "bf16":
        micro_params = jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), micro_params)
    assert_equal(params, micro_params)


def test_tensors_lie_where_the_encoder_wants_them(micro_params):
    state, mixer = micro_state(), micro_params["layers"]["mixer"]
    forward, backward = mixer["forward"], mixer["backward"]
    pairs = [
        (micro_params["cls_token"], state["cls_token"][0, 0]),
        (micro_params["pos_embed"]["cls"], state["pos_embed"][0, 0]),
        (micro_params["pos_embed"]["grid"][1, 2], state["pos_embed"][0, 6]),
        (micro_params["temporal_pos_embed"], state["temporal_pos_embedding"][0]),
        (
            micro_params["patch_embed"]["kernel"][0, 3, 5, 1],
            state["patch_embed.proj.weight"][:, 1, 0, 3, 5],
        ),
        (micro_params["head"]["kernel"], state["head.weight"].T),
        (micro_params["norm"]["scale"], state["norm_f.weight"]),
        (micro_params["layers"]["norm"]["scale"][1], state["layers.1.norm.weight"]),
        (mixer["in_proj"]["kernel"][1], state["layers.1.mixer.in_proj.weight"].T),
        (forward["conv"]["kernel"][1, -1], state["layers.1.mixer.conv1d.weight"][:, 0, 3]),
        (backward["conv"]["bias"][0], state["layers.0.mixer.conv1d_b.bias"]),
        (backward["A_log"][1], state["layers.1.mixer.A_b_log"]),
        (backward["D"][1], state["layers.1.mixer.D_b"]),
        (forward["dt_proj"]["kernel"][0], state["layers.0.mixer.dt_proj.weight"].T),
        (backward["x_proj"]["kernel"][0], state["layers.0.mixer.x_proj_b.weight"].T),
    ]
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", [path.name for path in sorted(GOLDENS.glob("*.pth"))])
def test_round_trip_gives_the_same_state_dict(name, tmp_path):
    tree = torch_file.read(GOLDENS / name)
    state = tree.get("model", tree.get("module", tree))
    size = None if name.startswith("inflate") else SIZE
    config, params = load_videomamba(GOLDENS / name, size=size)
    convert.save_torch(tmp_path / "x.pth", config, params)
    again = torch_file.read(tmp_path / "x.pth")
    assert list(again) == [key.removeprefix("module.") for key in state]
    for key, array in zip(again, state.values(), strict=True):
        np.testing.assert_array_equal(again[key], array.astype(np.float32), err_msg=key)
    assert_equal(load_videomamba(tmp_path / "x.pth", size=size)[1], params)


def test_torch_loads_the_written_file_with_weights_only(tmp_path, micro_params):
    torch = pytest.importorskip("torch")
    convert.save_torch(tmp_path / "x.pth", MICRO, micro_params)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    expected = torch.load(GOLDENS / "ckpt_layout_flat.pth")
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "name, expected, count",
    [
        ("keys_video_tiny_nc400_t8.json", models.preset("tiny"), "video nc=400 T=8"),
        (
            "keys_image_tiny.json",
            models.preset("tiny", frames=None, num_classes=1000),
            "image nc=1000",
        ),
    ],
)
def test_published_sizes_are_inferred(name, expected, count):
    state = zeros(name)
    config, params, report = from_state_dict(state)
    assert config == expected and not report.ignored
    counts = json.loads((GOLDENS / "param_counts.json").read_text())
    assert models.count(params) == counts["tiny"][count]
    back = convert.to_state_dict(config, params)
    assert [(k, v.shape) for k, v in back.items()] == [(k, v.shape) for k, v in state.items()]


@pytest.mark.parametrize(
    "config",
    [
        MICRO,
        ModelConfig(dim=32, depth=1, frames=None, size=(16, 16)),
        ModelConfig(
            dim=24,
            depth=3,
            state=8,
            expand=3,
            conv_width=3,
            dt_rank=5,
            patch=(8, 4),
            tubelet=2,
            frames=6,
            size=(24, 12),
            num_classes=5,
        ),
    ],
    ids=["micro", "image", "odd"],
)
def test_sizes_round_trip_and_are_those_of_the_encoder(config):
    shapes = jax.eval_shape(lambda key: models.init(config, key)[1], jax.random.key(0))
    expected = convert.param_shapes(config)
    assert jax.tree.map(lambda x: x.shape, shapes) == expected
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    again, back, report = from_state_dict(convert.to_state_dict(config, params), size=config.size)
    assert again == config and not report.ignored
    assert_equal(back, params)


def test_the_moving_average_is_taken_on_demand(caplog):
    path = GOLDENS / "ckpt_layout_full_training.pth"
    with caplog.at_level(logging.WARNING):
        load_videomamba(path, size=SIZE)
    assert "model_ema is a moving average" in caplog.text and "optimizer" in caplog.text
    average = torch_file.read(path)["model_ema"]
    params = load_videomamba(path, size=SIZE, ema=True)[1]
    np.testing.assert_array_equal(params["norm"]["scale"], average["norm_f.weight"])
    with pytest.raises(CheckpointError, match="no moving average"):
        load_videomamba(GOLDENS / "ckpt_layout_flat.pth", size=SIZE, ema=True)


# Inflation


@pytest.mark.parametrize("tubelet", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ["center", "mean"])
def test_inflation_of_the_kernel(tubelet, how):
    golden = np.load(GOLDENS / "inflate.npz")
    kernel = golden["w2d"].transpose(2, 3, 1, 0)[None]
    inflated = torch_layout.inflate_kernel(kernel, tubelet, how)
    expected = golden[f"t{tubelet}_{how}"].transpose(2, 3, 4, 1, 0)
    np.testing.assert_allclose(inflated, expected, rtol=0, atol=1e-7)


def test_an_image_checkpoint_inflates_to_video():
    path = GOLDENS / "inflate_image_ckpt.pth"
    config, image = load_videomamba(path)
    assert config.frames is None and "temporal_pos_embed" not in image
    config, params = load_videomamba(path, frames=4, tubelet=2)
    assert (config.frames, config.tubelet) == (4, 2)
    after = torch_file.read(GOLDENS / "inflate_video_after.pth")
    state = convert.to_state_dict(config, params)
    assert list(state) == list(after)
    # The original drops the head and leaves the temporal table alone; ours: the image's, zeros.
    assert not state.pop("temporal_pos_embedding").any()
    for key in state.keys() - {"head.weight", "head.bias"}:
        np.testing.assert_array_equal(state[key], after[key], err_msg=key)
    assert_equal({"head": params["head"]}, {"head": image["head"]})


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("inflate_image_ckpt", dict(frames=5, tubelet=2), "multiple of model.tubelet"),
        ("inflate_image_ckpt", dict(tubelet=2), "give --frames too"),
        ("inflate_image_ckpt", dict(frames=4, inflate="first"), "center or mean"),
        ("inflate_video_after", dict(frames=8), "a video model of 4 frames"),
        ("inflate_video_after", dict(tubelet=1), "tubelet 2"),
    ],
)
def test_options_that_do_not_go_with_the_file(name, options, message):
    with pytest.raises(ConfigError, match=message):
        load_videomamba(GOLDENS / f"{name}.pth", **options)


# Our own file


def test_our_file_round_trips(tmp_path, micro_params):
    config = ModelConfig(**{**vars(MICRO), "pooling": "mean", "dt_rank": 3})
    convert.save(tmp_path / "x.npz", config, jax.tree.map(jax.numpy.asarray, micro_params))
    again, params = convert.load(tmp_path / "x.npz")
    assert again == config
    assert_equal(params, micro_params)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("save", [convert.save, convert.save_torch])
def test_params_of_another_model_are_not_saved(save, tmp_path, micro_params):
    del micro_params["norm"]
    micro_params["extra"] = np.ones(2)
    micro_params["cls_token"] = np.ones(3)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "x.pth", MICRO, micro_params)
    for text in ("norm.scale is missing", "extra is unused", "cls_token is (3,), not (48,)"):
        assert text in str(error.value)
    assert not list(tmp_path.iterdir())


def test_other_npz_files_are_refused(tmp_path, micro_params):
    path = tmp_path / "x.npz"
    with pytest.raises(CheckpointError, match="no file"):
        convert.load(path)
    for content in ({"a": np.ones(2)}, {"config": np.array("{"), "a": np.ones(2)}):
        np.savez(path, **content)
        with pytest.raises(CheckpointError, match="no weight file of ours"):
            convert.load(path)
    np.savez(path, config=np.array({"a": 1}, dtype=object))
    with pytest.raises(CheckpointError, match="no weight file of ours"):
        convert.load(path)
    convert.save(path, MICRO, micro_params)
    raw = path.read_bytes()
    for cut in (0, 10, len(raw) // 2, len(raw) - 10):
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            convert.load(path)
    np.savez(path, config=np.load(GOLDENS / "inflate.npz")["w2d"])
    with pytest.raises(CheckpointError):
        convert.load(path)


# The command


def run(*words) -> int:
    return cli.main(["convert", *map(str, words)])


def test_the_command_there_and_back(tmp_path, capsys):
    ours, back, again = (tmp_path / name for name in ("x.npz", "x.pth", "y.pth"))
    source = GOLDENS / "ckpt_layout_full_training.pth"
    assert run(source, ours, "--size", "32,48") == 0
    out = capsys.readouterr().out
    for text in ("88,999 parameters", "dim 48, depth 2", "3 frames", "7 classes", "model_ema"):
        assert text in out
    assert run("--to-torch", ours, back) == 0
    assert run("--to-torch", source, again, "--size", "32x48") == 0
    state = micro_state()
    for path in (back, again):
        written = torch_file.read(path)
        assert list(written) == list(state)
        assert all(np.array_equal(written[key], state[key]) for key in state)


def test_the_command_takes_the_workdir_of_a_run(tmp_path, monkeypatch, micro_params, capsys):
    trained = model.Model(MICRO, micro_params, StretchConfig(), step=7)
    monkeypatch.setattr(model, "load", lambda path: trained)
    (tmp_path / "run").mkdir()
    assert run("--to-torch", tmp_path / "run", tmp_path / "x.pth") == 0
    assert "step 7" in capsys.readouterr().out
    assert_equal(load_videomamba(tmp_path / "x.pth", size=SIZE)[1], micro_params)


def test_the_command_names_the_preset_and_inflates(tmp_path, capsys):
    torch_file.write(tmp_path / "x.pth", zeros("keys_image_tiny.json"))
    words = ("--frames", 8, "--inflate", "mean", "--num-classes", 400)
    assert run(tmp_path / "x.pth", tmp_path / "x.npz", *words) == 0
    out = capsys.readouterr().out
    assert "model: tiny, 7,033,744 parameters" in out and "head.weight" in out
    assert convert.load(tmp_path / "x.npz")[0] == models.preset("tiny")


@pytest.mark.parametrize(
    "source, target, words, message",
    [
        ("ckpt_layout_flat.pth", "x.pth", [], "--to-torch writes"),
        ("ckpt_layout_flat.pth", "x.npz", ["--to-torch"], ".pth or .pt"),
        ("ckpt_layout_flat.pth", "no/x.npz", ["--size", "32,48"], "no folder"),
        ("inflate.npz", "x.pth", ["--to-torch"], "no weight file of ours"),
        ("inflate.npz", "x.npz", ["--frames", "8"], "--frames is for a .pth source"),
        ("nothing.pth", "x.npz", [], "no file"),
        ("recipe.json", "x.npz", [], "PyTorch"),
    ],
)
def test_errors_are_one_sentence_and_leave_no_file(
    source, target, words, message, tmp_path, capsys
):
    assert run(GOLDENS / source, tmp_path / target, *words) != 0
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "x.npz"
    target.write_text("old")

    def fail(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(np, "savez", fail)
    assert run(GOLDENS / "inflate_video_after.pth", target) != 0
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_help_says_what_the_command_takes(capsys):
    with pytest.raises(SystemExit) as error:
        run("--help")
    assert error.value.code == 0
    out = capsys.readouterr().out
    for word in ("--to-torch", "--frames", "--inflate", "--size", "--num-classes", "--ema", ".npz"):
        assert word in out
