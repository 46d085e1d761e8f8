"""Labels from columns of text: class names, votes, and which samples are trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.noisy_labels.data import table as tables
from examples.noisy_labels.data.parquet import PARQUET
from examples.noisy_labels.data.table import Table
from examples.noisy_labels.run.options import Options

Known = dict[int, str]  # a trusted label for each of some rows


def identifiers(table: Table, options: Options) -> list[str]:
    """Return the name of each row: unique, not empty."""
    if options.id is not None:
        column, cells = options.id, table.column(options.id, "id")
    elif options.images is not None:
        column, cells = options.file_column, table.column(options.file_column, "file_column")
    elif "id" in table.columns:
        column, cells = "id", table.columns["id"]
    else:
        return [str(row + 1) for row in range(len(table))]
    first: dict[str, int] = {}
    for row, cell in enumerate(cells):
        if not cell:
            raise ValueError(f"Table({table.where(row)}, column {column!r}): has no id. Every row needs one.")
        if cell in first:
            rule = f"the id {cell!r} is that of line {table.lines[first[cell]]} already"
            raise ValueError(f"Table({table.where(row)}, column {column!r}): {rule}. Every row needs one of its own.")
        first[cell] = row
    return cells


def label_columns(table: Table, options: Options) -> tuple[str, ...]:
    """Return the columns that hold given labels."""
    if options.annotators is not None:
        for name in options.annotators:
            table.column(name, "annotators")
        return options.annotators
    if options.label is None and "label" not in table.columns:
        rule = "which column holds the labels is not said"
        there = ", ".join(list(table.columns)[: tables.SHOWN])
        advice = f"Give --label or --annotators; the columns are {there}. If they look wrong, give --delimiter"
        raise ValueError(f"Table({table.file.name}): {rule}. {advice}.")
    name = options.label or "label"
    table.column(name, "label")
    return (name,)


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
    named, labels, places = _listed(path, set(ids), options)
    rows = {one: row for row, one in enumerate(ids)}
    if labels is None:
        labels_of_table = _column_of_trusted(path, table, options)
    known: Known = {}
    for i, (one, place) in enumerate(zip(named, places, strict=True)):
        if one not in rows:
            rule = f"the id {one!r} is not in {table.file.name}, whose first ids are {', '.join(ids[:3])}"
            raise ValueError(f"{role}({place}): {rule}. Is it misspelt, or is --id another column?")
        row = rows[one]
        if row in known:
            raise ValueError(f"{role}({place}): the id {one!r} is there twice. Name each sample once.")
        known[row] = labels[i] if labels is not None else labels_of_table[row]
        if not known[row]:
            rule = f"the trusted sample {one!r} has no label"
            raise ValueError(f"{role}({place}): {rule}. Give it one, or take it out of the list.")
    if not known:
        raise ValueError(f"{role}({path.name}): the file names no sample. Correction needs some trusted ones.")
    return known


def rows_named(file: str, role: str, table: Table, ids: Sequence[str], options: Options) -> list[int]:
    """Return the rows whose ids a file names."""
    named, _, places = _listed(Path(file), set(ids), options)
    rows = {one: row for row, one in enumerate(ids)}
    for one, place in zip(named, places, strict=True):
        if one not in rows:
            rule = f"the id {one!r} is not in {table.file.name}, whose first ids are {', '.join(ids[:3])}"
            raise ValueError(f"{role}({place}): {rule}. Is it misspelt, or is --id another column?")
    return [rows[one] for one in named]


def class_names(labels: set[str]) -> tuple[str, ...]:
    """Return the classes in order: by number if all are integers, else by name."""
    if all(_is_integer(one) for one in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def canonical(cells: Sequence[str]) -> list[str]:
    """Return labels with ``3.0`` written as ``3``, if all are integers: so are they written where some are missing."""
    if all(_is_integer(cell) for cell in cells if cell):
        return [str(int(float(cell))) if cell else cell for cell in cells]
    return list(cells)


def count_votes(columns: Sequence[Sequence[str]], names: tuple[str, ...]) -> Tensor:
    """Return how many columns name each class, (rows, classes)."""
    position = {name: i for i, name in enumerate(names)}
    votes = torch.zeros(len(columns[0]), len(names))
    for cells in columns:
        for row, cell in enumerate(cells):
            if cell:
                votes[row, position[cell]] += 1
    return votes


def _listed(path: Path, ids: set[str], options: Options) -> tuple[list[str], list[str] | None, list[str]]:
    """Return the ids in a file, their labels if it has any, and where each is."""
    if path.suffix.lower() not in (".csv", ".tsv", PARQUET):
        return _listed_in_text(path, options)
    table = tables.read(path, encoding=options.encoding)  # its delimiter may differ from the table's
    if len(table.columns) == 1 and options.delimiter is not None:
        table = tables.read(path, delimiter=options.delimiter, encoding=options.encoding)
    head = list(table.columns)
    if len(head) == 1 and head[0] in ids:  # a plain list that is called .csv
        return _listed_in_text(path, options)
    column = next((one for one in (options.id, options.file_column, "id") if one in table.columns), head[0])
    places = [table.where(row) for row in range(len(table))]
    others = [one for one in head if one != column]
    wanted = (options.trusted_column, options.label, "label")
    answer = next((one for one in wanted if one in others), others[0] if len(others) == 1 else None)
    return table.columns[column], None if answer is None else table.columns[answer], places


def _listed_in_text(path: Path, options: Options) -> tuple[list[str], None, list[str]]:
    if not path.is_file():
        raise FileNotFoundError(f"Trusted({path}): there is no such file.")
    try:
        lines = path.read_text(encoding=options.encoding).splitlines()
    except (UnicodeDecodeError, LookupError) as problem:
        rule = f"is not a text in {options.encoding} ({problem})"
        raise ValueError(f"Trusted({path.name}): {rule}. Another encoding is said with --encoding.") from None
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
