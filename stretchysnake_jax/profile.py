"""Traces of some steps of a run, for `stretchysnake train --profile`."""

import pathlib

import jax

from stretchysnake_jax.config import ConfigError

SOON = (0, 0)  # a few steps, after the first ones have compiled and the loader has filled up
WAIT, LENGTH = 10, 5


def parse_steps(text: str) -> tuple[int, int]:
    """The steps that `--profile` names.

    Args:
      text: START:END, the first and the last step, counted as in metrics.jsonl; "": `SOON`.

    Raises:
      ConfigError: anything else.
    """
    if not text:
        return SOON
    words = text.split(":")
    if len(words) == 2 and all(word.isdecimal() for word in words):
        start, end = map(int, words)
        if 1 <= start <= end:
            return start, end
    raise ConfigError(
        f"--profile is {text!r}: it takes START:END, the first and the last step, such as 100:104"
    )


class Profiler:
    """Traces some steps with JAX's profiler into the workdir's folder `profile`.

    The first of several processes traces. Steps that aren't traced cost nothing.

    Args:
      workdir: of the run.
      steps: the first and the last step; `SOON`: a few, soon after this process' first; None: none.
      say: prints a line.
    """

    def __init__(self, workdir, steps: tuple[int, int] | None, say=print):
        self._folder = pathlib.Path(workdir).absolute() / "profile"
        self._steps = None if jax.process_index() else steps
        self._say = say
        self._tracing, self._newest, self._mark = False, 0, None

    def step(self, step: int) -> None:
        """Says that a step begins: called once for each, before its batch is fetched."""
        if self._steps is None:
            return
        if self._steps == SOON:
            self._steps = step + WAIT, step + WAIT + LENGTH - 1
        first, last = self._steps
        self._unmark()
        # The loop reads a step's metrics during the one after it; only then was it done on the
        # device, so the trace goes on for one more.
        if self._tracing and step > last + 1:
            self._stop()
        elif not self._tracing and step > last:
            self._say(f"--profile: steps {first} to {last} were done before: nothing traced")
            self._steps = None
        elif not self._tracing and step >= first:
            self._start(step)
        if self._tracing:
            self._newest = step
            self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._mark.__enter__()

    def close(self) -> None:
        """Ends a trace that is going on; called after the last step."""
        self._unmark()
        if self._tracing:
            self._stop()
        elif self._steps == SOON:
            self._say("--profile: no step was done: nothing traced")
        elif self._steps:
            self._say(f"--profile: step {self._steps[0]} was not reached: nothing traced")
        self._steps = None

    def _unmark(self):
        if self._mark:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _start(self, step):
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would slow down what is measured
        try:
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options
            )
            self._tracing, self._steps = True, (step, self._steps[1])
        except RuntimeError as error:  # such as a trace that someone else is taking
            self._say(f"--profile: can't trace: {error}")
            self._steps = None

    def _stop(self):
        first, last = self._steps[0], min(self._steps[1], self._newest)
        self._tracing, self._steps = False, None
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:  # a full disk must not end the training
            self._say(f"--profile: the trace is lost: {error}")
            return
        newest = max(self._folder.glob("plugins/profile/*"))
        self._say(
            f"traced steps {first} to {last} into {newest}: open perfetto_trace.json.gz there at "
            f"https://ui.perfetto.dev, or 'pip install xprof' and 'xprof --logdir {self._folder}'"
        )
