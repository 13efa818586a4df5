"""The command `stretchysnake bench`: finds the benchmark asked for."""

import importlib

from stretchysnake_jax.config import ConfigError, nearest

BENCHMARKS = {
    "scan": "stretchysnake_bench.scan",
    "kernels": "stretchysnake_bench.kernels_table",
    "gpu": "stretchysnake_bench.gpu_report",
}


def main(argv: list[str]) -> int:
    """Runs `stretchysnake bench NAME ...`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: stretchysnake bench NAME ...\n\nNAME is one of: {', '.join(BENCHMARKS)}")
        return 0 if argv else 2
    if argv[0] not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {argv[0]!r}: {nearest(argv[0], BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[argv[0]]).main(argv[1:])
