"""What a method remembers from step to step, as values: declared once, then saved, checked, cast and undone.

A method declares what it keeps, reads it while it computes, and answers with the new values in ``Directions.state``.
Only moving commits them: looking twice remembers nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Generic, TypeVar

from torch import Tensor

from ..directions import Directions, Mark, NamedTensors, Reduction, StateValue
from ..levels import Level
from ..vectors import Vector

V = TypeVar("V", bound=StateValue)


class Remembered(ABC, Generic[V]):
    """One value of a method's state; it is replaced, never written into."""

    def __init__(self, name: str, start: V, reduction: Reduction | None) -> None:
        self.name = name
        self.reduction = reduction
        self.value = start

    def saved(self) -> V:
        """Return the value as a checkpoint needs it."""
        return self.value

    @abstractmethod
    def fitted(self, value: Any) -> V:
        """Return ``value`` where it belongs (device, dtype), or raise ValueError if it does not fit."""


class LevelState(Remembered[NamedTensors]):
    """Tensors named and shaped like variables of a level; a variable may be without one."""

    def __init__(self, name: str, level: Level, reduction: Reduction | None) -> None:
        super().__init__(name, {}, reduction)
        self._level = level

    def vector(self) -> Vector:
        """Return the tensors in the order of the level's variables."""
        return [self.value.get(name) for name in self._level.names]

    def saved(self) -> NamedTensors:
        """Without variables that were frozen since: an optimizer that is built anew does not know them."""
        names = set(self._level.trainable())
        return {name: x for name, x in self.value.items() if name in names}

    def of(self, directions: Directions[Any]) -> Vector:
        """Return the tensors that ``directions`` would commit, in the order of the level's variables."""
        value = directions.state.get(self.name, {})
        return [value.get(name) for name in self._level.names] if isinstance(value, Mapping) else []

    def named(self, vector: Vector) -> NamedTensors:
        """Name a vector of the level, for ``Directions.state``."""
        return {name: x.detach() for name, x in zip(self._level.names, vector, strict=True) if x is not None}

    def fitted(self, value: Any) -> NamedTensors:
        if not isinstance(value, Mapping):
            raise ValueError(f"the state {self.name} is a {type(value).__name__}, expected tensors by name")
        variables = dict(zip(self._level.names, self._level.tensors, strict=True))
        for name, x in value.items():
            if name not in variables:
                raise ValueError(f"the state {self.name} names {name}, which is no {self._level.side} variable")
            expected = tuple(variables[name].shape)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"the state {self.name} of {name} is {kind}, expected a floating-point tensor")
            if tuple(x.shape) != expected:
                raise ValueError(f"the state {self.name} of {name} has shape {tuple(x.shape)}, expected {expected}")
        return {name: x.to(variables[name].device, variables[name].dtype) for name, x in value.items()}


class ScalarState(Remembered[int]):
    """An integer, such as a counter."""

    def fitted(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"the state {self.name} is {value!r}, expected an integer >= 0")
        return value


class MethodState:
    """All that one method remembers, and how often it was committed."""

    def __init__(self) -> None:
        self._entries: dict[str, Remembered[Any]] = {}
        self._version = 0

    def declare(self, entry: Remembered[Any]) -> None:
        self._entries[entry.name] = entry

    def mark(self) -> Mark:
        """Return from which state directions are taken now, and how theirs may be reduced over tasks."""
        return Mark(id(self), self._version, {name: entry.reduction for name, entry in self._entries.items()})

    def is_stale(self, mark: Mark | None) -> bool:
        """Whether the state moved since ``mark``, or is that of another optimizer."""
        return mark is not None and (mark.owner, mark.version) != (id(self), self._version)

    def fitted(self, values: Mapping[str, Any], *, complete: bool = False) -> dict[str, Any]:
        """Return ``values`` checked and cast, without a change; ``complete``: every declared one must be there."""
        unknown = sorted(set(values) - set(self._entries))
        missing = sorted(set(self._entries) - set(values)) if complete else []
        if unknown or missing:
            raise ValueError(f"the method's state is {sorted(self._entries)}, got {sorted(values)}")
        return {name: self._entries[name].fitted(value) for name, value in values.items()}

    def commit(self, values: Mapping[str, Any]) -> None:
        """Replace what ``values`` name."""
        for name, value in self.fitted(values).items():
            self._entries[name].value = value
        self._version += bool(values)

    def put_back(self, values: Mapping[str, Any]) -> None:
        """Undo commits since :meth:`values` returned ``values``."""
        for name, value in values.items():
            self._entries[name].value = value
        self._version += 1

    def values(self) -> dict[str, Any]:
        """Return all values by name; tensors are shared, and never written."""
        return {name: entry.value for name, entry in self._entries.items()}

    def copy(self) -> dict[str, Any]:
        found = {name: entry.saved() for name, entry in self._entries.items()}
        return deepcopy({name: dict(v) if isinstance(v, Mapping) else v for name, v in found.items()})
