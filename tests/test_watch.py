"""What a run's stats say about whether its method can work."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

import bilevel


def run(method: Any, upper_loss: Any, lower_loss: Any, start: float, steps: int, **options: Any) -> bilevel.Watch:
    """Some steps under watch; losses take alpha and w."""
    alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
    w = torch.full((2,), start, dtype=torch.float64, requires_grad=True)
    optimizer = method(
        lambda: upper_loss(alpha, w),
        lambda: lower_loss(alpha, w),
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=options.pop("rate", 0.01)),
        lower_optimizer=torch.optim.SGD([w], lr=options.pop("lower_rate", 0.05)),
        **options,
    )
    watch = bilevel.Watch(window=20)
    for _ in range(steps):
        watch.look(optimizer.step())
    return watch


def test_a_singular_lower_hessian_is_seen_by_its_residual() -> None:
    """G does not know w_1, and F does: no v solves G_ww v = F_w."""
    with pytest.warns(RuntimeWarning, match="residual of the linear system stays at"):
        watch = run(
            bilevel.SOBA, lambda a, w: ((w - 1) ** 2).sum() + a**2, lambda a, w: (w[0] - a) ** 2, start=0.0, steps=100
        )
    assert set(watch.said) == {"residual"}


def test_a_penalty_that_is_too_small_is_seen_by_its_constraint() -> None:
    """F pulls w away from where G is lowest, and nothing holds it."""
    with pytest.warns(RuntimeWarning, match="the constraint has grown"):
        watch = run(
            bilevel.VPBGD,
            lambda a, w: ((w - 5) ** 2).sum() + a**2,
            lambda a, w: ((w - a) ** 2).sum(),
            start=0.0,
            steps=100,
            penalty=0.01,
            lower_rate=0.002,
        )
    assert set(watch.said) == {"constraint"}


def test_a_multiplier_that_explodes_is_seen() -> None:
    stats = [
        bilevel.BarrierStats(
            torch.zeros(()),
            torch.zeros(()),
            multiplier=torch.tensor(1.1**step),
            active=torch.tensor(True),
            constraint=torch.tensor(0.0),
            gradient_norm=torch.tensor(0.0),
        )
        for step in range(200)
    ]
    watch = bilevel.Watch(window=20)
    with pytest.warns(RuntimeWarning, match="the multiplier has grown from") as warned:
        collections.deque(map(watch.look, stats))
    assert len(warned) == 1  # once


@pytest.mark.parametrize("method", [bilevel.BOME, bilevel.VPBGD, bilevel.PDBO, bilevel.SOBA, bilevel.Implicit])
def test_nothing_is_said_where_a_method_works(method: Any) -> None:
    watch = run(
        method, lambda a, w: ((w - 1) ** 2).sum() + a**2, lambda a, w: ((w - a) ** 2).sum(), start=0.5, steps=300
    )
    assert watch.said == {}


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"Watch\(window=1\): must be at least 10"):
        bilevel.Watch(window=1)
    with pytest.raises(ValueError, match=r"Watch\(patience=0\)"):
        bilevel.Watch(patience=0)
