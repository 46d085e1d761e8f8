"""A user's loss closure: how it is called, what it must return, and that it reads the variables anew in each call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..batches import MISSING
from ..errors import ClosureError
from ..processes.joined import several


class Loss:
    """One level's loss, under the name that errors give it."""

    def __init__(self, owner: str, name: str, function: Callable[..., Any], *, needs_upper: bool = True) -> None:
        if not callable(function):
            raise TypeError(
                f"{owner}({name}={type(function).__name__}): must be callable. A loss value was passed? Pass the "
                "function that computes it, without calling it."
            )
        self.name = name
        self._function = function
        self.needs_upper = needs_upper
        self._calls = 0

    def __call__(self, batch: Any, devices: Iterable[torch.device], *, frozen: bool = False) -> tuple[Tensor, Any]:
        """Evaluate on ``batch`` and return the scalar and the detached ``aux``.

        ``frozen`` says that the lower variables need no gradient in this evaluation.
        """
        returned = self._function() if batch is MISSING else self._function(batch)
        value, aux = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        self._check(value, set(devices), frozen)
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:  # calls 1, 2, 4, ...: a scaler does not come and go
            refuse_scaled(self.name, value)
        return value, tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux)

    @staticmethod
    def number(value: Tensor) -> Tensor:
        """Return the detached value; a copy where the loss is a variable itself, or a view of one, which will move."""
        return value.detach().clone() if value.is_leaf or value._is_view() else value.detach()

    def _check(self, value: object, devices: set[torch.device], frozen: bool) -> None:
        expected = f"{self.name} returned {{}}, expected a scalar tensor, or (scalar tensor, aux). {{}}"
        if isinstance(value, (tuple, list)):
            shown = f"a {type(value).__name__} of {len(value)} values"
            raise ClosureError(
                expected.format(shown, "Put everything beside the loss into one aux: a tuple or a dict.")
            )
        if not isinstance(value, Tensor):
            shown = f"a {type(value).__name__}"
            raise ClosureError(expected.format(shown, "Return the loss tensor itself, without .item() or float()."))
        if value.shape != ():
            raise ClosureError(expected.format(f"shape {tuple(value.shape)}", "Reduce it with .mean() or .sum()."))
        if not value.is_floating_point():
            raise ClosureError(
                expected.format(f"dtype {value.dtype}", "A loss is real floating point; cast it with .float().")
            )
        if value.device not in devices:
            on = " and ".join(sorted(map(str, devices)))
            advice = f"The variables are on {on}. Move the batch to the device of the model."
            raise ClosureError(expected.format(f"a tensor on {value.device}", advice))
        if not value.requires_grad:
            if (frozen and not self.needs_upper) or several():  # of others' parts of the batch it may well have one
                return
            if frozen:
                self.check_use("upper", [])
            advice = "Nothing in it depends on a variable: was it detached, or computed under torch.no_grad()?"
            raise ClosureError(expected.format("a scalar without a graph", advice))

    def check_use(self, side: str, gradient: Sequence[Tensor | None]) -> None:
        """Refuse a loss that uses none of a level's variables where it must use some."""
        if side == "upper" and not self.needs_upper:
            return
        if all(part is None for part in gradient):
            cause = (
                "Usual causes: what they compute was detached, rounded (argmax), or is never used."
                if side == "upper"
                else "Usual causes: another copy of the model inside the loss, or a detached output."
            )
            raise ClosureError(
                f"{self.name} does not depend on any {side} variable, so there is nothing to differentiate. {cause} "
                f"Compute the loss from the tensors given as {side}=."
            )


def refuse_scaled(loss: str, value: Tensor) -> None:
    """Refuse what ``GradScaler.scale`` returned: its factor would be in every direction, product and multiplier.

    Looks at the last few operations only; and for live scalers only if one of them multiplied by a tensor like theirs.
    """
    node, factors = value.grad_fn, []
    for _ in range(4):
        if node is None or node.name() not in ("MulBackward0", "DivBackward0"):
            break
        found = [getattr(node, name, None) for name in ("_saved_self", "_saved_other")]
        factors += [x for x in found if isinstance(x, Tensor) and x.shape == () and x.dtype == torch.float32]
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    factors = [x for x in factors if not x.requires_grad]
    if not factors:
        return
    scalers = [x for x in gc.get_objects() if issubclass(type(x), torch.amp.GradScaler)]  # isinstance asks proxies
    scales = [x._scale.data_ptr() for x in scalers if isinstance(x._scale, Tensor)]
    if any(x.data_ptr() in scales for x in factors):
        raise ClosureError(
            f"{loss} returned GradScaler.scale(loss), whose factor would be in every direction, inner product and "
            "multiplier. Return the loss itself, and pass the scaler as scaler=, which scales and unscales derivatives."
        )


def sequence_number() -> int:
    """Return the number that autograd gives to the next recorded operation of this thread."""
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True) + 0
    return int(probe.grad_fn._sequence_nr()) if probe.grad_fn is not None else 0


def stale_variables(value: Tensor, since: float, names: dict[int, str], beyond: Iterable[Tensor] = ()) -> list[str]:
    """Name the variables that reach ``value`` through operations recorded before ``since``.

    Such an operation ran outside the call: its result was captured, and would keep the value of the point it was
    computed at however the variables are moved. ``names`` maps the ``id`` of a variable to its name. The search does
    not go ``beyond`` these tensors.
    """
    found: dict[str, None] = {}
    seen: set[tuple[Any, bool]] = {(x.grad_fn, stale) for x in beyond for stale in (False, True)}
    stack: list[tuple[Any, bool]] = [(value.grad_fn, False)]
    while stack:
        node, stale = stack.pop()
        if node is None or (node, stale) in seen:
            continue
        seen.add((node, stale))
        variable = getattr(node, "variable", None)
        if variable is not None:  # AccumulateGrad: a leaf
            if stale and id(variable) in names:
                found[names[id(variable)]] = None
            continue
        stale = stale or node._sequence_nr() < since
        stack.extend((parent, stale) for parent, _ in node.next_functions)
    return list(found)


def leaves_of(value: Tensor, names: dict[int, str], beyond: Iterable[Tensor] = ()) -> list[str]:
    """Name the variables that the graph of ``value`` ends in, out of those in ``names``; not ``beyond`` these
    tensors.
    """
    return stale_variables(value, float("inf"), names, beyond)
