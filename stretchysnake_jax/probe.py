"""Probes of frozen features: a linear classifier, and the votes of nearest neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import log_softmax, logsumexp

from stretchysnake_jax import outputs
from stretchysnake_jax.config import ConfigError

# Powers of ten: the inverse strength of the penalty.
STRENGTHS = tuple(10.0**power for power in range(-6, 5))
# DINO reports k of 10, 20, 100 and 200 at the temperature of Wu et al., 0.07.
NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.04, 0.07, 0.1, 0.2, 0.5, 1.0)
_BLOCK = 8192  # rows worked on at a time


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of standardised features.

    Attributes:
      mean, scale: float32 (D,): features are standardised by (x - mean) / scale.
      kernel: float32 (D, present classes).
      bias: float32 (present classes,).
      present: the classes that the training clips have, ascending.
      classes: number of all classes.
      c: the inverse strength of the penalty.
      gradient: largest entry of the gradient, by absolute value, in float64.
      iterations: of L-BFGS.
      converged: the gradient came down to the tolerance.
    """

    mean: np.ndarray
    scale: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    present: np.ndarray
    classes: int
    c: float
    gradient: float
    iterations: int
    converged: bool

    def log_probabilities(self, features: np.ndarray) -> np.ndarray:
        """Features (n, D) -> float64 (n, classes); -inf for classes that weren't trained on."""
        x = standardise(features, self.mean, self.scale)
        chances = np.full((len(x), self.classes), -np.inf)
        chances[:, self.present] = log_softmax(_logits64(x, self.kernel, self.bias), -1)
        return chances


def standardise(features, mean, scale) -> np.ndarray:
    """(x - mean) / scale, computed in float64, as float32 (n, D)."""
    return ((features - mean) / scale).astype(np.float32)


def fit_linear(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    c: float,
    *,
    start: LinearProbe | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> LinearProbe:
    """Multinomial logistic regression with an L2 penalty, by full-batch L-BFGS.

    Minimises mean_i(-log p(label_i | x_i)) + |kernel|^2 / (2 c n); the bias isn't penalised. n
    times that is scikit-learn's LogisticRegression(C=c). The steps are in float32; every 100 of
    them, and where they come to rest, gradient and loss are computed in float64, which decides.

    Args:
      features: (n, D), any scale.
      labels: (n,).
      classes: number of classes; those without a clip take no part.
      c: inverse strength of the penalty, > 0.
      start: where to begin: a probe of the same features and labels; None: zeros.
      tolerance: largest entry of the gradient that counts as done.
      max_iterations: steps at most.

    Raises:
      ConfigError: a feature that isn't finite, or clips of fewer than two classes.
    """
    _check_finite(features)
    present, y = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise ConfigError("the training clips are all of one class: a probe takes two or more")
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    # What rounding leaves of a constant feature is no spread.
    scale = np.where(scale > 1e-6 * np.maximum(abs(mean), 1e-30), scale, 1.0)
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    x, penalty = standardise(features, mean, scale), 1 / (c * len(y))
    if start is None:
        params = {"kernel": np.zeros((x.shape[1], len(present))), "bias": np.zeros(len(present))}
    else:
        params = {"kernel": start.kernel, "bias": start.bias}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    where = jnp.asarray(x), jnp.asarray(y, jnp.int32), jnp.float32(penalty)
    done, target, best, state = 0, tolerance, np.inf, _lbfgs().init(params)
    while True:
        steps = min(100, max_iterations - done)
        params, state, took, rest = _minimise(params, state, *where, target, steps)
        done += int(took)
        loss, gradient = _loss_and_gradient(jax.tree.map(np.asarray, params), x, y, penalty)
        # Below the noise of float32 a smaller gradient can't be seen, nor the loss fall.
        stuck = int(took) == 0 or (bool(rest) and loss >= best * (1 - 1e-9))
        if gradient <= tolerance or done >= max_iterations or stuck or not np.isfinite(loss):
            break
        best, target = min(best, loss), target / 2 if rest else target
    return LinearProbe(
        mean,
        scale,
        np.asarray(params["kernel"]),
        np.asarray(params["bias"]),
        present,
        classes,
        c,
        gradient,
        done,
        gradient <= tolerance,
    )


def _lbfgs():
    return optax.lbfgs(memory_size=10)


@jax.jit
def _minimise(params, state, x, y, penalty, target, steps):
    """Steps until the gradient is at `target`: (params, state, steps taken, it is at rest)."""

    def loss_fn(params):
        logits = jnp.dot(x, params["kernel"], precision="highest") + params["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean() + penalty / 2 * (params["kernel"] ** 2).sum()

    value_and_grad, optimizer = optax.value_and_grad_from_state(loss_fn), _lbfgs()

    def step(carry):
        params, state, taken, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss_fn
        )
        grad = optax.tree.get(state, "grad")  # at the new place
        largest = jnp.stack([abs(g).max() for g in jax.tree.leaves(grad)]).max()
        moved = jnp.stack([abs(u).max() for u in jax.tree.leaves(updates)]).max() > 0
        params = optax.apply_updates(params, updates)
        return params, state, taken + 1, (largest <= target) | ~moved

    def goes_on(carry):
        return (carry[2] < steps) & ~carry[3]

    return jax.lax.while_loop(goes_on, step, (params, state, jnp.int32(0), jnp.bool_(False)))


def _logits64(x, kernel, bias) -> np.ndarray:
    return x.astype(np.float64) @ kernel.astype(np.float64) + bias.astype(np.float64)


def _loss_and_gradient(params, x, y, penalty) -> tuple[float, float]:
    """What `fit_linear` minimises and the largest entry of its gradient, in float64."""
    kernel = params["kernel"].astype(np.float64)
    loss, by_kernel, by_bias = 0.0, np.zeros(kernel.shape), np.zeros(kernel.shape[1])
    for first in range(0, len(x), _BLOCK):
        rows, own = x[first : first + _BLOCK].astype(np.float64), y[first : first + _BLOCK]
        chances = log_softmax(_logits64(rows, kernel, params["bias"]), -1)
        loss -= chances[np.arange(len(own)), own].sum()
        error = np.exp(chances)
        error[np.arange(len(own)), own] -= 1
        by_kernel += rows.T @ error
        by_bias += error.sum(0)
    by_kernel = by_kernel / len(x) + penalty * kernel
    loss = loss / len(x) + penalty / 2 * (kernel**2).sum()
    return float(loss), float(max(abs(by_kernel).max(), abs(by_bias).max() / len(x)))


def neighbours(queries: np.ndarray, gallery: np.ndarray, k: int, block: int = _BLOCK):
    """The k rows of a gallery that are most alike each query, by cosine.

    Similarities are computed and merged block by block: memory grows with
    block * (block + k), not with queries * gallery.

    Args:
      queries: (n, D).
      gallery: (m, D), m >= k.
      k: neighbours of a query.
      block: rows of the gallery, and an eighth of it of the queries, at a time.

    Returns:
      (similarities float32 (n, k), falling; indices int32 (n, k)). Of equals the first comes first.

    Raises:
      ConfigError: another k, or a feature that isn't finite.
    """
    if not 1 <= k <= len(gallery):
        raise ConfigError(f"k is {k}: it takes 1 to {len(gallery)}, the clips of the gallery")
    _check_finite(queries, gallery)
    gallery, found = unit(gallery), []
    step = max(1, block // 8)
    for begin in range(0, len(queries), step):
        rows = jnp.asarray(unit(queries[begin : begin + step]))
        best = jnp.full((len(rows), k), -jnp.inf), jnp.zeros((len(rows), k), jnp.int32)
        for first in range(0, len(gallery), block):
            best = _merge(*best, rows, gallery[first : first + block], first)
        found.append([np.asarray(part) for part in best])
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _check_finite(*features) -> None:
    if not all(np.isfinite(rows).all() for rows in features):
        raise ConfigError("the features hold values that aren't finite: the model has overflowed")


def unit(features: np.ndarray) -> np.ndarray:
    """Rows divided by their length, float32 (n, D); zeros stay zeros."""
    length = np.linalg.norm(features.astype(np.float64), axis=-1, keepdims=True)
    return (features / np.maximum(length, 1e-30)).astype(np.float32)


@jax.jit
def _merge(best, ids, queries, block, first):
    """The best of those so far and of a block of the gallery."""
    new = jnp.dot(queries, block.T, precision="highest")
    new_ids = jnp.broadcast_to(first + jnp.arange(len(block), dtype=jnp.int32), new.shape)
    best, where = jax.lax.top_k(jnp.concatenate([best, new], 1), best.shape[1])
    return best, jnp.take_along_axis(jnp.concatenate([ids, new_ids], 1), where, 1)


def vote(similarities, labels, classes: int, k: int, temperature: float) -> np.ndarray:
    """Log of the classes' shares of the neighbours' votes.

    A neighbour votes for its class with exp(similarity / temperature): Wu et al., Unsupervised
    feature learning via non-parametric instance discrimination, 2018, section 3.4; DINO's
    evaluation is the same.

    Args:
      similarities: cosines, falling, (n, at least k).
      labels: of these neighbours, (n, at least k).
      classes: their number.
      k: how many vote.
      temperature: > 0.

    Returns:
      float64 (n, classes), -inf for classes without a vote.
    """
    logits = similarities[:, :k].astype(np.float64) / temperature
    weights = np.exp(logits - logsumexp(logits, 1, keepdims=True))
    shares = np.zeros((len(weights), classes))
    np.add.at(shares, (np.arange(len(weights))[:, None], labels[:, :k]), weights)
    with np.errstate(divide="ignore"):
        return np.log(shares)


def hold_out(labels: np.ndarray, groups: list[str] | None, share: float, seed: int = 0):
    """Chooses the clips that validate where a data set has no validation split.

    With groups (source videos, persons) whole groups are chosen, in a random order each that brings
    the classes' shares closer to `share`. Without them it is that share of every class. A class
    keeps at least one clip to train on.

    Args:
      labels: (n,).
      groups: of every clip, or None.
      share: of the clips, between 0 and 1.
      seed: of the choice.

    Returns:
      bool (n,), True for those chosen.

    Raises:
      ConfigError: nothing can be chosen.
    """
    rng, chosen = np.random.default_rng(seed), np.zeros(len(labels), bool)
    _, y, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if groups is None:
        for label, count in enumerate(counts):
            take = min(max(1, round(share * count)), count - 1)
            chosen[rng.permutation(np.flatnonzero(y == label))[:take]] = True
    else:
        names, group = np.unique(groups, return_inverse=True)
        held, taken = np.zeros(len(counts)), []
        # By group and class: the share of the class that the group holds.
        table = np.zeros((len(names), len(counts)))
        np.add.at(table, (group, y), 1 / counts[y])

        def away(shares):  # a class that is held out whole couldn't be learnt
            whole = shares.max() > 1 - 0.5 / counts.max()
            return np.inf if whole else ((shares - share) ** 2).sum()

        order = rng.permutation(len(names))
        for g in order:
            if away(held + table[g]) < away(held):
                held, taken = held + table[g], [*taken, g]
        if not taken:  # all groups are large: the one that is the least so
            taken = [g for g in order if away(table[g]) == min(map(away, table)) < np.inf][:1]
        chosen = np.isin(group, taken)
    if not chosen.any():
        raise ConfigError(
            f"no {share:.0%} of the {len(labels)} training clips can be held out (clips of a group "
            "stay together, and every class keeps one): give a validation list"
        )
    return chosen


def sweep_linear(train, val, classes: int, strengths=STRENGTHS, on_fit=None):
    """Fits a probe for every strength, each beginning where the last one ended.

    Args:
      train, val: (features (n, D), labels (n,)).
      classes: number of classes.
      strengths: inverse strengths, `LinearProbe.c`.
      on_fit: called with the number of fits done after each.

    Returns:
      (rows, probes): a row per strength, ascending: c, `scores` on val, gradient, iterations,
      converged.
    """
    rows, probes = [], []
    for c in sorted(strengths):
        probes.append(fit_linear(*train, classes, c, start=probes[-1] if probes else None))
        probe = probes[-1]
        fit = {k: getattr(probe, k) for k in ("gradient", "iterations", "converged")}
        rows.append({"c": c, **scores(probe.log_probabilities(val[0]), val[1]), **fit})
        if on_fit:
            on_fit(len(rows))
    return rows, probes


def sweep_neighbours(train, val, classes: int, ks=NEIGHBOURS, temperatures=TEMPERATURES):
    """Scores on `val` of every k up to the clips of `train`, and temperature.

    Args:
      train, val: (features (n, D), labels (n,)).
      classes: number of classes.
      ks: numbers of neighbours.
      temperatures: of the votes.

    Returns:
      A row per pair: k, temperature, `scores` without the loss, which is infinite as soon as a
      clip's own class has no vote.
    """
    ks = sorted({min(k, len(train[1])) for k in ks})
    near, ids = neighbours(val[0], train[0], ks[-1])
    rows = []
    for k in ks:
        for temperature in sorted(temperatures):
            chances = vote(near, train[1][ids], classes, k, temperature)
            found = scores(chances, val[1])
            del found["loss"]
            rows.append({"k": k, "temperature": temperature, **found})
    return rows


def scores(chances: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`outputs.summary` of log-probabilities (n, classes)."""
    return outputs.summary(outputs.Outputs(chances, labels, np.arange(len(labels)), [], 0.0))


def best(rows: list[dict]) -> int:
    """The row with the highest top1; among equals highest mean_class, then least loss, then first.

    A validation split of few clips leaves many equals, and the loss tells them apart.
    """

    def key(i):
        return rows[i]["top1"], rows[i]["mean_class"], -rows[i].get("loss", 0.0), -i

    return max(range(len(rows)), key=key)
