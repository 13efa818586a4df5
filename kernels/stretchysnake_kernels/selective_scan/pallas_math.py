"""What the Pallas kernels compute with, on a GPU as PTX instructions and elsewhere as plain jnp.

A program walks the channels of a block, one per thread, 32 per warp; a thread keeps all states of
its channel in registers. They are held as groups of GROUP states, arrays (GROUP, block), of which
Triton lays the first axis out in the thread; a larger array of states it would spread over the
lanes, and every sum over the states would be a row of shuffles. In memory a state as groups is
(..., channels / WARP, states / GROUP, WARP, GROUP) float32: a thread moves a group as one 128-bit
access, the groups of a warp lie side by side (with a stride of all channels between them each would
take an address of its own, and registers), and how many warps a program has makes no difference.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels.dispatch import Unsupported
from stretchysnake_kernels.selective_scan.gpu import WARP

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
GROUP = 4  # float32 numbers in one 128-bit access
TILE = 16  # sums over the channels that are computed together
# log(1 + e) = s P(s^2) with s = e / (e + 2) <= 1/3, which is 2 artanh(s). P by Remez exchange on
# [0, 1/9], largest relative error 4e-9, lowest power first.
LOG1P = (2.0000000079210483, 0.6666631468186289, 0.4002491028748, 0.2796060267788, 0.2817833525022)


@functools.cache
def modules():
    """Returns (jax.experimental.pallas, its Triton part), imported at the first use.

    Raises:
      Unsupported: this JAX has no Triton part of Pallas any more.
    """
    try:
        from jax.experimental import pallas
        from jax.experimental.pallas import triton
    except ImportError as error:
        raise Unsupported(f"this JAX has no Pallas for Triton ({error})") from error
    # Said at every compilation since JAX 0.11. A user of selective_scan can do nothing about it,
    # and will be served by another backend once the part is gone.
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", category=DeprecationWarning
    )
    return pallas, triton


class Math(NamedTuple):
    """The operations for which a GPU needs other words than a CPU.

    Attributes:
      fma: (a, b, c) -> a b + c, broadcast.
      exp2: v -> 2^v.
      reciprocal: v -> 1 / v.
      sum_channels: (up to four groups, factor (block,), exact) -> a tile, for every warp the inner
        product of each state with the factor over its channels, still in parts. Without `exact` a
        GPU cuts the addends to 11 bits.
      merge: two tiles -> (block,), for every warp the TILE sums of the first one, then those of the
        second one, both in the order that `ungroup_sums` takes.
    """

    fma: Callable
    exp2: Callable
    reciprocal: Callable
    sum_channels: Callable
    merge: Callable


def _portable_sums(groups, factor, exact):
    addends = (jnp.stack(groups) * factor).reshape(len(groups), GROUP, -1, WARP)
    sums = jnp.sum(addends, axis=3).T
    return jnp.pad(sums, ((0, 0), (0, 0), (0, TILE // GROUP - len(groups)))).reshape(-1, TILE)


PORTABLE = Math(
    fma=lambda a, b, c: a * b + c,
    exp2=jnp.exp2,
    reciprocal=lambda v: 1 / v,
    sum_channels=_portable_sums,
    merge=lambda first, second: jnp.concatenate((first, second), axis=1).reshape(-1),
)


def _inline(asm, *args):
    """Applies `asm` to every number of `args`, float32, broadcast against each other."""
    shape = jnp.broadcast_shapes(*(arg.shape for arg in args))
    (result,) = modules()[1].elementwise_inline_asm(
        asm,
        args=[jnp.broadcast_to(arg, shape) for arg in args],
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result


def _tensor_core_sums(groups, factor, exact):
    """Sums over the lanes by multiplying with ones, which saves 24 of 31 shuffles per 32 sums.

    In mma.m16n8k8 the lane 4 g + t holds, of the left factor, rows g and g + 8 at depths t and
    t + 4: four registers, here those of one group of states. A right factor with ones in column 2 i
    at depths 0-3, and in column 2 i + 1 at depths 4-7, adds each up over the four lanes of g,
    without moving any. With i = 0 .. 3 four groups fill the eight columns of an accumulator, of
    which a lane holds columns 2 t and 2 t + 1: the four states of group t. What is left to add up
    are the eight lanes of t; the exchanges that do it also leave each with one state.
    """
    return _inline(_sums_asm(len(groups), exact), *rows_of(groups), factor)


@functools.cache
def _sums_asm(groups, exact):
    code = ["{ .reg .b32 sum<4>, v<4>, w<4>, left, right, eight; .reg .f32 e, f; .reg .pred here;"]
    code.append("mov.u32 eight, %laneid; shr.u32 eight, eight, 2;")
    code += [f"mov.b32 sum{s}, 0;" for s in range(4)]
    sums = "{sum0, sum2, sum1, sum3}"  # rows g, g, g + 8, g + 8 of columns 2 t, 2 t + 1, again
    for i in range(groups):
        for column, side in ((2 * i, "left"), (2 * i + 1, "right")):
            code.append(f"setp.eq.u32 here, eight, {column};")
            code.append(f"selp.b32 {side}, 0x3f800000, 0, here;")
        for s in range(4):
            code.append(f"mul.f32 e, ${1 + GROUP * i + s}, ${1 + GROUP * groups};")
            code.append(f"mov.b32 v{s}, e;")
            if exact:  # the leading 11 bits, then what they leave
                code.append(f"and.b32 v{s}, v{s}, 0xffffe000; mov.b32 f, v{s};")
                code.append(f"sub.f32 f, e, f; mov.b32 w{s}, f;")
        for factor in ("v", "w") if exact else ("v",):
            left = ", ".join(f"{factor}{s}" for s in range(4))
            code.append(
                "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                f"{sums}, {{{left}}}, {{left, right}}, {sums};"
            )
    code.append(_deal([f"sum{s}" for s in range(4)], 8))
    code.append("mov.b32 $0, sum0; }")
    return "\n".join(code)


def _merge(first, second):
    code = "{ .reg .b32 v0, v1; mov.b32 v0, $1; mov.b32 v1, $2;"
    return _inline(f"{code}\n{_deal(['v0', 'v1'], 16)}\nmov.b32 $0, v0; }}", first, second)


def _deal(registers, mask):
    """PTX that adds registers up over lanes, a lane keeping half of them at each exchange.

    Args:
      registers: names of .b32 registers, a power of two; the sum is left in the first.
      mask: the bit of the lane's number that says which half it keeps first; then the lower ones.
    """
    code = ["{ .reg .pred upper; .reg .b32 lane, keep, send; .reg .f32 here, there;"]
    code.append("mov.u32 lane, %laneid;")
    while len(registers) > 1:
        half = len(registers) // 2
        code.append(f"and.b32 keep, lane, {mask}; setp.ne.u32 upper, keep, 0;")
        for low, high in zip(registers[:half], registers[half:], strict=True):
            code.append(f"selp.b32 send, {low}, {high}, upper;")
            code.append(f"selp.b32 keep, {high}, {low}, upper;")
            code.append(f"shfl.sync.bfly.b32 send, send, {mask}, 31, -1;")
            code.append("mov.b32 here, keep; mov.b32 there, send; add.f32 here, here, there;")
            code.append(f"mov.b32 {low}, here;")
        registers, mask = registers[:half], mask // 2
    return "\n".join([*code, "}"])


# Written out because XLA's Triton neither contracts a b + c nor has an exp2 of one instruction.
PTX = Math(
    fma=functools.partial(_inline, "fma.rn.f32 $0, $1, $2, $3;"),
    exp2=functools.partial(_inline, "ex2.approx.ftz.f32 $0, $1;"),
    reciprocal=functools.partial(_inline, "rcp.approx.ftz.f32 $0, $1;"),
    sum_channels=_tensor_core_sums,
    merge=_merge,
)


def softplus(v, math):
    """Returns log(1 + e^v) and its derivative, to float32 rounding on both tails."""
    e = math.exp2(jnp.abs(v) * -LOG2_E)
    one_side = math.reciprocal(e + 1)
    derivative = jnp.where(v < 0, e * one_side, one_side)
    return _softplus(v, e, math.reciprocal(e + 2), math), derivative


def _softplus(v, e, reciprocal, math):
    """Returns log(1 + e^v) from e^-|v| and 1 / (e^-|v| + 2)."""
    s = e * reciprocal
    square = s * s
    series = math.fma(square, jnp.float32(LOG1P[4]), jnp.float32(LOG1P[3]))
    for coefficient in LOG1P[2::-1]:
        series = math.fma(series, square, jnp.float32(coefficient))
    return math.fma(series, s, jnp.maximum(v, 0))


def sigmoid(v, math):
    """Returns 1 / (1 + e^-v)."""
    return math.reciprocal(math.exp2(v * -LOG2_E) + 1)


def softplus_and_sigmoid(v, z, math):
    """Returns log(1 + e^v) and 1 / (1 + e^-z) by one reciprocal: the slowest unit is the bound."""
    e = math.exp2(jnp.abs(v) * -LOG2_E)
    one, other = e + 2, math.exp2(jnp.minimum(z * -LOG2_E, 100)) + 1
    both = math.reciprocal(one * other)
    return _softplus(v, e, both * other, math), both * one


def sum_states(left, right, math):
    """Returns the sum over the states of the product of two lists of groups: (block,)."""
    total = left[0] * right[0]
    for a, b in zip(left[1:], right[1:], strict=True):
        total = math.fma(a, b, total)
    return jnp.sum(total, axis=0)


def rows_of(groups):
    """Returns the rows (block,) of groups (GROUP, block).

    Pallas for Triton cannot slice a value; a sum of which one addend remains is free: the choice is
    known when compiling, and -0.0 + v is v.
    """
    index = lax.broadcasted_iota(jnp.int32, groups[0].shape, 0)
    return [
        jnp.sum(jnp.where(index == k, group, -0.0), axis=0)
        for group in groups
        for k in range(GROUP)
    ]


def load_state(ref, *index):
    """Returns the state ref[*index], (warps, states / GROUP, WARP, GROUP), as a tuple of groups."""
    groups = ref.shape[-3]
    return tuple(ref[(*index, slice(None), j)].reshape(-1, GROUP).T for j in range(groups))


def store_state(ref, groups, *index):
    """Writes what `load_state` reads."""
    for j, group in enumerate(groups):
        ref[(*index, slice(None), j)] = group.T.reshape(-1, WARP, GROUP)


def load_token(ref, position):
    """Reads B or C of one token from (length, states): a list of columns (GROUP, 1)."""
    pallas, _ = modules()
    starts = range(0, ref.shape[1], GROUP)
    return [ref[position, pallas.ds(start, GROUP)][:, None] for start in starts]


def group_states(value):
    """Moves (..., states, channels) into groups (..., warps, states / GROUP, WARP, GROUP)."""
    *leading, states, channels = value.shape
    value = value.reshape(*leading, states // GROUP, GROUP, channels // WARP, WARP)
    return jnp.moveaxis(value, (-2, -4, -1, -3), (-4, -3, -2, -1))


def ungroup_states(value):
    """The inverse of `group_states`."""
    *leading, warps, groups, _, _ = value.shape
    value = jnp.moveaxis(value, (-4, -3, -2, -1), (-2, -4, -1, -3))
    return value.reshape(*leading, groups * GROUP, warps * WARP)


def ungroup_sums(value, states):
    """Adds up over the warps what `Math.merge` returned: the gradients of B and C (..., states).

    Args:
      value: (..., rows, channels), a row for every two tiles, first those of B, then those of C.
      states: their number.
    """
    *leading, rows, _ = value.shape
    value = jnp.sum(value.reshape(*leading, rows, -1, WARP), axis=-2)
    value = value.reshape(*leading, 2, -1, GROUP, TILE // GROUP)
    value = jnp.swapaxes(value, -1, -2).reshape(*leading, 2, -1)
    return value[..., 0, :states], value[..., 1, :states]
