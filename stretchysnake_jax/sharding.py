"""The mesh of devices, and the rules that say which axis of which array is spread over it.

Axes of the mesh: `data` and `fsdp` share out the clips of a batch, `sequence` the tokens of a clip,
and over `fsdp` parameters and optimizer state are cut up as well (fully sharded data parallelism:
XLA gathers a layer's parameters where the layer runs). Everything else is a whole copy on every
device.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stretchysnake_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "sequence")
BATCH = PartitionSpec(("data", "fsdp"))  # of arrays whose first axis is clips
TOKENS = PartitionSpec(("data", "fsdp"), "sequence")  # (batch, length, ...)
WHOLE = PartitionSpec()


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Lays the devices out.

    Args:
      config: the sizes of the axes.
      devices: all of them; None: those of every process of the job.

    Raises:
      ConfigError: the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = config.fsdp * config.sequence
    data = config.data or max(1, len(devices) // others)
    shape = (data, config.fsdp, config.sequence)
    if math.prod(shape) != len(devices):
        product = " x ".join(map(str, shape))
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.sequence is {product} = {math.prod(shape)}: it takes "
            f"all {len(devices)} devices; with mesh.data = 0, mesh.fsdp x mesh.sequence ({others}) "
            "has to divide their number"
        )
    # Devices come process by process: neighbours, which talk most, end up on the last axes.
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def of_parameter(path, shape: tuple[int, ...], shards: int) -> PartitionSpec:
    """How a parameter, or what the optimizer keeps for it, is cut up over `fsdp`.

    Along its longest axis that `shards` divides, the last of equals; the axis that stacks the
    layers stays whole, since layers run one after the other. An array without such an axis is
    copied.

    Args:
      path: in the state, as `jax.tree.map_with_path` gives it.
      shape: of the array.
      shards: size of the mesh axis.
    """
    names = [getattr(key, "key", None) for key in path]
    first = 1 if "layers" in names else 0
    fit = [axis for axis in range(first, len(shape)) if shape[axis] % shards == 0]
    if shards == 1 or not fit:
        return WHOLE
    axis = max(fit, key=lambda i: (shape[i], i))
    return PartitionSpec(*[None] * axis, "fsdp")


def of_state(mesh: Mesh, state):
    """The shardings of a training state (abstract will do), in its structure."""
    shards = mesh.shape["fsdp"]
    return jax.tree.map_with_path(
        lambda path, x: NamedSharding(mesh, of_parameter(path, x.shape, shards)), state
    )


def host_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process has to read: (index, number of parts).

    Processes that share the tokens of the same clips read the same part.

    Raises:
      ConfigError: a process would need clips from two places of the batch.
    """
    shards = batch_shards(mesh)
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((shards,)).values()
    rows = sorted({range(shards)[where[0]].start for where in places})
    if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise ConfigError(
            f"the devices of process {jax.process_index()} hold the parts {rows} of a batch, which "
            "aren't one stretch of it: choose a mesh.sequence that divides, or is a multiple of, "
            "the devices of a process"
        )
    return rows[0] // len(rows), shards // len(rows)


def place(mesh: Mesh, batch):
    """Puts this process's part of a batch onto its devices.

    Args:
      mesh: the mesh.
      batch: a pytree of arrays, clips first.

    Returns:
      The same as arrays of the whole batch, spread over the mesh.
    """
    sharding = NamedSharding(mesh, BATCH)
    _, parts = host_share(mesh)

    def put(x):
        return jax.make_array_from_process_local_data(sharding, x, (len(x) * parts, *x.shape[1:]))

    return jax.tree.map(put, batch)


def gather(mesh: Mesh | None, batch):
    """The whole of arrays of which each process has a part, as numpy; without a mesh as they are.

    Args:
      mesh: the mesh.
      batch: a pytree of arrays, clips first: this process's part.
    """
    if mesh is None:
        return batch
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, WHOLE))(place(mesh, batch))
    return jax.tree.map(np.asarray, whole)
