"""Files that are there as a whole or not at all."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def whole_file(path):
    """Gives a path to write to; its file becomes `path` when all went well and vanishes if not."""
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
