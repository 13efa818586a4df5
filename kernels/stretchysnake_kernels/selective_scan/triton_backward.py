"""The backward Triton kernels: all gradients of the scan, and the shorter one that sums a chunk up.

The states are recomputed, twice. The forward pass kept one state per span in memory. A program
first walks a span forwards and keeps one state per turn, in a scratch array that stays in the
cache; then it walks the turns backwards, each once more forwards in registers, then backwards. With
g_t the gradient of the state h_t, per channel and state:
  g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1};   with r_t = exp(dt_t A) g_t h_{t-1},
  d_dt = sum_n r A + x sum_n g B;   d_x = dt sum_n g B + D dy;   d_A += dt r;
  d_B = sum_d g dt x;   d_C = sum_d h dy.
The last two are sums over the channels: every warp writes its own, and XLA adds them up.
"""

# ruff: noqa: RUF005 (Triton joins tuples and cannot unpack them)

from typing import NamedTuple

import triton
import triton.language as tl

from stretchysnake_kernels.selective_scan.triton_forward import recompute_turn
from stretchysnake_kernels.selective_scan.triton_math import (
    LN_2,
    add_rows,
    advance,
    deal_sums,
    join,
    load_four,
    load_state,
    load_token,
    load_weights,
    locate,
    opaque,
    sigmoid,
    start_sums,
    step_size,
    store_state,
    store_summary,
    zero_state,
)

# With more states the registers do not hold the decay as well: it is read again where it is used.
MOST_KEPT = tl.constexpr(16)


class Arrays(NamedTuple):
    """Pointers to the arguments of `selective_scan_gradient`."""

    x: object
    delta: object
    decay: object
    B: object
    C: object
    D: object
    z: object
    bias: object
    start: object
    saved: object
    d_y: object
    d_last: object
    ends: object
    steps: object
    d_x: object
    d_delta: object
    d_z: object
    d_A: object
    d_D: object
    d_bias: object
    d_start: object
    sums: object
    scratch: object


class Summary(NamedTuple):
    """Pointers to the arguments of `selective_scan_gradient_summary`."""

    delta: object
    decay: object
    C: object
    D: object
    z: object
    bias: object
    d_y: object
    ends: object
    steps: object


@triton.jit
def _turn(
    arrays,
    position,
    STEP: tl.constexpr,
    at,
    kept,
    carry,
    weights,
    COUNT: tl.constexpr,
    plan: tl.constexpr,
):
    """Walks COUNT tokens forwards, then backwards.

    Args:
      arrays: the Arrays.
      position: where the first token stands.
      STEP: from one token to the next, 1 or -1.
      at: the Place.
      kept: pointer to the state before the first token, in scratch.
      carry: the gradients of the state after the last token, and so far of A, D and the bias.
      weights: the Weights.
      COUNT: of the tokens.
      plan: the Plan.

    Returns:
      The carry with the gradient of the state before the first token.
    """
    d_state, d_A, d_D, d_bias = carry
    decay, skip, bias = weights.decay, weights.D, weights.bias
    exact: tl.constexpr = arrays.x.dtype.element_ty == tl.float32
    position = opaque(position)
    token = at.row * plan.length + position
    wide = token * plan.channels + at.channel
    x = arrays.x + wide
    delta = arrays.delta + wide
    d_y = arrays.d_y + wide
    d_x = arrays.d_x + wide
    d_delta = arrays.d_delta + wide
    d_z = arrays.d_z + wide
    z = arrays.z + (at.video * plan.length + position) * plan.channels + at.channel
    B = arrays.B + token * plan.states
    C = arrays.C + token * plan.states
    all_decay = arrays.decay + at.direction * plan.states * plan.channels + 4 * at.channel
    thread = tl.arange(0, plan.block)
    warp = (at.row * (plan.channels // plan.block) + at.block) * (plan.block // 32)
    sums = arrays.sums + (warp * plan.length + position) * 32 * plan.tiles
    sums += (thread // 32).to(at.row.dtype) * plan.length * 32 * plan.tiles + thread % 32
    zero = tl.zeros((plan.block,), tl.float32)
    # A single token needs no more of its states at once than four.
    states = ()
    if COUNT > 1:
        states = (load_state(kept, plan.block, plan),)
    tokens = ()
    for i in tl.static_range(COUNT):
        to = i * STEP * plan.channels
        x_i = tl.load(x + to).to(tl.float32)
        dt, slope = step_size(tl.load(delta + to), bias, plan)
        factors = ()
        if COUNT > 1:
            B_i = load_token(B + i * STEP * plan.states, plan)
            after, factors = advance(states[i], dt, x_i, decay, B_i)
            states = states + (after,)
        tokens = tokens + ((x_i, dt, slope, factors),)
    for i in tl.static_range(COUNT - 1, -1, -1):
        to = i * STEP * plan.channels
        x_i, dt, slope, factors = tokens[i]
        d_y_i = tl.load(d_y + to).to(tl.float32)
        if plan.gated:
            z_i = tl.load(z + to).to(tl.float32)
            gate = sigmoid(z_i)
            d_gate = d_y_i * gate
            d_y_i = d_gate * z_i
        inflow = dt * x_i
        y_i = skip * x_i
        along_A = zero
        along_B = zero
        d_state_i = ()
        d_A_i = ()
        for tile in tl.static_range(tl.constexpr(plan.tiles)):
            sums_B = start_sums(plan)
            sums_C = start_sums(plan)
            for first in tl.static_range(16 * tile, 16 * tile + plan.states // plan.tiles, 4):
                B_q = load_four(B + i * STEP * plan.states + first, IS_CONSTANT=False)
                C_q = load_four(C + i * STEP * plan.states + first, IS_CONSTANT=False)
                if i == 0:  # read again: until here other numbers needed its registers
                    before = load_four(kept + first * plan.block, IS_CONSTANT=False)
                else:
                    before = states[i][first : first + 4]
                if plan.states > MOST_KEPT:
                    decay_q = load_four(all_decay + first * plan.channels, IS_CONSTANT=False)
                else:
                    decay_q = decay[first : first + 4]
                if COUNT > 1:
                    after_q = states[i + 1][first : first + 4]
                    factors_q = factors[first : first + 4]
                else:
                    after_q, factors_q = advance(before, dt, x_i, decay_q, B_q)
                d_B = ()
                d_C = ()
                for m in tl.static_range(4):
                    arriving = C_q[m] * d_y_i + d_state[first + m]
                    leaving = arriving * factors_q[m]
                    d_rate = leaving * before[m]
                    y_i = after_q[m] * C_q[m] + y_i
                    along_B = arriving * B_q[m] + along_B
                    along_A = d_rate * decay_q[m] + along_A
                    d_B = d_B + (arriving * inflow,)
                    d_C = d_C + (after_q[m] * d_y_i,)
                    d_state_i = d_state_i + (leaving,)
                    d_A_i = d_A_i + (d_rate * dt + d_A[first + m],)
                sums_B = add_rows(sums_B, d_B, first % 16 // 4, exact, plan)
                sums_C = add_rows(sums_C, d_C, first % 16 // 4, exact, plan)
            dealt = deal_sums(sums_B, sums_C, plan)
            tl.store(sums + (i * STEP * plan.tiles + tile) * 32, dealt)
        d_state = d_state_i
        d_A = d_A_i
        d_v = (along_B * x_i + along_A * LN_2) * slope
        if plan.gated:
            d_z_i = d_gate * y_i * (z_i * (1 - gate) + 1)
            tl.store(d_z + to, d_z_i.to(d_z.dtype.element_ty))
        tl.store(d_x + to, (along_B * dt + skip * d_y_i).to(d_x.dtype.element_ty))
        tl.store(d_delta + to, d_v.to(d_delta.dtype.element_ty))
        d_D = d_y_i * x_i + d_D
        d_bias = d_bias + d_v
    return d_state, d_A, d_D, d_bias


@triton.jit
def _walk(arrays, plan: tl.constexpr, REVERSE: tl.constexpr):
    """Does what `selective_scan_gradient` says, for a direction known when compiling."""
    step: tl.constexpr = -1 if REVERSE else 1
    origin: tl.constexpr = plan.length - 1 if REVERSE else 0
    size: tl.constexpr = plan.states * plan.channels  # of a state of all channels
    at = locate(plan)
    weights = load_weights(arrays, at, plan)
    video = at.row * size + 4 * at.channel
    zero = tl.zeros((plan.block,), tl.float32)
    d_state = load_state(arrays.d_last + video, plan.channels, plan)
    if plan.chunks > 1:
        later = plan.chunks - 1 - at.of_video
        d_state = join(arrays, at, plan.chunks - 1, later, -1, d_state, weights.decay, plan)
    carry = (d_state, zero_state(plan), zero, zero)

    turns: tl.constexpr = plan.length // plan.unroll
    span_turns: tl.constexpr = plan.span // plan.unroll
    spans: tl.constexpr = plan.chunk // plan.span
    first = at.of_video * spans
    last = tl.minimum(first + spans, plan.spans) - 1
    saved = arrays.saved + at.row * (plan.spans - 1) * size + 4 * at.channel
    program = at.chunk * (plan.channels // plan.block) + at.block
    slot: tl.constexpr = plan.states * plan.block
    scratch = arrays.scratch + program * plan.slots * slot + 4 * tl.arange(0, plan.block)
    for span in range(last, first - 1, -1):
        source = arrays.start + video
        if span > 0:
            source = saved + (span - 1).to(at.row.dtype) * size
        state = load_state(source, plan.channels, plan)
        count = tl.minimum(span_turns, turns - span * span_turns)
        odd = tl.where(span == plan.spans - 1, plan.length % plan.unroll, 0)  # turns of one token
        for turn in range(count):
            store_state(scratch + turn * slot, plan.block, state, plan)
            position = origin + (span * plan.span + turn * plan.unroll) * step
            current = weights
            if plan.states > MOST_KEPT:
                current = load_weights(arrays, at, plan)
            state, _ = recompute_turn(arrays, position, step, at, state, current, plan.unroll, plan)
        for turn in range(odd):
            store_state(scratch + (count + turn) * slot, plan.block, state, plan)
            position = origin + (turns * plan.unroll + turn) * step
            current = weights
            if plan.states > MOST_KEPT:
                current = load_weights(arrays, at, plan)
            state, _ = recompute_turn(arrays, position, step, at, state, current, 1, plan)
        for turn in range(odd - 1, -1, -1):
            kept = scratch + (count + turn) * slot
            position = origin + (turns * plan.unroll + turn) * step
            carry = _turn(arrays, position, step, at, kept, carry, weights, 1, plan)
        for turn in range(count - 1, -1, -1):
            kept = scratch + turn * slot
            position = origin + (span * plan.span + turn * plan.unroll) * step
            carry = _turn(arrays, position, step, at, kept, carry, weights, plan.unroll, plan)
    at = locate(plan)  # again, so that no registers hold these addresses until here
    video = at.row * size + 4 * at.channel
    chunk = at.chunk * size + 4 * at.channel
    if at.of_video == 0:
        store_state(arrays.d_start + video, plan.channels, carry[0], plan)
    store_state(arrays.d_A + chunk, plan.channels, carry[1], plan)
    tl.store(arrays.d_D + at.chunk * plan.channels + at.channel, carry[2])
    tl.store(arrays.d_bias + at.chunk * plan.channels + at.channel, carry[3])


@triton.jit
def selective_scan_gradient(
    x,
    delta,
    decay,
    B,
    C,
    D,
    z,
    bias,
    start,
    saved,
    d_y,
    d_last,
    ends,
    steps,
    d_x,
    d_delta,
    d_z,
    d_A,
    d_D,
    d_bias,
    d_start,
    sums,
    scratch,
    plan: tl.constexpr,
):
    """Computes all gradients.

    Args:
      x, delta, decay, B, C, D, z, bias, start, saved: as for `selective_scan`.
      d_y, d_last: gradients of y and of the last state.
      ends, steps: what `selective_scan_gradient_summary` wrote; not read for a single chunk.
      d_x, d_delta, d_z: like x; d_z per direction, not written unless plan.gated.
      d_A: (directions, batch, chunks, ...), states.
      d_D, d_bias: (directions, batch, chunks, channels) float32.
      d_start: like start.
      sums: (directions, batch, channels / 32, length, tiles, 2, 4, 4) float32: of every token, the
        sums over a warp's channels that make the gradients of B and C; at [tile, B or C, m, q] that
        of state 16 tile + 4 q + m.
      scratch: (programs, plan.slots, states / 4, plan.block, 4) float32.
      plan: the Plan; may differ from that of the forward pass in all but the span.
    """
    arrays = Arrays(
        x, delta, decay, B, C, D, z, bias, start, saved, d_y, d_last, ends, steps,
        d_x, d_delta, d_z, d_A, d_D, d_bias, d_start, sums, scratch,
    )  # fmt: skip
    # As in selective_scan.
    if plan.reverse[0] == plan.reverse[-1] or tl.program_id(1) == 0:
        _walk(arrays, plan, plan.reverse[0])
    else:
        _walk(arrays, plan, plan.reverse[-1])


@triton.jit
def _summary_turn(
    arrays,
    position,
    STEP: tl.constexpr,
    at,
    carry,
    weights,
    COUNT: tl.constexpr,
    plan: tl.constexpr,
):
    """Walks COUNT tokens backwards as `_turn` does; the carry is the gradient and the steps."""
    d_state, steps = carry
    token = at.row * plan.length + position
    delta = arrays.delta + token * plan.channels + at.channel
    d_y = arrays.d_y + token * plan.channels + at.channel
    z = arrays.z + (at.video * plan.length + position) * plan.channels + at.channel
    C = arrays.C + token * plan.states
    for i in tl.static_range(COUNT - 1, -1, -1):
        wide = i * STEP * plan.channels
        dt, _ = step_size(tl.load(delta + wide), weights.bias, plan)
        d_y_i = tl.load(d_y + wide).to(tl.float32)
        if plan.gated:
            z_i = tl.load(z + wide).to(tl.float32)
            d_y_i *= z_i * sigmoid(z_i)
        C_i = load_token(C + i * STEP * plan.states, plan)
        before = ()
        for n in tl.static_range(len(C_i)):
            arriving = C_i[n] * d_y_i + d_state[n]
            before = before + (arriving * tl.exp2(weights.decay[n] * dt),)
        d_state = before
        steps += dt
    return d_state, steps


@triton.jit
def _summarise(arrays, plan: tl.constexpr, REVERSE: tl.constexpr):
    """Does what `selective_scan_gradient_summary` says, for a direction known when compiling."""
    step: tl.constexpr = -1 if REVERSE else 1
    origin: tl.constexpr = plan.length - 1 if REVERSE else 0
    at = locate(plan, FIRST_CHUNK=1)
    weights = load_weights(arrays, at, plan)
    carry = (zero_state(plan), tl.zeros((plan.block,), tl.float32))
    turns: tl.constexpr = plan.length // plan.unroll
    chunk_turns: tl.constexpr = plan.chunk // plan.unroll
    rest = origin + turns * plan.unroll * step
    odd = tl.where(at.of_video == plan.chunks - 1, plan.length % plan.unroll, 0)
    for turn in range(odd - 1, -1, -1):
        carry = _summary_turn(arrays, rest + turn * step, step, at, carry, weights, 1, plan)
    first = at.of_video * chunk_turns
    for turn in range(tl.minimum(first + chunk_turns, turns) - 1, first - 1, -1):
        position = origin + turn * plan.unroll * step
        carry = _summary_turn(arrays, position, step, at, carry, weights, plan.unroll, plan)
    store_summary(arrays, at, carry[0], carry[1], plan)


@triton.jit
def selective_scan_gradient_summary(
    delta, decay, C, D, z, bias, d_y, ends, steps, plan: tl.constexpr
):
    """Walks every chunk but the first one backwards, from a zero gradient of its last state.

    Args:
      delta, decay, C, D, z, bias, d_y: as for `selective_scan_gradient`.
      ends: (directions, batch, chunks, ...), the gradients of the states before the chunks.
      steps: (directions, batch, chunks, channels) float32, the sums of their step sizes.
      plan: the Plan.
    """
    arrays = Summary(delta, decay, C, D, z, bias, d_y, ends, steps)
    # As in selective_scan.
    if plan.reverse[0] == plan.reverse[-1] or tl.program_id(1) == 0:
        _summarise(arrays, plan, plan.reverse[0])
    else:
        _summarise(arrays, plan, plan.reverse[-1])
