"""Who takes part in a benchmark of the selective scan, and how all are timed: interleaved.

On a GPU a call of a kernel may be shorter than its launch from Python. There our programs repeat
the call inside of one compiled loop, each turn waiting for the one before, and PyTorch replays a
CUDA graph: what is measured is the GPU at work, with one wait per sample of some 20 ms.
"""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from stretchysnake_bench import floor, mixer
from stretchysnake_bench.machine import NO_TIME, Budget, cores
from stretchysnake_kernels import bidirectional_selective_scan, selective_scan
from stretchysnake_kernels.selective_scan.arg_specs import ArgSpec, make_args

WARM_UPS = 2  # the first call after idle takes half as long again
BRIEF = 0.25  # seconds; what takes less is run once more before it is timed
PATIENCE = 5.0  # seconds; a contender that takes longer once it is warm runs one round only
FORWARD, BACK = "forward", "forward+backward"
FLOOR = "C++ floor"
SCAN, BOTH, BLOCK = "scan", "bidir", "block"
PASSES_OVER = {SCAN: 1, BOTH: 2, BLOCK: 2}  # directions
# Arguments that have the activations' dtype; the weights are float32, as in training.
ACTIVATIONS = ("x", "delta", "B", "C", "z")
# Largest error of y, relative to its largest entry, that rounding can explain.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
# Of a sample on a GPU, and the speed at 16 states from which the number of calls in it is guessed.
SAMPLE_SECONDS = 0.02
ELEMENTS_PER_SECOND = {FORWARD: 5e10, BACK: 1.2e10}
MOST_CALLS = 1000
GPU_KERNELS = ("pallas", "triton", "mosaic_gpu")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all contenders compute.

    Attributes:
      what: "scan" (one direction), "bidir" (both, added up) or "block" (one of the model's).
      spec: its size.
      dtype: of the activations.
    """

    what: str
    spec: ArgSpec
    dtype: str = "float32"

    @property
    def elements(self) -> int:
        """Numbers in x, of all directions."""
        return PASSES_OVER[self.what] * self.spec.elements

    def bytes(self, step: str) -> int:
        """Returns the bytes that a scan must read and write, each array once per pass."""
        spec, ways = self.spec, PASSES_OVER[self.what]
        wide, narrow = spec.elements, spec.batch * spec.length * spec.state
        # x and delta of each direction, z in, y out; B, C in.
        forward = (2 * ways + 2) * wide + 2 * ways * narrow
        # x, delta, z, dy in, the gradients of x, delta, z out; B, C and theirs.
        backward = (4 * ways + 3) * wide + 4 * ways * narrow
        size = jnp.dtype(self.dtype).itemsize
        return size * (forward if step == FORWARD else forward + backward)


@dataclasses.dataclass
class Job:
    """One contender of one pass.

    Attributes:
      what, step, name: as in the table.
      run: computes, waits, and returns y where it lies.
      read: copies y to a numpy array.
      memory: temporary bytes, None: unknown.
      calls: how often a run computes the pass.
      seconds: per call, of every round.
    """

    what: str
    step: str
    name: str
    run: Callable
    memory: int | None = None
    read: Callable = np.asarray
    calls: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)


def our_scan(args, implementation):
    """The scan of one direction, as a function of a dict."""
    return selective_scan(**args, delta_softplus=True, implementation=implementation)


def our_scans(args, implementation):
    """Both directions in one call, as the encoder makes it."""
    return bidirectional_selective_scan(**args, delta_softplus=True, implementation=implementation)


def our_block(args, implementation):
    """A block of the model, which holds two scans."""
    return mixer.mixer(args, args["u"], implementation)


OURS = {SCAN: our_scan, BOTH: our_scans, BLOCK: our_block}


def make_problem(problem: Problem) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draws the arguments of a problem, and a cotangent of its output."""
    spec, rng = problem.spec, np.random.default_rng(1)
    if problem.what == BLOCK:
        width = spec.channels // 2
        u = rng.normal(size=(spec.batch, spec.length, width)).astype(np.float32)
        args = mixer.make_params(width, spec.channels, spec.state) | {"u": u}
        return args, rng.normal(size=u.shape).astype(np.float32)
    args = make_args(spec)
    if problem.what == BOTH:
        other = make_args(spec, seed=1)
        args = {k: v if k == "z" else np.stack([v, other[k]]) for k, v in args.items()}
    dtype = jnp.dtype(problem.dtype)
    args = {k: v.astype(dtype) if k in ACTIVATIONS else v for k, v in args.items()}
    return args, rng.normal(size=args["z"].shape).astype(dtype)


def both_passes(function: Callable) -> Callable:
    """Returns (args, d_y) -> (y, gradients of args)."""

    def run(args, d_y):
        y, pullback = jax.vjp(function, args)
        return y, pullback(d_y)

    return run


def repeated(function: Callable, calls: int) -> Callable:
    """Returns a function that computes `function(*args)` so many times, one after the other."""
    if calls == 1:
        return function

    def run(*args):
        shapes = jax.eval_shape(function, *args)
        nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

        def turn(_, before):
            # Else the compiler would see that every turn computes the same, and compute it once.
            again, _ = lax.optimization_barrier((args, before))
            return function(*again)

        return lax.fori_loop(0, calls, turn, nothing)

    return run


def calls_per_sample(problem: Problem, step: str, name: str) -> int:
    """Returns how many calls fill a sample: one, but for our kernels on a GPU."""
    if jax.default_backend() != "gpu" or name not in GPU_KERNELS:
        return 1
    seconds = problem.elements * problem.spec.state / 16 / ELEMENTS_PER_SECOND[step]
    return int(np.clip(round(SAMPLE_SECONDS / seconds), 1, MOST_CALLS))


def jax_jobs(problem: Problem, name: str, args, d_y) -> list[Job]:
    """Compiles one of our implementations for both passes; its arguments lie on the device."""
    function = functools.partial(OURS[problem.what], implementation=name)
    args, d_y = jax.tree.map(jnp.asarray, (args, d_y))
    jobs = []
    for step, run, operands in (
        (FORWARD, function, (args,)),
        (BACK, both_passes(function), (args, d_y)),
    ):
        calls = calls_per_sample(problem, step, name)
        compiled = jax.jit(repeated(run, calls)).lower(*operands).compile()

        def wait(compiled=compiled, operands=operands, step=step):
            outputs = jax.block_until_ready(compiled(*operands))
            return outputs if step == FORWARD else outputs[0]

        memory = compiled.memory_analysis().temp_size_in_bytes
        jobs.append(Job(problem.what, step, name, wait, memory, calls=calls))
    return jobs


def torch_jobs(problem: Problem, args, d_y, quick: bool, say) -> list[Job]:
    """Returns the PyTorch contenders that are installed and can take this problem."""
    if importlib.util.find_spec("torch") is None:
        say("PyTorch is not installed: no comparison with it.")
        return []
    import torch
    from stretchysnake_bench import torch_peers as peers

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        say("This PyTorch does not find the GPU: no comparison with it.")
        return []
    jobs, spec = [], problem.spec
    d_y = peers.to_tensor(d_y, device)
    for peer in peers.PEERS[:1] if quick else peers.PEERS:
        if peer.only not in (None, device):
            continue
        try:
            importlib.import_module(peer.needs)
        except ImportError as error:
            say(f"{peer.name}: not measured, {error}.")
            continue
        if spec.length > peer.longest:
            say(
                f"{peer.name}: skipped at {problem.what} {spec.name}, too slow above "
                f"{peer.longest} tokens."
            )
            continue
        if problem.what == BLOCK and peer.tokens_last:
            continue
        tensors = peers.to_torch(args, peer.tokens_last, device)
        axis = 2 if peer.tokens_last else 1
        function = {
            SCAN: peers.scan,
            BOTH: functools.partial(peers.both_directions, axis=axis),
            BLOCK: peers.block,
        }[problem.what]
        function = functools.partial(function, peer.scan)
        as_y = d_y.transpose(1, 2).contiguous() if peer.tokens_last else d_y
        jobs += _torch_passes(problem, peer, function, tensors, as_y, device, say)
    return jobs


def _torch_passes(problem, peer, function, tensors, d_y, device, say):
    from stretchysnake_bench import torch_peers as peers

    def forward():
        return peers.forward(function, tensors)

    def both():
        return peers.forward_and_back(function, tensors, d_y)[0]

    jobs = []
    for step, compute in ((FORWARD, forward), (BACK, both)):
        if step == BACK and not peer.backward:
            continue
        kept = peers.saved_bytes(function, tensors) if step == BACK else None
        calls, run = 1, compute
        if device == "cuda":
            calls, run = peers.on_gpu(compute, SAMPLE_SECONDS, f"{peer.name} {step}", say)

        def read(y):
            y = peers.to_numpy(y)
            return np.swapaxes(y, 1, 2) if peer.tokens_last else y

        jobs.append(Job(problem.what, step, peer.name, run, kept, read, calls))
    return jobs


def floor_jobs(args, d_y: np.ndarray, say) -> list[Job]:
    """Returns the C++ contender, or says in one line why there is none."""
    try:
        lower = floor.Floor(args, d_y, threads=cores())
    except floor.Unavailable as reason:
        say(f"{FLOOR}: not measured, {reason}.")
        return []

    def run(method):
        method()
        return lower.y

    return [
        Job(SCAN, FORWARD, FLOOR, lambda: run(lower.forward)),
        Job(SCAN, BACK, FLOOR, lambda: run(lower.forward_and_back)),
    ]


def make_jobs(
    problem: Problem, ours: Sequence[str], quick: bool, say, failed, budget: Budget
) -> list[Job]:
    """Builds every contender of one problem.

    Args:
      problem: what they compute.
      ours: names of our implementations.
      quick: with one peer only.
      say: called with what a reader should know.
      failed: called with (name, reason) of a contender that could not be built.
      budget: when it is over, no further contender is built.
    """
    args, d_y = make_problem(problem)
    makers = {name: functools.partial(jax_jobs, problem, name, args, d_y) for name in ours}
    makers["PyTorch"] = functools.partial(torch_jobs, problem, args, d_y, quick, say)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and problem.what == SCAN and problem.dtype == "float32":
        makers[FLOOR] = functools.partial(floor_jobs, args, d_y, say)
    jobs = []
    for name, make in makers.items():
        if budget.over():
            failed(name, NO_TIME)
            continue
        try:
            jobs += make()
        except Exception as error:  # a kernel that does not compile: the others are still measured
            failed(name, first_line(error))
    return jobs


def first_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def expected_y(problem: Problem) -> np.ndarray:
    """Returns what all contenders must compute: y by plain JAX, as float32."""
    args, _ = make_problem(problem)
    function = functools.partial(OURS[problem.what], implementation="xla")
    return np.asarray(jax.jit(function)(args), np.float32)


def measure(problem: Problem, jobs: list[Job], rounds: int, progress, say, failed) -> list[Job]:
    """Runs all jobs in turn, `rounds` times after the warm-ups; fills their `seconds`.

    Returns:
      The jobs without those that failed or computed something else; of these `failed` is told.
    """
    expected = expected_y(problem)
    slow, before, out = set(), {}, set()
    for turn in range(WARM_UPS + rounds):
        for job in jobs:
            if id(job) in out or (id(job) in slow and turn != WARM_UPS):
                continue
            try:
                if turn >= WARM_UPS and before[id(job)] < BRIEF:
                    # The threads of the one before this one spin for some 20 ms after their work.
                    job.run()
                start = time.perf_counter()
                y = job.run()
                seconds = before[id(job)] = time.perf_counter() - start
                if turn == 0:
                    error = np.abs(np.asarray(job.read(y), np.float32) - expected).max()
                    error /= np.abs(expected).max()
                    if not error < TOLERANCE[problem.dtype]:
                        raise ValueError(f"computes another {job.what}: error {error:.1e}")
            except Exception as error:  # out of memory, say: the others are still measured
                failed(f"{job.name} {job.step}", first_line(error))
                out.add(id(job))
                continue
            if turn == WARM_UPS - 1 and seconds > PATIENCE:  # the first call pays for new memory
                slow.add(id(job))
                say(f"{job.name}: {seconds:.0f} s per {job.what} {job.step}, measured once.")
            if turn >= WARM_UPS:
                job.seconds.append(seconds / job.calls)
            del y
        progress(turn + 1, WARM_UPS + rounds)
    return [job for job in jobs if id(job) not in out]
