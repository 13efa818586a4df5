"""What a run is made of before its first step: config, clips, workdir, initial weights."""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from stretchysnake_jax import config as config_lib
from stretchysnake_jax.buckets import Schedule
from stretchysnake_jax.clock import Progress
from stretchysnake_jax.config import Config, ConfigError
from stretchysnake_jax.data import decode, stick_actions
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.metrics import check_installed
from stretchysnake_jax.validation import validate

# Fields that may change when a run goes on: they change neither its numbers nor their order.
# What is computed again, and on how many devices, changes the last digits alone.
FREE = ("data.threads", "data.workers", "data.prefetch", "train.log_every", "train.eval_every")
FREE += ("train.checkpoint_every", "train.keep", "train.keep_every", "train.loggers", "name")
FREE += ("train.remat", "train.layers", "train.compilation_cache")
FREE += ("mesh.data", "mesh.fsdp", "mesh.sequence")
FREE += ("data.max_unreadable", "data.allow_absolute", "data.test_clips", "data.test_crops")


def prepare(config: Config, progress: Progress) -> tuple[Config, ClipList, ClipList | None]:
    """Renders the embedded data if the config asks for it, and reads the lists.

    The first of several processes renders; the others wait for it.

    Returns:
      (config with absolute paths, training clips, validation clips or None).
    """
    validate(config)
    check_installed(config.train.loggers)
    decode.set_up_opencv()
    data = config_lib.resolve(config.data)
    stick = data.stick_actions
    if stick.path:
        make = {k: v for k, v in dataclasses.asdict(stick).items() if k != "path"}
        try:
            # Asked so, since the demo calls this where no device of JAX is to be started.
            several = jax.distributed.is_initialized()
            if not several or jax.process_index() == 0:
                show = progress.counter(f"rendering {stick.path}: clips")
                stick_actions.make(stick.path, **make, progress=show)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        progress.close()
        if several:
            multihost_utils.sync_global_devices("data is there")
        for split in config_lib.SPLITS:
            setattr(data, split, str(pathlib.Path(stick.path) / f"{split}.txt"))
    for name in (*config_lib.SPLITS, "root", "annotations"):
        if getattr(data, name):
            setattr(data, name, str(pathlib.Path(getattr(data, name)).absolute()))
    optim = config_lib.resolve(config.optim)
    config = dataclasses.replace(config, data=data, optim=optim)
    clips = load_clips(data, "train", say=progress.say)
    val = load_clips(data, "val", clips.classes, optional=True, say=progress.say)
    if len(clips.classes) != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes} but {data.train or data.dataset} has "
            f"{len(clips.classes)} classes: set it to {len(clips.classes)}"
        )
    return config, clips, val


def claim(workdir: pathlib.Path, config: Config, classes: list[str], begun: bool) -> None:
    """Writes the resolved config and the class names; checks the config of a run that has begun.

    The first of several processes writes.

    Raises:
      ConfigError: the workdir belongs to a run with another config.
    """
    path = workdir / "config.json"
    if begun:
        old, new = config_lib.load(path), config
        old.optim = config_lib.resolve(old.optim)
        old.data = config_lib.resolve(old.data)  # fields may have come after the run was begun
        for name in config_lib.field_names(new):
            if name not in FREE and _get(old, name) != _get(new, name):
                raise ConfigError(
                    f"{workdir} holds a run with another config: {name} is {_get(old, name)!r} "
                    f"there and {_get(new, name)!r} now; go on with its own or take a new workdir"
                )
    if jax.process_index() == 0:
        if not begun:
            (workdir / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        config_lib.save(config, path)


def settle_batches(config: Config, workdir: pathlib.Path, parts: int) -> Config:
    """The config with `data.batch_multiple` as the run began with it, on whatever it goes on.

    Were it the devices at hand, a run that goes on with another number of them would cut its row of
    clips into other batches.

    Args:
      config: the run's.
      workdir: where it may have begun.
      parts: into which the devices and `train.accumulate` cut a batch.

    Raises:
      ConfigError: data.batch_size can't be cut so.
    """
    data, path = config.data, workdir / "config.json"
    name, multiple = "data.batch_size", data.batch_size
    if data.tokens_per_batch:
        name, multiple = "data.batch_multiple", data.batch_multiple
        if not multiple:
            begun = path.exists() and config_lib.load(path).data.batch_multiple
            multiple = begun or parts
            config = dataclasses.replace(
                config, data=dataclasses.replace(data, batch_multiple=multiple)
            )
    if multiple % parts:
        raise ConfigError(
            f"{name} is {multiple}: the devices of the mesh and train.accumulate cut a batch into "
            f"{parts} parts, so it takes a multiple of {parts}; the nearest is "
            f"{max(1, round(multiple / parts)) * parts}"
        )
    return config


def fingerprints(clips: ClipList, schedule: Schedule) -> dict[str, str]:
    """Digests of the clips (paths, labels, classes, windows) and of the schedule of scales."""
    parts = [clips.paths, clips.labels.tolist(), clips.classes]
    if clips.windows is not None:
        parts += [clips.windows.tolist(), clips.unit]
    scales = repr((schedule.buckets, schedule.batch_sizes)).encode() + schedule.which.tobytes()
    return {
        "clips": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "schedule": hashlib.sha256(scales).hexdigest(),
    }


def _get(config: Config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def check_fingerprints(config: Config, workdir: pathlib.Path, then: dict, now: dict) -> None:
    """Raises ConfigError if a run can't go on as it was: other clips, or another schedule."""
    name = config.data.train or config.data.dataset
    if then["clips"] != now["clips"]:
        raise ConfigError(
            f"{name} has changed since {workdir} was begun: the run can't go on as it was; take a "
            "new workdir, with --config.train.init_from for its weights"
        )
    if then["schedule"] != now["schedule"]:
        raise ConfigError(
            f"{workdir} was begun by another version, whose schedule of scales was another: go on "
            "with that one, or take a new workdir, with --config.train.init_from for its weights"
        )


def start_from(config: Config, state: dict, say) -> dict:
    """The state with the parameters of `train.init_from`, its moving average beginning there."""
    params = initial_params(config, state["params"], say)
    state = state | {"params": params}
    return state | {"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else state


def initial_params(config: Config, fresh: dict, say) -> dict:
    """The parameters of `train.init_from`, fitted to the config's base scale.

    The head is kept if it has the right number of classes and drawn anew otherwise; everything else
    must have the same shape after interpolation.

    Raises:
      ConfigError: a parameter with another shape.
    """
    from stretchysnake_jax.model import load

    given = load(config.train.init_from)
    model = config.model
    fitted = given.stretch(frames=model.frames, size=model.size, patch=model.patch, method="paper")
    params = dict(fitted.fitted_params)
    if params["head"]["bias"].shape != fresh["head"]["bias"].shape:
        say(
            f"{config.train.init_from} has {params['head']['bias'].size} classes, the config "
            f"{model.num_classes}: the head starts anew"
        )
        params["head"] = fresh["head"]

    def check(path, new, old):
        if new is old:
            return old
        if new.shape != old.shape:
            raise ConfigError(
                f"{config.train.init_from}: {jax.tree_util.keystr(path)} has shape {new.shape}, "
                f"the config's model takes {old.shape}"
            )
        return jax.device_put(np.asarray(new, old.dtype), old.sharding)

    if jax.tree.structure(params) != jax.tree.structure(fresh):
        raise ConfigError(f"{config.train.init_from} holds another kind of model than the config's")
    return jax.tree.map_with_path(check, params, fresh)
