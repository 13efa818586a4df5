"""Rate and time left of long work, across interruptions, and the line that shows them."""

import collections
import sys
import time


def duration(seconds: float) -> str:
    """Seconds in words: 42s, 3m10s, 2h05m, 1d03h."""
    seconds = max(0, round(seconds))
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"


class Clock:
    """Counts work done out of a total.

    Args:
      total: units of work, such as steps.
      done: units already done when this process starts.
      elapsed: seconds that those took, from a checkpoint.
    """

    def __init__(self, total: int, done: int = 0, elapsed: float = 0.0):
        self.total, self.done = total, done
        self._before, self._start = elapsed, time.perf_counter()
        self._lap = elapsed
        self.waited = 0.0  # seconds of this process that `wait` was told of
        # Compilations come early and would spoil an average over all, so the rate is a recent one.
        self._marks = collections.deque([(self._start, done, 0.0)], maxlen=64)

    @property
    def elapsed(self) -> float:
        """Seconds of work, earlier runs included."""
        return self._before + time.perf_counter() - self._start

    def advance(self, done: int) -> None:
        """Says that `done` units are done in all."""
        self.done = done
        self._marks.append((time.perf_counter(), done, self.waited))

    def took(self, begun: float, ended: float | None = None) -> float:
        """Seconds that a step took on the device: from its begin, or the end of the one before.

        Args:
          begun: `elapsed` when it was given to the device.
          ended: `elapsed` when it was done, if the device doesn't work on its own; else now.
        """
        ended = self.elapsed if ended is None else ended
        before, self._lap = max(begun, self._lap), ended
        return ended - before

    def wait(self, seconds: float) -> None:
        """Says that the work stood still for so long, waiting for something."""
        self.waited += seconds

    @property
    def recent(self) -> tuple[float, int, int]:
        """What `rate` is taken from: (seconds, units done before them, units done after them)."""
        (t0, n0, _), (t1, n1, _) = self._marks[0], self._marks[-1]
        return t1 - t0, n0, n1

    @property
    def waiting(self) -> float:
        """Share of the recent time that was waiting, 0 to 1."""
        (t0, _, w0), (t1, _, w1) = self._marks[0], self._marks[-1]
        return (w1 - w0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def waiting_in_all(self) -> float:
        """Share of this process' time that was waiting, 0 to 1."""
        passed = time.perf_counter() - self._start
        return self.waited / passed if passed > 0 else 0.0

    @property
    def rate(self) -> float:
        """Recent units per second; 0 before the first."""
        seconds, before, after = self.recent
        return (after - before) / seconds if seconds > 0 else 0.0

    @property
    def left(self) -> str:
        """Time left, in words."""
        return duration((self.total - self.done) / self.rate) if self.rate else "?"


class Progress:
    """One line that is rewritten on a terminal, and printed now and then elsewhere.

    Args:
      every: seconds between prints where the output is no terminal.
      stream: where to; standard error unless given.
    """

    def __init__(self, every: float = 10.0, stream=None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else every
        self._last, self._width = 0.0, 0

    def show(self, text: str, force: bool = False) -> None:
        """Shows `text` if enough time has passed since the last."""
        now = time.perf_counter()
        if not force and now - self._last < self._every:
            return
        self._last = now
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def counter(self, what: str):
        """A function (done, total) that shows how many of `what` are done, and the time left."""
        clock = Clock(1)

        def show(done: int, total: int) -> None:
            clock.total = total
            clock.advance(done)
            self.show(f"{what} {done}/{total}, {clock.left} left", done == total)

        return show

    def close(self) -> None:
        """Ends the line."""
        if self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self.close()
        self._stream.write(text + "\n")
        self._stream.flush()
