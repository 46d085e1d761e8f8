"""Columns of text as numbers: what is numeric is read, what is categorical becomes one column for each category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas
import torch
from sklearn.preprocessing import OneHotEncoder
from torch import Tensor

from examples.noisy_labels.data.table import Table
from examples.noisy_labels.run.options import Options

EMPTY = ("", "na", "n/a", "nan", "null", "none", "-", "?")
MANY_CATEGORIES = 200
LARGEST = 1e150  # squares must be finite for the standard deviation


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

    def encode(self, table: Table) -> Tensor:
        """Return the features of all rows, float64, the numeric ones first."""
        parts = []
        for name in self.numeric:
            values = numbers(table, name, self.decimal)
            if np.isnan(values).any() and name not in self.fill:
                raise ValueError(_empty(table, int(np.isnan(values).argmax()), name))
            parts.append(np.nan_to_num(values, nan=self.fill.get(name, 0.0))[:, None])
        for name, known in self.categories.items():
            cells = pandas.Series(table.column(name, "categorical"))
            empty = cells.str.lower().isin(EMPTY)
            if empty.any() and self.missing == "refuse":
                raise ValueError(_empty(table, int(empty.argmax()), name))
            encoder = OneHotEncoder(categories=[list(known)], handle_unknown="ignore", sparse_output=False)
            parts.append(encoder.fit_transform(cells.to_frame()))
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which can be saved with tensors."""
        return asdict(self)


def fit(table: Table, options: Options, features: Sequence[str], rows: Sequence[int]) -> Encoding:
    """Learn categories and means from the rows that are trained on."""
    numeric = sorted(set(features) - set(options.categorical or ()))
    categories = {}
    for name in sorted(options.categorical or ()):
        cells = table.column(name, "categorical")
        known = sorted({cells[row] for row in rows} - ({""} if options.missing == "mean" else set()))
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
            values = numbers(table, name, options.decimal)[list(rows)]
            fill[name] = 0.0 if np.isnan(values).all() else float(np.nanmean(values))
    return Encoding(tuple(numeric), categories, fill, options.missing, options.decimal)


def numbers(table: Table, name: str, decimal: str) -> np.ndarray:
    """Return the numbers in a column, NaN where a cell is empty."""
    cells = pandas.Series(table.column(name, "features"))
    empty = cells.str.lower().isin(EMPTY)
    written = cells.str.replace(decimal, ".", regex=False).mask(empty)
    values = pandas.to_numeric(written, errors="coerce").to_numpy(dtype=float)
    for wrong in np.flatnonzero(np.isnan(values) & ~empty.to_numpy())[:1]:
        advice = "Name columns of text with --categorical, or leave them out with --ignore"
        if decimal == "." and pandas.notna(pandas.to_numeric(cells[wrong].replace(",", "."), errors="coerce")):
            advice = "Decimal commas are read with --decimal ,"
        rule = f"{cells[wrong]!r} is not a number"
        raise ValueError(f"Table({table.where(wrong)}, column {name!r}): {rule}. {advice}.")
    for large in np.flatnonzero(np.abs(values) > LARGEST)[:1]:
        rule = f"{cells[large]} is too large for a feature"
        raise ValueError(f"Table({table.where(large)}, column {name!r}): {rule}. Correct it.")
    return np.asarray(values)


def _empty(table: Table, row: int, name: str) -> str:
    rule = "the cell is empty, and a feature must have a value"
    advice = "Fill it, or take the mean of the column with --missing mean, or leave the column out with --ignore"
    return f"Table({table.where(row)}, column {name!r}): {rule}. {advice}."
