"""How the training step's time and memory grow with tokens: scales, contenders, fits, picture."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from stretchysnake_jax.buckets import Bucket, make_bucket
from stretchysnake_jax.config import ModelConfig, attention_twin
from stretchysnake_jax.step_contenders import OURS, Case
from stretchysnake_jax.whole_file import whole_file

FEWEST, MOST = 196, 51_000  # tokens
LONG = 1_500  # tokens from which they outweigh what every step costs; the second fit begins there
ATTENTION = "ours, attention"
NAMES = {"mamba": OURS, "attention": ATTENTION}  # by `model.blocks`
MOST_BYTES = 6e9  # that a step with attention may take
KEPT = 9  # float32 (heads, L, L) arrays of resident memory for each block on CPUs; XLA counts half
# name in the output -> (key of a row, factor to what the picture shows, its unit)
MEASURES = {
    "time": ("min_ms", 1e-3, "seconds per step"),
    "CPU time": ("cpu_ms", 1e-3, "seconds per step"),
    "peak memory": ("peak", 1e-6, "MB"),
    "XLA temp": ("temporaries", 1e-6, "MB"),
}


def scaling_buckets(model: ModelConfig, most: int = MOST) -> list[Bucket]:
    """Scales on the base grid whose frame counts double, of 196 to `most` tokens."""
    cells = model.grid[0] * model.grid[1]
    times, buckets = -(-FEWEST // cells), []
    while times * cells < most:
        buckets.append(make_bucket("vanilla", times * model.tubelet, model.size, model))
        times *= 2
    return buckets


def case_of(name: str, case: Case) -> Case:
    """What the contender of a name computes: for `ATTENTION` the twin of the case's model."""
    if name != ATTENTION:
        return case
    config = dataclasses.replace(case.config, model=attention_twin(case.config.model))
    return dataclasses.replace(case, config=config)


def attention_bytes(case: Case) -> float:
    """About what a step of `ATTENTION` holds of attention matrices."""
    model = case_of(ATTENTION, case).config.model
    return KEPT * model.depth * case.batch * model.num_heads * case.tokens**2 * 4


def scaling_names(case: Case, blocks: list[str], say) -> list[str]:
    """Who is measured at a scale.

    Args:
      case: the scale.
      blocks: of `NAMES`.
      say: is told, in a sentence, if attention would take more than `MOST_BYTES`.
    """
    names = [NAMES[kind] for kind in blocks]
    if ATTENTION in names and (needed := attention_bytes(case)) > MOST_BYTES:
        say(
            f"{ATTENTION}: not measured at {case.bucket}, {case.tokens:,} tokens would take about "
            f"{needed / 1e9:.3g} GB, {MOST_BYTES / 1e9:.3g} are allowed."
        )
        names.remove(ATTENTION)
    return names


def by_name(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows, or fits, of each contender."""
    names = dict.fromkeys(row.get("name", OURS) for row in rows)
    return {name: [row for row in rows if row.get("name", OURS) == name] for name in names}


def exponents(rows: list[dict]) -> list[dict]:
    """Fits value = c tokens^k by least squares of the logarithms.

    Args:
      rows: over token counts, ascending: name (that of `OURS` if it is missing), tokens, and the
        keys of `MEASURES`, None where unknown.

    Returns:
      {"name", "of", "from", "to", "points", "exponent"} of every contender and measure, over all
      tokens and from `LONG` on; without those of fewer than two points.
    """
    fits = []
    for name, own in by_name(rows).items():
        for of, (key, _, _) in MEASURES.items():
            for start in (0, LONG):
                known = [row for row in own if row[key] and row["tokens"] >= start]
                if len(known) >= 2:
                    x, y = (np.log([row[k] for row in known]) for k in ("tokens", key))
                    fit = {"name": name, "of": of, "from": known[0]["tokens"]}
                    fit |= {"to": known[-1]["tokens"], "points": len(known)}
                    fits.append(fit | {"exponent": float(np.polyfit(x, y, 1)[0])})
    return fits


def plot(path, rows: list[dict], fits: list[dict], title: str) -> None:
    """Draws time and memory against tokens, both axes logarithmic.

    Beside the curves, dotted, lines through their last points: of slope one, of two for attention.

    Args:
      path: the PNG to write, whole or not at all.
      rows, fits: see `exponents`; a contender has a colour.
      title: of the picture.
    """
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    units = dict.fromkeys(unit for _, _, unit in MEASURES.values())
    ticks = sorted({row["tokens"] for row in rows})
    contenders = by_name(rows)
    for axis, unit in zip(figure.subplots(1, len(units)), units, strict=True):
        drawn = [of for of, (*_, own) in MEASURES.items() if own == unit]
        for colour, (name, own) in enumerate(contenders.items()):
            for style, of in enumerate(drawn):
                key, scale, _ = MEASURES[of]
                known = [(row["tokens"], scale * row[key]) for row in own if row[key]]
                if not known:
                    continue
                slopes = [
                    f"{fit['exponent']:.2f} from {fit['from']:,}"
                    for fit in fits
                    if (fit["name"], fit["of"]) == (name, of)
                ]
                x, y = zip(*known, strict=True)
                label = f"{of}: exponent {', '.join(slopes)}"
                if len(contenders) > 1:
                    label = f"{name}, {label}"
                look = {"color": f"C{colour}", "marker": "os"[style], "alpha": (1, 0.5)[style]}
                axis.loglog(x, y, label=label, **look)
                power = 2 if name == ATTENTION else 1
                guide = [y[-1] * (n / x[-1]) ** power for n in x]
                axis.loglog(x, guide, ":", color=f"C{colour}", alpha=look["alpha"])
        axis.set_xlabel("tokens")
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.xaxis.set_minor_formatter("")
        axis.set_ylabel(unit)
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize=7 if len(contenders) > 1 else 8)
    guides = "linear" + ", for attention quadratic" * (ATTENTION in contenders)
    figure.suptitle(f"{title}; dotted: {guides}", fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
