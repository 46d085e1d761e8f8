"""Hyperparameters can be set while training: each is checked, and takes effect or raises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.barrier import Aligned, GradientNorm
from bilevel.penalty import Linear
from methods_table import CASES, Case, Problem

CLASSES = {case.method: case for case in CASES.values()}
LEVELS = {"upper_loss", "lower_loss", "upper", "lower", "upper_optimizer", "lower_optimizer", "other"}


def arguments(method: type[Any]) -> list[str]:
    own = [kind.__init__ for kind in method.__mro__ if "__init__" in vars(kind) and kind is not object]
    named = [
        x
        for f in own
        for x in inspect.signature(f).parameters.values()
        if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)
    ]
    return [name for name in dict.fromkeys(x.name for x in named) if name != "self"]


@pytest.mark.parametrize("case", CLASSES.values(), ids=[method.__name__ for method in CLASSES])
def test_whatever_is_named_like_an_argument_is_checked_when_it_is_set(case: Case) -> None:
    optimizer: Any = Problem().optimizer(case)
    names = arguments(case.method)
    assert set(names) > LEVELS
    for name in names:
        before = getattr(optimizer, name, None)
        with pytest.raises((TypeError, ValueError, AttributeError)):
            setattr(optimizer, name, object())
        assert getattr(optimizer, name, None) is before


def toy(method: Any = bilevel.EBOMLC, **options: Any) -> Any:
    w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 0.5))
    return method(
        lambda: (w - 3) ** 2 + a**2,
        lambda: (w - a) ** 2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        **options,
    )


def directions(optimizer: Any) -> Tensor:
    return torch.stack([*optimizer.directions().upper.values(), *optimizer.directions().lower.values()])


EFFECTS: list[tuple[Any, str, Any]] = [
    (bilevel.EBOMLC, "xi", 0.1),
    (bilevel.EBOMLC, "delta", 30.0),
    (bilevel.EBOMLC, "value_gradient", "difference"),
    (bilevel.BOME, "barrier", GradientNorm(9.0)),
    (bilevel.BOME, "inner_lr", 0.3),
    (bilevel.BOME, "inner_steps", 3),
    (bilevel.BOME, "multiplier_max", 0.01),
    (bilevel.Unrolled, "inner_steps", 3),
    (bilevel.Unrolled, "inner_lr", 0.3),
    (bilevel.EMLC, "inner_steps", 2),
    (bilevel.Implicit, "solver", bilevel.Neumann(0)),
    (bilevel.VPBGD, "penalty", 30.0),
    (bilevel.VPBGD, "normalise", False),
    (bilevel.F2SA, "penalty", Linear(3.0, slope=1.0)),
    (bilevel.BVFSM, "slack", 3.0),
    (bilevel.MEHA, "gamma", 0.2),
    (bilevel.BSG1, "eps", 1.0),
]


@pytest.mark.parametrize(("method", "name", "value"), EFFECTS)
def test_what_is_set_later_is_what_the_constructor_would_do(method: Any, name: str, value: Any) -> None:
    later, first = toy(method), toy(method, **{name: value})
    before = directions(later)
    setattr(later, name, value)
    assert torch.equal(directions(later), directions(first))
    assert not torch.equal(directions(later), before)


def test_the_discount_set_later() -> None:
    """It weighs every step but the last."""
    later = toy(bilevel.EMLC, inner_steps=2)
    later.discount = 0.25
    assert torch.equal(directions(later), directions(toy(bilevel.EMLC, inner_steps=2, discount=0.25)))


def test_papers_names() -> None:
    optimizer = toy()
    assert (optimizer.xi, optimizer.delta) == (0.5, 0.25)
    optimizer.delta = 0.5
    assert optimizer.barrier == Aligned(0.5)
    with pytest.raises(ValueError, match=r"EBOMLC\(xi=-1\.0\): must be"):
        optimizer.xi = -1.0
    with pytest.raises(TypeError, match=r"EBOMLC\(delta=much\): must be a Python number"):
        optimizer.delta = "much"
    optimizer.barrier = GradientNorm(0.5)
    with pytest.raises(AttributeError, match=r"no delta with the barrier GradientNorm"):
        _ = optimizer.delta


def test_a_preview_set_later_needs_an_optimizer_that_can_be_followed() -> None:
    w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 0.5))
    optimizer = bilevel.BOME(
        lambda: (w - 1) ** 2 + a**2,
        lambda: (w - a) ** 2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.RMSprop([w], lr=0.1),
    )
    optimizer.inner_step = "optimizer"
    with pytest.raises(ValueError, match=r"BOME\(lower_optimizer=RMSprop\): cannot be followed"):
        optimizer.step()


def test_what_is_fixed_says_so() -> None:
    with pytest.raises(AttributeError, match=r"Unrolled\(truncate=1\): is fixed at construction"):
        toy(bilevel.Unrolled, inner_steps=2).truncate = 1


def state_of(kind: Any, **options: Any) -> dict[str, Any]:
    w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 0.5))
    optimizer = bilevel.BOME(
        lambda: (w - 1) ** 2 + a**2,
        lambda: (w - a) ** 2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=kind([w], lr=0.1, **options),
    )
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("steps", [0, 1])
def test_the_state_of_another_optimizer_is_refused(steps: int) -> None:
    optimizer = toy(bilevel.BOME)
    for _ in range(steps):
        optimizer.step()
    before = optimizer.state_dict()
    for other in (torch.optim.Adam, torch.optim.RMSprop):
        with pytest.raises(ValueError, match=r"BOME\.load_state_dict.*are not those of SGD"):
            optimizer.load_state_dict(state_of(other))
        assert optimizer.state_dict() == before
    optimizer.step()


def test_options_of_a_scheduler_or_another_version_are_none_of_another_optimizer() -> None:
    state = state_of(torch.optim.SGD)
    for group in state["lower_optimizer"]["param_groups"]:
        del group["fused"]
        group["initial_lr"] = 0.2
    toy(bilevel.BOME).load_state_dict(state)


def test_maximize_that_is_loaded_or_set_later_is_refused() -> None:
    optimizer = toy(bilevel.BOME)
    before = optimizer.state_dict()
    state = state_of(torch.optim.SGD)
    state["lower_optimizer"]["param_groups"][0]["maximize"] = True
    with pytest.raises(ValueError, match=r"maximize=True, which would walk against"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before
    optimizer.step()
    for side in ("upper", "lower"):
        group = getattr(optimizer, f"{side}_optimizer").param_groups[0]
        group["maximize"] = True
        with pytest.raises(ValueError, match=rf"BOME\({side}_optimizer=SGD\): has maximize=True"):
            optimizer.step()
        group["maximize"] = False
    optimizer.step()
