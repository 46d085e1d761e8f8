"""Micro-batches and loss scaling on two processes: sums over parts, then means over processes; one scale for both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from group_of import GroupOf
from joined_batches import Batch, Shared, part
from methods_table import CASES

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("name", ["bome-unrolled-reverse", "ebomlc", "unrolled-reverse", "emlc-2", "implicit", "soba"])
def test_micro_batches_of_two_processes_are_the_joined_batch(two: GroupOf, name: str) -> None:
    assert max(two(in_parts, name)) < 1e-12


def in_parts(name: str) -> float:
    alone, shared = Shared(), Shared()
    one, many = alone.optimizer(CASES[name], False), shared.optimizer(CASES[name], dist.group.WORLD)
    for _ in range(3):
        batches = alone.batches(one.lower_batches)
        one.step(*batches)
        many.step(*map(part, batches), microbatches=3)
    values = shared.values()
    return max(float((x - values[n]).abs().max()) for n, x in alone.values().items())


@pytest.mark.parametrize("name", ["ebomlc", "emlc", "unrolled"])
def test_an_overflow_of_one_process_skips_the_step_of_both(two: GroupOf, name: str) -> None:
    (skipped, scale, mine), (_, _, theirs) = two(overflowing, name)
    assert skipped == [True, False]
    assert scale == 2.0**15
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


class Overflows(torch.autograd.Function):
    """Infinite gradients on the second process where the scale is 2^16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return torch.where(g.abs() > 2.0**15 * dist.get_rank(), torch.inf, g) if dist.get_rank() else g


def overflowing(name: str) -> tuple[list[bool], float, dict[str, Tensor]]:
    world, scaler = Shared(torch.float32), torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def upper_loss(batch: Batch) -> Tensor:
        found: Tensor = Overflows.apply(world.upper_loss(batch))
        return found

    optimizer = world.optimizer(CASES[name], dist.group.WORLD, upper_loss=upper_loss, scaler=scaler)
    skipped = [optimizer.step(*map(part, world.batches(optimizer.lower_batches))).skipped for _ in range(2)]
    return skipped, scaler.get_scale(), world.values()
