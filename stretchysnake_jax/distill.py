"""Scale self-distillation: the largest scale of a run teaches the one drawn in the same step.

Every batch is loaded at the largest scale, the teacher's. The student sees the same clips at the
bucket that was drawn, cut down from it on the device by `view`. One set of weights learns both:

    loss = CE(teacher) + CE(student) + weight * T^2 * KL(stop_gradient(p_teacher) || p_student)

with p = softmax(logits / T); T^2 keeps the gradients' size (Hinton et al., arXiv 1503.02531). The
nearest relatives train a network's widths so (the sandwich rule, arXiv 1903.05134), frame counts
(arXiv 2303.14817) and sizes (arXiv 2212.00776).
"""

import jax
import jax.numpy as jnp
import numpy as np


def frame_indices(given: int, wanted: int, sampling: str) -> np.ndarray:
    """The teacher's frames that lie as those of a test clip of fewer frames do.

    They are the same in every clip: a student whose frames were drawn from the teacher's, or from
    the video, learned less of what few frames show (docs/study.md, the student's frames).

    Args:
      given: frames that the clip has.
      wanted: frames to take.
      sampling: `data.sampling`. "uniform": from the first to the last, rounded down; "dense": in a
        row, in the middle; else the middle of equal parts, of two middle ones the first.

    Returns:
      Ascending indices, int64 (wanted,).
    """
    if sampling == "uniform":
        return np.linspace(0, given - 1, wanted).astype(np.int64)
    if sampling == "dense":
        return (given - wanted) // 2 + np.arange(wanted)
    return ((2 * np.arange(wanted) + 1) * given - 1) // (2 * wanted)


def area_weights(given: int, wanted: int) -> np.ndarray:
    """The matrix (wanted, given) that averages pixels by the area they share, float32.

    Rows add up to 1. It is what the loader does to frames that shrink (OpenCV's INTER_AREA).
    """
    side = given / wanted
    low = side * np.arange(wanted)[:, None]
    pixel = np.arange(given)
    shared = np.minimum(low + side, pixel + 1) - np.maximum(low, pixel)
    return (np.clip(shared, 0, None) / side).astype(np.float32)


def view(video, frames: int, height: int, width: int, sampling: str):
    """The student's view of clips: fewer frames, fewer pixels.

    Args:
      video: (B, T, H, W, 3), uint8 or float.
      frames, height, width: of the view; none above those of `video`.
      sampling: see `frame_indices`.

    Returns:
      (B, frames, height, width, 3) of the same dtype; uint8 is rounded. `video` itself if it has
      these sizes.

    Raises:
      ValueError: the view is larger than the video.
    """
    sizes, wanted = video.shape[1:4], (frames, height, width)
    if any(more > size for more, size in zip(wanted, sizes, strict=True)):
        raise ValueError(f"a view of {wanted} (frames, height, width) is larger than {sizes}")
    if frames < sizes[0]:
        video = video[:, frame_indices(sizes[0], frames, sampling)]
    if (height, width) == sizes[1:]:
        return video
    small = video.astype(jnp.float32)
    for axis, spec in ((1, "oh,bthwc->btowc"), (2, "ow,bthwc->bthoc")):
        if wanted[axis] < sizes[axis]:
            weights = area_weights(sizes[axis], wanted[axis])
            small = jnp.einsum(spec, weights, small, precision="highest")
    if jnp.issubdtype(video.dtype, jnp.integer):
        small = jnp.round(small)
    return small.astype(video.dtype)


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
