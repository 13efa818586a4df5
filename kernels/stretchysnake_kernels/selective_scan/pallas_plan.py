"""How the Pallas kernels lie on a GPU: grid, blocks, chunks, and the walk of a program."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from stretchysnake_kernels.selective_scan.gpu import WARP, Layout
from stretchysnake_kernels.selective_scan.pallas_math import GROUP, TILE, Math, modules, softplus

GRID = ("block", "direction", "video", "chunk")
# The axes of the arrays, by name: those of the grid (a program sees its own entry, without the
# axis), "channels" and "warps" of them (a program sees those of its block), and the others, which
# it sees whole. "chunks" is "chunk" seen whole.
TOKENS = "direction video length channels"
GATE = "one video length channels"
STATES = "direction video length states"
VECTOR = "direction channels"
DECAY = "direction warps groups lanes group"
START = "direction video warps groups lanes group"
CHUNK_STATE = "direction video chunk warps groups lanes group"
CHUNK_VECTOR = "direction video chunk channels"
CHUNK_STATES = "direction video chunks warps groups lanes group"
CHUNK_VECTORS = "direction video chunks channels"
SAVED = "direction video saved warps groups lanes group"
SCRATCH = "direction video chunk slots warps groups lanes group"
SUMS = "direction video length sums channels"


@dataclasses.dataclass(frozen=True)
class Plan(Layout):
    """The static side of a launch.

    A program walks one chunk of one video in one direction, for a block of channels. Tokens are
    counted in the order of the walk.

    Attributes:
      reverse: one bool per direction.
      videos: size of the batch.
      softplus: whether the step size goes through softplus.
      math: how to compute.
      interpret: whether to run on the CPU, as plain JAX.
    """

    reverse: tuple[bool, ...]
    videos: int
    softplus: bool
    math: Math
    interpret: bool

    @property
    def grid(self):
        """Axis -> programs along it. Axes of one program are left out: they take registers."""
        sizes = (self.channels // self.block, len(self.reverse), self.videos, self.chunks)
        return {a: size for a, size in zip(GRID, sizes, strict=True) if size > 1} or {GRID[0]: 1}

    @property
    def groups(self):
        return self.states // GROUP

    @property
    def sums(self):
        """Rows of a warp's sums per token: of the gradients of B and C, each in whole tiles."""
        return 2 * max(TILE, self.states) // WARP


class Walk:
    """The tokens of the running program; made inside a kernel.

    Attributes:
      chunk: index of its chunk.
      first: its first token.
      end: the token after its last one.
    """

    def __init__(self, plan):
        def program_id(axis):
            return modules()[0].program_id(list(plan.grid).index(axis))

        self.plan = plan
        self._reverse = plan.reverse[0]
        if len(set(plan.reverse)) > 1:
            self._reverse = program_id("direction") == plan.reverse.index(True)
        self.chunk, self.first, self.end = 0, 0, plan.length
        if plan.chunks > 1:
            self.chunk = program_id("chunk")
            self.first = self.chunk * plan.chunk
            self.end = jnp.minimum(plan.length, self.first + plan.chunk)

    def positions(self, first, count):
        """Returns where in the arrays `count` tokens from `first` on stand."""
        last = self.plan.length - 1
        if isinstance(self._reverse, bool):
            return [last - first - i if self._reverse else first + i for i in range(count)]
        start = jnp.where(self._reverse, last - first, first)
        step = 1 - 2 * self._reverse.astype(jnp.int32)
        return [start + i * step for i in range(count)]

    def spans(self):
        """Returns the number of its spans."""
        return -((self.first - self.end) // self.plan.span)

    def span(self, i):
        """Returns the first token of its i-th span, and the token after the last one."""
        first = self.first + i * self.plan.span
        return first, jnp.minimum(first + self.plan.span, self.end)

    def forward(self, first, end, tokens, carry, read=lambda at: None):
        """Walks tokens first .. end - 1.

        Args:
          first: a token.
          end: a token.
          tokens: (slot, first token, count, carry, what `read` returned for each) -> carry, called
            with a static count, `unroll` or, for what is left over, 1; slot counts the calls.
          carry: what goes from call to call.
          read: position -> what `tokens` wants to know of it a turn ahead, so that memory answers
            while the turn before computes.
        """
        unroll = self.plan.unroll
        turns = (end - first) // unroll

        def read_turn(i):
            # Nobody needs what is read after the last turn; it must be inside of the arrays.
            i = jnp.minimum(i, turns - 1)
            return tuple(map(read, self.positions(first + i * unroll, unroll)))

        def turn(i, carry):
            carry, known = carry
            following = read_turn(i + 1)
            return tokens(i, first + i * unroll, unroll, carry, known), following

        if self.plan.length >= unroll:
            carry, _ = lax.fori_loop(0, turns, turn, (carry, read_turn(0)))
        if self._even:
            return carry
        whole = first + turns * unroll

        def one(i, carry):
            known = tuple(map(read, self.positions(whole + i, 1)))
            return tokens(turns + i, whole + i, 1, carry, known)

        return lax.fori_loop(0, end - whole, one, carry)

    def backward(self, first, end, tokens, carry):
        """Makes the calls of `forward` in the opposite order."""
        unroll = self.plan.unroll
        turns = (end - first) // unroll
        whole = first + turns * unroll
        if not self._even:

            def one(i, carry):
                i = end - whole - 1 - i
                return tokens(turns + i, whole + i, 1, carry)

            carry = lax.fori_loop(0, end - whole, one, carry)

        def turn(i, carry):
            i = turns - 1 - i
            return tokens(i, first + i * unroll, unroll, carry)

        return lax.fori_loop(0, turns, turn, carry)

    @property
    def _even(self):  # then every span and chunk is a whole number of turns, too
        return self.plan.length % self.plan.unroll == 0


def step_size(delta, bias, plan):
    """Returns dt (block,) of one token, and its derivative by delta."""
    v = delta.astype(jnp.float32) + bias
    return softplus(v, plan.math) if plan.softplus else (v, jnp.ones_like(v))


def launch(kernel, plan, *, inputs, outputs, name):
    """Calls `kernel` once per block of channels, direction, video and chunk.

    Args:
      kernel: takes a ref per input and output.
      plan: what to launch.
      inputs: pairs (axes, array); the axes are one of the names at the top of this file.
      outputs: pairs (axes, dtype).
      name: of the kernel, in profiles.

    Returns:
      The list of outputs.
    """
    pallas, triton = modules()
    sizes = {
        "direction": len(plan.reverse),
        "video": plan.videos,
        "chunk": plan.chunks,
        "chunks": plan.chunks,
        "one": 1,
        "length": plan.length,
        "channels": plan.channels,
        "warps": plan.channels // WARP,
        "lanes": WARP,
        "states": plan.states,
        "groups": plan.groups,
        "group": GROUP,
        "saved": plan.spans - 1,
        "slots": plan.slots,
        "sums": plan.sums,
    }

    manual = jax.typeof(inputs[0][1]).mat  # which mesh axes it varies over, inside of shard_map

    def spec(axes):
        axes = axes.split()

        def index(*grid):
            at = dict(zip(plan.grid, grid, strict=True))
            at["channels"] = at["warps"] = at.get("block", 0)
            return tuple(at.get(axis, 0) for axis in axes)

        own = {"channels": plan.block, "warps": plan.warps}
        shown = [own.get(axis, sizes[axis]) for axis in axes]
        shown = [
            None if axis in (*GRID, "one") else size for axis, size in zip(axes, shown, strict=True)
        ]
        return pallas.BlockSpec(tuple(shown), index)

    def shape(axes, dtype):
        sizes_of_axes = tuple(sizes[axis] for axis in axes.split())
        return jax.ShapeDtypeStruct(sizes_of_axes, dtype, manual_axis_type=manual)

    call = pallas.pallas_call(
        kernel,
        grid=tuple(plan.grid.values()),
        in_specs=[spec(axes) for axes, _ in inputs],
        out_specs=[spec(axes) for axes, _ in outputs],
        out_shape=[shape(axes, dtype) for axes, dtype in outputs],
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=plan.interpret,
        name=name,
    )
    return call(*(array for _, array in inputs))
