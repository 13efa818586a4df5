"""The command `stretchysnake bench`: finds the benchmark asked for."""

import importlib

from stretchysnake_jax.config import ConfigError, nearest

# name -> (module, what it does)
BENCHMARKS = {
    "data": ("stretchysnake_jax.data.bench", "the loader: clips per second, stages, other readers"),
    "scan": ("stretchysnake_bench.scan", "time and memory of the selective scan; --tune on a GPU"),
    "step": ("stretchysnake_jax.step_bench", "the training step, beside PyTorch's; scaling"),
    "compile": ("stretchysnake_jax.compile_bench", "seconds to compile all buckets, by plan"),
    "efficiency": ("stretchysnake_jax.efficiency_bench", "what low resolution saves, measured"),
    "mesh": ("stretchysnake_jax.mesh_bench", "losses and memory over meshes and processes"),
    "kernels": ("stretchysnake_bench.kernels_table", "what the GPU kernels need, without a GPU"),
    "gpu": ("stretchysnake_bench.gpu_report", "all that needs a GPU: tests, tuning, benchmark"),
}
USAGE = "usage: stretchysnake bench NAME ...\n\n" + "\n".join(
    f"  {name:<12}{text}" for name, (_, text) in BENCHMARKS.items()
)
USAGE += "\n\n'stretchysnake bench NAME --help' says what one takes."


def main(argv: list[str]) -> int:
    """Runs `stretchysnake bench NAME ...`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {argv[0]!r}: {nearest(argv[0], BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[argv[0]][0]).main(argv[1:])
