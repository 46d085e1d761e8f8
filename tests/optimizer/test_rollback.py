"""Real optimizer steps are taken back whole: whichever optimizer or hook raises, and for ``directions``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from methods_table import Problem, Record, assert_same
from plain_hypergradients import Setup
from test_sequential import ATOMIC, REAL, Broken, batches_of

# Differences of float32 gradients on a batch of six are rough, which a look says.
pytestmark = pytest.mark.filterwarnings("ignore:hessian product by difference:UserWarning")


@pytest.mark.parametrize("side", ["upper", pytest.param("lower", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("name", ATOMIC)
def test_a_hook_that_raises_takes_the_whole_step_back(name: str, when: str, side: str) -> None:
    """Of either optimizer, before or after it stepped: the last call of the step is the worst, all else was moved."""
    case = ATOMIC[name]
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    optimizer.step(*batches_of(problem, case))
    own = optimizer.state_dict()["state"]
    torch_optimizer = problem.upper_optimizer if side == "upper" else problem.lower_optimizer
    if side == "lower" and case.inner_steps == 0:
        return  # it takes no lower step

    def hook(*_: Any) -> None:
        raise Broken

    handle = getattr(torch_optimizer, f"register_step_{when}_hook")(hook)
    before = Record(problem)
    with pytest.raises(Broken):
        optimizer.step(*batches_of(problem, case))
    assert Record(problem).differences(before) == []
    assert_same(optimizer.state_dict()["state"].get("last", {}), own.get("last", {}))
    handle.remove()
    assert optimizer.step(*batches_of(problem, case)).upper_moved


def annealed(optimizer: torch.optim.Optimizer) -> Callable[..., None]:
    """A hook that halves the rate and keeps a counter in the group, as schedule-free optimizers do."""

    def hook(*_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5
            group["k"] = group.get("k", 0) + 1

    return hook


@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize("name", REAL)
def test_directions_restore_the_parameter_groups(name: str, rate: str) -> None:
    case = REAL[name]
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    lower = problem.lower_optimizer
    if rate == "tensor":
        for group in lower.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    lower.register_step_post_hook(annealed(lower))
    before, groups = Record(problem), [*lower.param_groups]
    optimizer.directions(*batches_of(problem, case))
    assert Record(problem).differences(before) == []
    assert all(a is b for a, b in zip(lower.param_groups, groups, strict=True))
    optimizer.step(*batches_of(problem, case))
    assert [group["k"] for group in lower.param_groups] == [case.real_steps] * len(groups)


def test_replay_with_a_rate_that_hooks_change_is_store_bit_for_bit() -> None:
    """The second pass takes each step at the rate of the first: the same points, the same rates at the end."""
    store, replay = Setup("momentum"), Setup("momentum")
    for memory, setup in (("store", store), ("replay", replay)):
        optimizer = setup.optimizer(bilevel.EMLC, inner_steps=3, memory=memory)
        setup.lower_optimizer.register_step_post_hook(annealed(setup.lower_optimizer))
        torch.manual_seed(0)
        for index in range(2):
            optimizer.step(*setup.data[index : index + 4])
    for a, b in zip(store.lower_optimizer.param_groups, replay.lower_optimizer.param_groups, strict=True):
        assert (a["lr"], a["k"]) == (b["lr"], b["k"])
        assert b["k"] == 6
    assert_same(list(replay.student.parameters()), list(store.student.parameters()))
    assert_same(list(replay.corrector.parameters()), list(store.corrector.parameters()))


def test_replay_with_a_rate_from_a_counter_of_the_hooks_own() -> None:
    """The second pass goes on counting, and is not taken at its word: rates are those of the first."""
    store, replay = Setup("momentum"), Setup("momentum")
    for memory, setup in (("store", store), ("replay", replay)):
        optimizer = setup.optimizer(bilevel.EMLC, inner_steps=3, memory=memory)
        calls: list[int] = []

        def hook(lower: Any, *_: Any, calls: list[int] = calls) -> None:
            calls.append(1)
            for group in lower.param_groups:
                group["lr"] = 0.1 / (1 + len(calls))

        setup.lower_optimizer.register_step_post_hook(hook)
        torch.manual_seed(0)
        optimizer.step(*setup.data[:4])
    assert replay.lower_optimizer.param_groups[0]["lr"] == store.lower_optimizer.param_groups[0]["lr"] == 0.1 / 4
    assert_same(list(replay.student.parameters()), list(store.student.parameters()))
    assert_same(list(replay.corrector.parameters()), list(store.corrector.parameters()))


class Counting(torch.optim.SGD):
    """An optimizer from outside torch: its ``zero_grad`` has no option, and its state a plain value."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.state["step"] = 0  # type: ignore[index,assignment]

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()

    def step(self, closure: Any = None) -> Any:
        self.state["step"] += 1  # type: ignore[index,operator]
        return super().step(closure)


def counting(kind: str, **options: Any) -> tuple[bilevel.BilevelOptimizer, Tensor, Tensor]:
    w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 0.5))
    method: Any = getattr(bilevel, kind)
    optimizer = method(
        lambda: (w - 1) ** 2 + a**2,
        lambda: (w - a) ** 2 / 2,
        upper=a,
        lower=w,
        upper_optimizer=Counting([a], lr=0.1),
        lower_optimizer=Counting([w], lr=0.1),
        **options,
    )
    return optimizer, w, a


@pytest.mark.parametrize("kind", ["BOME", "EMLC", "Implicit"])
def test_optimizers_with_plain_values_in_their_state(kind: str) -> None:
    optimizer, w, a = counting(kind)
    lower: Any = optimizer.lower_optimizer
    optimizer.directions()
    assert lower.state["step"] == 0
    optimizer.step()
    assert lower.state["step"] == 1
    saved, at = optimizer.state_dict(), (w.item(), a.item())
    optimizer.step()
    after = (w.item(), a.item())
    w.data.fill_(at[0])
    a.data.fill_(at[1])
    optimizer.load_state_dict(saved)
    assert lower.state["step"] == 1
    optimizer.step()
    assert (w.item(), a.item()) == after
    handle = optimizer.upper_optimizer.register_step_post_hook(lambda *_: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    if kind != "BOME":
        assert lower.state["step"] == 2
        assert (w.item(), a.item()) == after
    handle.remove()


@pytest.mark.parametrize("name", ["BOME", "MLC"])
def test_a_simultaneous_method_whose_lower_optimizer_raises(name: str) -> None:
    """As documented: the upper level has moved, random state is given back, the method remembers nothing."""
    w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 0.5))
    lower = torch.optim.SGD([w], lr=0.1)
    optimizer = getattr(bilevel, name)(
        lambda: (w - 1) ** 2 + a**2,
        lambda: (w - a) ** 2 / 2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=lower,
    )
    kept, random = optimizer.state_dict()["state"], torch.get_rng_state()
    lower.register_step_pre_hook(lambda *_: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert (w.item(), a.item() != 0.5) == (2.0, True)
    assert optimizer.state_dict()["state"] == kept
    assert torch.equal(torch.get_rng_state(), random)
