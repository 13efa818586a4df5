"""Data sets by name, read from their official annotations.

`DATASETS` says what there is; the docstring of a reader gives the layout it expects and the order
of the classes. Names of files are looked up without regard to their case and suffix, wherever below
the root they lie. Clips that the annotations list and the disk doesn't hold are collected.
"""

import collections
import dataclasses
import os
from collections.abc import Callable

import numpy as np

from stretchysnake_jax.config import ConfigError, DataConfig, nearest
from stretchysnake_jax.data import index, source
from stretchysnake_jax.data.datasets import activities, folders, staged, web
from stretchysnake_jax.data.datasets.tree import NoSplit
from stretchysnake_jax.data.lists import ClipList, ListError, read_list


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
      read: (root of the videos, folder of the annotations, split, fold) -> `ClipList`.
      sizes: its splits, and the published number of clips of each, one per fold; None: no number
        is published, or there are several editions.
      classes: how many there are; None: any number.
      folds: how many ways there are to split it.
    """

    read: Callable[[str, str, str, int], ClipList]
    sizes: dict[str, tuple[int, ...] | None]
    classes: int | None = None
    folds: int = 1

    def size(self, split: str, fold: int) -> int | None:
        """The published number of clips."""
        sizes = self.sizes[split]
        return sizes[(fold - 1) % len(sizes)] if sizes else None


_UNKNOWN = {"train": None, "val": None, "test": None}
DATASETS = {
    # train and test: the lists' own lines; their sums are the 13,320 videos
    "ucf101": Dataset(
        web.read_ucf101, {"train": (9537, 9586, 9624), "test": (3783, 3734, 3696)}, 101, 3
    ),
    "hmdb51": Dataset(web.read_hmdb51, {"train": (3570,), "test": (1530,)}, 51, 3),
    # CVDF's files
    "kinetics400": Dataset(
        web.read_kinetics, {"train": (246534,), "val": (19906,), "test": (39805,)}, 400
    ),
    "kinetics600": Dataset(web.read_kinetics, _UNKNOWN, 600),
    "kinetics700": Dataset(web.read_kinetics, _UNKNOWN, 700),
    "ssv2": Dataset(web.read_ssv2, {"train": (168913,), "val": (24777,), "test": (27157,)}, 174),
    # 11,827 videos in all
    "coin": Dataset(activities.read_coin, {"train": (9030,), "test": (2797,)}, 180),
    "breakfast": Dataset(activities.read_breakfast, {"train": None, "test": None}, 10, 4),
    "breakfast_vis4mer": Dataset(
        activities.read_breakfast_vis4mer, {"train": (1357,), "test": (355,)}, 10
    ),
    "diving48": Dataset(activities.read_diving48, {"train": (15027,), "test": (1970,)}, 48),
    "weizmann": Dataset(staged.read_weizmann, {"train": (60,), "val": (10,), "test": (20,)}, 10),
    "weizmann_loso": Dataset(staged.read_weizmann_loso, {"train": (80,), "test": (10,)}, 10, 9),
    "ut_interaction": Dataset(staged.read_ut_interaction, {"train": (54,), "test": (6,)}, 6, 20),
    "kth": Dataset(staged.read_kth, _UNKNOWN, 6),
    "folders": Dataset(folders.read_folders, _UNKNOWN),
    "tfds": Dataset(folders.read_tfds, _UNKNOWN),
}


def find_dataset(name: str) -> Dataset:
    """The entry of a data set; ConfigError names the nearest for an unknown one."""
    if name not in DATASETS:
        raise ConfigError(f"unknown data set {name!r}: {nearest(name, DATASETS)}")
    return DATASETS[name]


def read_dataset(
    name: str,
    videos: str,
    annotations: str = "",
    split: str = "train",
    fold: int = 1,
    classes: list[str] | None = None,
) -> ClipList:
    """Reads a split of a data set from its official annotations.

    Args:
      name: one of `DATASETS`.
      videos: the folder of the videos.
      annotations: the folder of the annotation files; "": that of the videos.
      split: "train", "val" or "test"; not every data set has all three.
      fold: which of its ways to split it, from 1.
      classes: names in the order that the labels shall follow. None: that of the data set.

    Returns:
      The `ClipList`; its `missing` are the clips that were not found.

    Raises:
      NoSplit: the data set has no such split.
      ListError: annotations that can't be used, or that don't hold all of its classes.
      ConfigError: an unknown data set or fold.
    """
    dataset = find_dataset(name)
    if split not in dataset.sizes:
        raise NoSplit(f"{name} has no split {split!r}: it takes {', '.join(dataset.sizes)}")
    if not 1 <= fold <= dataset.folds:
        raise ConfigError(f"data.fold is {fold}: {name} takes 1 to {dataset.folds}")
    if not videos:
        raise ConfigError(f"data.root is empty: {name} takes the folder of its videos")
    clips = dataset.read(os.path.abspath(videos), annotations or videos, split, fold)
    if dataset.classes not in (None, len(clips.classes)):
        raise ListError(
            f"the annotations of {name} name {len(clips.classes)} classes, it has "
            f"{dataset.classes}: labels would be wrong (a part of a data set takes list files)"
        )
    for text, count in collections.Counter(clips.classes).items():
        if count > 1:
            raise ListError(f"the annotations of {name} name the class {text!r} {count} times")
    if classes is not None and list(classes) != clips.classes:
        lacking = [c for c in clips.classes if c not in classes]
        if lacking:
            raise ListError(
                f"{name} has the class {lacking[0]!r}, which is none of the {len(classes)} given"
            )
        order = np.array([classes.index(c) for c in clips.classes], np.int32)
        clips = dataclasses.replace(clips, labels=order[clips.labels], classes=list(classes))
    return clips


def load_clips(
    data: DataConfig, split: str, classes: list[str] | None = None, optional: bool = False, say=None
) -> ClipList | None:
    """The clips of a split of a run: those of its list file, or else of its data set.

    Args:
      data: list files, data set and where they lie.
      split: "train", "val" or "test".
      classes: the class names that labels must follow. None: those of the list or data set.
      optional: None is returned for a split that isn't there.
      say: takes a line about clips that are missing.

    Raises:
      ConfigError: the split isn't there, can't be read, or more than data.max_unreadable of it is
        missing.
    """
    clips = _load_split(data, split, classes, optional, say)
    if clips is None or not data.window:
        return clips
    return source.slide(clips, data.window, data.window_stride or data.window)


def _load_split(data, split, classes, optional, say):
    path = getattr(data, split)
    if path:
        return read_list(path, data.root, classes, data.allow_absolute)
    try:
        if not data.dataset:
            raise NoSplit(f"data.{split} is empty: it takes the path of a list file")
        clips = read_dataset(data.dataset, data.root, data.annotations, split, data.fold, classes)
    except NoSplit:
        if optional:
            return None
        raise
    total = len(clips) + len(clips.missing)
    clips.index = os.path.abspath(os.path.join(data.root, data.dataset + index.SUFFIX))
    if clips.missing:
        first = ", ".join(clips.missing[:3])
        text = f"{len(clips.missing)} of the {total} clips of {data.dataset} {split} are missing"
        if not len(clips) or len(clips.missing) > data.max_unreadable * total:
            raise ListError(
                f"{text}, more than data.max_unreadable = {data.max_unreadable:g} allows. The "
                f"first of them: {first}"
            )
        if say:
            say(f"{text} and left out: {first}, ...")
    return clips
