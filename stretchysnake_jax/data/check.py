"""Whether the clips of lists and data sets are there, can be decoded and are long enough."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable

import numpy as np

from stretchysnake_jax.data import decode, records, source
from stretchysnake_jax.data.index import open_counts
from stretchysnake_jax.data.lists import ClipList, ListError, write_classes, write_list
from stretchysnake_jax.whole_file import whole_file

EDGES = (0, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600)  # of the histogram of durations, seconds
# Headers often count up to three frames too many. A file that lacks more of them, and more than
# this share, is damaged.
_LACKING, _LACKING_SHARE = 3, 0.02
_MISSING = (None, None, None)
_SHOWN = 20  # missing clips and classes that are printed; more of them are counted


@dataclasses.dataclass
class Report:
    """What was found out about a split.

    Attributes:
      clips: the list that was looked at.
      missing: the paths of those that aren't there, one per clip.
      unreadable: path -> why nothing can be read from it.
      damaged: path -> what is wrong with a file that can be read in part.
      short: indices of clips with fewer frames than asked for.
      frames: of every clip, float64 (n,); NaN where unknown.
      seconds: of every clip, float64 (n,); NaN where unknown.
    """

    clips: ClipList
    missing: list[str]
    unreadable: dict[str, str]
    damaged: dict[str, str]
    short: list[int]
    frames: np.ndarray
    seconds: np.ndarray

    @property
    def good(self) -> ClipList:
        """The clips that can be read, those that are damaged or short among them."""
        return self.clips.select(np.flatnonzero(~np.isnan(self.frames)))

    @property
    def problems(self) -> dict[str, str]:
        """Path -> what is wrong with it, once per path; the missing ones last."""
        return self.unreadable | self.damaged | {p: "it is missing" for p in self.missing}


def check_clips(
    clips: ClipList,
    frames: int = 1,
    full: bool = False,
    workers: int | None = None,
    on_file: Callable[[int, int], None] | None = None,
) -> Report:
    """Looks at every clip of a list.

    Args:
      clips: the list, with what is missing by its reader's account.
      frames: clips with fewer are short.
      full: decode whole files and count their frames. Else only the first frame is decoded, the
        header is believed for the rest, and damage further on isn't found. The counts are kept
        in the list's index.
      workers: threads; None: one per core.
      on_file: called with (files done, files in all).

    Returns:
      The `Report`.
    """
    decode.set_up_opencv()
    counts = open_counts(clips.index) if full and clips.index else None
    files = list(dict.fromkeys(clips.paths))
    looked: dict[str, tuple] = {}
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        look = functools.partial(_look_at, full=full, counts=counts)
        for path, seen in zip(files, pool.map(look, files), strict=True):
            looked[path] = seen
            if on_file:
                on_file(len(looked), len(files))
    if counts is not None:
        counts.save()
    missing = clips.missing + [p for p in clips.paths if looked[p] == _MISSING]
    unreadable, damaged = {}, {}
    for path, (count, _, wrong) in looked.items():
        if wrong:
            (unreadable if count is None else damaged)[path] = wrong
    lengths, seconds = np.full((2, len(clips)), np.nan)
    for i, path in enumerate(clips.paths):
        count, rate, _ = looked[path]
        if count is None:
            continue
        try:
            lengths[i] = _clip_length(path, clips.window(i), count)
            seconds[i] = lengths[i] / rate if rate else np.nan
        except decode.UnreadableVideo as error:
            unreadable[path] = error.reason
    short = np.flatnonzero(lengths < frames).tolist()
    return Report(clips, missing, unreadable, damaged, short, lengths, seconds)


def _look_at(path: str, full: bool, counts=None) -> tuple[int | None, float | None, str | None]:
    """(frames, rate, what is wrong) of a file; `_MISSING` if it isn't there."""
    file = path.rpartition("#")[0] if records.is_address(path) else path
    if not os.path.lexists(file):
        return _MISSING
    claims = []

    def choose(n):
        claims.append(n)
        return np.arange(n if full else 1)

    try:
        _, count = source.read_clip(path, choose, lambda frame: frame[:1, :1], counts=counts)
    except decode.UnreadableVideo as error:
        return None, None, error.reason
    try:
        rate = source.frame_rate(path)
    except decode.UnreadableVideo:  # frames in a folder have none
        rate = None
    wrong = None
    if claims[0] - count > max(_LACKING, _LACKING_SHARE * claims[0]):
        wrong = (
            f"its header says {claims[0]} frames, {count} can be decoded: the file is cut off or "
            "damaged, or its header is wrong"
        )
    return count, rate, wrong


def _clip_length(path, window, count: int) -> int:
    """The frames of a clip; raises UnreadableVideo if it lies behind the end of its video."""
    if window is None:
        return count
    rate = source.frame_rate(path) if window[2] == "seconds" else 1.0
    if window[0] * rate >= count:
        reason = f"a clip starts at {window[0]:g} {window[2]}, the video has {count} frames"
        raise decode.UnreadableVideo(path, reason)
    first, end = source.frame_span(window, count, rate)
    return end - first


def overlaps(reports: dict[str, Report]) -> list[str]:
    """Sentences about what splits have in common and should not: videos, and groups."""
    said, names = [], list(reports)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            pair = reports[one].clips, reports[other].clips
            for what, sets in (
                ("videos", [set(clips.paths) for clips in pair]),
                ("groups", [set(clips.groups or ()) for clips in pair]),
            ):
                both = sorted(sets[0] & sets[1])
                if both:
                    said.append(f"{one} and {other} share {len(both)} {what}, such as {both[0]}")
    return said


def text(name: str, report: Report, frames: int, published: int | None = None) -> str:
    """A split's report for people."""
    missing, listed = len(report.missing), len(report.clips) + len(report.clips.missing)
    lines = [
        f"{name}: {listed} clips listed, {listed - missing} found, {missing} missing, "
        f"{len(report.unreadable)} unreadable, {len(report.damaged)} damaged"
    ]
    if frames > 1:
        lines[0] += f", {len(report.short)} shorter than {frames} frames"
    if published and published != listed:
        lines.append(f"  published: {published} clips, {listed - published:+d} here")
    problems = list(report.problems.items())
    shown = len(report.unreadable) + len(report.damaged) + _SHOWN
    lines += [f"  {path}: {reason}" for path, reason in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more are missing; --write lists them all")
    known = ~np.isnan(report.frames)
    if not known.any():
        return "\n".join(lines)
    counts = np.bincount(report.clips.labels[known], minlength=len(report.clips.classes))
    order = np.argsort(-counts, kind="stable")
    lines.append(
        f"  {len(counts)} classes of {counts.min()} to {counts.max()} clips, "
        f"median {np.median(counts):g}"
    )
    half = _SHOWN // 2
    picked = order if len(order) <= _SHOWN else [*order[:half], None, *order[-half:]]
    wide = max(len(report.clips.classes[i]) for i in picked if i is not None)
    for i in picked:
        lines.append("    ..." if i is None else _bar(report.clips.classes[i], wide, counts, i))
    lengths = report.frames[known]
    lines.append(f"  frames: {lengths.min():g} to {lengths.max():g}, median {np.median(lengths):g}")
    seconds = report.seconds[~np.isnan(report.seconds)]
    if len(seconds):
        bins = np.histogram(seconds, [*EDGES, np.inf])[0]
        lines.append(f"  seconds: {seconds.min():.2f} to {seconds.max():.2f}")
        names = [f"{a} to {b}" for a, b in itertools.pairwise(EDGES)]
        names.append(f"from {EDGES[-1]}")
        filled = np.flatnonzero(bins)
        lines += [_bar(names[i], 10, bins, i) for i in range(filled[0], filled[-1] + 1)]
    return "\n".join(lines)


def _bar(name: str, wide: int, counts, i: int) -> str:
    bar = "#" * round(40 * counts[i] / counts.max())
    return f"    {name:<{wide}} {counts[i]:>7}  {bar}".rstrip()


def write(folder, reports: dict[str, Report], root: str, sources: list[str]) -> list[str]:
    """Writes a list per split, classes.txt, and left_out.txt with what is wrong with the others.

    Lists hold what can be read, damaged and short clips among it; `read_list` reads them back with
    the same root.

    Args:
      folder: made if it isn't there.
      reports: split -> report.
      root: what paths are relative to.
      sources: the list files that were read, which are not overwritten.

    Returns:
      The paths of the lists.

    Raises:
      ListError: a list would replace the one it comes from, or the splits' classes differ.
    """
    folder = pathlib.Path(folder)
    classes = next(iter(reports.values())).clips.classes
    lists = {name: folder / f"{name}.txt" for name in reports}
    for name, report in reports.items():
        if any(os.path.abspath(lists[name]) == os.path.abspath(s) for s in sources):
            raise ListError(f"--write would replace {lists[name]}: it takes another folder")
        if report.clips.classes != classes:
            raise ListError(f"the classes of {name} are others than those of {next(iter(reports))}")
    folder.mkdir(parents=True, exist_ok=True)
    left_out = {}
    for name, report in reports.items():
        left_out |= {path: why for path, why in report.problems.items()}
        if len(report.good):
            write_list(lists[name], report.good, root)
        else:
            del lists[name]
    write_classes(folder / "classes.txt", classes)
    with whole_file(folder / "left_out.txt") as part:
        part.write_text("".join(f"{path}: {why}\n" for path, why in left_out.items()))
    return [str(path) for path in lists.values()]


def plot(path, reports: dict[str, Report]) -> None:
    """Draws the histograms of classes and durations, a row per split, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8 * len(reports)), dpi=110, layout="constrained")
    axes = figure.subplots(len(reports), 2, squeeze=False)
    for (classes, durations), (name, report) in zip(axes, reports.items(), strict=True):
        known = ~np.isnan(report.frames)
        counts = np.bincount(report.clips.labels[known], minlength=len(report.clips.classes))
        classes.bar(range(len(counts)), counts, width=0.9 if len(counts) < 60 else 1.0)
        if len(counts) <= 30:
            classes.set_xticks(range(len(counts)), report.clips.classes, rotation=60, fontsize=7)
        else:
            classes.set_xlabel("class")
        classes.set_ylabel("clips")
        classes.yaxis.get_major_locator().set_params(integer=True)
        classes.set_title(f"{name}: {known.sum()} clips, {len(counts)} classes", fontsize=10)
        seconds = report.seconds[~np.isnan(report.seconds)]
        unit = "seconds" if len(seconds) else "frames"
        durations.hist(seconds if len(seconds) else report.frames[known], bins=40)
        durations.set_xlabel(unit)
        durations.set_title(f"{name}: length, {unit}", fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
