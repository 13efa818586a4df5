"""Traces of some steps: which are traced, and what is said about them."""

import gzip
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.profile import LENGTH, SOON, WAIT, Profiler, parse_steps


@pytest.mark.parametrize("text, steps", [("", SOON), ("3:5", (3, 5)), ("7:7", (7, 7))])
def test_steps_are_parsed(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["5", "5:3", "0:3", "a:b", "1:2:3", ":4", "-1:4"])
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError, match=f"--profile is '{text}': it takes START:END"):
        parse_steps(text)


@jax.jit
def work(x):
    return (x @ x).sum()


def run_loop(profiler, start, end):
    """A loop as the training's: a step's result is read during the one after it."""
    pending, x = None, jnp.ones((64, 64))
    for step in range(start, end + 1):
        profiler.step(step)
        result = work(x)
        if pending is not None:
            pending.block_until_ready()
        pending = result
    profiler.close()


def traced_steps(path):
    """The steps that a trace marks, and the names of all its events."""
    (trace,) = pathlib.Path(path).glob("*perfetto_trace.json.gz")
    found = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    marks = [int(event["args"]["step_num"]) for event in found if event.get("name") == "train"]
    return sorted(marks), {event.get("name") for event in found}


@pytest.mark.parametrize(
    "steps, start, said, marked",
    [
        ((4, 6), 1, (4, 6), [4, 5, 6, 7]),  # one more, during which the last one ends
        (SOON, 101, (101 + WAIT, 100 + WAIT + LENGTH), None),
        ((19, 25), 1, (19, 20), [19, 20]),  # the run ends first
        ((2, 12), 11, (11, 12), [11, 12, 13]),  # the run goes on within them
    ],
)
def test_a_trace_holds_the_steps_that_are_said(steps, start, said, marked, tmp_path):
    lines = []
    run_loop(Profiler(tmp_path, steps, lines.append), start, start + 19)
    assert len(lines) == 1, lines
    found = re.match(r"traced steps (\d+) to (\d+) into (\S+): open .*perfetto.*xprof", lines[0])
    assert found, lines
    assert (int(found[1]), int(found[2])) == said
    marks, names = traced_steps(found[3])
    assert marks == (marked or list(range(said[0], said[1] + 2)))
    assert any("work" in str(name) for name in names)
    assert list(pathlib.Path(found[3]).glob("*.xplane.pb"))


@pytest.mark.parametrize(
    "steps, said",
    [
        ((3, 5), "--profile: steps 3 to 5 were done before: nothing traced"),
        ((90, 95), "--profile: step 90 was not reached: nothing traced"),
    ],
)
def test_steps_that_never_come_are_said_to(steps, said, tmp_path):
    lines = []
    run_loop(Profiler(tmp_path, steps, lines.append), 10, 20)
    assert lines == [said] and not list(tmp_path.iterdir())


def test_off_does_nothing(tmp_path):
    run_loop(Profiler(tmp_path, None, pytest.fail), 1, 20)
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_traces(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run_loop(Profiler(tmp_path, (2, 3), pytest.fail), 1, 20)
    assert not list(tmp_path.iterdir())


def test_a_trace_that_someone_else_takes_does_not_end_the_run(tmp_path):
    lines = []
    with jax.profiler.trace(tmp_path / "other"):
        run_loop(Profiler(tmp_path / "run", (2, 3), lines.append), 1, 6)
    assert len(lines) == 1 and "--profile: can't trace: " in lines[0]
