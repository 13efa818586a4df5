"""List files: one clip per line, "path label", separated by a comma, a tab or a space.

A list may say more about itself in comments:

    # columns: path start end label
    # flip: no

The columns are those of `COLUMNS`, the path first. Three columns without such a line are taken as
VideoMamba's "path label duration" or mmaction's "path frames label" where they can only be that.
"""

import collections
import csv
import dataclasses
import math
import os
import pathlib
import re

import numpy as np

from stretchysnake_jax.config import ConfigError, nearest
from stretchysnake_jax.data import index as index_lib
from stretchysnake_jax.whole_file import whole_file

MAX_LABEL = 1_000_000  # a larger number in the last column is not a class
# What a column of a list may hold. The length of a clip is counted, not believed: frames and
# duration are read over.
COLUMNS = {
    "path": "a video, a folder of frames, or a record (FILE#7), relative to the root",
    "label": "a class, as a number or a name",
    "start": "first second of the clip in its video",
    "end": "second at which it ends",
    "start_frame": "first frame of the clip, from 0",
    "end_frame": "the frame after its last",
    "group": "clips of one group (source video, person) belong into one split",
    "frames": "number of frames",
    "duration": "seconds",
}
VIDEO_SUFFIXES = (".3gp", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4")
VIDEO_SUFFIXES += (".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv")
_DELIMITERS = {"\t": "tab", ",": "comma", " ": "space"}
_WINDOWS = {("start", "end"): "seconds", ("start_frame", "end_frame"): "frames"}
_DIRECTIONS = {"left", "right", "clockwise", "anticlockwise", "counterclockwise"}


class ListError(ConfigError):
    """A list or an annotation that can't be used; the message names the file, the line and what it
    takes."""


@dataclasses.dataclass
class ClipList:
    """The clips of one split, in the order of its list.

    Attributes:
      paths: of the videos, folders of frames or records, joined with the root.
      labels: class indices, int32 (n,).
      classes: the name of every class.
      windows: the part of its video that a clip is, float64 (n, 2), from the first up to the
        second, which may be inf: the end of the video. None: whole videos.
      unit: of the windows, "seconds" or "frames".
      flip: a mirrored clip keeps its label.
      groups: the source (video, person) of every clip, which splits should not share. None: not
        known.
      missing: what the annotations list and the disk doesn't hold; not among the clips.
      index: the file of the videos' frame counts, see `index.open_counts`; "": none is kept.
    """

    paths: list[str]
    labels: np.ndarray
    classes: list[str]
    windows: np.ndarray | None = None
    unit: str = "seconds"
    flip: bool = True
    groups: list[str] | None = None
    missing: list[str] = dataclasses.field(default_factory=list)
    index: str = ""

    def __len__(self):
        return len(self.paths)

    def window(self, i: int) -> tuple[float, float, str] | None:
        """The part of its video that clip i is: (start, end, unit), or None: all of it."""
        return None if self.windows is None else (*map(float, self.windows[i]), self.unit)

    def select(self, ids) -> "ClipList":
        """The clips `ids` (indices), in that order; what is missing is left behind."""
        return dataclasses.replace(
            self,
            paths=[self.paths[i] for i in ids],
            labels=self.labels[list(ids)],
            windows=None if self.windows is None else self.windows[list(ids)],
            groups=None if self.groups is None else [self.groups[i] for i in ids],
            missing=[],
        )


def keeps_labels_mirrored(classes: list[str]) -> bool:
    """Whether no class is named after a direction (left, clockwise), which a mirror would turn."""
    return not any(_DIRECTIONS & set(re.findall("[a-z]+", name.lower())) for name in classes)


def read_list(
    path, root: str = "", classes: list[str] | None = None, allow_absolute: bool = False
) -> ClipList:
    """Reads a list file.

    The label is the last field of a line unless the list names its columns, so paths may hold
    spaces. Fields may be quoted; blank lines and lines that start with "#" are skipped. Labels are
    either all whole numbers >= 0 or all class names.

    Args:
      path: the list file, UTF-8.
      root: joined in front of every path; "": the folder of the list file.
      classes: the class names in order, for a list that must agree with another one. None: those of
        classes.txt (one per line) beside the list; without it the numbers up to the largest label
        or, for labels that are names, the sorted names of this list.
      allow_absolute: entries may lead out of the root, by an absolute path or by "..".

    Returns:
      The `ClipList`; that the videos exist isn't checked. Clips may be mirrored unless the list
      says "# flip: no" or a class is named after a direction.

    Raises:
      ListError: the file can't be read or used.
    """
    path = pathlib.Path(path)
    columns, rows, flip = _read_table(path)
    columns = columns or _guess_columns(path, rows)
    names_file = path.parent / "classes.txt"
    origin = "the list given with it"
    if classes is None and names_file.exists():
        classes, origin = read_classes(names_file), str(names_file)
    texts = [fields[columns.index("label")] for _, fields in rows]
    numbers = [re.fullmatch(r"[+-]?\d+(\.\d*)?", text) is not None for text in texts]
    if any(numbers):
        labels = [
            _label_number(path, line, text, numbers[0])
            for (line, _), text in zip(rows, texts, strict=True)
        ]
        if classes is None:
            classes = [str(i) for i in range(max(labels) + 1)]
    else:
        if classes is None:
            classes = sorted(set(texts))
        index = {name: i for i, name in enumerate(classes)}
        labels = [index.get(text, len(classes)) for text in texts]
    for (line, _), text, label in zip(rows, texts, labels, strict=True):
        if label >= len(classes):
            raise ListError(
                f"{path}, line {line}: label {text!r} is none of the {len(classes)} classes "
                f"of {origin}"
            )
    folder = os.path.abspath(root or path.parent)
    windows, unit = _read_windows(path, columns, rows)
    grouped = "group" in columns
    return ClipList(
        paths=[
            _join(folder, fields[0], allow_absolute, f"{path}, line {line}")
            for line, fields in rows
        ],
        labels=np.array(labels, np.int32),
        classes=list(classes),
        windows=windows,
        unit=unit,
        flip=keeps_labels_mirrored(classes) if flip is None else flip,
        groups=[fields[columns.index("group")] for _, fields in rows] if grouped else None,
        index=os.path.abspath(path) + index_lib.SUFFIX,
    )


def write_list(path, clips: ClipList, root: str) -> None:
    """Writes clips as a list that `read_list` reads back with the same root; whole or not at all.

    Windows, groups and `flip` are kept; classes.txt is `write_classes`. Clips outside of the root
    are written with absolute paths.

    Raises:
      ListError: a path that no list can hold.
    """
    columns, cells = ["path"], [[_relative(clip, root) for clip in clips.paths]]
    if clips.windows is not None:
        names = next(names for names, unit in _WINDOWS.items() if unit == clips.unit)
        columns += names
        cells += [[f"{x:.10g}" for x in clips.windows[:, i]] for i in range(2)]
    if clips.groups is not None:
        columns.append("group")
        cells.append(clips.groups)
    columns.append("label")
    cells.append(clips.labels.tolist())
    with whole_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# columns: {' '.join(columns)}\n")
        file.write("" if clips.flip else "# flip: no\n")
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows(zip(*cells, strict=True))


def write_classes(path, classes: list[str]) -> None:
    """Writes class names, one per line, as `read_classes` reads them; whole or not at all."""
    with whole_file(path) as part:
        part.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def _relative(clip: str, root: str) -> str:
    """The entry of a clip in a list with that root."""
    root, clip = os.path.abspath(root), os.path.abspath(clip)
    inside = clip.startswith(os.path.join(root, ""))
    entry = clip.removeprefix(os.path.join(root, "")) if inside else clip
    if any(ord(c) < 32 for c in entry) or entry != entry.rstrip():
        raise ListError(f"{clip!r} can't stand in a list: it holds a line break or ends in a space")
    # A reader strips spaces, and takes "#" for a comment.
    return f"./{entry}" if entry[0] in ' #"' else entry


def _join(folder: str, entry: str, allow_absolute: bool, where: str) -> str:
    """The path of an entry; raises ListError if it leads out of the folder."""
    full = os.path.normpath(os.path.join(folder, entry))
    if not allow_absolute and not full.startswith(os.path.join(folder, "")):
        raise ListError(
            f"{where}: {entry!r} leads out of the data root {folder}: set data.root to a folder "
            "above it, or data.allow_absolute to True"
        )
    return full


def read_classes(path) -> list[str]:
    """Reads class names, one per line; blank lines are skipped.

    Raises:
      ListError: the file can't be read, is empty or holds a name twice.
    """
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names:
        raise ListError(f"{path} names no class: one name per line was expected")
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ListError(f"{path} names the class {name!r} {count} times")
    return names


def read_lines(path) -> list[str]:
    """The lines of a text file in UTF-8; raises ListError if it can't be read."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ListError(f"there is no list file {path}") from None
    except UnicodeDecodeError as error:
        raise ListError(f"{path} is not a text file in UTF-8: {error.reason}") from None
    except OSError as error:
        raise ListError(f"{path} can't be read: {error.strerror}") from None


def _read_table(path) -> tuple[list[str] | None, list[tuple[int, list[str]]], bool | None]:
    """Columns (None: not named), rows (line number from 1, fields) and flip (None: not said)."""
    columns, flip, lines = None, None, []
    for number, line in enumerate(read_lines(path), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            lines.append((number, line))
        elif said := re.fullmatch(r"#\s*(columns|flip):(.*)", line):
            where, words = f"{path}, line {number}", said[2].split()
            if said[1] == "columns":
                columns = _check_columns(where, words)
            elif words in (["yes"], ["no"]):
                flip = words == ["yes"]
            else:
                raise ListError(f"{where}: flip is {said[2].strip()!r}: it takes yes or no")
    if not lines:
        raise ListError(f"{path} lists no clip: 'path label' per line was expected")
    count = len(columns) if columns else None
    delimiter = _find_delimiter([line for _, line in lines], count)
    rows = [(number, _split(line, delimiter, count)) for number, line in lines]
    takes = (count,) if count else (3,) if all(len(f) == 3 for _, f in rows) else (2,)
    for (number, line), (_, fields) in zip(lines, rows, strict=True):
        if len(fields) not in takes or not all(fields):
            words = " ".join(columns) if columns else "path label"
            raise ListError(
                f"{path}, line {number}: expected {takes[0]} fields, {words!r}, separated by a "
                f"{_DELIMITERS[delimiter]}, found {len(fields)}: {line!r}"
            )
    return columns, rows, flip


def _check_columns(where: str, words: list[str]) -> list[str]:
    for word in words:
        if word not in COLUMNS:
            raise ListError(f"{where}: unknown column {word!r}: {nearest(word, COLUMNS)}")
    pairs = [pair for pair in _WINDOWS if set(pair) & set(words)]
    whole = len(pairs) < 2 and all(set(pair) <= set(words) for pair in pairs)
    if words[:1] != ["path"] or "label" not in words or len(set(words)) < len(words) or not whole:
        raise ListError(
            f"{where}: the columns are {' '.join(words)!r}: they take path first, label, and "
            "start and end or start_frame and end_frame, each once"
        )
    return words


def _guess_columns(path, rows) -> list[str]:
    """The columns of a list that doesn't name them; raises ListError if they can't be told."""
    if len(rows[0][1]) == 2:
        return ["path", "label"]
    numbers = all(fields[1].isdecimal() and _is_number(fields[2]) for _, fields in rows)
    if numbers and any("." in fields[2] for _, fields in rows):
        return ["path", "label", "duration"]
    folder = not any(fields[0].lower().endswith(VIDEO_SUFFIXES) for _, fields in rows)
    if numbers and folder:
        return ["path", "frames", "label"]
    line, fields = rows[0]
    raise ListError(
        f"{path}, line {line}: expected two fields, 'path label', found 3: "
        f"{' '.join(fields)!r}; a list of three names them in a line of its own, such as "
        "'# columns: path frames label' or '# columns: path label duration'"
    )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?", text) is not None


def _find_delimiter(lines: list[str], count: int | None) -> str:
    """The delimiter that gives every line `count` fields or, if it isn't known, a number as its
    last field, or at least two fields.

    A path may hold any of the three, so the first one that occurs isn't good enough.
    """
    split = {d: [_split(line, d, count) for line in lines] for d in _DELIMITERS}
    tests = [lambda fields: _is_number(fields[-1]), lambda fields: True]
    if count:
        tests = [lambda fields: len(fields) == count]
    for test in tests:
        for delimiter, rows in split.items():
            if all(len(fields) > 1 and test(fields) for fields in rows):
                return delimiter
    return max(split, key=lambda d: sum(len(fields) > 1 for fields in split[d]))


def _split(line: str, delimiter: str, count: int | None) -> list[str]:
    if delimiter != " ":
        fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        return [field.strip() for field in fields]
    path, *fields = line.rsplit(maxsplit=count - 1 if count else 1)
    if len(path) > 1 and path[0] == path[-1] == '"':
        path = path[1:-1]
    elif not count and path.rpartition(" ")[2].isdecimal() and " " in path:
        return [*path.rsplit(maxsplit=1), *fields]  # three fields, not a path with a space
    return [path, *fields]


def _read_windows(path, columns, rows) -> tuple[np.ndarray | None, str]:
    """The windows of the rows and their unit."""
    pair = next((pair for pair in _WINDOWS if pair[0] in columns), None)
    if pair is None:
        return None, "seconds"
    windows = np.empty((len(rows), 2))
    for window, (line, fields) in zip(windows, rows, strict=True):
        texts = [fields[columns.index(name)] for name in pair]
        ok = _is_number(texts[0]) and (_is_number(texts[1]) or texts[1] == "inf")
        if ok:
            window[:] = [float(text) for text in texts]
        if not ok or window[0] >= window[1] or not math.isfinite(window[0]):
            raise ListError(
                f"{path}, line {line}: the clip goes from {texts[0]!r} to {texts[1]!r}: it takes "
                f"two numbers of {_WINDOWS[pair]}, the second larger, or inf"
            )
    return windows, _WINDOWS[pair]


def _label_number(path, line: int, text: str, first_is_number: bool) -> int:
    """A label as a number; the other labels of the file are numbers too."""
    if text.isdecimal() and len(text) < 20 and int(text) <= MAX_LABEL:
        return int(text)
    hint = "" if first_is_number else " (a header line? the file must not have one)"
    raise ListError(
        f"{path}, line {line}: the label is {text!r}, expected a whole number from 0 to "
        f"{MAX_LABEL}, as on other lines{hint}"
    )
