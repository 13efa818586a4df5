"""Actions played for the camera: Weizmann, UT-Interaction, KTH."""

import collections
import re

from stretchysnake_jax.data.datasets.tree import Entry, NoSplit, VideoTree, find_file, gather
from stretchysnake_jax.data.lists import ClipList, ListError, read_lines

WEIZMANN = ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")
WEIZMANN_SUBJECTS = ("daria", "denis", "eli", "ido", "ira", "lena", "lyova", "moshe", "shahar")
UT_INTERACTION = ("shake_hands", "hug", "kick", "point", "punch", "push")
KTH = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
# Persons of the authors' split; the others train.
_KTH_VAL = (1, 4, 19, 20, 21, 23, 24, 25)
_KTH_TEST = (2, 3, 5, 6, 7, 8, 9, 10, 22)


def read_weizmann(root, annotations, split: str, fold: int) -> ClipList:
    """Weizmann in a fixed split: moshe and shahar test, lyova validates, six others train.

    Videos are <class>/<subject>_<class>.avi; in the original 93 three of lena's come twice
    (lena_run1.avi, lena_run2.avi). There are no annotation files. A group is a subject.
    """
    test, val = ("moshe", "shahar"), ("lyova",)
    return _weizmann(root, lambda s: "test" if s in test else "val" if s in val else "train", split)


def read_weizmann_loso(root, annotations, split: str, fold: int) -> ClipList:
    """Weizmann, leaving one subject out: fold k tests on the k-th of the nine by name."""
    subject = WEIZMANN_SUBJECTS[fold - 1]
    return _weizmann(root, lambda s: "test" if s == subject else "train", split)


def _weizmann(root, split_of, split) -> ClipList:
    tree, there = VideoTree(root), collections.defaultdict(list)
    for clip in tree.clips:
        match = re.fullmatch(rf"([a-z]+)_({'|'.join(WEIZMANN)})[12]?\.\w+", clip.split("/")[-1])
        if match and match[1] in WEIZMANN_SUBJECTS:
            there[match[1], match[2]].append(clip)
    if not there:
        raise ListError(f"no video of Weizmann (bend/daria_bend.avi) is below {tree.root}")
    entries = [
        Entry((clip,), label, group=subject)
        for label, name in enumerate(WEIZMANN)
        for subject in WEIZMANN_SUBJECTS
        if split_of(subject) == split
        for clip in there.get((subject, name), [f"{name}/{subject}_{name}.avi"])
    ]
    return gather(tree, WEIZMANN, entries)


def read_ut_interaction(root, annotations, split: str, fold: int) -> ClipList:
    """UT-Interaction, leaving one sequence out: fold k tests on sequence k of its set.

    Videos are <number>_<sequence 1..20>_<class 0..5>.avi; set 1 holds sequences 1 to 10, set 2 11
    to 20, and a fold trains on the nine others of its own set. A group is a sequence.
    """
    tree, entries = VideoTree(root), []
    for clip in tree.clips:
        match = re.fullmatch(r"\d+_(\d+)_([0-5])\.\w+", clip.split("/")[-1])
        sequence = int(match[1]) if match else 0
        same_set = sequence > 0 and (sequence > 10) == (fold > 10)
        if same_set and (sequence == fold) == (split == "test"):
            entries.append(Entry((clip,), int(match[2]), group=f"sequence {sequence}"))
    if not entries:
        raise NoSplit(f"no video of UT-Interaction (1_1_0.avi) for this split is below {tree.root}")
    return gather(tree, UT_INTERACTION, entries)


def read_kth(root, annotations, split: str, fold: int) -> ClipList:
    """KTH in its authors' split by person, with 00sequences.txt.

    A line `person01_boxing_d1  frames 1-95, 96-185` cuts a video into clips, by frames from 1, both
    ends included; `*missing*` stands for the one that was lost. Videos are
    person01_boxing_d1_uncomp.avi. A group is a person.
    """
    path = find_file(annotations, ["00sequences.txt"])
    entries = []
    for line in read_lines(path):
        match = re.match(r"\s*(person(\d\d)_([a-z]+)_d\d)\s+frames\s(.*)", line)
        if not match or match[3] not in KTH:
            continue
        person = int(match[2])
        place = "val" if person in _KTH_VAL else "test" if person in _KTH_TEST else "train"
        names, label = (f"{match[1]}_uncomp", match[1]), KTH.index(match[3])
        for first, last in re.findall(r"(\d+)-(\d+)", match[4] if place == split else ""):
            window = (int(first) - 1, int(last))
            entries.append(Entry(names, label, window, f"person{person:02d}"))
    if not entries:
        raise ListError(f"{path} lists no clip: expected 'person01_boxing_d1 frames 1-95, 96-185'")
    return gather(VideoTree(root), KTH, entries, unit="frames")
