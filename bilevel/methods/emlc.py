"""EMLC's meta-gradient (Taraday and Baskin, ICCV 2023): forward mode through the lower model, reverse through the
upper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

from torch import Tensor

from ..checks.plain import Plain
from ..directions import Directions
from ..errors import message
from ..evaluation.oracle import Oracle
from ..hypergradient import ProductMode, Step, Trajectory, mixed_product, mode_taken, pull_back, train
from ..lower_steps import GradientDescent
from ..optimizer.base import Common
from ..optimizer.hooks import ONLY_REAL
from ..settings import Setting, chosen, numeric
from ..vectors import Vector
from .formulas import Formula, summed
from .hypergradient_method import HypergradientMethod, HypergradientStats

REPLAYED = 'the walk back through a lower_projection needs the points of all steps. Use memory="store".'


class EMLC(HypergradientMethod[HypergradientStats]):
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
    pairs the blocks of the last step with the targets of the first), and there is no extra factor 1/k. With a
    ``lower_projection`` P each step begins its way back with :math:`P'`: g is then :math:`P'_\tau \gamma P'_{\tau+1}
    \cdots P'_{k-1} \nabla_w F`.

    Args:
        upper_loss: F, called once per step, after the lower steps; see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G, called once per lower step.
        inner_steps: k >= 1. Default 1, where the meta-gradient is exact; the paper's CIFAR runs use 5.
        discount: :math:`\gamma`, in [0, 1]; default None: ``1 - lr`` of each variable's group, the paper's choice.
        memory: ``"store"`` (default) keeps a copy of the lower variables per step. ``"replay"`` keeps the first and
            takes the k steps a second time, from the same parameter groups: two copies whatever k is, k more
            gradients. The lower optimizer's hooks run twice; rates that they change end as after k steps, while what
            they keep elsewhere (the counter of a scheduler) counts 2k.
        product: Mode of the products of G: ``"auto"`` is forward mode, with double backward behind one warning that
            names what has no forward rule; ``"forward"`` fails there instead.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        k gradients of G, one of F, k mixed products of G (one dual evaluation each, no reverse pass through the lower
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

    virtual_walk = False
    ignores_clipping = ONLY_REAL
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
        product: ProductMode = "auto",
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.inner_steps = inner_steps
        self.memory = memory
        self.discount = discount
        self.product = product
        self.atomic = atomic
        super().__init__(upper_loss, lower_loss, **common)
        if memory == "replay" and self.lower_set.bounded:
            raise ValueError(message("EMLC", "memory", "replay", REPLAYED))

    def compute(self, oracle: Oracle) -> Directions[HypergradientStats]:
        stored = self.memory == "store"
        if not stored:
            oracle.keep_beginning()
        bounded = self.lower_set.bounded
        if bounded and not stored:
            raise ValueError(message("EMLC", "memory", "replay", REPLAYED))
        keep: Literal["all", "last"] = "all" if bounded else "last"
        walk = train(oracle, self.inner_steps, keep=self.inner_steps if stored else 0, gradients=keep)
        rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in self.lower_rates()]
        f, g = oracle.upper(), walk.first
        if bounded:
            weighted = self._pulled_back(walk.steps, f.lower, rates)
        else:
            weighted = [self._weighted(f.lower, rates, age) for age in reversed(range(self.inner_steps))]
        through = self._stored(oracle, walk, weighted) if stored else self._replayed(oracle, weighted)
        taken = mode_taken(oracle, "mixed", self.product)
        return Directions(
            upper=f.upper - through,
            stats=HypergradientStats.of(f, g, product=taken),
        )

    def _stored(self, oracle: Oracle, walk: Trajectory, weighted: list[Vector]) -> Vector:
        """Sum the products at the points that were kept."""
        products = [
            mixed_product(oracle, v, batch=s.batch, at=s.point, product=self.product, gradient=s.gradient or None)
            for v, s in zip(weighted, walk.steps, strict=True)
        ]
        return sum(products[1:], products[0])

    def _replayed(self, oracle: Oracle, weighted: list[Vector]) -> Vector:
        """Take the k steps a second time, with each product at the point where its step begins."""
        products = []
        with oracle.retracing() as step_again:
            for index, v in enumerate(weighted):
                products.append(mixed_product(oracle, v, batch=index, product=self.product))
                step_again(oracle.lower(batch=index, wrt="lower").lower)
        return sum(products[1:], products[0])

    def _weighted(self, g: Vector, rates: list[float | Tensor], age: int) -> Vector:
        """Return ``lr * discount^age * g``, the direction of the product at the step ``age`` steps before the last."""
        discounts = [1 - rate if self.discount is None else self.discount for rate in rates]
        return g.like(
            None if x is None else (x * (rate * discount**age)).to(x.dtype)
            for x, rate, discount in zip(g, rates, discounts, strict=True)
        )

    def _pulled_back(self, steps: Sequence[Step], g: Vector, rates: list[float | Tensor]) -> list[Vector]:
        """The directions of all products, back through the projections: each step cuts off what its bounds held."""
        rule, weighted = self.projected(GradientDescent(rates)), []
        for s in reversed(steps):
            point = s.point if s.point is not None else g
            held, slope, _ = pull_back(rule, Step(s.batch, point, s.gradient, rule.start()), point, g)
            weighted.append(-slope)
            discounts = [1 - rate if self.discount is None else self.discount for rate in rates]
            g = g.like(None if x is None else (d * x).to(x.dtype) for x, d in zip(held, discounts, strict=True))
        return weighted[::-1]

    def formula(self, plain: Plain, answer: Directions[HypergradientStats]) -> Formula:
        """The equation above: each product at its own point, with its own discount."""
        steps = plain.train(self.inner_steps, self.inner_rule)
        f = plain.upper()
        total = f.upper.like([None] * len(f.upper))
        bar = f.lower
        for step in reversed(steps):
            rates = [float(group["lr"]) for group in self.lower_groups()]
            if self.lower_set.bounded and step.point is not None:
                pairs = zip(step.point, step.gradient, rates, strict=True)
                reached = [x if g is None or x is None else x - rate * g for x, g, rate in pairs]
                bar = self.lower_set.derivative(reached)(bar)
            direction = bar.like(None if b is None else rate * b for b, rate in zip(bar, rates, strict=True))
            total = total + plain.product(direction, batch=step.batch, at=step.point)[0]
            discounts = [1 - rate if self.discount is None else self.discount for rate in rates]
            bar = bar.like(None if b is None else d * b for b, d in zip(bar, discounts, strict=True))
        return summed(f.upper, -1.0, total)
