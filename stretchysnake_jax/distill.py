"""Scale self-distillation: the largest scale of a run teaches the one drawn in the same step.

Every batch is loaded at the largest scale, the teacher's, and with it the frames of the bucket that
was drawn, the student's, which `views` shrinks on the device. One set of weights learns both:

    loss = CE(teacher) + CE(student) + weight * T^2 * KL(stop_gradient(p_teacher) || p_student)

with p = softmax(logits / T); T^2 keeps the gradients' size (Hinton et al., arXiv 1503.02531). The
nearest relatives train a network's widths so (the sandwich rule, arXiv 1903.05134), frame counts
(arXiv 2303.14817) and sizes (arXiv 2212.00776).
"""

import jax
import jax.numpy as jnp
import numpy as np

from stretchysnake_jax.buckets import Bucket, loaded_bucket


def area_weights(given: int, wanted: int) -> np.ndarray:
    """The matrix (wanted, given) that averages pixels by the area they share, float32.

    Rows add up to 1. It is what the loader does to frames that shrink (OpenCV's INTER_AREA).
    """
    side = given / wanted
    low = side * np.arange(wanted)[:, None]
    pixel = np.arange(given)
    shared = np.minimum(low + side, pixel + 1) - np.maximum(low, pixel)
    return (np.clip(shared, 0, None) / side).astype(np.float32)


def views(video, teacher: Bucket, student: Bucket):
    """The two clips that a step learns from.

    Args:
      video: (B, T, H, W, 3) of the `buckets.loaded_bucket`, uint8 or float.
      teacher, student: their scales; no side of the student's is larger.

    Returns:
      The teacher's clips and the student's, (B, frames, height, width, 3) each, of the same dtype;
      the student's are averaged by area, uint8 is rounded.

    Raises:
      ValueError: the student is larger, or the video isn't of these scales.
    """
    pairs = zip(student.shape, teacher.shape, strict=True)
    if any(more > side for more, side in pairs):
        raise ValueError(f"a student at {student} should be no larger than its teacher, {teacher}")
    loaded = loaded_bucket(teacher, student)
    if video.shape[1:] != loaded.shape:
        raise ValueError(f"clips of {video.shape[1:]}: {teacher} and {student} take {loaded.shape}")
    first, last = video[:, : teacher.frames], video[:, -student.frames :]
    small = last.astype(jnp.float32)
    for axis, spec in ((1, "oh,bthwc->btowc"), (2, "ow,bthwc->bthoc")):
        given, wanted = loaded.shape[axis], student.shape[axis]
        if wanted < given:
            small = jnp.einsum(spec, area_weights(given, wanted), small, precision="highest")
    if jnp.issubdtype(video.dtype, jnp.integer):
        small = jnp.round(small)
    return first, small.astype(video.dtype)


def divergence(teacher, student, temperature: float = 1.0):
    """T^2 KL(p_teacher || p_student) of every clip; no gradient reaches the teacher.

    Args:
      teacher, student: logits (B, classes).
      temperature: T, what both are divided by.

    Returns:
      float32 (B,), >= 0.
    """
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1)


def losses(teacher, student, cross_entropies, weight: float, temperature: float = 1.0):
    """The loss of every clip; the step masks and averages it as any other.

    Args:
      teacher, student: logits (B, classes).
      cross_entropies: those of the teacher and of the student, (B,) each.
      weight: of the divergence, `stretch.distill`.
      temperature: see `divergence`.

    Returns:
      (B,).
    """
    return sum(cross_entropies) + weight * divergence(teacher, student, temperature)
