"""SOBA: the single-loop stochastic algorithm of Dagréou, Ablin, Vaiter and Moreau (NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from ..directions import Directions
from ..evaluation.oracle import Oracle
from ..hypergradient import ProductMode
from ..optimizer.base import Common
from .single_loop import SingleLoop, SingleLoopStats


class SOBA(SingleLoop):
    r"""Implicit differentiation without loops: w, the linear system and :math:`\alpha` take one step each, all at once.

    .. math::
        w &\leftarrow w - \rho\, D_w, & D_w &= \nabla_w G \\
        v &\leftarrow v - \rho\, D_v, & D_v &= G_{ww}\, v + \nabla_w F \\
        \alpha &\leftarrow \alpha - \gamma\, D_\alpha, & D_\alpha &= G_{\alpha w}\, v + \nabla_\alpha F

    v follows the solution :math:`-G_{ww}^{-1} \nabla_w F` of the linear system, so that :math:`D_\alpha` follows the
    hypergradient. Each direction is linear in averages over samples: a batch of each loss gives an unbiased estimate.
    In the paper's letters (:math:`\theta` or z for w, :math:`\lambda` or x for :math:`\alpha`) these are its directions
    :math:`D_z, D_v, D_x`, and SOBA is their plug-in estimate.

    The upper rate must be small beside the lower one, for w and v to keep up. Differences from the paper and
    ``benchopt/benchmark_bilevel``: w and :math:`\alpha` move by your torch optimizers; the paper's step sizes that
    decrease are a scheduler of theirs, whose rate v takes by default. That code has v with the opposite sign in some
    versions.

    Args:
        upper_loss: F, called once per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels.
        lower_loss: G, called twice per step: a gradient, and both blocks of its Hessian along v.
        system_lr: Rate :math:`\rho` of v. Default: the lower optimizer's current rate, per parameter group, as in the
            paper, where w and v share one. Say it where that optimizer is Adam, or has momentum.
        product: Mode of the products of G.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        One gradient of G, one Hessian product of G, one gradient of F. Memory: v, from step to step, and the graph of
        one gradient of G.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> optimizer = bilevel.SOBA(
        ...     problem.upper_loss, problem.lower_loss, upper=problem.upper, lower=problem.lower,
        ...     upper_optimizer=torch.optim.SGD([problem.upper], lr=0.05),
        ...     lower_optimizer=torch.optim.SGD([problem.lower], lr=0.2),
        ... )
        >>> for _ in range(300):
        ...     stats = optimizer.step()
        >>> torch.allclose(problem.upper, problem.upper_solution, atol=1e-6)
        True

    References:
        Dagréou, Ablin, Vaiter and Moreau, `A framework for bilevel optimization that enables stochastic and global
        variance reduction algorithms <https://arxiv.org/abs/2201.13409>`_, NeurIPS 2022.
    """

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        system_lr: float | None = None,
        product: ProductMode = "auto",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(upper_loss, lower_loss, system_lr=system_lr, product=product, **common)

    def compute(self, oracle: Oracle) -> Directions[SingleLoopStats]:
        at = self.sample(oracle)
        return Directions(
            upper=at.f.upper + at.mixed,
            lower=at.g.lower,
            state={"v": self.next_v(at.system(at.hessian + at.f.lower))},
            stats=self.numbers(oracle, at),
        )
