"""The training step and the evaluation step: normalise, interpolate, encode, loss, update.

The interpolation is outside the encoder and inside the loss, so gradients reach the base
parameters.

Execution plan: the patch kernel isn't resized to the video's patches; the video's patches are
projected onto the base kernel with the adjoint (`interpolation.project_pixels`), which gives the
same tokens. A step is then two compiled functions: a small stem per bucket, and a trunk per
(frames, grid), so static_tokens compiles one trunk per frame count and any resolution reuses it.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding

from stretchysnake_jax import distill, mix, models, optim, sharding
from stretchysnake_jax.buckets import Bucket, find_teacher
from stretchysnake_jax.compile import Program, Programs, compile_program
from stretchysnake_jax.config import Config, ModelConfig, StretchConfig, resolve
from stretchysnake_jax.interpolation import (
    interpolate,
    pad_patches,
    padded_projection,
    project_cells,
    project_pixels,
)


def fit(params: dict, bucket: Bucket, stretch: StretchConfig) -> dict:
    """The parameters interpolated to a bucket with the methods of `stretch`."""
    return interpolate(
        params,
        frames=bucket.frames,
        grid=bucket.grid,
        patch=bucket.patch,
        kernel=stretch.kernel_method,
        spatial=stretch.spatial_method,
        temporal=stretch.temporal_method,
    )


class Stem:
    """stem(video, bucket) -> (projected video, its bucket): normalises, projects onto base patches.

    Programs are compiled for patches of one size. Patches that aren't among `exact` are put into
    cells of the next half of a base patch first, so that a few programs do for all resolutions.

    Args:
      model, stretch: the encoder, and how its patch kernel is interpolated.
      exact: patches that get a program of their own, such as those of training.
      mesh: the devices that batches are spread over; None: one.

    Attributes:
      project: the program for a patch, jitted: (video, bucket) -> projected video.
      traces: how often each program was traced, by bucket or by cells.
    """

    def __init__(self, model: ModelConfig, stretch: StretchConfig, exact=(), mesh=None):
        self.traces = collections.Counter()
        self._base, self._method, self._mesh = model.patch, stretch.kernel_method, mesh
        self._exact = {model.patch, *exact}
        spread = {"out_shardings": NamedSharding(mesh, sharding.BATCH)} if mesh else {}

        @functools.partial(jax.jit, static_argnums=1, **spread)
        def project(video, bucket):
            self.traces[bucket] += 1  # runs while tracing only
            video = models.normalise(video, model.normalise)
            return project_pixels(video, bucket.patch, model.patch, stretch.kernel_method)

        @functools.partial(jax.jit, **spread)
        def project_padded(video, matrices, patch):
            room = tuple(matrix.shape[1] for matrix in matrices)
            self.traces[video.shape, room] += 1
            rows, columns = (
                jnp.arange(video.shape[axis + 2]) % room[axis] < patch[axis] for axis in (0, 1)
            )
            video = models.normalise(video, model.normalise, rows[:, None] & columns)
            return project_cells(video, matrices)

        self.project, self._project_padded = project, project_padded

    def projected(self, bucket: Bucket) -> Bucket:
        """The bucket of base patches that a bucket's videos are projected to."""
        rows, columns = bucket.grid
        return Bucket(bucket.frames, rows * self._base[0], columns * self._base[1], self._base)

    def __call__(self, video, bucket: Bucket):
        """Projects this process's uint8 (B, T, H, W, 3).

        Returns:
          (float32 (B, T, rows * base, columns * base, 3) of all processes, its bucket).
        """
        if bucket.patch in self._exact:
            return self.project(self.place(video), bucket), self.projected(bucket)
        steps = [max(1, length // 2) for length in self._base]
        room = tuple(-(-p // s) * s for p, s in zip(bucket.patch, steps, strict=True))
        video = self.place(pad_patches(np.asarray(video), bucket.patch, room))
        matrices = padded_projection(bucket.patch, self._base, room, self._method)
        patch = np.array(bucket.patch, np.int32)
        return self._project_padded(video, matrices, patch), self.projected(bucket)

    def place(self, video):
        """Puts this process's clips on its devices, where there are several."""
        return video if self._mesh is None else sharding.place(self._mesh, video)


def make_targets(labels, classes: int, smoothing: float, weight=None):
    """What every clip should score.

    Args:
      labels: int (B,).
      classes: their number.
      smoothing: share of the target that is spread over all classes.
      weight: of the clip's own label if clips are mixed, float (B,), see `mix`; None: 1.

    Returns:
      float32 (B, classes).
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)
    return targets if weight is None else mix.mixed_targets(targets, weight)


def init_state(config: Config, steps: int, mesh=None):
    """A fresh training state.

    Args:
      config: the run's.
      steps: its length.
      mesh: the devices that it is spread over; None: one.

    Returns:
      params, opt_state, the number of steps done (int32), and with `optim.ema` the moving average
      of the parameters, ema.
    """

    def make():
        _, params = models.init(config.model, jax.random.key(config.train.seed))
        opt_state = optim.make_optimizer(config.optim, steps).init(params)
        state = {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}
        if resolve(config.optim).ema:
            state["ema"] = jax.tree.map(jnp.copy, params)
        return state

    if mesh is None:
        return make()
    return jax.jit(make, out_shardings=sharding.of_state(mesh, jax.eval_shape(make)))()


class TrainStep:
    """step(state, batch, bucket) -> (state, metrics), compiled once per bucket.

    Args:
      config: the run's.
      steps: its length.
      mesh: the devices that batch and state are spread over; None: one.

    Attributes:
      mixer: mixes clips before anything else, see `mix`; None: off.
      stem: the `Stem`.
      trunk: what comes after it, jitted: (state, arrays, projected bucket) -> (state, metrics).
      traces: how often the trunk was traced for each projected bucket; 1 for all that were met.
      state: the shapes of the training state, and where it lies.
      ahead: the (bucket, batch size) pairs that are compiled ahead, or None. If set, any other is
        an error.
    """

    def __init__(self, config: Config, steps: int, mesh=None):
        self.mixer = mix.make_mixer(config.data, config.train.seed, mesh)
        self.stem = Stem(config.model, config.stretch, mesh=mesh)
        self.traces = collections.Counter()
        self.ahead = None
        self._mesh, self._programs, self._plans = mesh, Programs(), {}
        self.state = jax.eval_shape(lambda: init_state(config, steps))
        spread = {}
        if mesh is not None:
            places = sharding.of_state(mesh, self.state)
            self.state = jax.tree.map(_at, self.state, places)
            spread["out_shardings"] = places, NamedSharding(mesh, sharding.WHOLE)
        train, settings = config.train, resolve(config.optim)
        apply = models.make_apply(config.model, train.dtype, mesh, train.remat, train.layers)
        optimizer = optim.make_optimizer(settings, steps)

        stretch, sampling = config.stretch, resolve(config.data).sampling

        def loss_fn(params, part, clips, key, bucket, student):
            logits = apply(fit(params, bucket, stretch), part["video"], key)
            losses = optax.softmax_cross_entropy(logits, part["targets"])
            if student:
                teacher, key = logits, jax.random.fold_in(key, 1)
                logits = apply(fit(params, student, stretch), part["student"], key)
                losses = losses, optax.softmax_cross_entropy(logits, part["targets"])
                weights = stretch.distill, stretch.distill_temperature
                losses = distill.losses(teacher, logits, losses, *weights)
            # Unreadable clips have mask 0: they neither teach nor count.
            correct = (logits.argmax(-1) == part["label"]) * part["mask"]
            return (losses * part["mask"]).sum() / clips, correct.sum() / clips

        @functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0, **spread)
        def train_step(state, batch, bucket, student=None):
            self.traces[student or bucket] += 1  # runs while tracing only
            batch = dict(batch)
            params, step = state["params"], state["step"]
            key = jax.random.fold_in(jax.random.key(train.seed), step)
            weight = batch.pop("weight", None)
            classes, smoothing = config.model.num_classes, settings.label_smoothing
            batch["targets"] = make_targets(batch["label"], classes, smoothing, weight)
            clips = jnp.maximum(batch["mask"].sum(), 1.0)
            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            if train.accumulate == 1:
                (loss, top1), grads = grad_fn(params, batch, clips, key, bucket, student)
            else:
                parts = jax.tree.map(functools.partial(split, parts=train.accumulate), batch)
                keys = jax.random.split(key, train.accumulate)

                def add(total, part):
                    return jax.tree.map(
                        jnp.add, total, grad_fn(params, *part, bucket, student)
                    ), None

                nothing = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params)
                counts = jnp.broadcast_to(clips, train.accumulate)
                ((loss, top1), grads), _ = lax.scan(add, nothing, (parts, counts, keys))
            metrics = {"loss": loss, "top1": top1, "grad_norm": optax.tree.norm(grads)}
            rate_scale = optim.batch_scale(settings, len(batch["label"]))
            updates, opt_state = optimizer.update(
                grads, state["opt_state"], params, rate_scale=rate_scale
            )
            params = optax.apply_updates(params, updates)
            new = {"params": params, "opt_state": opt_state, "step": step + 1}
            if settings.ema:
                new["ema"] = optim.update_ema(state["ema"], params, settings.ema, step)
            return new, metrics

        self.trunk = train_step
        self._teacher = find_teacher(stretch, config.model)
        self._view = jax.jit(
            lambda video, b: distill.view(video, b.frames, b.height, b.width, sampling),
            static_argnums=1,
            **({"out_shardings": NamedSharding(mesh, sharding.BATCH)} if mesh else {}),
        )

    @property
    def compilations(self) -> int:
        """Compiled functions so far: mixers, stems and trunks."""
        mixers = self.mixer.traces.values() if self.mixer else ()
        return sum(mixers) + sum(self.stem.traces.values()) + sum(self.traces.values())

    def compile(self, bucket: Bucket, batch_size: int) -> dict[str, Program]:
        """The programs of a bucket, compiled now unless they were before; for any thread.

        Args:
          bucket: the scale.
          batch_size: clips of a step, all hosts together.

        Returns:
          Those that run one after the other: mixer (if clips are mixed), stem and trunk; under
          `stretch.distill` also view and student, what makes the student's video and its stem.
          Buckets share a trunk where projected bucket and batch size are the same.
        """
        programs, loaded = {}, self._teacher or bucket

        def clips(shape, dtype):
            return clip_shapes((batch_size, *shape), dtype, self._mesh)

        label, mask = clips((), jnp.int32), clips((), jnp.float32)
        arrays = {"label": label, "mask": mask}
        video = clips(loaded.shape, jnp.uint8)
        if self.mixer:
            key, step = ("mixer", video.shape), self.state["step"]
            programs["mixer"] = self._programs.get(key, self.mixer.function, video, mask, step)
            arrays["weight"] = mask
        trunk = [self.stem.projected(loaded)]
        key = "stem", loaded, batch_size
        programs["stem"] = self._programs.get(key, self.stem.project, video, loaded)
        arrays["video"] = clips(trunk[0].shape, jnp.float32)
        if self._teacher:
            trunk.append(self.stem.projected(bucket))
            key, small = ("view", bucket, batch_size), clips(bucket.shape, jnp.uint8)
            programs["view"] = self._programs.get(key, self._view, video, bucket)
            key = "stem", bucket, batch_size
            programs["student"] = self._programs.get(key, self.stem.project, small, bucket)
            arrays["student"] = clips(trunk[1].shape, jnp.float32)
        key = "trunk", *trunk, batch_size
        programs["trunk"] = self._programs.get(key, self.trunk, self.state, arrays, *trunk)
        self._plans[bucket, batch_size] = programs
        return programs

    def __call__(self, state, batch: dict, bucket: Bucket):
        """One update.

        Args:
          state: see `init_state`; its buffers are donated.
          batch: video uint8 (B, T, H, W, 3), label int32 (B,), mask float32 (B,); on a mesh as
            `sharding.place` gives them.
          bucket: the batch's scale; under `stretch.distill` the student's, the video having the
            teacher's.

        Returns:
          (state, metrics): metrics are scalars: loss, top1 (0 to 1, by the clips' own labels, mixed
          or not; the student's) and grad_norm.

        Raises:
          RuntimeError: it isn't among those of `ahead`.
        """
        video, size = batch["video"], len(batch["video"])
        programs = self._plans.get((bucket, size))
        if programs is None:
            if self.ahead is not None and (bucket, size) not in self.ahead:
                raise RuntimeError(f"{size} clips of {bucket} weren't to be compiled ahead")
            programs = self.compile(bucket, size)
        arrays = {"label": batch["label"], "mask": batch["mask"]}
        if self.mixer:
            video, arrays["weight"] = programs["mixer"].run(video, batch["mask"], state["step"])
        arrays["video"] = programs["stem"].run(video)
        if self._teacher:
            arrays["student"] = programs["student"].run(programs["view"].run(video))
        return programs["trunk"].run(state, arrays)


def split(x, parts: int):
    """Splits (B, ...) into (parts, B / parts, ...); each device keeps clips of every part."""
    return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def clip_shapes(shape, dtype, mesh):
    """An array of clips as `jax.jit` wants to know of it: shape, dtype, and where it lies."""
    where = None if mesh is None else NamedSharding(mesh, sharding.BATCH)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _at(shape, where):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


class EvalStep:
    """predict(params, video, bucket) -> logits, features or tokens.

    Args:
      model, stretch: the encoder, and how its weights are interpolated.
      dtype: of the computation.
      output: what it gives, see `models.VideoMamba.__call__`.
      exact: patches that get a program of their own, see `Stem`.
      mesh: the devices that batches are spread over; None: one.

    Attributes:
      stem: the `Stem`.
      trunk: what comes after it, jitted: (params, projected video, projected bucket) -> output.
    """

    def __init__(
        self,
        model: ModelConfig,
        stretch: StretchConfig,
        dtype,
        *,
        output="logits",
        exact=(),
        mesh=None,
    ):
        apply = models.make_apply(model, dtype, mesh)
        self.stem, self._mesh = Stem(model, stretch, exact, mesh), mesh
        self._plans = {}
        spread = {"out_shardings": NamedSharding(mesh, sharding.WHOLE)} if mesh else {}

        @functools.partial(jax.jit, static_argnums=2, **spread)
        def trunk(params, video, bucket):
            return apply(fit(params, bucket, stretch), video, output=output)

        self.trunk = trunk

    def compile(self, params, bucket: Bucket, batch_size: int) -> None:
        """Compiles for a bucket, so that no later call does.

        Args:
          params: base parameters; shapes with shardings will do.
          bucket: the scale, its patch the base's or among `exact`.
          batch_size: clips, all processes together.
        """
        projected = self.stem.projected(bucket)
        video = clip_shapes((batch_size, *bucket.shape), jnp.uint8, self._mesh)
        stem = compile_program(self.stem.project, video, bucket)
        video = clip_shapes((batch_size, *projected.shape), jnp.float32, self._mesh)
        trunk = compile_program(self.trunk, params, video, projected)
        self._plans[bucket, batch_size] = stem.run, trunk.run

    def __call__(self, params, video, bucket: Bucket):
        """Encodes a batch.

        Args:
          params: base parameters.
          video: uint8 (B, T, H, W, 3), this process's part.
          bucket: the scale of the video.

        Returns:
          float32 of all processes: logits (B, classes), features (B, dim) or tokens (B, L, dim).
        """
        parts = sharding.host_share(self._mesh)[1] if self._mesh else 1
        plan = self._plans.get((bucket, len(video) * parts))
        if plan is None:
            return self.trunk(params, *self.stem(video, bucket))
        stem, trunk = plan
        return trunk(params, stem(self.stem.place(video)))
