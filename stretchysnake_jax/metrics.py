"""metrics.jsonl: one JSON object per line, in the order of the steps."""

import json
import math
import pathlib

from stretchysnake_jax.whole_file import whole_file


class MetricsLog:
    """Appends to a JSON-lines file.

    Args:
      path: the file.
      step: the step that the run continues from: later lines, written by a process that was killed
        before its next checkpoint, are dropped, so that no step stands twice.
    """

    def __init__(self, path, step: int = 0):
        self.path = pathlib.Path(path)
        if self.path.exists():
            kept = [line for line in read_lines(self.path) if line["step"] <= step]
            with whole_file(self.path) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))
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
