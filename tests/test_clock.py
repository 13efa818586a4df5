"""Durations, progress lines and the metrics file."""

import io

import pytest

from stretchysnake_jax import clock
from stretchysnake_jax.metrics import MetricsLog, read_lines


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0s"), (42, "42s"), (190, "3m10s"), (7500, "2h05m"), (97200, "1d03h"), (-3, "0s")],
)
def test_duration(seconds, text):
    assert clock.duration(seconds) == text


def test_clock_counts_on_from_a_checkpoint(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    work = clock.Clock(total=30, done=10, elapsed=50.0)
    assert work.rate == 0 and work.left == "?"
    now[0] += 5
    work.advance(20)
    assert work.rate == 2.0 and work.left == "5s" and work.elapsed == 55.0


def test_clock_tells_the_share_of_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    work = clock.Clock(total=300, elapsed=50.0)
    assert work.waiting == work.waiting_in_all == 0.0
    for step in range(1, 101):
        now[0] += 2.0
        work.wait(1.0 if step <= 20 else 0.5)
        work.advance(step)
    assert work.waiting == 0.25  # of the recent steps
    assert work.waiting_in_all == 0.3  # 20 s and 40 s of 200 s
    assert work.recent == (126.0, 37, 100)


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    progress = clock.Progress(every=10, stream=stream)
    for second in range(25):
        now[0] = 100.0 + second
        progress.show(f"at {second}")
    progress.say("done")
    assert stream.getvalue().splitlines() == ["at 0", "at 10", "at 20", "done"]


def test_metrics_drop_what_a_killed_process_wrote_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1 / step})
    log.write({"step": 4, "loss": float("nan")})
    log.close()
    assert read_lines(path)[-1] == {"step": 4, "loss": None}
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by a kill
    MetricsLog(path, step=2).close()
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2, is no JSON"):
        read_lines(path)
