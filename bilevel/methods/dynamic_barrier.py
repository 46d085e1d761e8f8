"""Dynamic barrier gradient descent on the value function: the machinery that BOME and EBOMLC share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

from torch import Tensor

from ..barrier import Barrier, Products, multiplier
from ..checks.check import Check
from ..checks.checker import Checker
from ..directions import Directions, Stats
from ..errors import message
from ..evaluation.evaluations import Evaluation, Wrt
from ..evaluation.oracle import Oracle
from ..hypergradient import ProductMode, adjoint, descend, mode_taken
from ..hypergradient.modes import PRODUCT_MODES
from ..lower_steps import InnerStep
from ..optimizer.base import BilevelOptimizer, Common
from ..settings import Fixed, Setting, chosen, numeric
from ..vectors import Vector, accumulation_dtype
from .barrier_formulas import Terms, ValueGradient, barrier_checks
from .bounded_barrier import Cone, Gradients, cone_multiplier, cone_products
from .starts import Starts, check_starts

StepFrom = Literal["current", "lookahead"]


@dataclass(frozen=True, kw_only=True)
class BarrierStats(Stats):
    """The numbers of one step of a barrier method.

    Attributes:
        multiplier: Weight of grad q in the direction (damping xi included); float64.
        active: Whether the multiplier is above 0: the constraint shaped the direction.
        constraint: ``Q = G(w, alpha) - G(w_T, alpha)`` on the first lower batch; float64.
        gradient_norm: ``|grad q|`` over both levels; float64. With projections that of the part of ``-grad q`` along
            which the variables can move.
        product: Mode of the products of G, for ``value_gradient="unrolled"``; else None.
        chosen: With several ``starts``, which end w moved to; 0: it stayed. Else None.

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
    chosen: Tensor | None = None


class BarrierOptions(Common, total=False):
    """The keyword arguments that BOME and EBOMLC pass on to :class:`DynamicBarrier`; their docstrings say what they
    mean.
    """

    inner_lr: float | None
    inner_step: InnerStep
    value_gradient: ValueGradient
    step_from: StepFrom
    eps: float
    cutoff: float
    multiplier_max: float | None
    product: ProductMode
    starts: int
    spread: float


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

    Where variables have projections, lambda and the directions are those of ``bounded_barrier.py``.
    """

    walks_virtually = True
    knows_shards = True
    barrier = Setting[Barrier](_check_barrier)
    value_gradient = Setting[ValueGradient](chosen("value_function", "difference", "unrolled"))
    step_from = Setting[StepFrom](chosen("current", "lookahead"))
    damping = Setting[float](numeric(0.0))
    eps = Setting[float](numeric(0.0))
    cutoff = Setting[float](numeric(0.0))
    multiplier_max = Setting[float | None](numeric(0.0, optional=True))
    starts = Fixed[int]()
    spread = Setting[float](numeric(0.0, exclusive=True))
    product = Setting[ProductMode](chosen(*PRODUCT_MODES))

    def __init__(
        self,
        *losses: Any,
        barrier: Barrier,
        inner_steps: int = 1,
        damping: float = 1.0,
        inner_lr: float | None = None,
        inner_step: InnerStep = "gradient",
        value_gradient: ValueGradient = "value_function",
        step_from: StepFrom = "current",
        eps: float = 1e-8,
        cutoff: float = 1e-12,
        multiplier_max: float | None = None,
        product: ProductMode = "auto",
        starts: int = 1,
        spread: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        check_starts(type(self).__name__, starts)
        self.__dict__.update(starts=starts)
        self.spread = spread
        self.barrier, self.damping = barrier, damping
        self.inner_steps, self.inner_lr, self.inner_step = inner_steps, inner_lr, inner_step
        self.value_gradient, self.product = value_gradient, product
        self.step_from = step_from
        self.eps, self.cutoff, self.multiplier_max = eps, cutoff, multiplier_max
        super().__init__(*losses, **common)
        self._starts = Starts(self, starts, lambda: self.spread)
        self._check_starts()
        self.inner_rule()  # refuses an optimizer that cannot be followed

    def compute(self, oracle: Oracle) -> Directions[BarrierStats]:
        return self._from_the_best(oracle) if self.starts > 1 else self._answer(oracle, self.terms(oracle))

    def _from_the_best(self, oracle: Oracle) -> Directions[BarrierStats]:
        """The same with several copies: the lowest end for w_T, from where ``f + lambda q`` is smallest."""
        self._check_starts()
        g, rule = oracle.lower(), self.inner_rule()
        first = descend(oracle, rule, self.inner_steps, first=g).end
        found = self._starts.walked(oracle, first, lambda y: descend(oracle, rule, self.inner_steps, start=y).end)
        f = oracle.upper()

        def terms(f: Evaluation, g: Evaluation) -> Terms:
            wide = accumulation_dtype(g.value.device)
            constraint = g.value.to(wide) - found.lowest.to(wide)
            return Terms(f, g, first, constraint, g.upper - found.gradient, g.lower)

        weight = self._answer(oracle, terms(f, g)).stats.multiplier
        point, chosen = found.better(oracle, f, g, weight.to(g.value.device, non_blocking=True))
        there = self._answer(oracle, terms(oracle.upper(point), oracle.lower(point)), point)
        stats = replace(there.stats, upper_loss=f.value, lower_loss=g.value, chosen=chosen)
        return Directions(there.upper, there.lower, stats, start=point, state=self._starts.state(found))

    def _check_starts(self) -> None:
        if self.starts > 1 and (self.value_gradient, self.step_from) != ("value_function", "current"):
            advice = 'goes with value_gradient="value_function" and step_from="current" alone. Leave the others out.'
            raise ValueError(message(type(self).__name__, "starts", self.starts, advice))

    def _answer(self, oracle: Oracle, at: Terms, current: Vector | None = None) -> Directions[BarrierStats]:
        """The directions from f and q; ``current``: where the lower step starts, if not at w."""
        f, q_upper, q_lower = at.upper, at.upper_gradient, at.lower_gradient
        (f_q_upper, q_q_upper), (f_q_lower, q_q_lower) = q_upper.dots(f.upper, q_upper), q_lower.dots(f.lower, q_lower)
        products = Products(
            upper=_on(f, f_q_upper),
            lower=_on(f, f_q_lower),
            squared_norm=_on(f, q_q_upper) + _on(f, q_q_lower),
            value=_on(f, at.constraint),
        )
        numbers: dict[str, Any] = {"eps": self.eps, "cutoff": self.cutoff, "maximum": self.multiplier_max}
        cone = self.cone(oracle.point() if current is None else current, at.inner_point)
        if cone is None:
            weight = self.damping * multiplier(self.barrier, products, **numbers)
            upper, lower = f.upper + weight * q_upper, f.lower + weight * q_lower
        else:
            gradients = Gradients(f.upper, f.lower, q_upper, q_lower)
            products = cone_products(cone, gradients, products)
            weight = self.damping * cone_multiplier(self.barrier, products, cone, gradients, **numbers)
            upper, lower = cone.descent(f.upper + weight * q_upper, f.lower + weight * q_lower)
        return Directions(
            upper=upper,
            lower=lower,
            start=at.inner_point if self.step_from == "lookahead" else None,
            stats=BarrierStats.of(
                f,
                at.lower,
                multiplier=weight,
                active=weight > 0,
                constraint=at.constraint,
                gradient_norm=products.squared_norm.sqrt(),
                product=mode_taken(oracle, "hessian", self.product) if self.value_gradient == "unrolled" else None,
            ),
        )

    def terms(self, oracle: Oracle) -> Terms:
        """Evaluate f, q and their gradients; the lower loss first, so that it is the one that moves buffers."""
        unrolled = self.value_gradient == "unrolled"
        g = oracle.lower()
        rule = self.inner_rule()
        walk = descend(oracle, rule, self.inner_steps, first=g, keep=self.inner_steps if unrolled else 0)
        # With w_T constant only alpha's gradient is needed there: the evaluation is forward-only through the lower
        # model.
        wrt: Wrt = "upper" if self.value_gradient == "value_function" else "both"
        near = oracle.lower_precisely(g, wrt=wrt)
        with oracle.precisely():
            ahead = oracle.lower(walk.end, wrt=wrt)
        q_upper = near.upper - ahead.upper
        q_lower = near.lower - ahead.lower if self.value_gradient == "difference" else g.lower
        if unrolled:
            through = adjoint(oracle, rule, walk.steps, ahead.lower, product=self.product, to_start=True)
            q_upper, q_lower = q_upper - through[0], near.lower - through[1]
        wide = accumulation_dtype(g.value.device)
        constraint = near.value.to(wide) - ahead.value.to(wide)
        f = oracle.upper()
        return Terms(f, g, walk.end, constraint, q_upper, q_lower)

    def cone(self, current: Vector, inner_point: Vector) -> Cone | None:
        """The directions in which the levels can move from where their steps start; None: in all."""
        if not (self.upper_set.bounded or self.lower_set.bounded):
            return None
        at = inner_point if self.step_from == "lookahead" else current
        upper = Vector((x.detach() for x in self.upper_level.tensors), self.upper_names)
        return Cone(self.upper_set, self.lower_set, upper, at)

    def checks(self, checker: Checker) -> Iterator[Check]:
        """Gradients of F, G and q, Q, the multiplier, the directions: from the equations above by plain autograd."""
        if self.starts > 1:
            yield from super().checks(checker)
            return
        with checker.oracle() as oracle:
            terms = self.terms(oracle)
        with checker.oracle() as oracle:
            answer = self.compute(oracle)
        yield from barrier_checks(self, checker, terms, answer)


def _on(evaluation: Evaluation, product: Tensor) -> Tensor:
    """Bring a product to the device of a loss: the levels may live on different ones."""
    return product.to(evaluation.value.device, non_blocking=True)
