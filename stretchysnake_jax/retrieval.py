"""Retrieval: for every query clip the clips of a gallery by likeness, recalls and mAP.

Nothing of the size queries x gallery is ever held: similarities are computed for some queries at a
time, and a query's are reduced to a few numbers before the next.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.probe import unit

RECALLS = (1, 5, 10)
BLOCK = 1 << 26  # similarities held at a time, float32: 256 MiB


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a gallery is worth to every query, (n,) each. A right clip is one of the query's class.

    Attributes:
      rank: int64, of the first right clip, from 1; clips alike it that are wrong go before it. 0:
        the gallery has no right clip.
      precision: float64, the average precision, see `rank`; NaN: likewise.
      nearest: int64 (n, k), the most alike clips of the gallery, falling; -1: there are no more.
      likeness: float32 (n, k), their cosines.
    """

    rank: np.ndarray
    precision: np.ndarray
    nearest: np.ndarray
    likeness: np.ndarray


def average_scales(features: list[np.ndarray]) -> np.ndarray:
    """The mean of the normalised features of several scales.

    Args:
      features: (n, dim) each, rows in the same order.

    Returns:
      float32 (n, dim); its rows have a length <= 1.
    """
    return np.mean([unit(values) for values in features], 0, dtype=np.float64).astype(np.float32)


def similarity_blocks(queries: np.ndarray, gallery: np.ndarray, limit: int = BLOCK):
    """Cosines, some queries at a time.

    Args:
      queries: (n, dim).
      gallery: (m, dim).
      limit: of similarities in a block; one query at least.

    Yields:
      (index of the first query, float32 (rows, m)).
    """
    step = max(1, limit // len(gallery))
    gallery = jnp.asarray(unit(gallery))
    for first in range(0, len(queries), step):
        yield first, np.asarray(_cosines(unit(queries[first : first + step]), gallery))


@jax.jit
def _cosines(queries, gallery):
    return jnp.dot(queries, gallery.T, precision="highest")


def rank(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    *,
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
    k: int = 10,
    limit: int = BLOCK,
    on_block=None,
) -> Ranking:
    """Ranks a gallery for every query by cosine similarity.

    Average precision is sum_n (R_n - R_(n-1)) P_n over falling thresholds of similarity, precision
    P and recall R of the clips that reach the threshold: scikit-learn's average_precision_score.
    Clips of equal similarity therefore share a threshold, and no order among them matters.

    Args:
      queries: features (n, dim).
      gallery: features (m, dim).
      query_labels, gallery_labels: class indices, (n,) and (m,).
      query_ids, gallery_ids: whole numbers, (n,) and (m,), or None: gallery clips with the id of
        the query are the query itself, and are left out.
      k: how many of the nearest are named.
      limit: see `similarity_blocks`.
      on_block: called with the number of queries done after every block.

    Raises:
      ConfigError: a feature that isn't finite.
    """
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise ConfigError("the features hold values that aren't finite: the model has overflowed")
    n, m = len(queries), len(gallery)
    k = min(k, m)
    ranks, precision = np.zeros(n, np.int64), np.full(n, np.nan)
    nearest, likeness = np.full((n, k), -1), np.full((n, k), -np.inf, np.float32)
    for first, block in similarity_blocks(queries, gallery, limit):
        for i, row in enumerate(block, first):
            right = gallery_labels == query_labels[i]
            if query_ids is not None:
                own = gallery_ids == query_ids[i]
                right &= ~own
                row = np.where(own, -np.inf, row)
            top = np.argpartition(row, m - k)[m - k :]
            top = top[np.lexsort((top, -row[top]))]
            top = top[row[top] > -np.inf]
            nearest[i, : len(top)], likeness[i, : len(top)] = top, row[top]
            if right.any():
                ranks[i], precision[i] = _score(row, right)
        if on_block:
            on_block(first + len(block))
    return Ranking(ranks, precision, nearest, likeness)


def _score(row: np.ndarray, right: np.ndarray) -> tuple[int, float]:
    """Rank of the first right one and average precision; similarities and bool, (m,) each."""
    alike = np.sort(row[right])
    # Of every right clip: how many clips are at least as alike, and how many of them are right.
    # Sorting values alone is several times faster than sorting clips.
    reach = len(row) - np.searchsorted(np.sort(row), alike)
    hits = len(alike) - np.searchsorted(alike, alike)
    return 1 + reach[-1] - hits[-1], float(np.mean(hits / reach))


def summary(ranking: Ranking) -> dict[str, float]:
    """Over the queries that have a right clip in the gallery: recalls "r1", ..., and "map".

    R@k is the share of queries with a right clip among the k nearest.

    Returns:
      shares, 0 to 1; queries, how many; unmatched: how many others there are.

    Raises:
      ConfigError: there is no such query.
    """
    there = ranking.rank > 0
    if not there.any():
        raise ConfigError("no query has a clip of its class in the gallery: nothing can be found")
    found = {f"r{k}": float((ranking.rank[there] <= k).mean()) for k in RECALLS}
    found["map"] = float(ranking.precision[there].mean())
    return found | {"queries": int(there.sum()), "unmatched": int((~there).sum())}
