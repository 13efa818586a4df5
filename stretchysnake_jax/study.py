"""The command `stretchysnake study`: does stretching work, and when does it beat resizing?

Trains and evaluates the models of configs/study/, cell by cell, a process on every core. study.csv
in --out has the rows of the finished cells and alone says which those are, so that a study goes on
wherever that file is; see docs/study.md.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
import time

from stretchysnake_jax import study_plan, worker
from stretchysnake_jax.ablate import parse_choices, parse_seeds
from stretchysnake_jax.clock import Progress, duration
from stretchysnake_jax.config import ConfigError
from stretchysnake_jax.study_plan import FOLDS, PARTS, Cell, Study, Table, cell_of
from stretchysnake_jax.whole_file import whole_file
from stretchysnake_jax.worker import share_cores


def work(cell: Cell, study: Study, cores: set[int], log, out) -> None:
    """The process of one cell; its words go to the file `log`, its rows to the file `out`."""

    def job(progress):
        # Not before the job: threads would have memory of their own, see `configure_cpu`.
        threading.Thread(target=leave_with_parent, daemon=True).start()
        import jax

        from stretchysnake_jax import study_cell

        # Compiled programs are kept for the other cells. They hold this processor's instructions,
        # so another machine that has the same folder takes one of its own.
        if not jax.config.jax_compilation_cache_dir:
            folder = study.runs / f"programs-{socket.gethostname()}"
            jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        rows = study_cell.do_cell(cell, study, progress)
        with whole_file(out) as part:
            part.write_text(json.dumps(rows) + "\n")
        return 0

    sys.exit(worker.run(job, log, "w", cores))


def leave_with_parent() -> None:
    """Ends this process when the one that started it is gone, however it went."""
    multiprocessing.parent_process().join()
    os._exit(1)


def count_cores() -> int:
    """The cores that this process may use."""
    return len(share_cores(1)[0]) or os.cpu_count() or 1


class Pool:
    """The cells that run side by side, one process and a share of the cores each.

    Args:
      study: the files.
      cores: for each place, those of its process.
    """

    def __init__(self, study: Study, cores: list[set[int]]):
        self._study, self._free = study, list(range(len(cores)))
        self._cores, self._running = cores, {}
        self._spawn = multiprocessing.get_context("spawn")

    def file(self, cell: Cell, suffix: str) -> pathlib.Path:
        """The log (".log") or the rows (".json") of a cell."""
        return self._study.runs / "cells" / (cell.key + suffix)

    @property
    def running(self) -> list[Cell]:
        """The cells that run now."""
        return list(self._running)

    def start_next(self, pending: list[Cell]) -> None:
        """Starts cells of the list, the first ones that can, and takes them out of it.

        A cell that would train what another is just training has to wait for it.
        """
        for cell in list(pending):
            if not self._free:
                return
            wanted = {workdir for _, workdir in self._study.missing(cell)}
            if any(wanted & taken for _, _, taken in self._running.values()):
                continue
            place = self._free.pop(0)
            log, out = self.file(cell, ".log"), self.file(cell, ".json")
            log.parent.mkdir(parents=True, exist_ok=True)
            for old in (log, out):
                old.unlink(missing_ok=True)
            arguments = (cell, self._study, self._cores[place], log, out)
            process = self._spawn.Process(target=work, args=arguments)
            process.start()
            self._running[cell] = process, place, wanted
            pending.remove(cell)

    def take_finished(self) -> list[tuple[Cell, list[dict] | str]]:
        """The cells that ended since the last call, with their rows, or why there are none."""
        found = []
        for cell, (process, place, _) in list(self._running.items()):
            if process.is_alive():
                continue
            process.join()
            del self._running[cell]
            self._free.append(place)
            out, code = self.file(cell, ".json"), process.exitcode
            how = f"signal {-code} ended it after: " if code < 0 else f"exit status {code}: "
            result = f"{how}{self.last_line(cell)} (log: {self.file(cell, '.log')})"
            if code == 0 and out.exists():
                result = json.loads(out.read_text())
                out.unlink()
            found.append((cell, result))
        return found

    def stop(self) -> None:
        """Ends the processes as Ctrl-C does: a training saves and leaves."""
        for process, _, _ in self._running.values():
            process.terminate()
        for process, _, _ in self._running.values():
            process.join()

    def last_line(self, cell: Cell) -> str:
        """The last line of a cell's log."""
        log = self.file(cell, ".log")
        lines = log.read_text().splitlines() if log.exists() else []
        return lines[-1] if lines else "starting"


def take_dependants(failed: Cell, pending: list[Cell], study: Study) -> list[Cell]:
    """Takes the cells that need a training which a failed cell left undone out of the list."""
    lost = {workdir for _, workdir in study.missing(failed)}
    found = [c for c in pending if lost & {workdir for _, workdir in study.missing(c)}]
    for cell in found:
        pending.remove(cell)
    return found


def run_cells(cells: list[Cell], table: Table, study: Study, progress: Progress) -> list[Cell]:
    """Runs cells side by side and adds the rows of each that ends; returns those that failed."""
    slots = count_cores()
    pool, pending = Pool(study, share_cores(slots)), list(cells)
    failed, begun, count = [], time.perf_counter(), 0
    budget = sum(cell.minutes for cell in cells)  # of all, minutes of a core
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        while pending or pool.running:
            pool.start_next(pending)
            time.sleep(0.3)
            for cell, rows in pool.take_finished():
                count += 1
                if isinstance(rows, str):
                    failed.append(cell)
                    progress.say(f"failed: {cell.key}: {rows}")
                    for other in take_dependants(cell, pending, study):
                        failed.append(other)
                        progress.say(f"not run: {other.key}: it takes the training of {cell.key}")
                    continue
                table.add(rows)
                took = f"{rows[0]['minutes']:.1f} of {cell.minutes:g} minutes"
                progress.say(f"done: {cell.key}, {len(rows)} rows, {took}")
            left = sum(cell.minutes for cell in pending) + sum(c.minutes for c in pool.running) / 2
            passed = (time.perf_counter() - begun) / 60
            done = budget - left  # until enough is done, the budgets are the estimate
            rate = done / passed if count else slots
            now = " | ".join(f"{c.key}: {pool.last_line(c)[:60]}" for c in pool.running[:2])
            eta = duration(60 * left / rate) if rate > 0 else "?"
            progress.show(f"{count}/{len(cells)} cells, about {eta} left | {now}")
    except BaseException:
        pool.stop()
        raise
    finally:
        progress.close()
        signal.signal(signal.SIGTERM, before)
    return failed


def find_left(cells: list[Cell], table: Table, study: Study, progress: Progress) -> list[Cell]:
    """The cells that have no rows; says which have rows of another configuration."""
    done, left = table.done(), []
    for cell in cells:
        if cell not in done:
            left.append(cell)
        elif done[cell] != study.digest(cell):
            progress.say(f"{cell.key}: its configuration has changed, it is run again")
            left.append(cell)
    return left


def current_rows(table: Table, study: Study, progress: Progress) -> list[dict]:
    """The rows that are reported, in the plan's order.

    Says which cells are left out as they are outdated or lack folds.
    """
    done, out = table.done(), {}
    for cell, digest in done.items():
        if not study.is_current(cell, digest):
            out[cell] = "another configuration"
        elif cell.kind == "fine":
            folds = (dataclasses.replace(cell, fold=fold) for fold in range(1, FOLDS + 1))
            if lacking := sum(fold not in done for fold in folds):
                out[cell] = f"{lacking} of {FOLDS} folds are lacking"
    for cell, why in out.items():
        progress.say(f"not reported: {cell.key}: {why}")
    planned = study_plan.make_cells(PARTS, sorted({cell.seed for cell in done}))
    order = {cell: place for place, cell in enumerate(planned)}
    rows = [row for row in table.rows if cell_of(row) not in out]
    return sorted(rows, key=lambda row: order[cell_of(row)])


def refuse_mixture(table: Table, study: Study) -> None:
    """ConfigError if the table is of a quick study and this isn't, or the other way round."""
    other = dataclasses.replace(study, quick=not study.quick)
    if any(other.is_current(cell, digest) for cell, digest in table.done().items()):
        without = "without" if study.quick else "with"
        raise ConfigError(f"{table.path} is of a study {without} --quick: take another --out")


def describe(cells: list[Cell], left: list[Cell], slots: int) -> str:
    """The parts and cells with their budgets, as text."""
    lines = []
    for part in dict.fromkeys(cell.part for cell in cells):
        own = [cell for cell in cells if cell.part == part]
        missing = [cell for cell in left if cell.part == part]
        lines.append(
            f"{part}: {PARTS[part].about}; {len(own)} cells of at most {own[0].minutes:g} minutes, "
            f"{len(missing)} to do"
        )
        for cell in own:
            lines.append(f"  {cell.key}" + ("" if cell in missing else "  done"))
    hours = sum(cell.minutes for cell in left) / 60
    lines.append(
        f"{len(left)} of {len(cells)} cells to do: at most {hours:.1f} hours of one core, "
        f"{hours / slots:.1f} on {slots}"
    )
    return "\n".join(lines)


def prepare_data(left: list[Cell], study: Study, progress: Progress) -> None:
    """Renders what the cells need, before several processes would do it at once."""
    from stretchysnake_jax import run, study_weizmann

    for setting in dict.fromkeys(cell.setting for cell in left):
        cell = next(cell for cell in left if cell.setting == setting)
        run.prepare(study.base_run(cell)[0], progress)
    if any(cell.kind == "followed" for cell in left):
        study_weizmann.prepare(study.weizmann, study.followed, progress)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="stretchysnake study",
        description="Trains and evaluates every model of configs/study/ and writes tables and "
        "figures. Interrupted, the same command goes on; cells whose rows are in OUT/study.csv are "
        "done. A process runs on every core that it may use (taskset).",
    )
    add = parser.add_argument
    add("--out", required=True, help="folder of study.csv, tables and figures, to be committed")
    add("--runs", help="folder of data, checkpoints and logs (default runs/study)")
    add("--data", metavar="weizmann=PATH", help="the folder of Weizmann's videos")
    add("--parts", help=f"of {', '.join(PARTS)}; default: all that there is data for")
    add("--seeds", default="0,1,2", help="default: 0,1,2")
    add("--list", action="store_true", help="say what there is to do, and do nothing")
    add("--report", action="store_true", help="write tables and figures from study.csv alone")
    add("--quick", action="store_true", help="tiny models and data, for a look that every part "
        "works; its numbers mean nothing (default of --runs: runs/study-quick)")  # fmt: skip
    return parser


def parse_data(text: str | None) -> str:
    """Reads --data; returns the folder of Weizmann or ""."""
    if text is None:
        return ""
    name, _, path = text.partition("=")
    if name != "weizmann" or not pathlib.Path(path).is_dir():
        raise ConfigError(f"--data is {text!r}: it takes weizmann=FOLDER, a folder that is there")
    return str(pathlib.Path(path).absolute())


def main(argv: list[str]) -> int:
    """The command `stretchysnake study`."""
    args, progress = make_parser().parse_args(argv), Progress()
    out = pathlib.Path(args.out)
    runs = pathlib.Path(args.runs or ("runs/study-quick" if args.quick else "runs/study"))
    study = Study(runs, parse_data(args.data), args.quick)
    table, failed = Table(out / "study.csv"), []
    refuse_mixture(table, study)
    parts = parse_choices(args.parts, "--parts", tuple(PARTS)) if args.parts else list(PARTS)
    needs = [part for part in parts if PARTS[part].kind in study_plan.NEED_WEIZMANN]
    if not args.report:
        if needs and not study.weizmann:
            if args.parts and not args.list:
                raise ConfigError(f"{needs[0]} takes --data weizmann=PATH")
            progress.say(f"left out without --data weizmann=PATH: {', '.join(needs)}")
            parts = [part for part in parts if part not in needs]
        cells = study_plan.make_cells(parts, parse_seeds(args.seeds))
        left = find_left(cells, table, study, progress)
        text = describe(cells, left, count_cores())
        print(text if args.list else text.splitlines()[-1])
        if args.list:
            return 0
        out.mkdir(parents=True, exist_ok=True)
        if left:
            prepare_data(left, study, progress)
            failed = run_cells(left, table, study, progress)
    rows = current_rows(table, study, progress)
    if not rows and not failed:
        raise ConfigError(f"{table.path} has no rows of this study: there is nothing to report")
    from stretchysnake_jax import study_report

    for path in study_report.write(out, rows) if rows else ():
        print(f"written: {path}")
    if failed:
        progress.say(f"{len(failed)} cells failed; the same command tries them again")
    return 1 if failed else 0
