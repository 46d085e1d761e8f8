"""DARTS: the one-step hypergradient with its mixed product by a central difference (Liu, Simonyan and Yang, ICLR
2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

from ..checks.check_directions import Check
from ..checks.claims import Claim
from ..checks.plain import Plain
from ..directions import Directions
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import Step, pull_back
from ..hypergradient.mode_choice import route_taken
from ..hypergradient.products import upper_product
from ..lower_steps import InnerStep
from ..optimizer.base import Common
from ..optimizer.hooks import VIRTUAL
from ..settings import Setting, numeric
from ..vectors import Vector
from .formulas import Formula, central_difference, difference_claims, summed
from .sequential import HypergradientStats, Sequential


class FiniteDifference(Sequential[HypergradientStats]):
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
        inner_step: ``"preview"``: the lower optimizer's own step; ``"plain"``: gradient descent. Default None: plain if
            ``inner_lr`` is given, else preview, as in DARTS.
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
        self.radius = radius
        super().__init__(
            upper_loss, lower_loss, common, inner_steps=1, inner_lr=inner_lr, inner_step=inner_step, atomic=atomic
        )
        self._check_rule()

    @property
    def _ignores_clipping(self) -> str | None:  # type: ignore[override]
        return VIRTUAL if self.inner_lr is None else None  # a rate of its own was chosen for what it is

    def _look_ahead(self, oracle: Oracle) -> Directions[HypergradientStats]:
        g = oracle.lower(wrt="lower")
        rule = self._rule()
        step = Step(0, None, g.lower, rule.start())
        ahead, _ = rule.step(oracle.point(), g.lower, step.state)
        f = oracle.upper(at=ahead)
        _, direction, _ = pull_back(rule, step, oracle.point(), f.lower, [{} for _ in ahead])
        through = upper_product(oracle, 0, direction, None, "difference", gradient=g.lower, radius=self.radius)
        route = route_taken(oracle, "upper", "difference")
        stats = HypergradientStats(f.value, g.value, upper_aux=f.aux, lower_aux=g.aux, product=route)
        return self._directions(oracle, f, g, through, stats)

    def _formula(self, plain: Plain, answer: Directions[HypergradientStats]) -> Formula:
        """The same difference, of plain gradients; or the product itself, where that took its place."""
        f, direction = self._plain_direction(plain)
        if answer.stats.product != "difference":
            return summed(f.upper, 1.0, plain.product(0, direction)[0])
        return summed(f.upper, 1.0, central_difference(plain, 0, direction, self.radius))

    def _more_claims(self, check: Check, answer: Directions[HypergradientStats]) -> Iterator[Claim]:
        if answer.stats.product == "difference":
            with check.plain() as plain:
                yield from difference_claims(check, plain, 0, self._plain_direction(plain)[1])

    def _plain_direction(self, plain: Plain) -> tuple[Evaluation, Vector]:
        """F at w', and v."""
        end, (step,) = plain.walk(self._rule(), 1)
        f = plain.upper(at=end)
        return f, pull_back(self._rule(), step, plain.point(), f.lower, [{} for _ in end])[1]
