"""Several lower starts: out of the wrong well, and to the well that is best for F."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel

pytestmark = pytest.mark.thorough

Method = type[bilevel.VPBGD] | type[bilevel.PDBO] | type[bilevel.BOME] | type[bilevel.F2SA] | type[bilevel.BVFSM]
METHODS = [bilevel.VPBGD, bilevel.PDBO, bilevel.BOME, bilevel.F2SA, bilevel.BVFSM]
TRAINING = [bilevel.F2SA, bilevel.BVFSM]  # w takes real steps while they compute
OPTIONS: dict[Method, dict[str, Any]] = {
    bilevel.F2SA: {"penalty": 10.0},
    bilevel.BVFSM: {"penalty": 1.0, "slack": 1.0, "regularisation": 0.0, "decay": 0.0, "value_steps": 3},
}


def wells(method: Method, slope: float, wish: float, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """Two wells in w, the lower one at the sign of -slope; F would have w near ``wish``, and alpha at 0.5."""
    alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = method(
        lambda: (alpha - 0.5) ** 2 + 0.1 * (w - wish) ** 2,
        lambda: (w**2 - 1) ** 2 + slope * w + 0.01 * alpha * w**2,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.05),
        lower_optimizer=torch.optim.SGD([w], lr=0.02),
        inner_steps=3,
        **OPTIONS.get(method, {}) | options,
    )
    return optimizer, alpha, w


@pytest.mark.parametrize("method", METHODS)
def test_one_start_stays_in_its_well_and_several_leave_it(method: Method) -> None:
    optimizer, _, w = wells(method, slope=0.3, wish=1.0)
    for _ in range(200):
        optimizer.step()
    assert w.item() > 0.8
    optimizer, alpha, w = wells(method, slope=0.3, wish=1.0, starts=4, spread=2.0)
    for _ in range(600):
        stats = optimizer.step()
    assert w.item() < -0.8
    assert stats.constraint.item() < 0.02
    assert alpha.item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_of_wells_that_are_equally_low_that_which_is_best_for_f_is_taken(method: Method) -> None:
    """Here w begins at 1, F would have it at -1, and G does not mind."""
    optimizer, _, w = wells(method, slope=0.0, wish=-1.0, starts=4, spread=2.0)
    moved = [int(optimizer.step().chosen) for _ in range(200)]
    assert w.item() == pytest.approx(-1.0, abs=0.05)
    assert any(moved)  # to the end of a copy


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_the_papers_where_the_lowest_end_is_that_of_the_method_itself(method: Method) -> None:
    """A convex lower problem that the first copy has solved: directions are those of one start, from where w goes."""
    answers = []
    for starts in (1, 3):
        alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        optimizer = method(
            lambda w=w, alpha=alpha: (w - 0.7) ** 2 + alpha**2,  # lowest where w is: no end is better
            lambda w=w, alpha=alpha: (w - alpha) ** 2,
            upper=alpha,
            lower=w,
            upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
            lower_optimizer=torch.optim.SGD([w], lr=0.1),
            starts=starts,
            **OPTIONS.get(method, {}),
        )
        answers.append(optimizer.directions())
    one, three = answers
    assert int(three.stats.chosen) == 0
    assert torch.equal(one.upper["0"], three.upper["0"])
    assert three.lower == one.lower if method in TRAINING else torch.equal(one.lower["0"], three.lower["0"])


@pytest.mark.parametrize("method", TRAINING)
@pytest.mark.parametrize("slope", [0.3, 0.0])
def test_where_w_goes_and_the_direction_there_are_those_of_the_equations(method: Method, slope: float) -> None:
    """From the ends of the walks, which the state holds, by hand."""
    steps, rate, decay = 3, 0.02, 0.1
    options = {"regularisation": decay, "decay": decay} if method is bilevel.BVFSM else {}
    optimizer, alpha, w = wells(method, slope=slope, wish=-1.0, starts=5, spread=2.0, **options)
    directions = optimizer.directions()

    def f(y: Tensor) -> Tensor:
        return (alpha - 0.5) ** 2 + 0.1 * (y + 1.0) ** 2

    def g(y: Tensor) -> Tensor:
        return (y**2 - 1) ** 2 + slope * y + 0.01 * alpha * y**2

    def slope_of(loss: Any, y: Tensor) -> Tensor:
        at = y.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(at), at)[0]

    regular = decay if method is bilevel.BVFSM else 0.0
    first = "z" if method is bilevel.BVFSM else "y[0]"
    ends = [directions.state[name]["0"] for name in (first, *(f"start[{i}]" for i in range(1, 5)))]
    begin = w.detach().clone()
    for _ in range(steps):
        begin = begin - rate * slope_of(lambda y: g(y) + regular * y**2, begin)
    assert ends[0].item() == pytest.approx(begin.item(), abs=1e-12)
    lowest = min(ends, key=lambda y: float((g(y) + regular * y**2).detach()))
    weight = 10.0 if method is bilevel.F2SA else 1.0 / (g(lowest) + regular * lowest**2 + 1.0).item()
    trained = w.detach().clone()
    for _ in range(steps):
        descended = (
            (lambda y: g(y) + f(y) / weight)
            if method is bilevel.F2SA
            else (lambda y: f(y) + weight * g(y) + regular * y**2)
        )
        trained = trained - rate * slope_of(descended, trained)
    points = [trained, *ends]
    values = [float((f(y) + regular * y**2 + weight * g(y)).detach()) for y in points]
    best = values.index(min(values))
    assert best > 0  # out of the well of w
    assert int(directions.stats.chosen) == best
    assert directions.start["0"].item() == pytest.approx(points[best].item(), abs=1e-12)
    expected = 2 * (alpha.item() - 0.5) + weight * 0.01 * (points[best].item() ** 2 - lowest.item() ** 2)
    assert directions.upper["0"].item() == pytest.approx(expected, abs=1e-10)
    assert directions.stats.constraint.item() == pytest.approx((g(trained) - g(lowest)).item(), abs=1e-12)
    assert w.item() == 1.0  # directions take nothing
    optimizer.step()
    assert w.item() == directions.start["0"].item()


@pytest.mark.parametrize("method", METHODS)
def test_the_copies_are_part_of_a_checkpoint_and_draw_nothing_from_torchs_generator(method: Method) -> None:
    state = torch.get_rng_state()
    optimizer, alpha, w = wells(method, slope=0.3, wish=1.0, starts=3)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    saved = optimizer.state_dict()
    at = alpha.item(), w.item()
    for _ in range(5):
        optimizer.step()
    again, alpha_again, w_again = wells(method, slope=0.3, wish=1.0, starts=3)
    alpha_again.data.fill_(at[0])
    w_again.data.fill_(at[1])
    again.load_state_dict(saved)
    for _ in range(5):
        again.step()
    assert (alpha.item(), w.item()) == (alpha_again.item(), w_again.item())


@pytest.mark.parametrize("method", [bilevel.VPBGD, *TRAINING])
def test_copies_begin_inside_the_set_of_the_lower_variables(method: Method) -> None:
    optimizer, _, w = wells(
        method, slope=0.3, wish=1.0, starts=5, spread=5.0, lower_projection=bilevel.projection.Box(0.0, 1.5)
    )
    for _ in range(100):
        optimizer.step()
    assert 0.5 < w.item() <= 1.5  # the well at -1 is out of reach


@pytest.mark.parametrize("method", TRAINING)
def test_networks_with_buffers_and_frozen_layers_keep_the_contracts(method: Method) -> None:
    options: dict[str, Any] = {"value_steps": 1} if method is bilevel.BVFSM else {}
    bilevel.testing.check_method(method, inner_steps=1, starts=3, **options)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_refused(method: Method) -> None:
    with pytest.raises(ValueError, match=r"\(starts=0\): must be at least 1"):
        wells(method, 0.3, 1.0, starts=0)
    with pytest.raises(ValueError, match=r"\(spread=0.0\)"):
        wells(method, 0.3, 1.0, spread=0.0)
    optimizer, _, _ = wells(method, 0.3, 1.0, starts=2)
    with pytest.raises(AttributeError, match="fixed at construction"):
        optimizer.starts = 3


def test_readings_that_do_not_go_with_several_starts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"F2SA\(starts=2\): goes with p=1 alone"):
        wells(bilevel.F2SA, 0.3, 1.0, starts=2, p=2)
    with pytest.raises(ValueError, match=r"BVFSM\(starts=2\): goes with argument=.released. alone"):
        wells(bilevel.BVFSM, 0.3, 1.0, starts=2, argument="paper")
    optimizer, _, w = wells(bilevel.BVFSM, 0.3, 1.0, starts=2)
    optimizer.argument = "paper"
    with pytest.raises(ValueError, match=r"BVFSM\(starts=2\): goes with argument=.released. alone"):
        optimizer.step()
    assert w.item() == 1.0
    with pytest.raises(ValueError, match=r"BOME\(starts=2\): goes with value_gradient"):
        wells(bilevel.BOME, 0.3, 1.0, starts=2, value_gradient="difference")
