"""What a step is computed on: one batch a side, several, or batches that know their place in a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import count, message

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "no batch"})()


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


@dataclass(frozen=True, init=False)
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

    batches: tuple[Any, ...]

    def __init__(self, *batches: Any) -> None:
        if not batches:
            raise TypeError(message("Batches", "batches", "()", "needs at least one. Pass the batches one by one."))
        object.__setattr__(self, "batches", batches)


def unpacked(batches: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """Return what the losses get, and the number of each batch that has one."""
    plain = [batch.batch if isinstance(batch, Indexed) else batch for batch in batches]
    return plain, [batch.index if isinstance(batch, Indexed) else None for batch in batches]


def sorted_batches(
    owner: str, batches: Sequence[Any], upper: Any, lower: Any, expected: int
) -> tuple[list[Any], list[Any]]:
    """Sort what ``step`` was given into upper and lower batches.

    Raises:
        TypeError: A wrong number of them, or one side by position and by name.
    """
    rest = list(batches)
    if upper is not MISSING and rest:
        raise TypeError(f"{owner}: got upper= and {len(rest)} positional batch(es). Pass them by position or by name.")
    upper_batch = rest.pop(0) if rest else upper
    if lower is not MISSING and rest:
        raise TypeError(f"{owner}: got lower= and {len(rest)} positional lower batch(es). Pass lower batches once.")
    lower_batches = rest if lower is MISSING else [lower]
    if len(lower_batches) not in (0, 1, expected):
        allowed = (
            "1 lower batch" if expected == 1 else f"1 lower batch for all inner steps or exactly {expected}, one each"
        )
        raise TypeError(
            f"{owner}: got {len(lower_batches)} lower batches, expected {allowed} (inner_steps={expected})."
        )
    return (list(upper_batch.batches) if isinstance(upper_batch, Batches) else [upper_batch]), lower_batches
