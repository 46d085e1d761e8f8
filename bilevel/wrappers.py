"""Wrappers of other libraries, and of torch's own for several processes: right, or refused by name with what to do.

Refused is what would be silently wrong here: some wrapped optimizers skip steps or count them twice, and a module that
shards its parameters waits for a backward pass that never comes. ``DistributedDataParallel`` is looked through;
Lightning's optimizers are stepped through, and Accelerate's taken off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .errors import ClosureError, message
from .processes.joined import several

LIBRARIES = {"accelerate", "lightning", "pytorch_lightning", "lightning_fabric", "deepspeed"}
# What lets DDP send in a forward, or prepare for a backward pass of its own.
SENDING = ("require_backward_grad_sync", "require_forward_param_sync", "find_unused_parameters", "static_graph")
SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def refuse_optimizer(owner: str, argument: str, optimizer: object) -> None:
    """Refuse an optimizer that decides by itself whether ``step`` steps."""
    for kind in type(optimizer).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in LIBRARIES:
            advice = (
                f"is wrapped by {library}, whose wrapper may skip or repeat steps. Pass the torch optimizer in it "
                "(.optimizer), and accumulate with bilevel.MicroBatches."
            )
            raise TypeError(message(owner, argument, type(optimizer).__name__, advice))
        if kind.__name__ == "ZeroRedundancyOptimizer":
            advice = (
                "shares its state over processes, so that each has a part of what a step may take back. Pass a plain "
                "torch optimizer."
            )
            raise TypeError(message(owner, argument, type(optimizer).__name__, advice))


def torch_optimizer(owner: str, argument: str, optimizer: Any) -> tuple[torch.optim.Optimizer, Once | None]:
    """Take a wrapper off an optimizer; return what is inside, and what must be stepped in its place, if anything.

    Lightning counts, calls back and writes checkpoints by the steps of its wrappers, so these are stepped. Accelerate's
    leave steps out between two synchronisations of gradients that are accumulated, which directions are not, so the
    optimizer inside is stepped.
    """
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(optimizer).__mro__}
    if {("lightning", "LightningOptimizer"), ("pytorch_lightning", "LightningOptimizer")} & kinds:
        precision = getattr(getattr(optimizer, "_strategy", None), "precision_plugin", None)
        _refuse_scaler(owner, argument, optimizer, getattr(precision, "scaler", None))
        return optimizer.optimizer, Once(owner, argument, optimizer)
    if (type(optimizer).__module__, type(optimizer).__name__) == ("accelerate.optimizer", "AcceleratedOptimizer"):
        _refuse_scaler(owner, argument, optimizer, optimizer.scaler)
        return optimizer.optimizer, None
    return optimizer, None


def _refuse_scaler(owner: str, argument: str, optimizer: object, scaler: object) -> None:
    if scaler is not None:
        advice = (
            "divides by a GradScaler's scale, which directions were never multiplied by. "
            'Use bfloat16 (precision="bf16-mixed", mixed_precision="bf16"), or autocast in the losses and scaler=.'
        )
        raise TypeError(message(owner, argument, type(optimizer).__name__, advice))


class Once:
    """Steps an optimizer through its wrapper, and sees that the wrapper stepped exactly once."""

    def __init__(self, owner: str, argument: str, wrapper: Any) -> None:
        self._owner, self._argument, self._wrapper = owner, argument, wrapper

    def step(self) -> None:
        """Step; raise if the wrapper did not, or did several times."""
        times: list[None] = []
        handle = self._wrapper.optimizer.register_step_post_hook(lambda *_: times.append(None))
        try:
            self._wrapper.step()
        finally:
            handle.remove()
        if len(times) != 1:
            advice = f"stepped {len(times)} times when asked once. Pass the torch optimizer in it (.optimizer)."
            raise RuntimeError(message(self._owner, self._argument, type(self._wrapper).__name__, advice))


def inside(module: nn.Module) -> nn.Module:
    """Return the module that a ``DistributedDataParallel`` wraps, or the module itself."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        wrapped: nn.Module = module.module
        return wrapped
    return module


def sharder_of(module: nn.Module) -> str | None:
    """Return the name of the wrapper that shards the parameters of ``module``, or None."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in SHARDED), None)


@contextmanager
def unwrapped(owner: str, *, sharded: bool = False) -> Iterator[None]:
    """Let a loss call a wrapped module meanwhile, if that means the module itself; costs nothing in one process.

    A ``DistributedDataParallel`` is: its reducer never sees these gradients, but they are averaged here. While a step
    lasts it sends nothing of its own, so that a process that raises leaves none waiting in a forward. ``sharded``: some
    variables are, by ``fully_shard``, whose modules may then be called.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    quiet: dict[int, tuple[nn.parallel.DistributedDataParallel, dict[str, bool]]] = {}

    def visit(module: nn.Module, arguments: Any) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel) and id(module) not in quiet:
            _check_ddp(owner, module)
            quiet[id(module)] = (module, {name: getattr(module, name) for name in SENDING})
            vars(module).update(dict.fromkeys(SENDING, False))
        elif not sharded and (name := sharder_of(module)) is not None:
            raise ClosureError(
                f"{owner}: a loss calls a module wrapped in {name}, whose parameters are shares that appear only "
                "around its forward and get their gradients only from .backward(). Call a plain module, or pass "
                "the sharded one as a level of BOME or EBOMLC."
            )

    handle = register_module_forward_pre_hook(visit)
    try:
        yield
    finally:
        handle.remove()
        for module, before in quiet.values():
            vars(module).update(before)


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
