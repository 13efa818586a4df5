"""Configurations: validation, JSON, the command line, and the files under configs/."""

import dataclasses
import pathlib

import pytest

from stretchysnake_jax import cli, validation
from stretchysnake_jax import config as config_lib
from stretchysnake_jax.buckets import training_buckets
from stretchysnake_jax.config import VARIANTS, Config, ConfigError, DataConfig, TrainConfig

ROOT = pathlib.Path(__file__).parent.parent
STICK = str(ROOT / "configs" / "stick_actions.py")


def valid():
    return Config(data=DataConfig(train="x.txt"), train=TrainConfig(steps=1))


def test_json_round_trip(tmp_path):
    config = valid()
    config.stretch.sizes, config.optim.clip_norm = (98, 126), 1.0
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.load(tmp_path / "config.json") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("stretch.variant", "static", "did you mean 'static_tokens'?"),
        ("stretch.kernel_method", "bicubic", "it takes: paper, pi, area"),
        ("stretch.frames", (), "at least one frame count"),
        ("stretch.sizes", (98, 0), "whole numbers >= 1"),
        ("model.size", (224,), "two whole numbers"),
        ("model.size", (220, 224), "multiple of the patch, 16; the nearest is 224"),
        ("model.pooling", "max", "it takes: cls, mean"),
        ("model.drop_path", 1.0, "0 up to 1"),
        ("model.frames", None, "a frame count"),
        ("model.depth", 0, "a number >= 1"),
        ("data.train", "", "the path of a list file"),
        ("data.batch_size", 0, "a number >= 1"),
        ("data.crop_scale", 1.5, "above 0, up to 1"),
        ("data.crop_area", 0.0, "above 0, up to 1"),
        ("data.recipe", "videomama", "did you mean 'videomamba'?"),
        ("data.sampling", "dence", "did you mean 'dense'?"),
        ("data.resize", "random", "did you mean 'random_resized'?"),
        ("data.stride", 0, "a number >= 1"),
        ("data.erase", 1.5, "a chance from 0 to 1"),
        ("data.mixup", -1.0, "or 0 for off"),
        ("data.rand_augment", "rand-m9-n2", "rand-m<magnitude 0-10>"),
        ("data.rand_augment", "rand-m11-n2-inc1", "rand-m<magnitude 0-10>"),
        ("data.colour_jitter", (0.4,), "(brightness, contrast, saturation, hue)"),
        ("data.batch_size", 7, "a multiple of data.repeats, 2"),
        ("data.test_clips", 4, "1 with data.sampling = 'uniform'"),
        ("data.test_crops", 3, "1 with data.resize = 'squash'"),
        ("optim.warmup", 1.0, "share of the steps"),
        ("train.epochs", 3.0, "one number > 0 and one 0"),
        ("train.dtype", "float16", "float32, bfloat16"),
        ("train.seed", -1, "a whole number >= 0"),
    ],
)
def test_what_cannot_run_is_refused_by_name(field, value, words):
    config = valid()
    validation.validate(config)
    part, name = field.split(".")
    if name == "batch_size":
        config.data.repeats = 2
    if name.startswith("test_"):
        config.data.recipe = "plain"
    setattr(getattr(config, part), name, value)
    with pytest.raises(ConfigError) as error:
        validation.validate(config)
    assert field.split(".")[1] in str(error.value) and words in str(error.value)


def test_the_command_line_overrides_fields():
    words = ["--config", f"{STICK}:debug", "--config.stretch.sizes=(28,56)", "--workdir", "w"]
    words += ["--config.model.drop_path", "0.25", "--config.stretch.variant=vanilla"]
    config, rest = cli.parse_config(words)
    assert config.stretch.sizes == (28, 56) and config.model.drop_path == 0.25
    assert config.stretch.variant == "vanilla" and config.train.steps == 6
    assert rest == ["--workdir", "w"]


def test_a_recipe_is_one_word_and_fields_beside_it_win():
    words = ["--config", f"{ROOT}/configs/k400.py", "--config.data.recipe=videomamba"]
    data = cli.parse_config([*words, "--config.data.mixup=0", "--config.data.flip=0.25"])[0].data
    assert data.rand_augment == "rand-m7-n4-mstd0.5-inc1" and data.resize == "random_resized"
    assert (data.mixup, data.flip, data.cutmix, data.sampling) == (0.0, 0.25, 1.0, "sparse")
    data = cli.parse_config(words[:2])[0].data
    assert (data.sampling, data.resize, data.flip, data.mixup) == ("uniform", "squash", 0.0, 0.0)
    data = cli.parse_config(["--config", STICK])[0].data
    assert (data.sampling, data.resize, data.flip, data.repeats) == ("sparse", "crop", 0.5, 1)


@pytest.mark.parametrize(
    "words, text",
    [
        ([], "--config is missing"),
        (["--config=nowhere.py"], "no config file at"),
        ([f"--config={STICK}:fast"], "unknown argument 'fast'"),
        ([f"--config={STICK}", "--config.train.stesp=3"], "did you mean 'train.steps'?"),
        ([f"--config={STICK}", "--config.optim.lr=3"], "unknown field --config.optim.lr"),
        ([f"--config={STICK}", "--config.steps=3"], "did you mean 'train.steps'?"),
        (
            [f"--config={STICK}", "--config.train.steps=many"],
            "--config.train.steps can't be 'many'",
        ),
        ([f"--config={STICK}", "--config.stretch.variant=static"], "did you mean 'static_tokens'"),
        ([f"--config={ROOT}/pyproject.toml"], "the config file fails"),
    ],
)
def test_a_typo_gives_one_sentence(words, text):
    with pytest.raises(ConfigError) as error:
        cli.parse_config(words)
    message = str(error.value)
    assert text in message and "\n" not in message and "Traceback" not in message


def test_commands(capsys):
    assert cli.main(["--help"]) == 0 and "evaluate" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2 and "did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("0.")
    assert cli.main(["train", "--workdir", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --config is missing")
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(cli.main([command, "--help"]))
        assert stop.value.code == 0 and "usage: stretchysnake" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
def test_k400_has_every_variant(variant):
    config, _ = cli.parse_config(["--config", f"{ROOT}/configs/k400.py:{variant}"])
    assert config.stretch.variant == variant and config.model.num_classes == 400
    assert training_buckets(config.stretch, config.model)
    assert config.model.dim == 576 and config.model.depth == 32


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.py")))
def test_every_config_file_is_valid_and_imports_the_config_alone(name):
    path = ROOT / "configs" / f"{name}.py"
    for suffix in ("", ":debug"):
        config, _ = cli.parse_config(["--config", f"{path}{suffix}"])
        assert dataclasses.is_dataclass(config)
    imports = [
        line for line in path.read_text().splitlines() if line.startswith(("import", "from"))
    ]
    assert all(line.startswith("from stretchysnake_jax.config import") for line in imports)


def test_field_names_are_all_leaves():
    names = config_lib.field_names(Config())
    assert "data.stick_actions.takes" in names and "train.steps" in names and "data" not in names


def test_inspect_prints_buckets_and_configs(capsys):
    assert cli.main(["inspect", "buckets", "--variant", "flex_all"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "224x224   16x16" in line)
    assert row.split()[:5] == ["8", "224x224", "16x16", "14x14", "1569"] and "100.64" in row
    assert cli.main(["inspect", "config", "--config", f"{STICK}:debug"]) == 0
    assert '"short_first": 0.45' in capsys.readouterr().out
    assert cli.main(["inspect", "buckets", "--variant", "flexall"]) == 2
    assert "did you mean 'flex_all'?" in capsys.readouterr().err
