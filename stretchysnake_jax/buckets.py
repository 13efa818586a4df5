"""Buckets: the spatio-temporal scales a run trains on, and the schedule step -> bucket.

The five variants of flexible training are those of the StretchySnake paper (arXiv 2510.16209, and
its released code for the sets): `temporal`, `spatial`, `flexivit`, `flex_all` and `static_tokens`,
which is StretchySnake; `vanilla` trains on one scale. All scales of a batch are one bucket, hence
one compiled step. The schedule is a pure function of (seed, step), so every host computes it alone.
"""

import bisect
import dataclasses
import functools
import itertools
import math

import numpy as np

from stretchysnake_jax.config import Config, ConfigError, ModelConfig, StretchConfig, resolve

# The paper's sets for a base patch of 16 and a base size of 224 pixels.
PAPER_SIZES = {
    "spatial": (96, 128, 224, 384),
    "flex_all": (96, 128, 224, 384),
    "static_tokens": (98, 126, 224, 392),
}
PAPER_PATCHES = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)
MAX_GRID = 24  # of flex_all: the release leaves out finer grids to fit its GPU


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """One spatio-temporal scale.

    Attributes:
      frames: frames of a clip.
      height, width: pixels.
      patch: (height, width) of a patch, pixels.
    """

    frames: int
    height: int
    width: int
    patch: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a clip as an array: (frames, height, width, 3)."""
        return self.frames, self.height, self.width, 3

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; pixels beyond the last whole patch are dropped."""
        return self.height // self.patch[0], self.width // self.patch[1]

    def tokens(self, tubelet: int = 1) -> int:
        """Length of the token sequence, the class token included."""
        rows, columns = self.grid
        return 1 + self.frames // tubelet * rows * columns

    def __str__(self):
        patch = "x".join(str(p) for p in dict.fromkeys(self.patch))
        return f"{self.frames}x{self.height}x{self.width}/{patch}"


def static_patch(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The patch of `static_tokens`, floor(size / grid) on each axis (the paper's p = H // 14).

    Args:
      size: (height, width) in pixels.
      grid: (rows, columns) that must come out.

    Raises:
      ConfigError: the grid would be another one; names the nearest valid sizes.
    """
    patch = []
    for axis, length, cells in zip(("height", "width"), size, grid, strict=True):
        p = length // cells
        if p < 1 or length // p != cells:
            valid = _nearest_static(length, cells)
            raise ConfigError(
                f"{axis} {length} gives static_tokens no grid of {cells}: "
                f"the nearest valid sizes are {' and '.join(map(str, valid))}"
            )
        patch.append(p)
    return tuple(patch)


def _nearest_static(length: int, cells: int) -> list[int]:
    valid = [n for n in range(cells, 2 * length + 2 * cells) if n // (n // cells) == cells]
    below = [n for n in valid if n < length][-1:]
    return below + [n for n in valid if n > length][:1]


def test_patch(variant: str, size: tuple[int, int], model: ModelConfig) -> tuple[int, int]:
    """The patch a variant is evaluated with at `size`.

    static_tokens: floor(H / grid), which must give the base grid. flexivit and flex_all: H / grid
    to the nearest whole number (the release's table: 96 -> 7, 112 -> 8, 192 -> 14, 448 -> 32, ...).
    The others keep the base patch.
    """
    if variant == "static_tokens":
        return static_patch(size, model.grid)
    if variant in ("flexivit", "flex_all"):
        return tuple(max(1, round(s / g)) for s, g in zip(size, model.grid, strict=True))
    return model.patch


test_patch.__test__ = False  # the name is the field's; pytest must not collect it


def make_bucket(
    variant: str, frames: int, size: tuple[int, int], model: ModelConfig, patch=None
) -> Bucket:
    """The bucket in which a model of `variant` sees clips of `frames` frames and `size` pixels.

    Args:
      variant: one of `config.VARIANTS`.
      frames: frames of a clip; a multiple of the tubelet.
      size: (height, width) in pixels.
      model: the encoder.
      patch: (height, width) in pixels, instead of the variant's own.

    Raises:
      ConfigError: the sizes don't fit together.
    """
    if frames < 1 or frames % model.tubelet:
        fit = max(model.tubelet, frames // model.tubelet * model.tubelet)
        raise ConfigError(
            f"{frames} frames don't divide into tubelets of {model.tubelet}: the nearest is {fit}"
        )
    patch = tuple(patch) if patch is not None else test_patch(variant, size, model)
    if min(size) < 1 or size[0] < patch[0] or size[1] < patch[1]:
        raise ConfigError(
            f"size {size[0]}x{size[1]} holds no patch of {patch[0]}x{patch[1]} pixels: "
            f"the smallest size is {patch[0]}x{patch[1]}"
        )
    return Bucket(frames, *size, patch)


def native_size(
    variant: str, size: tuple[int, int], ratio: float, model: ModelConfig
) -> tuple[int, int]:
    """The size of about as many pixels as `size`, in the shape of a video.

    Sides are whole multiples of the base grid where the patch follows from the size (then the grid
    stays and patches become rectangles), or else of the base patch (patches stay and the grid
    becomes a rectangle); each is the nearest to the one that would be exact.

    Args:
      variant: one of `config.VARIANTS`.
      size: (height, width) in pixels.
      ratio: width / height of the video, above 0.
      model: the encoder.

    Returns:
      (height, width) in pixels.
    """
    follows = variant in ("static_tokens", "flexivit", "flex_all")
    unit = model.grid if follows else model.patch
    side = math.sqrt(size[0] * size[1])
    exact = side / math.sqrt(ratio), side * math.sqrt(ratio)
    height, width = (max(1, round(e / u)) * u for e, u in zip(exact, unit, strict=True))
    return height, width


def flex_all_patches(size: int, base_patch: int) -> tuple[int, ...]:
    """The patches flex_all draws from at `size`: divisors of it.

    The release lists them by hand for a base patch of 16: 96 -> 12, 16, 24, 32, 48; 128 -> 16, 32;
    224 -> 14, 16, 28, 32; 384 -> 16, 24, 32, 48. The rule that gives exactly these: from 5/8 to 3
    times the base patch, and a grid of at most 24.
    """
    low, high = -(-5 * base_patch // 8), 3 * base_patch
    return tuple(p for p in range(low, high + 1) if size % p == 0 and size // p <= MAX_GRID)


def training_buckets(stretch: StretchConfig, model: ModelConfig) -> list[tuple[Bucket, float]]:
    """Every bucket a run trains on, with the chance that a step draws it.

    Frame count, size and patch are drawn uniformly and independently, as the release does (section
    1.2 of the method's specification); for flex_all the patch is drawn from the list of its size.

    Raises:
      ConfigError: a size that the variant can't use.
    """
    variant, base = stretch.variant, model.size
    frames = stretch.frames
    if variant == "vanilla":
        scales = [(base, (model.patch,))]
        frames = (model.frames,)
    elif variant == "temporal":
        scales = [(base, (model.patch,))]
    elif variant == "flexivit":
        size = (stretch.flexivit_size, stretch.flexivit_size)
        scales = [(size, tuple((p, p) for p in stretch.patches or PAPER_PATCHES))]
    else:
        scales = []
        sides = stretch.sizes or PAPER_SIZES[variant]
        for side, ratio in itertools.product(sides, stretch.ratios or (None,)):
            size = (side, side)
            if ratio is not None:
                size = native_size(variant, size, ratio, model)
            if variant == "flex_all":
                patches = tuple((p, p) for p in flex_all_patches(side, model.patch[0]))
                if not patches:
                    raise ConfigError(
                        f"stretch.sizes holds {side}, which no patch of flex_all divides: "
                        f"take a multiple of {model.patch[0]}"
                    )
            else:
                patches = (test_patch(variant, size, model),)
            scales.append((size, patches))
    found: dict[Bucket, float] = {}
    for t in frames:
        for size, patches in scales:
            for patch in patches:
                bucket = make_bucket(variant, t, size, model, patch)
                chance = 1 / len(frames) / len(scales) / len(patches)
                found[bucket] = found.get(bucket, 0.0) + chance
    return sorted(found.items())


def find_teacher(stretch: StretchConfig, model: ModelConfig) -> Bucket | None:
    """The scale that teaches the others under `stretch.distill`, or None if that is off.

    It has the most pixels, hence the most frames and the largest size of all, and of the buckets
    that have them the most tokens.

    Raises:
      ConfigError: there is no other scale.
    """
    if not stretch.distill:
        return None
    found = [bucket for bucket, _ in training_buckets(stretch, model)]
    if len(found) == 1:
        raise ConfigError(f"stretch.distill takes several scales, but there is only {found[0]}")
    return max(found, key=lambda b: (b.frames * b.height * b.width, b.tokens(model.tubelet)))


def _drawn(stretch: StretchConfig, model: ModelConfig) -> list[tuple[Bucket, float]]:
    """The buckets that steps draw from, all but the teacher, with their relative chances."""
    teacher = find_teacher(stretch, model)
    return [pair for pair in training_buckets(stretch, model) if pair[0] != teacher]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The bucket of every step of a run.

    Attributes:
      buckets: the distinct buckets.
      which: int32 (steps,), the index of each step's bucket.
      batch_sizes: samples of a step of each bucket, all hosts together; (): data.batch_size.
      teacher: the bucket that every step loads and learns beside its own, see `distill`, if any.
    """

    buckets: tuple[Bucket, ...]
    which: np.ndarray
    batch_sizes: tuple[int, ...] = ()
    teacher: Bucket | None = None

    @property
    def loaded(self) -> "Schedule":
        """The schedule for the loader: the teacher's scale, if there is one, at every step."""
        if self.teacher is None:
            return self
        return dataclasses.replace(self, buckets=(self.teacher,) * len(self.buckets))

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """How many samples come before each step, and in all: int64 (steps + 1,)."""
        return sample_offsets(self.which, self.batch_sizes)

    def __getitem__(self, step: int) -> Bucket:
        return self.buckets[self.which[step]]

    def __len__(self):
        return len(self.which)


def sample_offsets(which: np.ndarray, batch_sizes: tuple[int, ...]) -> np.ndarray:
    """How many samples come before each step, and in all.

    Args:
      which: the index of each step's bucket, int (steps,).
      batch_sizes: samples of a step of each bucket.

    Returns:
      int64 (steps + 1,).
    """
    return np.concatenate([[0], np.cumsum(np.array(batch_sizes, np.int64)[which])])


def make_batch_sizes(config: Config, buckets) -> tuple[int, ...]:
    """The samples of a step of every bucket, all hosts together.

    With `data.tokens_per_batch` a batch is the largest whose tokens (class tokens counted) don't
    exceed it, in multiples of `data.batch_multiple` (0: 1) and of `data.repeats`, and at least one
    multiple. Under `stretch.distill` the teacher's tokens count too.

    Args:
      config: the run's.
      buckets: the scales.
    """
    data = resolve(config.data)
    if not data.tokens_per_batch:
        return (data.batch_size,) * len(buckets)
    multiple = math.lcm(data.batch_multiple or 1, data.repeats)
    teacher, tubelet = find_teacher(config.stretch, config.model), config.model.tubelet
    more = teacher.tokens(tubelet) if teacher else 0
    tokens = [bucket.tokens(tubelet) + more for bucket in buckets]
    return tuple(max(1, data.tokens_per_batch // (n * multiple)) * multiple for n in tokens)


def make_schedule(stretch: StretchConfig, model: ModelConfig, steps: int, seed: int) -> Schedule:
    """Draws the bucket of every step; the same on every host and in every process.

    Each step's draw comes from a counter-based generator, so step k of a run doesn't depend on how
    many steps there are. With `stretch.short_first` the first share of the steps draws only among
    the buckets of the smallest frame count. With `stretch.curriculum` the first share draws among
    the cheapest buckets alone, one at first, then two, and so on: fewest tokens first, then fewest
    pixels. Buckets that aren't left out keep the ratio of their chances.

    Args:
      stretch, model: the run's configuration.
      steps: length of the run.
      seed: of the run.
    """
    found = _drawn(stretch, model)
    draws = np.array([_draw(seed, step) for step in range(steps)])
    which = _choose(found, stretch, model.tubelet, draws)
    return Schedule(tuple(b for b, _ in found), which, teacher=find_teacher(stretch, model))


def make_run_schedule(config: Config, samples: int) -> Schedule:
    """The schedule of a run with its length and its batch sizes.

    With `train.epochs` the run ends with the first step by which so many samples were drawn.

    Args:
      config: the run's.
      samples: of an epoch, augmented copies counted.

    Returns:
      The `Schedule`; a pure function of the arguments.
    """
    stretch, model, seed = config.stretch, config.model, config.train.seed
    found = _drawn(stretch, model)
    buckets = tuple(bucket for bucket, _ in found)
    sizes = make_batch_sizes(config, buckets)
    wanted = config.train.epochs * samples

    def draw_to(steps):
        draws.extend(_draw(seed, step) for step in range(len(draws), steps))

    def choose(steps):
        return _choose(found, stretch, model.tubelet, np.array(draws[:steps]))

    def drawn(steps):
        return sample_offsets(choose(steps), sizes)[-1]

    draws: list[float] = []
    steps = config.train.steps or math.ceil(wanted / max(sizes))
    draw_to(steps)
    if not config.train.steps and min(sizes) < max(sizes):
        # Longer runs draw more: the early steps of small clips are a share of all.
        while drawn(len(draws)) < wanted:
            draw_to(len(draws) + len(draws) // 4 + 1)
        steps = bisect.bisect_left(range(len(draws)), wanted, key=drawn)
    return Schedule(buckets, choose(steps), sizes, find_teacher(stretch, model))


def _draw(seed: int, step: int) -> float:
    return np.random.Generator(np.random.Philox(key=seed, counter=step)).random()


def _choose(found, stretch: StretchConfig, tubelet: int, draws: np.ndarray) -> np.ndarray:
    """The index of each step's bucket, int32 (steps,), from numbers 0..1.

    Args:
      found: (bucket, chance) each.
      stretch: which of them the early steps draw among.
      tubelet: frames per token.
      draws: (steps,).
    """
    buckets, chances = zip(*found, strict=True)
    which = _pick(chances, sum(chances), draws)
    for first, end, admitted in _early(buckets, stretch, tubelet, len(draws)):
        among = np.where(admitted, chances, 0.0)
        which[first:end] = _pick(among, among.sum(), draws[first:end])
    return which


def _pick(chances, total: float, draws: np.ndarray) -> np.ndarray:
    which = np.searchsorted(np.cumsum(chances), draws * total, side="right")
    return np.minimum(which, np.flatnonzero(chances)[-1]).astype(np.int32)


def _early(buckets, stretch: StretchConfig, tubelet: int, steps: int):
    """Yields (first step, end, mask of the buckets drawn) for the steps that leave some out."""
    if stretch.short_first:
        shortest = min(bucket.frames for bucket in buckets)
        yield 0, int(stretch.short_first * steps), [b.frames == shortest for b in buckets]
    if stretch.curriculum:
        cost = [(b.tokens(tubelet), b.frames * b.height * b.width) for b in buckets]
        rank = np.argsort(sorted(range(len(cost)), key=cost.__getitem__))
        end, stages = int(stretch.curriculum * steps), len(buckets) - 1
        for stage in range(stages):
            yield end * stage // stages, end * (stage + 1) // stages, rank <= stage
