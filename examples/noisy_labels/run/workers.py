"""Runs side by side, each in a process of its own: resumed where they were stopped, tried again where they failed."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import mean, median

from tqdm import tqdm

from examples.noisy_labels.run.cells import Cell
from examples.noisy_labels.run.interruption import Interruption

REPOSITORY = Path(__file__).parents[3]
FAILURES, LOCK, OUTPUT = "failures.jsonl", "lock", "output.txt"
LAST_LINES = 15  # of what a failed run has output


def program(cell: Cell) -> list[str]:
    """Return the command that trains a cell, or goes on with it."""
    start = [sys.executable, "-m", "examples.noisy_labels.cifar"]
    return [*start, *cell.arguments, "--resume", "auto", "--out", str(cell.folder)]


@dataclass
class Workers:
    """Trains cells.

    Attributes:
        out: Gets ``failures.jsonl``, a line for each failure.
        number: Runs at a time.
        threads: Threads of each.
        retries: How often a run that failed is started again; it goes on from its last checkpoint.
        command: The command of a cell.
        poll: Seconds between two looks at the processes.
    """

    out: Path
    number: int = 1
    threads: int = 1
    retries: int = 1
    command: Callable[[Cell], list[str]] = program
    poll: float = 0.5

    def train(self, cells: Sequence[Cell], interruption: Interruption) -> list[Cell]:
        """Train what is not finished; return the cells that failed for good.

        If it is asked to stop, the runs save themselves first, and what has not been tried is no failure.
        """
        waiting: queue.SimpleQueue[tuple[Cell, int]] = queue.SimpleQueue()
        failed: list[Cell] = []
        for cell in cells:
            if cell.result() is None:
                waiting.put((cell, 0))
        stop = threading.Event()
        threads = [threading.Thread(target=self._work, args=(waiting, failed, stop)) for _ in range(self.number)]
        for thread in threads:
            thread.start()
        try:
            self._watch(cells, threads, failed, stop, interruption)
        finally:  # whatever happens here, no run is left behind
            stop.set()
            for thread in threads:
                thread.join()
        return failed

    def _watch(
        self,
        cells: Sequence[Cell],
        threads: Sequence[threading.Thread],
        failed: Sequence[Cell],
        stop: threading.Event,
        interruption: Interruption,
    ) -> None:
        """Show how far all cells are, a line for each that is finished, and pass on a request to stop."""
        seconds: dict[Cell, list[float]] = {cell: [] for cell in cells}
        finished = {cell for cell in cells if cell.result() is not None}
        with tqdm(total=sum(cell.epochs for cell in cells), unit="epoch", disable=None) as bar:
            working = True
            while working:
                working = any(thread.is_alive() for thread in threads)
                time.sleep(self.poll if working else 0)
                if interruption.requested:
                    stop.set()
                new = [cell for cell in cells if cell not in finished and cell.result() is not None]
                for cell in cells:
                    if len(seconds[cell]) < cell.epochs:  # logs of finished runs are not read again and again
                        seconds[cell] = cell.seconds()
                bar.update(sum(map(len, seconds.values())) - bar.n)
                left = time_left(seconds, self.number, failed)
                words = "" if left is None else f"{timedelta(seconds=round(left))} left for all"
                bar.set_postfix_str(words)
                for cell in new:
                    finished.add(cell)
                    tqdm.write(f"{cell.name}: finished, {len(finished)} of {len(cells)}; {words}")

    def _work(self, waiting: queue.SimpleQueue[tuple[Cell, int]], failed: list[Cell], stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                cell, tries = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                code, output = self._run(cell, stop), _end_of(cell.folder / OUTPUT)
            except OSError as problem:  # no process, no space, no folder
                code, output = None, [str(problem)]
            if cell.result() is not None or stop.is_set():
                continue
            self._record(cell, code, output, tries)
            if tries < self.retries:
                waiting.put((cell, tries + 1))
            else:
                failed.append(cell)

    def _run(self, cell: Cell, stop: threading.Event) -> int | None:
        """Run a process to its end, or until a stop; return its exit code, None if it was not started."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        with locked(cell.folder / LOCK, stop, self.poll) as lock, (cell.folder / OUTPUT).open("ab") as output:
            if stop.is_set() or cell.result() is not None:
                return None
            process = subprocess.Popen(
                self.command(cell),
                cwd=REPOSITORY,
                env=os.environ | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=() if lock is None else (lock,),
                start_new_session=True,  # Ctrl-C reaches this program alone, which then lets the runs save themselves
            )
            asked = False
            while process.poll() is None:
                if stop.is_set() and not asked:
                    process.send_signal(signal.SIGTERM)
                    asked = True
                try:
                    process.wait(self.poll)
                except subprocess.TimeoutExpired:
                    continue
            return process.returncode

    def _record(self, cell: Cell, code: int | None, output: list[str], tries: int) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"cell": cell.name, "time": when, "try": tries + 1, "code": code, "output": output}
        with (self.out / FAILURES).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def _end_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if file.is_file() else []


@contextmanager
def locked(file: Path, stop: threading.Event, poll: float) -> Iterator[int | None]:
    """Hold a lock that a process inherits, so that it lasts as long as that process.

    If this program is killed, its runs go on; started again, it waits for them here instead of starting a second
    process in the same folder. Where there are no such locks (Windows) there is nothing to wait for: None.
    """
    if sys.platform == "win32":
        yield None
        return
    import fcntl

    with file.open("ab") as stream:
        while not stop.is_set():
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop.wait(poll)
        yield stream.fileno()


def time_left(seconds: dict[Cell, list[float]], workers: int, failed: Sequence[Cell] = ()) -> float | None:
    """Estimate the seconds until all cells are finished; None before the first epoch.

    An epoch of a cell takes the median of those of its method and data set, else the mean of all such medians. The rest
    takes as long as its sum on all workers, and at least as long as its longest cell.
    """
    kinds: dict[tuple[str, str], list[float]] = {}
    for cell, took in seconds.items():
        kinds.setdefault((cell.settings.method, cell.settings.dataset), []).extend(took)
    known = {kind: median(took) for kind, took in kinds.items() if took}
    if not known:
        return None
    usual = mean(known.values())
    rest = [
        (cell.epochs - len(took)) * known.get((cell.settings.method, cell.settings.dataset), usual)
        for cell, took in seconds.items()
        if cell not in failed
    ]
    return max(sum(rest) / workers, max(rest, default=0.0))
