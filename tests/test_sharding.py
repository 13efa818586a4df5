"""Meshes: losses and gradients are those of one device, state and tokens are cut up.

A process has the number of devices it started with, so the cases run in one process of their own
with eight virtual devices, which is this file as a program; the tests read its report.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from stretchysnake_jax import compile_report, models, sharding
from stretchysnake_jax.buckets import make_bucket
from stretchysnake_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    StretchConfig,
)
from stretchysnake_jax.step import EvalStep, TrainStep, init_state

# (data, fsdp, sequence): all axes, and each alone. 1 + 2 * 9 tokens: no axis divides them.
# `stretchysnake bench mesh` compares more, and several processes.
MESHES = [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)]
CHANGES = {
    "the same": {"train": {"accumulate": 2, "remat": "block"}, "optim": {"ema": 0.9}},
    "other": {"data": {"mixup": 0.8, "cutmix": 1.0}, "stretch": {"distill": 1.0}},
}
STEPS = ((2, 9), (2, 12))  # frames and size: two resolutions, one trunk


def make_config(change=None) -> Config:
    config = Config(
        model=ModelConfig(
            dim=16, depth=1, state=4, patch=(4, 4), size=(12, 12), frames=2, num_classes=6
        ),
        stretch=StretchConfig(frames=(2,), sizes=(9, 12, 15)),
        data=DataConfig(batch_size=16),
    )
    for part, fields in (change or {}).items():
        setattr(config, part, dataclasses.replace(getattr(config, part), **fields))
    return config


def train(config, mesh=None):
    """Losses and gradient norms of a few steps, the second with unreadable clips."""
    step, state = TrainStep(config, 20, mesh), init_state(config, 20, mesh)
    rng, numbers = np.random.default_rng(0), []
    for frames, size in STEPS:
        bucket = make_bucket("static_tokens", frames, (size, size), config.model)
        loaded = 15 if config.stretch.distill else size
        batch = {
            "video": rng.integers(0, 256, (16, frames, loaded, loaded, 3), np.uint8),
            "label": np.arange(16, dtype=np.int32) % 6,
            "mask": np.ones(16, np.float32),
        }
        batch["mask"][: 3 * len(numbers)] = 0
        if mesh is not None:
            batch = sharding.place(mesh, batch)
        state, metrics = step(state, batch, bucket)
        numbers += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return numbers, state, step


def run_cases(meshes, changes):
    """What the tests want to know, from a process with eight devices."""
    report = {"one": train(make_config())[0], "meshes": {}, "changes": {}, "bytes": {}}
    for shape in MESHES:
        mesh = sharding.make_mesh(MeshConfig(*shape))
        if shape in meshes:
            report["meshes"][str(shape)] = train(make_config(), mesh)[0]
        state = TrainStep(make_config(), 20, mesh).state
        report["bytes"][str(shape)] = compile_report.size(state)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    for name in changes:
        config = make_config(CHANGES[name])
        report["changes"][name] = [train(config, m)[0] for m in (None, mesh)]
    config = make_config()
    _, params = models.init(config.model, jax.random.key(0))
    bucket = make_bucket("static_tokens", 2, (10, 13), config.model)  # no patch of training
    video = np.random.default_rng(1).integers(0, 256, (8, *bucket.shape), np.uint8)
    alone = EvalStep(config.model, config.stretch, "float32")(params, video, bucket)
    spread = jax.device_put(params, sharding.of_state(mesh, params))
    logits = EvalStep(config.model, config.stretch, "float32", mesh=mesh)(spread, video, bucket)
    report["evaluation"] = float(np.abs(np.asarray(logits) - np.asarray(alone)).max())
    return report


def report_of(folder, which):
    path = folder / "report.json"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    paths = os.pathsep.join(sys.path)
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, path, which], env=env, check=True)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return report_of(tmp_path_factory.mktemp("sharding"), "few")


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory):
    return report_of(tmp_path_factory.mktemp("sharding"), "all")


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(whole_report, shape):
    assert whole_report["meshes"][str(shape)] == pytest.approx(whole_report["one"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_all_options_of_training_on_a_mesh(whole_report, name):
    alone, on_mesh = whole_report["changes"][name]
    assert on_mesh == pytest.approx(alone, rel=1e-5)
    if name == "the same":  # these don't change what is computed
        assert alone == pytest.approx(whole_report["one"], rel=1e-5)
    else:
        assert alone != pytest.approx(whole_report["one"], rel=1e-3)


def test_a_mesh_gives_the_losses_of_one_device(report):
    (shape,) = report["meshes"]
    assert report["meshes"][shape] == pytest.approx(report["one"], rel=1e-5)


def test_evaluation_on_a_mesh(report):
    assert report["evaluation"] < 1e-5


def test_the_state_of_a_device_falls_with_the_fsdp_axis(report):
    whole = report["bytes"]["(8, 1, 1)"]
    for shape, parts in (((2, 2, 2), 2), ((1, 8, 1), 8)):
        # Of this little model a few small arrays have no axis to cut.
        assert report["bytes"][str(shape)] == pytest.approx(whole / parts, rel=0.06)


def test_the_rule_cuts_the_longest_axis_but_never_the_layers():
    def rule(name, shape, shards=4):
        path = tuple(jax.tree_util.DictKey(part) for part in name.split("."))
        return sharding.of_parameter(path, shape, shards)

    assert rule("params.layers.mixer.in_proj.kernel", (32, 576, 2304)) == P(None, None, "fsdp")
    assert rule("params.layers.mixer.out_proj.kernel", (32, 1152, 576)) == P(None, "fsdp")
    assert rule("params.layers.norm.scale", (32, 575)) == P()
    assert rule("params.patch_embed.kernel", (1, 16, 16, 3, 192)) == P(*[None] * 4, "fsdp")
    assert rule("step", ()) == P()
    assert rule("params.head.kernel", (576, 400), shards=1) == P()


def test_every_large_array_of_a_published_model_is_cut():
    config = Config(model=models.preset("middle"))
    state = jax.eval_shape(lambda: init_state(config, 10))
    whole = [
        x.size
        for path, x in jax.tree.leaves_with_path(state)
        if sharding.of_parameter(path, x.shape, 64) == P()
    ]
    assert sum(whole) < 1e-4 * sum(x.size for x in jax.tree.leaves(state))


def test_a_mesh_that_does_not_fit_says_what_does():
    devices = jax.devices() * 6
    with pytest.raises(ConfigError, match=r"is 1 x 4 x 1 = 4: it takes all 6 devices"):
        sharding.make_mesh(MeshConfig(fsdp=4), devices)
    with pytest.raises(ConfigError, match=r"is 2 x 1 x 1 = 2: it takes all 6 devices"):
        sharding.make_mesh(MeshConfig(data=2), devices)


if __name__ == "__main__":
    which = (MESHES, list(CHANGES)) if sys.argv[2] == "all" else (MESHES[:1], [])
    with open(sys.argv[1], "w") as file:
        json.dump(run_cases(*which), file)
