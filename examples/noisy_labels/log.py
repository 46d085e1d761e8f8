"""The run's log: one JSON object a line, readable by people, by `jq` and by pandas (``read_json(lines=True)``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Log:
    """Appends records to a file and keeps them at hand.

    A log is continued by handing it the size it had at the checkpoint: what was written after that belongs to work that
    is done again, and is cut off, so that a resumed run leaves the same log as an uninterrupted one.
    """

    def __init__(self, file: Path, size: int = 0) -> None:
        self.file = file
        kept = file.read_bytes()[:size] if size else b""
        file.write_bytes(kept)
        self.records: list[dict[str, Any]] = [json.loads(line) for line in kept.splitlines()]

    def write(self, event: str, **values: Any) -> None:
        """Append one record; floats are rounded to six significant digits."""
        record = {"event": event, **{name: _short(value) for name, value in values.items()}}
        self.records.append(record)
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    @property
    def size(self) -> int:
        """Return the size of the file in bytes."""
        return self.file.stat().st_size

    def epochs(self) -> list[dict[str, Any]]:
        """Return the records written at the end of each epoch."""
        return [record for record in self.records if record["event"] == "epoch"]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
