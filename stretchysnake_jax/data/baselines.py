"""What a data set gives away without a video model: five baselines for a folder with list files.

The classifier is always kernel ridge regression, its strength chosen on the validation list; the
features differ:

chance  none: the most frequent class of the training list
length  frames, height and width of the clip
colour  mean and deviation of red, green and blue
frame   gradient histograms of the middle frame
motion  where, how much and how often per second the picture changes around the figure

    python -m stretchysnake_jax.data.baselines DIR

renders the levels of Stick Actions-10 under DIR and measures what resolution and frames tell there,
see `run` and `tell_timing`; the tables are in docs/data.md.
"""

import concurrent.futures
import itertools
import os
import pathlib
import sys

import cv2
import numpy as np

from stretchysnake_jax.data import stick_actions
from stretchysnake_jax.data.decode import read_clip
from stretchysnake_jax.data.lists import read_list
from stretchysnake_jax.data.sampling import sparse_view

SIDE = 64  # clips are looked at in this many pixels a side
NOISE = 15  # grey levels of change that are put down to noise and to the camera
WINDOW = 32  # frames of the temporal spectrum


def run(path, test_list=None, side: int = SIDE, rows: int = 1) -> dict[str, float]:
    """Runs the baselines.

    Args:
      path: a folder with train.txt and val.txt and, unless `test_list` is given, test.txt.
      test_list: another list file to test on, with the classes of the folder.
      side: pixels a side that are left of the videos; they are enlarged to `SIDE` again.
      rows: of scenes in the picture; the first scene is looked at.

    Returns:
      Accuracy on the test list, 0..1, by the name of the baseline.

    Raises:
      ListError, UnreadableVideo: a list or a video can't be used.
    """
    folder = pathlib.Path(path)
    classes = read_list(folder / "train.txt").classes
    files = (folder / "train.txt", folder / "val.txt", test_list or folder / "test.txt")
    train, val, test = sets = [read_list(file, classes=classes) for file in files]
    features = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for clips in sets:
            found = list(pool.map(lambda clip: _describe(clip, side, rows), clips.paths))
            features.append({name: np.array([row[name] for row in found]) for name in found[0]})
    most = np.bincount(train.labels).argmax()
    results = {"chance": float(np.mean(test.labels == most))}
    for name in features[0]:
        x, x_val, x_test = (f[name] for f in features)
        predict = _fit(x, train.labels, x_val, val.labels, len(classes))
        results[name] = float(np.mean(predict(x_test) == test.labels))
    return results


def _describe(path: str, side: int, rows: int) -> dict[str, np.ndarray]:
    """The features of one clip, by the name of the baseline."""
    size = []

    def shrink(frame):
        size[:] = frame.shape[:2]
        small = cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA)
        small = small[: side // rows, : side // rows]
        return cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)

    frames, count = read_clip(path, np.arange, shrink)
    grey = frames.mean(-1, dtype=np.float32)  # (n, SIDE, SIDE)
    return {
        "length": np.array([count, *size], np.float32),
        "colour": np.concatenate([frames.mean((0, 1, 2)), frames.std((0, 1, 2))]),
        "frame": describe_frame(grey[count // 2]),
        "motion": describe_motion(grey),
    }


def describe_frame(image: np.ndarray, cells: int = 8, bins: int = 9) -> np.ndarray:
    """Gradient histograms by cell: grey float32 (h, w) -> (cells * cells * bins,)."""
    dx, dy = cv2.Sobel(image, cv2.CV_32F, 1, 0), cv2.Sobel(image, cv2.CV_32F, 0, 1)
    which = (np.arctan2(dy, dx) % np.pi / np.pi * bins).astype(int) % bins
    votes = np.hypot(dx, dy)[..., None] * (which[..., None] == np.arange(bins))
    h, w = image.shape
    grid = votes.reshape(cells, h // cells, cells, w // cells, bins).sum((1, 3))
    energy = cv2.blur((grid**2).sum(-1), (3, 3))
    return (grid / np.sqrt(energy + 1e2)[..., None]).ravel().astype(np.float32)


def describe_motion(video: np.ndarray) -> np.ndarray:
    """Maps and spectra of the change in a box that follows it: float32 (n, h, w) -> (318,)."""
    if len(video) < 3:
        video = np.repeat(video, 3, axis=0)
    change = np.maximum(abs(video[2:] - video[:-2]) - NOISE, 0)  # (n - 2, h, w)
    # 1. The figure: the smoothed centre of the change, and its size over the whole clip.
    grid = np.stack(np.mgrid[: video.shape[1], : video.shape[2]], -1).astype(np.float32)  # y, x
    mass = change.sum((1, 2)) + 1e-3
    centre = np.einsum("nhw,hwc->nc", change, grid) / mass[:, None]
    weights = np.stack([mass, mass], -1)
    smooth = cv2.blur(centre * weights, (1, 9)) / cv2.blur(weights, (1, 9))
    square = np.einsum("nhw,hwc->c", change, grid**2) - (centre**2 * mass[:, None]).sum(0)
    spread = np.sqrt(np.maximum(square, 0) / mass.sum()).max() + 1
    # 2. Change and picture in that box, 16x16.
    scale = 16 / (5 * spread)
    box = np.empty((2, len(change), 16, 16), np.float32)
    for i, (y, x) in enumerate(smooth):
        affine = np.array([[scale, 0, 8 - scale * x], [0, scale, 8 - scale * y]])
        for k, image in enumerate((change[i], video[i + 1])):
            blurred = cv2.blur(image, (3, 3))
            box[k, i] = cv2.warpAffine(blurred, affine, (16, 16), borderMode=cv2.BORDER_REPLICATE)
    moved, seen = box[0], (box[1] - box[1].mean()) / (box[1].std() + 1)
    # 3. Where: mean and deviation over time. How often: power in octaves of frequency, by cell.
    where = [_pool(moved.mean(0), 8), _pool(moved.std(0), 8), _pool(seen.std(0), 8)]
    where = [m.ravel() / (np.linalg.norm(m) + 1e-3) for m in where]
    often = [_spectrum(_pool(seen, 4).reshape(len(seen), -1)), _spectrum(centre / spread)]
    return np.concatenate([*where, *(np.log(s + 1e-3).ravel() for s in often)]).astype(np.float32)


def _pool(image: np.ndarray, cells: int) -> np.ndarray:
    """Means over cells of the last two axes."""
    *lead, h, w = image.shape
    return image.reshape(*lead, cells, h // cells, cells, w // cells).mean((-3, -1))


def _spectrum(series: np.ndarray) -> np.ndarray:
    """(n, c) over time -> (bands, c): power in bands of frequency, mean over windows."""
    if len(series) < WINDOW:
        series = np.pad(series, ((0, WINDOW - len(series)), (0, 0)), mode="reflect")
    starts = np.unique(np.linspace(0, len(series) - WINDOW, 4).astype(int))
    windows = np.stack([series[s : s + WINDOW] for s in starts])
    windows = (windows - windows.mean(1, keepdims=True)) * np.hanning(WINDOW)[:, None]
    power = (abs(np.fft.rfft(windows, axis=1)) ** 2).mean(0)
    bands = itertools.pairwise((1, 2, 3, 4, 6, 8, 12, 17))
    return np.stack([power[a:b].mean(0) for a, b in bands])


def _fit(x, y, x_val, y_val, classes: int):
    """Kernel ridge regression onto one-hot labels; returns a function features -> labels."""
    mean, std = x.mean(0), x.std(0) + 1e-6

    def kernel(a):
        a, b = (a - mean) / std, (x - mean) / std
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return np.exp(-np.maximum(squares, 0) / (2 * b.shape[1]))

    gram, gram_val, best = kernel(x), kernel(x_val), (-1.0, None)
    target = np.eye(classes)[y] - 1 / classes
    for strength in 10.0 ** np.arange(-4, 3):
        weights = np.linalg.solve(gram + strength * np.eye(len(x)), target)
        accuracy = np.mean((gram_val @ weights).argmax(1) == y_val)
        best = max(best, (accuracy, weights), key=lambda pair: pair[0])
    return lambda z: (kernel(z) @ best[1]).argmax(1)


SIZES, FRAMES = (28, 56, 112), (2, 4, 8, 16)  # that the levels are measured at


def tell_timing(timing: int, people: int = 400, neighbours: int = 5) -> dict[int, float]:
    """How well the classes of a `timing` level can be told from the joints of a few frames.

    An observer who sees every joint, but neither the length of the clip nor its frame rate: the
    nearest neighbours, by the places of all joints in all frames, among other subjects' clips.

    Args:
      timing: the level; 0 is Stick Actions-10 itself.
      people: subjects of the clips that are compared with, one clip of each class per subject.
      neighbours: clips that vote.

    Returns:
      Accuracy 0..1 on 40 other subjects by number of frames: 1 and those of `FRAMES`.
    """
    labels, series = [], []
    for subject in range(people + 40):
        for label in range(len(stick_actions.classes(timing=timing))):
            # The smallest picture: joints are known to a sixteenth of a pixel.
            clip = stick_actions.prepare_clip(label, subject, 0, size=32, timing=timing)
            joints = np.concatenate(list(clip.joints.values()), 1).astype(np.float32)
            series.append((joints - joints.mean((0, 1))) / joints[..., 1].std())
            labels.append(label)
    labels, known, result = np.array(labels), people * len(set(labels)), {}
    for frames in (1, *FRAMES):
        x = np.stack([s[sparse_view(len(s), frames, 0, 1)].ravel() for s in series])
        near, x = x[:known], x[known:]
        far = (near**2).sum(1) - 2 * x @ near.T  # (tests, known), less a constant by row
        closest = np.argpartition(far, neighbours, 1)[:, :neighbours]
        votes = np.eye(labels.max() + 1)[labels[:known][closest]].sum(1)
        result[frames] = float(np.mean(votes.argmax(1) == labels[known:]))
    return result


def main(argv: list[str]) -> int:
    """Renders and measures all levels; prints the tables, accuracies in %."""
    if len(argv) != 1:
        raise SystemExit("usage: python -m stretchysnake_jax.data.baselines DIR")
    people = dict(train_subjects=40, val_subjects=8, test_subjects=16, takes=1)
    levels = [(0, 0), *((d, 0) for d in (1, 2, 3)), *((0, t) for t in (1, 2, 3))]
    for detail, timing in levels:
        folder = pathlib.Path(argv[0]) / f"detail{detail}_timing{timing}"
        stick_actions.make(folder, **people, detail=detail, timing=timing)
        name = f"detail {detail}, timing {timing}"
        for side in (SIDE,) if timing else SIZES:
            shown = run(folder, side=side, rows=detail + 1)
            shown = ", ".join(f"{k} {100 * v:.1f}" for k, v in shown.items())
            print(f"{name}, {side} px: {shown}", flush=True)
        if not detail:
            shown = [f"{frames}: {100 * v:.1f}" for frames, v in tell_timing(timing).items()]
            print(f"{name}, joints by frames: {', '.join(shown)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
