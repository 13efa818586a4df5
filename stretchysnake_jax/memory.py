"""Device memory of the training step per bucket, from compiling it and running nothing.

For the machine at hand, or for a GPU that is not there, which needs the packages of the extra
[aot] instead.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from stretchysnake_kernels import dispatch
from stretchysnake_kernels.selective_scan import gpu

from stretchysnake_jax.buckets import make_batch_sizes, training_buckets
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import Config
from stretchysnake_jax.step import TrainStep, init_state

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of device memory of one step on one bucket.

    Attributes:
      state: parameters and optimizer state, which the step updates in place.
      batch: the videos as the trunk takes them, with their labels.
      temporary: everything between, activations kept for the gradient included.
    """

    state: int
    batch: int
    temporary: int

    @property
    def total(self) -> int:
        return self.state + self.batch + self.temporary


def size(tree) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(config: Config, device: str | None = None, implementation: str | None = None):
    """Compiles the training step of every bucket of a config.

    Args:
      config: the experiment.
      device: a GPU that is not there, such as "h100" or "9.0"; None: the default device.
      implementation: of the selective scan; None: the one that runs by default.

    Yields:
      (bucket, Memory). Buckets that share a trunk and a batch size are compiled once, such as those
      of one frame count under static_tokens.

    Raises:
      ValueError: no such device.
      AotUnavailable: a package is missing that compiling for another device needs.
      dispatch.Unsupported: the implementation does not run there.
    """
    state = jax.eval_shape(lambda: init_state(config, 100))
    buckets = [bucket for bucket, _ in training_buckets(config.stretch, config.model)]
    done = {}
    for bucket, batch in zip(buckets, make_batch_sizes(config, buckets), strict=True):
        with contextlib.ExitStack() as stack:
            if implementation:
                stack.enter_context(dispatch.prefer(implementation))
            if device:
                from stretchysnake_bench import aot, proof

                stack.enter_context(gpu.compile_for(proof.find_gpu(aot.capability_of(device))))
            step = TrainStep(config, 100)
            video = jax.ShapeDtypeStruct(
                (batch, bucket.frames, bucket.height, bucket.width, 3), "u1"
            )
            video = jax.eval_shape(lambda v, b=bucket, s=step: s.stem(v, b)[0], video)
            trunk = step.stem.projected(bucket)
            if (trunk, batch) not in done:
                arrays = {
                    "video": video,
                    "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
                    "mask": jax.ShapeDtypeStruct((batch,), jnp.float32),
                }

                def update(state, arrays, step=step, trunk=trunk):
                    return step.trunk(state, arrays, trunk)

                if device:
                    temporary = aot.compile_for(update, state, arrays, target=device).temp_bytes
                else:
                    compiled = jax.jit(update, donate_argnums=0).lower(state, arrays).compile()
                    temporary = compiled.memory_analysis().temp_size_in_bytes
                done[trunk, batch] = Memory(size(state), size(arrays), temporary)
        yield bucket, done[trunk, batch]


def memory_table(config: Config, device: str | None, implementations: list[str | None]) -> str:
    """`measure` as text, for several implementations of the scan side by side."""
    buckets = len(training_buckets(config.stretch, config.model))
    progress, clock = Progress(), Clock(buckets * len(implementations))
    columns = []
    for implementation in implementations:
        rows = []
        for row in measure(config, device, implementation):
            rows.append(row)
            clock.advance(clock.done + 1)
            progress.show(f"compiling: {clock.done}/{clock.total} steps, {clock.left} left")
        columns.append(rows)
    progress.close()
    names = [name or "default" for name in implementations]
    lines = [
        f"{'bucket':<18}{'tokens':>8}{'state':>8}{'batch':>8}" + "".join(f"{n:>12}" for n in names)
    ]
    for several in zip(*columns, strict=True):
        bucket, memory = several[0]
        lines.append(
            f"{bucket!s:<18}{bucket.tokens(config.model.tubelet):>8}{memory.state / GIB:>8.2f}"
            f"{memory.batch / GIB:>8.2f}"
            + "".join(f"{other.temporary / GIB:>12.2f}" for _, other in several)
        )
    return "\n".join(lines)
