"""The command `stretchysnake bench mesh`: one run over many meshes and processes, compared.

Every row is a training run of a few steps, the same command in processes of its own, on virtual CPU
devices of this machine: the losses must be those of one device, and the memory of each device must
fall where state or tokens are cut up. It shows that the layouts are right, not how fast they are.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.metrics import read_lines

# processes x devices of each, and the mesh (data, fsdp, sequence)
LAYOUTS = (
    "1x1:1x1x1",
    "1x8:8x1x1",
    "1x8:1x8x1",
    "1x8:1x1x8",
    "1x8:2x4x1",
    "1x8:2x1x4",
    "1x8:1x4x2",
    "1x8:2x2x2",
    "2x4:8x1x1",
    "2x4:1x8x1",
    "2x4:2x2x2",
)
TOLERANCE = 1e-5  # relative, of the losses
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes, devices of each, and the mesh over all of them."""

    processes: int
    devices: int
    mesh: tuple[int, int, int]

    def __str__(self):
        return f"{self.processes}x{self.devices}:{'x'.join(map(str, self.mesh))}"


def parse(text: str) -> Layout:
    """A layout in the words of `--layouts`.

    Raises:
      ConfigError: other words, or a mesh of another size.
    """
    try:
        first, second = text.split(":")
        processes, devices = map(int, first.split("x"))
        data, fsdp, sequence = map(int, second.split("x"))
    except ValueError as error:
        raise ConfigError(
            f"--layouts has {text!r}: it takes PROCESSESxDEVICES:DATAxFSDPxSEQUENCE, such as "
            f"{LAYOUTS[-1]}"
        ) from error
    if processes * devices != data * fsdp * sequence or processes * devices < 1:
        raise ConfigError(
            f"--layouts has {text!r}: {processes} processes of {devices} devices need a mesh of "
            f"{processes * devices}, and {data}x{fsdp}x{sequence} is {data * fsdp * sequence}"
        )
    return Layout(processes, devices, (data, fsdp, sequence))


def run(layout: Layout, words: list[str], workdir: pathlib.Path) -> dict:
    """Trains in a layout.

    Args:
      layout: processes and mesh.
      words: of `stretchysnake train`, without --workdir.
      workdir: of the run.

    Returns:
      losses by step, and bytes per device by bucket: state, temporary.

    Raises:
      ConfigError: the run failed; the message is its own last line.
    """
    flag = f"--xla_force_host_platform_device_count={layout.devices}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_NUM_PROCESSES": str(layout.processes),
    }
    if layout.processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            env["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "stretchysnake_jax.cli", "train", *words]
    for name, size in zip(("data", "fsdp", "sequence"), layout.mesh, strict=True):
        command.append(f"--config.mesh.{name}={size}")
    command += ["--workdir", str(workdir)]
    with contextlib.ExitStack() as stack:
        files, started = [], []
        for number in range(layout.processes):
            files.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            own = env | {"JAX_PROCESS_ID": str(number)}
            process = subprocess.Popen(command, env=own, stdout=files[-1], stderr=files[-1])
            started.append(stack.enter_context(process))
        statuses = [process.wait() for process in started]
        for status, file in zip(statuses, files, strict=True):
            if status:
                file.seek(0)
                last = (file.read().strip().splitlines() or [f"status {status}"])[-1]
                raise ConfigError(f"the run in the layout {layout} failed: {last}")
    lines = [line for line in read_lines(workdir / "metrics.jsonl") if "loss" in line]
    costs = json.loads((workdir / "compile.json").read_text())
    return {
        "losses": [line["loss"] for line in lines],
        "state": max(cost["state"] for cost in costs),
        "temporary": max(cost["temporary"] for cost in costs),
    }


def table(rows: dict[Layout, dict]) -> str:
    """The rows as text; the first is what the others are compared with."""
    first = next(iter(rows.values()))
    lines = [
        f"{'processes':>9}{'devices':>9}{'mesh':>8}{'last loss':>12}{'difference':>12}"
        f"{'state MiB':>11}{'share':>7}{'temp MiB':>10}{'share':>7}"
    ]
    for layout, row in rows.items():
        lines.append(
            f"{layout.processes:>9}{layout.processes * layout.devices:>9}"
            f"{'x'.join(map(str, layout.mesh)):>8}{row['losses'][-1]:>12.6f}"
            f"{row['difference']:>12.1e}{row['state'] / MIB:>11.2f}"
            f"{row['state'] / first['state']:>7.3f}{row['temporary'] / MIB:>10.2f}"
            f"{row['temporary'] / first['temporary']:>7.3f}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs `stretchysnake bench mesh`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake bench mesh",
        description="Trains a few steps in several layouts of virtual CPU devices and processes, "
        "and compares losses (largest relative difference over all steps) and memory of a device, "
        "by XLA's analysis, with the first layout. mesh: data x fsdp x sequence. The exit status "
        f"is 1 if losses differ by more than {TOLERANCE:g}.",
        epilog="Everything else goes to 'stretchysnake train', such as --config.train.steps=10.",
    )
    parser.add_argument("--config", default="configs/stick_actions.py:debug", metavar="FILE[:ARG]")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args, words = parser.parse_known_args(argv)
    layouts = [parse(text) for text in args.layouts.split(",")]
    words = ["--config", args.config, "--config.train.log_every=1", *words]
    progress, rows = Progress(every=0.0), {}
    with tempfile.TemporaryDirectory(prefix="stretchysnake-mesh-") as folder:
        for number, layout in enumerate(layouts):
            progress.show(f"layout {number + 1}/{len(layouts)}: {layout}")
            rows[layout] = row = run(layout, words, pathlib.Path(folder) / str(number))
            wanted = next(iter(rows.values()))["losses"]
            pairs = zip(row["losses"], wanted, strict=True)
            row["difference"] = max(abs(a / b - 1) for a, b in pairs)
    progress.close()
    print(table(rows))
    if args.json:
        found = [{"layout": str(layout), **row} for layout, row in rows.items()]
        pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return int(any(row["difference"] > TOLERANCE for row in rows.values()))
