"""What the environment says of the other processes of a run: SLURM, Kubernetes, Open MPI, JAX_*."""

import collections
import pathlib
import re
from importlib.util import find_spec

from stretchysnake_jax.config import ConfigError

JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What JAX itself reads in a step of SLURM.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def find(environment: collections.abc.Mapping[str, str]) -> dict | None:
    """What `jax.distributed.initialize` takes to join the run that the environment tells of.

    JAX itself reads SLURM, Open MPI 4, and Kubernetes where the package `kubernetes` and the right
    to read pods are there. Added here: JAX_* variables, indexed jobs of Kubernetes (the index from
    JOB_COMPLETION_INDEX, the rest from JAX_*), Open MPI 5 without mpi4py, and several GPUs for one
    process (JAX gives each process of SLURM and Open MPI one).

    Args:
      environment: of the process.

    Returns:
      Keyword arguments, or None if this process is alone.

    Raises:
      ConfigError: the environment is half set.
    """
    env = {k: v for k, v in environment.items() if v}
    given = {name: env[name] for name in JAX if name in env}
    if given.get("JAX_NUM_PROCESSES") == "1":
        return None
    rank = None
    if "OMPI_COMM_WORLD_SIZE" in env:
        where = "Open MPI"
        size, rank = env["OMPI_COMM_WORLD_SIZE"], env["OMPI_COMM_WORLD_RANK"]
        local = int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    elif all(name in env for name in SLURM):
        where, size, rank = "SLURM", env["SLURM_NTASKS"], env["SLURM_PROCID"]
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", size)
        local = int(env["SLURM_LOCALID"]), _tasks_here(tasks, int(env.get("SLURM_NODEID", 0)))
    if rank is not None and "JAX_NUM_PROCESSES" not in given:
        if size == "1":
            return None
        devices = _local_devices(env, *local)
        if where == "SLURM" or "OMPI_MCA_orte_hnp_uri" in env:
            return devices  # and JAX reads the rest
        address = given.get("JAX_COORDINATOR_ADDRESS") or _launcher(env)
        return _checked(address, size, rank) | devices
    if rank is None and "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
        rank = env["JOB_COMPLETION_INDEX"]
        if not given and find_spec("kubernetes"):
            return {}
        if not given:
            raise ConfigError(
                f"Kubernetes says that this is number {rank} of an indexed job, but not of how "
                "many: set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES as launch/jobset.yaml "
                "does, or JAX_NUM_PROCESSES=1 for runs that are independent"
            )
    if given:
        missing = [name for name in JAX if name not in given]
        if rank is not None and "JAX_PROCESS_ID" in missing:
            missing.remove("JAX_PROCESS_ID")
        if missing:
            raise ConfigError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set, "
                f"{' and '.join(missing)} not: several processes need all of {', '.join(JAX)}, "
                "a single one none"
            )
        return _checked(
            given["JAX_COORDINATOR_ADDRESS"],
            given["JAX_NUM_PROCESSES"],
            given.get("JAX_PROCESS_ID") or rank or "",
        )
    if int(env.get("SLURM_JOB_NUM_NODES", 1)) > 1:
        raise ConfigError(
            f"this is one process in a SLURM job of {env['SLURM_JOB_NUM_NODES']} nodes: start it "
            "with srun as launch/slurm.sbatch does, or set JAX_NUM_PROCESSES=1 for this node alone"
        )
    return None


def _checked(address: str, size: str, rank: str) -> dict:
    """Keyword arguments of `jax.distributed.initialize`, JAX's own detection switched off."""
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS is {address!r}: it takes process 0's HOST:PORT")
    if not (size.isdigit() and rank.isdigit() and int(rank) < int(size)):
        raise ConfigError(
            f"process {rank!r} of {size!r}: JAX_NUM_PROCESSES takes a whole number, JAX_PROCESS_ID "
            "one from 0 to one less"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(size),
        "process_id": int(rank),
        "cluster_detection_method": "deactivate",
    }


def _tasks_here(tasks: str, node: int) -> int:
    """Tasks on a node, from SLURM's words for those of all nodes, such as "2(x3),1"."""
    each: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        each += [int(count)] * int(times or 1)
    return each[min(node, len(each) - 1)]


def _local_devices(env: dict[str, str], rank: int, size: int) -> dict:
    """Which GPUs of this host the process takes, as a keyword argument; none if there are none.

    Args:
      env: the environment.
      rank: the process' number on this host.
      size: processes on this host.
    """
    if "JAX_LOCAL_DEVICE_IDS" in env or env.get("JAX_PLATFORMS") == "cpu":
        return {}  # JAX reads the former
    if "CUDA_VISIBLE_DEVICES" in env:
        gpus = sum(word not in ("-1", "NoDevFiles") for word in _words(env["CUDA_VISIBLE_DEVICES"]))
    else:
        gpus = len(list(pathlib.Path("/proc/driver/nvidia/gpus").glob("*")))
    if not gpus:
        return {}
    # SLURM may have given each task GPUs of its own, and shows it no others.
    own = "SLURM_GPUS_PER_TASK" in env or gpus < len(_words(env.get("SLURM_STEP_GPUS", "")))
    if own or (gpus < size and "CUDA_VISIBLE_DEVICES" in env):
        return {"local_device_ids": list(range(gpus))}
    if gpus % size:
        raise ConfigError(
            f"{size} processes on this host can't share its {gpus} GPUs evenly: start one for each "
            "GPU or one for all"
        )
    each = gpus // size
    return {"local_device_ids": list(range(rank * each, (rank + 1) * each))}


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _launcher(env: dict[str, str]) -> str:
    """HOST:PORT of process 0 under Open MPI 5: the host of mpirun, as JAX has it for Open MPI 4."""
    match = re.match(r"pr\w+-(.+)-(\d+)@", env.get("PMIX_NAMESPACE", ""))
    if not match:
        raise ConfigError(
            "this Open MPI doesn't tell where process 0 is: pass it on with "
            "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"
        )
    host, number = match.groups()
    if env["OMPI_COMM_WORLD_LOCAL_SIZE"] == env["OMPI_COMM_WORLD_SIZE"]:
        host = "localhost"
    # As JAX does: a port of the upper ephemeral range that follows from the job's number.
    port = env.get("JAX_COORDINATOR_PORT") or str(int(number) % 2**12 + 65536 - 2**12)
    return f"{host}:{port}"
