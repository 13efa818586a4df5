"""The picture and the summary of runs: what they show, and that nothing lies over anything else."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from stretchysnake_jax.buckets import training_buckets
from stretchysnake_jax.config import ConfigError, StretchConfig, preset
from stretchysnake_jax.curves import ALL, _number, group_buckets, main_run, make_figure
from stretchysnake_jax.summary import Run, end_losses, smooth, step_seconds, summary

OLD = {"elapsed", "step_seconds", "clips", "tokens", "tokens_per_s"}  # not in older runs


def write_run(workdir, variant, steps=400, frames=(8, 16, 32, 64), without=(), validate=True):
    """Writes the metrics of a made-up run; returns the number of its buckets."""
    model = preset("middle", frames=8)
    stretch = StretchConfig(variant=variant, frames=frames)
    buckets = [bucket for bucket, _ in training_buckets(stretch, model)]
    rng, lines, elapsed = np.random.default_rng(0), [], 0.0
    for step in range(1, steps + 1):
        bucket = buckets[step % len(buckets)]
        seconds = 1e-3 * bucket.tokens() * bucket.height / 224
        elapsed += seconds
        line = {"step": step, "bucket": str(bucket), "loss": 6 / step + rng.uniform(1, 1.4)}
        line |= {"top1": 1 - 1 / step, "grad_norm": rng.lognormal(), "learning_rate": 1e-3}
        line |= {"clips_per_s": 4 / seconds, "data_wait": 0.1, "data_wait_share": 0.25}
        line |= {"unreadable": 3, "compiled": 2 * min(step, len(buckets)), "elapsed": elapsed}
        line |= {"step_seconds": seconds, "clips": 4, "tokens": 4 * bucket.tokens()}
        line["tokens_per_s"] = line["tokens"] / seconds
        lines.append({k: v for k, v in line.items() if k not in without})
        if validate and step % 100 == 0:
            value = {100: 0.2, 200: 0.7, 300: 0.6, 400: 0.65}[step]
            lines.append({"step": step, "bucket": "8x224x224/16", "val_top1": value, "val_loss": 1})
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(buckets)


def overlaps(figure):
    """Pairs of texts of a figure that lie over each other, and texts that leave it."""
    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.width, figure.bbox.height
    boxes = []
    for axis in figure.axes:
        texts = [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for ticks, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            low, high = min(low, high), max(low, high)
            places = zip(ticks.get_ticklabels(), ticks.get_ticklocs(), strict=True)
            texts += [text for text, place in places if low <= place <= high]
        legend = axis.get_legend()
        texts += legend.get_texts() if legend else []
        turned = {id(text) for text in texts if text.get_rotation() == 45}  # their boxes mislead
        for text in texts:
            if text.get_visible() and text.get_text().strip() and id(text) not in turned:
                boxes.append((text.get_text(), text.get_window_extent()))
    bad = [name for name, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]
    for i, (name, a) in enumerate(boxes):
        for other, b in boxes[:i]:
            across = min(a.x1, b.x1) - max(a.x0, b.x0)
            up = min(a.y1, b.y1) - max(a.y0, b.y0)
            if across > 1 and up > 1:
                bad.append((name, other))
    return bad


@pytest.mark.parametrize(
    "variant, frames, count, panels, maps",
    [
        ("vanilla", (8,), 1, 0, 0),
        ("temporal", (8, 16, 32, 64), 4, 1, 2),
        ("static_tokens", (8,), 4, 1, 2),
        ("static_tokens", (8, 16, 32), 12, 3, 2),
        ("flexivit", (8, 16, 32, 64), 40, 4, 2),
        ("flex_all", (8, 16, 32, 64, 128), 75, 5, 2),
    ],
)
def test_any_number_of_buckets_is_drawn_readably(variant, frames, count, panels, maps, tmp_path):
    assert write_run(tmp_path / "a run", variant, frames=frames) == count
    run = Run(tmp_path / "a run", "a run")
    groups = group_buckets([run])
    assert len(groups) == panels
    shown = [line for _, lines in groups for line in lines if line[0] != ALL]
    assert len(shown) == (count if panels else 0)
    assert sum(len(line[2]) for line in shown) == (400 if panels else 0)
    figure = make_figure([run])
    assert not overlaps(figure)
    assert len(figure.axes) == 2 + 6 + panels + maps
    assert all(axis.get_xlabel() for axis in figure.axes)
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[:5] == [
        "loss",
        "top-1, %",
        "learning rate",
        "gradient norm, log scale",
        "waiting for data, %",
    ]
    cells = [int(axis.get_images() != []) and len(axis.texts) for axis in figure.axes]
    assert sum(cells) == (2 * count if maps else 0)


def test_runs_are_compared(tmp_path):
    write_run(tmp_path / "one", "static_tokens", frames=(8, 16))
    write_run(tmp_path / "two", "static_tokens", frames=(16, 32), without=OLD, validate=False)
    write_run(tmp_path / "three", "vanilla")
    runs = [Run(tmp_path / name, name) for name in ("one", "two", "three")]
    groups = group_buckets(runs)
    assert [title for title, _ in groups] == ["8 frames", "16 frames", "32 frames"]
    assert [[len(line[2]) for line in lines] for _, lines in groups] == [
        [200, 0, 400],
        [200, 200, 0],
        [0, 200, 0],
    ]
    figure = make_figure(runs)
    assert not overlaps(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "three"]
    # Two maps of the first, one of the second, which has no times, none for a single bucket.
    titles = [axis.get_title() for axis in figure.axes if axis.get_images()]
    assert [title.split(":")[0] for title in titles] == ["one", "one", "two"]


def test_the_summary_says_what_the_run_did(tmp_path):
    write_run(tmp_path, "static_tokens", frames=(8, 16))
    text = summary(Run(tmp_path, "mine"))
    rows = {line[2:20].strip(): line[20:] for line in text.splitlines()[1:]}
    assert text.splitlines()[0] == "mine" and rows["steps"] == "400"
    assert rows["best validation"] == "top-1 70.0 % at step 200; the last 65.0 % at 400"
    tokens, seconds = 16 * 196 + 1, 1e-3 * (16 * 196 + 1) * 392 / 224
    assert rows["slowest bucket"] == (
        f"16x392x392/28, {seconds:.3g} s a step, {4 / seconds:.3g} clips/s, "
        f"{4 * tokens / seconds:,.0f} tokens/s"
    )
    assert rows["fastest bucket"].startswith("8x98x98/7, ")
    assert rows["waiting for data"] == "25 % of the time"
    assert rows["compilations"] == "16, the last by step 8"
    assert rows["unreadable clips"] == "3" and rows["time"].endswith(" steps/s")


def test_an_older_run_is_read_too(tmp_path):
    write_run(tmp_path, "static_tokens", without=OLD)
    run = Run(tmp_path, "old")
    assert not step_seconds(run) and not overlaps(make_figure([run]))
    assert "time  " not in summary(run) and "slowest" not in summary(run)


def test_compilations_of_all_processes_are_counted(tmp_path):
    counts = [2, 4, 4, 1, 3, 3]  # the fourth step was the first of a second process
    lines = [
        {"step": i + 1, "bucket": "8x98x98/7", "loss": 1.0, "compiled": c}
        for i, c in enumerate(counts)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "compilations      7, the last by step 5" in summary(Run(tmp_path, "run"))


def test_one_step_and_a_loss_that_is_not_finite_are_drawn(tmp_path):
    line = {"step": 1, "bucket": "8x98x98/7", "loss": 2.0, "top1": 0.0, "grad_norm": 1.0}
    broken = line | {"step": 2, "bucket": "8x126x126/9", "loss": None, "grad_norm": None}
    for lines in ([line], [line, broken]):
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        run = Run(tmp_path, "short")
        assert not overlaps(make_figure([run]))
    assert "not finite        the loss at step 2, bucket 8x126x126/9" in summary(run)
    assert end_losses(run) == {}


def test_smoothing_keeps_lines_straight_and_constants_constant():
    ramp = np.arange(200.0)
    np.testing.assert_allclose(smooth(ramp, 0.1)[20:-20], ramp[20:-20], rtol=1e-12)
    np.testing.assert_allclose(smooth(np.full(50, 3.0), 0.5), 3.0)
    noise = np.random.default_rng(0).normal(size=10_000)
    assert smooth(noise, 0.01).std() < 0.1 and len(smooth(noise, 0.01)) == 10_000
    np.testing.assert_array_equal(smooth(noise, 0.0), noise)


@pytest.mark.parametrize(
    "value, text", [(0.0, "0"), (9000, "9000"), (12_000, "12k"), (1.2e6, "1.2M"), (2e-5, "2e-05")]
)
def test_numbers_on_axes_are_short(value, text):
    assert _number(value) == text


def test_the_command_draws_a_real_run(trained, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert main_run([str(trained), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "steps             24 of 24" in said and f"curves: {out}" in said
    assert "best validation   top-1" in said and "compilations      4" in said
    assert matplotlib.image.imread(out).shape[1] == 1650
    run = Run(trained, "tiny")
    assert not overlaps(make_figure([run])) and len(group_buckets([run])[0][1]) == 4
    assert all(math.isfinite(value) for value in end_losses(run).values())


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl in .*: is it the workdir of a run"):
        main_run([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no training step yet"):
        main_run([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"--out is 'x\.pdf': it takes the name of a \.png"):
        main_run([str(tmp_path), "--out", "x.pdf"])
