"""Runs of the training command: killed, resumed, interrupted, broken, and what they write."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from stretchysnake_jax import cli, model
from stretchysnake_jax import config as config_lib
from stretchysnake_jax.buckets import make_run_schedule
from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.data.pipeline import TooManyUnreadable
from stretchysnake_jax.metrics import read_lines
from stretchysnake_jax.run import claim
from stretchysnake_jax.train import TrainingError, train

NUMBERS = ("step", "bucket", "loss", "top1", "grad_norm", "learning_rate")


def numbers(workdir):
    """What must not depend on interruptions: every number of every step, without the times."""
    lines = read_lines(pathlib.Path(workdir) / "metrics.jsonl")
    return [{k: line.get(k) for k in (*NUMBERS, "val_loss", "val_top1")} for line in lines]


def same_params(a, b):
    pairs = jax.tree.map(np.array_equal, model.load(a).params, model.load(b).params)
    return jax.tree.all(pairs)


def start(config_file, workdir, *more):
    command = [sys.executable, "-m", "stretchysnake_jax.cli", "train", "--config", config_file]
    return subprocess.Popen(
        [*map(str, command), "--workdir", str(workdir), *more],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for_step(workdir, step, process, seconds=120):
    log = pathlib.Path(workdir) / "metrics.jsonl"
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if log.exists() and any(line["step"] >= step for line in read_lines(log)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.stderr.read()}")


def test_a_run_begun_before_a_field_existed_goes_on(tiny_config, tmp_path):
    tiny_config.data = config_lib.resolve(tiny_config.data)
    values = config_lib.to_dict(tiny_config)
    for name in ("recipe", "rand_augment", "erase", "mixup", "repeats", "test_clips"):
        del values["data"][name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    claim(tmp_path, tiny_config, [], begun=True)
    tiny_config.data.erase = 0.5
    with pytest.raises(ConfigError, match=r"data\.erase is 0\.0 there and 0\.5 now"):
        claim(tmp_path, tiny_config, [], begun=True)


def test_a_run_writes_what_it_promises(trained):
    lines = read_lines(trained / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 25))
    wanted = {"step", "bucket", "loss", "learning_rate", "clips_per_s", "data_wait", "unreadable"}
    wanted |= {"data_wait_share"}
    assert all(wanted <= set(line) for line in steps)
    # 3 buckets: as many small stems, and one trunk for the one frame count.
    assert len({line["bucket"] for line in steps}) == 3 and steps[-1]["compiled"] == 4
    assert {"val_top1", "val_top5", "val_loss"} <= set(lines[-1]) and lines[-1]["step"] == 24
    assert (trained / "classes.txt").read_text().split() == list("012345")
    assert config_lib.load(trained / "config.json").train.steps == 24
    loaded = model.load(trained)
    assert loaded.step == 24 and loaded.classes == list("012345")
    assert model.load(trained, checkpoint="best").step == 24
    with pytest.raises(
        ConfigError, match="checkpoint '7' doesn't exist: it takes latest, best, 12"
    ):
        model.load(trained, checkpoint="7")


def test_the_same_config_gives_the_same_losses(trained, tiny_config, tmp_path):
    assert train(tiny_config, tmp_path) == 0
    assert numbers(tmp_path) == numbers(trained)
    assert same_params(tmp_path, trained)


def test_another_seed_gives_other_losses(trained, tiny_config, tmp_path):
    tiny_config.train.seed, tiny_config.train.steps = 1, 3
    assert train(tiny_config, tmp_path) == 0
    assert numbers(tmp_path)[0]["loss"] != numbers(trained)[0]["loss"]


def test_killed_and_resumed_equals_unbroken(trained, tiny_config_file, tmp_path):
    process = start(tiny_config_file, tmp_path)
    wait_for_step(tmp_path, 14, process)
    process.kill()  # SIGKILL: no chance to save
    process.communicate()
    done = read_lines(tmp_path / "metrics.jsonl")[-1]["step"]
    assert 14 <= done < 24, "the run was over before it was killed"
    process = start(tiny_config_file, tmp_path)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0 and re.search("continuing .* at step (6|12) of 24", text), text
    assert numbers(tmp_path) == numbers(trained)
    assert same_params(tmp_path, trained)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_leaves(number, trained, tiny_config_file, tmp_path):
    process = start(tiny_config_file, tmp_path)
    wait_for_step(tmp_path, 2, process)
    process.send_signal(number)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 128 + number, text
    assert f"{number.name}: saved step" in text and "start again to continue" in text
    process = start(tiny_config_file, tmp_path)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert numbers(tmp_path) == numbers(trained)


def test_a_finished_run_is_left_alone(trained, tiny_config, capsys):
    before = (trained / "metrics.jsonl").read_text()
    assert train(tiny_config, trained) == 0
    assert (trained / "metrics.jsonl").read_text() == before
    assert "done: 24 steps" in capsys.readouterr().err


def test_another_config_in_the_same_workdir_is_refused(trained, tiny_config):
    tiny_config.optim.learning_rate = 0.5
    with pytest.raises(ConfigError, match=r"optim\.learning_rate is 0\.01 there and 0\.5 now"):
        train(tiny_config, trained)


def test_a_run_whose_list_changed_is_not_continued(video_folder, tiny_config, tmp_path):
    lines = (video_folder / "clips.txt").read_text().splitlines()
    lines = [f"{video_folder}/{line}" for line in lines]
    (tmp_path / "clips.txt").write_text("\n".join(lines))
    tiny_config.data.train, tiny_config.train.steps = str(tmp_path / "clips.txt"), 1
    tiny_config.data.allow_absolute = True
    assert train(tiny_config, tmp_path / "run") == 0
    (tmp_path / "clips.txt").write_text("\n".join(reversed(lines)))
    with pytest.raises(ConfigError, match=r"clips\.txt has changed since"):
        train(tiny_config, tmp_path / "run")


def test_unreadable_clips_are_named_once_counted_and_left_out(
    video_folder, tiny_config, tmp_path, capsys
):
    lines = (video_folder / "clips.txt").read_text().splitlines()
    lines = [f"{video_folder}/{line}" for line in lines]
    (tmp_path / "broken.mp4").write_text("no video")
    listed = [*lines, f"{tmp_path}/broken.mp4 5"]
    (tmp_path / "clips.txt").write_text("\n".join(listed))
    tiny_config.data.train = str(tmp_path / "clips.txt")
    tiny_config.data.allow_absolute = True
    tiny_config.data.max_unreadable = 0.2
    tiny_config.train.steps = 12
    assert train(tiny_config, tmp_path / "run") == 0
    text = capsys.readouterr().err
    assert text.count("broken.mp4") == 1 and "unreadable, left out" in text
    rows = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert rows[-1]["unreadable"] == 1 and all(np.isfinite(row["loss"]) for row in rows)

    tiny_config.data.max_unreadable = 0.1
    with pytest.raises(TooManyUnreadable, match=r"1 of 7 clips.*data\.max_unreadable = 0\.1"):
        train(tiny_config, tmp_path / "strict")
    argv = ["train", "--workdir", str(tmp_path / "other")]
    argv += ["--config", str(_write_config(tiny_config, tmp_path))]
    assert cli.main(argv) == 1
    assert "error: 1 of 7 clips are unreadable" in capsys.readouterr().err


def _write_config(config, folder):
    """A config file that gives `config`."""
    path = folder / "config_file.py"
    values = json.dumps(config_lib.to_dict(config))
    path.write_text(
        "import json\nfrom stretchysnake_jax.config import Config, from_dict\n\n"
        f"def get_config():\n    return from_dict(Config, json.loads({values!r}))\n"
    )
    return path


def test_nan_stops_with_step_bucket_and_last_good_checkpoint(tiny_config, tmp_path):
    tiny_config.optim.learning_rate = 1e30
    tiny_config.train.checkpoint_every = 1
    message = r"at step \d+, bucket 2x\d+x\d+/\d; last good checkpoint: step \d+"
    with pytest.raises(TrainingError, match=message):
        train(tiny_config, tmp_path, Progress())
    loaded = model.load(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(loaded.params))


def test_wrong_number_of_classes_is_refused(tiny_config, tmp_path):
    tiny_config.model.num_classes = 5
    with pytest.raises(ConfigError, match=r"num_classes is 5 but .* has 6 classes: set it to 6"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_can_start_from_other_weights(trained, tiny_config, tmp_path, capsys):
    tiny_config.train.init_from = str(trained)
    tiny_config.train.steps, tiny_config.model.size = 1, (24, 24)
    tiny_config.stretch.sizes = (24,)
    tiny_config.optim.learning_rate = tiny_config.optim.final_learning_rate = 1e-12
    assert train(tiny_config, tmp_path / "run") == 0
    given = model.load(trained).stretch(frames=2, size=24, patch=4, method="paper").fitted_params
    got = model.load(tmp_path / "run").params
    assert got["pos_embed"]["grid"].shape == (6, 6, 16)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, given)
    tiny_config.model.dim = 32
    with pytest.raises(ConfigError, match=r"has shape .* takes"):
        train(tiny_config, tmp_path / "wide")


def test_epochs_set_the_number_of_steps(tiny_config, tmp_path):
    tiny_config.train.steps, tiny_config.train.epochs = 0, 1.5  # 6 clips, 3 per step
    assert train(tiny_config, tmp_path) == 0
    assert model.load(tmp_path).step == 3


@pytest.mark.slow
def test_a_token_budget_sets_the_batches(tiny_config, tmp_path, capsys):
    """Batches of several sizes; a run that goes on keeps the multiple that it began with."""
    tiny_config.stretch.variant, tiny_config.stretch.sizes = "flex_all", (8, 16)
    tiny_config.data.tokens_per_batch, tiny_config.train.steps = 40, 0
    tiny_config.train.epochs, tiny_config.train.checkpoint_every = 4.0, 2  # of 6 clips
    assert train(tiny_config, tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert re.search(r"clips/s, \d+ % waiting for data", said)
    assert re.search(r"done: \d+ steps .*, \d+ % of the time waiting for data", said)
    run = config_lib.load(tmp_path / "run" / "config.json")
    assert run.data.batch_multiple == jax.device_count()
    schedule = make_run_schedule(run, 6)
    assert len(set(schedule.batch_sizes)) > 1 and schedule.offsets[-2] < 24 <= schedule.offsets[-1]
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == len(schedule)
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(tiny_config, tmp_path / "run") == 0  # its own config says 0, "as at the start"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    tiny_config.data.batch_multiple = 7
    with pytest.raises(ConfigError, match=r"data\.batch_multiple is 1 there and 7 now"):
        train(tiny_config, tmp_path / "run")
