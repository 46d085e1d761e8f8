"""PDBO: a primal-dual bilevel optimizer for several lower minima (Sow, Ji, Guan and Liang, 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from torch import Tensor

from ..directions import Directions, Stats
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import descend
from ..optimizer.base import BilevelOptimizer, Common
from ..settings import Fixed, Setting, chosen, numeric
from ..vectors import Vector
from .penalty_method import difference
from .starts import Starts, check_starts


@dataclass(frozen=True, kw_only=True)
class PDBOStats(Stats):
    r"""The numbers of one step of :class:`PDBO`.

    Attributes:
        multiplier: :math:`\lambda`, after its step; float64. At ``multiplier_max`` the constraint cannot be met: allow
            more, or a larger tolerance.
        constraint: ``G(w, alpha) - G(omega, alpha) - tolerance``; float64. 0 or below: met.
        chosen: With several ``starts``, which end w moved to; 0: it stayed. Else None.

    Example:
        >>> import torch, bilevel
        >>> one = torch.tensor(1.0)
        >>> bilevel.PDBOStats(one, one, multiplier=2 * one, constraint=0 * one).as_dict()["multiplier"]
        2.0
    """

    multiplier: Tensor
    constraint: Tensor
    chosen: Tensor | None = None


class PDBO(BilevelOptimizer[PDBOStats]):
    r"""Gradient descent and ascent on the Lagrangian of ``G - min G <= tolerance``: the multiplier is learned.

    .. math::
        \omega_{t+1} &= \omega_t - a\,\nabla_w G(\omega_t, \alpha), \quad t < T, \qquad
            c_k = G(w, \alpha) - G(\omega_T, \alpha) - \delta \\
        \lambda &\leftarrow \Pi_{[0, B]} \big( \lambda + s\,((1 + \vartheta)\, c_k - \vartheta\, c_{k-1}) \big) \\
        (w, \alpha) &\leftarrow (w, \alpha) - \eta \big( \nabla F(w, \alpha)
            + \lambda\,(\nabla G(w, \alpha) - \nabla G(\omega_T, \alpha)) \big), \quad \omega_T \text{ constant}

    The lower problem is written as a constraint on the value function, relaxed by :math:`\delta` so that a finite
    multiplier exists (without it none balances :math:`\nabla F` where :math:`\nabla G = 0`, and :math:`\lambda` grows
    to B). First-order, and no assumption that the lower minimum is one point. Both levels move at once.

    *What was read*: the abstract and the scheme as others describe it; the full text was not at hand, so there are no
    equation numbers, and this is the generic primal-dual step with the extrapolation of the constraint that accelerated
    primal-dual methods have. Not offered: the proximal variant (PDBO inside a proximal-point loop), the averaging of
    the iterates of its theory, and its regularisation of G, which you can add to the loss.

    Args:
        upper_loss: F, called once per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels.
        lower_loss: G, called ``inner_steps + 2`` times per step, with ``start="current"`` once less.
        tolerance: :math:`\delta` >= 0; default 1e-3. Smaller: less bias, a larger multiplier, smaller rates.
        dual_lr: s > 0, rate of the multiplier; default 0.1. Too large shows as an oscillation that grows.
        multiplier_max: B > 0; default 100.
        extrapolation: :math:`\vartheta` in [0, 1]; default 1, which damps the oscillation of descent against ascent.
        inner_steps: T >= 1; default 1, as the walk goes on from step to step.
        inner_lr: a > 0. Default: the lower optimizer's current learning rate, per parameter group.
        start: ``"last"`` (default): the walk begins where it ended in the last step, at first at w. ``"current"``: w.
        starts: Copies of :math:`\omega` that walk from points of their own; default 1. With more, the lowest end takes
            the place of :math:`\omega_T`, and w moves to the end with the smallest :math:`F + \lambda (G - \min G)`
            where its own is larger: for lower problems with several minima. Fixed at construction.
        spread: How far from w the further copies begin, as a standard deviation; default 1.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        As of :class:`VPBGD`.

    Example:
        >>> import torch, bilevel
        >>> alpha, w = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.PDBO(
        ...     lambda: (w - 1) ** 2, lambda: (w - alpha) ** 2, upper=alpha, lower=w,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ... )
        >>> for _ in range(300):
        ...     stats = optimizer.step()
        >>> print(f"{w.item():.1f}, met: {stats.constraint.item() <= 1e-6}")
        1.0, met: True

    References:
        Sow, Ji, Guan and Liang, `A Primal-Dual Approach to Bilevel Optimization with Multiple Inner Minima
        <https://arxiv.org/abs/2203.01123>`_, 2022.
    """

    walks_virtually = True
    tolerance = Setting[float](numeric(0.0))
    dual_lr = Setting[float](numeric(0.0, exclusive=True))
    multiplier_max = Setting[float](numeric(0.0, exclusive=True))
    extrapolation = Setting[float](numeric(0.0, 1.0))
    start = Setting[Literal["last", "current"]](chosen("last", "current"))
    starts = Fixed[int]()
    spread = Setting[float](numeric(0.0, exclusive=True))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        tolerance: float = 1e-3,
        dual_lr: float = 0.1,
        multiplier_max: float = 100.0,
        extrapolation: float = 1.0,
        inner_steps: int = 1,
        inner_lr: float | None = None,
        start: Literal["last", "current"] = "last",
        starts: int = 1,
        spread: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        self.tolerance, self.dual_lr, self.multiplier_max = tolerance, dual_lr, multiplier_max
        self.extrapolation, self.start = extrapolation, start
        self.inner_steps, self.inner_lr, self.spread = inner_steps, inner_lr, spread
        check_starts(type(self).__name__, starts)
        self.__dict__.update(starts=starts)
        super().__init__(upper_loss, lower_loss, **common)
        # The mean over tasks is what the mean of their losses would give, but where one is clipped.
        self._omega = self.lower_state("omega", start="variables", reduction="mean")
        self._starts = Starts(self, starts, lambda: self.spread)
        self._multiplier = self.number_state("multiplier", 0.0, reduction="mean")
        self._constraint = self.number_state("constraint", 0.0, reduction="mean")

    def compute(self, oracle: Oracle) -> Directions[PDBOStats]:
        g = oracle.lower()
        begin: dict[str, Any] = {"start": self._omega.value} if self.start == "last" else {"first": g}
        walk = descend(oracle, self.inner_rule(), self.inner_steps, **begin)
        if self.starts > 1:
            return self._from_the_best(oracle, g, walk.end)
        near = oracle.lower_precisely(g)
        with oracle.precisely():
            ahead = oracle.lower(walk.end, wrt="upper")
        f = oracle.upper()
        constraint, multiplier = self._ascent(near, ahead.value)
        return Directions(
            upper=f.upper + multiplier * (near.upper - ahead.upper),
            lower=f.lower + multiplier * g.lower,
            state={"omega": walk.end, "multiplier": multiplier, "constraint": constraint},
            stats=PDBOStats.of(f, g, multiplier=multiplier, constraint=constraint),
        )

    def _from_the_best(self, oracle: Oracle, g: Evaluation, first: Vector) -> Directions[PDBOStats]:
        """The same with several copies: the lowest end for omega_T, and w where the Lagrangian is smallest."""
        rule = self.inner_rule()
        found = self._starts.walked(oracle, first, lambda y: descend(oracle, rule, self.inner_steps, start=y).end)
        f = oracle.upper()
        constraint, multiplier = self._ascent(g, found.lowest)
        point, chosen = found.better(oracle, f, g, multiplier)
        f_there, g_there = oracle.upper(point), oracle.lower(point)
        return Directions(
            upper=f_there.upper + multiplier * (g_there.upper - found.gradient),
            lower=f_there.lower + multiplier * g_there.lower,
            start=point,
            state={"omega": first, "multiplier": multiplier, "constraint": constraint, **self._starts.state(found)},
            stats=PDBOStats.of(f, g, multiplier=multiplier, constraint=constraint, chosen=chosen),
        )

    def _ascent(self, g: Evaluation, lowest: Tensor) -> tuple[Tensor, Tensor]:
        """The constraint, and the multiplier after its step."""
        constraint = difference(g.value, lowest) - self.tolerance
        last = self._constraint.value.to(constraint.device) if self._constraint.known else constraint
        ascent = (1 + self.extrapolation) * constraint - self.extrapolation * last
        multiplier = self._multiplier.value.to(constraint.device) + self.dual_lr * ascent
        return constraint, multiplier.clamp(0.0, self.multiplier_max)
