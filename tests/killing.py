"""Runs of the flagship in processes of their own, which are killed at chosen moments.

The processes are forked from a server that has torch imported, so that a run costs what it computes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.noisy_labels import cifar
from examples.noisy_labels.report import pictures
from examples.noisy_labels.run import checkpoint, files

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

PATIENCE = 120.0  # seconds; only a hanging process takes so long


@dataclass(frozen=True)
class End:
    """How a process ended: its exit code, negative for a signal, and what it had said on standard error."""

    code: int
    errors: str
    seconds: float


def server() -> ForkServerContext:
    """Return the context whose processes come with everything imported."""
    from multiprocessing import forkserver  # not on Windows, where other tests read what is below

    context = multiprocessing.get_context("forkserver")
    # torch imports _dynamo with the first optimizer: longer than a run.
    context.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "killing"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server of Python 3.11 is not told the path otherwise
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def run(
    arguments: Sequence[str],
    folder: Path,
    number: int | None = None,
    after: float | Path = 0.0,
    *,
    draw: bool = True,
) -> End:
    """Start ``cifar.py``; send it a signal after some seconds, or as soon as a file is there.

    Args:
        arguments: Command line.
        folder: For what the process prints.
        number: The signal, or None to let the run end by itself.
        after: When it is sent.
        draw: Whether pictures are drawn, which takes longer than all the rest; else a word is written in their place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    errors = folder / "stderr"
    process = server().Process(target=_child, args=(list(arguments), errors, draw))
    begin = time.monotonic()
    process.start()
    assert process.pid is not None
    if number is not None:
        if isinstance(after, Path):
            while not after.exists() and process.is_alive() and time.monotonic() < begin + PATIENCE:
                time.sleep(0.0005)
        else:
            process.join(after)
        if process.is_alive():
            os.kill(process.pid, number)
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the run did not end within {PATIENCE} s")
    said = errors.read_text() if errors.exists() else ""
    return End(process.exitcode, said, time.monotonic() - begin)


def _child(arguments: list[str], errors: Path, draw: bool) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    for name in () if draw else ("curves", "label_heatmap", "contact_sheet"):
        setattr(pictures, name, _written)
    with errors.open("w", encoding="utf-8") as stream, Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = nowhere, stream
        code = cifar.main(arguments)
    os._exit(code)


def _written(file: Path, *_: object, **__: object) -> None:
    with files.replacing(file) as stream:
        stream.write(b"picture")


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a log without the times, which differ between any two runs."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in ("seconds", "line")} for record in records]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all trained weights of the last checkpoint."""
    recipe = checkpoint.load(folder / checkpoint.NAME)["run"]["recipe"]
    parts = {name: state for name, state in recipe.items() if isinstance(state, dict)}
    entries = ((f"{part}.{name}", value) for part, state in parts.items() for name, value in state.items())
    return {name: value for name, value in entries if isinstance(value, torch.Tensor)}


def assert_same(one: Path, other: Path) -> None:
    """Compare every number that two finished runs have left, exactly."""
    assert log_of(one) == log_of(other)
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    tables = [(folder / "corrected_labels.csv").read_text() for folder in (one, other)]
    assert tables[0] == tables[1]
    assert tables[0].count("\n") > 1
    assert not list(other.glob(f"*{files.UNFINISHED}"))
