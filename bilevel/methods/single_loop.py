"""What single-loop methods share: w, the solution v of the linear system, and alpha move a step each, all at once."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor

from ..directions import Stats
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..feasible import FixedPointMap
from ..hypergradient import ProductMode, hessian_product, mode_taken
from ..hypergradient.modes import PRODUCT_MODES
from ..lower_steps import GradientDescent
from ..optimizer.base import BilevelOptimizer, Common
from ..settings import Setting, chosen, numeric
from ..vectors import Vector


@dataclass(frozen=True, kw_only=True)
class SingleLoopStats(Stats):
    """The numbers of one step of a single-loop method.

    Attributes:
        residual: ``|G_ww v + grad_w F| / |grad_w F|`` at the v that the step began with. One that grows means that the
            rate of v is too large; one that stays, that v lags behind, or that G has a flat direction.
        product: Mode of the products of G that was taken.

    Example:
        >>> import torch, bilevel
        >>> one = torch.tensor(1.0)
        >>> bilevel.SingleLoopStats(one, one, residual=0.5 * one, product="reverse").as_dict()["residual"]
        0.5
    """

    residual: Tensor
    product: str | None = None


@dataclass(frozen=True)
class Sample:
    """What one step sees: both losses at the current point, and the products of G with v."""

    f: Evaluation
    g: Evaluation
    mixed: Vector
    hessian: Vector
    bounds: FixedPointMap | None = None
    v: Vector | None = None

    def system(self, curved: Vector) -> Vector:
        """Return the direction of v from ``G_ww v + grad_w F``: that, or where there are bounds its free part."""
        return curved if self.bounds is None or self.v is None else self.bounds.system(self.v, curved)


class SingleLoop(BilevelOptimizer[SingleLoopStats], ABC):
    """The directions of Dagréou et al.: ``D_w = G_w``, ``D_v = G_ww v + F_w``, ``D_alpha = G_aw v + F_a``.

    With a ``lower_projection`` v is the y of :class:`bilevel.feasible.FixedPointMap`: D y takes the place of v in the
    products, and its system that of the linear system.
    """

    product = Setting[ProductMode](chosen(*PRODUCT_MODES))
    system_lr = Setting[float | None](numeric(0.0, exclusive=True, optional=True))

    def __init__(
        self,
        *losses: Any,
        system_lr: float | None = None,
        product: ProductMode = "auto",
        **common: Unpack[Common],
    ) -> None:
        self.system_lr, self.product = system_lr, product
        super().__init__(*losses, **common)
        self.v = self.lower_state("v", start="zeros", reduction="mean")  # its step is linear in what tasks average

    def sample(self, oracle: Oracle, g: Evaluation | None = None, gradient: Vector | None = None) -> Sample:
        """Look at both losses on the batches of this step; ``g``: G where it is known already, ``gradient``: the better
        estimate of its gradient, which says what bounds are active.
        """
        g = g or oracle.lower(wrt="lower")
        bounds, v = None, self.v.value
        if self.lower_set.bounded:
            slope = g.lower if gradient is None else gradient
            bounds = FixedPointMap(self.lower_set, oracle.point(), slope, self.lower_rates())
        mixed, hessian = hessian_product(oracle, v if bounds is None else bounds.free(v), product=self.product)
        oracle.check_dependence(mixed)
        return Sample(oracle.upper(), g, mixed, hessian, bounds, v)

    def next_v(self, direction: Vector) -> Vector:
        """Return v after its step: gradient descent."""
        rule = GradientDescent(self.lower_rates(self.system_lr))
        return direction.like(rule.step(self.v.value, direction, rule.start())[0])

    def numbers(self, oracle: Oracle, at: Sample) -> SingleLoopStats:
        """Return the stats of a step."""
        return SingleLoopStats.of(
            at.f,
            at.g,
            residual=at.system(at.hessian + at.f.lower).norm() / at.f.lower.norm(),
            product=mode_taken(oracle, "hessian", self.product),
        )
