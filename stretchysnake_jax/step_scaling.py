"""How the training step's time and memory grow with tokens: scales, fits and picture."""

import numpy as np
from matplotlib.figure import Figure

from stretchysnake_jax.buckets import Bucket, make_bucket
from stretchysnake_jax.config import ModelConfig
from stretchysnake_jax.whole_file import whole_file

FEWEST, MOST = 196, 51_000  # tokens
LONG = 1_500  # tokens from which they outweigh what every step costs; the second fit begins there
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


def exponents(rows: list[dict]) -> list[dict]:
    """Fits value = c tokens^k by least squares of the logarithms.

    Args:
      rows: of one contender over token counts, ascending: tokens, and the keys of `MEASURES`, None
        where unknown.

    Returns:
      {"of", "from", "to", "points", "exponent"} of every measure, over all tokens and from `LONG`
      on; without those of fewer than two points.
    """
    fits = []
    for of, (key, _, _) in MEASURES.items():
        for start in (0, LONG):
            known = [row for row in rows if row[key] and row["tokens"] >= start]
            if len(known) >= 2:
                x, y = (np.log([row[k] for row in known]) for k in ("tokens", key))
                fit = {"of": of, "from": known[0]["tokens"], "to": known[-1]["tokens"]}
                slope = float(np.polyfit(x, y, 1)[0])
                fits.append(fit | {"points": len(known), "exponent": slope})
    return fits


def plot(path, rows: list[dict], fits: list[dict], title: str) -> None:
    """Draws time and memory against tokens, both axes logarithmic, beside lines of slope one.

    Args:
      path: the PNG to write, whole or not at all.
      rows, fits: see `exponents`.
      title: of the picture.
    """
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    units = dict.fromkeys(unit for _, _, unit in MEASURES.values())
    for axis, unit in zip(figure.subplots(1, len(units)), units, strict=True):
        for of, (key, scale, own) in MEASURES.items():
            known = [(row["tokens"], scale * row[key]) for row in rows if row[key]]
            if own != unit or not known:
                continue
            slopes = [f"{f['exponent']:.2f} from {f['from']:,}" for f in fits if f["of"] == of]
            x, y = zip(*known, strict=True)
            (line,) = axis.loglog(x, y, "o-", label=f"{of}: exponent {', '.join(slopes)}")
            axis.loglog(x, [y[-1] * n / x[-1] for n in x], ":", color=line.get_color())
        axis.set_xlabel("tokens")
        axis.set_xticks([row["tokens"] for row in rows], [f"{row['tokens']:,}" for row in rows])
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.xaxis.set_minor_formatter("")
        axis.set_ylabel(unit)
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize=8)
    figure.suptitle(f"{title}; dotted: linear", fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
