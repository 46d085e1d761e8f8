"""The steps of two and of four processes are those of one on the joined batch, for every method and option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from bilevel.projection import Ball, Box
from group_of import GroupOf
from joined_batches import Shared, part, steps_apart
from methods_table import CASES

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


THOROUGH = pytest.param(torch.float32, marks=pytest.mark.thorough)


@pytest.mark.parametrize("dtype", [torch.float64, THOROUGH], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(two: GroupOf, name: str, dtype: torch.dtype) -> None:
    (apart, mine), (_, theirs) = two(steps_apart, name, dtype)
    assert apart < TOLERANCE[dtype]
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("name", ["bome", "unrolled", "implicit"])
def test_two_processes_are_one_in_float32(two: GroupOf, name: str) -> None:
    assert max(apart for apart, _ in two(steps_apart, name, torch.float32, 4)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("way", ["adjoint", "graph", "forward"])
def test_learned_rates_of_two_processes_are_those_of_one(two: GroupOf, way: str) -> None:
    assert max(two(learning, way)) < TOLERANCE[torch.float64]


def learning(way: str) -> float:
    alone, shared = Shared(), Shared()

    def build(world: Shared, group: Any) -> Any:
        bias = world.upper[2].bias
        options = {"differentiate": way, "lower_hyperparameters": lambda: {"lr": 0.1 * bias[0].exp()}}
        return world.optimizer(CASES["unrolled"], group, **options)

    one, many = build(alone, False), build(shared, dist.group.WORLD)
    for _ in range(3):
        batches = alone.batches(one.lower_batches)
        one.step(*batches)
        many.step(*map(part, batches))
    assert shared.lower_optimizer.param_groups[0]["lr"] != 0.1
    values = shared.values()
    return max(float((x - values[n]).abs().max()) for n, x in alone.values().items())


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_four_processes_are_one(four: GroupOf, name: str) -> None:
    assert max(apart for apart, _ in four(steps_apart, name, torch.float64)) < TOLERANCE[torch.float64]


@pytest.mark.thorough
def test_a_group_within_four_processes(four: GroupOf) -> None:
    """Processes 1 and 3 step together, the others not at all."""
    assert max(four(half)) < TOLERANCE[torch.float64]


def half() -> float:
    group = dist.new_group([1, 3])
    if dist.get_rank() % 2 == 0:
        return 0.0
    alone, shared = Shared(), Shared()
    one, many = alone.optimizer(CASES["bome"], False), shared.optimizer(CASES["bome"], group)
    assert many.processes.size == 2
    for _ in range(3):
        batches = alone.batches(1)
        mine = slice(0, 6) if dist.get_rank() == 1 else slice(6, 12)
        one.step(*batches)
        many.step(*((x[mine], y[mine]) for x, y in batches))
    values = shared.values()
    return max(float((x - values[n]).abs().max()) for n, x in alone.values().items())


@pytest.mark.parametrize("name", ["bome", "implicit", "unrolled", "unrolled-graph", "emlc-2", "soba", "gpbgd"])
def test_two_processes_are_one_at_active_bounds(two: GroupOf, name: str) -> None:
    weight = Shared(torch.float64).lower[2].weight
    size, largest = float(weight.detach().norm()), float(weight.detach().abs().max())
    bounds = {"lower_projection": {"2.weight": Ball(1.0001 * size), "2.bias": Box(-largest, largest)}}
    assert max(apart for apart, _ in two(steps_apart, name, torch.float64, 3, bounds)) < TOLERANCE[torch.float64]
