"""The loader: batches as a pure function of (list, schedule, seed, step), assembled with Grain.

The source of the pipeline is a plan whose element i says which clips make up global step i; it is
mapped to whole decoded batches. A batch depends on nothing but its step, so the stream is the same
for any number of threads, workers and hosts, and a run resumes from its step number alone.
"""

import dataclasses
import gc
from collections.abc import Iterator

import grain
import numpy as np

from stretchysnake_jax.buckets import Bucket, Schedule
from stretchysnake_jax.config import ConfigError, DataConfig
from stretchysnake_jax.data import decode, sampling, transforms
from stretchysnake_jax.data.lists import ClipList

_GEOMETRY, _FRAMES = 0, 1  # the random streams of a sample


class Plan:
    """Which clips every training step takes: a random-access source, element i = global step i.

    Epochs are permutations of the list; steps cut the row of all epochs into equal pieces, so a
    batch may hold the end of one epoch and the start of the next.

    Args:
      clips: length of the list.
      which: index of the bucket of every step, int (steps,).
      batch_size: clips per step, all hosts together.
      seed: of the permutations.
      shard_index, shard_count: this host and the number of hosts.
    """

    def __init__(self, clips, which, batch_size, seed, shard_index=0, shard_count=1):
        self.clips, self.which, self.batch_size, self.seed = clips, which, batch_size, seed
        self.shard_index, self.shard_count = shard_index, shard_count

    def __len__(self):
        return len(self.which)

    def __getitem__(self, step):
        rows = _rows(step, self.batch_size, self.shard_index, self.shard_count)
        ids = [self._clip(*divmod(int(row), self.clips)) for row in rows]
        return step, int(self.which[step]), np.array(ids, np.int32), rows

    def _clip(self, epoch, position):
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        shuffle = grain.experimental.index_shuffle
        return shuffle(position, max_index=self.clips - 1, seed=seed, rounds=4)


class ListPlan:
    """The plan of an evaluation: the list in its order, padded to whole batches with clip -1.

    Args: as of `Plan`.
    """

    def __init__(self, clips, batch_size, shard_index=0, shard_count=1):
        self.clips, self.batch_size = clips, batch_size
        self.shard_index, self.shard_count = shard_index, shard_count

    def __len__(self):
        return -(-self.clips // self.batch_size)

    def __getitem__(self, step):
        rows = _rows(step, self.batch_size, self.shard_index, self.shard_count)
        return step, 0, np.where(rows < self.clips, rows, -1).astype(np.int32), rows


def _rows(step, batch_size, shard_index, shard_count):
    """Numbers of a host's samples in the row of all samples of the run, int64."""
    share = batch_size // shard_count
    return step * batch_size + shard_index * share + np.arange(share)


@dataclasses.dataclass
class LoadBatch:
    """Maps an element of a plan to a batch.

    Attributes:
      config: sampling and transforms.
      clips: the list.
      buckets: the scales that the plan's bucket indices mean.
      seed: of the random frames, crops and flips; None: evaluation, nothing is random.
    """

    config: DataConfig
    clips: ClipList
    buckets: tuple[Bucket, ...]
    seed: int | None

    def __call__(self, element) -> dict:
        step, which, ids, rows = element
        bucket = self.buckets[which]
        n = len(ids)
        video = np.zeros((n, bucket.frames, bucket.height, bucket.width, 3), np.uint8)
        label = np.where(ids >= 0, self.clips.labels[ids], 0).astype(np.int32)
        mask = np.zeros(n, np.float32)
        unreadable = []
        for i in np.flatnonzero(ids >= 0):
            try:
                video[i] = self._read(self.clips.paths[ids[i]], bucket, int(rows[i]))
                mask[i] = 1
            except decode.UnreadableVideo as error:
                unreadable.append((error.path, error.reason))
        return {
            "step": step,
            "bucket": which,
            "video": video,
            "label": label,
            "mask": mask,
            "clip": ids,
            "unreadable": unreadable,
        }

    def _read(self, path, bucket, row):
        size, mode = (bucket.height, bucket.width), self.config.resize
        if self.seed is None:
            geometry = transforms.eval_geometry(*size, mode)
        else:
            rng = sample_rng(self.seed, row, _GEOMETRY)
            geometry = transforms.train_geometry(
                *size, mode, self.config.crop_scale, self.config.flip, rng
            )

        def choose(n):  # starts its generator anew: a second call must draw the same numbers
            if self.config.sampling == "uniform":
                return sampling.uniform(n, bucket.frames)
            rng = None if self.seed is None else sample_rng(self.seed, row, _FRAMES)
            return sampling.sparse(n, bucket.frames, rng)

        return decode.read_clip(path, choose, geometry)[0]


def sample_rng(seed: int, row: int, stream: int) -> np.random.Generator:
    """The generator of one sample: the same whichever host, worker and batch layout draws it.

    Args:
      seed: of the run.
      row: number of the sample in the row of all samples of the run.
      stream: tells independent uses for one sample apart.
    """
    # Philox counts up its first word with every block of numbers: were that word the row, a
    # sample would repeat the numbers of the one before it.
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, row, stream, 0]))


class Batches(Iterator):
    """An iterator over batches that holds threads or processes until closed; a context manager."""

    def __init__(self, dataset, workers: int):
        self._iterator, self._workers = iter(dataset), workers

    def __next__(self) -> dict:
        if self._iterator is None:
            raise ValueError("these batches are closed")
        batch = next(self._iterator)
        if not self._workers:
            return batch
        # What comes from a worker lies in shared memory. Copied, it is freed right away, not when
        # the last user lets go of it, and batches are plain arrays however they were made.
        return {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Stops loading; the iterator can't be used any more."""
        if self._iterator is None:
            return
        self._iterator.close()
        self._iterator = None
        if self._workers:
            gc.collect()  # Grain's last batches hang in cycles, their shared memory with them


def train_batches(
    config: DataConfig,
    clips: ClipList,
    schedule: Schedule,
    *,
    seed: int,
    start_step: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Batches:
    """The training batches from `start_step` to the end of the schedule.

    Args:
      config: batch size, sampling, transforms and loader.
      clips: the training list.
      schedule: the bucket of every step.
      seed: of order, frames, crops and flips; >= 0.
      start_step: the first step wanted.
      shard_index, shard_count: this host and the number of hosts; every host gets its rows of the
        global batch.

    Returns:
      An iterator of dicts, to be closed:
        step: int, counted from 0.
        bucket: int, index into `schedule.buckets`.
        video: uint8 (b, frames, height, width, 3), RGB; b = batch_size / shard_count.
        label: int32 (b,).
        mask: float32 (b,), 0 where the clip was unreadable and the video is zeros.
        clip: int32 (b,), index into the list.
        unreadable: list of (path, reason).

    Raises:
      ConfigError: the batch can't be divided among the hosts.
    """
    _check_shards("data.batch_size", config.batch_size, shard_count)
    if not 0 <= start_step <= len(schedule.which):
        raise ValueError(f"start_step {start_step} is outside 0..{len(schedule.which)}")
    plan = Plan(len(clips), schedule.which, config.batch_size, seed, shard_index, shard_count)
    return _load(config, plan, LoadBatch(config, clips, schedule.buckets, seed), start_step)


def eval_batches(
    config: DataConfig,
    clips: ClipList,
    bucket: Bucket,
    batch_size: int,
    *,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Batches:
    """The clips in list order, one view of each, nothing random.

    Args:
      config: sampling, transforms and loader; its batch size isn't used.
      clips: the list.
      bucket: the scale.
      batch_size: clips per batch, all hosts together.
      shard_index, shard_count: this host and the number of hosts.

    Returns:
      An iterator of dicts as of `train_batches`, to be closed. The last batch is padded to the full
      size with rows of mask 0 and clip -1, so all have one shape.

    Raises:
      ConfigError: the batch can't be divided among the hosts.
    """
    _check_shards("the evaluation batch size", batch_size, shard_count)
    plan = ListPlan(len(clips), batch_size, shard_index, shard_count)
    return _load(config, plan, LoadBatch(config, clips, (bucket,), None), 0)


def _check_shards(name, batch_size, shard_count):
    if batch_size % shard_count:
        raise ConfigError(
            f"{name} is {batch_size}: with {shard_count} hosts it takes a multiple of {shard_count}"
        )


def _load(config, plan, load, start):
    # Whole batches are the elements: Grain deals elements out to workers, so nothing smaller would
    # give the same stream for any number of them. It would buffer 500 by default.
    options = grain.ReadOptions(config.threads, max(config.threads, config.prefetch))
    dataset = grain.MapDataset.source(plan)[start:].map(load).to_iter_dataset(options)
    if config.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, outside absl.app too
            flags.FLAGS.mark_as_parsed()
        ahead = max(1, config.prefetch // config.workers)
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(config.workers, ahead), worker_init_fn=_start_worker
        )
    return Batches(dataset, config.workers)


def _start_worker(*_):
    """Keeps a worker off the accelerator (Grain imports JAX); the environment would be too late."""
    import jax

    jax.config.update("jax_platforms", "cpu")


class TooManyUnreadable(RuntimeError):
    """More clips than allowed gave no frames."""

    plain = True  # the message is for the user, without a traceback


class UnreadableTally:
    """The distinct unreadable clips that a run has met on this host."""

    def __init__(self, state: dict[str, str] | None = None):
        self._reasons = dict(state or {})

    @property
    def count(self) -> int:
        """How many distinct clips were unreadable."""
        return len(self._reasons)

    def add(self, batch: dict) -> list[tuple[str, str]]:
        """Counts the unreadable clips of a batch; returns those not met before: (path, reason)."""
        new = [(p, reason) for p, reason in batch["unreadable"] if p not in self._reasons]
        self._reasons.update(new)
        return list(dict(new).items())

    def check(self, total: int, max_share: float) -> None:
        """Raises TooManyUnreadable if more than `max_share` of `total` clips are unreadable."""
        if self.count > max_share * total:
            first = "; ".join(f"{p}: {reason}" for p, reason in list(self._reasons.items())[:3])
            raise TooManyUnreadable(
                f"{self.count} of {total} clips are unreadable, more than data.max_unreadable = "
                f"{max_share:g} allows. The first of them: {first}"
            )

    def state(self) -> dict[str, str]:
        """What a checkpoint keeps, plain JSON; `UnreadableTally(state)` goes on from it."""
        return dict(self._reasons)
