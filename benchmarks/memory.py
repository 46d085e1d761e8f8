"""Peak memory of a call: from CUDA's own counter, or on the CPU by following every tensor that torch makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], object], resident: Iterable[Tensor], device: torch.device) -> int:
    """Return the most bytes alive at once during ``call``, those of ``resident`` among them as long as they live.

    ``resident`` is what the caller holds before: parameters, their gradients, optimizer state, batches. What other
    parts of the program hold does not count.
    """
    live = LiveBytes(resident)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return live.now + torch.cuda.max_memory_allocated(device) - before
    with live:
        call()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows the storages behind the results of all operations from birth to death.

    Scratch memory inside a kernel is not seen; it is the same for whoever calls the kernel.
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in resident:
            self._follow(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def died(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)
