"""Probes: against scikit-learn, against plain computations, and the command end to end."""

import csv
import json

import cv2
import numpy as np
import pytest

from stretchysnake_jax import cli, outputs, plots, probe, probe_command, probe_report
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data.lists import ClipList


def make_data(n=120, dim=12, classes=5, spread=1.5, seed=0):
    """Clouds that overlap, features of unequal scale, one of them constant."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(9).normal(size=(classes, dim))
    features = centres[labels] + spread * rng.normal(size=(n, dim))
    features[:, 2] = 7.1
    return features * np.geomspace(0.01, 100, dim), labels


@pytest.mark.parametrize("c", [1e-4, 0.1, 100.0])
def test_the_linear_probe_equals_scikit_learn(c):
    linear = pytest.importorskip("sklearn.linear_model")
    from sklearn.preprocessing import StandardScaler

    (x, y), (other, _) = make_data(), make_data(n=300, seed=1)
    ours = probe.fit_linear(x, y, 5, c, tolerance=3e-7)
    scaler = StandardScaler().fit(x)
    theirs = linear.LogisticRegression(C=c, tol=1e-12, max_iter=10_000)
    theirs.fit(scaler.transform(x), y)
    assert ours.converged
    for points in (x, other):
        want = theirs.predict_log_proba(scaler.transform(points))
        got = ours.log_probabilities(points)
        np.testing.assert_allclose(got, want, atol=2e-3)
        assert (got.argmax(1) == want.argmax(1)).all()

    def loss(chances, kernel):
        return -c * chances[np.arange(len(y)), y].sum() + (kernel**2).sum() / 2

    best = loss(theirs.predict_log_proba(scaler.transform(x)), theirs.coef_)
    assert loss(ours.log_probabilities(x), ours.kernel) == pytest.approx(best, rel=1e-5)


def test_the_gradient_decides_when_a_fit_is_done():
    x, y = make_data()
    done = probe.fit_linear(x, y, 5, 1.0)
    assert done.converged and done.gradient <= 1e-6 and done.iterations < 200
    # Numerically, in float64: the loss around the solution.
    rows = probe.standardise(x, done.mean, done.scale)
    at = {"kernel": done.kernel.astype(np.float64), "bias": done.bias.astype(np.float64)}
    _, gradient = probe._loss_and_gradient(at, rows, y, 1 / len(y))
    assert gradient == pytest.approx(done.gradient)
    slopes = []
    for i, j in np.ndindex(done.kernel.shape):
        sides = []
        for step in (1e-4, -1e-4):
            moved = at["kernel"].copy()
            moved[i, j] += step
            sides.append(probe._loss_and_gradient(at | {"kernel": moved}, rows, y, 1 / len(y))[0])
        slopes.append(abs(sides[0] - sides[1]) / 2e-4)
    assert max(slopes) <= gradient + 1e-7
    short = probe.fit_linear(x, y, 5, 1.0, max_iterations=3)
    assert not short.converged and short.iterations == 3 and short.gradient > 1e-5
    assert probe.fit_linear(x, y, 5, 1.0, start=done).iterations <= 1
    stuck = probe.fit_linear(x, y, 5, 1.0, tolerance=1e-12)  # below what float32 can reach
    assert not stuck.converged and stuck.gradient < 1e-6


def test_classes_without_clips_take_no_part():
    x, y = make_data()
    full = probe.fit_linear(x, y, 5, 1.0)
    wide = probe.fit_linear(x, 2 * y + 1, 12, 1.0).log_probabilities(x)
    np.testing.assert_allclose(wide[:, 1:10:2], full.log_probabilities(x), atol=1e-6)
    assert (wide[:, ::2] == -np.inf).all() and wide.shape == (120, 12)


def test_what_cannot_be_fitted_is_named():
    x, y = make_data()
    with pytest.raises(ConfigError, match="all of one class"):
        probe.fit_linear(x, np.zeros_like(y), 5, 1.0)
    x[3, 3] = np.inf
    with pytest.raises(ConfigError, match="aren't finite"):
        probe.fit_linear(x, y, 5, 1.0)
    with pytest.raises(ConfigError, match="aren't finite"):
        probe.neighbours(x, x[:2], 1)


@pytest.mark.parametrize("block", [7, 64, 8192])
def test_neighbours_are_those_of_the_whole_matrix(block):
    gallery, queries = make_data(50)[0], make_data(23, seed=1)[0]
    gallery[4] = 0.0  # no direction: like nothing
    gallery[9] = 3 * gallery[20]  # the same direction: the first comes first
    near, ids = probe.neighbours(queries, gallery, 50, block)
    cosines = probe.unit(queries).astype(np.float64) @ probe.unit(gallery).T.astype(np.float64)
    np.testing.assert_allclose(near, -np.sort(-cosines, 1), atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosines, ids, 1), near, atol=1e-6)
    assert (np.sort(ids, 1) == np.arange(50)).all()
    equal = probe.neighbours(gallery[20:21], np.concatenate([gallery[20:21]] * 30), 30, block)
    assert equal[1][0].tolist() == list(range(30))
    with pytest.raises(ConfigError, match="k is 51: it takes 1 to 50"):
        probe.neighbours(queries, gallery, 51)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (10, 0.07), (50, 0.02), (50, 1.0)])
def test_votes_equal_scikit_learn(k, temperature):
    neighbors = pytest.importorskip("sklearn.neighbors")
    (x, y), (queries, _) = make_data(), make_data(300, seed=1)
    theirs = neighbors.KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / temperature),
    ).fit(x, y)
    near, ids = probe.neighbours(queries, x, 60)
    chances = probe.vote(near, y[ids], 5, k, temperature)
    np.testing.assert_allclose(np.exp(chances), theirs.predict_proba(queries), atol=1e-4)
    assert (chances.argmax(1) == theirs.predict(queries)).all()


def test_scores_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 8, 300), rng.normal(size=(300, 8))
    logits[np.arange(300), labels] += 1
    chances = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    found, guesses = probe.scores(chances, labels), chances.argmax(1)
    assert found["top1"] == pytest.approx(metrics.accuracy_score(labels, guesses))
    assert found["mean_class"] == pytest.approx(metrics.balanced_accuracy_score(labels, guesses))
    assert found["top5"] == pytest.approx(metrics.top_k_accuracy_score(labels, chances, k=5))
    assert found["loss"] == pytest.approx(metrics.log_loss(labels, np.exp(chances)))
    counts = outputs.confusion(labels, guesses, 8)
    assert (counts == metrics.confusion_matrix(labels, guesses)).all()
    names = [f"class {i}" for i in range(9)]
    wider = np.pad(chances, ((0, 0), (0, 1)), constant_values=-np.inf)
    table = probe_report.class_table(wider, labels, names)
    recall = metrics.recall_score(labels, guesses, average=None)
    assert [row["top1"] for row in table[:8]] == pytest.approx(recall)
    for row, line in zip(table[:8], counts - np.diag(np.diag(counts)), strict=True):
        assert row["clips"] == (labels == names.index(row["class"])).sum()
        assert row["mistakes"] == line.max() == line[names.index(row["mistaken_for"])]
    assert table[8] | {"class": ""} == {
        "class": "", "clips": 0, "top1": None, "top5": None, "mistaken_for": "", "mistakes": 0
    }  # fmt: skip


def test_a_part_of_train_is_held_out():
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    held = probe.hold_out(labels, None, 0.2)
    assert [held[labels == c].sum() for c in range(4)] == [10, 2, 1, 0]
    assert (held == probe.hold_out(labels, None, 0.2)).all()
    assert (held != probe.hold_out(labels, None, 0.2, seed=1)).any()
    with pytest.raises(ConfigError, match="of the 4 training clips can be held out"):
        probe.hold_out(np.arange(4), None, 0.2)


def test_groups_are_held_out_whole():
    labels, groups = np.tile(np.arange(5), 20), np.repeat([f"person {i}" for i in range(10)], 10)
    for seed in range(5):
        held = probe.hold_out(labels, list(groups), 0.2, seed)
        assert held.sum() == 20 and len(set(groups[held])) == 2
        assert not set(groups[held]) & set(groups[~held])
    halves = probe.hold_out(labels, ["a"] * 50 + ["b"] * 50, 0.1)
    assert halves.sum() == 50  # the smallest part there is
    with pytest.raises(ConfigError, match="can be held out"):
        probe.hold_out(labels, ["a"] * 100, 0.2)
    by_class = [str(label) for label in labels]  # a group is all that there is of a class
    with pytest.raises(ConfigError, match="can be held out"):
        probe.hold_out(labels, by_class, 0.2)


def test_sweeps_score_every_setting_on_the_validation_clips():
    train, val = make_data(), make_data(60, seed=1)
    rows, probes = probe.sweep_linear(train, val, 5, (1.0, 1e-6))
    assert [row["c"] for row in rows] == [1e-6, 1.0] == [p.c for p in probes]
    alone = probe.fit_linear(*train, 5, 1.0).log_probabilities(val[0])
    assert rows[1]["loss"] == pytest.approx(probe.scores(alone, val[1])["loss"], abs=1e-4)
    rows = probe.sweep_neighbours(train, val, 5, (3, 500, 700), (0.1, 1.0))
    assert [(r["k"], r["temperature"]) for r in rows] == [
        (3, 0.1), (3, 1.0), (120, 0.1), (120, 1.0)
    ]  # fmt: skip
    near, ids = probe.neighbours(val[0], train[0], 3)
    chances = probe.vote(near, train[1][ids], 5, 3, 0.1)
    assert rows[0]["top1"] == probe.scores(chances, val[1])["top1"]
    scores = [(0.5, 0.5), (0.7, 0.6), (0.7, 0.65), (0.7, 0.65)]
    rows = [{"top1": a, "mean_class": b} for a, b in scores]
    assert probe.best(rows) == 2
    losses = (1.0, 1.0, 3.0, 2.0)
    assert probe.best([row | {"loss": x} for row, x in zip(rows, losses, strict=True)]) == 3


def test_which_split_chooses_and_which_is_reported():
    lists = {name: ClipList([name], np.zeros(1, np.int32), ["a"]) for name in ("a", "b", "c")}

    def read(**names):
        return lambda split, classes: lists.get(names.get(split))

    found, reported = probe_command.find_splits(read(train="a", val="b", test="c"))
    assert found == {"train": lists["a"], "val": lists["b"], "test": lists["c"]}
    found, reported = probe_command.find_splits(read(train="a", val="b"))
    assert found == {"train": lists["a"], "test": lists["b"]} and reported == "val"
    found, reported = probe_command.find_splits(read(train="a", test="c"))
    assert found == {"train": lists["a"], "test": lists["c"]} and reported == "test"
    with pytest.raises(ConfigError, match="neither a test nor a validation list"):
        probe_command.find_splits(read(train="a"))


@pytest.fixture(scope="module")
def lists(video_folder, tmp_path_factory):
    """Lists of two classes by name, three clips of each, in train one that can't be read."""
    folder = tmp_path_factory.mktemp("lists")
    videos = sorted(p.name for p in video_folder.iterdir() if p.suffix in (".mp4", ".avi", ".webm"))
    (video_folder / "unreadable.mp4").write_bytes(b"no video")
    lines = [f"{video_folder / name},{'even' if i % 2 else 'odd'}" for i, name in enumerate(videos)]
    bad = f"{video_folder / 'unreadable.mp4'},odd"
    (folder / "train.txt").write_text("\n".join([*lines, bad]))
    (folder / "test.txt").write_text("\n".join(lines))
    yield folder
    (video_folder / "unreadable.mp4").unlink()


def arguments(folder, train):
    words = ["--train", folder / train, "--test", folder / "test.txt", "--allow-absolute"]
    return [*map(str, words), "--batch-size", "3"]


def test_the_linear_command(trained, lists, capsys):
    argv = ["probe", "linear", "--workdir", str(trained), *arguments(lists, "train.txt")]
    assert cli.main([*argv, "--val", str(lists / "test.txt"), "--frames", "3"]) == 0
    out, err = capsys.readouterr()
    assert "unreadable.mp4" in err and "test, 6 clips, 3x16x16/4: top-1" in out
    report = json.loads((trained / "probe_linear.json").read_text())
    assert report["clips"] == {"train": 6, "test": 6, "val": 6} and report["chosen_on"] == "val"
    assert [row["c"] for row in report["sweep"]] == [10.0**p for p in range(-6, 5)]
    # It chooses on the very clips that it reports on here, so the best of the sweep is reported.
    assert report["result"]["top1"] == max(row["top1"] for row in report["sweep"])
    assert report["result"] == {k: report["chosen"][k] for k in report["result"]}
    assert f"top-1 {100 * report['result']['top1']:.1f} %" in out
    assert (report["frames"], report["height"], report["patch"]) == (3, 16, [4, 4])
    assert np.sum(report["confusion"]) == 6
    with (trained / "probe_linear.classes.csv").open() as file:
        assert [(row["class"], row["clips"]) for row in csv.DictReader(file)] == [
            ("even", "3"), ("odd", "3")
        ]  # fmt: skip
    with (trained / "probe_linear.sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 11
    assert cv2.imread(str(trained / "probe_linear.png")).std() > 20
    assert not list(trained.glob("*.part"))


def test_the_knn_command_without_a_validation_list(trained, lists, capsys):
    argv = [
        "probe",
        "knn",
        "--workdir",
        str(trained),
        *arguments(lists, "test.txt"),
        "--size",
        "24x16",
    ]
    argv += ["--k", "1,2", "--temperature", "0.1,1", "--name", "votes", "--crops", "2"]
    assert cli.main(argv) == 0
    assert "chosen on 2 of the 6 clips of train" in capsys.readouterr().out
    report = json.loads((trained / "votes.json").read_text())
    assert report["chosen"] in report["sweep"] and len(report["sweep"]) == 4
    assert report["clips"] == {"train": 6, "test": 6} and report["views"] == [1, 2]
    if report["chosen"]["k"] == 1:  # every test clip is in the gallery
        assert report["result"] == {"top1": 1.0, "top5": 1.0, "mean_class": 1.0}


def test_the_data_of_another_config(trained, lists, tiny_config_file, capsys):
    argv = ["probe", "knn", "--workdir", str(trained), "--data-config", str(tiny_config_file)]
    argv += [f"--data-config.data.{s}={lists / 'test.txt'}" for s in ("train", "val", "test")]
    argv += ["--data-config.data.allow_absolute", "True", "--data-config.model.num_classes=2"]
    assert cli.main([*argv, "--refit", "train+val", "--k", "1,2", "--name", "other"]) == 0
    report = json.loads((trained / "other.json").read_text())
    assert [row["class"] for row in report["classes"]] == ["even", "odd"]
    assert report["chosen"]["k"] == 1 and report["result"]["top1"] == 1.0
    assert cli.main([*argv, "--data-config.data.shuffle=1"]) == 2
    assert "unknown field --data-config.data.shuffle" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["linear", "--c", "1,0"], "--c is '1,0': it takes numbers > 0"),
        (["knn", "--k", "x"], "--k is 'x': it takes whole numbers"),
        (["knn", "--temperature", "-1"], "--temperature is '-1': it takes numbers > 0"),
        (["knn", "--train", "a.txt"], "list files are --train and --test"),
        (["knn", "--hold-out", "1"], "--hold-out is 1.0: it takes above 0"),
        (["knn", "--frames", "2,4"], "--frames names 2 values"),
        (["knn", "--crops", "0"], "--crops is 0"),
        (["knn", "--size", "7"], "height 7 gives static_tokens no grid of 4"),
        (["linear", "--size", "8"], "of the 6 training clips can be held out"),  # one of each class
        (["knn", "--data-config", "nowhere.py"], "no config file at nowhere.py"),
    ],
)
def test_wrong_arguments_give_one_sentence(trained, argv, words, capsys):
    assert cli.main(["probe", argv[0], "--workdir", str(trained), *argv[1:]]) == 2
    err = capsys.readouterr().err.splitlines()
    assert words in err[-1] and err[-1].startswith("error: ")


@pytest.mark.parametrize("n", [2, 30, 70])
def test_confusion_matrices_of_any_size_are_drawn(n, tmp_path):
    counts = np.diag(np.arange(1, n + 1))
    counts[1, 0], counts[0] = 1, 0
    plots.confusion_matrix(tmp_path / "c.png", counts, [f"a class of number {i}" for i in range(n)])
    image = cv2.imread(str(tmp_path / "c.png"))
    assert 400 < image.shape[0] < 3000 and 400 < image.shape[1] < 3000
    grey = (image == 204).all(-1)
    assert grey.any(0).sum() > 150 and grey.any(1).sum() < image.shape[0] / 2  # the class of none
    assert list(tmp_path.iterdir()) == [tmp_path / "c.png"]
