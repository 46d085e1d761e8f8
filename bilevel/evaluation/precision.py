"""Evaluating closures in float64: everything they touch is wide for the duration, and as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..microbatches import MicroBatches

COARSE = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


def widened(batch: Any) -> Any:
    """Return a batch with float64 in the places of its other floating-point tensors, in containers and dataclasses."""
    if isinstance(batch, MicroBatches):
        return batch.mapped(widened)
    if is_dataclass(batch) and not isinstance(batch, type):
        wide = copy(batch)
        for entry in fields(batch):
            object.__setattr__(wide, entry.name, widened(getattr(batch, entry.name)))
        return wide
    return tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.dtype in COARSE else leaf, batch)


@contextmanager
def float64(modules: Iterable[nn.Module], variables: Iterable[Tensor]) -> Iterator[None]:
    """Give every floating-point tensor a float64 copy of its data, and its own data back afterwards."""
    tensors: dict[int, Tensor] = {id(t): t for t in variables}
    parts = [part for module in modules for part in module.modules()]
    for part in parts:
        tensors.update((id(t), t) for t in (*part._parameters.values(), *part._buffers.values()) if t is not None)
    kept = [(t, t.data, t.grad) for t in tensors.values() if t.is_floating_point()]
    # Plain attributes too: constants, and the weight that an old-style norm computes anew in each forward.
    plain = [(vars(part), name, t) for part in parts for name, t in vars(part).items() if isinstance(t, Tensor)]
    try:
        for tensor, data, _ in kept:
            tensor.grad = None
            tensor.data = data.double()
        for attributes, name, value in plain:
            if value.is_floating_point() and value.is_leaf and not value.requires_grad:
                attributes[name] = value.double()
        yield
    finally:
        for tensor, data, grad in kept:
            tensor.data = data
            tensor.grad = grad
        for attributes, name, value in plain:
            attributes[name] = value


@contextmanager
def widening() -> Iterator[None]:
    """Inside the ``with``, ``x.float()``, ``dtype=torch.bfloat16`` and captured float32 constants mean float64.

    Autocast leaves float64 alone, so that its regions compute in float64 as well.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening(torch.float64, COARSE):
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def float32(devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside the ``with``, what autocast or a cast of the loss would compute in half precision is in float32."""
    with _Widening(torch.float32, HALF, [device.type for device in devices]):
        yield


def computes_in_half(value: Tensor) -> bool:
    """Whether the graph of a loss holds what was computed in half precision, of variables that may be wider."""
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(entry.dtype in HALF for entry in getattr(node, "_input_metadata", ())):
            return True
        stack.extend(parent for parent, _ in node.next_functions)
    return False


class _Widening(TorchFunctionMode):
    def __init__(self, wide: torch.dtype, coarse: Sequence[torch.dtype], autocasting: Sequence[str] = ()) -> None:
        super().__init__()
        self._dtype, self._coarse, self._autocasting = wide, coarse, autocasting

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func in CASTS and (self._dtype == torch.float64 or func is not Tensor.float):
            return args[0].to(self._dtype)
        active = [device for device in self._autocasting if torch.is_autocast_enabled(device)]
        for device in active:
            torch.set_autocast_enabled(device, False)
        try:
            # What is written in place, or is an attribute that is set, must stay the tensor that it is.
            if name.endswith("_") or name == "__set__" or "out" in (kwargs or {}):
                return func(*args, **(kwargs or {}))
            return func(*map(self._wide, args), **{key: self._wide(value) for key, value in (kwargs or {}).items()})
        finally:
            for device in active:
                torch.set_autocast_enabled(device, True)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.dtype in self._coarse else value
        if isinstance(value, torch.dtype):
            return self._dtype if value in self._coarse else value
        if type(value) in (list, tuple):
            parts = [self._wide(part) for part in value]
            return value if all(a is b for a, b in zip(parts, value, strict=True)) else type(value)(parts)
        return value
