"""The backward Pallas kernels: all gradients of the scan, and the shorter one that sums a chunk up.

The states are recomputed, twice. The forward pass kept one state per span in memory. A program
first walks a span forwards and keeps one state per turn, in a scratch array that stays in the
cache; then it walks the turns from the end, each once more forwards in registers, then backwards.
With g_t the gradient of the state h_t, per channel and state:
  g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1};   with r_t = exp(dt_t A) g_t h_{t-1},
  d_dt = sum_n r A + x sum_n g B;   d_x = dt sum_n g B + D dy;   d_A += dt r;
  d_B = sum_d g dt x;   d_C = sum_d h dy.
The last two are sums over the channels: every warp writes those of its 32, and XLA adds them up.
"""

import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels.selective_scan import pallas_plan as plans
from stretchysnake_kernels.selective_scan.pallas_forward import advance, join, zero_state
from stretchysnake_kernels.selective_scan.pallas_math import (
    GROUP,
    LN_2,
    TILE,
    load_state,
    load_token,
    sigmoid,
    store_state,
    sum_states,
)

# With more states there are no registers to keep the factors of a step until it is walked back.
REMEMBER = 16


def summarise(operands, decay, d_y, *, plan):
    """Walks every chunk backwards from a zero gradient of its last state.

    Args:
      operands: fused.Operands.
      decay: its decay as groups.
      d_y: gradient of y, like x.
      plan: the Plan.

    Returns:
      The gradients of the states before the chunks, as groups (directions, batch, chunks, ...), and
      the sums of their step sizes, (directions, batch, chunks, channels), float32.
    """
    gated, math = operands.z is not None, plan.math

    def kernel(*refs):
        refs = iter(refs)
        delta_ref, d_y_ref, decay_ref, C_ref, bias_ref = (next(refs) for _ in range(5))
        z_ref = next(refs) if gated else None
        begin_ref, steps_ref = refs
        walk = plans.Walk(plan)
        decay, bias = load_state(decay_ref), bias_ref[...]

        def tokens(_, first, count, carry):
            gradient, steps = carry
            rows = []
            for at in reversed(walk.positions(first, count)):
                wide = delta_ref[at, :], d_y_ref[at, :], z_ref[at, :] if gated else None
                rows.append((*wide, load_token(C_ref, at)))
            for delta, d_y, z, C in rows:
                dt, _ = plans.step_size(delta, bias, plan)
                d_y = d_y.astype(jnp.float32)
                if gated:
                    z = z.astype(jnp.float32)
                    d_y = d_y * (z * sigmoid(z, math))
                gradient = tuple(
                    math.fma(column, d_y[None, :], g) * math.exp2(group * dt[None, :])
                    for column, g, group in zip(C, gradient, decay, strict=True)
                )
                steps = steps + dt
            return gradient, steps

        carry = zero_state(plan), jnp.zeros((plan.block,), jnp.float32)
        begin, steps = walk.backward(walk.first, walk.end, tokens, carry)
        store_state(begin_ref, begin)
        steps_ref[...] = steps

    inputs = [(plans.TOKENS, operands.delta), (plans.TOKENS, d_y), (plans.DECAY, decay)]
    inputs += [(plans.STATES, operands.C), (plans.VECTOR, operands.bias)]
    if gated:
        inputs.append((plans.GATE, operands.z))
    return plans.launch(
        kernel,
        plan,
        inputs=inputs,
        outputs=((plans.CHUNK_STATE, jnp.float32), (plans.CHUNK_VECTOR, jnp.float32)),
        name="selective_scan_gradient_summary",
    )


def gradients(operands, decay, start, saved, d_y, d_last, summary, *, plan):
    """Walks every chunk backwards.

    Args:
      operands: fused.Operands.
      decay: its decay as groups.
      start: its start as groups.
      saved: what the forward pass kept; None if there is one span only.
      d_y: gradient of y, like x.
      d_last: gradient of the last state, as groups.
      summary: what `summarise` returned; None for a single chunk.
      plan: the Plan.

    Returns:
      Gradients of x, delta and, with a gate, z per direction, in x's dtype; then in float32 of A as
      groups, D and the bias, (directions, batch, chunks, ...) each, and of the states before the
      chunks; last the sums of B and C per warp, (directions, batch, length, plan.sums, channels),
      which `ungroup_sums` adds up and takes apart.
    """
    gated, math = operands.z is not None, plan.math
    exact = operands.x.dtype == jnp.float32

    def kernel(*refs):
        refs = iter(refs)
        x_ref, delta_ref, d_y_ref, decay_ref, B_ref, C_ref, D_ref, bias_ref = (
            next(refs) for _ in range(8)
        )
        start_ref, d_last_ref = next(refs), next(refs)
        z_ref = next(refs) if gated else None
        saved_ref = None if saved is None else next(refs)
        summary_refs = None if summary is None else (next(refs), next(refs))
        d_x_ref, d_delta_ref = next(refs), next(refs)
        d_z_ref = next(refs) if gated else None
        d_A_ref, d_D_ref, d_bias_ref, d_start_ref, sums_ref, scratch_ref = refs
        walk = plans.Walk(plan)
        skip, bias = D_ref[...], bias_ref[...]

        # The decay is read again wherever it is used: kept in registers, it would take the place of
        # the factors, and the assembler would rather compute those a third time.
        def recompute(slot, first, count, state, _):
            store_state(scratch_ref, state, slot)
            for at in walk.positions(first, count):
                dt, _ = plans.step_size(delta_ref[at, :], bias, plan)
                x, B = x_ref[at, :].astype(jnp.float32), load_token(B_ref, at)
                state, _ = advance(state, dt, x, load_state(decay_ref), B, math)
            return state

        def back(slot, first, count, carry):
            state, steps = load_state(scratch_ref, slot), []
            for at in walk.positions(first, count):
                x = x_ref[at, :].astype(jnp.float32)
                dt, slope = plans.step_size(delta_ref[at, :], bias, plan)
                B = load_token(B_ref, at)
                state, factors = advance(state, dt, x, load_state(decay_ref), B, math)
                factors = factors if plan.states <= REMEMBER else None
                steps.append((at, x, dt, slope, factors, state))
            while steps:
                step = steps.pop()
                # The oldest state is read again: there are no registers to keep it.
                before = steps[-1][-1] if steps else load_state(scratch_ref, slot)
                carry = step_back(*step, before, carry)
            return carry

        def step_back(at, x, dt, slope, factors, state, before, carry):
            g, d_A, d_D, d_bias = carry
            B, C = load_token(B_ref, at), load_token(C_ref, at)
            d_y = d_y_ref[at, :].astype(jnp.float32)
            if gated:
                z = z_ref[at, :].astype(jnp.float32)
                gate = sigmoid(z, math)
                y = math.fma(skip, x, sum_states(state, C, math))
                d_gate = d_y * gate
                d_z = d_gate * y * math.fma(z, 1 - gate, jnp.float32(1))
                d_z_ref[at, :] = d_z.astype(d_z_ref.dtype)
                d_y = d_gate * z
            g = [math.fma(column, d_y[None, :], group) for column, group in zip(C, g, strict=True)]
            along_B, inflow = sum_states(g, B, math), dt * x
            tiles = sum_tiles(g, inflow) + sum_tiles(state, d_y)
            for i in range(0, len(tiles), 2):
                sums_ref[at, i // 2, :] = math.merge(*tiles[i : i + 2])
            if factors is None:
                factors = [math.exp2(group * dt[None, :]) for group in load_state(decay_ref)]
            g = tuple(group * factor for group, factor in zip(g, factors, strict=True))
            r = [group * old for group, old in zip(g, before, strict=True)]
            d_A = tuple(math.fma(a, dt[None, :], b) for a, b in zip(r, d_A, strict=True))
            d_dt = math.fma(along_B, x, sum_states(r, load_state(decay_ref), math) * LN_2)
            d_delta = d_dt * slope if plan.softplus else d_dt
            d_x = math.fma(along_B, dt, skip * d_y)
            d_x_ref[at, :] = d_x.astype(d_x_ref.dtype)
            d_delta_ref[at, :] = d_delta.astype(d_delta_ref.dtype)
            return g, d_A, math.fma(d_y, x, d_D), d_bias + d_delta

        def sum_tiles(groups, factor):
            tiles = [groups[i : i + TILE // GROUP] for i in range(0, len(groups), TILE // GROUP)]
            return [math.sum_channels(tile, factor, exact) for tile in tiles]

        def span(i, carry):
            i = walk.spans() - 1 - i
            at = walk.first // plan.span + i
            first, end = walk.span(i)
            state = load_span(at, start_ref, saved_ref)
            walk.forward(first, end, recompute, state)
            return walk.backward(first, end, back, carry)

        g, zero = load_state(d_last_ref), jnp.zeros((plan.block,), jnp.float32)
        if summary is not None:
            last = plan.chunks - 1
            g = join(last, last - walk.chunk, g, load_state(decay_ref), summary_refs, math, step=-1)
        carry = g, zero_state(plan), zero, zero
        g, d_A, d_D, d_bias = lax.fori_loop(0, walk.spans(), span, carry)
        store_state(d_A_ref, d_A)
        store_state(d_start_ref, g)
        d_D_ref[...] = d_D
        d_bias_ref[...] = d_bias

    inputs = [(plans.TOKENS, operands.x), (plans.TOKENS, operands.delta), (plans.TOKENS, d_y)]
    inputs += [(plans.DECAY, decay), (plans.STATES, operands.B), (plans.STATES, operands.C)]
    inputs += [(plans.VECTOR, operands.D), (plans.VECTOR, operands.bias)]
    inputs += [(plans.START, start), (plans.START, d_last)]
    if gated:
        inputs.append((plans.GATE, operands.z))
    if saved is not None:
        inputs.append((plans.SAVED, saved))
    if summary is not None:
        inputs += zip((plans.CHUNK_STATES, plans.CHUNK_VECTORS), summary, strict=True)
    outputs = [(plans.TOKENS, operands.x.dtype)] * (3 if gated else 2)
    outputs += [(plans.CHUNK_STATE, jnp.float32), (plans.CHUNK_VECTOR, jnp.float32)]
    outputs += [(plans.CHUNK_VECTOR, jnp.float32), (plans.CHUNK_STATE, jnp.float32)]
    outputs += [(plans.SUMS, jnp.float32), (plans.SCRATCH, jnp.float32)]
    *results, _ = plans.launch(
        kernel, plan, inputs=inputs, outputs=outputs, name="selective_scan_gradient"
    )
    return results


def load_span(span, start_ref, saved_ref):
    """Reads the state before a span."""
    if saved_ref is None:
        return load_state(start_ref)
    return lax.cond(
        span == 0,
        lambda: load_state(start_ref),
        lambda: load_state(saved_ref, span - 1),
    )
