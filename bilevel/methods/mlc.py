"""MLC's meta-gradient with its projected discount (Zheng, Awadallah and Dumais, AAAI 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

import torch

from ..checks.check import DIFFERENCE, Check, Same, Unknown
from ..checks.checker import Checker
from ..checks.plain import NoReference, Plain
from ..directions import Directions
from ..evaluation.oracle import Oracle
from ..hypergradient import ProductMode, Step, mixed_product, mode_taken, pull_back
from ..hypergradient.modes import PRODUCT_MODES
from ..lower_steps import OptimizerStep, check_followed
from ..optimizer.base import BilevelOptimizer, Common
from ..settings import Setting, chosen
from ..vectors import Vector, squared_norm
from .formulas import Formula, derivative_checks, summed
from .hypergradient_method import HypergradientStats


class MLC(BilevelOptimizer[HypergradientStats]):
    r"""One lower step per call; the upper variables move every ``inner_steps`` calls, along an accumulated estimate.

    .. math::
        d &= \nabla_w G(w, \alpha), \quad w_+ = \Phi(w, d), \quad g_0 = \nabla_w F(w), \quad g_1 = \nabla_w F(w_+) \\
        m &\leftarrow \nabla_\alpha F(w_+) - \nabla_\alpha \langle d, S g_1 \rangle + \gamma\, m, \quad
            \gamma = \frac{\langle (I - S)\, g_1, g_0 \rangle}{\|g_0\|^2}, \quad S = -\partial \Phi / \partial d

    :math:`\Phi` is the step of your lower optimizer from its real state; for SGD without dampening, S is the learning
    rate. w takes that step with d, computed with the old upper variables. The upper loss gets a fresh batch at each
    call. The Hessian of G is replaced by the identity in :math:`\gamma`, which projects on one direction; EMLC uses
    ``1 - lr``. A ``lower_projection`` P is the end of :math:`\Phi`, and I in :math:`\gamma` then is its derivative.

    Args:
        upper_loss: F, called once per step (twice with ``inner_steps > 1``); see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G, called once per step.
        inner_steps: Calls of ``step`` per upper update, >= 1; default 1 (MLC on CIFAR; 5 on Clothing1M). With 1, gamma
            plays no part and :math:`g_0` is not computed, unlike in the paper's code.
        product: Mode of the product of G.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off, or the lower optimizer cannot be followed; the message says what can.

    Cost:
        One gradient of G and one of F (two with ``inner_steps > 1``), one mixed product of G. Memory: a copy of the
        lower variables, and of the upper ones.

    Example:
        >>> import torch, bilevel
        >>> lower = torch.nn.Linear(1, 1, bias=False)
        >>> alpha = torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.MLC(
        ...     lambda: (lower.weight - 1).square().sum(), lambda: (lower.weight - alpha).square().sum(),
        ...     upper=alpha, lower=lower, upper_optimizer=torch.optim.SGD([alpha], lr=0.5),
        ...     lower_optimizer=torch.optim.SGD(lower.parameters(), lr=0.1), inner_steps=2,
        ... )
        >>> [optimizer.step().upper_moved for _ in range(4)]
        [False, True, False, True]

    References:
        Zheng, Awadallah and Dumais, `Meta Label Correction for Noisy Label Learning
        <https://arxiv.org/abs/1911.03809>`_, AAAI 2021, and its code.
    """

    follows_maximize = True
    walks_virtually = True
    product = Setting[ProductMode](chosen(*PRODUCT_MODES))
    lower_batches = 1  # inner_steps counts calls

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        product: ProductMode = "auto",
        **common: Unpack[Common],
    ) -> None:
        self.inner_steps = inner_steps
        self.product = product
        self.inner_step = "optimizer"
        super().__init__(upper_loss, lower_loss, **common)
        check_followed("MLC", self.lower_optimizer, "EMLC, which follows none")
        self._accumulated = self.upper_state("accumulated", reduction="mean")  # linear in what each call adds
        self._calls = self.scalar_state("calls")

    def compute(self, oracle: Oracle) -> Directions[HypergradientStats]:
        return self._estimate(oracle)[0]

    def _estimate(self, oracle: Oracle) -> tuple[Directions[HypergradientStats], Vector]:
        """Return the directions of this call and the accumulated estimate m."""
        w, g = oracle.point(), oracle.lower(wrt="lower")
        rule = self.inner_rule()
        step = Step(0, None, g.lower, rule.start())
        ahead, _ = rule.step(w, g.lower, step.state)
        f = oracle.upper(ahead)
        _, minus_s_g1, _ = pull_back(rule, step, w, f.lower)
        m = f.upper + mixed_product(oracle, minus_s_g1, product=self.product, gradient=g.lower)
        value, aux = f.value, f.aux
        if self.inner_steps > 1:
            here = oracle.upper()
            value, aux = here.value, here.aux
            squared = here.lower.squared_norm()
            projection = (self._free(w, step, f.lower) + minus_s_g1).dot(here.lower)
            gamma = torch.where(squared > 0, projection / torch.where(squared > 0, squared, 1.0), 0.0)
            m = m + gamma * self._accumulated.value
        calls = self._calls.value + 1
        due = calls >= self.inner_steps
        taken = mode_taken(oracle, "mixed", self.product)
        directions = Directions(
            upper=m if due else {},
            lower=g.lower,
            state={"accumulated": {} if due else m, "calls": 0 if due else calls},
            stats=HypergradientStats(value, g.value, upper_aux=aux, lower_aux=g.aux, product=taken),
        )
        return directions, m

    def _free(self, point: Vector, step: Step, upper: Vector) -> Vector:
        """Return ``P'(z) g_1`` at the point z that the step reaches before it is projected."""
        if not self.lower_set.bounded:
            return upper
        reached = OptimizerStep(self.lower_level).step(point, step.gradient, step.state)[0]
        return self.lower_set.derivative(reached)(upper)

    def checks(self, checker: Checker) -> Iterator[Check]:
        """The estimate m, whether it is due or not; with ``inner_steps=1`` it is the exact derivative."""
        with checker.oracle() as oracle:
            _, m = self._estimate(oracle)
        exact, loose = self.inner_steps == 1, DIFFERENCE if self.product == "difference" else 0.0
        try:
            with checker.plain() as plain:
                formula = self._formula(plain)
            yield Same("upper direction", m, formula.upper, formula.size, tolerance=loose)
        except NoReference as problem:
            yield Unknown("upper direction", float(m.norm()), str(problem))
        yield from derivative_checks(checker, self.inner_rule, 1, m, exact=exact, compared=exact, tolerance=loose)

    def _formula(self, plain: Plain) -> Formula:
        """The equations above by plain autograd, with gamma and the estimate so far."""
        rule = self.inner_rule()
        end, (step,) = plain.walk(rule, 1)
        f = plain.upper(end)
        _, minus_s_g1, _ = pull_back(rule, step, plain.point(), f.lower)
        found = summed(f.upper, 1.0, plain.product(minus_s_g1)[0])
        if self.inner_steps == 1:
            return found
        g0 = plain.upper().lower
        squared = float(squared_norm(g0))
        free = self._free(plain.point(), step, f.lower)
        gamma = float((free + minus_s_g1).dot(g0)) / squared if squared > 0 else 0.0
        total = summed(found.upper, gamma, self._accumulated.value)
        return Formula(total.upper, found.size + total.size)
