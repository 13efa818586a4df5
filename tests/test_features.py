"""Features of clips, frames and tokens: against the Python model, files, maps, the command."""

import dataclasses

import cv2
import numpy as np
import pytest

from stretchysnake_jax import cli, features, model
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data import pipeline
from stretchysnake_jax.data.decode import UnreadableVideo
from stretchysnake_jax.data.lists import read_list
from stretchysnake_jax.embed import embed, make_forward


@pytest.fixture(scope="module")
def loaded(trained):
    """A model, and the scale it is asked at: three frames of 16x24 pixels, 4x4 patches of 4x6."""
    found = model.load(trained)
    return found, found.stretch(frames=3, size=(16, 24)).bucket


def with_views(loaded):
    """The same model, whose run samples several views of a clip."""
    data = dataclasses.replace(loaded.run.data, sampling="dense", resize="crop", stride=2)
    return dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, data=data))


def read(loaded, clips, bucket, what, **settings):
    """(indices, features) of `features.stream`."""
    ids, values = zip(*features.stream(loaded, clips, bucket, what, 4, **settings), strict=True)
    return list(ids), np.stack(values)


def test_features_are_the_models_own(loaded, clips):
    """Against `Model.features` of the same videos; a list's features come in its order."""
    loaded, bucket = loaded
    wanted = []
    with pipeline.eval_batches(loaded.run.data, clips, bucket, 1) as batches:
        for batch in batches:
            if batch["mask"][0]:
                wanted.append(np.asarray(loaded.features(batch["video"]))[0])
    seen = []
    found = embed(loaded, clips, bucket, batch_size=4, on_batch=seen.append)
    np.testing.assert_allclose(found.values, wanted, atol=2e-5)
    assert list(found.clips) == list(range(6)) and list(found.labels) == list(range(6))
    assert seen == [4, 7] and found.unreadable[0][0].endswith("broken.mp4")
    unreadable = {}
    ids, values = read(loaded, clips, bucket, "cls", unreadable=unreadable)
    np.testing.assert_allclose(values, wanted, atol=2e-5)
    assert values.dtype == np.float32 and ids == list(range(6))
    assert list(unreadable.items()) == found.unreadable


def test_tokens_frames_and_clips_agree(loaded, clips):
    loaded, bucket = loaded
    clips = clips.select(range(6))
    tokens = read(loaded, clips, bucket, "token")[1]
    assert tokens.shape == (6, 3, 4, 4, 16)
    frames = read(loaded, clips, bucket, "frame")[1]
    np.testing.assert_allclose(frames, tokens.mean((2, 3)), atol=1e-6)
    mean = read(loaded, clips, bucket, "mean")[1]
    # The mean over all 49 tokens, of which the first is the class token.
    with pipeline.eval_batches(loaded.run.data, clips, bucket, 6) as batches:
        whole = loaded._run(next(batches)["video"], "tokens")
    np.testing.assert_allclose(tokens.reshape(6, 48, 16), whole[:, 1:], atol=2e-5)
    np.testing.assert_allclose(mean, np.mean(whole, 1), atol=2e-5)
    np.testing.assert_allclose(embed(loaded, clips, bucket, "mean").values, mean, atol=1e-6)


def test_a_mean_pooled_models_own_feature_is_pooled_before_the_norm(loaded, clips):
    loaded, bucket = loaded
    one = clips.select([0])
    assert loaded.config.pooling == "mean"
    assert not np.allclose(
        embed(loaded, one, bucket, "cls").values, embed(loaded, one, bucket, "mean").values
    )
    with pytest.raises(ConfigError, match="the pooling is 'max'"):
        embed(loaded, one, bucket, "max")


def test_the_same_model_is_compiled_once(loaded):
    from stretchysnake_jax.embed import _make_step

    loaded, bucket = loaded
    make_forward(loaded, bucket, "token")
    before = _make_step.cache_info().misses
    make_forward(dataclasses.replace(loaded, classes=None), bucket, "frame")
    assert _make_step.cache_info().misses == before
    other = loaded.stretch(method="bilinear")
    make_forward(other, bucket, "frame")
    assert _make_step.cache_info().misses == before + 1


def test_views_of_a_clip_are_averaged_those_of_frames_kept(loaded, clips):
    loaded, bucket = loaded
    loaded, clips = with_views(loaded), clips.select(range(6))
    views = {"views": (2, 2)}
    frames = read(loaded, clips, bucket, "frame", **views)[1]
    assert frames.shape == (6, 4, 3, 16) and np.isfinite(frames).all()
    own = embed(loaded, clips, bucket, views=(2, 2), batch_size=3).values
    np.testing.assert_allclose(read(loaded, clips, bucket, "cls", **views)[1], own, atol=1e-6)
    # The first view in time is where a single one of one crop isn't.
    assert not np.allclose(frames[:, 0], frames[:, 2])


def test_a_view_that_cannot_be_read_is_nan(loaded, clips, monkeypatch):
    loaded, bucket = loaded
    loaded, read_eval = with_views(loaded), pipeline.LoadBatch._read_eval

    def damaged(self, clip, bucket, rows):
        if clip == 1 and rows[0] % 2 == 0:
            raise UnreadableVideo(self.clips.paths[1], "the first half is damaged")
        return read_eval(self, clip, bucket, rows)

    monkeypatch.setattr(pipeline.LoadBatch, "_read_eval", damaged)
    ids, frames = read(loaded, clips.select(range(3)), bucket, "frame", views=(2, 1))
    assert ids == [0, 1, 2]
    assert np.isnan(frames[1, 0]).all() and np.isnan(frames).sum() == frames[1, 0].size
    clip = read(loaded, clips.select(range(3)), bucket, "cls", views=(2, 1))[1]
    assert np.isfinite(clip).all()


def test_an_image_model_takes_one_frame(loaded, clips):
    loaded, bucket = loaded
    image = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, frames=None))
    with pytest.raises(ConfigError, match="takes 1 frame, the clips would have 3"):
        embed(image, clips, bucket)


def test_nothing_that_can_be_read_is_an_error(loaded, clips):
    with pytest.raises(pipeline.TooManyUnreadable, match="no clip could be read; .*broken.mp4"):
        list(features.stream(*loaded[:1], clips.select([6]), loaded[1], "cls"))


@pytest.mark.parametrize("suffix", features.SUFFIXES)
@pytest.mark.parametrize("windows", [False, True])
def test_files_hold_what_was_written(clips, tmp_path, suffix, windows):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2, 4)).astype(np.float32)
    if windows:
        clips = dataclasses.replace(clips, windows=np.array([[i, np.inf] for i in range(7)]))
    path, about = tmp_path / f"f{suffix}", {"what": "frame", "frames": 2}
    shape = features.write(path, zip((0, 2, 5), values, strict=True), clips, about)
    assert shape == (3, 2, 4) and [p.name for p in tmp_path.iterdir()] == [path.name]
    found = features.read(path)
    np.testing.assert_array_equal(found.values, values)
    assert found.values.dtype == np.float32 and found.labels.tolist() == [0, 2, 5]
    assert found.paths == [clips.paths[i] for i in (0, 2, 5)]
    assert found.classes == clips.classes and found.about == about
    if windows:
        np.testing.assert_array_equal(found.windows, clips.windows[[0, 2, 5]])
    else:
        assert found.windows is None


@pytest.mark.parametrize("suffix", features.SUFFIXES)
def test_a_file_is_there_as_a_whole_or_not_at_all(clips, tmp_path, suffix):
    def rows():
        yield 0, np.zeros(4, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features.write(tmp_path / f"f{suffix}", rows(), clips, {})
    assert not list(tmp_path.iterdir())
    bad = tmp_path / f"bad{suffix}"
    with pytest.raises(ConfigError, match="there is no file"):
        features.read(bad)
    bad.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="is no file of 'stretchysnake features'"):
        features.read(bad)


def test_token_maps_show_the_principal_components():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2000, 3)) * (9, 3, 1)
    axes = np.linalg.qr(rng.normal(size=(8, 3)))[0].T
    tokens = (scores @ axes + 5).reshape(2, 10, 10, 10, 8)
    maps, shares = features.token_maps(tokens)
    assert maps.shape == (2, 10, 10, 10, 3) and maps.dtype == np.uint8
    assert (maps.min((0, 1, 2, 3)) == 0).all() and (maps.max((0, 1, 2, 3)) == 255).all()
    wanted = np.linalg.svd(tokens.reshape(-1, 8) - tokens.mean((0, 1, 2, 3)), full_matrices=False)
    np.testing.assert_allclose(shares, (wanted[1] ** 2 / (wanted[1] ** 2).sum())[:3], atol=1e-9)
    for colour in range(3):
        seen = maps[..., colour].ravel()
        inside = (seen > 0) & (seen < 255)
        score = wanted[0][:, colour] * np.sign(wanted[2][colour][abs(wanted[2][colour]).argmax()])
        assert np.corrcoef(seen[inside], score[inside])[0, 1] > 0.9999
    flat, shares = features.token_maps(np.ones((1, 1, 2, 2, 4)))
    assert flat.shape == (1, 1, 2, 2, 3) and np.isfinite(shares).all()


def test_the_command(trained, clips, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("".join(f"{p},{i}\n" for i, p in enumerate(clips.paths)))
    argv = ["features", "--workdir", str(trained), "--list", str(tmp_path / "list.txt")]
    argv += ["--allow-absolute", "--frames", "3", "--size", "16x24", "--batch-size", "4"]
    out = tmp_path / "tokens.arrayrecord"
    assert cli.main([*argv, "--per", "token", "--out", str(out), "--maps", "3"]) == 0
    text, err = capsys.readouterr()
    assert "float32 (6, 3, 4, 4, 16) (clips, steps, rows, columns, dim) at 3x16x24/4x6" in text
    assert "unreadable, left out" in err and "broken.mp4" in err
    tokens = features.read(out)
    assert tokens.about["what"] == "token" and tokens.about["patch"] == [4, 6]
    picture = cv2.imread(str(tmp_path / "tokens_maps.png"))
    assert picture.std() > 20 and "token maps of 2 clips" in text  # the third can't be read
    out = tmp_path / "frames.npz"
    assert cli.main([*argv, "--per", "frame", "--out", str(out)]) == 0
    frames = features.read(out)
    np.testing.assert_allclose(frames.values, tokens.values.mean((2, 3)), atol=1e-6)
    assert frames.paths == clips.paths[:6] == tokens.paths
    assert cli.main(["features", "--workdir", str(trained), "--split", "val"]) == 0
    found = features.read(trained / "features.npz")
    bucket = model.load(trained).stretch().bucket
    given = read_list(model.load(trained).run.data.val)
    wanted = embed(model.load(trained), given, bucket).values
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    assert found.about["views"] == [1, 1] and found.about["frames"] == 2
    (trained / "features.npz").unlink()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--frames", "2,3"], "--frames names 2 values"),
        (["--size", "7"], "gives static_tokens no grid"),
        (["--split", "test"], "the run has no test list"),
        (["--list", "nowhere.txt"], "nowhere.txt"),
        (["--out", "f.csv"], "--out is 'f.csv': it takes a file in .npz or .arrayrecord"),
        (["--out", "nowhere/f.npz"], "there is no folder nowhere"),
        (["--per", "token", "--pooling", "mean"], "--pooling is mean but --per is token"),
        (["--crops", "0"], "--crops is 0: it takes a number >= 1"),
        (["--maps", "-1"], "--maps is -1"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_wrong_arguments_give_one_sentence(trained, argv, words, capsys):
    before = sorted(p.name for p in trained.iterdir())
    assert cli.main(["features", "--workdir", str(trained), *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(p.name for p in trained.iterdir()) == before
