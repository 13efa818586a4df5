"""What the metrics of a run say: its steps by bucket, averages, and a few lines of text."""

import pathlib

import numpy as np

from stretchysnake_jax.clock import duration
from stretchysnake_jax.config import ConfigError, load
from stretchysnake_jax.metrics import FILE, read_lines


class Run:
    """The metrics of a workdir.

    Args:
      workdir: of the run, finished or not.
      name: what the picture calls it.

    Attributes:
      steps: lines of training steps.
      validations: lines of validations.
      planned: steps that the run is to have, or None if it is not known.

    Raises:
      ConfigError: there are no metrics in `workdir`.
    """

    def __init__(self, workdir, name: str):
        path = pathlib.Path(workdir) / FILE
        self.name = name
        try:
            lines = read_lines(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"no {FILE} in {workdir}: is it the workdir of a run?") from error
        self.steps = [line for line in lines if "loss" in line]
        self.validations = [line for line in lines if "val_top1" in line]
        if not self.steps:
            raise ConfigError(f"{path} holds no training step yet")
        config = pathlib.Path(workdir) / "config.json"
        self.planned = (load(config).train.steps if config.exists() else 0) or None

    def column(self, field: str, lines=None) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, float64 each, of the lines that have a value of `field`."""
        lines = self.steps if lines is None else lines
        pairs = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
        steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
        return steps, values

    @property
    def buckets(self) -> dict[str, list[dict]]:
        """The steps' lines by bucket, small buckets first."""
        found: dict[str, list[dict]] = {}
        for line in self.steps:
            found.setdefault(line["bucket"], []).append(line)
        return dict(sorted(found.items(), key=lambda item: parse_bucket(item[0])))


def parse_bucket(text: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """What `str` made of a Bucket: (frames, (height, width), patch), which also sorts them."""
    scale, _, patch = text.partition("/")
    frames, height, width = map(int, scale.split("x"))
    return frames, (height, width), tuple(map(int, patch.split("x")))


def scale_name(text: str) -> str:
    """Size and patch of a bucket in few characters: 224/16, 224x160/16."""
    _, (height, width), patch = parse_bucket(text)
    size = str(height) if height == width else f"{height}x{width}"
    return f"{size}/{'x'.join(map(str, patch))}"


def smooth(values: np.ndarray, share: float = 0.04) -> np.ndarray:
    """A centred moving average, twice; at the ends over what there is.

    Args:
      values: (n,).
      share: width of the average / n.

    Returns:
      (n,).
    """
    half = int(len(values) * share / 2)
    if half == 0:
        return values
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[high] - sums[low]) / (high - low)
    return values


def summary(run: Run) -> str:
    """What a run's metrics say, in a few lines of text."""
    last, (at, losses) = run.steps[-1], run.column("loss")
    planned = f" of {run.planned:,}" if run.planned else ""
    rows = [("steps", f"{last['step']:,}{planned}")]
    if last.get("elapsed"):
        rate = last["step"] / last["elapsed"]
        rows.append(("time", f"{duration(last['elapsed'])}, {rate:.3g} steps/s"))
    if len(losses):
        rows.append(("training loss", f"{smooth(losses)[0]:.3f} -> {smooth(losses)[-1]:.3f}"))
    if len(at) < len(run.steps):
        bad = next(line for line in run.steps if line["loss"] is None)
        rows.append(("not finite", f"the loss at step {bad['step']:,}, bucket {bad['bucket']}"))
    if run.validations:
        best = max(run.validations, key=lambda line: line["val_top1"])
        newest = run.validations[-1]
        text = f"top-1 {100 * best['val_top1']:.1f} % at step {best['step']:,}"
        if newest is not best:
            text += f"; the last {100 * newest['val_top1']:.1f} % at {newest['step']:,}"
        rows.append(("best validation", text))
    seconds = step_seconds(run)
    if seconds:
        slowest, fastest = max(seconds, key=seconds.get), min(seconds, key=seconds.get)
        text = f"{slowest}, {_bucket_speed(run, slowest, seconds)}"
        rows.append(("slowest bucket", text))
        if fastest != slowest:
            rows.append(("fastest bucket", f"{fastest}, {_bucket_speed(run, fastest, seconds)}"))
    waits, spans, before = [], [], 0.0
    for line in run.steps:
        if line.get("data_wait_share") is not None:
            now = line.get("elapsed", before + 1.0)  # without times all lines count alike
            waits.append(line["data_wait_share"])
            spans.append(max(now - before, 0.0))
            before = now
    if any(spans):
        rows.append(
            ("waiting for data", f"{100 * np.average(waits, weights=spans):.0f} % of the time")
        )
    counts = [line.get("compiled", 0) for line in run.steps]
    if any(counts):
        # The count starts anew with every process of the run.
        new = np.diff(counts, prepend=0)
        new = np.where(new < 0, counts, new)
        last_one = run.steps[np.flatnonzero(new)[-1]]["step"]
        rows.append(("compilations", f"{new.sum():,}, the last by step {last_one:,}"))
    if last.get("unreadable"):
        rows.append(("unreadable clips", f"{last['unreadable']:,}"))
    return "\n".join([run.name, *(f"  {name:<18}{text}" for name, text in rows)])


def step_seconds(run: Run) -> dict[str, float]:
    """Median seconds of a step of each bucket; a bucket without times is left out."""
    columns = {name: run.column("step_seconds", lines)[1] for name, lines in run.buckets.items()}
    return {name: float(np.median(values)) for name, values in columns.items() if len(values)}


def end_losses(run: Run) -> dict[str, float]:
    """Mean loss of each bucket over the last fifth of the steps; unseen buckets are left out."""
    begin = 0.8 * run.steps[-1]["step"]
    late = {name: [x for x in lines if x["step"] > begin] for name, lines in run.buckets.items()}
    columns = {name: run.column("loss", lines)[1] for name, lines in late.items()}
    return {name: float(values.mean()) for name, values in columns.items() if len(values)}


def _bucket_speed(run: Run, bucket: str, seconds: dict[str, float]) -> str:
    """Time of a step, clips and tokens per second of a bucket, as far as they are known."""
    parts = [f"{seconds[bucket]:.3g} s a step"]
    for field in ("clips", "tokens"):
        _, values = run.column(field, run.buckets[bucket])
        if len(values):
            rate = np.median(values) / seconds[bucket]
            parts.append(f"{rate:,.0f} {field}/s" if rate >= 100 else f"{rate:.3g} {field}/s")
    return ", ".join(parts)
