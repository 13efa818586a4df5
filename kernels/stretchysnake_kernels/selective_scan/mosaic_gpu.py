"""The selective scan as a Pallas kernel lowered through Mosaic GPU: compute capability 9.x, 10.x.

A warpgroup walks 128 channels, one per thread, and the thread keeps all states of its channel in
registers. The inputs come as tiles of some tokens, which the bulk copy engine fetches into shared
memory while the tile before is worked on.

There is a forward pass only. Where a gradient is wanted, both passes are those of pallas.py: its
backward pass starts from checkpoints that its own forward pass keeps. So a call is taken only
where pallas.py takes it, too.
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import fused, gpu, pallas, pallas_math

# Major compute capabilities. Older GPUs have no bulk copies; for 12.x, Mosaic GPU of JAX 0.10 to
# 0.12 asks its assembler for code that this refuses.
TAKEN = (9, 10)
CHANNELS = 128  # of a program: a warpgroup, one channel per thread
TILE = 16  # tokens fetched at once
SLOTS = 2  # tiles in shared memory: one worked on, one on its way
# State size -> tokens per turn of the loop. Tokens of a turn overlap, which a GPU with few warps
# needs; four warpgroups still share the registers of a multiprocessor (three with 32 states).
UNROLL = {8: 4, 16: 2, 32: 1}

_detect_races = contextvars.ContextVar("detect_races", default=False)

# With approx_math these become ex2.approx and rsqrt.approx; a division would take ten instructions.
MATH = pallas_math.PORTABLE._replace(reciprocal=lambda v: lax.square(lax.rsqrt(v)))


@functools.cache
def modules():
    """Returns (jax.experimental.pallas, its Mosaic GPU part, the class of interpret parameters).

    Raises:
      Unsupported: this JAX has no Mosaic GPU.
    """
    try:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        if hasattr(plgpu, "InterpretGPUParams"):
            return pl, plgpu, plgpu.InterpretGPUParams
        # JAX 0.10 has it without a public name.
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    except ImportError as error:
        raise Unsupported(f"this JAX has no Mosaic GPU ({error})") from error
    return pl, plgpu, InterpretGPUParams


@contextlib.contextmanager
def interpret(*, detect_races: bool = False):
    """While it lasts, calls are traced to run on the CPU, with copies and barriers simulated.

    Slow; for tests. The kernels of the gradient run as in `gpu.interpret`.

    Args:
      detect_races: also complain, with the words "RACE DETECTED", where no barrier orders two
        accesses. JAX 0.10 prints that, 0.12 raises jax.errors.JaxRuntimeError.
    """
    token = _detect_races.set(detect_races)
    try:
        with gpu.interpret():
            yield
    finally:
        _detect_races.reset(token)


def _find_target():
    """Returns the gpu.Target to compile for.

    Raises:
      Unsupported: the device is no GPU that the kernels run on, or this JAX cannot compile them.
    """
    target = pallas.find_target()
    if target.capability[0] not in TAKEN:
        have = ".".join(map(str, target.capability))
        raise Unsupported(f"takes compute capability 9.x and 10.x, the GPU has {have}")
    modules()
    return target


def scan(operands, *, softplus, reverse, interpret_params=None):
    """Launches the kernel once per block of 128 channels, direction and video.

    Args:
      operands: fused.Operands; channels a multiple of 128.
      softplus: whether the step size goes through softplus.
      reverse: one bool per direction.
      interpret_params: None to compile, else how to simulate.

    Returns:
      y like x, and the last state like start.
    """
    pl, plgpu, _ = modules()
    directions, videos, length, channels = operands.x.shape
    states = operands.decay.shape[1]
    unroll, tiles = UNROLL[states], -(-length // TILE)
    gated = operands.z is not None
    fetched = [operands.x, operands.delta, operands.B, operands.C] + [operands.z] * gated
    if length < TILE:  # a tile must lie within the array; what is added is never used
        widths = [(0, 0), (0, 0), (0, TILE - length), (0, 0)]
        fetched = [jnp.pad(value, widths) for value in fetched]

    def kernel(*refs):
        sources, refs = refs[: len(fetched)], refs[len(fetched) :]
        decay_ref, D_ref, bias_ref, start_ref, y_ref, last_ref, *buffers, arrived = refs
        x_tiles, delta_tiles, B_tiles, C_tiles, *z_tiles = buffers
        direction, video = lax.axis_index("direction"), lax.axis_index("video")
        block = pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)
        decay = [decay_ref[direction, n, block] for n in range(states)]
        skip, bias = D_ref[direction, block], bias_ref[direction, block]
        backwards = reverse[0]
        if len(set(reverse)) > 1:
            backwards = direction == reverse.index(True)

        def position(token):
            """Where in the arrays the token with this number in the order of the walk stands."""
            return jnp.where(backwards, length - 1 - token, token)

        def first_row(tile):
            # The last tile is moved back into the array, over tokens that the one before has had.
            first = jnp.where(backwards, length - (tile + 1) * TILE, tile * TILE)
            return jnp.clip(first, 0, max(length - TILE, 0))

        def fetch(tile):
            slot, tokens = lax.rem(tile, SLOTS), (video, pl.ds(first_row(tile), TILE))
            parts = [(direction, *tokens, block)] * 2  # x, delta
            parts += [(direction, *tokens)] * 2  # B, C
            parts += [(0, *tokens, block)] * gated  # z, one for both directions
            for source, part, buffer in zip(sources, parts, buffers, strict=True):
                plgpu.copy_gmem_to_smem(source.at[part], buffer.at[slot], arrived.at[slot])

        def advance(token, tile, state):
            slot, at = lax.rem(tile, SLOTS), position(token)
            row = at - first_row(tile)
            x = x_tiles[slot, row].astype(jnp.float32)
            dt = delta_tiles[slot, row].astype(jnp.float32) + bias
            if softplus:
                dt, _ = pallas_math.softplus(dt, MATH)
            inflow, y, updated = dt * x, skip * x, []
            for n in range(states):
                h = jnp.exp2(decay[n] * dt) * state[n] + B_tiles[slot, row, n] * inflow
                y = y + h * C_tiles[slot, row, n]
                updated.append(h)
            if gated:
                z = z_tiles[0][slot, row].astype(jnp.float32)
                y = y * (z * pallas_math.sigmoid(z, MATH))
            y_ref[direction, video, at, block] = y.astype(y_ref.dtype)
            return tuple(updated)

        def walk(tile, state):
            @pl.when(tile + 1 < tiles)
            def _():
                # Every thread has read the slot that is filled now.
                plgpu.commit_smem()
                fetch(tile + 1)

            plgpu.barrier_wait(arrived.at[lax.rem(tile, SLOTS)])
            first = tile * TILE
            count = jnp.minimum(TILE, length - first)
            turns = count // unroll

            def turn(i, state):
                for token in range(unroll):
                    state = advance(first + i * unroll + token, tile, state)
                return state

            state = lax.fori_loop(0, turns, turn, state)
            if length % unroll == 0:
                return state
            return lax.fori_loop(
                first + turns * unroll, first + count, lambda t, s: advance(t, tile, s), state
            )

        fetch(0)
        state = tuple(start_ref[direction, video, n, block] for n in range(states))
        state = lax.fori_loop(0, tiles, walk, state)
        for n, h in enumerate(state):
            last_ref[direction, video, n, block] = h

    launch = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype),
            jax.ShapeDtypeStruct(operands.start.shape, jnp.float32),
        ),
        grid=(directions, channels // CHANNELS, videos),
        grid_names=("direction", "block", "video"),
        scratch_types=[
            *(
                plgpu.SMEM((SLOTS, TILE, min(value.shape[-1], CHANNELS)), value.dtype)
                for value in fetched
            ),
            plgpu.Barrier(num_arrivals=len(fetched), num_barriers=SLOTS),
        ],
        # The barriers that Pallas would add around every store guard memory that is both read and
        # written by threads; here no memory is. Before a copy into shared memory stands our own.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret_params,
        kernel_name="selective_scan",
    )
    return launch(*fetched, operands.decay, operands.D, operands.bias, operands.start)


def _forward(target, options, detect_races, operands, *, softplus, reverse, save):
    if save:
        kernels = pallas.make_kernels(target, options)
        return kernels.forward(operands, softplus=softplus, reverse=reverse, save=True)
    params = None
    if target.interpret:
        # A number of copies may be under way; from one thread they would count as ordered.
        params = modules()[2](detect_races=detect_races, num_tma_threads_per_device=5 * SLOTS)
    return *scan(operands, softplus=softplus, reverse=reverse, interpret_params=params), ()


@functools.cache  # a traced function is found again by its kernels
def make_kernels(target, options, detect_races=False) -> fused.Kernels:
    """Returns the kernels for a device; `detect_races` as for `interpret`."""
    return fused.Kernels(
        forward=functools.partial(_forward, target, options, detect_races),
        backward=pallas.make_kernels(target, options).backward,
        channels=CHANNELS,
    )


selective_scan, bidirectional_selective_scan = fused.backend(
    lambda: make_kernels(_find_target(), gpu.find_options(), _detect_races.get())
)
