"""Scale self-distillation: the student's view against the loader's own, the loss against a plain
computation, and where its gradients go."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stretchysnake_jax import distill
from stretchysnake_jax.buckets import Bucket, loaded_bucket
from stretchysnake_jax.data import transforms

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("given, wanted", [(392, 98), (224, 126), (112, 56), (12, 5), (7, 7)])
def test_area_weights_share_out_every_pixel(given, wanted):
    weights = distill.area_weights(given, wanted)
    assert weights.shape == (wanted, given) and weights.min() >= 0
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(0), wanted / given, rtol=1e-5)


@pytest.mark.parametrize("height, width", [(98, 98), (28, 56), (126, 70), (14, 112)])
def test_pixels_are_averaged_as_the_loader_does_it(height, width):
    frame = RNG.integers(0, 256, (126, 112, 3), np.uint8)
    scales = Bucket(1, 126, 112, (14, 14)), Bucket(1, height, width, (7, 7))
    _, got = distill.views(jnp.asarray(frame)[None, None], *scales)
    assert got.dtype == jnp.uint8 and got.shape == (1, 1, height, width, 3)
    wanted = transforms.resize(frame, height, width)
    difference = np.abs(np.asarray(got[0, 0], int) - wanted)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02  # ties are rounded apart
    exact = cv2.resize(frame.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    _, floats = distill.views(jnp.asarray(frame, jnp.float32)[None, None], *scales)
    np.testing.assert_allclose(floats[0, 0], exact, atol=2e-3)


@pytest.mark.parametrize("frames", [1, 2, 7, 8])
def test_the_teacher_has_the_first_frames_and_the_student_the_last(frames):
    teacher, student = Bucket(8, 12, 18, (4, 6)), Bucket(frames, 6, 9, (2, 3))
    loaded = loaded_bucket(teacher, student)
    assert loaded.frames == (8 if frames == 8 else 8 + frames) and loaded.patch == (4, 6)
    video = RNG.integers(0, 256, (3, *loaded.shape), np.uint8)
    first, last = distill.views(jnp.asarray(video), teacher, student)
    np.testing.assert_array_equal(first, video[:, :8])
    parts = video[:, -frames:].astype(float).reshape(3, frames, 6, 2, 9, 2, 3)
    assert last.shape == (3, *student.shape)
    assert np.abs(np.asarray(last) - parts.mean((3, 5))).max() <= 0.5
    jitted = jax.jit(distill.views, static_argnums=(1, 2))(video, teacher, student)
    np.testing.assert_array_equal(jitted[1], last)


@pytest.mark.parametrize("scale", [(9, 12, 18), (2, 13, 18), (2, 12, 19)])
def test_a_student_is_never_larger_than_its_teacher(scale):
    teacher, student = Bucket(8, 12, 18, (4, 6)), Bucket(*scale, (2, 3))
    video = jnp.zeros((1, *loaded_bucket(teacher, student).shape))
    with pytest.raises(ValueError, match="no larger"):
        distill.views(video, teacher, student)
    with pytest.raises(ValueError, match=r"take \(8, 12, 18, 3\)"):
        distill.views(jnp.zeros((1, 9, 12, 18, 3)), teacher, teacher)


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
