"""BVFSM: bi-level value-function-based sequential minimization (Liu, Liu, Zeng, Zhang and Zhang, TPAMI 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

from torch import Tensor

from ..directions import Directions
from ..evaluation.oracle import Oracle
from ..optimizer import orders
from ..optimizer.base import Common
from ..penalty import Power, Scheduled, scheduled
from ..settings import Setting, chosen, counted, numeric
from ..vectors import Vector, present
from .penalty_method import PenaltyMethod, PenaltyStats, difference

Argument = Literal["released", "paper"]


class BVFSM(PenaltyMethod[PenaltyStats]):
    r"""A logarithmic barrier on the value function, with vanishing regularisation: several lower minima, first-order.

    .. math::
        z &\leftarrow z - a\,(\nabla_w G(z, \alpha) + 2 \mu z), \quad T_z \text{ times} \\
        P(w, \alpha) &= F(w, \alpha) + \theta \|w\|^2 - \sigma \log A, \quad
            A = G(z, \alpha) + \mu \|z\|^2 + c - G(w, \alpha) \\
        w &\leftarrow \text{your lower optimizer's step along } \nabla_w P = \nabla_w F + 2 \theta w
            + \tfrac{\sigma}{A} \nabla_w G(w, \alpha), \quad T \text{ times} \\
        \alpha &\leftarrow \alpha - \eta_\alpha \Big( \nabla_\alpha F(w, \alpha)
            - \tfrac{\sigma}{A} (\nabla_\alpha G(z, \alpha) - \nabla_\alpha G(w, \alpha)) \Big)

    z estimates the value function, regularised by :math:`\mu`; w minimises the upper loss inside the barrier; as
    :math:`\mu, \theta, \sigma \to 0` in the steps (sequential minimization), the answers go to that of the bilevel
    problem. z and w go on from where they were.

    The authors' released code evaluates the barrier at :math:`A = G(z, \alpha) + \mu \|z\|^2 + c`: there :math:`-G(w)`
    counts for its gradient alone, so that A is positive wherever w is, and c is the number of lower variables. That is
    ``argument="released"``, the default. Its weight of G falls with :math:`\sigma`: over many steps let :math:`\mu` and
    :math:`\theta` fall, and keep :math:`\sigma`. ``"paper"`` is A as above, which must be positive: the NaN that it is
    elsewhere is treated as ``on_nonfinite`` says. As the full text of the paper was not at hand, there are no equation
    numbers; the formulas are those of the code. Functional constraints and the pessimistic problem are not offered.

    Args:
        upper_loss: F, called ``inner_steps + 1`` times per step; see :class:`bilevel.BilevelOptimizer` for the closures
            and the arguments of both levels.
        lower_loss: G, called ``inner_steps + value_steps + 2`` times per step.
        penalty: :math:`\sigma` >= 0, weight of the barrier: a number or a schedule of :mod:`bilevel.penalty`. Default
            ``Power(0.001, -1.1)``, as in that code's demo.
        regularisation: :math:`\mu` >= 0, the same; default ``Power(0.01, -1.1)``.
        decay: :math:`\theta` >= 0, the same; default ``Power(0.01, -1.1)``. (The code's other decays are
            ``Logarithmic(...)`` and ``Power(..., -1.0)``.)
        inner_steps: T >= 1, real steps of w; default 25, as in that demo.
        value_steps: :math:`T_z` >= 1, steps of z; default 50.
        inner_lr: a > 0. Default: the lower optimizer's current learning rate, per parameter group.
        slack: c > 0; default None: the number of lower variables, plus 1e-8, as in that code (BOME's code has 1e-4).
        argument: ``"released"`` (default) or ``"paper"``: what A is.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        ``value_steps`` gradients of G at z, ``inner_steps`` of G and of F at w, all in w; then two evaluations of G and
        one of F that are forward-only through the lower module. Memory: z, from step to step.

    Example:
        >>> import torch, bilevel
        >>> alpha, w = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.BVFSM(
        ...     lambda: (w - 1) ** 2, lambda: (w - alpha) ** 2, upper=alpha, lower=w,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ...     penalty=1.0, slack=1.0,
        ... )
        >>> for _ in range(200):
        ...     stats = optimizer.step()
        >>> print(f"{alpha.item():.2f} {w.item():.2f}")
        1.00 1.00

    References:
        Liu, Liu, Zeng, Zhang and Zhang, `Value-Function-based Sequential Minimization for Bi-level Optimization
        <https://arxiv.org/abs/2110.04974>`_, TPAMI 2023, and its code ``vis-opt-group/BVFSM``.
    """

    walks_virtually = True
    order = orders.TRAIN_THEN_CORRECT
    regularisation = Setting[Scheduled](scheduled(0.0))
    decay = Setting[Scheduled](scheduled(0.0))
    value_steps = Setting[int](counted(1))
    slack = Setting[float | None](numeric(0.0, exclusive=True, optional=True))
    argument = Setting[Argument](chosen("released", "paper"))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        penalty: Scheduled = Power(0.001, -1.1),
        regularisation: Scheduled = Power(0.01, -1.1),
        decay: Scheduled = Power(0.01, -1.1),
        inner_steps: int = 25,
        value_steps: int = 50,
        inner_lr: float | None = None,
        slack: float | None = None,
        argument: Argument = "released",
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.regularisation, self.decay = regularisation, decay
        self.inner_steps, self.value_steps, self.inner_lr = inner_steps, value_steps, inner_lr
        self.slack, self.argument, self.atomic = slack, argument, atomic
        super().__init__(upper_loss, lower_loss, penalty=penalty, **common)
        self._z = self.lower_state("z", start="variables", reduction="mean")

    def compute(self, oracle: Oracle) -> Directions[PenaltyStats]:
        sigma, mu, theta = (self.scheduled(x) for x in (self.penalty, self.regularisation, self.decay))
        g = first = oracle.lower(wrt="lower")
        z = self._walk(oracle, mu)
        with oracle.precisely():
            value = oracle.lower(z, wrt="upper")
        bound = value.value + mu * z.squared_norm().to(value.value.device) + self._slack(z)
        f = start = oracle.upper(wrt="lower")
        for t in range(self.inner_steps):
            if t > 0:
                g, f = oracle.lower(batch=t, wrt="lower"), oracle.upper(wrt="lower")
            slope = f.lower + self._weight(sigma, bound, g.value) * g.lower
            oracle.train(_with_decay(slope, 2 * theta, oracle.point()))
        with oracle.precisely():
            g = oracle.lower(wrt="upper")
        f = oracle.upper(wrt="upper")
        return Directions(
            upper=f.upper + self._weight(sigma, bound, g.value) * (g.upper - value.upper),
            state={**self.stepped(), "z": z},
            stats=PenaltyStats.of(start, first, penalty=sigma, constraint=difference(g.value, value.value)),
        )

    def _walk(self, oracle: Oracle, mu: float) -> Vector:
        """Take the steps of z."""
        z, rule = self._z.value, self.inner_rule()
        for t in range(self.value_steps):
            slope = _with_decay(oracle.lower(z, batch=t, wrt="lower").lower, 2 * mu, z)
            z = z.like(rule.step(z, slope, rule.start())[0])
        return z

    def _weight(self, sigma: float, bound: Tensor, g: Tensor) -> Tensor:
        """``sigma / A``; NaN outside the barrier."""
        argument = bound if self.argument == "released" else difference(bound, g)
        return sigma / argument.where(argument > 0, float("nan"))

    def _slack(self, z: Vector) -> float:
        return sum(x.numel() for x in z if x is not None) + 1e-8 if self.slack is None else self.slack


def _with_decay(slope: Vector, weight: float, point: Vector) -> Vector:
    """Return ``slope + weight point``; variables that no loss uses stand still, as everywhere."""
    return slope.like(None if s is None else s + weight * x for s, x in zip(slope, present(point), strict=True))
