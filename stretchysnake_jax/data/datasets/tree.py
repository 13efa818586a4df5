"""What the readers of data sets share: finding the files that annotations name, and reading them.

Names are looked up, never matched as patterns: they hold brackets, blanks and quotes.
"""

import collections
import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from stretchysnake_jax.data.frames import IMAGE_SUFFIXES
from stretchysnake_jax.data.lists import (
    VIDEO_SUFFIXES,
    ClipList,
    ListError,
    keeps_labels_mirrored,
    read_lines,
)

_LOOK = 64  # entries of a folder that are looked at to tell whether it is a clip in frames


class NoSplit(ListError):
    """A split that a data set doesn't have."""


class VideoTree:
    """The clips below a folder: videos, and folders of frames. Hidden files are left out.

    Attributes:
      root: the folder.
      clips: paths below the root with "/", sorted.
    """

    def __init__(self, root):
        self.root = os.path.abspath(root)
        if not os.path.isdir(self.root):
            raise ListError(f"there is no folder {self.root}: data.root takes that of the videos")
        self.clips: list[str] = []
        self._scan()
        self.clips.sort()
        self._named = collections.defaultdict(list)  # by the last part of their stems
        for clip in self.clips:
            self._named[_parts(clip.casefold())[-1]].append(clip)

    def _scan(self):
        folders, seen = [""], set()
        while folders:
            folder = folders.pop()
            status = os.stat(os.path.join(self.root, folder))
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
                continue
            seen.add((status.st_dev, status.st_ino))
            below, videos, images = [], [], 0
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    suffix = os.path.splitext(entry.name)[1].lower()
                    if entry.name.startswith("."):
                        continue
                    elif entry.is_dir():
                        below.append(name)
                    elif suffix in VIDEO_SUFFIXES:
                        videos.append(name)
                    elif suffix in IMAGE_SUFFIXES:
                        images += 1
                        if images == _LOOK and not below and not videos:
                            break  # frames: no need to list them all, there may be millions
            if images and folder and not below and not videos:
                videos.append(folder)
            self.clips += videos
            folders += below

    def find(self, *names: str, exact_case: bool = False, prefer: tuple[str, ...] = ()):
        """The clip of a name, wherever below the root it lies and whatever its suffix.

        Args:
          names: such as "bend/a.avi", in order of preference; the last parts of the clip's path.
          exact_case: names that differ in case are different ones, as the ids of YouTube. Else a
            name as it is written comes first.
          prefer: names of folders above that come first, in this order.

        Returns:
          Its absolute path, or None. Of several, the one least deep below the root.
        """
        for name in names:
            parts, folded = _parts(name), _parts(name.casefold())

            def rank(clip, parts=parts):
                above = clip.casefold().split("/")[:-1]
                order = [i for i, p in enumerate(prefer) if p.casefold() in above]
                exact = _parts(clip)[-len(parts) :] == parts
                return min(order, default=len(prefer)), not exact, len(above), clip

            hits = [
                clip
                for clip in self._named.get(folded[-1], ())
                if _parts(clip if exact_case else clip.casefold())[-len(parts) :]
                == (parts if exact_case else folded)
            ]
            if hits:
                return os.path.join(self.root, min(hits, key=rank))
        return None


def _parts(path: str) -> list[str]:
    """The parts of a path, the suffix of a video cut off."""
    stem, suffix = os.path.splitext(path)
    return (stem if suffix.lower() in VIDEO_SUFFIXES else path).split("/")


@dataclasses.dataclass
class Entry:
    """A clip as annotations name it.

    Attributes:
      names: of its file, as `VideoTree.find` takes them; the first one is reported if missing.
      label: class index.
      window: the part of the video, in the unit of the list; None: all of it.
      group: see `ClipList.groups`.
    """

    names: tuple[str, ...]
    label: int
    window: tuple[float, float] | None = None
    group: str | None = None


def gather(
    tree: VideoTree,
    classes: list[str],
    entries: Iterable[Entry],
    *,
    unit: str = "seconds",
    flip: bool | None = None,
    exact_case: bool = False,
    prefer: tuple[str, ...] = (),
) -> ClipList:
    """Looks entries up: a `ClipList` of those found, with the names of the others.

    Args:
      tree: where the videos lie.
      classes: class names.
      entries: what the annotations list.
      unit: of the windows.
      flip: None: unless a class is named after a direction.
      exact_case, prefer: as of `VideoTree.find`.
    """
    found, paths, missing = [], [], []
    for entry in entries:
        path = tree.find(*entry.names, exact_case=exact_case, prefer=prefer)
        if path is None:
            missing.append(os.path.join(tree.root, entry.names[0]))
        else:
            found.append(entry)
            paths.append(path)
    windows, groups = [e.window for e in found], [e.group for e in found]
    return ClipList(
        paths=paths,
        labels=np.array([e.label for e in found], np.int32),
        classes=list(classes),
        windows=np.array(windows, float).reshape(-1, 2) if any(windows) else None,
        unit=unit,
        flip=keeps_labels_mirrored(classes) if flip is None else flip,
        groups=groups if any(groups) else None,
        missing=missing,
    )


def find_file(folder, names: list[str], below: tuple[str, ...] = ()) -> str:
    """The first annotation file of these names in a folder, or in one of the folders `below` it.

    Names may differ in case.

    Raises:
      ListError: there is none.
    """
    for place in ("", *below):
        inside = os.path.join(folder, place)
        if os.path.isdir(inside):
            there = {name.casefold(): name for name in sorted(os.listdir(inside), reverse=True)}
            for name in names:
                if name.casefold() in there:
                    return os.path.join(inside, there[name.casefold()])
    raise ListError(
        f"there is no {' or '.join(names)} in {os.path.abspath(folder)}: data.annotations takes "
        "the folder of the official annotation files"
    )


def read_json(path, kind: type):
    """Reads a JSON file whose outermost value is a `kind` (dict, list).

    Raises:
      ListError: it can't be read or is something else.
    """
    try:
        value = json.loads("\n".join(read_lines(path)))
    except json.JSONDecodeError as error:
        raise ListError(f"{path} is no JSON file: {error}") from error
    if not isinstance(value, kind):
        raise ListError(f"{path} holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def field(row: dict, name: str, where):
    """A field of an annotation; ListError if it isn't there."""
    if not isinstance(row, dict) or name not in row:
        text = json.dumps(row, ensure_ascii=False)[:80]
        raise ListError(f"{where}: {text} has no {name!r}")
    return row[name]


def number(row: dict, name: str, where) -> float:
    """A field of an annotation that is a number; ListError if it isn't."""
    value = field(row, name, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ListError(f"{where}: {name} is {value!r}, expected a number")
    return float(value)


def csv_rows(path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a csv file with a header: (line from 2, column in lower case -> text).

    Args:
      path: the file; fields may be quoted.
      columns: that it must have; there may be more, in any order.

    Raises:
      ListError: the file can't be read, or a column or a field lacks.
    """
    try:
        lines = csv.reader((line.rstrip("\r") for line in read_lines(path)), skipinitialspace=True)
        header = [name.strip().lower() for name in next(lines, [])]
        rows = [(i, [text.strip() for text in row]) for i, row in enumerate(lines, 2) if any(row)]
    except csv.Error as error:
        raise ListError(f"{path} is no csv file: {error}") from error
    for name in columns:
        if name not in header:
            raise ListError(
                f"{path}: its first line names no column {name!r}, found {','.join(header)[:80]!r}"
            )
    if not rows:
        raise ListError(f"{path} lists no clip")
    for line, row in rows:
        if len(row) < len(header):
            raise ListError(f"{path}, line {line}: {len(row)} fields under {len(header)} columns")
    return [(line, dict(zip(header, row, strict=False))) for line, row in rows]


def text_rows(path) -> Iterable[tuple[int, str]]:
    """The lines of a text file that hold something, stripped: (number from 1, line)."""
    for number, line in enumerate(read_lines(pathlib.Path(path)), 1):
        if line.strip():
            yield number, line.strip()


def class_index(classes: list[str]) -> dict[str, int]:
    """Name -> index, to be asked with `find_class`."""
    return {name: i for i, name in enumerate(classes)}


def find_class(index: dict[str, int], name: str, where: str) -> int:
    """The index of a class; ListError if it is none of them."""
    if name not in index:
        raise ListError(f"{where}: {name!r} is none of the {len(index)} classes")
    return index[name]
