"""DARTS: the one-step hypergradient with its mixed product by a central difference (Liu, Simonyan and Yang, ICLR
2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

from ..checks.check import Check
from ..checks.checker import Checker
from ..checks.plain import Plain
from ..directions import Directions
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import Step, mixed_product, mode_taken, pull_back
from ..lower_steps import InnerStep
from ..optimizer import orders
from ..optimizer.base import Common
from ..settings import Setting, numeric
from ..vectors import Vector
from .formulas import Formula, central_difference, difference_checks, summed
from .hypergradient_method import HypergradientMethod, HypergradientStats


class FiniteDifference(HypergradientMethod[HypergradientStats]):
    r"""One virtual lower step, differentiated without any second-order graph.

    .. math::
        w' &= \Phi(w, \nabla_w G(w, \alpha)), \quad u = \nabla_w F(w', \alpha), \quad v = \Phi_g^\top u, \quad
            \epsilon = r / \|v\| \\
        \alpha &\leftarrow \alpha - \eta_\alpha \Big( \nabla_\alpha F(w', \alpha) +
            \frac{\nabla_\alpha G(w + \epsilon v, \alpha) - \nabla_\alpha G(w - \epsilon v, \alpha)}{2 \epsilon} \Big)

    :math:`\Phi` is the step of your lower optimizer from its real state (momentum and weight decay included, as in
    DARTS), or plain gradient descent; for SGD :math:`v = -\eta u`, and the points are DARTS's own,
    :math:`w \pm r\, u / \|u\|`. Then w takes its ordinary step with the new upper variables. Copies are perturbed, not
    the parameters. The order of the difference is two: its error falls with r squared until rounding takes over.

    Args:
        upper_loss: F, called once per step, at :math:`w'`; see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G, called four times per step, twice of them forward-only through the lower model.
        inner_lr: Rate of that step; default None: the lower optimizer's current rates.
        inner_step: ``"optimizer"``: the lower optimizer's own step; ``"gradient"``: gradient descent. Default None:
            gradient if ``inner_lr`` is given, else optimizer, as in DARTS.
        radius: r > 0, distance of the two points from w; default 0.01 (DARTS).
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off, or the lower optimizer cannot be followed; the message says what can.

    Cost:
        Two gradients of G (one of them the ordinary step), one of F, two gradients of G in alpha alone. Memory: about
        four copies of the lower variables.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> upper_optimizer, lower_optimizer = problem.optimizers()
        >>> losses, levels = (problem.upper_loss, problem.lower_loss), dict(
        ...     upper=problem.upper, lower=problem.lower,
        ...     upper_optimizer=upper_optimizer, lower_optimizer=lower_optimizer,
        ... )
        >>> approximate = bilevel.FiniteDifference(*losses, **levels).directions().upper["0"]
        >>> torch.allclose(approximate, bilevel.Unrolled(*losses, **levels).directions().upper["0"])
        True

    References:
        Liu, Simonyan and Yang, `DARTS <https://arxiv.org/abs/1806.09055>`_, ICLR 2019, equations 7 and 8, and its code.
    """

    walks_virtually = True
    order = orders.LOOK_THEN_TRAIN
    follows_maximize = True
    radius = Setting[float](numeric(0.0, exclusive=True))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_lr: float | None = None,
        inner_step: InnerStep | None = None,
        radius: float = 0.01,
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.inner_lr = inner_lr
        self.inner_step = self._default_inner_step(inner_step)
        self.radius = radius
        self.atomic = atomic
        super().__init__(upper_loss, lower_loss, **common)
        self.inner_rule()  # refuses an optimizer that cannot be followed

    def compute(self, oracle: Oracle) -> Directions[HypergradientStats]:
        w, g = oracle.point(), oracle.lower(wrt="lower")
        rule = self.inner_rule()
        step = Step(0, None, g.lower, rule.start())
        ahead, _ = rule.step(w, g.lower, step.state)
        f = oracle.upper(ahead)
        _, v, _ = pull_back(rule, step, w, f.lower)
        through = mixed_product(oracle, v, product="difference", gradient=g.lower, radius=self.radius)
        taken = mode_taken(oracle, "mixed", "difference")
        return Directions(
            upper=f.upper + through,
            stats=HypergradientStats.of(f, g, product=taken),
        )

    def formula(self, plain: Plain, answer: Directions[HypergradientStats]) -> Formula:
        """The same difference, of plain gradients; or the product itself, where that took its place."""
        f, v = self._plain_direction(plain)
        if answer.stats.product != "difference":
            return summed(f.upper, 1.0, plain.product(v)[0])
        return summed(f.upper, 1.0, central_difference(plain, 0, v, self.radius))

    def more_checks(self, checker: Checker, answer: Directions[HypergradientStats]) -> Iterator[Check]:
        """Whether the difference is, for a small radius, the derivative."""
        if answer.stats.product == "difference":
            with checker.plain() as plain:
                yield from difference_checks(checker, plain, 0, self._plain_direction(plain)[1])

    def _plain_direction(self, plain: Plain) -> tuple[Evaluation, Vector]:
        """F at w', and v."""
        end, (step,) = plain.walk(self.inner_rule(), 1)
        f = plain.upper(end)
        return f, pull_back(self.inner_rule(), step, plain.point(), f.lower)[1]
