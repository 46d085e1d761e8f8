"""Counting the passes through a network, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class Passes:
    """How often a network was run, and how often a gradient reached its first layer."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Passes]:
    """Count the passes inside the ``with``.

    Both are counted at the first layer that has parameters. A gradient that arrives there has passed the whole
    network; a run of which nothing is recorded, or of which no gradient is asked, counts as forward only.
    """
    passes = Passes()

    def arrived(gradient: Tensor) -> None:
        passes.backward += 1

    def ran(layer: nn.Module, inputs: object, output: object) -> None:
        passes.forward += 1
        result = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if result.requires_grad:
            result.register_hook(arrived)

    first = next(part for part in network.modules() if any(True for _ in part.parameters(recurse=False)))
    handle = first.register_forward_hook(ran)
    try:
        yield passes
    finally:
        handle.remove()
