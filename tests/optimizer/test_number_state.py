"""A number that a method remembers: committed, undone, saved, cast, and averaged over tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from bilevel import Directions, Oracle, Stats


class Counting(bilevel.BilevelOptimizer[Stats]):
    """Moves by a weight that doubles in each step."""

    def __init__(self, *losses: Any, **common: Any) -> None:
        super().__init__(*losses, **common)
        self.weight = self.number_state("weight", 0.25, reduction="mean")

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        g, f = oracle.lower(), oracle.upper()
        weight = self.weight.value
        state = {"weight": 2 * weight}
        return Directions(weight * f.upper, g.lower, Stats(f.value, g.value), state=state)


def build(kind: type[Counting] = Counting) -> tuple[Any, Any]:
    alpha, w = (torch.tensor(x, requires_grad=True) for x in (1.0, 2.0))
    optimizer = kind(
        lambda: alpha**2 + w**2,
        lambda: (w - alpha) ** 2,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
    )
    return optimizer, alpha


def test_it_is_committed_by_step_and_apply_alone() -> None:
    optimizer, _ = build()
    for _ in range(2):  # looking remembers nothing
        found = optimizer.directions()
        assert found.upper["0"].item() == pytest.approx(0.25 * 2.0)
    optimizer.apply(found)
    assert optimizer.weight.value.item() == 0.5
    optimizer.step()
    assert optimizer.weight.value.item() == 1.0
    assert optimizer.weight.value.dtype == torch.float64
    with pytest.raises(ValueError, match="before another step moved the method's state"):
        optimizer.apply(found)


def test_it_is_saved_and_loaded() -> None:
    one, _ = build()
    one.step()
    state = one.state_dict()
    other, _ = build()
    other.load_state_dict(state)
    assert other.weight.value.item() == 0.5
    fresh = build()[0].state_dict()
    other.load_state_dict(fresh)
    assert other.weight.value.item() == 0.25


@pytest.mark.parametrize("wrong", [1.0, torch.ones(2), torch.ones((), dtype=torch.int64), {"0": torch.ones(())}])
def test_what_is_no_number_is_refused(wrong: Any) -> None:
    optimizer, _ = build()
    state = optimizer.state_dict()
    state["state"]["weight"] = wrong
    with pytest.raises(ValueError, match=r"the state weight is .*, expected a floating-point tensor of shape"):
        optimizer.load_state_dict(state)
    assert optimizer.weight.value.item() == 0.25


def test_a_step_that_fails_commits_nothing() -> None:
    optimizer, alpha = build()
    alpha.data.fill_(float("inf"))
    with pytest.raises(bilevel.NonFiniteError):
        optimizer.step()
    assert optimizer.weight.value.item() == 0.25


def test_over_tasks_it_is_averaged_if_its_declaration_says_so() -> None:
    optimizer, _ = build()
    tasks = [optimizer.directions() for _ in range(2)]
    assert Directions.mean(tasks).state["weight"] == 0.5

    class Undeclared(Counting):
        def __init__(self, *losses: Any, **common: Any) -> None:
            bilevel.BilevelOptimizer.__init__(self, *losses, **common)
            self.weight = self.number_state("weight", 0.25)

    optimizer, _ = build(Undeclared)
    tasks = [optimizer.directions() for _ in range(2)]
    with pytest.raises(ValueError, match="the state weight declares no mean"):
        Directions.mean(tasks)


def test_check_directions_compares_it() -> None:
    optimizer, _ = build()
    report = bilevel.check_directions(optimizer)
    assert report.passed
    assert "state weight" in str(report)
