"""The command `stretchysnake predict`: the most likely classes of any video file."""

import argparse
import json
import pathlib
import sys

import numpy as np

from stretchysnake_jax import flops, grid
from stretchysnake_jax import model as model_lib
from stretchysnake_jax.buckets import Bucket, make_bucket
from stretchysnake_jax.config import ConfigError, DataConfig
from stretchysnake_jax.data import decode
from stretchysnake_jax.evaluate import parse_budget, parse_scale


def best_scale(
    model: model_lib.Model, path: pathlib.Path, max_gflops: float
) -> tuple[Bucket, dict[str, str]]:
    """The cell of an evaluated grid with the highest top-1 within a budget.

    Args:
      model: what was evaluated.
      path: of the grid, without suffix.
      max_gflops: of one forward pass, by the full count of `flops.count`.

    Returns:
      (its bucket, the methods of interpolation that it was evaluated with, by weight).

    Raises:
      ConfigError: no grid is there, or no cell of it is within the budget.
    """
    cells = []
    for row in grid.read(path):
        size = row["height"], row["width"]
        bucket = make_bucket(
            model.methods.variant, row["frames"], size, model.config, grid.patch_of(row)
        )
        cost = flops.count(model.config, bucket)["full"] / 1e9
        cells.append({**row, "gflops": cost, "bucket": bucket})
    cheapest = min(cells, key=lambda cell: cell["gflops"])
    if cheapest["gflops"] > max_gflops:
        raise ConfigError(
            f"--max-gflops is {max_gflops:g}, but the cheapest cell of {path}.json, "
            f"{cheapest['bucket']}, takes {cheapest['gflops']:.3g}: evaluate fewer frames or "
            "smaller sizes"
        )
    cell = grid.best([cell for cell in cells if cell["gflops"] <= max_gflops])
    return cell["bucket"], cell["methods"]


def main(argv: list[str]) -> int:
    """The command `stretchysnake predict`."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake predict",
        description="Classifies video files and folders of frames. One that can't be read is named "
        "with the reason, the others are answered, and the exit status is 1.",
    )
    parser.add_argument("--workdir", required=True, help="a trained run, a .pth or a .npz file")
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--frames", help="frames of a clip; default: by the nearest trained bucket")
    parser.add_argument("--size", help="pixels, such as 112 or 112x196; default: likewise")
    parser.add_argument(
        "--max-gflops",
        type=float,
        metavar="X",
        help="see clips at the scale that was best within X GFLOPs when the run was evaluated",
    )
    parser.add_argument(
        "--grid", default="grid", help="the evaluation --max-gflops looks at (default grid)"
    )
    parser.add_argument("--top", type=int, default=5, help="classes named per video (default 5)")
    parser.add_argument("--checkpoint", default="latest", help="latest (default), best or a step")
    parser.add_argument("--json", action="store_true", help="one JSON object per video")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise ConfigError(f"--top is {args.top}: it takes a number >= 1")
    model = model_lib.load(args.workdir, checkpoint=args.checkpoint)
    data = model.run.data if model.run else DataConfig()
    names = model.classes or [str(i) for i in range(model.config.num_classes)]
    frames, size = parse_scale(args, "a clip is seen at one scale")

    chosen, methods = None, None
    if args.max_gflops is not None:
        parse_budget(args.max_gflops)
        if frames or size:
            raise ConfigError(
                "--max-gflops chooses the scale: it takes neither --frames nor --size"
            )
        if model.run is None:
            raise ConfigError(
                f"--max-gflops takes the workdir of a run that was evaluated, not {args.workdir}"
            )
        path = pathlib.Path(args.workdir) / args.grid
        chosen, methods = best_scale(model, path, args.max_gflops)

    def choose(height, width):
        return chosen or model.nearest_bucket(height, width, frames, size)

    if frames or size:
        choose(*model.config.size)  # refuses impossible scales before any video is opened
    failed = 0
    for path in args.videos:
        try:
            clip, bucket = model_lib.read_video(path, data, choose)
        except decode.UnreadableVideo as error:
            failed += 1
            if args.json:
                print(json.dumps({"video": path, "error": error.reason}), flush=True)
            print(f"{path}: {error.reason}", file=sys.stderr)
            continue
        pinned = model.stretch(
            frames=bucket.frames,
            size=(bucket.height, bucket.width),
            patch=bucket.patch,
            method=methods,
        )
        chances = np.asarray(pinned.predict(clip[None])[0])
        top = np.argsort(-chances, kind="stable")[: args.top]
        if args.json:
            found = [{"class": names[i], "probability": round(float(chances[i]), 6)} for i in top]
            scale = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
            print(json.dumps({"video": path, **scale, "top": found}), flush=True)
        else:
            print(f"{path}  ({bucket.frames} frames at {bucket.height}x{bucket.width})")
            for i in top:
                print(f"  {100 * chances[i]:5.1f} %  {names[i]}")
    return 1 if failed else 0
