"""NaN and infinity: found wherever they arise, and what each policy then leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.barrier import Barrier, Products
from methods_table import CASES, Case, Problem, Record, assert_same, every_barrier_case, every_case

NAN, INF = float("nan"), float("inf")


class BadGoingBack(torch.autograd.Function):
    """The identity, whose gradient is multiplied by NaN: the loss stays finite. It has both further derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * NAN

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].clone()


POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan loss": lambda loss: loss * NAN,
    "nan gradient": BadGoingBack.apply,
}
every_poison = pytest.mark.parametrize("how", POISONS.values(), ids=POISONS.keys())


def poison(problem: Problem, side: str, how: Callable[[Tensor], Tensor]) -> None:
    """Spoil every call of one loss."""
    problem.after_call = lambda index, loss: how(loss) if problem.calls[index].side == side else loss


@pytest.mark.parametrize("side", ["U", "L"])
@every_poison
@every_case
def test_raise_changes_nothing(case: Case, how: Callable[[Tensor], Tensor], side: str) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    optimizer.step(*problem.batches())
    poison(problem, side, how)
    before = Record(problem)
    with pytest.raises(bilevel.NonFiniteError, match="held NaN or infinity; nothing was moved"):
        optimizer.step(*problem.batches())
    assert Record(problem).differences(before) == []


@pytest.mark.parametrize("side", ["U", "L"])
@pytest.mark.parametrize("value", [INF, -INF])
@every_barrier_case
def test_an_infinite_loss_is_found(case: Case, value: float, side: str) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    poison(problem, side, lambda loss: loss + value)  # its gradient is finite
    before = Record(problem)
    with pytest.raises(bilevel.NonFiniteError, match=f"{'upper' if side == 'U' else 'lower'}_loss"):
        optimizer.step(*problem.batches())
    assert Record(problem).differences(before) == []


@pytest.mark.thorough
@pytest.mark.parametrize("side", ["U", "L"])
@every_poison
@every_case
def test_skip_moves_neither_level_nor_any_state(case: Case, how: Callable[[Tensor], Tensor], side: str) -> None:
    problem, twin = Problem().lived_in(), Problem().lived_in()
    optimizer = problem.optimizer(case, on_nonfinite="skip")
    assert not optimizer.step(*problem.batches()).skipped
    poison(problem, side, how)
    batches = problem.batches()
    before = Record(problem)
    twin.classifier.load_state_dict(problem.classifier.state_dict())
    twin.corrector.load_state_dict(problem.corrector.state_dict())
    twin.teacher.load_state_dict(problem.teacher.state_dict())
    torch.manual_seed(8)
    stats = optimizer.step(*batches)
    assert stats.skipped
    assert not stats.upper_moved
    # Only the random state has gone on, as it would have: a skipped step is not drawn again.
    after = torch.get_rng_state()
    assert Record(problem).differences(before) == ["random.torch"]
    torch.manual_seed(8)
    twin.lower_loss(batches[1])
    # A real lower step that cannot be taken ends the step before F.
    if not (case.real_steps and case.ordinary and side == "L"):
        twin.upper_loss(batches[0])
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.thorough
@every_case
def test_after_a_skipped_step_training_goes_on_as_if_it_had_not_been(case: Case) -> None:
    problem, twin = Problem(), Problem()
    one, other = problem.optimizer(case, on_nonfinite="skip"), twin.optimizer(case)
    batches = [problem.batches() for _ in range(3)]
    for index, some in enumerate(batches):
        if index == 1:
            poison(problem, "L", POISONS["nan loss"])
            assert one.step(*some).skipped
            problem.after_call = None
        torch.manual_seed(index)
        one.step(*some)
        torch.manual_seed(index)
        other.step(*some)
    assert_same(problem.parameters(), twin.parameters())
    assert_same(problem.buffers(), twin.buffers())
    for a, b in zip(
        (problem.upper_optimizer, problem.lower_optimizer), (twin.upper_optimizer, twin.lower_optimizer), strict=True
    ):
        assert_same(a.state_dict()["state"], b.state_dict()["state"])
    assert all(t.isfinite().all() for s in one.state_dict()["lower_optimizer"]["state"].values() for t in s.values())


@pytest.mark.thorough
@pytest.mark.parametrize("side", ["U", "L"])
@every_poison
@every_case
def test_ignore_hands_it_over(case: Case, how: Callable[[Tensor], Tensor], side: str) -> None:
    # Never a silent zero: what is not finite arrives as such.
    problem = Problem()
    optimizer = problem.optimizer(case, on_nonfinite="ignore")
    poison(problem, side, how)
    stats = optimizer.step(*problem.batches())
    assert not stats.skipped
    assert stats.upper_moved
    assert any(not p.isfinite().all() for p in problem.parameters().values())


@every_case
def test_directions_say_what_they_found_without_raising(case: Case) -> None:
    problem = Problem()
    optimizer = problem.optimizer(case)
    poison(problem, "U", POISONS["nan gradient"])
    directions = optimizer.directions(*problem.batches())
    assert any(d.isnan().all() for d in (*directions.upper.values(), *directions.lower.values()))
    with pytest.raises(bilevel.NonFiniteError, match=r"the upper direction.* held NaN"):
        optimizer.apply(directions)


@every_case
def test_a_look_ahead_that_explodes_is_found(case: Case) -> None:
    # The first calls are fine, the one after the walk is not: as with a learning rate that is too large.
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case, verify="never")
    before = Record(problem)
    problem.after_call = lambda index, loss: loss * (INF if index == case.inner_steps else 1.0)
    with pytest.raises(bilevel.NonFiniteError):
        optimizer.step(*problem.batches())
    assert Record(problem).differences(before) == []


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["upper", "lower", "start"])
def test_apply_checks_what_it_is_given(side: str, value: float, policy: str) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(CASES["bome-inner"], on_nonfinite=policy)
    directions = optimizer.directions(*problem.batches())
    next(iter(getattr(directions, side).values())).view(-1)[-1] = value  # one bad entry
    before = Record(problem)
    if policy == "raise":
        names = {"upper": "the upper direction", "lower": "the lower direction", "start": "the inner point"}
        with pytest.raises(bilevel.NonFiniteError, match=f"BOME.step: {names[side]} held"):
            optimizer.apply(directions)
    else:
        assert optimizer.apply(directions).skipped
    assert Record(problem).differences(before) == []


class Constant(Barrier):
    """A barrier that answers with a fixed number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, products: Products) -> Tensor:
        return 0 * products.value + self.value


@pytest.mark.parametrize("value", [INF, NAN, 1e300])
def test_a_multiplier_that_is_not_finite_is_found(value: float) -> None:
    # 1e300 is a finite multiplier in float64, but no float32 direction can hold its product.
    problem = Problem().lived_in()
    optimizer = problem.optimizer(CASES["bome"], barrier=Constant(value))
    before = Record(problem)
    with pytest.raises(bilevel.NonFiniteError, match="the upper direction and the lower direction held"):
        optimizer.step(*problem.batches())
    assert Record(problem).differences(before) == []
    limited = problem.optimizer(CASES["bome"], barrier=Constant(value), multiplier_max=1.0)
    if value == value:
        assert limited.step(*problem.batches()).multiplier == 1.0
    else:
        with pytest.raises(bilevel.NonFiniteError):  # a limit does not turn NaN into a number
            limited.step(*problem.batches())


def test_large_finite_values_are_no_reason_to_skip() -> None:
    # |grad q|^2 overflows float32, the directions do not.
    w = torch.zeros(2, requires_grad=True)
    alpha = torch.zeros(2, requires_grad=True)
    optimizer = bilevel.BOME(
        lambda: w.sum(),
        lambda: (w * (1e25 + alpha)).sum(),
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=1e-30),
        lower_optimizer=torch.optim.SGD([w], lr=1.0),
        inner_lr=1e-15,
    )
    stats = optimizer.step()
    assert stats.upper_moved
    assert stats.gradient_norm.isfinite()
    assert stats.gradient_norm > 1e25


def test_which_part_was_bad_is_named() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"])
    poison(problem, "U", POISONS["nan loss"])
    with pytest.raises(bilevel.NonFiniteError, match=r"BOME\.step: upper_loss and .*on_nonfinite=\"skip\""):
        optimizer.step(*problem.batches())
    poison(problem, "L", POISONS["nan loss"])
    with pytest.raises(bilevel.NonFiniteError, match=r"BOME\.step: lower_loss and "):
        optimizer.step(*problem.batches())


def test_an_unused_variable_does_not_count() -> None:
    # A variable that holds NaN but that no loss reads, in the step as in its check.
    problem = Problem()
    problem.classifier.unused = torch.nn.Parameter(torch.full((2,), NAN))
    problem.lower_optimizer.add_param_group({"params": [problem.classifier.unused]})
    assert not problem.optimizer(CASES["bome"]).step(*problem.batches()).skipped


def test_no_optimizer_hook_sees_a_skipped_step() -> None:
    problem = Problem()
    calls: list[str] = []
    problem.upper_optimizer.register_step_pre_hook(lambda *_: calls.append("upper"))
    problem.lower_optimizer.register_step_pre_hook(lambda *_: calls.append("lower"))
    optimizer = problem.optimizer(CASES["bome"], on_nonfinite="skip")
    poison(problem, "U", POISONS["nan loss"])
    optimizer.step(*problem.batches())
    assert calls == []
    problem.after_call = None
    optimizer.step(*problem.batches())
    assert calls == ["upper", "lower"]


def test_the_error_names_an_empty_batch_as_a_usual_cause() -> None:
    w, a = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = bilevel.BOME(
        lambda x: (w * x).mean() + a.sum(),
        lambda x: (w - a).square().sum(),
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
    )
    with pytest.raises(bilevel.NonFiniteError, match="Usual causes: an empty batch"):
        optimizer.step(torch.ones(0, 2), torch.ones(1, 2))
