"""Taking back real optimizer steps: a copy of a level's variables, gradients, optimizer state and parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..levels import Level


class GroupsCopy:
    """The parameter groups of a level's optimizer: rates that schedulers change, counters that some optimizers keep."""

    def __init__(self, level: Level) -> None:
        self._optimizer = level.optimizer
        self._groups = [(group, dict(group), _Values(group)) for group in level.optimizer.param_groups]

    def restore(self) -> None:
        self._optimizer.param_groups[:] = [group for group, _, _ in self._groups]
        for group, entries, values in self._groups:
            group.clear()
            group.update(entries)  # in their order, the parameters among them
            values.restore(group)


class LevelCopy:
    """What the torch optimizer of a level changes: the variables, their gradients, the optimizer's state and groups.

    What else a hook changes (the counter of a scheduler that it steps, a log) is not known here, and stays.
    """

    def __init__(self, level: Level) -> None:
        self.level = level
        # Everything the optimizer could touch, frozen members of its groups included.
        self._held = [tensor for group in level.optimizer.param_groups for tensor in group["params"]]
        self._values = [tensor.detach().clone() for tensor in self._held]
        self._grads = [tensor.grad for tensor in self._held]
        self._groups = GroupsCopy(level)
        self._state = level.optimizer.state
        # The same keys: the parameters themselves, which deepcopy would duplicate.
        self._keys = list(self._state)
        self._entries = [(key, _Values(entry)) for key, entry in self._state.items() if isinstance(entry, Mapping)]
        self._plain = _Values({key: entry for key, entry in self._state.items() if not isinstance(entry, Mapping)})

    def restore(self) -> None:
        """Put everything back, bit for bit, into the tensors that held it."""
        torch._foreach_copy_([tensor.data for tensor in self._held], self._values)
        for tensor, grad in zip(self._held, self._grads, strict=True):
            tensor.grad = grad
        self._groups.restore()
        self._state.clear()
        self._state.update((key, {}) for key in self._keys)
        for key, values in self._entries:
            values.restore(self._state[key])
        self._plain.restore(self._state)


class _Values:
    """Copies of the values of a mapping; ``params``, the members of a group, are no values."""

    def __init__(self, values: Mapping[Any, Any]) -> None:
        found = [(key, value) for key, value in values.items() if key != "params" or not isinstance(key, str)]
        self._tensors = [(key, value) for key, value in found if isinstance(value, Tensor)]
        self._copies = [value.detach().clone() for _, value in self._tensors]
        self._rest = [(key, deepcopy(value)) for key, value in found if not isinstance(value, Tensor)]

    def restore(self, values: Any) -> None:
        if self._copies:
            torch._foreach_copy_([value.data for _, value in self._tensors], self._copies)
        values.update(self._tensors)
        values.update((key, deepcopy(value)) for key, value in self._rest)
