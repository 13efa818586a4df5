"""Weight interpolation: fits the patch kernel and the position tables to another scale.

Pure functions on the parameter pytree, linear in the parameters, so gradients reach the base
parameters. Every method is one matrix per axis, (target, base), built once in float64 from the
formulas below; the resize is a product with it. At equal sizes the parameters come back untouched.

Parameters that are read here (and no others):
  patch_embed.kernel  (tubelet, height, width, 3, dim)
  pos_embed.grid      (rows, columns, dim)
  temporal_pos_embed  (frames // tubelet, dim), absent for image models
"""

import functools

import jax.numpy as jnp
import numpy as np


def cubic(x, a):
    """The cubic convolution kernel of Keys (1981), support 2, with parameter `a`."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def triangle(x):
    """Linear interpolation's kernel, support 1."""
    return np.maximum(0.0, 1.0 - np.abs(x))


def lanczos3(x):
    """sinc(x) sinc(x / 3), support 3."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def sample(base: int, target: int, weight, antialias: bool, border: str) -> np.ndarray:
    """A 1-D resize with half-pixel centres (align_corners=False) as a matrix.

    Args:
      base, target: lengths before and after.
      weight: the kernel, a function of the distance in samples.
      antialias: stretch the kernel by base / target when shrinking.
      border: what becomes of the weights that fall outside: "clamp" gives them to the edge sample,
        "renormalise" drops them and scales the others to sum 1.

    Returns:
      float64 (target, base); every row sums to 1.
    """
    scale = max(1.0, base / target) if antialias else 1.0
    centre = (np.arange(target) + 0.5) * base / target - 0.5
    margin = int(np.ceil(4 * scale)) + 1
    index = np.arange(-margin, base + margin)
    full = weight((centre[:, None] - index[None]) / scale)
    matrix = full[:, margin : margin + base].copy()
    if border == "clamp":
        matrix[:, 0] += full[:, :margin].sum(1)
        matrix[:, -1] += full[:, margin + base :].sum(1)
    return matrix / matrix.sum(1, keepdims=True)


def bicubic_antialias(base: int, target: int) -> np.ndarray:
    """PyTorch's bicubic with antialias=True: Keys a = -0.5, borders renormalised."""
    return sample(base, target, lambda x: cubic(x, -0.5), True, "renormalise")


def bicubic_torch(base: int, target: int) -> np.ndarray:
    """PyTorch's bicubic with antialias=False: Keys a = -0.75, borders clamped."""
    return sample(base, target, lambda x: cubic(x, -0.75), False, "clamp")


def linear_torch(base: int, target: int) -> np.ndarray:
    """PyTorch's (bi)linear with antialias=False: borders clamped."""
    return sample(base, target, triangle, False, "clamp")


def pseudo_inverse(base: int, target: int) -> np.ndarray:
    """PI-resize (FlexiViT, arXiv 2212.08013): (B^T)^+ for the pixel resize B, bicubic with
    antialias.

    For an enlarged kernel <B x, R w> = <x, w> for every patch of pixels x; for a shrunk one it is
    the least squares solution for white x. The pseudo-inverse of a product of axes is the product
    of the pseudo-inverses, so one matrix per axis is exact.
    """
    return np.linalg.pinv(bicubic_antialias(base, target).T)


def area_gained(base: int, target: int) -> np.ndarray:
    """`bicubic_antialias` times base / target on each axis.

    A token sums over target**2 products instead of base**2; the gain keeps its size.
    """
    return bicubic_antialias(base, target) * (base / target)


def bilinear(base: int, target: int) -> np.ndarray:
    """Linear with antialias, borders renormalised."""
    return sample(base, target, triangle, True, "renormalise")


def nearest(base: int, target: int) -> np.ndarray:
    """Each target sample copies the base sample that its centre falls into."""
    index = np.floor((np.arange(target) + 0.5) * base / target).astype(int)
    return np.eye(base)[np.clip(index, 0, base - 1)]


def lanczos(base: int, target: int) -> np.ndarray:
    """Lanczos-3 with antialias, borders renormalised."""
    return sample(base, target, lanczos3, True, "renormalise")


def none(base: int, target: int) -> np.ndarray:
    """No interpolation: the first samples as they are, zeros where there are no more."""
    return np.eye(target, base)


SHARED = {
    "pi": pseudo_inverse,
    "area": area_gained,
    "bilinear": bilinear,
    "nearest": nearest,
    "lanczos3": lanczos,
    "none": none,
}
# What "paper" means depends on the weight (the release: bicubic with antialias for the kernel,
# without for the spatial table, linear for the temporal table).
METHODS = {
    "kernel": {"paper": bicubic_antialias, **SHARED},
    "spatial": {"paper": bicubic_torch, **SHARED},
    "temporal": {"paper": linear_torch, **SHARED},
}


@functools.lru_cache(maxsize=512)
def resize_matrix(weight: str, method: str, base: int, target: int) -> np.ndarray:
    """The matrix that resizes one axis of a weight.

    Args:
      weight: "kernel", "spatial" or "temporal".
      method: a name in METHODS[weight].
      base, target: lengths before and after, both >= 1.

    Returns:
      float64 (target, base); the identity if the lengths are equal.

    Raises:
      ValueError: an unknown weight or method, or a length below 1.
    """
    if weight not in METHODS:
        raise ValueError(f"unknown weight {weight!r}: it takes {', '.join(METHODS)}")
    if method not in METHODS[weight]:
        known = ", ".join(METHODS[weight])
        raise ValueError(f"unknown interpolation method {method!r} for {weight}: it takes {known}")
    if base < 1 or target < 1:
        raise ValueError(f"can't resize length {base} to {target}: both must be at least 1")
    if base == target:
        return np.eye(base)
    return METHODS[weight][method](base, target)


def _resize(x, weight: str, method: str, axis: int, target: int):
    if x.shape[axis] == target:
        return x
    matrix = jnp.asarray(resize_matrix(weight, method, x.shape[axis], target), x.dtype)
    return jnp.moveaxis(jnp.tensordot(matrix, x, axes=(1, axis), precision="highest"), 0, axis)


def resize_kernel(kernel, patch: tuple[int, int], method: str = "paper"):
    """Resizes a patch kernel (tubelet, height, width, 3, dim) to patches of `patch` pixels."""
    kernel = _resize(kernel, "kernel", method, 1, patch[0])
    return _resize(kernel, "kernel", method, 2, patch[1])


def project_pixels(video, patch: tuple[int, int], base: tuple[int, int], method: str = "paper"):
    """The adjoint of `resize_kernel`, applied to the video instead of the kernel.

    Resizing a kernel w is linear, so <x, R w> = <R^T x, w> for every patch of pixels x: tokens of
    the projected video under the base kernel equal those of the video under the resized kernel. The
    encoder then sees one patch size whatever the resolution, and compiles for it once.

    Args:
      video: (batch, frames, height, width, 3), normalised; what fills no whole patch is dropped.
      patch: (height, width) of a patch of the video, pixels.
      base: (height, width) of the base kernel.
      method: of the kernel's interpolation.

    Returns:
      (batch, frames, rows * base height, columns * base width, 3).
    """
    b, t, h, w, c = video.shape
    rows, columns = h // patch[0], w // patch[1]
    x = video[:, :, : rows * patch[0], : columns * patch[1]]
    if tuple(patch) == tuple(base):
        return x
    x = x.reshape(b, t, rows, patch[0], columns, patch[1], c)
    for axis, length, target in ((3, patch[0], base[0]), (5, patch[1], base[1])):
        if length != target:
            matrix = jnp.asarray(resize_matrix("kernel", method, target, length).T, x.dtype)
            x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision="highest"), 0, axis)
    return x.reshape(b, t, rows * base[0], columns * base[1], c)


def pad_patches(video: np.ndarray, patch: tuple[int, int], room: tuple[int, int]) -> np.ndarray:
    """Moves every patch of a video into a larger cell, top left, with zeros around it.

    Videos of many sizes so become arrays of one shape, which one compiled function takes; see
    `padded_projection`.

    Args:
      video: (batch, frames, height, width, 3); what fills no whole patch is dropped.
      patch: (height, width) of a patch, pixels.
      room: (height, width) of a cell, at least as large.

    Returns:
      (batch, frames, rows * room height, columns * room width, 3), the video's dtype.
    """
    b, t, h, w, c = video.shape
    rows, columns = h // patch[0], w // patch[1]
    video = video[:, :, : rows * patch[0], : columns * patch[1]]
    padded = np.zeros((b, t, rows, room[0], columns, room[1], c), video.dtype)
    cells = video.reshape(b, t, rows, patch[0], columns, patch[1], c)
    padded[:, :, :, : patch[0], :, : patch[1]] = cells
    return padded.reshape(b, t, rows * room[0], columns * room[1], c)


def padded_projection(
    patch: tuple[int, int], base: tuple[int, int], room: tuple[int, int], method: str = "paper"
) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of `project_pixels` for patches that `pad_patches` has put into cells.

    Args:
      patch, base, method: as of `project_pixels`.
      room: (height, width) of a cell.

    Returns:
      For the height and the width: float32 (base, room), zero where a cell holds no patch.
    """
    matrices = []
    for length, target, cell in zip(patch, base, room, strict=True):
        matrix = resize_matrix("kernel", method, target, length).T
        matrices.append(np.pad(matrix, ((0, 0), (0, cell - length))).astype(np.float32))
    return tuple(matrices)


def project_cells(video, matrices):
    """`project_pixels` with matrices that are arguments, hence the same program for any of them.

    Args:
      video: float (batch, frames, rows * room height, columns * room width, 3), of `pad_patches`.
      matrices: of `padded_projection`.

    Returns:
      (batch, frames, rows * base height, columns * base width, 3).
    """
    high, wide = matrices
    b, t, h, w, c = video.shape
    rows, columns = h // high.shape[1], w // wide.shape[1]
    x = video.reshape(b, t, rows, high.shape[1], columns, wide.shape[1], c)
    x = jnp.einsum("ik,btrkcld,jl->btricjd", high, x, wide, precision="highest")
    return x.reshape(b, t, rows * high.shape[0], columns * wide.shape[0], c)


def resize_spatial(table, grid: tuple[int, int], method: str = "paper"):
    """Resizes a spatial table (rows, columns, dim) to `grid`; the class token's row isn't in it."""
    return _resize(_resize(table, "spatial", method, 0, grid[0]), "spatial", method, 1, grid[1])


def resize_temporal(table, length: int, method: str = "paper"):
    """Resizes a temporal table (length, dim)."""
    return _resize(table, "temporal", method, 0, length)


def interpolate(
    params: dict,
    *,
    frames: int,
    grid: tuple[int, int],
    patch: tuple[int, int],
    kernel: str = "paper",
    spatial: str = "paper",
    temporal: str = "paper",
) -> dict:
    """Fits the parameters of an encoder to a scale; everything else is passed through.

    Args:
      params: the parameter pytree, nested dicts; not changed.
      frames: frames of a clip.
      grid: (rows, columns) of patches.
      patch: (height, width) of a patch, pixels.
      kernel, spatial, temporal: the method of each weight, a name in METHODS.

    Returns:
      A pytree of the same structure.

    Raises:
      ValueError: an unknown method, or frames that don't divide into tubelets.
    """
    tubelet = params["patch_embed"]["kernel"].shape[0]
    if frames % tubelet:
        raise ValueError(f"{frames} frames don't divide into tubelets of {tubelet}")
    fitted = dict(params)
    fitted["patch_embed"] = {
        **params["patch_embed"],
        "kernel": resize_kernel(params["patch_embed"]["kernel"], patch, kernel),
    }
    fitted["pos_embed"] = {
        **params["pos_embed"],
        "grid": resize_spatial(params["pos_embed"]["grid"], grid, spatial),
    }
    if "temporal_pos_embed" in params:
        table = params["temporal_pos_embed"]
        fitted["temporal_pos_embed"] = resize_temporal(table, frames // tubelet, temporal)
    return fitted
