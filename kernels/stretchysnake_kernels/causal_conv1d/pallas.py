"""The causal convolution for NVIDIA GPUs: XLA's forward pass, and its gradient as a Pallas kernel.

What decides is the memory traffic. XLA fuses the plain formulation into one kernel that reads x
once and writes y once, for both directions together too, which is the least; so the forward pass
stays that. Its gradient takes XLA a dozen kernels per direction with float32 arrays in between: at
(8, 1569, 1152) in bfloat16 about 40 bytes per number of x where 6 would do, and for both directions
76 where 8 would do. The kernel here reads x and the cotangents once and writes the gradient of x
once: with the sums of the chunks, and XLA reading those again, 6.4 and 8.8 bytes. Nothing is atomic
or passes between threads: the result is deterministic.

With e_t the gradient of the sum before the activation, and everything outside the length zero:
  d_x_s = sum_k weight[width - 1 - k] e_{s + k};   d_weight[width - 1 - k] = sum_t e_t x_{t - k}.
The other direction has the signs of k the other way round. At place s a program holds x_s to
x_{s + width - 1}: all that e_{s + width - 1} needs, and in the other direction all that e_s needs.
With its taps taken from the end, the other direction then differs by nothing but which cotangent is
read at a place.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels.causal_conv1d import xla
from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan import gpu
from stretchysnake_kernels.selective_scan.pallas_math import PORTABLE, PTX, Math, modules, sigmoid

OLDEST = (8, 0)  # compute capability; XLA compiles Triton for no older GPU
DTYPES = ("float32", "bfloat16", "float16")
WIDEST = 8  # taps; a thread keeps the taps, their sums and the places they see in registers
CHANNELS = 64  # of a program: one warp, two neighbouring channels per thread
UNROLL = 4  # places per turn of the loop, whose reads are all under way together
RESIDENT = 4  # warps per quarter of a multiprocessor that hide each other's waits
# Tokens of a chunk: each chunk writes sums of its own, and begins width - 1 tokens early.
FEWEST, MOST = 32, 256


class Plan(NamedTuple):
    """The static side of a launch.

    A program walks one chunk of one video, for 64 channels and every direction.

    Attributes:
      reverse: one bool per direction.
      videos: size of the batch.
      length: tokens of a video.
      channels: a multiple of 64.
      width: taps.
      silu: whether SiLU follows.
      chunk: tokens of a chunk; the last one may be shorter.
      math: how to compute.
      interpret: whether to run on the CPU, as plain JAX.
    """

    reverse: tuple[bool, ...]
    videos: int
    length: int
    channels: int
    width: int
    silu: bool
    chunk: int
    math: Math
    interpret: bool

    @property
    def chunks(self):
        return -(-self.length // self.chunk)


def causal_conv1d(x, weight, bias, *, activation, reverse):
    """Computes what `api.causal_conv1d` documents.

    Raises:
      Unsupported: a dtype, width or device that the kernel does not take.
    """
    bias = None if bias is None else bias[None]
    return _check_and_run(x, weight[None], bias, activation, (reverse,))[0]


def bidirectional_causal_conv1d(x, weight, bias, *, activation):
    """Computes what `api.bidirectional_causal_conv1d` documents, its gradient in one launch.

    Raises:
      Unsupported: a dtype, width or device that the kernel does not take.
    """
    return _check_and_run(x, weight, bias, activation, (False, True))


def _check_and_run(x, weight, bias, activation, reverse):
    if x.dtype.name not in DTYPES:
        raise Unsupported(f"takes {' or '.join(DTYPES)}, x is {x.dtype.name}")
    if weight.shape[1] > WIDEST:
        raise Unsupported(f"takes up to {WIDEST} taps, got {weight.shape[1]}")
    target = gpu.find_target(OLDEST)
    modules()
    if bias is None:  # then nobody asks for its gradient, which costs an addition per token
        bias = jnp.zeros_like(weight[:, 0])
    return _convolve(x, weight, bias, activation, reverse, target, gpu.find_options().chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _convolve(x, weight, bias, activation, reverse, target, chunks):
    return jnp.stack(
        [
            xla.causal_conv1d(x, weight[i], bias[i], activation=activation, reverse=backwards)
            for i, backwards in enumerate(reverse)
        ]
    )


def _forward(x, weight, bias, *static):
    return _convolve(x, weight, bias, *static), (x, weight, bias)


def _backward(activation, reverse, target, chunks, saved, d_y):
    x, weight, bias = saved
    videos, length, channels = x.shape
    padding = -channels % CHANNELS

    def pad(value):
        widths = [(0, 0)] * (value.ndim - 1) + [(0, padding)]
        return jnp.pad(value, widths) if padding else value

    if chunks is None:
        warps = videos * (channels + padding) // CHANNELS
        chunk = choose_chunk(warps, length, target.multiprocessors)
    else:
        chunk = -(-length // chunks)
    plan = Plan(
        reverse=reverse,
        videos=videos,
        length=length,
        channels=channels + padding,
        width=weight.shape[1],
        silu=activation == "silu",
        chunk=-(-chunk // UNROLL) * UNROLL,
        math=PORTABLE if target.interpret else PTX,
        interpret=target.interpret,
    )
    weight32, bias32 = weight.astype(jnp.float32), bias.astype(jnp.float32)
    d_x, d_weight, d_bias = _launch(pad(x), pad(d_y), pad(weight32), pad(bias32), plan)
    d_weight, d_bias = (jnp.sum(sums, axis=(0, 1)) for sums in (d_weight, d_bias))
    return (
        d_x[..., :channels],
        d_weight[..., :channels].astype(weight.dtype),
        d_bias[..., :channels].astype(bias.dtype),
    )


_convolve.defvjp(_forward, _backward)


def choose_chunk(warps, length, multiprocessors):
    """Returns of how many tokens to make a chunk so that the GPU is busy.

    Args:
      warps: that run side by side with a single chunk.
      length: tokens of the sequence.
      multiprocessors: of the GPU; each runs four warps at once.
    """
    wanted = -(-RESIDENT * 4 * multiprocessors // warps)
    return min(max(-(-length // wanted), FEWEST), MOST)


def _launch(x, d_y, weight, bias, plan):
    """Walks every chunk.

    Args:
      x: (batch, length, channels).
      d_y: (directions, batch, length, channels), x's dtype.
      weight: (directions, width, channels) float32.
      bias: (directions, channels) float32.
      plan: the Plan.

    Returns:
      The gradient of x, and of weight and bias what each chunk adds to it, (batch, chunks, ...)
      float32.
    """
    pallas, triton = modules()
    directions, width, _ = weight.shape
    manual = jax.typeof(x).mat  # which mesh axes it varies over, inside of shard_map

    def spec(shape, index):  # of a program that is one of (blocks of channels, videos, chunks)
        return pallas.BlockSpec((*shape, CHANNELS), index)

    def shape(sizes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, manual_axis_type=manual)

    tokens = spec((None, plan.length), lambda block, video, chunk: (video, 0, block))
    cotangent = spec(
        (directions, None, plan.length), lambda block, video, chunk: (0, video, 0, block)
    )
    summed = (plan.videos, plan.chunks)
    return pallas.pallas_call(
        functools.partial(_walk, plan),
        grid=(plan.channels // CHANNELS, *summed),
        in_specs=[
            tokens,
            cotangent,
            spec((directions, width), lambda block, video, chunk: (0, 0, block)),
            spec((directions,), lambda block, video, chunk: (0, block)),
        ],
        out_specs=[
            tokens,
            spec(
                (None, None, directions, width),
                lambda block, video, chunk: (video, chunk, 0, 0, block),
            ),
            spec((None, None, directions), lambda block, video, chunk: (video, chunk, 0, block)),
        ],
        out_shape=[
            shape(x.shape, x.dtype),
            shape((*summed, *weight.shape), jnp.float32),
            shape((*summed, *bias.shape), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=plan.interpret,
        name="causal_conv1d_gradient",
    )(x, d_y, weight, bias)


def _walk(plan, x_ref, d_y_ref, weight_ref, bias_ref, d_x_ref, d_weight_ref, d_bias_ref):
    """The kernel: walks the places of one chunk.

    What it carries from place to place, all vectors (CHANNELS,) float32: the last width - 1 numbers
    of x; per direction the last width - 1 numbers of e; per direction the sums of the gradients of
    the taps and, last, the bias.
    """
    pallas, _ = modules()
    fma, past, length = plan.math.fma, plan.width - 1, plan.length
    directions = range(len(plan.reverse))
    # In the order of the places that they see.
    orders = [range(plan.width)[:: -1 if backwards else 1] for backwards in plan.reverse]
    taps = [[weight_ref[i, j] for j in order] for i, order in enumerate(orders)]
    bias = [bias_ref[i] for i in directions]
    chunk = pallas.program_id(2)
    first = chunk * plan.chunk
    end = jnp.minimum(first + plan.chunk, length)

    def read(s, row):
        """Reads the token that comes into view at place s, and each direction's cotangent."""
        ahead = [0 if backwards else past for backwards in plan.reverse]
        d_y = [row(d_y_ref, i, s + ahead[i]) for i in directions]
        return row(x_ref, s + past), d_y

    def inside(ref, *index):
        return ref[(*index, slice(None))].astype(jnp.float32)

    def anywhere(ref, *index):
        *leading, t = index
        row = inside(ref, *leading, jnp.clip(t, 0, length - 1))
        return jnp.where((t >= 0) & (t < length), row, 0.0)

    def step(carry, x, d_y):
        seen, errors, sums = carry
        seen = [*seen, x]
        errors = [[*errors[i], _error(seen, taps[i], bias[i], d_y[i], plan)] for i in directions]
        d_x = None
        for i in directions:
            for tap, error in zip(reversed(taps[i]), errors[i], strict=True):
                d_x = tap * error if d_x is None else fma(tap, error, d_x)
        totals = []
        for (*of_taps, of_bias), (*_, error) in zip(sums, errors, strict=True):
            of_taps = [fma(error, v, total) for v, total in zip(seen, of_taps, strict=True)]
            totals.append([*of_taps, of_bias + error])
        return (seen[1:], [own[1:] for own in errors], totals), d_x

    def turn(k, carry):
        start = first + k * UNROLL
        # Read before anything is written: the assembler cannot know that these never overlap.
        rows = [read(start + i, inside) for i in range(UNROLL)]
        for i, (x, d_y) in enumerate(rows):
            carry, d_x = step(carry, x, d_y)
            d_x_ref[start + i, :] = d_x.astype(d_x_ref.dtype)
        return carry

    def one(s, carry):
        carry, d_x = step(carry, *read(s, anywhere))
        d_x_ref[s, :] = d_x.astype(d_x_ref.dtype)
        return carry

    zero = jnp.zeros((CHANNELS,), jnp.float32)
    carry = (
        [anywhere(x_ref, first - past + i) for i in range(past)],
        [[zero] * past for _ in directions],
        [[zero] * (plan.width + 1) for _ in directions],
    )
    for i in range(past):
        carry, _ = step(carry, *read(first - past + i, anywhere))
    # What came into view so far is in the sums of the chunk before, where there is one.
    seen, errors, sums = carry
    sums = jax.tree.map(lambda total: jnp.where(chunk == 0, total, 0.0), sums)
    turns = jnp.maximum(jnp.minimum(end, length - past) - first, 0) // UNROLL
    carry = lax.fori_loop(0, turns, turn, (seen, errors, sums))
    _, _, sums = lax.fori_loop(first + turns * UNROLL, end, one, carry)
    for i, (*of_taps, of_bias) in enumerate(sums):
        for j, total in zip(orders[i], of_taps, strict=True):
            d_weight_ref[i, j] = total
        d_bias_ref[i] = of_bias


def _error(seen, taps, bias, d_y, plan):
    """Returns the gradient of the sum before the activation, from that of y."""
    if not plan.silu:
        return d_y
    fma, before = plan.math.fma, bias
    for tap, value in zip(taps, seen, strict=True):
        before = fma(tap, value, before)
    gate = sigmoid(before, plan.math)
    gated = d_y * gate
    # The derivative is gate (1 + before (1 - gate)).
    return fma(gated, fma(-before, gate, before), gated)
