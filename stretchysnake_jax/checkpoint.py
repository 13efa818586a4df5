"""Checkpoints of a run: the training state and the progress that belongs to it.

A checkpoint is the folder `checkpoints/STEP` of a workdir. Orbax writes the arrays, each process
its own, into `STEP.part`; then process 0 adds progress.json and SHA256SUMS, the digest of every
file, and renames the folder. So a kill or a full disk leaves a folder that no run would take for a
checkpoint, and what the disk damages later is found when it is read: Orbax itself takes a flipped
bit in an array for a number. `sha256sum --check SHA256SUMS` finds it, too.

All of Orbax that the project uses is in this file.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import shutil
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from stretchysnake_jax.config import ConfigError

FOLDER = "checkpoints"
BEST_BY = "val_top1"
PROGRESS = "progress.json"
DIGESTS = "SHA256SUMS"


class CheckpointFailed(RuntimeError):
    """A checkpoint that can't be written, or none that can be read; the message is for the user."""

    plain = True


@functools.cache
def _print_no_tracebacks() -> None:
    """Keeps threads of Orbax and TensorStore from printing what is raised here as one error."""
    logging.getLogger("absl").addFilter(lambda r: not (r.exc_info and "orbax" in r.pathname))
    hook = sys.unraisablehook

    def filtered(raised):  # after a write went wrong, others end that no one waits for
        if str(raised.exc_value) != "Event loop is closed":
            hook(raised)

    sys.unraisablehook = filtered


def _abstract(tree):
    # Where to put what is read: like the array at hand, or on the first device for a bare shape.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(x):
        sharding = getattr(x, "sharding", None) or here
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(describe, tree)


def _digests(folder: pathlib.Path) -> str:
    """The lines of `sha256sum` for every file of a checkpoint."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / DIGESTS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


def _damage(folder: pathlib.Path) -> str:
    """What is wrong with a checkpoint in a few words; none if nothing is."""
    try:
        written = (folder / DIGESTS).read_text(errors="replace")
        found = _digests(folder)
    except OSError as error:
        return f"{pathlib.Path(error.filename or folder).name}: {error.strerror}"
    if written == found:
        return ""
    other = sorted(set(written.splitlines()) ^ set(found.splitlines()), key=lambda line: line[66:])
    return f"{other[0][66:] if other else DIGESTS} isn't as it was written"


class Checkpoints:
    """The checkpoints of a workdir.

    With several processes, each calls every method.

    Args:
      workdir: of the run; they lie in its folder `checkpoints`.
      keep: newest ones kept; the best by validation top-1 is kept beside them.
      write: for the run itself. A reader must not clean up what a run is just writing.
      say: takes a sentence for the user; standard error unless given.
      keep_every: those of steps that are multiples of it are kept for good; 0: none.

    Raises:
      ConfigError: a reader finds no folder of checkpoints.
    """

    def __init__(self, workdir, keep: int = 3, write: bool = True, say=None, keep_every: int = 0):
        self._folder = pathlib.Path(workdir).absolute() / FOLDER
        self._keep, self._keep_every, self._write = keep, keep_every, write
        self._say = say or (lambda text: print(text, file=sys.stderr))
        if not write and not self._folder.is_dir():
            raise ConfigError(f"{workdir} holds no checkpoint: train first")
        if write:
            _print_no_tracebacks()
            self._folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self._clean_up("*")
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._pending = self._last = None

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint by validation top-1, if any was validated."""
        rated = []
        for step in self.steps:
            # A damaged one is no candidate; `restore_params` says so when it is asked for.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                rated.append((float(self._read(step)["metrics"][BEST_BY]), step))
        return max(rated)[1] if rated else None

    def _read(self, step: int) -> dict:
        return json.loads((self._folder / str(step) / PROGRESS).read_text())

    def save(self, state: dict, progress: dict, metrics: dict | None = None) -> None:
        """Saves, in the background, a training state; waits only for the save before it.

        Args:
          state: params, step, and whatever else belongs to it, such as opt_state: pytrees of
            arrays, which may be donated as soon as this returns.
          progress: plain JSON: elapsed seconds, unreadable clips.
          metrics: of a validation at this step.

        Raises:
          CheckpointFailed: the save before it, or the beginning of this one, went wrong.
        """
        step = int(state["step"])
        self.wait()
        if step == self._last:
            return
        part = self._folder / f"{step}.part"
        about = json.dumps({"progress": progress, "metrics": metrics})
        with self._cleanly(step):
            written = ocp.save_checkpointables_async(part, state, overwrite=True)
        self._pending = self._thread.submit(self._finish, step, part, written, about)
        self._last = step

    def _finish(self, step: int, part: pathlib.Path, written, about: str) -> None:
        with self._cleanly(step):
            written.result()  # when all processes are done
            if jax.process_index() == 0:
                (part / PROGRESS).write_text(about)
                (part / DIGESTS).write_text(_digests(part))
                part.rename(self._folder / str(step))
                self._prune()

    @contextlib.contextmanager
    def _cleanly(self, step: int):
        try:
            yield
        except Exception as error:
            if jax.process_index() == 0:
                self._clean_up(step)
            good = f"step {self.steps[-1]}" if self.steps else "none yet"
            text = " ".join(str(error).split())
            raise CheckpointFailed(
                f"the checkpoint of step {step} can't be written to {self._folder}: {text}; last "
                f"good checkpoint: {good}. Start again to continue from there"
            ) from error

    def _clean_up(self, step) -> None:
        for path in self._folder.glob(f"{step}.part*"):
            shutil.rmtree(path, ignore_errors=True)  # what stays is no checkpoint all the same

    def _prune(self) -> None:
        steps = self.steps
        kept = {*steps[-self._keep :], self.best}
        for step in steps:
            if step not in kept and not (self._keep_every and step % self._keep_every == 0):
                # Under another name first: a kill in between must leave no half of a checkpoint.
                (self._folder / str(step)).rename(self._folder / f"{step}.part")
                self._clean_up(step)

    def restore(self, state: dict) -> tuple[dict, dict]:
        """Reads the newest training state that is as it was written.

        Newer ones that are damaged are renamed to STEP.damaged, so that the run can write them
        anew.

        Args:
          state: one of the same shapes; arrays go where its arrays are, however they were spread
            when they were saved.

        Returns:
          (state, progress) as saved.

        Raises:
          ConfigError: there is no checkpoint.
          CheckpointFailed: all are damaged.
        """
        step = self._sound(self._some_steps()[::-1])
        found = ocp.load_checkpointables(self._folder / str(step), _abstract(state))
        self._last = step
        return found, self._read(step)["progress"]

    def restore_params(self, params, which: str = "latest") -> tuple[dict, int]:
        """Reads the parameters alone: their moving average if the run keeps one.

        That is what validation rates.

        Args:
          params: a pytree of the same shapes (abstract will do).
          which: "latest", which is the newest that isn't damaged, "best" or a step.

        Returns:
          (params, step).

        Raises:
          ConfigError: there is no such checkpoint.
          CheckpointFailed: it is damaged.
        """
        steps = self._some_steps()
        wanted = steps[::-1] if which == "latest" else [self.best if which == "best" else which]
        if wanted == [None]:
            raise ConfigError(f"no checkpoint of {self._folder} was validated: take 'latest'")
        if not str(wanted[0]).isdigit() or int(wanted[0]) not in steps:
            raise ConfigError(
                f"checkpoint {which!r} doesn't exist: it takes latest, best, "
                + ", ".join(map(str, steps))
            )
        step = self._sound([int(step) for step in wanted])
        folder = self._folder / str(step)
        name = "ema" if (folder / "ema").is_dir() else "params"
        return ocp.load_checkpointables(folder, {name: _abstract(params)})[name], step

    def _some_steps(self) -> list[int]:
        if not self.steps:
            raise ConfigError(f"{self._folder} holds no checkpoint: train first")
        return self.steps

    def _sound(self, steps: list[int]) -> int:
        """The first of `steps` whose checkpoint is as it was written; process 0 looks for all."""
        damaged, found = {}, -1
        if jax.process_index() == 0:
            for step in steps:
                damage = _damage(self._folder / str(step))
                if not damage:
                    found = step
                    break
                damaged[step] = damage
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        text = ", ".join(f"checkpoint {step} is damaged ({why})" for step, why in damaged.items())
        if found < 0:
            raise CheckpointFailed(
                f"{self._folder} holds no checkpoint that can be used: "
                f"{text or 'process 0 says why'}"
            )
        if damaged:
            self._say(f"{self._folder}: {text}: taking {found}, the newest that is whole")
        for step in damaged if self._write else ():
            aside = self._folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)
        return found

    def check(self) -> None:
        """Raises CheckpointFailed if the last save went wrong; doesn't wait for it."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk; raises CheckpointFailed if it can't be."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Waits, and gives back the resources."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
