"""F2SA: fully first-order stochastic approximation (Kwon et al., ICML 2023), and F2SA-p (Chen et al., ICLR 2026)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal, Unpack

from ..directions import Directions
from ..errors import count, message
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..optimizer import orders
from ..optimizer.base import Common
from ..penalty import Linear, Scheduled, scheduled
from ..settings import Fixed, Setting, chosen, numeric
from ..vectors import Vector
from .penalty_method import PenaltyMethod, PenaltyStats, difference
from .starts import Starts, check_starts, look


class F2SA(PenaltyMethod[PenaltyStats]):
    r"""The hypergradient as a finite difference of lower problems to which a little of F is added: first-order.

    .. math::
        y_j &\leftarrow y_j - \eta_j\,(\nabla_w G(y_j, \alpha) + j \nu\, \nabla_w F(y_j, \alpha)),
            \quad T \text{ times}, \quad \nu = 1 / \lambda \\
        \alpha &\leftarrow \alpha - \eta_\alpha \sum_j c_j \Big( j\, \nabla_\alpha F(y_j, \alpha)
            + \tfrac{1}{\nu} \nabla_\alpha G(y_j, \alpha) \Big)

    :math:`c_j` are the coefficients of the difference quotient of order p on the points
    :math:`-\lfloor p/2 \rfloor, \dots, \lceil p/2 \rceil`, which has an error of :math:`O(\nu^p)` (F2SA-p, lemma 3.1
    and algorithm 1; equation 9 is p = 1). F2SA is p = 1, with :math:`c_0 = -1, c_1 = 1`: in its letters :math:`y = y_1`
    and :math:`z = y_0`, and the direction is :math:`\nabla_\alpha F(y) + \lambda (\nabla_\alpha G(y) - \nabla_\alpha
    G(z))`. p = 2 is the central difference :math:`c_{\pm 1} = \pm 1/2`: one order better, and it needs no :math:`y_0`.

    The lower variables w are :math:`y_1`: your lower optimizer really takes their T steps. The other copies start at w
    in the first step, take steps of gradient descent, and are remembered.

    Differences from the papers: F2SA steps y along :math:`\nabla F + \lambda_k \nabla G`, with a rate :math:`\alpha_k`
    of its own, which must fall as :math:`\lambda_k` grows; here the copies step as in F2SA-p, where one rate serves
    every penalty, unless you say ``step_scale="penalty"``. Both points of the last difference see the same batches,
    whose noise then cancels; F2SA draws fresh ones. F2SA-p normalises its upper direction, which its authors hold to be
    a matter of the proof: ``normalise``. (F2SA in ``benchopt/benchmark_bilevel`` takes both gradients of F at z.)

    Args:
        upper_loss: F; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments of both levels. With
            ``Batches`` of T + 1 each step of a copy has its own, and the direction the last one.
        lower_loss: G; copy j takes its step t on lower batch t, the direction is taken on the first.
        penalty: :math:`\lambda` > 0, a number or a schedule of :mod:`bilevel.penalty`. Default ``Linear(1.0,
            slope=0.1)``, as in ``benchopt/benchmark_bilevel``; F2SA's theory has it grow as a power of the step.
        p: Order of the difference quotient, >= 1; default 1, F2SA. Fixed at construction.
        inner_steps: T >= 1; default 10, as in that benchmark.
        inner_lr: Rate of the copies other than w. Default: the lower optimizer's current rate, per parameter group.
        step_scale: ``"one"`` (default): copies step along :math:`\nabla G + j \nu \nabla F`. ``"penalty"``: those other
            than :math:`y_0` along :math:`\lambda \nabla G + j \nabla F`, as in F2SA: the lower rate is then its
            :math:`\alpha_k`, and ``inner_lr`` its :math:`\gamma_k`.
        normalise: Whether the upper direction is divided by its norm, as in F2SA-p. Default False.
        starts: Copies of :math:`y_0` that walk from points of their own; default 1. With more, for p = 1 alone, the
            lowest end takes the place of :math:`y_0`, and after its T steps w moves to the end with the smallest
            :math:`F + \lambda (G - \min G)` where its own is larger: for lower problems with several minima. The
            direction is taken where w is then. Fixed at construction.
        spread: How far from w the further copies begin, as a standard deviation; default 1.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        For each copy (p for even p, p + 1 for odd p): T gradients of G and, but for :math:`y_0`, T of F, in w; then
        one evaluation of each that is forward-only through the lower module. Memory: the copies but w, from step to
        step. With n ``starts``: n walks of :math:`y_0`, an evaluation of both losses at each end and one more where w
        goes, all forward-only through the lower module; n copies.

    Example:
        >>> import torch, bilevel
        >>> alpha, w = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.F2SA(
        ...     lambda: (w - 1) ** 2 + alpha**2, lambda: (w - alpha) ** 2, upper=alpha, lower=w,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.2),
        ...     p=2, penalty=10.0,
        ... )
        >>> for _ in range(100):
        ...     stats = optimizer.step()
        >>> print(f"{alpha.item():.2f}")
        0.50

    References:
        Kwon, Kwon, Wright and Nowak, `A Fully First-Order Method for Stochastic Bilevel Optimization
        <https://arxiv.org/abs/2301.10945>`_, ICML 2023; Chen, Li, Chayti and Zhang, `Faster Gradient Methods for
        Highly-smooth Stochastic Bilevel Optimization <https://arxiv.org/abs/2509.02937>`_, ICLR 2026.
    """

    walks_virtually = True
    order = orders.TRAIN_THEN_CORRECT
    penalty = Setting[Scheduled](scheduled(0.0, exclusive=True))
    p = Fixed[int]()
    step_scale = Setting[Literal["one", "penalty"]](chosen("one", "penalty"))
    normalise = Setting[bool](chosen(True, False))
    starts = Fixed[int]()
    spread = Setting[float](numeric(0.0, exclusive=True))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        penalty: Scheduled = Linear(1.0, slope=0.1),
        p: int = 1,
        inner_steps: int = 10,
        inner_lr: float | None = None,
        step_scale: Literal["one", "penalty"] = "one",
        normalise: bool = False,
        starts: int = 1,
        spread: float = 1.0,
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        count(type(self).__name__, "p", p, minimum=1)
        check_starts(type(self).__name__, starts)
        if starts > 1 and p != 1:
            advice = "goes with p=1 alone, which has y_0 and no copy but w that sees F. Leave p or starts out."
            raise ValueError(message(type(self).__name__, "starts", starts, advice))
        self.inner_steps, self.inner_lr = inner_steps, inner_lr
        self.step_scale, self.normalise, self.atomic = step_scale, normalise, atomic
        self.spread = spread
        self.__dict__.update(p=p, starts=starts)
        super().__init__(upper_loss, lower_loss, penalty=penalty, **common)
        self._coefficients = coefficients(p)
        self._copies = {
            j: self.lower_state(f"y[{j}]", start="variables", reduction="mean") for j in self._coefficients if j != 1
        }
        self._starts = Starts(self, starts, lambda: self.spread)

    def compute(self, oracle: Oracle) -> Directions[PenaltyStats]:
        penalty = self.scheduled(self.penalty)
        starts = {j: y.value for j, y in self._copies.items()}  # at first w, before it moves
        g, f = oracle.lower(wrt="lower"), oracle.upper(wrt="lower")
        others = self._starts.others(lambda y: self._walk(oracle, 0, y, penalty))  # begin around w, before it moves
        oracle.train(self._slope(1, g.lower, f.lower, penalty))
        for t in range(1, self.inner_steps):
            slope = oracle.lower(batch=t, wrt="lower").lower
            oracle.train(self._slope(1, slope, oracle.upper(batch=t, wrt="lower").lower, penalty))
        ends = {j: self._walk(oracle, j, y, penalty) for j, y in starts.items()}
        if self.starts > 1:
            return self._from_the_best(oracle, f, g, [ends[0], *others], penalty)

        last = self.inner_steps
        with oracle.precisely():  # their difference is multiplied by lambda, and their rounding with it
            gs = {j: oracle.lower(y, wrt="upper") for j, y in {1: None, **ends}.items()}
            fs = {j: oracle.upper(y, batch=last, wrt="upper") for j, y in {1: None, **ends}.items() if j != 0}
        terms = [c * penalty * gs[j].upper for j, c in self._coefficients.items()]
        terms += [c * j * fs[j].upper for j, c in self._coefficients.items() if j != 0]
        upper = sum(terms[1:], terms[0])
        nearest = max(j for j in ends if j <= 0)
        return Directions(
            upper=upper / upper.norm() if self.normalise else upper,
            state={**self.stepped(), **{f"y[{j}]": y for j, y in ends.items()}},
            stats=PenaltyStats.of(f, g, penalty=penalty, constraint=difference(gs[1].value, gs[nearest].value)),
        )

    def _from_the_best(
        self, oracle: Oracle, f: Evaluation, g: Evaluation, ends: list[Vector], penalty: float
    ) -> Directions[PenaltyStats]:
        """The same with several copies: the lowest end for y_0, and w where the penalised value is smallest."""
        last = self.inner_steps
        with oracle.precisely():
            found = look(oracle, ends, upper_batch=last)
            g_here, f_here = oracle.lower(wrt="upper"), oracle.upper(batch=last, wrt="upper")
            point, which = found.better(oracle, f_here, g_here, penalty)
            g_there, f_there = oracle.lower(point, wrt="upper"), oracle.upper(point, batch=last, wrt="upper")
        upper = f_there.upper + penalty * (g_there.upper - found.gradient)
        constraint = difference(g_here.value, found.lowest)
        return Directions(
            upper=upper / upper.norm() if self.normalise else upper,
            start=point,
            state={**self.stepped(), "y[0]": ends[0], **self._starts.state(found)},
            stats=PenaltyStats.of(f, g, penalty=penalty, constraint=constraint, chosen=which),
        )

    def _walk(self, oracle: Oracle, j: int, y: Vector, penalty: float) -> Vector:
        """Take T steps of copy j."""
        rule = self.inner_rule()
        for t in range(self.inner_steps):
            slope = oracle.lower(y, batch=t, wrt="lower").lower
            if j != 0:
                slope = self._slope(j, slope, oracle.upper(y, batch=t, wrt="lower").lower, penalty)
            y = y.like(rule.step(y, slope, rule.start())[0])
        return y

    def _slope(self, j: int, g: Vector, f: Vector, penalty: float) -> Vector:
        """The gradient of ``G + j nu F``, or of ``lambda`` times that."""
        return g + (j / penalty) * f if self.step_scale == "one" else penalty * g + j * f


def coefficients(p: int) -> dict[int, float]:
    """Return the weights of the difference quotient of order p at 0, by point, without those that are 0.

    Example:
        >>> from bilevel.methods.f2sa import coefficients
        >>> coefficients(2)
        {-1: -0.5, 1: 0.5}
    """
    points = range(-(p // 2), p - p // 2 + 1)
    # The derivative at 0 of the polynomial that is 1 at j and 0 at the other points.
    found = {j: prod(-m / (j - m) for m in points if m not in (0, j)) / j for j in points if j != 0}
    if p % 2 == 1:
        found[0] = -sum(found.values())
    return dict(sorted(found.items()))
