"""Stick Actions-10: a procedural data set of articulated figures doing the ten Weizmann actions.

Nothing is downloaded: `make` draws every clip from a seed. Three streams of random numbers keep
what a clip looks like apart from what happens in it:

* the subject stream draws the body, the clothes and the personal style;
* the scene stream (subject, take) draws length, background, framing and camera: it never sees the
  label, so none of these can tell the class;
* the motion stream (subject, take, label) draws speed, phase, amplitude, direction and view.

Two levels make it harder, `detail` and `timing`, see docs/data.md; level 0 of both is Stick
Actions-10 itself. Spawned renderers import this module: numpy and OpenCV only.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import cv2
import numpy as np

from stretchysnake_jax.config import SPLITS
from stretchysnake_jax.data import stick_motion
from stretchysnake_jax.data.stick_motion import CLASSES, LEVELS, classes
from stretchysnake_jax.data.video_file import write_video

FPS = 25
FRAMES = (36, 64)  # shortest and longest clip
VERSION, LEVELS_VERSION = 2, 3  # of level 0 and the others; raised when a pixel changes

_SUBJECT, _SCENE, _MOTION = 0, 1, 2


def clip_length(subject: int, take: int, *, seed: int = 0) -> int:
    """Frames of a clip: uniform on `FRAMES`, and the same for all ten classes."""
    rng = np.random.default_rng([_SCENE, seed, subject, take])
    return int(rng.integers(FRAMES[0], FRAMES[1] + 1))


def _contrasted(colour: np.ndarray, background: float, least: float = 70.0) -> np.ndarray:
    """Shift an RGB colour until its brightness is `least` away from the background's."""
    weights = np.array([0.30, 0.59, 0.11])
    way = -1.0 if background > 120 else 1.0
    for _ in range(8):  # clipping eats part of a shift, so repeat
        away = colour @ weights - background
        if abs(away) < least:
            colour = np.clip(colour + way * least - away, 5, 250)
    return colour


def _background(rng: np.random.Generator, size: int, floor: int, margin: int) -> np.ndarray:
    """A calm wall and floor with a few posts, (size + 2 margin, 4.5 size, 3) uint8."""
    height, width = size + 2 * margin, int(4.5 * size)
    base = rng.uniform(125, 205) + rng.uniform(-18, 18, 3)
    spots = (rng.normal(0, 7, (9, 40, 1)) + rng.normal(0, 3, (9, 40, 3))).astype(np.float32)
    canvas = cv2.resize(spots, (width, height), interpolation=cv2.INTER_CUBIC) + base
    horizon = margin + floor - int(size * rng.uniform(0.02, 0.14))
    for _ in range(rng.integers(0, 9)):
        left, top = int(rng.uniform(0, width)), int(rng.uniform(0.1, 0.8) * horizon)
        right = left + int(size * rng.uniform(0.05, 0.25))
        canvas[top:horizon, left:right] += rng.uniform(-30, 30, 3)
    canvas[horizon:] *= rng.uniform(0.55, 0.85)
    return np.clip(canvas, 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A clip before it is drawn: everything in pixels of the frame, y down.

    Attributes:
      size: pixels of a side.
      canvas: the background, uint8 (h, w, 3); `centre`: where each frame lies on it, (n, 2).
      grain: noise that is cut out at `corners`, uint8 (size + 64, size + 64, 3) and (n, 2).
      joints: polylines by body part in sixteenths of a pixel, int (n, points, 2).
      parts: (part, colours of its segments, their thickness), from far to near.
      radius: of the head.
    """

    size: int
    canvas: np.ndarray
    centre: np.ndarray
    grain: np.ndarray
    corners: np.ndarray
    joints: dict
    parts: tuple
    radius: float


def prepare_clip(
    label: int, subject: int, take: int, tile: int = 0, *, seed: int = 0, size: int = 128, timing=0
) -> Drawing:
    """Draws all random numbers of a scene.

    Args:
      tile: the number of the scene in its picture, see `render_clip`.
      size: height and width of the scene in pixels.

    Others as in `render_clip`.
    """
    name, tiles = classes(timing)[label], [tile] * (tile > 0)
    # 1. The subject.
    rng = np.random.default_rng([_SUBJECT, seed, subject])
    reach = dict(leg=(0.46, 0.54), arm=(0.38, 0.46), torso=(0.28, 0.34), head=(0.075, 0.095))
    body = {part: rng.uniform(*bounds) for part, bounds in reach.items()}
    stout = rng.uniform(0.8, 1.25)
    body |= dict(hips=0.05 * stout, shoulders=0.08 * stout)
    style = dict(elbow=rng.uniform(4, 18), lean=rng.uniform(-3, 4))
    top, trousers = rng.uniform(20, 235, (2, 3))
    skin = rng.uniform([160, 120, 90], [235, 200, 180])
    short_sleeves = rng.uniform() < 0.5

    # 2. The scene. The length comes first: `clip_length` repeats this draw.
    rng = np.random.default_rng([_SCENE, seed, subject, take, *tiles])
    n = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    n = clip_length(subject, take, seed=seed) if tile else n
    seconds = np.arange(n) / FPS
    scale = size / rng.uniform(1.42, 1.68)  # pixels per body height
    margin = size // 10
    floor = int(size - scale * rng.uniform(0.05, 0.15))
    canvas = _background(rng, size, floor, margin)
    middle = size / 2 + scale * rng.uniform(-0.08, 0.08)
    sway = [a * np.sin(rng.uniform(0.7, 2) * seconds + rng.uniform(0, 6.3)) for a in (0.04, 0.02)]
    shake = scale * np.stack(sway, -1) + rng.normal(0, 0.003 * scale, (n, 2))
    grain = np.clip(rng.normal(128, 2.5, (size + 64, size + 64, 3)).round(), 0, 255)
    grain, corners = grain.astype(np.uint8), rng.integers(0, 64, (n, 2))
    brightness = float(canvas.mean())
    top, trousers, skin = (_contrasted(c, brightness) for c in (top, trousers, skin))

    # 3. The motion, all frames at once: joints, y down, camera following the figure.
    if timing:  # a pair shares the stream
        rng = np.random.default_rng(
            [_MOTION, seed, subject, take, len(CLASSES) + label // 2, *tiles]
        )
        motion = stick_motion.timed_motion(name, timing, seconds, style, rng)
    else:
        rng = np.random.default_rng([_MOTION, seed, subject, take, label, *tiles])
        motion = stick_motion.motion(name, seconds, style, rng)
    travel = motion["speed"] * scale * seconds
    joints = {
        part: ((p * (1, -1) * scale + (middle, floor) - shake[:, None]) * 16).round().astype(int)
        for part, p in stick_motion.skeleton(motion, body).items()
    }
    centre = shake + np.array([canvas.shape[1] - travel[-1], canvas.shape[0] - 1.0]) / 2
    centre[:, 0] += travel

    shirt, legs, skin = (tuple(map(int, c)) for c in (top, trousers, skin))
    near_arm, near_leg = (shirt, skin if short_sleeves else shirt), (legs, legs)
    far_arm, far_leg = ([tuple(v * 4 // 5 for v in c) for c in m] for m in (near_arm, near_leg))
    shoe = tuple(v // 2 for v in legs)
    arm, leg = (0.085, 0.07), (0.115, 0.095, 0.07)  # widths from the joint outwards
    parts = (  # from far to near
        ("far arm", far_arm, arm),
        ("far leg", (*far_leg, shoe), leg),
        ("near leg", (*near_leg, shoe), leg),
        ("torso", (shirt,), (0.19,)),
        ("head", (skin,), ()),
        ("near arm", near_arm, arm),
    )
    widths = stout * scale
    parts = tuple((p, c, tuple(max(1, round(w * widths)) for w in ws)) for p, c, ws in parts)
    radius = body["head"] * scale
    return Drawing(size, canvas, centre, grain, corners, joints, parts, radius)


def render_clip(
    label: int, subject: int, take: int, *, seed: int = 0, size: int = 128, detail=0, timing=0
) -> np.ndarray:
    """Draw one clip.

    At a level of detail above 0 the picture is cut into (detail + 1) times as many rows and columns
    of scenes. In each of them the subject does the class's action once more: other scenery, other
    framing, another phase, the same length.

    Args:
      label: index into `classes(timing)`.
      subject: 0 or more; decides the body, the clothes and the style.
      take: 0 or more; with the subject it decides the scene and the length.
      seed: seed of the whole data set.
      size: height and width in pixels; even and at least 32 for each row of scenes.
      detail, timing: the levels, 0 to 3.

    Returns:
      (frames, size, size, 3) uint8 RGB at `FPS` frames per second.

    Raises:
      ValueError: an argument is out of range.
    """
    _check(label, subject, take, seed=seed, size=size, detail=detail, timing=timing)
    rows = detail + 1
    edges = [size * i // rows for i in range(rows + 1)]
    side = -(-size // rows)  # of the largest scene; what others can't hold is cut off
    clip = np.empty((clip_length(subject, take, seed=seed), size, size, 3), np.uint8)
    for tile in range(rows**2):
        y, x = divmod(tile, rows)
        part = clip[:, edges[y] : edges[y + 1], edges[x] : edges[x + 1]]
        d = prepare_clip(label, subject, take, tile, seed=seed, size=side, timing=timing)
        for i in range(len(clip)):
            part[i] = draw_frame(d, i)[: part.shape[1], : part.shape[2]]
    return clip


def _check(label, subject, take, *, seed, size, detail, timing):
    for name, level in (("detail", detail), ("timing", timing)):
        if level not in range(LEVELS):
            raise ValueError(f"{name} is {level!r}: it takes a level, 0 to {LEVELS - 1}")
    if not 0 <= label < len(classes(timing)) or min(subject, take, seed) < 0:
        raise ValueError(f"there is no clip {label=}, {subject=}, {take=}, {seed=}")
    least = 32 * (detail + 1)
    if size < least or size % 2:  # the codec cuts odd sizes
        at = f" at detail {detail}" if detail else ""
        raise ValueError(f"size must be even and at least {least}{at}, got {size}")


def draw_frame(d: Drawing, i: int) -> np.ndarray:
    """Draws frame `i`, uint8 (size, size, 3)."""
    frame = cv2.getRectSubPix(d.canvas, (d.size, d.size), d.centre[i].tolist())
    for part, colours, widths in d.parts:
        points = d.joints[part][i].tolist()
        if part == "head":
            cv2.circle(frame, points[0], round(d.radius * 16), colours[0], -1, cv2.LINE_AA, 4)
        for a, b, colour, width in zip(points, points[1:], colours, widths, strict=False):
            cv2.line(frame, a, b, colour, width, cv2.LINE_AA, 4)
    y, x = d.corners[i]
    return cv2.addWeighted(frame, 1, d.grain[y : y + d.size, x : x + d.size], 1, -128)


def _write_text(path: Path, text: str):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def _write_clip(path: str, size: int, key: tuple, settings: dict):
    """Render clip `key` into `path`."""
    write_video(path, render_clip(*key, size=size, **settings), FPS)


def _render_all(jobs: list, workers: int):
    """Run `_write_clip` on every job, yield after each; several workers are spawned processes."""
    if min(workers, len(jobs)) < 2:
        yield from (_write_clip(*job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork after JAX has started may deadlock
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), spawn, initializer=cv2.setNumThreads, initargs=(1,)
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(_write_clip, *j) for j in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def make(path, *, train_subjects=30, val_subjects=5, test_subjects=10, takes=4, size=128, seed=0,
         detail=0, timing=0, workers=None, progress=None) -> dict:  # fmt: skip
    """Write the data set into a folder; may be interrupted and called again.

    Writes videos/<split>/<class>/s<subject>_t<take>.mp4, train.txt, val.txt, test.txt ("path label"
    per line, the path relative to the folder), classes.txt and, last, dataset.json. Splits are by
    subject. The bytes don't depend on `workers`. One call at a time may write into a folder.

    Args:
      path: the folder; made if missing.
      train_subjects, val_subjects, test_subjects: subjects per split, 1 or more.
      takes: clips of each class per subject, 1 or more.
      size: height and width in pixels; even and at least 32 for each row of scenes.
      seed: seed of the whole data set.
      detail, timing: the levels, 0 to 3.
      workers: processes that render; None means one per core, 1 renders in this process.
        Several import the main module: guard it with `if __name__ == "__main__":`.
      progress: called as progress(done, total) after each clip, done and total in clips.

    Returns:
      What dataset.json holds.

    Raises:
      ValueError: if an argument is out of range, or the folder holds another data set.
      OSError: if OpenCV cannot write a video.
    """
    ends = np.cumsum([train_subjects, val_subjects, test_subjects]).tolist()
    if min(train_subjects, val_subjects, test_subjects, takes) < 1:
        raise ValueError("every split needs at least one subject, and takes must be 1 or more")
    drawn = dict(seed=seed, detail=detail, timing=timing)
    _check(0, 0, 0, size=size, **drawn)
    names = classes(timing)
    root = Path(os.path.abspath(path))
    subjects = {s: list(range(a, b)) for s, a, b in zip(SPLITS, [0, *ends], ends, strict=False)}
    version = LEVELS_VERSION if detail or timing else VERSION
    settings = {
        "name": "stick-actions-10", "version": version, "seed": seed, "size": size, "fps": FPS,
        "frames": list(FRAMES), "takes": takes, "subjects": subjects,
        "clips": {split: len(s) * takes * len(names) for split, s in subjects.items()},
    }  # fmt: skip
    if detail or timing:
        settings |= {"detail": detail, "timing": timing}

    # 1. Is this folder ours? The marker says so from before the first clip to after the last.
    finished, marker = root / "dataset.json", root / "dataset.partial.json"
    for note in (finished, marker):
        there = json.loads(note.read_text(encoding="utf-8")) if note.exists() else settings
        if there != settings:
            other = {k for k in {*there, *settings} if there.get(k, 0) != settings.get(k, 0)}
            raise ValueError(
                f"{root} was made with other settings ({', '.join(sorted(other))}): use a new "
                "folder or delete it"
            )
    strange = any(p.suffix != ".tmp" for p in root.glob("*"))
    if strange and not finished.exists() and not marker.exists():
        raise ValueError(f"{root} holds something else already: use a new folder")
    jobs, texts = [], {"classes.txt": "".join(f"{name}\n" for name in names)}
    for split, members in subjects.items():
        rows = [
            (f"videos/{split}/{name}/s{subject:03d}_t{take}.mp4", label, subject, take)
            for label, name in enumerate(names) for subject in members for take in range(takes)
        ]  # fmt: skip
        jobs += [(str(root / p), size, key, drawn) for p, *key in rows]
        texts[f"{split}.txt"] = "".join(f"{p} {label}\n" for p, label, *_ in rows)
    missing = [job for job in jobs if not os.path.exists(job[0])]
    if not missing and all((root / f).exists() for f in ("dataset.json", *texts)):
        return settings
    text = json.dumps(settings, indent=1) + "\n"
    root.mkdir(parents=True, exist_ok=True)
    _write_text(marker, text)
    for folder in {os.path.dirname(job[0]) for job in jobs}:
        os.makedirs(folder, exist_ok=True)

    # 2. The clips.
    with contextlib.closing(_render_all(missing, workers or os.cpu_count() or 1)) as clips:
        for done, _ in enumerate(clips, len(jobs) - len(missing) + 1):
            if progress:
                progress(done, len(jobs))

    # 3. The lists, and the promise that all is there.
    for name, lines in texts.items():
        _write_text(root / name, lines)
    _write_text(finished, text)
    marker.unlink()
    return settings
