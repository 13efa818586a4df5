"""The Python API: load, logits, features, stretch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stretchysnake_jax
from stretchysnake_jax import convert, models
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import decode, lists, pipeline

GOLDENS = pathlib.Path(__file__).parent / "goldens"
PTH = GOLDENS / "video_micro_nonsquare_grads.pth"


@pytest.fixture(scope="module")
def golden():
    return stretchysnake_jax.load(PTH), np.load(GOLDENS / "video_micro_nonsquare_grads.npz")


def test_a_pytorch_file_gives_the_numbers_of_the_original(golden):
    model, arrays = golden
    video = arrays["input"].transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(model.logits(video), arrays["logits64"], atol=2e-5)
    np.testing.assert_allclose(model.features(video), arrays["features64"], atol=2e-5)
    chances = model.predict(video)
    np.testing.assert_allclose(chances.sum(-1), 1, atol=1e-6)
    assert (chances.argmax(-1) == arrays["logits64"].argmax(-1)).all()


def test_uint8_is_normalised_inside(golden):
    model, _ = golden
    video = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 48, 3), np.uint8)
    given = models.normalise(jnp.asarray(video), "imagenet")
    np.testing.assert_allclose(model.logits(video), model.logits(given), atol=1e-6)
    np.testing.assert_allclose(model.logits(video), model.logits(jnp.asarray(video)), atol=0)


def test_all_kinds_of_files_give_the_same(golden, trained, tmp_path):
    model, _ = golden
    video = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 48, 3), np.uint8)
    convert.save(tmp_path / "x.npz", model.config, model.params)
    loaded = stretchysnake_jax.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(loaded.logits(video), model.logits(video))
    run = stretchysnake_jax.load(trained)
    assert run.classes == list("012345") and run.methods.variant == "static_tokens"
    assert run.logits(np.zeros((2, 2, 8, 8, 3), np.uint8)).shape == (2, 6)


def test_weights_follow_the_shape_of_the_video(golden, trained):
    model, _ = golden  # vanilla: the patch stays, the grid changes
    assert str(model.bucket_of((1, 5, 64, 48, 3))) == "5x64x48/16"
    assert model.logits(np.zeros((1, 5, 64, 48, 3), np.float32)).shape == (1, 7)
    run = stretchysnake_jax.load(trained)  # static_tokens: the patch changes, the grid stays
    assert str(run.bucket_of((1, 1, 24, 8, 3))) == "1x24x8/6x2"
    other = stretchysnake_jax.load(trained, variant="vanilla")
    assert str(other.bucket_of((1, 1, 24, 8, 3))) == "1x24x8/4"


def test_stretch_pins_a_scale_and_starts_from_the_base_each_time(golden):
    model, _ = golden
    video = np.random.default_rng(1).normal(size=(1, 4, 40, 60, 3)).astype(np.float32)
    wide = model.stretch(frames=4, size=(40, 60), patch=20, method="pi")
    again = model.stretch(frames=9, size=96, patch=8).stretch(
        frames=4, size=(40, 60), patch=(20, 20), method="pi"
    )
    np.testing.assert_array_equal(wide.logits(video), again.logits(video))
    assert wide.fitted_params["patch_embed"]["kernel"].shape == (1, 20, 20, 3, 48)
    assert wide.fitted_params["pos_embed"]["grid"].shape == (2, 3, 48)
    apply = jax.jit(models.make_apply(model.config))
    np.testing.assert_allclose(wide.logits(video), apply(wide.fitted_params, video), atol=1e-6)
    mixed = model.stretch(frames=4, size=(40, 60), patch=20, method={"kernel": "pi"})
    assert (mixed.methods.kernel_method, mixed.methods.spatial_method) == ("pi", "paper")
    with pytest.raises(
        ConfigError, match="4 frames of 32x48 pixels but the model is stretched to 4"
    ):
        wide.logits(np.zeros((1, 4, 32, 48, 3), np.float32))


@pytest.mark.parametrize("frames, size, patch", [(5, (48, 80), 16), (3, (40, 60), 20), (8, 28, 7)])
def test_paper_mode_equals_pytorch(golden, frames, size, patch):
    """A model whose weights PyTorch resized, against ours stretched: the logits agree."""
    torch = pytest.importorskip("torch")
    resize = torch.nn.functional.interpolate
    model, _ = golden
    size = (size, size) if isinstance(size, int) else size
    grid = (size[0] // patch, size[1] // patch)
    params = jax.tree.map(np.array, model.params)

    def as_image(x, order):
        return torch.tensor(np.ascontiguousarray(x.transpose(order)))

    kernel = as_image(params["patch_embed"]["kernel"][0], (3, 2, 0, 1))  # (C, 3, p, p)
    if patch != 16:
        kernel = resize(kernel, (patch, patch), mode="bicubic", antialias=True)
    params["patch_embed"]["kernel"] = kernel.numpy().transpose(2, 3, 1, 0)[None]
    table = as_image(params["pos_embed"]["grid"], (2, 0, 1))[None]
    table = resize(table, grid, mode="bicubic", align_corners=False)
    params["pos_embed"]["grid"] = table[0].numpy().transpose(1, 2, 0)
    table = as_image(params["temporal_pos_embed"], (1, 0))[None]
    table = resize(table, frames, mode="linear", align_corners=False)
    params["temporal_pos_embed"] = table[0].numpy().T
    video = np.random.default_rng(2).normal(size=(2, frames, *size, 3)).astype(np.float32)
    wanted = jax.jit(models.make_apply(model.config))(params, video)
    stretched = model.stretch(frames=frames, size=size, patch=patch, method="paper")
    np.testing.assert_allclose(stretched.logits(video), wanted, atol=1e-5)
    assert np.abs(wanted - wanted[0, 0]).max() > 1e-2


@pytest.mark.parametrize(
    "video, words",
    [
        (np.zeros((3, 32, 48, 3), np.uint8), "it takes (batch, frames, height, width, 3)"),
        (np.zeros((1, 3, 32, 48, 4), np.uint8), "has shape (1, 3, 32, 48, 4)"),
        (np.zeros((1, 3, 32, 48, 3), np.int32), "dtype int32: it takes uint8"),
        (np.zeros((1, 3, 8, 48, 3), np.uint8), "holds no patch of 16x16"),
        (np.zeros((0, 3, 32, 48, 3), np.uint8), "has shape (0, 3"),
    ],
)
def test_wrong_videos_are_refused(golden, video, words):
    with pytest.raises(ConfigError) as error:
        golden[0].logits(video)
    assert words in str(error.value)


def test_a_clip_is_read_as_the_run_reads_its_own(trained, video_folder):
    run = stretchysnake_jax.load(trained)
    video = run.read(video_folder / "a.mp4")  # 64x48: the nearest trained size is 24
    assert video.shape == (1, 2, 24, 24, 3) and video.dtype == np.uint8
    # Even frames, grey level 12 per frame: 2 of 20, spread evenly.
    batch = next(
        pipeline.eval_batches(run.run.data, *one(video_folder, run.bucket_of(video.shape)))
    )
    np.testing.assert_array_equal(video, batch["video"])
    assert run.read(video_folder / "a.mp4", frames=5, size=(8, 16)).shape == (1, 5, 8, 16, 3)
    pinned = run.stretch(frames=3, size=16)
    assert pinned.features(pinned.read(str(video_folder / "c d.mp4"))).shape == (1, 16)
    with pytest.raises(ConfigError, match="stretched to 3x16x16/4: it reads that scale alone"):
        pinned.read(video_folder / "a.mp4", frames=4)
    with pytest.raises(decode.UnreadableVideo, match="gone.mp4"):
        run.read("gone.mp4")


def one(folder, bucket):
    """Arguments of `eval_batches` for a.mp4 alone."""
    return lists.read_list(folder / "clips.txt").select([0]), bucket, 1


def test_the_likeliest_classes_of_a_clip(trained, golden, video_folder):
    run, path = stretchysnake_jax.load(trained), video_folder / "g.mp4"
    found = run.top(path, 3)
    chances = np.asarray(run.predict(run.read(path))[0])
    assert [name for name, _ in found] == [str(i) for i in np.argsort(-chances)[:3]]
    assert [chance for _, chance in found] == pytest.approx(sorted(chances)[::-1][:3])
    assert len(golden[0].stretch(frames=2, size=32).top(path, 99)) == 7  # no names: numbers


def test_wrong_paths_and_names_are_refused(golden, tmp_path):
    model, _ = golden
    with pytest.raises(ConfigError, match="nothing at .*it takes a workdir, a .pth or a .npz"):
        stretchysnake_jax.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no configuration at .* is it the workdir of a run"):
        stretchysnake_jax.load(tmp_path)
    with pytest.raises(ConfigError, match="variant is 'snake': .*it takes: vanilla"):
        stretchysnake_jax.load(PTH, variant="snake")
    with pytest.raises(ConfigError, match="method is 'bicubic': .*paper"):
        model.stretch(method="bicubic")
    with pytest.raises(ConfigError, match="the key 'kernal': did you mean 'kernel'"):
        model.stretch(method={"kernal": "pi"})


def test_importing_the_library_changes_nothing_in_the_process():
    import subprocess
    import sys

    code = (
        "import os; before = os.environ.get('XLA_FLAGS'); import stretchysnake_jax, jax, "
        "stretchysnake_jax.model, stretchysnake_jax.train; from jax._src import xla_bridge; "
        "assert os.environ.get('XLA_FLAGS') == before; "
        "assert not xla_bridge.backends_are_initialized(); "
        "assert callable(stretchysnake_jax.configure_cpu)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
