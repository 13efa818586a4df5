"""Data sets without annotation files: a folder per class, and what TFDS has prepared."""

import json
import os
import re

import numpy as np

from stretchysnake_jax.data import records
from stretchysnake_jax.data.datasets.tree import (
    NoSplit,
    VideoTree,
    field,
    read_json,
)
from stretchysnake_jax.data.lists import (
    ClipList,
    ListError,
    keeps_labels_mirrored,
    read_classes,
)

_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


def read_folders(root, annotations, split: str, fold: int) -> ClipList:
    """A folder per class: <class>/.../<clip>, or train/<class>/..., val/<class>/..., test/....

    A clip is a video or a folder of frames. Without folders of splits everything is the split
    train. Classes are the folders of the training split, sorted.
    """
    folder = _split_folder(root, "train")
    if folder is None:
        if split != "train":
            raise NoSplit(f"{os.path.abspath(root)} has no folder {split}, only classes")
        return read_tree(root)
    classes = read_tree(folder).classes
    if split == "train":
        return read_tree(folder)
    folder = _split_folder(root, split)
    if folder is None:
        raise NoSplit(f"{os.path.abspath(root)} has no folder {split}")
    return read_tree(folder, classes)


def _split_folder(root, split) -> str | None:
    folders = [os.path.join(root, name) for name in _SPLITS[split]]
    return next((folder for folder in folders if os.path.isdir(folder)), None)


def read_tree(root, classes: list[str] | None = None, loose: bool = False) -> ClipList:
    """The clips of a folder whose folders are the classes.

    Args:
      root: the folder.
      classes: names in order; None: those of its folders that hold clips, sorted.
      loose: clips that lie in no folder are taken too, as the class "."; else they are an error.

    Raises:
      ListError: there is no clip, or one in no folder or of an unknown class.
    """
    tree = VideoTree(root)
    names = [clip.split("/")[0] if "/" in clip else "." for clip in tree.clips]
    if not names:
        raise ListError(f"there is no video and no folder of frames below {tree.root}")
    if "." in names and not loose:
        raise ListError(
            f"{os.path.join(tree.root, tree.clips[names.index('.')])} lies in no folder: its "
            "folder would be its class"
        )
    classes = classes or sorted(set(names))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ListError(f"{tree.root} has the folder {unknown[0]}, which is no class of training")
    return ClipList(
        paths=[os.path.join(tree.root, clip) for clip in tree.clips],
        labels=np.array([classes.index(name) for name in names], np.int32),
        classes=list(classes),
        flip=keeps_labels_mirrored(classes),
    )


def read_tfds(root, annotations, split: str, fold: int) -> ClipList:
    """A data set that TFDS prepared with file_format="array_record"; TensorFlow isn't needed.

    The root is the folder of dataset_info.json or one above a single such folder. A record has the
    features "label" (ClassLabel) and "video": encoded frames, as of ucf101, or the bytes of a video
    file. Classes are those of label.labels.txt. Every record is read once for its label, which
    takes as long as reading the whole split: `stretchysnake data check --write` keeps the answer as
    list files. Files of TFRecord need TensorFlow and are refused.
    """
    folder = _tfds_folder(root)
    info = read_json(os.path.join(folder, "dataset_info.json"), dict)
    kind = info.get("fileFormat", "tfrecord")
    if kind not in ("array_record", "arrayrecord"):
        raise ListError(
            f"{folder} holds {kind} files, which only TensorFlow reads: prepare the data set again "
            "with file_format='array_record'"
        )
    splits = {field(s, "name", folder): s for s in field(info, "splits", folder)}
    name = next((n for n in _SPLITS[split] if n in splits), None)
    if name is None:
        raise NoSplit(f"{folder} has the splits {', '.join(splits)}, no {split}")
    lengths = [int(n) for n in field(splits[name], "shardLengths", folder)]
    template = splits[name].get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    names_file = os.path.join(folder, "label.labels.txt")
    classes = read_classes(names_file) if os.path.exists(names_file) else None
    paths, labels, missing = [], [], []
    for shard, length in enumerate(lengths):
        file = os.path.join(folder, _shard(template, info, name, kind, shard, len(lengths)))
        for i in range(length):
            address = f"{file}#{i}"
            if not os.path.exists(file):
                missing.append(address)
                continue
            label = records.read_example(address).get("label")
            if not label or not isinstance(label[0], int) or label[0] < 0:
                raise ListError(f"{address}: its feature 'label' is {label}, expected a class")
            paths.append(address)
            labels.append(label[0])
    if classes is None:
        classes = [str(i) for i in range(max(labels, default=-1) + 1)]
    if max(labels, default=-1) >= len(classes):
        raise ListError(f"{folder}: a label is {max(labels)}, {names_file} has {len(classes)}")
    return ClipList(
        paths=paths,
        labels=np.array(labels, np.int32),
        classes=classes,
        flip=keeps_labels_mirrored(classes),
        missing=missing,
    )


def _tfds_folder(root) -> str:
    """The folder of dataset_info.json: the root, or the one folder below it that has it."""
    found = []
    for folder, below, files in os.walk(os.path.abspath(root)):
        if "dataset_info.json" in files:
            found.append(folder)
            below.clear()
    if len(found) != 1:
        raise ListError(
            f"{os.path.abspath(root)} holds {len(found)} files dataset_info.json, as TFDS writes "
            "them: data.root takes the folder of one"
        )
    return found[0]


def _shard(template: str, info: dict, split: str, kind: str, shard: int, shards: int) -> str:
    values = {
        "DATASET": info.get("name", ""),
        "SPLIT": split,
        "FILEFORMAT": kind,
        "SHARD_INDEX": f"{shard:05d}",
        "NUM_SHARDS": f"{shards:05d}",
        "SHARD_X_OF_Y": f"{shard:05d}-of-{shards:05d}",
    }
    try:
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)
    except KeyError as error:
        text = json.dumps(template)
        raise ListError(f"dataset_info.json: unknown field {error} in {text}") from error
