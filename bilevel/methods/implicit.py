"""Approximate implicit differentiation: the hypergradient of a solved lower problem, by a linear system."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from ..checks.check import DIFFERENCE, Check, Same, Unknown
from ..checks.checker import Checker
from ..checks.plain import NoReference, Plain
from ..directions import Directions
from ..errors import message
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import (
    ConjugateGradient,
    ProductMode,
    Solver,
    hessian_product,
    mixed_product,
    mode_taken,
    train,
)
from ..optimizer.base import Common
from ..settings import Setting, chosen, counted
from ..vectors import Tensors, Vector
from .formulas import Formula, summed
from .hypergradient_method import HypergradientMethod, HypergradientStats


@dataclass(frozen=True, kw_only=True)
class ImplicitStats(HypergradientStats):
    """The numbers of one step of :class:`Implicit`.

    Attributes:
        iterations: Iterations of the solver that changed its iterate.
        residual: ``|f_w - (G_ww + damping I) p| / |f_w|`` of the returned p.
        converged: Whether the residual met the solver's tolerance. If not, the direction is used all the same: look
            here, and raise the iterations or the damping.
        indefinite: Whether the solver ended at a direction of no or negative curvature: w is not near a strict minimum
            of G. Train longer, or raise the damping. None: the solver does not look.

    Example:
        >>> import torch, bilevel
        >>> one = torch.tensor(1.0)
        >>> stats = bilevel.ImplicitStats(one, one, iterations=5 * one, residual=0 * one, converged=one > 0)
        >>> stats.as_dict()["converged"]
        1.0
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor
    indefinite: Tensor | None = None

    @classmethod
    def unknown(cls, lower_loss: Tensor) -> Self:
        """As of :class:`Stats`; no iteration was made, and nothing converged."""
        nan, none = torch.full_like(lower_loss, float("nan")), torch.zeros_like(lower_loss)
        return cls(nan, lower_loss, skipped=True, iterations=none, residual=nan, converged=none.to(torch.bool))


def _check_solver(owner: str, argument: str, value: object) -> None:
    if not isinstance(value, Solver):
        advice = "must be a solver value, such as bilevel.ConjugateGradient(iterations=20)."
        raise TypeError(message(owner, argument, value, advice))


class Implicit(HypergradientMethod[ImplicitStats]):
    r"""Lower steps, then the implicit-function hypergradient at the point they reach.

    .. math::
        (G_{ww} + \text{damping}\, I)\, p = \nabla_w F, \qquad
        \alpha \leftarrow \alpha - \eta_\alpha (\nabla_\alpha F - G_{\alpha w}\, p)

    Exact where :math:`\nabla_w G = 0`, the solver converged and damping is 0; otherwise biased by all three.

    Args:
        upper_loss: F, called once per step, after the lower steps; see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G, called once per lower step, and once per product with the Hessian. Products are on the last
            lower batch.
        inner_steps: Real lower steps per call, >= 0; default 1. 0: the lower problem is solved by other means, and
            ``step`` moves the upper variables alone.
        solver: ``ConjugateGradient()`` (default), ``Neumann()`` or ``FixedPoint()``, or a ``Solver`` of your own.
        warm_start: Start the solver from the last p (default True: the system changes slowly between steps), or from 0
            where that leaves the smaller residual, as after variables were set by hand. The last p is part of
            ``state_dict``, and what ``apply`` and ``Directions.mean`` carry on.
        product: Mode of the products of G.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        k gradients of G (with ``inner_steps=0`` one, for the stats), one of F, one Hessian product per iteration of the
        solver, one mixed product. One Hessian product more for the residual of ``Neumann``, and for the other solvers
        where they start from the last p. Memory: a few copies of the lower variables, whatever k is.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> solved = problem.lower.data.copy_(problem.lower_optimum(problem.upper.detach()))  # by other means
        >>> upper_optimizer, lower_optimizer = problem.optimizers()
        >>> optimizer = bilevel.Implicit(
        ...     problem.upper_loss, problem.lower_loss, upper=problem.upper, lower=problem.lower,
        ...     upper_optimizer=upper_optimizer, lower_optimizer=lower_optimizer, inner_steps=0,
        ... )
        >>> torch.allclose(optimizer.directions().upper["0"], problem.hypergradient(problem.upper), atol=1e-6)
        True

    References:
        Pedregosa, `Hyperparameter optimization with approximate gradient <https://arxiv.org/abs/1602.02355>`_, ICML
        2016; Lorraine et al., `Optimizing Millions of Hyperparameters by Implicit Differentiation
        <https://arxiv.org/abs/1911.02590>`_, AISTATS 2020.
    """

    virtual_walk = False
    inner_steps = Setting[int](counted(0))
    solver = Setting[Solver](_check_solver)
    warm_start = Setting[bool](chosen(True, False))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        solver: Solver | None = None,
        warm_start: bool = True,
        product: ProductMode = "auto",
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.inner_steps = inner_steps
        self.solver = ConjugateGradient() if solver is None else solver
        self.warm_start = warm_start
        self.product = product
        self.atomic = atomic
        super().__init__(upper_loss, lower_loss, **common)
        self._last = self.lower_state(
            "last", reduction="mean"
        )  # any start is right, so that the mean over tasks is too

    def compute(self, oracle: Oracle) -> Directions[ImplicitStats]:
        g = train(oracle, self.inner_steps).first
        last = self.lower_batches - 1
        f = oracle.upper()

        def hessian(v: Tensors) -> Tensors:
            return hessian_product(oracle, v, batch=last, product=self.product)[1]

        start = self._last.value if self.warm_start and self._last.known else None
        found = self.solver.solve(hessian, f.lower, start, self.lower_rates())
        p = f.lower.like(found.x)
        return Directions(
            upper=f.upper - mixed_product(oracle, p, batch=last, product=self.product),
            state={"last": p},
            stats=ImplicitStats.of(
                f,
                g,
                product=mode_taken(oracle, "hessian", self.product),
                iterations=found.iterations,
                residual=found.residual,
                converged=found.converged,
                indefinite=found.indefinite,
            ),
        )

    def formula(self, plain: Plain, answer: Directions[ImplicitStats]) -> Formula:
        r""":math:`\nabla_\alpha F - G_{\alpha w}\, p` with the p that the solver found."""
        f, p = self._solved(plain, answer)
        return summed(f.upper, -1.0, plain.product(p, batch=self.lower_batches - 1)[0])

    def more_checks(self, checker: Checker, answer: Directions[ImplicitStats]) -> Iterator[Check]:
        """The residual of that p in ``(G_ww + damping I) p = grad_w F``."""
        try:
            with checker.plain() as plain:
                f, p = self._solved(plain, answer)
                curved = plain.product(p, batch=self.lower_batches - 1)[1]
        except NoReference as problem:
            yield Unknown("residual", float(answer.stats.residual), str(problem))
            return
        damped = curved + float(getattr(self.solver, "damping", 0.0)) * p
        size = float(f.lower.norm())
        residual = (f.lower - damped).norm() / (size if size > 0 else 1.0)
        loose = DIFFERENCE if self.product == "difference" else 0.0
        # Of terms as long as the right-hand side: rounding leaves that much of a residual that is 0.
        yield Same("residual", [answer.stats.residual], [residual], size=1.0, tolerance=loose)

    def _solved(self, plain: Plain, answer: Directions[ImplicitStats]) -> tuple[Evaluation, Vector]:
        """F after the real steps, and p."""
        plain.train(self.inner_steps, self.inner_rule)
        if self.inner_steps == 0:
            plain.lower()
        return plain.upper(), self._last.of(answer)
