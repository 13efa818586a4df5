"""Several processes as one run: they find each other, agree on where to stop, and stop together.

All of it is JAX's own: `jax.distributed`, its key-value store, heartbeats and preemption service.
A thread and a hook put a name to a process that died, which JAX ends the others for with a stack
trace alone.
"""

import atexit
import collections
import ctypes
import dataclasses
import datetime
import multiprocessing
import os
import re
import signal as signals
import socket
import sys
import threading
import time

from stretchysnake_jax import cluster

STOPS_WITHIN = 30  # seconds after which no process goes on when one has died
DIED = 75  # exit status when another process died: start again (EX_TEMPFAIL of sysexits.h)
AGAIN = "starting the job again continues from the last checkpoint"
# JAX takes a process for dead that was silent for so many seconds; signs come at half of it.
HEARTBEAT = 20
BEAT, SILENT = 1.5, 6.0  # seconds between our signs of life; without one it may be the dead one
FOLDER = "stretchysnake/"  # in the key-value store
# The key by which JAX's preemption service hears of a preemption; it sets it itself on a SIGTERM
# that Python doesn't handle.
NOTICE = "RECEIVED_PREEMPTION_NOTICE"


class DistributedError(RuntimeError):
    """Processes that can't work together; the message is for the user."""

    plain = True


@dataclasses.dataclass
class Job:
    """What this process knows of the run.

    Attributes:
      process: its number.
      hosts: the host of each process.
      coordinator: address and port of process 0.
      say: prints a sentence.
      signs: process -> (its last sign of life, when it was first seen, monotonic seconds).
      read: when the signs were last read.
      state: "running", "done", or "failed".
    """

    process: int
    hosts: list[str]
    coordinator: str
    say: collections.abc.Callable[[str], None]
    signs: dict[int, tuple[str, float]] = dataclasses.field(default_factory=dict)
    read: float = 0.0
    state: str = "running"
    asked: bool = False  # to stop
    left: threading.Event = dataclasses.field(default_factory=threading.Event)


_job: Job | None = None


def start(timeout: int = 300) -> None:
    """Joins the other processes of the run, if the environment says that there are some.

    To be called before anything of JAX starts, and followed by a `Watch`: a process that ends
    without having left one in peace is taken for failed, and the others stop.

    Args:
      timeout: seconds to wait for all processes.

    Raises:
      ConfigError: the environment is half set (cluster.py).
      DistributedError: process 0 can't open the port.
    """
    global _job
    import jax

    if _job or jax.distributed.is_initialized():
        return
    arguments = cluster.find(os.environ)
    if arguments is None:
        return
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    job = _job = Job(-1, [], "", _print)
    _catch_abort()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        _job = None
        raise DistributedError(f"the processes can't find each other: {error}") from error
    from jax._src.distributed import global_state  # as Orbax does: JAX has no other way in

    client, size = global_state.client, global_state.num_processes
    job.process, job.coordinator = global_state.process_id, global_state.coordinator_address
    client.key_value_set(f"{FOLDER}host/{job.process}", socket.gethostname())
    client.wait_at_barrier(f"{FOLDER}hosts", timeout * 1000)
    names = {int(k.rpartition("/")[2]): v for k, v in client.key_value_dir_get(f"{FOLDER}host/")}
    job.hosts = [names[process] for process in range(size)]
    thread = threading.Thread(target=_exchange_signs, args=(job, client), daemon=True)
    thread.start()
    atexit.register(_leave, job, client, thread)


def hosts() -> list[str]:
    """The host of each process; this one's alone if there are no others."""
    return list(_job.hosts) if _job else [socket.gethostname()]


def stop_agreed(signal: int | None, step: int) -> int | None:
    """All processes agree on a step to stop after, once one of them got a signal.

    To be called by every process after every step. JAX's preemption service does it: a notice
    reaches all processes, and the step after the farthest of them is the one.

    Args:
      signal: that this process got, if any.
      step: that it has just taken.

    Returns:
      The signal if this step is the one to stop after, else None. Alone, `signal`.
    """
    if _job is None:
        return signal
    from jax._src.distributed import global_state
    from jax.experimental import multihost_utils

    client = global_state.client
    if signal and not _job.asked:
        _job.asked = True
        client.key_value_set(f"{FOLDER}signal", str(int(signal)), allow_overwrite=True)
        now = datetime.datetime.now(datetime.UTC).isoformat()
        client.key_value_set(NOTICE, now, allow_overwrite=True)
    if not multihost_utils.reached_preemption_sync_point(step):
        return None
    found = dict(client.key_value_dir_get(FOLDER)).get(f"{FOLDER}signal")
    return int(found) if found else int(signals.SIGTERM)  # one that came before Python handled it


class Watch:
    """Around the work of several processes: when one dies or fails, the others stop.

    They stop within `STOPS_WITHIN` seconds and name its host and number: with exit status `DIED`
    if it died, 1 if it failed. Alone, it does nothing.

    Args:
      say: prints a sentence, on every process and from any thread; on standard error unless given.
    """

    def __init__(self, say: collections.abc.Callable[[str], None] | None = None):
        self._say = say or _print

    def __enter__(self):
        if _job:
            _job.say = self._say
        return self

    def __exit__(self, kind, error, trace):
        if _job is None:
            return
        if error is None:
            _job.state = "done"
            return
        from jax._src.distributed import global_state

        if _may_be_anothers(error):
            # Where another process died, its partners in a collective fail at once; who it was is
            # known a little later, and ends this process.
            time.sleep(STOPS_WITHIN)
        _fail(_job, global_state.client, f"{kind.__name__}: {error}".splitlines()[0])


def _may_be_anothers(error: BaseException | None) -> bool:
    """Whether the death of another process may be behind an error: one that XLA raises.

    They come as JaxRuntimeError or as ValueError, and in others that were raised from them; all
    begin with the status code.
    """
    codes = "UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION"
    while error is not None:
        if re.match(rf"({codes}): ", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(job: Job, client, reason: str) -> None:
    """Tells the others that this process failed."""
    job.state = "failed"
    client.key_value_set(f"{FOLDER}now/failed", f"{job.process} {reason}", allow_overwrite=True)
    if job.process == 0:
        time.sleep(3 * BEAT)  # the store goes with this process; the others must have read it


def _exchange_signs(job: Job, client) -> None:
    """Shows that this process lives, notes that of the others, and stops when one has failed.

    JAX alone decides that a process is dead, by heartbeats that don't wait for Python; these signs
    only tell which one it was.
    """
    import jax

    count = 0
    while not job.left.wait(BEAT):
        count += 1
        try:
            client.key_value_set(f"{FOLDER}now/{job.process}", str(count), allow_overwrite=True)
            found = {k.rpartition("/")[2]: v for k, v in client.key_value_dir_get(f"{FOLDER}now/")}
        except jax.errors.JaxRuntimeError:
            return  # the store is gone: the run is over, or JAX ends this process now
        job.read = time.monotonic()
        failed = found.pop("failed", None)
        if failed and job.state == "running":
            process, _, reason = failed.partition(" ")
            if job.process == 0:
                time.sleep(2 * BEAT)  # as in `_fail`
            _exit(job, f"{_name(job, int(process))} failed ({reason}); {AGAIN}", 1)
        for process, sign in found.items():
            if job.signs.get(int(process), ("",))[0] != sign:
                job.signs[int(process)] = sign, job.read


def _name(job: Job, process: int) -> str:
    return f"process {process} on host {job.hosts[process]}"


def _dead(job: Job) -> list[int]:
    """The processes that seem to have died when JAX ends this one."""
    silent = [p for p, (_, seen) in job.signs.items() if job.read - seen > SILENT]
    if silent or job.process == 0:
        return sorted(silent)
    if time.monotonic() - job.read > SILENT:
        return [0]  # which holds the store, and did not answer
    host, _, port = job.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError:
        return [0]
    return []  # all is well with the others: what aborts is this process' own


def _catch_abort() -> None:
    """Has `_on_abort` called when JAX aborts this process, as it does when another has died.

    JAX does so from C++, with no exception that Python could catch; its callback for the case
    can't be given a Python function (std::bad_cast, in JAX 0.10 as in 0.12).
    """
    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_abort)
    ctypes.CDLL(None).signal(int(signals.SIGABRT), _abort_handler)


_abort_handler = None  # kept: ctypes doesn't


def _on_abort(number: int) -> None:
    """Says who died and exits; when it returns, the abort goes on."""
    job = _job
    if job is None or job.state == "failed":
        return
    if not job.hosts:
        _exit(job, "not all processes of the run came in time: look at the others' output", DIED)
    dead = _dead(job)
    if dead:
        _exit(job, f"{', '.join(_name(job, p) for p in dead)} died; {AGAIN}", DIED)


def _exit(job: Job, sentence: str, status: int) -> None:
    """Ends this process at once: its main thread may wait for the dead one for ever."""
    try:
        job.say(sentence)
        for child in multiprocessing.active_children():
            child.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _print(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _leave(job: Job, client, thread: threading.Thread) -> None:
    """At the end of the process: waits for the others, then leaves."""
    import jax

    if job.state == "running":
        _fail(job, client, "it ended before its work was done")
    if job.state == "failed":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the others are stopping, there is nobody to wait for
    jax.distributed.shutdown()
    job.left.set()
    thread.join()
