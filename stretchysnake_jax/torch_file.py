"""Reads and writes PyTorch's .pth files without torch, and runs nothing that a file holds.

Such a file is a pickle, which `plain_pickle` reads, and the raw storages of the tensors.
"""

import io
import pathlib
import pickle
import struct
import zipfile
import zlib

import numpy as np

from stretchysnake_jax.plain_pickle import (
    STORAGE_NAMES,
    STORAGES,
    CheckpointError,
    Name,
    UnsafeCheckpoint,
    dtype_of,
    interpret,
    require,
)
from stretchysnake_jax.whole_file import whole_file

__all__ = ["CheckpointError", "UnsafeCheckpoint", "read", "write"]

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file in the format before torch 1.6


def _describe_storage(reference) -> tuple[np.dtype, str, int]:
    """(dtype, key, number of elements) of the tuple that stands for a storage."""
    ok = isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage"
    ok = ok and isinstance(reference[1], Name) and type(reference[4]) is int and reference[4] >= 0
    ok = ok and isinstance(reference[2], str | int)
    require(ok and reference[1] in STORAGE_NAMES, "a reference that is no storage")
    require(len(reference) == 5 or reference[5] is None, "a view of a storage (torch < 0.4)")
    return dtype_of(STORAGE_NAMES[reference[1]]), str(reference[2]), reference[4]


def _read_zip(stream, size: int):
    with zipfile.ZipFile(stream) as archive:
        records = {}  # by their names inside the archive's one folder
        for info in archive.infolist():
            folder, _, name = info.filename.partition("/")
            records[name or folder] = info
        if any(name.endswith(".npy") for name in records):
            raise CheckpointError("it is a NumPy .npz file, not a PyTorch one: rename it to .npz")
        require("constants.pkl" not in records, "it is a TorchScript module, not a checkpoint")
        require("data.pkl" in records, "it is a zip file, but PyTorch wrote no data.pkl into it")
        # torch stores without compression, so no honest file unpacks to more than its own size.
        stored = all(i.compress_type == zipfile.ZIP_STORED for i in records.values())
        total = sum(i.file_size for i in records.values())
        require(stored and total <= size, f"its records claim {total} bytes of a file of {size}")

        def load(name: str) -> bytes:
            require(name in records, f"its record {name} is missing")
            return archive.read(records[name])

        if "byteorder" in records:
            require(load("byteorder").strip() == b"little", "a big-endian machine wrote it")
        loaded = {}

        def load_storage(reference) -> np.ndarray:
            dtype, key, count = _describe_storage(reference)
            if key not in loaded:
                loaded[key] = load(f"data/{key}")
            held, needed = len(loaded[key]), count * dtype.itemsize
            require(held >= needed, f"storage {key} holds {held} bytes, {needed} are needed")
            return np.frombuffer(loaded[key], dtype, count)

        return interpret(io.BytesIO(load("data.pkl")), load_storage)


def _no_storage(reference):
    raise CheckpointError("a storage where none can be")


def _read_legacy(stream, size: int):
    magic = interpret(stream, _no_storage)
    require(type(magic) is int and magic == _MAGIC, "it doesn't begin like a PyTorch file")
    interpret(stream, _no_storage)  # version of the protocol
    system = interpret(stream, _no_storage)
    little = isinstance(system, dict) and system.get("little_endian", True)
    require(little, "a big-endian machine wrote it")
    raw = {}  # key -> bytes: the tensors are views of these, filled after the pickle
    itemsize = {}

    def load_storage(reference) -> np.ndarray:
        dtype, key, count = _describe_storage(reference)
        if key not in raw:
            needed = count * dtype.itemsize
            claimed = needed + sum(buffer.size for buffer in raw.values())
            require(claimed <= size, f"its storages claim {claimed} bytes of a file of {size}")
            raw[key], itemsize[key] = np.zeros(needed, np.uint8), dtype.itemsize
        return raw[key].view(dtype)

    result = interpret(stream, load_storage)
    keys = interpret(stream, _no_storage)
    ok = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    require(ok and sorted(keys) == sorted(raw), "its list of storages is wrong")
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        buffer = raw[key]
        require(count * itemsize[key] == buffer.size, f"storage {key} has another size")
        require(stream.readinto(memoryview(buffer)) == buffer.size, "it ends too early")
    return result


def _guess(head: bytes) -> str:
    """What a file that is no PyTorch file looks like."""
    text = head.lstrip().lower()
    if head[8:10] == b'{"':
        return "it is a safetensors file; this reads PyTorch's .pth and .pt"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return "it is a web page: the download went wrong"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: run 'git lfs pull'"
    if head[257:262] == b"ustar":
        return "it is a tar file (torch 0.1); save it again with a newer torch"
    return "it doesn't begin like a PyTorch file"


def read(path):
    """Reads a file of torch.save, in the zip format or the one before torch 1.6.

    Args:
      path: of the .pth or .pt file.

    Returns:
      What was saved, as plain nested data: tensors become read-only NumPy arrays with the dtype
      they have in the file (bfloat16: ml_dtypes.bfloat16) that share memory where the tensors do;
      objects such as argparse.Namespace become dicts.

    Raises:
      UnsafeCheckpoint: the pickle asks for more than tensors and plain data. Nothing was run.
      CheckpointError: no such file, no PyTorch file, or a damaged one.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(512)
            stream.seek(0)
            require(size > 0, "it is empty")
            if head[:4] == b"PK\x03\x04":
                return _read_zip(stream, size)
            try:
                return _read_legacy(stream, size)
            except UnsafeCheckpoint:
                raise
            except CheckpointError as error:
                known = head.startswith(pickle.dumps(_MAGIC, 2))
                raise CheckpointError(str(error) if known else _guess(head)) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


_CLASSES = {dtype_of(dtype): name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


def _global(name: str) -> bytes:
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def _number(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _pickle(state: dict[str, np.ndarray]) -> bytes:
    """The pickle (protocol 2) of an OrderedDict of tensors; tensor i lies in storage i."""
    empty = _global("collections.OrderedDict") + b")R"
    made = [b"\x80\x02", empty, b"("]
    for i, (name, array) in enumerate(state.items()):
        kind = _global(f"torch.{_CLASSES[array.dtype]}")
        storage = _tuple(_text("storage"), kind, _text(str(i)), _text("cpu"), _number(array.size))
        strides = [_number(s // array.itemsize) for s in array.strides]
        tensor = _tuple(
            storage + b"Q",
            _number(0),
            _tuple(*map(_number, array.shape)),
            _tuple(*strides),
            b"\x89",  # no gradient
            empty,  # no hooks
        )
        made += [_text(name), _global("torch._utils._rebuild_tensor_v2"), tensor, b"R"]
    return b"".join([*made, b"u."])


def write(path, state: dict[str, np.ndarray]) -> None:
    """Writes what torch.save(state_dict, path) would: a zip file that torch.load reads.

    Args:
      path: of the file; it is written whole or not at all.
      state: name -> array, of a dtype that torch has (ml_dtypes.bfloat16 is its bfloat16).

    Raises:
      CheckpointError: a dtype that torch has not.
    """
    state = {name: np.asarray(array) for name, array in state.items()}
    for name, array in state.items():
        require(array.dtype in _CLASSES, f"{name} is of dtype {array.dtype}: torch has none such")
        # np.ascontiguousarray alone would make a scalar 1-D.
        state[name] = np.ascontiguousarray(array).reshape(array.shape)
    with whole_file(path) as part, zipfile.ZipFile(part, "w") as archive:

        def add(name: str, raw) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), raw)

        add("data.pkl", _pickle(state))
        add("byteorder", b"little")
        for i, array in enumerate(state.values()):
            add(f"data/{i}", array.tobytes())
        add("version", b"3\n")
