"""A trained model in Python: load it, stretch it, ask it.

model = stretchysnake_jax.load("runs/demo/static_tokens")
video = model.read("holiday.mov")        # or any uint8 array (batch, frames, height, width, 3)
model.predict(video)                     # weights fitted to the video's shape
model.top("holiday.mov")                 # [("wave", 0.93), ...]
long = model.stretch(frames=32, size=112)
long.features(long.read("holiday.mov"))  # fitted to exactly this scale
"""

import dataclasses
import functools
import numbers
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from stretchysnake_jax import config as config_lib
from stretchysnake_jax import convert, models
from stretchysnake_jax.buckets import Bucket, make_bucket, training_buckets
from stretchysnake_jax.checkpoint import Checkpoints
from stretchysnake_jax.config import Config, ConfigError, ModelConfig, StretchConfig
from stretchysnake_jax.data import sampling, source, transforms
from stretchysnake_jax.step import fit


@dataclasses.dataclass(frozen=True)
class Model:
    """An encoder with its weights.

    Attributes:
      config: the encoder's shape.
      params: base parameters, nested dicts of float32 arrays.
      methods: the variant, which gives the patch at a size, and the methods of interpolation.
      classes: the names of the classes, or None.
      bucket: the one scale that the model is stretched to; None: whatever the video has.
      run: the configuration of the run that trained it, or None.
      step: of the checkpoint, or None.
    """

    config: ModelConfig
    params: dict
    methods: StretchConfig
    classes: list[str] | None = None
    bucket: Bucket | None = None
    run: Config | None = None
    step: int | None = None

    def stretch(
        self,
        *,
        frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        patch: int | tuple[int, int] | None = None,
        method: str | dict[str, str] | None = None,
    ) -> "Model":
        """The same weights, pinned to one scale.

        Always starts from the base parameters: stretching twice loses nothing.

        Args:
          frames: frames of a clip; None: the base.
          size: pixels, a number or (height, width); None: the base.
          patch: pixels, a number or (height, width); None: by the model's variant.
          method: of all three weights, one of `config.METHODS`, or a dict with some of the keys
            kernel, spatial and temporal; None: the model's own. "paper" reproduces PyTorch.

        Raises:
          ConfigError: an unknown method, or sizes that don't fit together.
        """
        chosen = method if isinstance(method, dict) else dict.fromkeys(_WEIGHTS, method)
        methods = dataclasses.replace(self.methods)
        for weight, name in chosen.items():
            if weight not in _WEIGHTS:
                known = config_lib.nearest(weight, _WEIGHTS)
                raise ConfigError(f"method has the key {weight!r}: {known}")
            if name is not None:
                if name not in config_lib.METHODS:
                    known = config_lib.nearest(name, config_lib.METHODS)
                    raise ConfigError(f"method is {name!r}: {known}")
                setattr(methods, f"{weight}_method", name)
        bucket = make_bucket(
            self.methods.variant,
            frames if frames is not None else self.config.frames or 1,
            _pair(size, "size") if size is not None else self.config.size,
            self.config,
            _pair(patch, "patch") if patch is not None else None,
        )
        return dataclasses.replace(self, methods=methods, bucket=bucket)

    @property
    def fitted_params(self) -> dict:
        """The parameters interpolated to the pinned scale; the base ones if none is pinned."""
        return self.params if self.bucket is None else fit(self.params, self.bucket, self.methods)

    def logits(self, video: npt.ArrayLike) -> jax.Array:
        """Class scores.

        Args:
          video: (batch, frames, height, width, 3), RGB: uint8 (normalised inside), or floating
            point (taken as normalised already).

        Returns:
          float32 (batch, num_classes).

        Raises:
          ConfigError: the video has another shape or dtype than the model takes.
        """
        return self._run(video, "logits")

    def features(self, video: npt.ArrayLike) -> jax.Array:
        """Clip embeddings after the final norm: `video` as of `logits` -> float32 (batch, dim)."""
        return self._run(video, "features")

    def predict(self, video: npt.ArrayLike) -> jax.Array:
        """Class probabilities: `video` as of `logits` -> float32 (batch, num_classes)."""
        return jax.nn.softmax(self.logits(video), -1)

    def read(
        self,
        path: str | os.PathLike,
        *,
        frames: int | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Reads a clip as the model's run reads its test clips.

        Args:
          path: a video file or a folder of frames.
          frames: frames of the clip, which are spread over the video.
          size: pixels, a number or (height, width). Where the model is stretched, both are given by
            it; else what isn't given is that of `nearest_bucket`.

        Returns:
          uint8 (1, frames, height, width, 3), RGB.

        Raises:
          UnreadableVideo: with the path and the reason.
          ConfigError: the sizes don't fit together, or with those of a stretched model.
        """
        shape = None if size is None else _pair(size, "size")
        pinned = self.bucket
        if pinned:
            own = pinned.frames, (pinned.height, pinned.width)
            if (frames or own[0], shape or own[1]) != own:
                raise ConfigError(f"the model is stretched to {pinned}: it reads that scale alone")

        def choose(height, width):
            return pinned or self.nearest_bucket(height, width, frames, shape)

        data = self.run.data if self.run else config_lib.DataConfig()
        return read_video(path, data, choose)[0][None]

    def top(self, path: str | os.PathLike, k: int = 5) -> list[tuple[str, float]]:
        """The k most likely classes of a clip, with their probabilities; `path` as of `read`."""
        chances = np.asarray(self.predict(self.read(path))[0], np.float64)
        names = self.classes or [str(i) for i in range(len(chances))]
        return [(names[i], float(chances[i])) for i in np.argsort(-chances, kind="stable")[:k]]

    def nearest_bucket(self, height: int, width: int, frames=None, size=None) -> Bucket:
        """The scale at which clips of height x width pixels are seen when none is asked for.

        The trained bucket whose size is nearest to the clip's short side (in octaves), with the
        most frames; the base scale for a model that no run trained. `frames` and `size` (height,
        width) replace its own.
        """
        if self.run is None:
            near = (self.config.frames or 1, *self.config.size)
            near = make_bucket(self.methods.variant, near[0], near[1:], self.config)
        else:
            side = min(height, width)

            def distance(bucket):
                away = abs(np.log2(min(bucket.height, bucket.width) / side))
                base = abs(bucket.patch[0] - self.config.patch[0])
                return round(float(away), 6), -bucket.frames, base

            buckets = training_buckets(self.run.stretch, self.run.model)
            near = min((bucket for bucket, _ in buckets), key=distance)
        if frames is None and size is None:
            return near
        size = size or (near.height, near.width)
        return make_bucket(self.methods.variant, frames or near.frames, size, self.config)

    def bucket_of(self, shape) -> Bucket:
        """The scale at which a video of `shape` (batch, frames, height, width, 3) is seen."""
        if len(shape) != 5 or shape[-1] != 3 or min(shape) < 1:
            raise ConfigError(
                f"video has shape {tuple(shape)}: it takes (batch, frames, height, width, 3)"
            )
        _, frames, height, width, _ = shape
        if self.bucket is None:
            return make_bucket(self.methods.variant, frames, (height, width), self.config)
        b = self.bucket
        if (frames, height, width) != (b.frames, b.height, b.width):
            raise ConfigError(
                f"video has {frames} frames of {height}x{width} pixels but the model is stretched "
                f"to {b.frames} of {b.height}x{b.width}"
            )
        return b

    def _run(self, video, output):
        if not hasattr(video, "shape"):
            video = np.asarray(video)
        bucket = self.bucket_of(video.shape)
        if video.dtype != np.uint8:
            if not jnp.issubdtype(video.dtype, jnp.floating):
                raise ConfigError(
                    f"video has dtype {video.dtype}: it takes uint8 pixels, or floating point that "
                    "is normalised already"
                )
            video = jnp.asarray(video, jnp.float32)
        if self.config.frames is None and bucket.frames != 1:
            raise ConfigError(f"an image model takes 1 frame, the video has {bucket.frames}")
        methods = tuple(getattr(self.methods, f"{w}_method") for w in _WEIGHTS)
        return _forward(_Frozen(self.config), methods)(self.params, video, bucket, output)


def read_video(path, data: config_lib.DataConfig, choose_bucket) -> tuple[np.ndarray, Bucket]:
    """Reads a clip at the scale that `choose_bucket(height, width)` gives for its frames' size.

    Returns:
      (uint8 (frames, height, width, 3), the bucket).

    Raises:
      UnreadableVideo: with the reason.
    """
    seen, data = {}, config_lib.resolve(data)

    def geometry(frame):
        bucket = seen.setdefault("bucket", choose_bucket(*frame.shape[:2]))
        return transforms.eval_geometry(bucket.height, bucket.width, data.resize)(frame)

    # The size decides the bucket and the bucket how many frames: look at the first frame.
    path = str(path)
    source.read_clip(path, lambda n: np.zeros(1, int), geometry)
    bucket = seen["bucket"]
    choose = functools.partial(
        sampling.choose, data.sampling, frames=bucket.frames, stride=data.stride
    )
    frames, _ = source.read_clip(path, choose, geometry)
    return frames, bucket


_WEIGHTS = ("kernel", "spatial", "temporal")


def _pair(value, name: str) -> tuple[int, int]:
    """A number or (height, width) as (height, width)."""
    values = (value, value) if isinstance(value, numbers.Integral) else tuple(value)
    if len(values) != 2 or not all(isinstance(v, numbers.Integral) and v >= 1 for v in values):
        raise ConfigError(f"{name} is {value!r}: it takes pixels, a number or (height, width)")
    return int(values[0]), int(values[1])


class _Frozen:
    """A configuration as a dictionary key."""

    def __init__(self, config: ModelConfig):
        self.config, self._key = config, tuple(config_lib.to_dict(config).items())

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return self._key == other._key


@functools.lru_cache(maxsize=64)
def _forward(frozen: _Frozen, methods: tuple[str, str, str]):
    # Compiled functions are shared by all models of one shape, stretched ones included.
    config = frozen.config
    apply = models.make_apply(config)
    stretch = StretchConfig(**{f"{w}_method": m for w, m in zip(_WEIGHTS, methods, strict=True)})

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def forward(params, video, bucket, output):
        if video.dtype == jnp.uint8:
            video = models.normalise(video, config.normalise)
        return apply(fit(params, bucket, stretch), video, output=output)

    return forward


def load(
    path: str | os.PathLike, *, checkpoint: str = "latest", variant: str | None = None
) -> Model:
    """Loads a model.

    Args:
      path: the workdir of a run, a PyTorch checkpoint (.pth, .pt; VideoMamba's layouts), or a .npz
        or .safetensors file of `stretchysnake convert`.
      checkpoint: of a workdir: "latest", "best" or a step.
      variant: how the patch follows from the size, one of `config.VARIANTS`; None: as the run was
        trained; for a file that doesn't say it vanilla, so patches stay as they are and the tables
        are interpolated.

    Raises:
      ConfigError: nothing there, or nothing that can be loaded.
    """
    path = pathlib.Path(path)
    if variant is not None and variant not in config_lib.VARIANTS:
        known = config_lib.nearest(variant, config_lib.VARIANTS)
        raise ConfigError(f"variant is {variant!r}: {known}")
    if path.is_dir():
        run = config_lib.load(path / "config.json")
        shapes = jax.eval_shape(lambda key: models.init(run.model, key)[1], jax.random.key(0))
        checkpoints = Checkpoints(path, write=False)
        params, step = checkpoints.restore_params(shapes, checkpoint)
        checkpoints.close()
        methods = dataclasses.replace(run.stretch, variant=variant or run.stretch.variant)
        names = path / "classes.txt"
        classes = names.read_text().splitlines() if names.exists() else None
        return Model(run.model, params, methods, classes, run=run, step=step)
    if not path.exists():
        raise ConfigError(
            f"nothing at {path}: it takes a workdir, a .pth or a .npz or .safetensors file"
        )
    classes, methods = None, None
    if path.suffix == ".safetensors":
        config, params, classes, methods = convert.load_safetensors(path)
    else:
        read = convert.load if path.suffix == ".npz" else convert.load_videomamba
        config, params = read(path)
    methods = methods or StretchConfig(variant="vanilla")
    if variant is not None:
        methods = dataclasses.replace(methods, variant=variant)
    return Model(config, jax.tree.map(jnp.asarray, params), methods, classes)
