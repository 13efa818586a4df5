"""The loader: batches as a pure function of (list, schedule, seed, step), assembled with Grain.

The source of the pipeline is a plan whose element i says which clips make up global step i; it is
mapped to whole decoded batches. A batch depends on nothing but its step, so the stream is the same
for any number of threads, workers and hosts, and a run resumes from its step number alone.
"""

import dataclasses
import functools
import gc
import math
from collections.abc import Iterator

import grain
import numpy as np

from stretchysnake_jax.buckets import Bucket, Schedule, sample_offsets
from stretchysnake_jax.config import ConfigError, DataConfig, resolve
from stretchysnake_jax.data import augment, decode, sampling, source, transforms
from stretchysnake_jax.data.index import open_counts
from stretchysnake_jax.data.lists import ClipList

_STREAMS = {"geometry": 0, "frames": 1, "colour": 2, "erase": 3}  # the random streams of a sample


class Plan:
    """Which clips every training step takes: a random-access source, element i = global step i.

    Epochs are permutations of the list; steps cut the row of all epochs into pieces, so a batch may
    hold the end of one epoch and the start of the next.

    Args:
      clips: length of the list.
      which: index of the bucket of every step, int (steps,).
      batch_sizes: samples of a step of every bucket, all hosts together.
      seed: of the permutations.
      shard_index, shard_count: this host and the number of hosts.
      repeats: how often a clip comes, one after the other.
    """

    def __init__(self, clips, which, batch_sizes, seed, shard_index=0, shard_count=1, repeats=1):
        self.clips, self.which, self.seed = clips, which, seed
        self.offsets = sample_offsets(which, batch_sizes)
        self.shard_index, self.shard_count, self.repeats = shard_index, shard_count, repeats

    def __len__(self):
        return len(self.which)

    def __getitem__(self, step):
        rows = _rows(*self.offsets[step : step + 2], self.shard_index, self.shard_count)
        ids = [self._clip(*divmod(int(row) // self.repeats, self.clips)) for row in rows]
        return step, int(self.which[step]), np.array(ids, np.int32), rows

    def _clip(self, epoch, position):
        seed = _epoch_seed(self.seed, epoch)
        shuffle = grain.experimental.index_shuffle
        return shuffle(position, max_index=self.clips - 1, seed=seed, rounds=4)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed, epoch):
    """The seed of an epoch's permutation."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


class ListPlan:
    """The plan of an evaluation: the list in its order, padded to whole batches with clip -1.

    Args: as of `Plan`; `views` of every clip come one after the other.
    """

    def __init__(self, clips, batch_size, shard_index=0, shard_count=1, views=1):
        self.clips, self.batch_size, self.views = clips, batch_size, views
        self.shard_index, self.shard_count = shard_index, shard_count

    def __len__(self):
        return -(-self.clips * self.views // self.batch_size)

    def __getitem__(self, step):
        first = step * self.batch_size
        rows = _rows(first, first + self.batch_size, self.shard_index, self.shard_count)
        ids = rows // self.views
        return step, 0, np.where(ids < self.clips, ids, -1).astype(np.int32), rows


def _rows(first, end, shard_index, shard_count):
    """A host's part of the batch [first, end) of the row of all samples of the run, int64."""
    share = (end - first) // shard_count
    return first + shard_index * share + np.arange(share)


@dataclasses.dataclass
class LoadBatch:
    """Maps an element of a plan to a batch.

    Attributes:
      config: sampling and transforms, resolved on the way.
      clips: the list.
      buckets: the scales that the plan's bucket indices mean.
      seed: of the random frames and augmentations; None: evaluation, nothing is random.
      views: evaluation only, test clips and test crops of every clip.
    """

    config: DataConfig
    clips: ClipList
    buckets: tuple[Bucket, ...]
    seed: int | None
    views: tuple[int, int] = (1, 1)

    def __post_init__(self):
        self.config = resolve(self.config)

    def __call__(self, element) -> dict:
        step, which, ids, rows = element
        bucket = self.buckets[which]
        n = len(ids)
        video = np.empty((n, bucket.frames, bucket.height, bucket.width, 3), np.uint8)
        label = np.where(ids >= 0, self.clips.labels[ids], 0).astype(np.int32)
        mask = np.zeros(n, np.float32)
        unreadable = []
        for same in self._decoded_together(ids, rows):
            try:
                read = self._read_train if self.seed is not None else self._read_eval
                video[same] = read(int(ids[same[0]]), bucket, rows[same])
                mask[same] = 1
            except decode.UnreadableVideo as error:
                unreadable += [(error.path, error.reason)] * len(same)
        video[mask == 0] = 0
        return {
            "step": step,
            "bucket": which,
            "video": video,
            "label": label,
            "mask": mask,
            "clip": ids,
            "unreadable": unreadable,
        }

    def _decoded_together(self, ids, rows) -> list[list[int]]:
        """The samples of a batch, the repeats of one clip together: they show the same frames."""
        groups = {}
        for i in np.flatnonzero(ids >= 0):
            together = rows[i] if self.seed is None else rows[i] // self.config.repeats
            groups.setdefault(int(together), []).append(int(i))
        return list(groups.values())

    def _read_train(self, clip, bucket, rows):
        """Augmented copies of one clip, uint8 (len(rows), frames, height, width, 3)."""
        copies = [self._draw_augmentation(bucket, int(row)) for row in rows]
        first = int(rows[0]) // self.config.repeats

        def choose(n):  # starts its generator anew: a second call must draw the same numbers
            rng = sample_rng(self.seed, first, _STREAMS["frames"])
            return self._choose(n, bucket, rng=rng)

        video = self._read(clip, choose, copies[0] if len(copies) == 1 else _Copies(copies))
        video = video.reshape(bucket.frames, len(copies), bucket.height, bucket.width, 3)
        for copy, frames in zip(copies, video.swapaxes(0, 1), strict=True):
            copy.finish(frames)
        return video.swapaxes(0, 1)

    def _read_eval(self, clip, bucket, rows):
        """One view of one clip, uint8 (1, frames, height, width, 3)."""
        clips, crops = self.views
        view, crop = divmod(int(rows[0]) % (clips * crops), crops)
        size, mode = (bucket.height, bucket.width), self.config.resize
        geometry = transforms.eval_geometry(*size, mode, crop, crops)
        choose = functools.partial(self._choose, bucket=bucket, view=view, views=clips)
        return self._read(clip, choose, geometry)[None]

    def _draw_augmentation(self, bucket, row):
        def rngs(name):
            return sample_rng(self.seed, row, _STREAMS[name])

        size = bucket.height, bucket.width
        return augment.draw(self.config, *size, self.clips.flip, rngs)

    def _choose(self, n, bucket, **which):
        config = self.config
        return sampling.choose(config.sampling, n, bucket.frames, stride=config.stride, **which)

    def _read(self, clip, choose, transform):
        window, index = self.clips.window(clip), self.clips.index
        counts = open_counts(index) if index else None
        return source.read_clip(self.clips.paths[clip], choose, transform, window, counts)[0]


class _Copies:
    """Several augmentations of the same frame, the results one below the other."""

    def __init__(self, copies):
        self._copies = copies
        height, width = copies[0].shape
        self.shape = len(copies) * height, width

    def write(self, frame, out):
        """See `decode.to_rgb`."""
        for copy, part in zip(self._copies, np.split(out, len(self._copies)), strict=True):
            copy.write(frame, part)


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

    def __init__(self, dataset, workers: int, index: str = ""):
        self._iterator, self._workers, self._index = iter(dataset), workers, index

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
        if self._index:
            open_counts(self._index).save()
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
      schedule: the bucket of every step; its batch sizes, if it has some, go before the config's.
      seed: of order, frames, crops and flips; >= 0.
      start_step: the first step wanted.
      shard_index, shard_count: this host and the number of hosts; every host gets its rows of the
        global batch.

    Returns:
      An iterator of dicts, to be closed:
        step: int, counted from 0.
        bucket: int, index into `schedule.buckets`.
        video: uint8 (b, frames, height, width, 3), RGB; b is this host's part of the batch.
        label: int32 (b,).
        mask: float32 (b,), 0 where the clip was unreadable and the video is zeros.
        clip: int32 (b,), index into the list.
        unreadable: list of (path, reason).

    Raises:
      ConfigError: a batch can't be divided among the hosts.
    """
    config = resolve(config)
    sizes = schedule.batch_sizes or (config.batch_size,) * len(schedule.buckets)
    for size in sizes:
        name = "a batch by data.tokens_per_batch" if config.tokens_per_batch else "data.batch_size"
        _check_shards(name, size, shard_count)
    if not 0 <= start_step <= len(schedule.which):
        raise ValueError(f"start_step {start_step} is outside 0..{len(schedule.which)}")
    shard = shard_index, shard_count
    plan = Plan(len(clips), schedule.which, sizes, seed, *shard, config.repeats)
    return _load(config, plan, LoadBatch(config, clips, schedule.buckets, seed), start_step)


def eval_batches(
    config: DataConfig,
    clips: ClipList,
    bucket: Bucket,
    batch_size: int,
    *,
    shard_index: int = 0,
    shard_count: int = 1,
    views: tuple[int, int] = (1, 1),
) -> Batches:
    """The clips in list order, nothing random.

    Args:
      config: sampling, transforms and loader; its batch size isn't used.
      clips: the list.
      bucket: the scale.
      batch_size: views per batch, all hosts together.
      shard_index, shard_count: this host and the number of hosts.
      views: (test clips, test crops) of every clip, such as (4, 3), crops innermost. They come one
        after the other and have the clip's index.

    Returns:
      An iterator of dicts as of `train_batches`, to be closed. The last batch is padded to the full
      size with rows of mask 0 and clip -1, so all have one shape.

    Raises:
      ConfigError: the batch can't be divided among the hosts.
    """
    _check_shards("the evaluation batch size", batch_size, shard_count)
    plan = ListPlan(len(clips), batch_size, shard_index, shard_count, math.prod(views))
    return _load(config, plan, LoadBatch(config, clips, (bucket,), None, views), 0)


def _check_shards(name, batch_size, shard_count):
    if batch_size % shard_count:
        raise ConfigError(
            f"{name} is {batch_size}: with {shard_count} hosts it takes a multiple of {shard_count}"
        )


def _load(config, plan, load, start):
    # Whole batches are the elements: Grain deals elements out to workers, so nothing smaller would
    # give the same stream for any number of them. It would buffer 500 by default.
    options = grain.ReadOptions(config.threads, _buffered(config))
    dataset = grain.MapDataset.source(plan)[start:].map(load).to_iter_dataset(options)
    if config.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, outside absl.app too
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(config.workers, _ahead(config))
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    return Batches(dataset, config.workers, load.clips.index)


def _buffered(config) -> int:
    """Batches that a process has ready or in work."""
    return max(config.threads, config.prefetch)


def _ahead(config) -> int:
    """Batches of each worker that wait for the main process."""
    return max(1, config.prefetch // config.workers)


def memory_bound(
    config: DataConfig, buckets, batch_sizes, shard_count: int = 1, pixels: int = 1920 * 1080
) -> int:
    """An upper bound of what the loader holds on a host, bytes.

    batches x the largest batch + threads x (2 x a sample of it x data.repeats + 64 bytes a pixel of
    the video): a batch is batch size / hosts x frames x height x width x 3 bytes; batches =
    max(data.threads, data.prefetch) + 2 in use without workers, and workers x (that +
    max(1, data.prefetch // workers)) + 2 with them, and so do the threads multiply. 64 bytes a
    pixel are 17 frames of the decoder's, and one as bytes and as floats.

    The interpreter and its libraries come on top, some 0.2 GiB per process, and the index with
    some 200 bytes per video that has an entry.

    Args:
      config: the loader.
      buckets: the scales.
      batch_sizes: samples of a step of every bucket, all hosts together.
      shard_count: number of hosts.
      pixels: of a frame of the largest video.
    """
    config = resolve(config)
    samples = [b.frames * b.height * b.width * 3 for b in buckets]
    batch = max(n * size for n, size in zip(samples, batch_sizes, strict=True)) // shard_count
    batches, processes = _buffered(config), max(1, config.workers)
    if config.workers:
        batches = config.workers * (batches + _ahead(config))
    thread = 2 * max(samples) * config.repeats + 64 * pixels
    return (batches + 2) * batch + processes * config.threads * thread


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
