"""How the figures of Stick Actions-10 move: classes by level, joint angles over time, joints in 3D.

NumPy only: spawned renderers import this module.
"""

import numpy as np

CLASSES = ("bend", "jack", "jump", "pjump", "run", "side", "skip", "walk", "wave1", "wave2")
LEVELS = 4  # of detail and of timing, 0 to 3
# Above level 0 of timing the classes are pairs <action>_<variant>. The clips of a pair share every
# random number and differ in the variant alone.
TIMING_CLASSES = (
    "jack_once", "jack_twice", "circle_out", "circle_in", "wave1_slow", "wave1_fast",
    "pjump_even", "pjump_pairs", "drill_squat", "drill_spread",
)  # fmt: skip
BEATS = (2, 4, 8)  # per clip, by level of timing
START = (0.125, 0.125, 0.4)  # beats that a clip begins before or after the first one, at most

# Cycles per second, and travel in body heights per second. `bend` is one event, not a cycle.
_FREQUENCY = dict(jump=1.3, pjump=1.6, run=1.5, side=1.7, skip=1.7, walk=0.95)  # others: 1.0
_SPEED = dict(jump=0.85, run=1.5, side=0.75, skip=1.0, walk=0.55)
_FRONTAL = ("jack", "pjump", "side", "wave1", "wave2")
# Arms that make the class move; any other arm may be held still in some pose.
_MOVING_ARMS = dict(jack=(0, 1), wave1=(0,), wave2=(0, 1), circle=(0, 1), drill=(0, 1))


def classes(timing: int = 0) -> tuple[str, ...]:
    """The ten class names of a level of timing, in the order of their labels."""
    return TIMING_CLASSES if timing else CLASSES


def motion(name: str, seconds: np.ndarray, style: dict, rng: np.random.Generator) -> dict:
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
    a = _at_rest(n, style)
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


def timed_motion(
    name: str, level: int, seconds: np.ndarray, style: dict, rng: np.random.Generator
) -> dict:
    """Joint angles over time of a class of `TIMING_CLASSES`; arguments and result as `motion`.

    The variants of a pair pass through the same poses and spend about the same share of the clip in
    each; only tempo, the order of the phases or the spread of the pauses differs. A clip begins
    near the first beat, as trimmed clips do, see `START`.

    Args:
      level: 1 to 3, sets the beats of a clip: `BEATS`.
    """
    action, variant = name.split("_")
    n, amplitude = len(seconds), rng.uniform(0.85, 1.15)
    beats = BEATS[level - 1] * rng.uniform(0.95, 1.05) * seconds / seconds[-1]
    turn = (beats + rng.uniform(-START[level - 1], START[level - 1])) / 2
    a = _at_rest(n, style)

    def pulse(turn, begin, lasts):  # 0 to 1 and back, from `begin` on, once every turn
        return np.sin(np.pi * np.clip((turn % 1 - begin) / lasts, 0, 1)) ** 2

    if action == "wave1":  # tempo: a wave per turn, or two
        low, high = rng.uniform(10, 60), rng.uniform(145, 168)
        waves = turn if variant == "slow" else 2 * turn
        a["lift"][0] = low + (high - low) * (1 - np.cos(2 * np.pi * waves)) / 2
        a["elbow"][0] = 0
    elif action == "jack":  # one slow opening, or two quick ones, then a rest as long
        opening = pulse(turn, 0, 0.5)
        if variant == "twice":
            opening = pulse(turn, 0, 0.25) + pulse(turn, 0.25, 0.25)
        a["spread"] += 26 * amplitude * opening
        a["lift"] += 10 + 145 * opening
        a["elbow"] *= 0.3
    elif action == "pjump":  # two hops and two equal rests, or two hops and one long rest
        hop = pulse(turn, 0, 0.25) + pulse(turn, 0.5 if variant == "even" else 0.25, 0.25)
        a["rise"] += 0.30 * hop
        a["hip"] += 34 * amplitude * hop
        a["knee"] -= 68 * amplitude * hop
    elif action == "circle":  # both arms go up at the sides and down in front, or the other way
        turn = turn * (1 if variant == "out" else -1) % 1
        a["lift"] = np.tile(np.where(turn < 0.5, 360 * turn, 0), (2, 1))
        a["swing"] = np.tile(np.where(turn < 0.5, 0, 360 * (1 - turn)), (2, 1))
        a["elbow"] *= 0
    else:  # drill: arms up, squat, legs apart; or arms up, legs apart, squat
        parts = [pulse(turn, k / 3, 1 / 3) for k in range(3)]
        up, squat, apart = parts if variant == "squat" else (parts[0], parts[2], parts[1])
        a["lift"] += 10 + 140 * up
        a["elbow"] *= 0.3
        a["hip"] += 52 * amplitude * squat
        a["knee"] -= 104 * amplitude * squat
        a["spread"] += 28 * amplitude * apart

    _hold_still(action, a, rng)
    if rng.uniform() < 0.5:  # the lead side is the right one
        a = {k: v[::-1] if v.ndim == 2 else v for k, v in a.items()}
    return a | {"yaw": rng.uniform(-30, 30), "speed": 0.0}


def _at_rest(n: int, style: dict) -> dict:
    """The angles of a standing figure over n frames, as `motion` returns them."""
    a = {k: np.zeros((2, n)) for k in ("hip", "spread", "knee", "swing", "lift", "elbow", "fold")}
    a |= {"lean": np.full(n, style["lean"]), "rise": np.zeros(n)}
    a["lift"] += 7
    a["elbow"] += style["elbow"]
    return a


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


def skeleton(motion: dict, body: dict) -> dict:
    """Polylines by body part, (n, points, 2): right and up in body heights, ground at 0.

    The last point of a leg is its toes.
    """
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
