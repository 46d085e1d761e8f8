"""What an evaluation touches besides its result: buffers, random state, training flags, held tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from methods_table import CASES, Case, Problem, assert_same, bits, every_case

# --- buffers ------------------------------------------------------------------------------------------------------


@every_case
def test_buffers_move_once_a_step_by_the_lower_loss(case: Case) -> None:
    # Once for each real lower step, where there are several: the twin then takes them too.
    problem, twin = Problem(), Problem()
    optimizer = problem.optimizer(case)
    for _ in range(3):
        batches = problem.batches(case.inner_steps)
        for name, module in twin.modules.items():
            module.load_state_dict(problem.modules[name].state_dict())
        twin.lower_optimizer.load_state_dict(deepcopy(problem.lower_optimizer.state_dict()))
        torch.manual_seed(4)
        optimizer.step(*batches)
        torch.manual_seed(4)
        for batch in batches[1 : 1 + max(case.real_steps, 1)]:
            loss, _ = twin.lower_loss(batch)  # all three modules, at the point before the step
            twin.lower_optimizer.zero_grad()
            loss.backward(inputs=[p for p in twin.classifier.parameters() if p.requires_grad])
            twin.lower_optimizer.step()  # an ordinary training loop
        if case.ordinary or case.real_steps == 1:  # else the points are others
            assert_same(problem.buffers(), twin.buffers())
        if case.real_steps and case.ordinary:
            assert_same(dict(problem.classifier.named_parameters()), dict(twin.classifier.named_parameters()))
    assert int(problem.classifier.norm.num_batches_tracked) == 3 * max(case.real_steps, 1)
    assert len(problem.buffers()) == 9


class Scale(nn.Module):
    """One lower parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Counter(nn.Module):
    """Counts its calls in a buffer: in place, or by binding a new tensor."""

    def __init__(self, *, rebind: bool = False) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.rebind = rebind

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.rebind:
            self.count = self.count + 1
            self.last = x.detach().mean(0)
        elif self.training:
            self.count += 1
            self.last.copy_(x.detach().mean(0))
        return x


class Scene:
    """A lower and an upper level of one parameter each; ``seen_by`` says which losses call which extra module."""

    def __init__(self, *, rebind: bool = False, **seen_by: str) -> None:
        self.lower, self.upper = Scale(), Scale()
        self.extra = {name: Counter(rebind=rebind) for name in seen_by}
        self.seen_by = seen_by
        self.upper_batch, self.lower_batch = torch.full((2, 3), 5.0), torch.full((2, 3), 2.0)

    def __getitem__(self, name: str) -> Counter:
        return self.extra[name]

    def upper_loss(self, x: Tensor) -> Tensor:
        for name, sides in self.seen_by.items():
            if "U" in sides:
                self.extra[name](x)
        return (self.lower(x) - x).square().mean() + 0.1 * self.upper.weight.square().sum()

    def lower_loss(self, x: Tensor) -> Tensor:
        for name, sides in self.seen_by.items():
            for _ in range(sides.count("L")):
                self.extra[name](x)
        return (self.lower(x) - self.upper(x) - 1).square().mean()  # mse_loss has no forward mode

    def optimizer(self, case: Case, **options: Any) -> Any:
        arguments: dict[str, Any] = {
            "upper": self.upper,
            "lower": self.lower,
            "upper_optimizer": torch.optim.SGD(self.upper.parameters(), lr=0.01),
            "lower_optimizer": torch.optim.SGD(self.lower.parameters(), lr=0.01),
            **case.options,
            **options,
        }
        return case.method(self.upper_loss, self.lower_loss, **arguments)

    def step(self, case: Case, **options: Any) -> None:
        self.optimizer(case, **options).step(self.upper_batch, self.lower_batch)


@pytest.mark.parametrize("rebind", [False, True], ids=["in place", "rebound"])
@every_case
def test_a_teacher_moves_once_whichever_loss_calls_it(case: Case, rebind: bool) -> None:
    scene = Scene(rebind=rebind, lower_only="L", upper_only="U", both="LU", twice="LLU", never="")
    optimizer = scene.optimizer(case, other=scene.extra.values())
    lower = max(case.real_steps, 1)
    upper = 0 if case.upper_at == "ahead" else 1  # F is then never evaluated at the current point
    for steps in (1, 2):
        optimizer.step(scene.upper_batch, scene.lower_batch)
        counts = {name: float(part.count) for name, part in scene.extra.items()}
        # A loss that calls a module twice moves it twice, as one plain evaluation would.
        expected = {"lower_only": lower, "upper_only": upper, "both": lower, "twice": 2 * lower, "never": 0}
        assert counts == {name: steps * each for name, each in expected.items()}
    assert scene["both"].last[0] == 2.0  # by the lower loss
    assert scene["upper_only"].last[0] == 5.0 * upper


@pytest.mark.parametrize("rebind", [False, True], ids=["in place", "rebound"])
@every_case
def test_directions_give_buffers_back(case: Case, rebind: bool) -> None:
    scene = Scene(rebind=rebind, lower_only="L", upper_only="U", both="LU")
    objects = {name: dict(part.named_buffers()) for name, part in scene.extra.items()}
    scene.optimizer(case, other=scene.extra.values()).directions(scene.upper_batch, scene.lower_batch)
    for name, part in scene.extra.items():
        assert part.count is objects[name]["count"]
        assert float(part.count) == 0
        assert not part.last.any()


@every_case
def test_a_teacher_in_evaluation_mode_never_moves(case: Case) -> None:
    scene = Scene(both="LU")
    scene["both"].eval()
    scene.step(case, other=scene["both"])
    assert scene["both"].count == 0
    problem = Problem()
    for module in problem.modules.values():
        module.eval()
    kept = bits(problem.buffers())
    problem.optimizer(case).step(*problem.batches())
    assert bits(problem.buffers()) == kept


def test_evaluation_mode_may_be_set_between_steps() -> None:
    scene = Scene(both="LU")
    optimizer = scene.optimizer(CASES["bome"], other=scene["both"])
    for training in (True, False, True):
        scene["both"].train(training)
        optimizer.step(scene.upper_batch, scene.lower_batch)
    assert scene["both"].count == 2


def test_a_submodule_moves_for_itself() -> None:
    # "Each module's buffers": what the lower loss moved does not keep the upper loss from moving another part.
    scene = Scene(lower_part="L", upper_part="U")
    parts = nn.ModuleList(scene.extra.values())
    scene.step(CASES["bome"], other=parts)
    assert [float(part.count) for part in scene.extra.values()] == [1, 1]


POLICIES: dict[str, Callable[[Case], int]] = {
    "once": lambda case: 1,
    "every": lambda case: len(case.step_calls),
    "never": lambda case: 0,
}


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["bome", "bome-3", "bome-difference", "bome-unrolled-reverse", "ebomlc"])
def test_policies_of_each_level(name: str, policy: str, level: str) -> None:
    case = CASES[name]
    scene = Scene(mine="LU", other="LU")
    own, foreign = (scene.lower, scene.upper) if level == "lower" else (scene.upper, scene.lower)
    own.part, foreign.part = scene["mine"], scene["other"]
    scene.step(case, **{f"{level}_buffers": policy})
    assert float(scene["mine"].count) == POLICIES[policy](case)
    assert float(scene["other"].count) == 1
    before = float(scene["mine"].count)
    scene.optimizer(case, **{f"{level}_buffers": policy}).directions(scene.upper_batch, scene.lower_batch)
    assert float(scene["mine"].count) == before


def test_buffers_of_several_dtypes_shapes_and_memory_layouts() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("flag", torch.tensor(False))
            self.register_buffer("narrow", torch.zeros(2, dtype=torch.bfloat16))
            self.register_buffer("grid", torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
            self.register_buffer("turned", torch.zeros(2, 3).t())
            self.register_buffer("empty", torch.zeros(0))
            self.register_buffer("absent", None)
            self.register_buffer("whole", torch.zeros(3, dtype=torch.int64))
            self.register_buffer("expanded", torch.ones(1).expand(3))

        def forward(self) -> None:
            for name, buffer in self.named_buffers():
                if name == "flag":
                    buffer.logical_not_()
                elif name == "expanded":
                    self.expanded = (buffer[:1] + 1).expand(3)
                elif buffer.numel():
                    buffer += torch.arange(buffer.numel()).view(buffer.shape).to(buffer.dtype)

    odd, scene = Odd(), Scene()

    def lower_loss(x: Tensor) -> Tensor:
        odd()
        return scene.lower_loss(x)

    optimizer = bilevel.BOME(
        scene.upper_loss,
        lower_loss,
        upper=scene.upper,
        lower=scene.lower,
        upper_optimizer=torch.optim.SGD(scene.upper.parameters(), lr=0.01),
        lower_optimizer=torch.optim.SGD(scene.lower.parameters(), lr=0.01),
        inner_steps=2,
        other=odd,
    )
    expected = Odd()
    expected()
    strides = {name: b.stride() for name, b in odd.named_buffers()}
    optimizer.step(scene.upper_batch, scene.lower_batch)
    for name, buffer in expected.named_buffers():
        assert torch.equal(odd.get_buffer(name), buffer), name
        assert odd.get_buffer(name).stride() == strides[name]


class Lazy(Counter):
    """Counts in a buffer that the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.total is None:
            self.total = torch.zeros(())
        self.total += 1
        return x


@pytest.mark.parametrize("sides", ["L", "U", "LU"])
def test_a_buffer_that_its_first_call_makes_is_kept_by_step_alone(sides: str) -> None:
    scene = Scene(lazy=sides)
    scene.extra["lazy"] = lazy = Lazy()
    optimizer = scene.optimizer(CASES["bome-3"], other=lazy)
    optimizer.directions(scene.upper_batch, scene.lower_batch)
    assert lazy.total is None
    for steps in (1, 2):
        optimizer.step(scene.upper_batch, scene.lower_batch)
        assert lazy.total == steps


def test_a_buffer_that_its_first_call_makes_moves_once_for_each_real_lower_step() -> None:
    scene = Scene(lazy="LU")
    scene.extra["lazy"] = lazy = Lazy()
    for steps in (2, 4):
        scene.step(CASES["emlc-2"], other=lazy)
        assert lazy.total == steps


def test_a_buffer_of_not_a_number_is_kept() -> None:
    scene = Scene(unset="U")
    scene["unset"].last.fill_(float("nan"))
    scene["unset"].eval()
    scene.step(CASES["bome"], other=scene["unset"])
    assert scene["unset"].last.isnan().all()


def test_a_buffer_shared_by_two_modules() -> None:
    scene = Scene(one="L", two="U")
    scene["two"].count = scene["one"].count
    scene.step(CASES["bome"], other=scene.extra.values())
    assert scene["two"].count is scene["one"].count


@pytest.mark.parametrize("change", ["shape", "dtype", "removed"])
def test_a_loss_that_changes_the_kind_of_a_buffer_is_refused(change: str) -> None:
    scene = Scene(both="LU")
    part = scene["both"]
    new = {"shape": torch.zeros(5), "dtype": torch.zeros(3, dtype=torch.float64), "removed": None}[change]
    before = part.last

    def lower_loss(x: Tensor) -> Tensor:
        part.last = new
        return scene.lower_loss(x)

    part.eval()
    optimizer = bilevel.BOME(
        scene.upper_loss,
        lower_loss,
        upper=scene.upper,
        lower=scene.lower,
        upper_optimizer=torch.optim.SGD(scene.upper.parameters(), lr=0.01),
        lower_optimizer=torch.optim.SGD(scene.lower.parameters(), lr=0.01),
        other=part,
    )
    with pytest.raises(bilevel.ClosureError, match=r"Counter\.last: a loss (changed|removed) this buffer"):
        optimizer.step(scene.upper_batch, scene.lower_batch)
    assert part.last is before


def test_every_call_of_a_batch_finds_the_buffers_of_its_first() -> None:
    # A loss may depend on what it moves, as with spectral norm: Q compares the same function at two points.
    class Drifting(Counter):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.count)

    scene = Scene(drift="")
    scene.extra["drift"] = drift = Drifting()

    def lower_loss(x: Tensor) -> Tensor:
        return (scene.lower(drift(x)) - scene.upper(x)).square().mean()

    optimizer = bilevel.BOME(
        scene.upper_loss,
        lower_loss,
        upper=scene.upper,
        lower=scene.lower,
        upper_optimizer=torch.optim.SGD(scene.upper.parameters(), lr=0.01),
        lower_optimizer=torch.optim.SGD(scene.lower.parameters(), lr=0.01),
        inner_lr=1e-6,
        other=drift,
    )
    for calls in (1, 2):
        stats = optimizer.step(scene.upper_batch, scene.lower_batch)
        assert 0 < stats.constraint < 1e-2 * stats.lower_loss
        assert drift.count == calls


# --- training flags -----------------------------------------------------------------------------------------------


@every_case
def test_flags_that_a_loss_sets_hold_until_its_call_ends(case: Case) -> None:
    scene = Scene(both="LU")
    part = scene["both"]
    seen: list[bool] = []

    def lower_loss(x: Tensor) -> Tensor:
        seen.append(part.training)
        part.eval()
        return scene.lower_loss(x)

    optimizer = case.method(
        scene.upper_loss,
        lower_loss,
        upper=scene.upper,
        lower=scene.lower,
        upper_optimizer=torch.optim.SGD(scene.upper.parameters(), lr=0.01),
        lower_optimizer=torch.optim.SGD(scene.lower.parameters(), lr=0.01),
        other=part,
        verify="never",
        **case.options,
    )
    optimizer.step(scene.upper_batch, scene.lower_batch)
    assert seen == [True] * sum(call in "Ll" for call in case.step_calls)  # every call of a batch is the same function
    assert part.training


# --- random state -------------------------------------------------------------------------------------------------


@every_case
def test_the_random_state_is_that_of_one_evaluation_of_each_batch(case: Case) -> None:
    problem, twin = Problem(), Problem()
    optimizer = problem.optimizer(case)
    for count in sorted({1, case.inner_steps}):
        batches = problem.batches(count)
        torch.manual_seed(11)
        optimizer.step(*batches)
        after_step = torch.get_rng_state()
        torch.manual_seed(11)
        start = torch.get_rng_state()
        for batch in batches[1:]:
            twin.lower_loss(batch)
        twin.upper_loss(batches[0])
        assert torch.equal(after_step, torch.get_rng_state())
        assert not torch.equal(after_step, start)


@every_case
def test_each_batch_meets_the_same_masks_in_every_call(case: Case) -> None:
    problem = Problem()
    optimizer = problem.optimizer(case)
    masks: list[Tensor] = []
    problem.classifier.dropout.register_forward_hook(lambda m, i, out: masks.append(out.detach() == 0) and None)
    for count in sorted({1, case.inner_steps}):
        masks.clear()
        problem.calls.clear()
        batches = problem.batches(count)
        optimizer.step(*batches)
        first: dict[tuple[str, int], Tensor] = {}
        for call, mask in zip(problem.calls, masks, strict=True):
            assert torch.equal(first.setdefault((call.side, id(call.batch)), mask), mask)
        distinct = {mask.numpy().tobytes() for mask in first.values()}
        assert len(distinct) == len(batches)  # but each batch has its own
    fresh = [m.numpy().tobytes() for m in masks]
    optimizer.step(*batches)
    assert masks[len(fresh)].numpy().tobytes() not in fresh  # and each step


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_cancels_in_q(p: float) -> None:
    problem = Problem(torch.float64)
    problem.classifier.dropout.p = problem.teacher.dropout.p = p
    optimizer = problem.optimizer(CASES["bome"], inner_lr=1e-9)
    upper, lower = problem.batches()
    draws = torch.stack([problem.lower_loss(lower)[0].detach() for _ in range(10)])
    for _ in range(5):
        q = optimizer.directions(upper, lower).stats.constraint
        assert 0 < q < 1e-6 * draws.std()  # not 0: q is about 1e-9 |grad G|^2
        torch.rand(1)


def test_numpy_and_python_randomness_are_left_to_the_user() -> None:
    # Documented: noise of these two does not cancel, and their state moves with each call of a loss.
    scene = Scene()
    drawn: list[tuple[float, float]] = []

    def lower_loss(x: Tensor) -> Tensor:
        drawn.append((random.random(), np.random.rand()))  # noqa: NPY002 (the state that users seed)
        return scene.lower_loss(x)

    optimizer = bilevel.BOME(
        scene.upper_loss,
        lower_loss,
        upper=scene.upper,
        lower=scene.lower,
        upper_optimizer=torch.optim.SGD(scene.upper.parameters(), lr=0.01),
        lower_optimizer=torch.optim.SGD(scene.lower.parameters(), lr=0.01),
        inner_steps=2,
        verify="never",  # a look warns of it
    )
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    optimizer.directions(scene.upper_batch, scene.lower_batch)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert drawn == [(random.random(), np.random.rand()) for _ in range(3)]  # noqa: NPY002


@every_case
def test_a_step_without_randomness_draws_none(case: Case) -> None:
    scene = Scene()
    before = torch.get_rng_state()
    scene.step(case)
    assert torch.equal(torch.get_rng_state(), before)


# --- hold ---------------------------------------------------------------------------------------------------------


def corrected(features: Callable[[Tensor], Tensor]) -> tuple[Any, nn.Linear, list[tuple[Tensor, Tensor]]]:
    """An optimizer whose corrector reads ``features`` of the student; notes (features now, features as held)."""
    torch.manual_seed(0)
    student, corrector = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    seen: list[tuple[Tensor, Tensor]] = []

    def lower_loss(x: Tensor) -> Tensor:
        hidden = student(x)
        held = features(hidden)
        seen.append((hidden.detach().clone(), held.detach().clone()))
        return cross_entropy(hidden, corrector(held).softmax(1))

    optimizer = bilevel.BOME(
        lambda x: (student(x) - 5).square().mean(),
        lower_loss,
        upper=corrector,
        lower=student,
        upper_optimizer=torch.optim.SGD(corrector.parameters(), lr=0.1),
        lower_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        inner_steps=2,
        barrier=bilevel.barrier.GradientNorm(100.0),  # so that grad q counts
        verify="never",
    )
    return optimizer, student, seen


def test_held_values_are_those_of_the_current_point() -> None:
    optimizer, _, seen = corrected(bilevel.hold)
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(2):
        seen.clear()
        optimizer.step(x, x)
        now, held = zip(*seen, strict=True)
        assert not torch.equal(now[0], now[1])  # the student did move
        assert not torch.equal(now[1], now[2])
        for value in held:
            assert torch.equal(value, now[0])


def test_a_held_value_of_each_batch() -> None:
    optimizer, student, seen = corrected(bilevel.hold)
    first, second = torch.randn(2, 4, 3, dtype=torch.float64)
    at_current = student(first).detach()
    optimizer.directions(first, first, second)
    assert torch.equal(seen[0][1], at_current)
    assert torch.equal(seen[1][1], seen[1][0])  # the first evaluation of the second batch is a look-ahead one
    assert torch.equal(seen[2][1], at_current)


def test_hold_cuts_the_gradient_inside_a_step_and_is_the_identity_outside() -> None:
    x = torch.ones(2, requires_grad=True)
    assert bilevel.hold(x) is x
    flags: list[bool] = []

    def note(hidden: Tensor) -> Tensor:
        held = bilevel.hold(hidden)
        flags.append(held.requires_grad)
        return held

    optimizer, _, _ = corrected(note)
    optimizer.step(torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))
    assert flags == [False] * 3
    assert bilevel.hold(x) is x


def test_hold_is_released_when_a_loss_raises() -> None:
    def fail(hidden: Tensor) -> Tensor:
        bilevel.hold(hidden)
        raise KeyError("boom")

    optimizer, _, _ = corrected(fail)
    with pytest.raises(KeyError):
        optimizer.step(torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))
    x = torch.ones(2, requires_grad=True)
    assert bilevel.hold(x) is x


def test_a_held_tensor_may_be_changed_in_place_afterwards() -> None:
    # In both directions: by the loss on its own tensor, and on what hold returned.
    def careless(hidden: Tensor) -> Tensor:
        other = hidden.detach() * 1
        held = bilevel.hold(other)
        result = held.clone()
        other.zero_()
        held.add_(1)
        return result

    plain, _, expected = corrected(bilevel.hold)
    optimizer, _, seen = corrected(careless)
    x = torch.randn(4, 3, dtype=torch.float64)
    found, wanted = optimizer.directions(x, x), plain.directions(x, x)
    assert_same([held for _, held in seen], [held for _, held in expected])
    assert_same(found.upper, wanted.upper)


def test_several_held_tensors_are_replayed_in_order() -> None:
    def two(hidden: Tensor) -> Tensor:
        a, b = bilevel.hold(hidden[:, 0]), bilevel.hold(hidden[:, 1])
        return torch.stack([a, b], 1)

    optimizer, _, seen = corrected(two)
    x = torch.randn(4, 3, dtype=torch.float64)
    optimizer.step(x, x)
    assert all(torch.equal(held, seen[0][0]) for _, held in seen)


@pytest.mark.parametrize("what", ["more often", "another shape"])
def test_holding_other_tensors_in_a_later_call_is_refused(what: str) -> None:
    calls: list[int] = []

    def changing(hidden: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) < 2:
            return bilevel.hold(hidden)
        if what == "more often":
            bilevel.hold(hidden)
            return bilevel.hold(hidden)
        bilevel.hold(hidden[:2])
        return hidden.detach()

    optimizer, student, _ = corrected(changing)
    kept = bits(list(student.parameters()))
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(bilevel.ClosureError, match="held other tensors"):
        optimizer.step(x, x)
    assert bits(list(student.parameters())) == kept


def test_only_tensors_can_be_held() -> None:
    with pytest.raises(TypeError, match=r"hold\(tensor=list\): must be a tensor"):
        bilevel.hold([torch.ones(1)])


@pytest.mark.parametrize("route", ["forward", "reverse", "difference"])
def test_held_values_are_replayed_in_mixed_products_too(route: str) -> None:
    # With held features, the unrolled gradient of q takes targets at the current point: G = -<t(h), log p(w)>.
    optimizer, student, _ = corrected(bilevel.hold)
    optimizer.value_gradient, optimizer.product, optimizer.inner_steps = "unrolled", route, 1
    corrector = optimizer._evaluator.upper.modules[0]
    x = torch.randn(4, 3, dtype=torch.float64)
    found = optimizer.directions(x, x)

    held = student(x).detach()
    weight, bias = student.weight, student.bias

    def g(w: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(x @ w.T + b, corrector(held).softmax(1))

    step = torch.autograd.grad(g(weight, bias), [weight, bias], create_graph=True)
    q = g(weight, bias) - g(weight - 0.1 * step[0], bias - 0.1 * step[1])
    q_gradient = torch.autograd.grad(q, [*corrector.parameters()])
    weight_of_q = found.stats.multiplier  # F does not depend on the corrector
    assert weight_of_q > 0
    for direction, expected in zip(found.upper.values(), q_gradient, strict=True):
        torch.testing.assert_close(direction, weight_of_q * expected, rtol=1e-6, atol=1e-9)
