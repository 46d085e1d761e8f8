"""Handing directions to the torch optimizers: do they fit, are they finite, write ``.grad``, step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .directions import Directions
from .errors import NonFiniteError, message
from .variables import Level
from .vectors import Vector, all_finite


def match(owner: str, level: Level, named: Mapping[str, Tensor]) -> Vector:
    """Return the named directions as a vector of ``level``, or refuse names, shapes and dtypes that do not fit."""
    unknown = [name for name in named if name not in level.names]
    if unknown:
        advice = (
            f"names no {level.side} variable. Directions fit the optimizer, and the set of variables, that made them."
        )
        raise ValueError(message(f"{owner}.apply", "directions", unknown[0], advice))
    for name, tensor in zip(level.names, level.tensors, strict=True):
        direction = named.get(name)
        if direction is not None and (direction.shape != tensor.shape or direction.dtype != tensor.dtype):
            got, expected = (tuple(direction.shape), direction.dtype), (tuple(tensor.shape), tensor.dtype)
            advice = f"has shape and dtype {got}, expected {expected}. Directions are in the variables' own dtype."
            raise ValueError(message(f"{owner}.apply", "directions", name, advice))
    return [named.get(name) for name in level.names]


def is_finite(owner: str, directions: Directions, must_be: bool) -> bool:
    """Return whether losses and directions are finite; waits for the device once. Raises instead if ``must_be``."""
    stats = directions.stats
    checks = {
        "upper_loss": all_finite([stats.upper_loss]),
        "lower_loss": all_finite([stats.lower_loss]),
        "the upper direction": all_finite(list(directions.upper.values())),
        "the lower direction": all_finite(list(directions.lower.values())),
        "the inner point": all_finite(list((directions.start or {}).values())),
    }
    verdicts = {name: verdict for name, verdict in checks.items() if verdict is not None}
    device = next(iter(verdicts.values())).device
    finite = torch.stack([v.to(device, non_blocking=True) for v in verdicts.values()]).tolist()
    bad = [name for name, good in zip(verdicts, finite, strict=True) if not good]
    if bad and must_be:
        raise NonFiniteError(
            f"{owner}.step: {' and '.join(bad)} held NaN or infinity; nothing was moved. "
            'Lower the learning rates, or pass on_nonfinite="skip" to drop such steps.'
        )
    return not bad


def place(level: Level, values: Mapping[str, Tensor]) -> None:
    """Put ``values`` into the variables, for a step that starts from another point."""
    torch._foreach_copy_([tensor.data for tensor in level.tensors], [values[name] for name in level.names])


def hand_over(level: Level, direction: Vector) -> None:
    """What a training loop does: zero_grad, fill ``.grad``, step. Stale gradients of frozen parameters go too."""
    level.optimizer.zero_grad(set_to_none=True)
    for tensor, part in zip(level.tensors, direction, strict=True):
        tensor.grad = part
    level.optimizer.step()
