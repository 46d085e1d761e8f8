"""Hyperparameters of the lower optimizer that are computed from upper variables: rates, momentum, decay, betas.

A closure computes them; its values go into the step that is differentiated, with their graph, and as numbers into the
parameter groups before each real step, so that what is differentiated is what is done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import ClosureError, message
from .evaluation.losses import sequence_number, stale_variables
from .levels import Level
from .lower_steps import GradientDescent, InnerStep, OptimizerStep, Rule, State, current_rates
from .vectors import Tensors, accumulation_dtype

Hyperparameters = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Groups = list[
    dict[str, Any]
]  # for each parameter group, values by name: 0-dim tensors, numbers, a pair of them (betas)
NAMES = {
    "gradient": ("lr",),
    "SGD": ("lr", "momentum", "dampening", "weight_decay"),
    "Adam": ("lr", "betas", "eps", "weight_decay"),
    "AdamW": ("lr", "betas", "eps", "weight_decay"),
}
SIGNED = ("dampening",)
OFF = sys.float_info.min  # a momentum that torch computes with and that changes no number


class LowerHyperparameters:
    """What a closure computes for the parameter groups of the lower optimizer.

    Args:
        owner: The class that errors name.
        closure: Returns a mapping from names to values for all groups, or one for each group.
        upper: The upper level.
        lower: The lower level.
        inner_step: Says which step is differentiated.
    """

    def __init__(
        self,
        owner: str,
        closure: Callable[[], Hyperparameters],
        upper: Level,
        lower: Level,
        inner_step: Callable[[], InnerStep],
    ) -> None:
        self._owner, self._closure, self._upper, self._lower = owner, closure, upper, lower
        self._inner_step = inner_step
        if not callable(closure):
            advice = "must be a function without arguments that returns them. Pass the function, without calling it."
            raise TypeError(message(owner, "lower_hyperparameters", type(closure).__name__, advice))

    def groups(self) -> Groups:
        """Call the closure, with its graph; return the values for each parameter group.

        Raises:
            TypeError, ValueError: It returned something else than hyperparameters of this step, or of a wrong sign.
            ClosureError: What it returned is no function of the upper variables as they are now.
        """
        since = sequence_number()
        with torch.enable_grad():
            found = self._for_each_group(self._closure())
            self._check_graph([x for x in tensors_of(found) if x.requires_grad], since)
            # + 0: an upper variable may be a value itself, and will move.
            groups: Groups = tree_map(lambda x: x + 0 if isinstance(x, Tensor) and x.is_leaf else x, found)
        if all(x.device.type == "cpu" for x in tensors_of(groups)):
            self._check_signs(_numbers(groups))
        return groups

    def rule(self, groups: Groups) -> Rule:
        """Return the lower step with these values, which it is differentiated in."""
        place = {id(x): i for i, group in enumerate(self._lower.optimizer.param_groups) for x in group["params"]}
        which = [place[id(x)] for x in self._lower.tensors]

        def made(groups: Groups) -> Rule:
            if self._kind != "gradient":
                return OptimizerStep(self._lower, instead=[groups[i] for i in which])
            own = current_rates(self._lower, None)
            return GradientDescent([groups[i].get("lr", rate) for i, rate in zip(which, own, strict=True)])

        return Learned(groups, made)

    def write(self, groups: Groups) -> None:
        """Put the values into the parameter groups: as numbers, or where torch keeps a tensor, into that."""
        own = self._lower.optimizer.param_groups
        if not all(_is_tensor(group.get(name)) for group, values in zip(own, groups, strict=True) for name in values):
            groups = _numbers(groups)  # waits for the device
            self._check_signs(groups)
        for group, values in zip(own, groups, strict=True):
            for name, value in values.items():
                group[name] = _put(group.get(name), value)
            if "momentum" in values and not isinstance(group["momentum"], Tensor):
                group["momentum"] = group["momentum"] or OFF  # with 0 torch keeps no buffer, which the derivative needs

    @property
    def _kind(self) -> str:
        return "gradient" if self._inner_step() == "gradient" else type(self._lower.optimizer).__name__

    def _for_each_group(self, found: Any) -> Groups:
        own = self._lower.optimizer.param_groups
        if isinstance(found, Mapping):
            found = [found] * len(own)
        if not isinstance(found, (list, tuple)) or not all(isinstance(values, Mapping) for values in found):
            advice = 'must return a dict such as {"lr": log_lr.exp()}, or a list with one for each parameter group.'
            raise TypeError(self._said(f"a {type(found).__name__}", advice))
        if len(found) != len(own):
            advice = f"returned {len(found)} mappings for the {len(own)} parameter groups of lower_optimizer."
            raise ValueError(self._said("[...]", f"{advice} Return one for each, or a single one for all."))
        return [{name: self._value(name, value) for name, value in values.items()} for values in found]

    def _value(self, name: str, value: Any) -> Any:
        known = NAMES[self._kind]
        if name not in known:
            step = 'inner_step="gradient"' if self._kind == "gradient" else f"the step of {self._kind}"
            more = ' Use inner_step="optimizer" for the others.' if self._kind == "gradient" else ""
            raise ValueError(self._said(name, f"is none that {step} is differentiated in: {', '.join(known)}.{more}"))
        if name == "betas":
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise ValueError(self._said(name, "must be a pair, as in torch: (beta1, beta2)."))
            return tuple(self._scalar(name, part) for part in value)
        return self._scalar(name, value)

    def _scalar(self, name: str, value: Any) -> Tensor | float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, Tensor):
            advice = "must be a scalar tensor, or a number for what is not learned."
            raise TypeError(self._said(f"{name}: {type(value).__name__}", advice))
        if value.numel() != 1:
            advice = "must be a scalar. Rates for parts of a model are parameter groups: return a list of dicts."
            raise ValueError(self._said(f"{name} of shape {tuple(value.shape)}", advice))
        if not value.is_floating_point():
            raise TypeError(self._said(f"{name}: {value.dtype}", "must be real floating point. Cast it."))
        return value.reshape(()) if value.dim() else value

    def _check_graph(self, values: Sequence[Tensor], since: int) -> None:
        variables = {
            id(x): f"{level.side} variable {name}"
            for level in (self._upper, self._lower)
            for name, x in zip(level.names, level.tensors, strict=True)
        }
        read = {name for x in values for name in stale_variables(x, float("inf"), variables)}
        read |= {variables[id(x)] for x in values if id(x) in variables}
        if below := sorted(name for name in read if name.startswith("lower")):
            advice = f"depends on {below[0]}: a derivative through that is not taken. Detach it inside the closure."
            raise ValueError(self._said("...", advice))
        if not read:
            advice = (
                "depends on no upper variable. Usual causes: float(x) or detach inside the closure; a variable that is "
                "not in upper=. For constants, set them in the lower optimizer."
            )
            raise ValueError(self._said("...", advice))
        if stale := sorted({name for x in values for name in stale_variables(x, since, variables)}):
            raise ClosureError(
                f"{self._owner}: lower_hyperparameters reads {', '.join(stale)} through a tensor that was computed "
                "outside the call, so it would stay as it was when the variable moves. Compute it inside the closure."
            )

    def _check_signs(self, numbers: Groups) -> None:
        """Refuse what torch would refuse at construction; what is not finite is left to ``on_nonfinite``."""
        for values in numbers:
            for name, value in values.items():
                for part in value if isinstance(value, tuple) else (value,):
                    if part < 0 and name not in SIGNED:
                        advice = "must be at least 0. Did an upper step move it there? Use exp(x), softplus(x)."
                        raise ValueError(self._said(f"{name}: {part:g}", advice))
                    if name == "betas" and part >= 1:
                        advice = "must be below 1. Did an upper step move it there? Use sigmoid(x)."
                        raise ValueError(self._said(f"{name}: {part:g}", advice))

    def _said(self, value: str, advice: str) -> str:
        return message(self._owner, "lower_hyperparameters", value, advice)


class Learned(Rule):
    """A step some of whose hyperparameters are tensors with a graph.

    Args:
        groups: The values for each parameter group.
        made: Makes the step from them.
    """

    def __init__(self, groups: Groups, made: Callable[[Groups], Rule]) -> None:
        self._groups, self._made = groups, made
        self._rule = made(groups)

    @property
    def hyperparameters(self) -> Sequence[Tensor]:
        return tensors_of(self._groups)

    def at(self, hyperparameters: Sequence[Tensor]) -> Rule:
        values, structure = tree_flatten(self._groups)
        others = iter(hyperparameters)
        replaced = [next(others) if isinstance(value, Tensor) else value for value in values]
        return Learned(tree_unflatten(replaced, structure), self._made)

    def start(self) -> State:
        return self._rule.start()

    def step(self, point: Tensors, gradient: Tensors, state: State) -> tuple[list[Tensor], State]:
        return self._rule.step(point, gradient, state)


def tensors_of(groups: Groups) -> list[Tensor]:
    """Return the values that are tensors."""
    return [value for value in tree_flatten(groups)[0] if isinstance(value, Tensor)]


def _numbers(groups: Groups) -> Groups:
    """Return the values as numbers, at one transfer for each device."""
    values, structure = tree_flatten(groups)
    for device in {value.device for value in values if isinstance(value, Tensor)}:
        here = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.device == device]
        wide = accumulation_dtype(device)
        found = torch.stack([values[i].detach().to(wide) for i in here]).tolist()
        for i, number in zip(here, found, strict=True):
            values[i] = number
    return tree_unflatten(values, structure)  # type: ignore[no-any-return]


def _put(own: Any, value: Any) -> Any:
    """Return what takes the place of ``own`` in a parameter group."""
    if isinstance(value, tuple):
        parts = own if isinstance(own, (tuple, list)) else (None,) * len(value)
        return tuple(_put(a, b) for a, b in zip(parts, value, strict=True))
    if not isinstance(own, Tensor):
        return float(value)
    with torch.no_grad():
        own.copy_(torch.as_tensor(value))
    return own


def _is_tensor(own: Any) -> bool:
    parts: Iterable[Any] = own if isinstance(own, (tuple, list)) else (own,)
    return all(isinstance(part, Tensor) for part in parts)
