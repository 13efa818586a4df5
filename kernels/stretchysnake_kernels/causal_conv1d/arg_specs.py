"""The named shapes of the causal convolution, shared by its tests and benchmark."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One problem size: `batch` videos of `length` tokens and a kernel of `width` taps."""

    name: str
    batch: int
    length: int
    channels: int
    width: int = 4
    bench: bool = False


ARG_SPECS = (
    ArgSpec("one_token", 2, 1, 3),
    ArgSpec("shorter_than_kernel", 1, 2, 5),
    ArgSpec("one_tap", 2, 5, 3, width=1),
    ArgSpec("odd", 3, 37, 7, width=3),
    ArgSpec("typical", 2, 50, 16),
    ArgSpec("M", 8, 1569, 384, bench=True),
)


def make_args(spec: ArgSpec, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """Returns x, weight and bias as numpy arrays of `dtype`, keyed by argument name."""
    rng = np.random.default_rng(seed)
    args = {
        "x": rng.normal(size=(spec.batch, spec.length, spec.channels)),
        "weight": rng.normal(size=(spec.width, spec.channels)) / np.sqrt(spec.width),
        "bias": rng.normal(size=spec.channels),
    }
    return {name: value.astype(dtype) for name, value in args.items()}
