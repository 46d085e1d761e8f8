"""``check_method``: the contracts that every method of the library keeps, on anyone's method."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..optimizer.base import BilevelOptimizer
from .check_directions import check_directions
from .scene import Build, Scene, differences

STEPS = 3


@dataclass(frozen=True)
class Subject:
    """A method under contract.

    Attributes:
        method: Its class, or a function that builds it as the class would.
        options: Its options, beside losses, levels and torch optimizers.
        upper_batches: How many upper batches it takes a step.
        calls: How many calls of both losses a step makes by its documentation, or None.

    Example:
        >>> import bilevel
        >>> from bilevel.testing import CONTRACTS, Subject
        >>> CONTRACTS[0](Subject(bilevel.EBOMLC, {"xi": 1.0}))
    """

    method: Build
    options: dict[str, Any] = field(default_factory=dict)
    upper_batches: int = 1
    calls: int | None = None

    def built(self, scene: Scene, **changes: Any) -> tuple[BilevelOptimizer[Any], list[list[Any]]]:
        """Build it on a scene; return it and batches for some steps."""
        optimizer = scene.build(self.method, self.options, **changes)
        count = optimizer.lower_batches
        return optimizer, [scene.batches(self.upper_batches, count) for _ in range(STEPS)]


class ContractError(AssertionError):
    """A method breaks a contract; the message says which, and how.

    Example:
        >>> import bilevel
        >>> try:
        ...     bilevel.testing.check_method(bilevel.BOME, calls=7)
        ... except bilevel.testing.ContractError as error:
        ...     print(error)
        calls are as documented: [3] calls a step, expected [7].
    """


def _require(kept: bool, contract: str, told: str) -> None:
    if not kept:
        raise ContractError(f"{contract}: {told}")


def directions_change_nothing(subject: Subject) -> None:
    """``directions`` leaves parameters, buffers, gradients, optimizers, random state and flags as they were, and gives
    the same when asked again.
    """
    scene = Scene()
    optimizer, (first, second, _) = subject.built(scene)
    optimizer.step(*first)
    before = scene.record()
    found = optimizer.directions(*second)
    changed = differences(before, scene.record())
    _require(not changed, "directions change nothing", f"changed: {', '.join(changed)}.")
    again = optimizer.directions(*second)
    apart = [n for n, x in found.upper.items() if not torch.equal(x, again.upper[n])]
    apart += [n for n, x in found.lower.items() if not torch.equal(x, again.lower[n])]
    _require(
        not apart,
        "directions change nothing",
        f"a second look gave other directions of {', '.join(apart)}. Is something remembered outside "
        "Directions.state, or drawn outside the losses?",
    )


def a_step_is_its_directions_applied(subject: Subject) -> None:
    """``step`` moves the upper level, and the lower one if it has directions, as ``apply(directions(...))`` does."""
    stepped, applied = Scene(), Scene()
    one, batches = subject.built(stepped)
    other, _ = subject.built(applied)
    for batch in batches:
        torch.manual_seed(0)
        one.step(*batch)
        torch.manual_seed(0)
        directions = other.directions(*batch)
        other.apply(directions)
        sides = ["upper", *(["lower"] if directions.lower else [])]
        mine, yours = stepped.record(), applied.record()
        names = [n for n in mine if n.split(" ")[0] in sides and "running" not in n and "batches_tracked" not in n]
        changed = differences({n: mine[n] for n in names}, {n: yours.get(n) for n in names})
        _require(
            not changed,
            "a step is its directions applied",
            f"different: {', '.join(changed)}. Is state written by the method itself instead of Directions.state?",
        )
        applied.lower.load_state_dict(stepped.lower.state_dict())
        applied.lower_optimizer.load_state_dict(deepcopy(stepped.lower_optimizer.state_dict()))


def a_resumed_run_goes_on(subject: Subject) -> None:
    """Continuing from ``state_dict`` gives the same numbers as not stopping."""
    through, resumed = Scene(), Scene()
    one, batches = subject.built(through)
    torch.manual_seed(0)
    for batch in batches[:2]:
        one.step(*batch)
    other, _ = subject.built(resumed)
    for mine, yours in ((through.upper, resumed.upper), (through.lower, resumed.lower)):
        yours.load_state_dict(mine.state_dict())
    other.load_state_dict(deepcopy(one.state_dict()))
    for scene, optimizer in ((through, one), (resumed, other)):
        torch.manual_seed(1)
        optimizer.step(*batches[2])
        optimizer.step(*batches[0])
        scene.calls = 0
    changed = differences(through.record(), resumed.record())
    changed += differences(_flat(one.state_dict()["state"]), _flat(other.state_dict()["state"]))
    _require(
        not changed,
        "a resumed run goes on",
        f"different: {', '.join(changed)}. Is something remembered that is not declared (lower_state, upper_state, "
        "scalar_state, table_state)?",
    )


def a_loss_that_raises_changes_nothing(subject: Subject) -> None:
    """Whichever call of a loss raises, everything is as before the step."""

    def failing(loss: Tensor) -> Tensor:
        raise KeyError("a user's own error")

    for number in range(_calls_of_a_step(subject)):
        scene, optimizer, batch = _disturbed(subject, number, failing)
        before = scene.record()
        try:
            optimizer.step(*batch)
        except KeyError:
            changed = differences(before, scene.record())
            _require(not changed, "a loss that raises changes nothing", f"call {number + 1}: {', '.join(changed)}.")
        else:
            _require(False, "a loss that raises changes nothing", f"the error of call {number + 1} was swallowed.")


def what_is_not_finite_moves_nothing(subject: Subject) -> None:
    """From whichever call on a loss is NaN: an error, or the step is skipped; nothing moved."""
    contract = "what is not finite moves nothing"
    for policy in ("raise", "skip"):
        for number in range(_calls_of_a_step(subject)):
            scene, optimizer, batch = _disturbed(subject, number, lambda loss: loss * float("nan"), policy)
            before, state = scene.record(), _flat(optimizer.state_dict()["state"])
            try:
                skipped = bool(optimizer.step(*batch).skipped)
                _require(policy == "skip" and skipped, contract, f"NaN from call {number + 1} on was not noticed.")
            except NonFiniteError:
                _require(
                    policy == "raise", contract, f"NaN from call {number + 1} on raised, under on_nonfinite='skip'."
                )
            changed = differences(before, scene.record(), ignoring=["random state"])
            changed += differences(state, _flat(optimizer.state_dict()["state"]))
            _require(not changed, contract, f"call {number + 1}, {policy}: {', '.join(changed)}.")


def calls_are_as_documented(subject: Subject) -> None:
    """Every step calls the losses the same number of times, and as often as is documented."""
    counts = set()
    scene = Scene()
    optimizer, batches = subject.built(scene, verify="never")
    for batch in batches:
        scene.calls = 0
        optimizer.step(*batch)
        counts.add(scene.calls)
    expected = {min(counts) if subject.calls is None else subject.calls}
    _require(
        counts == expected, "calls are as documented", f"{sorted(counts)} calls a step, expected {sorted(expected)}."
    )


def directions_are_right(subject: Subject) -> None:
    """``check_directions`` finds no disagreement, in float64 and in float32."""
    for dtype in (torch.float64, torch.float32):
        scene = Scene(dtype)
        optimizer, (first, second, _) = subject.built(scene)
        optimizer.step(*first)
        report = check_directions(optimizer, *second, samples=1)
        _require(report.passed, "directions are right", f"in {dtype}:\n{report}")


CONTRACTS: tuple[Callable[[Subject], None], ...] = (
    directions_change_nothing,
    a_step_is_its_directions_applied,
    a_resumed_run_goes_on,
    a_loss_that_raises_changes_nothing,
    what_is_not_finite_moves_nothing,
    calls_are_as_documented,
    directions_are_right,
)


def check_method(method: Build, *, upper_batches: int = 1, calls: int | None = None, **options: Any) -> None:
    """Run the contracts that the library's own methods keep on a method of your own.

    It is built on two small networks with BatchNorm, dropout and a frozen layer. ``CONTRACTS`` are the single ones, to
    be parametrised over in a test suite: each takes a ``Subject``.

    Args:
        method: The class, or a function that takes what it takes.
        upper_batches: How many upper batches a step needs; more than one are passed as :class:`bilevel.Batches`.
        calls: How many calls of both losses a step makes, by your documentation; None: any constant number.
        options: Arguments of the method, beside losses, levels and torch optimizers.

    Raises:
        ContractError: An ``AssertionError`` with every contract that is broken, and how.

    Cost:
        About a thousand calls of a tiny loss: some seconds.

    Example:
        >>> import bilevel
        >>> bilevel.testing.check_method(bilevel.BOME, inner_steps=2, calls=4)
    """
    subject = Subject(method, options, upper_batches, calls)
    broken = []
    for contract in CONTRACTS:
        try:
            contract(subject)
        except ContractError as error:
            broken.append(str(error))
    if broken:
        raise ContractError("\n".join(broken))


def _calls_of_a_step(subject: Subject) -> int:
    scene = Scene()
    optimizer, (first, second, _) = subject.built(scene, verify="never")
    optimizer.step(*first)
    scene.calls = 0
    optimizer.step(*second)
    return scene.calls


def _disturbed(
    subject: Subject, number: int, fault: Callable[[Tensor], Tensor], policy: str = "raise"
) -> tuple[Scene, BilevelOptimizer[Any], list[Any]]:
    """A method after its first step, in whose next one the losses go wrong from some call on."""
    scene = Scene()
    optimizer, (first, second, _) = subject.built(scene, verify="never", on_nonfinite=policy)
    optimizer.step(*first)
    scene.calls = 0
    scene.after_call = lambda index, loss: fault(loss) if index >= number else loss
    return scene, optimizer, second


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found.update({f"state {name}.{key}": x for key, x in value.items()})
        else:
            found[f"state {name}"] = value
    return found
