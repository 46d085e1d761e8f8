"""Sequential methods: they answer with an upper direction, and their ``step`` also takes the real lower steps.

Two orders exist. *Look first*: the upper direction comes from virtual lower steps, the upper variables move, then the
lower ones take their ordinary step. *Train first*: the lower variables take real steps, the upper direction follows.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from ..checks.check_directions import Check
from ..checks.claims import DIFFERENCE, Claim, Same, Unknown
from ..checks.plain import NoReference, Plain
from ..directions import Directions, Stats
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import Step
from ..hypergradient.mode_choice import Kind, route_taken
from ..hypergradient.modes import ROUTES, Route
from ..levels import Level
from ..lower_steps import GradientDescent, InnerStep, Preview, Rule, check_preview, current_rates
from ..optimizer.base import BilevelOptimizer, Common
from ..optimizer.undo import Saved
from ..settings import Setting, chosen, counted, numeric
from ..vectors import Vector, add_scaled, squared_norm
from .formulas import Formula, GraphStart, derivative_claims


@dataclass(frozen=True, kw_only=True)
class HypergradientStats(Stats):
    """The numbers of one step of a hypergradient method.

    ``upper_loss`` and ``upper_aux`` are those of F where it was evaluated: after the lower steps, virtual or real; for
    :class:`MLC` with ``inner_steps > 1``, which evaluates F at the current point too, those at the current point.

    Attributes:
        product: Route of the products of G that was taken, or None if there was none.

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


class Sequential(BilevelOptimizer[H], ABC):
    """Methods with an upper direction only.

    Args:
        inner_steps: Lower steps per call of ``step``.
        inner_lr: Rate of the lower steps that are differentiated; None: the lower optimizer's current ones.
        inner_step: What such a step is: ``"preview"`` the lower optimizer's own, ``"plain"`` gradient descent. None:
            plain if a rate is given, as the lower optimizer's step goes with its own rate.
        product: Route of the products of G.
        atomic: Whether a step that fails, or is not finite, after the first real optimizer step is taken back. Costs
            a copy of both levels and of their optimizers' state, the second one's made right before it moves. Without
            it such a step stays half taken.
        common: The arguments of :class:`bilevel.BilevelOptimizer`.
    """

    trains_first = False
    product_kind: Kind = "upper"  # which products of G the method takes, for its stats
    exact = False  # whether the upper direction is the total derivative, for check_directions
    inner_steps = Setting[int](counted(1))
    inner_lr = Setting[float | None](numeric(0.0, exclusive=True, optional=True))
    inner_step = Setting[InnerStep](chosen("plain", "preview"))
    product = Setting[Route](chosen(*ROUTES))
    atomic = Setting[bool](chosen(True, False))

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        common: Common,
        *,
        inner_steps: int,
        inner_lr: float | None = None,
        inner_step: InnerStep | None = None,
        product: Route = "auto",
        atomic: bool = True,
    ) -> None:
        # ``common`` as one argument: an option that the method at hand does not have must not end in one of these.
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.inner_step = ("preview" if inner_lr is None else "plain") if inner_step is None else inner_step
        self.product = product
        self.atomic = atomic
        super().__init__(upper_loss, lower_loss, **common)

    @property
    def _after_failure(self) -> str:  # type: ignore[override]
        return "nothing was moved" if self.atomic else "earlier moves of this step stay (atomic=False)"

    @property
    def lower_batches(self) -> int:
        """``inner_steps``: one lower batch for all lower steps, or one each."""
        return max(self.inner_steps, 1)

    def _look_ahead(self, oracle: Oracle) -> Directions[H]:
        """Look first: answer from virtual steps, moving nothing."""
        raise NotImplementedError

    def _train_and_look(self, oracle: Oracle, *, real: bool) -> Directions[H]:
        """Train first: take the real lower steps and answer at the point they reach.

        ``real`` steps are refused if they are not finite; those of ``directions`` are taken back anyway.
        """
        raise NotImplementedError

    def _answer(self, oracle: Oracle) -> Directions[H]:
        if not self.trains_first:
            return self._look_ahead(oracle)
        saved = Saved([self._lower])
        try:
            return self._train_and_look(oracle, real=False)
        finally:
            saved.restore()

    def _step(self, oracle: Oracle) -> H:
        return self._train_then_correct(oracle) if self.trains_first else self._correct_then_train(oracle)

    def _correct_then_train(self, oracle: Oracle) -> H:
        """Move the upper variables; then G at the current w with the new ones gives the ordinary lower step."""
        answer = self._look_ahead(oracle)
        with self._taken_back_on_error(self._upper) as saved:
            stats = self._move(answer, oracle)
            if stats.skipped:
                return stats
            g = oracle.lower(wrt="lower")
            if not self._may_train(g):
                oracle.replay.undo_buffers()
                if saved is not None:
                    saved.restore()
                return replace(stats, upper_moved=saved is None, skipped=True)
            if saved is not None:
                saved.add(self._lower)
            self._hand_to_lower(g.lower)
        return stats

    def _train_then_correct(self, oracle: Oracle) -> H:
        with self._taken_back_on_error(self._lower) as saved:
            try:
                answer = self._train_and_look(oracle, real=True)
                if saved is not None:
                    saved.add(self._upper)
                stats = self._move(answer, oracle)
            except _SkippedError as bad:
                oracle.replay.undo_buffers()
                stats = self._stats_of_skipped(bad.loss)
            if stats.skipped and saved is not None:
                saved.restore()
        return stats

    def _stats_of_skipped(self, lower_loss: Tensor) -> H:
        """What is known of a step whose real lower steps ended in ``lower_loss``, not finite."""
        unknown = torch.full_like(lower_loss, float("nan"))
        return cast(H, HypergradientStats(unknown, lower_loss, skipped=True))  # with more numbers, a method overrides

    def _train(
        self,
        oracle: Oracle,
        *,
        real: bool,
        rule: Callable[[], Rule] | None = None,
        keep: int = 0,
        before: Callable[[], None] = lambda: None,
    ) -> tuple[Evaluation, list[Step]]:
        """Take the real lower steps; return G before the first.

        The last ``keep`` steps are recorded: a copy of each point and, if there is a ``rule``, the gradient and a copy
        of the rule's state, as its derivative will need them. ``before`` is called before each.
        """
        steps: list[Step] = []
        first: Evaluation | None = None
        for index in range(self.inner_steps):
            g = oracle.lower(index, wrt="lower", trains=True)
            first = first or g
            kept = index >= self.inner_steps - keep
            if kept:
                start = rule().start() if rule is not None else []
                state = [{name: s.clone() for name, s in entry.items()} for entry in start]
                steps.append(Step(index, [x.clone() for x in oracle.point()], [] if rule is None else g.lower, state))
            before()
            self._train_along(g, real=real, kept=kept and rule is not None)
        return first or oracle.lower(wrt="lower"), steps

    def _train_along(self, g: Evaluation, *, real: bool, kept: bool) -> None:
        """Take a real lower step; a gradient that is ``kept`` for later stays as it is if hooks clip in place."""
        if real and not self._may_train(g):
            raise _SkippedError(g.value)
        self._hand_to_lower([x if x is None else x.clone() for x in g.lower] if kept else g.lower)

    def _rule(self) -> Rule:
        """The lower step that is differentiated."""
        if self.inner_step == "preview":
            self._check_rule()  # it may have been set since
            return Preview(self._lower, self.inner_lr)
        return GradientDescent(current_rates(self._lower, self.inner_lr))

    def _check_rule(self, otherwise: str = 'inner_step="plain" for gradient descent') -> None:
        if self.inner_step == "preview":
            check_preview(type(self).__name__, self.lower_optimizer, otherwise)

    def _directions(
        self, oracle: Oracle, f: Evaluation, g: Evaluation, through: Vector, stats: H | None = None
    ) -> Directions[H]:
        """Answer with the sum of F's own gradient and the part ``through`` the lower steps."""
        oracle.check_dependence(through)
        named, _ = self._named(add_scaled(f.upper, 1.0, through), [None] * len(self._lower.names))
        if stats is None:
            taken = route_taken(oracle, self.product_kind, self.product)
            plain = HypergradientStats(f.value, g.value, upper_aux=f.aux, lower_aux=g.aux, product=taken)
            stats = cast(H, plain)
        return Directions(named, {}, stats)

    @contextmanager
    def _taken_back_on_error(self, *levels: Level) -> Iterator[Saved | None]:
        saved = Saved(levels) if self.atomic else None
        remembered = self._state.values()
        try:
            yield saved
        except BaseException:
            if saved is not None:
                saved.restore()
                self._state.put_back(remembered)
            raise

    def _may_train(self, g: Evaluation) -> bool:
        """Whether a real lower step may be taken; waits for the device unless ``on_nonfinite="ignore"``."""
        return self._are_finite({"lower_loss": [g.value], "the gradient of a lower step": g.lower})

    def _formula(self, plain: Plain, answer: Directions[H]) -> Formula:
        """The upper direction by plain autograd, from the equations of the class; ``answer`` is the method's own.

        Methods that train first take their real lower steps here as well; they are taken back afterwards.

        Raises:
            NoReference: Plain autograd has no second derivative of the lower loss.
        """
        raise NotImplementedError

    def _claims(self, check: Check) -> Generator[Claim, None, None]:
        """The direction against the class's own equations, then against the derivative of its lower steps."""
        with check.oracle() as oracle:
            answer = self._answer(oracle)
        upper = [answer.upper.get(name) for name in self._upper.names]
        loose = DIFFERENCE if self.product == "difference" else 0.0
        saved = Saved([self._lower])
        try:
            with check.plain() as plain:
                formula = self._formula(plain, answer)
            yield Same("upper direction", upper, formula.upper, formula.size, tolerance=loose)
        except NoReference as problem:
            yield Unknown("upper direction", float(squared_norm(upper).sqrt()), str(problem))
        finally:
            saved.restore()
        yield from self._more_claims(check, answer)
        yield from derivative_claims(
            check,
            self._rule,
            max(self.inner_steps, 1),
            upper,
            exact=self.exact,
            # Real steps move buffers each time, hooks clip them: the walk that is shifted here is a virtual one.
            compared=self.exact and not self.trains_first,
            tolerance=loose,
            start=self._graph_start,
        )

    def _more_claims(self, check: Check, answer: Directions[H]) -> Iterator[Claim]:
        """What a class compares beside its direction."""
        return iter(())

    @property
    def _graph_start(self) -> GraphStart:
        """Computes the lower point that the steps start from, with its graph; None: the current one."""
        return None


class _SkippedError(Exception):
    """A real lower step was not finite under ``on_nonfinite="skip"``."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss
