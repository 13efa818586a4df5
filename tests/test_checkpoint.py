"""Checkpoints: whole or not at all, kept by rule, and found out when they are damaged."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stretchysnake_jax import checkpoint
from stretchysnake_jax.checkpoint import CheckpointFailed, Checkpoints
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.validation import validate

PROGRESS = {"elapsed": 1.5, "unreadable": {"a.mp4": "no video"}, "position": 12}


def make_state(step, *more, side=32):
    """A training state whose numbers follow from its step; `more`: names of further parts."""
    rng = np.random.default_rng(step)

    def params():
        return {"head": {"kernel": jnp.asarray(rng.normal(size=(side, side)), jnp.float32)}}

    opt_state = ({"mu": params(), "count": jnp.int32(step)}, ())
    state = {"params": params(), "opt_state": opt_state, "step": jnp.int32(step)}
    return state | {name: params() for name in more}


def write(workdir, steps, *more, **settings):
    checkpoints = Checkpoints(workdir, **settings)
    for step in steps:
        checkpoints.save(make_state(step, *more), PROGRESS, {"val_top1": step % 5})
    checkpoints.close()


def read(workdir, write=True):
    """(state, progress, what was said) of a restored workdir."""
    said = []
    checkpoints = Checkpoints(workdir, write=write, say=said.append)
    state, progress = checkpoints.restore(jax.tree.map(jnp.zeros_like, make_state(0)))
    checkpoints.close()
    return state, progress, said


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def names(workdir):
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("more", [(), ("ema",)])
def test_what_is_saved_comes_back_although_it_was_donated(more, tmp_path):
    state, wanted = make_state(6, *more, side=512), make_state(6, *more, side=512)
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, PROGRESS)
    for _ in range(5):
        state = spoil(state)
    checkpoints.wait()
    found, progress = checkpoints.restore(state)
    assert_same(found, wanted)
    assert progress == PROGRESS and found["step"].dtype == jnp.int32
    shapes = jax.eval_shape(lambda: wanted["params"])
    params, step = checkpoints.restore_params(shapes)
    assert_same(params, wanted[more[0] if more else "params"])
    assert step == 6
    checkpoints.close()


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
    """The loop goes on while files are written; before they are all there, no step is."""
    may_write, digests = threading.Event(), checkpoint._digests

    def slow_digests(folder):
        assert may_write.wait(60)
        return digests(folder)

    monkeypatch.setattr(checkpoint, "_digests", slow_digests)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), PROGRESS)
    checkpoints.check()
    assert checkpoints.steps == []
    may_write.set()
    checkpoints.wait()
    assert checkpoints.steps == [1] and names(tmp_path) == {"1"}
    checkpoints.close()


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"keep": 1}, [9, 12]),  # 9: the best, 9 % 5 being 4
        ({"keep": 3}, [9, 10, 11, 12]),
        ({"keep": 1, "keep_every": 4}, [4, 8, 9, 12]),
        ({"keep": 2, "keep_every": 6}, [6, 9, 11, 12]),
    ],
)
def test_the_newest_the_best_and_every_nth_are_kept(settings, kept, tmp_path):
    write(tmp_path, range(1, 7), **settings)
    write(tmp_path, range(7, 13), **settings)
    checkpoints = Checkpoints(tmp_path, write=False)
    assert checkpoints.steps == kept and checkpoints.best == 9
    assert names(tmp_path) == {str(step) for step in kept}
    params = make_state(0)["params"]
    assert_same(checkpoints.restore_params(params, "best")[0], make_state(9)["params"])
    assert_same(checkpoints.restore_params(params, kept[0])[0], make_state(kept[0])["params"])
    with pytest.raises(ConfigError, match="checkpoint '7' doesn't exist: it takes latest, best, "):
        checkpoints.restore_params(params, "7")


def test_a_run_without_validation_has_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), PROGRESS)
    checkpoints.wait()
    assert checkpoints.best is None and checkpoints.steps == [2, 3]
    with pytest.raises(ConfigError, match="was validated: take 'latest'"):
        checkpoints.restore_params(make_state(0)["params"], "best")


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint: train first"):
        Checkpoints(tmp_path, write=False)
    with pytest.raises(ConfigError, match="holds no checkpoint: train first"):
        Checkpoints(tmp_path).restore(make_state(0))


def test_a_flipped_bit_in_any_file_is_found(tmp_path):
    """Wherever it is; then the checkpoint before it is taken."""
    rng = np.random.default_rng(0)
    write(tmp_path / "whole", [1, 2])
    folder = tmp_path / "whole" / "checkpoints" / "2"
    files = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    assert {"progress.json", "SHA256SUMS", "_CHECKPOINT_METADATA"} < {p.name for p in files}
    for file in files:
        size = (folder / file).stat().st_size
        for position in sorted({0, size // 2, size - 1}) if size else ():
            flip(folder / file, position)
            assert file.name in checkpoint._damage(folder) or file.name == "SHA256SUMS"
            flip(folder / file, position)
        if not size:
            continue
        workdir = tmp_path / "damaged"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", workdir)
        flip(workdir / "checkpoints" / "2" / file, rng.integers(size))
        state, progress, said = read(workdir)
        assert_same(state, make_state(1))
        assert progress == PROGRESS
        assert len(said) == 1 and "checkpoint 2 is damaged (" in said[0]
        assert said[0].endswith("taking 1, the newest that is whole")
        assert names(workdir) == {"1", "2.damaged"}
    assert not checkpoint._damage(folder)


def _truncate(folder):
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "truncated": _truncate,
    "emptied": lambda folder: os.truncate(folder / "params" / "_METADATA", 0),
    "lost": lambda folder: largest_file(folder).unlink(),
    "lost part": lambda folder: shutil.rmtree(folder / "opt_state"),
    "no digests": lambda folder: (folder / "SHA256SUMS").unlink(),
    "half the digests": lambda folder: os.truncate(
        folder / "SHA256SUMS", (folder / "SHA256SUMS").stat().st_size // 2
    ),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "no folder": lambda folder: [shutil.rmtree(folder), folder.write_text("")],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_half_a_checkpoint_is_found(damage, tmp_path):
    write(tmp_path, [1, 2, 3])
    for step in (2, 3):
        damage(tmp_path / "checkpoints" / str(step))
    before = names(tmp_path)
    state, _, said = read(tmp_path, write=False)
    assert_same(state, make_state(1))
    assert len(said) == 1 and "checkpoint 3 is damaged" in said[0] and "checkpoint 2 " in said[0]
    assert names(tmp_path) == before  # a reader moves nothing
    assert_same(read(tmp_path)[0], make_state(1))
    assert names(tmp_path) == {"1", "2.damaged", "3.damaged"}


def test_a_damaged_step_is_written_anew(tmp_path):
    write(tmp_path, [1, 2])
    flip(largest_file(tmp_path / "checkpoints" / "2"), -100)
    checkpoints = Checkpoints(tmp_path, keep=1)
    state, _ = checkpoints.restore(make_state(0))
    checkpoints.save(state, PROGRESS)  # as it is on disk: nothing to do
    checkpoints.wait()
    assert checkpoints.steps == [1]
    checkpoints.save(make_state(2), PROGRESS, {"val_top1": 5})
    checkpoints.close()
    assert names(tmp_path) == {"2", "2.damaged"}
    assert_same(read(tmp_path)[0], make_state(2))


def test_if_all_are_damaged_one_error_says_so_every_time(tmp_path):
    write(tmp_path, [1, 2])
    for step in (1, 2):
        flip(largest_file(tmp_path / "checkpoints" / str(step)), -100)
    for _ in range(2):  # nor does the run begin anew at the second time
        with pytest.raises(CheckpointFailed) as error:
            read(tmp_path)
        text = str(error.value)
        assert "holds no checkpoint that can be used: checkpoint 2 is damaged" in text
        assert "checkpoint 1 is damaged" in text and "\n" not in text
        assert names(tmp_path) == {"1", "2"}


def test_a_reader_of_one_step_gets_that_or_an_error(tmp_path):
    write(tmp_path, [4, 5, 6])
    flip(largest_file(tmp_path / "checkpoints" / "4"), -100)
    said = []
    checkpoints = Checkpoints(tmp_path, write=False, say=said.append)
    params = make_state(0)["params"]
    for which in ("best", "4", 4):
        with pytest.raises(CheckpointFailed, match="can be used: checkpoint 4 is damaged"):
            checkpoints.restore_params(params, which)
    assert checkpoints.restore_params(params)[1] == 6 and not said
    flip(largest_file(tmp_path / "checkpoints" / "6"), -100)
    found, step = checkpoints.restore_params(params)
    assert step == 5 and "checkpoint 6 is damaged" in said[0]
    assert_same(found, make_state(5)["params"])


def test_what_a_killed_run_left_is_no_checkpoint(tmp_path):
    write(tmp_path, [1])
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "2.part.orbax-checkpoint-tmp")
    shutil.copytree(folder / "1", folder / "3.part")
    assert Checkpoints(tmp_path, write=False).steps == [1]
    assert len(names(tmp_path)) == 3
    assert Checkpoints(tmp_path).steps == [1] and names(tmp_path) == {"1"}


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk):
    write(small_disk, [1])
    checkpoints = Checkpoints(small_disk)
    with pytest.raises(CheckpointFailed) as error:
        checkpoints.save(make_state(2, side=400), PROGRESS)  # 1.3 MB
        checkpoints.wait()
    text = str(error.value)
    print(text)
    assert "checkpoint of step 2 can't be written" in text and "\n" not in text
    assert "last good checkpoint: step 1. Start again" in text
    assert os.strerror(errno.ENOSPC).lower() in text.lower() and len(text) < 600
    checkpoints.close()  # the error was told
    assert names(small_disk) == {"1"}
    assert_same(read(small_disk)[0], make_state(1))
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(CheckpointFailed, match="step 1. Start again"):
        write(small_disk, [2])  # not even a folder
    (small_disk / "filler").unlink()
    write(small_disk, [2])
    assert_same(read(small_disk)[0], make_state(2))


@pytest.mark.parametrize("late", [False, True])
def test_what_goes_wrong_in_the_background_is_told_once(late, tmp_path, monkeypatch):
    write(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path)

    def no_space(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_digests", no_space)
    checkpoints.save(make_state(2), PROGRESS)
    while not checkpoints._pending.done():
        time.sleep(0.01)
    with pytest.raises(CheckpointFailed, match="No space left on device"):
        if late:
            checkpoints.save(make_state(3), PROGRESS)
        else:
            checkpoints.check()
    checkpoints.check()
    checkpoints.close()
    assert names(tmp_path) == {"1"}


MESHES = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from stretchysnake_jax.checkpoint import Checkpoints

def mesh(*shape):
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

def spread(mesh, spec, step=0):
    kernel = np.random.default_rng(step).normal(size=(16, 24)).astype(np.float32)
    place = lambda x, *spec: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])
    return {"params": {"kernel": place(kernel, *spec)}, "step": place(np.int32(step))}

def check(found, like, step):
    assert [x.sharding for x in jax.tree.leaves(found)] == [
        x.sharding for x in jax.tree.leaves(like)]
    wanted = spread(mesh(8, 1), (), step)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        for shard in a.addressable_shards:
            whole = np.asarray(b.addressable_shards[0].data)
            np.testing.assert_array_equal(shard.data, whole[shard.index])
"""


def run(*scripts, processes=1):
    """Runs a script on 8 virtual devices, shared by processes that know each other."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    started = []
    for i in range(processes):
        join = f"jax.distributed.initialize('{address}', {processes}, {i})"
        lines = ["import jax", join if processes > 1 else "", MESHES, *scripts]
        flags = f"--xla_force_host_platform_device_count={8 // processes}"
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags}
        command = [sys.executable, "-c", "\n".join(lines)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env))
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n\n".join(errors)
    return errors


def save_on(workdir, shape, spec, steps):
    return f"""
c = Checkpoints({str(workdir)!r})
for step in {steps}:
    c.save(spread(mesh(*{shape}), {spec}, step), {{"elapsed": step}}, {{"val_top1": step}})
c.close()
"""


def restore_on(workdir, shape, spec, step):
    return f"""
c = Checkpoints({str(workdir)!r})
like = spread(mesh(*{shape}), {spec})
found, progress = c.restore(like)
check(found, like, {step})
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
here, step = c.restore_params(abstract["params"])
assert progress == {{"elapsed": {step}}} and step == {step}
np.testing.assert_array_equal(here["kernel"], np.asarray(
    spread(mesh(8, 1), (), {step})["params"]["kernel"].addressable_shards[0].data))
c.close()
"""


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
    run(
        save_on(tmp_path, (2, 4), ("fsdp",), [3]),
        restore_on(tmp_path, (4, 2), ("fsdp",), 3),
        restore_on(tmp_path, (8, 1), (None, "data"), 3),
        restore_on(tmp_path, (2, 4), ("data", "fsdp"), 3),
        restore_on(tmp_path, (1, 8), (), 3),
    )


def test_several_processes_write_and_read_one_checkpoint(tmp_path):
    script = save_on(tmp_path, (2, 4), (("data", "fsdp"),), [3, 4])
    run(script, restore_on(tmp_path, (4, 2), ("fsdp",), 4), processes=2)
    assert names(tmp_path) == {"3", "4"}
    folder = tmp_path / "checkpoints" / "4"
    assert {p.name for p in (folder / "params").glob("ocdbt.process_*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    alone = shutil.copytree(tmp_path, tmp_path.with_name("alone"))
    run(restore_on(alone, (4, 2), ("fsdp",), 4))  # on one process, then
    flip(largest_file(folder), -100)
    errors = run(restore_on(tmp_path, (2, 4), ("fsdp",), 3), processes=2)
    assert sum("checkpoint 4 is damaged" in text for text in errors) == 1
    assert names(tmp_path) == {"3", "4.damaged"}


@pytest.mark.parametrize("keep_every", [4, -6])
def test_keep_every_fits_the_steps_that_are_saved(keep_every, tiny_config):
    tiny_config.train.keep_every = 12
    validate(tiny_config)
    tiny_config.train.keep_every = keep_every
    with pytest.raises(ConfigError, match="keep_every is .* a multiple of train.checkpoint_every"):
        validate(tiny_config)
