"""Contact sheets of a report: some right and some wrong clips, in pictures inside the page."""

import pathlib

import numpy as np

from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import Config, ConfigError
from stretchysnake_jax.data import transforms
from stretchysnake_jax.data.lists import ClipList
from stretchysnake_jax.data.show import load_strips
from stretchysnake_jax.grid import clip_names, patch_of
from stretchysnake_jax.report_charts import data_uri, locate, name_cell
from stretchysnake_jax.report_page import Html, element, missing, note

FRAMES_SHOWN = 4  # of a clip
TALLEST = 112  # pixels of a frame, so that a page stays small
GAP = 2  # pixels between frames


def sheets(
    config: Config, name: str, row: dict, clips: ClipList, count: int, on_clip
) -> list[Html]:
    """Wrong clips, then right ones, spread evenly over their list.

    Args:
      config: the run's, for sampling and transforms.
      name: of the grid.
      row: its cell, with `guesses`.
      clips: the list.
      count: of clips on each sheet, at most.
      on_clip: called after every clip read.

    Raises:
      ConfigError: none of the videos can be read.
    """
    found, pictures, lost = [], 0, {}
    bucket, names = Bucket(*locate(row), patch_of(row)), clip_names(clips)
    readable, right = row["guesses"] >= 0, row["guesses"] == clips.labels
    for title, ids in (
        ("Wrong", np.flatnonzero(readable & ~right)),
        ("Right", np.flatnonzero(readable & right)),
    ):
        cards = []
        for place in np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)):
            i = ids[place]
            strips, unreadable = load_strips(config, clips, [i], [bucket], None)
            on_clip()
            lost |= unreadable
            pictures += len(strips)
            if strips:
                picture = _picture(strips[0][1], clips.paths[i])
            else:
                picture = missing(f"unreadable now: {next(iter(unreadable.values()))}")
            label, guess = clips.classes[clips.labels[i]], clips.classes[row["guesses"][i]]
            words = [element("b", label)]
            if title == "Wrong":
                words += [" taken for ", element("b", guess, class_="wrong")]
            caption = element("figcaption", *words, element("small", names[i]))
            cards.append(element("figure", picture, caption))
        number = f"{len(cards)} of {len(ids):,}" if len(cards) < len(ids) else f"{len(ids):,}"
        found.append(element("h4", f"{title}: {number} clips"))
        found.append(element("div", *cards, class_="sheet"))
    if lost and not pictures:
        path, reason = next(iter(lost.items()))
        raise ConfigError(
            "no pictures: none of the clips could be read when this page was made, such as "
            f"{path}: {reason}; put the videos back where they were evaluated and run "
            "'stretchysnake report' again"
        )
    text = (
        f"At the best cell of {name}, {name_cell(row)}: up to {FRAMES_SHOWN} frames of a clip as "
    )
    return [note(f"{text}the model gets them; clips spread evenly over the list."), *found]


def _picture(video: np.ndarray, path: str) -> Html:
    """Some frames of a clip, uint8 (frames, height, width, 3), beside each other."""
    shown = np.linspace(0, len(video) - 1, min(len(video), FRAMES_SHOWN)).astype(int)
    shrink = min(1.0, TALLEST / video.shape[1])
    size = [max(1, round(shrink * side)) for side in video.shape[1:3]]
    gap = [(0, 0), (0, GAP), (0, 0)]
    frames = [np.pad(transforms.resize(video[t], *size), gap, constant_values=255) for t in shown]
    strip = np.hstack(frames)[:, :-GAP, ::-1]  # OpenCV writes BGR
    alt = f"{len(shown)} of {len(video)} frames of {pathlib.PurePath(path).name}"
    return element("img", src=data_uri(np.ascontiguousarray(strip), ".jpg"), alt=alt)
