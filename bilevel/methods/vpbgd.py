"""V-PBGD: penalty-based bilevel gradient descent on the value function (Shen and Chen, ICML 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

from ..directions import Directions
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import descend
from ..optimizer.base import Common
from ..penalty import Scheduled
from ..settings import Fixed, Setting, chosen, numeric
from ..vectors import Vector
from .penalty_method import PenaltyMethod, PenaltyStats, difference
from .starts import Starts, check_starts


class VPBGD(PenaltyMethod[PenaltyStats]):
    r"""Descent on F plus a penalty on how far G is above its minimum: BOME with a multiplier that you choose.

    .. math::
        \omega_{t+1} &= \omega_t - a\,\nabla_w G(\omega_t, \alpha), \quad t < T \\
        (w, \alpha) &\leftarrow (w, \alpha) - \eta\, s \big( \nabla F(w, \alpha)
            + \gamma\,(\nabla G(w, \alpha) - \nabla G(\omega_T, \alpha)) \big), \quad \omega_T \text{ constant} \\
        s &= \min(1 / \gamma, 1)

    The penalised problem is the paper's (:math:`\gamma`-penalty with :math:`p = G - \min G`); that :math:`\omega_T` is
    a constant is its equation for the gradient of the value function (Danskin), so that only :math:`\nabla_\alpha` sees
    it. Both levels move at once. Its minimiser is :math:`O(1/\gamma)` from that of the bilevel problem; where F is
    smallest, over both levels, at a pair that solves the lower problem, any :math:`\gamma > 0` is exact.

    Differences from the authors' code: your torch optimizers take the step, projections are ``upper_projection`` and
    ``lower_projection``; s and the order of updates are that code's, the paper folds s into its step size.

    Args:
        upper_loss: F, called once per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels.
        lower_loss: G, called ``inner_steps + 2`` times per step, with ``start="current"`` once less.
        penalty: :math:`\gamma` >= 0, a number or a schedule of :mod:`bilevel.penalty`. Default 10, as in the paper's
            toy problem; its data hyper-cleaning code has ``Linear(0.0, slope=0.2 / 30000, maximum=0.2)``. Larger: less
            bias, smaller steps.
        inner_steps: T >= 1; default 1, as in that code.
        inner_lr: a > 0. Default: the lower optimizer's current learning rate, per parameter group.
        start: Where the walk begins. ``"last"`` (default, that code): where it ended in the last step, at first at w.
            ``"current"``: at w, as in BOME; for other data in each step, or w set by hand.
        starts: Copies of :math:`\omega` that walk from points of their own; default 1. With more, the lowest end takes
            the place of :math:`\omega_T`, and w moves to the end with the smallest :math:`F + \gamma (G - \min G)`
            where its own is larger: for lower problems with several minima. Fixed at construction.
        spread: How far from w the further copies begin, as a standard deviation; default 1.
        normalise: Whether directions are scaled by s (default True, that code), so that one learning rate serves every
            penalty. That code divides by :math:`\gamma + 10^{-8}`, and so do we.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        ``inner_steps + 1`` gradients of G, one more evaluation that is forward-only through the lower module, and one
        gradient of F; ``start="current"`` saves one gradient of G. Memory: two copies of the lower variables beside the
        gradients, one of them from step to step. With n ``starts``: n walks and n evaluations of both losses at their
        ends, n copies, and one more gradient of each loss.

    Example:
        >>> import torch, bilevel
        >>> alpha, w = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.VPBGD(
        ...     lambda: (w - 1) ** 2, lambda: (w - alpha) ** 2, upper=alpha, lower=w,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ...     penalty=bilevel.penalty.Linear(1.0, slope=0.01, maximum=2.0),
        ... )
        >>> for _ in range(300):
        ...     stats = optimizer.step()
        >>> print(f"{alpha.item():.3f} {w.item():.3f} {stats.penalty}")
        1.000 1.000 2.0

    References:
        Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method <https://arxiv.org/abs/2302.05185>`_, ICML
        2023, algorithm V-PBGD, and its code.
    """

    walks_virtually = True
    start = Setting[Literal["last", "current"]](chosen("last", "current"))
    normalise = Setting[bool](chosen(True, False))
    starts = Fixed[int]()
    spread = Setting[float](numeric(0.0, exclusive=True))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        penalty: Scheduled = 10.0,
        inner_steps: int = 1,
        inner_lr: float | None = None,
        start: Literal["last", "current"] = "last",
        normalise: bool = True,
        starts: int = 1,
        spread: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        self.inner_steps, self.inner_lr = inner_steps, inner_lr
        self.start, self.normalise, self.spread = start, normalise, spread
        check_starts(type(self).__name__, starts)
        self.__dict__.update(starts=starts)
        super().__init__(upper_loss, lower_loss, penalty=penalty, **common)
        # Of several tasks the mean is where one step on the mean of their losses would end.
        self._omega = self.lower_state("omega", start="variables", reduction="mean")
        self._starts = Starts(self, starts, lambda: self.spread)

    def compute(self, oracle: Oracle) -> Directions[PenaltyStats]:
        gamma = self.scheduled(self.penalty)
        scale = min(1 / (gamma + 1e-8), 1.0) if self.normalise else 1.0
        g = oracle.lower()
        begin = {"start": self._omega.value} if self.start == "last" else {"first": g}
        walk = descend(oracle, self.inner_rule(), self.inner_steps, **begin)
        if self.starts > 1:
            return self._from_the_best(oracle, g, walk.end, gamma, scale)
        near = oracle.lower_precisely(g)
        with oracle.precisely():
            ahead = oracle.lower(walk.end, wrt="upper")
        f = oracle.upper()
        return Directions(
            upper=scale * (f.upper + gamma * (near.upper - ahead.upper)),
            lower=scale * (f.lower + gamma * g.lower),
            state={**self.stepped(), "omega": walk.end},
            stats=PenaltyStats.of(f, g, penalty=gamma, constraint=difference(near.value, ahead.value)),
        )

    def _from_the_best(
        self, oracle: Oracle, g: Evaluation, first: Vector, gamma: float, scale: float
    ) -> Directions[PenaltyStats]:
        """The same with several copies: the lowest end for omega_T, and w where the penalised value is smallest."""
        rule = self.inner_rule()
        found = self._starts.walked(oracle, first, lambda y: descend(oracle, rule, self.inner_steps, start=y).end)
        f = oracle.upper()
        point, chosen = found.better(oracle, f, g, gamma)
        f_there, g_there = oracle.upper(point), oracle.lower(point)
        return Directions(
            upper=scale * (f_there.upper + gamma * (g_there.upper - found.gradient)),
            lower=scale * (f_there.lower + gamma * g_there.lower),
            start=point,
            state={**self.stepped(), "omega": first, **self._starts.state(found)},
            stats=PenaltyStats.of(f, g, penalty=gamma, constraint=difference(g.value, found.lowest), chosen=chosen),
        )
