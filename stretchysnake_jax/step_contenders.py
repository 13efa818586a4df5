"""Who takes part in `stretchysnake bench step`, each in a process of its own.

So the memory of one is not that of another: a contender's peak is how far its resident memory grew
from the moment at which its framework had started, weights and optimizer included. All processes
are set up alike, see `configure_cpu`, and draw the same batch. The PyTorch model's weights are
ours, fitted to the bucket beforehand; ours fits them in every step, as training does.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import time

import numpy as np

from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import Config, ModelConfig, resolve

OURS, TORCH = "ours", "PyTorch eager"
STEPS = 1000  # the length of the run that the learning rate is scheduled for
PRODUCT = 2048  # rows and columns of the matrix product that a CPU's peak is taken from


class Failed(Exception):
    """A contender that can't go on; the text says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What all contenders compute: one training step over and over.

    Attributes:
      config: of the run; the model, the optimizer, the dtype and the seed count.
      bucket: the scale.
      batch: clips.
      weights: a .npz of the fitted weights under PyTorch's names, for PyTorch.
    """

    config: Config
    bucket: Bucket
    batch: int
    weights: str | None = None

    @property
    def tokens(self) -> int:
        """Of a clip, the class token included."""
        return self.bucket.tokens(self.config.model.tubelet)

    def draw(self) -> dict[str, np.ndarray]:
        """The batch: video uint8 (B, T, H, W, 3), label int32 (B,), mask float32 (B,)."""
        rng, b = np.random.default_rng(0), self.bucket
        shape = (self.batch, b.frames, b.height, b.width, 3)
        return {
            "video": rng.integers(0, 256, shape, np.uint8),
            "label": rng.integers(0, self.config.model.num_classes, self.batch).astype(np.int32),
            "mask": np.ones(self.batch, np.float32),
        }


def fitted_model(model: ModelConfig, bucket: Bucket) -> ModelConfig:
    """The model whose base scale is `bucket`: of the same shapes as the fitted parameters."""
    size = tuple(n * p for n, p in zip(bucket.grid, bucket.patch, strict=True))
    frames = None if model.frames is None else bucket.frames
    return dataclasses.replace(model, frames=frames, size=size, patch=bucket.patch)


def save_weights(case: Case, path) -> None:
    """Writes what PyTorch loads: the initial weights of `init_state`, fitted to the bucket."""
    from stretchysnake_jax.step import fit, init_state
    from stretchysnake_jax.torch_layout import to_state_dict

    params = init_state(case.config, STEPS)["params"]
    fitted = fit(params, case.bucket, case.config.stretch)
    np.savez(path, **to_state_dict(fitted_model(case.config.model, case.bucket), fitted))


class Ours:
    """The library's own step, called as the training loop calls it."""

    def __init__(self):
        import jax

        from stretchysnake_jax import step

        self._jax, self._library = jax, step
        jax.block_until_ready(jax.numpy.ones(3) + 1)  # starts the backend

    def load(self, case: Case) -> dict:
        self._bucket, self._batch = case.bucket, case.draw()
        if self._jax.default_backend() != "cpu":  # as the training loop does ahead of the step
            self._batch = self._jax.device_put(self._batch)
        self._train_step = self._library.TrainStep(case.config, STEPS)
        self._state = self._library.init_state(case.config, STEPS)
        programs = self._train_step.compile(case.bucket, case.batch)
        return {
            "compile_seconds": sum(program.seconds for program in programs.values()),
            "temporaries": programs["trunk"].temporary,
        }

    def step(self) -> float:
        self._state, metrics = self._train_step(self._state, self._batch, self._bucket)
        self._jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def device_peak(self) -> int | None:
        stats = self._jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use")

    def product(self) -> float:
        jnp = self._jax.numpy
        square = jnp.ones((PRODUCT, PRODUCT))
        multiply = self._jax.jit(jnp.matmul)
        return fastest(lambda: multiply(square, square).block_until_ready())


class Torch:
    """The same model in plain PyTorch eager, see `stretchysnake_bench.torch_model`."""

    def __init__(self):
        import torch
        from stretchysnake_bench import torch_model

        self._torch, self._library = torch, torch_model
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.ones(3, device=self._device) + 1

    def load(self, case: Case) -> dict:
        torch, batch = self._torch, case.draw()
        self._video = torch.from_numpy(batch["video"]).to(self._device)
        self._label = torch.from_numpy(batch["label"].astype(np.int64)).to(self._device)
        with np.load(case.weights) as weights:
            model = self._library.load(fitted_model(case.config.model, case.bucket), weights)
        self._train_step = self._library.TrainStep(
            model.to(self._device), resolve(case.config.optim)
        )
        return {"compile_seconds": None, "temporaries": None}

    def step(self) -> float:
        return self._train_step(self._video, self._label)

    def device_peak(self) -> int | None:
        return self._torch.cuda.max_memory_allocated() if self._device == "cuda" else None

    def product(self) -> float:
        square = self._torch.ones(PRODUCT, PRODUCT)
        return fastest(lambda: square @ square)


CONTENDERS = {OURS: Ours, TORCH: Torch}


def fastest(multiply, seconds: float = 0.5) -> float:
    """Operations per second of the fastest of the products computed in so many seconds."""
    multiply()
    end, best = time.perf_counter() + seconds, float("inf")
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - start)
    return 2 * PRODUCT**3 / best


# Memory of a process, as Linux tells it.


def resident(field: str) -> int | None:
    """Bytes of this process, "VmRSS" now or "VmHWM" at most so far; None: no Linux."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith(f"{field}:")), None)


def forget_peak() -> None:
    """Sets "VmHWM" to what it is now, where the system lets a process do that."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> int | None:
    """Bytes that processes may still take; None: no Linux."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:")), None)


# The processes.


def serve(pipe, name: str, case: Case) -> None:
    """Runs a contender in this process: answers each word with a dict, or with a text: why not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark itself stops its processes
    with contextlib.suppress(OSError):  # where memory runs out, this process goes, not others
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    from stretchysnake_kernels import configure_cpu

    try:
        configure_cpu()
        contender = CONTENDERS[name]()
        base = resident("VmRSS")

        def grown():
            on_device = contender.device_peak()
            if on_device is not None:
                return on_device
            peak = resident("VmHWM")
            return None if base is None or peak is None else max(0, peak - base)

        def answer(word):
            if word == "load":
                return contender.load(case)
            if word == "product":
                return {"product": contender.product()}
            if word == "forget":
                forget_peak()
                return {}
            start, cpu = time.perf_counter(), time.process_time()
            loss = contender.step()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            return {"loss": loss, "seconds": seconds, "cpu": cpu, "peak": grown()}

        while (word := pipe.recv()) is not None:
            pipe.send(answer(word))
    except EOFError:  # the benchmark is gone
        return
    except Exception as error:  # whatever a contender raises is for the table to say
        lines = str(error).strip().splitlines()
        pipe.send(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")


class Contender:
    """A contender's process; leaving the context ends it.

    Args:
      name: one of `CONTENDERS`.
      case: what it computes.

    Attributes:
      name: as given.
      loaded: compile_seconds, and temporaries, the bytes that XLA sets aside for a step beside its
        arguments; None where nothing is compiled.
      first: the answer of the first step.
      steps: the answers of the timed steps.
    """

    def __init__(self, name: str, case: Case):
        self.name, self.loaded, self.first, self.steps = name, {}, {}, []
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, name, case), daemon=True)
        self._process.start()
        other.close()

    def ask(self, word: str) -> dict:
        """Sends a word and waits for the answer: load, step, forget or product.

        Raises:
          Failed: the contender raised an error, or its process was ended.
        """
        try:
            self._pipe.send(word)
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            why = "killed, memory may have run out" if code == -signal.SIGKILL else f"status {code}"
            raise Failed(f"its process ended ({why})") from error
        if isinstance(answer, str):
            raise Failed(answer)
        return answer

    def warm_up(self) -> None:
        """Loads, compiles, and takes a step more, so that what follows can be timed."""
        self.loaded = self.ask("load")
        self.first = self.ask("step")
        self.ask("step")
        self.ask("forget")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()
        self._pipe.close()
