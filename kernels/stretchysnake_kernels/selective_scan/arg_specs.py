"""The named shapes of the selective scan, shared by its tests, its benchmark and its tuning."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One problem size.

    Attributes:
      name: what tests and `stretchysnake bench scan --shapes` call it.
      batch: videos.
      length: tokens per video.
      channels: width of the mixer (the model's width times its expansion).
      state: numbers of state per channel.
      bench: whether the benchmark offers it; the others are small and odd, for tests.
    """

    name: str
    batch: int
    length: int
    channels: int
    state: int = 16
    bench: bool = False

    @property
    def elements(self) -> int:
        """Size of x, in numbers."""
        return self.batch * self.length * self.channels


ARG_SPECS = (
    ArgSpec("one_token", 2, 1, 1, 2),
    ArgSpec("odd", 2, 37, 7, 3),
    ArgSpec("chunk_plus_one", 2, 49, 8, 16),
    ArgSpec("wide_state", 1, 70, 6, 40),
    ArgSpec("whole_chunks", 4, 48, 200, 16),  # large enough for the polynomial exponential
    ArgSpec("XS", 1, 197, 192, bench=True),  # one frame of the Tiny model, to try a benchmark
    ArgSpec("S", 8, 785, 384, bench=True),  # 4 frames of 14x14 tokens and the class token
    ArgSpec("M", 8, 1569, 384, bench=True),  # 8 frames
    ArgSpec("L", 1, 12545, 384, bench=True),  # 64 frames
    ArgSpec("XL", 2, 1569, 1152, bench=True),  # the Middle model
)


def make_args(spec: ArgSpec, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """Draws arguments of the magnitudes met in training: dt of 1e-3 to 1, A of -1 to -state.

    Returns:
      x, delta, A, B, C, D, z, delta_bias as numpy arrays of `dtype`, keyed by argument name.
    """
    rng = np.random.default_rng(seed)
    tokens = (spec.batch, spec.length)
    decay = -np.tile(np.arange(1, spec.state + 1), (spec.channels, 1))
    args = {
        "x": rng.normal(size=(*tokens, spec.channels)),
        "delta": rng.normal(size=(*tokens, spec.channels)),
        "A": decay * rng.uniform(0.8, 1.2, size=decay.shape),
        "B": rng.normal(size=(*tokens, spec.state)),
        "C": rng.normal(size=(*tokens, spec.state)),
        "D": rng.normal(size=spec.channels),
        "z": rng.normal(size=(*tokens, spec.channels)),
        "delta_bias": rng.uniform(-5, -1, size=spec.channels),
    }
    return {name: value.astype(dtype) for name, value in args.items()}
