"""The page of `stretchysnake report`: its numbers, names as text, missing pieces, a browser."""

import base64
import contextlib
import dataclasses
import fcntl
import html.parser
import json
import os
import re
import select
import shutil
import signal
import time

import cv2
import numpy as np
import pytest
from conftest import VIDEOS

from stretchysnake_jax import cli, grid, report_charts
from stretchysnake_jax import config as config_lib
from stretchysnake_jax.data.lists import read_list, write_classes

CLASSES = ["<script>alert(1)</script>", 'a"b', "c&d", "run", "walk", "wave"]
# The files of `video_folder`, the first by another name.
NAMES = ["<img src=x onerror=alert(1)>.mp4", *list(VIDEOS)[1:]]
# (frames, size) -> what each clip was taken for; -1: unreadable
GUESSES = {
    (2, 8): [0, 1, 2, 0, 0, -1],
    (2, 16): [0, 1, 2, 3, 0, -1],
    (4, 8): [1, 1, 1, 1, 1, -1],
    (4, 24): [0, 1, 2, 3, 4, -1],
}
TRAINED = {(2, 8), (2, 16)}
STEPS = 12


class Page(html.parser.HTMLParser):
    """A page as a list of elements: dicts with tag, attributes, texts below, and parents."""

    VOID = ("img", "meta")

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        here = {"tag": tag, "text": "", "parents": list(self._open), **dict(attrs)}
        self.elements.append(here)
        if tag not in self.VOID:
            self._open.append(here)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for one in self._open:
            one["text"] += data

    def find(self, tag, class_=None, inside=None):
        """Elements by tag, a word of their class, and one that they lie in."""
        return [
            e
            for e in self.elements
            if e["tag"] == tag
            and (class_ is None or class_ in e.get("class", "").split())
            and (inside is None or inside in e["parents"])
        ]

    def rows(self, table):
        """The texts of a table's cells by row."""
        return [
            [c["text"] for c in self.elements if c["tag"] in ("th", "td") and row in c["parents"]]
            for row in self.find("tr", inside=table)
        ]


def make_rows(clips):
    """A grid of GUESSES: rows as `grid.evaluate_grid` makes them, some numbers made up."""
    rows = []
    for number, ((frames, size), guesses) in enumerate(GUESSES.items()):
        guesses = np.array(guesses, np.int32)
        seen = guesses >= 0
        top1 = float((guesses == clips.labels)[seen].mean())
        gflops = 0.01 * frames * size
        rows.append(
            {"frames": frames, "height": size, "width": size, "patch": "4", "top1": top1}
            | {"top5": 0.9, "mean_class": top1, "loss": 1 + number / 7, "gflops": gflops}
            | {"published_gflops": gflops / 2, "xla_gflops": None, "memory_mib": 3.25}
            | {"clips_per_s": 12.5, "trained": (frames, size) in TRAINED, "clips": 5}
            | {"methods": {}, "unreadable": [[clips.paths[5], "it is <broken>"]]}
            | {"guesses": guesses, "ranks": np.where(guesses == clips.labels, 1, 2) * seen}
        )
    return rows


def make_run(folder, config, video_folder, *, variant="static_tokens", name="grid"):
    """Writes what a finished and evaluated run leaves behind, but for checkpoints."""
    folder.mkdir(parents=True)
    for old, new in zip(VIDEOS, NAMES, strict=True):
        shutil.copy(video_folder / old, folder / new)
    lines = "".join(f'"{name}",{i}\n' for i, name in enumerate(NAMES))
    (folder / "list.csv").write_text(lines)
    write_classes(folder / "classes.txt", CLASSES)
    data = dataclasses.replace(config.data, train="", val=str(folder / "list.csv"))
    stretch = dataclasses.replace(config.stretch, variant=variant)
    config_lib.save(dataclasses.replace(config, data=data, stretch=stretch), folder / "config.json")
    metrics = []
    for step in range(1, STEPS + 1):
        line = {"step": step, "bucket": ("2x8x8/2", "2x16x16/4")[step % 2], "loss": 3 / step}
        line |= {"top1": step / 20, "learning_rate": 1e-3 / step, "clips": 3, "step_seconds": 0.5}
        metrics.append(line | {"elapsed": 1.0 * step, "unreadable": 0})
    last = {"step": STEPS, "bucket": "2x16x16/4", "val_top1": 0.5, "val_top5": 1, "val_loss": 1.25}
    text = "".join(json.dumps(line) + "\n" for line in [*metrics, last])
    (folder / "metrics.jsonl").write_text(text)
    clips = read_list(folder / "list.csv", classes=CLASSES)
    grid.write(make_rows(clips), folder / name, clips)
    return folder


@pytest.fixture
def run(tmp_path, tiny_config, video_folder):
    return make_run(tmp_path / "run", tiny_config, video_folder)


def report(*words):
    """Runs the command; returns the page."""
    words = [str(word) for word in words]
    out = words[words.index("--out") + 1] if "--out" in words else f"{words[0]}/report.html"
    assert cli.main(["report", *words]) == 0
    with open(out, encoding="utf-8") as file:
        return Page(file.read())


def test_every_number_of_a_heat_map_is_the_grids(run):
    page = report(run)
    [heat, _] = page.find("table", "map")
    rows = {(r["frames"], r["height"]): r for r in grid.read(run / "grid")}
    [head, *lines] = page.rows(heat)
    found = {
        (int(line[0]), int(size)): text
        for line in lines
        for size, text in zip(head[1:], line[1:], strict=True)
    }
    assert set(found) == {(t, s) for t in (2, 4) for s in (8, 16, 24)}
    for place, text in found.items():
        assert text == (f"{100 * rows[place]['top1']:.1f}" if place in rows else "")
    labels = {}
    for cell in page.find("td", "tip", inside=heat):
        t, s = map(
            int, re.match(r"(\d+) frames of (\d+)x\2, patch 4:", cell["aria-label"]).groups()
        )
        labels[t, s] = cell
        row, text = rows[t, s], cell["aria-label"]
        assert f"loss {row['loss']:.3f}, {row['gflops']:.3g} GFLOPs, 12.5 clips/s" in text
        assert text.endswith(", trained there") == ((t, s) in TRAINED)
        assert ("framed" in cell["class"].split()) == ((t, s) in TRAINED)
    assert set(labels) == set(rows)


def test_the_cost_chart_has_every_cell_and_the_front(run):
    page = report(run)
    rows = grid.read(run / "grid")
    dots = page.find("circle", "tip")
    assert len(dots) == len(rows)
    on_front = [d["aria-label"] for d in dots if d["aria-label"].endswith("the Pareto front")]
    front = [f"{r['frames']} frames of {r['height']}x{r['width']}" for r in grid.pareto_front(rows)]
    assert sorted(label.split(",")[0] for label in on_front) == sorted(front)
    assert len(front) == 3  # (4, 8) costs as much as (2, 16) and is worse


def test_the_confusion_is_the_grids(run):
    page = report(run)
    _, confusion = page.find("table", "map")
    clips = read_list(run / "list.csv", classes=CLASSES)
    row = grid.best(make_rows(clips))
    counts = grid.confusion(row, clips)
    labels = [cell["aria-label"] for cell in page.find("td", "tip", inside=confusion)]
    assert labels == [
        f"{name} taken for {guess}: {counts[i, j]} of {counts[i].sum()} clips"
        for i, name in enumerate(CLASSES)
        for j, guess in enumerate(CLASSES)
    ]
    assert [cells[1:] for cells in page.rows(confusion)[1:]] == [
        ["100" if n else "" for n in line] for line in counts
    ]


def test_charts_hold_what_was_logged(run):
    page = report(run)
    charts = [json.loads(e["data-chart"]) for e in page.find("svg", "lines")]
    titles = [e["text"] for e in page.find("figcaption") if "taken for" not in e["text"]]
    loss, top1, rate, loss_by_bucket, _ = charts
    training, validation = loss["lines"]
    assert training["x"] == list(range(1, STEPS + 1))  # too few to be averaged
    assert training["y"] == [float(f"{3 / step:.5g}") for step in training["x"]]
    assert (validation["x"], validation["y"]) == ([STEPS], [1.25])
    assert top1["lines"][1]["y"] == [50.0] and rate["lines"][0]["y"][1] == 5e-4
    small, large = loss_by_bucket["lines"]
    assert small["name"] == "2 frames, 8/2" and small["x"] == list(range(2, STEPS + 1, 2))
    assert large["y"][0] == 3.0
    assert "Loss, by bucket" in titles and "Learning rate" in titles


def test_names_stay_text_and_nothing_is_outside(run):
    page = report(run)
    assert len(page.find("script")) == 1 and not page.find("script")[0].get("src")
    assert not page.find("link") and not page.find("iframe") and not page.find("base")
    for one in page.elements:
        for key, value in one.items():
            if key in ("src", "href"):
                assert value.startswith(("data:image/", "#"))
            assert not key.startswith("on")
    text = page.find("main")[0]["text"]
    assert CLASSES[0] in text and NAMES[0] in text and "it is <broken>" in text
    [viewport] = [e for e in page.find("meta") if e.get("name") == "viewport"]
    assert viewport["content"].startswith("width=device-width")
    assert all(page.find("th", inside=table) for table in page.find("table"))
    assert all(page.find("title", inside=svg) for svg in page.find("svg"))
    assert all(image["alt"] for image in page.find("img"))
    style = page.find("style")[0]["text"]
    assert "http" not in style and "@import" not in style and "url(" not in style


def test_sheets_show_the_clips_at_the_models_bucket(run):
    page = report(run)
    figures = page.find("figure", inside=page.find("div", "sheet")[1])  # right ones
    texts = [f"{name}{run / file}" for name, file in zip(CLASSES, NAMES, strict=True)]
    assert [figure["text"] for figure in figures] == texts[:5]
    for figure in figures:
        [image] = page.find("img", inside=figure)
        data = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (24, 4 * 24 + 3 * 2, 3)  # best at 4 frames of 24, and the gaps
        levels = [picture[:, i * 26 + 4 : i * 26 + 20].mean() for i in range(4)]
        assert levels == sorted(levels) and levels[0] < levels[3]  # the videos grow lighter
    page = report(run, "--grid", "grid", "--sheet", 1)
    assert len(page.find("img")) == 1
    assert [e["text"] for e in page.find("h4")][1:] == ["Wrong: 0 clips", "Right: 1 of 5 clips"]


def test_missing_pieces_say_how_to_get_them(run, tmp_path, capsys):
    def sentences(folder):
        return "\n".join(e["text"] for e in report(folder).find("p", "missing"))

    (run / "grid.npz").unlink()
    text = sentences(run)
    assert "says what every clip was taken for" in text and "--name grid' again" in text
    (run / "grid.json").unlink()
    assert f"run 'stretchysnake evaluate --workdir {run} --name grid' first" in sentences(run)
    (run / "metrics.jsonl").unlink()
    assert "no metrics.jsonl in" in sentences(run)
    (run / "config.json").unlink()
    assert cli.main(["report", str(run)]) == 2
    assert "holds no config, metrics or grid" in capsys.readouterr().err


def test_videos_that_are_gone_leave_a_sentence(run):
    for name in NAMES[1:]:
        (run / name).unlink()
    page = report(run)
    assert len(page.find("img")) == 1
    text = "\n".join(e["text"] for e in page.find("p", "missing"))
    assert "unreadable now: there is no such file" in text
    (run / NAMES[0]).unlink()
    page = report(run)
    [sentence] = [e["text"] for e in page.find("p", "missing")]
    assert sentence.startswith("no pictures: none of the clips") and not page.find("img")


def test_clips_that_are_parts_of_videos_are_read_as_such(run):
    clips = read_list(run / "list.csv", classes=CLASSES)
    windows = np.array([[0, np.inf], *[[i, i + 2] for i in range(5)]], np.float64)
    clips = dataclasses.replace(clips, windows=windows, unit="frames")
    grid.write(make_rows(clips), run / "grid", clips)
    page = report(run)
    texts = [f["text"] for f in page.find("figure", inside=page.find("div", "sheet")[1])]
    assert texts[0].endswith(f"{NAMES[0]} [0, inf] frames") and "[3, 5] frames" in texts[4]
    assert len(page.find("img")) == 4  # the last has 3 frames, its part begins behind them


def test_runs_side_by_side(run, tmp_path, tiny_config, video_folder):
    other = make_run(tmp_path / "other", tiny_config, video_folder, variant="vanilla")
    rows = grid.read(other / "grid")[:3]
    rows[0]["top1"] = 0.25
    (other / "grid.json").write_text(json.dumps(rows))
    page = report(run, other, "--out", tmp_path / "both.html")
    differs, results, *_ = map(page.rows, page.find("table"))
    assert differs[0] == ["field", "run", "other"]
    found = {line[0]: line[1:] for line in differs[1:]}
    assert found["stretch.variant"] == ['"static_tokens"', '"vanilla"']
    assert set(found) == {"stretch.variant", "data.val"}
    found, among = {line[0]: line[1:] for line in results}, {(2, 8, 8), (2, 16, 16), (4, 8, 8)}
    for which, trained, count in (("trained", True, 2), ("unseen", False, 1)):
        assert found[f"mean top-1, %, of {which} cells"] == [
            f"{100 * grid.mean_top1(grid.read(r / 'grid'), trained, among):.1f} ({count})"
            for r in (run, other)
        ]
    assert found["best validation top-1, %"] == ["50.0", "50.0"]
    (other / "grid.json").unlink()  # one of them has none
    page = report(run, other, "--out", tmp_path / "both.html")
    found = {line[0]: line[1:] for line in page.rows(page.find("table")[1])}
    assert found["grid"] == ["grid, 5 clips", "none: 'stretchysnake evaluate' makes one"]


def test_grids_are_chosen_by_name(run, capsys):
    shutil.copy(run / "grid.json", run / "second.json")
    shutil.copy(run / "grid.json", run / "third.partial.json")
    (run / "table.json").write_text('[{"frames": 3}]')
    assert [e["text"] for e in report(run).find("h4")][:2] == ["grid, 5 clips", "second, 5 clips"]
    page = report(run, "--grid", "second")
    assert [e["text"] for e in page.find("h4")] == ["second, 5 clips"]
    page = report(run, "--grid", "nothing")
    assert any("no grid at" in e["text"] for e in page.find("p", "missing"))


def test_a_page_is_whole_or_not_there(run, monkeypatch, capsys):
    assert cli.main(["report", str(run), "--out", str(run / "page.txt")]) == 2
    assert "--out is" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--sheet", "0"]) == 2
    assert "--sheet is 0" in capsys.readouterr().err
    before = sorted(run.iterdir())

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    assert cli.main(["report", str(run)]) == 2
    assert sorted(run.iterdir()) == before


def test_many_classes_are_a_picture_and_a_list():
    counts = np.zeros((400, 400), int)
    counts[np.arange(400), np.arange(400)] = 9
    counts[7, 300] = 3
    page = Page(report_charts.confusion_map(counts, [f"class {i}" for i in range(400)]))
    [image] = page.find("img")
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).sum(2)
    assert picture.shape == (400, 400) and len(data) < 20_000
    assert (picture[counts == 9] < picture[7, 300]).all() and picture[7, 300] < picture[300, 7]
    assert page.rows(page.find("table")[0])[1:] == [["class 7", "class 300", "25", "3 of 12"]]


class Browser:
    """Chromium without a window, by its DevTools protocol over a pipe.

    Args:
      path: of the program.
      profile: a folder of its own.
    """

    def __init__(self, path, profile):
        pipes = [*os.pipe(), *os.pipe()]
        # Away from 3 and 4, which the browser reads from and writes to.
        high = [fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 10) for pipe in pipes]
        read, self._write, self._read, write = high
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", "--no-first-run", "--disable-dev-shm-usage"]
        actions = [(os.POSIX_SPAWN_DUP2, read, 3), (os.POSIX_SPAWN_DUP2, write, 4)]
        quiet = os.devnull, os.O_WRONLY, 0
        actions += [(os.POSIX_SPAWN_OPEN, stream, *quiet) for stream in (1, 2)]
        self._process = os.posix_spawn(path, [path, *options], os.environ, file_actions=actions)
        for pipe in (*pipes, read, write):
            os.close(pipe)
        self._rest, self._number, self._session, self.events = b"", 0, {}, []
        page = self("Target.createTarget", url="about:blank")["targetId"]
        session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def _next(self):
        end = time.monotonic() + 60
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser says nothing"
            got = os.read(self._read, 1 << 20)
            assert got, "the browser has ended"
            self._rest += got
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def __call__(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address):
        self.events.clear()
        self("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression):
        """What JavaScript gives."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point(self, selector):
        """Moves the mouse onto the middle of an element; returns the tip's text."""
        self.value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = f"(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector({selector!r})"
        x, y = self.value(f"{box}.getBoundingClientRect())")
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return self.value("document.getElementById('tip').textContent")

    def close(self):
        os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)


CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell", "chrome")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])  # a phone's and a desktop's
def test_a_browser_shows_the_page(run, tmp_path, tiny_config, video_folder, width):
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if not path:
        pytest.skip("no Chromium is installed: on Debian apt-get install chromium")
    other = make_run(tmp_path / ("other" + 40 * "_long"), tiny_config, video_folder)
    page = tmp_path / "page.html"
    report(run, other, "--out", page)
    with contextlib.closing(Browser(path, tmp_path / "profile")) as browser:
        colours = set()
        for scheme in ("light", "dark"):
            size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
            browser("Emulation.setDeviceMetricsOverride", **size)
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser("Emulation.setEmulatedMedia", features=[feature])
            browser.open(page.as_uri())
            for opened in (False, True):
                browser.value(
                    f"document.querySelectorAll('details').forEach(d => d.open={opened:d})"
                )
                wide, room = browser.value(
                    "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
                )
                assert wide <= room <= width
            colours.add(browser.value("getComputedStyle(document.body).backgroundColor"))
            cell = "table.map td.tip"
            label = browser.value(f"document.querySelector('{cell}').getAttribute('aria-label')")
            assert browser.point(cell) == label and label.startswith("2 frames of 8x8")
            assert re.match(r"step \d+\nrun: ", browser.point("svg.lines"))
            shown = "getComputedStyle(document.querySelector('.cross')).visibility"
            assert browser.value(shown) == "visible"
            assert browser.value("[...document.images].every(i => i.naturalWidth > 0)")
            said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
            assert not [event for event in browser.events if event["method"] in said]
            asked = [
                event["params"]["request"]["url"]
                for event in browser.events
                if event["method"] == "Network.requestWillBeSent"
            ]
            assert [url for url in asked if not url.startswith("data:image/")] == [page.as_uri()]
        assert len(colours) == 2
