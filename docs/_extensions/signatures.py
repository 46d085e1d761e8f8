"""Signatures with every argument that a method takes, where the code says ``**common: Unpack[Common]``.

What must be given comes first, then the method's own options, then what all methods share, with the defaults of the
base class; the list of arguments below the signature gets the base class's words for them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, Required, get_args, get_origin, get_type_hints

from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

ENTRY = re.compile(r"^    (\w+): ")  # an argument in a docstring's section "Args:"


def constructor(kind: type) -> Callable[..., None] | None:
    """The ``__init__`` of a class, if it hands options on that a ``TypedDict`` names."""
    found: Callable[..., None] = vars(kind).get("__init__", None) or kind.__init__  # type: ignore[misc]
    try:
        return found if handed_on(found) else None
    except (TypeError, ValueError):  # built in
        return None


def handed_on(function: Callable[..., None]) -> type | None:
    """The ``TypedDict`` of ``**options: Unpack[TypedDict]``."""
    variable = [p.name for p in inspect.signature(function).parameters.values() if p.kind is Parameter.VAR_KEYWORD]
    hint = get_type_hints(function).get(variable[0]) if variable else None
    (options,) = get_args(hint) or (None,)
    return options if hasattr(options, "__required_keys__") else None


def unpacked(kind: type, function: Callable[..., None]) -> Signature:
    """The signature of ``kind(...)`` with all options by name."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD][1:]
    named = {parameter.name for parameter in own}
    options = handed_on(function)
    missing = [name for name in get_type_hints(options) if name not in named]
    must = required(options)
    rest = {name: Parameter(name, Parameter.KEYWORD_ONLY, **shared(kind, name)) for name in missing}
    positional = [p for p in own if p.kind is not Parameter.KEYWORD_ONLY]
    keyword = [p for p in own if p.kind is Parameter.KEYWORD_ONLY]
    first = [parameter for name, parameter in rest.items() if name in must]
    last = [parameter for name, parameter in rest.items() if name not in must]
    return Signature([*positional, *first, *keyword, *last])


def required(options: type | None) -> set[str]:
    """The names that must be given; ``__required_keys__`` does not see them where annotations are strings."""
    hints = get_type_hints(options, include_extras=True)
    return {name for name, hint in hints.items() if get_origin(hint) is Required}


def shared(kind: type, name: str) -> dict[str, Any]:
    """Default and annotation of an argument, from the nearest base class whose constructor has it by name."""
    for base in kind.__mro__:
        parameter = inspect.signature(base).parameters.get(name) if "__init__" in vars(base) else None
        if parameter is not None:
            return {"default": parameter.default, "annotation": parameter.annotation}
    raise LookupError(f"{kind.__name__}({name}=): no constructor of a base class has this argument by name.")


def sign(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    if what != "class" or not isinstance(thing, type) or not thing.__module__.startswith("bilevel"):
        return None
    function = constructor(thing)
    if function is None:
        return None
    return stringify_signature(unpacked(thing, function), unqualified_typehints=True), returns


def entries(kind: type) -> dict[str, list[str]]:
    """The lines of each argument in the docstring of a class."""
    found: dict[str, list[str]] = {}
    name = None
    inside = False
    for line in inspect.getdoc(kind).splitlines():  # type: ignore[union-attr]
        if not line.startswith(" "):
            inside = line == "Args:"
            name = None
        elif inside and (entry := ENTRY.match(line)):
            name = entry[1]
            found[name] = [line]
        elif inside and name is not None:
            found[name].append(line)
    return found


def explain(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Put the base class's words in the place of the line that refers to them."""
    if what != "class" or not isinstance(thing, type):
        return
    function = constructor(thing)
    start = next((i for i, line in enumerate(lines) if re.match(r"    (common|options): ", line)), None)
    if function is None or start is None:
        return
    end = next(i for i in range(start + 1, len(lines) + 1) if i == len(lines) or not lines[i].startswith("     "))
    base = next(kind for kind in thing.__mro__ if kind.__name__ == "BilevelOptimizer")
    own, inherited = entries(thing), entries(base)
    must = required(handed_on(function))
    lines[start:end] = [line for name in inherited if name not in own and name not in must for line in inherited[name]]
    losses = lines.index(own["lower_loss"][-1]) + 1
    lines[losses:losses] = [line for name in inherited if name not in own and name in must for line in inherited[name]]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-process-docstring", explain, priority=100)  # before napoleon reads the section
    return {"parallel_read_safe": True, "parallel_write_safe": True}
