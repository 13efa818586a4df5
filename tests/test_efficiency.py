"""What cells save: counts by hand, times by the machine's clock and by one of our own."""

import csv
import itertools
import json
import types

import pytest

from stretchysnake_jax import cli, efficiency, evaluate, flops, model
from stretchysnake_jax.buckets import Bucket


def test_efficiency_is_counted_and_timed_beside_the_reference(trained, capsys):
    loaded = model.load(trained)
    reference, small = Bucket(2, 24, 24, (6, 6)), Bucket(2, 8, 8, (2, 2))
    seen = []
    rows = efficiency.measure(
        loaded.run,
        loaded.params,
        [small, reference],
        reference,
        loaded.methods,
        batch_size=2,
        rounds=3,
        on_run=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 8) for i in range(1, 9)]
    assert [row["reference"] for row in rows] == [True, False]
    assert rows[0]["speedup"] == 1 and rows[0]["gflops_saved"] == 0
    for name, convention in (("gflops_saved", "full"), ("published_saved", "published")):
        counts = [flops.count(loaded.config, bucket)[convention] for bucket in (small, reference)]
        assert rows[1][name] == pytest.approx(1 - counts[0] / counts[1])
    assert 0 < rows[1]["speedup_low"] <= rows[1]["speedup"] <= rows[1]["speedup_high"]
    argv = ["evaluate", "--workdir", str(trained), "--frames", "2", "--sizes", "8", "--name", "e"]
    assert cli.main([*argv, "--efficiency", "2x24"]) == 0
    out = capsys.readouterr().out
    assert "the forward pass against 2x24x24/6" in out and "(reference)" in out
    with (trained / "e_efficiency.csv").open() as file:
        assert [list(row) for row in csv.DictReader(file)] == [list(efficiency.COLUMNS)] * 2
    default = evaluate.parse_reference("base", "static_tokens", loaded.config)
    assert default == Bucket(2, 16, 16, (4, 4))


def test_a_slow_cell_is_told_from_a_fast_one(monkeypatch, trained):
    """Times by a clock of our own: the medians and quartiles of ratios within a round."""
    loaded = model.load(trained)
    small, large = Bucket(2, 8, 8, (2, 2)), Bucket(2, 16, 16, (4, 4))
    now = itertools.count()
    took = {8: 1.0, 16: 4.0}

    class Step:
        def __init__(self, *args, **kwargs):
            self.at = 0.0

        def compile(self, *args):
            pass

        def __call__(self, params, video, bucket):
            clock.time += took[bucket.height] * (1 + 0.5 * (next(now) % 2))
            return video

    clock = types.SimpleNamespace(time=0.0)
    clock.perf_counter = lambda: clock.time
    monkeypatch.setattr(efficiency, "EvalStep", Step)
    monkeypatch.setattr(efficiency, "time", clock)
    _, row = efficiency.measure(
        loaded.run, None, [small], large, loaded.methods, batch_size=1, rounds=20
    )
    # Every other run takes half as long again: a ratio is 4 * 1.5 or 4 / 1.5.
    assert row["speedup_low"] == pytest.approx(4 / 1.5)
    assert row["speedup_high"] == pytest.approx(6)


@pytest.mark.slow
def test_the_benchmark_of_an_untrained_model(tmp_path, capsys):
    argv = ["bench", "efficiency", "--model", "micro", "--frames", "2,4", "--sizes", "28,56"]
    argv += ["--rounds", "2", "--json", str(tmp_path / "out.json")]
    assert cli.main([*argv, "--reference", "4x56"]) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["vanilla"] * 4 + ["static_tokens"] * 4
    saved = {(r["variant"], r["frames"], r["height"]): r["gflops_saved"] for r in rows}
    assert saved["vanilla", 4, 56] == saved["static_tokens", 4, 56] == 0
    # A quarter of the tokens, and the class token; or the same tokens of fewer pixels each.
    assert saved["vanilla", 4, 28] > 0.7 and 0 < saved["static_tokens", 4, 28] < 0.1
    assert out.count("(reference)") == 2
    assert cli.main([*argv, "--variants", "static"]) == 2
    assert "did you mean 'static_tokens'" in capsys.readouterr().err
