"""The command `stretchysnake export`: a model for others to run, with a card, and onto the hub.

A .jaxexport file is what `jax.export` serialises: the StableHLO of the whole forward pass at one
bucket, weights inside, for any batch. It runs where JAX alone is. So the scan in it is the one in
plain JAX ("xla"): kernels of our own are custom calls that need this package and, on a GPU, that
kind of GPU, and that `jax.export` does not vouch for.
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from stretchysnake_kernels import dispatch

from stretchysnake_jax import card, convert, grid, models
from stretchysnake_jax import model as model_lib
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.clock import Clock, Progress
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.retrieve import parse_cells
from stretchysnake_jax.whole_file import whole_file

FORMATS = ("stablehlo", "safetensors")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SAFETENSORS = "model.safetensors"
ABOUT = "export.json"
CARD = "README.md"
# Each comes with the extra [export]. jax.export writes and reads its files with flatbuffers.
PACKAGES = {"stablehlo": "flatbuffers", "safetensors": "safetensors"}


class PushFailed(RuntimeError):
    """The hub did not take the files; the message is for the user."""

    plain = True


def file_name(bucket: Bucket) -> str:
    """The file of a bucket, such as 8x112x112.jaxexport."""
    return f"{bucket.frames}x{bucket.height}x{bucket.width}.jaxexport"


def make_exported(
    model: model_lib.Model, bucket: Bucket, platforms: tuple[str, ...]
) -> jax.export.Exported:
    """The forward pass at a bucket as StableHLO, in float32.

    It takes uint8 (batch, frames, height, width, 3), RGB, and returns probabilities, float32
    (batch, num_classes), and features, float32 (batch, dim), as `Model.predict` and
    `Model.features`. Weights are constants of it, interpolated to the bucket already.

    Args:
      model: loaded.
      bucket: the scale.
      platforms: some of PLATFORMS; none of them has to be there.
    """
    stretched = model.stretch(
        frames=bucket.frames, size=(bucket.height, bucket.width), patch=bucket.patch
    )
    params = jax.tree.map(np.asarray, stretched.fitted_params)
    # As `models.VideoMamba` chooses for the platform at hand, which is not the one in question.
    layers = "unrolled" if platforms == ("cpu",) else "loop"
    apply, head = models.make_apply(model.config, layers=layers), params["head"]

    def forward(video):  # of one clip
        video = models.normalise(video[None], model.config.normalise)
        features = apply(params, video, output="features")
        logits = features @ head["kernel"] + head["bias"]
        return {"probabilities": jax.nn.softmax(logits[0]), "features": features[0]}

    (batch,) = jax.export.symbolic_shape("batch")
    video = jax.ShapeDtypeStruct((batch, *bucket.shape), jnp.uint8)
    # Over clips by vmap: the scan chooses its arithmetic by how much state there is, which it can't
    # where the batch is a symbol.
    exported = jax.export.export(jax.jit(jax.vmap(forward)), platforms=platforms)
    with dispatch.prefer("xla"), _without_locations():
        return exported(video)


@contextlib.contextmanager
def _without_locations():
    """While it lasts, what is traced does not hold where its source files lie on this machine."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def write(
    model: model_lib.Model,
    out: pathlib.Path,
    buckets: list[Bucket],
    platforms: tuple[str, ...],
    formats: tuple[str, ...],
    on_file=None,
) -> tuple[list[str], dict]:
    """Writes the files of a model, and `export.json`, which says what they are.

    Args:
      model: loaded.
      out: the folder, made if it isn't there.
      buckets: those that get a .jaxexport file.
      platforms: that these run on.
      formats: some of FORMATS.
      on_file: called with the name of each file and how many are done, before it is made.

    Returns:
      (the names of the files, `export.json` last; what that one holds).
    """
    out.mkdir(parents=True, exist_ok=True)
    files, on_file = [], on_file or (lambda name, done: None)
    about = {
        "input": "uint8 (batch, frames, height, width, 3), RGB",
        "outputs": {
            "probabilities": f"float32 (batch, {model.config.num_classes})",
            "features": f"float32 (batch, {model.config.dim})",
        },
        "classes": model.classes,
        "stablehlo": [],
        "safetensors": None,
    }
    for bucket in buckets if "stablehlo" in formats else ():
        name = file_name(bucket)
        on_file(name, len(files))
        exported = make_exported(model, bucket, platforms)
        with whole_file(out / name) as part:
            part.write_bytes(exported.serialize())
        files.append(name)
        about["stablehlo"].append(
            {
                "file": name,
                **grid.place(bucket),
                "platforms": list(platforms),
                "jax": jax.__version__,
                "calling_convention": exported.calling_convention_version,
            }
        )
    if "safetensors" in formats:
        on_file(SAFETENSORS, len(files))
        params = jax.tree.map(np.asarray, model.params)
        path = out / SAFETENSORS
        convert.save_safetensors(path, model.config, params, model.classes, model.methods)
        files.append(SAFETENSORS)
        about["safetensors"] = SAFETENSORS
    with whole_file(out / ABOUT) as part:
        part.write_text(json.dumps(about, indent=1) + "\n")
    return [*files, ABOUT], about


def find_hub(repository: str):
    """The hub's client, before anything is computed.

    Raises:
      ConfigError: no name of a repository, huggingface_hub isn't installed, or there is no token.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push is {repository!r}: it takes OWNER/NAME")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            "--push takes the package huggingface_hub, which isn't installed: "
            "pip install 'stretchysnake-jax[hub]'"
        ) from error
    if not huggingface_hub.get_token():
        raise ConfigError(
            "--push finds no token for the Hugging Face hub: log in with 'hf auth login', or set "
            "HF_TOKEN"
        )
    return huggingface_hub.HfApi()


def push(hub, repository: str, out: pathlib.Path, files: list[str], private: bool) -> str:
    """Uploads these files of a folder, and nothing else of it.

    Args:
      hub: of `find_hub`.
      repository: OWNER/NAME; made if it isn't there.
      out: the folder.
      files: their names.
      private: of a repository that is made.

    Returns:
      The address of the repository.

    Raises:
      PushFailed: the hub refused, or can't be reached.
    """
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=str(out),
            allow_patterns=files,
            commit_message="stretchysnake export",
        )
    except Exception as error:  # the client's own errors and those of its HTTP library, by version
        text = " ".join(str(error).split())
        raise PushFailed(f"{repository} was not pushed, {out} is complete: {text}") from error
    return str(address)


def _some_of(text: str, option: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Reads "cpu,cuda"; raises ConfigError that names what is none of `known`."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in known:
            raise ConfigError(f"{option} holds {word!r}: it takes {', '.join(known)}")
    return words


def _check_target(out: pathlib.Path, formats: tuple[str, ...]) -> None:
    """Raises ConfigError for what would fail late, or destroy what isn't ours."""
    for name in formats:
        package = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--format {name} takes the package {package}, which isn't installed: "
                "pip install 'stretchysnake-jax[export]'"
            )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out is {out}, a file: it takes a folder")
    path = out / CARD
    if path.exists() and card.MARK not in path.read_text(errors="replace"):
        raise ConfigError(f"{path} is no model card of this command: --out takes another folder")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stretchysnake export",
        description="Writes a model for others to run: a program per bucket that JAX alone runs "
        "(NAME.jaxexport, StableHLO with the weights inside, any batch), the weights as "
        f"{SAFETENSORS}, and a model card, {CARD}. The programs hold the scan in plain JAX, not "
        "our C++ and GPU kernels, which would tie them to this package and to one kind of GPU.",
    )
    add = parser.add_argument
    text = "a trained run, or a .pth, .npz or .safetensors file"
    add("--workdir", required=True, help=text)
    add("--out", required=True, metavar="DIR", help="the folder to write")
    text = "FRAMESxSIZE or FRAMESxHEIGHTxWIDTH of each program; default: the model's base scale"
    add("--buckets", metavar="8x112,...", help=text)
    text = f"that one program runs on, of {', '.join(PLATFORMS)} (default cpu,cuda)"
    add("--platforms", default="cpu,cuda", help=text)
    add("--format", default=",".join(FORMATS), help=f"default {','.join(FORMATS)}")
    add("--checkpoint", default="latest", help="latest (default), best or a step")
    add("--grid", default="grid", help="the evaluation that the card shows (default grid)")
    text = "of the weights, as the hub names it (default apache-2.0)"
    add("--license", default="apache-2.0", metavar="ID", help=text)
    text = "upload the files to this repository of the Hugging Face hub, made if it isn't there"
    add("--push", metavar="OWNER/NAME", help=text)
    add("--private", action="store_true", help="a repository that --push makes is private")
    return parser


def main(argv: list[str]) -> int:
    """The command `stretchysnake export`."""
    args = _parser().parse_args(argv)
    out, workdir = pathlib.Path(args.out), pathlib.Path(args.workdir)
    formats = _some_of(args.format, "--format", FORMATS)
    platforms = _some_of(args.platforms, "--platforms", PLATFORMS)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise ConfigError(f"--license is {args.license!r}: it takes a name such as apache-2.0")
    if args.private and not args.push:
        raise ConfigError("--private is for --push OWNER/NAME, which is missing")
    hub = find_hub(args.push) if args.push else None
    _check_target(out, formats)
    model, progress = model_lib.load(workdir, checkpoint=args.checkpoint), Progress()
    base = model.config.frames or 1, model.config.size
    buckets = [model.stretch(frames=base[0], size=base[1]).bucket]
    if args.buckets:
        buckets = parse_cells(args.buckets, model, "--buckets")
        if "stablehlo" not in formats:
            raise ConfigError(f"--buckets is for --format stablehlo, not {args.format}")
    rows = None
    if workdir.is_dir() and (workdir / f"{args.grid}.json").exists():
        rows = grid.read(workdir / args.grid)
    elif args.grid != "grid":
        raise ConfigError(f"--grid is {args.grid}, but there is no {workdir / args.grid}.json")

    clock = Clock(len(buckets) * ("stablehlo" in formats) + ("safetensors" in formats))

    def on_file(name, done):
        clock.advance(done)
        progress.show(f"writing {name}: {done}/{clock.total} files done, {clock.left} left")

    files, about = write(model, out, buckets, platforms, formats, on_file)
    progress.close()
    name = args.push.partition("/")[2] if args.push else None
    with whole_file(out / CARD) as part:
        part.write_text(card.make(model, about, name=name, rows=rows, licence=args.license))
    files.append(CARD)
    for file in files:
        print(f"{out / file}  {(out / file).stat().st_size / 2**20:.2f} MiB")
    if hub:
        print(f"pushed to {push(hub, args.push, out, files, args.private)}")
    return 0
