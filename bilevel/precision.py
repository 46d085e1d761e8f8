"""Evaluating closures in float64: everything they touch is wide for the duration, and as before afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Widening(TorchFunctionMode):
    """Let every operation see float64 where it would see less: also on tensors that a closure captured or makes.

    Autocast leaves float64 alone, so inside this mode its regions compute in float64 as well.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` on wide arguments, and widen what it makes."""
        args, kwargs = tree_map(_wide, args), tree_map(_wide, kwargs or {})
        return tree_map(_wide, func(*args, **kwargs))


def _wide(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.dtype in NARROW:
        return leaf.double()
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in NARROW else leaf


def widened(batch: Any) -> Any:
    """Return a batch with float64 in the places of its other floating-point tensors, in containers and dataclasses."""
    if is_dataclass(batch) and not isinstance(batch, type):
        wide = copy(batch)
        for entry in fields(batch):
            object.__setattr__(wide, entry.name, widened(getattr(batch, entry.name)))
        return wide
    return tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.dtype in NARROW else leaf, batch)


@contextmanager
def float64(modules: Iterable[nn.Module], variables: Iterable[Tensor]) -> Iterator[None]:
    """Give every floating-point tensor a float64 copy of its data, and its own data back afterwards."""
    tensors: dict[int, Tensor] = {id(t): t for t in variables}
    for module in modules:
        tensors.update((id(t), t) for t in (*module.parameters(), *module.buffers()))
    kept = [(t, t.data, t.grad) for t in tensors.values() if t.is_floating_point()]
    try:
        for tensor, data, _ in kept:
            tensor.grad = None
            tensor.data = data.double()
        yield
    finally:
        for tensor, data, grad in kept:
            tensor.data = data
            tensor.grad = grad
