"""What a page says about one run: its config, data, curves, grids, confusion, clips, costs."""

import dataclasses
import functools
import json
import pathlib
import re
import zipfile

import jax
import numpy as np

from stretchysnake_jax import config as config_lib
from stretchysnake_jax import grid, models, report_charts
from stretchysnake_jax.card import data_name
from stretchysnake_jax.config import Config, ConfigError
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.report_charts import Line, hues, line_chart, locate, name_cell, name_frames
from stretchysnake_jax.report_page import Html, details, element, facts, missing, note, table
from stretchysnake_jax.report_sheet import sheets
from stretchysnake_jax.summary import (
    Run,
    end_losses,
    parse_bucket,
    scale_name,
    smooth,
    step_seconds,
    summary,
)

TOGETHER = 6  # buckets whose curves are drawn in one chart
_WINDOW = re.compile(r"(.*) \[(\S+), (\S+)\] (seconds|frames)", re.DOTALL)  # see grid.clip_names


class Subject:
    """A run to report on. What is missing raises a ConfigError that says how to get it.

    Args:
      folder: the workdir.
      name: what the page calls it.
      wanted: names of grids; None: all that are there.

    Raises:
      ConfigError: nothing of a run is there.
    """

    def __init__(self, folder: pathlib.Path, name: str, wanted: list[str] | None = None):
        self.folder, self.name, self._wanted = folder, name, wanted
        if all(maybe(self, what) is None for what in ("config", "run", "grids")):
            raise ConfigError(f"{folder} holds no config, metrics or grid: is it a run's workdir?")

    @functools.cached_property
    def config(self) -> Config:
        """The resolved configuration."""
        found = config_lib.load(self.folder / "config.json")
        data, optim = config_lib.resolve(found.data), config_lib.resolve(found.optim)
        return dataclasses.replace(found, data=data, optim=optim)

    @functools.cached_property
    def run(self) -> Run:
        """The metrics."""
        try:
            return Run(self.folder, self.name)
        except ConfigError:
            raise
        except ValueError as error:  # of a damaged line
            raise ConfigError(str(error)) from error

    @functools.cached_property
    def grids(self) -> dict[str, list[dict]]:
        """The rows of the grids by name: "grid" first, the others by name."""
        found = {}
        for name in self._wanted or sorted(
            (path.stem for path in self.folder.glob("*.json")), key=lambda n: (n != "grid", n)
        ):
            try:
                rows = grid.read(self.folder / name)
            except ConfigError:
                if self._wanted:
                    raise
                continue  # another table
            if rows and all(set(row) >= set(grid.COLUMNS) for row in rows):
                if self._wanted or not name.endswith(".partial"):
                    found[name] = rows
            elif self._wanted:
                raise ConfigError(
                    f"{self.folder / name}.json lacks columns that this version draws: run "
                    f"'stretchysnake evaluate --workdir {self.folder} --name {name}' again"
                )
        if not found:
            grid.read(self.folder / "grid")  # says what to run
            raise ConfigError(
                f"no grid of this version in {self.folder}: run 'stretchysnake evaluate --workdir "
                f"{self.folder}' again"
            )
        return found

    @functools.cached_property
    def answers(self) -> tuple[str, dict, ClipList]:
        """(name of a grid, its best cell with the `guesses` of every clip, the clips)."""
        for name, rows in self.grids.items():
            try:
                with np.load(self.folder / f"{name}.npz") as file:
                    arrays = {key: file[key] for key in ("clips", "labels", "guesses")}
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                continue
            shape = len(rows), len(arrays["labels"])
            if arrays["guesses"].shape == shape and len(arrays["clips"]) == shape[1]:
                best = grid.best(rows)
                best = best | {"guesses": arrays["guesses"][rows.index(best)]}
                return name, best, self._listed(arrays)
        raise ConfigError(
            f"no grid of {self.folder} says what every clip was taken for: run 'stretchysnake "
            f"evaluate --workdir {self.folder} --name {next(iter(self.grids))}' again"
        )

    def _listed(self, arrays) -> ClipList:
        paths, windows, unit = [str(name) for name in arrays["clips"]], None, "seconds"
        parts = [_WINDOW.fullmatch(path) for path in paths]
        if all(parts):
            paths, unit = [part[1] for part in parts], parts[0][4]
            windows = np.array([(float(part[2]), float(part[3])) for part in parts])
        file = self.folder / "classes.txt"
        classes = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        count = 1 + int(max(arrays["labels"].max(), arrays["guesses"].max()))
        classes += map(str, range(len(classes), count))
        return ClipList(paths, arrays["labels"], classes, windows, unit)


def maybe(subject: Subject, what: str):
    """An attribute of a subject, or None where it is missing."""
    try:
        return getattr(subject, what)
    except ConfigError:
        return None


def run_section(subject: Subject, number: int, sheet: int, on_clip) -> Html:
    """All about one run.

    Args:
      subject: the run.
      number: of the run on the page.
      sheet: clips on each contact sheet.
      on_clip: called after every clip read for them.
    """
    parts = [
        ("", lambda: [_about(subject)]),
        ("Data", lambda: _data(subject)),
        ("Curves", lambda: _curves(subject.run)),
        ("Grids", lambda: _grids(subject)),
        ("Confusion", lambda: _confusion(subject)),
        ("Clips", lambda: sheets(subject.config, *subject.answers, sheet, on_clip)),
        ("Cost of training", lambda: _training(subject.run)),
        ("Unreadable clips", lambda: _unreadable(subject)),
        ("Configuration", lambda: [_config(subject.config)]),
    ]
    found = [element("h2", subject.name)]
    for title, make in parts:
        found += [element("h3", title)] if title else []
        try:
            found += make()
        except ConfigError as error:
            found.append(missing(f"{str(error).rstrip('.')}."))
    return element("section", *found, id=f"run-{number}")


def _about(subject: Subject) -> Html:
    config, pairs = subject.config, [("workdir", subject.folder)]
    shapes = jax.eval_shape(lambda key: models.init(config.model, key)[1], jax.random.key(0))
    size, patch = ("x".join(map(str, pair)) for pair in (config.model.size, config.model.patch))
    pairs += [
        ("variant", config.stretch.variant),
        ("encoder", f"{config.model.depth} blocks of {config.model.dim} channels"),
        ("parameters", f"{models.count(shapes):,}"),
        ("base scale", f"{name_frames(config.model.frames or 1)} of {size}, patches of {patch}"),
        ("seed", config.train.seed),
        ("precision", config.train.dtype),
        ("started from", config.train.init_from or None),
    ]
    run = maybe(subject, "run")
    lines = summary(run).splitlines()[1:] if run else []
    return facts(pairs + [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines])


def _data(subject: Subject) -> list[Html]:
    data, rows = subject.config.data, []
    whole = dataclasses.replace(data, window=0.0)  # to cut into windows opens every video
    for split in config_lib.SPLITS:
        name = data_name(data, split)
        try:
            clips = load_clips(whole, split, optional=True) if name else None
        except (ConfigError, OSError):
            rows.append((split, name, "not at hand when this page was made", ""))
            continue
        if clips:
            lacking = f", {len(clips.missing):,} more are missing" if clips.missing else ""
            rows.append((split, name, f"{len(clips):,}{lacking}", f"{len(clips.classes):,}"))
    videos = "videos, each cut into windows" if data.window else "clips"
    return [table(("split", "data", videos, "classes"), rows, class_="words")]


def _curves(run: Run) -> list[Html]:
    found = [
        _overview(run, "loss", "loss", 1, False),
        _overview(run, "top1", "top-1, %", 100, True),
    ]
    steps, rates = run.column("learning_rate")
    if len(steps):
        rate = line_chart("Learning rate", "learning rate", [Line("rate", steps, rates, 215)])
        found.append(rate)
    by_bucket = [*_by_bucket(run, "loss", "loss", 1), *_by_bucket(run, "top1", "top-1, %", 100)]
    return [
        note("Training is a moving average. Point at a chart for its values."),
        element("div", *found, class_="charts"),
        *([element("div", *by_bucket, class_="charts")] if len(run.buckets) > 1 else []),
    ]


def _overview(run: Run, field: str, unit: str, factor: float, zero: bool) -> Html:
    steps, values = run.column(field)
    lines = [Line("training", steps, factor * smooth(values), 215)]
    steps, values = run.column(f"val_{field}", run.validations)
    lines.append(Line("validation", steps, factor * values, 25, dots=True, dashed=True))
    if not any(len(line.steps) for line in lines):
        raise ConfigError(f"the metrics of {run.name} hold no {field} that is a number")
    title = {"loss": "Loss, all buckets", "top1": "Top-1, all buckets"}[field]
    return line_chart(title, unit, lines, zero=zero)


def _by_bucket(run: Run, field: str, unit: str, factor: float) -> list[Html]:
    """Charts of a field: a line per bucket, a chart per frame count where the buckets are many."""
    groups: dict[str, dict[str, list]] = {}
    for bucket, logged in run.buckets.items():
        frames = name_frames(parse_bucket(bucket)[0])
        if len(run.buckets) <= TOGETHER:
            groups.setdefault("by bucket", {})[f"{frames}, {scale_name(bucket)}"] = logged
        else:
            groups.setdefault(frames, {})[scale_name(bucket)] = logged
    charts = {}
    for group, members in groups.items():
        lines = []
        for (label, logged), hue in zip(members.items(), hues(len(members)), strict=True):
            steps, values = run.column(field, logged)
            lines.append(Line(label, steps, factor * smooth(values, 0.12), hue))
        if any(len(line.steps) for line in lines):
            charts[f"{'Loss' if field == 'loss' else 'Top-1'}, {group}"] = lines
    among = [line for lines in charts.values() for line in lines]
    return [
        line_chart(title, unit, lines, zero=field == "top1", among=among)
        for title, lines in charts.items()
    ]


def _grids(subject: Subject) -> list[Html]:
    found = []
    for name, rows in subject.grids.items():
        means = ", ".join(f"{which} {text}" for which, text in average(rows).items())
        charts = [element("figure", report_charts.heat_map(rows)), report_charts.cost_chart(rows)]
        found.append(element("h4", f"{name}, {count_clips(rows)}"))
        found.append(note(f"Mean top-1, %: {means}. Point at a cell for all it measured."))
        found.append(element("div", *charts, class_="pair"))
        found.append(details(f"Costs of {name}", *_costs(subject, name, rows)))
    return found


def count_clips(rows: list[dict]) -> str:
    """How many clips the cells of a grid saw, in words."""
    counts = sorted({row["clips"] for row in rows if "clips" in row})
    return f"{' or '.join(f'{count:,}' for count in counts) or '?'} clips"


def average(rows: list[dict], among: set | None = None) -> dict[str, str]:
    """Mean top-1 in % of all, the trained and the unseen cells, with their number.

    Args:
      rows: of a grid.
      among: only cells whose (frames, height, width) is in it.
    """
    rows, found = [row for row in rows if among is None or locate(row) in among], {}
    for which, trained in (("all cells", None), ("trained cells", True), ("unseen cells", False)):
        count = sum(trained is None or row["trained"] == trained for row in rows)
        mean = 100 * grid.mean_top1(rows, trained)
        found[which] = f"{mean:.1f} ({count})" if count else "none"
    return found


def _costs(subject: Subject, name: str, rows: list[dict]) -> list[Html]:
    speed = _speed_ups(subject.folder / f"{name}_efficiency.json")
    lines = []
    for row in rows:
        xla = row["xla_gflops"]
        line = [grid.cell_name(row)]
        line += [f"{row['gflops']:.3g}", f"{row['published_gflops']:.3g}"]
        line += ["unknown" if xla is None else f"{xla:.3g}"]
        line += [f"{row[key]:.3g}" for key in ("memory_mib", "clips_per_s")]
        line += [speed.get((*locate(row), row["patch"]), "")] if speed else []
        lines.append([*line, f"{100 * row['top1']:.1f}", "yes" if row["trained"] else "no"])
    head = ["scale", "GFLOPs", "published", "XLA", "MiB", "clips/s"]
    head += ["speed-up"] if speed else []
    text = "GFLOPs of a clip with all its views, a multiply-add is one (for XLA two); MiB of a "
    text += "batch; clips/s of the forward pass."
    return [table([*head, "top-1, %", "trained"], lines), note(text)]


def _speed_ups(file: pathlib.Path) -> dict[tuple, str]:
    """What `evaluate --efficiency` measured, by scale and patch; empty if it was not asked to."""
    try:
        rows = json.loads(file.read_text()) if file.exists() else []
        return {(*locate(row), row["patch"]): f"{row['speedup']:.2f}" for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is no table of 'stretchysnake evaluate --efficiency': run it again"
        ) from error


def _confusion(subject: Subject) -> list[Html]:
    name, row, clips = subject.answers
    counts = grid.confusion(row, clips)
    text = f"Of the best cell of {name}, {name_cell(row)}: {counts.sum():,} clips, "
    text += f"{100 * counts.trace() / max(1, counts.sum()):.1f} % right. Numbers are % of the "
    text += "clips of a class (row) that were taken for another (column)."
    return [note(text), report_charts.confusion_map(counts, clips.classes)]


def _training(run: Run) -> list[Html]:
    seconds, losses, rows = step_seconds(run), end_losses(run), []
    for name, logged in run.buckets.items():
        took, loss = seconds.get(name), losses.get(name)
        _, clips = run.column("clips", logged)
        rows.append(
            (
                name,
                f"{len(logged):,}",
                f"{np.median(clips):g}" if len(clips) else "",
                "" if took is None else f"{took:.3g}",
                "" if loss is None else f"{loss:.3f}",
            )
        )
    head = ("bucket", "steps logged", "clips", "seconds of a step (median)", "loss at the end")
    return [table(head, rows), note("The loss is the mean over the last fifth of the steps.")]


def _unreadable(subject: Subject) -> list[Html]:
    rows = [row for rows in (maybe(subject, "grids") or {}).values() for row in rows]
    bad = {path: reason for row in rows for path, reason in row.get("unreadable", ())}
    run = maybe(subject, "run")
    trained = run.steps[-1].get("unreadable", 0) if run else 0
    text = f"In training {trained or 'none'}, in evaluation {len(bad) or 'none'}."
    return [note(text), *([table(("clip", "reason"), bad.items(), class_="words")] if bad else [])]


def list_fields(config: Config) -> dict[str, str]:
    """Every field by its dotted name, its value as JSON."""
    found = {}
    for name in config_lib.field_names(config):
        value = functools.reduce(getattr, name.split("."), config)
        found[name] = json.dumps(value, ensure_ascii=False)
    return found


def _config(config: Config) -> Html:
    rows = list_fields(config).items()
    return details("Every field, resolved", table(("field", "value"), rows, class_="words"))
