"""Ablations: rows against single evaluations, what is shared, interruptions, refusals, pictures."""

import csv
import json
import os
import signal

import cv2
import numpy as np
import pytest

from stretchysnake_jax import ablate, ablation, cli, config, evaluate, outputs
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import ConfigError, ModelConfig, StretchConfig
from stretchysnake_jax.data.lists import read_list


def rows_of(out):
    return json.loads((out / "ablation.json").read_text())


def pick(rows, **wanted):
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def stretched(trained, tmp_path_factory):
    """Two methods tried on a checkpoint: (arguments, the folder)."""
    out = tmp_path_factory.mktemp("ablate") / "out"
    argv = ["ablate", "--workdir", str(trained), "--methods", "pi,none", "--frames", "2,3"]
    argv += ["--sizes", "8,20", "--split", "val", "--out", str(out)]
    assert cli.main(argv) == 0
    return argv, out


def test_every_row_is_a_single_evaluation(stretched, trained, video_folder):
    rows, clips = rows_of(stretched[1]), read_list(video_folder / "clips.txt")
    assert len(rows) == 4 * (1 + 2 * 4) and {row["steps"] for row in rows} == {24}
    assert {(row["variant"], row["seed"]) for row in rows} == {("static_tokens", 0)}
    for weights, method in (("all", "pi"), ("kernel", "none")):
        chosen = {weights: method}
        if weights == "all":
            chosen = dict.fromkeys(("kernel", "spatial", "temporal"), method)
        found = evaluate.run(trained, [2, 3], [(8, 8), (20, 20)], methods=chosen, clips=clips)
        ours = pick(rows, weights=weights, method=method)
        assert len(ours) == 4
        for a, b in zip(ours, found, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
            names = ("frames", "height", "patch", "trained", "gflops", "top1", "clips")
            assert [a[n] for n in names] == [b[n] for n in names]
    kernel = pick(rows, weights="kernel", frames=2, height=20)
    assert kernel[0]["loss"] != kernel[1]["loss"]
    with (stretched[1] / "ablation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(ablation.COLUMNS) and len(table) == len(rows)


def test_a_killed_evaluation_goes_on(stretched, tmp_path, monkeypatch, capsys):
    argv, compute = [*stretched[0][:-1], str(tmp_path)], outputs.compute

    def killed(step, params, data, clips, bucket, *args, **kwargs):
        if bucket.frames == 3:
            raise KeyboardInterrupt
        return compute(step, params, data, clips, bucket, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "compute", killed)
        assert cli.main(argv) == 130
    assert rows_of(tmp_path) == rows_of(stretched[1])[:18]
    capsys.readouterr()
    assert cli.main(argv) == 0
    assert "18 rows done, 18 were there" in capsys.readouterr().out
    assert rows_of(tmp_path) == rows_of(stretched[1])


def test_a_finished_ablation_does_nothing_and_a_grown_one_the_rest(stretched, capsys, monkeypatch):
    argv, out = stretched
    before, seen, real = rows_of(out), [], outputs.compute
    monkeypatch.setattr(outputs, "compute", lambda *a, **k: seen.append(a[4]) or real(*a, **k))
    assert cli.main(argv) == 0
    assert not seen and "0 rows done, 36 were there" in capsys.readouterr().out
    assert rows_of(out) == before
    argv = [word.replace("8,20", "8,20,7") for word in argv]
    assert cli.main(argv) == 0  # no grid of 4 fits 7 pixels
    out_text, err = capsys.readouterr()
    assert not seen and "18 rows done, 36 were there" in out_text
    assert err.count("height 7 gives static_tokens no grid of 4") == 1
    rows = rows_of(out)
    assert rows[:36] == before
    for row in rows[36:]:
        assert row["height"] == 7 and "no grid" in row["reason"]
        assert {row[name] for name in (*ablation.SCORES, "trained", "gflops")} == {None}
    for name in ("ablation.png", "grids_static_tokens.png"):
        assert cv2.imread(str(out / name)).std() > 10
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pi,none": "pi"}, "with more methods: ['none'] too; name those as well"),
        ({"2,3": "2"}, "with more frames: [3] too"),
        ({"val": "train"}, ""),
        ({"--split": "--crops", "val": "2"}, "views is [1, 1] there and [1, 2] now"),
    ],
)
def test_changed_settings_are_refused(stretched, change, words, capsys):
    argv, out = stretched
    files = {path: path.read_bytes() for path in out.iterdir()}
    argv = [change.get(word, word) for word in argv]
    sizes = json.loads((out / "settings.json").read_text())["axes"]["sizes"]
    argv[argv.index("--sizes") + 1] = ",".join(str(height) for height, _ in sizes)
    status, err = cli.main(argv), capsys.readouterr().err
    if not words:  # the same clips under another name
        assert status == 0
        return
    assert status == 2 and words in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in out.iterdir()} == files


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "one of --workdir (evaluates a run) and --config (trains)"),
        (["--steps", "3"], "--steps is for training"),
        (["--methods", "paper,cubic"], "--methods is 'cubic': "),
        (["--weights", "kernels"], "--weights is 'kernels': did you mean 'kernel'"),
        (["--variants", "static"], "--variants is 'static': did you mean 'static_tokens'"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--split", "test"], "there is no test list"),
    ],
)
def test_wrong_arguments_give_one_sentence(trained, tmp_path, argv, words, capsys):
    where = ["--workdir", str(trained)] if argv else []
    assert cli.main(["ablate", "--out", str(tmp_path / "out"), *where, *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def training(tiny_config_file, out):
    argv = ["ablate", "--config", str(tiny_config_file), "--out", str(out), "--steps", "4"]
    argv += ["--config.train.checkpoint_every=2", "--config.stretch.sizes=8", "--frames", "2,3"]
    argv += ["--config.data.val=", "--split", "train"]
    return [*argv, "--variants", "vanilla,static_tokens", "--sizes", "10,16"]


@pytest.fixture(scope="module")
def unbroken(tiny_config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert cli.main(training(tiny_config_file, out)) == 0
    return out


@pytest.mark.slow
def test_variants_are_trained_alike(unbroken):
    rows = rows_of(unbroken)
    assert [row["run"] for row in rows[::4]] == ["vanilla-0", "static_tokens-0"]
    a, b = (config.load(unbroken / "runs" / row["run"] / "config.json") for row in rows[::4])
    assert a.train.steps == 4 and a.train.seed == b.train.seed == 0
    a.name, a.stretch.variant = b.name, b.stretch.variant
    assert a == b
    reasons = [row["reason"] for row in rows if row["height"] == 10]
    assert not any(reasons[:2]) and all("no grid of 4" in reason for reason in reasons[2:])
    assert all(row["top1"] is not None for row in rows if row["height"] == 16)
    trained = [row["trained"] for row in rows if row["height"] == 16]
    assert trained == [True, False, False, False]
    for name in ("ablation.png", "grids.png"):
        assert cv2.imread(str(unbroken / name)).std() > 10


def test_another_config_is_refused(unbroken, tiny_config_file, capsys):
    argv = training(tiny_config_file, unbroken)
    assert cli.main([*argv, "--config.optim.learning_rate=0.5"]) == 2
    err = capsys.readouterr().err
    assert "optim.learning_rate is 0.01 there and 0.5 now" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_killed_training_goes_on(unbroken, tiny_config_file, tmp_path, monkeypatch, capsys):
    argv, real, calls = training(tiny_config_file, tmp_path / "out"), Progress.show, []

    def show(self, text, *args):
        if text.startswith("step 1/4") and not calls:
            calls.append(text)
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the first training
        real(self, text, *args)

    monkeypatch.setattr(Progress, "show", show)
    assert cli.main(argv) == 128 + signal.SIGINT and calls
    assert not (tmp_path / "out" / "ablation.json").exists()
    assert cli.main(argv) == 0
    assert "continuing" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == rows_of(unbroken)


def test_methods_that_change_no_training_share_a_run(tiny_config, tmp_path):
    tiny_config.stretch.frames = (2,)
    pairs = [ablate.OWN, ("kernel", "pi"), ("spatial", "pi"), ("temporal", "pi"), ("all", "pi")]
    given = tiny_config, ["vanilla", "static_tokens"], pairs, [0, 1]
    runs = ablate.plan_training(*given, True, tmp_path)
    names = ["vanilla-0", "vanilla-1"]
    names += [f"static_tokens-{which}{seed}" for seed in (0, 1) for which in ("", "kernel-pi-")]
    assert [run.name for run in runs] == names and runs[0].tests == pairs
    assert runs[2].tests == [ablate.OWN, ("spatial", "pi"), ("temporal", "pi")]
    assert runs[3].tests == [("kernel", "pi"), ("all", "pi")]
    assert runs[3].config.stretch.kernel_method == "pi"
    assert runs[2].config.stretch.kernel_method == "area"
    assert len(ablate.plan_training(*given, False, tmp_path)) == 4
    tiny_config.stretch.sizes = (7,)
    [run] = ablate.plan_training(tiny_config, ["static_tokens"], pairs, [0], False, tmp_path)
    assert "no grid of 4" in run.reason


def test_only_methods_of_resized_weights_matter():
    model = ModelConfig(patch=(4, 4), size=(16, 16), frames=2)
    methods = ablate.methods_of(StretchConfig(kernel_method="area"), ("spatial", "pi"))
    assert methods == {"kernel": "area", "spatial": "pi", "temporal": "paper"}
    for bucket, wanted in (
        (Bucket(2, 16, 16, (4, 4)), ""),
        (Bucket(2, 24, 24, (6, 6)), "kernel"),
        (Bucket(2, 24, 16, (4, 4)), "spatial"),
        (Bucket(3, 20, 20, (10, 10)), "kernel spatial temporal"),
    ):
        used = ablate.methods_used(methods, [bucket], model)
        assert used == tuple((w, methods[w]) for w in wanted.split())


def make_rows(variant, seed, top1, trained, weights="all", method="own"):
    return [
        {"variant": variant, "weights": weights, "method": method, "frames": 2, "height": size}
        | {"width": size, "patch": "4", "seed": seed, "top1": value, "trained": size == trained}
        for size, value in top1.items()
    ]


def test_means_are_over_the_cells_that_all_share(tmp_path):
    rows = make_rows("vanilla", 0, {8: 0.2, 16: 0.8, 20: 0.4}, 16)
    rows += make_rows("vanilla", 1, {8: 0.4, 16: 1.0, 20: 0.4}, 16)
    rows += make_rows("static_tokens", 0, {8: 0.6, 16: 0.5, 20: None}, 24)
    rows += make_rows("static_tokens", 1, {8: 0.8, 16: 0.5, 20: None}, 24)
    lines, name = ablation.summarise(rows)
    assert name == "1 cells unseen by all"
    assert [line["common"] for line in lines] == [[0.2, 0.4], [0.6, 0.8]]
    assert lines[0]["trained"] == [0.8, 1.0] and np.isnan(lines[1]["trained"]).all()
    text = ablation.table(lines, name).splitlines()
    assert text[1].split() == ["vanilla", "all", "own", "30.0", "20.0", "to", "40.0", "90.0"]
    assert text[2].split()[-1] == "-"
    mean = ablation.mean_grid(rows, "vanilla", ablation.OWN)
    assert [row["top1"] for row in mean] == pytest.approx([0.3, 0.9, 0.4])
    assert ablation.mean_grid(rows, "static_tokens", ablation.OWN)[2]["top1"] is None
    assert [path.name for path in ablation.draw(tmp_path, rows, "t")] == [
        "ablation.png",
        "grids.png",
    ]
    both = make_rows("vanilla", 0, {8: 0.2}, 8)
    assert ablation.common_cells(both) == ({(2, 8, 8)}, "all 1 common cells")


def test_weights_that_are_never_resized_have_one_bar(tmp_path):
    rows = make_rows("vanilla", 0, {8: 0.2, 16: 0.8}, 16)
    for weights, top1 in (("kernel", 0.2), ("spatial", 0.3)):
        for method in ("pi", "none"):
            rows += make_rows("vanilla", 0, {8: top1, 16: 0.8}, 16, weights, method)
    lines = ablation._merge_same(ablation.summarise(rows)[0])
    assert [(line["weights"], line["method"]) for line in lines] == [
        ("all", "own"),
        ("kernel", "any method"),
        ("spatial", "pi"),
        ("spatial", "none"),
    ]


def test_seeds_are_whole_numbers():
    assert ablate.parse_seeds("0,2,0") == [0, 2]
    with pytest.raises(ConfigError, match="--seeds is '0,a'"):
        ablate.parse_seeds("0,a")
