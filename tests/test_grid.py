"""Evaluation grids: numbers against a plain computation, files, tables, pictures; predict."""

import csv
import json
import pathlib
import shutil
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VIDEOS

from stretchysnake_jax import (
    buckets,
    cli,
    evaluate,
    flops,
    grid,
    model,
    models,
    outputs,
    plots,
    predict,
)
from stretchysnake_jax import config as config_lib
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import ConfigError, StretchConfig
from stretchysnake_jax.data import pipeline
from stretchysnake_jax.data.lists import ClipList, read_list
from stretchysnake_jax.step import EvalStep

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def test_scores_equal_a_plain_computation(tiny_config, video_folder):
    """A model that gives fixed logits: accuracy and loss by hand, a ragged batch counted once."""
    clips = read_list(video_folder / "clips.txt")
    rng = np.random.default_rng(0)
    given = rng.normal(size=(6, 6)).astype(np.float32)
    given[2, :] = 1.0  # ties: no class is above the right one, but none below either
    seen = []

    def eval_step(params, video, bucket):
        seen.append(len(video))
        start = 4 * (len(seen) - 1 - (len(seen) > 1))  # the first batch runs twice
        rows = given[start : start + 4]
        return np.pad(rows, ((0, 4 - len(rows)), (0, 0)), constant_values=9.0)

    where = tiny_config.data, clips, Bucket(2, 16, 16, (4, 4)), 4
    found = outputs.compute(eval_step, None, *where)
    row = outputs.summary(found)
    assert list(found.clips) == list(range(6)) and set(seen) == {4}
    p = np.exp(given.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    own = p[np.arange(6), clips.labels]
    assert row["loss"] == pytest.approx(-np.log(own).mean())
    rank = (given > given[np.arange(6), clips.labels][:, None]).sum(1) + 1
    rank[2] = 6  # a model that can't tell classes apart isn't right by luck
    assert row["top1"] == np.mean(rank == 1) and row["top5"] == np.mean(rank <= 5)
    assert row["mean_class"] == np.mean([(rank == 1)[clips.labels == c].mean() for c in range(6)])
    assert found.clips_per_s > 0
    table = outputs.confusion(found.labels, found.values.argmax(1), 6)
    assert table.sum() == 6 and table.trace() == (given.argmax(1) == clips.labels).sum()
    given[:] = np.nan  # a model that overflows is wrong, not right
    seen.clear()
    assert outputs.summary(outputs.compute(eval_step, None, *where))["top1"] == 0


def test_views_are_merged_as_in_the_release():
    golden = json.loads((GOLDENS / "recipe.json").read_text())["merge"]
    videos = {}
    for view in golden["views"]:  # the first of views of one number counts
        videos.setdefault(view["id"], {}).setdefault((view["chunk"], view["crop"]), view)
    merged = np.stack(
        [
            outputs.merge_scores(np.array([[v["logits"] for v in views.values()]]))[0]
            for views in videos.values()
        ]
    )
    labels = np.array([next(iter(views.values()))["label"] for views in videos.values()])
    found = outputs.Outputs(merged, labels, np.arange(len(labels)), [], 1.0)
    scores = outputs.summary(found)
    assert 100 * scores["top1"] == golden["top1"] and 100 * scores["top5"] == golden["top5"]
    np.testing.assert_allclose(np.exp(merged).sum(1), 1)


@pytest.mark.parametrize("batch_size", [4, 5])  # views of a clip may lie in two batches
def test_every_view_of_a_clip_counts(tiny_config, video_folder, batch_size):
    clips = read_list(video_folder / "clips.txt")
    tiny_config.data.sampling, tiny_config.data.resize = "dense", "crop"

    def eval_step(params, video, bucket):
        light = video.reshape(len(video), -1).mean(1) / 255
        return np.stack([light, 1 - light], 1)

    where = tiny_config.data, clips, Bucket(2, 16, 16, (4, 4)), batch_size
    found = outputs.compute(eval_step, None, *where, views=(3, 2), merge=lambda x: x)
    assert found.values.shape == (6, 6, 2) and list(found.labels) == list(clips.labels)
    light = found.values[0, :, 0].reshape(3, 2)  # the video grows lighter
    assert light[0, 0] < light[1, 0] < light[2, 0]
    mean = outputs.compute(
        eval_step, None, *where, views=(3, 2), merge=outputs.merge_features
    ).values
    np.testing.assert_allclose(mean, found.values.mean(1))


def test_unreadable_clips_are_left_out_of_the_scores(tiny_config, video_folder, tmp_path):
    (tmp_path / "bad.mp4").write_text("x")
    paths = [str(video_folder / "a.mp4"), str(tmp_path / "bad.mp4")]
    clips = ClipList(paths, np.array([0, 1], np.int32), ["a", "b"])

    def eval_step(params, video, bucket):
        return np.tile([1.0, 0.0], (2, 1))

    bucket = Bucket(2, 16, 16, (4, 4))
    found = outputs.compute(eval_step, None, tiny_config.data, clips, bucket, batch_size=2)
    assert list(found.clips) == [0] and outputs.summary(found)["top1"] == 1.0
    assert [path for path, _ in found.unreadable] == [paths[1]]
    none = ClipList(paths[1:], np.array([1], np.int32), ["a", "b"])
    with pytest.raises(pipeline.TooManyUnreadable, match=r"no clip could be read; .*bad\.mp4"):
        outputs.compute(eval_step, None, tiny_config.data, none, bucket, batch_size=2)


def test_the_command_writes_tables_and_pictures(trained, video_folder, capsys):
    argv = ["evaluate", "--workdir", str(trained), "--frames", "2,3", "--sizes", "8,16,20x24"]
    assert cli.main([*argv, "--split", "val", "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "8" in out and "20x24" in out and "*" in out and "unseen cells" in out
    with (trained / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(grid.COLUMNS) and len(rows) == 6
    assert [r["trained"] for r in rows] == ["True", "True", "False", "False", "False", "False"]
    assert rows[2]["patch"] == "5x6" and rows[0]["patch"] == "2"
    assert all(0 <= float(r["top1"]) <= float(r["top5"]) <= 1 for r in rows)
    assert all(float(r["gflops"]) > float(r["published_gflops"]) > 0 for r in rows)
    assert len(json.loads((trained / "grid.json").read_text())) == 6
    with np.load(trained / "grid.npz") as file:
        assert list(file["clips"]) == read_list(video_folder / "clips.txt").paths
        right = (file["ranks"] == 1).mean(1)
        assert ((file["guesses"] == file["labels"]).mean(1) == right).all()
        own = (file["guesses"] == file["labels"])[2]
    np.testing.assert_allclose(right, [float(r["top1"]) for r in rows], atol=1e-6)
    with (trained / "grid_classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes] == list("012345")  # a clip each
    assert [float(row["2x20x24/5x6"]) for row in classes] == own.tolist()
    for name in ("grid.png", "grid_cost.png", "grid_confusion.png"):
        image = cv2.imread(str(trained / name))
        assert image is not None and image.std() > 10
    assert not list(trained.glob("*.part*"))


def test_evaluation_agrees_with_the_python_model(trained, video_folder):
    """The projected plan and padding of the command against `Model.logits` on the same clips."""
    loaded = model.load(trained)
    rows = evaluate.run(
        trained, [2], [(24, 24)], clips=read_list(video_folder / "clips.txt"), name="check"
    )
    clips = read_list(video_folder / "clips.txt")
    bucket = loaded.bucket_of((1, 2, 24, 24, 3))
    with pipeline.eval_batches(loaded.run.data, clips, bucket, 6) as batches:
        batch = next(batches)
    p = np.asarray(loaded.predict(batch["video"]))[np.arange(6), batch["label"]]
    assert rows[0]["loss"] == pytest.approx(-np.log(p).mean(), abs=1e-5)


def test_the_control_keeps_the_grid_of_a_fixed_patch_model(trained, video_folder):
    clips = read_list(video_folder / "clips.txt")
    kwargs = {"clips": clips, "name": "control"}
    rows = evaluate.run(trained, [2], [(24, 24)], variant="vanilla", **kwargs)
    assert rows[0]["patch"] == "4" and not rows[0]["trained"]
    rows = evaluate.run(trained, [2], [(24, 24)], methods={"kernel": "pi"}, **kwargs)
    assert rows[0]["patch"] == "6" and rows[0]["trained"]
    assert (trained / "control.csv").exists()


@pytest.mark.parametrize("variant", ["static_tokens", "vanilla"])
def test_native_aspect_sees_every_clip_in_its_own_shape(
    trained, video_folder, variant, capsys, clips
):
    """Against the Python model, clip by clip; the broken clip is left out and counted once."""
    rows = evaluate.run(
        trained, [2], [(24, 24)], variant=variant, clips=clips, name="native", native_aspect=True
    )
    # 24 pixels, 4 x 4 base patches of 4 pixels; 4:3, 3:4 and 5:3 (24 / 1.291 = 18.6, 31.0).
    shapes = {64 / 48: (20, 28), 48 / 64: (28, 20), 80 / 48: (20, 32)}
    loaded = model.load(trained, variant=variant)
    own, cost = [], []
    for i, (_, _, width, height) in enumerate(VIDEOS.values()):
        size = shapes[width / height]
        bucket = buckets.make_bucket(variant, 2, size, loaded.config)
        assert bucket.grid == (4, 4) or variant == "vanilla"
        with pipeline.eval_batches(loaded.run.data, clips.select([i]), bucket, 1) as batches:
            own.append(float(loaded.predict(next(batches)["video"])[0, i]))
        cost.append(flops.count(loaded.config, bucket)["full"] / 1e9)
    [row] = rows
    assert row["loss"] == pytest.approx(-np.log(own).mean(), abs=1e-5)
    # The one that can't be read has the shape of the others' median, 4:3.
    assert row["gflops"] == pytest.approx(np.mean([*cost, cost[0]]))
    assert row["clips"] == 6 and [path[-10:] for path, _ in row["unreadable"]] == ["broken.mp4"]
    assert sum(row["native"].values()) == 7 and len(row["native"]) == 3 and not row["trained"]
    assert capsys.readouterr().err.count("unreadable, left out") == 1
    assert (trained / "native.png").exists()


def test_native_aspect_of_squares_is_the_plain_grid(trained, clips):
    loaded = model.load(trained)
    ready = [grid.make_cells(loaded.run, loaded.methods, [2], [(16, 16)]), loaded.methods]
    plain = grid.evaluate_grid(loaded.run, loaded.params, clips, *ready)
    same = grid.evaluate_grid(loaded.run, loaded.params, clips, *ready, ratios=np.ones(len(clips)))
    assert plain[0]["loss"] == same[0]["loss"] and plain[0]["gflops"] == same[0]["gflops"]
    assert plain[0]["trained"] and same[0]["trained"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--native-aspect", "--max-gflops", "1"], "it takes neither --patches nor --efficiency"),
        (["--frames", "2,x"], "--frames is '2,x': it takes whole numbers"),
        (["--sizes", "8x"], "--sizes holds '8x'"),
        (["--sizes", "8,7"], "height 7 gives static_tokens no grid of 4"),
        (["--kernel-method", "cubic"], "the kernel method is 'cubic': "),
        (["--split", "test"], "no test list: give one with --list"),
        (["--variant", "static"], "did you mean 'static_tokens'"),
        (["--list", "nowhere.txt"], "nowhere.txt"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--patches", "2"], "patches are given, but static_tokens has one patch at a size"),
        (["--patches", "40", "--variant", "flexivit"], "size 8x8 holds no patch of 40x40"),
        (["--max-gflops", "0"], "--max-gflops is 0: it takes GFLOPs above 0"),
        (["--max-gflops", "1", "--split", "val"], "it takes neither --list nor --split"),
        (["--max-gflops", "1"], "the run has no test list"),
        (["--efficiency", "16"], "--efficiency holds ''"),
        (["--efficiency", "2x7"], "height 7 gives static_tokens no grid of 4"),
    ],
)
def test_wrong_arguments_give_one_sentence(trained, argv, words, capsys):
    before = sorted(p.name for p in trained.iterdir())
    assert cli.main(["evaluate", "--workdir", str(trained), *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(p.name for p in trained.iterdir()) == before


def test_predict(trained, video_folder, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_text("x")
    good, bad = str(video_folder / "a.mp4"), str(tmp_path / "bad.mp4")
    assert cli.main(["predict", "--workdir", str(trained), good]) == 0
    out = capsys.readouterr().out
    assert "(2 frames at 24x24)" in out and out.count("%") == 5
    argv = ["predict", "--workdir", str(trained), "--json", "--top", "2", "--frames", "3"]
    assert cli.main([*argv, "--size", "16x8", bad, good]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["video"] == bad and "error" in lines[0] and bad in err
    assert (lines[1]["frames"], lines[1]["height"], lines[1]["width"]) == (3, 16, 8)
    first, second = lines[1]["top"]
    assert first["probability"] >= second["probability"] > 0 and first["class"] in "012345"
    assert cli.main(["predict", "--workdir", str(trained), "--size", "7", good]) == 2
    assert "no grid of 4" in capsys.readouterr().err
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"img_{i:05}.jpg"), np.full((24, 32, 3), 80 * i, np.uint8))
    assert cli.main(["predict", "--workdir", str(trained), str(tmp_path)]) == 0  # frames
    assert "(2 frames at 24x24)" in capsys.readouterr().out


def test_the_nearest_bucket_follows_the_short_side(trained):
    loaded = model.load(trained)
    for side, wanted in ((7, 8), (13, 16), (18, 16), (300, 24)):
        assert loaded.nearest_bucket(side, 2 * side).height == wanted


def test_tables_and_means():
    rows = [
        {"frames": t, "height": s, "width": s, "top1": v, "trained": s == 8}
        for t, s, v in ((2, 8, 0.5), (2, 16, 0.25), (4, 8, 1.0), (4, 16, 0.0))
    ]
    assert grid.mean_top1(rows) == 0.4375 and grid.mean_top1(rows, trained=True) == 0.75
    assert grid.mean_top1(rows, among={(2, 16, 16)}) == 0.25
    assert np.isnan(grid.mean_top1(rows, among=set()))
    text = grid.table(rows).splitlines()
    assert text[0].split() == ["frames", "8", "16"] and text[1].split() == ["2", "50.0*", "25.0"]


def test_a_difference_map_is_drawn(tmp_path):
    rows = [{"frames": 2, "height": 8, "width": 8, "top1": -0.5, "trained": True}]
    plots.heat_maps(tmp_path / "d.png", [("difference", rows)], difference=True)
    assert cv2.imread(str(tmp_path / "d.png")) is not None


def test_xla_counts_what_the_formulas_say():
    """All but the scan, which is a kernel of ours or a loop: unknown to XLA."""
    config = config_lib.ModelConfig(dim=96, depth=1, size=(32, 32), patch=(8, 8), frames=4)
    params = jax.eval_shape(lambda key: models.init(config, key)[1], jax.random.key(0))
    step, bucket = EvalStep(config, StretchConfig(), "float32"), Bucket(4, 32, 32, (8, 8))
    cost = grid.compiled_cost(step, params, bucket, 2)
    assert cost["xla_gflops"] is None and cost["xla_hidden"]
    scan = 2 * 9 * bucket.tokens() * config.inner * config.state
    rest = 2 * (flops.count(config, bucket)["full"] - scan) / 1e9
    assert rest <= cost["xla_visible_gflops"] <= 1.2 * rest
    size = 4 * sum(x.size for x in jax.tree.leaves(params)) + 2 * 4 * 4 * 32 * 32 * 3
    assert size / 2**20 < cost["memory_mib"] < 20


def test_xla_knows_a_program_without_kernels_and_loops():
    bucket = Bucket(1, 8, 8, (4, 4))
    stem = types.SimpleNamespace(
        projected=lambda bucket: bucket,
        project=jax.jit(lambda video, bucket: video[:, 0], static_argnums=1),
    )

    def cost_of(function, params):
        trunk = jax.jit(function, static_argnums=2)
        return grid.compiled_cost(types.SimpleNamespace(stem=stem, trunk=trunk), params, bucket, 3)

    cost = cost_of(lambda p, video, _: video.reshape(3, -1) @ p, jnp.ones((192, 5)))
    assert cost["xla_gflops"] == pytest.approx(2 * 192 * 5 / 1e9) and not cost["xla_hidden"]
    assert cost["memory_mib"] >= 4 * (192 * 5 + 3 * 192) / 2**20
    cost = cost_of(lambda p, v, _: jax.lax.fori_loop(0, 9, lambda i, x: x * p[i], v), jnp.ones(9))
    assert cost["xla_gflops"] is None and cost["xla_hidden"] == ["loop"]


def test_patches_are_a_third_axis(trained, video_folder):
    clips = read_list(video_folder / "clips.txt")
    kwargs = {"variant": "flexivit", "clips": clips, "name": "patches"}
    rows = evaluate.run(trained, [2], [(16, 16)], patches=[(4, 4), (8, 4)], **kwargs)
    assert [r["patch"] for r in rows] == ["4", "8x4"]
    text = grid.table(rows).splitlines()
    assert text[0].split() == ["frames", "16/4", "16/8x4"] and len(text) == 2
    assert grid.scale_name((8, 16, (4, 2))) == "8x16/4x2"
    loaded = model.load(trained, variant="flexivit")
    with pipeline.eval_batches(loaded.run.data, clips, Bucket(2, 16, 16, (8, 4)), 6) as batches:
        batch = next(batches)
    pinned = loaded.stretch(frames=2, size=16, patch=(8, 4))
    p = np.asarray(pinned.predict(batch["video"]))[np.arange(6), batch["label"]]
    assert rows[1]["loss"] == pytest.approx(-np.log(p).mean(), abs=1e-5)
    assert [r["trained"] for r in rows] == [True, False]


def test_the_pareto_front_and_the_best():
    rng = np.random.default_rng(0)
    for _ in range(50):
        cells = rng.integers(1, 8, (12, 2)) / 8
        rows = [{"gflops": g, "top1": t} for g, t in cells]
        found = {(r["gflops"], r["top1"]) for r in grid.pareto_front(rows)}
        assert found == {
            (g, t)
            for g, t in cells
            if not any((a <= g and b > t) or (a < g and b >= t) for a, b in cells)
        }
        top = grid.best(rows)
        assert (-top["top1"], top["gflops"]) == min((-t, g) for g, t in cells)


@pytest.fixture(scope="module")
def tested(trained, video_folder, tmp_path_factory):
    """A run that has a test list, of the last four clips."""
    folder = tmp_path_factory.mktemp("tested")
    workdir = shutil.copytree(trained, folder / "tiny")
    (video_folder / "test.txt").write_text(
        "".join((video_folder / "clips.txt").read_text().splitlines(keepends=True)[2:])
    )
    run = config_lib.load(workdir / "config.json")
    run.data.test = str(video_folder / "test.txt")
    config_lib.save(run, workdir / "config.json")
    return workdir


def test_a_budget_picks_on_validation_and_reports_on_test(tested, video_folder, capsys):
    argv = ["--workdir", str(tested), "--frames", "2,3", "--sizes", "8,16"]
    limit = grid.gflops(config_lib.load(tested / "config.json"), Bucket(2, 16, 16, (4, 4)))
    assert cli.main(["evaluate", *argv, "--max-gflops", str(limit)]) == 0
    out = capsys.readouterr().out
    rows = json.loads((tested / "budget.json").read_text())
    assert [(r["frames"], r["height"], r["clips"]) for r in rows] == [(2, 8, 6), (2, 16, 6)]
    wanted = max(rows, key=lambda r: (r["top1"], -r["gflops"]))
    [row] = json.loads((tested / "budget_test.json").read_text())
    assert row["height"] == wanted["height"] and row["clips"] == 4
    assert f"2 frames at {wanted['height']}x{wanted['height']}" in out and "4 test clips" in out
    own = evaluate.run(tested, [2], [(row["height"],) * 2], name="own")  # the test list by default
    assert own[0]["loss"] == pytest.approx(row["loss"])
    assert cli.main(["evaluate", *argv, "--max-gflops", "1e-9"]) == 2
    assert "the cheapest cell, 2x8x8/2, takes" in capsys.readouterr().err


def test_predict_takes_the_best_cell_of_a_budget(tested, video_folder, capsys):
    video = str(video_folder / "a.mp4")
    argv = ["predict", "--workdir", str(tested), "--json", video, "--grid", "chosen"]
    assert cli.main([*argv, "--max-gflops", "1"]) == 2
    assert "run 'stretchysnake evaluate --workdir" in capsys.readouterr().err
    rows = evaluate.run(tested, [2], [(8, 8), (16, 16)], methods={"kernel": "pi"}, name="chosen")
    [row.pop(name) for row in rows for name in grid.PER_CLIP]
    rows.append(rows[0] | {"frames": 3})
    for row, top1 in zip(rows, (0.4, 0.5, 0.3), strict=True):
        row["top1"] = top1
    (tested / "chosen.json").write_text(json.dumps(rows))
    loaded = model.load(tested)
    costs = [
        grid.gflops(loaded.run, Bucket(t, s, s, (p, p)))
        for t, s, p in ((2, 8, 2), (2, 16, 4), (3, 8, 2))
    ]
    for limit, wanted in zip(sorted(costs), (8, 16, 16), strict=True):
        bucket, methods = predict.best_scale(loaded, tested / "chosen", limit)
        assert (bucket.frames, bucket.height) == (2, wanted)
        assert methods == {"kernel": "pi", "spatial": "paper", "temporal": "paper"}
    assert cli.main([*argv, "--max-gflops", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[name] for name in ("frames", "height", "width")] == [2, 16, 16]
    clip, _ = model.read_video(video, loaded.run.data, lambda h, w: bucket)
    chances = np.asarray(loaded.stretch(frames=2, size=16, method=methods).predict(clip[None])[0])
    assert found["top"][0]["probability"] == pytest.approx(chances.max(), abs=1e-5)
    assert cli.main([*argv, "--max-gflops", "1e-9"]) == 2
    assert "the cheapest cell of" in capsys.readouterr().err
    assert cli.main([*argv, "--max-gflops", "1", "--size", "8"]) == 2
    assert "neither --frames nor --size" in capsys.readouterr().err


def test_parse_sizes():
    assert evaluate.parse_sizes("56,84x112") == [(56, 56), (84, 112)]
    with pytest.raises(ConfigError, match="holds '0'"):
        evaluate.parse_sizes("0")
