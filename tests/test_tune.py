"""The search for launch options, with a clock that tells made-up times."""

import argparse
import json

import numpy as np
import pytest
from stretchysnake_bench import tune
from stretchysnake_bench.contenders import BOTH, Problem
from stretchysnake_bench.machine import NO_TIME, Budget
from stretchysnake_kernels.selective_scan import gpu, pallas
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec

KIND = "NVIDIA Abacus 9000"
SPECS = [ArgSpec("tiny", 1, 7, 32, 8)]


def make_search(milliseconds, *, default=(4, 1), broken=(), wrong=(), **more):
    """A search over candidates that take `milliseconds(unroll, warps)`, with 1 % of noise."""
    rng, asked = np.random.default_rng(0), []

    def make(launch):
        which = default if launch is None else (launch.unroll, launch.warps)
        asked.append(which)
        if which in broken:
            raise RuntimeError("register spilling\nand a page of text")
        y = np.full(3, 2.0 if which in wrong else 1.0)
        return tune.Program(f"program {which}", [lambda: y, lambda: y], [1, 1])

    def clock(programs, rounds):
        def one(program):
            unroll, warps = map(int, program.text[9:-1].split(","))
            return 1e-3 * milliseconds(unroll, warps) * (1 + 0.01 * rng.uniform(-1, 1, rounds))

        return [[one(program) for _ in program.runs] for program in programs]

    return tune.Search(make, 1e-5, clock, **more), asked


def test_the_fastest_unroll_then_its_fastest_warps():
    search, asked = make_search(lambda unroll, warps: abs(unroll - 8) + 10 / warps)
    found = search.run()
    assert found["launch"] == {"unroll": 8, "warps": 4}
    assert found["speedup"] == pytest.approx((4 + 10) / 2.5, rel=0.02)
    assert asked == [(4, 1), *((u, 1) for u in tune.UNROLLS), (8, 2), (8, 4)]


@pytest.mark.parametrize("faster, launch", [(0.99, None), (0.95, {"unroll": 16, "warps": 1})])
def test_the_default_stays_unless_it_pays(faster, launch):
    search, _ = make_search(lambda unroll, warps: faster if (unroll, warps) == (16, 1) else 1)
    assert search.run()["launch"] == launch


def test_warps_are_tried_with_the_default_unroll_where_no_other_helps():
    search, _ = make_search(lambda unroll, warps: 1 + (unroll != 4) - 0.1 * (warps == 2))
    assert search.run()["launch"] == {"unroll": 4, "warps": 2}


def test_bad_candidates_are_reported_and_left_out():
    search, asked = make_search(
        lambda unroll, warps: warps / unroll, broken=[(8, 1)], wrong=[(4, 1)], default=(1, 1)
    )
    found = search.run()
    assert found["launch"] == {"unroll": 2, "warps": 1}
    reasons = {record["unroll"]: record.get("skipped") for record in found["tried"][:5]}
    assert reasons[4] == "its results are off by 1.0e+00"
    assert reasons[8] == "RuntimeError: register spilling"
    assert reasons[16] == "unroll 8 spills already" and (16, 1) not in asked
    assert found["tried"][0]["same_as"] == "the default"


def test_nothing_new_is_built_after_the_end():
    search, asked = make_search(lambda unroll, warps: 1 / unroll, budget=Budget(-1))
    found = search.run()
    assert asked == [(4, 1)] and found["launch"] is None
    assert {record["skipped"] for record in found["tried"]} == {NO_TIME}


def test_results_that_are_not_numbers_are_no_match():
    good, bad = np.ones(2), np.array([1, np.nan])
    assert tune.error_of((good,), (good,)) == 0
    assert tune.error_of((good, bad), (good, good)) == np.inf


def test_programs_differ_where_the_launch_does():
    problems = [Problem(BOTH, SPECS[0])]
    usual = pallas.FORWARD.unroll[8]
    with gpu.interpret():
        default = tune.build(problems, "pallas", "forward")
        same, other = (
            tune.build(problems, "pallas", "forward", forward=gpu.Launch(unroll))
            for unroll in (usual, usual // 4)
        )
        with pytest.raises(ValueError, match="unroll is 5"):
            tune.build(problems, "pallas", "forward", forward=gpu.Launch(5))
    assert default.text == same.text != other.text
    assert tune.error_of(other.runs[0](), default.runs[0]()) < 2e-6
    seconds = tune.time_rounds([default, other], 2)
    assert np.shape(seconds) == (2, 1, 2) and np.min(seconds) > 0


def test_what_is_written_is_what_a_call_takes(tmp_path, monkeypatch):
    monkeypatch.setenv(gpu.TUNING_VARIABLE, str(tmp_path / "new"))
    path = tune.tuning_folder() / gpu.tuning_file(KIND)
    target, key = gpu.Target(kind=KIND), gpu.tuning_key("pallas", "forward", 16, "bfloat16")
    which = pallas.FORWARD._replace(unroll={16: 2})
    ask = (which, 16, "bfloat16", target, gpu.Options())
    gpu.read_tuning.cache_clear()
    assert gpu.choose_launch(*ask) == gpu.Launch(2)
    entry = {"key": key, "launch": {"unroll": 8, "warps": 4}, "tried": []}
    tune.write_tuning(path, KIND, {"jax": "1"}, [entry])
    assert gpu.choose_launch(*ask) == gpu.Launch(8, 4)

    other = {"key": "pallas backward 16 bfloat16", "launch": None}
    tune.write_tuning(path, KIND, {"jax": "1"}, [other])
    kept = json.loads(path.read_text())
    assert kept["device"] == KIND and kept["launches"] == {key: {"unroll": 8, "warps": 4}}
    assert [entry["key"] for entry in kept["measured"]] == [key, other["key"]]
    tune.write_tuning(path, KIND, {"jax": "2"}, [other])  # what another JAX measured is forgotten
    assert json.loads(path.read_text())["launches"] == {}
    assert gpu.choose_launch(*ask) == gpu.Launch(2)
    assert list(path.parent.iterdir()) == [path]
    gpu.read_tuning.cache_clear()


def test_a_kernel_that_does_not_run_does_not_stop_the_others(monkeypatch):
    lines, built = [], []

    def build(problems, backend, which, **chosen):
        if backend == "triton":
            raise NotImplementedError("needs jax-triton")
        built.append((which, chosen))
        return tune.Program(f"{which} {chosen}", [lambda: np.ones(2)] * len(problems), [1])

    def clock(programs, rounds):  # the longer the text, the slower
        return [[[len(program.text)] * rounds] * len(program.runs) for program in programs]

    monkeypatch.setattr(tune, "build", build)
    entries, failures = tune.tune(
        ["triton", "pallas"], SPECS, "float32", multiprocessors=132, clock=clock, say=lines.append
    )
    assert [entry["key"] for entry in entries] == [
        "pallas forward 8 float32",
        "pallas backward 8 float32",
    ]
    assert [failure["what"] for failure in failures] == [
        "triton forward 8 float32",
        "triton backward 8 float32",
    ]
    assert failures[0]["reason"] == "NotImplementedError: needs jax-triton"
    assert ("backward", {"backward": gpu.Launch(2, 1)}) in built
    chunks = entries[0]["chunks"]
    assert chunks["shape"] == "tiny" and chunks["rule"] in chunks["milliseconds"]
    assert set(chunks["milliseconds"]) == {1, chunks["rule"], 2 * chunks["rule"]}
    assert "triton forward 8 float32: not tuned, NotImplementedError: needs jax-triton" in lines
    assert any(line.startswith("pallas forward 8 float32: the default stays") for line in lines)


def run_main(monkeypatch, platform, **found):
    monkeypatch.setattr(tune, "tune", lambda *args, **kwargs: found["found"])
    options = argparse.Namespace(
        states=None, implementations=["pallas", "xla"], dtype=None, json=found.get("json")
    )
    device = {"platform": platform, "kind": KIND, "multiprocessors": 132}
    machine = {"device": device, "versions": {"jax": "1"}}
    return tune.main(options, machine, Budget(), SPECS)


def test_the_command_writes_the_file_and_a_report(tmp_path, monkeypatch):
    monkeypatch.setenv(gpu.TUNING_VARIABLE, str(tmp_path))
    entry = {"key": "pallas forward 8 bfloat16", "launch": {"unroll": 8, "warps": 1}}
    failures = [{"what": "triton forward 8 bfloat16", "reason": NO_TIME}]
    report = tmp_path / "report.json"
    assert run_main(monkeypatch, "gpu", found=([entry], failures), json=report) == 0
    path = tmp_path / "nvidia_abacus_9000.json"
    written = json.loads(path.read_text())
    assert written["launches"] == {entry["key"]: entry["launch"]}
    report = json.loads(report.read_text())
    assert report["tuning"] == written and report["failures"] == failures


def test_the_command_needs_a_gpu_a_folder_and_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(gpu.TUNING_VARIABLE, str(tmp_path / "own"))
    assert run_main(monkeypatch, "cpu", found=([], [])) == 1
    assert capsys.readouterr().err == ("error: tuning needs a GPU, the default device is a cpu\n")
    assert not (tmp_path / "own").exists()

    (tmp_path / "file").write_text("")
    monkeypatch.setenv(gpu.TUNING_VARIABLE, str(tmp_path / "file" / "folder"))
    assert run_main(monkeypatch, "gpu", found=([], [])) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/file/folder takes no tuning file: set STRETCHYSNAKE_TUNING to a folder "
        "of yours\n"
    )

    monkeypatch.setenv(gpu.TUNING_VARIABLE, str(tmp_path / "own"))
    assert run_main(monkeypatch, "gpu", found=([], [])) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not list((tmp_path / "own").iterdir())


def test_tuning_is_not_tuned_again_on_top_of_itself(tmp_path, monkeypatch):
    monkeypatch.setenv(gpu.TUNING_VARIABLE, str(tmp_path))
    entry = {"key": gpu.tuning_key("pallas", "forward", 8, "float32")}
    entry["launch"] = {"unroll": 2, "warps": 1}
    tune.write_tuning(tmp_path / gpu.tuning_file(KIND), KIND, {}, [entry])
    with gpu.compile_for(gpu.Target(kind=KIND)):
        tuned = gpu.find_target((0, 0))
        with tune.untuned():
            assert gpu.find_target((0, 0)) == tuned._replace(kind=None)
    gpu.read_tuning.cache_clear()
