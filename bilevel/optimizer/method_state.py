"""What a method remembers from step to step, as values: declared once, then saved, checked, cast and undone.

A method declares what it keeps, reads it while it computes, and answers with the new values in ``Directions.state``.
Only moving commits them: looking twice remembers nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from ..directions import Directions, Mark, NamedTensors, Reduction
from ..levels import Level
from ..vectors import Vector, accumulation_dtype

V = TypeVar("V", bound=NamedTensors | int | Tensor | None)
StateStart = Literal["nothing", "zeros", "variables"]


class Remembered(ABC, Generic[V]):
    """One value of a method's state; it is replaced, never written into (a table's rows apart)."""

    def __init__(self, name: str, start: V, reduction: Reduction | None) -> None:
        self.name = name
        self.reduction = reduction
        self.stored = start

    @property
    def known(self) -> bool:
        """Whether anything was remembered yet."""
        return bool(self.stored)

    def saved(self) -> V:
        """Return what is stored as a checkpoint needs it."""
        return self.stored

    def before(self, value: Any) -> Any:
        """Return what undoes that ``value`` is committed."""
        return self.stored

    def commit(self, value: Any) -> None:
        """Replace what is stored by what :meth:`fitted` returned."""
        self.stored = value

    @abstractmethod
    def fitted(self, value: Any) -> Any:
        """Return ``value`` where it belongs (device, dtype), or raise ValueError if it does not fit."""

    def loaded(self, value: Any) -> V:
        """The same for what :meth:`saved` returned."""
        found: V = self.fitted(value)
        return found


class LevelState(Remembered[NamedTensors]):
    """Tensors named and shaped like the variables of a level.

    Attributes:
        value: What is remembered, as a vector. What is not known yet is as ``start`` says.
    """

    def __init__(self, name: str, level: Level, start: StateStart, reduction: Reduction | None) -> None:
        super().__init__(name, {}, reduction)
        self._level, self._start = level, start

    @property
    def value(self) -> Vector:
        variables = zip(self._level.names, self._level.tensors, strict=True)
        return Vector((self.stored.get(n, self._beginning(x)) for n, x in variables), self._level.names)

    def saved(self) -> NamedTensors:
        """Without variables that were frozen since: an optimizer that is built anew does not know them."""
        names = set(self._level.trainable())
        return {name: x for name, x in self.stored.items() if name in names}

    def of(self, directions: Directions[Any]) -> Vector:
        """Return the tensors that ``directions`` would commit."""
        value = directions.state.get(self.name, {})
        named: Any = value if isinstance(value, Mapping) else {}
        return Vector((named.get(name) for name in self._level.names), self._level.names)

    def fitted(self, value: Any) -> NamedTensors:
        if not isinstance(value, Mapping):
            raise ValueError(f"the state {self.name} is a {type(value).__name__}, expected tensors by name")
        return fitted_to(f"the state {self.name}", value, self._level)

    def _beginning(self, variable: Tensor) -> Tensor | None:
        if self._start == "nothing":
            return None
        return variable.detach().clone() if self._start == "variables" else torch.zeros_like(variable)


class ScalarState(Remembered[int]):
    """An integer, such as a counter.

    Attributes:
        value: The integer.
    """

    @property
    def value(self) -> int:
        return self.stored

    def fitted(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"the state {self.name} is {value!r}, expected an integer >= 0")
        return value


class NumberState(Remembered[Tensor | None]):
    """A number that a step computes, such as a multiplier: a 0-dim tensor in the accumulation dtype, on the device.

    Attributes:
        value: The number; what is not known yet is the start.
    """

    def __init__(self, name: str, level: Level, start: float, reduction: Reduction | None) -> None:
        super().__init__(name, None, reduction)
        self._level, self._start = level, start

    @property
    def known(self) -> bool:
        return self.stored is not None

    @property
    def value(self) -> Tensor:
        if self.stored is not None:
            return self.stored
        device = self._level.tensors[0].device
        return torch.full((), self._start, dtype=accumulation_dtype(device), device=device)

    def fitted(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
            shown = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"the state {self.name} is {shown!r}, expected a floating-point tensor of shape ()")
        device = self._level.tensors[0].device
        return value.to(device, accumulation_dtype(device), non_blocking=True)

    def loaded(self, value: Any) -> Tensor | None:
        return None if value is None else self.fitted(value)


def fitted_to(what: str, value: NamedTensors, level: Level, *leading: int) -> NamedTensors:
    """Return tensors where the variables of a level are, or raise ValueError if one does not fit its variable."""
    variables = dict(zip(level.names, level.tensors, strict=True))
    for name, x in value.items():
        if name not in variables:
            raise ValueError(f"{what} names {name}, which is no {level.side} variable")
        expected = (*leading, *variables[name].shape)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{what} of {name} is {kind}, expected a floating-point tensor")
        if tuple(x.shape) != expected:
            raise ValueError(f"{what} of {name} has shape {tuple(x.shape)}, expected {expected}")
    return {name: x.to(variables[name].device, variables[name].dtype) for name, x in value.items()}


class MethodState:
    """All that one method remembers, and how often it was committed."""

    def __init__(self) -> None:
        self._entries: dict[str, Remembered[Any]] = {}
        self._version = 0

    def declare(self, entry: Remembered[Any]) -> None:
        if entry.name in self._entries:
            raise ValueError(f"the state {entry.name} is declared twice. Give each its own name.")
        self._entries[entry.name] = entry

    def mark(self) -> Mark:
        """Return from which state directions are taken now, and how theirs may be reduced over tasks."""
        return Mark(id(self), self._version, {name: entry.reduction for name, entry in self._entries.items()})

    def is_stale(self, mark: Mark | None) -> bool:
        """Whether the state moved since ``mark``, or is that of another optimizer."""
        return mark is not None and (mark.owner, mark.version) != (id(self), self._version)

    def fitted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return new ``values`` checked and cast, without a change."""
        self._check_names(values, complete=False)
        return {name: self._entries[name].fitted(value) for name, value in values.items()}

    def loaded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same for what :meth:`copy` returned: every declared one must be there."""
        self._check_names(values, complete=True)
        return {name: self._entries[name].loaded(value) for name, value in values.items()}

    def commit(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Replace what ``values`` name; return what undoes it."""
        before = {name: self._entries[name].before(value) for name, value in values.items()}
        for name, value in values.items():
            self._entries[name].commit(value)
        self._version += bool(values)
        return before

    def put_back(self, values: Mapping[str, Any]) -> None:
        """Undo a commit, from what it returned."""
        for name, value in values.items():
            self._entries[name].commit(value)
        self._version += bool(values)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are remembered."""
        stored = [entry.stored for entry in self._entries.values()]
        single = [value for value in stored if isinstance(value, Tensor)]
        return single + [x for value in stored if isinstance(value, Mapping) for x in value.values()]

    def copy(self) -> dict[str, Any]:
        found = {name: entry.saved() for name, entry in self._entries.items()}
        return deepcopy({name: dict(v) if isinstance(v, Mapping) else v for name, v in found.items()})

    def _check_names(self, values: Mapping[str, Any], *, complete: bool) -> None:
        unknown = sorted(set(values) - set(self._entries))
        missing = sorted(set(self._entries) - set(values)) if complete else []
        if unknown or missing:
            raise ValueError(f"the method's state is {sorted(self._entries)}, got {sorted(values)}")
