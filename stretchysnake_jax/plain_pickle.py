"""Reads a pickle as plain data, without running anything it holds.

A pickle is a small program: it may name any function of any module and call it. Python's unpickler
isn't used here. `interpret` walks the opcodes itself, and the only names it knows are those of
`_BUILDERS`, each of which makes plain data. It refuses any other by name, imports nothing and looks
nothing up in a module.

Two rules keep a hostile file from filling the memory or the C stack: only scalars are hashed, and
no value of the file goes into a message before its type is known (a tuple that holds itself fifty
times over prints without end).
"""

import math
import pathlib
import pickletools
import re

import ml_dtypes
import numpy as np

from stretchysnake_jax.config import ConfigError

_MOST_SHARED = 2**28  # elements of a tensor that is larger than its storage (stride 0)


class CheckpointError(ConfigError):
    """A file that is no checkpoint, is damaged, or doesn't fit; the message says which."""


class UnsafeCheckpoint(CheckpointError):
    """A file whose pickle asks for more than tensors and plain data; the message names it."""


class Record(dict):
    """The attributes of an object such as argparse.Namespace, as plain data."""


class Name(str):
    """A known `module.name` on the pickle's stack: a token, never the thing itself."""


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype that torch calls `name`; ml_dtypes has those that NumPy has not."""
    return np.dtype(getattr(ml_dtypes, name, name))


STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",  # bytes; the tensor names the dtype
}
_NO_STORAGE_CLASS = "uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
_DTYPES = {f"torch.{n}": n for n in [*STORAGES.values(), *_NO_STORAGE_CLASS.split()]}
STORAGE_NAMES = {
    f"{module}.{name}": dtype
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in STORAGES.items()
}


def require(ok: bool, problem: str) -> None:
    """Raises CheckpointError, saying `problem`, unless `ok`."""
    if not ok:
        raise CheckpointError(problem)


def _tensor(storage, offset, size, stride, *_) -> np.ndarray:
    """A read-only view of `storage`, an array (numel,); offset and stride count elements."""
    size, stride = tuple(size), tuple(stride)
    ok = isinstance(storage, np.ndarray) and storage.ndim == 1 and storage.flags.c_contiguous
    require(ok, "a tensor without a storage")
    ok = len(size) == len(stride) <= 64
    ok = ok and all(type(n) is int and 0 <= n < 2**48 for n in (offset, *size, *stride))
    require(ok, "a tensor whose offset, size and stride make no sense")
    dtype, count = storage.dtype, math.prod(size)
    if count == 0:
        return np.zeros(size, dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    require(last < storage.size, f"a tensor reaches element {last} of a storage of {storage.size}")
    require(count <= max(storage.size, _MOST_SHARED), f"a tensor claims {count} elements")
    strides = tuple(s * dtype.itemsize for s in stride)
    view = np.ndarray(size, dtype, storage, offset * dtype.itemsize, strides)
    view.flags.writeable = False
    return view


def _tensor_v3(storage, offset, size, stride, grad, hooks, dtype, *_) -> np.ndarray:
    require(isinstance(dtype, Name) and dtype in _DTYPES, "a tensor without a dtype")
    dtype = dtype_of(_DTYPES[dtype])
    whole = storage[: storage.size // dtype.itemsize * dtype.itemsize]
    return _tensor(whole.view(dtype), offset, size, stride)


def _from_type(function, kind, arguments, state) -> np.ndarray:
    return _call(function, arguments)  # a subclass of Tensor: the subclass is dropped


def _numpy_dtype(text, *_) -> np.dtype:
    # Neither objects nor structures.
    require(re.fullmatch(r"[<|=]?([biufcSU]\d+|\?)", text), f"a NumPy dtype {text!r}")
    return np.dtype(text)


def _numpy_scalar(dtype, raw):
    require(isinstance(dtype, np.dtype) and len(raw) == dtype.itemsize, "a damaged NumPy scalar")
    return np.frombuffer(raw, dtype, 1)[0]


def _object(*_) -> Record:
    return Record()


def _mapping(pairs=()) -> dict:
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    return {_key(key): value for key, value in pairs}


def _device(*parts) -> str:
    require(all(isinstance(part, str | int) for part in parts), "a damaged torch.device")
    return ":".join(map(str, parts))


def _encode(text, coding) -> bytes:
    # Protocol 2 has no bytes: Python 3 writes them as text to be encoded.
    require(isinstance(text, str) and coding == "latin1", "bytes in an unknown coding")
    return text.encode("latin1")


def _path(*parts) -> str:
    return str(pathlib.PurePosixPath(*parts))


def _windows_path(*parts) -> str:
    return str(pathlib.PureWindowsPath(*parts))


_NAMED_BUILTINS = "object int float str bool list tuple dict"

# Every name a file may ask for -> what makes plain data of the arguments; None: only ever named.
_BUILDERS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    "torch.Size": lambda size=(): tuple(size),
    "torch.device": _device,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda factory=None, *rest: _mapping(*rest),
    "argparse.Namespace": _object,
    "types.SimpleNamespace": _object,
    "copyreg._reconstructor": lambda kind, base, state: _call(kind, ()),
    "numpy.dtype": _numpy_dtype,
    "numpy.ndarray": None,
    "_codecs.encode": _encode,
    **dict.fromkeys(f"builtins.{name}" for name in _NAMED_BUILTINS.split()),
    "builtins.set": lambda items=(): {_key(i) for i in items},
    "builtins.frozenset": lambda items=(): frozenset(_key(i) for i in items),
    "builtins.bytes": lambda: b"",
    "builtins.complex": complex,
    **dict.fromkeys(_DTYPES),
    **dict.fromkeys(STORAGE_NAMES),
}
for _pathlib in ("pathlib", "pathlib._local"):  # the second since Python 3.13
    _BUILDERS[f"{_pathlib}.PosixPath"] = _BUILDERS[f"{_pathlib}.PurePosixPath"] = _path
    _BUILDERS[f"{_pathlib}.WindowsPath"] = _BUILDERS[f"{_pathlib}.PureWindowsPath"] = _windows_path
for _multiarray in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _BUILDERS[f"{_multiarray}._reconstruct"] = lambda *_: np.empty(0, np.uint8)
    _BUILDERS[f"{_multiarray}.scalar"] = _numpy_scalar


def _name(module, name) -> Name:
    require(isinstance(module, str) and isinstance(name, str), "its pickle is damaged")
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if f"{module}.{name}" not in _BUILDERS:
        require(bool(re.fullmatch(r"[\w.<>]+", f"{module}.{name}")), "its pickle is damaged")
        raise UnsafeCheckpoint(
            f"the file asks for {module}.{name}, which is neither a tensor nor plain data; it is "
            "refused, and nothing of it was run"
        )
    return Name(f"{module}.{name}")


def _call(name, arguments):
    """Makes plain data; `name` must come from `_name`, a string that looks like one won't do."""
    builder = _BUILDERS.get(name) if isinstance(name, Name) else None
    if builder is None:
        what = name if isinstance(name, Name) else f"a {type(name).__name__}"
        raise UnsafeCheckpoint(f"the file calls {what}, which makes no plain data; it is refused")
    return builder(*arguments)


def _key(key):
    # Only scalars: the hash of a tuple nested a million deep would overflow the stack.
    scalar = (str, int, float, bool, bytes, type(None))
    ok = isinstance(key, scalar) or (
        isinstance(key, tuple) and all(isinstance(part, scalar) for part in key)
    )
    require(ok, f"a dictionary key or set member of type {type(key).__name__}")
    return key


def _set_state(target, state) -> None:
    """The opcode BUILD: gives an object its attributes."""
    if isinstance(target, Record):
        for part in state if isinstance(state, tuple) else (state,):
            target.update({_key(k): v for k, v in (part or {}).items()})
    elif isinstance(target, np.dtype):
        require(state[1] != ">", "a big-endian NumPy array")
    elif isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, raw = state
        ok = isinstance(raw, bytes) and isinstance(shape, tuple) and isinstance(dtype, np.dtype)
        ok = ok and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**48 for n in shape)
        ok = ok and target.base is None and len(raw) == math.prod(shape) * dtype.itemsize
        require(ok, "a NumPy array whose data has another size")
        target.__setstate__((1, shape, dtype, bool(fortran), raw))
    else:  # attributes of a tensor, or `_metadata` of a state dict
        require(isinstance(target, dict | np.ndarray), f"state for a {type(target).__name__}")


# Opcodes whose argument is the value they push.
_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
)
_LITERALS = frozenset(_LITERALS.split())

# What a pickle that makes no sense raises on the way.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError)
_DAMAGE = (*_DAMAGE, ValueError)


def interpret(stream, load_storage):
    """Walks one pickle, from the stream's position to behind its STOP.

    Args:
      stream: a binary file.
      load_storage: called with the tuple that stands for a storage; returns its array (numel,).

    Returns:
      None, numbers, strings, bytes, tuples, lists, dicts, sets and NumPy arrays, nested.

    Raises:
      UnsafeCheckpoint: the pickle asks for anything else.
      CheckpointError: it is damaged.
    """
    stack, outer, memo = [], [], {}

    def items() -> list:
        nonlocal stack
        made, stack = stack, outer.pop()
        return made

    try:
        for opcode, argument, _ in pickletools.genops(stream):
            match opcode.name:
                case name if name in _LITERALS:
                    stack.append(argument)
                case "BYTEARRAY8":
                    stack.append(bytes(argument))
                case "PROTO" | "FRAME":
                    pass
                case "NONE" | "NEWTRUE" | "NEWFALSE" as name:
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
                case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT" | "EMPTY_SET" as name:
                    kinds = {"LIST": list, "TUPLE": tuple, "DICT": dict, "SET": set}
                    stack.append(kinds[name.removeprefix("EMPTY_")]())
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "POP":
                    _ = stack.pop() if stack else items()
                case "POP_MARK":
                    items()
                case "DUP":
                    stack.append(stack[-1])
                case "LIST":
                    made = items()
                    stack.append(made)
                case "TUPLE":
                    made = tuple(items())
                    stack.append(made)
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    count = int(name[-1])
                    require(len(stack) >= count, "too few values on the pickle's stack")
                    stack[-count:] = [tuple(stack[-count:])]
                case "FROZENSET":
                    made = frozenset(_key(i) for i in items())
                    stack.append(made)
                case "DICT":
                    made = items()
                    stack.append({_key(k): v for k, v in zip(made[::2], made[1::2], strict=True)})
                case "APPEND":
                    value = stack.pop()
                    list.append(stack[-1], value)
                case "APPENDS":
                    made = items()
                    list.extend(stack[-1], made)
                case "ADDITEMS":
                    made = items()
                    set.update(stack[-1], [_key(i) for i in made])
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    dict.__setitem__(stack[-1], _key(key), value)
                case "SETITEMS":
                    made = items()
                    for key, value in zip(made[::2], made[1::2], strict=True):
                        dict.__setitem__(stack[-1], _key(key), value)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_name(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_name(module, name))
                case "INST":
                    called = _name(*argument.split(" ", 1))
                    made = items()
                    stack.append(_call(called, made))
                case "REDUCE" | "NEWOBJ":
                    arguments, called = stack.pop(), stack.pop()
                    stack.append(_call(called, arguments))
                case "BUILD":
                    state = stack.pop()
                    _set_state(stack[-1], state)
                case "BINPERSID":
                    stack.append(load_storage(stack.pop()))
                case "STOP":
                    return stack.pop()
                case name:
                    raise CheckpointError(f"its pickle uses {name}, which no checkpoint needs")
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"its pickle is damaged ({error})") from error
    raise CheckpointError("its pickle has no end")
