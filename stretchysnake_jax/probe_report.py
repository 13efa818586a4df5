"""What a sweep over settings of a classifier leaves: tables, a confusion matrix, words."""

import csv
import json
import math

import numpy as np

from stretchysnake_jax import outputs, plots
from stretchysnake_jax.whole_file import whole_file


def class_table(chances: np.ndarray, labels: np.ndarray, classes: list[str]) -> list[dict]:
    """A row per class: clips, share right first and among five, what it is most mistaken for."""
    rank = outputs.ranks(chances, labels)
    guesses, rows = chances.argmax(1), []
    for c, name in enumerate(classes):
        own = labels == c
        row = {"class": name, "clips": int(own.sum()), "top1": None, "top5": None}
        row |= {"mistaken_for": "", "mistakes": 0}
        if own.any():
            row |= {"top1": float((rank[own] <= 1).mean()), "top5": float((rank[own] <= 5).mean())}
            wrong = np.bincount(guesses[own & (guesses != c)], minlength=len(classes))
            if wrong.any():
                row |= {"mistaken_for": classes[wrong.argmax()], "mistakes": int(wrong.max())}
        rows.append(row)
    return rows


def _write_csv(path, rows: list[dict]) -> None:
    with whole_file(path) as part, part.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for row in rows:
            table.writerow({k: round(v, 6) if k in _SHARES and v else v for k, v in row.items()})


_SHARES = ("top1", "top5", "mean_class", "loss")


def _show_sweep(rows: list[dict], choice: int) -> str:
    """The sweep as text, shares in %, the chosen row marked."""
    keys = [k for k in rows[0] if k != "converged"]
    width = 2 + max(10, *map(len, keys))
    lines = ["  " + "".join(f"{k:>{width}}" for k in keys)]
    for i, row in enumerate(rows):
        texts = [
            "-"
            if row[k] is None
            else f"{100 * row[k]:.1f}"
            if k in _SHARES[:3]
            else f"{row[k]:.4f}"
            if k == "loss"
            else f"{row[k]:.4g}"
            for k in keys
        ]
        mark = "" if row.get("converged", True) else "  not converged"
        row = "".join(f"{text:>{width}}" for text in texts)
        lines.append(f"{'>' if i == choice else ' '} {row}{mark}")
    return "\n".join(lines)


def write(where, report: dict) -> None:
    """Writes WHERE.json, .sweep.csv, .classes.csv and .png (the confusion matrix).

    Args:
      where: path without a suffix.
      report: holds sweep (rows), classes (of `class_table`) and confusion (counts), and more.
    """
    with whole_file(f"{where}.json") as part:
        part.write_text(json.dumps(_finite(report), indent=1) + "\n")
    _write_csv(f"{where}.sweep.csv", report["sweep"])
    _write_csv(f"{where}.classes.csv", report["classes"])
    names = [row["class"] for row in report["classes"]]
    plots.confusion_matrix(f"{where}.png", np.array(report["confusion"]), names)


def text(report: dict, what: str) -> str:
    """The sweep and the result for people; `what` names the clips that it is of."""
    shares = ", ".join(
        f"{name} {100 * report['result'][key]:.1f} %"
        for name, key in (("top-1", "top1"), ("top-5", "top5"), ("mean class", "mean_class"))
    )
    sweep = _show_sweep(report["sweep"], report["choice"])
    return f"chosen on {report['chosen_on']}; shares in %\n\n{sweep}\n\n{what}: {shares}"


def _finite(value):
    """JSON has no infinity: None stands for it."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
