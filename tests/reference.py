"""BOME and EBOMLC written down plainly: the readable reference beside the fast version.

Nothing here comes from ``bilevel``. Both levels are lists of float64 tensors, both losses are functions of them, and
every derivative is ``torch.autograd.grad`` of the printed formula, graphs through the inner steps included. The
optimizers are written out as well, so that what the tests compare with never went through the library or
``torch.optim``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Tensors = list[Tensor]
Loss = Callable[[Tensors, Tensors, Any], Tensor]
"""``loss(alpha, w, batch)``"""


@dataclass(frozen=True)
class Mover:
    """Settings of the optimizer that moves one variable: momentum SGD, or Adam where ``betas`` are given."""

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] | None = None
    adam_eps: float = 1e-8
    decoupled: bool = False
    amsgrad: bool = False


State = dict[str, Any]


def move(x: Tensor, g: Tensor, state: State, mover: Mover) -> tuple[Tensor, State]:
    """One optimizer step of one variable, out of place and differentiable."""
    if mover.decoupled:
        x = x - mover.lr * mover.weight_decay * x
    else:
        g = g + mover.weight_decay * x
    if mover.betas is None:
        if mover.momentum == 0:
            return x - mover.lr * g, {}
        buffer = mover.momentum * state["buffer"] + (1 - mover.dampening) * g if "buffer" in state else g
        step = g + mover.momentum * buffer if mover.nesterov else buffer
        return x - mover.lr * step, {"buffer": buffer}
    beta1, beta2 = mover.betas
    t = state.get("t", 0) + 1
    m = beta1 * state.get("m", torch.zeros_like(x)) + (1 - beta1) * g
    v = beta2 * state.get("v", torch.zeros_like(x)) + (1 - beta2) * g**2
    largest = torch.maximum(state.get("largest", torch.zeros_like(x)), v) if mover.amsgrad else v
    m_hat, v_hat = m / (1 - beta1**t), largest / (1 - beta2**t)
    # A gradient that is 0 in theory (a bias in front of BatchNorm) is exactly 0 on one CPU and 1e-17 on another. Where
    # none but zeros were seen the step is 0, and its derivative is defined as 0: that of the root would be NaN.
    seen = largest > 0
    ratio = m_hat / (torch.where(seen, v_hat, 1.0).sqrt() + mover.adam_eps)
    return x - mover.lr * torch.where(seen, ratio, 0.0), {"t": t, "m": m, "v": v, "largest": largest}


@dataclass(frozen=True)
class Options:
    """Every option of both classes, under the names of the library; EBOMLC is ``barrier="aligned"``, one inner step."""

    inner_steps: int = 1
    inner_lr: float | None = None
    inner_step: Literal["gradient", "optimizer"] = "gradient"
    barrier: Literal["gradient_norm", "value", "aligned"] = "gradient_norm"
    delta: float = 0.5
    xi: float = 1.0
    value_gradient: Literal["value_function", "difference", "unrolled"] = "value_function"
    step_from: Literal["current", "lookahead"] = "current"
    eps: float = 1e-8
    cutoff: float = 1e-12
    multiplier_max: float | None = None


@dataclass(frozen=True)
class Answer:
    """What one look at the losses gives."""

    upper: Tensors
    lower: Tensors
    multiplier: float
    constraint: float
    gradient_norm: float
    start: Tensors


@dataclass
class Reference:
    """One optimizer: two losses, the current point, the state of the two optimizers."""

    upper_loss: Loss
    lower_loss: Loss
    alpha: Tensors
    w: Tensors
    upper_movers: Sequence[Mover]
    lower_movers: Sequence[Mover]
    options: Options

    def __post_init__(self) -> None:
        self.alpha = [x.detach().clone() for x in self.alpha]
        self.w = [x.detach().clone() for x in self.w]
        self.upper_states: list[State] = [{} for _ in self.alpha]
        self.lower_states: list[State] = [{} for _ in self.w]

    def directions(self, upper_batch: Any, lower_batches: Sequence[Any]) -> Answer:
        o = self.options
        alpha = [x.clone().requires_grad_() for x in self.alpha]
        w = [x.clone().requires_grad_() for x in self.w]

        end = self._inner_point(alpha, w, lower_batches)
        first = lower_batches[0]
        if o.value_gradient == "value_function":  # w_T is a constant
            ahead = [x.detach() for x in end]
        elif o.value_gradient == "difference":  # w_T moves as w does: its Jacobian is the identity
            ahead = [x + (y - x).detach() for x, y in zip(w, end, strict=True)]
        else:
            ahead = end
        q = self.lower_loss(alpha, w, first) - self.lower_loss(alpha, ahead, first)
        f = self.upper_loss(alpha, w, upper_batch)

        grad_q = torch.autograd.grad(q, alpha + w, materialize_grads=True)
        grad_f = torch.autograd.grad(f, alpha + w, materialize_grads=True)
        beta = self._multiplier(grad_f, grad_q, float(q.detach()))
        d = [a + o.xi * beta * b for a, b in zip(grad_f, grad_q, strict=True)]
        return Answer(
            upper=d[: len(alpha)],
            lower=d[len(alpha) :],
            multiplier=o.xi * beta,
            constraint=float(q.detach()),
            gradient_norm=_inner(grad_q, grad_q) ** 0.5,
            start=[x.detach() for x in end],
        )

    def step(self, upper_batch: Any, lower_batches: Sequence[Any]) -> Answer:
        answer = self.directions(upper_batch, lower_batches)
        start = answer.start if self.options.step_from == "lookahead" else self.w
        self.alpha, self.upper_states = _move_all(self.alpha, answer.upper, self.upper_states, self.upper_movers)
        self.w, self.lower_states = _move_all(start, answer.lower, self.lower_states, self.lower_movers)
        return answer

    def _inner_point(self, alpha: Tensors, w: Tensors, lower_batches: Sequence[Any]) -> Tensors:
        """``w_T``, with the graph of all T steps."""
        o = self.options
        point, states = w, self.lower_states
        for t in range(o.inner_steps):
            batch = lower_batches[t] if len(lower_batches) > 1 else lower_batches[0]
            value = self.lower_loss(alpha, point, batch)
            gradient = torch.autograd.grad(value, point, create_graph=True)
            movers = [self._inner_mover(mover) for mover in self.lower_movers]
            point, states = _move_all(point, gradient, states, movers)
        return point

    def _inner_mover(self, mover: Mover) -> Mover:
        lr = mover.lr if self.options.inner_lr is None else self.options.inner_lr
        return Mover(lr) if self.options.inner_step == "gradient" else Mover(**{**vars(mover), "lr": lr})

    def _multiplier(self, grad_f: Sequence[Tensor], grad_q: Sequence[Tensor], q: float) -> float:
        o = self.options
        split = len(self.alpha)
        norm = _inner(grad_q, grad_q)
        phi = {
            "gradient_norm": o.delta * norm,
            "value": o.delta * max(q, 0.0),
            "aligned": o.delta * norm + _inner(grad_f[:split], grad_q[:split]),
        }[o.barrier]
        if norm <= o.cutoff:
            return 0.0
        beta = max(phi - _inner(grad_f, grad_q), 0.0) / (norm + o.eps)
        return beta if o.multiplier_max is None else min(beta, o.multiplier_max)


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def _move_all(
    values: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State], movers: Sequence[Mover]
) -> tuple[Tensors, list[State]]:
    pairs = [move(x, g, s, m) for x, g, s, m in zip(values, gradients, states, movers, strict=True)]
    return [x for x, _ in pairs], [s for _, s in pairs]
