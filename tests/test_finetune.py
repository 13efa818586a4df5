"""Fine-tuning with a sweep: who chooses, what is trained, what is reported."""

import json

import numpy as np
import pytest

from stretchysnake_jax import cli, evaluate, finetune, model, run
from stretchysnake_jax import config as config_lib
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data.lists import read_list


@pytest.fixture(scope="module")
def lists(video_folder, tmp_path_factory):
    """Lists of two classes beside the videos' folder: all six clips each."""
    folder = tmp_path_factory.mktemp("two")
    clips = read_list(video_folder / "clips.txt")
    lines = [f"{path},{'even' if i % 2 else 'odd'}\n" for i, path in enumerate(clips.paths)]
    for name in ("train", "val", "test"):
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def arguments(config_file, trained, lists, out, *splits):
    words = [f"--config={config_file}", f"--config.train.init_from={trained}"]
    words += ["--config.data.allow_absolute=True", "--config.model.num_classes=2"]
    words += ["--config.train.steps=2", "--config.data.val="]
    words += [f"--config.data.{s}={lists / s}.txt" for s in splits]
    return ["finetune", *words, "--out", str(out), "--frames", "2", "--size", "24"]


@pytest.mark.slow
def test_the_sweep_chooses_on_val_and_reports_on_test(
    tiny_config_file, trained, lists, tmp_path, capsys
):
    argv = arguments(tiny_config_file, trained, lists, tmp_path, "train", "val", "test")
    # The second can't be trained: a finding, not the end.
    argv += ["--learning-rates", "0.01,1e30", "--weight-decays", "0.05"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    report = json.loads((tmp_path / "finetune.json").read_text())
    assert [row["learning_rate"] for row in report["sweep"]] == [0.01, 1e30]
    assert report["sweep"][1]["top1"] is None and "the loss is" in err and " - " in out
    assert report["choice"] == 0 and report["chosen_on"] == "val"
    assert report["reported_on"] == "test" and report["steps"] == 2
    assert "the head starts anew" in err and (report["height"], report["patch"]) == (24, [6, 6])
    # The same clips choose and are reported on here. Against the command that evaluates.
    assert report["result"] == {k: report["chosen"][k] for k in report["result"]}
    rows = evaluate.run(report["workdir"], [2], [(24, 24)], name="check")
    assert {k: rows[0][k] for k in report["result"]} == pytest.approx(report["result"])
    assert np.sum(report["confusion"]) == 6
    tuned, given = model.load(report["workdir"]), model.load(trained)
    assert tuned.run.optim.learning_rate == 0.01
    moved = np.abs(tuned.params["patch_embed"]["kernel"] - given.params["patch_embed"]["kernel"])
    assert 0 < moved.max() < 0.1  # two steps from where it started
    # Again: nothing is trained twice.
    assert cli.main([word for word in argv if "1e30" not in word and word != "--learning-rates"]
                    + ["--learning-rates", "0.01"]) == 0  # fmt: skip
    assert "continuing" in capsys.readouterr().err
    assert json.loads((tmp_path / "finetune.json").read_text())["result"] == report["result"]


def test_a_part_of_train_chooses_where_a_list_is_missing(tiny_config, trained, lists, tmp_path):
    data, quiet = tiny_config.data, run.Progress()
    data.train, data.val, data.allow_absolute = str(lists / "train.txt"), "", True
    tiny_config.model.num_classes = 2
    with pytest.raises(ConfigError, match="neither a test nor a validation list"):
        finetune.settle_lists(tiny_config, 0.34, tmp_path, quiet)
    data.test = str(lists / "test.txt")
    config, val, test, reported, words = finetune.settle_lists(tiny_config, 0.34, tmp_path, quiet)
    assert reported == "test" and len(test) == 6 and words == "2 of the 6 clips of train"
    config, train, again = run.prepare(config, quiet)  # as the training reads it
    assert again.paths == val.paths and sorted(val.labels) == [0, 1]
    assert sorted(train.paths + val.paths) == sorted(test.paths)
    assert train.classes == test.classes == ["even", "odd"]


def test_runs_differ_in_rate_and_decay_alone(tiny_config):
    optim = tiny_config.optim = config_lib.resolve(tiny_config.optim)
    optim.learning_rate, optim.final_learning_rate = 1e-3, 1e-5
    runs = finetune.make_runs(tiny_config, [1e-4, 1e-3], [0.0, 0.1])
    assert list(runs) == ["lr0.0001_wd0", "lr0.0001_wd0.1", "lr0.001_wd0", "lr0.001_wd0.1"]
    one = runs["lr0.0001_wd0.1"].optim
    assert (one.learning_rate, one.weight_decay) == (1e-4, 0.1)
    assert one.final_learning_rate == pytest.approx(1e-6)
    assert runs["lr0.001_wd0"].optim.final_learning_rate == 1e-5


@pytest.mark.parametrize(
    "words, text",
    [
        ([], "--config is missing"),
        (["--config", "CONFIG"], "train.init_from is ''"),
        (["--config", "CONFIG", "--config.train.init_from=x", "--learning-rates", "fast"],
         "--learning-rates is 'fast': it takes numbers > 0"),
        (["--config", "CONFIG", "--hold-out", "0"], "--hold-out is 0.0"),
        (["--config", "CONFIG", "--config.train.init_from=x", "--frames", "2,4"],
         "--frames names 2 values"),
    ],
)  # fmt: skip
def test_wrong_arguments_give_one_sentence(tiny_config_file, tmp_path, words, text, capsys):
    words = [str(tiny_config_file) if word == "CONFIG" else word for word in words]
    assert cli.main(["finetune", *words, "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and not (tmp_path / "x").exists()
