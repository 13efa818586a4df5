"""Everything that needs a GPU, in one command: the tests marked gpu, the tuning, the benchmark.

Each part runs in a process of its own, with a share of the time; a part that fails or runs out of
time does not keep the others from running. One JSON file holds it all.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from stretchysnake_bench.machine import NO_TIME, can_write, write_json

SECONDS = 570  # of the whole; a part gets its share of what is left when it starts
SHARES = {"tests": 0.4, "tuning": 0.45, "scan": 1.0}
# A part that watches its time begins nothing new this long before it is stopped: what it has begun
# then may be a compilation. Never more than half of its time.
GRACE = 45
TESTS = pathlib.Path(__file__).resolve().parents[2] / "tests" / "test_on_gpu.py"
RESULT = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
DESCRIBE = (
    "import json; from stretchysnake_bench.machine import describe_machine; "
    "print(json.dumps(describe_machine()))"
)


def run_part(command: Sequence[str], seconds: float) -> tuple[int | None, list[str]]:
    """Runs a command, shows its lines as they come, and ends it when its time is over.

    Returns:
      Its exit status, None where it was stopped, and its lines.
    """
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
    }
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # to end it with all that it has started
    )
    stopped = threading.Event()

    def stop():
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    alarm = threading.Timer(seconds, stop)
    alarm.start()
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(lines[-1], flush=True)
        status = process.wait()
    finally:
        alarm.cancel()
        if process.poll() is None:  # interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return (None if stopped.is_set() else status), lines


def describe() -> dict:
    """Returns `machine.describe_machine()`, from another process: this one leaves the GPU alone.

    Raises:
      RuntimeError: JAX does not start.
    """
    done = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"JAX does not start: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def read_results(lines: Sequence[str]) -> dict[str, str]:
    """Returns test -> outcome, from what `pytest -v` prints."""
    return {match[1]: match[2].lower() for match in map(RESULT.match, lines) if match}


def run_tests(seconds: float, folder: pathlib.Path) -> dict:
    """Runs the tests marked gpu."""
    if not TESTS.is_file():
        return {"error": "not run: an installed wheel has no tests/, run this from a clone"}
    # Not the project's own options: those leave slow tests out and start several processes.
    command = ["-m", "pytest", "-o", "addopts=", "-v", "-m", "gpu", "--tb=short", str(TESTS)]
    status, lines = run_part([*command, "--rootdir", str(TESTS.parents[1])], seconds)
    results = read_results(lines)
    part = {"results": results, "passed": sum(r == "passed" for r in results.values())}
    if status != 0:
        part["output"] = lines[-200:]
        part["error"] = "tests failed" if status == 1 else f"pytest ended with status {status}"
    if status is None:
        part["error"] = f"cut short after {seconds:.0f} s"
    elif not part["passed"] and "error" not in part:
        part["error"] = "no test passed: all were skipped"
    return part


def run_bench(name: str, words: Sequence[str], seconds: float, folder: pathlib.Path) -> dict:
    """Runs `bench scan`, which watches its time itself, and returns what it wrote."""
    path = folder / f"{name}.json"
    command = ["-m", "stretchysnake_bench.scan", *words, "--json", str(path)]
    command += ["--seconds", str(max(seconds - GRACE, seconds / 2))]
    status, lines = run_part(command, seconds)
    part = json.loads(path.read_text()) if path.is_file() else {}
    if status != 0:
        part["output"] = lines[-200:]
        part["error"] = f"ended with status {status}"
    part["cut_short"] = [
        failure["what"] for failure in part.get("failures", []) if failure["reason"] == NO_TIME
    ]
    if status is None:
        part["error"] = f"cut short after {seconds:.0f} s"
    return part


def main(argv: Sequence[str]) -> int:
    """Runs `stretchysnake bench gpu`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="stretchysnake bench gpu", description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="the file to write")
    parser.add_argument("--shapes", default="M,L,XL,S", help="of the benchmark, in this order")
    parser.add_argument("--tune-shapes", default="M", help="to tune on")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    options = parser.parse_args(argv)
    can_write(parser, options.json)
    end = time.perf_counter() + options.seconds
    try:
        machine = describe()
    except RuntimeError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    device = machine["device"]
    if device["platform"] != "gpu":
        print(
            f"error: bench gpu needs a GPU, JAX's default device is a {device['platform']}",
            file=sys.stderr,
        )
        return 1
    print(f"On {device['kind']}, in at most {options.seconds:.0f} s: {', '.join(SHARES)}")
    parts = {
        "tests": run_tests,
        "tuning": lambda s, f: run_bench("t", ["--tune", "--shapes", options.tune_shapes], s, f),
        "scan": lambda s, f: run_bench("s", ["--shapes", options.shapes], s, f),
    }
    result = {"machine": machine, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in parts.items():
            seconds = SHARES[name] * (end - time.perf_counter())
            print(f"\n{name}: at most {seconds:.0f} s", flush=True)
            start = time.perf_counter()
            try:
                part = run(seconds, pathlib.Path(folder))
            except (OSError, ValueError) as reason:  # half a file, say
                part = {"error": f"{type(reason).__name__}: {reason}"}
            part["seconds"] = time.perf_counter() - start
            result["parts"][name] = part
            result["ok"] = not any("error" in part for part in result["parts"].values())
            write_json(options.json, result)  # what there is, should the next part be interrupted
    for name, part in result["parts"].items():
        print(f"{name}: {part.get('error', 'done')}, {part['seconds']:.0f} s")
        for what in part.get("cut_short", []):
            print(f"  {what}: {NO_TIME}")
    print(f"Wrote {options.json}")
    return 0 if result["ok"] else 1
