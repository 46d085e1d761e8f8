"""Preconditioners of the linear system: an estimate of the diagonal, or a function that is nearly the inverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import message
from ..levels import Level
from ..vectors import Tensors, Vector

Preconditioner = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Callable[[Vector], Vector]


def check_preconditioner(owner: str, argument: str, value: object) -> None:
    """Refuse what is neither a positive diagonal nor a function."""
    if value is None or (callable(value) and not isinstance(value, Tensor)):
        return
    tensors = _tensors(value)
    if tensors is None:
        advice = "must be a tensor or several (a diagonal), or a function from vector to vector."
        raise TypeError(message(owner, argument, value, advice))
    for x in tensors:
        if not bool(((x > 0) & x.isfinite()).all()):
            advice = (
                f"holds {float(x.min()):.3g}; the diagonal must be positive and finite. It is an estimate of that of "
                "G_ww, damping included: clamp it from below, with .clamp(min=1e-6)."
            )
            raise ValueError(message(owner, argument, "...", advice))


def preconditioned(owner: str, value: Preconditioner, level: Level) -> Callable[[Tensors], Vector]:
    """Return ``r -> M r`` on vectors of a level.

    Raises:
        ValueError: The diagonal is of other shapes than the variables, or the function returns something else.
    """
    if callable(value) and not isinstance(value, Tensor):
        function = value
        return lambda r: _like(owner, function(Vector(r, level.names)), level)
    diagonal = _diagonal(owner, value, level)

    def divide(r: Tensors) -> Vector:
        pairs = zip(r, diagonal, strict=True)
        return Vector((None if x is None else (x / d.to(x.device)).to(x.dtype) for x, d in pairs), level.names)

    return divide


def _diagonal(owner: str, value: Tensor | Sequence[Tensor] | Mapping[str, Tensor], level: Level) -> list[Tensor]:
    if isinstance(value, Mapping):
        missing = [name for name in level.names if name not in value]
        if missing or len(value) != len(level.names):
            advice = f"must have an entry for each lower variable, and no other: {', '.join(level.names[:5])}."
            raise ValueError(message(owner, "preconditioner", sorted(value), advice))
        found = [value[name] for name in level.names]
    else:
        found = [value] if isinstance(value, Tensor) else list(value)
    shapes, expected = [tuple(x.shape) for x in found], [tuple(x.shape) for x in level.tensors]
    if shapes != expected:
        advice = f"has the shapes {shapes[:3]}, expected {expected[:3]}: one tensor like each lower variable, in order."
        raise ValueError(message(owner, "preconditioner", "...", advice))
    return [x.detach() for x in found]


def _like(owner: str, found: object, level: Level) -> Vector:
    """Check what a function returned."""
    shapes = [None if x is None else tuple(x.shape) for x in found] if isinstance(found, Vector) else None
    if (
        not isinstance(found, Vector)
        or len(found) != len(level.names)
        or any(
            shape is not None and shape != tuple(x.shape) for shape, x in zip(shapes or [], level.tensors, strict=True)
        )
    ):
        got = shapes if shapes is not None else type(found).__name__
        advice = f"returned {got}, expected a Vector like the lower variables. Begin with v.like(...)."
        raise ValueError(message(owner, "preconditioner", "...", advice))
    return found


def _tensors(value: object) -> list[Tensor] | None:
    if isinstance(value, Tensor):
        items: list[object] = [value]
    elif isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple)):
        items = list(value)
    else:
        return None
    tensors = [x for x in items if isinstance(x, Tensor) and x.dtype != torch.bool and not x.is_complex()]
    return tensors if items and len(tensors) == len(items) else None
