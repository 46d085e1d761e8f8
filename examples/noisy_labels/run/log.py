"""The run's log: one JSON object a line, readable by people, by `jq` and by pandas (``read_json(lines=True)``)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.noisy_labels.run.files import not_written

Record = dict[str, Any]
Mark = dict[str, Any]  # how far a log had come, and the SHA-256 of that


class Log:
    """Appends records to a file and keeps them at hand.

    A log is continued by handing it the mark it had at the checkpoint: what was written after that belongs to work that
    is done again, and is cut off, so that a resumed run leaves the same log as an uninterrupted one.

    Args:
        file: The log.
        mark: What `sync` returned: how much of it is kept. Without one it is begun anew.
        listener: Is told every record too, those that are kept first.
        writes: False: another process writes the file, and this one has the records in mind alone.
    """

    def __init__(
        self,
        file: Path,
        mark: Mark | None = None,
        listener: Callable[[Record], None] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self.file, self.listener, self.writes = file, listener, writes
        kept = b"" if mark is None else _kept(file, mark)
        if writes:
            with file.open("ab") as stream:  # what is kept is never written again, so a kill cannot lose it
                stream.truncate(len(kept))
        self.records: list[Record] = [json.loads(line) for line in kept.splitlines()]
        for record in self.records:
            self._tell(record)

    def write(self, event: str, **values: Any) -> None:
        """Append one record; floats are rounded to six significant digits."""
        record = {"event": event, **{name: _short(value) for name, value in values.items()}}
        self.records.append(record)
        if self.writes:
            self._append((json.dumps(record) + "\n").encode())
        self._tell(record)

    def sync(self) -> Mark:
        """Wait until all records are on the disk; return the size of the file in bytes and its SHA-256."""
        with self.file.open("rb") as stream:
            os.fsync(stream.fileno())
            content = stream.read()
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def epochs(self) -> list[Record]:
        """Return the records written at the end of each epoch."""
        return [record for record in self.records if record["event"] == "epoch"]

    def _append(self, line: bytes) -> None:
        """Write a line whole or not at all: half a record would be no JSON."""
        with self.file.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                written = stream.write(line)
                if written < len(line):  # a disk that has just become full takes a part, and refuses the next one
                    stream.write(line[written:])
            except OSError as problem:
                stream.truncate(before)
                raise not_written(self.file, problem) from problem

    def _tell(self, record: Record) -> None:
        if self.listener:
            self.listener(record)


def has_trained(file: Path) -> bool:
    """Return whether a log, or what is left of it, tells of more than that a run was started."""
    return file.is_file() and len(file.read_bytes().splitlines()) > 1


def _kept(file: Path, mark: Mark) -> bytes:
    """Return what a log held at its mark, if that is still there."""
    content, size = file.read_bytes() if file.is_file() else b"", mark["size"]
    advice = "It was changed since. Put it back, or start another run"
    if len(content) < size:
        raise ValueError(f"Log({file}): has {len(content)} bytes, and {size} at the checkpoint. {advice}.")
    if hashlib.sha256(content[:size]).hexdigest() != mark["sha256"]:
        raise ValueError(f"Log({file}): is not what it was at the checkpoint: its SHA-256 differs. {advice}.")
    return content[:size]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
