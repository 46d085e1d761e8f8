"""Handing directions to the torch optimizers: do they fit, are they finite, write ``.grad``, step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..directions import Directions
from ..errors import NonFiniteError, message
from ..levels import Level
from ..processes.joined import agreed
from ..shards import like_whole
from ..vectors import Tensors, all_finite, without_aliasing


def match(owner: str, level: Level, named: Mapping[str, Tensor]) -> Tensors:
    """Return the named directions as a vector of ``level``, or refuse names, shapes and dtypes that do not fit."""
    known = set(level.names)  # a search through the tuple for each name would be quadratic
    unknown = [name for name in named if name not in known]
    if unknown:
        advice = (
            f"names no {level.side} variable. Directions fit the optimizer, and the set of variables, that made them."
        )
        raise ValueError(message(f"{owner}.apply", "directions", unknown[0], advice))
    for name, tensor in zip(level.names, level.parts, strict=True):
        direction = named.get(name)
        if direction is not None and (direction.shape != tensor.shape or direction.dtype != tensor.dtype):
            got, expected = (tuple(direction.shape), direction.dtype), (tuple(tensor.shape), tensor.dtype)
            advice = f"has shape and dtype {got}, expected {expected}. Directions are in the variables' own dtype."
            raise ValueError(message(f"{owner}.apply", "directions", name, advice))
    return [named.get(name) for name in level.names]


def checked(directions: Directions) -> dict[str, Tensors]:
    """Name what of ``directions`` must be finite."""
    stats = directions.stats
    return {
        "upper_loss": [stats.upper_loss],
        "lower_loss": [stats.lower_loss],
        "the upper direction": list(directions.upper.values()),
        "the lower direction": list(directions.lower.values()),
        "the inner point": list((directions.start or {}).values()),
        **{
            f"the {name} estimate": tree_leaves(value)
            for name, value in directions.state.items()
            if isinstance(value, Mapping)
        },
    }


def are_finite(owner: str, checks: Mapping[str, Tensors], must_be: bool, moved: str) -> bool:
    """Return whether all named vectors are finite; waits for the device once. Raises instead if ``must_be``, and says
    what was ``moved``.
    """
    together = all_finite([tensor for vector in checks.values() for tensor in vector])
    if not agreed(together is not None and not bool(together), "whether all is finite"):
        return True
    if must_be:
        verdicts = {name: all_finite(vector) for name, vector in checks.items()}
        bad = [name for name, verdict in verdicts.items() if verdict is not None and not verdict]
        raise NonFiniteError(
            f"{owner}.step: {' and '.join(bad)} held NaN or infinity; {moved}. "
            "Usual causes: an empty batch, log(0), or rates that are too large. "
            'Lower the learning rates, or pass on_nonfinite="skip" to drop such steps.'
        )
    return False


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a loaded state of other shapes, which torch would only notice in the middle of its next step.

    That state is elementwise is known of torch's own optimizers, Adafactor apart.
    """
    if not type(optimizer).__module__.startswith("torch.optim.") or isinstance(optimizer, torch.optim.Adafactor):
        return
    for tensor, entry in optimizer.state.items():
        for name, value in entry.items() if isinstance(entry, Mapping) else ():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != tensor.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of shape {tuple(tensor.shape)}")


# What torch's schedulers add to a group.
SCHEDULED = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "params", "param_names"}


def check_groups(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Refuse the state of another kind of optimizer, whose groups torch would take over without a word.

    Options that are only missing, or only added, are those of another version of the same optimizer.
    """
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        missing = sorted(set(optimizer.defaults) - set(group))
        added = sorted(set(group) - set(own) - SCHEDULED)
        if missing and added:
            kind = type(optimizer).__name__
            raise ValueError(f"its options {added} are not those of {kind}, and {missing} are missing")


def set_values(level: Level, values: Mapping[str, Tensor]) -> None:
    """Put ``values`` into the variables, for a step that starts from another point."""
    torch._foreach_copy_([tensor.data for tensor in level.parts], [values[name] for name in level.names])


def step_along(level: Level, direction: Tensors) -> None:
    """What a training loop does: zero_grad, fill ``.grad``, step. Stale gradients of frozen parameters go too.

    By hand, as ``zero_grad`` of optimizers outside torch need not know ``set_to_none``.
    """
    for group in level.optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = None
    for tensor, part in zip(level.tensors, without_aliasing(direction), strict=True):
        tensor.grad = part if part is None else like_whole(part, tensor)
    level.move()
