"""What a cell saves against a reference scale, in operations and in seconds on this machine."""

import time

import jax
import numpy as np

from stretchysnake_jax import grid
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import Config, StretchConfig
from stretchysnake_jax.step import EvalStep

COLUMNS = ("frames", "height", "width", "patch", "gflops", "gflops_saved", "published_saved")
COLUMNS += ("seconds", "speedup", "speedup_low", "speedup_high", "reference")


def measure(
    config: Config,
    params,
    cells: list[Bucket],
    reference: Bucket,
    stretch: StretchConfig,
    *,
    batch_size: int = 8,
    rounds: int = 9,
    on_run=None,
) -> list[dict]:
    """Times the forward pass of cells, each beside the reference.

    A round runs every cell and the reference once, in an order of its own, so that whatever else
    the machine does in the meantime meets all alike; a speed-up is taken within a round. Video is
    random and lies on the device: nothing is read from disk or sent.

    Args:
      config: the run's.
      params: base parameters.
      cells: the scales.
      reference: the scale that they are compared with.
      stretch: the methods of interpolation.
      batch_size: clips of a run.
      rounds: how often each is timed.
      on_run: called with (runs done, runs in all), compilations counted as runs.

    Returns:
      A row for the reference and each other cell, with the keys of COLUMNS:
        gflops: as of `grid.gflops`, for one view.
        gflops_saved: the share of the reference's that is saved, < 0 if it takes more.
        published_saved: the same by the published count.
        seconds: the median of a batch.
        speedup: the median over rounds of the reference's seconds divided by the cell's.
        speedup_low, speedup_high: quartiles of that.
        reference: whether it is the reference.
    """
    buckets = list(dict.fromkeys([reference, *cells]))
    exact = {bucket.patch for bucket in buckets}
    eval_step = EvalStep(config.model, stretch, config.train.dtype, exact=exact)
    rng, done, total = np.random.default_rng(0), 0, len(buckets) * (rounds + 1)
    seconds = np.empty((rounds, len(buckets)))

    def run(bucket):
        nonlocal done
        shape = (batch_size, *bucket.shape)
        video = jax.device_put(rng.integers(0, 256, shape, np.uint8))
        jax.block_until_ready(video)
        start = time.perf_counter()
        jax.block_until_ready(eval_step(params, video, bucket))
        took = time.perf_counter() - start
        done += 1
        if on_run:
            on_run(done, total)
        return took

    for bucket in buckets:
        eval_step.compile(params, bucket, batch_size)
        run(bucket)
    for times in seconds:
        for i in rng.permutation(len(buckets)):
            times[i] = run(buckets[i])
    rows = []
    for bucket, times in zip(buckets, seconds.T, strict=True):
        low, speedup, high = np.percentile(seconds[:, 0] / times, (25, 50, 75))
        full, published = (
            [grid.gflops(config, b, convention=c) for b in (bucket, reference)]
            for c in ("full", "published")
        )
        rows.append(
            {
                **grid.place(bucket),
                "gflops": full[0],
                "gflops_saved": 1 - full[0] / full[1],
                "published_saved": 1 - published[0] / published[1],
                "seconds": float(np.median(times)),
                "speedup": float(speedup),
                "speedup_low": float(low),
                "speedup_high": float(high),
                "reference": bucket == reference,
                "batch_size": batch_size,
                "device": jax.devices()[0].device_kind,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Rows of `measure` as text."""
    lines = [
        f"{'scale':>17}{'GFLOPs':>10}{'saved':>8}{'published':>11}{'ms/batch':>10}{'speed-up':>10}"
        "   quartiles"
    ]
    for row in rows:
        text = f"{grid.cell_name(row):>17}{row['gflops']:>10.3g}{100 * row['gflops_saved']:>6.0f} %"
        text += f"{100 * row['published_saved']:>9.0f} %{1e3 * row['seconds']:>10.1f}"
        text += f"{row['speedup']:>9.2f}x   {row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
        lines.append(text + ("   (reference)" if row["reference"] else ""))
    return "\n".join(lines)
