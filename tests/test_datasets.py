"""Tests of the readers of data sets, on a few files in each official layout."""

import dataclasses
import json
import os

import numpy as np
import pytest

from stretchysnake_jax.config import SPLITS, ConfigError, DataConfig
from stretchysnake_jax.data import datasets
from stretchysnake_jax.data.datasets import tree
from stretchysnake_jax.data.lists import ListError


@pytest.fixture
def make(tmp_path):
    """Writes files: relative path -> text; a list of paths gets a byte each. Returns the folder."""

    def write(files):
        if not isinstance(files, dict):
            files = dict.fromkeys(files, "x")
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        return tmp_path

    return write


def names(clips, folder):
    return [os.path.relpath(path, folder) for path in clips.paths]


def read(name, folder, split="train", fold=1, videos="v", annotations="a", **options):
    where = str(folder / videos), str(folder / annotations)
    return datasets.read_dataset(name, *where, split, fold, **options)


UCF = [f"Class{i}" for i in range(99)]


@pytest.fixture
def ucf(make):
    classes = ["ApplyEyeMakeup", "HandstandPushups", *UCF]
    lists = "a/ucfTrainTestlist/"
    index = "".join(f"{i} {name}\r\n" for i, name in enumerate(classes, 1))
    train = (
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n"
        "HandstandPushups/v_HandStandPushups_g09_c02.avi 2\r\n"
        "Class0/v_Class0_g01_c01.avi 3\r\n"
    )
    test = "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n\r\n"
    make({f"{lists}classInd.txt": index, f"{lists}trainlist02.txt": train})
    make({f"{lists}testlist02.txt": test})
    return make(
        [
            "v/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
            "v/UCF-101/HandstandPushups/v_HandstandPushups_g09_c02.avi",
            "v/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
        ]
    )


def test_ucf101(ucf):
    clips = read("ucf101", ucf, fold=2)
    assert [os.path.basename(p) for p in clips.paths] == [
        "v_ApplyEyeMakeup_g08_c01.avi",
        "v_HandstandPushups_g09_c02.avi",  # written HandStand in the list
    ]
    assert clips.labels.tolist() == [0, 1] and clips.classes[:2] == [
        "ApplyEyeMakeup",
        "HandstandPushups",
    ]
    assert clips.groups == ["ApplyEyeMakeup_g08", "HandstandPushups_g09"]
    assert clips.missing == [str(ucf / "v/Class0/v_Class0_g01_c01.avi")]
    assert clips.flip and clips.windows is None
    test = read("ucf101", ucf, "test", fold=2)
    assert test.labels.tolist() == [0] and not test.missing
    with pytest.raises(ListError, match=r"no trainlist01\.txt in .*data\.annotations"):
        read("ucf101", ucf)
    (ucf / "a/ucfTrainTestlist/trainlist02.txt").write_text("Nothing/v_x_g01_c01.avi 1\n")
    with pytest.raises(ListError, match=r"trainlist02\.txt, line 1: 'nothing' is none of the 101"):
        read("ucf101", ucf, fold=2)


def test_all_classes_must_be_there(ucf):
    path = ucf / "a/ucfTrainTestlist/classInd.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ListError, match="name 100 classes, it has 101"):
        read("ucf101", ucf, fold=2)


def test_hmdb51(make):
    odd = "a_[b](c)!;~#+&@_wave_0.avi"
    lists = {f"a/testTrainMulti_7030_splits/c{i:02d}_test_split1.txt": "" for i in range(50)}
    lists["a/testTrainMulti_7030_splits/wave_test_split1.txt"] = (
        f"{odd} 1 \r\nw2.avi 2 \r\nw3.avi 0 \r\nw4.avi 1 \r\n"
    )
    folder = make(lists)
    make([f"v/wave/{odd}", "v/wave/w2.avi", "v/wave/w3.avi", "v/wave/.hidden.avi"])
    clips = read("hmdb51", folder)
    assert names(clips, folder) == [f"v/wave/{odd}"]
    assert clips.labels.tolist() == [50] and clips.classes[50] == "wave"
    assert clips.missing == [str(folder / "v/wave/w4.avi")]
    assert names(read("hmdb51", folder, "test"), folder) == ["v/wave/w2.avi"]
    (folder / "a/testTrainMulti_7030_splits/wave_test_split1.txt").write_text("w2.avi 3\n")
    with pytest.raises(ListError, match="line 1: expected 'name.avi 0', 1 or 2, found 'w2.avi 3'"):
        read("hmdb51", folder)
    with pytest.raises(ListError, match="testTrainMulti_7030_splits"):
        read("hmdb51", folder, fold=2)


KINETICS = ["air drumming", "eating, slowly", *(f"class {i:03d}" for i in range(398))]


@pytest.fixture
def kinetics(make):
    header = "label,youtube_id,time_start,time_end,split,is_cc\r\n"
    rows = [f"{name},other{i:06d},0,10,train,0\r\n" for i, name in enumerate(KINETICS[2:])]
    rows.insert(0, '"air drumming",-2k_nM0y_9Q,1,11,train,0\r\n')
    rows.insert(1, '"eating, slowly",_AbCd_12345,100,110,train,0\r\n')
    rows.insert(2, '"eating, slowly",abcdefghijk,5,15,train,0\r\n')
    make({"a/train.csv": header + "".join(rows)})
    make({"a/kinetics_400_validate.csv": header + "air drumming,vvvvvvvvvvv,7.0,17.0,validate,0\n"})
    make({"a/test.csv": "youtube_id,time_start,time_end,split\nttttttttttt,1,11,test\n"})
    return make(
        [
            "v/train/-2k_nM0y_9Q_000001_000011.mp4",
            "v/replacement_for_corrupted_k400/-2k_nM0y_9Q_000001_000011.mp4",
            "v/train/eating,_slowly/_AbCd_12345_000100_000110.mkv",
            "v/train/ABCDEFGHIJK_000005_000015.mp4",  # another video: ids know their case
            "v/val/vvvvvvvvvvv_000007_000017.mp4",
        ]
    )


def test_kinetics(kinetics):
    clips = read("kinetics400", kinetics)
    assert names(clips, kinetics / "v") == [
        "replacement_for_corrupted_k400/-2k_nM0y_9Q_000001_000011.mp4",
        "train/eating,_slowly/_AbCd_12345_000100_000110.mkv",
    ]
    assert clips.classes == sorted(KINETICS)
    assert [clips.classes[i] for i in clips.labels] == ["air drumming", "eating, slowly"]
    assert len(clips.missing) == 399
    assert clips.missing[0] == str(kinetics / "v/abcdefghijk_000005_000015")
    val = read("kinetics400", kinetics, "val")
    assert names(val, kinetics / "v") == ["val/vvvvvvvvvvv_000007_000017.mp4"]
    assert val.classes == clips.classes
    with pytest.raises(datasets.NoSplit, match=r"test\.csv has no column 'label'"):
        read("kinetics400", kinetics, "test")
    (kinetics / "a/test.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nair drumming,vvvvvvvvvvv,7,17,test\n"
    )
    assert read("kinetics400", kinetics, "test").labels.tolist() == [0]
    with pytest.raises(ListError, match="400 classes, it has 600"):
        read("kinetics600", kinetics)
    header = "label,youtube_id,time_start,time_end\n"
    (kinetics / "a/train.csv").write_text(f"{header}air drumming,x,1\n")
    with pytest.raises(ListError, match=r"train\.csv, line 2: 3 fields under 4 columns"):
        read("kinetics400", kinetics)
    (kinetics / "a/train.csv").write_text(f"{header}air drumming,x,1,a\n")
    with pytest.raises(ListError, match="line 2: time_start and time_end are '1' and 'a'"):
        read("kinetics400", kinetics)
    (kinetics / "a/train.csv").write_text("air drumming,x,1,11\n")
    with pytest.raises(ListError, match=r"train\.csv: its first line names no column 'youtube_id'"):
        read("kinetics400", kinetics)


@pytest.mark.parametrize("prefix", ["a/labels/", "a/something-something-v2-"])
def test_ssv2(make, prefix):
    labels = {f"Doing {i}": str(i) for i in range(2, 174)}
    labels |= {"Holding something next to something": "0", "Throwing something": "1"}
    train = [
        {"id": "78687", "label": "x", "template": "Holding [something] next to [something]"},
        {"id": "9", "label": "x", "template": "Throwing [something]"},
    ]
    folder = make(
        {
            f"{prefix}labels.json": json.dumps(labels),
            f"{prefix}train.json": json.dumps(train),
            f"{prefix}validation.json": json.dumps(train[1:]),
            f"{prefix}test.json": json.dumps([{"id": "1420"}]),
        }
    )
    make(["v/20bn/78687.webm", "v/20bn/1420.webm", "v/20bn/9/00001.jpg", "v/20bn/9/00002.jpg"])
    clips = read("ssv2", folder)
    assert names(clips, folder) == ["v/20bn/78687.webm", "v/20bn/9"]  # the second in frames
    assert clips.labels.tolist() == [0, 1] and clips.classes[2] == "Doing 2"
    assert clips.flip is False
    assert names(read("ssv2", folder, "val"), folder) == ["v/20bn/9"]
    with pytest.raises(datasets.NoSplit, match=r"test-answers\.csv"):
        read("ssv2", folder, "test")
    make({f"{prefix}test-answers.csv": "1420;Throwing something\r\n"})
    assert read("ssv2", folder, "test").labels.tolist() == [1]
    make({f"{prefix}train.json": json.dumps([{"id": "9", "template": "Eating [something]"}])})
    with pytest.raises(ListError, match="video 9: 'Eating something' is none of the 174"):
        read("ssv2", folder)
    make({f"{prefix}train.json": "[{]"})
    with pytest.raises(ListError, match=r"train\.json is no JSON file"):
        read("ssv2", folder)


@pytest.mark.parametrize("subset", ["testing", "validation"])
def test_coin(make, subset):
    rows = {
        f"id{i:09d}": {"class": f"Task{i}", "recipe_type": i, "start": 0, "end": 9.5}
        | {"subset": "training"}
        for i in range(180)
    }
    rows["-_testvideo"] = rows["id000000003"] | {"subset": subset, "start": 60.0, "end": 69.5}
    folder = make({"a/COIN.json": json.dumps({"database": rows})})
    make(["v/3/-_testvideo.mp4", "v/id000000007.webm"])
    test = read("coin", folder, "test")
    assert names(test, folder) == ["v/3/-_testvideo.mp4"] and test.labels.tolist() == [3]
    assert test.window(0) == (60.0, 69.5, "seconds") and test.classes[3] == "Task3"
    train = read("coin", folder)
    assert names(train, folder) == ["v/id000000007.webm"] and len(train.missing) == 179
    rows["-_testvideo"]["start"] = "60.0"
    make({"a/COIN.json": json.dumps({"database": rows})})
    with pytest.raises(ListError, match="start is '60.0', expected a number"):
        read("coin", folder, "test")
    rows["-_testvideo"]["subset"] = "tset"
    make({"a/COIN.json": json.dumps({"database": rows})})
    with pytest.raises(ListError, match="video -_testvideo: subset is 'tset'"):
        read("coin", folder)
    del rows["id000000005"], rows["-_testvideo"]
    make({"a/COIN.json": json.dumps({"database": rows})})
    with pytest.raises(ListError, match="no video has the recipe_type 5"):
        read("coin", folder)


BREAKFAST = [
    "v/P03/cam01/P03_cereals.avi",
    "v/P03/cam01/P03_cereals.avi.labels",
    "v/P03/webcam02/P03_cereals.avi",
    "v/P03/stereo/P03_tea_ch0.avi",
    "v/P03/stereo/P03_tea_ch1.avi",
    "v/P16/stereo/P16_tea_ch0.avi",
    "v/P47/cam01/P47_milk.avi",
]


def test_breakfast_folds(make):
    folder = make(BREAKFAST)
    test = read("breakfast", folder, "test", annotations="")
    assert names(test, folder / "v") == [
        "P03/cam01/P03_cereals.avi",
        "P03/stereo/P03_tea_ch1.avi",
        "P03/webcam02/P03_cereals.avi",
    ]
    assert [test.classes[i] for i in test.labels] == ["cereals", "tea", "cereals"]
    assert test.groups == ["P03"] * 3 and not test.missing
    train = read("breakfast", folder, annotations="")
    assert names(train, folder / "v") == [
        "P16/stereo/P16_tea_ch0.avi",
        "P47/cam01/P47_milk.avi",
    ]
    assert names(read("breakfast", folder, "test", 4, annotations=""), folder / "v") == [
        "P47/cam01/P47_milk.avi"
    ]
    assert train.classes == sorted(train.classes)
    # The names of segmentation files tell what is missing.
    make(["a/P03_cam01_P03_cereals.txt", "a/P04_stereo01_P04_tea.txt", "a/P20_cam01_P20_tea.txt"])
    test = read("breakfast", folder, "test")
    assert names(test, folder / "v") == ["P03/cam01/P03_cereals.avi"]
    assert test.missing == [str(folder / "v/P04/stereo/P04_tea_ch1")]
    with pytest.raises(ConfigError, match=r"data\.fold is 5: breakfast takes 1 to 4"):
        read("breakfast", folder, fold=5)


def test_breakfast_vis4mer(make):
    folder = make(BREAKFAST)
    train = read("breakfast_vis4mer", folder)
    assert len(train) == 4 and train.labels.tolist() == [0, 2, 0, 2]  # tea is 2
    assert names(read("breakfast_vis4mer", folder, "test"), folder / "v") == [
        "P47/cam01/P47_milk.avi"
    ]
    header = "file_name,duration,action,class_id\r\n"
    make({"a/train.csv": f"{header}P03-cam01-P03_cereals,56,cereals,0\nP46-cam01-P46_tea,5,tea,2"})
    make(["flat/P03-cam01-P03_cereals.mp4"])
    train = read("breakfast_vis4mer", folder)
    assert names(train, folder / "v") == ["P03/cam01/P03_cereals.avi"]
    assert train.missing == [str(folder / "v/P46/cam01/P46_tea")]
    flat = read("breakfast_vis4mer", folder, videos="flat")
    assert names(flat, folder) == ["flat/P03-cam01-P03_cereals.mp4"]
    make({"a/train.csv": f"{header}P03_cereals,56,cereals,0\n"})
    with pytest.raises(ListError, match="line 2: file_name is 'P03_cereals'"):
        read("breakfast_vis4mer", folder)


def test_diving48(make):
    vocabulary = [["Back", f"{i}som", "05Twis", "FREE"] for i in range(48)]
    row = {"vid_name": "-mmq0PT-u8k_00155", "label": 7, "start_frame": 3, "end_frame": 48}
    folder = make({"a/Diving48_vocab.json": json.dumps(vocabulary)})
    make(["v/rgb/-mmq0PT-u8k_00155.mp4"])
    make({"a/Diving48_train.json": json.dumps([row])})
    with pytest.raises(ListError, match=r"first labels .* take Diving48_V2_train\.json"):
        read("diving48", folder)
    with pytest.raises(ListError, match=r"no Diving48_V2_test\.json"):
        read("diving48", folder, "test")
    make({"a/Diving48_V2_train.json": json.dumps([row, row | {"vid_name": "x_00001"}])})
    clips = read("diving48", folder)
    assert names(clips, folder) == ["v/rgb/-mmq0PT-u8k_00155.mp4"] and len(clips.missing) == 1
    assert clips.labels.tolist() == [7] and clips.classes[7] == "Back_7som_05Twis_FREE"
    assert clips.window(0) == (3.0, 48.0, "frames") and clips.groups == ["-mmq0PT-u8k"]
    make({"a/Diving48_V2_train.json": json.dumps([row | {"label": 48}])})
    with pytest.raises(ListError, match="label 48 is none of the 48 classes"):
        read("diving48", folder)


def test_weizmann(make):
    people, classes = datasets.staged.WEIZMANN_SUBJECTS, datasets.staged.WEIZMANN
    files = [f"v/{c}/{s}_{c}.avi" for c in classes for s in people]
    files.remove("v/run/lena_run.avi")
    folder = make([*files, "v/run/lena_run1.avi", "v/run/lena_run2.avi"])
    (folder / "v/bend/shahar_bend.avi").unlink()
    found = {split: read("weizmann", folder, split) for split in SPLITS}
    assert {split: len(clips) for split, clips in found.items()} == {
        "train": 61,
        "val": 10,
        "test": 19,
    }
    assert found["test"].missing == [str(folder / "v/bend/shahar_bend.avi")]
    assert set(found["test"].groups) == {"moshe", "shahar"} and set(found["val"].groups) == {
        "lyova"
    }
    # The name of a class may end in a digit.
    wave = [p for p, y in zip(found["val"].paths, found["val"].labels, strict=True) if y == 9]
    assert wave == [str(folder / "v/wave2/lyova_wave2.avi")]
    one = read("weizmann_loso", folder, "test", fold=9)
    assert set(one.groups) == {"shahar"} and len(one) == 9
    assert "shahar" not in read("weizmann_loso", folder, fold=9).groups


def test_ut_interaction(make):
    folder = make([f"v/{i}_{s}_{i % 6}.avi" for i, s in enumerate((1, 1, 2, 10, 11, 12))])
    assert names(read("ut_interaction", folder, "test", 1), folder) == [
        "v/0_1_0.avi",
        "v/1_1_1.avi",
    ]
    assert names(read("ut_interaction", folder, "train", 1), folder) == [
        "v/2_2_2.avi",
        "v/3_10_3.avi",
    ]
    assert names(read("ut_interaction", folder, "train", 12), folder) == ["v/4_11_4.avi"]


def test_kth(make):
    folder = make(
        {
            "a/00sequences.txt": "A text\n\nperson01_boxing_d1\t\tframes\t1-95, 96-185\n"
            "person13_handclapping_d3\t*missing*\nperson02_running_d2   frames 3-7\n"
            "person11_walking_d4 frames 10-20, 21-30\n"
        }
    )
    make(["v/boxing/person01_boxing_d1_uncomp.avi", "v/person11_walking_d4_uncomp.avi"])
    val = read("kth", folder, "val")
    assert [val.window(i) for i in range(2)] == [(0.0, 95.0, "frames"), (95.0, 185.0, "frames")]
    assert len(val) == 2 and val.labels.tolist() == [0, 0] and val.groups == ["person01"] * 2
    assert read("kth", folder).labels.tolist() == [5, 5]
    assert len(read("kth", folder, "test").missing) == 1


def test_folders(make):
    folder = make(
        ["v/b/1.mp4", "v/a/x/2.AVI", "v/a/f/img_1.jpg", "v/a/f/img_2.jpg", "v/a/note.txt"]
    )
    clips = read("folders", folder)
    assert names(clips, folder / "v") == ["a/f", "a/x/2.AVI", "b/1.mp4"]
    assert clips.classes == ["a", "b"] and clips.labels.tolist() == [0, 0, 1]
    with pytest.raises(datasets.NoSplit, match="has no folder val"):
        read("folders", folder, "val")
    make(["w/train/left/1.mp4", "w/train/b/1.mp4", "w/validation/b/2.mp4"])
    assert read("folders", folder, videos="w").flip is False  # named after a direction
    val = read("folders", folder, "val", videos="w")
    assert val.classes == ["b", "left"] and val.labels.tolist() == [0]
    make(["w/validation/c/2.mp4"])
    with pytest.raises(ListError, match="has the folder c, which is no class of training"):
        read("folders", folder, "val", videos="w")
    make(["v/loose.mp4"])
    with pytest.raises(ListError, match=r"loose\.mp4 lies in no folder"):
        read("folders", folder)
    make(["none/readme.txt"])
    with pytest.raises(ListError, match="no video and no folder of frames"):
        read("folders", folder, videos="none")


def test_finding_clips(make):
    folder = make(
        [
            "v/A/one.mp4",
            "v/x/y/a/ONE.mp4",
            "v/b/two.avi",
            "v/c/two.avi",
            "v/d/[1]*.mp4",
            "v/d/thumb.png",
        ]
    )
    os.symlink(folder / "v", folder / "v" / "loop")
    os.symlink(folder / "v" / "b" / "two.avi", folder / "v" / "b" / "link.avi")
    clips = tree.VideoTree(folder / "v")

    def find(*wanted, **options):
        path = clips.find(*wanted, **options)
        return path and os.path.relpath(path, folder / "v")

    assert find("a/ONE") == "x/y/a/ONE.mp4" and find("a/one") == "A/one.mp4"
    assert find("one") == "A/one.mp4" and find("ONE") == "x/y/a/ONE.mp4"
    assert find("One", exact_case=True) is None
    assert find("c/two.webm") == "c/two.avi"  # another container
    assert find("two") == "b/two.avi" and find("two", prefer=("c",)) == "c/two.avi"
    assert find("d/[1]*") == "d/[1]*.mp4" and find("d/*") is None
    assert find("nothing", "b/two") == "b/two.avi"
    assert "b/link.avi" in clips.clips and "d" not in clips.clips
    assert not any(clip.startswith("loop") for clip in clips.clips)
    with pytest.raises(ListError, match="no folder .*gone"):
        tree.VideoTree(folder / "gone")


def test_classes_of_another_model(make):
    folder = make(["v/a/1.mp4", "v/b/1.mp4"])
    clips = read("folders", folder, classes=["b", "x", "a"])
    assert clips.labels.tolist() == [2, 0] and clips.classes == ["b", "x", "a"]
    with pytest.raises(ListError, match="the class 'a', which is none of the 1 given"):
        read("folders", folder, classes=["b"])


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match="'ucf102': did you mean 'ucf101'"):
        datasets.read_dataset("ucf102", str(tmp_path))
    with pytest.raises(datasets.NoSplit, match="hmdb51 has no split 'val': it takes train, test"):
        datasets.read_dataset("hmdb51", str(tmp_path), split="val")
    with pytest.raises(ConfigError, match=r"data\.root is empty"):
        datasets.read_dataset("hmdb51", "")


def test_published_sizes():
    sizes = datasets.DATASETS["ucf101"]
    assert [sizes.size("train", k) + sizes.size("test", k) for k in (1, 2, 3)] == [13320] * 3
    assert datasets.DATASETS["hmdb51"].size("test", 3) == 1530
    coin = datasets.DATASETS["coin"]
    assert coin.size("train", 1) + coin.size("test", 1) == 11827
    assert datasets.DATASETS["folders"].size("val", 1) is None
    for name, dataset in datasets.DATASETS.items():
        assert dataset.read.__doc__, name
        assert set(dataset.sizes) <= set(SPLITS)


def test_load_clips(ucf, tmp_path):
    data = DataConfig(
        dataset="ucf101",
        root=str(ucf / "v"),
        annotations=str(ucf / "a"),
        fold=2,
        max_unreadable=0.5,
    )
    said = []
    clips = datasets.load_clips(data, "train", say=said.append)
    assert len(clips) == 2 and "1 of the 3 clips of ucf101 train are missing" in said[0]
    with pytest.raises(ListError, match=r"1 of the 3 .* more than data\.max_unreadable = 0\.05"):
        datasets.load_clips(dataclasses.replace(data, max_unreadable=0.05), "train")
    assert datasets.load_clips(data, "val", optional=True) is None
    with pytest.raises(datasets.NoSplit):
        datasets.load_clips(data, "val")
    # A list file comes before the data set.
    (tmp_path / "own.txt").write_text("UCF-101/a.avi Class5\n")
    data.val = str(tmp_path / "own.txt")
    val = datasets.load_clips(data, "val", clips.classes)
    assert val.labels.tolist() == [7] and val.paths == [str(ucf / "v/UCF-101/a.avi")]
    with pytest.raises(ConfigError, match=r"data\.test is empty"):
        datasets.load_clips(DataConfig(), "test")
    assert datasets.load_clips(DataConfig(), "test", optional=True) is None
    assert np.asarray(clips.labels).dtype == np.int32
