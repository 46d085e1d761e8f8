"""What methods share that answer with an upper direction: their stats, their options, and how they are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from ..checks.check import DIFFERENCE, Check, Same, Unknown
from ..checks.checker import Checker
from ..checks.plain import NoReference, Plain
from ..directions import Directions, Stats
from ..hypergradient.mode_choice import Kind
from ..hypergradient.modes import PRODUCT_MODES, ProductMode
from ..lower_steps import InnerStep
from ..optimizer import orders
from ..optimizer.base import BilevelOptimizer
from ..settings import Setting, chosen
from ..vectors import squared_norm
from .formulas import Formula, GraphStart, derivative_checks


@dataclass(frozen=True, kw_only=True)
class HypergradientStats(Stats):
    """The numbers of one step of a hypergradient method.

    ``upper_loss`` and ``upper_aux`` are those of F where it was evaluated: after the lower steps, virtual or real; for
    :class:`MLC` with ``inner_steps > 1``, which evaluates F at the current point too, those at the current point.

    Attributes:
        product: Mode of the products of G that was taken, or None if there was none.

    Example:
        >>> import torch, bilevel
        >>> one = torch.tensor(1.0)
        >>> bilevel.HypergradientStats(one, one, product="forward").product
        'forward'
    """

    product: str | None = None


if TYPE_CHECKING:
    import typing_extensions  # as in bilevel/directions.py

    H = typing_extensions.TypeVar("H", bound=HypergradientStats, default=HypergradientStats)
else:
    H = TypeVar("H", bound=HypergradientStats)


class HypergradientMethod(BilevelOptimizer[H], ABC):
    """Methods whose upper direction is a derivative of F through lower steps, or an approximation of it."""

    order: orders.Order = orders.TRAIN_THEN_CORRECT
    product_kind: Kind = "mixed"  # which products of G the method takes, for its stats
    exact: ClassVar[bool] = False  # whether the upper direction is the total derivative, for check_directions
    virtual_walk: bool = True  # whether that derivative is the one of virtual steps from the current point
    product = Setting[ProductMode](chosen(*PRODUCT_MODES), default="auto")

    @property
    def graph_start(self) -> GraphStart:
        """Computes the lower point that the steps start from, with its graph; None: the current one."""
        return None

    @abstractmethod
    def formula(self, plain: Plain, answer: Directions[H]) -> Formula:
        """The upper direction once more, by plain autograd from the equations of the class; ``answer`` is the method's.

        Raises:
            NoReference: Plain autograd has no second derivative of the lower loss.
        """

    def more_checks(self, checker: Checker, answer: Directions[H]) -> Iterator[Check]:
        """What a class compares beside its direction."""
        return iter(())

    def checks(self, checker: Checker) -> Iterator[Check]:
        """The direction against the class's own equations, then against the derivative of its lower steps."""
        with checker.oracle() as oracle:
            answer = self.compute(oracle)
        upper = [answer.upper.get(name) for name in self.upper_names]
        loose = DIFFERENCE if self.product == "difference" else 0.0
        try:
            with checker.plain() as plain:
                formula = self.formula(plain, answer)
            yield Same("upper direction", upper, formula.upper, formula.size, tolerance=loose)
        except NoReference as problem:
            yield Unknown("upper direction", float(squared_norm(upper).sqrt()), str(problem))
        yield from self.more_checks(checker, answer)
        yield from derivative_checks(
            checker,
            self.inner_rule,
            max(self.inner_steps, 1),
            upper,
            exact=self.exact,
            # Real steps move buffers each time, hooks clip them: the walk that is shifted here is a virtual one.
            compared=self.exact and self.virtual_walk,
            tolerance=loose,
            start=self.graph_start,
        )

    def _default_inner_step(self, inner_step: InnerStep | None) -> InnerStep:
        """Gradient descent if a rate is given, as the lower optimizer's step goes with its own rate."""
        if inner_step is not None:
            return inner_step
        return "optimizer" if self.inner_lr is None else "gradient"
