"""Wrappers of other libraries, and of torch's own for several processes: right, or refused by name with what to do.

Refused is what would be silently wrong here: a wrapped optimizer skips steps or counts them twice, and a module that
shards its parameters waits for a backward pass that never comes. ``DistributedDataParallel`` is looked through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .errors import ClosureError, message
from .processes.joined import several

LIBRARIES = {"accelerate", "lightning", "pytorch_lightning", "lightning_fabric", "deepspeed"}
SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def refuse_optimizer(owner: str, argument: str, optimizer: object) -> None:
    """Refuse an optimizer that decides by itself whether ``step`` steps."""
    for kind in type(optimizer).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in LIBRARIES:
            advice = (
                f"is wrapped by {library}, whose wrapper may skip or repeat steps. Pass the torch optimizer in it "
                "(.optimizer), and accumulate by averaging directions."
            )
            raise TypeError(message(owner, argument, type(optimizer).__name__, advice))
        if kind.__name__ == "ZeroRedundancyOptimizer":
            advice = (
                "shares its state over processes, so that each has a part of what a step may take back. Pass a plain "
                "torch optimizer."
            )
            raise TypeError(message(owner, argument, type(optimizer).__name__, advice))


def inside(module: nn.Module) -> nn.Module:
    """Return the module that a ``DistributedDataParallel`` wraps, or the module itself."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        wrapped: nn.Module = module.module
        return wrapped
    return module


def sharder_of(module: nn.Module) -> str | None:
    """Return the name of the wrapper that shards the parameters of ``module``, or None."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in SHARDED), None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one process's share of a larger one (``DTensor``: FSDP2, tensor parallelism)."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


@contextmanager
def unwrapped(owner: str) -> Iterator[None]:
    """Let a loss call a wrapped module meanwhile, if that means the module itself; costs nothing in one process.

    A ``DistributedDataParallel`` is: its reducer never sees these gradients, but they are averaged here. While a step
    lasts it sends nothing of its own, so that a process that raises leaves none waiting in a forward.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    quiet: dict[int, tuple[nn.parallel.DistributedDataParallel, bool, bool]] = {}

    def visit(module: nn.Module, arguments: Any) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel) and id(module) not in quiet:
            _check_ddp(owner, module)
            quiet[id(module)] = (module, module.require_backward_grad_sync, module.require_forward_param_sync)
            module.require_backward_grad_sync = module.require_forward_param_sync = False
        elif (name := sharder_of(module)) is not None:
            raise ClosureError(
                f"{owner}: a loss calls a module wrapped in {name}, whose parameters are shares that appear only "
                "around its forward and get their gradients only from .backward(). Call a plain module."
            )

    handle = register_module_forward_pre_hook(visit)
    try:
        yield
    finally:
        handle.remove()
        for module, backward, forward in quiet.values():
            module.require_backward_grad_sync, module.require_forward_param_sync = backward, forward


def _check_ddp(owner: str, module: nn.parallel.DistributedDataParallel) -> None:
    """Refuse a DDP module whose processes are not those that step together, or that casts."""
    group, processes = module.process_group, several()
    if torch.distributed.get_world_size(group) == 1:
        return
    if processes is None:
        raise ClosureError(
            f"{owner}: a loss calls a module wrapped in DistributedDataParallel, but every process steps alone "
            "(process_group=False), so that each would train a model of its own. Pass the group as process_group=, or "
            "call the module itself (.module)."
        )
    ranks = torch.distributed.get_process_group_ranks
    if ranks(group) != ranks(processes.group):
        raise ClosureError(
            f"{owner}: a loss calls a module wrapped in DistributedDataParallel over the processes {ranks(group)}, but "
            f"those of {ranks(processes.group)} step together. Give both the same process_group."
        )
    if getattr(module, "mixed_precision", None) is not None:
        raise ClosureError(
            f"{owner}: a loss calls a DistributedDataParallel with mixed_precision=, which casts parameters in hooks "
            "of its own. Use torch.autocast inside the loss instead."
        )
