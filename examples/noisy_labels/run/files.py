"""Writing a file so that, killed at any moment, either the old one or the new one is there, whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

UNFINISHED = ".unfinished"


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Open a file beside ``file`` that takes its place when all is written, and is deleted if that fails.

    Raises:
        OSError: With one line that names the file, the cause, and what to do.
    """
    unfinished = file.with_name(file.name + UNFINISHED)
    try:
        with unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    except BaseException as problem:
        _remove(unfinished)
        if isinstance(problem, OSError):
            raise not_written(file, problem) from problem
        raise


def not_written(file: Path, problem: OSError) -> OSError:
    """Return the error that says, in one line, why a file could not be written."""
    cause = problem.strerror or str(problem)
    rule = f"cannot be written ({cause})"
    return OSError(f"{file}: {rule}. What was there before is untouched. Make room or choose another --out.")


def refuse_unusable(folder: Path) -> None:
    """Refuse a folder that cannot be one, before hours are spent on what shall be written into it."""
    if "\0" in str(folder):
        raise ValueError("--out: a name cannot hold a zero character.")
    whole = folder.absolute()
    place = next(one for one in (whole, *whole.parents) if one.exists())
    if not place.is_dir():
        raise ValueError(f"--out {folder}: {place} is a file, not a folder. Name another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: nothing may be written into {place}. Name another --out.")


def sweep(folder: Path) -> None:
    """Delete what a process that was killed while writing has left."""
    for file in folder.glob(f"*{UNFINISHED}"):
        file.unlink()


def _remove(unfinished: Path) -> None:
    try:
        unfinished.unlink(missing_ok=True)
    except OSError:  # where not even that is possible, the first problem is the one to be told
        return
