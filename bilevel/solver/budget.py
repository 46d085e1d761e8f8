"""A budget of gradient evaluations: every call of a loss is counted, and the one too many is not made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class SpentError(Exception):
    """The budget is used up. Whoever searches catches it and answers with the best that was found."""


class Budget:
    """How many calls of the two losses have been made, and may be.

    Args:
        total: Most calls.
        report: Called with the number of calls after each; a progress bar, for example.
    """

    def __init__(self, total: int, report: Callable[[int], object] | None = None) -> None:
        self.total, self.used, self._limit, self._report = total, 0, total, report

    @property
    def left(self) -> int:
        """Calls that may still be made under the current limit."""
        return self._limit - self.used

    @contextmanager
    def limited(self, calls: int) -> Iterator[None]:
        """Make at most so many calls inside, and none that the limit outside does not allow."""
        outside = self._limit
        self._limit = min(outside, self.used + max(calls, 0))
        try:
            yield
        finally:
            self._limit = outside

    def counted(self, loss: Callable[..., Any], extra: Callable[[], Tensor] | None = None) -> Callable[..., Any]:
        """Return the loss with its calls counted; ``extra`` is added to its value."""

        def call(*batch: Any) -> Any:
            if self.left <= 0:
                raise SpentError
            self.used += 1
            if self._report is not None:
                self._report(self.used)
            value = loss(*batch)
            if extra is None:
                return value
            if isinstance(value, tuple):
                return (value[0] + extra(), *value[1:])
            return value + extra()

        return call
