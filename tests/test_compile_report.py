"""What a training step takes, from compiling it."""

import dataclasses
import json

import pytest
from stretchysnake_bench import aot

from stretchysnake_jax import cli, compile, compile_report, config
from stretchysnake_jax.step import init_state

needs_compiler = pytest.mark.skipif(
    aot.missing_packages() is not None, reason=str(aot.missing_packages())
)


def test_one_row_per_bucket_and_one_compilation_per_trunk(tiny_config, monkeypatch):
    compiled = []

    def count(function, *args):
        compiled.append(function.__name__)
        return compile_program(function, *args)

    compile_program = compile.compile_program
    monkeypatch.setattr(compile, "compile_program", count)
    rows = list(compile_report.measure(tiny_config))
    assert [(c.bucket.frames, c.bucket.height) for c in rows] == [(2, 8), (2, 16), (2, 24)]
    found = rows[0]
    assert all(other.temporary == found.temporary for other in rows)
    assert sorted(compiled) == ["project"] * 3 + ["train_step"]  # static tokens: one trunk
    # Parameters, two moments, and two step counts.
    state = init_state(tiny_config, 1)
    assert found.state == compile_report.size(state) > 3 * compile_report.size(state["params"])
    assert found.clips == 3 * (2 * 16 * 16 * 3 + 2) * 4
    assert found.total > found.temporary > found.clips


@pytest.mark.slow
def test_memory_grows_linearly_with_the_batch(tiny_config):
    def temporary(batch_size):
        tiny_config.data = dataclasses.replace(tiny_config.data, batch_size=batch_size)
        return next(compile_report.measure(tiny_config)).temporary

    small, large = temporary(32), temporary(64)
    assert 1.5 < large / small < 2.1


@pytest.mark.slow
def test_the_command(tiny_config_file, capsys):
    argv = ["inspect", "compile", "--config", str(tiny_config_file)]
    assert cli.main([*argv, "--implementations", "xla,reference"]) == 0
    table = capsys.readouterr().out
    assert "xla  reference" in table and "2x24x24/6" in table
    for more, words in (
        (["--implementations", "xls"], "--implementations has 'xls'"),
        (["--implementations", "pallas"], "pallas: runs on GPUs, the default device is a cpu"),
        (["--device", "h1000"], "h1000"),
    ):
        assert cli.main(argv + more) == 2
        assert words in capsys.readouterr().err
    assert cli.main(argv[:2]) == 2
    assert "--config is missing" in capsys.readouterr().err


@needs_compiler
@pytest.mark.slow
def test_our_kernels_need_less_memory_on_a_gpu(tiny_config):
    tiny_config.model.dim, tiny_config.model.depth, tiny_config.model.state = 64, 4, 16
    tiny_config.stretch.frames, tiny_config.train.dtype = (8,), "bfloat16"
    tiny_config.stretch.sizes = (56,)
    tiny_config.model.size = (56, 56)

    def temporary(implementation):
        return next(compile_report.measure(tiny_config, "h100", implementation)).temporary

    ours = temporary("pallas")
    assert ours < 0.6 * temporary("xla")
    assert ours < 0.1 * temporary("reference")


def test_a_batch_that_fits_is_suggested(tiny_config):
    cost = next(compile_report.measure(tiny_config))
    assert cost.fits and cost.flops > 0
    tight = dataclasses.replace(cost, limit=int(cost.total / compile_report.USABLE) + 1)
    assert tight.fits and tight.suggested_batch() == cost.batch
    assert tight.suggested_batch(2) == cost.batch // 2 * 2
    over = dataclasses.replace(tight, limit=tight.limit - 2)
    assert not over.fits and over.suggested_batch() == cost.batch - 1
    none = dataclasses.replace(cost, limit=cost.state)
    assert none.suggested_batch() == 0
    unknown = dataclasses.replace(cost, limit=None)
    assert unknown.fits is None and unknown.suggested_batch() is None


@pytest.mark.slow
def test_the_benchmark_of_plans(monkeypatch, tmp_path, capsys):
    small = {"dim": 16, "depth": 1, "state": 4, "patch": (4, 4), "frames": 2, "size": (8, 8)}
    monkeypatch.setitem(config.PRESETS, "tiny", small | {"num_classes": 6, "dt_rank": 1})
    path = tmp_path / "compile.json"
    words = ["bench", "compile", "--frames", "2", "--sizes", "8", "--json", str(path)]
    assert cli.main(words) == 0
    assert "tiny, static_tokens, 1 buckets, batch 1" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["programs"] for row in rows] == [2, 2, 1, 1]  # a stem and a trunk; a step
    assert all(row["seconds"] >= row["longest"] > 0 for row in rows)


def test_bad_words_for_the_benchmark_of_plans(capsys):
    for more, words in (
        (["--variant", "static"], "did you mean 'static_tokens'"),
        (["--frames", "x"], "--frames and --sizes take numbers"),
        (["--json", "no/such.json"], "there is no folder no"),
    ):
        try:
            assert cli.main(["bench", "compile", *more]) == 2
        except SystemExit as ended:
            assert ended.code == 2
        assert words in capsys.readouterr().err
