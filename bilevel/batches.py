"""What a step is computed on: one batch a side, several, or batches that know their place in a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import count, message


@dataclass(frozen=True)
class Indexed:
    """A batch that knows which one of a data set it is, for methods that keep a table with a row for each.

    The loss gets ``batch`` alone; the method reads the number as ``oracle.lower_index()`` or ``oracle.upper_index()``.

    Args:
        index: The batch's number, >= 0.
        batch: What the loss gets.

    Raises:
        TypeError, ValueError: ``index`` is no integer >= 0.

    Example:
        >>> import bilevel
        >>> bilevel.Indexed(3, "images and labels").index
        3
    """

    index: int
    batch: Any

    def __post_init__(self) -> None:
        count("Indexed", "index", self.index, minimum=0)


class Batches:
    """Several upper batches of one step, for methods that look at F more than once: ``step(Batches(a, b), lower)``.

    Several lower batches are passed one by one, ``step(upper, first, second)``.

    Raises:
        TypeError: There is none.

    Example:
        >>> import bilevel
        >>> len(bilevel.Batches("first", "second").batches)
        2
    """

    def __init__(self, *batches: Any) -> None:
        if not batches:
            raise TypeError(message("Batches", "batches", "()", "needs at least one. Pass the batches one by one."))
        self.batches = batches


def unpacked(batches: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """Return what the losses get, and the number of each batch that has one."""
    plain = [batch.batch if isinstance(batch, Indexed) else batch for batch in batches]
    return plain, [batch.index if isinstance(batch, Indexed) else None for batch in batches]


def several(upper: Any) -> list[Any]:
    """Return the upper batches of a step, one or several."""
    return list(upper.batches) if isinstance(upper, Batches) else [upper]
