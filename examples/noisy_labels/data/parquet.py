"""Parquet files through pandas, as columns of text: what is read and checked afterwards is the same as of CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.noisy_labels.run.files import replacing

PARQUET = ".parquet"


def read_parquet(file: Path) -> dict[str, list[str]]:
    """Return the cells of each column as text, empty where they are missing.

    Raises:
        ValueError: It is no Parquet file, or what reads it is not installed.
    """
    pandas = _pandas(file)
    try:
        frame = pandas.read_parquet(file)
    except ImportError:
        raise ValueError(_not_installed(file)) from None
    except Exception as problem:  # whatever the engines raise on a broken file
        said = " ".join(str(problem).split())
        raise ValueError(f"Table({file.name}): cannot be read as Parquet ({said}). Is it whole?") from None
    index = frame.index
    if index.name is not None:  # pandas stores a named index as a column
        frame = frame.reset_index()
    return {str(name): [_text(cell) for cell in frame[name].tolist()] for name in frame.columns}


def write_parquet(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns as a Parquet file."""
    frame = _pandas(file).DataFrame({name: list(values) for name, values in columns.items()})
    try:
        with replacing(file) as stream:
            frame.to_parquet(stream, index=False)
    except ImportError:
        raise ValueError(_not_installed(file)) from None


def _pandas(file: Path) -> Any:
    try:
        import pandas  # imports for a second, and only Parquet needs it
    except ImportError:
        raise ValueError(_not_installed(file)) from None
    return pandas


def _not_installed(file: Path) -> str:
    rule = "Parquet is read and written by pandas and pyarrow, which are not installed"
    return f'Table({file.name}): {rule}. Install them (pip install -e ".[parquet]"), or save as CSV.'


def _text(cell: Any) -> str:
    """Return a cell as CSV would hold it. Missing is whatever is not equal to itself, and what pandas calls NA."""
    if cell is None or type(cell).__name__ in ("NAType", "NaTType") or cell != cell:
        return ""
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15:
        return str(int(cell))  # integers with missing ones among them are stored as floats
    return str(cell).strip()
