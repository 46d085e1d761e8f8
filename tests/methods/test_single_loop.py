"""Single-loop methods, each beside a plain loop written here from its paper, and on problems with known answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import Indexed, problems
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


@pytest.mark.thorough
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


# --- SABA ---------------------------------------------------------------------------------------------------------

# Values of the batches: both losses are linear in them, and their mean is 0.
UPPER_BATCHES, LOWER_BATCHES = [1.0, -2.5, 1.5], [0.5, 1.5, -3.0, 1.0]


def draws(steps: int, seed: int = 3) -> list[tuple[int, int]]:
    draw = torch.Generator().manual_seed(seed)
    pick = torch.randint(12, (steps,), generator=draw).tolist()
    return [(i % 3, i % 4) for i in pick]


def saba(problem: Curved, **changes: Any) -> Any:
    options = {"upper_rows": 3, "lower_rows": 4, "system_lr": RATE, "product": "reverse", **changes}
    return problem.optimizer(bilevel.SABA, **options)


def test_saba_is_its_paper() -> None:
    problem = Curved()
    optimizer = saba(problem)
    w, alpha = problem.point
    v = torch.zeros_like(w)
    # SAGA's memory: the terms of G (w, v, alpha) by lower batch, and those of F (w, alpha) by upper batch.
    g_table = [[torch.zeros_like(x) for x in (w, w, alpha)] for _ in LOWER_BATCHES]
    f_table = [[torch.zeros_like(x) for x in (w, alpha)] for _ in UPPER_BATCHES]

    def reduced(table: list[list[Tensor]], index: int, new: list[Tensor]) -> list[Tensor]:
        means = [torch.stack(column).mean(0) for column in zip(*table, strict=True)]
        found = [x - old + mean for x, old, mean in zip(new, table[index], means, strict=True)]
        table[index] = new
        return found

    for i, j in draws(25):
        f = problem.gradients(problem.f, w, alpha, UPPER_BATCHES[i])
        g = problem.gradients(problem.g, w, alpha, LOWER_BATCHES[j])
        mixed, hessian = problem.products(w, alpha, v, LOWER_BATCHES[j])
        slope, hessian, mixed = reduced(g_table, j, [g.lower, hessian, mixed])
        f_lower, f_upper = reduced(f_table, i, [f.lower, f.upper])
        w, alpha = w - LOWER_RATE * slope, alpha - UPPER_RATE * (f_upper + mixed)
        v = v - RATE * (hessian + f_lower)
        optimizer.step(Indexed(i, UPPER_BATCHES[i]), Indexed(j, LOWER_BATCHES[j]))
        for found, expected in zip(problem.point, (w, alpha), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_with_one_row_saba_is_soba() -> None:
    one, two = Curved(), Curved()
    saba_, soba_ = saba(one, upper_rows=1, lower_rows=1), two.optimizer(bilevel.SOBA, system_lr=RATE, product="reverse")
    for k in range(6):
        saba_.step(0.1 * k, -0.2 * k)
        soba_.step(0.1 * k, -0.2 * k)
    for found, expected in zip(one.point, two.point, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.thorough
def test_without_noise_at_the_end_where_soba_keeps_it() -> None:
    """At one constant rate: the answer of the whole sum, and a ball around it."""
    solved = Curved()
    optimizer = solved.optimizer(bilevel.SOBA, system_lr=RATE, product="reverse")
    for _ in range(1500):
        optimizer.step(0.0, 0.0)
    errors = {}
    for method in (bilevel.SABA, bilevel.SOBA):
        problem = Curved()
        optimizer = (
            saba(problem) if method is bilevel.SABA else problem.optimizer(method, system_lr=RATE, product="reverse")
        )
        for i, j in draws(1500):
            optimizer.step(Indexed(i, UPPER_BATCHES[i]), Indexed(j, LOWER_BATCHES[j]))
        errors[method.__name__] = float((problem.alpha - solved.alpha).detach().norm())
    assert errors["SABA"] < 1e-2 * errors["SOBA"]
    assert errors["SOBA"] > 1e-3


def test_saba_resumes_with_its_tables() -> None:
    straight, broken = Curved(), Curved()
    one, two = saba(straight), saba(broken)
    for k, (i, j) in enumerate(draws(12)):
        if k == 6:
            state = two.state_dict()
            two = saba(broken)
            two.load_state_dict(state)
        for optimizer in (one, two):
            optimizer.step(Indexed(i, UPPER_BATCHES[i]), Indexed(j, LOWER_BATCHES[j]))
    assert torch.equal(straight.alpha, broken.alpha)


def test_a_batch_without_a_row_is_refused() -> None:
    optimizer = saba(Curved())
    with pytest.raises(TypeError, match=r"SABA\.step: the lower batch has no number"):
        optimizer.step(Indexed(0, 1.0), 1.0)
    with pytest.raises(ValueError, match="has the rows 0 to 2, got 3"):
        optimizer.step(Indexed(3, 1.0), Indexed(3, 1.0))
    with pytest.raises(ValueError, match=r"SABA\(upper_rows=0\): must be at least 1"):
        saba(Curved(), upper_rows=0)


# --- MEHA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_meha_is_its_scheme(gamma: float) -> None:
    def step(
        p: Curved, w: Tensor, alpha: Tensor, state: State, upper: float, lower: list[float]
    ) -> tuple[Tensor, Tensor]:
        """By plain autograd of the penalised function, with theta in the place of the envelope's solution."""
        k = state["k"] = state.get("k", -1) + 1
        c, (batch,) = 0.8 * (k + 1) ** 0.25, lower
        theta = state.get("theta", w)
        theta = state["theta"] = theta - RATE * (p.gradients(p.g, theta, alpha, batch).lower + (theta - w) / gamma)

        def psi(w: Tensor, alpha: Tensor, batch: float) -> Tensor:
            envelope = p.g(theta, alpha, batch) + (theta - w).square().sum() / (2 * gamma)
            return p.f(w, alpha, upper) / c + p.g(w, alpha, batch) - envelope

        w = w - LOWER_RATE * p.gradients(psi, w, alpha, batch).lower
        return w, alpha - UPPER_RATE * p.gradients(psi, w, alpha, batch).upper

    options: dict[str, Any] = {"penalty": bilevel.penalty.Power(0.8, 0.25), "gamma": gamma, "inner_lr": RATE}
    assert_follows(bilevel.MEHA, step, steps=8, **options)


@pytest.mark.thorough
def test_meha_comes_closer_as_its_penalty_grows() -> None:
    found = []
    for c in (8.0, 32.0):
        problem = problems.quadratic(seed=2)
        trained(problem, bilevel.MEHA, 1500, (0.1, 0.2), penalty=c)
        found.append(distance(problem))
    assert found[1] == pytest.approx(found[0] / 4, rel=0.3)


@pytest.mark.thorough
def test_meha_finds_a_minimum_of_a_lower_loss_that_is_not_convex() -> None:
    """G has its minima where sin(w - alpha) = -1, and alpha can bring one of them to w = 1, where F is smallest."""
    alpha, w = torch.tensor(0.5, dtype=torch.float64), torch.tensor(-0.8, dtype=torch.float64)
    alpha.requires_grad_()
    w.requires_grad_()
    optimizer = bilevel.MEHA(
        lambda: (w - 1) ** 2 + 0.0 * alpha,
        lambda: (w - alpha).sin(),
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        gamma=0.5,
    )
    for _ in range(3000):
        optimizer.step()
    assert w.item() == pytest.approx(1.0, abs=1e-3)
    assert torch.sin(w - alpha).item() == pytest.approx(-1.0, abs=1e-6)


def test_meha_resumes() -> None:
    for one, two in resumed(bilevel.MEHA):
        assert torch.equal(one, two)


# --- BSG-1 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_bsg1_is_its_code(inner_steps: int) -> None:
    def step(
        p: Curved, w: Tensor, alpha: Tensor, state: State, upper: float, lower: list[float]
    ) -> tuple[Tensor, Tensor]:
        for batch in lower:
            w = w - LOWER_RATE * p.gradients(p.g, w, alpha, batch).lower
        f, g = p.gradients(p.f, w, alpha, upper), p.gradients(p.g, w, alpha, lower[-1])
        ratio = (f.lower @ g.lower) / (g.lower @ g.lower + 1e-4)
        return w, alpha - UPPER_RATE * (f.upper - ratio * g.upper)

    assert_follows(bilevel.BSG1, step, each=inner_steps, inner_steps=inner_steps, eps=1e-4)


def test_bsg1_is_exact_where_the_lower_variable_is_one_number() -> None:
    """There outer products are second derivatives up to a factor, which cancels for G = (w - alpha)^2."""
    alpha, w = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 2.0))
    optimizer = bilevel.BSG1(
        lambda: (w - 1) ** 2 + alpha**2,
        lambda: (w - alpha) ** 2,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        eps=0.0,
    )
    found = optimizer.directions().upper["0"]
    after = w.item() - 0.1 * 2 * (w.item() - alpha.item())
    # dw*/dalpha = 1, so that the hypergradient at w is 2 (w - 1) + 2 alpha.
    assert found.item() == pytest.approx(2 * (after - 1) + 2 * 0.3, rel=1e-12)


def test_bsg1_resumes() -> None:
    for one, two in resumed(bilevel.BSG1):
        assert torch.equal(one, two)
