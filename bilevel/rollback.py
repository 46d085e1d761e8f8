"""Taking back real optimizer steps: a copy of a level's variables, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .variables import Level


class Saved:
    """Copies of what the torch optimizers of ``levels`` change: one copy of the variables and of the optimizer
    state.
    """

    def __init__(self, levels: Iterable[Level]) -> None:
        self._levels = [(level, _held(level)) for level in levels]
        self._values = [[tensor.detach().clone() for tensor in held] for _, held in self._levels]
        self._grads = [[tensor.grad for tensor in held] for _, held in self._levels]
        self._states = [_copied(level.optimizer.state) for level, _ in self._levels]

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        for (level, held), values, grads, state in zip(
            self._levels, self._values, self._grads, self._states, strict=True
        ):
            torch._foreach_copy_([tensor.data for tensor in held], values)
            for tensor, grad in zip(held, grads, strict=True):
                tensor.grad = grad
            level.optimizer.state.clear()
            level.optimizer.state.update(_copied(state))

    def values(self, level: Level) -> list[Tensor]:
        """Return the copies of a level's variables, in parameter order."""
        for (owner, held), values in zip(self._levels, self._values, strict=True):
            if owner is level:
                of = {id(tensor): value for tensor, value in zip(held, values, strict=True)}
                return [of[id(tensor)] for tensor in level.tensors]
        raise KeyError(level.side)


def _held(level: Level) -> list[Tensor]:
    # Everything the optimizer could touch, frozen members of its groups included.
    return [tensor for group in level.optimizer.param_groups for tensor in group["params"]]


def _copied(state: Any) -> dict[Any, Any]:
    """Copy optimizer state under the same keys (the parameters themselves, which deepcopy would duplicate)."""
    return {
        key: {name: value.clone() if isinstance(value, Tensor) else deepcopy(value) for name, value in entry.items()}
        for key, entry in state.items()
    }
