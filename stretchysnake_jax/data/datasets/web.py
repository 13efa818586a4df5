"""Short clips from the web: UCF-101, HMDB-51, Kinetics, Something-Something V2."""

import os
import re

from stretchysnake_jax.data.datasets.tree import (
    Entry,
    NoSplit,
    VideoTree,
    class_index,
    csv_rows,
    field,
    find_class,
    find_file,
    gather,
    read_json,
    text_rows,
)
from stretchysnake_jax.data.lists import ClipList, ListError

# What a split may be called in the names of files and folders.
_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validate", "validation"),
    "test": ("test", "testing"),
}


def read_ucf101(root, annotations, split: str, fold: int) -> ClipList:
    """UCF-101, with the lists of ucfTrainTestlist.

    classInd.txt holds `1 ApplyEyeMakeup`; trainlist01.txt
    `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`, testlist01.txt the same without the number;
    folds 1 to 3. The label is the folder; classes are in the order of classInd.txt. Lists say
    v_HandStandPushups, files v_HandstandPushups: case doesn't count. A group is a class and gNN:
    clips of one source video.
    """
    below = ("ucfTrainTestlist",)
    path = find_file(annotations, ["classInd.txt"], below)
    numbered = []
    for number, line in text_rows(path):
        words = line.split()
        if len(words) != 2 or not words[0].isdecimal():
            raise ListError(f"{path}, line {number}: expected 'number class', found {line!r}")
        numbered.append((int(words[0]), words[1]))
    classes = [name for _, name in sorted(numbered)]
    index = {name.casefold(): i for i, name in enumerate(classes)}
    path = find_file(annotations, [f"{split}list{fold:02d}.txt"], below)
    entries = []
    for number, line in text_rows(path):
        name = line.split()[0]
        folder = name.split("/")[0]
        label = find_class(index, folder.casefold(), f"{path}, line {number}")
        group = re.search(r"_g(\d+)_c\d+", name)
        entries.append(
            Entry(
                (name, name.split("/")[-1]),
                label,
                group=f"{classes[label]}_g{group[1]}" if group else None,
            )
        )
    return gather(VideoTree(root), classes, entries)


def read_hmdb51(root, annotations, split: str, fold: int) -> ClipList:
    """HMDB-51, with the lists of testTrainMulti_7030_splits.

    <class>_test_split1.txt, 51 files for each of folds 1 to 3, hold `name.avi 1 `: 1 training, 2
    test, 0 neither. Videos are <class>/<name>.avi; names hold ! ( ) [ ] ; ~ # + & @. Classes are
    sorted by name.
    """
    folder = annotations
    if os.path.isdir(os.path.join(annotations, "testTrainMulti_7030_splits")):
        folder = os.path.join(annotations, "testTrainMulti_7030_splits")
    suffix = f"_test_split{fold}.txt"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    classes = sorted(n.removesuffix(suffix) for n in names if n.endswith(suffix) and n[0] != ".")
    if not classes:
        raise ListError(
            f"there is no <class>{suffix} in {os.path.abspath(folder)}: data.annotations takes the "
            "folder testTrainMulti_7030_splits"
        )
    wanted = {"train": "1", "test": "2"}[split]
    entries = []
    for label, name in enumerate(classes):
        path = os.path.join(folder, name + suffix)
        for number, line in text_rows(path):
            clip, _, use = line.rpartition(" ")
            if use not in ("0", "1", "2") or not clip.strip():
                raise ListError(
                    f"{path}, line {number}: expected 'name.avi 0', 1 or 2, found {line!r}"
                )
            if use == wanted:
                clip = clip.strip()
                entries.append(Entry((f"{name}/{clip}", clip), label))
    return gather(VideoTree(root), classes, entries)


def read_kinetics(root, annotations, split: str, fold: int) -> ClipList:
    """Kinetics-400, -600, -700, with the csv files of any of their editions.

    train.csv, val.csv (or validate.csv) and test.csv, or such names with kinetics-400_ in front,
    have a header: label, youtube_id, time_start, time_end, split. Columns are told by it, for some
    editions of test.csv have no labels; such a split can't be read. Videos are
    <id>_<start>_<end>.mp4, the times in six digits, anywhere below the root; of several, those in
    replacement_for_corrupted_k400 and then those in the split's own folder come first. Classes are
    the sorted labels of train.csv.
    """
    rows, path = _kinetics_rows(annotations, split)
    train = rows if split == "train" else _kinetics_rows(annotations, "train")[0]
    classes = sorted({row["label"] for _, row in train if row.get("label")})
    if "label" not in rows[0][1]:
        raise NoSplit(f"{path} has no column 'label': the labels of this split aren't published")
    index, entries = class_index(classes), []
    for line, row in rows:
        try:
            start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        except ValueError:
            raise ListError(
                f"{path}, line {line}: time_start and time_end are {row['time_start']!r} and "
                f"{row['time_end']!r}, expected seconds"
            ) from None
        video = row["youtube_id"]
        names = (f"{video}_{start:06d}_{end:06d}", f"{video}_{start}_{end}")
        entries.append(Entry(names, find_class(index, row["label"], f"{path}, line {line}")))
    prefer = ("replacement_for_corrupted_k400", *_ALIASES[split])
    return gather(VideoTree(root), classes, entries, exact_case=True, prefer=prefer)


def _kinetics_rows(annotations, split: str) -> tuple[list[tuple[int, dict]], str]:
    """The rows of a split's csv file as of `csv_rows`, and the file."""
    names = []
    for alias in _ALIASES[split]:
        names += [f"{alias}.csv", f"kinetics_{alias}.csv"]
        for n in (400, 600, 700):
            names += [f"kinetics{x}{alias}.csv" for x in (f"-{n}_", f"_{n}_", f"{n}_")]
        names += [f"kinetics_700_2020_{alias}.csv", f"kinetics700_2020_{alias}.csv"]
    folder = os.path.abspath(annotations)
    try:
        path = find_file(folder, names, ("annotations",))
    except ListError:
        raise NoSplit(
            f"there is no {names[0]} in {folder}: data.annotations takes the folder of the csv "
            "files of Kinetics"
        ) from None
    return csv_rows(path, ("youtube_id", "time_start", "time_end")), path


def read_ssv2(root, annotations, split: str, fold: int) -> ClipList:
    """Something-Something V2, with its json files under either of their names.

    labels.json maps 174 templates to numbers in quotes; train.json and validation.json list
    {"id": "78687", "template": "Holding [something] next to [something]", ...}: without its
    brackets the template is the class. test.json has ids only; their classes are the lines
    `1420;Throwing something` of test-answers.csv. Older files are called
    something-something-v2-train.json. Videos are <id>.webm, or folders of frames. Classes are in
    the order of labels.json. Mirrored clips change their class ("from left to right").
    """

    def file(name):
        return find_file(annotations, [name, f"something-something-v2-{name}"], ("labels",))

    path = file("labels.json")
    labels = {}
    for name, number in read_json(path, dict).items():
        if not str(number).isdecimal():
            raise ListError(f"{path}: the number of {name!r} is {number!r}, expected 0, 1, ...")
        labels[name] = int(number)
    classes = sorted(labels, key=labels.get)
    if [labels[name] for name in classes] != list(range(len(classes))):
        raise ListError(f"{path}: the numbers of the classes aren't 0 to {len(classes) - 1}")
    path = file({"train": "train", "val": "validation", "test": "test"}[split] + ".json")
    answers = {}
    if split == "test":
        try:
            rows = list(text_rows(file("test-answers.csv")))
        except ListError as error:
            raise NoSplit(f"the test split has no labels: {error}") from error
        answers = dict(line.split(";", 1) for _, line in rows if ";" in line)
    entries = []
    for row in read_json(path, list):
        video = str(field(row, "id", path))
        text = answers.get(video) if split == "test" else field(row, "template", path)
        if text is None:
            raise ListError(f"test-answers.csv has no line for the video {video} of {path}")
        text = text.replace("[", "").replace("]", "").strip()
        entries.append(Entry((video,), find_class(labels, text, f"{path}, video {video}")))
    return gather(VideoTree(root), classes, entries, flip=False)
