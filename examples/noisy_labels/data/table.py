"""Tables in CSV or Parquet files, through pandas: columns of text, and a name for each row, for messages."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas

from examples.noisy_labels.run.files import replacing

DELIMITERS = (",", ";", "\t", "|")
PARQUET = ".parquet"
LISTED = 12  # column names in a message


@dataclass(frozen=True)
class Table:
    """Columns of text, stripped of surrounding spaces; an empty text where a cell is missing.

    Args:
        file: Where it was read from.
        cells: A column of texts for each column; its index counts rows as spreadsheets do.
        unnamed: Columns without a name, which are called by their position. Most often they are row numbers.
    """

    file: Path
    cells: pandas.DataFrame
    unnamed: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.cells.columns)

    def column(self, name: str, role: str) -> list[str]:
        """Return the cells of a column; ``role`` is the option that asks for it."""
        if name not in self.cells:
            there = ", ".join(self.columns[:LISTED]) + (", ..." if len(self.columns) > LISTED else "")
            rule = f"there is no such column, but {there}"
            advice = "Is the name misspelt? If the columns look wrong, give --delimiter"
            raise ValueError(f"Table({self.file.name}, {role}={name!r}): {rule}. {advice}.")
        cells: list[str] = self.cells[name].tolist()
        return cells

    def where(self, row: int) -> str:
        """Return how a message names a row."""
        return f"{self.file.name}, row {self.cells.index[row]}"


def read(file: Path, *, delimiter: str | None = None, encoding: str = "utf-8-sig") -> Table:
    """Read a CSV file whose first row has the names of the columns and whose empty rows are skipped, or Parquet.

    Raises:
        ValueError: It is no such file, or its rows are not all alike.
        OSError: It is not there.
    """
    if not file.is_file():
        raise FileNotFoundError(f"Table({file}): there is no such file.")
    if file.suffix.lower() == PARQUET:
        return _parquet(file)
    name = file.name
    text = text_of(file, encoding, "Table")
    body = re.sub(r"^(\s*\n)+", "", text)
    if not body.strip():
        rule = "the file is empty"
        raise ValueError(f"Table({name}): {rule}. It needs a row of column names and a row for each sample.")
    separator = delimiter.replace("\\t", "\t") if delimiter else max(DELIMITERS, key=body.splitlines()[0].count)
    before = text[: len(text) - len(body)].count("\n")
    frame = _parsed(name, body, separator, before)
    frame.index += before + 1
    holds, whole = (frame.fillna("") != "").any(axis=1), frame.notna().all(axis=1)
    frame = frame[holds | whole if frame.shape[1] > 1 else holds]
    short = frame.isna().any(axis=1)
    if short.any():
        rule = f"has {int(frame[short].iloc[0].notna().sum())} cells, and the first {frame.shape[1]}"
        raise ValueError(f"Table({name}, row {short.idxmax()}): {rule}. {_RAGGED}.")
    frame = frame.map(str.strip)
    header = [cell or f"column {i + 1}" for i, cell in enumerate(frame.iloc[0])]
    if len(set(header)) < len(header):
        twice = next(one for one in header if header.count(one) > 1)
        raise ValueError(f"Table({name}): two columns are called {twice!r}. Every column needs a name of its own.")
    if len(frame) == 1:
        raise ValueError(f"Table({name}): there is no row after the column names. Is it the right file?")
    unnamed = tuple(one for one, cell in zip(header, frame.iloc[0], strict=True) if not cell)
    return Table(file, frame.iloc[1:].set_axis(header, axis=1), unnamed)


def text_of(file: Path, encoding: str, owner: str) -> str:
    """Return the text in a file."""
    try:
        return file.read_text(encoding=encoding)
    except (UnicodeError, LookupError) as problem:
        rule = f"is not a text in {encoding} ({problem})"
        advice = "A spreadsheet must be saved as CSV first; --encoding names another encoding, for example cp1252"
        raise ValueError(f"{owner}({file.name}): {rule}. {advice}.") from None


def write(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns as CSV, numbers with at most four decimals, or as Parquet, whichever the file is called after."""
    frame = pandas.DataFrame({name: list(values) for name, values in columns.items()})
    try:
        with replacing(file) as stream:
            if file.suffix == PARQUET:
                frame.to_parquet(stream, index=False)
            else:
                stream.write(frame.to_csv(index=False, float_format="%.4f", lineterminator="\r\n").encode())
    except ImportError:
        raise ValueError(_without_pyarrow(file)) from None


_RAGGED = "A cell that holds the delimiter must be quoted; another delimiter is named with --delimiter"


def _parsed(name: str, text: str, separator: str, before: int) -> pandas.DataFrame:
    """Return all rows alike, that of the names too; a cell that a row lacks is missing."""
    try:
        return pandas.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None,
            dtype=str,
            keep_default_na=False,
            skipinitialspace=True,
            skip_blank_lines=False,
            engine="python",  # which tells a missing cell from an empty one
        )
    except pandas.errors.ParserError as problem:
        found = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(problem))
        if found:
            wanted, row, there = map(int, found.groups())
            rule = f"has {there} cells, and the first {wanted}"
            raise ValueError(f"Table({name}, row {row + before}): {rule}. {_RAGGED}.") from None
        rule = " ".join(str(problem).split())
        raise ValueError(f"Table({name}): {rule}. Most often a quotation mark is not closed.") from None


def _parquet(file: Path) -> Table:
    try:
        frame = pandas.read_parquet(file)
    except ImportError:
        raise ValueError(_without_pyarrow(file)) from None
    except Exception as problem:  # whatever the engines raise on a broken file
        rule = f"cannot be read as Parquet ({' '.join(str(problem).split())})"
        raise ValueError(f"Table({file.name}): {rule}. Is it whole?") from None
    if frame.index.name is not None:  # pandas stores a named index as a column
        frame = frame.reset_index()
    if not len(frame):
        raise ValueError(f"Table({file.name}): there is no row in it. Is it the right file?")
    cells = pandas.DataFrame({str(name): [_text(one) for one in frame[name].tolist()] for name in frame.columns})
    cells.index += 1
    return Table(file, cells)


def _text(cell: Any) -> str:
    """Return a cell as CSV would hold it."""
    if cell is None or cell is pandas.NA or cell != cell:
        return ""
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15:
        return str(int(cell))  # integers with missing ones among them are stored as floats
    return str(cell).strip()


def _without_pyarrow(file: Path) -> str:
    rule = "Parquet is read and written by pyarrow, which is not installed"
    return f'Table({file.name}): {rule}. Install it (pip install -e ".[parquet]"), or save as CSV.'
