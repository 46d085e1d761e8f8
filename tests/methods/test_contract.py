"""What every method promises: what it leaves alone, what it calls and how often, what it hands to the torch optimizers.

Each test runs for every row of ``methods_table.CASES``; a method that joins the table is under contract.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from operator import methodcaller
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.barrier import Value
from methods_table import (
    CASES,
    Case,
    Problem,
    Record,
    assert_same,
    bits,
    every_barrier_case,
    every_case,
    every_dtype,
    leaves,
)

# Differences of float32 gradients on a batch of six are rough, which a look says.
pytestmark = pytest.mark.filterwarnings("ignore:hessian product by difference:UserWarning")


def batch_counts(case: Case) -> list[int]:
    """The numbers of lower batches that a row accepts: one, or one for each inner step."""
    return sorted({1, max(case.inner_steps, 1)})


# --- directions, apply, step --------------------------------------------------------------------------------------


@every_dtype
@every_case
def test_directions_move_nothing(case: Case, dtype: torch.dtype) -> None:
    problem = Problem(dtype).lived_in()
    optimizer = problem.optimizer(case)
    for count in batch_counts(case):
        before = Record(problem)
        directions = optimizer.directions(*problem.batches(count))
        assert Record(problem).differences(before) == []
        assert len(directions.upper) == 6  # and the look was a real one
        assert len(directions.lower) == (6 if case.gives_lower else 0)


@every_dtype
@every_case
def test_step_is_apply_of_directions(case: Case, dtype: torch.dtype) -> None:
    # For the upper level of a sequential method as well: where its lower steps are real, directions takes them back.
    stepped, applied = Problem(dtype).lived_in(), Problem(dtype).lived_in()
    one, other = stepped.optimizer(case), applied.optimizer(case)
    for _ in range(2):
        batches = stepped.batches(case.inner_steps)
        torch.manual_seed(7)
        stats = one.step(*batches)
        torch.manual_seed(7)
        directions = other.directions(*batches)
        applied_stats = other.apply(directions)
        assert_same(dict(stepped.corrector.named_parameters()), dict(applied.corrector.named_parameters()))
        assert_same_state(stepped.upper_optimizer, applied.upper_optimizer)
        assert numbers(stats) == numbers(applied_stats)
        assert stats.upper_moved
        assert not stats.skipped
        assert directions.stats.upper_moved is False
        if case.gives_lower:
            assert_same(stepped.parameters(), applied.parameters())
            assert_same_state(stepped.lower_optimizer, applied.lower_optimizer)
        # Buffers, and the lower level of a sequential method, move by step alone: bring the twins together again.
        for name, module in applied.modules.items():
            module.load_state_dict(stepped.modules[name].state_dict())
        applied.lower_optimizer.load_state_dict(deepcopy(stepped.lower_optimizer.state_dict()))


def numbers(stats: bilevel.Stats) -> dict[str, float]:
    """What a logger gets, but for the numbers of the calls."""
    return {name: value for name, value in stats.as_dict().items() if not name.endswith("/call")}


def assert_same_state(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    assert bits(dict(leaves(found.state_dict(), ""))) == bits(dict(leaves(expected.state_dict(), "")))


@pytest.mark.filterwarnings("ignore:.*hook of the lower optimizer (changed|moved):UserWarning")  # right here
@every_case
def test_apply_leaves_the_directions_as_they_are(case: Case) -> None:
    problem = Problem()
    optimizer = problem.optimizer(case)
    for torch_optimizer in (problem.upper_optimizer, problem.lower_optimizer):
        parameters = torch_optimizer.param_groups[0]["params"]
        torch_optimizer.register_step_pre_hook(
            lambda *_, p=parameters: torch.nn.utils.clip_grad_norm_(p, 1e-3) and None
        )
    directions = optimizer.directions(*problem.batches())
    kept = [{name: d.clone() for name, d in side.items()} for side in (directions.upper, directions.lower)]
    optimizer.apply(directions)
    assert_same(directions.upper, kept[0])
    assert_same(directions.lower, kept[1])
    gradients = [p.grad for p in problem.corrector.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients) < 2e-3  # the hook did clip


@every_case
def test_directions_are_named_and_ordered_like_parameters(case: Case) -> None:
    problem = Problem()
    directions = problem.optimizer(case).directions(*problem.batches())
    trainable = {n: p for n, p in problem.classifier.named_parameters() if p.requires_grad}
    assert list(directions.lower) == (list(trainable) if case.gives_lower else [])
    assert list(directions.upper) == [n for n, _ in problem.corrector.named_parameters()]
    for name, direction in directions.lower.items():
        assert direction.shape == trainable[name].shape
        assert not direction.requires_grad
    assert (directions.start is not None) == (case.options.get("step_from") == "lookahead")


@every_case
def test_directions_and_variables_share_no_memory(case: Case) -> None:
    problem = Problem()
    directions = problem.optimizer(case).directions(*problem.batches())
    tensors = [*directions.upper.values(), *directions.lower.values(), *(directions.start or {}).values()]
    tensors += problem.parameters().values()
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@every_case
def test_the_torch_optimizers_see_the_directions_as_gradients(case: Case) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    seen: list[dict[str, Tensor | None]] = []

    def oracle(*_: Any) -> None:
        seen.append({n: None if p.grad is None else p.grad.clone() for n, p in problem.parameters().items()})

    problem.upper_optimizer.register_step_pre_hook(oracle)
    problem.lower_optimizer.register_step_pre_hook(oracle)
    batches = problem.batches(case.inner_steps)
    torch.manual_seed(3)
    directions = optimizer.directions(*batches)
    seen.clear()  # real lower steps that directions takes back may call hooks
    torch.manual_seed(3)
    optimizer.step(*batches)
    assert len(seen) == 1 + max(case.real_steps, 1)  # the upper optimizer steps once, the lower one for each lower step
    last = {name: p.grad for name, p in problem.corrector.named_parameters()}
    assert_same(last, dict(directions.upper))  # what .grad holds after the step
    at_upper = seen[case.real_steps]
    assert_same({name: at_upper[f"corrector.{name}"] for name in directions.upper}, dict(directions.upper))
    if case.gives_lower:
        assert_same({name: seen[1][f"classifier.{name}"] for name in directions.lower}, dict(directions.lower))


@every_dtype
@every_case
def test_directions_keep_the_dtype(case: Case, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    directions = problem.optimizer(case).directions(*problem.batches())
    tensors = [*directions.upper.values(), *directions.lower.values(), *(directions.start or {}).values()]
    assert {t.dtype for t in tensors} == {dtype}
    assert directions.stats.upper_loss.dtype == dtype


@every_dtype
@every_barrier_case
def test_the_multiplier_is_computed_in_float64(case: Case, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    stats = problem.optimizer(case).directions(*problem.batches()).stats
    assert {stats.multiplier.dtype, stats.constraint.dtype, stats.gradient_norm.dtype} == {torch.float64}


@every_case
def test_float32_directions_are_those_of_float64_rounded(case: Case) -> None:
    narrow, wide = Problem(torch.float32), Problem(torch.float64)
    for name, parameter in wide.parameters().items():
        parameter.data.copy_(narrow.parameters()[name])  # float32 values are float64 values
    for problem in (narrow, wide):
        for part in (problem.classifier, problem.teacher):
            part.dropout.p = 0.0  # masks of the two dtypes are drawn differently
    batches = narrow.batches(case.inner_steps)
    found = narrow.optimizer(case).directions(*batches)
    expected = wide.optimizer(case).directions(*[tuple(t.double() for t in batch) for batch in batches])
    # A central difference in float32 is good to about the square of the cube root of the rounding unit.
    tolerance = 5e-3 if getattr(expected.stats, "product", None) == "difference" else 2e-4
    for side in ("upper", "lower"):
        for name, direction in getattr(expected, side).items():
            scale = max(float(d.abs().max()) for d in getattr(expected, side).values())
            error = (getattr(found, side)[name].double() - direction).abs().max() / scale
            assert error < tolerance, (side, name)


@every_case
def test_directions_do_not_depend_on_the_surrounding_grad_mode(case: Case) -> None:
    problem = Problem()
    optimizer = problem.optimizer(case)
    batches = problem.batches()
    torch.manual_seed(0)
    expected = optimizer.directions(*batches)
    torch.manual_seed(0)
    with torch.no_grad():
        found = optimizer.directions(*batches)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert_same(found.upper, expected.upper)
    assert_same(found.lower, expected.lower)


# --- calls --------------------------------------------------------------------------------------------------------


@every_case
def test_calls_of_the_losses_are_the_documented_ones(case: Case) -> None:
    for count in batch_counts(case):
        problem = Problem()
        optimizer = problem.optimizer(case, verify="never")
        for verb in ("directions", "step", "step"):  # the second step as the first
            problem.calls.clear()
            getattr(optimizer, verb)(*problem.batches(count))
            found = [call.side if call.side == "U" or call.graph else "l" for call in problem.calls]
            assert "".join(found) == case.calls_of(verb)


@every_case
def test_each_call_gets_its_batch_itself(case: Case) -> None:
    problem = Problem()
    batches = problem.batches(case.inner_steps)
    kept = bits(batches)
    problem.optimizer(case, verify="never").step(*batches)
    assert bits(batches) == kept
    lower = [call.batch for call in problem.calls if call.side == "L"]
    assert next(call.batch for call in problem.calls if call.side == "U") is batches[0]
    for found, expected in zip(lower, batches[1:], strict=False):
        assert found is expected  # inner step t is on batch t
    after = lower[case.inner_steps :]
    if case.gives_lower:
        assert after[0] is batches[1]  # Q is measured on the first
        after = after[1:]
    if case.then:
        assert after.pop() is batches[1]  # the ordinary step is on the first
    # What is left are products of the steps, in whatever order.
    assert {id(batch) for batch in after} <= {id(batch) for batch in batches[1:]}


@every_case
def test_a_single_lower_batch_serves_every_inner_step(case: Case) -> None:
    problem = Problem()
    upper, lower = problem.batches()
    problem.optimizer(case, verify="never").step(upper, lower)
    assert all(call.batch is (lower if call.side == "L" else upper) for call in problem.calls)


@every_case
def test_aux_is_that_of_the_current_point_and_detached(case: Case) -> None:
    problem = Problem()
    stats = problem.optimizer(case, verify="never").step(*problem.batches(case.inner_steps))
    assert stats.lower_aux["call"] == 0
    assert stats.upper_aux["call"] == case.directions_calls.index("U")
    assert not stats.lower_aux["logits"].requires_grad
    assert not stats.upper_aux["logits"].requires_grad
    assert not stats.upper_loss.requires_grad
    assert not stats.lower_loss.requires_grad


@pytest.mark.parametrize("structure", ["bare", "list", "nested", "none", "number"])
def test_aux_may_be_any_structure(structure: str) -> None:
    problem = Problem()

    def loss(batch: Any) -> tuple[Tensor, Any]:
        value, aux = problem.lower_loss(batch)
        logits = aux["logits"]
        kinds = {"bare": logits, "list": [logits, 1], "nested": {"a": (logits, "b")}, "none": None, "number": 0.5}
        return value, kinds[structure]

    stats = problem.optimizer(CASES["bome"], lower_loss=loss).step(*problem.batches())
    shapes = {"bare": Tensor, "list": list, "nested": dict, "none": type(None), "number": float}
    assert type(stats.lower_aux) is shapes[structure]
    tensors = [leaf for _, leaf in leaves(stats.lower_aux, "") if isinstance(leaf, Tensor)]
    assert len(tensors) == (structure in ("bare", "list", "nested"))
    assert not any(t.requires_grad for t in tensors)
    numbers = stats.as_dict()
    assert all(type(v) is float for v in numbers.values())
    assert numbers.get("lower_aux") == (0.5 if structure == "number" else None)


@every_case
def test_losses_and_q_are_those_of_the_current_point(case: Case) -> None:
    problem, twin = Problem().lived_in(), Problem().lived_in()
    upper, lower = problem.batches()
    torch.manual_seed(5)
    stats = problem.optimizer(case).step(upper, lower)
    torch.manual_seed(5)
    lower_value, _ = twin.lower_loss(lower)
    upper_value, _ = twin.upper_loss(upper)
    assert_same([stats.lower_loss], [lower_value.detach()])
    assert torch.equal(stats.upper_loss, upper_value.detach()) == (case.upper_at == "current")


# --- batches ------------------------------------------------------------------------------------------------------


def bare(*signatures: str) -> tuple[list[tuple[str, tuple[Any, ...]]], Any]:
    """An optimizer over two numbers whose losses note what they are called with."""
    alpha, w = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    seen: list[tuple[str, tuple[Any, ...]]] = []

    def upper_loss(*batch: Any) -> Tensor:
        seen.append(("U", batch))
        return (w - 1) ** 2

    def lower_loss(*batch: Any) -> Tensor:
        seen.append(("L", batch))
        return (w - alpha) ** 2

    optimizer = bilevel.BOME(
        upper_loss,
        lower_loss,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        inner_steps=2,
        verify="never",
    )
    return seen, optimizer


@pytest.mark.parametrize("verb", ["step", "directions"])
@pytest.mark.parametrize(
    ("args", "kwargs", "upper", "lower"),
    [
        ((), {}, (), [(), (), ()]),
        (("u",), {}, ("u",), [(), (), ()]),
        ((None,), {}, (None,), [(), (), ()]),
        (("u", None), {}, ("u",), [(None,)] * 3),
        (("u", "l"), {}, ("u",), [("l",)] * 3),
        (("u", "l", "m"), {}, ("u",), [("l",), ("m",), ("l",)]),
        (("u", None, None), {}, ("u",), [(None,)] * 3),
        ((("x", "y"), ["l"]), {}, (("x", "y"),), [(["l"],)] * 3),
        ((), {"upper": "u"}, ("u",), [(), (), ()]),
        ((), {"lower": "l"}, (), [("l",)] * 3),
        ((), {"upper": None, "lower": None}, (None,), [(None,)] * 3),
        (("u",), {"lower": "l"}, ("u",), [("l",)] * 3),
    ],
)
def test_batches_by_position_and_by_name(
    verb: str, args: tuple[Any, ...], kwargs: dict[str, Any], upper: Any, lower: Any
) -> None:
    seen, optimizer = bare()
    getattr(optimizer, verb)(*args, **kwargs)
    assert seen == [("L", batch) for batch in lower] + [("U", upper)]


# --- a loss that raises -------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class RaisesGoingBack(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise Interrupted

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return RaisesGoingBack.apply(tangents[0])


@every_case
@pytest.mark.parametrize(("verb", "where"), [("step", "forward"), ("directions", "backward"), ("step", "keyboard")])
def test_a_loss_that_raises_at_any_call_changes_nothing(case: Case, verb: str, where: str) -> None:
    error: type[BaseException] = KeyboardInterrupt if where == "keyboard" else Interrupted
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case, verify="never")
    batches = problem.batches(case.inner_steps)
    if verb == "step":
        optimizer.step(*batches)  # not the first step: what was found out about the losses is in place
    for at in range(len(case.calls_of(verb))):

        def after(index: int, loss: Tensor, at: int = at) -> Tensor:
            if index != at:
                return loss
            problem.classifier.eval()  # a loss may leave flags behind
            if where == "backward":
                return RaisesGoingBack.apply(loss)
            raise error

        problem.calls.clear()
        problem.after_call = after
        before = Record(problem)
        with pytest.raises(error):
            getattr(optimizer, verb)(*batches)
        assert len(problem.calls) == at + 1
        assert Record(problem).differences(before) == []
    problem.after_call = None
    problem.calls.clear()
    optimizer.step(*batches)  # and the optimizer is still of use
    assert len(problem.calls) == len(case.step_calls)


@pytest.mark.thorough
@every_case
def test_an_interruption_at_any_call_of_a_look_changes_nothing(case: Case) -> None:
    # A look calls the losses more often, twice in float64 among them; how often depends on what it suspects.
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case, verify="always")
    batches = problem.batches(case.inner_steps)
    interrupted = 0
    while True:

        def after(index: int, loss: Tensor, at: int = interrupted) -> Tensor:
            if index == at:
                problem.classifier.eval()
                raise KeyboardInterrupt
            return loss

        problem.calls.clear()
        problem.after_call = after
        before = Record(problem)
        try:
            optimizer.step(*batches)
        except KeyboardInterrupt:
            assert Record(problem).differences(before) == []
            interrupted += 1
        else:
            break
    assert interrupted > len(case.step_calls)


@pytest.mark.thorough
@every_dtype
@every_case
def test_looks_leave_no_trace(case: Case, dtype: torch.dtype) -> None:
    """A run whose every step is a look, and one without any: the same bits everywhere, random state included."""
    runs = [Problem(dtype).lived_in(), Problem(dtype).lived_in()]
    one, other = (run.optimizer(case, verify=verify) for run, verify in zip(runs, ("always", "never"), strict=True))
    for verb in ("step", "directions", "step", "step"):
        batches = runs[0].batches(case.inner_steps)
        state = torch.get_rng_state()
        found = getattr(one, verb)(*batches)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        expected = getattr(other, verb)(*batches)
        assert torch.equal(torch.get_rng_state(), after)
        stats = [answer.stats if verb == "directions" else answer for answer in (found, expected)]
        assert numbers(stats[0]) == numbers(stats[1])
    assert_same(runs[0].parameters(), runs[1].parameters())
    assert_same(runs[0].buffers(), runs[1].buffers())
    assert_same_state(runs[0].upper_optimizer, runs[1].upper_optimizer)
    assert_same_state(runs[0].lower_optimizer, runs[1].lower_optimizer)


@every_case
def test_after_an_error_the_same_step_gives_the_same_numbers(case: Case) -> None:
    failed, plain = Problem().lived_in(), Problem().lived_in()
    batches = plain.batches(case.inner_steps)
    one, other = failed.optimizer(case), plain.optimizer(case)

    def after(index: int, loss: Tensor) -> Tensor:
        if index == len(case.step_calls) - 1:
            raise Interrupted
        return loss

    failed.after_call = after
    torch.manual_seed(2)
    with pytest.raises(Interrupted):
        one.step(*batches)
    failed.after_call = None
    one.step(*batches)
    torch.manual_seed(2)
    other.step(*batches)
    assert_same(failed.parameters(), plain.parameters())
    assert_same(failed.buffers(), plain.buffers())


# --- checkpoints --------------------------------------------------------------------------------------------------


def save(problem: Problem, optimizer: Any) -> dict[str, Any]:
    """What a user's checkpoint holds, through a file and back."""
    file = io.BytesIO()
    modules = {name: module.state_dict() for name, module in problem.modules.items()}
    torch.save({"modules": modules, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file)  # with weights_only, as is the default
    return loaded


@every_dtype
@every_case
def test_a_checkpoint_in_the_middle_gives_the_same_numbers(case: Case, dtype: torch.dtype) -> None:
    straight = Problem(dtype)
    optimizer = straight.optimizer(case)
    batches = [straight.batches(case.inner_steps) for _ in range(4)]
    torch.manual_seed(0)
    for some in batches[:2]:
        optimizer.step(*some)
    state = save(straight, optimizer)
    ends = [optimizer.step(*some) for some in batches[2:]]

    resumed = Problem(dtype, seed=50)
    fresh = resumed.optimizer(case)
    for name, module in resumed.modules.items():
        module.load_state_dict(state["modules"][name])
    fresh.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    again = [fresh.step(*some) for some in batches[2:]]

    assert_same(resumed.parameters(), straight.parameters())
    assert_same(resumed.buffers(), straight.buffers())
    assert bits(dict(leaves(fresh.state_dict(), ""))) == bits(dict(leaves(optimizer.state_dict(), "")))
    assert [numbers(stats) for stats in again] == [numbers(stats) for stats in ends]


@every_case
def test_later_steps_do_not_change_a_saved_state(case: Case) -> None:
    problem = Problem()
    optimizer = problem.optimizer(case)
    optimizer.step(*problem.batches())
    state = optimizer.state_dict()
    kept = bits(dict(leaves(state, "")))
    optimizer.step(*problem.batches())
    assert bits(dict(leaves(state, ""))) == kept
    assert bits(dict(leaves(optimizer.state_dict(), ""))) != kept
    optimizer.load_state_dict(state)
    optimizer.step(*problem.batches())
    assert bits(dict(leaves(state, ""))) == kept  # nor do steps after loading it


def of_shape(state: dict[str, Any]) -> dict[str, Any]:
    """The same, as a model with other layers would have saved it."""
    return {**state, "state": {key: {name: torch.ones(7) for name in entry} for key, entry in state["state"].items()}}


WRONG_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not a mapping": (lambda s: None, "state_dict"),
    "a module's": (lambda s: {"weight": torch.zeros(1)}, "must have the keys"),
    "a torch optimizer's": (lambda s: s["upper_optimizer"], "must have the keys"),
    "a key is missing": (lambda s: {k: v for k, v in s.items() if k != "lower_optimizer"}, "must have the keys"),
    "a key too many": (lambda s: {**s, "more": 1}, "must have the keys"),
    "another format": (lambda s: {**s, "format": 2}, "format"),
    "another method": (lambda s: {**s, "method": "Other"}, "another method"),
    "state of its own": (lambda s: {**s, "state": {"velocity": 1}}, "velocity"),
    "the upper optimizer refuses": (lambda s: {**s, "upper_optimizer": {"state": {}, "param_groups": []}}, "not fit"),
    "the lower optimizer refuses": (lambda s: {**s, "lower_optimizer": {"state": {}, "param_groups": []}}, "not fit"),
    "levels exchanged": (
        lambda s: {**s, "upper_optimizer": s["lower_optimizer"], "lower_optimizer": s["upper_optimizer"]},
        "not fit",
    ),
    "of another architecture": (
        lambda s: {**s, "lower_optimizer": of_shape(s["lower_optimizer"])},
        r"shape \(7,\) for",
    ),
    "not an optimizer's state": (lambda s: {**s, "lower_optimizer": 5}, "not fit"),
}


@pytest.mark.parametrize("case", [CASES["bome"], CASES["ebomlc"]], ids=["bome", "ebomlc"])
@pytest.mark.parametrize(("wrong", "pattern"), WRONG_STATES.values(), ids=WRONG_STATES.keys())
def test_a_wrong_state_is_refused_and_changes_nothing(
    case: Case, wrong: Callable[[dict[str, Any]], Any], pattern: str
) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    state = optimizer.state_dict()
    optimizer.step(*problem.batches())
    before = Record(problem)
    with pytest.raises(ValueError, match=pattern):
        optimizer.load_state_dict(wrong(state))
    assert Record(problem).differences(before) == []


def test_the_state_of_another_class_is_refused() -> None:
    problem = Problem()
    state = problem.optimizer(CASES["bome"]).state_dict()
    with pytest.raises(ValueError, match="this optimizer is EBOMLC"):
        problem.optimizer(CASES["ebomlc"]).load_state_dict(state)


# --- no hidden synchronisation ------------------------------------------------------------------------------------


class Synchronised(AssertionError):
    pass


class NoSynchronisation(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises on every operation that would wait for an accelerator; ``paused`` while the user's optimizers run."""

    READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "item")

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused and any(func._schema.name == f"aten::{read}" for read in self.READS):
            raise Synchronised(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_synchronisation(monkeypatch: pytest.MonkeyPatch) -> NoSynchronisation:
    """Forbid what reads values on the host, at the two levels where it can be noticed without an accelerator."""
    mode = NoSynchronisation()
    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")
    for name in names:
        original = getattr(Tensor, name)

        def guarded(self: Tensor, *args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            if not mode.paused and torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise Synchronised(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, guarded)
    # The linear solvers may stop early where asking is free; here they do as they would on an accelerator.
    monkeypatch.setattr("bilevel.hypergradient.solvers._may_ask", lambda value: False)
    return mode


def pause(mode: NoSynchronisation, paused: bool) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        mode.paused = paused

    return hook


@every_case
def test_step_reads_no_value_on_the_host(case: Case, no_synchronisation: NoSynchronisation) -> None:
    problem = Problem()
    optimizer = problem.optimizer(case, on_nonfinite="ignore")
    for torch_optimizer in (problem.upper_optimizer, problem.lower_optimizer):
        torch_optimizer.register_step_pre_hook(pause(no_synchronisation, True))
        torch_optimizer.register_step_post_hook(pause(no_synchronisation, False))
    for _ in range(2):  # looks may read values: at steps 1 and 2, not at 3
        optimizer.step(*problem.batches(case.inner_steps))
    before = Record(problem)
    with no_synchronisation:
        optimizer.step(*problem.batches(case.inner_steps))
    assert Record(problem).differences(before) != []


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_other_policies_wait_once_for_each_step(policy: str, no_synchronisation: NoSynchronisation) -> None:
    # The documented cost of "raise" and "skip"; and proof that the guard above notices.
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"], on_nonfinite=policy, verify="never")
    with no_synchronisation:
        optimizer.directions(*problem.batches())
        with pytest.raises(Synchronised):
            optimizer.step(*problem.batches())


@pytest.mark.parametrize(
    "read", [float, bool, *(methodcaller(name) for name in ("tolist", "item", "cpu", "numpy", "nonzero"))], ids=str
)
def test_the_guard_against_synchronisation_works(
    read: Callable[[Tensor], Any], no_synchronisation: NoSynchronisation
) -> None:
    value = torch.ones(())
    with no_synchronisation, pytest.raises(Synchronised):
        read(value)
    read(value)


# --- what a method is built of ------------------------------------------------------------------------------------


def test_options_are_keyword_only() -> None:
    problem = Problem()
    with pytest.raises(TypeError, match="positional"):
        bilevel.BOME(problem.upper_loss, problem.lower_loss, problem.corrector)


def test_the_optimizers_are_the_users_own() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"], barrier=Value(0.1))
    assert optimizer.upper_optimizer is problem.upper_optimizer
    assert optimizer.lower_optimizer is problem.lower_optimizer
    assert optimizer.barrier == Value(0.1)
