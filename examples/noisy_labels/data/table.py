"""CSV files as columns of text, with the line of each row, so that every complaint can name it."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from examples.noisy_labels.data.parquet import PARQUET, read_parquet

DELIMITERS = (",", ";", "\t", "|")
SHOWN = 12  # column names in a message


@dataclass(frozen=True)
class Table:
    """Columns of text, stripped of surrounding spaces.

    Args:
        file: Where it was read from.
        columns: Cells by column name.
        lines: The line of the file on which each row ends, counted from 1.
        unnamed: Columns without a name, which are called by their position. Most often they are row numbers.
    """

    file: Path
    columns: dict[str, list[str]]
    lines: list[int]
    unnamed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str, role: str) -> list[str]:
        """Return the cells of a column; ``role`` is the option that asks for it."""
        if name not in self.columns:
            there = ", ".join(list(self.columns)[:SHOWN]) + (", ..." if len(self.columns) > SHOWN else "")
            rule = f"there is no such column, but {there}"
            advice = "Is the name misspelt? If the columns look wrong, give --delimiter"
            raise ValueError(f"Table({self.file.name}, {role}={name!r}): {rule}. {advice}.")
        return self.columns[name]

    def where(self, row: int) -> str:
        """Return how a message names a row."""
        return f"{self.file.name}, line {self.lines[row]}"


def read(file: Path, *, delimiter: str | None = None, encoding: str = "utf-8-sig") -> Table:
    """Read a CSV file with a header, whose empty lines are skipped, or a Parquet file, whose lines are its rows."""
    if not file.is_file():
        raise FileNotFoundError(f"Table({file}): there is no such file.")
    name = file.name
    if file.suffix.lower() == PARQUET:
        columns = read_parquet(file)
        if not (there := len(next(iter(columns.values()), []))):
            raise ValueError(f"Table({name}): there is no row in it. Is it the right file?")
        return Table(file, columns, [row + 1 for row in range(there)])
    try:
        text = file.read_text(encoding=encoding)
    except (UnicodeDecodeError, LookupError) as problem:
        rule = f"is not a text in {encoding} ({problem})"
        advice = (
            "A spreadsheet must be saved as CSV first; another encoding is said with --encoding, for example cp1252"
        )
        raise ValueError(f"Table({name}): {rule}. {advice}.") from None
    text_lines = list(io.StringIO(text, newline=""))  # unlike splitlines, breaks lines where csv does
    first = next((line for line in text_lines if line.strip()), None)
    if first is None:
        raise ValueError(
            f"Table({name}): the file is empty. It needs a line of column names and a line for each sample."
        )
    separator = delimiter.replace("\\t", "\t") if delimiter else _delimiter(first)
    reader = csv.reader(text_lines, delimiter=separator, skipinitialspace=True, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped) or len(stripped) > 1:
                rows.append(stripped)
                lines.append(reader.line_num)
    except csv.Error as problem:
        raise ValueError(
            f"Table({name}, line {reader.line_num}): {problem}. Most often a quotation mark is not closed."
        ) from None
    header = [cell or f"column {i + 1}" for i, cell in enumerate(rows[0])]
    if len(set(header)) < len(header):
        twice = next(one for one in header if header.count(one) > 1)
        raise ValueError(f"Table({name}): two columns are called {twice!r}. Every column needs a name of its own.")
    for cells, line in zip(rows[1:], lines[1:], strict=True):
        if len(cells) != len(header):
            rule = f"has {len(cells)} cells, and the first line {len(header)}"
            advice = "A cell that holds the delimiter must be quoted; another delimiter is said with --delimiter"
            raise ValueError(f"Table({name}, line {line}): {rule}. {advice}.")
    if len(rows) == 1:
        raise ValueError(f"Table({name}): there is no row after the column names. Is it the right file?")
    columns = {one: [cells[i] for cells in rows[1:]] for i, one in enumerate(header)}
    return Table(file, columns, lines[1:], tuple(one for one, cell in zip(header, rows[0], strict=True) if not cell))


def _delimiter(header: str) -> str:
    """Return the delimiter that finds the most columns in the header; names hold other delimiters now and then."""

    def columns(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter, skipinitialspace=True)))

    return max(DELIMITERS, key=columns)
