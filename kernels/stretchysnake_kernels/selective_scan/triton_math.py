"""What the Triton kernels are made of; imported only where Triton is installed.

A program walks one chunk of one video in one direction, for `plan.block` channels, one per thread.
A state is a tuple of rows (plan.block,), one row per state and each row one register, so that no
sum over the states crosses threads and nothing goes through shared memory. In memory a state is
(..., states / 4, channels, 4) float32: a thread moves four numbers as one 128-bit access. `plan` is
the triton.Plan, a constant to the compiler.
"""

# ruff: noqa: RUF005 (Triton joins tuples and cannot unpack them)

from typing import NamedTuple

import triton
import triton.language as tl

from stretchysnake_kernels.selective_scan.fused import LOG2_E

TO_BASE_2 = tl.constexpr(LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)


class Place(NamedTuple):
    """What the running program works on, as integers that can count an array's numbers.

    Attributes:
      direction: index.
      video: index.
      row: index of (direction, video).
      chunk: index of (direction, video, chunk).
      of_video: index of the chunk among those of its video; a constant if it is the only one.
      block: index of its channels.
      channel: (plan.block,), their indices.
    """

    direction: object
    video: object
    row: object
    chunk: object
    of_video: object
    block: object
    channel: object


class Weights(NamedTuple):
    """What the tokens share: the decay as a state, and D and the bias, (plan.block,) float32."""

    decay: object
    D: object
    bias: object


@triton.jit
def locate(plan: tl.constexpr, FIRST_CHUNK: tl.constexpr = 0):
    """Returns the Place of the running program; the grid begins with chunk FIRST_CHUNK."""
    blocks: tl.constexpr = plan.channels // plan.block
    program = opaque(tl.program_id(0))
    block = program % blocks
    video = program // blocks
    direction = tl.program_id(1)
    if plan.large:  # 32 bits save registers
        video = video.to(tl.int64)
        direction = direction.to(tl.int64)
    row = direction * (tl.num_programs(0) // blocks) + video
    if plan.chunks > 1:
        of_video = tl.program_id(2) + FIRST_CHUNK
    else:
        of_video = 0
    channel = block * plan.block + tl.arange(0, plan.block)
    return Place(direction, video, row, row * plan.chunks + of_video, of_video, block, channel)


@triton.jit
def opaque(index):
    """Returns an int32 of which the compiler knows nothing.

    What depends on it is then computed where it is needed. An address that is kept until then, or
    carried from turn to turn, takes two registers.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [index], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def reciprocal(v):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softplus(v):
    """Returns log(1 + e^v) and its derivative, to float32 rounding on both tails.

    With e = exp(-|v|) and s = e / (e + 2): log(1 + e) = 2 artanh(s) = s P(s^2). P by Remez exchange
    on [0, 1/9], largest relative error 4e-9. One reciprocal serves s and the derivative.
    """
    e = tl.exp2(tl.abs(v) * -TO_BASE_2)
    inverse = reciprocal((e + 1) * (e + 2))
    s = e * ((e + 1) * inverse)
    square = s * s
    series = square * 0.2817833525022 + 0.2796060267788
    series = series * square + 0.4002491028748
    series = series * square + 0.6666631468186289
    series = series * square + 2.0000000079210483
    one_side = (e + 2) * inverse
    return series * s + tl.maximum(v, 0.0), tl.where(v < 0, e * one_side, one_side)


@triton.jit
def sigmoid(v):
    return reciprocal(tl.exp2(v * -TO_BASE_2) + 1)


@triton.jit
def step_size(delta, bias, plan: tl.constexpr):
    """Returns dt of one token and its derivative by delta."""
    v = delta.to(tl.float32) + bias
    if plan.softplus:
        return softplus(v)
    else:
        return v, tl.full((plan.block,), 1.0, tl.float32)


@triton.jit
def load_four(pointer, IS_CONSTANT: tl.constexpr):
    """Reads four float32 numbers in one access, as four scalars or rows, like the pointer.

    Written out because Triton gives the numbers of one access to one tensor, which it cannot take
    apart again; and because its analysis of accesses takes time that grows with the square of their
    number. IS_CONSTANT lets the compiler move the read, and keep the numbers of an equal one.
    """
    return tl.inline_asm_elementwise(
        "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,l",
        [pointer.to(tl.int64)],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=IS_CONSTANT,
        pack=1,
    )


@triton.jit
def load_token(pointer, plan: tl.constexpr):
    """Reads B or C of one token, as scalars."""
    values = ()
    for n in tl.static_range(0, tl.constexpr(plan.states), 4):
        values = values + load_four(pointer + n, IS_CONSTANT=True)
    return values


@triton.jit
def zero_state(plan: tl.constexpr):
    state = ()
    for _ in tl.static_range(tl.constexpr(plan.states)):
        state = state + (tl.zeros((plan.block,), tl.float32),)
    return state


@triton.jit
def load_state(pointer, channels: tl.constexpr, plan: tl.constexpr):
    """Reads a state.

    Args:
      pointer: to the own channels in (states / 4, channels, 4) float32, a row.
      channels: their number in memory.
      plan: the Plan.
    """
    state = ()
    for n in tl.static_range(0, tl.constexpr(plan.states), 4):
        state = state + load_four(pointer + n * channels, IS_CONSTANT=False)
    return state


@triton.jit
def store_state(pointer, channels: tl.constexpr, state, plan: tl.constexpr):
    """Writes what `load_state` reads."""
    for n in tl.static_range(0, tl.constexpr(plan.states), 4):
        address = (pointer + n * channels).to(tl.int64)
        tl.inline_asm_elementwise(
            "st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;",  # there must be a result
            "=r,l,f,f,f,f",
            (address,) + state[n : n + 4],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_weights(arrays, at, plan: tl.constexpr):
    """Returns the Weights of the program at `at`, from arrays.decay, .D and .bias."""
    decay = arrays.decay + at.direction * plan.states * plan.channels + 4 * at.channel
    vector = at.direction * plan.channels + at.channel
    decay = load_state(decay, plan.channels, plan)
    return Weights(decay, tl.load(arrays.D + vector), tl.load(arrays.bias + vector))


@triton.jit
def advance(state, dt, x, decay, B):
    """Returns the state after one more token, and the factors that its past was multiplied by.

    Takes a whole state, or the same part of all arguments.
    """
    inflow = dt * x
    factors = ()
    after = ()
    for n in tl.static_range(len(state)):
        factors = factors + (tl.exp2(decay[n] * dt),)
        after = after + (factors[n] * state[n] + B[n] * inflow,)
    return after, factors


@triton.jit
def sum_states(left, right):
    """Returns the sum over the states of left right."""
    total = left[0] * right[0]
    for n in tl.static_range(1, len(left)):
        total = left[n] * right[n] + total
    return total


@triton.jit
def store_summary(arrays, at, state, steps, plan: tl.constexpr):
    """Writes what a chunk did to a state of zeros, and the sum of its step sizes."""
    pointer = arrays.ends + at.chunk * plan.states * plan.channels + 4 * at.channel
    store_state(pointer, plan.channels, state, plan)
    tl.store(arrays.steps + at.chunk * plan.channels + at.channel, steps)


@triton.jit
def join(arrays, at, first, count, STEP: tl.constexpr, state, decay, plan: tl.constexpr):
    """Carries a state over `count` chunks, from chunk `first` on, by their summaries."""
    for i in range(count):
        chunk = at.chunk - at.of_video + first + i * STEP
        pointer = arrays.ends + chunk * plan.states * plan.channels + 4 * at.channel
        ends = load_state(pointer, plan.channels, plan)
        dt = tl.load(arrays.steps + chunk * plan.channels + at.channel)
        after = ()
        for n in tl.static_range(len(state)):
            after = after + (tl.exp2(decay[n] * dt) * state[n] + ends[n],)
        state = after
    return state


@triton.jit
def start_sums(plan: tl.constexpr):
    """Returns what `add_rows` adds to: the sums over the channels of up to 16 rows."""
    if plan.tensor_cores:
        zero = tl.zeros((plan.block,), tl.float32)
        return (zero, zero, zero, zero)
    else:
        return ()


@triton.jit
def add_rows(sums, rows, q: tl.constexpr, EXACT: tl.constexpr, plan: tl.constexpr):
    """Takes four more rows into `sums`, as its rows 4 q to 4 q + 3.

    The tensor cores add them up over every four lanes without moving anything. In mma.m16n8k8 lane
    4 g + t holds, of the left factor, rows g and g + 8 at depths t and t + 4; a right factor of
    ones in column 2 q at depths 0-3 and in column 2 q + 1 at depths 4-7 sums each of our rows over
    t. After q = 0..3 the accumulator is full: register m of lane (g, t) is the sum of row m of call
    q = t.

    The units take 11 bits of a number. EXACT gives them the next 11 bits as well. GPUs without them
    leave all the adding to `deal_sums`.
    """
    if plan.tensor_cores:
        group = tl.arange(0, plan.block) % 32 // 4
        left = tl.where(group == 2 * q, 1.0, 0.0).to(tl.int32, bitcast=True)
        right = tl.where(group == 2 * q + 1, 1.0, 0.0).to(tl.int32, bitcast=True)
        leading = ()
        rest = ()
        for m in tl.static_range(4):
            bits = rows[m].to(tl.int32, bitcast=True)
            if EXACT:
                bits = bits & -8192
                left_over = rows[m] - bits.to(tl.float32, bitcast=True)
                rest = rest + (left_over.to(tl.int32, bitcast=True),)
            leading = leading + (bits,)
        sums = _multiply_ones(sums, leading, left, right)
        if EXACT:
            sums = _multiply_ones(sums, rest, left, right)
        return sums
    else:
        return sums + rows


@triton.jit
def _multiply_ones(sums, values, left, right):
    """Adds mma.m16n8k8 of `values` and a factor of ones to `sums`: see add_rows."""
    # Registers 1 and 2 of the left factor are (row g + 8, depth t) and (row g, depth t + 4).
    factors = (values[0], values[2], values[1], values[3], left, right)
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        factors + sums,
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def deal_sums(first, second, plan: tl.constexpr):
    """Returns a row: lane 4 g + t of each warp gets row 4 t + g % 4 of `first`, or `second`, g > 3.

    Every exchange halves both the rows and the lanes left: 7 shuffles instead of 24.
    """
    if plan.tensor_cores:
        parts = first + second
    else:
        parts = _add_fours(first, plan) + _add_fours(second, plan)
    return _halve(_halve(_halve(parts, 16, plan), 8, plan), 4, plan)[0]


@triton.jit
def _add_fours(rows, plan: tl.constexpr):
    """Returns what the tensor cores would have made of the rows."""
    for _ in tl.static_range(16 - plan.states // plan.tiles):
        rows = rows + (tl.zeros((plan.block,), tl.float32),)
    return _halve(_halve(rows, 2, plan), 1, plan)


@triton.jit
def _halve(rows, mask: tl.constexpr, plan: tl.constexpr):
    """Adds rows up over pairs of lanes; lanes with the bit `mask` get the second half of them."""
    upper = (tl.arange(0, plan.block) & mask) != 0
    half: tl.constexpr = len(rows) // 2
    halves = ()
    for i in tl.static_range(half):
        low, high = rows[i], rows[i + half]
        sent = tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;",
            "=f,f,r",
            [tl.where(upper, low, high), mask],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        halves = halves + (tl.where(upper, high, low) + sent,)
    return halves
