"""Fixtures that several test files use."""

import dataclasses
import os
import shutil
import tempfile

# Compiled functions are shared by all tests of a session and the processes that they start, those
# of pytest-xdist included, and XLA is asked for its least effort at machine code, which takes a
# third off the tests' time; what it does to a program before stays. Set before JAX is imported.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="stretchysnake-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    _FLAGS = os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

# The extra [aot] brings JAX's CUDA plugin without NVIDIA's libraries, which it would ask for.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import cv2
import numpy as np
import pytest
from stretchysnake_configs.study import stick
from stretchysnake_kernels import configure_cpu

from stretchysnake_jax import study_plan

# As the commands do, so that runs in this process and in processes of their own give the same bits.
configure_cpu()

# Files of `video_folder`: name -> (fourcc, frames, width, height).
VIDEOS = {
    "a.mp4": ("mp4v", 20, 64, 48),
    "b.avi": ("MJPG", 12, 64, 48),
    "c d.mp4": ("mp4v", 9, 48, 64),
    "e.webm": ("VP90", 15, 64, 48),
    "f.avi": ("MJPG", 3, 80, 48),
    "g.mp4": ("mp4v", 16, 64, 48),
}


def grey_levels(n):
    """The grey level of every frame of a video of `video_folder`."""
    return 12 * np.arange(n)


def write_grey_video(path, fourcc, n, width, height):
    """Writes a video of `n` even frames whose grey level tells their number; returns its bytes."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 25, (width, height))
    assert writer.isOpened()
    for level in grey_levels(n):
        writer.write(np.full((height, width, 3), level, np.uint8))
    writer.release()
    return path.read_bytes()


def make_row(cell, top1=0.5, test="own", frames=2, size=28, **more):
    """A row of the study's table, as a cell gives it, by hand."""
    row = dataclasses.asdict(cell) | {"test": test, "frames": frames, "size": size, "top1": top1}
    row |= {"where": study_plan.where(frames, size, stick.get_config("").stretch)}
    row |= {"gflops": 0.1 * frames, "trained": 0, "clips": 10, "config": "x", "minutes": 1.0}
    return dict.fromkeys(study_plan.COLUMNS) | row | {"fold": cell.fold or None} | more


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory):
    """A folder of small videos of several codecs, with a list `clips.txt` (labels 0..5)."""
    folder = tmp_path_factory.mktemp("videos")
    for name, spec in VIDEOS.items():
        write_grey_video(folder / name, *spec)
    lines = [f"{name} {label}\n" for label, name in enumerate(VIDEOS)]
    (folder / "clips.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def clips(video_folder, tmp_path_factory):
    """Six videos that can be read, and one that can't."""
    from stretchysnake_jax.data import lists

    folder = tmp_path_factory.mktemp("clips")
    for name in VIDEOS:
        shutil.copy(video_folder / name, folder)
    (folder / "broken.mp4").write_bytes(b"no video")
    names = [*VIDEOS, "broken.mp4"]
    (folder / "list.txt").write_text("".join(f"{n},{i}\n" for i, n in enumerate(names)))
    return lists.read_list(folder / "list.txt")


TINY_CONFIG = '''"""A run of seconds."""

from stretchysnake_jax.config import (
    Config, DataConfig, ModelConfig, OptimConfig, StretchConfig, TrainConfig,
)


def get_config(arg=""):
    return Config(
        name="tiny",
        model=ModelConfig(
            dim=16, depth=1, state=4, patch=(4, 4), size=(16, 16), frames=2, num_classes=6,
            pooling="mean", normalise="clip", drop_path=0.1,
        ),
        stretch=StretchConfig(frames=(2,), sizes=(8, 16, 24), kernel_method="area"),
        data=DataConfig(
            train="{folder}/clips.txt", val="{folder}/clips.txt", batch_size=3, crop_scale=0.8,
            threads=2,
        ),
        optim=OptimConfig(learning_rate=1e-2),
        train=TrainConfig(steps=24, log_every=1, checkpoint_every=6),
    )
'''


@pytest.fixture(scope="session")
def tiny_config_file(video_folder, tmp_path_factory):
    """The path of a config file that trains on `video_folder` in seconds."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(TINY_CONFIG.replace("{folder}", str(video_folder)))
    return path


@pytest.fixture
def tiny_config(tiny_config_file):
    """What `tiny_config_file` gives, made anew for every test."""
    from stretchysnake_jax.cli import parse_config

    return parse_config(["--config", str(tiny_config_file)])[0]


@pytest.fixture(scope="session")
def trained(tiny_config_file, tmp_path_factory):
    """The workdir of a finished run of `tiny_config_file`."""
    from stretchysnake_jax.cli import parse_config
    from stretchysnake_jax.train import train

    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(parse_config(["--config", str(tiny_config_file)])[0], workdir) == 0
    return workdir
