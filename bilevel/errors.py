"""The kinds of error, and how they are phrased.

Every message reads ``Owner(argument=value): the rule. The usual cause. What to do.``
"""

from __future__ import annotations


class ClosureError(RuntimeError):
    """A loss closure broke its contract: not a scalar, no graph, a level it does not use, a captured tensor.

    Example:
        >>> import bilevel
        >>> issubclass(bilevel.ClosureError, RuntimeError)
        True
    """


class NonFiniteError(ArithmeticError):
    """A loss or a direction held NaN or infinity under ``on_nonfinite="raise"``; nothing was moved.

    Example:
        >>> import bilevel
        >>> issubclass(bilevel.NonFiniteError, ArithmeticError)
        True
    """


class ProcessError(RuntimeError):
    """Another process of the group raised, ended, or does something else, so that this one cannot go on alone.

    Example:
        >>> import bilevel
        >>> issubclass(bilevel.ProcessError, RuntimeError)
        True
    """


def message(owner: str, argument: str, value: object, advice: str) -> str:
    """Phrase an error about one argument, shortening what the caller passed to one line."""
    shown = value if isinstance(value, str) else repr(value)
    shown = " ".join(shown.split())
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return f"{owner}({argument}={shown}): {advice}"


def choice(owner: str, argument: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the ``allowed`` ones."""
    if value not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(message(owner, argument, repr(value), f"must be one of {words}."))


def number(
    owner: str, argument: str, value: object, *, minimum: float, maximum: float | None = None, exclusive: bool = False
) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite real number between ``minimum`` and ``maximum``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(owner, argument, value, "must be a Python number. Convert tensors with float(x)."))
    finite = value == value and abs(value) != float("inf")
    if not finite or value < minimum or (exclusive and value == minimum):
        rule = "greater than" if exclusive else "at least"
        raise ValueError(message(owner, argument, value, f"must be finite and {rule} {minimum:g}."))
    if maximum is not None and value > maximum:
        raise ValueError(message(owner, argument, value, f"must be at most {maximum:g}."))


def count(owner: str, argument: str, value: object, *, minimum: int) -> None:
    """Raise TypeError or ValueError unless ``value`` is an integer not below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message(owner, argument, value, "must be an integer."))
    if value < minimum:
        raise ValueError(message(owner, argument, value, f"must be at least {minimum}."))
