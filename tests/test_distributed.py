"""Real processes on this machine: they find each other, agree on a stop, and stop together."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from stretchysnake_jax import cluster, distributed
from stretchysnake_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
OTHERS = (*cluster.JAX, "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_PORT", "JOB_COMPLETION_INDEX")
PREFIXES = ("SLURM_", "OMPI_", "PMIX_", "KUBERNETES_")
# A process with four virtual devices; every test's own work follows. Slow beats and long silences
# would make tests slow, so they are shorter where a test waits for them.
SET_UP = """
import sys, time
from stretchysnake_jax import distributed
if {quick}:
    distributed.HEARTBEAT, distributed.BEAT, distributed.SILENT = 8, 0.5, 2.0
distributed.start(60)
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
me = jax.process_index()
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

def total(scale=1.0):
    "The sum of 0, 1, ... over all devices of all processes, by a collective."
    values = np.arange(jax.device_count(), dtype=np.float32) * scale
    spread = NamedSharding(mesh, PartitionSpec("data"))
    values = jax.make_array_from_callback(values.shape, spread, values.__getitem__)
    psum = jax.shard_map(
        lambda v: jax.lax.psum(v, "data"),
        mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(),
    )
    return float(jax.jit(psum)(values)[0])

def say(text):
    print(text, flush=True)
"""


def environment(**extra):
    """This process' environment without what tells of other processes, and four CPU devices."""
    clean = {k: v for k, v in os.environ.items() if k not in OTHERS and not k.startswith(PREFIXES)}
    flags = "--xla_force_host_platform_device_count=4"
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    clean |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths}
    return clean | {k: str(v) for k, v in extra.items()}


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture
def run(tmp_path):
    """Starts processes of one run; returns them. What still lives at the end is killed."""
    started = []

    def launch(code, count=2, quick=True, given=None):
        script = tmp_path / "work.py"
        script.write_text(SET_UP.replace("{quick}", str(quick)) + code)
        given = given or dict(
            zip(cluster.JAX, (f"localhost:{free_port()}", count, "{rank}"), strict=True)
        )
        for process in range(count):
            env = environment(**{k: str(v).format(rank=process) for k, v in given.items()})
            with (tmp_path / f"{process}.log").open("w") as log:
                started.append(
                    subprocess.Popen([sys.executable, script], env=env, stdout=log, stderr=log)
                )
            started[-1].log = tmp_path / f"{process}.log"
        return started

    yield launch
    for process in started:
        process.kill()
        process.wait()


def wait_for(process, text, seconds=60):
    """Waits until a process has printed a text."""
    end = time.monotonic() + seconds
    while text not in process.log.read_text():
        assert time.monotonic() < end and process.poll() is None, process.log.read_text()
        time.sleep(0.05)


def ended(processes, seconds=60):
    """Exit status and output of each."""
    found = [process.wait(seconds) for process in processes]
    return found, [process.log.read_text() for process in processes]


ENDLESS = """
with distributed.Watch(say):
    print("sum", total(), flush=True)
    for step in range(10_000):
        {work}
        time.sleep(0.05)
"""


SUM = """
with distributed.Watch(say):
    counts = jax.process_count(), jax.local_device_count()
    print(*counts, total(), distributed.hosts())
    time.sleep(2 * me)  # the first may be done long before the last
"""


def test_find_each_other_and_sum_over_all_devices(run):
    status, output = ended(run(SUM))
    assert status == [0, 0], output
    for text in output:
        assert f"2 4 28.0 {[socket.gethostname()] * 2}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {
            "SLURM_JOB_ID": os.getpid(),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": 2,
            "SLURM_PROCID": "{rank}",
            "SLURM_LOCALID": "{rank}",
            "SLURM_STEP_TASKS_PER_NODE": 2,
        },
        {
            "OMPI_MCA_orte_hnp_uri": f"{os.getpid() * 4096}.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": 2,
            "OMPI_COMM_WORLD_RANK": "{rank}",
            "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
            "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
        },
    ],
    ids=["SLURM", "Open MPI 4"],
)
def test_find_each_other_by_what_jax_reads(run, given):
    status, output = ended(run(SUM, given=given))
    assert status == [0, 0], output
    assert all("2 4 28.0" in text for text in output)


@pytest.mark.parametrize(
    ("victim", "work"),
    [
        pytest.param(0, "pass", marks=pytest.mark.slow),
        pytest.param(1, "pass", marks=pytest.mark.slow),
        pytest.param(0, "total(step)", marks=pytest.mark.slow),
        pytest.param(1, "multihost_utils.process_allgather(jnp.ones(3))", marks=pytest.mark.slow),
        (1, "total(step)"),
    ],
)
def test_the_others_stop_and_name_the_dead(run, victim, work):
    processes = run(ENDLESS.replace("{work}", work))
    for process in processes:
        wait_for(process, "sum 28.0")
    time.sleep(2)  # a few signs of life
    processes[victim].kill()
    begin = time.monotonic()
    (status,), (output,) = ended([processes[1 - victim]])
    assert time.monotonic() - begin < 15  # of a heartbeat of 8 s
    assert status == distributed.DIED, output
    sentence = f"process {victim} on host {socket.gethostname()} died; {distributed.AGAIN}"
    assert output.count(sentence) == 1, output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_three_stop_within_the_stated_time(run, victim):
    processes = run(ENDLESS.replace("{work}", "total(step)"), count=3, quick=False)
    for process in processes:
        wait_for(process, "sum 66.0")
    time.sleep(10)
    processes.pop(victim).kill()
    begin = time.monotonic()
    status, output = ended(processes)
    assert time.monotonic() - begin < distributed.STOPS_WITHIN
    assert status == [distributed.DIED] * 2, output
    for text in output:
        assert text.count(f"process {victim} on host {socket.gethostname()} died; ") == 1, text


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_others_stop_when_one_fails(run, culprit):
    work = f"if me == {culprit} and step == 9: raise ValueError('no disk')"
    processes = run(ENDLESS.replace("{work}", work))
    status, output = ended(processes)
    assert status == [1, 1], output
    assert "ValueError: no disk" in output[culprit]
    sentence = f"process {culprit} on host {socket.gethostname()} failed (ValueError: no disk); "
    assert sentence in output[1 - culprit]


@pytest.mark.slow
def test_a_process_that_leaves_early_has_failed(run):
    code = "if me == 1: sys.exit(0)\n" + ENDLESS.replace("{work}", "pass").replace("total()", "1")
    status, output = ended(run(code))
    assert status == [1, 1], output
    assert "process 1 on host" in output[0] and "it ended before its work was done" in output[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_hangs_is_dead_too(run, victim):
    processes = run(ENDLESS.replace("{work}", "total(step)"))
    for process in processes:
        wait_for(process, "sum 28.0")
    time.sleep(2)
    processes[victim].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    (status,), (output,) = ended([processes[1 - victim]])
    assert time.monotonic() - begin < 15
    assert status == distributed.DIED, output
    assert f"process {victim} on host {socket.gethostname()} died; " in output


STOPPING = """
import signal
class Note:
    got = None
def note(number, frame):
    Note.got = number
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
with distributed.Watch(say):
    for step in range(1, 2001):
        total(step)
        if step == 5: print("under way", flush=True)
        if agreed := distributed.stop_agreed(Note.got, step):
            print(f"stops with {agreed} at {step}, own {Note.got}")
            break
        time.sleep(0.02 * me)
"""


@pytest.mark.parametrize(
    ("target", "number"),
    [pytest.param(0, signal.SIGTERM, marks=pytest.mark.slow), (1, signal.SIGINT)],
)
def test_all_stop_at_one_step(run, target, number):
    processes = run(STOPPING)
    for process in processes:
        wait_for(process, "under way")
    processes[target].send_signal(number)
    status, output = ended(processes)
    assert status == [0, 0], output
    lines = [next(k for k in text.splitlines() if k.startswith("stops")) for text in output]
    said = {line.split(", own")[0] for line in lines}
    assert len(said) == 1, lines
    assert f"stops with {int(number)} at " in lines[0]
    assert lines[1 - target].endswith("own None")


@pytest.mark.parametrize(
    ("error", "anothers"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (RuntimeError("INTERNAL: NCCL operation failed"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("x is UNKNOWN: y"), False),
    ],
)
def test_errors_that_another_may_have_caused(error, anothers):
    assert distributed._may_be_anothers(error) == anothers
    try:
        raise OSError("checkpoint") from error
    except OSError as raised:
        assert distributed._may_be_anothers(raised) == anothers


def test_alone_nothing_happens(monkeypatch):
    for name in (*OTHERS, *(k for k in os.environ if k.startswith(PREFIXES))):
        monkeypatch.delenv(name, raising=False)
    distributed.start()
    with distributed.Watch(print) as watch, pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError
    assert distributed.stop_agreed(None, 3) is None
    assert distributed.stop_agreed(signal.SIGTERM, 3) == signal.SIGTERM
    assert distributed.hosts() == [socket.gethostname()]


@pytest.mark.slow
def test_who_does_not_come(tmp_path):
    code = "from stretchysnake_jax import distributed\ndistributed.start(3)"
    env = environment(
        JAX_COORDINATOR_ADDRESS=f"localhost:{free_port()}", JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=0
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == distributed.DIED
    assert "not all processes of the run came in time" in done.stderr


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
}
FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "CUDA_VISIBLE_DEVICES": "",
}
HERE = {"JAX_COORDINATOR_ADDRESS": "n1:99", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
INDEXED = {"KUBERNETES_SERVICE_HOST": "k", "JOB_COMPLETION_INDEX": "2"}
ARGUMENTS = {
    "coordinator_address": "n1:99",
    "num_processes": 4,
    "process_id": 2,
    "cluster_detection_method": "deactivate",
}


def without(given, *names):
    return {k: v for k, v in given.items() if k not in names}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),
        ({"JAX_COORDINATOR_ADDRESS": ""}, None),
        (HERE, ARGUMENTS),
        (HERE | SLURM, ARGUMENTS),
        (INDEXED | without(HERE, "JAX_PROCESS_ID"), ARGUMENTS),
        (INDEXED | HERE | {"JOB_COMPLETION_INDEX": "0"}, ARGUMENTS),
        (INDEXED | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | FOUR, {"local_device_ids": [2, 3]}),
        (
            SLURM | FOUR | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"},
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        (SLURM | FOUR | {"SLURM_GPUS_PER_TASK": "4"}, {"local_device_ids": [0, 1, 2, 3]}),
        (SLURM | FOUR | {"SLURM_STEP_GPUS": "0,1,2,3,4,5,6,7"}, {"local_device_ids": [0, 1, 2, 3]}),
        (SLURM | FOUR | {"SLURM_STEP_GPUS": "0,1,2,3"}, {"local_device_ids": [2, 3]}),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, {"local_device_ids": [0]}),
        (SLURM | FOUR | {"JAX_LOCAL_DEVICE_IDS": "3"}, {}),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}, {}),
        (
            MPI | {"PMIX_NAMESPACE": "prterun-n-1-8291@1"},
            ARGUMENTS | {"coordinator_address": "n-1:61539"},
        ),
        (MPI | {"JAX_COORDINATOR_ADDRESS": "n1:99"}, ARGUMENTS),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM | MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.96.0.1:34911"}, {}),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "8"}, None),
    ],
)
def test_reads_the_environment(given, wanted):
    assert cluster.find(given) == wanted


@pytest.mark.parametrize(
    "left", [*itertools.combinations(HERE, 1), *itertools.combinations(HERE, 2)]
)
def test_half_set(left):
    given = {name: HERE[name] for name in left}
    with pytest.raises(ConfigError) as raised:
        cluster.find(given)
    _, _, missing = str(raised.value).partition(" set, ")
    for name in HERE:
        assert (name in missing.split(" not: ")[0]) == (name not in left)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (HERE | {"JAX_COORDINATOR_ADDRESS": "n1"}, "'n1': it takes process 0's HOST:PORT"),
        (HERE | {"JAX_PROCESS_ID": "4"}, "process '4' of '4'"),
        (HERE | {"JAX_NUM_PROCESSES": "four"}, "process '2' of 'four'"),
        (INDEXED, "number 2 of an indexed job, but not of how many"),
        (MPI, "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "2 processes on this host can't share its 3"),
        ({"SLURM_JOB_NUM_NODES": "2"}, "a SLURM job of 2 nodes: start it with srun"),
    ],
)
def test_one_sentence_where_the_environment_is_half_set(given, words):
    with pytest.raises(ConfigError) as raised:
        cluster.find(given)
    assert words in str(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mpirun"), reason="no Open MPI")
def test_open_mpi(tmp_path):
    script = tmp_path / "work.py"
    code = "with distributed.Watch(say): print(f'{total()} on {jax.process_count()}')\n"
    script.write_text(SET_UP.replace("{quick}", "True") + code)
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, script]
    if os.getuid() == 0:
        command.insert(1, "--allow-run-as-root")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("28.0 on 2") == 2


@pytest.mark.slow
def test_train(tiny_config_file, tmp_path):
    """Two processes of four devices give the losses of one process of eight."""
    train = [sys.executable, "-m", "stretchysnake_jax.cli", "train", "--config", tiny_config_file]
    train += ["--config.data.batch_size=8", "--config.data.repeats=4", "--config.train.steps=6"]
    program = tmp_path / "stretchysnake"
    program.write_text(f'#!/bin/sh\nshift\nexec {" ".join(map(str, train))} "$@"\n')
    program.chmod(0o755)
    losses = {}
    for processes, devices in ((1, 8), (2, 4)):
        workdir = tmp_path / str(processes)
        command = [ROOT / "launch/local.sh", str(processes), f"cpu:{devices}", "--workdir", workdir]
        env = environment(STRETCHYSNAKE=program)
        del env["XLA_FLAGS"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses[processes] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses[1]) == 6
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_hosts(tiny_config_file, tmp_path):
    """One of two processes is killed; a single one continues from the last checkpoint."""
    words = [sys.executable, "-m", "stretchysnake_jax.cli", "train", "--config", tiny_config_file]
    words += ["--config.data.batch_size=8", "--config.data.repeats=4", "--config.train.steps=80"]
    words += ["--config.train.checkpoint_every=5", "--config.train.log_every=1", "--workdir"]

    def losses(workdir):
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def begin(workdir, count):
        port, started = free_port(), []
        for process in range(count):
            given = (f"localhost:{port}", count, process)
            env = environment(**dict(zip(cluster.JAX, given, strict=True)))
            with (tmp_path / f"{process}.log").open("w") as log:
                command = [*map(str, words), str(workdir)]
                started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        return started

    (alone,) = begin(tmp_path / "unbroken", 1)
    assert alone.wait(300) == 0
    wanted, workdir = losses(tmp_path / "unbroken"), tmp_path / "run"
    two = begin(workdir, 2)
    checkpoints = workdir / "checkpoints"
    while not [c for c in checkpoints.glob("*") if c.name.isdigit() and int(c.name) >= 10]:
        assert two[0].poll() is None, (tmp_path / "0.log").read_text()
        time.sleep(0.05)
    two[1].kill()
    assert two[0].wait(60) == distributed.DIED, (tmp_path / "0.log").read_text()
    assert 10 <= max(losses(workdir)) < 80
    (one,) = begin(workdir, 1)
    assert one.wait(300) == 0, (tmp_path / "0.log").read_text()
    found = losses(workdir)
    assert list(found) == list(range(1, 81))
    assert [found[k] for k in wanted] == pytest.approx(list(wanted.values()), rel=1e-5)
