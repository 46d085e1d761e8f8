"""The architecture carries methods that are not in it: two are written here, each against its closed form.

They use what an author of a method has: an oracle, arithmetic on vectors, and an order in which the levels move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import Directions, Oracle, Stats, problems
from bilevel.hypergradient import descend, mixed_product
from bilevel.optimizer import orders


@dataclass(frozen=True, kw_only=True)
class PenaltyStats(Stats):
    """A method may report numbers of its own."""

    gap: Tensor


class Penalty(bilevel.BilevelOptimizer[PenaltyStats]):
    """A simultaneous method: descend on ``F + gamma (G(w, alpha) - G(w_T, alpha))``, w_T constant (V-PBGD)."""

    def __init__(self, *losses: Any, gamma: float, inner_steps: int, inner_lr: float, **common: Any) -> None:
        super().__init__(*losses, **common)
        self.gamma, self.inner_steps, self.inner_lr = gamma, inner_steps, inner_lr

    def compute(self, oracle: Oracle) -> Directions[PenaltyStats]:
        g = oracle.lower()
        ahead = oracle.lower(descend(oracle, self.inner_rule(), self.inner_steps, first=g).end, wrt="upper")
        f = oracle.upper()
        return Directions(
            upper=f.upper + self.gamma * (g.upper - ahead.upper),
            lower=f.lower + self.gamma * g.lower,
            stats=PenaltyStats.of(f, g, gap=g.value - ahead.value),
        )


class OneStep(bilevel.BilevelOptimizer[Stats]):
    """A sequential method: ``alpha`` descends on ``F(w - a grad_w G(w, alpha), alpha)``, then w takes its real step."""

    order = orders.LOOK_THEN_TRAIN

    def __init__(self, *losses: Any, inner_lr: float, **common: Any) -> None:
        super().__init__(*losses, **common)
        self.inner_lr = inner_lr

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        a, g = self.inner_lr or 0.0, oracle.lower(wrt="lower")
        f = oracle.upper(oracle.point() - a * g.lower)
        return Directions(
            upper=f.upper - a * mixed_product(oracle, f.lower, product="reverse"),
            stats=Stats.of(f, g),
        )


GAMMA, INNER, STEPS = 3.0, 0.2, 4


def build(kind: type[Any], problem: problems.Quadratic, **changes: Any) -> Any:
    own = {"gamma": GAMMA, "inner_steps": STEPS} if kind is Penalty else {}
    upper_optimizer, lower_optimizer = problem.optimizers()
    arguments = {
        "upper": problem.upper,
        "lower": problem.lower,
        "upper_optimizer": upper_optimizer,
        "lower_optimizer": lower_optimizer,
        "inner_lr": INNER,
        **own,
        **changes,
    }
    losses = [arguments.pop("upper_loss", problem.upper_loss), arguments.pop("lower_loss", problem.lower_loss)]
    return kind(*losses, **arguments)


def closed_form(kind: type[Any], p: problems.Quadratic, alpha: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
    """Directions from the matrices of the quadratic family."""
    pull = p.hessian @ w - p.coupling @ alpha - p.offset  # grad_w G
    grad_alpha_f = p.weight * (alpha - p.anchor)
    if kind is Penalty:
        contraction = torch.eye(len(w), dtype=w.dtype) - INNER * p.hessian
        optimum = p.lower_optimum(alpha)
        ahead = optimum + torch.linalg.matrix_power(contraction, STEPS) @ (w - optimum)
        return (
            grad_alpha_f + GAMMA * p.coupling.T @ (ahead - w),
            p.upper_hessian @ (w - p.target) + GAMMA * pull,
        )
    after = w - INNER * pull  # d after / d alpha = INNER * coupling
    return grad_alpha_f + INNER * p.coupling.T @ (p.upper_hessian @ (after - p.target)), None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [Penalty, OneStep])
def test_directions_are_those_of_the_closed_form(kind: type[Any], seed: int) -> None:
    problem = problems.quadratic(seed)
    found = build(kind, problem).directions()
    upper, lower = closed_form(kind, problem, problem.upper.detach(), problem.lower.detach())
    torch.testing.assert_close(found.upper["0"], upper, rtol=1e-11, atol=1e-11)
    if lower is None:
        assert found.lower == {}
    else:
        torch.testing.assert_close(found.lower["0"], lower, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [Penalty, OneStep])
def test_steps_are_those_of_the_closed_form(kind: type[Any]) -> None:
    problem = problems.quadratic(seed=5)
    optimizer, rate = build(kind, problem), problem.learning_rate
    alpha, w = problem.upper.detach().clone(), problem.lower.detach().clone()
    for _ in range(5):
        upper, lower = closed_form(kind, problem, alpha, w)
        alpha = alpha - rate * upper
        if lower is None:  # the real lower step: a plain one, which sees the upper variables after their move
            lower = problem.hessian @ w - problem.coupling @ alpha - problem.offset
        w = w - rate * lower
        stats = optimizer.step()
        assert stats.upper_moved
        torch.testing.assert_close(problem.upper.detach(), alpha, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(problem.lower.detach(), w, rtol=1e-10, atol=1e-10)


def test_a_simultaneous_method_converges_to_the_minimiser_of_its_penalty() -> None:
    problem = problems.quadratic(seed=1)
    optimizer = build(Penalty, problem, inner_steps=20)
    for _ in range(250):
        stats = optimizer.step()
    directions = optimizer.directions()
    assert max(d.abs().max().item() for d in (*directions.upper.values(), *directions.lower.values())) < 1e-10
    assert stats.as_dict()["gap"] > 1e-4  # a finite penalty is not quite the lower optimum


def test_a_sequential_method_ends_where_its_own_hypergradient_vanishes() -> None:
    problem = problems.quadratic(seed=1)
    optimizer = build(OneStep, problem)
    for _ in range(400):
        optimizer.step()
    alpha, w = problem.upper.detach(), problem.lower.detach()
    torch.testing.assert_close(w, problem.lower_optimum(alpha), rtol=0, atol=1e-10)
    assert closed_form(OneStep, problem, alpha, w)[0].abs().max().item() < 1e-10
    # one step knows the inverse Hessian as INNER * I only: near the solution, not at it
    assert 1e-3 < (alpha - problem.upper_solution).norm().item() < 1.0


@pytest.mark.parametrize("kind", [Penalty, OneStep])
def test_new_methods_inherit_the_contracts(kind: type[Any]) -> None:
    problem = problems.quadratic(seed=2)
    optimizer = build(kind, problem)
    before = [problem.upper.detach().clone(), problem.lower.detach().clone()]
    optimizer.directions()
    assert torch.equal(problem.upper, before[0])
    assert torch.equal(problem.lower, before[1])
    assert problem.upper.grad is None

    state = optimizer.state_dict()
    assert state["method"] == kind.__name__
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=f"the state of another method; this optimizer is {kind.__name__}"):
        optimizer.load_state_dict({**state, "method": "BOME"})
    with pytest.raises(TypeError, match=f"{kind.__name__}.step: got 2 lower batches, expected 1 lower batch"):
        optimizer.step(None, None, None)
    with pytest.raises(TypeError, match="that you built"):
        build(kind, problem, upper_optimizer=None)


@pytest.mark.parametrize("kind", [Penalty, OneStep])
def test_a_loss_that_raises_at_any_call_changes_nothing(kind: type[Any]) -> None:
    problem = problems.quadratic(seed=2)
    calls = {"left": 0}

    def counted() -> Tensor:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyError("a user's own error")
        return problem.lower_loss()

    optimizer = build(kind, problem, lower_loss=counted, verify="never")
    before = [problem.upper.detach().clone(), problem.lower.detach().clone()]
    documented = {Penalty: STEPS + 1, OneStep: 3}[kind]
    for n in range(1, documented + 1):
        calls["left"] = n
        with pytest.raises(KeyError):
            optimizer.step()
        assert torch.equal(problem.upper, before[0]), f"call {n}"
        assert torch.equal(problem.lower, before[1]), f"call {n}"
    calls["left"] = documented + 1
    optimizer.step()
    assert calls["left"] == 1, "one call fewer than it takes to raise"


@pytest.mark.parametrize("kind", [Penalty, OneStep])
def test_a_loss_that_is_not_finite_moves_nothing(kind: type[Any]) -> None:
    problem = problems.quadratic(seed=2)
    for policy in ("raise", "skip"):
        optimizer = build(kind, problem, upper_loss=lambda: problem.upper_loss() * float("inf"), on_nonfinite=policy)
        before = [problem.upper.detach().clone(), problem.lower.detach().clone()]
        if policy == "raise":
            with pytest.raises(bilevel.NonFiniteError, match=f"{kind.__name__}.step: upper_loss"):
                optimizer.step()
        else:
            assert optimizer.step().skipped
        assert torch.equal(problem.upper, before[0])
        assert torch.equal(problem.lower, before[1])
