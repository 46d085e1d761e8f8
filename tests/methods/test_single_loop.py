"""Single-loop methods, each beside a plain loop written here from its paper, and on problems with known answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import problems
from family import LOWER_RATE, UPPER_RATE, Curved, State, assert_follows, distance, resumed, trained

PRODUCTS = ["auto", "reverse"]  # forward mode reads variables from modules, as those of the contract tests
RATE = 0.03


def soba(*, theta: float | None = None) -> Any:
    """The paper's directions; with ``theta`` the upper one is averaged (MA-SOBA)."""

    def step(
        p: Curved, w: Tensor, alpha: Tensor, state: State, upper: float, lower: list[float]
    ) -> tuple[Tensor, Tensor]:
        v = state.get("v", torch.zeros_like(w))
        f, g = p.gradients(p.f, w, alpha, upper), p.gradients(p.g, w, alpha, lower[0])
        mixed, hessian = p.products(w, alpha, v, lower[0])
        state["v"] = v - RATE * (hessian + f.lower)
        direction = mixed + f.upper
        if theta is not None:
            direction = state["h"] = (1 - theta) * state.get("h", 0 * alpha) + theta * direction
        return w - LOWER_RATE * g.lower, alpha - UPPER_RATE * direction

    return step


@pytest.mark.parametrize("product", PRODUCTS)
def test_soba_is_its_paper(product: Any) -> None:
    stats = assert_follows(bilevel.SOBA, soba(), steps=10, system_lr=RATE, product=product)
    assert 0 < float(stats.residual) < 1


@pytest.mark.parametrize("product", PRODUCTS)
def test_masoba_is_its_paper(product: Any) -> None:
    assert_follows(bilevel.MASOBA, soba(theta=0.25), steps=10, theta=0.25, system_lr=RATE, product=product)


def test_masoba_that_forgets_at_once_is_soba() -> None:
    assert_follows(bilevel.MASOBA, soba(), theta=1.0, system_lr=RATE)


def test_v_moves_at_the_rate_of_the_lower_optimizer() -> None:
    default, said = Curved(), Curved()
    one, two = default.optimizer(bilevel.SOBA), said.optimizer(bilevel.SOBA, system_lr=LOWER_RATE)
    for _ in range(4):
        one.step(0.0, 0.0)
        two.step(0.0, 0.0)
    assert torch.equal(default.alpha, said.alpha)


@pytest.mark.parametrize(("method", "options"), [(bilevel.SOBA, {}), (bilevel.MASOBA, {"theta": 0.3})])
def test_they_find_the_solution(method: Any, options: dict[str, Any]) -> None:
    for seed in range(3):
        problem = problems.quadratic(seed)
        optimizer = trained(problem, method, 900, (0.03, 0.2), **options)
        assert distance(problem) < 1e-6
        assert float(optimizer.step().residual) < 1e-6


@pytest.mark.parametrize(("method", "options"), [(bilevel.SOBA, {}), (bilevel.MASOBA, {"theta": 0.3})])
def test_they_resume(method: Any, options: dict[str, Any]) -> None:
    for one, two in resumed(method, **options):
        assert torch.equal(one, two)


def test_a_weight_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MASOBA\(theta=0\.0\): must be finite and greater than 0"):
        Curved().optimizer(bilevel.MASOBA, theta=0.0)
