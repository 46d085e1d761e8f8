"""The problems with known answers: are the answers right, and does BOME reach them from the published starts?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bilevel
from bilevel import problems
from bilevel.problems import Problem, Quadratic


def bome(problem: Problem, **options: Any) -> bilevel.BOME:
    upper_optimizer, lower_optimizer = problem.optimizers()
    return bilevel.BOME(
        problem.upper_loss,
        problem.lower_loss,
        upper=problem.upper,
        lower=problem.lower,
        upper_optimizer=upper_optimizer,
        lower_optimizer=lower_optimizer,
        **options,
    )


def run(problem: Problem, steps: int, **options: Any) -> bilevel.BarrierStats:
    """Take ``steps`` steps with the published barrier, and return the last stats."""
    optimizer = bome(problem, barrier=bilevel.barrier.GradientNorm(0.5), **options)
    for _ in range(steps):
        stats = optimizer.step()
    assert isinstance(stats, bilevel.BarrierStats)
    return stats


def error(found: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    return float((found.detach() - expected).abs().max())


# Many lower minima. The published runs take 1000 steps and more; f is below 1e-10 after far fewer.


@pytest.mark.thorough
@pytest.mark.parametrize(("inner_steps", "steps"), [(1, 200), (10, 100), (100, 100)])
def test_degenerate_reaches_its_solution(inner_steps: int, steps: int) -> None:
    problem = problems.degenerate()
    assert problem.upper.tolist() == 0
    assert problem.lower.tolist() == [0, 0]
    run(problem, steps, inner_steps=inner_steps)
    assert problem.upper_loss().item() < 1e-10
    assert error(problem.upper, problem.upper_solution) < 1e-4
    assert error(problem.lower, problem.lower_solution) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("inner_steps", [1, 10, 100])
def test_degenerate_over_the_published_number_of_steps(inner_steps: int) -> None:
    problem = problems.degenerate()
    run(problem, 1000, inner_steps=inner_steps)
    assert problem.upper_loss().item() < 1e-14
    assert error(problem.upper, problem.upper_solution) < 2e-5


@pytest.mark.parametrize("inner_steps", [1, 10])
def test_degenerate_is_solved_to_rounding_without_eps(inner_steps: int) -> None:
    problem = problems.degenerate()
    run(problem, 400, inner_steps=inner_steps, eps=0.0, cutoff=0.0)
    assert error(problem.upper, problem.upper_solution) < 1e-12
    assert error(problem.lower, problem.lower_solution) < 1e-12


# A saddle


def test_minimax_after_the_published_200_steps() -> None:
    problem = problems.minimax()
    assert (problem.upper.item(), problem.lower.item()) == (4.0, 4.0)
    run(problem, 200, inner_steps=10)
    assert problem.upper.item() == pytest.approx(0.049, abs=5e-4)
    assert problem.lower.item() == pytest.approx(-0.016, abs=5e-4)


def test_minimax_after_1000_steps_stands_where_eps_stops_it() -> None:
    """With eps the walk ends where ``lambda = 1`` and ``theta = -v/2``: there ``0.625 v^2 = eps``.

    BOME's script adds eps in another place, ``relu(delta - dot / (n2 + eps))``, and ends at (9e-5, -4e-5).
    """
    problem, eps = problems.minimax(), 1e-8
    run(problem, 1000, inner_steps=10, eps=eps)
    stop = (eps / 0.625) ** 0.5
    assert abs(problem.upper.item()) < 2e-4
    assert problem.upper.item() == pytest.approx(stop, rel=1e-5)
    assert problem.lower.item() == pytest.approx(-stop / 2, rel=1e-5)


def test_minimax_reaches_its_solution_without_eps() -> None:
    problem = problems.minimax()
    run(problem, 1000, inner_steps=10, eps=0.0, cutoff=0.0)
    assert error(problem.upper, problem.upper_solution) < 1e-9
    assert error(problem.lower, problem.lower_solution) < 1e-9


def test_the_projections_of_the_toys_hold() -> None:
    problem = problems.minimax()
    optimizer = bome(problem)
    with torch.no_grad():
        problem.upper.fill_(-9.99)
        problem.lower.fill_(9.99)
    for _ in range(3):
        optimizer.step()
        assert problem.upper.abs().item() <= 10
        assert problem.lower.abs().item() <= 10
    assert problem.upper.item() == -10


# A coreset


def coreset_weights(problem: Problem) -> list[float]:
    return torch.softmax(problem.upper.detach(), 0).tolist()


@pytest.mark.thorough
def test_coreset_is_within_the_published_tolerance_after_1750_steps() -> None:
    """The walk enters the tolerance of the 5000-step end point here already; it goes on towards it after that."""
    problem = problems.coreset(start=2)
    run(problem, 1750, inner_steps=10, eps=1e-4)
    assert error(problem.lower, problem.lower_solution) < 0.03
    assert problem.upper_loss().item() == pytest.approx(0.72, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1, 2])
def test_coreset_after_the_published_5000_steps(start: int) -> None:
    problem = problems.coreset(start=start)
    stats = run(problem, 5000, inner_steps=10, eps=1e-4)
    assert error(problem.lower, problem.lower_solution) < 0.03
    assert problem.lower.tolist() == pytest.approx([1.82, 0.385], abs=5e-3)
    assert coreset_weights(problem) == pytest.approx([0.002, 0.799, 0.002, 0.197], abs=2e-3)
    assert problem.upper_loss().item() == pytest.approx(0.709, abs=1e-3)
    assert stats.constraint.item() == pytest.approx(9.7e-4, abs=1e-5)


def test_the_coreset_solution_is_the_projection_on_the_convex_hull() -> None:
    problem = problems.coreset()
    points = torch.tensor([[1.0, 3.0], [3.0, 1.0], [-2.0, 2.0], [-3.0, -2.0]], dtype=torch.float64)
    x0, solution = torch.tensor([3.0, -2.0], dtype=torch.float64), problem.lower_solution
    torch.testing.assert_close(0.8 * points[1] + 0.2 * points[3], solution, rtol=0, atol=1e-15)
    # x0 - solution is normal to the hull: no point lies further along it
    assert ((points - solution) @ (x0 - solution)).max().item() <= 1e-12
    with torch.no_grad():
        problem.lower.copy_(solution)
        problem.upper.copy_(torch.tensor([0.0, 0.8, 0.0, 0.2]).log().clamp(min=-60))
    assert problem.lower_loss().item() < 1e-12
    assert problem.upper_loss().item() == pytest.approx(0.72, rel=1e-12)


# The quadratic family

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 5)


def upper_value(problem: Quadratic, alpha: Tensor) -> Tensor:
    """``F(w*(alpha), alpha)`` written from the docstring's formula, with a graph through the solve."""
    w = torch.linalg.solve(problem.hessian, problem.coupling @ alpha + problem.offset)
    away = w - problem.target
    return 0.5 * away @ problem.upper_hessian @ away + 0.5 * problem.weight * (alpha - problem.anchor).square().sum()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds, sizes, sizes)
def test_quadratic_answers_agree_with_autograd_through_the_solve(seed: int, upper_size: int, lower_size: int) -> None:
    problem = problems.quadratic(seed, upper_size, lower_size)
    for alpha in (problem.upper, problem.upper_solution):
        assert alpha is not None
        alpha = alpha.detach().clone().requires_grad_()
        (through_solve,) = torch.autograd.grad(upper_value(problem, alpha), alpha)
        torch.testing.assert_close(problem.hypergradient(alpha.detach()), through_solve, rtol=1e-10, atol=1e-11)
    assert problem.upper_solution is not None
    assert problem.hypergradient(problem.upper_solution).abs().max().item() < 1e-10
    torch.testing.assert_close(
        problem.lower_optimum(problem.upper_solution), problem.lower_solution, rtol=1e-10, atol=1e-10
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds)
def test_quadratic_hypergradient_agrees_with_central_differences(seed: int) -> None:
    problem = problems.quadratic(seed)
    alpha, step = problem.upper.detach(), 1e-3  # F is quadratic: no truncation error at any step
    for i, expected in enumerate(problem.hypergradient(alpha).tolist()):
        shift = step * torch.eye(3, dtype=torch.float64)[i]
        difference = (upper_value(problem, alpha + shift) - upper_value(problem, alpha - shift)) / (2 * step)
        assert difference.item() == pytest.approx(expected, rel=1e-8, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds)
def test_quadratic_closures_are_the_losses_of_the_docstring(seed: int) -> None:
    problem = problems.quadratic(seed)
    assert problem.hessian.equal(problem.hessian.T) or error(problem.hessian, problem.hessian.T) < 1e-14
    eigenvalues = torch.linalg.eigvalsh(problem.hessian)
    assert eigenvalues.min().item() >= 1 - 1e-12
    assert eigenvalues.max().item() <= 4 + 1e-12
    alpha = problem.upper.detach().clone()
    with torch.no_grad():
        problem.lower.copy_(problem.lower_optimum(alpha))
    assert problem.upper_loss().item() == pytest.approx(upper_value(problem, alpha).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(problem.lower_loss(), problem.lower)
    assert gradient.abs().max().item() < 1e-12


def test_quadratic_draws_are_reproducible_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = problems.quadratic(5), problems.quadratic(5), problems.quadratic(6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.upper, again.upper)
    assert torch.equal(first.hessian, again.hessian)
    assert not torch.equal(first.hessian, other.hessian)
    assert problems.quadratic(0, dtype=torch.float32).upper.dtype == torch.float32


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(3))
def test_bome_approaches_the_solution_of_a_quadratic_problem(seed: int) -> None:
    """At a constant rate BOME ends near the solution with a multiplier of about 0.4 / rate; it must decay to arrive."""
    problem = problems.quadratic(seed)
    optimizer = bome(problem, inner_steps=12, inner_lr=0.25)
    decay = [
        torch.optim.lr_scheduler.ExponentialLR(o, 0.985) for o in (optimizer.upper_optimizer, optimizer.lower_optimizer)
    ]
    start = error(problem.upper, problem.upper_solution)
    distances = []
    for step in range(241):
        if step in (60, 120, 240):
            distances.append(
                error(problem.upper, problem.upper_solution) + error(problem.lower, problem.lower_solution)
            )
        optimizer.step()
        for schedule in decay:
            schedule.step()
    assert start > 0.9
    assert distances[0] > 1.5 * distances[1] > 1.5 * 1.5 * distances[2]
    assert distances[2] < 0.05
    assert error(problem.lower, problem.lower_optimum(problem.upper.detach())) < 0.04


@pytest.mark.parametrize("seed", range(2))
def test_half_the_rate_doubles_the_multiplier_that_bome_settles_at(seed: int) -> None:
    products = []
    for rate, steps in ((0.1, 100), (0.05, 200)):
        problem = problems.quadratic(seed)
        optimizer = bilevel.BOME(
            problem.upper_loss,
            problem.lower_loss,
            upper=problem.upper,
            lower=problem.lower,
            upper_optimizer=torch.optim.SGD([problem.upper], rate),
            lower_optimizer=torch.optim.SGD([problem.lower], rate),
            inner_steps=5,
            inner_lr=0.25,
        )
        for _ in range(steps):
            stats = optimizer.step()
        assert isinstance(stats, bilevel.BarrierStats)
        products.append(rate * stats.multiplier.item())
    assert products[1] == pytest.approx(products[0], rel=0.15)
