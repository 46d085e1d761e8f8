"""The run's log: one JSON object a line, readable by people, by `jq` and by pandas (``read_json(lines=True)``)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Log:
    """Appends records to a file and keeps them at hand.

    A log is continued by handing it the size it had at the checkpoint: what was written after that belongs to work that
    is done again, and is cut off, so that a resumed run leaves the same log as an uninterrupted one.

    Args:
        file: The log.
        size: Bytes of it that are kept.
        listener: Is told every record too, those that are kept first.
    """

    def __init__(self, file: Path, size: int = 0, listener: Callable[[Record], None] | None = None) -> None:
        self.file, self.listener = file, listener
        with file.open("ab") as stream:  # what is kept is never written again, so a kill cannot lose it
            if stream.tell() < size:
                rule = f"has {stream.tell()} bytes, and {size} at the checkpoint"
                raise ValueError(f"Log({file}): {rule}. It was changed since. Put it back, or start another run.")
            stream.truncate(size)
        self.records: list[Record] = [json.loads(line) for line in file.read_bytes().splitlines()]
        for record in self.records:
            self._tell(record)

    def write(self, event: str, **values: Any) -> None:
        """Append one record; floats are rounded to six significant digits."""
        record = {"event": event, **{name: _short(value) for name, value in values.items()}}
        self.records.append(record)
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self._tell(record)

    def sync(self) -> int:
        """Wait until all records are on the disk; return the size of the file in bytes."""
        with self.file.open("rb") as stream:
            os.fsync(stream.fileno())
            return stream.seek(0, os.SEEK_END)

    def epochs(self) -> list[Record]:
        """Return the records written at the end of each epoch."""
        return [record for record in self.records if record["event"] == "epoch"]

    def _tell(self, record: Record) -> None:
        if self.listener:
            self.listener(record)


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
