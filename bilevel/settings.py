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
        """Return the default: what was set is found in the instance before this is asked."""
        if instance is None:
            return self
        if self._default is NONE:
            raise AttributeError(f"{type(instance).__name__} keeps no attribute {self._name}")
        return self._default


class Setting(_Kept[V]):
    """An attribute that is checked whenever it is set, and takes effect from the next step on."""

    def __init__(self, check: Check, default: V = NONE) -> None:
        super().__init__(default)
        self._check = check

    def accept(self, owner: str, value: V) -> None:
        """Refuse a value that does not pass."""
        self._check(owner, self._name, value)


class Fixed(_Kept[V]):
    """An argument of the constructor that cannot be set later, and says so instead of doing nothing."""

    def accept(self, owner: str, value: V) -> None:
        """Refuse every value."""
        advice = "is fixed at construction. Build a new optimizer; load_state_dict carries its state on."
        raise AttributeError(message(owner, self._name, value, advice))


class Settable:
    """A class whose settings are checked as they are set; reading one is reading an ordinary attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        kept = getattr(type(self), name, None)
        if isinstance(kept, (Setting, Fixed)):
            kept.accept(type(self).__name__, value)
        super().__setattr__(name, value)


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
