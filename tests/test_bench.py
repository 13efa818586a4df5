"""The benchmark of the scan and the one command for GPUs: what they compute, say, and write."""

import collections
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stretchysnake_bench import aot, contenders, gpu_report, prediction, roofline, scan, scan_table
from stretchysnake_bench.contenders import BACK, BLOCK, BOTH, FORWARD, SCAN, Job, Problem
from stretchysnake_bench.machine import NO_TIME, Budget, can_write, write_json
from stretchysnake_bench.sass import Loop, Resources
from stretchysnake_kernels.selective_scan import gpu
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec

MIDDLE = ArgSpec("XL8", 8, 1569, 1152)
TINY = ArgSpec("XS", 1, 8, 32)
H100 = roofline.find_device("H100")


# Problems and jobs


def test_bytes_of_a_pass():
    bf16, both = Problem(SCAN, MIDDLE, "bfloat16"), Problem(BOTH, MIDDLE, "bfloat16")
    narrow = 2 * 16 / 1152  # B and C, per element
    assert bf16.bytes(FORWARD) == pytest.approx(MIDDLE.elements * 2 * (4 + narrow))
    assert bf16.bytes(BACK) == pytest.approx(MIDDLE.elements * 2 * (11 + 3 * narrow))
    assert Problem(SCAN, MIDDLE).bytes(BACK) == 2 * bf16.bytes(BACK)
    # The second direction has its own x, delta, B and C, and shares z and y.
    assert both.bytes(FORWARD) == pytest.approx(MIDDLE.elements * 2 * (6 + 2 * narrow))
    assert both.elements == 2 * bf16.elements


@pytest.mark.parametrize("what", [SCAN, BOTH])
def test_all_implementations_compute_the_same_problem(what):
    problem, failures = Problem(what, TINY, "bfloat16"), []
    jobs = contenders.make_jobs(
        problem, ["xla", "native"], True, print, lambda *why: failures.append(why), Budget()
    )
    jobs = contenders.measure(
        problem, jobs, 1, lambda *done: None, print, lambda *why: failures.append(why)
    )
    # Where no compiler was, there is no native; nothing else may fail.
    assert {name.split()[0] for name, _ in failures} <= {"native"}
    assert {job.step for job in jobs if job.name == "xla"} == {FORWARD, BACK}
    assert all(len(job.seconds) == 1 and job.seconds[0] > 0 for job in jobs)
    weights = {k: v.dtype for k, v in contenders.make_problem(problem)[0].items() if k in "AD"}
    assert set(weights.values()) == {np.dtype("float32")}


def test_what_fails_or_computes_something_else_is_left_out():
    problem = Problem(SCAN, TINY)
    right = contenders.expected_y(problem)

    def fails():
        raise MemoryError("out of memory\nand a traceback")

    jobs = [
        Job(SCAN, FORWARD, "right", lambda: right, calls=4),
        Job(SCAN, FORWARD, "wrong", lambda: right + 1),
        Job(SCAN, FORWARD, "broken", fails),
    ]
    failures = {}
    left = contenders.measure(
        problem, jobs, 2, lambda *done: None, print, lambda *why: failures.update([why])
    )
    assert [job.name for job in left] == ["right"] and len(left[0].seconds) == 2
    assert failures["broken forward"] == "MemoryError: out of memory"
    assert failures["wrong forward"].startswith("ValueError: computes another scan: error ")


def test_repeated_calls_are_all_computed():
    def double(x):
        return {"y": 2 * x, "sum": jnp.sum(x)}

    x = jnp.arange(4.0)
    lowered = jax.jit(contenders.repeated(double, 3)).lower(x)
    assert "while" in lowered.as_text() and "optimization_barrier" in lowered.as_text()
    np.testing.assert_array_equal(lowered.compile()(x)["y"], 2 * x)
    assert contenders.repeated(double, 1) is double
    assert contenders.calls_per_sample(Problem(SCAN, TINY), FORWARD, "pallas") == 1  # on the CPU


def test_nothing_is_built_after_the_end():
    failures = []
    jobs = contenders.make_jobs(
        Problem(SCAN, TINY), ["xla"], True, print, lambda *why: failures.append(why), Budget(-1)
    )
    assert jobs == [] and ("xla", NO_TIME) in failures


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_peers_compute_both_directions(dtype):
    pytest.importorskip("torch")
    from stretchysnake_bench import torch_peers as peers

    problem = Problem(BOTH, TINY, dtype)
    args, d_y = contenders.make_problem(problem)
    want = contenders.expected_y(problem)
    for peer in (peers.PEERS[0], peers.PEERS[2]):
        tensors = peers.to_torch(args, peer.tokens_last)
        y = peers.both_directions(peer.scan, tensors, 2 if peer.tokens_last else 1)
        got = peers.to_numpy(y)
        got = np.swapaxes(got, 1, 2) if peer.tokens_last else got
        tolerance = contenders.TOLERANCE[dtype]
        assert np.abs(got - want).max() < tolerance * np.abs(want).max()
    assert peers.to_tensor(d_y).shape == d_y.shape


# The table


def make_jobs(seconds):
    """One of ours and a peer."""
    ours = Job(SCAN, FORWARD, "pallas", None, memory=2**20, calls=7, seconds=seconds)
    return [ours, Job(SCAN, FORWARD, "torch loop", None, seconds=[9 * s for s in seconds])]


def test_rows_hold_rates_and_shares_of_the_roofline():
    problem = Problem(SCAN, MIDDLE, "bfloat16")
    expected = prediction.Expected(95e-6, 76e-6, "special", 108, 0)
    rows = scan_table.table_rows(
        problem, make_jobs([90e-6, 100e-6, 130e-6]), ["pallas"], False, H100,
        {(FORWARD, "pallas"): expected},
    )  # fmt: skip
    ours, peer, ratio = rows
    assert ours["median_ms"] == pytest.approx(0.1) and ours["min_ms"] == pytest.approx(0.09)
    assert ours["elements_per_second"] == pytest.approx(MIDDLE.elements / 1e-4)
    assert ours["hbm_share"] == pytest.approx(problem.bytes(FORWARD) / 3.352e12 / 1e-4)
    assert ours["model_ms"] == pytest.approx(0.095) and ours["bound_share"] == pytest.approx(0.76)
    assert ours["calls"] == 7 and ours["bound"] == "special" and "model_ms" not in peer
    assert ratio["name"] == "torch loop / pallas" and ratio["ratio"] == pytest.approx(9)
    assert "bar" not in ratio
    line = scan_table.format_row(ours, on_gpu=True)
    for text in ("0.0900", "0.1000", "144.599", "35%", "0.0950", "76%"):
        assert text in line.split()
    assert len(scan_table.header(on_gpu=True).split("ratio")[0]) == len(line) + 1 + 3


def test_bars_are_for_the_cpu_only():
    jobs = [
        Job(SCAN, FORWARD, "xla", None, memory=0, seconds=[1e-3]),
        Job(SCAN, FORWARD, "torch loop", None, seconds=[1e-3]),
    ]
    problem = Problem(SCAN, ArgSpec("S", 8, 785, 384))
    assert scan_table.table_rows(problem, jobs, ["xla"])[-1]["holds"] is False
    assert "holds" not in scan_table.table_rows(problem, jobs, ["xla"], bars=False)[-1]


# The command


@pytest.mark.slow
def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scan.SPECS, "XS", TINY)
    monkeypatch.setattr(scan, "memory_growth", lambda ours: {name: {} for name in ours})
    path = tmp_path / "scan.json"
    words = ["--quick", "--implementations", "xla,pallas", "--directions", "1,2", "--rounds", "1"]
    assert scan.main([*words, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "pallas: not measured" in out and "bidir XS: batch, length" in out
    result = json.loads(path.read_text())
    assert result["machine"]["device"]["platform"] == "cpu" and result["failures"] == []
    ours = [row for row in result["rows"] if row["name"] == "xla"]
    assert {(row["what"], row["pass"]) for row in ours} == {
        (what, step) for what in (SCAN, BOTH, BLOCK) for step in (FORWARD, BACK)
    }
    assert all("model_ms" not in row and "hbm_share" not in row for row in ours)

    assert scan.main([*words, "--seconds", "0", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["rows"] == [] and {f["reason"] for f in result["failures"]} == {NO_TIME}


@pytest.mark.parametrize(
    "words, message",
    [
        ("--shapes S,Q", "--shapes has Q, takes some of XS, S, M, L, XL"),
        ("--directions 3", "--directions has 3, takes some of 1, 2"),
        ("--implementations cuda", "--implementations has cuda, takes some of pallas, triton"),
        ("--rounds 0", "--rounds is 0, takes at least 1"),
        ("--tune --states 7", "--states has 7, takes some of 8, 16, 32"),
        ("--json no/such/folder.json", "no/such/folder.json, but there is no folder no/such"),
        ("--json .", "--json is ., a folder, takes the name of a file"),
    ],
)
def test_bad_words_are_refused_in_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit):
        scan.main(words.split())
    assert message in capsys.readouterr().err


def test_an_unknown_gpu_has_no_roofline(capsys):
    found = {"kind": "NVIDIA L40S", "multiprocessors": 142, "capability": "8.9"}
    assert scan.known_device(found, print) is None
    out = capsys.readouterr().out
    assert "No roofline and no prediction: the cost model has no figures for 'NVIDIA L40S'" in out
    found = {"kind": "NVIDIA H100 80GB HBM3", "multiprocessors": 114, "capability": "9.0"}
    assert scan.known_device(found, print).cores == 114


def test_files_are_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1})
    with pytest.raises(TypeError):
        write_json(path, {"b": object()})
    assert json.loads(path.read_text()) == {"b": 1} and list(tmp_path.iterdir()) == [path]
    can_write(None, path)


# The prediction


def count_per_token(name, *loops, states=16):
    """`prediction.count_per_token` of a kernel with these loops, dicts of opcodes."""
    loops = [
        Loop(collections.Counter({k.replace("_", "."): v for k, v in loop.items()}))
        for loop in loops
    ]
    return prediction.count_per_token(Resources(99, 0, 0, 0, 0, loops, ""), name, states)


def test_instructions_are_counted_per_token():
    # Half precision: four tokens a turn, the tokens left over, a loop over chunks.
    walk, tail = dict(STG_E_U16=4, FFMA=40, MUFU_EX2=8), dict(STG_E_U16=1, FFMA=13)
    chunks = dict(LDG_E_128=4, LDG_E=1, FFMA=99)
    count = count_per_token("selective_scan", tail, walk, chunks)
    assert count == {"STG": 1, "FFMA": 10, "MUFU": 2}
    again, back = dict(LDG_E_U16=4, FFMA=10), dict(STG_E_U16=6, STG_E=2, LDG_E_U16=8, FFMA=60)
    count = count_per_token("selective_scan_gradient", again, back, chunks)
    assert count == {"LDG": 2 + 4, "STG": 3 + 1, "FFMA": 5 + 30}
    count = count_per_token("selective_scan_gradient_summary", dict(LDG_E_U16=6, FFMA=8))
    assert count == {"LDG": 3, "FFMA": 4}


def test_instructions_are_counted_per_token_in_float32():
    chunks = dict(LDG_E_128=4, LDG_E=1, FFMA=99)
    walk = dict(STG_E=4, LDG_E=12, LDG_E_128=32, FFMA=40)
    count = count_per_token("selective_scan", walk, chunks)
    assert count == {"STG": 1, "LDG": 11, "FFMA": 10}
    again, back = dict(LDG_E=4, LDG_E_128=8, FFMA=10), dict(STG_E=10, LDG_E=8, FFMA=60)
    count = count_per_token("selective_scan_gradient", again, back, chunks, states=32)
    assert count == {"LDG": 6 + 4, "STG": 5, "FFMA": 5 + 30}


def predict_tiny(**change):
    problem = Problem(SCAN, TINY, "bfloat16")
    function = functools.partial(contenders.our_scan, implementation="pallas")
    with gpu.compile_for(gpu.Target((9, 0))):
        return prediction.expect(
            function,
            contenders.make_problem(problem)[:1],
            **dict(device=H100, states=16, elements=problem.elements, bytes_moved=100) | change,
        )


@pytest.mark.skipif(aot.missing_packages() is not None, reason=str(aot.missing_packages()))
def test_the_model_predicts_a_kernel():
    found = predict_tiny()
    # A warp on a GPU of 528 quarters: far from the bound.
    assert found.seconds > 100 * found.bound_seconds > 0
    assert found.bound in ("special", "issue") and found.spills == 0 and found.registers > 32
    large = predict_tiny(bytes_moved=10**9)
    assert large.bound == "HBM" and large.seconds == pytest.approx(1e9 / H100.bandwidth)


@pytest.mark.skipif(aot.missing_packages() is not None, reason=str(aot.missing_packages()))
def test_repeating_a_call_adds_no_copies_and_no_wait():
    problem = Problem(BOTH, ArgSpec("", 1, 197, 192), "bfloat16")
    function = functools.partial(contenders.our_scans, implementation="pallas")
    args = contenders.make_problem(problem)[:1]
    with gpu.compile_for(gpu.Target((9, 0))):
        once, many = (
            aot.compile_for(contenders.repeated(function, calls), *args) for calls in (1, 9)
        )
    assert '"known_trip_count":{"n":"9"}' in many.hlo.replace(" ", "")
    assert many.temp_bytes - once.temp_bytes < 4096
    body = many.hlo[: many.hlo.index("ENTRY")]
    assert not re.search(r"bf16\[[\d,]+\]\S* copy\(", body)


def test_no_prediction_without_packages_or_kernels(monkeypatch):
    monkeypatch.setattr(aot, "missing_packages", lambda: None)
    with pytest.raises(prediction.NoPrediction, match="it calls no Triton kernel"):
        predict_tiny(compile_kernels=lambda *args, target: [])

    def refuse(*args, target):
        raise NotImplementedError("a pallas_call gave 0 Triton kernels, only those are read")

    with pytest.raises(prediction.NoPrediction, match="gave 0 Triton kernels"):
        predict_tiny(compile_kernels=refuse)
    monkeypatch.setattr(aot, "missing_packages", lambda: "needs this and that")
    with pytest.raises(prediction.NoPrediction, match="needs this and that"):
        predict_tiny()


# The one command


def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch, capsys):
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU")
    path = tmp_path / "gpu.json"
    assert gpu_report.main(["--json", str(path)]) == 1
    error = "error: bench gpu needs a GPU, JAX's default device is a cpu\n"
    assert capsys.readouterr().err == error
    assert not path.exists()


@pytest.mark.parametrize("broken", [None, "tests", "scan"])
def test_one_file_with_all_parts_whatever_fails(tmp_path, monkeypatch, capsys, broken):
    clock, watched = [0.0], []
    monkeypatch.setattr(gpu_report.time, "perf_counter", lambda: clock[0])

    def run_part(command, seconds):  # every part takes all of its time
        clock[0] += seconds
        if "pytest" in command:
            bad = "FAILED" if broken == "tests" else "PASSED"
            return int(broken == "tests"), [f"tests/test_on_gpu.py::test_a[x y-1] {bad}  [ 50%]"]
        tuning = "--tune" in command
        watched.append(seconds - float(command[command.index("--seconds") + 1]))
        text = json.dumps({"rows": [1], "failures": [{"what": "L", "reason": NO_TIME}]})
        if broken == "scan" and not tuning:
            return None, ["Killed"]
        with open(command[command.index("--json") + 1], "w") as file:
            file.write(text)
        return 0, []

    machine = {"device": {"platform": "gpu", "kind": "NVIDIA Abacus 9000"}}
    monkeypatch.setattr(gpu_report, "describe", lambda: machine)
    monkeypatch.setattr(gpu_report, "run_part", run_part)
    path = tmp_path / "gpu.json"
    assert gpu_report.main(["--json", str(path)]) == (0 if broken is None else 1)
    result = json.loads(path.read_text())
    assert result["machine"] == machine and result["ok"] == (broken is None)
    tests, tuning, scanned = (result["parts"][name] for name in ("tests", "tuning", "scan"))
    assert tests["results"] == {
        "tests/test_on_gpu.py::test_a[x y-1]": "failed" if broken == "tests" else "passed"
    }
    assert tests.get("error") == ("tests failed" if broken == "tests" else None)
    assert tuning["rows"] == [1] and tuning["cut_short"] == ["L"]
    if broken == "scan":
        assert scanned["error"].startswith("cut short after ") and scanned["output"] == ["Killed"]
    assert "NVIDIA Abacus 9000, in at most 570 s" in capsys.readouterr().out
    assert clock[0] == pytest.approx(570)
    assert watched == pytest.approx([gpu_report.GRACE] * 2)


def test_a_part_is_shown_and_stopped_when_its_time_is_over(capfd):
    words = ["-c", "import time; print('begun', flush=True); time.sleep(60)"]
    status, lines = gpu_report.run_part(words, 3)
    assert status is None and lines == ["begun"] and capfd.readouterr().out == "begun\n"
    assert gpu_report.run_part(["-c", "import sys; sys.exit(3)"], 60) == (3, [])


def test_an_installed_wheel_has_no_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "TESTS", tmp_path / "tests" / "test_on_gpu.py")
    part = gpu_report.run_tests(1, tmp_path)
    assert part == {"error": "not run: an installed wheel has no tests/, run this from a clone"}


def test_the_tests_for_a_gpu_are_found_and_skipped_here(tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU")
    assert gpu_report.TESTS.is_file() and sys.executable
    part = gpu_report.run_tests(120, tmp_path)
    assert len(part["results"]) > 30 and set(part["results"].values()) == {"skipped"}
    assert part["error"] == "no test passed: all were skipped"
