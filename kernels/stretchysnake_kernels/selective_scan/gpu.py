"""What the GPU backends share: which GPU to compile for, and how to launch kernels on it."""

import contextlib
import contextvars
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax

from stretchysnake_kernels import dispatch
from stretchysnake_kernels.dispatch import Unsupported

WARP = 32  # channels of a warp, one per thread
WARPS = (1, 2, 4, 8)  # of a program; more would leave a thread too few registers
MOST_CHUNKS = 64  # a chunk joins the summaries of all those before it
LEAST_SPANS = 4  # of a chunk, so that joining is short beside walking
# A folder of <device kind>.json, looked at before the one of this package.
TUNING_VARIABLE = "STRETCHYSNAKE_TUNING"
TUNING = pathlib.Path(__file__).parent.parent / "tuning"


class Target(NamedTuple):
    """What to compile for.

    Attributes:
      capability: compute capability, such as (9, 0).
      multiprocessors: their number.
      interpret: whether to run the kernels as plain JAX on any device, instead.
      kind: JAX's name of the device, by which its tuning is found; None: untuned.
    """

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    interpret: bool = False
    kind: str | None = None


class Launch(NamedTuple):
    """How a pass is launched, as far as it may be chosen.

    Attributes:
      unroll: tokens per turn of the loop; more overlap, and need more registers.
      warps: of a program, each of 32 channels: 1, 2, 4 or 8, and fewer where the channels do not
        divide.
    """

    unroll: int
    warps: int = 1


class Pass(NamedTuple):
    """What a backend wants of its forward or backward pass.

    Attributes:
      backend: name of the implementation.
      name: "forward" or "backward".
      unroll: state size -> tokens per turn of the loop where nothing is tuned; as many as the
        registers hold.
      overhead: work of the chunk-parallel mode, relative to the sequential one.
      resident: warps per quarter of a multiprocessor that hide each other's waits.
    """

    backend: str
    name: str
    unroll: dict[int, int]
    overhead: float
    resident: int


@dataclasses.dataclass(frozen=True)  # Triton would take a NamedTuple apart
class Layout:
    """How the tokens and channels of a launch are dealt out; a backend's Plan adds to it.

    Attributes:
      length: tokens of a video.
      channels: a multiple of `block`.
      states: 8, 16 or 32.
      chunk: tokens of a chunk, a multiple of `span`; the last one may be shorter.
      span: tokens between two saved states, a multiple of `unroll`.
      unroll: tokens per turn of the loop.
      warps: of a program.
    """

    length: int
    channels: int
    states: int
    chunk: int
    span: int
    unroll: int
    warps: int

    @property
    def block(self):
        """Channels of a program."""
        return WARP * self.warps

    @property
    def chunks(self):
        return -(-self.length // self.chunk)

    @property
    def spans(self):
        return -(-self.length // self.span)

    @property
    def slots(self):
        """States that the backward pass keeps of a span: one per turn, and the odd tokens'."""
        return min(self.span, self.length) // self.unroll + self.length % self.unroll


class Options(NamedTuple):
    """What a caller may choose; None: as tuned for the device, else by the rule in the code.

    Attributes:
      chunks: into how many parts to cut a sequence, which then run side by side.
      forward: how to launch the forward pass.
      backward: how to launch the backward pass.
    """

    chunks: int | None = None
    forward: Launch | None = None
    backward: Launch | None = None


_target = contextvars.ContextVar("target", default=None)
_options = contextvars.ContextVar("options", default=None)


@contextlib.contextmanager
def compile_for(target: Target):
    """While it lasts, calls are traced for `target` instead of the default device.

    For compiling without the GPU, and for tests.
    """
    with dispatch.setting(_target, target), dispatch.trace_for("gpu"):
        yield


def interpret():
    """While it lasts, calls are traced to run as plain JAX, on any device. Slow; for tests."""
    return compile_for(Target(interpret=True))


def options(**chosen):
    """While it lasts, calls are traced with these `Options`; what is jitted already keeps its own.

    Raises:
      ValueError: chunks, unroll or warps below 1.
    """
    value = Options(**chosen)
    numbers = [("chunks", value.chunks)]
    for which in ("forward", "backward"):
        launch = getattr(value, which)
        numbers += [] if launch is None else launch._asdict().items()
    for name, number in numbers:
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, takes 1 or more")
    return dispatch.setting(_options, value)


def find_options() -> Options:
    """Returns those of `options`."""
    return _options.get() or Options()


def find_target(oldest: tuple[int, int]) -> Target:
    """Returns what to compile for: that of `compile_for`, else the default device.

    Args:
      oldest: compute capability that the kernels need.

    Raises:
      Unsupported: the device is no GPU that the kernels run on.
    """
    target = _target.get()
    if target is None:
        device = jax.local_devices()[0]
        if jax.default_backend() != "gpu":
            raise Unsupported(f"runs on GPUs, the default device is a {jax.default_backend()}")
        capability = str(device.compute_capability)
        if not re.fullmatch(r"\d+\.\d+", capability):
            raise Unsupported(f"runs on NVIDIA GPUs, the default device is a {device.device_kind}")
        capability = tuple(int(part) for part in capability.split("."))
        target = Target(capability, device.core_count, kind=device.device_kind)
    if target.capability < oldest:
        need, have = (".".join(map(str, version)) for version in (oldest, target.capability))
        raise Unsupported(f"takes compute capability {need} and up, the GPU has {have}")
    return target


def choose_launch(which: Pass, states: int, dtype: str, target: Target, options: Options) -> Launch:
    """Returns how to launch a pass: as chosen, else as tuned for the device, else by default.

    Args:
      which: the pass.
      states: state size of the kernel.
      dtype: name of x's dtype.
      target: what to compile for.
      options: what the caller chose.

    Raises:
      ValueError: the device's tuning file is none.
    """
    if (chosen := getattr(options, which.name)) is not None:
        return chosen
    tuned = read_tuning(target.kind).get(tuning_key(which.backend, which.name, states, dtype))
    return Launch(which.unroll[states]) if tuned is None else Launch(**tuned)


def lay_out(operands, which: Pass, target: Target, options: Options) -> Layout:
    """Returns how to deal the tokens and channels of a pass out.

    Args:
      operands: fused.Operands, channels a multiple of 32.
      which: the pass.
      target: what to compile for.
      options: what the caller chose.

    Raises:
      ValueError: an unroll or a number of warps that the kernels do not take, or the device's
        tuning file is none.
    """
    directions, videos, length, channels = operands.x.shape
    states = operands.decay.shape[1]
    span = 4 * states  # states of 4 bytes: a byte per token and channel; also whole turns
    launch = choose_launch(which, states, operands.x.dtype.name, target, options)
    if span % launch.unroll:
        raise ValueError(f"unroll is {launch.unroll}, takes a divisor of {span}")
    if launch.warps not in WARPS:
        raise ValueError(f"warps is {launch.warps}, takes one of {WARPS}")
    blocks, chunks = channels // WARP, options.chunks
    if chunks is None:
        warps = directions * videos * blocks
        cores, overhead, resident = target.multiprocessors, which.overhead, which.resident
        chunks = choose_chunks(warps, length, span, cores, overhead, resident)
    return Layout(
        length=length,
        channels=channels,
        states=states,
        chunk=math.ceil(length / chunks / span) * span,
        span=span,
        unroll=launch.unroll,
        # Fewer than wanted where the channels do not divide into such blocks: one must not reach
        # over the last channel, and to pad for it would cost more than it wins.
        warps=math.gcd(launch.warps, blocks),
    )


def tuning_key(backend: str, which: str, states: int, dtype: str) -> str:
    """Returns the name of an entry of a tuning file."""
    return f"{backend} {which} {states} {dtype}"


def tuning_file(kind: str) -> str:
    """Returns the name of a device kind's file, such as "nvidia_h100_80gb_hbm3.json"."""
    return re.sub(r"\W+", "_", kind.lower()) + ".json"


@functools.cache
def read_tuning(kind: str | None) -> dict[str, dict[str, int]]:
    """Returns the entries that `stretchysnake bench scan --tune` wrote for a device kind.

    Raises:
      ValueError: the file is no such table.
    """
    if kind is None:
        return {}
    folders = [pathlib.Path(own)] if (own := os.environ.get(TUNING_VARIABLE)) else []
    for folder in (*folders, TUNING):
        path = folder / tuning_file(kind)
        if not path.is_file():
            continue
        try:
            launches = json.loads(path.read_text())["launches"]
            for entry in launches.values():
                if min(Launch(**entry)) < 1:
                    raise ValueError(f"{entry} has a number below 1")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no tuning file ({error}): write it anew with stretchysnake bench scan "
                "--tune, or delete it"
            ) from error
        return launches
    return {}


def choose_chunks(
    warps: int, length: int, span: int, multiprocessors: int, overhead: float, resident: int
) -> int:
    """Returns into how many chunks to cut a sequence so that the GPU is busy.

    Args:
      warps: that run side by side without cutting.
      length: tokens of the sequence.
      span: tokens, of which a chunk takes a multiple.
      multiprocessors: of the GPU; each runs four warps at once.
      overhead: work of the chunk-parallel mode, relative to the sequential one.
      resident: warps wanted per quarter of a multiprocessor.
    """
    quarters = 4 * multiprocessors
    if warps * overhead >= quarters:
        return 1
    wanted = -(-resident * quarters // warps)
    return max(1, min(wanted, length // (LEAST_SPANS * span), MOST_CHUNKS))
