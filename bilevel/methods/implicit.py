"""Approximate implicit differentiation: the hypergradient of a solved lower problem, by a linear system."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self, Unpack, cast

import torch
from torch import Tensor

from ..checks.check import DIFFERENCE, Check, Same, Unknown
from ..checks.checker import Checker
from ..checks.plain import NoReference, Plain
from ..directions import Directions
from ..errors import message
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..feasible import FixedPointMap
from ..hypergradient import (
    ConjugateGradient,
    HessianProducts,
    Preconditioner,
    ProductMode,
    Solution,
    Solver,
    check_preconditioner,
    mode_taken,
    preconditioned,
    train,
)
from ..optimizer.base import Common
from ..settings import Setting, chosen, counted
from ..vectors import Tensors, Vector
from .formulas import Formula, summed
from .hypergradient_method import HypergradientMethod, HypergradientStats

INDEFINITE = (
    "Implicit: G has no strict minimum where the lower steps ended: the solver met a direction of no or negative "
    "curvature, and raised its damping, or ended there (stats.indefinite, stats.damping). Usual causes: too few lower "
    "steps, a saddle, a batch that leaves directions flat. Train longer, regularise G, or give a damping."
)


@dataclass(frozen=True, kw_only=True)
class ImplicitStats(HypergradientStats):
    """The numbers of one step of :class:`Implicit`.

    Attributes:
        iterations: Iterations of the solver that changed its iterate.
        residual: ``|f_w - (G_ww + damping I) p| / |f_w|`` of the returned p.
        converged: Whether the residual met the solver's tolerance. If not, the direction is used all the same: look
            here, and raise the iterations or the damping.
        indefinite: Whether the solver met a direction of no or negative curvature: w is not near a strict minimum of G,
            and the damping was raised, or the iteration ended. Train longer, or raise the damping yourself. None: the
            solver does not look.
        damping: The damping that the solver ended with, and of which the residual speaks. None: its own.

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
    damping: Tensor | None = None

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

    Exact where :math:`\nabla_w G = 0`, the solver converged and damping is 0; otherwise biased by all three. With a
    ``lower_projection`` P the point that the steps reach is taken for a fixed point of :math:`w = P(z)`, :math:`z = w -
    s \nabla_w G`, and the system is that of the free directions, with :math:`D = P'(z)`, s the lower learning rate:

    .. math::
        \big( D (I - D) / s + D\, G_{ww} D + \text{damping}\, I \big)\, y = D\, \nabla_w F, \qquad p = D y

    Args:
        upper_loss: F, called once per step, after the lower steps; see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G, called once per lower step and once for all products with the Hessian (in ``forward`` and
            ``difference`` mode once, or twice, for each). Products are on the last lower batch.
        inner_steps: Real lower steps per call, >= 0; default 1. 0: the lower problem is solved by other means, and
            ``step`` moves the upper variables alone.
        solver: ``ConjugateGradient()`` (default), ``Neumann()`` or ``FixedPoint()``, or a ``Solver`` of your own.
        warm_start: Start the solver from the last p (default True: the system changes slowly between steps), or from 0
            where that leaves the smaller residual, as after variables were set by hand. The last p is part of
            ``state_dict``, and what ``apply`` and ``Directions.mean`` carry on.
        preconditioner: Of ``ConjugateGradient``: an estimate of the diagonal of :math:`G_{ww} + \text{damping}\, I`,
            which residuals are divided by (a tensor like the lower variable, one for each in order, or a mapping by
            name; positive), or a function from :class:`bilevel.Vector` to ``Vector`` that nearly solves the system: v
            to M v with M symmetric, positive definite, and near to the inverse. Default None.
        product: Mode of the products of G.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        k gradients of G (with ``inner_steps=0`` one, for the stats), one of F; one gradient of G with its graph and,
        for each iteration of the solver, one pass back through that; one mixed product. One pass back more for the
        residual of ``Neumann``, and for the other solvers where they start from the last p. With a
        ``lower_projection`` one gradient of G more. Memory: a few copies of the lower variables, whatever k is, and the
        graph of one gradient of G while the system is solved.

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
    preconditioner = Setting[Preconditioner | None](check_preconditioner)

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        solver: Solver | None = None,
        warm_start: bool = True,
        preconditioner: Preconditioner | None = None,
        product: ProductMode = "auto",
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.inner_steps = inner_steps
        self.solver = ConjugateGradient() if solver is None else solver
        self.warm_start, self.preconditioner = warm_start, preconditioner
        self.product = product
        self.atomic = atomic
        super().__init__(upper_loss, lower_loss, **common)
        # Any start is right, so that the mean over tasks is too. With projections it is y.
        self._last = self.lower_state("last", reduction="mean")
        self._preconditioned()

    def compute(self, oracle: Oracle) -> Directions[ImplicitStats]:
        g = train(oracle, self.inner_steps).first
        last = self.lower_batches - 1
        f = oracle.upper()
        bounds = None
        if self.lower_set.bounded:  # as a look: it is no step of training, along which buffers would move again
            here = oracle.lower(oracle.point().clone(), batch=last, wrt="lower")
            bounds = FixedPointMap(self.lower_set, oracle.point(), here.lower, self.lower_rates())
        with HessianProducts(oracle, batch=last, product=self.product) as products:
            found = self._solved(products, f.lower, bounds)
            y = f.lower.like(found.x)
            through = products.mixed(y if bounds is None else bounds.free(y))
        self._tell(oracle, found)
        return Directions(
            upper=f.upper - through,
            state={"last": y},
            stats=ImplicitStats.of(
                f,
                g,
                product=mode_taken(oracle, "hessian", self.product),
                iterations=found.iterations,
                residual=found.residual,
                converged=found.converged,
                indefinite=found.indefinite,
                damping=found.damping,
            ),
        )

    def _solved(self, products: HessianProducts, right: Vector, bounds: FixedPointMap | None) -> Solution:
        """Solve the system, in the free directions if there are ``bounds``."""

        def product(v: Tensors) -> Tensors:
            if bounds is None:
                return products(v)
            y = right.like(v)
            return bounds.system(y, products(bounds.free(y)))

        start = self._last.value if self.warm_start and self._last.known else None
        right = right if bounds is None else bounds.free(right)
        preconditioner = self._preconditioned()
        with torch.no_grad():
            if preconditioner is None:
                return self.solver.solve(product, right, start, self.lower_rates())
            own = preconditioner
            if bounds is not None:
                free = bounds.free
                own = lambda r: free(preconditioner(free(right.like(r))))  # noqa: E731
            solver = cast(ConjugateGradient, self.solver)
            return solver.solve(product, right, start, self.lower_rates(), preconditioner=own)

    def _preconditioned(self) -> Callable[[Tensors], Vector] | None:
        """The preconditioner on vectors, checked against the solver and the variables, either of which may change."""
        if self.preconditioner is None:
            return None
        if not isinstance(self.solver, ConjugateGradient):
            advice = "is used by ConjugateGradient alone. Write it into your own Solver, or leave it out."
            raise ValueError(message("Implicit", "preconditioner", f"... with {type(self.solver).__name__}", advice))
        return preconditioned("Implicit", self.preconditioner, self.lower_level)

    def _tell(self, oracle: Oracle, found: Solution) -> None:
        """Warn once of a lower problem without a strict minimum here; a device is asked in looks alone."""
        if found.indefinite is None or not (found.indefinite.device.type == "cpu" or oracle.comparing):
            return
        if bool(found.indefinite):
            oracle.verification.say_of("indefinite", INDEFINITE)

    def formula(self, plain: Plain, answer: Directions[ImplicitStats]) -> Formula:
        r""":math:`\nabla_\alpha F - G_{\alpha w}\, p` with the p that the solver found."""
        f, y, bounds = self._replayed(plain, answer)
        p = y if bounds is None else bounds.free(y)
        return summed(f.upper, -1.0, plain.product(p, batch=self.lower_batches - 1)[0])

    def more_checks(self, checker: Checker, answer: Directions[ImplicitStats]) -> Iterator[Check]:
        """The residual of that p in ``(G_ww + damping I) p = grad_w F``."""
        last = self.lower_batches - 1
        try:
            with checker.plain() as plain:
                f, y, bounds = self._replayed(plain, answer)
                if bounds is None:
                    right, curved = f.lower, plain.product(y, batch=last)[1]
                else:
                    right = bounds.free(f.lower)
                    curved = bounds.system(y, plain.product(bounds.free(y), batch=last)[1])
        except NoReference as problem:
            yield Unknown("residual", float(answer.stats.residual), str(problem))
            return
        own = answer.stats.damping
        damped = curved + float(getattr(self.solver, "damping", 0.0) if own is None else own) * y
        size = float(right.norm())
        residual = (right - damped).norm() / (size if size > 0 else 1.0)
        loose = DIFFERENCE if self.product == "difference" else 0.0
        # Of terms as long as the right-hand side: rounding leaves that much of a residual that is 0.
        yield Same("residual", [answer.stats.residual], [residual], size=1.0, tolerance=loose)

    def _replayed(
        self, plain: Plain, answer: Directions[ImplicitStats]
    ) -> tuple[Evaluation, Vector, FixedPointMap | None]:
        """F after the real steps, the solution of the system, and the bounds that it is of."""
        plain.train(self.inner_steps, self.inner_rule)
        if self.inner_steps == 0:
            plain.lower()
        f, bounds = plain.upper(), None
        if self.lower_set.bounded:
            point = plain.point()
            here = plain.lower(point, batch=self.lower_batches - 1)
            bounds = FixedPointMap(self.lower_set, point, here.lower, self.lower_rates())
        return f, self._last.of(answer), bounds
