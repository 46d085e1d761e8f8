"""A table with a row for each batch of a data set: what methods with variance reduction remember."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from ..directions import NamedTensors, Rows
from ..levels import Level
from ..vectors import Vector
from .method_state import Remembered, fitted_to


class TableState(Remembered[NamedTensors]):
    """A row like the variables of a level for each batch of a data set: the memory of variance reduction.

    Rows that were never written are zero. ``Directions.state`` names the rows that a step writes: ``{index: vector}``.
    Memory: ``rows`` copies of the level, made at the first write.
    """

    def __init__(self, name: str, level: Level, rows: int) -> None:
        super().__init__(name, {}, None)
        self._level, self.rows = level, rows

    def __getitem__(self, index: int) -> Vector:
        """Return a row; not a copy, so read it before the step that writes it is over."""
        self._check_index(index)
        variables = zip(self._level.names, self._level.tensors, strict=True)
        found = (self.stored[n][index] if n in self.stored else torch.zeros_like(x) for n, x in variables)
        return Vector(found, self._level.names)

    def mean(self) -> Vector:
        """Return the mean of all rows; it costs a pass over the table."""
        variables = zip(self._level.names, self._level.tensors, strict=True)
        found = (self.stored[n].mean(0) if n in self.stored else torch.zeros_like(x) for n, x in variables)
        return Vector(found, self._level.names)

    def saved(self) -> NamedTensors:
        names = set(self._level.trainable())
        return {name: x for name, x in self.stored.items() if name in names}

    def commit(self, value: Rows | NamedTensors) -> None:
        """Write rows, or put a whole table in the place of this one."""
        if all(isinstance(key, str) for key in value):
            self.stored = cast(NamedTensors, value)
            return
        variables = dict(zip(self._level.names, self._level.tensors, strict=True))
        table = dict(self.stored)
        for index, row in cast(Rows, value).items():
            for name, x in row.items():
                if name not in table:
                    table[name] = variables[name].detach().new_zeros((self.rows, *x.shape))
                table[name][index] = x
        self.stored = table

    def fitted(self, value: Any) -> Rows:
        if not isinstance(value, Mapping):
            raise ValueError(f"the state {self.name} is a {type(value).__name__}, expected rows by number")
        for index in value:
            self._check_index(index)
        what = f"the state {self.name}, row"
        return {index: fitted_to(f"{what} {index}", row, self._level) for index, row in value.items()}

    def loaded(self, value: Any) -> NamedTensors:
        if not isinstance(value, Mapping):
            raise ValueError(f"the state {self.name} is a {type(value).__name__}, expected tensors by name")
        return fitted_to(f"the state {self.name}", value, self._level, self.rows)

    def before(self, value: Rows | NamedTensors) -> Rows | NamedTensors:
        """Return copies of the rows that are written, or the table that is replaced."""
        if all(isinstance(key, str) for key in value):
            return self.stored
        return {index: self[index].clone().named() for index in cast(Rows, value)}

    def _check_index(self, index: Any) -> None:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < self.rows:
            raise ValueError(f"the state {self.name} has the rows 0 to {self.rows - 1}, got {index!r}")
