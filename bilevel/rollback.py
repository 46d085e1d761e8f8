"""Taking back real optimizer steps: a copy of a level's variables, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        self._states = [_Entries(level.optimizer.state) for level, _ in self._levels]

    def restore(self) -> None:
        """Put everything back, bit for bit, into the tensors that held it."""
        for (level, held), values, grads, entries in zip(
            self._levels, self._values, self._grads, self._states, strict=True
        ):
            torch._foreach_copy_([tensor.data for tensor in held], values)
            for tensor, grad in zip(held, grads, strict=True):
                tensor.grad = grad
            entries.restore(level.optimizer.state)


def _held(level: Level) -> list[Tensor]:
    # Everything the optimizer could touch, frozen members of its groups included.
    return [tensor for group in level.optimizer.param_groups for tensor in group["params"]]


class _Entries:
    """A copy of optimizer state, under the same keys (the parameters themselves, which deepcopy would duplicate)."""

    def __init__(self, state: Mapping[Any, dict[str, Any]]) -> None:
        found = [(key, name, value) for key, entry in state.items() for name, value in entry.items()]
        self._keys = list(state)
        self._tensors = [item for item in found if isinstance(item[2], Tensor)]
        self._copies = [value.clone() for _, _, value in self._tensors]
        self._rest = [(key, name, deepcopy(value)) for key, name, value in found if not isinstance(value, Tensor)]

    def restore(self, state: dict[Any, dict[str, Any]]) -> None:
        state.clear()
        state.update((key, {}) for key in self._keys)
        if self._copies:
            torch._foreach_copy_([value.data for _, _, value in self._tensors], self._copies)
        for key, name, value in self._tensors:
            state[key][name] = value
        for key, name, value in self._rest:
            state[key][name] = deepcopy(value)
