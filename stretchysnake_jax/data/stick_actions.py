"""Stick Actions-10: a procedural data set of articulated figures doing the ten Weizmann actions.

Nothing is downloaded: `make` draws every clip from a seed. Three streams of random numbers keep
what a clip looks like apart from what happens in it:

* the subject stream draws the body, the clothes and the personal style;
* the scene stream (subject, take) draws length, background, framing and camera: it never sees the
  label, so none of these can tell the class;
* the motion stream (subject, take, label) draws speed, phase, amplitude, direction and view.

Spawned renderers import this module: numpy and OpenCV only.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
from pathlib import Path

import cv2
import numpy as np

from stretchysnake_jax.config import SPLITS

CLASSES = ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")
FPS = 25
FRAMES = (36, 64)  # shortest and longest clip
VERSION = 2  # raise it with every change that alters a pixel

# Cycles per second, and travel in body heights per second. `bend` is one event, not a cycle.
_FREQUENCY = dict(jump=1.3, pjump=1.6, run=1.5, side=1.7, skip=1.7, walk=0.95)  # others: 1.0
_SPEED = dict(jump=0.85, run=1.5, side=0.75, skip=1.0, walk=0.55)
_FRONTAL = ("jack", "pjump", "side", "wave1", "wave2")
# Arms that make the class move; any other arm may be held still in some pose.
_MOVING_ARMS = dict(jack=(0, 1), wave1=(0,), wave2=(0, 1))
_SUBJECT, _SCENE, _MOTION = 0, 1, 2


def clip_length(subject: int, take: int, *, seed: int = 0) -> int:
    """Frames of a clip: uniform on `FRAMES`, and the same for all ten classes."""
    rng = np.random.default_rng([_SCENE, seed, subject, take])
    return int(rng.integers(FRAMES[0], FRAMES[1] + 1))


def _motion(name: str, seconds: np.ndarray, style: dict, rng: np.random.Generator) -> dict:
    """Joint angles over time.

    Args:
      name: class name.
      seconds: (n,) times of the frames.
      style: the subject's personal style.
      rng: the motion stream.

    Returns:
      Angles in degrees, each (2, n), row 0 the lead side: `hip`, `spread`, `knee`, `swing`,
      `lift`, `elbow`, `fold`, where the first of each pair (hip, swing, elbow) turns forward
      and the second (spread, lift, fold) turns outwards; `lean` (n,) degrees; `rise` (n,) leg
      lengths off the ground; `yaw` degrees (0 faces the camera); `speed` of travel on screen.
    """
    n, amplitude = len(seconds), rng.uniform(0.8, 1.2)
    start, rate = rng.uniform(), _FREQUENCY.get(name, 1.0) * rng.uniform(0.85, 1.15)
    phase = 2 * np.pi * (start + seconds * rate)
    way = rng.choice((-1.0, 1.0))  # the side travelled to, or turned to
    yaw = rng.uniform(-30, 30) + (0 if name in _FRONTAL else way * 90)
    side = np.array([[1.0], [-1.0]])
    sin, cos = np.sin(phase), np.cos(phase)
    # The cycles linger at their neutral pose, which is the same one, standing, in most classes.
    hop, crouch = np.maximum(0, sin) ** 1.5, np.maximum(0, -sin) ** 1.5
    stride, opening = sin * abs(sin) ** 0.5, ((1 - cos) / 2) ** 1.5
    a = {k: np.zeros((2, n)) for k in ("hip", "spread", "knee", "swing", "lift", "elbow", "fold")}
    a |= {"lean": np.full(n, style["lean"]), "rise": np.zeros(n)}
    a["lift"] += 7
    a["elbow"] += style["elbow"]
    if name in ("walk", "run"):
        run = name == "run"
        a["lean"] += rng.uniform(2, 12) if run else 0
        a["hip"] += (47 if run else 27) * amplitude * side * stride + 6 * run
        a["knee"] -= (75 if run else 22) * amplitude * np.maximum(0, side * cos)
        a["swing"] -= (45 if run else 24) * amplitude * side * stride
        a["elbow"] += rng.uniform(25, 80) if run else rng.uniform(0, 60)
        a["rise"] += (0.12 if run else 0.03) * abs(cos)
    elif name == "skip":  # hops on one leg, the other one stays bent and lifts with the hop
        a["lean"] += 5
        a["hip"] += np.stack([18 * amplitude * sin + 8, 18 + 32 * hop])
        a["knee"] -= np.stack([25 * crouch + 5, 52 + 43 * hop])
        a["swing"] += 35 * amplitude * side * sin
        a["elbow"] += rng.uniform(0, 60)
        a["rise"] += 0.22 * hop
    elif name == "jump":  # forwards, both legs together
        a["lean"] += 22 * crouch
        a["hip"] += 36 * crouch
        a["knee"] -= 66 * crouch
        a["swing"] += 40 * amplitude * cos
        a["rise"] += 0.30 * hop
    elif name == "pjump":  # on the spot
        a["hip"] += 24 * crouch
        a["knee"] -= 48 * crouch
        a["rise"] += 0.27 * hop
    elif name == "jack":
        a["spread"] += 26 * amplitude * opening
        a["lift"] += 10 + 145 * opening
        a["elbow"] *= 0.3
        a["rise"] += 0.12 * abs(sin)
    elif name == "side":  # gallops sideways
        a["spread"] += 23 * amplitude * opening
        a["rise"] += 0.10 * abs(sin)
    elif name in ("wave1", "wave2"):
        arms = slice(0, 1) if name == "wave1" else slice(0, 2)
        low, high = rng.uniform(10, 70), rng.uniform(145, 168)
        a["lift"][arms] = low + (high - low) * (1 - cos) / 2
        a["fold"][arms] = 15 * sin
        a["elbow"][arms] = 0
    else:  # bend: stands, bends down and comes up once, somewhere inside the clip
        lasts = rng.uniform(1.15, 1.5)
        begins = rng.uniform(-0.1, max(0.0, seconds[-1] - lasts) + 0.1)
        bent = np.sin(np.pi * np.clip((seconds - begins) / lasts, 0, 1))
        a["lean"] += 88 * min(1.0, amplitude) * bent
        a["swing"] += 20 * bent
        a["hip"] -= 8 * bent

    _hold_still(name, a, rng)
    if rng.uniform() < 0.5:  # the lead side is the right one
        a = {k: v[::-1] if v.ndim == 2 else v for k, v in a.items()}
    across = np.cos(np.radians(yaw)) * way if name == "side" else np.sin(np.radians(yaw))
    speed = _SPEED.get(name, 0.0) * rng.uniform(0.85, 1.15) * across
    return a | {"yaw": yaw, "speed": speed}


def _hold_still(name: str, a: dict, rng: np.random.Generator):
    """Puts limbs that the class doesn't need into poses that others move through, in place.

    One frame then tells little: a raised arm may be a wave or held, a bent knee a skip or held.
    """
    for arm in {0, 1}.difference(_MOVING_ARMS.get(name, ())):
        if rng.uniform() < 0.4:
            raised, way = rng.uniform(20, 165), rng.permutation(["lift", "swing"])
            a[way[0]][arm], a[way[1]][arm] = raised, 0
            a["fold"][arm], a["elbow"][arm] = 0, rng.uniform(0, 60)
    if name in ("bend", "wave1", "wave2"):
        a["spread"] += rng.uniform(0, 24)
        if rng.uniform() < 0.4:
            a["hip"][0] += rng.uniform(10, 50)
            a["knee"][0] -= rng.uniform(30, 100)
    if name not in ("bend", "jump") and rng.uniform() < 0.4:
        a["lean"] += rng.uniform(0, 30)


def _direction(forward: np.ndarray, outward: np.ndarray, sign: int) -> np.ndarray:
    """Unit vectors (n, 3) (left, up, forward) of a limb that hangs down at angles 0, 0."""
    f, o = np.radians(forward), np.radians(outward)
    return np.stack([sign * np.sin(o) * np.cos(f), -np.cos(o) * np.cos(f), np.sin(f)], -1)


def _skeleton(motion: dict, body: dict) -> dict:
    """Polylines by body part, (n, points, 2): right and up in body heights, ground at 0."""
    n, lean = len(motion["lean"]), np.radians(motion["lean"])
    up = np.stack([np.zeros(n), np.cos(lean), np.sin(lean)], -1)
    neck = up * body["torso"]
    legs, arms = [], []
    for i, sign in enumerate((1, -1)):
        hip = np.tile([sign * body["hips"], 0.0, 0.0], (n, 1))
        knee = hip + _direction(motion["hip"][i], motion["spread"][i], sign) * body["leg"] / 2
        shank = motion["hip"][i] + motion["knee"][i]
        ankle = knee + _direction(shank, motion["spread"][i], sign) * body["leg"] / 2
        toe = ankle + _direction(shank + 80, np.zeros(n), sign) * 0.075
        legs.append([hip, knee, ankle, toe])
        shoulder = neck - up * 0.03 + np.array([sign * body["shoulders"], 0.0, 0.0])
        lift, swing = motion["lift"][i], motion["swing"][i]
        elbow = shoulder + _direction(swing, lift, sign) * body["arm"] / 2
        lower = _direction(swing + motion["elbow"][i], lift + motion["fold"][i], sign)
        arms.append([shoulder, elbow, elbow + lower * body["arm"] / 2])
    # The lowest ankle stands on the ground, unless the figure is in the air.
    offset = np.zeros((n, 3))
    offset[:, 1] = motion["rise"] * body["leg"] - np.minimum(legs[0][2][:, 1], legs[1][2][:, 1])
    yaw = np.radians(motion["yaw"])
    project = np.array([[np.cos(yaw), 0.0], [0.0, 1.0], [np.sin(yaw), 0.0]])

    far, near = (0, 1) if yaw > 0 else (1, 0)
    parts = {
        "far arm": arms[far], "far leg": legs[far], "near leg": legs[near], "near arm": arms[near],
        "torso": [np.zeros((n, 3)), neck], "head": [neck + up * body["head"] * 1.4],
    }  # fmt: skip
    return {k: np.stack([(p + offset) @ project for p in v], 1) for k, v in parts.items()}


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


def render_clip(label: int, subject: int, take: int, *, seed: int = 0, size: int = 128):
    """Draw one clip.

    Args:
      label: index into `CLASSES`.
      subject: 0 or more; decides the body, the clothes and the style.
      take: 0 or more; with the subject it decides the scene and the length.
      seed: seed of the whole data set.
      size: height and width in pixels; even and at least 32.

    Returns:
      (frames, size, size, 3) uint8 RGB at `FPS` frames per second.

    Raises:
      ValueError: an argument is out of range.
    """
    if not 0 <= label < len(CLASSES) or min(subject, take, seed) < 0:
        raise ValueError(f"there is no clip {label=}, {subject=}, {take=}, {seed=}")
    if size < 32 or size % 2:  # the codec cuts odd sizes
        raise ValueError(f"size must be even and at least 32, got {size}")

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
    rng = np.random.default_rng([_SCENE, seed, subject, take])
    n = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
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

    # 3. The motion, all frames at once: joints in pixels, y down, camera following the figure.
    motion_rng = np.random.default_rng([_MOTION, seed, subject, take, label])
    motion = _motion(CLASSES[label], seconds, style, motion_rng)
    travel = motion["speed"] * scale * seconds
    joints = {
        part: ((p * (1, -1) * scale + (middle, floor) - shake[:, None]) * 16).round().astype(int)
        for part, p in _skeleton(motion, body).items()
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

    # 4. Draw.
    clip = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        frame = cv2.getRectSubPix(canvas, (size, size), centre[i].tolist())
        for part, colours, widths in parts:
            points = joints[part][i].tolist()
            if part == "head":
                radius = round(body["head"] * scale * 16)
                cv2.circle(frame, points[0], radius, colours[0], -1, cv2.LINE_AA, 4)
            for a, b, colour, width in zip(points, points[1:], colours, widths, strict=False):
                thickness = max(1, round(width * stout * scale))
                cv2.line(frame, a, b, colour, thickness, cv2.LINE_AA, 4)
        y, x = corners[i]
        cv2.addWeighted(frame, 1, grain[y : y + size, x : x + size], 1, -128, dst=clip[i])
    return clip


def _write_text(path: Path, text: str):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def _write_clip(path: str, label: int, subject: int, take: int, seed: int, size: int):
    """Render one clip into `path`; a clip is there as a whole or not at all."""
    clip = render_clip(label, subject, take, seed=seed, size=size)
    temporary = path.removesuffix(".mp4") + ".tmp.mp4"
    codec = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(temporary, cv2.CAP_FFMPEG, codec, FPS, (size, size))
    written = writer.isOpened() and all(
        writer.write(frame[..., ::-1].copy()) is not False for frame in clip
    )
    writer.release()  # a full disk shows only now, as a file without its index
    if not written or cv2.VideoCapture(temporary).get(cv2.CAP_PROP_FRAME_COUNT) != len(clip):
        raise OSError(f"OpenCV can't write mp4v video to {temporary}: is the disk full?")
    os.replace(temporary, path)


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
         workers=None, progress=None) -> dict:  # fmt: skip
    """Write the data set into a folder; may be interrupted and called again.

    Writes videos/<split>/<class>/s<subject>_t<take>.mp4, train.txt, val.txt, test.txt ("path label"
    per line, the path relative to the folder), classes.txt and, last, dataset.json. Splits are by
    subject. The bytes don't depend on `workers`. One call at a time may write into a folder.

    Args:
      path: the folder; made if missing.
      train_subjects, val_subjects, test_subjects: subjects per split, 1 or more.
      takes: clips of each class per subject, 1 or more.
      size: height and width in pixels; even and at least 32.
      seed: seed of the whole data set.
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
    render_clip(0, 0, 0, seed=seed, size=size)  # a wrong seed or size shows before any file
    root = Path(os.path.abspath(path))
    subjects = {s: list(range(a, b)) for s, a, b in zip(SPLITS, [0, *ends], ends, strict=False)}
    settings = {
        "name": "stick-actions-10", "version": VERSION, "seed": seed, "size": size, "fps": FPS,
        "frames": list(FRAMES), "takes": takes, "subjects": subjects,
        "clips": {split: len(s) * takes * len(CLASSES) for split, s in subjects.items()},
    }  # fmt: skip

    # 1. Is this folder ours? The marker says so from before the first clip to after the last.
    finished, marker = root / "dataset.json", root / "dataset.partial.json"
    for note in (finished, marker):
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{root} was made with other settings: use a new folder or delete it")
    strange = any(p.suffix != ".tmp" for p in root.glob("*"))
    if strange and not finished.exists() and not marker.exists():
        raise ValueError(f"{root} holds something else already: use a new folder")
    jobs, texts = [], {"classes.txt": "".join(f"{name}\n" for name in CLASSES)}
    for split, members in subjects.items():
        rows = [
            (f"videos/{split}/{name}/s{subject:03d}_t{take}.mp4", label, subject, take)
            for label, name in enumerate(CLASSES) for subject in members for take in range(takes)
        ]  # fmt: skip
        jobs += [(str(root / p), *key, seed, size) for p, *key in rows]
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
