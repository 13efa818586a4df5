"""Longer activities: COIN, Breakfast and Diving-48."""

import os
import re

from stretchysnake_jax.data.datasets.tree import (
    Entry,
    VideoTree,
    csv_rows,
    field,
    find_file,
    gather,
    number,
    read_json,
)
from stretchysnake_jax.data.lists import ClipList, ListError

BREAKFAST = ("cereals", "coffee", "friedegg", "juice", "milk")  # by name
BREAKFAST += ("pancake", "salat", "sandwich", "scrambledegg", "tea")
BREAKFAST_VIS4MER = ("cereals", "coffee", "tea", "pancake", "friedegg")  # by ViS4mer's class_id
BREAKFAST_VIS4MER += ("scrambledegg", "sandwich", "juice", "milk", "salat")
_FOLDS = {1: (3, 15), 2: (16, 28), 3: (29, 41), 4: (42, 54)}  # test persons, first and last
_VIS4MER_TEST = (47, 54)


def read_coin(root, annotations, split: str, fold: int) -> ClipList:
    """COIN, with COIN.json.

    {"database": {ID: {"class", "recipe_type": 0..179, "start", "end", "subset", ...}}}. The label
    is recipe_type; the clip is the region of interest, `start` to `end` in seconds. The subset that
    is not "training" is called "testing" or "validation": both are the split test. Videos are
    <id>.mp4, by themselves or in folders named by recipe_type.
    """
    path = find_file(annotations, ["COIN.json"], ("annotations",))
    names, entries = {}, []
    for video, row in field(read_json(path, dict), "database", path).items():
        where = f"{path}, video {video}"
        label, subset = field(row, "recipe_type", where), field(row, "subset", where)
        if not isinstance(label, int) or label < 0:
            raise ListError(f"{where}: recipe_type is {label!r}, expected a whole number from 0")
        if subset not in ("training", "testing", "validation"):
            raise ListError(
                f"{where}: subset is {subset!r}, expected training, testing or validation"
            )
        names[label] = str(field(row, "class", where))
        if (subset == "training") == (split == "train"):
            window = (number(row, "start", where), number(row, "end", where))
            if not 0 <= window[0] < window[1]:
                raise ListError(f"{where}: it goes from {window[0]:g} to {window[1]:g} seconds")
            entries.append(Entry((video, f"{label}/{video}"), label, window))
    if sorted(names) != list(range(len(names))):
        lacking = next(i for i in range(len(names)) if i not in names)
        raise ListError(f"{path}: no video has the recipe_type {lacking}, but some have a larger")
    classes = [names[i] for i in range(len(names))]
    return gather(VideoTree(root), classes, entries, exact_case=True)


def read_breakfast(root, annotations, split: str, fold: int) -> ClipList:
    """Breakfast in its four official folds, which are told by person.

    Fold 1 tests on P03 to P15, fold 2 on P16 to P28, fold 3 on P29 to P41, fold 4 on P42 to P54,
    and each trains on the others. Videos are P03/cam01/P03_cereals.avi; of the two channels
    P03/stereo/P03_cereals_ch0.avi and _ch1.avi the second is taken, and the first where there is no
    other. What ought to be there is read from the names of the segmentation files in the
    annotation folder (P03_cam01_P03_cereals.txt) where it has any, else from the videos. A group is
    a person; the ten classes are sorted by name.
    """
    first, last = _FOLDS[fold]
    return _breakfast(root, _breakfast_ids(root, annotations), BREAKFAST, split, first, last)


def read_breakfast_vis4mer(root, annotations, split: str, fold: int) -> ClipList:
    """Breakfast in the split of ViS4mer, which VideoMamba uses too: P47 to P54 are the test.

    Videos and segmentation files as of `read_breakfast`; train.csv and test.csv with the header
    file_name,duration,action,class_id and rows `P03-cam01-P03_cereals,56,cereals,0` come before
    them. Classes are in the order of ViS4mer's class_id.
    """
    try:
        path = find_file(annotations, [f"{split}.csv", f"breakfast_{split}.csv"])
    except ListError:  # the split is by person, so it needs no file
        ids = _breakfast_ids(root, annotations)
    else:
        ids = []
        for line, row in csv_rows(path, ("file_name",)):
            clip = _breakfast_id(row["file_name"])
            if clip is None:
                raise ListError(
                    f"{path}, line {line}: file_name is {row['file_name']!r}, expected such as "
                    "P03-cam01-P03_cereals"
                )
            ids.append(clip)
    return _breakfast(root, ids, BREAKFAST_VIS4MER, split, *_VIS4MER_TEST)


def _breakfast_id(name: str) -> tuple[str, str, str] | None:
    """(person, camera, activity) of a name such as P03_cam01_P03_cereals, or None."""
    pattern = r"(P\d\d)[-_/](cam\d+|webcam\d+|stereo)\d*[-_/]\1_([a-z]+)(?:_ch[01])?(?:\.\w+)*"
    match = re.fullmatch(pattern, name)
    return (match[1], match[2], match[3]) if match else None


def _breakfast_ids(root, annotations) -> list[tuple[str, str, str]]:
    """Every clip that segmentation files name, or else every one below the root; sorted."""
    names = os.listdir(annotations) if os.path.isdir(annotations) else []
    ids = {_breakfast_id(name) for name in names if name.endswith(".txt")} - {None}
    if not ids:
        ends = ["/".join(clip.split("/")[-3:]) for clip in VideoTree(root).clips]
        ids = {_breakfast_id(end) or _breakfast_id(end.split("/")[-1]) for end in ends} - {None}
    if not ids:
        raise ListError(
            f"no video of Breakfast (P03/cam01/P03_cereals.avi) is below {os.path.abspath(root)}"
        )
    return sorted(ids)


def _breakfast(root, ids, classes, split, first, last) -> ClipList:
    """The clips of a split; the persons from `first` to `last` are the test."""
    entries = []
    for person, camera, activity in ids:
        if activity not in classes:
            raise ListError(f"{activity!r} of {person} {camera} is none of Breakfast's activities")
        if (first <= int(person[1:]) <= last) == (split == "test"):
            channels = ("_ch1", "_ch0", "") if camera == "stereo" else ("",)
            names = [f"{person}/{camera}/{person}_{activity}{c}" for c in channels]
            names += [
                f"{person}{x}{y}{x}{person}_{activity}{c}"  # all in one folder
                for x in "-_"
                for y in (camera, f"{camera}01")
                for c in channels
            ]
            entries.append(Entry(tuple(names), classes.index(activity), group=person))
    return gather(VideoTree(root), classes, entries)


def read_diving48(root, annotations, split: str, fold: int) -> ClipList:
    """Diving-48 with its second, corrected labels (V2).

    Diving48_V2_train.json and Diving48_V2_test.json list {"vid_name": "-mmq0PT-u8k_00155",
    "label": 0, "start_frame": 0, "end_frame": 48}; Diving48_vocab.json holds 48 lists [takeoff,
    somersault, twist, position]. Videos are <vid_name>.mp4, as a rule in rgb/, or folders of
    frames. The clip is the frames from start_frame up to end_frame.
    """
    try:
        path = find_file(annotations, [f"Diving48_V2_{split}.json"], ("annotations",))
    except ListError as error:
        try:
            old = find_file(annotations, [f"Diving48_{split}.json"], ("annotations",))
        except ListError:
            raise error from None
        raise ListError(
            f"{old} holds the first labels of Diving-48, many of them wrong: take "
            f"Diving48_V2_{split}.json"
        ) from None
    vocabulary = find_file(annotations, ["Diving48_vocab.json"], ("annotations",))
    classes = ["_".join(map(str, words)) for words in read_json(vocabulary, list)]
    entries = []
    for row in read_json(path, list):
        video, label = str(field(row, "vid_name", path)), field(row, "label", path)
        if not isinstance(label, int) or not 0 <= label < len(classes):
            raise ListError(
                f"{path}, video {video}: label {label!r} is none of the {len(classes)} classes"
            )
        start, end = (number(row, f"{name}_frame", path) for name in ("start", "end"))
        window = (start, end) if start < end else (start, float("inf"))
        source = video.rpartition("_")[0]  # several dives are cut from one video
        entries.append(Entry((f"rgb/{video}", video), label, window, group=source))
    return gather(VideoTree(root), classes, entries, unit="frames", exact_case=True)
