"""A pickle that asks for more than plain data is refused by name; nonsense is one clean error."""

import collections
import io
import os
import pathlib
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from stretchysnake_jax import plain_pickle, torch_file
from stretchysnake_jax.torch_file import CheckpointError, UnsafeCheckpoint

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def interpret(program: bytes):
    return plain_pickle.interpret(io.BytesIO(program), torch_file._no_storage)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def evil_programs(marker):
    """name -> (a pickle that would make the file `marker`, what the refusal must name)."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    programs = {}
    for protocol in range(6):
        value = {"model": {"w": Calls(os.system, shell)}}
        programs[f"system {protocol}"] = (pickle.dumps(value, protocol), f"{os.name}.system")
        value = [Calls(eval, code)]
        programs[f"eval {protocol}"] = (pickle.dumps(value, protocol), "builtins.eval")
    programs["getattr"] = (pickle.dumps(Calls(getattr, (), "index")), "builtins.getattr")
    programs["popen"] = (pickle.dumps(Calls(subprocess.Popen, ["touch", str(marker)])), "Popen")
    programs["pickle"] = (pickle.dumps(Calls(pickle.loads, b"N.")), "_pickle.loads")
    programs["class"] = (pickle.dumps(collections.deque([1])), "collections.deque")

    def stack_global(module, name):
        text = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
        return b"\x80\x04" + text + b"\x93)R."

    nested = "_rebuild_tensor_v2.__globals__"
    programs["nested"] = (stack_global("torch._utils", nested), f"torch._utils.{nested}")
    programs["split"] = (stack_global("torch", "serialization.os.system"), "os.system")
    programs["load"] = (stack_global("torch.storage", "_load_from_bytes"), "_load_from_bytes")
    programs["compile"] = (stack_global("torch.jit", "_script"), "torch.jit._script")
    programs["inst"] = (b"(S'" + shell.encode() + b"'\nios\nsystem\n.", "os.system")
    programs["object"] = (b"(cos\nsystem\nS'" + shell.encode() + b"'\no.", "os.system")
    # A string that looks like a known name isn't one; the result of a call isn't one either.
    programs["imitation"] = (b"\x80\x02X\x17\x00\x00\x00collections.OrderedDict)R.", "a str")
    programs["result"] = (b"\x80\x02ccollections\nOrderedDict\n)R)R.", "a dict")
    programs["named only"] = (b"\x80\x02c__builtin__\nobject\n)R.", "builtins.object")
    return programs


@pytest.mark.parametrize("name", evil_programs(""))
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_pickle_that_asks_for_more_is_refused_by_name(tmp_path, name, form):
    marker, path = tmp_path / "was-run", tmp_path / "x.pth"
    program, asked = evil_programs(marker)[name]
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", program)
    elif form == "legacy":
        head = [pickle.dumps(value, 2) for value in (torch_file._MAGIC, 1001, {})]
        path.write_bytes(b"".join(head) + program)
    else:
        path.write_bytes(program)
    before = set(sys.modules)
    with pytest.raises(UnsafeCheckpoint) as error:
        torch_file.read(path)
    assert asked in str(error.value) and str(path) in str(error.value)
    assert not marker.exists()
    assert not any(module.startswith("torch") for module in set(sys.modules) - before)


def test_state_set_on_a_known_name_changes_nothing():
    # BUILD with a dict on a name: Python's unpickler would set attributes of the function.
    with pytest.raises(CheckpointError):
        interpret(b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.")


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02K\x01",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02K\x01K\x01b.",
        b"\x80\x02K\x01Q.",
        b"P1\n.",
        b"\x82\x01.",
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo of 4 G entries
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes longer than any memory
        b"\x80\x02" + b"\x85" * 3 + b".",
        b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",  # a key nested 100,000 deep
        b"\x80\x02ccollections\nOrderedDict\n(l((" + b")" + b"\x85" * 99_999 + b"K\x01tatR.",
        b"\x80\x02ctorch\ndevice\n)" + b"2\x86" * 60 + b"\x85R.",  # printing it would never end
        b"\x80\x02ctorch\nSize\n)" + b"2\x86" * 60 + b"\x85R" + b"\x85\x81.",
    ],
)
def test_nonsense_is_one_clean_error(program):
    with pytest.raises(CheckpointError) as error:
        interpret(program)
    assert len(str(error.value)) < 300


def test_flipped_bits_never_raise_anything_else(tmp_path):
    with zipfile.ZipFile(GOLDENS / "ckpt_layout_full_training.pth") as archive:
        whole = archive.read("ckpt_layout_full_training/data.pkl")
    rng = random.Random(0)

    def storage(reference):
        dtype, _, count = torch_file._describe_storage(reference)
        plain_pickle.require(count < 10**6, "too large")
        return np.zeros(count, dtype)

    refused = 0
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            plain_pickle.interpret(io.BytesIO(raw), storage)
        except CheckpointError:
            refused += 1
    assert refused > 20
