"""The command `stretchysnake`: finds the subcommand, sets the process up, and turns errors into one
sentence and an exit status.

Every subcommand is a module with main(argv) -> exit status, imported when it is called.
"""

import importlib
import os
import re
import sys
from importlib.util import find_spec

from stretchysnake_jax.config import Config, ConfigError, field_names, nearest, resolve
from stretchysnake_jax.validation import validate

# name -> (module, what it does)
COMMANDS = {
    "demo": ("stretchysnake_jax.demo", "the whole path on embedded data: render, train, evaluate"),
    "train": ("stretchysnake_jax.train", "train from a config file"),
    "evaluate": ("stretchysnake_jax.evaluate", "accuracy and cost over frame counts and sizes"),
    "compare": ("stretchysnake_jax.compare", "two evaluations: differences with intervals"),
    "predict": ("stretchysnake_jax.predict", "classify video files"),
    "ablate": ("stretchysnake_jax.ablate", "variants, methods and scales as one table"),
    "study": ("stretchysnake_jax.study", "does stretching work? models, controls, tables, figures"),
    "probe": ("stretchysnake_jax.probe_command", "linear and k-NN classifiers on frozen features"),
    "finetune": (
        "stretchysnake_jax.finetune",
        "a trained model on other data, with a sweep",
    ),
    "features": ("stretchysnake_jax.features", "embeddings of a list as a file, token maps"),
    "retrieve": ("stretchysnake_jax.retrieve", "nearest clips: recall and mAP, contact sheet"),
    "report": ("stretchysnake_jax.report", "runs as one HTML page: curves, grids, clips, costs"),
    "inspect": ("stretchysnake_jax.inspect", "buckets, or a resolved config, without running"),
    "data": (
        "stretchysnake_jax.data.commands",
        "check, show and prepare clips; make the embedded data set",
    ),
    "convert": ("stretchysnake_jax.convert", "PyTorch checkpoints to ours and back"),
    "export": ("stretchysnake_jax.export", "programs for JAX alone, safetensors, card, hub"),
    "bench": (
        "stretchysnake_jax.bench",
        "benchmarks: the selective scan, the GPU kernels, the loader",
    ),
}

USAGE = "usage: stretchysnake COMMAND ...\n\n" + "\n".join(
    f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()
)
USAGE += "\n\n'stretchysnake COMMAND --help' says what a command takes."


def parse_config(argv: list[str]) -> tuple[Config, list[str]]:
    """Takes `--config FILE[:ARG]` and `--config.a.b=VALUE` out of a command line.

    Args:
      argv: the command line.

    Returns:
      (config, the words left over). The config is validated, its recipes filled in.

    Raises:
      ConfigError: a file that can't be read, an unknown field, a value of the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    words, rest = [], []
    argv = iter(argv)
    for word in argv:
        if word == "--config":
            words.append(f"--config={next(argv, '')}")
        elif word.startswith("--config."):
            words.append(word if "=" in word else f"{word}={next(argv, '')}")
        elif word.startswith("--config="):
            words.append(word)
        else:
            rest.append(word)
    if not any(word.startswith("--config=") and word != "--config=" for word in words):
        raise ConfigError("--config is missing: it takes a config file, such as configs/k400.py")
    known = field_names(Config())
    for word in words:
        name = word.split("=")[0].removeprefix("--config").removeprefix(".")
        if name and name not in known:
            last = {k.rpartition(".")[2]: k for k in known}
            close = nearest(name, known).split("?")[0]
            if "did you mean" not in close:
                close = nearest(last.get(name.rpartition(".")[2], name), known).split("?")[0]
            hint = f"{close}?" if "did you mean" in close else "see 'stretchysnake inspect config'"
            raise ConfigError(f"unknown field --config.{name}: {hint}")
    values, before = flags.FlagValues(), sys.argv
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    try:
        sys.argv = ["stretchysnake", *words]  # ml_collections looks for overrides there
        values(sys.argv)
        config = values.config
        getattr(config, "model", None)  # where a file that could not be read raises
    except Exception as error:  # whatever a config file raises, and the flags' own errors
        raise ConfigError(_flag_error(error)) from error
    finally:
        sys.argv = before
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() returned {type(config).__name__}: it takes a Config")
    validate(config)
    config.data, config.optim = resolve(config.data), resolve(config.optim)
    return config, rest


def _flag_error(error: Exception) -> str:
    """One sentence from an error of config_flags, which quotes whole tracebacks."""
    text = str(error).strip()
    missing = re.search(r"No such file or directory: '([^']*)'", text)
    if missing:
        return f"no config file at {missing[1]}: it takes a path such as configs/k400.py"
    if "Traceback" in text:
        return f"the config file fails: {text.splitlines()[-1]}"
    if isinstance(error, SyntaxError):
        return f"the config file fails: {text}"
    value = re.match(r"flag (--[\w.]+)=(.*?): (.*)", text, re.DOTALL)
    return f"{value[1]} can't be {value[2]!r}: {value[3]}" if value else text


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        import stretchysnake_jax

        print(stretchysnake_jax.__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"unknown command {argv[0]!r}: {nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    if find_spec("jax_cuda13_plugin") and not find_spec("nvidia"):
        # The extra [aot] brings JAX's CUDA plugin alone; it would not start without the libraries.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from stretchysnake_kernels import configure_cpu

    configure_cpu()  # before anything of JAX starts
    try:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0
    except BrokenPipeError:
        return 141
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not getattr(error, "plain", False):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
