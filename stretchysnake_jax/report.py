"""The command `stretchysnake report`: what runs wrote about themselves, as one HTML page."""

import argparse
import datetime
import importlib.metadata
import pathlib
import platform

from stretchysnake_bench.machine import describe_machine

import stretchysnake_jax
from stretchysnake_jax import grid
from stretchysnake_jax.clock import Progress, duration
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.report_charts import Line, hues, line_chart, locate, name_cell
from stretchysnake_jax.report_page import Html, element, facts, note, page, table
from stretchysnake_jax.report_run import (
    Subject,
    average,
    count_clips,
    list_fields,
    maybe,
    run_section,
)
from stretchysnake_jax.summary import smooth
from stretchysnake_jax.whole_file import whole_file

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PACKAGES += ("opencv-python-headless",)


def comparison(subjects: list[Subject]) -> Html:
    """Several runs side by side: what differs in their configurations, results, curves."""
    names = [subject.name for subject in subjects]
    found = [element("h2", "The runs side by side")]
    fields = [list_fields(config) if (config := maybe(s, "config")) else {} for s in subjects]
    keys = dict.fromkeys(name for of_run in fields for name in of_run)
    rows = [[key, *(of_run.get(key, "not known") for of_run in fields)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    found.append(element("h3", "What differs in the configuration"))
    found.append(
        table(("field", *names), rows, class_="words") if rows else note("Nothing differs.")
    )
    found += [element("h3", "Results"), *_results(subjects)]
    curves = []
    for field, title, unit, factor in (
        ("loss", "Training loss", "loss", 1),
        ("top1", "Validation top-1", "top-1, %", 100),
    ):
        lines = []
        for subject, hue in zip(subjects, hues(len(subjects)), strict=True):
            if run := maybe(subject, "run"):
                validated = field == "top1"
                which = ("val_top1", run.validations) if validated else (field,)
                steps, values = run.column(*which)
                values = factor * (values if validated else smooth(values))
                lines.append(Line(subject.name, steps, values, hue, dots=validated))
        if any(len(line.steps) for line in lines):
            curves.append(line_chart(title, unit, lines, zero=field == "top1"))
    found.append(element("div", *curves, class_="charts"))
    return element("section", *found, id="runs")


def _results(subjects: list[Subject]) -> list[Html]:
    """A column per run; means are over the cells that all evaluated runs have."""
    grids = [maybe(subject, "grids") or {} for subject in subjects]
    known = [of_run for of_run in grids if of_run]
    shared = [name for name in (known[0] if known else ()) if all(name in g for g in known)]
    names = [shared[0] if shared and g else next(iter(g), None) for g in grids]
    cells = [g[name] if name else None for g, name in zip(grids, names, strict=True)]
    places = [{locate(row) for row in rows} for rows in cells if rows]
    common = set.intersection(*places) if places else set()
    columns = []
    for subject, name, rows in zip(subjects, names, cells, strict=True):
        column = {"variant": "", "steps": "", "time": "", "training loss at the end": ""}
        if config := maybe(subject, "config"):
            column["variant"] = config.stretch.variant
        if run := maybe(subject, "run"):
            column["steps"] = f"{run.steps[-1]['step']:,}"
            column["time"] = duration(run.steps[-1].get("elapsed", 0.0))
            _, losses = run.column("loss")
            column["training loss at the end"] = f"{smooth(losses)[-1]:.3f}" if len(losses) else ""
        tops = run.column("val_top1", run.validations)[1] if run else []
        column["best validation top-1, %"] = f"{100 * max(tops):.1f}" if len(tops) else ""
        column["grid"] = "none: 'stretchysnake evaluate' makes one"
        if rows:
            column["grid"] = f"{name}, {count_clips(rows)}"
        means = average(rows, common) if rows else {}
        for which in ("all cells", "trained cells", "unseen cells"):
            column[f"mean top-1, %, of {which}"] = means.get(which, "")
        best = grid.best(rows) if rows else None
        text = (
            best and f"{100 * best['top1']:.1f} at {name_cell(best)}, {best['gflops']:.3g} GFLOPs"
        )
        column["best cell, top-1, %"] = text or ""
        columns.append(column)
    lines = [[key, *(column[key] for column in columns)] for key in columns[0]]
    text = f"Means are over the {len(common)} scales (frames, size) that all evaluated runs have, "
    text += "trained and unseen as each run was trained; their number in brackets. 'stretchysnake "
    text += "compare' gives the differences cell by cell, with intervals."
    return [table(("", *(s.name for s in subjects)), lines, class_="words"), note(text)]


def _environment() -> list[Html]:
    """The machine that made the page."""
    found, installed = describe_machine(), []
    for name in PACKAGES:
        try:
            installed.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:  # another build of OpenCV will do
            installed.append((name, "not known"))
    pairs = [
        ("made", datetime.datetime.now().astimezone().isoformat(" ", "minutes")),
        ("stretchysnake-jax", stretchysnake_jax.__version__),
        ("Python", platform.python_version()),
        *installed,
        ("system", platform.platform()),
        ("processor", f"{found['cpu']}, {found['cores']} cores"),
        ("device", found["device"]["kind"]),
    ]
    text = "Of the machine that made this page; a run does not record its own."
    return [element("h2", "Environment"), note(text), facts(pairs)]


def make(subjects: list[Subject], sheet: int = 12, on_clip=lambda: None) -> str:
    """The page.

    Args:
      subjects: the runs.
      sheet: clips on each contact sheet.
      on_clip: called after every clip read for them.
    """
    names = [subject.name for subject in subjects]
    several = len(subjects) > 1
    links = [("runs", "Side by side")] if several else []
    links += [(f"run-{i}", name) for i, name in enumerate(names)]
    links.append(("environment", "Environment"))
    title = f"Report: {', '.join(names)}"
    return page(
        title,
        element("h1", title),
        element("nav", *(element("a", text, href=f"#{to}") for to, text in links)),
        *([comparison(subjects)] if several else []),
        *(run_section(subject, i, sheet, on_clip) for i, subject in enumerate(subjects)),
        element("footer", *_environment(), id="environment"),
    )


def main(argv: list[str]) -> int:
    """The command `stretchysnake report`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake report",
        description="Writes one HTML page about runs that needs nothing but itself: configuration, "
        "curves, grids, accuracy against cost, confusion, right and wrong clips, costs.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's workdir")
    parser.add_argument(
        "--out", metavar="FILE.html", help="default: RUN/report.html, of several report.html"
    )
    parser.add_argument(
        "--grid",
        action="append",
        metavar="NAME",
        help="draw this grid, may be given again; default: all that a run has",
    )
    parser.add_argument(
        "--sheet", type=int, default=12, metavar="N", help="clips on each sheet (default 12)"
    )
    args = parser.parse_args(argv)
    if args.sheet < 1:
        raise ConfigError(f"--sheet is {args.sheet}: it takes a number >= 1")
    folders = [pathlib.Path(run) for run in args.runs]
    out = pathlib.Path(args.out or (folders[0] if len(folders) == 1 else ".") / "report.html")
    if out.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out is {args.out!r}: it takes the name of an .html file")
    short = [folder.absolute().name for folder in folders]
    names = short if len(set(short)) == len(short) else args.runs
    subjects = [Subject(f, name, args.grid) for f, name in zip(folders, names, strict=True)]
    progress, total, done = Progress(), 2 * args.sheet * len(subjects), 0
    show = progress.counter("report: clips")

    def on_clip():
        nonlocal done
        done += 1
        show(done, total)

    text = make(subjects, args.sheet, on_clip)
    progress.close()
    with whole_file(out) as part:
        # A file name may hold bytes that are no text.
        part.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    print(f"report: {out}, {out.stat().st_size / 1e6:.1f} MB")
    return 0
