"""EMLC's meta-gradient (Taraday and Baskin, ICCV 2023): forward mode through the lower model, reverse through the
upper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

from torch import Tensor

from ..checks.plain import Plain
from ..directions import Directions
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient.modes import Route
from ..hypergradient.products import upper_product
from ..lower_steps import GradientDescent, Rule, current_rates
from ..optimizer.apply import hand_over
from ..optimizer.base import Common
from ..optimizer.hooks import ONLY_REAL
from ..optimizer.undo import Groups, Saved
from ..settings import Setting, chosen, numeric
from ..vectors import Vector, add_scaled
from .formulas import Formula, summed
from .sequential import HypergradientStats, Sequential


class EMLC(Sequential[HypergradientStats]):
    r"""The exact one-step meta-gradient, and its discounted k-step form, for any lower loss.

    .. math::
        w_{\tau+1} &= \text{your lower optimizer's step along } \nabla_w G(w_\tau, \alpha), \quad \tau < k \\
        g &= \nabla_w F(w_k, \alpha) \\
        \alpha &\leftarrow \alpha - \eta_\alpha \Big( \nabla_\alpha F(w_k, \alpha) - \eta \sum_{\tau < k}
            \gamma^{k-1-\tau}\, G_{\alpha w}(w_\tau, \alpha)\, g \Big)

    The paper states the products for cross-entropy with soft targets (equations 10 and 11), where
    :math:`-G_{\alpha w}\, g` is the Jacobian-vector product of log-probabilities times the targets' Jacobian; here
    they are those of your closure. As in the paper's code, the real steps use momentum and weight decay, the derivative
    is that of plain gradient descent. Differences from that code: each product is paired with its own step (the code
    pairs the blocks of the last step with the targets of the first), and there is no extra factor 1/k.

    Args:
        upper_loss: F, called once per step, after the lower steps; see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G, called once per lower step.
        inner_steps: k >= 1. Default 1, where the meta-gradient is exact; the paper's CIFAR runs use 5.
        discount: :math:`\gamma`, in [0, 1]; default None: ``1 - lr`` of each variable's group, the paper's choice.
        memory: ``"store"`` (default) keeps a copy of the lower variables per step. ``"replay"`` keeps the first and
            takes the k steps a second time, from the same parameter groups: two copies whatever k is, k more
            gradients. The lower optimizer's hooks run twice; rates that they change end as after k steps, while what
            they keep elsewhere (the counter of a scheduler) counts 2k.
        product: Route of the products of G: ``"auto"`` is forward mode, with double backward behind one warning that
            names what has no forward rule; ``"forward"`` fails there instead.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        k gradients of G, one of F, k upper products of G (one dual evaluation each, no reverse pass through the lower
        model). Memory: ``"store"`` k copies of the lower variables.

    Example:
        >>> import torch, bilevel
        >>> lower = torch.nn.Linear(1, 1, bias=False)
        >>> alpha = torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.EMLC(
        ...     lambda: (lower.weight - 1).square().sum(), lambda: (lower.weight - alpha).square().sum(),
        ...     upper=alpha, lower=lower, upper_optimizer=torch.optim.SGD([alpha], lr=0.5),
        ...     lower_optimizer=torch.optim.SGD(lower.parameters(), lr=0.1), inner_steps=5,
        ... )
        >>> for _ in range(100):
        ...     stats = optimizer.step()
        >>> print(f"{alpha.item():.3f}")
        1.000

    References:
        Taraday and Baskin, `Enhanced Meta Label Correction for Coping with Label Corruption
        <https://arxiv.org/abs/2305.12961>`_, ICCV 2023, propositions 1 and 3, equations 10 and 11.
    """

    trains_first = True
    _ignores_clipping = ONLY_REAL
    memory = Setting[Literal["store", "replay"]](chosen("store", "replay"))
    discount = Setting[float | None](numeric(0.0, 1.0, optional=True))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        discount: float | None = None,
        memory: Literal["store", "replay"] = "store",
        product: Route = "auto",
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.memory = memory
        self.discount = discount
        self._last: Vector | None = None
        super().__init__(upper_loss, lower_loss, common, inner_steps=inner_steps, product=product, atomic=atomic)

    def _train_and_look(self, oracle: Oracle, *, real: bool) -> Directions[HypergradientStats]:
        beginning = Saved([self._lower]) if self.memory == "replay" else None
        groups: list[Groups] = []  # before each step, then at the end: hooks may change rates, and run twice

        def note() -> None:
            if beginning:
                groups.append(Groups(self._lower))

        first, steps = self._train(oracle, real=real, keep=0 if beginning else self.inner_steps, before=note)
        note()
        rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in current_rates(self._lower, None)]
        f = oracle.upper()
        if beginning:
            beginning.restore()
        through: Vector = [None] * len(self._upper.tensors)
        for index in range(self.inner_steps):
            point = None if beginning else steps[index].point
            weighted = self._weighted(f.lower, rates, age=self.inner_steps - 1 - index)
            known = self._last if index == self.inner_steps - 1 else None
            product = upper_product(oracle, index, weighted, point, self.product, gradient=known)
            through = add_scaled(through, -1.0, product)
            if beginning:  # the next of the k steps once more
                gradient = oracle.lower(index, wrt="lower").lower
                groups[index].restore()
                hand_over(self._lower, gradient)
        if beginning:
            groups[-1].restore()
        self._last = None
        return self._directions(oracle, f, first, through)

    def _train_along(self, g: Evaluation, *, real: bool, kept: bool) -> None:
        """Keep the gradient, which is in ``.grad`` anyway, as long as no hook changes it: it verifies a product."""
        versions = [None if x is None else x._version for x in g.lower]
        super()._train_along(g, real=real, kept=kept)
        intact = versions == [None if x is None else x._version for x in g.lower]
        self._last = g.lower if intact and self.memory == "store" else None

    def _weighted(self, g: Vector, rates: list[float | Tensor], age: int) -> Vector:
        """Return ``lr * discount^age * g``, the direction of the product at the step ``age`` steps before the last."""
        discounts = [1 - rate if self.discount is None else self.discount for rate in rates]
        return [
            None if x is None else (x * (rate * discount**age)).to(x.dtype)
            for x, rate, discount in zip(g, rates, discounts, strict=True)
        ]

    def _formula(self, plain: Plain, answer: Directions[HypergradientStats]) -> Formula:
        """The equation above: each product at its own point, with its own discount."""
        steps = plain.train(self.inner_steps, self._rule)
        f = plain.upper()
        total: Vector = [None] * len(f.upper)
        for step in steps:
            direction: list[Tensor | None] = []
            for group, g in zip(self._lower.groups(), f.lower, strict=True):
                rate = float(group["lr"])
                discount = 1 - rate if self.discount is None else self.discount
                direction.append(None if g is None else rate * discount ** (self.inner_steps - 1 - step.index) * g)
            total = add_scaled(total, 1.0, plain.product(step.index, direction, step.point)[0])
        return summed(f.upper, -1.0, total)

    def _rule(self) -> Rule:
        return GradientDescent(current_rates(self._lower, None))
