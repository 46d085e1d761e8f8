"""MEHA: Moreau envelope based Hessian-free algorithm (Liu, Liu, Yao, Zeng and Zhang, ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from ..directions import Directions
from ..evaluation.oracle import Oracle
from ..optimizer import orders
from ..optimizer.base import Common
from ..penalty import Power, Scheduled, scheduled
from ..settings import Setting, numeric
from ..vectors import Vector
from .penalty_method import PenaltyMethod, PenaltyStats, difference


class MEHA(PenaltyMethod[PenaltyStats]):
    r"""A penalty on the gap to the Moreau envelope of G, in a single loop: for lower losses that are not convex.

    .. math::
        v_\gamma(w, \alpha) &= \min_\theta \; G(\theta, \alpha) + \tfrac{1}{2 \gamma} \|\theta - w\|^2 \\
        \theta &\leftarrow \theta - \eta\,\big( \nabla_w G(\theta, \alpha) + \tfrac{1}{\gamma} (\theta - w) \big) \\
        w &\leftarrow \text{your lower optimizer's step along } \tfrac{1}{c} \nabla_w F(w, \alpha)
            + \nabla_w G(w, \alpha) - \tfrac{1}{\gamma} (w - \theta) \\
        \alpha &\leftarrow \alpha - \eta_\alpha \Big( \tfrac{1}{c} \nabla_\alpha F(w, \alpha)
            + \nabla_\alpha G(w, \alpha) - \nabla_\alpha G(\theta, \alpha) \Big)

    :math:`G - v_\gamma \le 0` stands for the lower problem: it holds at its stationary points, and where G is weakly
    convex and :math:`\gamma` small, the envelope's problem has one solution, which one step on :math:`\theta` follows.
    The directions are the gradient of :math:`F / c + G - v_\gamma` with :math:`\theta` in the place of that solution.
    :math:`c = c_k` grows as :math:`\underline{c} (k + 1)^p` with p in (0, 1/2).

    Differences: the paper moves :math:`\theta, \alpha, w` in turn, each with the newest of the others; the authors'
    library (BOAT) :math:`\theta, w, \alpha`, and so do we: the real lower step comes before the upper one. The lower
    loss has no nonsmooth part, whose proximal step the paper has. The full text was not at hand: there are no equation
    numbers.

    Args:
        upper_loss: F, called twice per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels.
        lower_loss: G, called four times per step.
        penalty: c > 0, a number or a schedule of :mod:`bilevel.penalty`. Default ``Power(1.0, 0.25)``; BOAT has that
            exponent.
        gamma: :math:`\gamma` > 0, of the envelope; default 1. Less than 1 / the most negative curvature of G.
        inner_lr: :math:`\eta` > 0. Default: the lower optimizer's current learning rate, per parameter group.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        Two gradients of G and one of F, in w alone; two evaluations of G and one of F that are forward-only through the
        lower module. Memory: :math:`\theta`, from step to step.

    Example:
        >>> import torch, bilevel
        >>> alpha, w = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.MEHA(
        ...     lambda: (w - 1) ** 2, lambda: (w - alpha) ** 2, upper=alpha, lower=w,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ... )
        >>> for _ in range(400):
        ...     stats = optimizer.step()
        >>> print(f"{alpha.item():.3f} {w.item():.3f}")
        1.000 1.000

    References:
        Liu, Liu, Yao, Zeng and Zhang, `Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-loop and
        Hessian-free Solution Strategy <https://arxiv.org/abs/2405.09927>`_, ICML 2024.
    """

    walks_virtually = True
    order = orders.TRAIN_THEN_CORRECT
    penalty = Setting[Scheduled](scheduled(0.0, exclusive=True))
    gamma = Setting[float](numeric(0.0, exclusive=True))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        penalty: Scheduled = Power(1.0, 0.25),
        gamma: float = 1.0,
        inner_lr: float | None = None,
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.gamma, self.inner_lr, self.atomic = gamma, inner_lr, atomic
        super().__init__(upper_loss, lower_loss, penalty=penalty, **common)
        self._theta = self.lower_state("theta", start="variables", reduction="mean")

    def compute(self, oracle: Oracle) -> Directions[PenaltyStats]:
        c = self.scheduled(self.penalty)
        theta, rule = self._theta.value, self.inner_rule()
        g = oracle.lower(wrt="lower")
        slope = oracle.lower(theta, wrt="lower").lower
        pulled = slope + _where(slope, (1 / self.gamma) * (theta - oracle.point()))
        theta = theta.like(rule.step(theta, pulled, rule.start())[0])
        f = oracle.upper(wrt="lower")
        slope = (1 / c) * f.lower + g.lower
        oracle.train(slope - _where(slope, (1 / self.gamma) * (oracle.point() - theta)))

        with oracle.precisely():
            ahead, here = oracle.lower(theta, wrt="upper"), oracle.lower(wrt="upper")
        above = oracle.upper(wrt="upper")
        envelope = (0.5 / self.gamma) * (theta - oracle.point()).squared_norm().to(here.value.device)
        return Directions(
            upper=(1 / c) * above.upper + here.upper - ahead.upper,
            state={**self.stepped(), "theta": theta},
            stats=PenaltyStats.of(f, g, penalty=c, constraint=difference(here.value, ahead.value) - envelope),
        )


def _where(slope: Vector, pull: Vector) -> Vector:
    """Return ``pull`` where the losses have a slope: variables that they do not use stand still, as everywhere."""
    return pull.like(None if s is None else x for s, x in zip(slope, pull, strict=True))
