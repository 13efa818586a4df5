"""The true frame counts of videos, found out once and kept in a small file beside the list.

A header's frame count is a hint. A video that contradicts it has to be read again, or counted; its
true count is kept, so that this happens once and not in every epoch. The index only saves work:
what is read with it and without it is equal.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import threading
import time

SUFFIX = ".index"
_FORMAT = "frame counts, 1"  # the one key of the file; another one is another format
_SAVE_SECONDS = 30.0  # between two saves, while little is new
_SAVE_SHARE = 8  # saved at once when more than 1/8 is new: a few saves while an index fills


class FrameCounts:
    """The frame counts known of the videos of a list; may be used by many threads.

    Several processes may share a file: each adds what it found to what the others have written.
    Two that save at the same moment may lose an entry, which is then found out again.

    Args:
      path: the file; it need not be there. What can't be read is built anew, which is said once.
      known: path -> entry, of another index.
    """

    def __init__(self, path, known: dict[str, list[int]] | None = None):
        self.path = pathlib.Path(path)
        self._lock = threading.Lock()
        self._known = (known or {}) | self._read(print)
        self._said = False
        self._new: dict[str, list[int]] = {}
        self._saved = time.monotonic()

    def get(self, path: str) -> int | None:
        """The number of frames of a video; None if it isn't known or the file has changed."""
        entry = self._known.get(path)
        return entry[2] if entry and entry[:2] == _stamp(path) else None

    def learn(self, path: str, count: int) -> None:
        """Keeps the number of frames of a video, >= 1; in the file too, sooner or later."""
        stamp = _stamp(path)
        if stamp is None:
            return
        with self._lock:
            self._known[path] = self._new[path] = [*stamp, int(count)]
            waited = time.monotonic() - self._saved > _SAVE_SECONDS
            if waited or _SAVE_SHARE * len(self._new) > len(self._known):
                self._save()

    def save(self) -> None:
        """Writes what is new."""
        with self._lock:
            self._save()

    def _save(self):
        if not self._new:
            return
        self._known = self._read() | self._known  # what other processes wrote meanwhile
        text = json.dumps({_FORMAT: self._known}, separators=(",", ":"))
        try:
            _replace(self.path, text)
        except OSError as error:  # such as a full disk: no reason to end a run
            if not self._said:
                print(
                    f"{self.path} can't be written ({error.strerror}): frame counts are found "
                    "out again in the next run",
                    file=sys.stderr,
                )
            self._said = True
        self._new, self._saved = {}, time.monotonic()

    def _read(self, say=lambda *_, **__: None) -> dict[str, list[int]]:
        """Path -> [bytes, time of change in ns, frames]; empty, and said, if it can't be read."""
        try:
            videos = json.loads(self.path.read_text(encoding="utf-8"))[_FORMAT]
            if all(_is_entry(entry) for entry in videos.values()):
                return videos
            reason = "an entry is not [bytes, time, frames]"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        say(
            f"{self.path} is no index of frame counts ({reason}); it is built anew",
            file=sys.stderr,
        )
        return {}


def open_counts(path: str) -> FrameCounts:
    """The index of a list: one object per process, and one file for all processes.

    Args:
      path: where it belongs, such as LIST.index. In a folder that can't be written it is a file of
        its own in the user's cache folder ($XDG_CACHE_HOME/stretchysnake or
        ~/.cache/stretchysnake) instead; one that lies beside the list is then read only.
    """
    with _opening:
        return _open(os.path.abspath(path))


_opening = threading.Lock()


@functools.lru_cache(maxsize=16)
def _open(path: str) -> FrameCounts:
    if os.access(os.path.dirname(path), os.W_OK):
        return FrameCounts(path)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = f"{hashlib.sha256(path.encode()).hexdigest()[:16]}{SUFFIX}"
    beside = FrameCounts(path)._known
    return FrameCounts(os.path.join(cache, "stretchysnake", name), beside)


def _stamp(path: str) -> list[int] | None:
    """What changes when a file does: [bytes, time of change in ns]; None: there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _is_entry(entry) -> bool:
    """Whether an entry read from a file is [bytes, time in ns, frames >= 1]."""
    whole = isinstance(entry, list) and all(type(value) is int for value in entry)
    return whole and len(entry) == 3 and entry[2] >= 1


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file as a whole. Hosts may share the folder, so a process id is no name of its own.

    Raises:
      OSError: the folder does not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, part = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
