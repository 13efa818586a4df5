"""The forward Triton kernels: the whole scan, and the shorter one that sums a chunk up.

A long sequence in a small batch leaves most of a GPU idle. Then it is cut into chunks that run side
by side: `selective_scan_summary` walks every chunk from a zero state, and in `selective_scan` a
chunk first joins the summaries of those before it.

Tokens are counted in the order of the walk. `plan.unroll` of them are one turn of a loop, and what
is left over are turns of one token, so that no length needs masks or padding.
"""

# ruff: noqa: RUF005 (Triton joins tuples and cannot unpack them)

from typing import NamedTuple

import triton
import triton.language as tl

from stretchysnake_kernels.selective_scan.triton_math import (
    advance,
    join,
    load_state,
    load_token,
    load_weights,
    locate,
    opaque,
    sigmoid,
    step_size,
    store_state,
    store_summary,
    sum_states,
    zero_state,
)


class Arrays(NamedTuple):
    """Pointers to the arguments of `selective_scan`."""

    x: object
    delta: object
    decay: object
    B: object
    C: object
    D: object
    z: object
    bias: object
    start: object
    ends: object
    steps: object
    y: object
    last: object
    saved: object


class Summary(NamedTuple):
    """Pointers to the arguments of `selective_scan_summary`."""

    x: object
    delta: object
    decay: object
    B: object
    D: object
    bias: object
    ends: object
    steps: object


@triton.jit
def recompute_turn(
    arrays,
    position,
    STEP: tl.constexpr,
    at,
    state,
    weights,
    COUNT: tl.constexpr,
    plan: tl.constexpr,
):
    """Walks COUNT tokens.

    Args:
      arrays: with x, delta and B.
      position: where the first token stands.
      STEP: from one token to the next, 1 or -1.
      at: the Place.
      state: before the first token.
      weights: the Weights.
      COUNT: of the tokens.
      plan: the Plan.

    Returns:
      The state after the last token, and the sum of the step sizes.
    """
    position = opaque(position)
    token = at.row * plan.length + position
    x = arrays.x + token * plan.channels + at.channel
    delta = arrays.delta + token * plan.channels + at.channel
    B = arrays.B + token * plan.states
    steps = tl.zeros((plan.block,), tl.float32)
    for i in tl.static_range(COUNT):
        wide = i * STEP * plan.channels
        dt, _ = step_size(tl.load(delta + wide), weights.bias, plan)
        B_i = load_token(B + i * STEP * plan.states, plan)
        x_i = tl.load(x + wide).to(tl.float32)
        state, _ = advance(state, dt, x_i, weights.decay, B_i)
        steps += dt
    return state, steps


@triton.jit
def _turn(
    arrays,
    position,
    STEP: tl.constexpr,
    at,
    state,
    weights,
    COUNT: tl.constexpr,
    plan: tl.constexpr,
):
    """Walks COUNT tokens as `recompute_turn` does, and writes their y; returns the state."""
    token = at.row * plan.length + position
    x = arrays.x + token * plan.channels + at.channel
    delta = arrays.delta + token * plan.channels + at.channel
    y = arrays.y + token * plan.channels + at.channel
    z = arrays.z + (at.video * plan.length + position) * plan.channels + at.channel
    B = arrays.B + token * plan.states
    C = arrays.C + token * plan.states
    tokens = ()
    for i in tl.static_range(COUNT):  # all reads before the first write, so that they overlap
        wide = i * STEP * plan.channels
        token_i = (tl.load(x + wide), tl.load(delta + wide))
        if plan.gated:
            token_i = token_i + (tl.load(z + wide),)
        tokens = tokens + (token_i,)
    for i in tl.static_range(COUNT):
        narrow = i * STEP * plan.states
        x_i = tokens[i][0].to(tl.float32)
        dt, _ = step_size(tokens[i][1], weights.bias, plan)
        state, _ = advance(state, dt, x_i, weights.decay, load_token(B + narrow, plan))
        y_i = weights.D * x_i + sum_states(state, load_token(C + narrow, plan))
        if plan.gated:
            z_i = tokens[i][2].to(tl.float32)
            y_i *= z_i * sigmoid(z_i)
        tl.store(y + i * STEP * plan.channels, y_i.to(y.dtype.element_ty))
    return state


@triton.jit
def _scan(arrays, plan: tl.constexpr, REVERSE: tl.constexpr):
    """Does what `selective_scan` says, for a direction known when compiling."""
    step: tl.constexpr = -1 if REVERSE else 1
    first: tl.constexpr = plan.length - 1 if REVERSE else 0
    at = locate(plan)
    weights = load_weights(arrays, at, plan)
    video = at.row * plan.states * plan.channels + 4 * at.channel
    state = load_state(arrays.start + video, plan.channels, plan)
    if plan.chunks > 1:
        state = join(arrays, at, 0, at.of_video, 1, state, weights.decay, plan)

    # A lap is what is walked between two saved states.
    lap: tl.constexpr = plan.span if plan.save else plan.chunk
    laps: tl.constexpr = (plan.length + lap - 1) // lap
    turns: tl.constexpr = plan.length // plan.unroll
    lap_turns: tl.constexpr = lap // plan.unroll
    first_lap = at.of_video * (plan.chunk // lap)
    saved = arrays.saved + at.row * (laps - 1) * plan.states * plan.channels + 4 * at.channel
    for i in range(first_lap, tl.minimum(first_lap + plan.chunk // lap, laps)):
        if plan.save and i > 0:
            kept = saved + (i - 1).to(at.row.dtype) * plan.states * plan.channels
            store_state(kept, plan.channels, state, plan)
        for turn in range(tl.minimum(lap_turns, turns - i * lap_turns)):
            position = first + (i * lap + turn * plan.unroll) * step
            state = _turn(arrays, position, step, at, state, weights, plan.unroll, plan)
    if at.of_video == plan.chunks - 1:
        for turn in range(plan.length % plan.unroll):
            position = first + (turns * plan.unroll + turn) * step
            state = _turn(arrays, position, step, at, state, weights, 1, plan)
        store_state(arrays.last + video, plan.channels, state, plan)


@triton.jit
def selective_scan(
    x,
    delta,
    decay,
    B,
    C,
    D,
    z,
    bias,
    start,
    ends,
    steps,
    y,
    last,
    saved,
    plan: tl.constexpr,
):
    """Computes y and the last state, and with plan.save the states before each span but the first.

    Args:
      x, delta, decay, B, C, D, z, bias, start: as in fused.Operands, the states as in memory (see
        triton_math.py); z is not read unless plan.gated.
      ends, steps: what `selective_scan_summary` wrote; not read if there is a single chunk.
      y: like x.
      last: like start.
      saved: (directions, batch, spans - 1, ...), states; not written unless plan.save.
      plan: the Plan.
    """
    arrays = Arrays(x, delta, decay, B, C, D, z, bias, start, ends, steps, y, last, saved)
    # The walk is compiled for each direction: steps that are not constants take more registers.
    if plan.reverse[0] == plan.reverse[-1] or tl.program_id(1) == 0:
        _scan(arrays, plan, plan.reverse[0])
    else:
        _scan(arrays, plan, plan.reverse[-1])


@triton.jit
def _summarise(arrays, plan: tl.constexpr, REVERSE: tl.constexpr):
    """Does what `selective_scan_summary` says, for a direction known when compiling."""
    step: tl.constexpr = -1 if REVERSE else 1
    first: tl.constexpr = plan.length - 1 if REVERSE else 0
    at = locate(plan)
    weights = load_weights(arrays, at, plan)
    state = zero_state(plan)
    steps = tl.zeros((plan.block,), tl.float32)
    for turn in range(plan.chunk // plan.unroll):
        position = first + (at.of_video * plan.chunk + turn * plan.unroll) * step
        state, more = recompute_turn(arrays, position, step, at, state, weights, plan.unroll, plan)
        steps += more
    store_summary(arrays, at, state, steps, plan)


@triton.jit
def selective_scan_summary(x, delta, decay, B, D, bias, ends, steps, plan: tl.constexpr):
    """Walks every chunk but the last one from a zero state.

    Args:
      x, delta, decay, B, D, bias: as for `selective_scan`.
      ends: (directions, batch, chunks, ...), the states at the ends of the chunks.
      steps: (directions, batch, chunks, channels) float32, the sums of their step sizes.
      plan: the Plan.
    """
    arrays = Summary(x, delta, decay, B, D, bias, ends, steps)
    # As in selective_scan.
    if plan.reverse[0] == plan.reverse[-1] or tl.program_id(1) == 0:
        _summarise(arrays, plan, plan.reverse[0])
    else:
        _summarise(arrays, plan, plan.reverse[-1])
