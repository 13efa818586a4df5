"""What a run writes about itself while it trains.

metrics.jsonl is always written: one JSON object per line, in the order of the steps. It is the
truth; TensorBoard and Weights & Biases, if `train.loggers` names them, get copies of its lines.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import secrets
import socket
import time

from stretchysnake_jax.config import Config, ConfigError
from stretchysnake_jax.whole_file import whole_file

FILE = "metrics.jsonl"
# Fields about the machine's work; the other numbers of a training step are about the model.
WORK = ("elapsed", "step_seconds", "clips", "tokens", "clips_per_s", "tokens_per_s", "data_wait")
WORK += ("data_wait_share", "unreadable", "compiled")


class MetricsLog:
    """Appends to a JSON-lines file.

    Args:
      path: the file.
      step: the step that the run continues from: later lines, written by a process that was killed
        before its next checkpoint, are dropped, so that no step stands twice.

    Attributes:
      earlier: the lines that were kept.
    """

    def __init__(self, path, step: int = 0):
        self.path = pathlib.Path(path)
        self.earlier = []
        if self.path.exists():
            self.earlier = [line for line in read_lines(self.path) if line["step"] <= step]
            with whole_file(self.path) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in self.earlier))
        self._file = self.path.open("a")

    def write(self, line: dict) -> None:
        """Writes one line and flushes it. NaN and infinities become null, which JSON has."""
        line = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_lines(path) -> list[dict]:
    """Reads a metrics file; a last line that was cut off by a kill is left out."""
    lines = pathlib.Path(path).read_text().split("\n")
    found = []
    for number, line in enumerate(lines):
        try:
            if line:
                found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise ValueError(f"{path}, line {number + 1}, is no JSON: {line[:80]!r}") from None
    return found


def check_installed(names) -> None:
    """Raises ConfigError if a logger's package is missing; names the extra that brings it.

    Args:
      names: `train.loggers`.
    """
    for name in names:
        spec = importlib.util.find_spec(name)  # package, extra and logger have one name
        if spec is None or spec.origin is None:  # or a mere folder of that name
            raise ConfigError(
                f"train.loggers has {name!r}, but the package {name} isn't installed: "
                f"pip install 'stretchysnake-jax[{name}]', or leave it out"
            )


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a line, named as TensorBoard and Weights & Biases group them.

    Args:
      line: of a training step, or of a validation.

    Returns:
      train/..., val/... and work/..., and the loss once more as loss_of/<bucket>.
    """
    found = {}
    for name, value in line.items():
        if name == "step" or not isinstance(value, int | float):
            continue
        if name.startswith("val_"):
            found[f"val/{name.removeprefix('val_')}"] = value
        else:
            found[f"{'work' if name in WORK else 'train'}/{name}"] = value
    if "train/loss" in found and "bucket" in line:
        found[f"loss_of/{line['bucket']}"] = found["train/loss"]
    return found


class TensorBoard:
    """Writes TensorBoard's event files with TensorBoard's own protocol and no TensorFlow.

    Args:
      folder: where the files go.
      start_step: the step that the run continues from; TensorBoard hides what stood after it.
      earlier: lines of the steps so far, written if the folder has none of them yet.
    """

    def __init__(self, folder, start_step: int, earlier=()):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        resumed = any(folder.glob("events.out.tfevents.*"))
        # TensorBoard reads a folder's files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter((folder / name).open("xb"))
        self._write(file_version="brain.Event:2")
        if resumed:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=start_step + 1, session_log=start)
        else:
            for line in earlier:
                self.write(line)

    def _write(self, **fields):
        event = self._event(wall_time=time.time(), **fields)
        self._file.write(event.SerializeToString())
        self._file.flush()  # a killed process must leave no hole

    def write(self, line: dict) -> None:
        """Writes the numbers of one line."""
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in scalars(line).items()]
        self._write(step=line["step"], summary=self._summary(value=values))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WandB:
    """Sends lines to Weights & Biases; with WANDB_MODE=offline they stay in the workdir.

    The run's id lies in the workdir, so that a run that goes on is one run there too. WANDB_PROJECT
    and its kin hold as usual. Neither code nor what the process prints is sent.

    Args:
      workdir: of the run.
      config: sent along.
      earlier: lines of the steps so far; those that Weights & Biases doesn't have are sent.

    Raises:
      ConfigError: it can't start, such as without a login.
    """

    def __init__(self, workdir, config: Config, earlier=()):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        path = pathlib.Path(workdir) / "wandb_id.txt"
        if not path.exists():
            with whole_file(path) as part:
                part.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            quiet=True,
            finish_timeout=60.0,  # seconds; a run that was told to stop can't wait for a network
        )
        try:
            self._run = wandb.init(
                dir=str(workdir),
                id=path.read_text().strip(),
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", "stretchysnake-jax"),
                name=os.environ.get("WANDB_NAME", config.name),
                config=dataclasses.asdict(config),
                settings=settings,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"train.loggers has 'wandb', which can't start: {str(error).rstrip('.')}; log in "
                "with 'wandb login', set WANDB_MODE=offline, or leave it out"
            ) from error
        # It has the steps before this one; the server ignores them if they come again.
        self._first = self._run.step
        for line in earlier:
            self.write(line)

    def write(self, line: dict) -> None:
        """Sends the numbers of one line; its row is complete when a later step comes."""
        if line["step"] >= self._first:
            self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        """Sends the rest and ends the run."""
        self._run.finish()


class Loggers:
    """Writes the lines of a run everywhere they are wanted.

    The first of several processes writes; the others do nothing. A copy that fails while the run is
    going is given up with a sentence: it must not end the training. metrics.jsonl must be written.

    Args:
      config: the experiment; `train.loggers` names the copies.
      workdir: of the run; must exist.
      start_step: the step that the run continues from. What was written of later ones is dropped.
      say: prints a line.

    Raises:
      ConfigError: a logger's package is missing, or it can't start.
    """

    def __init__(self, config: Config, workdir, start_step: int = 0, say=print):
        import jax  # here, since who only reads metrics needs none

        self._log, self._copies, self._say = None, {}, say
        if jax.process_index():
            return
        workdir, names = pathlib.Path(workdir), config.train.loggers
        check_installed(names)
        self._log = MetricsLog(workdir / FILE, start_step)
        earlier, self._log.earlier = self._log.earlier, []  # of a long run they are many
        if "tensorboard" in names:
            folder = workdir / "tensorboard"
            self._copies["tensorboard"] = TensorBoard(folder, start_step, earlier)
        if "wandb" in names:
            self._copies["wandb"] = WandB(workdir, config, earlier)

    def write(self, line: dict) -> None:
        """Writes a line: `step`, and numbers or texts by name."""
        if self._log is None:
            return
        self._log.write(line)
        for name in list(self._copies):
            self._try(name, "write", line)

    def close(self) -> None:
        """Completes and closes everything."""
        if self._log is None:
            return
        self._log.close()
        for name in list(self._copies):
            self._try(name, "close")
        self._copies = {}

    def _try(self, name, what, *args):
        try:
            getattr(self._copies[name], what)(*args)
        except Exception as error:  # whatever a package and its network may raise
            del self._copies[name]
            self._say(f"{name} failed and is left out from here on, {FILE} goes on: {error}")
