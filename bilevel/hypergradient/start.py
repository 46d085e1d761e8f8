"""A starting point of the lower variables: a function of the upper ones, as in MAML, or the same one for every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import message
from ..levels import Level
from ..vectors import Tensors

Start = Callable[[], Iterable[Tensor] | Mapping[str, Tensor]]


def start_of(owner: str, start: Start, lower: Level) -> list[Tensor]:
    """Call ``start``; return one tensor for each lower variable, in parameter order, with its graph.

    Raises:
        TypeError, ValueError: It returned something else.
    """
    with torch.enable_grad():
        found = start()
    values = _in_order(owner, found, lower.names)
    kinds, expected = _kinds(values), _kinds(lower.tensors)
    if kinds != expected:
        wrong = next((i for i, (a, b) in enumerate(zip(kinds, expected, strict=False)) if a != b), None)
        advice = (
            f"returned {len(kinds)} tensors for the {len(expected)} lower variables."
            if wrong is None
            else f"returned {kinds[wrong]} for {lower.names[wrong]}, expected {expected[wrong]}."
        )
        raise ValueError(message(owner, "start", "...", f"{advice} Return one tensor like each lower variable."))
    # + 0: an upper variable that is itself the start (MAML) must not be taken for the lower variable in its place.
    with torch.enable_grad():
        return [x + 0 if x.requires_grad else x.detach().requires_grad_() for x in values]


def through_start(start: list[Tensor], upper: tuple[Tensor, ...], bars: Tensors) -> Tensors:
    """Pull a cotangent of the starting point back through its graph to the upper variables."""
    pairs = [(x, bar) for x, bar in zip(start, bars, strict=True) if bar is not None]
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, upper, grad_outputs=weights, allow_unused=True)


def _in_order(owner: str, found: Any, names: tuple[str, ...]) -> list[Tensor]:
    if isinstance(found, Mapping):
        missing = [name for name in names if name not in found]
        if missing:
            advice = f"returned no {', '.join(missing[:3])}. Name every lower variable, or return them in order."
            raise ValueError(message(owner, "start", "...", advice))
        values = [found[name] for name in names]
    else:
        values = list(found) if isinstance(found, Iterable) and not isinstance(found, Tensor) else [found]
    for value in values:
        if not isinstance(value, Tensor):
            advice = f"returned a {type(value).__name__} among its values. Return one tensor like each lower variable."
            raise TypeError(message(owner, "start", "...", advice))
    return values


def _kinds(tensors: Iterable[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype, torch.device]]:
    return [(tuple(x.shape), x.dtype, x.device) for x in tensors]
