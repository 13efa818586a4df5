"""Scale self-distillation: the student's view against the loader's own, the loss against a plain
computation, and where its gradients go."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stretchysnake_jax import distill
from stretchysnake_jax.data import sampling, transforms

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "given, wanted, name, indices",
    [
        (8, 2, "uniform", [0, 7]),
        (8, 2, "sparse", [1, 5]),
        (8, 4, "ssv2", [0, 2, 4, 6]),
        (8, 4, "dense", [2, 3, 4, 5]),
        (64, 8, "uniform", [0, 9, 18, 27, 36, 45, 54, 63]),
        (64, 8, "sparse", [3, 11, 19, 27, 35, 43, 51, 59]),
        (8, 3, "sparse", [1, 3, 6]),
        (4, 4, "uniform", [0, 1, 2, 3]),
        (4, 4, "sparse", [0, 1, 2, 3]),
        (4, 4, "dense", [0, 1, 2, 3]),
        (5, 1, "sparse", [2]),
    ],
)
def test_frames_lie_as_those_of_a_test_clip(given, wanted, name, indices):
    found = distill.frame_indices(given, wanted, name)
    assert found.tolist() == indices
    # In a long video the frames taken of a test clip are near those of a shorter one.
    n, stride = 10_000, 20
    long = sampling.choose(name, n, given, stride=stride)[found]
    short = sampling.choose(name, n, wanted, stride=stride)
    assert np.abs(long - short).max() <= (stride if name == "dense" else 0.51 * n / given)


@pytest.mark.parametrize("given, wanted", [(392, 98), (224, 126), (112, 56), (12, 5), (7, 7)])
def test_area_weights_share_out_every_pixel(given, wanted):
    weights = distill.area_weights(given, wanted)
    assert weights.shape == (wanted, given) and weights.min() >= 0
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(0), wanted / given, rtol=1e-5)


@pytest.mark.parametrize("height, width", [(98, 98), (28, 56), (126, 70), (14, 112)])
def test_pixels_are_averaged_as_the_loader_does_it(height, width):
    frame = RNG.integers(0, 256, (126, 112, 3), np.uint8)
    got = distill.view(jnp.asarray(frame)[None, None], 1, height, width, sampling="uniform")
    assert got.dtype == jnp.uint8 and got.shape == (1, 1, height, width, 3)
    wanted = transforms.resize(frame, height, width)
    difference = np.abs(np.asarray(got[0, 0], int) - wanted)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02  # ties are rounded apart
    exact = cv2.resize(frame.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    floats = distill.view(jnp.asarray(frame, jnp.float32)[None, None], 1, height, width, "uniform")
    np.testing.assert_allclose(floats[0, 0], exact, atol=2e-3)


def test_a_view_takes_frames_then_pixels_and_clips_stay_apart():
    video = RNG.integers(0, 256, (3, 8, 12, 18, 3), np.uint8)
    got = np.asarray(distill.view(jnp.asarray(video), 2, 6, 9, sampling="sparse"))
    taken = video[:, [1, 5]].astype(float).reshape(3, 2, 6, 2, 9, 2, 3).mean((3, 5))
    assert got.shape == (3, 2, 6, 9, 3) and np.abs(got - taken).max() <= 0.5
    same = jnp.asarray(video)
    assert distill.view(same, 8, 12, 18, sampling="uniform") is same
    jitted = jax.jit(lambda v: distill.view(v, 2, 6, 9, "sparse"))(video)
    np.testing.assert_array_equal(jitted, got)


@pytest.mark.parametrize("wanted", [(9, 12, 18), (8, 13, 18), (8, 12, 19)])
def test_a_view_is_never_larger(wanted):
    with pytest.raises(ValueError, match=r"is larger than \(8, 12, 18\)"):
        distill.view(jnp.zeros((1, 8, 12, 18, 3)), *wanted, sampling="uniform")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_that_of_a_plain_computation(temperature):
    teacher, student = RNG.normal(size=(2, 4, 6)) * 3
    p = np.exp(teacher / temperature) / np.exp(teacher / temperature).sum(1, keepdims=True)
    q = np.exp(student / temperature) / np.exp(student / temperature).sum(1, keepdims=True)
    wanted = temperature**2 * (p * np.log(p / q)).sum(1)
    got = distill.divergence(jnp.asarray(teacher), jnp.asarray(student), temperature)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert (np.asarray(distill.divergence(teacher, teacher, temperature)) < 1e-6).all()


def test_the_loss_of_a_clip_and_its_gradients():
    teacher, student = (jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(2, 4, 6)))
    labels, mask = jnp.array([0, 5, 2, 2]), jnp.array([1.0, 1.0, 0.0, 1.0])

    def cross_entropy(logits):
        return -jax.nn.log_softmax(logits)[jnp.arange(4), labels]

    def loss(teacher, student, weight):
        both = cross_entropy(teacher), cross_entropy(student)
        losses = distill.losses(teacher, student, both, weight, 2.0)
        assert losses.shape == (4,)
        return (losses * mask).sum() / mask.sum()

    found = jax.value_and_grad(loss, argnums=(0, 1))(teacher, student, 0.7)
    parts = cross_entropy(teacher) + cross_entropy(student)
    parts = parts + 0.7 * distill.divergence(teacher, student, 2.0)
    assert float(found[0]) == pytest.approx(float((parts * mask).sum() / 3), rel=1e-6)
    alone = jax.grad(lambda t: (cross_entropy(t) * mask).sum() / 3)(teacher)
    np.testing.assert_array_equal(found[1][0], alone)  # the teacher learns from the labels alone
    for grads in found[1]:  # an unreadable clip teaches nothing
        assert not np.asarray(grads)[2].any() and np.asarray(grads)[[0, 1, 3]].any()
    p = jax.nn.softmax(teacher / 2)
    q = jax.nn.softmax(student / 2)
    own = jax.grad(lambda s: (cross_entropy(s) * mask).sum() / 3)(student)
    taught = 0.7 * 2 * (q - p) * mask[:, None] / 3  # T^2 / T
    np.testing.assert_allclose(found[1][1], own + taught, rtol=1e-4, atol=1e-6)


def test_gentle_logits_of_low_precision_stay_finite():
    teacher = jnp.array([[200.0, -200.0, 0.0]], jnp.bfloat16)
    got = distill.divergence(teacher, -teacher, 1.0)
    assert got.dtype == jnp.float32 and np.isfinite(np.asarray(got)).all()
