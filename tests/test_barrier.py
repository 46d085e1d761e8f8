"""The multiplier against what it is meant to be: the solution of ``min |d - f|^2  s.t.  <q, d> >= phi``.

Vectors are drawn as small integers times a power of ten, so that each failing example is readable; where a test says
*exactly*, it computes in rational numbers from the very floats that the library saw, and has no rounding of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bilevel
from bilevel.barrier import Aligned, Barrier, GradientNorm, Products, Value, multiplier
from bilevel.vectors import dot, squared_norm

# Derandomised, without a database: the same examples everywhere. No deadline: the first call of a kernel is slow.
oracle = settings(derandomize=True, database=None, deadline=None, max_examples=100)

Array = np.ndarray[Any, np.dtype[np.float64]]
UNIT = 1e-12  # relative to the terms that are summed


class Problem:
    """The gradients of f and q at a point, each an upper block followed by a lower block."""

    def __init__(self, upper: int, f: list[float], q: list[float]) -> None:
        self.upper = upper
        self.f = np.array(f)
        self.q = np.array(q)

    def __repr__(self) -> str:
        return f"Problem({self.upper}, {self.f.tolist()}, {self.q.tolist()})"

    def blocks(self, x: Array, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        whole = torch.tensor(x, dtype=dtype)
        return [whole[: self.upper]], [whole[self.upper :]]

    def products(self, value: float = 0.0, dtype: torch.dtype = torch.float64) -> Products:
        """The products as a method computes them, through ``bilevel.vectors``."""
        f_upper, f_lower = self.blocks(self.f, dtype)
        q_upper, q_lower = self.blocks(self.q, dtype)
        return Products(
            upper=dot(f_upper, q_upper),
            lower=dot(f_lower, q_lower),
            squared_norm=squared_norm(q_upper) + squared_norm(q_lower),
            value=torch.tensor(value, dtype=torch.float64),
        )

    def scaled(self, f: float, q: float) -> Problem:
        return Problem(self.upper, (f * self.f).tolist(), (q * self.q).tolist())


def integers(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-9, 9), min_size=size, max_size=size)


@st.composite
def problems(draw: st.DrawFn, exponent: int = 0) -> Problem:
    """One to four variables in each level; f may vanish, q does not; both scaled by up to ``10**exponent``."""
    upper, lower = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    f, q = draw(integers(upper + lower)), draw(integers(upper + lower))
    assume(any(q))
    powers = st.integers(-exponent, exponent)
    f_scale, q_scale = 10.0 ** draw(powers), 10.0 ** draw(powers)
    return Problem(upper, [x * f_scale for x in f], [x * q_scale for x in q])


deltas = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 3.0])


def exact(barrier: Barrier, products: Products, **options: Any) -> float:
    """The multiplier of the quadratic program itself: no eps, no cutoff."""
    found = multiplier(barrier, products, eps=0.0, cutoff=0.0, **options)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert not found.requires_grad
    return found.item()


def rational(x: Array) -> list[Fraction]:
    return [Fraction(float(entry)) for entry in x]


def inner(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def root(x: Fraction) -> Fraction:
    """The square root to 200 bits: exact enough for every comparison here, at every scale."""
    bits = 2 * (200 + abs(x.numerator.bit_length() - x.denominator.bit_length()))
    return Fraction(math.isqrt((x.numerator << bits) // x.denominator), 1 << (bits // 2))


# --- the closed form solves the quadratic program ---------------------------------------------------------------------


def projection(f: Array, q: Array, phi_over_norm: float, norm: float) -> Array:
    """Project f on ``{d : <q, d> >= phi}`` in a frame whose first axis is q: there the program is ``d_1 >= phi / |q|``.

    The reflection ``H = I - 2 u u^T`` that takes ``q/|q|`` to ``s e_1``, s a sign, is its own inverse. Nothing here
    divides an inner product by a squared norm, as the closed form does.
    """
    axis = np.zeros_like(q)
    axis[0] = 1.0
    normal = q / norm
    sign = -1.0 if normal[0] > 0 else 1.0  # reflect to the far side: no cancellation in u
    u = normal - sign * axis
    u /= np.linalg.norm(u)
    turned = f - 2.0 * u * (u @ f)
    turned[0] = sign * max(sign * turned[0], phi_over_norm)
    back: Array = turned - 2.0 * u * (u @ turned)
    return back


@oracle
@given(problems(exponent=150), deltas)
@example(Problem(1, [0.0, 0.0], [3e-150, 4e-150]), 0.25)  # f = 0: the multiplier is delta
@example(Problem(1, [1e150, 0.0], [1e-150, 0.0]), 0.5)  # the extremes against each other, inactive
@example(Problem(1, [-1e150, 0.0], [1e-150, 0.0]), 0.5)  # and active: the multiplier is 1e300
@example(Problem(2, [-4.0, 3.0, 0.0], [3.0, 4.0, 0.0]), 0.25)  # orthogonal
@example(Problem(1, [0.25, 0.5], [1.0, 2.0]), 0.25)  # degenerate: f = delta q lies on the boundary
def test_the_closed_form_is_the_projection_on_the_half_space(problem: Problem, delta: float) -> None:
    scale = float(np.abs(problem.q).max())
    norm = scale * float(np.linalg.norm(problem.q / scale))
    found = exact(GradientNorm(delta), problem.products())
    # Scaled by the power of two next to 1/|f|: |f| is squared nowhere, and the comparison has one meaning at every
    # scale.
    phi_over_norm = delta * norm
    size = max(float(np.abs(problem.f).max()), phi_over_norm)
    assume(size > 0)
    expected = projection(problem.f / size, problem.q, phi_over_norm / size, norm)
    direction = problem.f / size + (found * (problem.q / norm)) * (norm / size)
    assert np.abs(direction - expected).max() <= UNIT


@oracle
@given(problems(exponent=150), deltas, st.floats(0.0, 8.0))
def test_kkt_conditions(problem: Problem, delta: float, value: float) -> None:
    """Exactly: d - f = lambda q with lambda >= 0 by construction, d is feasible, and lambda > 0 only on the
    boundary.
    """
    f, q = rational(problem.f), rational(problem.q)
    squared, total = inner(q, q), inner(f, q)
    value = value * float(np.abs(problem.q).max()) ** 2
    allowed = Fraction(UNIT)
    cases: list[tuple[Barrier, Fraction]] = [
        (GradientNorm(delta), Fraction(delta) * squared),
        (Value(delta), Fraction(delta) * Fraction(value)),
        (Aligned(delta), Fraction(delta) * squared + inner(f[: problem.upper], q[: problem.upper])),
    ]
    for barrier, phi in cases:
        found = Fraction(exact(barrier, problem.products(value)))
        assert found >= 0
        slack = total + found * squared - phi  # <q, d> - phi
        scale = root(inner(f, f) * squared) + abs(phi) + found * squared  # the size of the terms that were summed
        assert slack >= -allowed * scale, barrier
        if found > 0:
            assert slack <= allowed * scale, barrier


@oracle
@given(problems(), deltas, st.sampled_from([-1, 1]))
def test_on_the_boundary(problem: Problem, delta: float, side: int) -> None:
    """A gradient f = delta q satisfies the constraint with equality: the multiplier is 0; a step inside or outside by h
    moves it by 0 or h.
    """
    # Integers and a dyadic delta: every product is exact, so the equality is, too.
    products = Problem(problem.upper, (delta * problem.q).tolist(), problem.q.tolist()).products()
    assert exact(GradientNorm(delta), products) == 0.0
    moved = (delta + side * 0.5) * problem.q
    products = Problem(problem.upper, moved.tolist(), problem.q.tolist()).products()
    assert exact(GradientNorm(delta), products) == (0.5 if side < 0 else 0.0)


@pytest.mark.parametrize(
    ("f", "q", "delta", "expected"),
    [
        # lambda = max(delta - <f, q>/|q|^2, 0), by hand
        ([0.0, 0.0], [3.0, 4.0], 0.25, 0.25),
        ([-3.0, -4.0], [3.0, 4.0], 0.25, 1.25),
        ([3.0, 4.0], [3.0, 4.0], 0.25, 0.0),
        ([3.0, 4.0], [3.0, 4.0], 1.5, 0.5),
        ([-4.0, 3.0], [3.0, 4.0], 2.0, 2.0),  # orthogonal: delta
        ([-5.0, 0.0], [3.0, 4.0], 0.5, 0.5 + 15 / 25),
        ([1.0, 0.0], [0.0, 1.0], 0.0, 0.0),
        ([0.0, -2.0], [0.0, 1.0], 0.0, 2.0),  # delta = 0 still forbids an increase of q
    ],
)
def test_by_hand(f: list[float], q: list[float], delta: float, expected: float) -> None:
    assert exact(GradientNorm(delta), Problem(1, f, q).products()) == expected


# --- equations 10 and 11, and the reductions --------------------------------------------------------------------------


@oracle
@given(problems(exponent=100), deltas)
def test_equation_10_gives_equation_11(problem: Problem, delta: float) -> None:
    """Exactly: ``max(delta - <f_w, q_w> / |q|^2, 0)``, with the joint norm and without alpha in the numerator."""
    f, q, n = rational(problem.f), rational(problem.q), problem.upper
    squared = inner(q, q)
    expected = max(Fraction(delta) - inner(f[n:], q[n:]) / squared, Fraction(0))
    found = Fraction(exact(Aligned(delta), problem.products()))
    # (10) adds <f_a, q_a> and (7) takes it away again: rounding is relative to that term.
    scale = Fraction(delta) + root(inner(f, f) / squared)
    assert abs(found - expected) <= Fraction(UNIT) * scale


def test_equation_11_by_hand() -> None:
    # f = (100, -2), q = (3, 4), alpha first: lambda = 1/4 - (-8)/25 = 0.57. The lower norm alone would give 1/4 + 8/16
    # = 0.75.
    problem = Problem(1, [100.0, -2.0], [3.0, 4.0])
    assert exact(Aligned(0.25), problem.products()) == pytest.approx(0.57, rel=1e-13)
    # <f, q> = 292: BOME's constraint is inactive here.
    assert exact(GradientNorm(0.25), problem.products()) == 0.0


@oracle
@given(problems(exponent=150), deltas)
def test_without_an_upper_gradient_equation_11_is_equation_7(problem: Problem, delta: float) -> None:
    """At rho = 1 equation 9 takes the corrector out of F, so grad_alpha F = 0: the same bits."""
    f = problem.f.copy()
    f[: problem.upper] = 0.0
    products = Problem(problem.upper, f.tolist(), problem.q.tolist()).products()
    assert exact(Aligned(delta), products) == exact(GradientNorm(delta), products)


# --- Lemma 2, and what the multiplier is monotone and invariant in ----------------------------------------------------


@oracle
@given(problems(), integers(8), deltas, st.sampled_from([Aligned, GradientNorm]))
def test_lemma_2(problem: Problem, second: list[int], delta: float, kind: Callable[[float], Barrier]) -> None:
    """With ``|grad F| <= M`` and ``|grad G| <= M`` everywhere: ``beta |grad Q| <= M (2 delta + 1)``."""
    # grad Q = grad G(w) - grad G(w_1), a difference of two gradients within the bound. (Under the other reading grad_w
    # Q = grad_w G(w),
    # so |grad Q| <= 2M as well.)
    g, g_ahead = problem.q, np.array(second[: len(problem.q)], dtype=np.float64)
    assume((g != g_ahead).any())
    bound = max(float(np.linalg.norm(x)) for x in (problem.f, g, g_ahead))
    q = g - g_ahead
    found = exact(kind(delta), Problem(problem.upper, problem.f.tolist(), q.tolist()).products())
    assert found * np.linalg.norm(q) <= bound * (2 * delta + 1) * (1 + 1e-14)


@pytest.mark.parametrize("bound", [1e-100, 1.0, 7.5, 1e100])
@pytest.mark.parametrize("delta", [0.0, 0.25, 2.0])
def test_lemma_2_is_tight(delta: float, bound: float) -> None:
    """``grad_w F = -M q/|q|`` with ``|q| = 2M``, all of it in w: beta |q| = delta 2M + M."""
    normal = np.array([0.0, 0.6, 0.8])
    problem = Problem(1, (-bound * normal).tolist(), (2 * bound * normal).tolist())
    found = exact(Aligned(delta), problem.products())
    assert found * 2 * bound == pytest.approx(bound * (2 * delta + 1), rel=1e-14, abs=0.0)


@oracle
@given(problems(exponent=50), st.floats(0.0, 10.0), st.floats(0.0, 10.0), st.floats(-5.0, 5.0))
def test_monotone_in_delta(problem: Problem, one: float, two: float, value: float) -> None:
    """Without any tolerance: every rounded operation on the way is monotone."""
    smaller, larger = sorted((one, two))
    products = problem.products(value)
    for kind in (GradientNorm, Value, Aligned):
        assert exact(kind(smaller), products) <= exact(kind(larger), products), kind


@oracle
@given(problems(), deltas, st.integers(0, 10_000))
def test_rotation_changes_nothing(problem: Problem, delta: float, seed: int) -> None:
    """Turning all variables leaves BOME's multiplier; turning each level within itself leaves EBOMLC's, too."""
    generator = np.random.default_rng(seed)

    def rotation(size: int) -> Array:
        q, r = np.linalg.qr(generator.normal(size=(size, size)))
        turn: Array = q * np.sign(np.diag(r))
        return turn

    size = len(problem.f)
    joint = rotation(size)
    blocks = np.zeros((size, size))
    blocks[: problem.upper, : problem.upper] = rotation(problem.upper)
    blocks[problem.upper :, problem.upper :] = rotation(size - problem.upper)
    cases: list[tuple[Barrier, Array]] = [
        (GradientNorm(delta), joint),
        (GradientNorm(delta), blocks),
        (Aligned(delta), blocks),
    ]
    for barrier, turn in cases:
        turned = Problem(problem.upper, (turn @ problem.f).tolist(), (turn @ problem.q).tolist())
        scale = delta + float(np.linalg.norm(problem.f) / np.linalg.norm(problem.q))
        assert abs(exact(barrier, turned.products()) - exact(barrier, problem.products())) <= UNIT * max(scale, 1e-300)


@oracle
@given(problems(), deltas, st.floats(-4.0, 4.0), st.integers(-400, 400))
def test_joint_scaling_changes_nothing(problem: Problem, delta: float, value: float, power: int) -> None:
    """Other units of length scale f and q by c and, for Value, q itself by c^2. With c a power of two: the
    same bits.
    """
    c = math.ldexp(1.0, power)
    scaled = problem.scaled(c, c)
    for kind in (GradientNorm, Aligned):
        assert exact(kind(delta), scaled.products()) == exact(kind(delta), problem.products())
    assert exact(Value(delta), scaled.products(value * c * c)) == exact(Value(delta), problem.products(value))


@oracle
@given(problems(), deltas, st.integers(-60, 60))
def test_scaling_f_and_delta_scales_the_multiplier(problem: Problem, delta: float, power: int) -> None:
    """The multiplier is in units of f over q: (c f, c delta) gives c lambda, and c q gives lambda / c if phi stays."""
    c = math.ldexp(1.0, power)
    assert exact(GradientNorm(c * delta), problem.scaled(c, 1.0).products()) == c * exact(
        GradientNorm(delta), problem.products()
    )
    # phi = delta * value is c delta * (value / c): left alone while q grows by c, so lambda falls by c and lambda q
    # stays.
    assert exact(Value(delta), problem.scaled(1.0, c).products(3.0 * c)) == (
        exact(Value(delta), problem.products(3.0)) / c
    )


# --- float32 ----------------------------------------------------------------------------------------------------------


@oracle
@given(
    problems(),
    deltas,
    st.sampled_from([1e-30, 1e-23, 1.0, 1e19, 1e35]),
    st.sampled_from([1e-30, 1e-23, 1.0, 1e19, 1e35]),
)
def test_float32_gradients_give_the_float64_multiplier(
    problem: Problem, delta: float, f_scale: float, q_scale: float
) -> None:
    """Products of float32 values are exact in float64, so nothing is lost: not even where float32 squares over- or
    underflow.
    """
    f = np.float32(f_scale) * problem.f.astype(np.float32)
    q = np.float32(q_scale) * problem.q.astype(np.float32)
    same = Problem(problem.upper, f.astype(np.float64).tolist(), q.astype(np.float64).tolist())
    for barrier in (GradientNorm(delta), Aligned(delta)):
        found = exact(barrier, same.products(dtype=torch.float32))
        assert found == exact(barrier, same.products())
        assert math.isfinite(found)


# --- eps, cutoff, maximum ---------------------------------------------------------------------------------------------


@oracle
@given(problems(exponent=6), deltas, st.sampled_from([1e-12, 1e-8, 1e-4, 1.0, 100.0]))
def test_eps_shrinks_the_multiplier_by_a_known_factor(problem: Problem, delta: float, eps: float) -> None:
    """``lambda(eps) = lambda(0) |q|^2 / (|q|^2 + eps)``: relu over the whole numerator, eps only in the denominator."""
    products = problem.products()
    squared = products.squared_norm.item()
    for barrier in (GradientNorm(delta), Aligned(delta), Value(delta)):
        found = multiplier(barrier, products, eps=eps, cutoff=0.0).item()
        assert found == pytest.approx(exact(barrier, products) * (squared / (squared + eps)), rel=1e-14, abs=0.0)


def test_eps_makes_the_multiplier_vanish_with_the_gradient() -> None:
    """The published codes differ: ``relu(delta - dot/(n2 + eps))`` would stay delta as n2 -> 0; ours, like (7), does
    not.
    """
    # |q|^2 = 25e-10 next to the default eps 1e-8, f = 0: lambda = delta / (1 + 4) = 0.1
    products = Problem(1, [0.0, 0.0], [3e-5, 4e-5]).products()
    assert multiplier(GradientNorm(0.5), products).item() == pytest.approx(0.5 * 25 / 125, rel=1e-12)


def test_the_default_eps_and_cutoff_are_the_documented_ones() -> None:
    products = Problem(1, [0.0, 0.0], [3e-5, 4e-5]).products()
    assert multiplier(GradientNorm(0.5), products) == multiplier(
        GradientNorm(0.5), products, eps=1e-8, cutoff=1e-12, maximum=None
    )
    at = replace(products, squared_norm=torch.tensor(1e-12, dtype=torch.float64))
    above = replace(products, squared_norm=torch.tensor(1.001e-12, dtype=torch.float64))
    assert multiplier(GradientNorm(0.5), at).item() == 0.0
    assert multiplier(GradientNorm(0.5), above).item() > 0.0


@pytest.mark.parametrize("cutoff", [0.0, 1e-300, 1e-12, 25.0, 1e10])
def test_cutoff_is_inclusive_and_a_step(cutoff: float) -> None:
    """At ``|q|^2 = cutoff`` the multiplier is 0; one float above it is the exact one again."""
    f_dot = torch.tensor(-1.0, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    at = Products(zero, f_dot, torch.tensor(cutoff, dtype=torch.float64), zero)
    squared = math.nextafter(cutoff, math.inf)
    above = replace(at, squared_norm=torch.tensor(squared, dtype=torch.float64))
    assert multiplier(GradientNorm(0.0), at, eps=0.0, cutoff=cutoff).item() == 0.0
    assert (
        multiplier(GradientNorm(0.0), above, eps=0.0, cutoff=cutoff).item() == 1.0 / squared
        if squared > 1e-308
        else math.inf
    )


@oracle
@given(problems(exponent=100), deltas)
def test_the_correction_is_bounded_while_the_multiplier_is_not(problem: Problem, delta: float) -> None:
    """A10, exactly: ``beta |q| <= delta |q| + |f|`` however small q is."""
    f, q = rational(problem.f), rational(problem.q)
    f_norm, q_norm = root(inner(f, f)), root(inner(q, q))
    for barrier in (GradientNorm(delta), Aligned(delta)):
        found = Fraction(exact(barrier, problem.products()))
        assert found * q_norm <= (Fraction(delta) * q_norm + f_norm) * (1 + Fraction(UNIT))


@pytest.mark.parametrize("power", [0, 1, 4, 50, 150])
def test_the_multiplier_grows_like_one_over_the_gradient(power: int) -> None:
    """A10: f against q, |f| = 5: lambda = delta + 5/|q| without bound, lambda |q| -> |f| = 5."""
    size = 10.0**-power
    problem = Problem(1, [-3.0, -4.0], [0.6 * size, 0.8 * size])
    found = exact(GradientNorm(0.25), problem.products())
    assert found == pytest.approx(0.25 + 5.0 / size, rel=1e-14)
    assert found * size == pytest.approx(0.25 * size + 5.0, rel=1e-14)
    # With eps the multiplier is bounded by |f| / (2 sqrt(eps)) + delta, attained at |q| = sqrt(eps), and vanishes with
    # q.
    assert multiplier(GradientNorm(0.25), problem.products(), eps=1e-8, cutoff=0.0).item() <= 0.25 + 5.0 / 2e-4


@oracle
@given(problems(exponent=20), deltas, st.sampled_from([0.0, 1e-3, 0.25, 1.0, 50.0]))
def test_maximum_cuts_and_does_nothing_else(problem: Problem, delta: float, maximum: float) -> None:
    for barrier in (GradientNorm(delta), Aligned(delta)):
        products = problem.products()
        assert exact(barrier, products, maximum=maximum) == min(exact(barrier, products), maximum)


# --- limits and non-finite values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("barrier", [GradientNorm(0.5), Value(0.5), Aligned(0.5)])
@pytest.mark.parametrize("lower", [0.0, 1.0, -1.0])
def test_a_vanishing_gradient_gives_zero_without_eps_and_cutoff(barrier: Barrier, lower: float) -> None:
    """0/0 (and 1/0: rounding may leave a product where the norm underflowed) is specified: 0."""
    zero = torch.zeros((), dtype=torch.float64)
    products = Products(zero, zero + lower, zero, zero + 2.0)
    assert exact(barrier, products) == 0.0
    # 1e-170 squares to 0 in float64.
    assert exact(barrier, Problem(1, [-1.0, -1.0], [1e-170, 1e-170]).products()) == 0.0


numbers = st.floats(-1e300, 1e300)


@oracle
@given(
    numbers,
    numbers,
    st.floats(0.0, 1e300),
    numbers,
    deltas,
    st.sampled_from([0.0, 1e-8]),
    st.sampled_from([0.0, 1e-12]),
)
@example(-1.0, 0.0, 5e-324, 0.0, 1.0, 0.0, 0.0)  # a subnormal norm
def test_finite_products_never_give_nan(
    upper: float, lower: float, squared: float, value: float, delta: float, eps: float, cutoff: float
) -> None:
    """Whatever the products are, also where they contradict Cauchy and Schwarz and the quotient overflows."""
    products = Products(*(torch.tensor(x, dtype=torch.float64) for x in (upper, lower, squared, value)))
    for barrier in (GradientNorm(delta), Value(delta), Aligned(delta)):
        assert multiplier(barrier, products, eps=eps, cutoff=cutoff).item() >= 0.0  # False for NaN


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("squared", [4.0, 0.0, 1e-13])
@pytest.mark.parametrize("where", ["upper", "lower", "squared_norm"])
def test_a_non_finite_product_is_never_hidden(where: str, squared: float, bad: float) -> None:
    """Neither relu (of -inf), nor the cutoff, nor the maximum may turn it into a number."""
    one = torch.ones((), dtype=torch.float64)
    products = replace(Products(one, one, squared * one, one), **{where: bad * one})
    for barrier in (GradientNorm(0.5), Value(0.5), Aligned(0.5), GradientNorm(0.0)):
        for maximum in (None, 10.0):
            assert not math.isfinite(multiplier(barrier, products, maximum=maximum).item()), (barrier, maximum)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_constraint_is_never_hidden(bad: float) -> None:
    """-inf is an inner point where G overflowed: the clamp at 0 must not make a number of it."""
    one = torch.ones((), dtype=torch.float64)
    products = Products(-one, -one, one, bad * one)
    assert not math.isfinite(multiplier(Value(0.5), products).item())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overflow_of_the_products_stays_non_finite(sign: float) -> None:
    """Gradients of 1e200 are finite, their squares are not: the multiplier says so, on the side where relu would answer
    0, too.
    """
    products = Problem(1, [sign * 1e200, 0.0], [1e200, 0.0]).products()
    for barrier in (GradientNorm(0.5), Aligned(0.5)):
        assert not math.isfinite(multiplier(barrier, products).item())


# --- barrier functions ------------------------------------------------------------------------------------------------


def test_phi_of_each_barrier() -> None:
    """The values of phi, at products that tell every term apart."""
    products = Products(*(torch.tensor(x, dtype=torch.float64) for x in (3.0, 5.0, 16.0, 64.0)))
    assert products.total.item() == 8.0
    assert GradientNorm(0.25)(products).item() == 4.0
    assert Value(0.25)(products).item() == 16.0
    assert Aligned(0.25)(products).item() == 4.0 + 3.0


@pytest.mark.parametrize("value", [-1e300, -1.0, -1e-300, -0.0, 0.0])
def test_value_never_asks_for_an_increase_of_q(value: float) -> None:
    """An overshooting walk makes q negative. phi = 0 then: with <f, q> = -2, |q|^2 = 4 the multiplier is 1/2,
    not less.
    """
    products = Products(*(torch.tensor(x, dtype=torch.float64) for x in (0.0, -2.0, 4.0, value)))
    assert Value(3.0)(products).item() == 0.0
    assert exact(Value(3.0), products) == 0.5


def test_a_barrier_of_ones_own() -> None:
    class Constant(Barrier):
        def __call__(self, products: Products) -> Tensor:
            return 0 * products.value + 6.0

    # <f, q> = 2, |q|^2 = 8: lambda = (6 - 2)/8
    products = Products(*(torch.tensor(x, dtype=torch.float64) for x in (1.5, 0.5, 8.0, -7.0)))
    assert exact(Constant(), products) == 0.5


@pytest.mark.parametrize("kind", [GradientNorm, Value, Aligned])
@pytest.mark.parametrize(
    ("delta", "error", "rule"),
    [
        (-0.1, ValueError, "at least 0"),
        (math.nan, ValueError, "finite"),
        (math.inf, ValueError, "finite"),
        (True, TypeError, "number"),
        ("0.5", TypeError, "number"),
        (None, TypeError, "number"),
        (torch.tensor(0.5), TypeError, "float"),
    ],
)
def test_a_bad_delta_is_refused(
    kind: Callable[[Any], Barrier], delta: object, error: type[Exception], rule: str
) -> None:
    with pytest.raises(error, match=rule) as caught:
        kind(delta)
    assert str(caught.value).startswith(f"{kind.__name__}(delta=")


@pytest.mark.parametrize("kind", [GradientNorm, Value, Aligned])
def test_barriers_are_values(kind: Callable[[float], Barrier]) -> None:
    assert kind(0.0) == kind(0)
    assert kind(0.25) != kind(0.5)
    with pytest.raises(AttributeError):
        kind(0.25).delta = 1.0  # type: ignore[attr-defined]


# --- through the optimizers -------------------------------------------------------------------------------------------


def quadratic_optimizer(method: type[bilevel.BilevelOptimizer], upper_pull: float, **options: Any) -> Any:
    """F pulls w, and alpha by ``upper_pull``, against the lower loss; everything in float64."""
    alpha = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([4.0, 3.0], dtype=torch.float64)

    def upper_loss() -> Tensor:
        return ((w - target) ** 2).sum() + upper_pull * (alpha**2).sum()

    def lower_loss() -> Tensor:
        return ((w - alpha) ** 2).sum()

    return method(
        upper_loss,
        lower_loss,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        **options,
    )


@pytest.mark.parametrize("xi", [0.0, 1e-3, 0.1, 0.5, 1.0, 2.0])
def test_xi_scales_the_correction_and_never_its_sign(xi: float) -> None:
    """Directions are ``grad F + xi beta grad Q``: with xi = 0 the gradients of F, and linear in xi."""
    plain = quadratic_optimizer(bilevel.EBOMLC, 1.0, xi=0.0).directions()
    full = quadratic_optimizer(bilevel.EBOMLC, 1.0, xi=1.0).directions()
    found = quadratic_optimizer(bilevel.EBOMLC, 1.0, xi=xi).directions()
    # grad_w F = 2 (w - target) = (-6, -2), grad_alpha F = 2 alpha
    assert plain.lower["0"].tolist() == [-6.0, -2.0]
    assert plain.upper["0"].tolist() == [0.6, -0.4]
    assert full.stats.multiplier.item() > 0.25  # F pulls against G: active, more than delta
    assert found.stats.multiplier.item() == pytest.approx(xi * full.stats.multiplier.item(), rel=1e-15, abs=0.0)
    for side in ("upper", "lower"):
        gradient, whole, got = (getattr(d, side)["0"] for d in (plain, full, found))
        correction = whole - gradient
        assert (correction != 0).all()
        torch.testing.assert_close(got - gradient, xi * correction, rtol=1e-12, atol=1e-14)
        if xi > 0:
            assert torch.equal(torch.sign(got - gradient), torch.sign(correction))


def test_xi_leaves_an_inactive_barrier_alone() -> None:
    """Where beta = 0 every xi gives the gradients of F: the damping is outside the relu."""
    found = []
    for xi in (0.0, 0.5, 2.0):
        optimizer = quadratic_optimizer(bilevel.EBOMLC, 0.0, xi=xi, delta=0.0)
        # Beyond the target, F and G pull w the same way: <grad_w F, grad_w Q> > 0.
        optimizer.lower_optimizer.param_groups[0]["params"][0].data.copy_(torch.tensor([9.0, 9.0]))
        directions = optimizer.directions()
        assert not directions.stats.active.item()
        assert directions.stats.multiplier.item() == 0.0
        found.append(directions.lower["0"].tolist())
    assert found == [[10.0, 12.0]] * 3  # 2 (w - target)


def test_ebomlc_is_bome_where_f_does_not_see_alpha() -> None:
    """grad_alpha F = 0 and xi = 1 take EBOMLC to BOME with one step and the same delta, to the bit."""
    bome = quadratic_optimizer(bilevel.BOME, 0.0, barrier=GradientNorm(0.25), inner_steps=1).directions()
    ebomlc = quadratic_optimizer(bilevel.EBOMLC, 0.0, delta=0.25, xi=1.0).directions()
    assert bome.stats.multiplier.item() == ebomlc.stats.multiplier.item() > 0
    assert torch.equal(bome.upper["0"], ebomlc.upper["0"])
    assert torch.equal(bome.lower["0"], ebomlc.lower["0"])
    # and only there: a gradient of F in alpha enters BOME's numerator, not EBOMLC's
    assert (
        quadratic_optimizer(bilevel.BOME, 5.0, barrier=GradientNorm(0.25)).directions().stats.multiplier.item()
        != quadratic_optimizer(bilevel.EBOMLC, 5.0, delta=0.25, xi=1.0).directions().stats.multiplier.item()
    )


def test_products_of_a_method_use_both_levels() -> None:
    """By hand at alpha = (0.3, -0.2), w = (1, 2), inner rate 0.1, value-function reading, eps = cutoff = 0.

    u = w - alpha = (0.7, 2.2); w_1 = w - 0.2 u; Q = |u|^2 (1 - 0.8^2);
    grad_w Q = 2u, grad_alpha Q = -2u + 1.6u = -0.4u; |grad Q|^2 = 4.16 |u|^2.
    """
    u = np.array([0.7, 2.2])
    alpha, w = np.array([0.3, -0.2]), np.array([1.0, 2.0])
    squared = 4.16 * float(u @ u)
    f_w, f_alpha = 2 * (w - np.array([4.0, 3.0])), 2 * alpha
    upper, lower = float(f_alpha @ (-0.4 * u)), float(f_w @ (2 * u))
    constraint = float(u @ u) * (1 - 0.64)
    expected = {
        GradientNorm(0.5): 0.5 - (upper + lower) / squared,
        Value(0.5): (0.5 * constraint - upper - lower) / squared,
        Aligned(0.5): 0.5 - lower / squared,
    }
    for barrier, value in expected.items():
        stats = quadratic_optimizer(bilevel.BOME, 1.0, barrier=barrier, eps=0.0, cutoff=0.0).directions().stats
        assert stats.multiplier.item() == pytest.approx(value, rel=1e-12), barrier
        assert stats.constraint.item() == pytest.approx(constraint, rel=1e-12)
        assert stats.gradient_norm.item() == pytest.approx(math.sqrt(squared), rel=1e-12)
        assert stats.active.item()
