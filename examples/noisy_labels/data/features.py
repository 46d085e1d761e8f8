"""Columns of text as numbers: what is numeric is read, what is categorical becomes one column for each category."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.noisy_labels.data.table import Table
from examples.noisy_labels.run.options import Options

EMPTY = {"", "na", "n/a", "nan", "null", "none", "-", "?"}
MANY_CATEGORIES = 200


@dataclass(frozen=True)
class Encoding:
    """How features become numbers; part of the saved model. Columns are sorted, so their order in a file is no matter.

    Args:
        numeric: Numeric columns.
        categories: For each categorical column its categories; any other value is encoded as none of them.
        fill: What stands for an empty cell of a numeric column.
        missing: ``refuse`` or ``mean``, as told by ``--missing``; with the latter an empty category is none of them.
        decimal: What separates the decimals of a number.
    """

    numeric: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]
    fill: dict[str, float]
    missing: str
    decimal: str

    @property
    def width(self) -> int:
        """Return how many numbers a row becomes."""
        return len(self.numeric) + sum(map(len, self.categories.values()))

    def encode(self, table: Table) -> Tensor:
        """Return the features of all rows, float64 (rows, width)."""
        parts = [self._numbers(table, name)[:, None] for name in self.numeric]
        for name, known in self.categories.items():
            cells = np.array(table.column(name, "categorical"), dtype=object)
            self._refuse_empty(table, name)
            parts.append((cells[:, None] == np.array(known, dtype=object)[None]).astype(np.float64))
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which can be saved with tensors."""
        return asdict(self)

    def _numbers(self, table: Table, name: str) -> np.ndarray:
        cells = table.column(name, "features")
        values = np.array([number(table, row, name, cell, self.decimal) for row, cell in enumerate(cells)])
        empty = np.isnan(values)
        if empty.any() and name not in self.fill:
            raise ValueError(_empty(table, int(empty.argmax()), name))
        return np.where(empty, self.fill.get(name, 0.0), values)

    def _refuse_empty(self, table: Table, name: str) -> None:
        if self.missing == "mean":
            return
        for row, cell in enumerate(table.columns[name]):
            if cell.lower() in EMPTY:
                raise ValueError(_empty(table, row, name))


def fit(table: Table, options: Options, features: Sequence[str], rows: Sequence[int]) -> Encoding:
    """Learn categories and means from the rows that are trained on."""
    categorical = sorted(options.categorical or ())
    for name in categorical:
        table.column(name, "categorical")
    numeric = sorted(set(features) - set(categorical))
    categories = {}
    for name in categorical:
        known = sorted({table.columns[name][row] for row in rows} - ({""} if options.missing == "mean" else set()))
        if len(known) > MANY_CATEGORIES:
            rule = f"has {len(known)} categories, and at most {MANY_CATEGORIES} are sensible"
            raise ValueError(f"Table({table.file.name}, categorical={name!r}): {rule}. Is it a name? Use --ignore.")
        categories[name] = tuple(known)
    if not numeric and not categories:
        rule = "no column is left for the features"
        raise ValueError(f"Table({table.file.name}): {rule}. The columns are {', '.join(table.columns)}.")
    fill: dict[str, float] = {}
    if options.missing == "mean":
        for name in numeric:
            values = [number(table, row, name, table.column(name, "features")[row], options.decimal) for row in rows]
            known_values = [value for value in values if not math.isnan(value)]
            fill[name] = math.fsum(known_values) / len(known_values) if known_values else 0.0
    return Encoding(tuple(numeric), categories, fill, options.missing, options.decimal)


def number(table: Table, row: int, name: str, cell: str, decimal: str) -> float:
    """Return the number in a cell, NaN if the cell is empty."""
    if cell.lower() in EMPTY:
        return math.nan
    try:
        value = float(cell.replace(decimal, ".") if decimal == "," else cell)
    except ValueError:
        advice = "Name columns of text with --categorical, or leave them out with --ignore"
        if decimal == "." and _is_number(cell.replace(",", ".")):
            advice = "Decimal commas are said with --decimal ,"
        raise ValueError(f"Table({table.where(row)}, column {name!r}): {cell!r} is not a number. {advice}.") from None
    if not math.isfinite(value) or abs(value) > 1e150:  # squares must be finite for the standard deviation
        raise ValueError(f"Table({table.where(row)}, column {name!r}): {cell} is too large for a feature. Correct it.")
    return value


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _empty(table: Table, row: int, name: str) -> str:
    rule = "the cell is empty, and a feature must have a value"
    advice = "Fill it, or take the mean of the column with --missing mean, or leave the column out with --ignore"
    return f"Table({table.where(row)}, column {name!r}): {rule}. {advice}."
