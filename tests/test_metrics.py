"""The copies of a run's metrics for TensorBoard and Weights & Biases, and what resuming does."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
import types

import jax
import pytest

from stretchysnake_jax import metrics
from stretchysnake_jax.config import Config, ConfigError, from_dict, load, save, to_dict
from stretchysnake_jax.metrics import FILE, Loggers, read_lines, scalars
from stretchysnake_jax.validation import validate


def step_line(step):
    line = {"step": step, "bucket": "8x98x98/7", "loss": 1 / step, "top1": 0.5, "compiled": 2}
    return line | {"clips_per_s": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3}


def val_line(step):
    return {"step": step, "bucket": "8x224x224/16", "val_top1": 0.25, "val_loss": 2.0}


def make_config(*names):
    config = Config(name="run")
    config.train.loggers = names
    return config


def write_run(workdir, config, start, end):
    """Writes the steps after `start` up to `end`, and a validation every 4 steps."""
    loggers = Loggers(config, workdir, start)
    for step in range(start + 1, end + 1):
        loggers.write(step_line(step))
        if step % 4 == 0:
            loggers.write(val_line(step))
    return loggers


def test_numbers_are_grouped_by_what_they_tell():
    assert scalars(step_line(2) | {"distance": None}) == {
        "train/loss": 0.5,
        "train/top1": 0.5,
        "train/grad_norm": 1.0,
        "train/learning_rate": 1e-3,
        "work/compiled": 2,
        "work/clips_per_s": 3.0,
        "loss_of/8x98x98/7": 0.5,
    }
    assert scalars(val_line(2)) == {"val/top1": 0.25, "val/loss": 2.0}


def test_loggers_are_validated_and_saved(tiny_config, tmp_path):
    tiny_config.train.loggers = ("tensorboard", "wandb")
    validate(tiny_config)
    save(tiny_config, tmp_path / "config.json")
    assert load(tmp_path / "config.json").train.loggers == ("tensorboard", "wandb")
    assert from_dict(Config, to_dict(Config())).train.loggers == ()
    tiny_config.train.loggers = ("tensorbord",)
    with pytest.raises(ConfigError, match="train.loggers is 'tensorbord': did you mean 'tensorbo"):
        validate(tiny_config)
    tiny_config.train.loggers = "wandb"
    with pytest.raises(ConfigError, match=r"train\.loggers is 'wandb': it takes a tuple of"):
        validate(tiny_config)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda _: None)
    message = f"'{name}', but the package {name} isn't installed: .*stretchysnake-jax\\[{name}\\]"
    with pytest.raises(ConfigError, match=message):
        Loggers(make_config(name), tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_loggers_only_the_json_lines_are_written_and_nothing_is_imported(tmp_path):
    code = "\n".join(
        [
            "import sys",
            "from stretchysnake_jax.config import Config",
            "from stretchysnake_jax.metrics import Loggers",
            f"loggers = Loggers(Config(), {str(tmp_path)!r})",
            "loggers.write({'step': 1, 'loss': float('nan')})",
            "loggers.close()",
            "assert not {'tensorboard', 'wandb', 'tensorflow', 'torch'} & set(sys.modules)",
        ]
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert read_lines(tmp_path / FILE) == [{"step": 1, "loss": None}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_run(tmp_path, make_config("wandb"), 0, 4).close()
    assert not list(tmp_path.iterdir())


class FakeWandB(types.ModuleType):
    """Stands for the package, and for a server that has the rows before `step`."""

    class Error(Exception):
        pass

    def __init__(self, step=0):
        super().__init__("wandb")
        self.step, self.rows, self.ended, self.fails = step, [], False, False
        self.Settings = lambda **values: values

    def init(self, **values):
        if self.fails:
            raise self.Error("No API key configured.")
        self.values = values
        return self

    def log(self, values, step):
        if self.fails:
            raise BrokenPipeError("the service is gone")
        self.rows.append((step, values))

    def finish(self):
        self.ended = True


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics, "check_installed", lambda names: None)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # undoes what the logger sets
    return fake


def test_wandb_gets_the_steps_that_it_has_not_under_one_id(fake_wandb, tmp_path):
    config = make_config("wandb")
    write_run(tmp_path, config, 0, 6).close()
    assert [step for step, _ in fake_wandb.rows] == [1, 2, 3, 4, 4, 5, 6] and fake_wandb.ended
    name, settings = fake_wandb.values["id"], fake_wandb.values["settings"]
    assert fake_wandb.values["resume"] == "allow" and fake_wandb.values["dir"] == str(tmp_path)
    assert settings["disable_git"] and settings["disable_code"] and settings["console"] == "off"
    # Killed after step 6, goes on from 4: the server has the rows up to 5, step 6 was lost.
    fake_wandb.rows, fake_wandb.step = [], 6
    write_run(tmp_path, config, 4, 8).close()
    assert [step for step, _ in fake_wandb.rows] == [6, 7, 8, 8]
    assert fake_wandb.values["id"] == name
    # The server lost the last rows before the checkpoint: they come from metrics.jsonl.
    fake_wandb.rows, fake_wandb.step = [], 7
    write_run(tmp_path, config, 8, 9).close()
    assert [step for step, _ in fake_wandb.rows] == [7, 8, 8, 9]


def test_wandb_that_cannot_start_is_one_sentence(fake_wandb, tmp_path):
    fake_wandb.fails = True
    message = r"'wandb', which can't start: No API key configured; log in with 'wandb login'"
    with pytest.raises(ConfigError, match=message):
        Loggers(make_config("wandb"), tmp_path)


def test_a_logger_that_fails_does_not_end_the_run(fake_wandb, tmp_path):
    said = []
    loggers = Loggers(make_config("wandb"), tmp_path, say=said.append)
    loggers.write(step_line(1))
    fake_wandb.fails = True
    loggers.write(step_line(2))
    loggers.write(step_line(3))
    loggers.close()
    assert len(said) == 1 and "wandb failed" in said[0] and "the service is gone" in said[0]
    assert [line["step"] for line in read_lines(tmp_path / FILE)] == [1, 2, 3]


def events(folder):
    """What TensorBoard shows: tag -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    config, folder = make_config("tensorboard"), tmp_path / "tensorboard"
    write_run(tmp_path, config, 0, 6)  # killed: not closed
    shown = events(folder)
    assert shown["train/loss"] == [(s, pytest.approx(1 / s)) for s in range(1, 7)]
    write_run(tmp_path, config, 4, 9).close()
    shown = events(folder)
    assert [step for step, _ in shown["loss_of/8x98x98/7"]] == list(range(1, 10))
    assert shown["val/top1"] == [(4, 0.25), (8, 0.25)]
    write_run(tmp_path, config, 0, 2).close()  # no checkpoint was left
    assert [step for step, _ in events(folder)["train/loss"]] == [1, 2]
    assert "val/top1" not in events(folder) or not events(folder)["val/top1"]


def test_tensorboard_switched_on_later_gets_the_steps_so_far(tmp_path):
    pytest.importorskip("tensorboard")
    write_run(tmp_path, make_config(), 0, 6).close()
    write_run(tmp_path, make_config("tensorboard"), 5, 7).close()
    shown = events(tmp_path / "tensorboard")
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]


def offline_rows(folder):
    """The rows that lie in an offline run of Weights & Biases, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    # LevelDB's log: 7 bytes, then blocks of 32 KiB that hold pieces: checksum, length, kind, data.
    data, at, pieces, rows = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            break
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record, pieces = Record.FromString(pieces), b""
            row = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            if row:
                rows[json.loads(row["_step"])] = {k: json.loads(v) for k, v in row.items()}
    return rows


def wait_for_rows(folder, last):
    """`offline_rows` once step `last` is there: W&B's own process writes on after the run's end."""
    end = time.monotonic() + 60
    while last not in (rows := offline_rows(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return rows


def test_wandb_works_offline_and_goes_on_as_one_run(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    config = make_config("wandb")
    write_run(tmp_path, config, 0, 6).close()
    write_run(tmp_path, config, 4, 8).close()
    name = (tmp_path / "wandb_id.txt").read_text()
    first, second = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
    assert {step: row["train/loss"] for step, row in wait_for_rows(first, 6).items()} == {
        step: 1 / step for step in range(1, 7)
    }
    rows = wait_for_rows(second, 8)  # what a process before it may have lost is sent again
    assert sorted(rows) == list(range(1, 9))
    assert rows[8]["val/top1"] == 0.25 and rows[8]["train/loss"] == 1 / 8
