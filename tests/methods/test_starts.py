"""Several lower starts: out of the wrong well, and to the well that is best for F."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel

Method = type[bilevel.VPBGD] | type[bilevel.PDBO] | type[bilevel.BOME]
METHODS = [bilevel.VPBGD, bilevel.PDBO, bilevel.BOME]


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
        **options,
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
        )
        answers.append(optimizer.directions())
    one, three = answers
    assert int(three.stats.chosen) == 0
    assert torch.equal(one.upper["0"], three.upper["0"])
    assert torch.equal(one.lower["0"], three.lower["0"])


def test_the_copies_are_part_of_a_checkpoint_and_draw_nothing_from_torchs_generator() -> None:
    state = torch.get_rng_state()
    optimizer, alpha, w = wells(bilevel.VPBGD, slope=0.3, wish=1.0, starts=3)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    saved = optimizer.state_dict()
    at = alpha.item(), w.item()
    for _ in range(5):
        optimizer.step()
    again, alpha_again, w_again = wells(bilevel.VPBGD, slope=0.3, wish=1.0, starts=3)
    alpha_again.data.fill_(at[0])
    w_again.data.fill_(at[1])
    again.load_state_dict(saved)
    for _ in range(5):
        again.step()
    assert (alpha.item(), w.item()) == (alpha_again.item(), w_again.item())


def test_copies_begin_inside_the_set_of_the_lower_variables() -> None:
    optimizer, _, w = wells(
        bilevel.VPBGD, slope=0.3, wish=1.0, starts=5, spread=5.0, lower_projection=bilevel.projection.Box(0.0, 1.5)
    )
    for _ in range(100):
        optimizer.step()
    assert 0.5 < w.item() <= 1.5  # the well at -1 is out of reach


@pytest.mark.parametrize("method", METHODS)
def test_what_is_refused(method: Method) -> None:
    with pytest.raises(ValueError, match=r"\(starts=0\): must be at least 1"):
        wells(method, 0.3, 1.0, starts=0)
    with pytest.raises(ValueError, match=r"\(spread=0.0\)"):
        wells(method, 0.3, 1.0, spread=0.0)
    optimizer, _, _ = wells(method, 0.3, 1.0, starts=2)
    with pytest.raises(AttributeError, match="fixed at construction"):
        optimizer.starts = 3


def test_readings_of_q_that_do_not_go_with_several_starts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"BOME\(starts=2\): goes with value_gradient"):
        wells(bilevel.BOME, 0.3, 1.0, starts=2, value_gradient="difference")
