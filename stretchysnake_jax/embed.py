"""Features of the clips of a list at one scale: of clips, of their time steps, or of tokens."""

import dataclasses
import functools

from stretchysnake_jax import outputs
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import (
    SPLITS,
    Config,
    ConfigError,
    ModelConfig,
    StretchConfig,
    nearest,
)
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.data.lists import ClipList, read_list
from stretchysnake_jax.model import Model
from stretchysnake_jax.step import EvalStep

POOLINGS = ("cls", "mean")


def embed(
    model: Model,
    clips: ClipList,
    bucket: Bucket,
    pooling: str = "cls",
    batch_size: int = 8,
    views: tuple[int, int] = (1, 1),
    on_batch=None,
) -> outputs.Outputs:
    """Computes a feature of every clip.

    Args:
      model: loaded; its run says how clips are sampled and resized, and the dtype.
      clips: the list.
      bucket: the scale.
      pooling: "cls": what the model's own head sees: the class token, or of a model with mean
        pooling the mean token. "mean": the mean of all tokens after the final norm.
      batch_size: views per batch.
      views: (test clips, test crops) of every clip, their features averaged.
      on_batch: called with the number of clips done after every batch.

    Returns:
      `outputs.Outputs`, values (clips, dim).

    Raises:
      ConfigError: an unknown pooling.
      TooManyUnreadable: there is no clip that can be read.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"the pooling is {pooling!r}: {nearest(pooling, POOLINGS)}")
    return outputs.compute(
        make_forward(model, bucket, pooling),
        model.params,
        run_of(model).data,
        clips,
        bucket,
        batch_size,
        views=views,
        merge=outputs.merge_features,
        on_batch=on_batch,
    )


def make_forward(model: Model, bucket: Bucket, what: str):
    """Makes a function (params, uint8 video (B, T, H, W, 3), bucket) -> float32 features.

    Args:
      model: its encoder; calls for the same one share compiled programs.
      bucket: the scale that it is made for.
      what: "cls" or "mean" as of `embed`, (B, dim); "token": all but the class token after the
        final norm, (B, steps, rows, columns, dim), steps being frames / tubelet; "frame": the mean
        of each step's tokens, (B, steps, dim).

    Raises:
      ConfigError: several frames for an image model.
    """
    if model.config.frames is None and bucket.frames != 1:
        raise ConfigError(f"an image model takes 1 frame, the clips would have {bucket.frames}")
    parts = dataclasses.astuple(model.config), dataclasses.astuple(model.methods)
    output = "features" if what == "cls" else "tokens"
    step = _make_step(*parts, run_of(model).train.dtype, output, bucket.patch)

    def forward(params, video, bucket):
        values = step(params, video, bucket)
        if what == "cls":
            return values
        if what == "mean":
            return values.mean(1)
        grid = (bucket.frames // model.config.tubelet, *bucket.grid)
        values = values[:, 1:].reshape(len(values), *grid, -1)
        return values.mean((2, 3)) if what == "frame" else values

    return forward


@functools.lru_cache(maxsize=16)
def _make_step(model: tuple, methods: tuple, dtype: str, output: str, patch) -> EvalStep:
    # Configurations are mutable, so they come as tuples of their fields.
    config, stretch = ModelConfig(*model), StretchConfig(*methods)
    return EvalStep(config, stretch, dtype, output=output, exact={patch})


def run_of(model: Model) -> Config:
    """The configuration of the run that trained a model; the defaults for one without a run."""
    return model.run or Config(model=model.config, stretch=model.methods)


def find_clips(
    model: Model, where: str, classes: list[str] | None, allow_absolute: bool = False, say=None
) -> ClipList:
    """The clips of a split of the model's run, or of a list file.

    Args:
      model: loaded.
      where: "train", "val", "test", or the path of a list file.
      classes: the class names that labels must follow. None: of a split the run's, of a list file
        its own.
      allow_absolute: entries of a list file may lead out of its folder.
      say: takes a line about clips that are missing.

    Raises:
      ConfigError: the split or the file isn't there, or can't be read.
    """
    data = run_of(model).data
    if where not in SPLITS:
        return read_list(where, "", classes, allow_absolute or data.allow_absolute)
    clips = load_clips(data, where, classes or model.classes, optional=True, say=say)
    if clips is None:
        raise ConfigError(f"the run has no {where} list: take another split, or a list file")
    return clips
