"""What one process decides, all decide; what one raises ends the step on all, and they go on from where they were."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bilevel
from bilevel.testing.scene import differences
from group_of import GroupOf
from joined_batches import Shared, part, steps_apart
from methods_table import CASES

KINDS = {case.method: name for name, case in reversed(CASES.items())}
QUICK = {bilevel.BOME, bilevel.Unrolled, bilevel.Implicit, bilevel.BSG1}
every_class = pytest.mark.parametrize(
    "name",
    [pytest.param(n, id=k.__name__, marks=() if k in QUICK else pytest.mark.thorough) for k, n in KINDS.items()],
)


class Fault(Exception):
    """An error of a user's own, with arguments of its own."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"fault {number}: {what}")


def disturbed(shared: Shared, number: int, fault: Callable[[Tensor], Tensor], rank: int) -> list[int]:
    """Let a process have a fault in a call of its losses; return the list whose first entry counts the calls."""
    calls = [0]
    for name in ("upper_loss", "lower_loss"):
        plain = getattr(shared, name)

        def loss(batch: Any, plain: Callable[[Any], Tensor] = plain) -> Tensor:
            calls[0] += 1
            value: Tensor = plain(batch)
            return fault(value) if calls[0] == number and dist.get_rank() == rank else value

        setattr(shared, name, loss)
    return calls


def raising(loss: Tensor) -> Tensor:
    raise Fault(1, "a user's own")


def record(shared: Shared) -> dict[str, Any]:
    found: dict[str, Any] = dict(shared.values())
    for side, optimizer in (("upper", shared.upper_optimizer), ("lower", shared.lower_optimizer)):
        for index, entry in enumerate(optimizer.state_dict()["state"].values()):
            found |= {f"{side} {index} {key}": torch.as_tensor(x).clone() for key, x in entry.items()}
    return found


def an_error_of_one(name: str) -> list[str]:
    """Raise in each call of the losses in turn; return what the other process said."""
    case, told = CASES[name], []
    shared = Shared()
    calls = disturbed(shared, -1, raising, 1)
    optimizer = shared.optimizer(case, dist.group.WORLD, verify="never")
    batches = [part(b) for b in shared.batches(optimizer.lower_batches)]
    optimizer.step(*batches)
    calls[0] = 0
    optimizer.step(*batches)
    for number in range(1, calls[0] + 1):
        shared = Shared()
        disturbed(shared, number + calls[0], raising, 1)
        optimizer = shared.optimizer(case, dist.group.WORLD, verify="never")
        optimizer.step(*batches)
        before = record(shared)
        try:
            optimizer.step(*batches)
        except Fault:
            assert dist.get_rank() == 1
        except bilevel.ProcessError as error:
            assert dist.get_rank() == 0
            told.append(str(error))
        else:
            raise AssertionError(f"call {number} of process 1 raised, and nobody said so")
        assert differences(before, record(shared)) == []
        assert optimizer.step(*batches).lower_loss.isfinite()
    return told


@every_class
def test_an_error_of_one_ends_the_step_of_both_and_changes_nothing(two: GroupOf, name: str) -> None:
    told, own = two(an_error_of_one, name)
    assert len(told) >= 2
    assert own == []
    assert all("process 1 raised Fault: fault 1: a user's own" in text for text in told)


def not_finite_on_one(name: str, policy: str) -> str:
    case, shared = CASES[name], Shared()
    calls = disturbed(shared, -1, raising, 0)
    optimizer = shared.optimizer(case, dist.group.WORLD, verify="never", on_nonfinite=policy)
    batches = [part(b) for b in shared.batches(optimizer.lower_batches)]
    optimizer.step(*batches)
    shared = Shared()
    disturbed(shared, calls[0] + 1, lambda loss: loss * float("nan"), 0)
    optimizer = shared.optimizer(case, dist.group.WORLD, verify="never", on_nonfinite=policy)
    optimizer.step(*batches)
    before = record(shared)
    try:
        outcome = f"skipped {optimizer.step(*batches).skipped}"
    except bilevel.NonFiniteError:
        outcome = "raised"
    assert differences(before, record(shared)) == []
    return outcome


@pytest.mark.parametrize(("policy", "outcome"), [("raise", "raised"), ("skip", "skipped True")])
@pytest.mark.parametrize("name", ["bome", "unrolled", "implicit"])
def test_what_is_not_finite_on_one_stops_both(two: GroupOf, name: str, policy: str, outcome: str) -> None:
    assert two(not_finite_on_one, name, policy) == [outcome] * 2


def with_solver(solver: Any) -> float:
    return steps_apart("implicit", torch.float64, 3, {"solver": solver, "warm_start": True})[0]


@pytest.mark.parametrize(
    "solver",
    [
        bilevel.ConjugateGradient(4, tolerance=1e-2, damping=1.0),
        bilevel.Neumann(5, tolerance=0.5),
        bilevel.FixedPoint(5),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_solvers_stop_together(two: GroupOf, solver: Any) -> None:
    assert max(two(with_solver, solver)) < 1e-12


def with_options(name: str, options: dict[str, Any]) -> float:
    return steps_apart(name, torch.float64, 3, options)[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unrolled", {"differentiate": "auto", "inner_steps": 3, "truncate": 2}),
        ("unrolled", {"differentiate": "graph", "inner_steps": 3, "truncate": 2, "virtual": False}),
        ("unrolled", {"differentiate": "auto", "inner_steps": 2, "product": "difference"}),
        ("emlc", {"memory": "replay", "inner_steps": 3}),
        pytest.param("emlc", {"product": "reverse", "discount": 0.5, "inner_steps": 2}, marks=pytest.mark.thorough),
        pytest.param("emlc", {"product": "difference", "verify": "always"}, marks=pytest.mark.thorough),
        ("mlc", {"inner_steps": 2}),
        pytest.param("finite-difference", {"inner_step": "gradient", "inner_lr": 0.05}, marks=pytest.mark.thorough),
        pytest.param("bsg1", {"inner_steps": 1, "verify": "always"}, marks=pytest.mark.thorough),
        pytest.param("bvfsm", {"inner_steps": 2, "value_steps": 3}, marks=pytest.mark.thorough),
        ("f2sa", {"p": 3, "step_scale": "penalty", "normalise": True}),
        pytest.param("unrolled-forward", {"inner_steps": 3, "truncate": 2}, marks=pytest.mark.thorough),
        pytest.param("unrolled", {"inner_steps": 4, "checkpoints": "sqrt"}, marks=pytest.mark.thorough),
        pytest.param(
            "implicit",
            {"solver": bilevel.ConjugateGradient(3, damping=1.0), "product": "auto", "warm_start": True},
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "implicit",
            {"solver": bilevel.ConjugateGradient(3, damping=1.0), "product": "forward", "verify": "always"},
            marks=pytest.mark.thorough,
        ),
        pytest.param("pdbo", {"starts": 3}, marks=pytest.mark.thorough),
        ("vpbgd", {"starts": 2}),
        pytest.param("bome", {"upper_projection": bilevel.projection.Box(-0.6, 0.6)}, marks=pytest.mark.thorough),
        pytest.param("ebomlc", {"lower_projection": bilevel.projection.Box(-0.5, 0.5)}, marks=pytest.mark.thorough),
        pytest.param(
            "unrolled",
            {"lower_projection": bilevel.projection.Box(-0.5, 0.5), "product": "reverse"},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_further_options(two: GroupOf, name: str, options: dict[str, Any]) -> None:
    bound = 1e-9 if options.get("product") == "difference" else 1e-12
    assert max(two(with_options, name, options)) < bound


def in_micro_batches(name: str) -> float:
    return steps_apart(name, torch.float64, 3, None, 2)[0]


@pytest.mark.parametrize("name", ["bome", "emlc", "implicit", "soba-forward"])
def test_parts_in_micro_batches(two: GroupOf, name: str) -> None:
    assert max(two(in_micro_batches, name)) < 1e-12


def overflowing() -> list[tuple[bool, float]]:
    """Steps with a scaler, in the second of which the loss of process 0 overflows at any scale above 4."""
    shared = Shared(torch.float32)
    number = [0]
    plain = shared.lower_loss

    def loss(batch: Any) -> Tensor:
        value: Tensor = plain(batch)
        small = value.half() * (2**13 if number[0] == 2 and dist.get_rank() == 0 else 1)
        return small.float() / (2**13 if number[0] == 2 and dist.get_rank() == 0 else 1)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=100)
    optimizer = shared.optimizer(CASES["bome"], dist.group.WORLD, lower_loss=loss, scaler=scaler)
    found = []
    for number[0] in range(1, 5):
        stats = optimizer.step(*map(part, shared.batches(1)))
        found.append((stats.skipped, float(scaler.get_scale())))
    return found


def test_an_overflow_of_one_process_skips_the_step_of_both(two: GroupOf) -> None:
    mine, theirs = two(overflowing)
    assert mine == theirs
    assert any(skipped for skipped, _ in mine)
    assert not mine[-1][0]
    assert mine[-1][1] < 2.0**16


def uneven(name: str) -> float:
    """A branch of the lower network, and the corrector, that only process 1's part of the batch uses."""
    case = CASES[name]
    found = []
    for group in (False, dist.group.WORLD):
        shared = Shared()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            extra = nn.Linear(4, 3, dtype=torch.float64)
        shared.lower.add_module("extra", extra)
        shared.lower_optimizer = torch.optim.SGD(shared.lower.parameters(), lr=0.1)
        plain = shared.lower_loss

        def loss(batch: Any, shared: Shared = shared, extra: nn.Module = extra, plain: Any = plain) -> Tensor:
            x, label = batch
            marked = x[:, 0] > 10
            logits = shared.lower[2](shared.lower[:2](x))
            each = nn.functional.cross_entropy(logits, label, reduction="none")
            if marked.any():
                corrected = shared.upper(torch.cat([shared.lower[:2](x), label], 1)).softmax(1)
                each = each + marked * nn.functional.cross_entropy(extra(x), corrected, reduction="none")
            return each.mean()

        options = {"product": "reverse"} if hasattr(case.method, "product") else {}
        optimizer = shared.optimizer(case, group, lower_loss=loss, **options)
        for _ in range(3):
            batches = shared.batches(optimizer.lower_batches)
            for x, _ in batches:
                x[-3:, 0] = 11.0
            optimizer.step(*(map(part, batches) if group else batches))
        found.append(shared.values() | {f"extra.{n}": p.detach() for n, p in extra.named_parameters()})
    return max(float((x - found[1][n]).abs().max()) for n, x in found[0].items())


@pytest.mark.parametrize("name", ["bome", "unrolled", "unrolled-graph", "emlc", "soba-forward", "gpbgd"])
def test_variables_that_one_process_alone_uses(two: GroupOf, name: str) -> None:
    assert max(two(uneven, name)) < 1e-12


class Doubled(torch.autograd.Function):
    """A function without a rule for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def forward_mode_fails_on_one() -> tuple[str, list[str]]:
    shared = Shared()
    plain = shared.lower_loss

    def loss(batch: Any) -> Tensor:
        value: Tensor = plain(batch)
        return value + (0.0 * Doubled.apply(shared.lower[0].weight).sum() if dist.get_rank() else 0)

    optimizer = shared.optimizer(CASES["emlc"], dist.group.WORLD, lower_loss=loss)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        stats = optimizer.step(*map(part, shared.batches(1)))
    return stats.product, [str(w.message) for w in told]


def test_the_mode_of_a_product_is_chosen_together(two: GroupOf) -> None:
    for product, told in two(forward_mode_fails_on_one):
        assert product == "reverse"
        assert len([text for text in told if "Falling back to double backward" in text]) == 1


def holds_on_one() -> list[int]:
    """Count calls per step of a loss that holds once more from step 3 on, on process 1 alone."""
    shared, counts, step = Shared(), [], 0
    calls = disturbed(shared, -1, raising, 0)
    plain = shared.lower_loss

    def loss(batch: Any) -> Tensor:
        if step >= 4 and dist.get_rank() == 1:
            bilevel.hold(batch[0])
        value: Tensor = plain(batch)
        return value

    optimizer = shared.optimizer(CASES["bome"], dist.group.WORLD, lower_loss=loss)
    for step in range(6):  # noqa: B007 (the loss reads it)
        calls[0] = 0
        optimizer.step(*map(part, shared.batches(1)))
        counts.append(calls[0])
    return counts


def test_looks_are_agreed(two: GroupOf) -> None:
    counts, same = two(holds_on_one)
    assert counts == same
    assert counts[2] == counts[5] == 3  # steps 3 and 6 are no looks
    assert counts[4] > 3  # step 5 is one, as process 1 held once more


def apart_at_first() -> str:
    shared = Shared()
    if dist.get_rank() == 1:
        with torch.no_grad():
            shared.lower[2].bias += 1e-9
    try:
        shared.optimizer(CASES["bome"], dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def test_other_initial_values_are_refused_by_name(two: GroupOf) -> None:
    for text in two(apart_at_first):
        assert "BOME(lower=2.bias): differs between process 0 and process 1" in text


def apart_by_a_rate() -> list[str]:
    shared = Shared()
    optimizer = shared.optimizer(CASES["bome"], dist.group.WORLD)
    batches = [part(b) for b in shared.batches(1)]
    optimizer.step(*batches)
    shared.lower_optimizer.param_groups[0]["lr"] = 0.1 + dist.get_rank()
    told = []
    for _ in range(4):
        try:
            optimizer.step(*batches)
        except ValueError as error:
            told.append(str(error))
    return told


def test_variables_that_part_are_noticed_in_looks(two: GroupOf) -> None:
    for told in two(apart_by_a_rate):
        assert "differs between process 0 and process 1" in told[0]


def of_different_sizes() -> list[str]:
    shared = Shared()
    optimizer = shared.optimizer(CASES["bome"], dist.group.WORLD)
    upper, lower = map(part, shared.batches(1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step(upper, tuple(x[: 3 + dist.get_rank()] for x in lower))
    return [str(w.message) for w in told]


def test_batches_of_different_sizes_are_told_once(two: GroupOf) -> None:
    for told in two(of_different_sizes):
        assert len(told) == 1
        assert "the lower batches of the processes hold 3 to 4 samples" in told[0]


def other_rows() -> str:
    shared = Shared()
    optimizer = shared.optimizer(CASES["saba"], dist.group.WORLD, upper_rows=1, lower_rows=4)
    upper, lower = map(part, shared.batches(1))
    try:
        optimizer.step(upper, bilevel.Indexed(dist.get_rank(), lower))
    except ValueError as error:
        return str(error)
    return ""


def test_rows_of_a_table_belong_to_joined_batches(two: GroupOf) -> None:
    for text in two(other_rows):
        assert "SABA.step: the processes gave lower batches of the numbers 0 to 1" in text


def other_calls() -> str:
    shared = Shared()
    optimizer = shared.optimizer(CASES["bome"], dist.group.WORLD)
    batches = [part(b) for b in shared.batches(1)]
    found = optimizer.directions(*batches)
    try:
        optimizer.apply(found) if dist.get_rank() else optimizer.state_dict()
    except bilevel.ProcessError as error:
        told = str(error)
    optimizer.step(*batches)
    return told


def test_different_calls_are_refused_by_name(two: GroupOf) -> None:
    for text in two(other_calls):
        assert "the processes do different things: process 0 is at BOME.state_dict; process 1 is at" in text


def a_hook_that_raises() -> list[str]:
    shared = Shared()
    optimizer = shared.optimizer(CASES["emlc"], dist.group.WORLD)
    batches = [part(b) for b in shared.batches(1)]
    optimizer.step(*batches)

    def fail(*_: Any) -> None:
        if dist.get_rank() == 0:
            raise Fault(2, "in a hook")

    handle = shared.upper_optimizer.register_step_post_hook(fail)
    before, told = record(shared), []
    try:
        optimizer.step(*batches)
    except (Fault, bilevel.ProcessError) as error:
        told.append(str(error))
    assert differences(before, record(shared)) == []
    handle.remove()
    optimizer.step(*batches)
    return told


def test_moves_are_taken_back_on_both(two: GroupOf) -> None:
    own, other = two(a_hook_that_raises)
    assert own == ["fault 2: in a hook"]
    assert "process 0 raised Fault: fault 2: in a hook" in other[0]


def random_calls(seed: int, name: str) -> list[Any]:
    """Steps, looks, applications, checkpoints and checks in any order, with errors on one process now and then."""
    draw, case, shared = random.Random(seed), CASES[name], Shared()
    fault: list[int] = [-1, 0]
    calls = disturbed(shared, -1, raising, 0)
    plain = {side: getattr(shared, f"{side}_loss") for side in ("upper", "lower")}

    def loss(side: str) -> Callable[[Any], Tensor]:
        def function(batch: Any) -> Tensor:
            value: Tensor = plain[side](batch)
            if calls[0] == fault[0] and dist.get_rank() == fault[1]:
                raise Fault(3, side)
            return value

        return function

    optimizer = shared.optimizer(case, dist.group.WORLD, upper_loss=loss("upper"), lower_loss=loss("lower"))
    saved = optimizer.state_dict(), shared.values()
    outcomes: list[Any] = []
    for _ in range(12):
        verb = draw.choice(["step", "step", "step", "directions", "apply", "save", "load"])
        batches = [part(b) for b in shared.batches(optimizer.lower_batches)]
        calls[0], fault[0], fault[1] = 0, draw.choice([-1, 1, 2, 3]), draw.randrange(dist.get_world_size())
        try:
            if verb == "step":
                outcomes.append(float(optimizer.step(*batches).lower_loss))
            elif verb == "directions":
                outcomes.append(float(optimizer.directions(*batches).stats.lower_loss))
            elif verb == "apply":
                optimizer.apply(optimizer.directions(*batches))
            elif verb == "save":
                saved = optimizer.state_dict(), shared.values()
            else:
                optimizer.load_state_dict(saved[0])
                with torch.no_grad():
                    for side, module in (("upper", shared.upper), ("lower", shared.lower)):
                        for key, p in module.named_parameters():
                            p.copy_(saved[1][f"{side}.{key}"])
        except (Fault, bilevel.ProcessError):
            outcomes.append(f"{verb} failed")
    return [*outcomes, *(float(x.sum()) for x in shared.values().values())]


@pytest.mark.parametrize(
    ("seed", "name"),
    [
        *((0, name) for name in ("bome", "emlc", "unrolled-graph", "saba")),
        *(pytest.param(seed, name, marks=pytest.mark.thorough) for seed in (1, 2) for name in CASES),
    ],
)
def test_any_sequence_of_calls(two: GroupOf, seed: int, name: str) -> None:
    mine, theirs = two(random_calls, seed, name)
    assert mine == theirs
