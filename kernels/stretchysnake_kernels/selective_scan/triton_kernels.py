"""The selective scan as Triton kernels; imported only where Triton is installed.

A program is one warp and walks all tokens of one video in one direction, for 32 channels, one per
thread. A state is a tuple of rows (CHANNELS,), one row per state and each row one register, so that
no sum over the states crosses threads and nothing goes through shared memory. Kernels are called
by triton.py, which holds the shapes.

Tokens are counted in the order of the walk. `UNROLL` of them are one turn of a loop, and what is
left over are turns of one token, so that no length needs masks or padding.
"""

# ruff: noqa: RUF005 (Triton joins tuples and cannot unpack them)

import triton
import triton.language as tl

from stretchysnake_kernels.selective_scan.fused import LOG2_E

CHANNELS = tl.constexpr(32)  # of a program: one warp, one channel per thread
TO_BASE_2 = tl.constexpr(LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _reciprocal(v):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _softplus(v):
    """Returns log(1 + e^v) and its derivative, to float32 rounding on both tails.

    With e = exp(-|v|) and s = e / (e + 2): log(1 + e) = 2 artanh(s) = s P(s^2). P by Remez exchange
    on [0, 1/9], largest relative error 4e-9. One reciprocal serves s and the derivative.
    """
    e = tl.exp2(tl.abs(v) * -TO_BASE_2)
    inverse = _reciprocal((e + 1) * (e + 2))
    s = e * ((e + 1) * inverse)
    square = s * s
    series = square * 0.2817833525022 + 0.2796060267788
    series = series * square + 0.4002491028748
    series = series * square + 0.6666631468186289
    series = series * square + 2.0000000079210483
    one_side = (e + 2) * inverse
    return series * s + tl.maximum(v, 0.0), tl.where(v < 0, e * one_side, one_side)


@triton.jit
def _sigmoid(v):
    return _reciprocal(tl.exp2(v * -TO_BASE_2) + 1)


@triton.jit
def _step_size(delta, bias, SOFTPLUS: tl.constexpr):
    """Returns dt of one token and its derivative by delta."""
    v = delta.to(tl.float32) + bias
    if SOFTPLUS:
        return _softplus(v)
    else:
        return v, tl.full((CHANNELS,), 1.0, tl.float32)


@triton.jit
def _load_four(pointer, IS_CONSTANT: tl.constexpr):
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
def _load_token(pointer, STATES: tl.constexpr):
    """Reads B or C of one token, as scalars."""
    values = ()
    for n in tl.static_range(0, STATES, 4):
        values = values + _load_four(pointer + n, IS_CONSTANT=True)
    return values


@triton.jit
def _zero_state(STATES: tl.constexpr):
    state = ()
    for _ in tl.static_range(STATES):
        state = state + (tl.zeros((CHANNELS,), tl.float32),)
    return state


@triton.jit
def _load_state(pointer, channels: tl.constexpr, STATES: tl.constexpr):
    """Reads a state.

    Args:
      pointer: to the own channels in (STATES / 4, channels, 4) float32, a row.
      channels: their number in memory.
      STATES: a multiple of 4.
    """
    state = ()
    for n in tl.static_range(0, STATES, 4):
        state = state + _load_four(pointer + n * channels, IS_CONSTANT=False)
    return state


@triton.jit
def _store_state(pointer, channels: tl.constexpr, state, STATES: tl.constexpr):
    """Writes what `_load_state` reads."""
    for n in tl.static_range(0, STATES, 4):
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
def _advance(state, dt, x, decay, B, STATES: tl.constexpr):
    """Returns the state after one more token, and the factors that its past was multiplied by."""
    inflow = dt * x
    factors = ()
    after = ()
    for n in tl.static_range(STATES):
        factors = factors + (tl.exp2(decay[n] * dt),)
        after = after + (factors[n] * state[n] + B[n] * inflow,)
    return after, factors


@triton.jit
def _sum_states(left, right, STATES: tl.constexpr):
    """Returns the sum over the states of left right."""
    total = left[0] * right[0]
    for n in tl.static_range(1, STATES):
        total = left[n] * right[n] + total
    return total


@triton.jit
def _place(ALL_CHANNELS: tl.constexpr, LARGE: tl.constexpr):
    """Returns what the running program works on, as integers that can count an array's numbers.

    Args:
      ALL_CHANNELS: as for `forward`.
      LARGE: whether that takes 64 bits; 32 save registers.

    Returns:
      direction; video; block, the index of its channels; row, the index of (direction, video).
    """
    blocks: tl.constexpr = ALL_CHANNELS // CHANNELS
    block = tl.program_id(0) % blocks
    video = tl.program_id(0) // blocks
    direction = tl.program_id(1)
    if LARGE:
        video = video.to(tl.int64)
        direction = direction.to(tl.int64)
    row = direction * (tl.num_programs(0) // blocks) + video
    return direction, video, block, row


@triton.jit
def _load_weights(
    decay, D, bias, direction, channel, ALL_CHANNELS: tl.constexpr, STATES: tl.constexpr
):
    """Returns the decay as a state, and D and the bias."""
    decay += direction * STATES * ALL_CHANNELS + 4 * channel
    at = direction * ALL_CHANNELS + channel
    return _load_state(decay, ALL_CHANNELS, STATES), tl.load(D + at), tl.load(bias + at)


@triton.jit
def _forward_turn(
    inputs,
    y,
    token,
    gate_token,
    channel,
    step,
    state,
    weights,
    ALL_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    COUNT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Walks COUNT tokens.

    Args:
      inputs: x, delta, z, B and C.
      y: as for `forward`.
      token: index of the first token among those of all directions and videos.
      gate_token: its index among those of z.
      channel, step: of the program.
      state: before the first token.
      weights: what `_load_weights` returns.
      ALL_CHANNELS to GATED: as for `forward`; COUNT in the place of UNROLL.

    Returns:
      The state after the last token.
    """
    x, delta, z, B, C = inputs
    decay, skip, bias = weights
    x += token * ALL_CHANNELS + channel
    delta += token * ALL_CHANNELS + channel
    y += token * ALL_CHANNELS + channel
    z += gate_token * ALL_CHANNELS + channel
    B += token * STATES
    C += token * STATES
    tokens = ()
    for i in tl.static_range(COUNT):  # all reads before the first write, so that they overlap
        at = i * step * ALL_CHANNELS
        token_i = (tl.load(x + at), tl.load(delta + at))
        if GATED:
            token_i = token_i + (tl.load(z + at),)
        tokens = tokens + (token_i,)
    for i in tl.static_range(COUNT):
        x_i = tokens[i][0].to(tl.float32)
        dt, _ = _step_size(tokens[i][1], bias, SOFTPLUS)
        at = i * step * STATES
        state, _ = _advance(state, dt, x_i, decay, _load_token(B + at, STATES), STATES)
        y_i = skip * x_i + _sum_states(state, _load_token(C + at, STATES), STATES)
        if GATED:
            z_i = tokens[i][2].to(tl.float32)
            y_i *= z_i * _sigmoid(z_i)
        tl.store(y + i * step * ALL_CHANNELS, y_i.to(y.dtype.element_ty))
    return state


@triton.jit
def _walk_forward(
    arrays,
    LENGTH: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    SPAN: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    SAVE: tl.constexpr,
    LARGE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Does what `forward` says, for a direction known when compiling."""
    x, delta, decay, B, C, D, z, bias, start, y, last, saved = arrays
    step: tl.constexpr = -1 if REVERSE else 1
    first: tl.constexpr = LENGTH - 1 if REVERSE else 0
    direction, video, block, row = _place(ALL_CHANNELS, LARGE)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    inputs = (x, delta, z, B, C)
    weights = _load_weights(decay, D, bias, direction, channel, ALL_CHANNELS, STATES)
    of_video = row * STATES * ALL_CHANNELS + 4 * channel
    state = _load_state(start + of_video, ALL_CHANNELS, STATES)
    token = row * LENGTH + first
    gate_token = video * LENGTH + first

    turns: tl.constexpr = LENGTH // UNROLL
    spans: tl.constexpr = (LENGTH + SPAN - 1) // SPAN if SAVE else 1
    span_turns: tl.constexpr = SPAN // UNROLL if SAVE else turns
    saved += row * (spans - 1) * STATES * ALL_CHANNELS + 4 * channel
    for span in range(spans):
        if SAVE and span > 0:
            kept = saved + (span - 1).to(row.dtype) * STATES * ALL_CHANNELS
            _store_state(kept, ALL_CHANNELS, state, STATES)
        for _ in range(tl.minimum(span_turns, turns - span * span_turns)):
            state = _forward_turn(
                inputs, y, token, gate_token, channel, step, state, weights,
                ALL_CHANNELS, STATES, UNROLL, SOFTPLUS, GATED,
            )  # fmt: skip
            token += UNROLL * step
            gate_token += UNROLL * step
    for _ in range(LENGTH % UNROLL):
        state = _forward_turn(
            inputs, y, token, gate_token, channel, step, state, weights,
            ALL_CHANNELS, STATES, 1, SOFTPLUS, GATED,
        )  # fmt: skip
        token += step
        gate_token += step
    _store_state(last + of_video, ALL_CHANNELS, state, STATES)


@triton.jit
def forward(
    x,
    delta,
    decay,
    B,
    C,
    D,
    z,
    bias,
    start,
    y,
    last,
    saved,
    LENGTH: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    SPAN: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    SAVE: tl.constexpr,
    LARGE: tl.constexpr,
    FIRST_REVERSE: tl.constexpr,
    SECOND_REVERSE: tl.constexpr,
):
    """Computes y and the last state, and with SAVE the states before each span but the first.

    Args:
      x, delta, decay, B, C, D, z, bias, start: as in fused.Operands, but for the last two axes of
        decay and start, (STATES / 4, ALL_CHANNELS, 4); z is not read unless GATED.
      y: like x.
      last: like start.
      saved: (directions, batch, spans - 1, STATES / 4, ALL_CHANNELS, 4) float32; not written unless
        SAVE.
      LENGTH, ALL_CHANNELS, STATES: sizes; channels a multiple of 32, states of 4.
      SPAN: tokens between two saved states, a multiple of UNROLL.
      UNROLL: tokens of a turn.
      SOFTPLUS: whether the step size goes through softplus.
      GATED: whether there is a gate.
      SAVE: whether to keep states.
      LARGE: whether an array has 2^31 numbers or more.
      FIRST_REVERSE, SECOND_REVERSE: of each direction; the same twice for a single one.
    """
    arrays = (x, delta, decay, B, C, D, z, bias, start, y, last, saved)
    # The walk is compiled for each direction: steps that are not constants take more registers.
    if FIRST_REVERSE == SECOND_REVERSE or tl.program_id(1) == 0:
        _walk_forward(
            arrays, LENGTH, ALL_CHANNELS, STATES, SPAN, UNROLL, SOFTPLUS, GATED, SAVE,
            LARGE, FIRST_REVERSE,
        )  # fmt: skip
    else:
        _walk_forward(
            arrays, LENGTH, ALL_CHANNELS, STATES, SPAN, UNROLL, SOFTPLUS, GATED, SAVE,
            LARGE, SECOND_REVERSE,
        )  # fmt: skip


@triton.jit
def _multiply_ones(sums, values, left, right):
    """Adds mma.m16n8k8 of `values` and a factor of ones to `sums`: see _add_channels."""
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
def _exchange(low, high, upper, mask):
    """Adds two rows up over pairs of lanes; lanes where `upper` get the sums of `high`."""
    sent = tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;",
        "=f,f,r",
        [tl.where(upper, low, high), mask],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    return tl.where(upper, high, low) + sent


@triton.jit
def _add_channels(sums, rows, q: tl.constexpr, EXACT: tl.constexpr):
    """Adds four rows up over every four lanes, into the q-th place of `sums`.

    The tensor cores do it without moving anything. In mma.m16n8k8 lane 4 g + t holds, of the left
    factor, rows g and g + 8 at depths t and t + 4; a right factor of ones in column 2 q at depths
    0-3 and in column 2 q + 1 at depths 4-7 sums each of our rows over t. After q = 0..3 the
    accumulator is full: register m of lane (g, t) is the sum of row m of call q = t.

    The units take 11 bits of a number. EXACT gives them the next 11 bits as well.
    """
    group = tl.arange(0, CHANNELS) // 4
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


@triton.jit
def _deal(parts):
    """Adds eight rows up over the lanes that have t in common; lane (g, t) gets part g.

    Every exchange halves both the rows and the lanes left: 7 shuffles instead of 24.
    """
    lane = tl.arange(0, CHANNELS)
    halves = ()
    for i in tl.static_range(4):
        halves = halves + (_exchange(parts[i], parts[i + 4], (lane & 16) != 0, 16),)
    first = _exchange(halves[0], halves[2], (lane & 8) != 0, 8)
    second = _exchange(halves[1], halves[3], (lane & 8) != 0, 8)
    return _exchange(first, second, (lane & 4) != 0, 4)


@triton.jit
def _recompute_turn(
    inputs,
    token,
    channel,
    step,
    state,
    weights,
    ALL_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    COUNT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Does what `_forward_turn` does, without y."""
    x, delta, _, B, _ = inputs
    decay, _, bias = weights
    x += token * ALL_CHANNELS + channel
    delta += token * ALL_CHANNELS + channel
    B += token * STATES
    for i in tl.static_range(COUNT):
        at = i * step * ALL_CHANNELS
        dt, _ = _step_size(tl.load(delta + at), bias, SOFTPLUS)
        B_i = _load_token(B + i * step * STATES, STATES)
        state, _ = _advance(state, dt, tl.load(x + at).to(tl.float32), decay, B_i, STATES)
    return state


@triton.jit
def _backward_turn(
    inputs,
    outputs,
    token,
    gate_token,
    sums_token,
    channel,
    step,
    kept,
    carry,
    weights,
    ALL_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Walks COUNT tokens forwards, then backwards.

    Args:
      inputs: x, delta, z, B, C and d_y.
      outputs: d_x, d_delta, d_z and sums.
      token, gate_token, channel, step, weights: as for `_forward_turn`.
      sums_token: index of the first token among those of sums.
      kept: pointer to the state before the first token.
      carry: the gradients of the state after the last token, and so far of A, D and the bias.
      ALL_CHANNELS to GATED: as for `backward`; COUNT in the place of UNROLL.

    Returns:
      The carry with the gradient of the state before the first token.
    """
    x, delta, z, B, C, d_y = inputs
    d_x, d_delta, d_z, sums = outputs
    decay, skip, bias = weights
    d_state, d_A, d_D, d_bias = carry
    exact: tl.constexpr = x.dtype.element_ty == tl.float32
    wide = token * ALL_CHANNELS + channel
    x += wide
    delta += wide
    d_y += wide
    d_x += wide
    d_delta += wide
    d_z += wide
    z += gate_token * ALL_CHANNELS + channel
    B += token * STATES
    C += token * STATES
    sums += sums_token * 32 * TILES + tl.arange(0, CHANNELS)
    zero = tl.zeros((CHANNELS,), tl.float32)
    states = (_load_state(kept, CHANNELS, STATES),)
    tokens = ()
    for i in tl.static_range(COUNT):
        at = i * step * ALL_CHANNELS
        x_i = tl.load(x + at).to(tl.float32)
        dt, slope = _step_size(tl.load(delta + at), bias, SOFTPLUS)
        B_i = _load_token(B + i * step * STATES, STATES)
        after, factors = _advance(states[i], dt, x_i, decay, B_i, STATES)
        states = states + (after,)
        tokens = tokens + ((x_i, dt, slope, factors),)
    for i in tl.static_range(COUNT - 1, -1, -1):
        at = i * step * ALL_CHANNELS
        x_i, dt, slope, factors = tokens[i]
        d_y_i = tl.load(d_y + at).to(tl.float32)
        if GATED:
            z_i = tl.load(z + at).to(tl.float32)
            gate = _sigmoid(z_i)
            d_gate = d_y_i * gate
            d_y_i = d_gate * z_i
        inflow = dt * x_i
        y_i = skip * x_i
        along_A = zero
        along_B = zero
        d_state_i = ()
        d_A_i = ()
        for tile in tl.static_range(TILES):
            sums_B = (zero, zero, zero, zero)
            sums_C = (zero, zero, zero, zero)
            for first in tl.static_range(16 * tile, 16 * tile + STATES // TILES, 4):
                B_q = _load_four(B + i * step * STATES + first, IS_CONSTANT=False)
                C_q = _load_four(C + i * step * STATES + first, IS_CONSTANT=False)
                if i == 0:  # read again: until here other numbers needed its registers
                    before = _load_four(kept + first * CHANNELS, IS_CONSTANT=False)
                else:
                    before = states[i][first : first + 4]
                d_B = ()
                d_C = ()
                for m in tl.static_range(4):
                    after = states[i + 1][first + m]
                    arriving = C_q[m] * d_y_i + d_state[first + m]
                    leaving = arriving * factors[first + m]
                    d_rate = leaving * before[m]
                    y_i = after * C_q[m] + y_i
                    along_B = arriving * B_q[m] + along_B
                    along_A = d_rate * decay[first + m] + along_A
                    d_B = d_B + (arriving * inflow,)
                    d_C = d_C + (after * d_y_i,)
                    d_state_i = d_state_i + (leaving,)
                    d_A_i = d_A_i + (d_rate * dt + d_A[first + m],)
                sums_B = _add_channels(sums_B, d_B, first % 16 // 4, exact)
                sums_C = _add_channels(sums_C, d_C, first % 16 // 4, exact)
            tl.store(sums + (i * step * TILES + tile) * 32, _deal(sums_B + sums_C))
        d_state = d_state_i
        d_A = d_A_i
        d_v = (along_B * x_i + along_A * LN_2) * slope
        if GATED:
            d_z_i = d_gate * y_i * (z_i * (1 - gate) + 1)
            tl.store(d_z + at, d_z_i.to(d_z.dtype.element_ty))
        tl.store(d_x + at, (along_B * dt + skip * d_y_i).to(d_x.dtype.element_ty))
        tl.store(d_delta + at, d_v.to(d_delta.dtype.element_ty))
        d_D = d_y_i * x_i + d_D
        d_bias = d_bias + d_v
    return d_state, d_A, d_D, d_bias


@triton.jit
def _walk_backward(
    inputs,
    outputs,
    LENGTH: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    LARGE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Does what `backward` says, for a direction known when compiling."""
    x, delta, decay, B, C, D, z, bias, start, saved, d_y, d_last = inputs
    d_x, d_delta, d_z, d_A, d_D, d_bias, d_start, sums, scratch = outputs
    step: tl.constexpr = -1 if REVERSE else 1
    first: tl.constexpr = LENGTH - 1 if REVERSE else 0
    direction, video, block, row = _place(ALL_CHANNELS, LARGE)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    read = (x, delta, z, B, C, d_y)
    written = (d_x, d_delta, d_z, sums)
    weights = _load_weights(decay, D, bias, direction, channel, ALL_CHANNELS, STATES)
    of_video = row * STATES * ALL_CHANNELS + 4 * channel
    program = row * (ALL_CHANNELS // CHANNELS) + block
    scratch += program * SLOTS * STATES * CHANNELS + 4 * tl.arange(0, CHANNELS)
    zero = tl.zeros((CHANNELS,), tl.float32)
    d_state = _load_state(d_last + of_video, ALL_CHANNELS, STATES)
    carry = (d_state, _zero_state(STATES), zero, zero)

    spans: tl.constexpr = (LENGTH + SPAN - 1) // SPAN
    turns: tl.constexpr = LENGTH // UNROLL
    span_turns: tl.constexpr = SPAN // UNROLL
    saved += row * (spans - 1) * STATES * ALL_CHANNELS + 4 * channel
    for span in range(spans - 1, -1, -1):
        source = start + of_video
        if span > 0:
            source = saved + (span - 1).to(row.dtype) * STATES * ALL_CHANNELS
        state = _load_state(source, ALL_CHANNELS, STATES)
        count = tl.minimum(span_turns, turns - span * span_turns)
        odd = tl.where(span == spans - 1, LENGTH % UNROLL, 0)  # turns of one token, the last ones
        for turn in range(count):
            _store_state(scratch + turn * STATES * CHANNELS, CHANNELS, state, STATES)
            position = first + (span * SPAN + turn * UNROLL) * step
            state = _recompute_turn(
                read[:5], row * LENGTH + position, channel, step, state, weights,
                ALL_CHANNELS, STATES, UNROLL, SOFTPLUS,
            )  # fmt: skip
        for turn in range(odd):
            _store_state(scratch + (count + turn) * STATES * CHANNELS, CHANNELS, state, STATES)
            position = first + (turns * UNROLL + turn) * step
            state = _recompute_turn(
                read[:5], row * LENGTH + position, channel, step, state, weights,
                ALL_CHANNELS, STATES, 1, SOFTPLUS,
            )  # fmt: skip
        for turn in range(odd - 1, -1, -1):
            position = first + (turns * UNROLL + turn) * step
            carry = _backward_turn(
                read, written,
                row * LENGTH + position, video * LENGTH + position, program * LENGTH + position,
                channel, step, scratch + (count + turn) * STATES * CHANNELS, carry, weights,
                ALL_CHANNELS, STATES, TILES, 1, SOFTPLUS, GATED,
            )  # fmt: skip
        for turn in range(count - 1, -1, -1):
            position = first + (span * SPAN + turn * UNROLL) * step
            carry = _backward_turn(
                read, written,
                row * LENGTH + position, video * LENGTH + position, program * LENGTH + position,
                channel, step, scratch + turn * STATES * CHANNELS, carry, weights,
                ALL_CHANNELS, STATES, TILES, UNROLL, SOFTPLUS, GATED,
            )  # fmt: skip
    _store_state(d_start + of_video, ALL_CHANNELS, carry[0], STATES)
    _store_state(d_A + of_video, ALL_CHANNELS, carry[1], STATES)
    tl.store(d_D + row * ALL_CHANNELS + channel, carry[2])
    tl.store(d_bias + row * ALL_CHANNELS + channel, carry[3])


@triton.jit
def backward(
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
    d_x,
    d_delta,
    d_z,
    d_A,
    d_D,
    d_bias,
    d_start,
    sums,
    scratch,
    LENGTH: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATED: tl.constexpr,
    LARGE: tl.constexpr,
    FIRST_REVERSE: tl.constexpr,
    SECOND_REVERSE: tl.constexpr,
):
    """Computes all gradients, the states recomputed twice.

    The forward pass kept one state per span. A program walks a span forwards and keeps one state
    per turn, in `scratch`, which stays in the cache; then it walks the turns backwards, each once
    more forwards in registers, then backwards. With g_t the gradient of the state h_t, per channel
    and state:
      g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1};   with r_t = exp(dt_t A) g_t h_{t-1},
      d_dt = sum_n r A + x sum_n g B;   d_x = dt sum_n g B + D dy;   d_A += dt r;
      d_B = sum_d g dt x;   d_C = sum_d h dy.

    Args:
      x, delta, decay, B, C, D, z, bias, start, saved: as for `forward`.
      d_y, d_last: gradients of y and of the last state.
      d_x, d_delta, d_z: like x; d_z per direction, not written unless GATED.
      d_A: like start.
      d_D, d_bias: (directions, batch, ALL_CHANNELS) float32.
      d_start: like start.
      sums: (directions, batch, blocks of channels, LENGTH, TILES, 2, 4, 4) float32: of every token,
        the sums over the block's channels that make the gradients of B and C; at [tile, B or C, m,
        q] that of state 16 tile + 4 q + m.
      scratch: (directions, batch, blocks, SLOTS, STATES / 4, CHANNELS, 4) float32.
      LENGTH, ALL_CHANNELS, STATES, SPAN: as in the forward pass.
      TILES: STATES / 16, rounded up.
      SLOTS: the most turns of a span.
      UNROLL: tokens of a turn, a divisor of SPAN; may differ from the forward pass.
      SOFTPLUS, GATED, LARGE, FIRST_REVERSE, SECOND_REVERSE: as in the forward pass.
    """
    inputs = (x, delta, decay, B, C, D, z, bias, start, saved, d_y, d_last)
    outputs = (d_x, d_delta, d_z, d_A, d_D, d_bias, d_start, sums, scratch)
    # As in the forward pass.
    if FIRST_REVERSE == SECOND_REVERSE or tl.program_id(1) == 0:
        _walk_backward(
            inputs, outputs, LENGTH, ALL_CHANNELS, STATES, TILES, SPAN, SLOTS, UNROLL, SOFTPLUS,
            GATED, LARGE, FIRST_REVERSE,
        )  # fmt: skip
    else:
        _walk_backward(
            inputs, outputs, LENGTH, ALL_CHANNELS, STATES, TILES, SPAN, SLOTS, UNROLL, SOFTPLUS,
            GATED, LARGE, SECOND_REVERSE,
        )  # fmt: skip
