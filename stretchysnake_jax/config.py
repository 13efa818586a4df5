"""The configuration as nested dataclasses; `validation.validate` says what is wrong with one.

Nothing heavy is imported here: files under configs/ and loader workers import this module alone.
"""

import dataclasses
import difflib
import json
import pathlib
import re

from stretchysnake_jax.whole_file import whole_file

SPLITS = ("train", "val", "test")
VARIANTS = ("vanilla", "temporal", "spatial", "flexivit", "flex_all", "static_tokens")
METHODS = ("paper", "pi", "area", "bilinear", "nearest", "lanczos3", "none")
SAMPLINGS = ("sparse", "uniform", "dense", "ssv2")
REMAT = ("none", "block", "matmuls")
LAYERS = ("auto", "loop", "unrolled")
BLOCKS = ("mamba", "attention")
RESIZES = ("crop", "squash", "random_resized")
LOGGERS = ("tensorboard", "wandb")
SCHEDULES = ("cosine", "videomamba")
RATE_SCALES = ("none", "linear", "sqrt")
LAYER_DECAYS = ("intended", "published")
_PLAIN = {
    "sampling": "uniform",
    "resize": "squash",
    "flip": 0.0,
    "rand_augment": "",
    "erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "repeats": 1,
}
# What the fields of DataConfig that are None stand for: "light" is the demo's, "plain" the
# preprocessing of the StretchySnake paper, "videomamba" the fine-tuning of VideoMamba-S and -M.
RECIPES = {
    "light": _PLAIN | {"sampling": "sparse", "resize": "crop", "flip": 0.5},
    "plain": _PLAIN,
    "videomamba": {
        "sampling": "sparse",
        "resize": "random_resized",
        "flip": 0.5,
        "rand_augment": "rand-m7-n4-mstd0.5-inc1",
        "erase": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "repeats": 2,
    },
}
# The same of OptimConfig. "stretchysnake": the defaults of the paper's release, whose optimiser is
# VideoMamba's; its peak is lr * clips * 2 / 256 whether or not a clip comes twice, and 5 of its 12
# epochs are warm-up. "videomamba": the fine-tuning of VideoMamba-S on Kinetics-400; 5 of 50 epochs.
OPTIM_RECIPES = {
    "light": {
        "learning_rate": 1e-3,
        "warmup": 0.05,
        "schedule": "cosine",
        "scale_rate": "none",
        "base_batch": 256,
        "layer_decay": 1.0,
        "layer_decay_form": "intended",
    },
    "stretchysnake": {
        "learning_rate": 1e-3,
        "warmup": 5 / 12,
        "schedule": "videomamba",
        "scale_rate": "linear",
        "base_batch": 128,
        "layer_decay": 0.75,
        "layer_decay_form": "published",
    },
    "videomamba": {
        "learning_rate": 2e-4,
        "warmup": 5 / 50,
        "schedule": "videomamba",
        "scale_rate": "linear",
        "base_batch": 256,
        "layer_decay": 0.75,
        "layer_decay_form": "published",
    },
}


@dataclasses.dataclass
class ModelConfig:
    """Shape and initialisation of a VideoMamba encoder; `PRESETS` names the published
    ones. A field that only one kind of blocks has is left aside by the other."""

    dim: int = 192  # channels of a token
    depth: int = 24  # blocks
    state: int = 16  # scan states per channel
    expand: int = 2  # inner width of a mixer / dim
    conv_width: int = 4  # taps of the causal convolution
    dt_rank: int | None = None  # None: ceil(dim / 16)
    patch: tuple[int, int] = (16, 16)  # base patch, pixels (height, width)
    tubelet: int = 1  # frames per token
    frames: int | None = 8  # frames of the base temporal table; None: an image model without one
    size: tuple[int, int] = (224, 224)  # base input, pixels (height, width)
    num_classes: int = 400
    pooling: str = "cls"  # "cls": the first token, as published; "mean": mean over all tokens
    dt_init: str = (
        "videomamba"  # "videomamba": bias 0, as released; "mamba": softplus(bias) in 1e-3..0.1
    )
    linear_init_std: float | None = 0.02  # of the projections; None: uniform, +-1 / sqrt(inputs)
    pos_init_std: float = 0.02  # of the spatial table
    temporal_init_std: float = 0.0  # of the temporal table
    drop_path: float = 0.0  # rate of the last block; linear from 0 over the depth
    normalise: str = (
        "imagenet"  # uint8 input: "imagenet" mean and std, or "clip": by the clip's own
    )
    blocks: str = "mamba"  # "attention": those of a plain ViT, see `attention_twin`
    heads: int | None = None  # of attention blocks; None: one for every 64 channels, as in ViT
    mlp_ratio: float = 4.0  # hidden width of their MLP / dim

    @property
    def num_heads(self) -> int:
        """Heads of an attention block."""
        return self.heads if self.heads is not None else max(1, self.dim // 64)

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP of an attention block."""
        return int(self.mlp_ratio * self.dim)

    @property
    def inner(self) -> int:
        """Inner width of a mixer."""
        return self.expand * self.dim

    @property
    def rank(self) -> int:
        """Rank of the step-size projection, ceil(dim / 16) unless set."""
        return self.dt_rank if self.dt_rank is not None else -(-self.dim // 16)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the base spatial table, in patches."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]


@dataclasses.dataclass
class StretchConfig:
    """Which scales a run trains on, and how the weights are fitted to them."""

    variant: str = "static_tokens"  # one of VARIANTS
    frames: tuple[int, ...] = (8, 16, 32, 64)  # frame counts drawn in training (not by vanilla)
    sizes: tuple[int, ...] = ()  # square sizes drawn, pixels; (): the variant's own of the paper
    # spatial and static_tokens: widths / heights drawn in training, each with as many pixels as the
    # square of the size, in whole patches; (): squares
    ratios: tuple[float, ...] = ()
    patches: tuple[int, ...] = ()  # flexivit only: patch sizes drawn; (): those of the paper
    flexivit_size: int = 240  # the one size flexivit trains at, pixels
    kernel_method: str = "paper"  # each one of METHODS
    spatial_method: str = "paper"
    temporal_method: str = "paper"
    short_first: float = (
        0.0  # share of the steps, from the start, that use the smallest frame count
    )
    # Share of the steps, from the start, over which the buckets come in one by one: fewest tokens
    # first, then fewest pixels; 0: all are drawn from the first step on
    curriculum: float = 0.0
    # Weight of scale self-distillation: every clip is loaded at the largest scale, which teaches
    # the one drawn among the others in the same step, see `distill`; 0: off
    distill: float = 0.0
    distill_temperature: float = 1.0  # of both sides of its divergence


@dataclasses.dataclass
class StickActionsConfig:
    """The embedded data set, rendered on first use; off while `path` is empty."""

    path: str = ""
    train_subjects: int = 60
    val_subjects: int = 5
    test_subjects: int = 10
    takes: int = 2  # clips per subject and class
    size: int = 128  # pixels
    seed: int = 0
    # Levels 0 to 3, see docs/data.md: how small the figures are, and how quick what tells the
    # classes, which are others from level 1 of timing on
    detail: int = 0
    timing: int = 0


@dataclasses.dataclass
class DataConfig:
    """List files or a data set, frame sampling, transforms and the loader."""

    train: str = ""  # list files, "path label" per line; each comes before the split of `dataset`
    val: str = ""
    test: str = ""
    dataset: str = ""  # one that is read from its own annotations, such as "ucf101"
    annotations: str = ""  # the folder of those; "": `root`
    fold: int = 1  # which of the data set's ways to split it
    root: str = ""  # of the videos; "" with list files: the folder of the list file
    allow_absolute: bool = False  # list entries may lead out of the root
    stick_actions: StickActionsConfig = dataclasses.field(default_factory=StickActionsConfig)
    batch_size: int = 8  # clips per step, all hosts together, augmented copies counted
    # Tokens of a step, all hosts together: every bucket gets the batch size that comes closest from
    # below, in whole multiples and at least one; 0: data.batch_size for all of them
    tokens_per_batch: int = 0
    batch_multiple: int = 0  # such a batch size is a multiple of it; 0: the devices at the start
    recipe: str = "light"  # one of RECIPES: what stands for the fields that are None
    sampling: str | None = None  # one of SAMPLINGS, see docs/data.md
    stride: int = 4  # "dense" sampling: frames of the video per frame of the clip
    window: float = 0.0  # seconds of the windows that long videos are cut into; 0: whole clips
    window_stride: float = 0.0  # seconds from the start of one to the next; 0: none overlap
    # "crop": short side, then the bucket's shape; "squash": straight to (height, width);
    # "random_resized": a box of any area and a ratio of 3/4 to 4/3 in training, else as "crop"
    resize: str | None = None
    crop_scale: float = 1.0  # "crop": smallest side of a training crop / the short side
    crop_area: float = 0.08  # "random_resized": smallest training box / the frame, areas
    flip: float | None = None  # chance of a horizontal flip in training
    rand_augment: str | None = None  # in timm's words, rand-m7-n4-mstd0.5-inc1; "": off
    # Of training clips: brightness, contrast and saturation change by a factor within 1 +- these,
    # the hue by up to the fourth, in turns (0 to 0.5); (): off
    colour_jitter: tuple[float, ...] = ()
    erase: float | None = None  # chance that a box of a training clip is filled with noise
    mixup: float | None = None  # alpha of mixup, on the device; 0: off
    cutmix: float | None = None  # alpha of cutmix; 0: off; with mixup, each step tosses a coin
    repeats: int | None = None  # copies of a training clip in a batch, augmented apart
    test_clips: int = 1  # views of a test clip in time ...
    test_crops: int = 1  # ... times views in space, along the long side
    threads: int = 4  # batches decoded side by side
    workers: int = 0  # loader processes; 0: threads of this one
    prefetch: int = 4  # batches kept ready
    max_unreadable: float = (
        0.05  # the run stops when more than this share of the clips is unreadable
    )


@dataclasses.dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    recipe: str = "light"  # one of OPTIM_RECIPES: what stands for the fields that are None
    learning_rate: float | None = None  # peak
    final_learning_rate: float = 1e-6
    warmup: float | None = None  # share of all steps, such as 5 / 50 for 5 of 50 epochs
    warmup_learning_rate: float | None = None  # of the first step; None: final_learning_rate
    # "cosine": the peak comes after the last step of the warm-up; "videomamba": with it, and once
    # more after it, as released
    schedule: str | None = None
    # How the three rates follow the clips of a step (augmented copies counted): "none", or times
    # clips / base_batch ("linear") or its root ("sqrt"); by bucket where their batches differ
    scale_rate: str | None = None
    base_batch: int | None = None
    layer_decay: float | None = None  # factor on the rate from a block to the one below; 1: off
    # "intended": on blocks and embeddings; "published": VideoMamba's release leaves the blocks and
    # the temporal table out, so patches, class token and spatial table all but stand still
    layer_decay_form: str | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05  # not on 1-D parameters, biases, position tables and the class token
    clip_norm: float = 0.0  # largest global gradient norm; 0: off
    label_smoothing: float = 0.1
    # Decay of a moving average of the weights, such as 0.9999; 0: off. After n updates at most
    # (1 + n) / (10 + n), so that the initial weights are soon forgotten
    ema: float = 0.0


@dataclasses.dataclass
class TrainConfig:
    """Length of a run, precision, and what it writes when."""

    steps: int = 0  # exactly one of steps and epochs; 0: the other counts
    epochs: float = 0.0
    seed: int = 0  # initial weights, data order, scales and drop path all follow from it
    dtype: str = "float32"  # of the computation; parameters, residual and scan state stay float32
    # What the gradient computes again instead of keeping it: "none"; "block": all but a block's
    # input, the least memory; "matmuls": all but that and what its projections gave
    remat: str = "none"
    # The blocks of a compiled program: a "loop", which compiles fast, or "unrolled", which runs
    # faster on CPUs, where XLA undoes remat in it; "auto": unrolled on CPUs without remat
    layers: str = "auto"
    accumulate: int = 1  # parts of a step's batch that go through the model one after the other
    # Folder where compiled programs are kept for later runs, see docs/scale.md; "": they aren't
    compilation_cache: str = "~/.cache/stretchysnake/programs"
    init_from: str = ""  # what to start from: a workdir, a .pth, .npz or .safetensors file
    log_every: int = 10  # steps
    eval_every: int = 0  # steps between validations, at the base scale; 0: at the end only
    checkpoint_every: int = 500  # steps
    keep: int = 3  # newest checkpoints kept, beside the best
    loggers: tuple[str, ...] = ()  # of LOGGERS, beside metrics.jsonl; each needs its extra
    keep_every: int = 0  # steps whose multiples are kept for good, beside them; 0: none


@dataclasses.dataclass
class MeshConfig:
    """How the devices of all processes are laid out, see `sharding`."""

    data: int = 0  # devices that share out a batch; 0: all that the other axes leave
    fsdp: int = 1  # as data, and parameters and optimizer state are cut up over them
    sequence: int = 1  # devices that share out the tokens of a clip


@dataclasses.dataclass
class Config:
    """One experiment."""

    name: str = "stretchysnake"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    stretch: StretchConfig = dataclasses.field(default_factory=StretchConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


class ConfigError(ValueError):
    """A configuration that can't be run; the message names the field, its value and what it
    takes."""


def nearest(name: str, known) -> str:
    """The tail of an error message that offers the nearest valid choice.

    Args:
      name: what was asked for.
      known: the valid names.

    Returns:
      A text such as "did you mean 'static_tokens'? it takes: vanilla, temporal, ...".
    """
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}it takes: {', '.join(known)}"


# tiny, small, middle and base are the published VideoMamba models; micro is the demo's.
PRESETS = {
    "micro": {
        "dim": 64,
        "depth": 4,
        "state": 8,
        "patch": (8, 8),
        "size": (56, 56),
        "pooling": "mean",
        "dt_init": "mamba",
        "linear_init_std": None,
        "pos_init_std": 0.5,
        "temporal_init_std": 0.5,
        "normalise": "clip",
    },
    "tiny": {"dim": 192, "depth": 24},
    "small": {"dim": 384, "depth": 24},
    "middle": {"dim": 576, "depth": 32},
    "base": {"dim": 768, "depth": 24, "frames": None, "num_classes": 1000},  # images only
}


def preset(name: str, **changes) -> ModelConfig:
    """The configuration of a preset, with fields changed.

    Raises:
      ConfigError: an unknown preset or field.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}: {nearest(name, PRESETS)}")
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    for field in changes:
        if field not in fields:
            raise ConfigError(f"unknown field model.{field}: {nearest(field, fields)}")
    return ModelConfig(**{**PRESETS[name], **changes})


def check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ConfigError if `value` is none of `known`."""
    if value not in known:
        raise ConfigError(f"{field} is {value!r}: {nearest(value, known)}")


def require(ok: bool, field: str, value, takes: str) -> None:
    """Raises ConfigError: what `field` is, and what it takes, unless `ok`."""
    if not ok:
        raise ConfigError(f"{field} is {value!r}: it takes {takes}")


def check_blocks(model: ModelConfig) -> None:
    """Raises ConfigError if `model` has no blocks that can be built."""
    check_choice("model.blocks", model.blocks, BLOCKS)
    if model.blocks == "attention":
        ok = model.num_heads >= 1 and model.dim % model.num_heads == 0
        require(ok, "model.heads", model.heads, f"a number that divides model.dim, {model.dim}")
        takes = "a number > 0 that makes the MLP a channel wide or more"
        require(model.hidden >= 1, "model.mlp_ratio", model.mlp_ratio, takes)


def block_parameters(model: ModelConfig) -> int:
    """How many parameters a block has."""
    dim, inner, state, rank = model.dim, model.inner, model.state, model.rank
    if model.blocks == "attention":  # two norms, qkv, proj, fc1, fc2, all with biases
        return 4 * dim * (dim + 1) + 4 * dim + 2 * dim * model.hidden + model.hidden + dim
    direction = inner * (model.conv_width + 1 + rank + 2 * state + rank + 1 + state + 1)
    return dim + 3 * dim * inner + 2 * direction  # norm, in_proj and out_proj, both directions


def attention_twin(model: ModelConfig) -> ModelConfig:
    """The transformer of the same size: as many ViT blocks as come closest in parameters.

    Width, heads and MLP ratio stay as `model` has them, tokens, tables and head too, so the depth
    is what makes the sizes equal: a ViT block at ratio 4 holds about 1.5 Mamba blocks' parameters.
    """
    twin = dataclasses.replace(model, blocks="attention")
    depth = round(model.depth * block_parameters(model) / block_parameters(twin))
    return dataclasses.replace(twin, depth=max(1, depth))


def resolve(part):
    """`part` with its recipe's value in every field of it that is None; again, it changes nothing.

    Args:
      part: a DataConfig or an OptimConfig.

    Raises:
      ConfigError: an unknown recipe.
    """
    name, recipes = ("data", RECIPES)
    if isinstance(part, OptimConfig):
        name, recipes = ("optim", OPTIM_RECIPES)
    check_choice(f"{name}.recipe", part.recipe, tuple(recipes))
    recipe = recipes[part.recipe].items()
    return dataclasses.replace(part, **{k: v for k, v in recipe if getattr(part, k) is None})


def parse_rand_augment(text: str) -> tuple[float, int, float]:
    """RandAugment in timm's words, such as "rand-m7-n4-mstd0.5-inc1".

    Returns:
      (magnitude 0..10, operations per clip, standard deviation of the magnitude).

    Raises:
      ConfigError: other words; "inc1" has to be there, the other severities aren't implemented.
    """
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"rand-m{number}-n(\d+)(?:-mstd{number})?-inc1", text)
    require(
        match is not None and float(match[1]) <= 10,
        "data.rand_augment",
        text,
        '"" or rand-m<magnitude 0-10>-n<operations>-mstd<deviation>-inc1',
    )
    return float(match[1]), int(match[2]), float(match[3] or 0)


def field_names(config, prefix: str = "") -> list[str]:
    """Every leaf field of a configuration by its dotted name."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += field_names(value, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def to_dict(config) -> dict:
    """A configuration (or a part of one) as plain nested dicts."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, where: str = ""):
    """The inverse of `to_dict`, from parsed JSON too (lists become tuples).

    Raises:
      ConfigError: a key that `cls` doesn't have.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    default = cls()
    made = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown field {where}{key}: {nearest(key, fields)}")
        if dataclasses.is_dataclass(getattr(default, key)):
            made[key] = from_dict(type(getattr(default, key)), value, f"{where}{key}.")
        else:
            made[key] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


def save(config: Config, path) -> None:
    """Writes `config` as JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(path) -> Config:
    """Reads what `save` wrote.

    Raises:
      ConfigError: the file is missing or isn't such a file.
    """
    path = pathlib.Path(path)
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration at {path}: is it the workdir of a run?") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON file: {error}") from error
    return from_dict(Config, values)
