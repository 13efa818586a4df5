"""List files: one "path label" per line, separated by a comma, a tab or a space."""

import collections
import csv
import dataclasses
import os
import pathlib
import re

import numpy as np

from stretchysnake_jax.config import ConfigError

MAX_LABEL = 1_000_000  # a larger number in the last column is not a class
_DELIMITERS = {"\t": "tab", ",": "comma", " ": "space"}


class ListError(ConfigError):
    """A list file that can't be used; the message names the file, the line and what it takes."""


@dataclasses.dataclass
class ClipList:
    """The clips of a list file, in its order.

    Attributes:
      paths: of the videos, joined with the root.
      labels: class indices, int32 (n,).
      classes: the name of every class.
    """

    paths: list[str]
    labels: np.ndarray
    classes: list[str]

    def __len__(self):
        return len(self.paths)


def read_list(path, root: str = "", classes: list[str] | None = None) -> ClipList:
    """Reads a list file.

    The label is the last field of a line, so paths may hold spaces. Fields may be quoted; blank
    lines and lines that start with "#" are skipped. Labels are either all whole numbers >= 0 or
    all class names.

    Args:
      path: the list file, UTF-8.
      root: joined in front of every path; "": the folder of the list file.
      classes: the class names in order, for a list that must agree with another one. None: those of
        classes.txt (one per line) beside the list; without it the numbers up to the largest label
        or, for labels that are names, the sorted names of this list.

    Returns:
      The `ClipList`; that the videos exist isn't checked.

    Raises:
      ListError: the file can't be read or used.
    """
    path = pathlib.Path(path)
    rows = _read_rows(path)
    names_file = path.parent / "classes.txt"
    origin = "the list given with it"
    if classes is None and names_file.exists():
        classes, origin = read_classes(names_file), str(names_file)
    texts = [label for _, _, label in rows]
    numbers = [re.fullmatch(r"[+-]?\d+(\.\d*)?", text) is not None for text in texts]
    if any(numbers):
        labels = [_number(path, line, label, numbers[0]) for line, _, label in rows]
        if classes is None:
            classes = [str(i) for i in range(max(labels) + 1)]
    else:
        if classes is None:
            classes = sorted(set(texts))
        index = {name: i for i, name in enumerate(classes)}
        labels = [index.get(text, len(classes)) for text in texts]
    for (line, _, text), label in zip(rows, labels, strict=True):
        if label >= len(classes):
            raise ListError(
                f"{path}, line {line}: label {text!r} is none of the {len(classes)} classes "
                f"of {origin}"
            )
    folder = os.path.abspath(root or path.parent)
    return ClipList(
        paths=[os.path.join(folder, clip) for _, clip, _ in rows],
        labels=np.array(labels, np.int32),
        classes=list(classes),
    )


def read_classes(path) -> list[str]:
    """Reads class names, one per line; blank lines are skipped.

    Raises:
      ListError: the file can't be read, is empty or holds a name twice.
    """
    names = [line.strip() for line in _read_lines(path) if line.strip()]
    if not names:
        raise ListError(f"{path} names no class: one name per line was expected")
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ListError(f"{path} names the class {name!r} {count} times")
    return names


def _read_lines(path) -> list[str]:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ListError(f"there is no list file {path}") from None
    except UnicodeDecodeError as error:
        raise ListError(f"{path} is not a text file in UTF-8: {error.reason}") from None
    except OSError as error:
        raise ListError(f"{path} can't be read: {error.strerror}") from None


def _read_rows(path) -> list[tuple[int, str, str]]:
    """The rows of a list file: (line number from 1, path, label), both texts."""
    lines = [(i, line.strip()) for i, line in enumerate(_read_lines(path), 1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ListError(f"{path} lists no clip: 'path label' per line was expected")
    delimiter = _find_delimiter([line for _, line in lines])
    rows = []
    for number, line in lines:
        fields = _split(line, delimiter)
        if len(fields) != 2 or not all(fields):
            raise ListError(
                f"{path}, line {number}: expected two fields, 'path label', separated by a "
                f"{_DELIMITERS[delimiter]}, found {len(fields)}: {line!r}"
            )
        rows.append((number, fields[0], fields[1]))
    return rows


def _find_delimiter(lines: list[str]) -> str:
    """The delimiter that gives every line a whole number as its last field, or at least two fields.

    A path may hold any of the three, so the first one that occurs isn't good enough.
    """
    split = {d: [_split(line, d) for line in lines] for d in _DELIMITERS}
    for test in (lambda fields: fields[-1].isdecimal(), lambda fields: True):
        for delimiter, rows in split.items():
            if all(len(fields) > 1 and test(fields) for fields in rows):
                return delimiter
    return max(split, key=lambda d: sum(len(fields) > 1 for fields in split[d]))


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter != " ":
        fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        return [field.strip() for field in fields]
    path, _, label = line.rpartition(" ")
    path = path.strip()
    if len(path) > 1 and path[0] == path[-1] == '"':
        path = path[1:-1]
    elif path.rpartition(" ")[2].isdecimal():  # "path frames label", not a path with a space
        return [*path.rsplit(maxsplit=1), label]
    return [path, label] if path else [label]


def _number(path, line: int, text: str, first_is_number: bool) -> int:
    """A label as a number; the other labels of the file are numbers too."""
    if text.isdecimal() and len(text) < 20 and int(text) <= MAX_LABEL:
        return int(text)
    hint = "" if first_is_number else " (a header line? the file must not have one)"
    raise ListError(
        f"{path}, line {line}: the label is {text!r}, expected a whole number from 0 to "
        f"{MAX_LABEL}, as on other lines{hint}"
    )
