"""Tests of RandAugment, colour jitter, random-resized crops, test crops and random erasing."""

import json
import math
import pathlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from stretchysnake_jax.config import RECIPES, DataConfig, parse_rand_augment, resolve
from stretchysnake_jax.data import augment, pipeline, transforms

GOLDENS = pathlib.Path(__file__).parent / "goldens"
LEVELS = json.loads((GOLDENS / "recipe.json").read_text())["randaugment_levels"]
CROPS = json.loads((GOLDENS / "sampling.json").read_text())["test_spatial_crops"]


def make_frame(height=60, width=80, seed=0):
    """A smooth coloured picture, uint8 BGR, with noise that spreads its histogram."""
    rng = np.random.default_rng(seed)
    small = rng.integers(20, 230, (5, 6, 3), np.uint8)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 10, 240).astype(np.uint8)


def pillow(name, value, frame):
    """The operation as timm does it with Pillow, BGR in and out."""
    image = Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))
    width, height = image.size

    def affine(*matrix):
        grey = (augment.FILL,) * 3
        method = Image.Transform.AFFINE
        return image.transform(image.size, method, matrix, Image.Resampling.BICUBIC, fillcolor=grey)

    def solarize_add():
        return image.point([min(255, i + value) if i < 128 else i for i in range(256)] * 3)

    def rotate():
        return image.rotate(value, Image.Resampling.BICUBIC, fillcolor=(augment.FILL,) * 3)

    out = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": rotate,
        "PosterizeIncreasing": lambda: ImageOps.posterize(image, value),
        "SolarizeIncreasing": lambda: ImageOps.solarize(image, value),
        "SolarizeAdd": solarize_add,
        "ColorIncreasing": lambda: ImageEnhance.Color(image).enhance(value),
        "ContrastIncreasing": lambda: ImageEnhance.Contrast(image).enhance(value),
        "BrightnessIncreasing": lambda: ImageEnhance.Brightness(image).enhance(value),
        "SharpnessIncreasing": lambda: ImageEnhance.Sharpness(image).enhance(value),
        "ShearX": lambda: affine(1, value, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, value, 1, 0),
        "TranslateXRel": lambda: affine(1, 0, round(value * width), 0, 1, 0),
        "TranslateYRel": lambda: affine(1, 0, 0, 0, 1, round(value * height)),
    }[name]()
    return np.asarray(out)[..., ::-1].astype(int)


# Operations.


def test_levels_golden():
    assert list(augment.OPERATIONS) == LEVELS["ops"]
    for name, cases in LEVELS["abs_or_signed_args"].items():
        for magnitude, args in cases.items():
            got = [augment.level(name, float(magnitude), sign) for sign in (1, -1)]
            wanted = None if args is None else args[0]
            assert wanted in got, (name, magnitude, got)
            if name in ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing"):
                assert sum(got) == pytest.approx(2)  # 1 +- something


EXACT = ["AutoContrast", "Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing"]
EXACT += ["SolarizeAdd", "ContrastIncreasing", "BrightnessIncreasing"]
EXACT += ["TranslateXRel", "TranslateYRel"]


@pytest.mark.parametrize("magnitude", [0, 2.5, 7, 10])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_equal_pillow(name, magnitude):
    for sign in (1, -1):
        value = augment.level(name, magnitude, sign)
        frame = make_frame()
        kept = frame.copy()
        got = augment.make_operation(name, value)(frame)
        assert got.dtype == np.uint8 and got.shape == frame.shape
        np.testing.assert_array_equal(frame, kept)  # the frame itself is left alone
        if name == "PosterizeIncreasing" and value == 0:
            assert not got.any()  # Pillow refuses 0 bits
            continue
        away = np.abs(got - pillow(name, value, frame))
        if name in EXACT:
            assert away.max() == 0
        elif name.startswith(("Color", "Sharpness")):
            assert away.max() <= 1
        else:  # another cubic kernel, and another way with the pixels along the border
            assert np.median(away) <= 1 and (away > 12).mean() < 0.05


def test_operations_on_even_frames_and_single_pixels():
    for frame in (np.full((9, 7, 3), 77, np.uint8), np.full((1, 1, 3), 5, np.uint8)):
        for name in ("AutoContrast", "Equalize"):
            np.testing.assert_array_equal(augment.make_operation(name, None)(frame), frame)
        for name in augment.OPERATIONS:
            value = augment.level(name, 7.0)
            assert augment.make_operation(name, value)(frame).shape == frame.shape


def test_rotation_turns_about_the_centre():
    frame = make_frame(21, 21)
    got = augment.make_operation("Rotate", 90.0)(frame)
    np.testing.assert_array_equal(got[1:-1, 1:-1], np.rot90(frame)[1:-1, 1:-1])


def test_hue_by_a_third_of_a_turn_swaps_channels():
    blue = np.zeros((4, 4, 3), np.uint8)
    blue[..., 0] = 200
    got = augment._hue(1 / 3)(blue)  # blue -> red in HSV
    assert got[..., 2].min() > 190 and got[..., :2].max() < 10
    # Eight bits of hue lose a little, as with torchvision on images.
    np.testing.assert_allclose(augment._hue(0.0)(blue), blue, atol=6)


# Draws.


def test_rand_augment_is_drawn_as_the_text_says():
    rng = np.random.default_rng(0)
    counts = [len(augment.draw_rand_augment("rand-m7-n4-mstd0.5-inc1", rng)) for _ in range(2000)]
    assert max(counts) == 4 and min(counts) == 0 and 1.9 < np.mean(counts) < 2.1
    assert parse_rand_augment("rand-m5-n2-mstd0.25-inc1") == (5.0, 2, 0.25)
    assert parse_rand_augment("rand-m9-n3-inc1") == (9.0, 3, 0.0)


def test_jitter_stays_in_range():
    frame, rng = make_frame(), np.random.default_rng(0)
    brightest = []
    for _ in range(100):
        (operation,) = augment.draw_colour_jitter((0.3, 0.0, 0.0, 0.0), rng)
        brightest.append(operation(frame).mean() / frame.mean())
    assert 0.69 < min(brightest) < 0.75 and 1.2 < max(brightest) < 1.31
    assert len(augment.draw_colour_jitter((0.1, 0.1, 0.1, 0.1), rng)) == 4


def test_erase_boxes():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.draw_erase_box(100, 100, rng) for _ in range(3000)])
    top, left, high, wide = boxes.T
    area, ratio = high * wide / 1e4, high / wide
    assert 0.018 < area.min() < 0.025 and 0.3 < area.max() < 0.345
    assert 0.27 < ratio.min() < 0.33 and 3.0 < ratio.max() < 3.7
    assert 0.9 < np.exp(np.median(np.log(ratio))) < 1.1  # log-uniform
    assert (top >= 0).all() and (top + high).max() == 100 and (left + wide).max() == 100
    assert augment.draw_erase_box(1, 1, rng) is None


def test_erased_pixels_are_noise_of_the_encoders_input():
    video = np.full((16, 40, 40, 3), 7, np.uint8)
    augment.erase(video, (5, 6, 20, 30), np.random.default_rng(0))
    box = video[:, 5:25, 6:36].astype(float)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        assert abs(box[..., c].mean() / 255 - mean) < 0.02
        assert abs(box[..., c].std() / 255 - std) < 0.02  # cut off at black and white
    assert (box[0] != box[1]).any()
    video[:, 5:25, 6:36] = 7
    assert (video == 7).all()


# Geometry.


def torchvision_box(height, width, area, draws):
    """RandomResizedCrop.get_params, written down again, for given uniform draws."""
    for a, r, i, j in draws:
        pixels = height * width * (area + (1 - area) * a)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * r)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(i * (height - h + 1)), int(j * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(256, 340), (340, 256), (50, 400), (400, 50), (224, 224)])
def test_random_resized_boxes_equal_torchvisions(size):
    for seed in range(300):
        rng = np.random.default_rng(seed)
        geometry = transforms.train_geometry(224, 224, "random_resized", 0.08, 0.5, rng)
        got = geometry.box(*size)
        assert got == torchvision_box(*size, 0.08, geometry.draws)
        top, left, high, wide = got
        assert 0 <= top <= size[0] - high and 0 <= left <= size[1] - wide


def test_random_resized_boxes_follow_the_buckets_shape():
    rng = np.random.default_rng(0)
    ratios = [
        wide / high
        for _ in range(500)
        for *_, high, wide in [
            transforms.train_geometry(32, 64, "random_resized", 0.08, 0, rng).box(400, 800)
        ]
    ]
    assert 1.45 < min(ratios) < 1.6 and 2.5 < max(ratios) < 2.75


@pytest.mark.parametrize("case", CROPS, ids=str)
def test_test_crops_golden(case):
    side = min(case["H"], case["W"])
    geometry = transforms.eval_geometry(side, side, "crop", case["crop"], case["num_crop"])
    assert geometry.box(case["H"], case["W"]) == (case["y0"], case["x0"], case["h"], case["w"])


# The whole.


def draw(data, row=0, size=(24, 32), flip=True):
    def rngs(name):
        return pipeline.sample_rng(3, row, pipeline._STREAMS[name])

    return augment.draw(resolve(data), *size, flip, rngs)


def test_videomamba_recipe_draws_what_it_names():
    rows = [draw(DataConfig(recipe="videomamba"), row) for row in range(800)]
    assert all(isinstance(row.geometry, transforms.RandomResized) for row in rows)
    assert 0.2 < np.mean([row.erase_box is not None for row in rows]) < 0.3
    assert 1.85 < np.mean([len(row.operations) for row in rows]) < 2.15
    assert 0.45 < np.mean([row.geometry.flip for row in rows]) < 0.55
    assert not any(
        draw(DataConfig(recipe="videomamba"), row, flip=False).geometry.flip for row in range(50)
    )


def test_plain_recipe_does_nothing():
    row = draw(DataConfig(recipe="plain"))
    assert not row.operations and row.erase_box is None and not row.geometry.flip
    assert row.geometry.box(37, 91) == (0, 0, 37, 91)


def test_one_draw_does_not_move_another():
    some = DataConfig(recipe="videomamba")
    less = DataConfig(recipe="videomamba", rand_augment="", erase=0.0)
    for row in range(20):
        one, other = draw(some, row).geometry, draw(less, row).geometry
        assert one.box(100, 90) == other.box(100, 90) and one.flip == other.flip


def test_frames_are_augmented_alike():
    """Equal frames stay equal, but for the noise of an erased box."""
    data = DataConfig(recipe="videomamba", colour_jitter=(0.4, 0.4, 0.4, 0.1))
    for row in range(30):
        one = draw(data, row)
        frame = make_frame(seed=row)
        first, second = one.frame(frame), one.frame(frame)
        np.testing.assert_array_equal(first, second)
        assert first.shape == (24, 32, 3) and first.dtype == np.uint8


def test_every_recipe_fills_every_field():
    for recipe in RECIPES:
        filled = resolve(DataConfig(recipe=recipe))
        assert None not in vars(filled).values() and resolve(filled) == filled
    assert resolve(DataConfig(recipe="videomamba", erase=0.0, flip=0.1)).flip == 0.1
