"""Lower-level steps as functions of the point and its gradient: gradient descent, momentum SGD, Adam.

A ``Rule`` starts from a state and maps ``(point, gradient, state)`` to the next point and state, out of place and
differentiably; the torch optimizer that it follows is only read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import message
from .levels import Level
from .shards import part_of
from .vectors import Tensors, present

Point = Sequence[Tensor]
State = Sequence[dict[str, Tensor]]
InnerStep = Literal["gradient", "optimizer"]
FOLLOWED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class Rule(ABC):
    """One lower step as a function: out of place, differentiable, with its state (momentum, moments) as a value.

    Example:
        >>> import torch
        >>> from bilevel.lower_steps import Rule
        >>> class Clipped(Rule):
        ...     def start(self):
        ...         return []
        ...     def step(self, point, gradient, state):
        ...         return [x if g is None else (x - 0.1 * g).clamp(0, 1) for x, g in zip(point, gradient)], state
        >>> Clipped().step([torch.tensor(0.5)], [torch.tensor(9.0)], [])
        ([tensor(0.)], [])
    """

    @abstractmethod
    def start(self) -> State:
        """Return the state before the first step, one mapping per variable; tensors are shared, never written."""

    @abstractmethod
    def step(self, point: Tensors, gradient: Tensors, state: State) -> tuple[list[Tensor], State]:
        """Return the next point and state; a variable without gradient stays as it is, as in torch."""

    @property
    def hyperparameters(self) -> Sequence[Tensor]:
        """What the step depends on beside its arguments, to be differentiated: rates that are upper variables."""
        return ()

    def at(self, hyperparameters: Sequence[Tensor]) -> Rule:
        """Return the same step with other values of its hyperparameters."""
        return self


def constant(rule: Rule) -> Rule:
    """Return the rule with its hyperparameters detached, for walks that keep no graph."""
    return rule.at([value.detach() for value in rule.hyperparameters])


class GradientDescent(Rule):
    """``w <- w - lr_i * grad_i``: no momentum, no weight decay, one rate per variable.

    Example:
        >>> import torch
        >>> from bilevel.lower_steps import GradientDescent
        >>> rule = GradientDescent([0.1])
        >>> rule.step([torch.tensor(1.0)], [torch.tensor(2.0)], rule.start())[0]
        [tensor(0.8000)]
    """

    def __init__(self, rates: Sequence[float | Tensor]) -> None:
        self._rates = rates

    def start(self) -> State:
        return [{} for _ in self._rates]

    def step(self, point: Tensors, gradient: Tensors, state: State) -> tuple[list[Tensor], State]:
        moved = [
            x if g is None else _moved(x, g, _on(rate, x))
            for x, g, rate in zip(present(point), gradient, self._rates, strict=True)
        ]
        return moved, state


class OptimizerStep(Rule):
    """The step that the user's own lower optimizer would take, from its real state, without taking it.

    Args:
        level: The lower level.
        rate: Its rate; None: each group's own.
        instead: For each variable, what to take instead of the options of its group; tensors are differentiated.
    """

    def __init__(
        self, level: Level, rate: float | None = None, *, instead: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        own = [{**group, "lr": _held(group["lr"]) if rate is None else rate} for group in level.groups()]
        self._groups = own if instead is None else [{**a, **b} for a, b in zip(own, instead, strict=True)]
        states = [level.optimizer.state.get(tensor, {}) for tensor in level.tensors]
        self._start = [{k: part_of(v.detach()) for k, v in state.items() if isinstance(v, Tensor)} for state in states]

    def start(self) -> State:
        return self._start

    def step(self, point: Tensors, gradient: Tensors, state: State) -> tuple[list[Tensor], State]:
        moved, after = [], []
        for x, g, s, group in zip(present(point), gradient, state, self._groups, strict=True):
            kind = _momentum_sgd if "momentum" in group else _adam
            new_x, new_s = (x, s) if g is None else kind(x, g, s, group)
            moved.append(new_x)
            after.append(new_s)
        return moved, after


def check_followed(owner: str, optimizer: torch.optim.Optimizer, otherwise: str) -> None:
    """Refuse an optimizer whose step is not written down here as a function; ``otherwise`` names the alternative."""
    if type(optimizer) not in FOLLOWED:
        names = ", ".join(kind.__name__ for kind in FOLLOWED)
        advice = f"cannot be followed as a function; these can: {names}. Use one of them, or {otherwise}."
        raise ValueError(message(owner, "lower_optimizer", type(optimizer).__name__, advice))


def current_rates(level: Level, rate: float | None) -> list[float | Tensor]:
    """Return ``rate`` for every variable or, if it is None, the current learning rate of each one's group."""
    if rate is not None:
        return [rate] * len(level.tensors)
    return [_held(group["lr"]) for group in level.groups()]


def _moved(x: Tensor, g: Tensor, rate: float | Tensor) -> Tensor:
    """Return ``x - rate * g``, as one operation where that is possible: there are many small tensors."""
    moved = x - rate * g if isinstance(rate, Tensor) else torch.sub(x, g, alpha=rate)
    return moved if moved.dtype == x.dtype else moved.to(x.dtype)


def _held(rate: float | Tensor) -> float | Tensor:
    """Return the rate of a group, which is a constant also where torch keeps it as a tensor."""
    return rate.detach() if isinstance(rate, Tensor) else rate


def _on(value: Any, x: Tensor) -> Any:
    """Return a hyperparameter where it meets a variable: on its device and, as a number does, in its dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(x.device, x.dtype if x.dim() == 0 else value.dtype, non_blocking=True)


def _acts(value: Any) -> bool:
    """Whether a hyperparameter is to be computed with: one that is differentiated also where it is 0."""
    return isinstance(value, Tensor) or value != 0


def _momentum_sgd(
    x: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """``torch.optim.SGD``: ``d = g + wd*x; b = m*b + (1-damp)*d; x - lr*b`` (nesterov: ``x - lr*(d + m*b)``)."""
    rate, momentum, dampening, decay = (_on(group[n], x) for n in ("lr", "momentum", "dampening", "weight_decay"))
    if group.get("maximize"):
        g = -g
    if _acts(decay):
        g = g + decay * x
    if _acts(momentum):
        held = state.get("momentum_buffer")
        buffer = g if held is None else momentum * held + (1 - dampening) * g
        state = {"momentum_buffer": buffer}
        g = g + momentum * buffer if group["nesterov"] else buffer
    return _moved(x, g, rate), state


def _adam(x: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """``torch.optim.Adam`` and ``AdamW``: ``x - lr/c1 * m / (sqrt(v)/sqrt(c2) + eps)``, with bias corrections c."""
    rate, decay, eps = (_on(group[name], x) for name in ("lr", "weight_decay", "eps"))
    beta1, beta2 = (_on(beta, x) for beta in group["betas"])
    if group.get("maximize"):
        g = -g
    if _acts(decay):
        if group.get("decoupled_weight_decay"):
            x = (x - rate * decay * x).to(x.dtype)
        else:
            g = g + decay * x
    step = state["step"] + 1 if "step" in state else torch.ones((), dtype=torch.float64)
    m = beta1 * state["exp_avg"] + (1 - beta1) * g if "exp_avg" in state else (1 - beta1) * g
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g if "exp_avg_sq" in state else (1 - beta2) * g * g
    after = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    if group["amsgrad"]:
        held = state.get("max_exp_avg_sq")
        v = v if held is None else torch.maximum(held, v)
        after["max_exp_avg_sq"] = v
    count = step.double()  # float32 powers of a long run would lose what the correction corrects
    correction1, correction2 = _correction(beta1, count, x), _correction(beta2, count, x)
    # sqrt has no derivative at 0. Where no gradient was ever seen, the update is 0 and its derivative is defined as 0.
    seen = v > 0
    root = torch.where(seen, torch.where(seen, v, 1.0).sqrt(), 0.0)
    ratio = m / (root / torch.sqrt(correction2) + eps)
    ratio = torch.where(seen, ratio, ratio.detach())
    return (x - rate / correction1 * ratio).to(x.dtype), after


def _correction(beta: float | Tensor, count: Tensor, x: Tensor) -> Tensor:
    """Return ``1 - beta^count``, in float64."""
    if isinstance(beta, Tensor):
        beta, count = beta.double(), count.to(beta.device)
    found: Tensor = 1 - beta**count
    return found.to(x.device, non_blocking=True)
