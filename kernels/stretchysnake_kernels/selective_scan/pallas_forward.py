"""The forward Pallas kernels: the whole scan, and the shorter one that sums a chunk up.

A long sequence in a small batch leaves most of a GPU idle. Then it is cut into chunks that run side
by side: `summarise` walks every chunk from a zero state, and in `scan` a chunk first joins the
summaries of those before it.
"""

import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels.selective_scan import pallas_plan as plans
from stretchysnake_kernels.selective_scan.pallas_math import (
    GROUP,
    load_state,
    load_token,
    modules,
    sigmoid,
    softplus_and_sigmoid,
    store_state,
    sum_states,
)


def summarise(operands, decay, *, plan):
    """Walks every chunk from a zero state.

    Args:
      operands: fused.Operands.
      decay: its decay as groups.
      plan: the Plan.

    Returns:
      The states at the ends of the chunks, as groups (directions, batch, chunks, ...), and the sums
      of their step sizes, (directions, batch, chunks, channels), float32.
    """

    def kernel(x_ref, delta_ref, decay_ref, B_ref, bias_ref, end_ref, steps_ref):
        walk = plans.Walk(plan)
        decay, bias = load_state(decay_ref), bias_ref[...]

        def read(at):
            return x_ref[at, :], delta_ref[at, :]

        def tokens(_, first, count, carry, known):
            state, steps = carry
            columns = [load_token(B_ref, at) for at in walk.positions(first, count)]
            for (x, delta), B in zip(known, columns, strict=True):
                dt, _ = plans.step_size(delta, bias, plan)
                state, _ = advance(state, dt, x.astype(jnp.float32), decay, B, plan.math)
                steps = steps + dt
            return state, steps

        carry = zero_state(plan), jnp.zeros((plan.block,), jnp.float32)
        end, steps = walk.forward(walk.first, walk.end, tokens, carry, read)
        store_state(end_ref, end)
        steps_ref[...] = steps

    inputs = [(plans.TOKENS, operands.x), (plans.TOKENS, operands.delta), (plans.DECAY, decay)]
    inputs += [(plans.STATES, operands.B), (plans.VECTOR, operands.bias)]
    return plans.launch(
        kernel,
        plan,
        inputs=inputs,
        outputs=((plans.CHUNK_STATE, jnp.float32), (plans.CHUNK_VECTOR, jnp.float32)),
        name="selective_scan_summary",
    )


def scan(operands, decay, start, summary, *, plan, save):
    """Walks every chunk from its own start.

    Args:
      operands: fused.Operands.
      decay: its decay as groups.
      start: its start as groups.
      summary: what `summarise` returned; None for a single chunk.
      plan: the Plan.
      save: whether to keep the states that the backward pass starts from.

    Returns:
      y like x; the states at the ends of the chunks, as `summarise` returns them; and with `save`,
      if there is more than one span, the states before each span but the first, as groups
      (directions, batch, spans - 1, ...), float32.
    """
    gated, save, math = operands.z is not None, save and plan.spans > 1, plan.math

    def kernel(*refs):
        refs = iter(refs)
        x_ref, delta_ref, decay_ref, B_ref, C_ref, D_ref, bias_ref, start_ref = (
            next(refs) for _ in range(8)
        )
        z_ref = next(refs) if gated else None
        summary_refs = None if summary is None else (next(refs), next(refs))
        y_ref, end_ref = next(refs), next(refs)
        saved_ref = next(refs) if save else None
        walk = plans.Walk(plan)
        decay, skip, bias = load_state(decay_ref), D_ref[...], bias_ref[...]

        def read(at):
            return x_ref[at, :], delta_ref[at, :], z_ref[at, :] if gated else None

        def step_and_gate(delta, z):
            z = z.astype(jnp.float32) if gated else None
            if gated and plan.softplus:
                dt, opening = softplus_and_sigmoid(delta.astype(jnp.float32) + bias, z, math)
                return dt, z * opening
            dt, _ = plans.step_size(delta, bias, plan)
            return dt, z * sigmoid(z, math) if gated else None

        def tokens(_, first, count, state, known):
            # All reads come before the first write, so that they overlap.
            places = walk.positions(first, count)
            columns = [(load_token(B_ref, at), load_token(C_ref, at)) for at in places]
            for at, (x, delta, z), (B, C) in zip(places, known, columns, strict=True):
                x = x.astype(jnp.float32)
                dt, gate = step_and_gate(delta, z)
                state, _ = advance(state, dt, x, decay, B, math)
                y = math.fma(skip, x, sum_states(state, C, math))
                y = y if gate is None else y * gate
                y_ref[at, :] = y.astype(y_ref.dtype)
            return state

        def span(i, state):
            keep_state(saved_ref, walk.first // plan.span + i, state)
            return walk.forward(*walk.span(i), tokens, state, read)

        state = load_state(start_ref)
        if summary is not None:
            state = join(0, walk.chunk, state, decay, summary_refs, math)
        if save:
            state = lax.fori_loop(0, walk.spans(), span, state)
        else:
            state = walk.forward(walk.first, walk.end, tokens, state, read)
        store_state(end_ref, state)

    inputs = [(plans.TOKENS, operands.x), (plans.TOKENS, operands.delta), (plans.DECAY, decay)]
    inputs += [(plans.STATES, operands.B), (plans.STATES, operands.C), (plans.VECTOR, operands.D)]
    inputs += [(plans.VECTOR, operands.bias), (plans.START, start)]
    if gated:
        inputs.append((plans.GATE, operands.z))
    if summary is not None:
        inputs += zip((plans.CHUNK_STATES, plans.CHUNK_VECTORS), summary, strict=True)
    outputs = [(plans.TOKENS, operands.x.dtype), (plans.CHUNK_STATE, jnp.float32)]
    if save:
        outputs.append((plans.SAVED, jnp.float32))
    return plans.launch(kernel, plan, inputs=inputs, outputs=outputs, name="selective_scan")


def zero_state(plan):
    """Returns a state of zeros, as groups."""
    return (jnp.zeros((GROUP, plan.block), jnp.float32),) * plan.groups


def advance(state, dt, x, decay, B, math):
    """Returns the state after one more token, and the factors that its past was multiplied by."""
    factors = tuple(math.exp2(group * dt[None, :]) for group in decay)
    inflow = (dt * x)[None, :]
    state = tuple(
        math.fma(factor, group, column * inflow)
        for factor, group, column in zip(factors, state, B, strict=True)
    )
    return state, factors


def join(first, count, carry, decay, summary_refs, math, step=1):
    """Carries a state over `count` chunks, from chunk `first` on, by their summaries."""
    ends_ref, steps_ref = summary_refs

    def over(i, carry):
        chunk = first + i * step
        dt = steps_ref[chunk, :][None, :]
        return tuple(
            math.fma(math.exp2(group * dt), old, new)
            for group, old, new in zip(decay, carry, load_state(ends_ref, chunk), strict=True)
        )

    return lax.fori_loop(0, count, over, carry)


def keep_state(ref, span, state):
    """Writes the state before a span; that before the first one is known."""

    @modules()[0].when(span > 0)
    def _():
        store_state(ref, state, span - 1)
