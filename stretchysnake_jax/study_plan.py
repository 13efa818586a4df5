"""What the study runs: its parts, their cells, the grid, and the table of rows that are done.

A cell is one trained model (one seed) with all its evaluations. What the models are is said by
configs/study/ alone.
"""

import csv
import dataclasses
import fcntl
import hashlib
import json
import operator
import os
import pathlib

from stretchysnake_jax import run
from stretchysnake_jax.config import Config, ConfigError, StretchConfig, field_names
from stretchysnake_jax.whole_file import whole_file

FRAMES, SIZES = (2, 3, 4, 6, 8, 16), (28, 35, 56, 84, 112, 126)
# Where every method is tried on every weight: neither number is one that vanilla is trained with.
METHOD_FRAMES, METHOD_SIZES = (3, 8, 16), (28, 84, 126)
# Where the many folds of Weizmann are tested: trained, between and beyond, too.
FINE_FRAMES, FINE_SIZES = (2, 4, 6, 16), (28, 56, 84, 126)
METHODS = ("paper", "pi", "area", "bilinear", "nearest", "none")
RETRIEVAL = ((2, 28), (4, 56), (6, 84), (8, 112))  # (frames, size) of gallery and of queries
FOLDS = 9  # subjects of Weizmann
MANY = 1500  # tokens of a clip, above which a quarter of the test clips has to do
# What a cell's rows depend on beside its models and the numbers here: to be raised with the code
# that tests.
PROTOCOL = 2
NEED_WEIZMANN = ("zero", "followed", "fine")  # kinds of parts
TEST_BATCH = 10
TRAINED = "study.json"  # in a workdir whose training is done


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the study.

    Attributes:
      models: of configs/study/stick.py, by the setting that they are trained on.
      minutes: that a cell may take on one core.
      kind: what a cell does: "grid" trains and evaluates on the clips of its own setting; the
        others evaluate the same checkpoint: "methods" of interpolation, "retrieval", "zero" shots
        of Weizmann, "followed" the same with the camera on the person; "fine" fine-tunes it on
        Weizmann, one subject left out.
      about: in words.
      seeds: it is run with the seeds below this number alone.
    """

    models: dict[str, tuple[str, ...]]
    minutes: float
    kind: str
    about: str
    seeds: int = 1000


_VARIANTS = ("vanilla", "temporal", "spatial", "flexivit", "flex_all", "static_tokens")
_BASE = (*_VARIANTS, "vit_vanilla", "vit_static_tokens")
_KERNELS = tuple(f"static_tokens_{m}" for m in METHODS if m != "area")
_TABLES = tuple(
    f"{model}_{weight}_{m}"
    for model, weight in (("spatial", "grid"), ("static_tokens", "time"))
    for m in METHODS
    if m != "paper"
)
_PAIR = ("vanilla", "static_tokens")
PARTS = {
    "base": Part(
        {"base": (*_BASE, "vanilla_small")}, 10, "grid", "large, smooth figures: all variants, ViT"
    ),
    "detail": Part(
        {"detail": ("vanilla", "vanilla_large", "spatial", "static_tokens")},
        10,
        "grid",
        "sixteen small scenes in a picture",
    ),
    "timing": Part(
        {
            "timing": (
                "vanilla",
                "vanilla_long",
                "temporal",
                "static_tokens",
                "static_tokens_even",
                "stretchy_plus",
            )
        },
        10,
        "grid",
        "classes told by timing",
    ),
    "recipes": Part(
        {"base": ("static_tokens_budget", "stretchy_plus")},
        10,
        "grid",
        "beyond the paper, beside static_tokens",
    ),
    "kernels": Part(
        {"base": _KERNELS}, 8, "grid", "kernel methods in training; area is base's", seeds=1
    ),
    "tables": Part(
        {"base": _TABLES},
        10,
        "grid",
        "methods for the position tables in training; paper is base's",
        seeds=1,
    ),
    "methods": Part({"base": _PAIR}, 6, "methods", "methods tried on checkpoints of base"),
    "weizmann_zero": Part({"base": _BASE}, 4, "zero", "checkpoints of base on Weizmann"),
    "weizmann_follow": Part(
        {"base": ("vanilla", "temporal", "static_tokens")},
        4,
        "followed",
        "the same, the camera on the person",
    ),
    "weizmann": Part(
        {"base": (*_PAIR, "static_tokens_wide", "stretchy_plus")},
        2,
        "fine",
        "fine-tuned, one subject left out",
    ),
    "retrieval": Part({"base": _PAIR}, 4, "retrieval", "R@1, gallery and queries at 4 scales each"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell; `fold` is 0 but for folds of Weizmann."""

    part: str
    setting: str
    model: str
    seed: int
    fold: int = 0

    @property
    def key(self) -> str:
        """Its name, which is a file name too."""
        name = f"{self.part}-{self.setting}-{self.model}-{self.seed}"
        return f"{name}-fold{self.fold}" if self.fold else name

    @property
    def minutes(self) -> float:
        """Its budget on one core."""
        return PARTS[self.part].minutes

    @property
    def kind(self) -> str:
        """See `Part`."""
        return PARTS[self.part].kind


def make_cells(parts, seeds) -> list[Cell]:
    """All cells of some parts, part by part, seeds outside of models: all models of a seed come
    before the next seed."""
    return [
        Cell(part, setting, model, seed, fold)
        for part in parts
        for seed in seeds
        if seed < PARTS[part].seeds
        for setting, models in PARTS[part].models.items()
        for model in models
        for fold in (range(1, FOLDS + 1) if PARTS[part].kind == "fine" else (0,))
    ]


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a study's files are, and whether it is the quick one.

    Attributes:
      runs: workdirs, data and logs.
      weizmann: the folder of its clips; "": there is none.
      quick: tiny models and data, a grid of four cells.
    """

    runs: pathlib.Path
    weizmann: str = ""
    quick: bool = False

    @property
    def followed(self) -> pathlib.Path:
        """The folder of Weizmann's videos with the camera on the person."""
        return self.runs / "data" / "weizmann_followed"

    def zero_shot_clips(self, cell: Cell) -> str | None:
        """The folder of Weizmann that a cell tests on without training, if that is what it does."""
        return {"zero": self.weizmann, "followed": str(self.followed)}.get(cell.kind)

    def places(self, cell: Cell) -> list[tuple[int, int]]:
        """(frames, size) of every place at which a cell is tested."""
        special = {
            "fine": (FINE_FRAMES, FINE_SIZES),
            "methods": (METHOD_FRAMES, METHOD_SIZES),
        }
        frames, sizes = special.get(cell.kind, (FRAMES, SIZES))
        if self.quick:
            frames, sizes = (2, 3), (28, 35)
        elif cell.kind == "retrieval":
            return list(RETRIEVAL)
        return [(t, s) for t in frames for s in sizes]

    def base_run(self, cell: Cell) -> tuple[Config, pathlib.Path]:
        """The configuration and the workdir of the training on Stick Actions-10 behind a cell.

        Models of one configuration share a workdir, whatever their names.
        """
        from stretchysnake_configs.study import stick, weizmann

        name = weizmann.STARTS.get(cell.model, cell.model)
        config = stick.get_config(f"{name},{cell.setting}" + ",quick" * self.quick)
        config.train.seed = cell.seed
        config.data.stick_actions.path = str(self.runs / "data" / cell.setting)
        name = f"{cell.setting}-{config.stretch.variant}-{cell.seed}-{digest(config)}"
        return config, self.runs / name

    def fine_run(self, cell: Cell) -> tuple[Config, pathlib.Path]:
        """The same of the fine-tuning on Weizmann that follows it."""
        from stretchysnake_configs.study import weizmann

        base, start = self.base_run(cell)
        config = weizmann.get_config(cell.model + ",quick" * self.quick)
        config.train.seed, config.train.init_from = cell.seed, str(start)
        config.data.root, config.data.fold = self.weizmann, cell.fold
        name = f"weizmann-{config.stretch.variant}-{cell.seed}"
        return config, self.runs / f"{name}-{digest(config, base)}-fold{cell.fold}"

    def chain(self, cell: Cell) -> list[tuple[Config, pathlib.Path]]:
        """The trainings behind a cell, in their order."""
        runs = [self.base_run(cell)]
        return [*runs, self.fine_run(cell)] if cell.kind == "fine" else runs

    def missing(self, cell: Cell) -> list[tuple[Config, pathlib.Path]]:
        """The trainings that a cell has to do, in their order: none if the last of them is done."""
        chain = self.chain(cell)
        done = [i for i, (_, workdir) in enumerate(chain) if (workdir / TRAINED).exists()]
        return chain[done[-1] + 1 :] if done else chain

    def digest(self, cell: Cell) -> str:
        """Tells a cell's configurations, and how it is tested, apart from others."""
        tested = {
            "methods": (METHODS, METHOD_FRAMES, METHOD_SIZES),
            "retrieval": (RETRIEVAL,),
        }.get(cell.kind, (self.places(cell), MANY))
        return digest(*(config for config, _ in self.chain(cell)), tested=(PROTOCOL, *tested))

    def is_current(self, cell: Cell, found: str) -> bool:
        """Whether a cell is one of the study and rows with this digest are of its configuration."""
        planned = cell.part in PARTS and cell in make_cells([cell.part], [cell.seed])
        return planned and self.digest(cell) == found


# What isn't the recipe: where files lie, and the axes of the study.
_PLACES = ("data.stick_actions.path", "data.root", "train.init_from", "train.seed", "data.fold")


def digest(*configs: Config, tested=None) -> str:
    """A short name of what configurations set, in fields that change a run's numbers.

    Fields at their defaults don't count, so that a field which comes later changes no name.
    `tested`, which JSON takes, counts too if it is given.
    """
    default, found = Config(), [] if tested is None else [tested]
    for config in configs:
        names = [name for name in field_names(config) if name not in (*run.FREE, *_PLACES)]
        values = {name: operator.attrgetter(name)(config) for name in names}
        found.append({k: v for k, v in values.items() if v != operator.attrgetter(k)(default)})
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]


def where(frames: int, size: int, stretch: StretchConfig) -> str:
    """How a place of the grid lies to the scales of flexible training, the same for all models.

    Returns:
      "trained": both numbers are drawn in it; "beyond": one is outside of their range; else
      "between".
    """
    pairs = ((frames, stretch.frames), (size, stretch.sizes))
    if any(not min(known) <= value <= max(known) for value, known in pairs):
        return "beyond"
    return "trained" if all(value in known for value, known in pairs) else "between"


# Columns of study.csv and their types; what is blank is None. `setting` is what a model was trained
# on, `test` how it was run: "own", the controls "kernel" and "resized", or WEIGHT:METHOD. Of
# retrieval, top1 is R@1, frames and size are the queries' and gallery is FRAMESxSIZE.
COLUMNS = {
    "part": str,
    "setting": str,
    "model": str,
    "seed": int,
    "fold": int,
    "test": str,
    "frames": int,
    "size": int,
    "patch": str,
    "gallery": str,
    "where": str,
    "trained": int,
    "top1": float,
    "loss": float,
    "gflops": float,
    "clips": int,
    "minutes": float,
    "config": str,
    "reason": str,
}


def cell_of(row: dict) -> Cell:
    """The cell that a row belongs to."""
    return Cell(row["part"], row["setting"], row["model"], row["seed"], row["fold"] or 0)


class Table:
    """The rows of finished cells in a CSV file, which is whole after every `add`.

    Several studies may add to one file.

    Args:
      path: of the file; it need not be there.

    Raises:
      ConfigError: it is no such table.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.rows = path, []
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            table = csv.DictReader(file)
            if table.fieldnames != list(COLUMNS):
                raise ConfigError(f"{self.path} has the columns {table.fieldnames}: it takes "
                                  f"{', '.join(COLUMNS)}")  # fmt: skip
            rows = []
            for number, row in enumerate(table, 2):
                try:
                    rows.append({k: COLUMNS[k](v) if v else None for k, v in row.items()})
                except (KeyError, ValueError, TypeError) as error:
                    place = f"{self.path}, line {number}"
                    raise ConfigError(f"{place}, can't be read: {error}") from error
        self.rows = rows

    def done(self) -> dict[Cell, str]:
        """The finished cells, with the digest of their configurations."""
        return {cell_of(row): row["config"] for row in self.rows}

    def add(self, rows: list[dict]) -> None:
        """Adds the rows of one cell in place of those that it had, and those that others added."""
        cell, folder = cell_of(rows[0]), os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self._read()
            self.rows = [row for row in self.rows if cell_of(row) != cell]
            self.rows += [dict.fromkeys(COLUMNS) | row for row in rows]
            with whole_file(self.path) as part, part.open("w", newline="") as file:
                table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                table.writeheader()
                for row in self.rows:
                    table.writerow({k: _text(v) for k, v in row.items()})
        finally:
            os.close(folder)


def _text(value):
    if isinstance(value, float):
        return f"{value:.5g}"
    return int(value) if isinstance(value, bool) else "" if value is None else value
