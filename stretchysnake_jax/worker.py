"""What the processes have in common that the demo and the study run side by side."""

import os
import pathlib
import traceback

from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import ConfigError


def share_cores(parts: int) -> list[set[int]]:
    """Divides the cores that this process may use; empty sets where that can't be done."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * parts
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < parts:
        return [set()] * parts
    return [set(cores[i::parts]) for i in range(parts)]


def run(job, log, mode: str, cores: set[int]) -> int:
    """Does the job of a process on its cores; its words go to a file.

    Args:
      job: called with a `Progress`, once JAX is set up for CPUs; returns an exit status.
      log: the file.
      mode: how it is opened, "w" or "a".
      cores: those this process may use; empty: any.

    Returns:
      The exit status: the job's, 130 when it was interrupted, 1 when it failed.
    """
    if cores:
        os.sched_setaffinity(0, cores)
    from stretchysnake_kernels import configure_cpu

    configure_cpu()
    with pathlib.Path(log).open(mode, buffering=1) as stream:
        progress = Progress(every=1.0, stream=stream)
        try:
            return job(progress)
        except KeyboardInterrupt:
            progress.say("interrupted")
            return 130
        except Exception as error:  # into the log, which the parent quotes; nothing is lost
            if not isinstance(error, ConfigError) and not getattr(error, "plain", False):
                traceback.print_exc(file=stream)
            progress.say(f"error: {error}")
            return 1
