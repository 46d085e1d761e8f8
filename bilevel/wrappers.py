"""Wrappers of other libraries, and of torch's own for several processes: taken off, stepped through, or refused.

What is refused would be silently wrong here. Some wrapped optimizers skip steps or count them twice; a wrapped module
waits for a backward pass that never comes, so that each process trains a model of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .errors import ClosureError, message

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
            advice = "shares its state over processes, which are not supported yet. Pass a plain torch optimizer."
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
            'Use bfloat16 (precision="bf16-mixed", mixed_precision="bf16").'
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


def wrapper_of(module: nn.Module) -> str | None:
    """Return the name of the wrapper that ``module`` is, or None."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "DistributedDataParallel"
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in SHARDED), None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one process's share of a larger one (``DTensor``: FSDP2, tensor parallelism)."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


@contextmanager
def unwrapped(owner: str) -> Iterator[None]:
    """Refuse that a loss calls a wrapped module meanwhile; costs nothing where there is one process only."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return

    def refuse(module: nn.Module, arguments: Any) -> None:
        name = wrapper_of(module)
        if name is not None:
            raise ClosureError(
                f"{owner}: a loss calls a module wrapped in {name}, whose processes would each train a model of their "
                "own: its reducer never sees these gradients. Call the module itself (.module); several processes "
                "are not supported yet."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def warn_of_processes(owner: str) -> None:
    """Say once that nothing is averaged over processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world = torch.distributed.get_world_size()
    if world > 1:
        warnings.warn(
            f"{owner}: one of {world} processes. Nothing is averaged over them: each moves its own copy of the "
            "variables, which drift apart. Train in one process, or average directions yourself "
            "(directions, all_reduce, apply).",
            stacklevel=4,
        )
