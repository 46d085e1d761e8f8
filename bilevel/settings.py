"""Hyperparameters as attributes: what a constructor checks is checked again when it is set while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

from .errors import choice, count, message, number

V = TypeVar("V")
Check = Callable[[str, str, Any], object]


NONE: Any = object()


class _Kept(Generic[V]):
    """An argument of a constructor, kept under its own name; ``default``: its value until it is set."""

    def __init__(self, default: V = NONE) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: Any, owner: type) -> V: ...

    def __get__(self, instance: Any, owner: type) -> Self | V:
        if instance is None:
            return self
        found: V = instance.__dict__.get(self._name, self._default)
        if found is NONE:
            raise AttributeError(f"{type(instance).__name__} keeps no attribute {self._name}")
        return found


class Setting(_Kept[V]):
    """An attribute that is checked whenever it is set, and takes effect from the next step on."""

    def __init__(self, check: Check, default: V = NONE) -> None:
        super().__init__(default)
        self._check = check

    def __set__(self, instance: Any, value: V) -> None:
        self._check(type(instance).__name__, self._name, value)
        instance.__dict__[self._name] = value


class Fixed(_Kept[V]):
    """An argument of the constructor that cannot be set later, and says so instead of doing nothing."""

    def __set__(self, instance: Any, value: V) -> None:
        advice = "is fixed at construction. Build a new optimizer; load_state_dict carries its state on."
        raise AttributeError(message(type(instance).__name__, self._name, value, advice))


def numeric(minimum: float, maximum: float | None = None, *, exclusive: bool = False, optional: bool = False) -> Check:
    """Check for a number; None as well if ``optional``."""

    def check(owner: str, name: str, value: Any) -> None:
        if value is not None or not optional:
            number(owner, name, value, minimum=minimum, maximum=maximum, exclusive=exclusive)

    return check


def counted(minimum: int) -> Check:
    """Check for an integer."""
    return lambda owner, name, value: count(owner, name, value, minimum=minimum)


def chosen(*allowed: Any) -> Check:
    """Check for one of some values."""
    return lambda owner, name, value: choice(owner, name, value, allowed)
