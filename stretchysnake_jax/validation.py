"""What is wrong with a configuration, said before anything is built from it."""

from stretchysnake_jax.config import (
    LAYER_DECAYS,
    LAYERS,
    LOGGERS,
    METHODS,
    RATE_SCALES,
    REMAT,
    RESIZES,
    SAMPLINGS,
    SCHEDULES,
    VARIANTS,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    StretchConfig,
    check_blocks,
    check_choice,
    parse_rand_augment,
    require,
    resolve,
)


def _pair(field: str, value) -> None:
    ok = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, int) for v in value)
    require(ok and min(value) >= 1, field, value, "two whole numbers >= 1, (height, width)")


def validate_model(model: ModelConfig) -> None:
    """Raises ConfigError if no encoder can be built from `model`."""
    for name in ("dim", "depth", "state", "expand", "conv_width", "tubelet", "num_classes"):
        require(getattr(model, name) >= 1, f"model.{name}", getattr(model, name), "a number >= 1")
    _pair("model.patch", model.patch)
    _pair("model.size", model.size)
    for axis, size, patch in zip(("height", "width"), model.size, model.patch, strict=True):
        require(
            size % patch == 0,
            "model.size",
            model.size,
            f"a {axis} that is a multiple of the patch, {patch}; the nearest is "
            f"{max(patch, round(size / patch) * patch)}",
        )
    if model.frames is not None:
        ok = model.frames >= model.tubelet and model.frames % model.tubelet == 0
        require(ok, "model.frames", model.frames, f"a multiple of model.tubelet, {model.tubelet}")
    check_blocks(model)
    check_choice("model.pooling", model.pooling, ("cls", "mean"))
    check_choice("model.dt_init", model.dt_init, ("videomamba", "mamba"))
    check_choice("model.normalise", model.normalise, ("imagenet", "clip"))
    require(0 <= model.drop_path < 1, "model.drop_path", model.drop_path, "a rate from 0 up to 1")


def validate(config: Config) -> None:
    """Raises ConfigError, naming the field, if `config` can't be run."""
    validate_model(config.model)
    model, stretch, data, optim, train = (
        config.model,
        config.stretch,
        config.data,
        config.optim,
        config.train,
    )
    check_choice("stretch.variant", stretch.variant, VARIANTS)
    for name in ("kernel_method", "spatial_method", "temporal_method"):
        check_choice(f"stretch.{name}", getattr(stretch, name), METHODS)
    for name in ("frames", "sizes", "patches"):
        value = getattr(stretch, name)
        ok = isinstance(value, tuple) and all(isinstance(v, int) and v >= 1 for v in value)
        require(ok, f"stretch.{name}", value, "a tuple of whole numbers >= 1")
    require(len(stretch.frames) > 0, "stretch.frames", stretch.frames, "at least one frame count")
    for frames in stretch.frames:
        ok = frames % model.tubelet == 0
        require(ok, "stretch.frames", frames, f"multiples of model.tubelet, {model.tubelet}")
    _validate_stretch(stretch)
    require(model.frames is not None, "model.frames", None, "a frame count: training needs video")
    _validate_augmentation(resolve(data))
    for name in ("batch_size", "threads", "prefetch"):
        require(getattr(data, name) >= 1, f"data.{name}", getattr(data, name), "a number >= 1")
    for name in ("tokens_per_batch", "batch_multiple"):
        require(getattr(data, name) >= 0, f"data.{name}", getattr(data, name), "a number >= 0")
    require(data.workers >= 0, "data.workers", data.workers, "a number >= 0")
    require(0 <= data.max_unreadable <= 1, "data.max_unreadable", data.max_unreadable, "0 to 1")
    ok = bool(data.train) or bool(data.dataset) or bool(data.stick_actions.path)
    takes = "the path of a list file, 'path label' per line (or name a data.dataset)"
    require(ok, "data.train", data.train, takes)
    for name in ("detail", "timing"):
        level = getattr(data.stick_actions, name)
        require(level in range(4), f"data.stick_actions.{name}", level, "a level, 0 to 3")
    ok = bool(data.root) or not data.dataset
    require(ok, "data.root", data.root, f"the folder of the videos of {data.dataset}")
    require(data.fold >= 1, "data.fold", data.fold, "a number >= 1")
    _validate_optim(resolve(optim))
    lengths = (train.steps, train.epochs)
    ok = min(lengths) == 0 and max(lengths) > 0
    require(ok, "(train.steps, train.epochs)", lengths, "one number > 0 and one 0")
    require(train.seed >= 0, "train.seed", train.seed, "a whole number >= 0")
    require(train.eval_every >= 0, "train.eval_every", train.eval_every, "a number >= 0")
    check_choice("train.dtype", train.dtype, ("float32", "bfloat16"))
    ok = isinstance(train.loggers, tuple)
    require(ok, "train.loggers", train.loggers, f"a tuple of {', '.join(LOGGERS)}, or ()")
    for name in train.loggers:
        check_choice("train.loggers", name, LOGGERS)
    check_choice("train.remat", train.remat, REMAT)
    check_choice("train.layers", train.layers, LAYERS)
    ok = train.accumulate >= 1 and data.batch_size % train.accumulate == 0
    takes = f"a number that divides data.batch_size, {data.batch_size}"
    require(ok, "train.accumulate", train.accumulate, takes)
    for name, least in (("data", 0), ("fsdp", 1), ("sequence", 1)):
        value = getattr(config.mesh, name)
        require(value >= least, f"mesh.{name}", value, f"a number >= {least}")
    for name in ("log_every", "checkpoint_every", "keep"):
        require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "a number >= 1")
    ok = train.keep_every >= 0 and train.keep_every % train.checkpoint_every == 0
    takes = f"a multiple of train.checkpoint_every, {train.checkpoint_every}, or 0 for none"
    require(ok, "train.keep_every", train.keep_every, takes)


def _validate_stretch(stretch: StretchConfig) -> None:
    """Shapes, the order in which buckets come, and distillation."""
    if stretch.ratios:
        flexible = stretch.variant in ("spatial", "static_tokens")
        wanted = "() but under the variants spatial and static_tokens"
        require(flexible, "stretch.ratios", stretch.ratios, wanted)
    for ratio in stretch.ratios:
        require(0.1 <= ratio <= 10, "stretch.ratios", ratio, "width / height from 0.1 to 10")
    for name in ("short_first", "curriculum"):
        value = getattr(stretch, name)
        require(0 <= value <= 1, f"stretch.{name}", value, "0 to 1")
    ok = not (stretch.short_first and stretch.curriculum)
    require(ok, "stretch.curriculum", stretch.curriculum, "0 beside stretch.short_first")
    require(stretch.distill >= 0, "stretch.distill", stretch.distill, "a weight > 0, or 0 for off")
    ok = not stretch.distill or stretch.variant != "vanilla"
    require(ok, "stretch.distill", stretch.distill, "0 with 'vanilla', which has a single scale")
    value = stretch.distill_temperature
    require(value > 0, "stretch.distill_temperature", value, "a number > 0")


def _validate_optim(optim: OptimConfig) -> None:
    """The optimiser; `optim` is resolved."""
    require(optim.learning_rate > 0, "optim.learning_rate", optim.learning_rate, "a number > 0")
    require(0 <= optim.warmup < 1, "optim.warmup", optim.warmup, "a share of the steps, 0 to 1")
    value = optim.warmup_learning_rate
    ok = value is None or value >= 0
    require(ok, "optim.warmup_learning_rate", value, "a rate >= 0, or None for the final one")
    check_choice("optim.schedule", optim.schedule, SCHEDULES)
    check_choice("optim.scale_rate", optim.scale_rate, RATE_SCALES)
    require(optim.base_batch >= 1, "optim.base_batch", optim.base_batch, "a number of clips >= 1")
    ok = 0 < optim.layer_decay <= 1
    require(ok, "optim.layer_decay", optim.layer_decay, "above 0, up to 1, which is off")
    check_choice("optim.layer_decay_form", optim.layer_decay_form, LAYER_DECAYS)
    ok = 0 <= optim.label_smoothing < 1
    require(ok, "optim.label_smoothing", optim.label_smoothing, "from 0 up to 1")
    require(optim.clip_norm >= 0, "optim.clip_norm", optim.clip_norm, "a norm > 0, or 0 for off")
    require(0 <= optim.ema < 1, "optim.ema", optim.ema, "a decay from 0, which is off, up to 1")


def _validate_augmentation(data: DataConfig) -> None:
    """Sampling, augmentation and test views; `data` is resolved."""
    check_choice("data.sampling", data.sampling, SAMPLINGS)
    check_choice("data.resize", data.resize, RESIZES)
    for name in ("stride", "repeats", "test_clips", "test_crops"):
        require(getattr(data, name) >= 1, f"data.{name}", getattr(data, name), "a number >= 1")
    for name in ("crop_scale", "crop_area"):
        value = getattr(data, name)
        require(0 < value <= 1, f"data.{name}", value, "above 0, up to 1")
    for name in ("flip", "erase"):
        value = getattr(data, name)
        require(0 <= value <= 1, f"data.{name}", value, "a chance from 0 to 1")
    for name in ("window", "window_stride"):
        value = getattr(data, name)
        require(value >= 0, f"data.{name}", value, "seconds >= 0")
    for name in ("mixup", "cutmix"):
        value = getattr(data, name)
        require(value >= 0, f"data.{name}", value, "the alpha of a Beta, > 0, or 0 for off")
    if data.rand_augment:
        parse_rand_augment(data.rand_augment)
    jitter = data.colour_jitter
    ok = isinstance(jitter, tuple) and len(jitter) in (0, 4) and all(j >= 0 for j in jitter)
    ok = ok and (not jitter or jitter[3] <= 0.5)
    takes = "() or (brightness, contrast, saturation, hue), each >= 0, hue up to 0.5"
    require(ok, "data.colour_jitter", jitter, takes)
    ok = data.batch_size % data.repeats == 0
    require(ok, "data.batch_size", data.batch_size, f"a multiple of data.repeats, {data.repeats}")
    ok = data.test_clips == 1 or data.sampling != "uniform"
    require(ok, "data.test_clips", data.test_clips, "1 with data.sampling = 'uniform'")
    ok = data.test_crops == 1 or data.resize != "squash"
    require(ok, "data.test_crops", data.test_crops, "1 with data.resize = 'squash'")
