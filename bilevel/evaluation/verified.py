"""Evaluations of which every shortcut is compared with plain autograd of the closure.

A closure can tell that an evaluation is forward-only through the lower model, or that it is called a second time; so
that in looks (``verification.py``) it is evaluated with every flag on as well, and twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..errors import ClosureError
from ..microbatches import Sum
from ..processes.joined import Share, agreed, averaged
from ..vectors import present
from .evaluations import Evaluation, Evaluations, Key, Part, Point, Subject, Wrt
from .inspection import inspected
from .losses import Loss, sequence_number
from .precision import HALF, computes_in_half, float64, widened, widening
from .replay import Policy, Replay
from .verification import (
    BLATANT,
    DECIDED,
    Verification,
    coarsest,
    out_of_memory,
    rounding,
    value_gap,
    vector_gap,
)

# How torch says that a loss differentiates something that has no graph: with the lower variables' flags off.
NO_GRAPH_INSIDE = ("does not require grad", "not have been used in the graph")


class Lasting(Protocol):
    """What is known from step to step: of :class:`bilevel.evaluation.oracle.Evaluator`."""

    subject: Subject
    modules: Sequence[tuple[nn.Module, Policy]]
    verification: Verification


class VerifiedEvaluations(Evaluations):
    """The evaluations of one step, with verification.

    Attributes:
        plain: Whether plain autograd of the closures as they stand is asked for, and no shortcut at all.
    """

    plain = False

    def __init__(
        self,
        evaluator: Lasting,
        replay: Replay,
        upper_batches: Sequence[Any],
        lower_batches: Sequence[Any],
        *,
        verifies: bool = True,
    ) -> None:
        super().__init__(evaluator.subject, replay, upper_batches, lower_batches)
        self._evaluator = evaluator
        self._verifies = verifies
        self._inspected: set[str] = set()
        self._repeated: set[str] = set()

    @property
    def verification(self) -> Verification:
        """What is known about shortcuts, kept from step to step."""
        return self._evaluator.verification

    @property
    def watching(self) -> bool:
        """Whether shortcuts are to be verified at all."""
        return self._verifies and self.verification.mode != "never"

    @property
    def checking(self) -> bool:
        """Whether this look searches the graphs of the losses for what it cannot serve."""
        return self._verifies and self.verification.due

    @property
    def comparing(self) -> bool:
        """Whether this look calls the losses anew to compare shortcuts with plain autograd."""
        return self._verifies and self.verification.comparing

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the fewest digits among the variables."""
        return coarsest(self._subject.variables)

    @contextmanager
    def in_float64(self) -> Iterator[Self]:
        """Look at the same losses and batches in float64, for a decision; nothing stays changed."""
        if self.upper_level.sharded or self.lower_level.sharded:
            raise ClosureError(f"{self.owner}: shards of variables cannot be widened to float64.")
        with float64(self._subject.modules, self._subject.variables), widening(), warnings.catch_warnings():
            # torch.compile looks at .grad of the widened copies that a compiled module is given.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            replay = Replay(self._devices, self._evaluator.modules, self._subject.variables)
            replay.follow(self.replay)
            upper, lower = ([widened(batch) for batch in self._batches[side]] for side in ("upper", "lower"))
            try:
                yield type(self)(self._evaluator, replay, upper, lower, verifies=False)
            finally:
                replay.undo()

    def _note_precision(self, loss: Loss, value: Tensor) -> None:
        if self._precise:  # float32 by our own doing
            return
        half = not any(x.dtype in HALF for x in self._subject.variables) and computes_in_half(value)
        (self.verification.in_half.add if half else self.verification.in_half.discard)(loss.name)

    def _agree_precision(self, loss: Loss) -> None:
        if agreed(self._computes_in_half(loss), "the precision of a loss"):
            self.verification.in_half.add(loss.name)

    def _computes_in_half(self, loss: Loss) -> bool:
        return loss.name in self.verification.in_half

    def refuse_hooks(self) -> None:
        """A hook on a variable makes of its gradient something that no product is the derivative of.

        Nor has a shard of a variable one.
        """
        if self.upper_level.sharded or self.lower_level.sharded:
            raise ClosureError(
                f"{self.owner}: takes second derivatives, which fully_shard has none of: its parameters get their "
                'gradients only from .backward(). Use value_gradient="value_function" or "difference", or a model that '
                "is whole on every process."
            )
        if not any(tensor._backward_hooks for tensor in self._subject.variables):
            return
        for name, tensor in self._subject.named_variables:
            if tensor._backward_hooks:
                raise ClosureError(
                    f"{self.owner}: a gradient hook is registered on {name} (register_hook). {self.owner} takes "
                    "derivatives of gradients, which a hook changes and no route follows. Clip or mask in a "
                    "register_step_pre_hook of the torch optimizer, scale inside the loss, or use BOME or EBOMLC."
                )

    def _evaluate(self, key: Key, at: Point | None, wrt: Wrt) -> Evaluation:
        loss = self._loss(key[0])
        shortcut = f"{loss.name}, forward-only"
        if wrt == "upper" and shortcut not in self.verification.choices:
            try:
                found = self._evaluate_as(key, at, wrt, freeze=True)
            except RuntimeError as error:
                if not any(mark in str(error) for mark in NO_GRAPH_INSIDE):
                    raise
                self.verification.choices[shortcut] = "gradients on"  # it differentiates inside: nothing is wrong
            else:
                return self._verified(shortcut, found, key, at) if self.comparing else found
        found = self._evaluate_as(key, at, wrt)
        if self.comparing and loss.name not in self._repeated:
            self._repeat(found.value, key, at)
        return found

    def _has_news(self, key: Key) -> bool:
        return self.verification.holds_differ(self._loss(key[0]).name, self.replay.held_count((*key, 0)))

    def _hear(self, news: bool) -> None:
        if news:
            self.verification.look_now()

    def _repeat(self, value: Tensor, key: Key, at: Point | None) -> None:
        """See that a second call of a loss gives the same."""
        loss = self._loss(key[0])
        self._repeated.add(loss.name)
        try:

            def share() -> Share:
                total = Sum()
                for part, weight in self._parts(key):
                    _, batch = self._called(part)
                    with self.replay.silently(), self._prepared(part, at, current=at is None):
                        since = sequence_number()
                        value_again, _ = loss(batch, self._devices)
                        self._refuse_stale(loss, value_again, since)
                        total.add(weight, [loss.number(value_again)])
                    del value_again  # and its graph, before the next one is made
                return Share(present(total.total))

            again = averaged(self._place(key, "once more"), share).numbers[0]
        except (RuntimeError, MemoryError) as error:
            self._unverified(loss.name, error)
            return
        if agreed(bool(value_gap(value, again) > rounding(value.dtype))):
            self.verification.unrepeatable.add(loss.name)
            self.verification.say_of(
                loss.name,
                f"{loss.name} returned {float(value):.7g}, and then {float(again):.7g} for the same batch, "
                "variables and random state, so that differences of it, and its slopes, mean nothing. Usual causes: "
                "random numbers of numpy, Python or a torch.Generator of one's own, a counter, a batch or a module "
                "(not named in other=) that the loss changes. Draw such numbers outside the loss, in the batch.",
            )

    @contextmanager
    def _prepared(self, key: Part, at: Point | None, *, substituted: bool = False, **options: Any) -> Iterator[None]:
        """Surround one evaluation; in a look, the first one of a loss must change nothing."""
        prepared = super()._prepared(key, at, substituted=substituted, **options)
        loss, batch = self._called(key)
        if not self.comparing or loss.name in self._inspected:
            with prepared:
                yield
            return
        if not substituted:  # else it is asked again of the variables themselves
            self._inspected.add(loss.name)
        with prepared, inspected(loss.name, self._watched(), set(map(id, self._subject.variables)), batch):
            yield

    def _watched(self) -> list[tuple[str, Tensor]]:
        """The variables and all other parameters of the known modules, as errors call them."""
        found = {id(x): (name, x) for name, x in self._subject.named_variables}
        for module in self._subject.modules:
            for name, x in module.named_parameters():
                found.setdefault(id(x), (f"parameter {name} of {type(module).__name__}", x))
        return list(found.values())

    def _verified(self, shortcut: str, found: Evaluation, key: Key, at: Point | None) -> Evaluation:
        """Compare a forward-only evaluation with the one that has every flag on, which replaces it if they differ."""
        loss = self._loss(key[0])
        try:
            with self.replay.silently():
                plain = self._evaluate_as(key, at, "upper")
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._unverified(shortcut, error)
            return found
        gap = _gap(found, plain)
        if loss.name in self.verification.unrepeatable:
            return found
        if not self.verification.suspects(shortcut, gap, rounding(self.dtype)):
            return found

        def in_float64() -> float:
            with self.in_float64() as wide:
                point = None if at is None else [x.double() for x in at]
                a, b = (wide._evaluate_as(key, point, "upper", freeze=freeze) for freeze in (False, True))
                return float(_gap(a, b))

        if self.differs(shortcut, float(gap), in_float64):
            self.verification.choices[shortcut] = "gradients on"
            self.verification.say(
                f"{loss.name} is another function where its lower variables need no gradient (by {float(gap):.1e}). "
                "Usual causes: a condition on requires_grad or torch.is_grad_enabled(), such as a penalty on [p for p "
                "in model.parameters() if p.requires_grad]. Choose the parameters once, outside the loss, by name. "
                "From now on it is evaluated with all gradients on, at more memory."
            )
        return plain

    def differs(self, name: str, gap: float, in_float64: Callable[[], float], limit: float = DECIDED) -> bool:
        """Decide a suspicion: whether two routes, ``gap`` apart here, are more than ``limit`` apart in float64 as well.

        Where float64 cannot be asked, only a blatant difference counts; another one is told, and changes nothing.
        """
        try:
            wide = in_float64()
        except Exception as error:  # whatever a closure may say to float64
            if agreed(gap > BLATANT):  # what replaces a shortcut is right in any case
                return True
            if out_of_memory(error):
                self._unverified(name, error)
            else:
                self.verification.say(
                    f"{name}: differs from plain autograd by {gap:.1e}, and whether that is noise of a low precision "
                    f"could not be decided in float64 ({type(error).__name__}: {error}). Nothing was changed. Compare "
                    "with bilevel.check_directions."
                )
            self.verification.clear(name, gap)
            return False
        if agreed(wide > limit):
            return True
        self.verification.clear(name, gap)
        return False

    def _unverified(self, what: str, error: BaseException) -> None:
        if not out_of_memory(error):
            raise error
        self.verification.say(f"{what}: not verified, for want of memory. Nothing else is affected.")


def _gap(a: Evaluation, b: Evaluation) -> Tensor:
    """Return the larger of the gaps of values and of upper gradients."""
    gradients = vector_gap(a.upper, b.upper)
    return torch.maximum(value_gap(a.value, b.value).to(gradients.device, gradients.dtype), gradients)
