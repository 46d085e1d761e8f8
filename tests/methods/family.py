"""A small problem whose every derivative varies, and the plain loop that a method is compared with, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UPPER_RATE, LOWER_RATE = 0.05, 0.04

State = dict[str, Any]
Loss = Callable[[Tensor, Tensor, float], Tensor]
Step = Callable[["Curved", Tensor, Tensor, State, float, list[float]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gradients:
    """A loss at a point, and its gradients."""

    value: Tensor
    upper: Tensor
    lower: Tensor


class Curved:
    """Not quadratic in either level; a batch is a number, whose part of both losses has mean 0 over -1 and 1."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        root = normal(3, 3)
        self.hessian = root @ root.T / 3 + torch.eye(3, dtype=torch.float64)
        self.coupling, self.target = normal(3, 2), normal(5)
        self.alpha = (0.5 * normal(2)).requires_grad_()
        self.lower = [normal(3).requires_grad_(), normal(2).requires_grad_()]

    def f(self, w: Tensor, alpha: Tensor, batch: float) -> Tensor:
        fit = (w - self.target).cosh().log().sum() + 0.2 * (w[0] - alpha[1]) ** 2
        return fit + 0.1 * alpha.square().sum() + 0.1 * batch * (w[3] + alpha[0] * w[1])

    def g(self, w: Tensor, alpha: Tensor, batch: float) -> Tensor:
        first, second = w[:3], w[3:]
        bowl = 0.5 * first @ self.hessian @ first - first @ self.coupling @ alpha.tanh()
        other = 0.5 * (alpha.exp() * (second - first[:2].sin()) ** 2).sum()
        return bowl + other + 0.1 * batch * (second * alpha).sum()

    def gradients(self, loss: Loss, w: Tensor, alpha: Tensor, batch: float = 0.0) -> Gradients:
        """By plain autograd."""
        w, alpha = w.detach().requires_grad_(), alpha.detach().requires_grad_()
        value = loss(w, alpha, batch)
        upper, lower = torch.autograd.grad(value, [alpha, w])
        return Gradients(value.detach(), upper, lower)

    def products(self, w: Tensor, alpha: Tensor, v: Tensor, batch: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return ``(G_aw v, G_ww v)``, by plain autograd."""
        w, alpha = w.detach().requires_grad_(), alpha.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.g(w, alpha, batch), w, create_graph=True)
        mixed, hessian = torch.autograd.grad(slope @ v, [alpha, w])
        return mixed, hessian

    def optimizer(self, method: type[Any], **options: Any) -> Any:
        def upper_loss(batch: float) -> Tensor:
            return self.f(torch.cat(self.lower), self.alpha, batch)

        def lower_loss(batch: float) -> Tensor:
            return self.g(torch.cat(self.lower), self.alpha, batch)

        arguments: dict[str, Any] = {
            "upper": self.alpha,
            "lower": self.lower,
            "upper_optimizer": torch.optim.SGD([self.alpha], lr=UPPER_RATE),
            "lower_optimizer": torch.optim.SGD(self.lower, lr=LOWER_RATE),
            **options,
        }
        return method(upper_loss, lower_loss, **arguments)

    @property
    def point(self) -> tuple[Tensor, Tensor]:
        return torch.cat([w.detach() for w in self.lower]), self.alpha.detach().clone()


def batches(steps: int, each: int) -> Iterator[tuple[float, list[float]]]:
    """An upper batch and ``each`` lower ones, for each step."""
    draw = torch.Generator().manual_seed(5)
    for _ in range(steps):
        upper, *lower = torch.randn(1 + each, generator=draw, dtype=torch.float64).tolist()
        yield upper, lower


def assert_follows(
    method: type[Any],
    step: Step,
    *,
    steps: int = 6,
    each: int = 1,
    wrap: Callable[[int, float], Any] = lambda k, b: b,
    **options: Any,
) -> Any:
    """Walk ``steps`` steps of a method, and the plain loop beside it; return the last stats.

    ``step`` maps ``(problem, w, alpha, state, upper batch, lower batches)`` to the next ``(w, alpha)``.
    """
    problem = Curved()
    optimizer = problem.optimizer(method, **options)
    w, alpha = problem.point
    state: State = {}
    stats = None
    for k, (upper, lower) in enumerate(batches(steps, each)):
        w, alpha = step(problem, w, alpha, state, upper, lower)
        stats = optimizer.step(wrap(k, upper), *(wrap(k, one) for one in lower))
        for found, expected in zip(problem.point, (w, alpha), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=1e-10, atol=1e-12, msg=lambda text, k=k: f"step {k}: {text}"
            )
    return stats


def trained(problem: Any, method: type[Any], steps: int, rates: Sequence[float] = (0.1, 0.1), **options: Any) -> Any:
    """Run a method on one of ``bilevel.problems`` with plain SGD; return the optimizer."""
    optimizer = method(
        problem.upper_loss,
        problem.lower_loss,
        upper=problem.upper,
        lower=problem.lower,
        upper_optimizer=torch.optim.SGD([problem.upper], lr=rates[0]),
        lower_optimizer=torch.optim.SGD([problem.lower], lr=rates[1]),
        **options,
    )
    for _ in range(steps):
        optimizer.step()
    return optimizer


def distance(problem: Any) -> float:
    """How far the upper variables are from the solution."""
    return float((problem.upper.detach() - problem.upper_solution).norm())


def resumed(method: type[Any], **options: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs of variables: after six steps in one go, and with a checkpoint after the third."""
    straight, broken = Curved(), Curved()
    one, two = straight.optimizer(method, **options), broken.optimizer(method, **options)
    for k, (upper, lower) in enumerate(batches(6, 1)):
        if k == 3:
            state = two.state_dict()
            two = broken.optimizer(method, **options)
            two.load_state_dict(state)
        one.step(upper, *lower)
        two.step(upper, *lower)
    return zip(straight.point, broken.point, strict=True)
