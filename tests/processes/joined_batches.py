"""A label-correction problem without BatchNorm and dropout, of which each process gets its part of every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from methods_table import CASES, Case

INPUTS, HIDDEN, CLASSES, SAMPLES = 4, 8, 3, 12
Batch = tuple[Tensor, Tensor]


class Shared:
    """The two losses and networks, the same on every process; ``dtype`` of all of it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.lower = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).to(dtype)
            self.upper = nn.Sequential(nn.Linear(HIDDEN + CLASSES, 5), nn.Tanh(), nn.Linear(5, CLASSES)).to(dtype)
        self.dtype, self._draw = dtype, torch.Generator().manual_seed(8)
        self.upper_optimizer: torch.optim.Optimizer = torch.optim.Adam(self.upper.parameters(), lr=1e-2)
        self.lower_optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.lower.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2
        )

    def batch(self) -> Batch:
        x = torch.randn(SAMPLES, INPUTS, generator=self._draw, dtype=torch.float64).to(self.dtype)
        return x, torch.eye(CLASSES, dtype=self.dtype)[torch.randint(CLASSES, (SAMPLES,), generator=self._draw)]

    def batches(self, lower: int) -> list[Batch]:
        return [self.batch() for _ in range(1 + lower)]

    def upper_loss(self, batch: Batch) -> Tensor:
        x, label = batch
        features = self.lower[:2](x)
        mixture = 0.3 * self.lower[2](features).softmax(1) + 0.7 * self._corrected(features.detach(), label)
        return -(label * mixture.log()).sum(1).mean()

    def lower_loss(self, batch: Batch) -> Tensor:
        x, label = batch
        features = self.lower[:2](x)
        return cross_entropy(self.lower[2](features), self._corrected(bilevel.hold(features.detach()), label))

    def _corrected(self, features: Tensor, label: Tensor) -> Tensor:
        found: Tensor = self.upper(torch.cat([features, label], 1)).softmax(1)
        return found

    def optimizer(self, case: Case, process_group: Any, **changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "upper": self.upper,
            "lower": self.lower,
            "upper_optimizer": self.upper_optimizer,
            "lower_optimizer": self.lower_optimizer,
            "process_group": process_group,
            **case.options,
            **changes,
        }
        losses = [arguments.pop("upper_loss", self.upper_loss), arguments.pop("lower_loss", self.lower_loss)]
        return case.method(*losses, **arguments)

    def values(self) -> dict[str, Tensor]:
        """Return copies of all variables by name."""
        named = [*self.upper.named_parameters(prefix="upper"), *self.lower.named_parameters(prefix="lower")]
        return {name: x.detach().clone() for name, x in named}


def part(batch: Batch) -> Batch:
    """Return this process's samples of a batch."""
    size = SAMPLES // dist.get_world_size()
    rank = dist.get_rank()
    return batch[0][rank * size : (rank + 1) * size], batch[1][rank * size : (rank + 1) * size]


def steps_apart(
    name: str,
    dtype: torch.dtype,
    steps: int = 3,
    options: Mapping[str, Any] | None = None,
    microbatches: int | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Take the same steps alone on joined batches, and together on parts; return how far the variables are apart, and
    where they are.
    """
    case = CASES[name]
    alone, shared = Shared(dtype), Shared(dtype)
    one = alone.optimizer(case, False, **options or {})
    many = shared.optimizer(case, dist.group.WORLD, **options or {})
    for _ in range(steps):
        batches = alone.batches(one.lower_batches)
        mine, ours = one.step(*batches), many.step(*map(part, batches), microbatches=microbatches)
        for number in ("upper_loss", "lower_loss"):
            assert torch.allclose(getattr(mine, number), getattr(ours, number), rtol=1e-5, atol=1e-6), number
    values = shared.values()
    return max(float((x - values[n]).abs().max()) for n, x in alone.values().items()), values
