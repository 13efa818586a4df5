"""Retrieval: scores against scikit-learn and plain loops, blocks, and the command."""

import csv
import json
import tracemalloc

import cv2
import numpy as np
import pytest

from stretchysnake_jax import cli, model, retrieval
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data.lists import read_list
from stretchysnake_jax.embed import embed


def make_sides(rng, queries=40, gallery=70, dim=8, classes=5, ties=False):
    """Features and labels of queries and of a gallery; with ties, all cosines are 0 or 1."""
    sides = []
    for n in (queries, gallery):
        values = np.eye(dim)[rng.integers(dim, size=n)] if ties else rng.normal(size=(n, dim))
        sides += [values, rng.integers(classes, size=n)]
    q, q_labels, g, g_labels = sides
    return q, g, q_labels, g_labels


def likeness(queries, gallery):
    (_, block), *rest = retrieval.similarity_blocks(queries, gallery)
    assert not rest
    return block


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learns(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    sides = make_sides(np.random.default_rng(0), ties=ties)
    ids = np.arange(40), np.arange(70) + 20  # queries from 20 on are in the gallery, too
    found = retrieval.rank(*sides, query_ids=ids[0], gallery_ids=ids[1])
    for i, row in enumerate(likeness(*sides[:2])):
        others = ids[1] != ids[0][i]
        right = (sides[3] == sides[2][i])[others]
        wanted = metrics.average_precision_score(right, row[others])
        assert found.precision[i] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_and_recalls_by_a_plain_loop(ties):
    sides = make_sides(np.random.default_rng(1), classes=12, ties=ties)
    found = retrieval.rank(*sides)
    ranks = []
    for row, label in zip(likeness(*sides[:2]), sides[2], strict=True):
        # Wrong ones first among equals.
        order = sorted(range(len(row)), key=lambda j: (-row[j], sides[3][j] == label))
        ranks.append(1 + [sides[3][j] == label for j in order].index(True))
    assert list(found.rank) == ranks
    scores = retrieval.summary(found)
    for k in (1, 5, 10):
        assert scores[f"r{k}"] == np.mean(np.array(ranks) <= k)
    assert scores["map"] == found.precision.mean()
    assert (scores["queries"], scores["unmatched"]) == (40, 0)


def test_cosines_and_the_nearest():
    queries, gallery, *labels = make_sides(np.random.default_rng(2))
    found = retrieval.rank(queries, 7 * gallery, *labels, k=4)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)
    cosines = queries @ gallery.T / lengths
    order = np.argsort(-cosines, 1)[:, :4]
    np.testing.assert_array_equal(found.nearest, order)
    np.testing.assert_allclose(found.likeness, np.take_along_axis(cosines, order, 1), atol=1e-6)


def test_blocks_give_what_the_whole_gives():
    sides = make_sides(np.random.default_rng(3))
    whole, done = retrieval.rank(*sides), []
    sizes = [block.shape for _, block in retrieval.similarity_blocks(*sides[:2], limit=300)]
    assert sizes == [(4, 70)] * 10
    parts = retrieval.rank(*sides, limit=300, on_block=done.append)
    assert done == list(range(4, 41, 4))
    np.testing.assert_array_equal(parts.rank, whole.rank)
    np.testing.assert_array_equal(parts.nearest, whole.nearest)
    np.testing.assert_array_equal(parts.precision, whole.precision)
    one = retrieval.rank(*sides, limit=1)  # a query at least
    np.testing.assert_array_equal(one.rank, whole.rank)


def test_a_hundred_thousand_clips_fit():
    """The largest block, and all that ranking holds beside it."""
    n = 100_000
    gallery = np.random.default_rng(4).normal(size=(n, 4)).astype(np.float32)
    blocks = retrieval.similarity_blocks(gallery, gallery)
    (first, block), (second, _) = next(blocks), next(blocks)
    assert (first, second) == (0, len(block)) and block.shape[1] == n
    assert block.nbytes <= 2**28
    labels = np.arange(n) % 400
    tracemalloc.start()
    retrieval.rank(gallery[:20], gallery, labels[:20], labels, limit=10 * n)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 10 * n + 20 * 4 * n  # a block, and some arrays of a row


def test_the_query_itself_is_left_out():
    features = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 1]])
    labels, ids = np.array([0, 1, 0, 1]), np.array([5, 6, 7, 8])
    found = retrieval.rank(features, features, labels, labels, query_ids=ids, gallery_ids=ids)
    assert list(found.nearest[:, 0]) == [1, 0, 3, 2] and (found.nearest[:, 3] == -1).all()
    assert list(found.rank) == [3, 2, 3, 2]
    np.testing.assert_allclose(found.precision, 1 / found.rank)
    assert list(retrieval.rank(features, features, labels, labels).rank) == [1] * 4


def test_queries_without_a_right_clip_are_counted_apart():
    features = np.eye(3)
    found = retrieval.rank(features, features, np.array([0, 1, 7]), np.array([0, 1, 2]))
    assert list(found.rank) == [1, 1, 0] and np.isnan(found.precision[2])
    scores = retrieval.summary(found)
    assert (scores["queries"], scores["unmatched"], scores["map"]) == (2, 1, 1.0)
    none = retrieval.rank(features, features, np.full(3, 7), np.zeros(3, int))
    with pytest.raises(ConfigError, match="no query has a clip of its class"):
        retrieval.summary(none)
    with pytest.raises(ConfigError, match="aren't finite"):
        retrieval.rank(features * np.nan, features, np.zeros(3), np.zeros(3))


def test_scales_count_alike():
    rng = np.random.default_rng(5)
    small, large = rng.normal(size=(4, 8)), 1000 * rng.normal(size=(4, 8))
    mean = retrieval.average_scales([small, large])
    wanted = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (small, large)]
    np.testing.assert_allclose(mean, sum(wanted) / 2, atol=1e-6)


@pytest.fixture
def lists(clips, tmp_path):
    """Two list files of the same videos in two classes; the second holds a damaged one, too."""
    for name, paths in (("q.txt", clips.paths[:6]), ("g.txt", clips.paths)):
        (tmp_path / name).write_text("".join(f"{p},{i % 2}\n" for i, p in enumerate(paths)))
    (tmp_path / "classes.txt").write_text("even\nodd\n")
    return tmp_path / "q.txt", tmp_path / "g.txt"


def test_the_command(trained, lists, capsys):
    query, gallery = map(str, lists)
    argv = ["retrieve", "--workdir", str(trained), "--allow-absolute", "--batch-size", "3"]
    argv += ["--query", query, "--gallery", gallery, "--sheet", "2", "--name", "found"]
    argv += ["--cells", "2x16,2x8x24", "--gallery-cells", "3x24", "--pooling", "mean"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "6 queries of q.txt in 6 clips of g.txt, at 2x16x16/4 + 2x8x24/2x6 among" in out
    assert "unreadable, left out" in err and "broken.mp4" in err
    loaded = model.load(trained)
    sides = []
    clips = read_list(query, allow_absolute=True)
    for cells in ([(2, 16), (2, (8, 24))], [(3, 24)]):
        scales = [loaded.stretch(frames=t, size=s).bucket for t, s in cells]
        sides.append([embed(loaded, clips, scale, "mean", 3).values for scale in scales])
    features, ids = [retrieval.average_scales(side) for side in sides], np.arange(6)
    wanted = retrieval.rank(*features, clips.labels, clips.labels, query_ids=ids, gallery_ids=ids)
    found = json.loads((trained / "found.json").read_text())
    for key, value in retrieval.summary(wanted).items():
        assert found[key] == pytest.approx(value)
    assert [row["class"] for row in found["classes"]] == ["even", "odd"]
    assert found["unreadable"][0][0].endswith("broken.mp4")
    with (trained / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(wanted.rank)
    assert all(row["clip"] != row["nearest"] for row in rows)
    assert cv2.imread(str(trained / "found.png")).std() > 20


def test_a_list_in_itself(trained, lists, capsys):
    argv = ["retrieve", "--workdir", str(trained), "--allow-absolute", "--sheet", "0"]
    argv += ["--query", str(lists[0]), "--gallery", str(lists[0]), "--name", "self"]
    assert cli.main([*argv, "--cells", "2x16"]) == 0
    found = json.loads((trained / "self.json").read_text())
    assert found["gallery_clips"] == 6 and found["queries"] == 6
    assert not (trained / "self.png").exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--cells", "2"], "--cells holds '2': it takes FRAMESxSIZE"),
        (["--gallery-cells", "2x16,0x8"], "--gallery-cells holds '0x8'"),
        (["--cells", "2x7"], "gives static_tokens no grid"),
        (["--query", "test"], "the run has no test list"),
        (["--query", "nowhere.txt"], "nowhere.txt"),
        (["--query", "val", "--gallery", "val"], "no query has a clip of its class"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--sheet", "-1"], "--sheet is -1"),
    ],
)
def test_wrong_arguments_give_one_sentence(trained, argv, words, capsys):
    before = sorted(p.name for p in trained.iterdir())
    assert cli.main(["retrieve", "--workdir", str(trained), "--cells", "2x16", *argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert words in err[-1] and err[-1].startswith("error: ")
    assert sorted(p.name for p in trained.iterdir()) == before
