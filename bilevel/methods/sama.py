"""SAMA: scalable meta learning, algorithmically adapted (Choe et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from ..checks.check import Check
from ..checks.checker import Checker
from ..checks.plain import Plain
from ..directions import Directions
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import Step, mixed_product, mode_taken, train
from ..lower_steps import OptimizerStep, check_followed
from ..optimizer.base import Common
from ..optimizer.hooks import ONLY_REAL
from ..settings import Setting, numeric
from ..vectors import Vector
from .formulas import Formula, central_difference, difference_checks, summed
from .hypergradient_method import HypergradientMethod, HypergradientStats


class SAMA(HypergradientMethod[HypergradientStats]):
    r"""Lower steps, then a first-order hypergradient that knows the lower optimizer.

    .. math::
        u &= D\, \nabla_w F(w, \alpha), \quad e = R / \|u\| \\
        \alpha &\leftarrow \alpha - \eta_\alpha \Big( \nabla_\alpha F -
            \frac{\nabla_\alpha G(w + e u, \alpha) - \nabla_\alpha G(w - e u, \alpha)}{2 e} \Big)

    The base Jacobian is taken for the identity. D is the derivative of the optimizer's update in the last gradient g:
    the identity for SGD (the learning rate is left out, as in the code), and for Adam, elementwise, with the moments
    before that gradient,

    .. math:: D = \eta\, \frac{(1 - b_1) b_2 v - b_1 (1 - b_2)\, g\, m}{(\sqrt{v_+} + \epsilon)^3}, \quad
        v_+ = b_2 v + (1 - b_2) g^2

    (0 where :math:`v_+ = 0`; no bias correction, as in the code). Copies are perturbed, not the parameters.

    Args:
        upper_loss: F, called once per step, after the lower steps; see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G, called ``inner_steps + 2`` times per step, the last two forward-only through the lower model.
        inner_steps: Real lower steps per call, >= 1; default 1.
        radius: R > 0; default 1.0, as in Betty.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off, or the lower optimizer is neither SGD, Adam nor AdamW.

    Cost:
        k gradients of G, one of F, two gradients of G in alpha alone. Memory: about three
        copies of the lower variables.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> upper_optimizer, lower_optimizer = problem.optimizers()
        >>> optimizer = bilevel.SAMA(
        ...     problem.upper_loss, problem.lower_loss, upper=problem.upper, lower=problem.lower,
        ...     upper_optimizer=upper_optimizer, lower_optimizer=lower_optimizer,
        ... )
        >>> optimizer.step().upper_moved
        True

    References:
        Choe et al., `Making Scalable Meta Learning Practical <https://arxiv.org/abs/2310.05674>`_, NeurIPS 2023, and
        the code in Betty.
    """

    virtual_walk = False
    ignores_clipping = ONLY_REAL
    radius = Setting[float](numeric(0.0, exclusive=True))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        radius: float = 1.0,
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.inner_steps = inner_steps
        self.radius = radius
        self.atomic = atomic
        super().__init__(upper_loss, lower_loss, **common)
        check_followed("SAMA", self.lower_optimizer, "Neumann(0) in Implicit, which knows no optimizer")

    def compute(self, oracle: Oracle) -> Directions[HypergradientStats]:
        walk = train(oracle, self.inner_steps, rule=self._real_step, keep=1)
        f, g = oracle.upper(), walk.first
        u = self._adapted(walk.steps[-1], self._free(walk.steps[-1], f.lower))
        last = self.lower_batches - 1
        product = mixed_product(oracle, u, batch=last, product="difference", radius=self.radius)
        taken = mode_taken(oracle, "mixed", "difference")
        return Directions(
            upper=f.upper - product,
            stats=HypergradientStats.of(f, g, product=taken),
        )

    def formula(self, plain: Plain, answer: Directions[HypergradientStats]) -> Formula:
        """The same difference, of plain gradients, along D as the moments give it; or the product itself, where that
        took its place.
        """
        f, u = self._plain_direction(plain)
        last = self.lower_batches - 1
        if answer.stats.product != "difference":
            return summed(f.upper, -1.0, plain.product(u, batch=last)[0])
        return summed(f.upper, -1.0, central_difference(plain, last, u, self.radius))

    def more_checks(self, checker: Checker, answer: Directions[HypergradientStats]) -> Iterator[Check]:
        """Whether the difference is, for a small radius, the derivative."""
        if answer.stats.product == "difference":
            with checker.plain() as plain:
                u = self._plain_direction(plain)[1]
                yield from difference_checks(checker, plain, self.lower_batches - 1, u)

    def _real_step(self) -> OptimizerStep:
        return OptimizerStep(self.lower_level)

    def _free(self, last: Step, upper: Vector) -> Vector:
        """Return ``P'(z) grad_w F`` at the point z that the last step reached before it was projected."""
        if not self.lower_set.bounded or last.point is None:
            return upper
        return self.lower_set.derivative(self._real_step().step(last.point, last.gradient, last.state)[0])(upper)

    def _adapted(self, last: Step, upper: Vector) -> Vector:
        """Return ``u = D grad_w F``."""
        if isinstance(self.lower_optimizer, torch.optim.SGD):
            return upper
        terms = zip(self.lower_groups(), last.point or [], last.gradient, last.state, upper, strict=True)
        return upper.like(
            None if u is None or g is None or x is None else _adam_slope(group, x, g, s) * u
            for group, x, g, s, u in terms
        )

    def _plain_direction(self, plain: Plain) -> tuple[Evaluation, Vector]:
        """F after the real steps, and u. With the moments m_+ and v_+ that include g, D is
        ``lr ((1 - b1) v_+ - (1 - b2) g m_+) / (sqrt(v_+) + eps)^3``.
        """
        last = plain.train(self.inner_steps, self._real_step)[-1]
        f = plain.upper()
        if isinstance(self.lower_optimizer, torch.optim.SGD):
            return f, self._free(last, f.lower)
        upper = self._free(last, f.lower)
        terms = zip(self.lower_groups(), last.point or [], last.gradient, last.state, upper, strict=True)
        return f, f.lower.like(
            None if u is None or g is None or x is None else _slope_after(group, x, g, before) * u
            for group, x, g, before, u in terms
        )


def _adam_slope(group: dict[str, Any], x: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    beta1, beta2 = group["betas"]
    if not group.get("decoupled_weight_decay"):
        g = g + group["weight_decay"] * x  # what the moments are of
    m, v = state.get("exp_avg", torch.zeros_like(g)), state.get("exp_avg_sq", torch.zeros_like(g))
    after = beta2 * v + (1 - beta2) * g * g
    slope = group["lr"] * ((1 - beta1) * beta2 * v - beta1 * (1 - beta2) * g * m) / (after.sqrt() + group["eps"]) ** 3
    if "max_exp_avg_sq" in state:  # amsgrad: where an old maximum stands, the gradient moves the first moment alone
        held = state["max_exp_avg_sq"]
        slope = torch.where(held > after, group["lr"] * (1 - beta1) / (held.sqrt() + group["eps"]), slope)
    return torch.where(after > 0, slope, 0.0).to(g.dtype)


def _slope_after(group: dict[str, Any], x: Tensor, g: Tensor, before: dict[str, Tensor]) -> Tensor:
    """The same slope from the moments that include ``g``, as the quotient rule gives it."""
    beta1, beta2 = group["betas"]
    if not group.get("decoupled_weight_decay"):
        g = g + group["weight_decay"] * x
    m = beta1 * before.get("exp_avg", 0.0 * g) + (1 - beta1) * g
    v = beta2 * before.get("exp_avg_sq", 0.0 * g) + (1 - beta2) * g**2
    slope = ((1 - beta1) * v - (1 - beta2) * g * m) / (v**0.5 + group["eps"]) ** 3
    if "max_exp_avg_sq" in before:
        largest = before["max_exp_avg_sq"]
        slope = torch.where(largest > v, (1 - beta1) / (largest**0.5 + group["eps"]), slope)
    return torch.where(v > 0, group["lr"] * slope, 0.0)
