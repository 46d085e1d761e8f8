"""What a method remembers is a value: committed by ``step`` and by ``apply``, averaged, saved, checked and undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import Directions, problems
from methods_table import Problem, assert_same


def scalars(w0: float = 2.0, a0: float = 0.5) -> tuple[Tensor, Tensor]:
    w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (w0, a0))
    return w, a


def mlc(w: Tensor, a: Tensor, target: Callable[[], float] = lambda: 1.0, **options: Any) -> bilevel.MLC:
    return bilevel.MLC(
        lambda: (w - target()) ** 2,
        lambda: (w - a) ** 2 / 2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=1.0),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        **{"inner_steps": 2, **options},
    )


def implicit(problem: problems.Quadratic, **options: Any) -> bilevel.Implicit:
    upper_optimizer, lower_optimizer = problem.optimizers()
    return bilevel.Implicit(
        problem.upper_loss,
        problem.lower_loss,
        upper=problem.upper,
        lower=problem.lower,
        upper_optimizer=upper_optimizer,
        lower_optimizer=lower_optimizer,
        **options,
    )


def test_apply_of_directions_is_step_for_a_method_with_state() -> None:
    """Six calls: alpha moves in every second one by ``apply`` as by ``step``, to the last bit."""
    (w, a), (v, b) = scalars(), scalars()
    stepped, applied = mlc(w, a), mlc(v, b)
    for call in range(6):
        stats = applied.apply(applied.directions())
        assert stats.upper_moved == stepped.step().upper_moved == bool(call % 2)
        assert torch.equal(w, v)
        assert torch.equal(a, b)
        assert applied.state_dict()["state"] == stepped.state_dict()["state"]
    assert a.item() != 0.5


def test_apply_commits_the_warm_start() -> None:
    """inner_steps=0: ``apply(directions())`` is the whole step."""
    one, other = problems.quadratic(seed=0), problems.quadratic(seed=0)
    solver = bilevel.ConjugateGradient(iterations=2)
    stepped, applied = (implicit(p, inner_steps=0, solver=solver) for p in (one, other))
    for _ in range(4):
        stats = stepped.step()
        assert torch.equal(stats.residual, applied.apply(applied.directions()).residual)
        assert torch.equal(one.upper, other.upper)
    assert applied.state_dict()["state"]["last"].keys() == {"0"}


def test_the_mean_of_tasks_accumulates_the_mean() -> None:
    """F of task t is (w - c_t)^2: by hand, ``m`` is the mean of the tasks' estimates and alpha moves along it."""
    w, a = scalars()
    task = 0.0
    optimizer = mlc(w, a, lambda: task)
    m, at = 0.0, 2.0
    for _ in range(2):
        directions, estimates = [], []
        d = at - 0.5
        ahead = at - 0.1 * d
        for task in (1.0, -3.0):
            g0, g1 = 2 * (at - task), 2 * (ahead - task)
            gamma = 0.9 * g1 * g0 / g0**2  # S = lr = 0.1
            estimates.append(0.1 * g1 + gamma * m)  # G_aw = -1
            directions.append(optimizer.directions())
        m, at = sum(estimates) / 2, ahead
        optimizer.apply(Directions.mean(directions))
        assert w.item() == pytest.approx(at, rel=1e-12)
    assert a.item() == pytest.approx(0.5 - m, rel=1e-12)


def test_directions_whose_state_has_moved_are_refused() -> None:
    w, a = scalars()
    optimizer = mlc(w, a)
    stale = optimizer.directions()
    optimizer.step()
    before = (w.item(), a.item(), optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=r"MLC\.apply\(directions=.*\): were taken before another step"):
        optimizer.apply(stale)
    with pytest.raises(ValueError, match=r"MLC\.apply\(directions=.*\): were taken before another step"):
        mlc(*scalars()).apply(optimizer.directions())
    with pytest.raises(ValueError, match="before and after the method's state moved"):
        Directions.mean([stale, replace(stale, mark=optimizer.directions().mark)])
    assert (w.item(), a.item(), optimizer.state_dict()["state"]) == before
    fresh = optimizer.directions()
    optimizer.apply(fresh)
    with pytest.raises(ValueError, match="were taken before another step"):
        optimizer.apply(fresh)  # twice: the second would count the same call again


class Remembers(bilevel.BilevelOptimizer[bilevel.Stats]):
    """A method of an author's own: heavy-ball on the upper gradient, its buffer kept as declared state."""

    def __init__(self, *losses: Any, reduction: Any = None, **common: Any) -> None:
        super().__init__(*losses, **common)
        self.z = self.upper_state("z", start="zeros", reduction=reduction)
        self.t = self.scalar_state("t")

    def compute(self, oracle: bilevel.Oracle) -> Directions:
        f, g = oracle.upper(), oracle.lower()
        z = f.upper + 0.5 * self.z.value
        stats = bilevel.Stats(f.value, g.value)
        return Directions(upper=z, lower=g.lower, state={"z": z, "t": self.t.value + 1}, stats=stats)


def remembers(w: Tensor, a: Tensor, **options: Any) -> Remembers:
    return Remembers(
        lambda: (a - 1) ** 2 / 2 + w**2,
        lambda: (w - a) ** 2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.5),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        **options,
    )


def test_an_authors_state() -> None:
    w, a = scalars(a0=3.0)
    optimizer = remembers(w, a)
    assert not optimizer.z.known
    optimizer.step()  # gradient 2, z = 2, a = 2
    optimizer.step()  # gradient 1, z = 2, a = 1
    assert (a.item(), float(optimizer.z.value.norm()), optimizer.t.value) == (1.0, 2.0, 2)
    with pytest.raises(ValueError, match="the state z declares no mean"):
        Directions.mean([optimizer.directions(), optimizer.directions()])
    averaged = remembers(w, a, reduction="mean")
    assert Directions.mean([averaged.directions(), averaged.directions()]).state["t"] == 1


def test_a_step_that_is_skipped_or_raises_commits_nothing() -> None:
    w, a = scalars()
    optimizer = remembers(w, a, on_nonfinite="skip")
    optimizer.step()
    kept = optimizer.state_dict()["state"]
    a.data.fill_(float("nan"))
    assert optimizer.step().skipped
    assert optimizer.state_dict()["state"] == kept
    a.data.fill_(0.5)
    optimizer.lower_optimizer.register_step_pre_hook(lambda *_: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.state_dict()["state"] == kept


MISFITS = {
    "a name that is no variable": {"accumulated": {"b": torch.zeros((), dtype=torch.float64)}, "calls": 1},
    "another shape": {"accumulated": {"0": torch.zeros(3, dtype=torch.float64)}, "calls": 1},
    "integers": {"accumulated": {"0": torch.zeros((), dtype=torch.int64)}, "calls": 1},
    "no tensor": {"accumulated": {"0": 0.0}, "calls": 1},
    "no mapping": {"accumulated": torch.zeros(()), "calls": 1},
    "a counter that is none": {"accumulated": {}, "calls": -1},
    "a missing value": {"accumulated": {}},
    "an unknown value": {"accumulated": {}, "calls": 1, "z": 1},
    "that of another method": {"last": {}},
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_state_that_does_not_fit_changes_nothing(kind: str) -> None:
    w, a = scalars()
    optimizer = mlc(w, a)
    optimizer.step()
    kept = optimizer.state_dict()
    other = mlc(*scalars())
    other.step()
    misfit = {**other.state_dict(), "state": MISFITS[kind]}
    misfit["lower_optimizer"]["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"MLC\.load_state_dict\(state=.*\): does not fit"):
        optimizer.load_state_dict(misfit)
    assert optimizer.state_dict() == kept
    assert optimizer.lower_optimizer.param_groups[0]["lr"] == 0.1


def test_loaded_state_is_cast_to_the_variables() -> None:
    w, a = scalars()
    optimizer = mlc(w, a)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"]["accumulated"] = {n: x.float() for n, x in state["state"]["accumulated"].items()}
    optimizer.load_state_dict(state)
    assert {x.dtype for x in optimizer.state_dict()["state"]["accumulated"].values()} == {torch.float64}
    assert optimizer.step().upper_moved


def test_fewer_inner_steps_than_calls_so_far_are_due_at_once() -> None:
    """A state saved with inner_steps=5 goes on with 2."""
    w, a = scalars()
    optimizer = mlc(w, a, inner_steps=5)
    for _ in range(3):
        optimizer.step()
    fewer = mlc(w, a, inner_steps=2)
    fewer.load_state_dict(optimizer.state_dict())
    assert [fewer.step().upper_moved for _ in range(3)] == [True, False, True]


def test_the_upper_loss_of_mlc_is_where_its_docstring_says() -> None:
    """F ahead of the step with inner_steps=1; at the current point where gamma needs F there."""
    for inner_steps, at in ((1, 2.0 - 0.1 * 1.5), (2, 2.0)):
        stats = mlc(*scalars(), inner_steps=inner_steps).directions().stats
        assert stats.upper_loss.item() == pytest.approx((at - 1) ** 2, rel=1e-12)


@pytest.mark.parametrize("method", [bilevel.Implicit, bilevel.MLC])
def test_a_variable_that_was_frozen_since_is_no_part_of_a_checkpoint(method: type[Any]) -> None:
    """The one that resumes is built with it frozen, and goes on to the same numbers."""
    runs = [Problem(), Problem()]
    options = {"inner_steps": 2} if method is bilevel.MLC else {"solver": bilevel.ConjugateGradient(damping=30.0)}
    batches = runs[0].batches()

    def build(run: Problem) -> Any:
        return method(
            run.upper_loss,
            run.lower_loss,
            upper=run.corrector,
            lower=run.classifier,
            upper_optimizer=run.upper_optimizer,
            lower_optimizer=run.lower_optimizer,
            **options,
        )

    one = build(runs[0])
    one.step(*batches)
    for run in runs:
        run.classifier.hidden.bias.requires_grad_(False)
        run.corrector.mix.bias.requires_grad_(False)
    for name, module in runs[1].modules.items():
        module.load_state_dict(runs[0].modules[name].state_dict())
    other = build(runs[1])
    other.load_state_dict(one.state_dict())
    for optimizer in (one, other):
        torch.manual_seed(0)
        optimizer.step(*batches)
    assert_same(runs[0].parameters(), runs[1].parameters())
