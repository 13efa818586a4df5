"""What the reader of .pth files reads and what it refuses, and the writer's files in torch."""

import argparse
import collections
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from stretchysnake_jax import torch_file
from stretchysnake_jax.torch_file import CheckpointError, UnsafeCheckpoint

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FILES = sorted(path.name for path in GOLDENS.glob("*.pth"))


def write_zip(path, program: bytes, records=(), compression=zipfile.ZIP_STORED):
    """A file in torch's zip format around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", program)
        for name, raw in dict(records).items():
            archive.writestr(f"a/{name}", raw)
    return path


def assert_same(ours, theirs):
    """Compares what we read with what torch.load gave."""
    import torch

    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, np.ndarray) and ours.shape == tuple(theirs.shape)
        assert f"torch.{ours.dtype.name}" == str(theirs.dtype)
        # A copy: contiguous() keeps odd strides of axes of length 1.
        flat = torch.empty(theirs.numel(), dtype=theirs.dtype).copy_(theirs.detach().reshape(-1))
        raw = flat.view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.frombuffer(ours.tobytes(), np.uint8), raw)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, argparse.Namespace):
        assert_same(ours, vars(theirs))
    elif isinstance(theirs, list | tuple):
        assert type(ours) is (tuple if isinstance(theirs, tuple) else list)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs and type(ours) is type(theirs)


@pytest.mark.parametrize("name", FILES)
def test_goldens_read_as_torch_reads_them(name):
    torch = pytest.importorskip("torch")
    assert_same(torch_file.read(GOLDENS / name), torch.load(GOLDENS / name, weights_only=False))


@pytest.mark.parametrize("name", FILES)
def test_goldens_survive_write_and_read(name, tmp_path):
    tree = torch_file.read(GOLDENS / name)
    state = tree.get("model", tree.get("module", tree))
    torch_file.write(tmp_path / "x.pth", state)
    again = torch_file.read(tmp_path / "x.pth")
    assert list(again) == list(state)
    for key, array in state.items():
        assert again[key].dtype == array.dtype
        np.testing.assert_array_equal(again[key], array)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_torch_loads_what_write_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    state = {
        "float32": rng.normal(size=(3, 4)).astype(np.float32),
        "a.transposed": rng.normal(size=(3, 4)).astype(np.float32).T,
        "float16": rng.normal(size=5).astype(np.float16),
        "bfloat16": rng.normal(size=(2, 2, 2)).astype(ml_dtypes.bfloat16),
        "int64": np.arange(-3, 3),
        "bool": np.array([True, False]),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 3), np.int32),
    }
    torch_file.write(tmp_path / "x.pth", state)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert isinstance(loaded, collections.OrderedDict)
    assert_same(state, dict(loaded))
    assert_same(torch_file.read(tmp_path / "x.pth"), dict(loaded))


def test_write_refuses_a_dtype_that_torch_has_not_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=r"names.*<U1"):
        torch_file.write(tmp_path / "x.pth", {"names": np.array(["a"])})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    torch_file.write(tmp_path / "x.pth", {"a": np.ones(2)})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.raises(OSError, match="disk full"):
        torch_file.write(tmp_path / "x.pth", {"a": np.zeros(2)})
    assert torch_file.read(tmp_path / "x.pth")["a"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def rich_tree(torch):
    """All that training files hold: dtypes, views, shared storages, objects of known classes."""
    base = torch.arange(60, dtype=torch.float32)
    weights = torch.nn.Linear(3, 2)
    names = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64"
    return {
        "dtypes": {name: torch.ones(3).to(getattr(torch, name)) for name in names.split()},
        "view": base[7:31].view(4, 6).t(),
        "slice": base[3::7],
        "shared": [base, base[:5]],
        "expanded": torch.ones(1).expand(4, 5),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "parameter": weights.weight,
        "state": weights.state_dict(),  # has an attribute _metadata
        "numbers": (1, -2, 2**40, 1.5, True, None, b"bytes", "text"),
        "args": argparse.Namespace(lr=0.1, betas=[0.9, 0.999]),
        "set": {1, 2},
        "numpy": (np.float64(0.5), np.int32(7)),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_what_torch_saves(tmp_path, zipped, protocol):
    torch = pytest.importorskip("torch")
    tree, path = rich_tree(torch), tmp_path / "x.pth"
    kwargs = dict(pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    torch.save(tree, path, **kwargs)
    ours = torch_file.read(path)
    assert_same(ours, tree)
    assert np.shares_memory(*ours["shared"])
    assert not ours["view"].flags.writeable


@pytest.mark.parametrize("zipped", [True, False])
def test_rare_but_inert_values_become_plain_data(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    array = np.arange(6.0).reshape(2, 3)
    tree = {
        "path": pathlib.PurePosixPath("/data/x"),
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter([3, 3, 5]),
        "array": array,
        "fortran": np.asfortranarray(array),
        "frozen": frozenset([1]),
    }
    torch.save(tree, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    ours = torch_file.read(tmp_path / "x.pth")
    np.testing.assert_array_equal(ours.pop("array"), array)
    np.testing.assert_array_equal(ours.pop("fortran"), array)
    assert ours == {
        "path": "/data/x",
        "size": (2, 3),
        "device": "cuda:1",
        "dtype": "torch.bfloat16",
        "default": {"a": [1]},
        "counter": {3: 2, 5: 1},
        "frozen": frozenset([1]),
    }


def test_dtypes_without_a_storage_class(tmp_path):
    torch = pytest.importorskip("torch")
    tree = {"u": torch.tensor([1, 2, 3]).to(torch.uint16), "f": torch.ones(4).to(torch.float8_e5m2)}
    tree["tail"] = tree["u"][1:]
    torch.save(tree, tmp_path / "x.pth")
    ours = torch_file.read(tmp_path / "x.pth")
    assert ours["u"].dtype == np.uint16 and ours["tail"].tolist() == [2, 3]
    assert ours["f"].dtype == ml_dtypes.float8_e5m2 and ours["f"].astype(float).tolist() == [1] * 4


@pytest.mark.parametrize("seed", range(4))
def test_random_strided_tensors(tmp_path, seed):
    torch = pytest.importorskip("torch")
    rng = random.Random(seed)
    tree = []
    for _ in range(20):
        tensor = torch.randn([rng.randint(1, 5) for _ in range(rng.randint(1, 4))])
        tensor = tensor.permute(rng.sample(range(tensor.ndim), tensor.ndim))
        cuts = []
        for n in tensor.shape:
            start = rng.randrange(n)
            cuts.append(slice(start, rng.randint(start, n), rng.randint(1, 2)))
        tree += [tensor, tensor[tuple(cuts)]]
    torch.save(tree, tmp_path / "x.pth", _use_new_zipfile_serialization=bool(seed % 2))
    assert_same(torch_file.read(tmp_path / "x.pth"), tree)


def tensor_program(numel, offset=0, size=(2,), stride=(1,), kind="FloatStorage", key="0"):
    """A pickle of one tensor with any numbers."""
    tuples = [b"".join(map(torch_file._number, t)) for t in (size, stride)]
    storage = [torch_file._text(t) for t in ("storage", key, "cpu")]
    storage.insert(1, f"ctorch\n{kind}\n".encode())
    reference = b"(" + b"".join(storage) + torch_file._number(numel) + b"tQ"
    arguments = reference + torch_file._number(offset)
    for raw in tuples:
        arguments += b"(" + raw + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89NtR."


@pytest.mark.parametrize(
    "changed",
    [
        dict(size=(5,)),
        dict(offset=3),
        dict(offset=-1),
        dict(size=(-2,)),
        dict(stride=(-1,)),
        dict(stride=(4,)),
        dict(stride=(2**61,)),
        dict(size=(2**31, 2**31, 2**31), stride=(0, 0, 0)),
        dict(size=(2**29,), stride=(0,)),
        dict(size=(2, 2)),
        dict(numel=5),
        dict(numel=2**40),
        dict(numel=-1),
        dict(kind="DoubleStorage"),
        dict(kind="Size"),
        dict(key="1"),
        dict(key="../0"),
    ],
    ids=str,
)
def test_tensors_stay_inside_their_storage(tmp_path, changed):
    records = {"data/0": np.arange(4, dtype=np.float32).tobytes()}
    whole = torch_file.read(write_zip(tmp_path / "ok.pth", tensor_program(4), records))
    assert whole.tolist() == [0, 1]
    with pytest.raises(CheckpointError):
        program = tensor_program(**{"numel": 4, **changed})
        torch_file.read(write_zip(tmp_path / "x.pth", program, records))


def test_a_legacy_file_that_claims_huge_storages_is_refused(tmp_path):
    head = [pickle.dumps(value, 2) for value in (torch_file._MAGIC, 1001, {"little_endian": True})]
    raw = b"".join(head) + tensor_program(2**40) + pickle.dumps(["0"], 2)
    (tmp_path / "x.pth").write_bytes(raw + struct.pack("<q", 2**40))
    with pytest.raises(CheckpointError, match="claim"):
        torch_file.read(tmp_path / "x.pth")


def test_a_zip_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    records = {"data/0": bytes(10**7)}
    path = write_zip(tmp_path / "x.pth", tensor_program(4), records, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="claim"):
        torch_file.read(path)


SAFETENSORS = struct.pack("<Q", 2) + b'{"__metadata__":{}}'


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (SAFETENSORS, "safetensors"),
        (b"some text, none of torch's", "PyTorch"),
        (b"check your network\nand try again\n", "PyTorch"),
        (bytes(range(256)) * 4, "PyTorch"),
        (pickle.dumps({"a": 1}), "PyTorch"),
        (pickle.dumps(torch_file._MAGIC, 2), "damaged"),
        (b"PK\x03\x04 and no more", "damaged or cut short"),
    ],
)
def test_what_is_no_pytorch_file_is_said(tmp_path, content, message):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        torch_file.read(path)
    assert not isinstance(error.value, UnsafeCheckpoint)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "records, message",
    [
        ({"constants.pkl": b""}, "TorchScript"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"weights.npy": b""}, "npz"),
    ],
)
def test_zips_of_other_kinds_are_said(tmp_path, records, message):
    with pytest.raises(CheckpointError, match=message):
        torch_file.read(write_zip(tmp_path / "x.pth", b"N.", records))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no file"):
        torch_file.read(tmp_path / "x.pth")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99, 0.9999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(tmp_path, share, zipped):
    path = GOLDENS / "ckpt_layout_flat.pth"
    if not zipped:
        torch = pytest.importorskip("torch")
        state, path = torch.load(path), tmp_path / "whole.pth"
        torch.save(state, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    (tmp_path / "x.pth").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(CheckpointError):
        torch_file.read(tmp_path / "x.pth")


def test_neither_reading_nor_writing_imports_torch(tmp_path):
    code = (
        "import sys; from stretchysnake_jax import torch_file as t; "
        "x = t.read(sys.argv[1]); t.write(sys.argv[2], x); t.read(sys.argv[2]); "
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, GOLDENS / "ckpt_layout_flat.pth", tmp_path / "x.pth"]
    subprocess.run(command, check=True, cwd=GOLDENS.parent.parent)
