"""What a model says of the clips of a list at one scale, several views of a clip merged."""

import dataclasses
import math
import time

import jax
import numpy as np
from scipy.special import logsumexp

from stretchysnake_jax import sharding
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.data import pipeline
from stretchysnake_jax.data.lists import ClipList


@dataclasses.dataclass(frozen=True)
class Outputs:
    """One row per readable clip, in the order of the list.

    Attributes:
      values: float64 (clips, ...): log-probabilities or features.
      labels: class indices, (clips,).
      clips: indices in the list, ascending, (clips,).
      unreadable: (path, reason) of the others, each once.
      clips_per_s: views per second of the compiled forward pass, reading not counted.
    """

    values: np.ndarray
    labels: np.ndarray
    clips: np.ndarray
    unreadable: list[tuple[str, str]]
    clips_per_s: float


def merge_scores(scores: np.ndarray) -> np.ndarray:
    """Logits of a clip's views, (clips, views, classes) -> log of the mean probabilities."""
    chances = scores - logsumexp(scores, -1, keepdims=True)
    return logsumexp(chances, 1) - math.log(scores.shape[1])


def merge_features(features: np.ndarray) -> np.ndarray:
    """The mean over a clip's views, (clips, views, ...) -> (clips, ...)."""
    return features.mean(1)


def compute(
    eval_step,
    params,
    data,
    clips: ClipList,
    bucket: Bucket | list[Bucket],
    batch_size: int = 8,
    *,
    views: tuple[int, int] = (1, 1),
    merge=merge_scores,
    on_batch=None,
    mesh=None,
) -> Outputs:
    """Runs a model over a list.

    Args:
      eval_step: an `EvalStep`.
      params: base parameters.
      data: the `DataConfig`, for sampling and transforms.
      clips: the list; a clip is known by its place in it.
      bucket: the scale, or a list with that of every clip; clips of one scale make batches.
      batch_size: views per batch.
      views: (test clips, test crops) of every clip.
      merge: makes one row of a clip's views, (clips, views, ...) -> (clips, ...).
      on_batch: called with the number of clips done after every batch.
      mesh: the devices that a batch is spread over, of every process; None: one. Each process
        reads its part and gets the rows of the whole list; `unreadable` is its own.

    Raises:
      TooManyUnreadable: there is no clip that can be read.
    """
    rows, labels, ids, unreadable, seconds, done = [], [], [], {}, 0.0, 0
    index, count = sharding.host_share(mesh) if mesh else (0, 1)
    each = math.prod(views)
    for scale, members in _by_scale(bucket, len(clips)).items():
        times = []
        batches = pipeline.eval_batches(
            data,
            clips.select(members),
            scale,
            batch_size,
            shard_index=index,
            shard_count=count,
            views=views,
        )
        with batches:
            for batch in batches:
                # The first call compiles; it is made twice so that even one batch is timed.
                for _ in range(1 if times else 2):
                    start = time.perf_counter()
                    values = jax.block_until_ready(eval_step(params, batch["video"], scale))
                times.append(time.perf_counter() - start)
                keys = ("label", "mask", "clip")
                label, mask, clip = sharding.gather(mesh, tuple(batch[key] for key in keys))
                rows.append(np.asarray(values, np.float64)[mask > 0])
                labels.append(label[mask > 0])
                ids.append(members[clip[mask > 0]])
                unreadable |= dict(batch["unreadable"])
                if on_batch:
                    on_batch(done + min(len(members), len(times) * batch_size // each))
        done += len(members)
        seconds += float(np.median(times)) * len(members) * each / batch_size
    rows, labels, ids = (np.concatenate(parts) for parts in (rows, labels, ids))
    if not len(ids):
        path, reason = next(iter(unreadable.items()), ("the list", "it is empty"))
        raise pipeline.TooManyUnreadable(f"no clip could be read; {path}: {reason}")
    # Hosts read views in turns; of a damaged video some views may be readable and others not.
    order = np.argsort(ids, kind="stable")
    ids, first = np.unique(ids[order], return_index=True)
    values = np.concatenate([merge(seen[None]) for seen in np.split(rows[order], first[1:])])
    rate = done * each / seconds
    return Outputs(values, labels[order][first], ids, [*unreadable.items()], rate)


def _by_scale(bucket, clips: int) -> dict[Bucket, np.ndarray]:
    """The scales, and the clips that are seen at each: ascending indices."""
    if isinstance(bucket, Bucket):
        return {bucket: np.arange(clips)}
    return {
        scale: np.array([i for i, own in enumerate(bucket) if own == scale])
        for scale in sorted(set(bucket))
    }


def ranks(chances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rank of each clip's own class, from 1.

    It counts the classes that aren't scored below it: ties and NaN are against the clip.
    """
    own = chances[np.arange(len(labels)), labels]
    return (~(chances < own[:, None])).sum(1)


def confusion(labels: np.ndarray, guesses: np.ndarray, classes: int) -> np.ndarray:
    """How many clips of a class (row) were taken for which (column), int64 (classes, classes)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, guesses), 1)
    return counts


def summary(outputs: Outputs) -> dict[str, float]:
    """Of log-probabilities: top1, top5, mean_class (shares) and loss (mean cross entropy).

    mean_class is the mean over the classes that the list has of the share of right ones.
    """
    rank = ranks(outputs.values, outputs.labels)
    right = rank <= 1
    found = np.unique(outputs.labels)
    own = outputs.values[np.arange(len(rank)), outputs.labels]
    return {
        "top1": float(right.mean()),
        "top5": float((rank <= 5).mean()),
        "mean_class": float(np.mean([right[outputs.labels == c].mean() for c in found])),
        "loss": float(-own.mean()),
    }
