"""What autograd takes for a constant in a loss, held as it was while differences are taken.

A finite difference of a loss sees whatever depends on the variables; autograd does not see what is detached, computed
under ``no_grad``, or turned into a Python number. With all of these held at their values of one evaluation, a
difference is of the function that autograd differentiates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass
class Constants:
    """The constants of a sequence of evaluations, in the order in which they were computed."""

    values: list[Any] = field(default_factory=list)
    cursor: int | None = None  # None while recording

    def visit(self, value: Any, *, in_place: bool) -> Any:
        """Record ``value``, or return the recorded one in its place."""
        if self.cursor is None:
            self.values.append(value.detach().clone() if isinstance(value, Tensor) else value)
            return value
        if self.cursor >= len(self.values) or type(self.values[self.cursor]) is not type(value):
            raise LookupError("the loss computes other constants than before")
        held = self.values[self.cursor]
        self.cursor += 1
        if not isinstance(value, Tensor):
            return held
        if held.shape != value.shape or held.dtype != value.dtype:
            raise LookupError("the loss computes constants of other shapes than before")
        if in_place:  # what the closure goes on to read is its own tensor
            value.detach().copy_(held)
            return value
        return held.clone()


_active: ContextVar[Constants | None] = ContextVar("bilevel_constants", default=None)


@contextmanager
def recording() -> Iterator[Constants]:
    """Record the constants of all evaluations inside the ``with``."""
    constants = Constants()
    token = _active.set(constants)
    try:
        yield constants
    finally:
        _active.reset(token)


@contextmanager
def constants_held(constants: Constants) -> Iterator[None]:
    """Give the recorded constants to the same sequence of evaluations once more."""
    token = _active.set(Constants(constants.values, cursor=0))
    try:
        yield
    finally:
        _active.reset(token)


@contextmanager
def constants_of_a_loss() -> Iterator[None]:
    """Surround one call of a loss: what :func:`recording` and :func:`constants_held` reach."""
    constants = _active.get()
    if constants is None:
        yield
        return
    with _Watch(constants):
        yield


class _Watch(TorchFunctionMode):
    """Sees every call of a function of torch; one whose result needs no gradient computes a constant."""

    def __init__(self, constants: Constants) -> None:
        super().__init__()
        self._constants = constants

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        found = func(*args, **options)
        if _inside_a_custom_function():
            return found
        written = (*args[:1], options.get("out"))
        if isinstance(found, (tuple, list)) and not isinstance(found, torch.Size):
            parts = [self._visited(part, written) for part in found]
            changed = any(a is not b for a, b in zip(parts, found, strict=True))
            return type(found)(parts) if changed and type(found) in (tuple, list) else found
        return self._visited(found, written)

    def _visited(self, value: Any, written: Sequence[Any]) -> Any:
        constant = isinstance(value, (float, bool)) or (isinstance(value, Tensor) and not value.requires_grad)
        if not constant:
            return value
        return self._constants.visit(value, in_place=any(value is tensor for tensor in written))


def _inside_a_custom_function() -> bool:
    """The forward of an ``autograd.Function`` runs without gradients, but its result has one."""
    apply = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is apply:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
