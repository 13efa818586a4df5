"""How a PyTorch state dict of VideoMamba and our parameters correspond, every key accounted for.

`_TOP` and `_LAYER` are the whole correspondence: both directions, the inferred sizes and the check
of every key follow from them.
"""

import collections
import math
import re

import numpy as np

from stretchysnake_jax.config import ModelConfig
from stretchysnake_jax.torch_file import CheckpointError

# (name in torch, path in our tree, axes in torch, axes in ours), in the order of torch's file.
# C, C1: dim, d: inner width, n: states, w: taps, r: rank, k: tubelet, ph pw: patch, T: tokens in
# time, h: hidden width.
_TOP = (
    ("cls_token", "cls_token", "1 1 C", "C"),
    ("pos_embed", "pos_embed", "1 rows C", "rows C"),  # row 0 is the class token's
    ("temporal_pos_embedding", "temporal_pos_embed", "1 T C", "T C"),
    ("patch_embed.proj.weight", "patch_embed.kernel", "C 3 k ph pw", "k ph pw 3 C"),
    ("patch_embed.proj.bias", "patch_embed.bias", "C", "C"),
    ("head.weight", "head.kernel", "classes C", "C classes"),
    ("head.bias", "head.bias", "classes", "classes"),
    ("norm_f.weight", "norm.scale", "C", "C"),
)
# The same of block i, below "layers.i." and "layers.".
_LAYER = (
    ("mixer.A_log", "mixer.forward.A_log", "d n", "d n"),
    ("mixer.D", "mixer.forward.D", "d", "d"),
    ("mixer.A_b_log", "mixer.backward.A_log", "d n", "d n"),
    ("mixer.D_b", "mixer.backward.D", "d", "d"),
    ("mixer.in_proj.weight", "mixer.in_proj.kernel", "2d C", "C 2d"),
    ("mixer.conv1d.weight", "mixer.forward.conv.kernel", "d 1 w", "w d"),
    ("mixer.conv1d.bias", "mixer.forward.conv.bias", "d", "d"),
    ("mixer.x_proj.weight", "mixer.forward.x_proj.kernel", "r+2n d", "d r+2n"),
    ("mixer.dt_proj.weight", "mixer.forward.dt_proj.kernel", "d r", "r d"),
    ("mixer.dt_proj.bias", "mixer.forward.dt_proj.bias", "d", "d"),
    ("mixer.conv1d_b.weight", "mixer.backward.conv.kernel", "d 1 w", "w d"),
    ("mixer.conv1d_b.bias", "mixer.backward.conv.bias", "d", "d"),
    ("mixer.x_proj_b.weight", "mixer.backward.x_proj.kernel", "r+2n d", "d r+2n"),
    ("mixer.dt_proj_b.weight", "mixer.backward.dt_proj.kernel", "d r", "r d"),
    ("mixer.dt_proj_b.bias", "mixer.backward.dt_proj.bias", "d", "d"),
    ("mixer.out_proj.weight", "mixer.out_proj.kernel", "C d", "d C"),
    ("norm.weight", "norm.scale", "C", "C"),
)
# The same of attention blocks, under timm's names. No PyTorch model has them below our tokens, so
# they serve files of our own alone.
_VIT_LAYER = (
    ("norm1.weight", "norm1.scale", "C", "C"),
    ("norm1.bias", "norm1.bias", "C", "C"),
    ("attn.qkv.weight", "attn.qkv.kernel", "3C C", "C 3C"),
    ("attn.qkv.bias", "attn.qkv.bias", "3C", "3C"),
    ("attn.proj.weight", "attn.proj.kernel", "C1 C", "C C1"),
    ("attn.proj.bias", "attn.proj.bias", "C", "C"),
    ("norm2.weight", "norm2.scale", "C", "C"),
    ("norm2.bias", "norm2.bias", "C", "C"),
    ("mlp.fc1.weight", "mlp.fc1.kernel", "h C", "C h"),
    ("mlp.fc1.bias", "mlp.fc1.bias", "h", "h"),
    ("mlp.fc2.weight", "mlp.fc2.kernel", "C h", "h C"),
    ("mlp.fc2.bias", "mlp.fc2.bias", "C", "C"),
)
_LAYERS = {"mamba": _LAYER, "attention": _VIT_LAYER}


def _top(video: bool):
    """The rows of `_TOP` for a video or an image model."""
    if video:
        return _TOP
    rows = [row for row in _TOP if row[0] != "temporal_pos_embedding"]
    # An image kernel has no axis of time; ours has one of a single frame.
    return [(n, p, t.replace(" k", ""), o.replace("k ", "1 ")) for n, p, t, o in rows]


def _rows(depth: int, video: bool, blocks: str = "mamba"):
    """(name, path, layer or None, torch's axes, our axes) of every tensor, in torch's order."""
    top = [(name, path, None, *axes) for name, path, *axes in _top(video)]
    layers = [
        (f"layers.{i}.{name}", f"layers.{path}", i, *axes)
        for i in range(depth)
        for name, path, *axes in _LAYERS[blocks]
    ]
    return [*top[:-1], *layers, top[-1]]


def _move(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Permutes axes from `source` to `target`, such as "d 1 w" to "w d"; "1" comes and goes."""
    source, target = source.split(), target.split()
    array = array.squeeze(tuple(i for i, name in enumerate(source) if name == "1"))
    source = [name for name in source if name != "1"]
    array = array.transpose([source.index(name) for name in target if name != "1"])
    return np.expand_dims(array, tuple(i for i, name in enumerate(target) if name == "1"))


def _dims(config: ModelConfig) -> dict[str, int]:
    """The size of every axis that the tables name."""
    return {
        "1": 1,
        "3": 3,
        "C": config.dim,
        "C1": config.dim,
        "3C": 3 * config.dim,
        "h": config.hidden,
        "d": config.inner,
        "2d": 2 * config.inner,
        "n": config.state,
        "w": config.conv_width,
        "r": config.rank,
        "r+2n": config.rank + 2 * config.state,
        "k": config.tubelet,
        "ph": config.patch[0],
        "pw": config.patch[1],
        "rows": 1 + math.prod(config.grid),
        "T": (config.frames or 0) // config.tubelet,
        "classes": config.num_classes,
    }


def _shape(axes: str, dims: dict[str, int]) -> tuple[int, ...]:
    return tuple(dims[name] for name in axes.split())


def nest(flat: dict) -> dict:
    """The nested dict of a flat one with dotted names."""
    tree = {}
    for path, value in flat.items():
        *folders, name = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def flatten(tree: dict, prefix: str = "") -> dict:
    """The inverse of `nest`."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def param_shapes(config: ModelConfig) -> dict:
    """The shapes of the parameters of `config`, as the nested dict that the parameters are."""
    dims, flat = _dims(config), {}
    for _, path, layer, _, axes in _rows(1, config.frames is not None, config.blocks):
        stacked = () if layer is None else (config.depth,)
        flat[path] = stacked + _shape(axes, dims)
    del flat["pos_embed"]
    flat |= {"pos_embed.cls": (config.dim,), "pos_embed.grid": (*config.grid, config.dim)}
    return nest(flat)


def check(kind: str, shapes: dict, found: dict, allow_unused: bool = False) -> None:
    """Raises CheckpointError that names every missing, unused and mis-shaped key.

    Args:
      kind: what the keys are of, for the message.
      shapes: key -> expected shape.
      found: key -> array.
      allow_unused: unused keys are fine.
    """
    problems = [f"{key} is missing" for key in shapes if key not in found]
    if not allow_unused:
        problems += [f"{key} is unused" for key in found if key not in shapes]
    for key in shapes.keys() & found.keys():
        array = found[key]
        if not isinstance(array, np.ndarray) or array.dtype.kind in "bcOSUM":
            problems.append(f"{key} is no tensor of real numbers")
        elif array.shape != shapes[key]:
            problems.append(f"{key} is {array.shape}, not {shapes[key]}")
    if problems:
        raise CheckpointError(f"{kind}: {'; '.join(sorted(problems))}")


def infer(state: dict, size: tuple[int, int] | None) -> ModelConfig:
    """The configuration whose tensors have the shapes of `state`.

    Every tensor votes for the axes it has, so that one bad tensor is told apart from the rest.

    Args:
      state: PyTorch's names -> arrays.
      size: (height, width) of the input in pixels; None: square.

    Raises:
      CheckpointError: tensors from which a size follows are missing.
    """
    numbers = {int(m[1]) for key in state if (m := re.match(r"layers\.(\d{1,4})\.", key))}
    depth = max(numbers, default=0) + 1
    video = "temporal_pos_embedding" in state or np.ndim(state.get("patch_embed.proj.weight")) == 5
    votes = collections.defaultdict(collections.Counter)
    for name, _, _, axes, _ in _rows(depth, video):
        shape, axes = np.shape(state.get(name)), axes.split()
        if len(shape) == len(axes):
            for axis, length in zip(axes, shape, strict=True):
                votes[axis][length] += 1
    dims = {axis: counter.most_common(1)[0][0] for axis, counter in votes.items()}
    needed = {axis for *_, axes, _ in _rows(1, video) for axis in axes.split()}
    if needed - set(dims):
        missing = [name for name, *_ in _rows(depth, video) if name not in state]
        raise CheckpointError(
            f"its sizes can't be told: {', '.join(missing) or 'the tensors'} "
            f"{'are missing' if missing else 'have too few or too many axes'}"
        )
    if min(dims.values()) < 1:
        raise CheckpointError("it has tensors of size 0")
    if dims["d"] % dims["C"]:
        raise CheckpointError(
            f"the inner width, {dims['d']}, is no multiple of the width, {dims['C']}"
        )
    config = ModelConfig(
        dim=dims["C"],
        depth=depth,
        state=dims["n"],
        expand=dims["d"] // dims["C"],
        conv_width=dims["w"],
        dt_rank=None if dims["r"] == -(-dims["C"] // 16) else dims["r"],
        patch=(dims["ph"], dims["pw"]),
        tubelet=dims.get("k", 1),
        frames=dims["T"] * dims["k"] if video else None,
        num_classes=dims["classes"],
    )
    config.size = _find_size(dims["rows"] - 1, config.patch, size)
    return config


def _find_size(count: int, patch: tuple[int, int], size) -> tuple[int, int]:
    """The input size in pixels for a spatial table of `count` patches.

    Unless given it is square, or where no square has so many patches, the landscape rectangle
    nearest to one: 6 patches are 2x3. A file doesn't say; `from_state_dict` reports the guess.
    """
    if size is None:
        rows = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
        return rows * patch[0], count // rows * patch[1]
    exact = size[0] % patch[0] == size[1] % patch[1] == 0
    if not exact or size[0] // patch[0] * (size[1] // patch[1]) != count:
        raise CheckpointError(
            f"--size {size[0]},{size[1]} doesn't fit: pos_embed has {count} rows beside the class "
            f"token's, for patches of {patch[0]}x{patch[1]} pixels"
        )
    return tuple(size)


def inflate_kernel(kernel: np.ndarray, tubelet: int, how: str = "center") -> np.ndarray:
    """An image's patch kernel for videos.

    Args:
      kernel: (1, ph, pw, 3, C).
      tubelet: frames per token.
      how: "center": on the frame tubelet // 2, zero elsewhere; "mean": on every frame, / tubelet.

    Returns:
      (tubelet, ph, pw, 3, C).
    """
    if how not in ("center", "mean"):
        raise CheckpointError(f"inflate is {how!r}: it takes center or mean")
    if how == "mean":
        return np.repeat(kernel / tubelet, tubelet, axis=0)
    made = np.zeros((tubelet, *kernel.shape[1:]), kernel.dtype)
    made[tubelet // 2] = kernel[0]
    return made


def key_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """PyTorch's names and shapes for `config`, in PyTorch's order."""
    rows, dims = _rows(config.depth, config.frames is not None, config.blocks), _dims(config)
    return {name: _shape(axes, dims) for name, _, _, axes, _ in rows}


def to_params(config: ModelConfig, state: dict) -> dict:
    """PyTorch's tensors, of the shapes of `key_shapes`, as nested dicts of float32 arrays."""
    flat, layers = {}, collections.defaultdict(list)
    rows = _rows(config.depth, config.frames is not None, config.blocks)
    for name, path, layer, source, target in rows:
        array = _move(np.asarray(state[name], np.float32), source, target)
        if layer is None:
            flat[path] = np.array(array, order="C")  # a copy: the file's array is read-only
        else:
            layers[path].append(array)
    flat |= {path: np.stack(arrays) for path, arrays in layers.items()}
    table = flat.pop("pos_embed")
    flat["pos_embed.cls"], grid = table[0].copy(), table[1:].copy()
    flat["pos_embed.grid"] = grid.reshape(*config.grid, config.dim)
    return nest(flat)


def to_state_dict(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: PyTorch's names, shapes and order.

    Raises:
      CheckpointError: params that aren't of `config`, each by name.
    """
    flat = {path: np.asarray(array) for path, array in flatten(params).items()}
    check("the parameters don't fit the configuration", flatten(param_shapes(config)), flat)
    grid = flat["pos_embed.grid"].reshape(-1, config.dim)
    flat["pos_embed"] = np.concatenate([flat["pos_embed.cls"][None], grid])
    state = {}
    rows = _rows(config.depth, config.frames is not None, config.blocks)
    for name, path, layer, target, source in rows:
        array = flat[path] if layer is None else flat[path][layer]
        state[name] = np.ascontiguousarray(_move(array, source, target))
    return state
