"""BSG-1: bilevel stochastic gradient with a rank-one Hessian (Giovannelli, Kent and Vicente)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from ..directions import Directions, Stats
from ..evaluation.oracle import Oracle
from ..hypergradient import train
from ..optimizer import orders
from ..optimizer.base import BilevelOptimizer, Common
from ..settings import Setting, numeric


class BSG1(BilevelOptimizer[Stats]):
    r"""Real lower steps, then the implicit hypergradient with gradients in the place of second derivatives.

    .. math::
        w &\leftarrow T \text{ steps of your lower optimizer along } \nabla_w G(w, \alpha) \\
        \alpha &\leftarrow \alpha - \eta_\alpha \Big( \nabla_\alpha F - \frac{\langle \nabla_w F, \nabla_w G \rangle}
            {\|\nabla_w G\|^2 + \varepsilon}\, \nabla_\alpha G \Big), \quad \text{all at the w reached}

    In :math:`\nabla_\alpha F - G_{\alpha w} G_{ww}^{-1} \nabla_w F` the outer products of gradients, :math:`\nabla_w G
    \nabla_w G^\top` for :math:`G_{ww}` and :math:`\nabla_\alpha G\, \nabla_w G^\top` for :math:`G_{\alpha w}`, leave
    one ratio (the pseudo-inverse of a matrix of rank one). It is a heuristic: of :math:`\nabla_w F` only the part along
    :math:`\nabla_w G` counts, and the nearer the lower problem is to its solution, the less can be said of it; where
    :math:`\nabla_w G = 0` it knows nothing. We offer it to compare with. With a ``lower_projection`` only the part of
    :math:`-\nabla_w G` along which w can move takes the place of second derivatives.

    Differences from the code in BOME's scripts: your torch optimizers take the steps; the last lower batch serves
    :math:`\nabla G`.

    Args:
        upper_loss: F, called once per step, after the lower steps; see :class:`bilevel.BilevelOptimizer` for the
            closures and the arguments of both levels.
        lower_loss: G, called ``inner_steps + 1`` times per step.
        inner_steps: T >= 1; default 1.
        eps: :math:`\varepsilon` >= 0; default 1e-8, as in BOME's scripts.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        ``inner_steps + 1`` gradients of G, one of F. Memory: one copy of the lower variables.

    Example:
        >>> import torch, bilevel
        >>> alpha, w = torch.zeros((), requires_grad=True), torch.full((), 2.0, requires_grad=True)
        >>> optimizer = bilevel.BSG1(
        ...     lambda: (w - 1) ** 2, lambda: (w - alpha) ** 2, upper=alpha, lower=w,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ... )
        >>> for _ in range(200):
        ...     stats = optimizer.step()
        >>> print(f"{w.item():.2f}")
        1.00

    References:
        Giovannelli, Kent and Vicente, `Inexact bilevel stochastic gradient methods for constrained and unconstrained
        lower-level problems <https://arxiv.org/abs/2110.00604>`_, 2021.
    """

    order = orders.TRAIN_THEN_CORRECT
    eps = Setting[float](numeric(0.0))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        eps: float = 1e-8,
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.inner_steps, self.eps, self.atomic = inner_steps, eps, atomic
        super().__init__(upper_loss, lower_loss, **common)

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        first = train(oracle, self.inner_steps, gradients="last").first
        f = oracle.upper()
        # At the current point, but as a look: it is no step of training, along which buffers would move again.
        g = oracle.lower(oracle.point().clone(), batch=self.inner_steps - 1)
        slope = -self.lower_set.tangent(oracle.point(), -g.lower) if self.lower_set.bounded else g.lower
        ratio = f.lower.dot(slope) / (slope.squared_norm() + self.eps)
        return Directions(
            upper=f.upper - ratio * g.upper,
            stats=Stats.of(f, first),
        )
