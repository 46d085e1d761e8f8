"""Calling a closure with other tensors in the places of a level's variables, and with kernels that can be
differentiated further.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

# Dual levels and the choice of kernels are the process's, not the thread's: one thread at a time has them.
PROCESS_WIDE = RLock()


class Places:
    """Where modules hold the given variables, and their buffers.

    What ``torch.func.functional_call`` does for one module's ``forward``, for a closure that calls any of several
    modules in any way; and the search through the modules is done once a step, not at each call.
    """

    def __init__(self, modules: Iterable[nn.Module], variables: Sequence[Tensor]) -> None:
        which = {id(variable): index for index, variable in enumerate(variables)}
        parts = {id(part): part for module in modules for part in module.modules()}
        # The dictionaries themselves: assigning to the attribute would refuse what is no Parameter.
        self._variables: list[tuple[dict[str, Any], str, int]] = []
        self._buffers: list[tuple[dict[str, Any], str]] = []
        for part in parts.values():
            for own in (part._parameters, part._buffers):  # a variable may be registered as a buffer
                self._variables += [(own, name, which[id(p)]) for name, p in own.items() if id(p) in which]
            buffers = part._buffers.items()
            self._buffers += [(part._buffers, name) for name, b in buffers if b is not None and id(b) not in which]

    @contextmanager
    def holding(self, values: Sequence[Tensor], *, copy_buffers: bool) -> Iterator[None]:
        """Put ``values`` in the places of the variables; ``copy_buffers``: also copies in those of the buffers."""
        before = [(place, name, place[name]) for place, name, _ in self._variables]
        buffers = [(place, name, place[name]) for place, name in self._buffers] if copy_buffers else []
        copies: dict[int, Tensor] = {}  # one for a buffer that stands in two places
        try:
            for place, name, index in self._variables:
                place[name] = values[index]
            for place, name, buffer in buffers:
                if buffer is not None and id(buffer) not in copies:
                    copies[id(buffer)] = buffer.clone()
                place[name] = copies.get(id(buffer))
            yield
        finally:
            for place, name, own in (*before, *buffers):
                place[name] = own


@contextmanager
def plain_attention() -> Iterator[None]:
    """The fused attention kernels have neither a forward-mode nor a second-order rule; the plain one has both.

    Transformer layers in evaluation mode choose a fused kernel of their own where no parameter requires a gradient.
    """
    with PROCESS_WIDE, _math_kernels():
        yield


@contextmanager
def _math_kernels() -> Iterator[None]:
    # What torch.nn.attention.sdpa_kernel does, which takes a fifth of a millisecond to do it.
    cuda, mha = torch.backends.cuda, torch.backends.mha
    switches = (
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled(), False),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled(), False),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled(), False),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled(), True),
        (mha.set_fastpath_enabled, mha.get_fastpath_enabled(), False),
    )
    for switch, _, during in switches:
        switch(during)
    try:
        yield
    finally:
        for switch, before, _ in switches:
            switch(before)
