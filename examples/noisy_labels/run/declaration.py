"""One declaration of an option: its default, its words in ``--help``, and what it may be.

Both programs declare their options as fields of a frozen dataclass; the command line, the saved configuration and the
checks are made from that. An error names an option as the command line does.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar, Protocol

LARGEST_SEED = 2**63 - 1  # what torch takes
NOUNS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}


class Declared(Protocol):
    """A dataclass of options; ``headings`` has the first option of each group, and the group's title in ``--help``."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    headings: ClassVar[dict[str, str]]


def option(
    default: Any,
    description: str,
    choices: tuple[str, ...] | None = None,
    kind: type = str,
    within: str | None = None,
    items: type = str,
) -> Any:
    """Declare a field.

    Args:
        default: Its value where it is left out; an option may be None only where that is the default.
        description: What ``--help`` says about it.
        choices: The words that it may be.
        kind: Its type.
        within: The interval in which numbers must be, such as ``[0, 1)`` or ``[1, inf)``; of a tuple, each item.
        items: Of a tuple, the type of its items.
    """
    metadata = {"description": description, "choices": choices, "kind": kind, "within": within, "items": items}
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """Return an option as it is written on the command line."""
    return "--" + name.replace("_", "-")


def written(name: str, value: Any) -> str:
    """Return an option and its value as they are written on the command line."""
    return f"{flag(name)} {_plain(value)}"


def add_arguments(parser: argparse.ArgumentParser, kind: type[Declared]) -> None:
    """Let the command line set each option; an option that is left out is not there afterwards."""
    group: Any = parser
    for one in dataclasses.fields(kind):
        if one.name in kind.headings:
            group = parser.add_argument_group(kind.headings[one.name])
        declared = one.metadata
        words = declared["description"] + ("" if one.default is None else f" [{_plain(one.default)}]")
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "help": words.replace("%", "%%")}
        if declared["kind"] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif declared["kind"] is not tuple and declared["choices"]:
            arguments["choices"] = declared["choices"]
        elif declared["kind"] is not tuple:
            arguments |= {"type": declared["kind"], "metavar": declared["kind"].__name__.upper()}
        elif declared["items"] is int:
            arguments |= {"type": integers, "metavar": "N,N,..."}
        else:
            arguments |= {"nargs": "+", "metavar": "NAME"}
        group.add_argument(flag(one.name), **arguments)


def integers(text: str) -> tuple[int, ...]:
    """Read integers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between them, not {text!r}") from None


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads an integer that must not be smaller."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer, at least {least}, not {text!r}")
        return int(text)

    return read


def words(text: str) -> tuple[str, ...]:
    """Read words with commas between them."""
    found = tuple(word for word in text.split(",") if word)
    if not found:
        raise argparse.ArgumentTypeError("names nothing")
    return found


def check(options: Declared) -> None:
    """Check each option by itself.

    Raises:
        ValueError: One is of the wrong type, out of its interval, or none of its choices.
    """
    for one in dataclasses.fields(options):
        value, declared = getattr(options, one.name), one.metadata
        if value is None and one.default is None:
            continue
        if declared["kind"] is tuple:
            if not isinstance(value, tuple) or not value:
                raise ValueError(f"{written(one.name, value)}: must be a list, with something in it.")
            for item in value:
                _check(one.name, item, declared["items"], declared["within"], declared["choices"])
        else:
            _check(one.name, value, declared["kind"], declared["within"], declared["choices"])


def plain(kind: type[Declared], values: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON or the command line gives back as arguments of a dataclass of options: lists become tuples.

    Raises:
        ValueError: An option is not known.
    """
    unknown = sorted(set(values) - {one.name for one in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{flag(unknown[0])}: no such option. The file is of another version, or mistyped.")
    return {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}


def _plain(value: Any) -> Any:
    if not isinstance(value, tuple | list):
        return value
    return ("," if all(isinstance(one, int) for one in value) else " ").join(map(str, value))


def _check(name: str, value: Any, kind: type, within: str | None, choices: tuple[str, ...] | None) -> None:
    allowed = (int, float) if kind is float else (kind,)
    right = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if not right or (kind is float and not _finite(value)):
        raise ValueError(f"{written(name, value)}: must be {NOUNS[kind]}.")
    if choices and value not in choices:
        raise ValueError(f"{written(name, value)}: must be one of {', '.join(choices)}.")
    if kind is str and (not value or "\0" in value):
        raise ValueError(f"{flag(name)}: is empty. Leave it out, or say what it shall be.")
    if within is not None and not _inside(value, within):
        raise ValueError(f"{written(name, value)}: must be {_in_words(within)}.")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _ends(within: str) -> tuple[float, float]:
    low, high = within[1:-1].split(",")
    return float(low), float(high)


def _inside(value: float, within: str) -> bool:
    low, high = _ends(within)
    return (low < value or (within[0] == "[" and low == value)) and (
        value < high or (within[-1] == "]" and value == high)
    )


def _in_words(within: str) -> str:
    low, high = _ends(within)
    above = f"at least {low:g}" if within[0] == "[" else f"above {low:g}"
    if math.isinf(high):
        return above
    if within[0] + within[-1] == "[]":
        return f"between {low:g} and {high:g}"
    return f"{above} and {'at most' if within[-1] == ']' else 'below'} {high:g}"
