"""Files that are there as a whole or not at all."""

import contextlib
import os
import pathlib
import socket


@contextlib.contextmanager
def whole_file(path):
    """Gives a path to write to; its file becomes `path` when all went well and vanishes if not."""
    path = pathlib.Path(path)
    # Of this host, too: processes of several may write to one folder.
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
