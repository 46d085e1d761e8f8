"""Dynamic barrier gradient descent on the value function: the machinery that BOME and EBOMLC share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from ..barrier import Barrier, Products, multiplier
from ..checks.check_directions import Check, loss_claims
from ..checks.claims import DIFFERENCE, Claim, Same, Unknown
from ..checks.plain import NoReference
from ..directions import Directions, Stats
from ..errors import choice, message
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import adjoint, descend
from ..hypergradient.mode_choice import route_taken
from ..hypergradient.modes import ROUTES, Route
from ..lower_steps import GradientDescent, InnerStep, Preview, Rule, check_preview, current_rates
from ..optimizer.base import BilevelOptimizer, Common
from ..optimizer.hooks import VIRTUAL
from ..settings import Setting, chosen, counted, numeric
from ..vectors import Vector, accumulation_dtype, add_scaled, dot, squared_norm, subtract
from .barrier_terms import Terms, ValueGradient, plain_products, plain_terms, value_claims

StepFrom = Literal["outer", "inner"]


@dataclass(frozen=True, kw_only=True)
class BarrierStats(Stats):
    """The numbers of one step of a barrier method.

    Attributes:
        multiplier: Weight of grad q in the direction (damping xi included); float64.
        active: Whether the multiplier is above 0: the constraint shaped the direction.
        constraint: ``Q = G(w, alpha) - G(w_T, alpha)`` on the first lower batch; float64.
        gradient_norm: ``|grad q|`` over both levels; float64.
        product: Route of the mixed products, for ``value_gradient="unrolled"``; else None.

    Example:
        >>> import torch, bilevel
        >>> one = torch.tensor(1.0)
        >>> stats = bilevel.BarrierStats(
        ...     one, one, multiplier=2 * one, active=one > 0, constraint=one, gradient_norm=one
        ... )
        >>> stats.as_dict()["active"]
        1.0
    """

    multiplier: Tensor
    active: Tensor
    constraint: Tensor
    gradient_norm: Tensor
    product: str | None = None


def _check_barrier(owner: str, argument: str, value: object) -> None:
    if not isinstance(value, Barrier):
        advice = "must be a barrier function, such as bilevel.barrier.GradientNorm(0.5)."
        raise TypeError(message(owner, argument, value, advice))


class DynamicBarrier(BilevelOptimizer[BarrierStats], ABC):
    """Directions ``grad f + xi lambda grad q`` for both levels, with ``q = G(w, alpha) - G(w_T, alpha)``.

    One step, in the notation of the papers::

        w_0 = w;  w_{t+1} = w_t - a grad_w G(w_t, alpha),  t < T
        q = G(w, alpha) - G(w_T, alpha)
        lambda = relu(phi - <grad f, grad q>) / (|grad q|^2 + eps)
        alpha <- alpha - eta_alpha (grad_alpha f + xi lambda grad_alpha q)
        w     <- w     - eta_w     (grad_w f     + xi lambda grad_w q)
    """

    inner_steps = Setting[int](counted(1))
    inner_lr = Setting[float | None](numeric(0.0, exclusive=True, optional=True))
    inner_step = Setting[InnerStep](chosen("plain", "preview"))
    barrier = Setting[Barrier](_check_barrier)
    value_gradient = Setting[ValueGradient](chosen("value_function", "difference", "unrolled"))
    step_from = Setting[StepFrom](chosen("outer", "inner"))
    damping = Setting[float](numeric(0.0))
    eps = Setting[float](numeric(0.0))
    cutoff = Setting[float](numeric(0.0))
    multiplier_max = Setting[float | None](numeric(0.0, optional=True))
    product = Setting[Route](chosen(*ROUTES))

    def __init__(
        self,
        *losses: Any,
        barrier: Barrier,
        inner_steps: int,
        inner_lr: float | None,
        inner_step: InnerStep,
        value_gradient: ValueGradient,
        step_from: StepFrom,
        damping: float,
        eps: float,
        cutoff: float,
        multiplier_max: float | None,
        product: Route,
        **common: Unpack[Common],
    ) -> None:
        owner = type(self).__name__
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.barrier = barrier
        choice(owner, "inner_step", inner_step, ("plain", "preview"))
        self.value_gradient = value_gradient
        self.step_from = step_from
        self.product = product
        self.damping = damping
        self.eps = eps
        self.cutoff = cutoff
        self.multiplier_max = multiplier_max
        super().__init__(*losses, **common)
        self.inner_step = inner_step
        self._rule()  # refuses an optimizer that no preview can follow

    @property
    def _ignores_clipping(self) -> str | None:  # type: ignore[override]
        return VIRTUAL if self.inner_lr is None else None  # a rate of its own was chosen for what it is

    @property
    def lower_batches(self) -> int:
        """``inner_steps``: one lower batch for all inner steps, or one each."""
        return self.inner_steps

    def _answer(self, oracle: Oracle) -> Directions[BarrierStats]:
        terms = self._terms(oracle)
        f, q_upper, q_lower = terms.upper, terms.upper_gradient, terms.lower_gradient
        products = Products(
            upper=_on(f, dot(f.upper, q_upper)),
            lower=_on(f, dot(f.lower, q_lower)),
            squared_norm=_on(f, squared_norm(q_upper)) + _on(f, squared_norm(q_lower)),
            value=_on(f, terms.constraint),
        )
        weight = self.damping * multiplier(
            self.barrier, products, eps=self.eps, cutoff=self.cutoff, maximum=self.multiplier_max
        )
        upper, lower = self._named(add_scaled(f.upper, weight, q_upper), add_scaled(f.lower, weight, q_lower))
        start = dict(zip(self._lower.names, terms.inner_point, strict=True)) if self.step_from == "inner" else None
        stats = BarrierStats(
            upper_loss=f.value,
            lower_loss=terms.lower.value,
            upper_aux=f.aux,
            lower_aux=terms.lower.aux,
            multiplier=weight,
            active=weight > 0,
            constraint=terms.constraint,
            gradient_norm=products.squared_norm.sqrt(),
            product=route_taken(oracle, "both", self.product) if self.value_gradient == "unrolled" else None,
        )
        return Directions(upper, lower, stats, start)

    def _terms(self, oracle: Oracle) -> Terms:
        """Evaluate f, q and their gradients; the lower loss first, so that it is the one that moves buffers."""
        unrolled = self.value_gradient == "unrolled"
        g = oracle.lower()
        rule = self._rule()
        walk = descend(oracle, rule, g, self.inner_steps, keep=self.inner_steps if unrolled else 0)
        # With w_T constant only alpha's gradient is needed there: the evaluation is forward-only through the lower
        # model.
        ahead = oracle.lower(at=walk.end, wrt="upper" if self.value_gradient == "value_function" else "both")
        q_upper, q_lower = subtract(g.upper, ahead.upper), self._lower_gradient(g, ahead)
        if unrolled:
            through_upper, through_lower = adjoint(oracle, rule, walk.steps, ahead.lower, self.product, to_start=True)
            q_upper, q_lower = subtract(q_upper, through_upper), subtract(g.lower, through_lower)
        wide = accumulation_dtype(g.value.device)
        constraint = g.value.to(wide) - ahead.value.to(wide)
        f = oracle.upper()
        return Terms(f, g, walk.end, constraint, q_upper, q_lower)

    def _lower_gradient(self, g: Evaluation, ahead: Evaluation) -> Vector:
        """grad_w q, where it needs no derivative of the walk."""
        return subtract(g.lower, ahead.lower) if self.value_gradient == "difference" else g.lower

    def _claims(self, check: Check) -> Generator[Claim, None, None]:
        """Gradients of F, G and q, Q, the multiplier, the directions: from the equations above by plain autograd."""
        with check.oracle() as oracle:
            terms = self._terms(oracle)
        with check.oracle() as oracle:
            answer = self._answer(oracle)
        by_difference = self.value_gradient == "unrolled" and self.product == "difference"
        loose = DIFFERENCE if by_difference else 0.0
        with check.plain() as plain:
            plainly, reason = terms, ""
            try:
                plainly = plain_terms(plain, self.value_gradient, self._rule, self.inner_steps)
            except NoReference as problem:
                reason = str(problem)
            yield from loss_claims(check, plain, terms.upper, terms.lower)
            yield from value_claims(
                check, plain, terms, self.value_gradient, self._rule, self.inner_steps, loose, differentiable=not reason
            )
            q = plainly.lower.value - plain.lower_value(at=plain.walk(self._rule(), self.inner_steps)[0])
        yield Same("Q", [terms.constraint], [q], size=float(plainly.lower.value.abs()))
        weight, size = self._plain_multiplier(plain_products(plainly))
        yield Same("multiplier", [answer.stats.multiplier], [weight], size=size, tolerance=loose)
        f, computed = plainly.upper, (answer.upper, answer.lower)
        for level, gradient, part, found in (
            (self._upper, f.upper, plainly.upper_gradient, computed[0]),
            (self._lower, f.lower, plainly.lower_gradient, computed[1]),
        ):
            direction, expected = [found.get(name) for name in level.names], add_scaled(gradient, weight, part)
            length = float(squared_norm(direction).sqrt())
            if reason:
                yield Unknown(f"{level.side} direction", length, reason)
            else:
                terms_size = float(squared_norm(gradient).sqrt()) + float(abs(weight) * squared_norm(part).sqrt())
                yield Same(f"{level.side} direction", direction, expected, size=terms_size, tolerance=loose)
        if answer.start is not None:
            yield Same("inner point", [answer.start[name] for name in self._lower.names], plainly.inner_point)

    def _plain_multiplier(self, products: Products) -> tuple[Tensor, float]:
        """The multiplier as the equations have it, and the size of the terms that may cancel in it."""
        phi, total, squared = float(self.barrier(products)), float(products.total), float(products.squared_norm)
        found = max(phi - total, 0.0) / (squared + self.eps) if squared > self.cutoff else 0.0
        found = found if self.multiplier_max is None else min(found, self.multiplier_max)
        weight = torch.tensor(self.damping * found, dtype=torch.float64)
        return weight, self.damping * (abs(phi) + abs(total)) / (squared + max(self.eps, 1e-300))

    def _rule(self) -> Rule:
        if self.inner_step == "preview":
            check_preview(type(self).__name__, self.lower_optimizer, 'inner_step="plain"')
            return Preview(self._lower, self.inner_lr)
        return GradientDescent(current_rates(self._lower, self.inner_lr))


def _on(evaluation: Evaluation, product: Tensor) -> Tensor:
    """Bring a product to the device of a loss: the levels may live on different ones."""
    return product.to(evaluation.value.device, non_blocking=True)
