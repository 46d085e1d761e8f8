"""BVFSM: bi-level value-function-based sequential minimization (Liu, Liu, Zeng, Zhang and Zhang, TPAMI 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

from torch import Tensor

from ..directions import Directions
from ..errors import message
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..optimizer import orders
from ..optimizer.base import Common
from ..penalty import Power, Scheduled, scheduled
from ..settings import Fixed, Setting, chosen, counted, numeric
from ..vectors import Vector, accumulation_dtype, present
from .penalty_method import PenaltyMethod, PenaltyStats, difference
from .starts import Starts, check_starts, look

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
        starts: Copies of z that walk from points of their own; default 1. With more, for ``argument="released"``
            alone, the lowest end takes the place of z, and after its T steps w moves to the end y with the smallest
            :math:`F + \theta \|y\|^2 + \tfrac{\sigma}{A} G` where its own is larger. The direction is taken where w is
            then. Fixed at construction.
        spread: How far from w the further copies begin, as a standard deviation; default 1.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        ``value_steps`` gradients of G at z, ``inner_steps`` of G and of F at w, all in w; then two evaluations of G and
        one of F that are forward-only through the lower module. Memory: z, from step to step. With n
        ``starts``: n walks of z, an evaluation of both losses at each end and one more where w goes, all forward-only
        through the lower module; n copies.

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
    starts = Fixed[int]()
    spread = Setting[float](numeric(0.0, exclusive=True))

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
        starts: int = 1,
        spread: float = 1.0,
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.regularisation, self.decay = regularisation, decay
        self.inner_steps, self.value_steps, self.inner_lr = inner_steps, value_steps, inner_lr
        self.slack, self.argument, self.atomic = slack, argument, atomic
        self.spread = spread
        check_starts(type(self).__name__, starts)
        self.__dict__.update(starts=starts)
        super().__init__(upper_loss, lower_loss, penalty=penalty, **common)
        self._check_starts()
        self._starts = Starts(self, starts, lambda: self.spread)
        self._z = self.lower_state("z", start="variables", reduction="mean")

    def compute(self, oracle: Oracle) -> Directions[PenaltyStats]:
        sigma, mu, theta = (self.scheduled(x) for x in (self.penalty, self.regularisation, self.decay))
        g = first = oracle.lower(wrt="lower")
        z = self._walk(oracle, self._z.value, mu)
        if self.starts > 1:
            return self._from_the_best(oracle, g, z, (sigma, mu, theta))
        with oracle.precisely():
            value = oracle.lower(z, wrt="upper")
        bound = value.value + mu * z.squared_norm().to(value.value.device) + self._slack(z)
        start = self._train(oracle, g, bound, sigma, theta)
        with oracle.precisely():
            g = oracle.lower(wrt="upper")
        f = oracle.upper(wrt="upper")
        return Directions(
            upper=f.upper + self._weight(sigma, bound, g.value) * (g.upper - value.upper),
            state={**self.stepped(), "z": z},
            stats=PenaltyStats.of(start, first, penalty=sigma, constraint=difference(g.value, value.value)),
        )

    def _train(self, oracle: Oracle, g: Evaluation, bound: Tensor, sigma: float, theta: float) -> Evaluation:
        """Take the T real steps of w from where G is ``g``, and return F there."""
        f = start = oracle.upper(wrt="lower")
        for t in range(self.inner_steps):
            if t > 0:
                g, f = oracle.lower(batch=t, wrt="lower"), oracle.upper(wrt="lower")
            slope = f.lower + self._weight(sigma, bound, g.value) * g.lower
            oracle.train(_with_decay(slope, 2 * theta, oracle.point()))
        return start

    def _from_the_best(
        self, oracle: Oracle, first: Evaluation, z: Vector, weights: tuple[float, float, float]
    ) -> Directions[PenaltyStats]:
        """The same with several copies: the lowest end for z, and w where what it descends on is smallest."""
        sigma, mu, theta = weights
        self._check_starts()
        ends = [z, *self._starts.others(lambda y: self._walk(oracle, y, mu))]  # begin around w, before it moves
        with oracle.precisely():
            found = look(oracle, ends, regular=lambda y: mu * y.squared_norm())
        bound = found.bound + self._slack(z)
        start = self._train(oracle, first, bound, sigma, theta)
        with oracle.precisely():
            g_here = oracle.lower(wrt="upper")
        f_here = oracle.upper(wrt="upper")
        weight = self._weight(sigma, bound, g_here.value)
        points = [oracle.point(), *ends]
        fs, gs = [f_here.value, *found.upper_values], [g_here.value, *found.lower_values]
        point, which = found.best(
            oracle, [self._objective(f, g, weight, theta, y) for f, g, y in zip(fs, gs, points, strict=True)]
        )
        with oracle.precisely():
            g_there = oracle.lower(point, wrt="upper")
        f_there = oracle.upper(point, wrt="upper")
        return Directions(
            upper=f_there.upper + weight * (g_there.upper - found.gradient),
            start=point,
            state={**self.stepped(), "z": z, **self._starts.state(found)},
            stats=PenaltyStats.of(
                start, first, penalty=sigma, constraint=difference(g_here.value, found.lowest), chosen=which
            ),
        )

    def _objective(self, f: Tensor, g: Tensor, weight: Tensor, theta: float, y: Vector) -> Tensor:
        """What w descends on, up to a constant, with the barrier by its weight."""
        wide, device = accumulation_dtype(g.device), g.device
        decay = theta * y.squared_norm().to(device, wide)
        return f.to(device, wide) + decay + weight * g.to(wide)

    def _check_starts(self) -> None:
        if self.starts > 1 and self.argument != "released":
            advice = 'goes with argument="released" alone: w may be outside of the barrier of a lower copy. Leave it.'
            raise ValueError(message(type(self).__name__, "starts", self.starts, advice))

    def _walk(self, oracle: Oracle, z: Vector, mu: float) -> Vector:
        """Take the steps of z, or of a copy of it."""
        rule = self.inner_rule()
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
