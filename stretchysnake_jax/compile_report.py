"""What the training step of every bucket takes, from compiling it and running nothing.

For the machine at hand, or for a GPU that is not there, which needs the packages of the extra
[aot] instead.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import threading
import time

import jax
import jax.numpy as jnp
from stretchysnake_kernels import dispatch
from stretchysnake_kernels.selective_scan import gpu

from stretchysnake_jax import flops, sharding
from stretchysnake_jax.buckets import Bucket, Schedule, make_batch_sizes, training_buckets
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import Config
from stretchysnake_jax.step import TrainStep, init_state
from stretchysnake_jax.whole_file import whole_file

GIB = 2**30
USABLE = 0.9  # of a device's memory; the rest is the allocator's and the libraries'


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one step on one bucket takes, on each device.

    Attributes:
      bucket: the scale.
      batch: clips of the step, all devices together.
      seconds: to compile what no earlier bucket had compiled.
      flops: of the step by `flops.count`, on all devices together: multiply-add 2, the backward
        pass twice the forward one, nothing computed again.
      state: bytes of parameters and optimizer state, which the step updates in place.
      clips: bytes of the batch as the trunk takes it.
      temporary: bytes of everything between, activations kept for the gradient included.
      limit: bytes of memory that the device has; None: unknown.
    """

    bucket: Bucket
    batch: int
    seconds: float
    flops: float
    state: int
    clips: int
    temporary: int
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes in use during a step."""
        return self.state + self.clips + self.temporary

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the memory; None: unknown."""
        return self.limit and self.total <= USABLE * self.limit

    def suggested_batch(self, multiple: int = 1) -> int | None:
        """The largest batch that fits, in multiples of `multiple`, if memory grows with the clips;
        0: none."""
        if self.limit is None:
            return None
        clip = (self.clips + self.temporary) / self.batch
        fit = (USABLE * self.limit - self.state) / clip
        return max(0, math.floor(fit / multiple) * multiple)


def size(tree) -> int:
    """Bytes that the arrays of a tree (shapes will do) take on one device."""

    def bytes_of(x):
        where = getattr(x, "sharding", None)
        shape = where.shard_shape(x.shape) if where is not None else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(bytes_of, jax.tree.leaves(tree)))


def device_memory() -> int | None:
    """Bytes of memory of this machine's devices, each; of a CPU the machine's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def step_flops(config: Config, bucket: Bucket, batch: int) -> float:
    """Operations of a training step: multiply-add 2, backward twice forward."""
    return 2 * 3 * batch * flops.count(config.model, bucket)["full"]


def cost_of(config: Config, step: TrainStep, bucket: Bucket, batch: int) -> Cost:
    """Compiles what a bucket needs, unless it was before, and says what it takes."""
    start = time.perf_counter()
    programs = step.compile(bucket, batch)
    trunk = programs["trunk"]
    state = size(step.state)
    return Cost(
        bucket,
        batch,
        time.perf_counter() - start,
        step_flops(config, bucket, batch),
        state,
        trunk.arguments - state,
        trunk.temporary,
        device_memory(),
    )


def measure(config: Config, device: str | None = None, implementation: str | None = None):
    """Compiles the training step of every bucket of a config.

    Args:
      config: the experiment.
      device: a GPU that is not there, such as "h100" or "9.0"; None: the devices of this process,
        laid out by `config.mesh`.
      implementation: of the selective scan; None: the one that runs by default.

    Yields:
      The `Cost` of each. Buckets that share a trunk and a batch size are compiled once, such as
      those of one frame count under static_tokens.

    Raises:
      ConfigError: the mesh doesn't fit the devices.
      ValueError: no such device.
      AotUnavailable: a package is missing that compiling for another device needs.
      dispatch.Unsupported: the implementation does not run there.
    """
    buckets = [bucket for bucket, _ in training_buckets(config.stretch, config.model)]
    sizes = make_batch_sizes(config, buckets)
    if device:
        with preferred(implementation):
            yield from _measure_elsewhere(config, zip(buckets, sizes, strict=True), device)
        return
    mesh = sharding.make_mesh(config.mesh)
    step = TrainStep(config, 100, mesh if mesh.size > 1 else None)
    for bucket, batch in zip(buckets, sizes, strict=True):
        with preferred(implementation):
            cost = cost_of(config, step, bucket, batch)
        yield cost


def preferred(implementation: str | None):
    """A context in which an implementation of the scan runs; None: the default."""
    return dispatch.prefer(implementation) if implementation else contextlib.nullcontext()


def _measure_elsewhere(config, buckets, device):
    from stretchysnake_bench import aot

    state, done = jax.eval_shape(lambda: init_state(config, 100)), {}
    limit = aot.device_memory(device)
    for bucket, batch in buckets:
        start = time.perf_counter()
        with gpu.compile_for(aot.find_gpu(device)):
            step = TrainStep(config, 100)
            trunk = step.stem.projected(bucket)
            video = jax.ShapeDtypeStruct((batch, *trunk.shape), jnp.float32)
            arrays = {
                "video": video,
                "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
                "mask": jax.ShapeDtypeStruct((batch,), jnp.float32),
            }
            if (trunk, batch) not in done:

                def update(state, arrays, step=step, trunk=trunk):
                    return step.trunk(state, arrays, trunk)

                done[trunk, batch] = aot.compile_for(update, state, arrays, target=device)
        yield Cost(
            bucket,
            batch,
            time.perf_counter() - start,
            step_flops(config, bucket, batch),
            size(state),
            size(arrays),
            done[trunk, batch].temp_bytes,
            limit,
        )


def table(rows: list[list[Cost]], names: list[str], config: Config, multiple: int = 1) -> str:
    """Costs as text.

    Args:
      rows: for every bucket, its cost by implementation of the scan.
      names: of the implementations.
      config: the experiment.
      multiple: what a suggested batch is a multiple of.
    """
    lines = [
        f"{'bucket':<18}{'tokens':>8}{'batch':>7}{'compile':>9}{'TFLOP':>8}{'state':>8}{'clips':>8}"
        + "".join(f"{name:>11}" for name in names)
        + f"{'fits':>7}{'batch that fits':>17}"
    ]
    for several in rows:
        cost = several[0]
        fits = {None: "?", True: "yes", False: "no"}[cost.fits]
        largest = cost.suggested_batch(multiple)
        lines.append(
            f"{cost.bucket!s:<18}{cost.bucket.tokens(config.model.tubelet):>8}{cost.batch:>7}"
            f"{sum(other.seconds for other in several):>7.1f} s{cost.flops / 1e12:>8.3g}"
            f"{cost.state / GIB:>8.2f}{cost.clips / GIB:>8.2f}"
            + "".join(f"{other.temporary / GIB:>11.2f}" for other in several)
            + f"{fits:>7}{'?' if largest is None else largest:>17}"
        )
    return "\n".join(lines)


def report(config: Config, device: str | None, implementations: list[str | None]) -> str:
    """`measure` as text, for several implementations of the scan side by side."""
    buckets = len(training_buckets(config.stretch, config.model))
    progress, columns = Progress(), []
    clock = Clock(buckets * len(implementations))
    for implementation in implementations:
        column = []
        for cost in measure(config, device, implementation):
            column.append(cost)
            clock.advance(clock.done + 1)
            progress.show(f"compiling: {clock.done}/{clock.total} steps, {clock.left} left")
        columns.append(column)
    progress.close()
    names = [name or "temporary" for name in implementations]
    return table(list(map(list, zip(*columns, strict=True))), names, config)


def plan(config: Config, step: TrainStep, schedule: Schedule, start: int, path: pathlib.Path):
    """The compilations of a run, for `compile.Ahead`.

    Tells `step` that there will be no others.

    Args:
      config: the run's.
      step: what is compiled.
      schedule: its buckets.
      start: steps that are done.
      path: a file that the first process writes: a JSON row per bucket, anew with every one.

    Returns:
      A list of functions, one per bucket, in the order in which the run meets them.
    """
    lock, rows = threading.Lock(), []
    wanted = dict.fromkeys(schedule.which[start:].tolist())
    wanted = [(schedule.buckets[i], schedule.batch_sizes[i]) for i in wanted]
    step.ahead = set(wanted)

    def compile_bucket(bucket, batch):
        cost = cost_of(config, step, bucket, batch)
        row = dataclasses.asdict(cost) | {"bucket": str(bucket), "fits": cost.fits}
        with lock:
            rows.append(row | {"suggested_batch": cost.suggested_batch()})
            if jax.process_index() == 0:
                with whole_file(path) as part:
                    part.write_text(json.dumps(rows, indent=2) + "\n")

    return [functools.partial(compile_bucket, *pair) for pair in wanted]
