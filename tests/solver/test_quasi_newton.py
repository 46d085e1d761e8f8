"""The descent that solves both levels: against solutions by linear algebra and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.projection import Ball, Box, Projection
from bilevel.solver.budget import Budget, SpentError
from bilevel.solver.landscape import Landscape
from bilevel.solver.quasi_newton import DENSE, Function, InverseHessian, descend
from bilevel.solver.sets import Space


def space(size: int, projection: Projection | None = None, start: Tensor | None = None) -> Space:
    """A space of so many variables in a set."""
    y = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    if start is not None:
        y.data.copy_(start)
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    return Landscape(
        lambda: (y**2).sum() + (x**2).sum(),
        lambda: (y**2).sum() + (x**2).sum(),
        upper=x,
        lower=y,
        upper_projection=None,
        lower_projection=projection,
        budget=Budget(100),
    ).lower


def quadratic(size: int, seed: int = 0) -> tuple[Function, Tensor, Tensor]:
    """``x H x / 2 - b x`` with eigenvalues between 1 and 100; H and b."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    h = rotation @ torch.diag(torch.logspace(0, 2, size, dtype=torch.float64)) @ rotation.T
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    return lambda x: (float(0.5 * x @ h @ x - b @ x), h @ x - b), h, b


@pytest.mark.parametrize("size", [1, 3, 8, DENSE + 6])
def test_it_solves_a_quadratic_problem(size: int) -> None:
    function, h, b = quadratic(size)
    end = descend(function, torch.zeros(size, dtype=torch.float64), space(size), tolerance=1e-9, steps=400)
    assert end.stationary
    torch.testing.assert_close(end.x, torch.linalg.solve(h, b), rtol=0, atol=1e-8)


@pytest.mark.parametrize("size", [3, DENSE + 6])
def test_a_minimum_in_a_box_meets_the_first_order_conditions(size: int) -> None:
    function, _, _ = quadratic(size, seed=1)
    box = Box(-0.02, 0.01)
    end = descend(function, torch.zeros(size, dtype=torch.float64), space(size, box), tolerance=1e-9, steps=400)
    gradient = function(end.x)[1]
    assert bool((end.x >= -0.02).all() and (end.x <= 0.01).all())
    at_low, at_high = end.x <= -0.02, end.x >= 0.01
    assert bool((gradient[at_low] >= 0).all() and (gradient[at_high] <= 0).all())
    assert gradient[~at_low & ~at_high].abs().max().item() < 1e-8
    assert int((at_low | at_high).sum()) > 0


def test_a_minimum_in_a_ball_is_found_by_projected_gradients() -> None:
    """|x - (3, 4)|^2 on the unit ball: (0.6, 0.8)."""
    centre = torch.tensor([3.0, 4.0], dtype=torch.float64)
    end = descend(
        lambda x: (float(((x - centre) ** 2).sum()), 2 * (x - centre)),
        torch.zeros(2, dtype=torch.float64),
        space(2, Ball(1.0)),
        tolerance=1e-9,
        steps=100,
    )
    torch.testing.assert_close(end.x, torch.tensor([0.6, 0.8], dtype=torch.float64), rtol=0, atol=1e-8)


def test_it_leaves_rosenbrocks_valley_at_its_end() -> None:
    def rosenbrock(x: Tensor) -> tuple[float, Tensor]:
        a, b = x.tolist()
        value = (1 - a) ** 2 + 100 * (b - a**2) ** 2
        return value, torch.tensor([-2 * (1 - a) - 400 * a * (b - a**2), 200 * (b - a**2)], dtype=torch.float64)

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    end = descend(rosenbrock, start, space(2), tolerance=1e-8, steps=100)
    assert end.stationary
    torch.testing.assert_close(end.x, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-7)


def test_it_walks_up_to_a_kink() -> None:
    """The minimum 0 of 3 |x| + (x - y)^2."""

    def kinked(x: Tensor) -> tuple[float, Tensor]:
        value = 3 * x[0].abs() + (x[1] - x[0]) ** 2
        return float(value), torch.stack([3 * x[0].sign() - 2 * (x[1] - x[0]), 2 * (x[1] - x[0])])

    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    end = descend(kinked, start, space(2), tolerance=1e-8, steps=100, wolfe=True)
    assert end.value < 1e-5


def test_points_that_are_not_finite_are_not_taken() -> None:
    """The lowest point of exp(x) - log(x), where x exp(x) = 1; steps from 3 go below 0, where there is no logarithm."""

    def function(x: Tensor) -> tuple[float, Tensor]:
        return float(x.exp() - x.log()) if x > 0 else float("nan"), x.exp() - 1 / x

    end = descend(function, torch.tensor([3.0], dtype=torch.float64), space(1), tolerance=1e-9, steps=50)
    assert end.stationary
    assert end.x.item() == pytest.approx(0.5671432904097838)


def test_what_is_known_of_the_inverse_hessian_makes_the_next_descent_short() -> None:
    function, h, b = quadratic(5)
    inverse = InverseHessian(5)
    calls = []

    def counted(x: Tensor) -> tuple[float, Tensor]:
        calls.append(1)
        return function(x)

    end = descend(counted, torch.zeros(5, dtype=torch.float64), space(5), tolerance=1e-8, steps=100, inverse=inverse)
    first = len(calls)
    calls.clear()
    moved = b + 0.01
    again = descend(
        lambda x: (counted(x)[0] - 0.01 * float(x.sum()), function(x)[1] - 0.01),
        end.x,
        space(5),
        tolerance=1e-8,
        steps=100,
        inverse=inverse,
    )
    torch.testing.assert_close(again.x, torch.linalg.solve(h, moved), rtol=0, atol=1e-7)
    assert len(calls) <= first / 2


def test_a_budget_is_never_exceeded_and_limits_nest() -> None:
    seen: list[int] = []
    budget = Budget(10, seen.append)
    loss = budget.counted(lambda: torch.zeros(()))
    with budget.limited(4):
        with budget.limited(100):
            assert budget.left == 4
        for _ in range(4):
            loss()
        with pytest.raises(SpentError):
            loss()
    for _ in range(6):
        loss()
    with pytest.raises(SpentError):
        loss()
    assert (budget.used, seen) == (10, list(range(1, 11)))


def test_a_space_is_flat_and_back() -> None:
    module = torch.nn.Linear(2, 3)
    x = torch.zeros(1, requires_grad=True)
    module.bias.data.clamp_(min=0)
    landscape = Landscape(
        lambda: module(torch.ones(2)).sum() + x.sum(),
        lambda: module(torch.ones(2)).square().sum() + x.sum(),
        upper=x,
        lower=module,
        upper_projection=None,
        lower_projection={"bias": bilevel.projection.Box(0.0, None)},
        budget=Budget(100),
    )
    flat = landscape.lower.flat()
    assert flat.shape == (9,)
    landscape.lower.put(flat + 1)
    torch.testing.assert_close(landscape.lower.flat(), flat + 1)
    assert landscape.lower.low is not None
    assert landscape.lower.low.tolist() == [-torch.inf] * 6 + [0.0] * 3
    assert landscape.lower.project(flat - 10)[6:].tolist() == [0.0] * 3
