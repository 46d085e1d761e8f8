"""Computing in float64 whatever a loss asks for: casts to coarser types inside it become casts to float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

COARSE = (torch.float32, torch.float16, torch.bfloat16)
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


@contextmanager
def widened() -> Iterator[None]:
    """Inside the ``with``, ``x.float()``, ``dtype=torch.bfloat16`` and captured float32 constants mean float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(default)


class _Widening(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func in CASTS:
            return args[0].double()
        # What is written in place, or is an attribute that is set, must stay the tensor that it is.
        if name.endswith("_") or name == "__set__" or "out" in (kwargs or {}):
            return func(*args, **(kwargs or {}))
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in COARSE else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in COARSE else value
    if type(value) in (list, tuple):
        parts = [_wide(part) for part in value]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else type(value)(parts)
    return value
