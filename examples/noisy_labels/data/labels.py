"""Labels from columns of text: class names, votes, and which samples are trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
import torch
from torch import Tensor

from examples.noisy_labels.data import table as tables
from examples.noisy_labels.data.table import PARQUET, Table
from examples.noisy_labels.run.options import Options

Known = dict[int, str]  # a trusted label for each of some rows


def identifiers(table: Table, options: Options) -> list[str]:
    """Return the name of each row: unique, not empty."""
    if options.id is not None:
        column, role = options.id, "id"
    elif options.images is not None:
        column, role = options.file_column, "file_column"
    elif "id" in table.columns:
        column, role = "id", "id"
    else:
        return [str(row + 1) for row in range(len(table))]
    cells = pandas.Series(table.column(column, role))
    for row in cells.index[cells == ""][:1]:
        raise ValueError(f"Table({table.where(row)}, column {column!r}): has no id. Every row needs one.")
    for row in cells.index[cells.duplicated()][:1]:
        first = table.where(int((cells == cells[row]).argmax()))
        rule = f"the id {cells[row]!r} is that of {first.rpartition(', ')[2]} already"
        raise ValueError(f"Table({table.where(row)}, column {column!r}): {rule}. Every row needs one of its own.")
    return list(cells)


def label_columns(table: Table, options: Options) -> tuple[str, ...]:
    """Return the columns that hold given labels."""
    if options.annotators is None and options.label is None and "label" not in table.columns:
        rule = "no column is called 'label', and none is named as the labels'"
        there = ", ".join(table.columns[: tables.LISTED])
        advice = f"Give --label or --annotators; the columns are {there}. If they look wrong, give --delimiter"
        raise ValueError(f"Table({table.file.name}): {rule}. {advice}.")
    role = "label" if options.annotators is None else "annotators"
    names = options.annotators or (options.label or "label",)
    for name in names:
        table.column(name, role)
    return names


def known_labels(file: str | None, role: str, table: Table, ids: Sequence[str], options: Options) -> Known:
    """Return the trusted labels of the rows that a file names, or of those with a cell in the trusted column.

    The labels are, whichever is there first: in the column ``--trusted-column`` of the file, in the file's column that
    is called as the labels' column of the table, in the file's second column if it has two, in the column
    ``--trusted-column`` of the table, in the labels' column of the table.
    """
    if file is None:
        cells = table.column(options.trusted_column or "", "trusted_column")
        return {row: cell for row, cell in enumerate(cells) if cell}
    path = Path(file)
    rows, labels, places = _rows(path, role, table, ids, options)
    if labels is None:
        of_table = _column_of_trusted(path, table, options)
        labels = [of_table[row] for row in rows]
    known: Known = {}
    for row, label, place in zip(rows, labels, places, strict=True):
        if row in known:
            raise ValueError(f"{role}({place}): the id {ids[row]!r} is there twice. Name each sample once.")
        if not label:
            rule = f"the trusted sample {ids[row]!r} has no label"
            raise ValueError(f"{role}({place}): {rule}. Give it one, or take it out of the list.")
        known[row] = label
    if not known:
        raise ValueError(f"{role}({path.name}): the file names no sample. Correction needs some trusted ones.")
    return known


def rows_named(file: str, role: str, table: Table, ids: Sequence[str], options: Options) -> list[int]:
    """Return the rows whose ids a file names."""
    return _rows(Path(file), role, table, ids, options)[0]


def class_names(labels: set[str]) -> tuple[str, ...]:
    """Return the classes in order: by number if all are integers, else by name."""
    return tuple(sorted(labels, key=int if all(map(_is_integer, labels)) else str))


def canonical(cells: Sequence[str]) -> list[str]:
    """Return labels with ``3.0`` written as ``3``, if all are integers: so are they written where some are missing."""
    if all(_is_integer(cell) for cell in cells if cell):
        return [str(int(float(cell))) if cell else cell for cell in cells]
    return list(cells)


def count_votes(columns: Sequence[Sequence[str]], names: tuple[str, ...]) -> Tensor:
    """Return how many columns name each class, (rows, classes)."""
    cells, known = np.array(columns, dtype=object), np.array(names, dtype=object)
    return torch.from_numpy((cells[..., None] == known).sum(0)).float()


def _rows(
    path: Path, role: str, table: Table, ids: Sequence[str], options: Options
) -> tuple[list[int], list[str] | None, list[str]]:
    """Return the rows whose ids a file names, the labels beside them if it has any, and where each is."""
    named, labels, places = _listed(path, role, set(ids), options)
    rows = {one: row for row, one in enumerate(ids)}
    for one, place in zip(named, places, strict=True):
        if one not in rows:
            rule = f"the id {one!r} is not in {table.file.name}, whose first ids are {', '.join(ids[:3])}"
            raise ValueError(f"{role}({place}): {rule}. Is it misspelt, or is --id another column?")
    return [rows[one] for one in named], labels, places


def _listed(path: Path, role: str, ids: set[str], options: Options) -> tuple[list[str], list[str] | None, list[str]]:
    if path.suffix.lower() in (".csv", ".tsv", PARQUET):
        table = tables.read(path, encoding=options.encoding)  # its delimiter may differ from the table's
        if len(table.columns) == 1 and options.delimiter is not None:
            table = tables.read(path, delimiter=options.delimiter, encoding=options.encoding)
        head = table.columns
        if len(head) > 1 or head[0] not in ids:  # else a plain list that is called .csv
            column = next((one for one in (options.id, options.file_column, "id") if one in head), head[0])
            others = [one for one in head if one != column]
            wanted = (options.trusted_column, options.label, "label")
            answer = next((one for one in wanted if one in others), others[0] if len(others) == 1 else None)
            labels = None if answer is None else table.column(answer, "trusted_column")
            return table.column(column, "id"), labels, [table.where(row) for row in range(len(table))]
    if not path.is_file():
        raise FileNotFoundError(f"{role}({path}): there is no such file.")
    lines = tables.text_of(path, options.encoding, role).splitlines()
    numbered = [(i + 1, line.strip()) for i, line in enumerate(lines) if line.strip()]
    return [line for _, line in numbered], None, [f"{path.name}, line {i}" for i, _ in numbered]


def _column_of_trusted(path: Path, table: Table, options: Options) -> list[str]:
    if options.trusted_column is not None:
        return table.column(options.trusted_column, "trusted_column")
    if options.annotators is not None:
        rule = "has ids without labels, and of several annotators' columns none is the trusted one"
        raise ValueError(f"Trusted({path.name}): {rule}. Give the labels in it, or name --trusted-column.")
    return table.column(label_columns(table, options)[0], "label")


def _is_integer(cell: str) -> bool:
    try:
        return float(cell).is_integer()
    except (ValueError, OverflowError):
        return False
