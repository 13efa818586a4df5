"""Export: programs that JAX alone runs, safetensors there and back, the card, and the push."""

import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from stretchysnake_jax import card, cli, convert, export, grid, model, torch_file, torch_layout
from stretchysnake_jax.config import ModelConfig, StretchConfig
from stretchysnake_jax.convert import CheckpointError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SIZE = (32, 48)  # of the goldens
TINY = ModelConfig(
    dim=16, depth=2, state=4, patch=(4, 4), size=(16, 16), frames=2, num_classes=5, normalise="clip"
)

# Runs a program of the folder it is in, knowing of it what export.json says.
ALONE = """
import sys
import jax
import jax.export
import numpy as np

folder, name = sys.argv[1:]
with open(f"{folder}/{name}", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
found = {}
for batch in (1, 3):
    out = program.call(np.load(f"{folder}/video.npy")[:batch])
    found |= {f"{key}{batch}": value for key, value in out.items()}
np.savez(f"{folder}/out.npz", **found)
ours = [name for name in sys.modules if name.partition(".")[0].startswith("stretchysnake")]
assert not ours and "flax" not in sys.modules, ours
"""


def draw(config):
    """Random parameters; drawing those of a fresh model would have to be compiled."""
    rng = np.random.default_rng(3)
    flat = torch_layout.flatten(convert.param_shapes(config))
    values = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in flat.items()}
    return torch_layout.nest(values)


@pytest.fixture(scope="module")
def tiny():
    """A model with random weights."""
    params = draw(TINY)
    classes = ["walk", "Ünter", 'a "b"', "d", "e"]
    methods = StretchConfig(variant="static_tokens", kernel_method="area", spatial_method="pi")
    return model.Model(TINY, params, methods, classes)


def run(*words) -> int:
    return cli.main(["export", *map(str, words)])


@pytest.fixture
def weights(tiny, tmp_path):
    """The path of a .npz of `tiny`; safetensors need not be installed."""
    convert.save(tmp_path / "tiny.npz", tiny.config, tiny.params)
    return tmp_path / "tiny.npz"


# Programs


def test_a_process_with_jax_alone_gives_the_same_numbers(weights, tmp_path):
    pytest.importorskip("flatbuffers")
    words = ["--workdir", weights, "--out", tmp_path, "--format", "stablehlo"]
    assert run(*words, "--buckets", "4x24,2x16x8") == 0
    about = json.loads((tmp_path / "export.json").read_text())
    assert [program["file"] for program in about["stablehlo"]] == [
        "4x24x24.jaxexport",
        "2x16x8.jaxexport",
    ]
    video = np.random.default_rng(0).integers(0, 256, (3, 4, 24, 24, 3), np.uint8)
    np.save(tmp_path / "video.npy", video)
    # Away from the sources, so that nothing but JAX can be imported by chance.
    subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path), "4x24x24.jaxexport"], check=True, cwd=tmp_path
    )
    out, ours = np.load(tmp_path / "out.npz"), model.load(weights)
    for name, values in (
        ("probabilities", ours.predict(video)),
        ("features", ours.features(video)),
    ):
        for batch in (1, 3):
            np.testing.assert_allclose(out[f"{name}{batch}"], values[:batch], rtol=0, atol=1e-6)
            assert out[f"{name}{batch}"].dtype == np.float32
    assert np.ptp(out["probabilities3"], axis=0).max() > 1e-3  # clips differ


def test_a_program_holds_no_kernels_and_no_places(tiny):
    pytest.importorskip("flatbuffers")
    bucket = tiny.stretch(frames=2, size=8).bucket
    exported = export.make_exported(tiny, bucket, ("cuda",))  # no GPU is here
    assert exported.platforms == ("cuda",)
    assert "stretchysnake" not in exported.mlir_module()
    data = bytes(exported.serialize())
    root = pathlib.Path(__file__).resolve().parent.parent
    assert str(root).encode() not in data and b".py" not in data
    assert jax.config.jax_traceback_in_locations_limit != 0  # as it was
    with pytest.raises(ValueError, match="cuda"):
        exported.call(np.zeros((1, *bucket.shape), np.uint8))


def test_interpolation_methods_and_image_models_are_kept(tiny):
    pytest.importorskip("flatbuffers")
    config = ModelConfig(dim=16, depth=1, state=4, frames=None, size=(32, 16), num_classes=3)
    image = model.Model(config, draw(config), StretchConfig("vanilla"))
    for given, shape in ((tiny, (1, 2, 24, 32, 3)), (image, (2, 1, 48, 32, 3))):
        bucket = given.stretch(frames=shape[1], size=shape[2:4]).bucket
        video = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        out = export.make_exported(given, bucket, ("cpu",)).call(video)
        np.testing.assert_allclose(out["probabilities"], given.predict(video), rtol=0, atol=1e-6)


# Safetensors


def save_tiny(tiny, path):
    convert.save_safetensors(path, tiny.config, tiny.params, tiny.classes, tiny.methods)


def test_safetensors_hold_the_whole_model(tiny, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    save_tiny(tiny, path)
    again = model.load(path)
    assert (again.config, again.classes) == (tiny.config, tiny.classes)
    assert again.methods.variant == "static_tokens" and again.methods.spatial_method == "pi"
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, tiny.params))
    assert model.load(path, variant="vanilla").methods.variant == "vanilla"
    # The names and shapes are PyTorch's.
    state = convert.to_state_dict(tiny.config, tiny.params)
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(state)
        for name, array in state.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_convert_writes_and_reads_safetensors(tmp_path, capsys):
    pytest.importorskip("safetensors")
    source = GOLDENS / "ckpt_layout_flat.pth"
    ours, npz, back = (tmp_path / name for name in ("x.safetensors", "x.npz", "x.pth"))
    for words in ([source, ours, "--size", "32,48"], [ours, npz], ["--to-torch", ours, back]):
        assert cli.main(["convert", *map(str, words)]) == 0
    expected = convert.load_videomamba(source, size=SIZE)
    for config, params in (convert.load(npz), convert.load_videomamba(back, size=SIZE)):
        assert config == expected[0]
        assert jax.tree.all(jax.tree.map(np.array_equal, params, expected[1]))
    capsys.readouterr()
    assert cli.main(["convert", str(ours), str(npz), "--frames", "8"]) == 2
    assert "--frames is for a .pth source" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors_of_others_are_read_as_a_state_dict(dtype, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    state = dict(torch_file.read(GOLDENS / "ckpt_layout_flat.pth"))
    state = {f"module.{name}": np.ascontiguousarray(a).astype(dtype) for name, a in state.items()}
    path = tmp_path / "x.safetensors"
    numpy.save_file(state, path)
    config, params = convert.load_videomamba(path, size=SIZE)
    assert config.size == SIZE and config.num_classes == 7
    table = state["module.temporal_pos_embedding"][0].astype(np.float32)
    np.testing.assert_array_equal(params["temporal_pos_embed"], table)
    assert model.load(path).methods.variant == "vanilla"


def test_bad_safetensors_are_one_sentence(tiny, tmp_path, monkeypatch):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="there is no file"):
        convert.load_safetensors(path)
    save_tiny(tiny, path)
    raw = path.read_bytes()
    for cut in (0, 5, len(raw) // 2):
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError, match="no readable .safetensors file"):
            model.load(path)
    path.write_bytes(raw)
    state, metadata = convert.read_safetensors(path)
    del state["norm_f.weight"]
    numpy.save_file(state, path, metadata)
    with pytest.raises(CheckpointError, match="norm_f.weight is missing"):
        model.load(path)
    for bad in ("{", '{"dim": "x"}', '{"depths": 1}', "[]"):
        numpy.save_file(state, path, metadata | {"config": bad})
        with pytest.raises(CheckpointError, match="no weight file of ours"):
            model.load(path)
    numpy.save_file(state, path, metadata | {"stretch": '{"variant": "static"}'})
    with pytest.raises(CheckpointError, match="did you mean 'static_tokens'"):
        model.load(path)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ValueError, match=r"stretchysnake-jax\[export\]"):
        model.load(path)


# The card


def test_the_card_says_what_the_run_was_and_nothing_of_places(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "save_safetensors", lambda path, *_: path.write_bytes(b""))
    monkeypatch.setattr(export, "_check_target", lambda *_: None)
    rows = [
        {
            "frames": 2,
            "height": 16,
            "width": 24,
            "patch": "4x6",
            "top1": 0.5,
            "top5": 1.0,
            "gflops": 0.01234,
            "clips": 6,
            "methods": {},
            "trained": True,
        }
    ]
    (tmp_path / "run").symlink_to(trained)
    monkeypatch.setattr(grid, "read", lambda path: rows if path.name == "mine" else None)
    (trained / "mine.json").write_text("[]")
    words = ["--workdir", tmp_path / "run", "--format", "safetensors", "--grid", "mine"]
    try:
        assert run(*words, "--out", tmp_path / "out", "--license", "cc-by-4.0") == 0
    finally:
        (trained / "mine.json").unlink()
    text = (tmp_path / "out" / "README.md").read_text()
    front = text.split("---\n")[1].splitlines()
    assert "library_name: stretchysnake-jax" in front and "license: cc-by-4.0" in front
    assert front[-2:] == ["metrics:", "- accuracy"]
    for part in (
        "# tiny\n",
        "| variant | static_tokens |",
        "| checkpoint | step 24 |",
        "* train: the list clips.txt, 6 clips",
        "| length | 24 steps |",
        "| 2 | 16x24 | 4x6 | 50.0 | 100.0 | 0.0123 | yes |",
        "Over 6 clips.",
        'load("model.safetensors")',
        "The weights: cc-by-4.0.",
    ):
        assert part in text, part
    assert "* test" not in text and "jax.export" not in text
    assert str(tmp_path) not in text and str(trained.parent.parent) not in text
    config = model.load(trained).run
    assert str(pathlib.Path(config.data.train).parent) not in text


def test_the_card_of_bare_weights_and_of_data_that_are_gone(tiny, trained, monkeypatch):
    about = {"stablehlo": [], "safetensors": None}
    text = card.make(tiny, about)
    assert "## Data" not in text and "metrics" not in text and "## Load" not in text
    gone = model.load(trained)
    gone.run.data.train = "/somewhere/else/train.txt"
    text = card.make(gone, about, name="x")
    assert "* train: the list train.txt; not at hand when this card was made" in text
    assert "somewhere" not in text


# The push


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what it is asked."""
    calls = []

    class HfApi:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return f"hub://{repo_id}"

        def upload_folder(self, **options):
            if "refuse" in options["repo_id"]:
                raise RuntimeError("403\nForbidden")
            calls.append(("upload", options["repo_id"], options))

    fake = types.SimpleNamespace(HfApi=HfApi, get_token=lambda: "secret", calls=calls)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.fixture
def words(weights, tmp_path, monkeypatch):
    """Words of a command that writes no program."""
    monkeypatch.setattr(convert, "save_safetensors", lambda path, *_: path.write_bytes(b"x"))
    monkeypatch.setitem(export.PACKAGES, "safetensors", "json")
    return ["--workdir", weights, "--out", tmp_path / "out", "--format", "safetensors"]


def test_push_uploads_the_files_written_and_no_others(words, hub, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "private.txt").write_text("mine")
    assert run(*words, "--push", "me/snake", "--private") == 0
    create, upload = hub.calls
    assert create == ("create", "me/snake", {"private": True, "exist_ok": True})
    assert upload[2]["folder_path"] == str(tmp_path / "out")
    assert upload[2]["allow_patterns"] == ["model.safetensors", "export.json", "README.md"]
    out = capsys.readouterr().out
    assert "pushed to hub://me/snake" in out and "secret" not in out
    assert "# snake\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_push_that_is_refused_keeps_the_files(words, hub, tmp_path, capsys):
    assert run(*words, "--push", "me/refused") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: me/refused was not pushed") and "403 Forbidden" in error
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "break_hub, more, message",
    [
        (lambda hub: None, ["--push", "snake"], "it takes OWNER/NAME"),
        (lambda hub: setattr(hub, "get_token", lambda: None), ["--push", "me/snake"], "HF_TOKEN"),
        (
            lambda hub: sys.modules.__setitem__("huggingface_hub", None),
            ["--push", "me/snake"],
            "pip install 'stretchysnake-jax[hub]'",
        ),
        (lambda hub: None, ["--private"], "--private is for --push"),
    ],
)
def test_a_push_that_can_not_be_is_refused_first(
    break_hub, more, message, words, hub, tmp_path, capsys
):
    break_hub(hub)
    assert run(*words, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not hub.calls


# Bad input


@pytest.mark.parametrize(
    "more, message",
    [
        (["--format", "onnx"], "--format holds 'onnx': it takes stablehlo, safetensors"),
        (["--platforms", "gpu"], "--platforms holds 'gpu': it takes cpu, cuda"),
        (["--buckets", "8"], "--buckets holds '8': it takes FRAMESxSIZE"),
        (["--buckets", "2x16"], "--buckets is for --format stablehlo"),
        (["--license", "Apache 2"], "--license is 'Apache 2'"),
        (["--grid", "none"], "--grid is none, but there is no"),
        (["--workdir", "nothing"], "nothing at nothing"),
    ],
)
def test_bad_options(more, message, words, tmp_path, capsys):
    assert run(*words, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_destroyed(words, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    readme = tmp_path / "out" / "README.md"
    readme.write_text("# My project\n")
    assert run(*words) == 2
    assert "is no model card of this command" in capsys.readouterr().err
    assert readme.read_text() == "# My project\n"
    readme.unlink()
    assert run(*words) == 0 and run(*words) == 0  # over its own it writes
    monkeypatch.setitem(export.PACKAGES, "safetensors", "no_such_package")
    assert run(*words) == 2
    assert "pip install 'stretchysnake-jax[export]'" in capsys.readouterr().err
