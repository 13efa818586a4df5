"""Interpolation against PyTorch's numbers, and its invariances in float64."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stretchysnake_jax import interpolation, models
from stretchysnake_jax.config import METHODS

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_position_tables_equal_pytorch():
    golden = np.load(GOLDENS / "pos_interp.npz")
    worst = 0.0
    for k in range(13):
        pos, wanted = golden[f"k{k}_pos_in"][0], golden[f"k{k}_pos_out"][0]
        side, target = (round((len(t) - 1) ** 0.5) for t in (pos, wanted))
        out = interpolation.resize_spatial(
            jnp.asarray(pos[1:].reshape(side, side, -1)), (target, target)
        )
        np.testing.assert_array_equal(pos[0], wanted[0])  # the class token's row stays
        worst = max(worst, np.abs(out.reshape(target**2, -1) - wanted[1:]).max())
        time, wanted = golden[f"k{k}_tpos_in"][0], golden[f"k{k}_tpos_out"][0]
        out = interpolation.resize_temporal(jnp.asarray(time), len(wanted))
        worst = max(worst, np.abs(out - wanted).max())
    assert worst < 1e-5


def test_raw_resizes_equal_pytorch_on_rectangles():
    golden = np.load(GOLDENS / "resize_kernels.npz")
    for k in range(8):
        x = golden[f"r{k}_in"][0].astype(np.float64)
        wanted = golden[f"r{k}_bicubic"][0]
        rows, columns = (
            interpolation.bicubic_torch(a, b)
            for a, b in zip(x.shape[1:], wanted.shape[1:], strict=True)
        )
        np.testing.assert_allclose(rows @ x @ columns.T, wanted, atol=1e-5)
        wanted = golden[f"r{k}_bilinear"][0]
        rows, columns = (
            interpolation.linear_torch(a, b)
            for a, b in zip(x.shape[1:], wanted.shape[1:], strict=True)
        )
        np.testing.assert_allclose(rows @ x @ columns.T, wanted, atol=1e-5)
    for k in range(6):
        x, wanted = golden[f"t{k}_in"][0], golden[f"t{k}_linear"][0]
        matrix = interpolation.linear_torch(x.shape[1], wanted.shape[1])
        np.testing.assert_allclose(x @ matrix.T, wanted, atol=1e-5)


@pytest.mark.parametrize("target", [3, 7, 9, 14, 20, 28, 32])
def test_the_antialiased_methods_equal_jax_image(x64, target):
    eye = np.eye(16)
    pairs = [
        (interpolation.bicubic_antialias, "cubic"),
        (interpolation.bilinear, "linear"),
        (interpolation.lanczos, "lanczos3"),
    ]
    for ours, theirs in pairs:
        wanted = jax.image.resize(eye, (target, 16), theirs, antialias=True)
        np.testing.assert_allclose(ours(16, target), wanted, atol=1e-13)
    wanted = jax.image.resize(eye, (target, 16), "nearest")
    np.testing.assert_array_equal(interpolation.nearest(16, target), wanted)


@pytest.mark.parametrize("weight", ["kernel", "spatial", "temporal"])
@pytest.mark.parametrize("method", METHODS)
def test_equal_sizes_are_the_identity(weight, method):
    for n in (1, 2, 16):
        np.testing.assert_array_equal(interpolation.resize_matrix(weight, method, n, n), np.eye(n))


@pytest.mark.parametrize("patch", [(16, 16), (20, 32), (28, 17), (48, 48)])
def test_pi_resize_upwards_keeps_every_token(x64, patch):
    # <B x, R w> = <x, w> for every patch x, not only smooth ones (FlexiViT, section 3.4).
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 16, 16))
    kernel = jnp.asarray(w[None, :, :, None, None])
    resized = interpolation.resize_kernel(kernel, patch, "pi")[0, :, :, 0, 0]
    rows, columns = (interpolation.bicubic_antialias(16, p) for p in patch)
    assert np.sum((rows @ x @ columns.T) * resized) == pytest.approx(np.sum(x * w), abs=1e-10)


@pytest.mark.parametrize("target", [5, 8, 15])
def test_pi_resize_downwards_is_the_least_squares_solution(x64, target):
    # Against a plain least-squares solver on the full two-dimensional operator.
    rng = np.random.default_rng(1)
    w = rng.normal(size=(16, 16))
    one = interpolation.bicubic_antialias(16, target)
    full = np.kron(one, one)  # (target**2, 16**2)
    wanted = np.linalg.lstsq(full.T, w.reshape(-1), rcond=None)[0]
    ours = interpolation.resize_kernel(
        jnp.asarray(w[None, :, :, None, None]), (target, target), "pi"
    )
    np.testing.assert_allclose(np.ravel(ours), wanted, atol=1e-9)


def test_area_keeps_the_size_of_tokens_where_plain_bicubic_does_not():
    # Tokens of a flat patch: the sum of the kernel times the grey level.
    kernel = jnp.ones((1, 16, 16, 3, 1))
    for p in (7, 28):
        gained, plain = (
            np.asarray(interpolation.resize_kernel(kernel, (p, p), method), np.float64).sum()
            for method in ("area", "paper")
        )
        assert gained == pytest.approx(kernel.size, rel=1e-5)
        assert plain == pytest.approx(kernel.size * (p / 16) ** 2, rel=1e-5)


def test_none_cuts_and_pads():
    table = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(interpolation.resize_temporal(table, 2, "none"), table[:2])
    longer = interpolation.resize_temporal(table, 4, "none")
    np.testing.assert_array_equal(longer, jnp.concatenate([table, jnp.zeros((1, 2))]))


def test_unknown_names_and_lengths_are_refused():
    with pytest.raises(ValueError, match="unknown interpolation method 'bicubic'.*paper"):
        interpolation.resize_matrix("kernel", "bicubic", 4, 8)
    with pytest.raises(ValueError, match="unknown weight 'head'"):
        interpolation.resize_matrix("head", "pi", 4, 8)
    with pytest.raises(ValueError, match="must be at least 1"):
        interpolation.resize_matrix("kernel", "pi", 4, 0)


@pytest.fixture(scope="module")
def micro():
    config = models.preset("micro", frames=4, num_classes=5, tubelet=2)
    return config, models.init(config, jax.random.key(0))[1]


@pytest.mark.parametrize("method", METHODS)
def test_interpolate_fits_rectangles_under_jit_and_passes_gradients(micro, method):
    _, params = micro
    scale = {"frames": 6, "grid": (5, 9), "patch": (6, 11)}
    methods = dict.fromkeys(("kernel", "spatial", "temporal"), method)

    @jax.jit
    def fit(params):
        return interpolation.interpolate(params, **scale, **methods)

    out = fit(params)
    assert out["patch_embed"]["kernel"].shape == (2, 6, 11, 3, 64)
    assert out["pos_embed"]["grid"].shape == (5, 9, 64)
    assert out["temporal_pos_embed"].shape == (3, 64)
    assert out["layers"] is not None and out["head"]["kernel"].shape == (64, 5)
    grads = jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(fit(p))))(params)
    assert np.abs(grads["patch_embed"]["kernel"]).max() > 0
    assert np.abs(grads["pos_embed"]["grid"]).max() > 0
    assert np.abs(grads["temporal_pos_embed"]).max() > 0


def test_interpolate_to_the_own_scale_returns_the_parameters(micro):
    config, params = micro
    out = interpolation.interpolate(params, frames=4, grid=config.grid, patch=config.patch)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, out, params))
    with pytest.raises(ValueError, match="5 frames don't divide into tubelets of 2"):
        interpolation.interpolate(params, frames=5, grid=(7, 7), patch=(8, 8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("patch", [(4, 4), (16, 8), (9, 13)])
def test_projected_pixels_give_the_tokens_of_the_resized_kernel(x64, method, patch):
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.normal(size=(1, 8, 8, 3, 6)))
    video = jnp.asarray(rng.normal(size=(2, 3, 2 * patch[0] + 1, 3 * patch[1] + 2, 3)))

    def tokens(video, kernel):
        p = kernel.shape[1:3]
        rows, columns = video.shape[2] // p[0], video.shape[3] // p[1]
        x = video[:, :, : rows * p[0], : columns * p[1]]
        x = x.reshape(2, 3, rows, p[0], columns, p[1], 3)
        return jnp.einsum("btrhcwk,hwkd->btrcd", x, kernel[0])

    def by_kernel(kernel):
        return tokens(video, interpolation.resize_kernel(kernel, patch, method))

    def by_pixels(kernel):
        return tokens(interpolation.project_pixels(video, patch, (8, 8), method), kernel)

    np.testing.assert_allclose(by_pixels(kernel), by_kernel(kernel), atol=1e-12)
    gradients = [
        jax.grad(lambda k, f=f: jnp.sum(f(k) ** 3))(kernel) for f in (by_kernel, by_pixels)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-9, rtol=1e-10)
