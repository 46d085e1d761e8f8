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
    """Open a file beside ``file`` that takes its place when all is written, and is deleted if that fails."""
    unfinished = file.with_name(file.name + UNFINISHED)
    try:
        with unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Delete what a process that was killed while writing has left."""
    for file in folder.glob(f"*{UNFINISHED}"):
        file.unlink()
