"""What lies in launch/: scripts are run with programs of straw around them, files are read."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from stretchysnake_jax import cluster, distributed

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
LOCAL = LAUNCH / "local.sh"
SCRIPTS = [LOCAL, LAUNCH / "slurm.sbatch"]
TOOLS = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
NAMES = (*cluster.JAX, "JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES")
# Says on one line what it was started with.
ECHO = """#!/usr/bin/env bash
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS" \\
  "on ${CUDA_VISIBLE_DEVICES:-$JAX_PLATFORMS $XLA_FLAGS}: $*"
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def clean(**extra):
    environment = {k: v for k, v in os.environ.items() if k not in NAMES}
    return environment | {k: str(v) for k, v in extra.items()}


def local(program, *words, **extra):
    """Runs local.sh with `program` in the place of stretchysnake."""
    env = clean(STRETCHYSNAKE=program, **extra)
    return subprocess.run([LOCAL, *words], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert script.read_text().startswith("#!")


@pytest.mark.skipif(not shutil.which("shellcheck", path=TOOLS), reason="no shellcheck")
def test_shellcheck():
    done = subprocess.run(
        [shutil.which("shellcheck", path=TOOLS), *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not shutil.which("hadolint", path=TOOLS), reason="no hadolint")
def test_hadolint():
    done = subprocess.run(
        [shutil.which("hadolint", path=TOOLS), LAUNCH / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_local_starts_processes_of_one_run(tmp_path):
    program = executable(tmp_path / "echo.sh", ECHO)
    done = local(program, "3", "cpu:4", "--workdir", "a b", XLA_FLAGS="--xla_one")
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    port = re.search(r"at localhost:(\d+) ", lines[0])[1]
    flags = "--xla_one --xla_force_host_platform_device_count=4"
    assert lines == [
        f"{i} of 3 at localhost:{port} on cpu {flags}: train --workdir a b" for i in range(3)
    ]


def test_local_gives_each_process_a_gpu(tmp_path):
    program = executable(tmp_path / "echo.sh", ECHO)
    done = local(
        program, "2", "gpu", "evaluate", "x", CUDA_VISIBLE_DEVICES="3,5,7", JAX_COORDINATOR_PORT=99
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"{i} of 2 at localhost:99 on {gpu}: evaluate x" for i, gpu in enumerate((3, 5))
    ]
    done = local(program, "2", "gpu", CUDA_VISIBLE_DEVICES="3")
    assert done.returncode == 2 and done.stderr == "2 processes need a GPU each, there are 1\n"


@pytest.mark.parametrize("words", [(), ("2",), ("0", "gpu"), ("2", "cpu:"), ("two", "cpu:1")])
def test_local_says_what_it_takes(words):
    done = local("true", *words)
    assert done.returncode == 2 and done.stderr.startswith("usage: launch/local.sh PROCESSES")


def test_local_needs_the_program():
    done = local("no-such-program", "1", "cpu:1")
    assert done.returncode == 2 and "no-such-program isn't on the PATH" in done.stderr


def test_local_returns_the_highest_status(tmp_path):
    program = executable(tmp_path / "exit.sh", "#!/bin/sh\nexit $((75 * JAX_PROCESS_ID))\n")
    assert local(program, "2", "cpu:1").returncode == 75


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_passes_a_signal_on(tmp_path, number):
    text = "#!/usr/bin/env bash\ntrap 'echo saved; exit 143' TERM\necho ready\n"
    program = executable(tmp_path / "wait.sh", text + "while true; do sleep 0.1; done\n")
    process = subprocess.Popen(
        [LOCAL, "2", "cpu:1"],
        env=clean(STRETCHYSNAKE=program),
        stdout=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, SIGINT is ignored, and no shell can change that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    time.sleep(0.3)  # the trap of local.sh is set by then
    process.send_signal(number)
    assert process.communicate(timeout=120)[0] == "saved\n" * 2
    assert process.returncode == 143


def test_local_runs_commands():
    words = ("2", "cpu:1", "inspect", "config", "--config", str(ROOT / "configs/k400.py"))
    program = shutil.which("stretchysnake", path=TOOLS)
    done = local(program, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"dim": 576') == 2


def test_local_runs_a_job_over_all_devices(tmp_path):
    code = f"""#!{sys.executable}
from stretchysnake_jax import distributed
distributed.start(60)
import jax
from jax.experimental import multihost_utils
with distributed.Watch(print):
    total = multihost_utils.process_allgather(jax.numpy.arange(3.0) + jax.process_index()).sum()
    print(f"{{jax.device_count()}} devices, sum {{total}}", flush=True)
"""
    program = executable(tmp_path / "work.py", code)
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    done = local(program, "2", "cpu:4", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 devices, sum 9.0") == 2


@pytest.mark.parametrize(
    ("status", "state", "restarts", "again"),
    [
        (0, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (1, "RUNNING", 0, False),
        (distributed.DIED, "RUNNING", 0, True),
        (128 + signal.SIGKILL, "RUNNING", 99, True),
        (128 + signal.SIGTERM, "RUNNING", 0, True),
        (128 + signal.SIGTERM, "COMPLETING", 0, False),
        (128 + signal.SIGTERM, "RUNNING", 100, False),
    ],
)
def test_sbatch_starts_again_what_can_go_on(tmp_path, status, state, restarts, again):
    calls = tmp_path / "calls"
    for name, answer in (("srun", f"exit {status}"), ("squeue", f"echo {state}"), ("scontrol", "")):
        executable(tmp_path / name, f'#!/bin/sh\necho {name} "$@" >> {calls}\n{answer}\n')
    env = clean(SLURM_JOB_ID=7, SLURM_JOB_NODELIST="n[1-2]", SLURM_RESTART_COUNT=restarts)
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    words = ["--config", "a b.py", "--workdir", "runs/x"]
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", *words], env=env, capture_output=True, text=True
    )
    said = calls.read_text().splitlines()
    assert said[0].endswith("stretchysnake train --config a b.py --workdir runs/x")
    assert ("scontrol requeue 7" in said) == again
    assert done.returncode == (0 if again else status), done.stderr


def test_sbatch_saves_before_the_time_is_up():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert {"requeue", "nodes", "gpus-per-node", "time"} <= options.keys()
    assert options["ntasks-per-node"] == "1" and options["open-mode"] == "append"
    name, _, seconds = options["signal"].partition("@")
    assert name == "TERM" and int(seconds) >= 60  # to the processes, not to the script alone (B:)
    wait = re.search(r"srun .*--wait=(\d+)", text)[1]
    assert int(wait) > distributed.STOPS_WITHIN


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_jobset_tells_processes_of_each_other(jobset):
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completionMode"] == "Indexed" and workers["replicas"] == 1
    assert job["completions"] == job["parallelism"]
    label = "metadata.labels['jobset.sigs.k8s.io/jobset-name']"
    env = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    for variable in container["env"]:
        if "value" in variable:
            found = [name for name in re.findall(r"\$\((\w+)\)", variable["value"])]
            value = variable["value"]
            for name in found:
                value = value.replace(f"$({name})", env[name])  # earlier ones, as Kubernetes does
            env[variable["name"]] = value
        else:
            assert variable["valueFrom"]["fieldRef"]["fieldPath"] == label
            env[variable["name"]] = jobset["metadata"]["name"]
    found = cluster.find(env)
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    assert found["coordinator_address"] == f"{name}-{workers['name']}-0-0.{name}:{port}"
    assert (found["num_processes"], found["process_id"]) == (job["parallelism"], 1)


def test_jobset_starts_again_what_can_go_on(jobset):
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert not {distributed.DIED, 137, 143} & set(rule["onExitCodes"]["values"])
    volumes = {v["name"] for v in job["template"]["spec"]["volumes"]}
    (container,) = job["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {m["name"] for m in container["volumeMounts"]} == volumes


def test_jobset_follows_its_schema(jobset):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="no model of a JobSet")
    read = models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
    assert lost(jobset, read) == []


def lost(given, read, path=""):
    """What a reader left out because it doesn't know it; defaults that it added are fine."""
    if isinstance(given, dict):
        pairs = [(k, v, read.get(k)) for k, v in given.items()]
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = [(i, *both) for i, both in enumerate(zip(given, read, strict=True))]
    else:
        return [] if given == read else [path]
    return [name for key, a, b in pairs for name in lost(a, b, f"{path}/{key}")]


@pytest.fixture(scope="module")
def skypilot():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_tells_processes_of_each_other(skypilot, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    dump = "#!/usr/bin/env bash\nenv -0 > found\nprintf '%s\\n' \"$@\"\n"
    executable(tmp_path / ".venv" / "bin" / "stretchysnake", dump)
    env = clean(SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES=2, SKYPILOT_NODE_RANK=1)
    env |= skypilot["envs"] | {"HOME": "home"}
    done = subprocess.run(
        ["bash", "-euc", skypilot["run"]], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    config, name = skypilot["envs"]["CONFIG"], skypilot["envs"]["NAME"]
    assert done.stdout.split() == ["train", "--config", config, "--workdir", f"home/runs/{name}"]
    found = (tmp_path / "found").read_text().split("\0")
    assert cluster.find(dict(line.split("=", 1) for line in found if line)) == {
        "coordinator_address": "10.0.0.1:8476",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }
    assert (ROOT / config).is_file()
    recovery = skypilot["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert {distributed.DIED, 143} <= set(recovery)


@pytest.mark.slow
def test_skypilot_follows_its_schema():
    sky = pytest.importorskip("sky", reason="no SkyPilot")
    assert sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml")).num_nodes == 2


def test_dockerfile_copies_what_setup_needs():
    text = (LAUNCH / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in kept if line.startswith("!")}
    packages = re.search(r"\npackages =\n((?: +\S+\n)+)", (ROOT / "setup.cfg").read_text())[1]
    roots = {"stretchysnake_kernels": "kernels", "stretchysnake_bench": "kernels"}
    roots["stretchysnake_configs"] = "configs"
    for package in packages.split():
        top = package.split(".")[0]
        assert roots.get(top, top) in copied
    assert 'ENTRYPOINT ["stretchysnake"]' in text and re.search(r"^USER \d+$", text, re.M)
