"""MA-SOBA: SOBA with a moving average of its upper direction (Chen, Xiao and Balasubramanian, 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from ..directions import Directions
from ..evaluation.oracle import Oracle
from ..hypergradient import ProductMode
from ..optimizer.base import Common
from ..settings import Setting, numeric
from .single_loop import SingleLoop, SingleLoopStats


class MASOBA(SingleLoop):
    r""":class:`SOBA` whose upper direction is averaged over the steps, so that noise of batches averages out.

    .. math::
        w &\leftarrow w - \rho\, \nabla_w G(w, \alpha), \qquad
        v \leftarrow v - \rho\, (G_{ww}(w, \alpha)\, v + \nabla_w F(w, \alpha)) \\
        h &\leftarrow (1 - \theta)\, h + \theta\, (G_{\alpha w}(w, \alpha)\, v + \nabla_\alpha F(w, \alpha)) \\
        \alpha &\leftarrow \alpha - \eta_\alpha\, h

    All right-hand sides are at the values before the step. The average is what lets one dispense with the smoothness of
    high order that SOBA's theory asks for. With :math:`\theta = 1` it is SOBA.

    Differences from the paper: h starts at 0, and :math:`\alpha` moves along the average that has this step's estimate
    in it, as in later authors' code of the method; along the one before, the estimate would be a step older. v has the
    sign of SOBA.

    Args:
        upper_loss: F, called once per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels.
        lower_loss: G, called twice per step: a gradient, and both blocks of its Hessian along v.
        theta: Weight of the new estimate, in (0, 1]; default 0.1. Smaller: less noise, more delay, and a smaller
            upper rate.
        system_lr: Rate :math:`\rho` of v. Default: the lower optimizer's current rate, per parameter group.
        product: Mode of the products of G.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        As of :class:`SOBA`. Memory: v and h, from step to step.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> optimizer = bilevel.MASOBA(
        ...     problem.upper_loss, problem.lower_loss, upper=problem.upper, lower=problem.lower,
        ...     upper_optimizer=torch.optim.SGD([problem.upper], lr=0.05),
        ...     lower_optimizer=torch.optim.SGD([problem.lower], lr=0.2), theta=0.5,
        ... )
        >>> for _ in range(400):
        ...     stats = optimizer.step()
        >>> torch.allclose(problem.upper, problem.upper_solution, atol=1e-6)
        True

    References:
        Chen, Xiao and Balasubramanian, `Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed Smoothness
        Conditions <https://arxiv.org/abs/2306.12067>`_, 2023.
    """

    theta = Setting[float](numeric(0.0, 1.0, exclusive=True))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        theta: float = 0.1,
        system_lr: float | None = None,
        product: ProductMode = "auto",
        **common: Unpack[Common],
    ) -> None:
        self.theta = theta
        super().__init__(upper_loss, lower_loss, system_lr=system_lr, product=product, **common)
        self._average = self.upper_state("h", reduction="mean")  # nothing counts as 0

    def compute(self, oracle: Oracle) -> Directions[SingleLoopStats]:
        at = self.sample(oracle)
        h = (1 - self.theta) * self._average.value + self.theta * (at.f.upper + at.mixed)
        return Directions(
            upper=h,
            lower=at.g.lower,
            state={"v": self.next_v(at.system(at.hessian + at.f.lower)), "h": h},
            stats=self.numbers(oracle, at),
        )
