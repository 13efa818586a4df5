"""One cell of the study: trains its model if need be, evaluates it, and gives its rows."""

import dataclasses
import functools
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from stretchysnake_jax import ablate, grid, model, outputs, retrieval, run, study_plan
from stretchysnake_jax.buckets import Bucket, make_bucket, native_size, training_buckets
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import Config, ConfigError
from stretchysnake_jax.data.datasets import load_clips
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.step import EvalStep, Stem
from stretchysnake_jax.study_plan import TEST_BATCH, TRAINED, Cell, Study
from stretchysnake_jax.train import train
from stretchysnake_jax.whole_file import whole_file

OWN, KERNEL, RESIZED = "own", "kernel", "resized"


class CellFailed(RuntimeError):
    """A training that did not end; the message is for the user."""

    plain = True


def train_once(config: Config, workdir: pathlib.Path, progress: Progress) -> None:
    """Trains; then `workdir`/study.json says that it is done and what it took, in minutes of the
    processor.

    Raises:
      CellFailed: a signal ended it; the next call goes on.
    """
    start = time.process_time()
    if status := train(config, workdir, progress):
        raise CellFailed(f"the training ended with status {status}")
    with whole_file(workdir / TRAINED) as part:
        part.write_text(json.dumps({"minutes": (time.process_time() - start) / 60}) + "\n")


@functools.partial(jax.jit, static_argnums=1)
def resize(video, size: tuple[int, int]):
    """The control's view: clips resized to (height, width), cubic, antialiased, on the device.

    Args:
      video: uint8 (B, T, H, W, 3).
      size: the new height and width.

    Returns:
      uint8 (B, T, *size, 3).
    """
    shape = (*video.shape[:2], *size, 3)
    found = jax.image.resize(video.astype(jnp.float32), shape, "cubic", antialias=True)
    return jnp.clip(jnp.round(found), 0, 255).astype(jnp.uint8)


class Tests:
    """All ways in which a cell's model is run at a place of the grid; a clip is read once for all.

    "own": as it was trained. A model trained at one size and patch has the controls too: "kernel":
    the kernel PI-resized so that the grid of tokens stays, as static_tokens does it; "resized":
    the video, cut down to the size of the place, is resized to the size trained on and seen there.
    A model trained on one ratio of sides sees rectangles with about as many pixels as the square.

    Args:
      config: the run's.
      output: of the encoder, "logits" or "features".

    Attributes:
      names: of the tests.
    """

    __test__ = False  # pytest must not collect it

    def __init__(self, config: Config, output: str = "logits"):
        self._config, self._base = config, config.model.size
        buckets = {bucket for bucket, _ in training_buckets(config.stretch, config.model)}
        self._trained = buckets
        one = len({(b.height, b.width, b.patch) for b in buckets}) == 1
        self.names = (OWN, KERNEL, RESIZED) if one else (OWN,)
        self._step = EvalStep(config.model, config.stretch, config.train.dtype, output=output)
        static = dataclasses.replace(config.stretch, variant="static_tokens", kernel_method="pi")
        self._kernel = Stem(config.model, static)

    def bucket(self, name: str, frames: int, size: int) -> Bucket:
        """What the encoder sees under a test; ConfigError if there is no such bucket."""
        variant = "static_tokens" if name == KERNEL else self._config.stretch.variant
        seen = self._base if name == RESIZED else self.shape(size)
        return make_bucket(variant, frames, seen, self._config.model)

    def shape(self, size: int) -> tuple[int, int]:
        """Height and width of the videos that are read at a size."""
        stretch = self._config.stretch
        if len(stretch.ratios) != 1:
            return size, size
        return native_size(stretch.variant, (size, size), stretch.ratios[0], self._config.model)

    def is_trained(self, name: str, frames: int, size: int) -> bool:
        """Whether the encoder was trained on just what it sees."""
        same = name != RESIZED or self.shape(size) == self._base
        return same and self.bucket(name, frames, size) in self._trained

    def __call__(self, names, frames: int, size: int):
        """A step for `outputs.compute`: (params, video, bucket) -> (B, len(names), ...)."""
        buckets = {name: self.bucket(name, frames, size) for name in names}

        def step(params, video, _):
            found = []
            for name, bucket in buckets.items():
                view = resize(video, self._base) if name == RESIZED else video
                stem = self._kernel if name == KERNEL else self._step.stem
                found.append(self._step.trunk(params, *stem(view, bucket)))
            return jnp.stack(found, 1)

        return step

    def compute(self, names, params, data, clips, frames: int, size: int, on_batch, merge) -> dict:
        """`outputs.Outputs` by test; see `outputs.compute`."""
        seen = Bucket(frames, *self.shape(size), (1, 1))  # the loader reads the shape alone
        step = self(names, frames, size)
        found = outputs.compute(
            step, params, data, clips, seen, TEST_BATCH, merge=merge, on_batch=on_batch
        )
        return {
            name: dataclasses.replace(found, values=found.values[:, i])
            for i, name in enumerate(names)
        }


class Counter:
    """Shows how many clips of a cell's evaluation are done."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._clock, self._before = progress, Clock(total), 0

    def __call__(self, done: int) -> None:
        """Says that `done` clips of the list at hand are done."""
        self._clock.advance(self._before + done)
        text = f"evaluating: {self._clock.done}/{self._clock.total} clips"
        self._progress.show(f"{text}, {self._clock.left} left")

    def next(self, clips: ClipList) -> None:
        """Says that a list is done."""
        self._before += len(clips)


def quarter(clips: ClipList) -> ClipList:
    """A fourth of the clips of every class, at least one, the same in every cell."""
    rng, found = np.random.default_rng(0), []
    for label in np.unique(clips.labels):
        own = rng.permutation(np.flatnonzero(clips.labels == label))
        found.extend(own[: max(1, round(len(own) / 4))].tolist())
    return clips.select(sorted(found))


def grid_rows(cell: Cell, study: Study, loaded: model.Model, data, clips, progress) -> list[dict]:
    """Rows of every place and test of the grid; of what can't be run there is a reason.

    What takes more than `MANY` tokens is run on a quarter of the clips, but for the folds' few.
    """
    tests, rows, plan = Tests(loaded.run), [], []
    some = clips if cell.kind == "fine" else quarter(clips)
    for frames, size in study.places(cell):
        left, few, many = {}, [], []
        for name in tests.names:
            try:
                tokens = tests.bucket(name, frames, size).tokens()
                (many if tokens > study_plan.MANY else few).append(name)
            except ConfigError as error:
                left[name] = str(error)
        passes = [(names, on) for names, on in ((few, clips), (many, some)) if names]
        plan.append((frames, size, passes, left))
    counter = Counter(progress, sum(len(on) for *_, passes, _ in plan for _, on in passes))
    for frames, size, passes, left in plan:
        found = {}
        for names, on in passes:
            given = loaded.params, data, on, frames, size, counter, outputs.merge_scores
            found |= tests.compute(names, *given)
            counter.next(on)
        for name in tests.names:
            row = place(cell, name, frames, size, loaded.run)
            if name in left:
                rows.append(row | {"reason": left[name]})
                continue
            scores, bucket = outputs.summary(found[name]), tests.bucket(name, frames, size)
            row |= {key: scores[key] for key in ("top1", "loss")}
            row |= {"patch": grid.place(bucket)["patch"], "clips": len(found[name].labels)}
            row |= {"gflops": grid.gflops(loaded.run, bucket)}
            rows.append(row | {"trained": tests.is_trained(name, frames, size)})
    return rows


def place(cell: Cell, test: str, frames: int, size: int, config: Config) -> dict:
    """The columns of a row that say what it is of."""
    row = dataclasses.asdict(cell) | {"fold": cell.fold or None}
    row |= {"test": test, "frames": frames, "size": size}
    return row | {"where": study_plan.where(frames, size, config.stretch)}


def method_rows(cell: Cell, study: Study, loaded: model.Model, data, clips, progress) -> list[dict]:
    """Rows of the methods of interpolation, each on one weight, the others as trained.

    Whatever a model was trained as, the kernel and the temporal table are tried where the patch
    follows the size and the grid of tokens stays; the spatial table where the patch stays. Places
    of more than `MANY` tokens are left out.
    """
    step, rows = ablate.make_step(loaded.run), []
    trained = {bucket for bucket, _ in training_buckets(loaded.run.stretch, loaded.config)}
    groups = (("static_tokens", ("kernel", "temporal")), ("spatial", ("spatial",)))
    found = [
        (make_bucket(variant, frames, (size, size), loaded.config), weights)
        for (frames, size), (variant, weights) in itertools.product(study.places(cell), groups)
    ]
    found = [(bucket, weights) for bucket, weights in found if bucket.tokens() <= study_plan.MANY]
    counter = Counter(progress, len(found) * len(clips))
    for bucket, weights in found:
        pairs = [(weight, method) for weight in weights for method in study_plan.METHODS]
        given = step, loaded, clips, bucket, pairs, TEST_BATCH, (1, 1), counter
        scores, _ = ablate.evaluate_cell(*given)
        counter.next(clips)
        for (weight, method), score in zip(pairs, scores, strict=True):
            row = place(cell, f"{weight}:{method}", bucket.frames, bucket.height, loaded.run)
            row |= {key: score[key] for key in ("top1", "loss", "clips")}
            row |= {"patch": grid.place(bucket)["patch"], "trained": bucket in trained}
            rows.append(row | {"gflops": grid.gflops(loaded.run, bucket)})
    return rows


def retrieval_rows(
    cell: Cell, study: Study, loaded: model.Model, data, clips, progress
) -> list[dict]:
    """R@1 of test clips among training clips, for every pair of scales."""
    gallery = load_clips(data, "train", loaded.classes, say=progress.say)
    scales = study.places(cell)
    tests, rows = Tests(loaded.run, "features"), []
    counter = Counter(progress, len(scales) * (len(clips) + len(gallery)))
    features = {}
    for frames, size in scales:
        for side, members in (("query", clips), ("gallery", gallery)):
            given = tests.names, loaded.params, data, members, frames, size, counter
            found = tests.compute(*given, outputs.merge_features)
            counter.next(members)
            for name in tests.names:
                features[side, frames, size, name] = found[name]
    for name in tests.names:
        for frames, size in scales:
            query, bucket = features["query", frames, size, name], tests.bucket(name, frames, size)
            for scale in scales:
                of = features["gallery", *scale, name]
                ranking = retrieval.rank(query.values, of.values, query.labels, of.labels)
                row = place(cell, name, frames, size, loaded.run)
                row |= {"gallery": "x".join(map(str, scale)), "clips": len(query.labels)}
                row |= {"top1": retrieval.summary(ranking)["r1"]}
                row |= {"patch": grid.place(bucket)["patch"]}
                row |= {"trained": tests.is_trained(name, frames, size)}
                rows.append(row | {"gflops": grid.gflops(loaded.run, bucket)})
    return rows


def weizmann_clips(root: str, classes, progress: Progress) -> ClipList:
    """All clips of Weizmann below a folder, labelled as a model's classes are."""
    config = Config()
    config.data.dataset, config.data.root = "weizmann_loso", root
    parts = [load_clips(config.data, s, classes, say=progress.say) for s in ("train", "test")]
    return dataclasses.replace(
        parts[0],
        paths=[path for part in parts for path in part.paths],
        labels=np.concatenate([part.labels for part in parts]),
        groups=None,
    )


KINDS = {
    "grid": grid_rows,
    "zero": grid_rows,
    "followed": grid_rows,
    "fine": grid_rows,
    "methods": method_rows,
    "retrieval": retrieval_rows,
}


def do_cell(cell: Cell, study: Study, progress: Progress) -> list[dict]:
    """Trains what has to be trained, evaluates, and returns the rows for study.csv.

    `minutes` of the rows is the processor's time, so that other work on the machine doesn't count,
    for the whole cell, its training included whenever that was; a cell that was interrupted counts
    from where it went on.

    Raises:
      CellFailed: a training was ended by a signal.
      ConfigError: a part of the study's configuration can't be run.
    """
    chain, start = study.chain(cell), time.process_time()
    there = 0.0  # minutes of a training that another call did
    if cell.kind in ("grid", "fine") and (chain[-1][1] / TRAINED).exists():
        there = json.loads((chain[-1][1] / TRAINED).read_text())["minutes"]
    for config, workdir in study.missing(cell):
        train_once(config, workdir, progress)
    config, workdir = chain[-1]
    data = run.prepare(config, progress)[0].data
    loaded = model.load(workdir)
    if root := study.zero_shot_clips(cell):
        clips = weizmann_clips(root, loaded.classes, progress)
    else:
        clips = load_clips(data, "test", loaded.classes, say=progress.say)
    rows = KINDS[cell.kind](cell, study, loaded, data, clips, progress)
    minutes = there + (time.process_time() - start) / 60
    progress.say(f"cell done: {minutes:.1f} of {cell.minutes:g} minutes")
    return [row | {"minutes": minutes, "config": study.digest(cell)} for row in rows]
