"""G-PBGD: penalty-based bilevel gradient descent on the lower gradient's norm (Shen and Chen, ICML 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

from ..directions import Directions
from ..evaluation.oracle import Oracle
from ..hypergradient import ProductMode, hessian_product, mode_taken
from ..hypergradient.modes import PRODUCT_MODES
from ..optimizer.base import Common
from ..penalty import Scheduled
from ..settings import Setting, chosen
from ..vectors import Vector, present
from .penalty_method import PenaltyMethod, PenaltyStats


@dataclass(frozen=True, kw_only=True)
class GPBGDStats(PenaltyStats):
    """The numbers of one step of :class:`GPBGD`; ``constraint`` is ``|grad_w G|^2 / 2``.

    Attributes:
        product: Mode of the products of G that was taken.

    Example:
        >>> import torch, bilevel
        >>> one = torch.tensor(1.0)
        >>> bilevel.GPBGDStats(one, one, penalty=10.0, constraint=one, product="reverse").product
        'reverse'
    """

    product: str | None = None


class GPBGD(PenaltyMethod[GPBGDStats]):
    r"""Descent on F plus a penalty on the gradient of G: no walk, one Hessian product.

    .. math::
        (w, \alpha) &\leftarrow (w, \alpha) - \eta\, s \Big( \nabla F(w, \alpha)
            + \tfrac{\gamma}{2} \nabla \|\nabla_w G(w, \alpha)\|^2 \Big), \qquad s = \min(1 / \gamma, 1) \\
        \tfrac{1}{2} \nabla_w \|\nabla_w G\|^2 &= G_{ww} \nabla_w G, \qquad
            \tfrac{1}{2} \nabla_\alpha \|\nabla_w G\|^2 = G_{\alpha w} \nabla_w G

    The gradient's norm stands for the value gap of :class:`VPBGD`, with which it goes together where G satisfies the
    Polyak-Łojasiewicz inequality. Where it does not, every stationary point of G meets the constraint, saddles and
    maxima included. Differences from the authors' code: as of :class:`VPBGD`. The factor 1/2 is that code's; the
    paper's penalty is without it.

    With a ``lower_projection`` P the gradient of G does not vanish at an active bound. What is penalised then is the
    residual :math:`r = w - P(z)`, :math:`z = w - \nabla_w G`, which does: the products above are along :math:`P'(z)\,
    r`, and :math:`\nabla_w` has :math:`r - P'(z)\, r` besides.

    Args:
        upper_loss: F, called once per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels.
        lower_loss: G, called twice per step: a gradient, and both blocks of its Hessian along it.
        penalty: :math:`\gamma` >= 0, a number or a schedule of :mod:`bilevel.penalty`. Default 10; the authors' data
            hyper-cleaning code has ``Linear(0.0, slope=37 / 5000, maximum=37.0)``.
        normalise: Whether directions are scaled by s (default True, as in that code).
        product: Mode of the product of G.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        One gradient of G, one Hessian product of G, one gradient of F. Memory: the graph of one gradient of G.

    Example:
        >>> import torch, bilevel
        >>> alpha, w = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.GPBGD(
        ...     lambda: (w - 1) ** 2, lambda: (w - alpha) ** 2, upper=alpha, lower=w, product="reverse",
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ...     penalty=2.0,
        ... )
        >>> for _ in range(300):
        ...     stats = optimizer.step()
        >>> print(f"{alpha.item():.3f} {w.item():.3f}")
        1.000 1.000

    References:
        Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method <https://arxiv.org/abs/2302.05185>`_, ICML
        2023, and its code.
    """

    normalise = Setting[bool](chosen(True, False))
    product = Setting[ProductMode](chosen(*PRODUCT_MODES))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        penalty: Scheduled = 10.0,
        normalise: bool = True,
        product: ProductMode = "auto",
        **common: Unpack[Common],
    ) -> None:
        self.normalise, self.product = normalise, product
        super().__init__(upper_loss, lower_loss, penalty=penalty, **common)

    def compute(self, oracle: Oracle) -> Directions[GPBGDStats]:
        gamma = self.scheduled(self.penalty)
        scale = min(1 / (gamma + 1e-8), 1.0) if self.normalise else 1.0
        g = oracle.lower(wrt="lower")
        residual, free = self._residual(oracle.point(), g.lower)
        mixed, hessian = hessian_product(oracle, free, product=self.product)
        oracle.check_dependence(mixed)
        f = oracle.upper()
        return Directions(
            upper=scale * (f.upper + gamma * mixed),
            lower=scale * (f.lower + gamma * (hessian if residual is free else hessian + residual - free)),
            state=self.stepped(),
            stats=GPBGDStats.of(
                f,
                g,
                penalty=gamma,
                constraint=0.5 * residual.squared_norm(),
                product=mode_taken(oracle, "hessian", self.product),
            ),
        )

    def _residual(self, point: Vector, gradient: Vector) -> tuple[Vector, Vector]:
        """Return ``r = w - P(z)`` with ``z = w - grad_w G``, and ``P'(z) r``; the gradient twice without a P."""
        if not self.lower_set.bounded:
            return gradient, gradient
        z = point - gradient
        # From what the projection moves: inside the set r is the gradient to the last bit.
        residual = gradient.like(
            None if g is None else g + (x - y)
            for g, x, y in zip(gradient, present(z), self.lower_set.project(z), strict=True)
        )
        return residual, self.lower_set.derivative(z)(residual)
