"""The study: its plan, what resuming and failing do, the controls, its quick form."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import make_row
from stretchysnake_configs.study import stick, weizmann

from stretchysnake_jax import (
    cli,
    models,
    study,
    study_cell,
    study_plan,
    study_report,
)
from stretchysnake_jax.buckets import Bucket, training_buckets
from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import Config, ConfigError, StretchConfig
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.interpolation import bicubic_antialias
from stretchysnake_jax.step import fit
from stretchysnake_jax.study_plan import PARTS, Cell, Study, Table
from stretchysnake_jax.validation import validate


def test_the_plan_names_every_cell_once():
    cells = study_plan.make_cells(PARTS, [0, 1, 2])
    assert len({cell.key for cell in cells}) == len(cells) == len(set(cells))
    assert {cell.model for cell in cells} == {*stick.MODELS, *weizmann.STARTS}
    assert all(cell.minutes <= 10 for cell in cells)
    assert sum(cell.part == "weizmann" for cell in cells) == 4 * 9 * 3
    assert cells[0].key == "base-base-vanilla-0" and cells[9].seed == 1
    # A model stands once in a table, so no two rows of a sheet are of one thing.
    lines = [(sheet, cell.model, cell.fold) for cell in cells if cell.seed == 0
             for sheet in study_report.sheets_of(make_row(cell)) if cell.kind in ("grid", "fine")
             ]  # fmt: skip
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("name", stick.MODELS)
def test_models_differ_from_static_tokens_in_what_is_named_alone(name):
    config, plain = stick.get_config(f"{name},detail"), stick.get_config("static_tokens,detail")
    validate(config)
    assert training_buckets(config.stretch, config.model)
    assert config.data.stick_actions.detail == 3 and not config.data.stick_actions.timing
    assert (config.train, config.optim) == (plain.train, plain.optim)
    assert config.data.batch_size == 8 and config.train.steps == 2100
    if not name.startswith(("vit_", "vanilla_")):  # hence the same initial weights
        assert config.model == dataclasses.replace(
            plain.model, frames=4 if name == "vanilla" else 8
        )
    assert stick.get_config(f"{name},quick").train.steps < 10
    fine = weizmann.get_config(name)
    assert fine.model == config.model and fine.train.steps == 300


def test_a_config_that_is_not_there_is_refused_by_name():
    for arg, words in (("vanila", "'vanilla'"), ("vanilla,fine", "it takes: base, detail, timing"),
                       ("vanilla,base,x", "it takes: quick")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            stick.get_config(arg)


@pytest.mark.parametrize(
    "frames, size, wanted",
    [
        (2, 28, "trained"),
        (8, 112, "trained"),
        (3, 56, "between"),
        (4, 84, "between"),
        (6, 35, "between"),
        (16, 56, "beyond"),
        (4, 126, "beyond"),
        (3, 126, "beyond"),
        (1, 28, "beyond"),
    ],
)
def test_where_a_place_lies(frames, size, wanted):
    stretch = StretchConfig(frames=(2, 4, 8), sizes=(28, 56, 112))
    assert study_plan.where(frames, size, stretch) == wanted


def test_runs_are_shared_by_configuration(tmp_path):
    files = Study(tmp_path, "w")
    cells = [Cell("recipes", "base", name, 0) for name in ("stretchy_plus", "static_tokens")]
    cells += [
        Cell("base", "base", "static_tokens", 0),
        Cell("retrieval", "base", "static_tokens", 0),
    ]
    names = [files.base_run(cell)[1] for cell in cells]
    assert names[0] != names[1] == names[2] == names[3]
    assert files.digest(cells[1]) == files.digest(cells[2])
    folds = [Cell("weizmann", "base", "vanilla", 0, fold) for fold in (1, 2)]
    assert files.digest(folds[0]) == files.digest(folds[1])
    (start, base), (config, own) = files.chain(folds[1])
    assert config.train.init_from == str(base) and config.data.fold == 2
    assert own != files.fine_run(folds[0])[1] and start.train.steps == 2100
    # A field that comes later, at its default, changes no digest; another value does.
    other = stick.get_config("vanilla")
    assert study_plan.digest(Config()) == study_plan.digest(Config(name="else"))
    other.optim.learning_rate = 1e-3
    assert study_plan.digest(other) != study_plan.digest(stick.get_config("vanilla"))
    wide = files.base_run(Cell("weizmann", "base", "static_tokens_wide", 0, 1))
    assert wide[1] == names[1]
    # What is done need not be done again: of a fine-tuning that is there not even its start.
    assert len(files.missing(folds[0])) == 2
    own.mkdir(parents=True)
    (own / study_plan.TRAINED).write_text("{}")
    assert files.missing(folds[1]) == [] and len(files.missing(folds[0])) == 2
    base.mkdir()
    (base / study_plan.TRAINED).write_text("{}")
    assert [workdir for _, workdir in files.missing(folds[0])] == [files.fine_run(folds[0])[1]]


def test_the_table_keeps_rows_and_takes_new_ones_in_place(tmp_path):
    path, cell = tmp_path / "study.csv", Cell("weizmann", "base", "vanilla", 0, 3)
    other, table = Cell("base", "base", "vanilla", 0), Table(path)
    table.add([make_row(other, top1=0.25), make_row(other, None, frames=16, reason="no, none")])
    table.add([make_row(cell)])
    again = Table(path)
    assert again.rows == table.rows and again.done() == {other: "x", cell: "x"}
    assert again.rows[1]["reason"] == "no, none" and again.rows[1]["top1"] is None
    again.add([make_row(other, top1=0.75) | {"config": "y"}])
    assert [row["top1"] for row in Table(path).rows] == [0.5, 0.75]
    assert Table(path).done()[other] == "y"
    table.add([make_row(dataclasses.replace(other, seed=1))])  # it keeps what the other one wrote
    assert len(Table(path).rows) == 3 and Table(path).done()[other] == "y"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="it takes part, setting"):
        Table(path)


def test_only_missing_and_changed_cells_are_left(tmp_path, capsys):
    files, table = Study(tmp_path), Table(tmp_path / "study.csv")
    cells = study_plan.make_cells(["base"], [0])
    for cell in cells[:2]:
        table.add([make_row(cell) | {"config": files.digest(cell)}])
    table.add([make_row(cells[3]) | {"config": "old"}])
    assert study.find_left(cells, table, files, Progress()) == cells[2:]
    assert f"{cells[3].key}: its configuration has changed" in capsys.readouterr().err
    text = study.describe(cells, cells[2:], 2)
    assert "9 cells of at most 10 minutes, 7 to do" in text and "0.6 on 2" in text
    assert f"{cells[0].key}  done" in text


@pytest.fixture
def no_work(monkeypatch):
    """Cells do nothing, see `fake_work`; processes are forked, which takes no second."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(study, "work", fake_work)


def fake_work(cell, files, cores, log, out):
    """Stands for `study.work` in processes: the model says what happens."""
    pathlib.Path(log).write_text(f"at work\nerror: {cell.model} went wrong\n")
    if cell.model == "temporal":
        sys.exit(1)
    if cell.model == "flex_all":
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.model == "spatial":
        time.sleep(60)
    pathlib.Path(out).write_text(json.dumps([make_row(cell)]))


def test_a_failing_cell_is_reported_and_the_others_go_on(tmp_path, no_work, capsys):
    names = ("temporal", "flex_all", "vanilla", "flexivit")
    cells = [Cell("base", "base", name, 0) for name in names]
    cells += [Cell("weizmann_zero", "base", "temporal", 0)]
    table = Table(tmp_path / "study.csv")
    failed = study.run_cells(cells, table, Study(tmp_path / "runs"), Progress())
    assert set(failed) == {*cells[:2], cells[4]}
    assert Table(tmp_path / "study.csv").done().keys() == set(cells[2:4])
    said = capsys.readouterr().err
    assert "failed: base-base-temporal-0: exit status 1: error: temporal went wrong" in said
    assert "failed: base-base-flex_all-0: signal 9 ended it after: error: flex_all" in said
    assert "not run: weizmann_zero-base-temporal-0: it takes the training of base-base-t" in said
    assert "done: base-base-vanilla-0, 1 rows, 1.0 of 10 minutes" in said


def test_an_interrupted_study_keeps_what_is_done(tmp_path, no_work, monkeypatch):
    cells = [Cell("base", "base", name, 0) for name in ("vanilla", "spatial", "flexivit")]
    monkeypatch.setattr(study, "share_cores", lambda parts: [set()])  # one at a time
    table, files = Table(tmp_path / "study.csv"), Study(tmp_path / "runs")
    real, begun = table.add, time.monotonic()

    def add(rows):
        real(rows)
        signal.setitimer(signal.ITIMER_REAL, 1.0)

    monkeypatch.setattr(table, "add", add)
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(KeyboardInterrupt):
            study.run_cells(cells, table, files, Progress())
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < 50  # the cell that sleeps was ended
    assert study.find_left(cells, Table(table.path), files, Progress()) == cells  # digest "x"
    assert Table(table.path).done() == {cells[0]: "x"}


def test_a_cell_has_its_memory_set_up_before_any_thread_runs(tmp_path, monkeypatch):
    before, seen = threading.active_count(), []

    def run(job, log, mode, cores):  # it calls `configure_cpu`, then the job
        seen.append(threading.active_count())
        return 3

    monkeypatch.setattr(study.worker, "run", run)
    with pytest.raises(SystemExit) as ended:
        study.work(Cell("base", "base", "vanilla", 0), Study(tmp_path), set(), "log", "out")
    assert ended.value.code == 3 and seen == [before]


def test_two_cells_never_train_the_same_run(tmp_path, no_work):
    pool = study.Pool(Study(tmp_path), [set(), set()])
    cells = [Cell("weizmann_zero", "base", "spatial", 0), Cell("base", "base", "spatial", 0)]
    pending = [*cells, Cell("base", "base", "spatial", 1)]
    try:
        pool.start_next(pending)
        started = pool.running
    finally:
        pool.stop()
    assert started == [cells[0], Cell("base", "base", "spatial", 1)] and pending == cells[1:]


@pytest.fixture(scope="module")
def vanilla():
    """A tiny model of one scale, 2 x 16 pixels: (config, parameters, video of 3 x 24 pixels)."""
    config = stick.get_config("vanilla,quick")
    config.model = dataclasses.replace(config.model, patch=(4, 4), size=(16, 16), frames=2)
    shapes = jax.eval_shape(lambda key: models.init(config.model, key)[1], jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    video = rng.integers(0, 256, (2, 3, 24, 24, 3), np.uint8)
    return config, params, video


def test_controls_are_what_they_say(vanilla):
    config, params, video = vanilla
    tests = study_cell.Tests(config)
    assert tests.names == ("own", "kernel", "resized")
    found = np.asarray(tests(tests.names, 3, 24)(params, video, None))
    apply = models.make_apply(config.model)

    def plainly(pixels, bucket, method):
        stretch = dataclasses.replace(config.stretch, kernel_method=method)
        run = jax.jit(lambda p, x: apply(fit(p, bucket, stretch), models.normalise(x, "clip")))
        return run(params, pixels)

    # The resize once more, as products with matrices in float64.
    rows = bicubic_antialias(24, 16)
    small = np.einsum("ih,jw,bthwc->btijc", rows, rows, video.astype(float))
    small = np.clip(np.round(small), 0, 255).astype(np.uint8)
    assert np.abs(np.asarray(study_cell.resize(video, (16, 16))).astype(int) - small).max() <= 1
    wanted = [
        plainly(video, Bucket(3, 24, 24, (4, 4)), "area"),
        plainly(video, Bucket(3, 24, 24, (6, 6)), "pi"),
        plainly(small, Bucket(3, 16, 16, (4, 4)), "area"),
    ]
    for i, logits in enumerate(wanted):
        np.testing.assert_allclose(found[:, i], logits, atol=2e-2 if i == 2 else 2e-4)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-2
    # At the trained size all three are the model itself.
    video = video[:, :2, :16, :16]
    same = np.asarray(tests(tests.names, 2, 16)(params, video, None))
    np.testing.assert_allclose(same[:, 1:], same[:, :1].repeat(2, 1), atol=1e-5)
    assert all(tests.is_trained(name, 2, 16) for name in tests.names)
    assert not any(tests.is_trained(name, 2, 24) for name in tests.names)


def test_a_quarter_of_the_clips_is_of_all_classes_and_subjects():
    labels = np.repeat(np.arange(10), 20)
    names = [f"{label}/s{subject}_t{take}.mp4" for label in range(10) for subject in range(10)
             for take in range(2)]  # fmt: skip
    clips = ClipList(names, labels, tuple("abcdefghij"))
    found = study_cell.quarter(clips)
    assert np.bincount(found.labels).tolist() == [5] * 10
    assert found.paths == study_cell.quarter(clips).paths
    assert len({path.split("/")[1].split("_")[0] for path in found.paths}) == 10
    assert 10 < sum(path.endswith("t0.mp4") for path in found.paths) < 40
    few = ClipList(names[:3], labels[:3], tuple("abcdefghij"))
    assert len(study_cell.quarter(few)) == 1


def test_only_models_of_one_scale_have_controls():
    for name, count in (("temporal", 3), ("vit_vanilla", 3), ("vanilla_large", 3), ("spatial", 1),
                        ("flexivit", 1), ("static_tokens", 1)):  # fmt: skip
        assert len(study_cell.Tests(stick.get_config(f"{name},quick")).names) == count
    tests = study_cell.Tests(stick.get_config("vanilla_large,quick"))
    assert str(tests.bucket("resized", 4, 28)) == "4x112x112/16"
    assert str(tests.bucket("kernel", 4, 28)) == "4x28x28/4"


def test_a_model_of_one_ratio_sees_rectangles():
    config = weizmann.get_config("static_tokens_wide")
    tests, square = study_cell.Tests(config), study_cell.Tests(stick.get_config(""))
    assert tests.names == ("own",) and square.shape(112) == (112, 112)
    assert str(tests.bucket("own", 4, 112)) == "4x98x126/14x18"  # of 100.2 x 125.2 pixels
    assert tests.is_trained("own", 4, 112) and not tests.is_trained("own", 4, 126)


def test_only_whole_and_current_cells_are_reported(tmp_path, capsys):
    files, table = Study(tmp_path, "w"), Table(tmp_path / "study.csv")
    base, old = Cell("base", "base", "vanilla", 0), Cell("base", "base", "spatial", 0)
    folds = [Cell("weizmann", "base", "vanilla", seed, fold)
             for seed in (0, 1) for fold in range(1, 10) if (seed, fold) != (1, 9)]  # fmt: skip
    gone = Cell("no_part", "base", "vanilla", 0)
    for cell in (*folds, base):
        table.add([make_row(cell, config=files.digest(cell))])
    for cell in (old, gone, Cell("kernels", "base", "static_tokens_pi", 1)):
        table.add([make_row(cell)])
    rows = study.current_rows(table, files, Progress())
    assert [study_plan.cell_of(row) for row in rows] == [base, *folds[:9]]
    said = capsys.readouterr().err
    assert "base-base-spatial-0: another configuration" in said and "no_part" in said
    assert "weizmann-base-vanilla-1-fold8: 1 of 9 folds are lacking" in said
    study.refuse_mixture(table, files)
    with pytest.raises(ConfigError, match="without --quick: take another --out"):
        study.refuse_mixture(table, dataclasses.replace(files, quick=True))


def test_cells_say_how_they_are_tested(tmp_path, monkeypatch):
    files, cell = Study(tmp_path), Cell("methods", "base", "vanilla", 0)
    grid, methods = files.digest(Cell("base", "base", "vanilla", 0)), files.digest(cell)
    monkeypatch.setattr(study_plan, "METHOD_FRAMES", (3,))
    assert files.digest(cell) != methods
    assert files.digest(Cell("base", "base", "vanilla", 0)) == grid
    monkeypatch.setattr(study_plan, "PROTOCOL", 99)
    assert files.digest(Cell("base", "base", "vanilla", 0)) != grid


def test_one_seed_is_the_first_whatever_is_asked_for():
    assert {cell.seed for cell in study_plan.make_cells(["kernels"], [2, 0, 1])} == {0}
    assert study_plan.make_cells(["kernels"], [1, 2]) == []


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    out = ["study", "--out", str(tmp_path / "out")]
    for words, text in (
        (["--parts", "basis"], "did you mean 'base'"),
        (["--parts", "weizmann"], "weizmann takes --data weizmann=PATH"),
        (["--data", "weizmann=/nowhere"], "a folder that is there"),
        (["--report"], "no rows"),
    ):
        assert cli.main([*out, *words]) == 2
        assert text in capsys.readouterr().err
    assert cli.main([*out, "--list", "--seeds", "0"]) == 0
    said = capsys.readouterr()
    assert "base-base-vanilla-0" in said.out and "left out without --data" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_study_goes_on_after_a_kill(tmp_path, capsys):
    argv = ["study", "--quick", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    argv += ["--parts", "base,methods,retrieval", "--seeds", "0"]
    table = tmp_path / "out" / "study.csv"
    process = subprocess.Popen([sys.executable, "-m", "stretchysnake_jax.cli", *argv])
    try:
        while not table.exists() and process.poll() is None:
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    there = Table(table).done()
    assert 0 < len(there) < 12
    time.sleep(3)  # its children notice that it is gone
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert not any(f"done: {cell.key}," in said.err for cell in there)
    cells = study_plan.make_cells(["base", "methods", "retrieval"], [0])
    rows = Table(table).rows
    assert {study_plan.cell_of(row) for row in rows} == set(cells)
    own = [row for row in rows if row["part"] == "base" and row["model"] == "vanilla"]
    assert len(own) == 3 * 4 and {row["where"] for row in own} == {"trained", "between", "beyond"}
    assert (tmp_path / "out" / "curves_base.png").exists()
    assert cli.main(argv) == 0  # nothing is left
    assert "0 of 12 cells to do" in capsys.readouterr().out
