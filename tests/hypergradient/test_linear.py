"""Solvers of ``(H + damping I) x = b``, against dense linear algebra.

Five code bases share a conjugate gradient that returns the iterate before the one that met its tolerance; on
``2 x = 2`` it answers 0. So the iterate that is returned, its residual and its status are compared one by one here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel import ConjugateGradient, FixedPoint, Neumann
from bilevel.hypergradient import Solution, Solver

RATE = 0.1
EVERY: dict[str, Callable[..., Solver]] = {
    "cg": lambda n=50, **options: ConjugateGradient(n, **options),
    "neumann": lambda n=400, **options: Neumann(n, rate=options.pop("rate", RATE), **options),
    "fixed point": lambda n=400, **options: FixedPoint(n, rate=options.pop("rate", RATE), **options),
    "heavy ball": lambda n=400, **options: FixedPoint(n, rate=options.pop("rate", RATE), momentum=0.5, **options),
}
every_solver = pytest.mark.parametrize("name", EVERY)
every_iteration = pytest.mark.parametrize("name", [name for name in EVERY if name != "neumann"])  # from a start


class System:
    """A dense symmetric H whose products are counted; vectors are split over two tensors."""

    def __init__(self, matrix: Tensor, right: Tensor) -> None:
        self.matrix, self.right = matrix, right
        self.products = 0

    def product(self, vector: Any) -> list[Tensor]:
        self.products += 1
        return self.split(self.matrix @ self.join(vector))

    def split(self, x: Tensor) -> list[Tensor]:
        return [x[:1].reshape(1, 1), x[1:]]

    def join(self, vector: Any) -> Tensor:
        return torch.cat([part.reshape(-1) for part in vector])

    def solve(self, solver: Solver, start: Tensor | None = None, rates: Any = (RATE, RATE)) -> Solution:
        first = None if start is None else self.split(start)
        return solver.solve(self.product, self.split(self.right), first, rates)

    def answer(self, damping: float = 0.0) -> Tensor:
        exact: Tensor = torch.linalg.solve(self.matrix + damping * torch.eye(len(self.right)).double(), self.right)
        return exact

    def residual(self, found: Solution, damping: float = 0.0) -> float:
        x = self.join(found.x)
        return float((self.right - self.matrix @ x - damping * x).norm() / self.right.norm())


def drawn(*eigenvalues: float, seed: int = 0) -> System:
    """A random rotation of these eigenvalues, and a random right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = rotation @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ rotation.T
    return System((matrix + matrix.T) / 2, torch.randn(size, generator=generator, dtype=torch.float64))


# --- the bug that five code bases share ---------------------------------------------------------------------------


def test_two_x_is_two() -> None:
    found = ConjugateGradient().solve(lambda v: [2 * v[0]], [torch.tensor([2.0])], None, [0.1])
    assert found.x[0] is not None
    assert found.x[0].item() == 1.0
    assert (found.iterations.item(), found.residual.item(), found.converged.item()) == (1.0, 0.0, True)


@pytest.mark.parametrize("scale", [1e-6, 0.3, 2.0, 1e6])
@pytest.mark.parametrize("size", [2, 5])
def test_an_isotropic_hessian_takes_one_iteration(size: int, scale: float) -> None:
    system = System(scale * torch.eye(size, dtype=torch.float64), torch.linspace(-1, 2, size, dtype=torch.float64))
    found = system.solve(ConjugateGradient(tolerance=1e-12))
    torch.testing.assert_close(system.join(found.x), system.right / scale, rtol=1e-14, atol=0)
    assert found.iterations == 1
    assert found.converged
    assert system.products == 1


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-2, 1e-4, 1e-8])
@every_solver
def test_the_iterate_that_met_the_tolerance_is_returned(name: str, tolerance: float) -> None:
    """Its residual meets it, and one iteration fewer does not: neither one too early nor one too late."""
    make = EVERY[name]
    found = drawn(1, 2, 4, 7).solve(make(tolerance=tolerance))
    taken = int(found.iterations)
    assert found.converged
    assert drawn(1, 2, 4, 7).residual(found) <= tolerance * (1 + 1e-6)
    # The first iterate of the stationary iterations is `a b`, before any of the counted ones.
    fewest = {"cg": taken, "neumann": taken, "fixed point": taken + 1, "heavy ball": taken + 1}[name]
    again = drawn(1, 2, 4, 7).solve(make(fewest, tolerance=tolerance))
    assert again.converged
    assert torch.equal(torch.cat([x.reshape(-1) for x in again.x]), torch.cat([x.reshape(-1) for x in found.x]))  # type: ignore[union-attr]
    if taken > 1:
        before = drawn(1, 2, 4, 7).solve(make(fewest - 1, tolerance=tolerance))
        assert not before.converged
        assert drawn(1, 2, 4, 7).residual(before) > tolerance


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("damping", [0.0, 0.7])
@every_solver
def test_residual_and_status_are_those_of_the_iterate(name: str, damping: float, iterations: int) -> None:
    system = drawn(1, 2, 4, 7, 8)
    found = system.solve(EVERY[name](iterations, damping=damping, tolerance=1e-9))
    residual = system.residual(found, damping)
    assert float(found.residual) == pytest.approx(residual, rel=1e-6, abs=1e-14)
    assert bool(found.converged) == (residual <= 1e-9)
    assert bool(found.converged) == (name == "cg" and iterations == 10)


# --- solutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.5, 20.0])
@every_solver
def test_solutions_are_those_of_dense_linear_algebra(name: str, damping: float) -> None:
    system = drawn(1, 1.5, 2, 4, 7)
    rate = 0.04 if damping == 20 else RATE  # below 2 / (7 + damping)
    options = {} if name == "cg" else {"rate": rate}
    found = system.solve(EVERY[name](damping=damping, tolerance=1e-13, **options))
    torch.testing.assert_close(system.join(found.x), system.answer(damping), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_conjugate_gradients_minimise_over_the_krylov_space(count: int) -> None:
    """After n iterations, ``x`` minimises ``x'Hx/2 - b'x`` over span(b, Hb, ..., H^(n-1) b): their definition."""
    system = drawn(0.5, 1, 3, 6, 9, 20)
    found = system.solve(ConjugateGradient(count, tolerance=0.0))
    powers = torch.stack([torch.linalg.matrix_power(system.matrix, j) @ system.right for j in range(count)], 1)
    basis = torch.linalg.qr(powers)[0]
    optimum = basis @ torch.linalg.solve(basis.T @ system.matrix @ basis, basis.T @ system.right)
    torch.testing.assert_close(system.join(found.x), optimum, rtol=1e-10, atol=1e-10)
    assert found.iterations == count


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_conjugate_gradients_take_one_iteration_per_distinct_eigenvalue(distinct: int) -> None:
    system = drawn(*([1.0, 5.0, 30.0][:distinct] * 3))
    found = system.solve(ConjugateGradient(tolerance=1e-10))
    assert found.iterations == distinct
    assert found.converged
    torch.testing.assert_close(system.join(found.x), system.answer(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("terms", [0, 1, 2, 7])
def test_neumann_is_the_sum_of_its_series(terms: int, damping: float) -> None:
    system = drawn(1, 2, 4)
    shrinking = torch.eye(3, dtype=torch.float64) - RATE * (system.matrix + damping * torch.eye(3, dtype=torch.float64))
    series = sum(torch.linalg.matrix_power(shrinking, j) for j in range(terms + 1))
    assert isinstance(series, Tensor)
    found = system.solve(Neumann(terms, rate=RATE, damping=damping))
    torch.testing.assert_close(system.join(found.x), RATE * series @ system.right, rtol=1e-13, atol=1e-13)
    assert found.iterations == terms


def test_rates_default_to_those_of_the_lower_groups() -> None:
    """One per variable, numbers or tensors: ``x = A sum_j (I - H A)^j b`` with a diagonal A."""
    system = drawn(1, 2, 4)
    rates = torch.tensor([0.3, 0.05, 0.05], dtype=torch.float64)
    scaled = torch.eye(3, dtype=torch.float64) - system.matrix @ torch.diag(rates)
    series = torch.eye(3, dtype=torch.float64) + scaled + scaled @ scaled
    for solver in (Neumann(2), FixedPoint(3)):
        for given_rates in ((0.3, 0.05), (torch.tensor(0.3, dtype=torch.float64), 0.05)):
            found = system.solve(solver, rates=given_rates)
            torch.testing.assert_close(system.join(found.x), rates * (series @ system.right), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_fixed_point_without_momentum_is_neumann_with_one_term_fewer(count: int) -> None:
    one, other = (drawn(1, 2, 4).solve(s) for s in (FixedPoint(count, tolerance=0.0), Neumann(count - 1)))
    assert all(torch.equal(a, b) for a, b in zip(one.x, other.x, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("momentum", [0.3, 0.9])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_fixed_point_with_momentum_is_the_adjoint_of_the_heavy_ball(count: int, momentum: float) -> None:
    """``b_{t+1} = m b_t + g, w_{t+1} = w_t - a b_{t+1}`` n times, as one matrix on (w, b), transposed.

    With ``g = H w + G_wa alpha`` the derivative of ``<r, w_n>`` in alpha is ``-G_aw x``, so x is read off at a unit
    coupling: the derivative in a shift of g.
    """
    system = drawn(1, 2, 4)
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    a, h = RATE, system.matrix
    one = torch.cat([torch.cat([eye - a * h, -a * momentum * eye], 1), torch.cat([h, momentum * eye], 1)])
    shift = torch.cat([-a * eye, eye])  # what a shift of g does in one step
    total, power = torch.zeros(6, 3, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for _ in range(count):
        total, power = total + power @ shift, power @ one
    expected = -total.T @ torch.cat([eye, zero]) @ system.right
    found = system.solve(FixedPoint(count, rate=a, momentum=momentum, tolerance=0.0))
    torch.testing.assert_close(system.join(found.x), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    eigenvalues=st.lists(st.floats(0.1, 50.0), min_size=1, max_size=7),
    damping=st.sampled_from([0.0, 0.1, 3.0]),
    seed=st.integers(0, 99),
    warm=st.booleans(),
)
def test_any_positive_definite_system(eigenvalues: list[float], damping: float, seed: int, warm: bool) -> None:
    system = drawn(*eigenvalues, seed=seed)
    start = torch.linspace(-1, 1, len(eigenvalues), dtype=torch.float64) if warm else None
    found = system.solve(ConjugateGradient(60, tolerance=1e-10, damping=damping), start)
    assert found.converged
    torch.testing.assert_close(system.join(found.x), system.answer(damping), rtol=1e-7, atol=1e-7)


@every_solver
def test_float32(name: str) -> None:
    matrix, right = drawn(1, 2, 4, 7).matrix.float(), drawn(1, 2, 4, 7).right.float()
    system = System(matrix, right)
    found = system.solve(EVERY[name](tolerance=1e-6))
    assert all(x is not None and x.dtype == torch.float32 for x in found.x)
    assert found.residual.dtype == torch.float64
    torch.testing.assert_close(system.join(found.x).double(), drawn(1, 2, 4, 7).answer(), rtol=1e-4, atol=1e-5)
    assert found.converged


# --- special right-hand sides and starts --------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@every_solver
def test_a_zero_right_hand_side_has_the_solution_zero(name: str, warm: bool) -> None:
    """At once, with residual 0 and converged, wherever it starts from."""
    system = drawn(1, 2, 4)
    system.right = torch.zeros(3, dtype=torch.float64)
    found = system.solve(EVERY[name](5, tolerance=1e-9), torch.full((3,), 0.7, dtype=torch.float64) if warm else None)
    assert system.join(found.x).tolist() == [0.0, 0.0, 0.0]
    assert (found.iterations.item(), found.residual.item(), found.converged.item()) == (0.0, 0.0, True)


@every_solver
def test_a_variable_that_the_upper_loss_does_not_use(name: str) -> None:
    """None in the right-hand side counts as zero; the solution has an entry there, because H couples the variables."""
    system = drawn(1, 2, 4)
    system.right[0] = 0.0
    dense = system.solve(EVERY[name](4))

    def product(vector: Any) -> list[Tensor]:
        return system.product([torch.zeros(1, 1).double() if v is None else v for v in vector])

    found = EVERY[name](4).solve(product, [None, system.right[1:]], None, (RATE, RATE))
    present = torch.cat([torch.zeros(1).double() if x is None else x.reshape(-1) for x in found.x])
    torch.testing.assert_close(present, system.join(dense.x), rtol=1e-13, atol=1e-13)


@every_iteration
def test_a_start_at_the_solution_stays_there(name: str) -> None:
    system = drawn(1, 2, 4)
    answer = system.answer()
    found = system.solve(EVERY[name](tolerance=1e-9), answer)
    assert found.iterations == 0
    assert found.converged
    assert torch.equal(system.join(found.x), answer)
    assert system.products == 1  # to see it


@every_iteration
def test_a_start_near_the_solution_only_comes_nearer(name: str) -> None:
    """Also with momentum, whose velocity starts at rest there."""
    system = drawn(1, 2, 4)
    away = 1e-6 * torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    distances = [away.norm()]
    for count in (2, 4, 8):
        found = system.solve(EVERY[name](count, tolerance=0.0), system.answer() + away)
        distances.append((system.join(found.x) - system.answer()).norm())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.7 * distances[0]


@every_iteration
def test_a_start_saves_iterations(name: str) -> None:
    system = drawn(*[1 + 0.5 * k for k in range(12)])
    cold = system.solve(EVERY[name](tolerance=1e-6))
    assert cold.converged
    system.right = system.right + 1e-4 * torch.linspace(-1, 1, 12, dtype=torch.float64)
    warm = system.solve(EVERY[name](tolerance=1e-6), system.join(cold.x))
    assert warm.converged
    assert warm.iterations < cold.iterations


# --- where it does not converge -----------------------------------------------------------------------------------


def test_too_few_iterations_are_told() -> None:
    system = drawn(1, 5, 30)
    found = system.solve(ConjugateGradient(2))
    assert not found.converged
    assert found.iterations == 2
    assert float(found.residual) == pytest.approx(system.residual(found), rel=1e-9)
    assert float(found.residual) > 1e-3


INDEFINITE = [(-1.0, -2.0), (3.0, -1e-3, 2.0), (1.0, 2.0, -5.0), (-4.0, 1.0, 1.0), (1.0, -1.0, 0.5, -0.5)]


@pytest.mark.parametrize("eigenvalues", INDEFINITE)
def test_negative_curvature_raises_the_damping(eigenvalues: tuple[float, ...]) -> None:
    """What is solved is ``(H + d I) x = b``, with a d that makes it positive definite, and is told."""
    system = drawn(*eigenvalues)
    found = system.solve(ConjugateGradient(30, tolerance=1e-11))
    assert found.damping is not None
    assert found.indefinite
    assert found.converged
    damping = float(found.damping)
    assert -min(eigenvalues) < damping <= 4 * max(map(abs, eigenvalues))  # of one raise, or of two
    torch.testing.assert_close(system.join(found.x), system.answer(damping), rtol=1e-8, atol=1e-10)
    assert float(found.residual) == pytest.approx(system.residual(found, damping), abs=1e-12)
    again = drawn(*eigenvalues).solve(ConjugateGradient(30, tolerance=1e-11, damping=6.0))  # enough from the first on
    assert not again.indefinite
    assert again.damping == 6.0


def test_the_damping_of_an_eigenvector() -> None:
    """``-x = b``: |A p|/|p| = 1, so that the damping is 2 and x is b, after one product that raised and one more."""
    right = torch.tensor([1.0, -2.0], dtype=torch.float64)
    system = System(-torch.eye(2, dtype=torch.float64), right)
    found = system.solve(ConjugateGradient())
    assert system.join(found.x).tolist() == right.tolist()
    assert (found.damping, found.iterations, system.products) == (2.0, 1.0, 2)


def test_no_curvature_along_the_first_direction_of_a_saddle() -> None:
    """``diag(1, -1) x = (1, 1)``: <b, A b> = 0 though A b is not. |A b|/|b| = 1: x = (1/3, 1)."""
    system = System(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64))
    found = system.solve(ConjugateGradient(tolerance=1e-12))
    assert found.damping == pytest.approx(2.0)
    torch.testing.assert_close(system.join(found.x), torch.tensor([1 / 3, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("eigenvalues", [(0.0, 0.0), (4.0, 0.0, 1.0), (2.0, 0.0, 0.0, 1.0)])
def test_a_flat_direction_ends_conjugate_gradients(eigenvalues: tuple[float, ...]) -> None:
    """Not converged, finite, and no worse than where it stopped: never along the flat direction."""
    system = drawn(*eigenvalues)
    found = system.solve(ConjugateGradient(20, tolerance=1e-9))
    assert not found.converged
    assert found.indefinite
    assert found.damping == 0
    x = system.join(found.x)
    assert x.isfinite().all()
    assert float(found.residual) == pytest.approx(system.residual(found), rel=1e-6)
    energy = 0.5 * x @ system.matrix @ x - system.right @ x
    assert energy <= 0  # each step taken went downhill
    assert system.products <= len(eigenvalues)
    damped = drawn(*eigenvalues).solve(ConjugateGradient(20, tolerance=1e-9, damping=6.0))
    assert damped.converged  # what the class advises


def test_a_flat_direction_that_the_right_hand_side_does_not_need() -> None:
    """A singular, consistent system is solved as if it were not."""
    diagonal = torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64)
    system = System(torch.diag(diagonal), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    found = system.solve(ConjugateGradient(tolerance=1e-12))
    assert found.converged
    assert not found.indefinite
    torch.testing.assert_close(system.join(found.x), torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64))


# --- preconditioned -----------------------------------------------------------------------------------------------


def test_an_exact_preconditioner_solves_at_once() -> None:
    system = drawn(1.0, 10.0, 1000.0)
    inverse = torch.linalg.inv(system.matrix)
    found = ConjugateGradient(tolerance=1e-10).solve(
        system.product, system.split(system.right), None, (RATE, RATE),
        preconditioner=lambda r: system.split(inverse @ system.join(r)),
    )  # fmt: skip
    assert found.iterations == 1
    torch.testing.assert_close(system.join(found.x), system.answer(), rtol=1e-9, atol=0)


def test_a_diagonal_preconditioner_against_the_scaled_system() -> None:
    """Preconditioned by M, the iterates are ``S y`` with y those of plain CG on ``S A S y = S b``, S S = M."""
    draw = torch.Generator().manual_seed(3)
    factor = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    scales = torch.logspace(-2, 2, 6, dtype=torch.float64)
    matrix = scales[:, None] * (factor @ factor.T + torch.eye(6)) * scales
    right = torch.randn(6, generator=draw, dtype=torch.float64)
    diagonal = matrix.diagonal()
    for n in (1, 3, 5):
        system, plain = System(matrix, right), System(matrix / (diagonal.outer(diagonal)) ** 0.5, right / diagonal**0.5)
        found = ConjugateGradient(n, tolerance=0.0).solve(
            system.product, system.split(right), None, (RATE, RATE),
            preconditioner=lambda r: system.split(system.join(r) / diagonal),  # noqa: B023
        )  # fmt: skip
        expected = plain.join(plain.solve(ConjugateGradient(n, tolerance=0.0)).x) / diagonal**0.5
        torch.testing.assert_close(system.join(found.x), expected, rtol=1e-6, atol=1e-12)
        assert float(found.residual) == pytest.approx(system.residual(found), rel=1e-9)


def test_a_preconditioner_that_is_not_positive_is_refused() -> None:
    system = drawn(1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="is not positive definite"):
        ConjugateGradient().solve(
            system.product,
            system.split(system.right),
            None,
            (RATE, RATE),
            preconditioner=lambda r: [None if x is None else -x for x in r],
        )


@pytest.mark.parametrize("name", ["neumann", "fixed point", "heavy ball"])
def test_a_rate_too_large_diverges_and_says_so(name: str) -> None:
    system = drawn(1, 2, 4)
    found = system.solve(EVERY[name](30, rate=2.0, tolerance=1e-6))
    assert not found.converged
    assert found.residual > 1


def test_neumann_without_a_tolerance_has_converged_only_at_a_residual_of_zero() -> None:
    assert not drawn(1, 2, 4).solve(Neumann(30, rate=0.2)).converged
    exact = System(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    assert exact.solve(Neumann(1, rate=1.0)).converged


# --- costs, values, errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("make", "products"),
    [
        (lambda n: ConjugateGradient(n, tolerance=0.0), lambda n, warm: n + warm),
        (lambda n: Neumann(n, rate=RATE), lambda n, warm: n + 1),
        (lambda n: FixedPoint(n, rate=RATE, tolerance=0.0), lambda n, warm: n + warm),
    ],
    ids=["cg", "neumann", "fixed point"],
)
def test_products_are_the_documented_ones(make: Any, products: Any, warm: bool, iterations: int) -> None:
    """CG: one an iteration, and one to begin from a start. Neumann: one a term, and one for the residual, wherever it
    is told to start. Fixed point: one an iteration, and one from a start: only from 0 the first step is known.
    """
    system = drawn(1, 2, 4, 7, 9)
    system.solve(make(iterations), torch.ones(5, dtype=torch.float64) if warm else None)
    assert system.products == products(iterations, warm)


def test_nothing_that_was_passed_is_changed() -> None:
    for make in EVERY.values():
        system = drawn(1, 2, 4)
        start = torch.ones(3, dtype=torch.float64)
        kept = system.right.clone()
        system.solve(make(5), start)
        assert torch.equal(system.right, kept)
        assert start.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_neumann_series_begins_with_its_first_term_whatever_the_start(count: int) -> None:
    one, other = (drawn(1, 2, 4).solve(Neumann(count), start) for start in (None, torch.full((3,), 9.0).double()))
    assert all(torch.equal(a, b) for a, b in zip(one.x, other.x, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("count", [1, 3])
def test_a_fixed_point_iteration_from_a_start_is_one(count: int) -> None:
    """``x <- x + a (b - H x)``, so many times: a single one moves an old answer too."""
    system = drawn(1, 2, 4)
    x = 1.3 * system.answer()  # residual 0.3, better than 0
    found = system.solve(FixedPoint(count, rate=0.1, tolerance=0.0), x)
    for _ in range(count):
        x = x + 0.1 * (system.right - system.matrix @ x)
    torch.testing.assert_close(torch.cat([part.reshape(-1) for part in found.x if part is not None]), x)


def test_solvers_are_values() -> None:
    assert ConjugateGradient(5) == ConjugateGradient(iterations=5)
    assert ConjugateGradient(5) != ConjugateGradient(6)
    assert len({Neumann(2), Neumann(2), FixedPoint(2)}) == 2
    assert repr(FixedPoint(3, momentum=0.5)) == (
        "FixedPoint(iterations=3, rate=None, momentum=0.5, tolerance=1e-06, damping=0.0)"
    )
    with pytest.raises(AttributeError):
        Neumann(2).iterations = 3  # type: ignore[misc]


NAN = float("nan")
WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (ConjugateGradient, {"iterations": 0}, ValueError, r"ConjugateGradient\(iterations=0\): must be at least 1"),
    (ConjugateGradient, {"iterations": 2.0}, TypeError, r"ConjugateGradient\(iterations=2\.0\): must be an integer"),
    (ConjugateGradient, {"iterations": True}, TypeError, r"iterations=True\): must be an integer"),
    (ConjugateGradient, {"tolerance": -1e-6}, ValueError, r"ConjugateGradient\(tolerance=-1e-06\): must be"),
    (ConjugateGradient, {"tolerance": NAN}, ValueError, r"tolerance=nan\): must be finite"),
    (ConjugateGradient, {"tolerance": "small"}, TypeError, r"tolerance=small\): must be a Python number"),
    (ConjugateGradient, {"damping": -1.0}, ValueError, r"ConjugateGradient\(damping=-1\.0\): must be"),
    (ConjugateGradient, {"damping": math.inf}, ValueError, r"damping=inf\): must be finite"),
    (ConjugateGradient, {"damping": torch.ones(())}, TypeError, "Convert tensors with float"),
    (Neumann, {"iterations": -1}, ValueError, r"Neumann\(iterations=-1\): must be at least 0"),
    (Neumann, {"rate": 0.0}, ValueError, r"Neumann\(rate=0\.0\): must be finite and greater than 0"),
    (Neumann, {"rate": -0.1}, ValueError, r"Neumann\(rate=-0\.1\): must be finite and greater than 0"),
    (Neumann, {"tolerance": -1.0}, ValueError, r"Neumann\(tolerance=-1\.0\): must be"),
    (Neumann, {"damping": -1.0}, ValueError, r"Neumann\(damping=-1\.0\): must be"),
    (FixedPoint, {"iterations": 0}, ValueError, r"FixedPoint\(iterations=0\): must be at least 1"),
    (FixedPoint, {"rate": 0.0}, ValueError, r"FixedPoint\(rate=0\.0\): must be finite and greater than 0"),
    (FixedPoint, {"momentum": 1.0}, ValueError, r"FixedPoint\(momentum=1\.0\): must be below 1"),
    (FixedPoint, {"momentum": -0.1}, ValueError, r"FixedPoint\(momentum=-0\.1\): must be"),
    (FixedPoint, {"tolerance": None}, TypeError, r"FixedPoint\(tolerance=None\): must be a Python number"),
    (FixedPoint, {"damping": -1.0}, ValueError, r"FixedPoint\(damping=-1\.0\): must be"),
    (ConjugateGradient, {"tolerance": None}, TypeError, r"ConjugateGradient\(tolerance=None\): must be"),
]


@pytest.mark.parametrize(("solver", "options", "kind", "pattern"), WRONG)
def test_a_wrong_number_is_refused(solver: Any, options: dict[str, Any], kind: type[Exception], pattern: str) -> None:
    with pytest.raises(kind, match=pattern):
        solver(**options)


@every_solver
def test_without_asking_later_iterations_leave_the_converged_iterate_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator the iteration runs to its end instead of waiting for the device; the answer is the same."""
    asking, running = drawn(1, 2, 4, 7), drawn(1, 2, 4, 7)
    solver = EVERY[name](60, tolerance=1e-2)
    expected = asking.solve(solver)
    monkeypatch.setattr("bilevel.hypergradient.solvers._may_ask", lambda value: False)
    found = running.solve(solver)
    assert running.products > asking.products
    assert found.iterations == expected.iterations
    assert found.converged
    assert torch.equal(running.join(found.x), asking.join(expected.x))
    assert torch.equal(found.residual, expected.residual)


@every_iteration
def test_a_start_that_is_worse_than_zero_is_dropped(name: str) -> None:
    """Of another system, or NaN: the iterates are those from zero."""
    for bad in (1e3, float("nan")):
        system, cold = drawn(1, 2, 4, 7), drawn(1, 2, 4, 7)
        found = system.solve(EVERY[name](3), torch.full_like(system.right, bad))
        expected = cold.solve(EVERY[name](3))
        torch.testing.assert_close(system.join(found.x), cold.join(expected.x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.residual, expected.residual, rtol=1e-9, atol=0.0)


def test_a_start_reaches_where_the_right_hand_side_is_unused() -> None:
    """F uses the first part alone, G couples both: x has entries in both, whatever the start."""
    h = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)

    def product(v: Any) -> list[Tensor]:
        full = torch.stack([torch.zeros((), dtype=torch.float64) if part is None else part for part in v])
        return list(h @ full)

    right, exact = [torch.tensor(1.0, dtype=torch.float64), None], torch.tensor([0.6, -0.2], dtype=torch.float64)
    for start in (None, list(exact), [exact[0], None], list(100 * exact)):
        found = ConjugateGradient(5, tolerance=1e-12).solve(product, right, start, [RATE, RATE])
        assert found.x[0] is not None
        assert found.x[1] is not None
        torch.testing.assert_close(torch.stack([found.x[0], found.x[1]]), exact, rtol=1e-10, atol=1e-12)


def test_an_indefinite_system_says_so() -> None:
    right = torch.ones(2, dtype=torch.float64)
    for entries, damping, indefinite in (((1.0, -2.0), 0.0, True), ((1.0, 2.0), 0.0, False), ((1.0, -2.0), 3.0, False)):
        found = System(torch.diag(torch.tensor(entries, dtype=torch.float64)), right).solve(
            ConjugateGradient(10, damping=damping)
        )
        assert found.indefinite is not None
        assert bool(found.indefinite) is indefinite
        assert found.converged
    assert System(torch.eye(2).double(), right).solve(Neumann(1)).indefinite is None


def test_a_product_that_is_not_finite_is_not_taken_for_negative_curvature() -> None:
    right = [torch.ones(2, dtype=torch.float64)]
    for bad in (float("nan"), float("inf")):
        calls = iter([1.0, bad, 1.0])
        diagonal = torch.tensor([1.0, 3.0], dtype=torch.float64)
        found = ConjugateGradient(3).solve(lambda v: [next(calls) * diagonal * v[0]], right, None, [0.1])  # noqa: B023
        assert found.x[0] is not None
        assert not bool(torch.isfinite(found.x[0]).all())
