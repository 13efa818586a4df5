"""Runs that are killed, lose checkpoints or fill the disk, and end as if nothing had been."""

import functools
import random
import re
import resource
import shutil
import time

import jax
import numpy as np
import pytest
from test_checkpoint import flip, largest_file, names, small_disk  # noqa: F401
from test_train import numbers, start, wait_for_step

from stretchysnake_jax import cli
from stretchysnake_jax import config as config_lib
from stretchysnake_jax.checkpoint import Checkpoints
from stretchysnake_jax.step import init_state
from stretchysnake_jax.train import train

STEPS = 30


def words(config_file, steps=STEPS):
    """Arguments of a run with checkpoints so often that many kills hit a save."""
    settings = {"steps": steps, "checkpoint_every": 2, "eval_every": 10}
    settings = [f"--config.train.{name}={value}" for name, value in settings.items()]
    return ["--config", str(config_file), *settings]


def run(words, workdir):
    return train(cli.parse_config(words)[0], workdir)


@pytest.fixture(scope="module")
def unbroken_for(tiny_config_file, tmp_path_factory):
    """Gives, for a number of steps, the workdir of a run that nothing happened to."""

    @functools.cache
    def unbroken(steps):
        workdir = tmp_path_factory.mktemp("runs") / "unbroken"
        assert run(words(tiny_config_file, steps), workdir) == 0
        return workdir

    return unbroken


@pytest.fixture
def unbroken(unbroken_for):
    return unbroken_for(STEPS)


def assert_equal_runs(workdir, unbroken):
    """The same metrics.jsonl but for times, and the same state and progress, bit for bit."""
    assert numbers(workdir) == numbers(unbroken)
    config = config_lib.load(unbroken / "config.json")
    like = init_state(config, config.train.steps)
    (a, said), (b, wanted) = (
        Checkpoints(path, write=False).restore(like) for path in (workdir, unbroken)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert int(a["step"]) == config.train.steps
    assert said | {"elapsed": 0} == wanted | {"elapsed": 0}
    assert {name for name in names(workdir) if name.isdigit()} == names(unbroken)


def begin(words, workdir):
    return start(words[1], workdir, *words[2:])


def finish(words, workdir):
    """Runs to the end and returns what was said."""
    process = begin(words, workdir)
    text = process.communicate(timeout=280)[1]
    assert process.returncode == 0, text
    return text


def last_step(workdir):
    """The last step that stands in metrics.jsonl, or 0."""
    log = workdir / "metrics.jsonl"
    return max([line["step"] for line in numbers(workdir)], default=0) if log.exists() else 0


def saving(workdir, since):
    """Whether a checkpoint has been begun since a time, and isn't there yet."""
    try:
        parts = list((workdir / "checkpoints").glob("*.part*"))
        return any(part.stat().st_mtime > since for part in parts)
    except FileNotFoundError:  # it is there now
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kills, steps", [(20, 150)])
def test_killed_at_random_moments_equals_unbroken(
    kills, steps, unbroken_for, tiny_config_file, tmp_path
):
    """One kill while a checkpoint is written, one within the next steps, one at any time of the
    start, and so on."""
    argv, rng, in_flight = words(tiny_config_file, steps), random.Random(kills), 0
    unbroken, workdir = unbroken_for(steps), tmp_path
    wanted = numbers(unbroken)
    for kill in range(kills):
        before, began = last_step(workdir), time.time()
        process = begin(argv, workdir)
        if kill % 3 == 2:
            end = began + rng.uniform(0, 10)
            while time.time() < end and last_step(workdir) < before + 2:
                time.sleep(0.01)
        else:
            wait_for_step(workdir, before + rng.randint(1, 3), process)
            while kill % 3 == 0 and not saving(workdir, began) and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        in_flight += saving(workdir, began)
        assert last_step(workdir) < steps, "the run was over before it was killed"
        if last_step(workdir):
            so_far = numbers(workdir)
            assert so_far == wanted[: len(so_far)]
    assert in_flight, "no kill hit a save"
    print(f"{kills} kills, {in_flight} in a save, the last at step {last_step(workdir)}")
    finish(argv, workdir)
    assert_equal_runs(workdir, unbroken)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    unbroken, tiny_config_file, tmp_path, capsys
):
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    flip(largest_file(workdir / "checkpoints" / "30"), -100)
    (workdir / "checkpoints" / "28" / "SHA256SUMS").unlink()
    assert run(words(tiny_config_file), workdir) == 0
    said = capsys.readouterr().err
    assert len(re.findall("30 is dam.*28 is dam.*taking 26, the newest that is whole\n", said)) == 1
    assert f"continuing {workdir} at step 26 of 30" in said
    assert_equal_runs(workdir, unbroken)


def test_a_run_without_a_whole_checkpoint_stops(unbroken, tiny_config_file, tmp_path, capsys):
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    for step in names(workdir):
        flip(largest_file(workdir / "checkpoints" / step), -100)
    assert cli.main(["train", *words(tiny_config_file), "--workdir", str(workdir)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: .* holds no checkpoint that can be used: checkpoint 30 is dam", error)
    assert numbers(workdir) == numbers(unbroken) and names(workdir) == names(unbroken)


@pytest.fixture(params=["small disk", "file size limit"])
def fill(request, tmp_path):
    """(workdir, what takes a process the room for a checkpoint, what gives it back)."""
    if request.param == "small disk":
        disk = request.getfixturevalue("small_disk")
        filler = disk / "filler"

        def fill(process):
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - 2**16))

        yield disk / "run", fill, filler.unlink
    else:

        def fill(process):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**14, 2**14))

        yield tmp_path / "run", fill, lambda: None


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(fill, unbroken, tiny_config_file):
    workdir, fill, make_room = fill
    process = begin(words(tiny_config_file), workdir)
    wait_for_step(workdir, 11, process)
    fill(process)
    text = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "Traceback" not in text, text
    error = text.splitlines()[-1]
    found = re.match(r"error: the checkpoint of step (\d+) can't be .*: step (\d+). Start", error)
    assert found and int(found[1]) == int(found[2]) + 2, text
    assert re.search("No space left on device|File too large", error)
    assert Checkpoints(workdir, write=False).steps[-1] == int(found[2]) >= 8
    make_room()
    assert f"at step {found[2]} of {STEPS}" in finish(words(tiny_config_file), workdir)
    assert_equal_runs(workdir, unbroken)
