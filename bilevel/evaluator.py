"""The losses and their derivatives at any point: the only place that differentiates a closure.

Values of the lower variables other than the current ones reach a closure by one of two routes:

* *swap*: they are exchanged into the parameters in place, and taken out again whatever happens. It reaches every way
  of reading a parameter, and serves everything that needs no derivative *along* a direction.
* *substitute*: other tensors take their places in the modules (``substitution.py``). It carries dual tensors (forward
  mode) and graphs through the lower point, and reaches only what is read from a module.

The upper variables are never replaced: they are leaves of the graph. Where only their gradient is wanted, an evaluation
is *forward-only* through the lower model: the lower variables' flags are off. A closure can tell, so that this shortcut
is verified (``verification.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .closures import MISSING, Loss, captured, sequence_number
from .errors import ClosureError
from .inspection import explained, inspected, refuse_accumulation_hooks, refuse_one_shot, refuse_shared_memory
from .precision import Widening, float64, widened
from .replay import Policy, Replay
from .substitution import Places, plain_attention
from .variables import Level
from .vectors import Vector, exchange
from .verification import (
    BLATANT,
    DECIDED,
    Verification,
    Verify,
    coarsest,
    out_of_memory,
    rounding,
    value_gap,
    vector_gap,
)

Wrt = Literal["both", "upper", "lower"]
Point = Sequence[Tensor]
Graph = tuple[Tensor, Any]
# How torch says that a loss differentiates something that has no graph: with the lower variables' flags off.
NO_GRAPH_INSIDE = ("does not require grad", "not have been used in the graph")


@dataclass(frozen=True)
class Evaluation:
    """A loss at a point: its value and its gradients, per level (empty where it was not asked for)."""

    value: Tensor
    upper: Vector
    lower: Vector
    aux: Any = None


class Evaluator:
    """Two losses over two levels; :meth:`look` opens the look around the current point that one step takes."""

    def __init__(
        self,
        owner: str,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        upper: Level,
        lower: Level,
        modules: Sequence[tuple[nn.Module, Policy]],
        verify: Verify = "auto",
    ) -> None:
        self.owner = owner
        self.upper_loss = Loss(owner, "upper_loss", upper_loss)
        self.lower_loss = Loss(owner, "lower_loss", lower_loss)
        self.upper = upper
        self.lower = lower
        self.modules = modules
        self.verification = Verification(verify)
        refuse_shared_memory(owner, self.named_variables)

    @property
    def devices(self) -> set[torch.device]:
        return {tensor.device for level in (self.upper, self.lower) for tensor in level.tensors}

    @property
    def variables(self) -> list[Tensor]:
        return [*self.upper.tensors, *self.lower.tensors]

    @property
    def named_variables(self) -> list[tuple[str, Tensor]]:
        """The variables of both levels, as errors call them."""
        return [
            (f"{level.side} variable {name}", tensor)
            for level in (self.upper, self.lower)
            for name, tensor in zip(level.names, level.tensors, strict=True)
        ]

    def forget_checks(self) -> None:
        """The set of variables changed: what was found out about the closures no longer holds."""
        refuse_shared_memory(self.owner, self.named_variables)
        self.verification.forget()

    @contextmanager
    def look(self, upper_batch: Any, lower_batches: Sequence[Any], *, verifies: bool = True) -> Iterator[Look]:
        """Look around the current point; whatever goes wrong inside, everything is as before afterwards.

        ``verifies``: whether this is a step that counts for :class:`Verification`.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a bilevel step needs gradients, but runs under torch.inference_mode(). Leave that context first."
            )
        for side, batch in (("upper", upper_batch), *(("lower", batch) for batch in lower_batches)):
            refuse_one_shot(self.owner, side, batch)
        refuse_accumulation_hooks(self.owner, self.named_variables)
        devices = self.devices
        replay = Replay(devices, self.modules, self.variables)
        kinds = sorted({device.type for device in devices})
        if verifies:
            self.verification.begin((replay.training, *(torch.is_autocast_enabled(kind) for kind in kinds)))
        try:
            yield Look(self, replay, upper_batch, lower_batches, verifies=verifies)
        except BaseException:
            replay.undo()
            raise
        if verifies:
            self.verification.end()


class Look:
    """The losses of one step, evaluated around the current point on the batches of that step."""

    def __init__(
        self,
        evaluator: Evaluator,
        replay: Replay,
        upper_batch: Any,
        lower_batches: Sequence[Any],
        *,
        verifies: bool = True,
    ) -> None:
        self._evaluator = evaluator
        self._upper_batch = upper_batch
        self._lower_batches = lower_batches or [MISSING]
        self._verifies = verifies
        self._inspected: set[str] = set()
        self.owner = evaluator.owner
        self.replay = replay
        self.upper_level = evaluator.upper
        self.lower_level = evaluator.lower
        self._devices = evaluator.devices
        self.upper_loss = evaluator.upper_loss
        self.lower_loss = evaluator.lower_loss

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
        return coarsest(self._evaluator.variables)

    @contextmanager
    def in_float64(self) -> Iterator[Look]:
        """Look at the same losses and batches in float64, for a decision; nothing stays changed."""
        modules = [module for module, _ in self._evaluator.modules]
        with float64(modules, self._evaluator.variables), Widening():
            replay = Replay(self._devices, self._evaluator.modules, self._evaluator.variables)
            replay.follow(self.replay)
            batches = [widened(batch) for batch in self._lower_batches]
            try:
                yield Look(self._evaluator, replay, widened(self._upper_batch), batches, verifies=False)
            finally:
                replay.undo()

    def point(self) -> list[Tensor]:
        """Return the current values of the lower variables: views, not copies."""
        return [tensor.detach() for tensor in self.lower_level.tensors]

    def upper(self, at: Point | None = None, wrt: Wrt = "both") -> Evaluation:
        """Evaluate F at the current point, or with the lower variables ``at`` other values. One call of the loss."""
        loss = self.upper_loss
        evaluation = self._evaluate(loss, "upper", self._upper_batch, at, wrt)
        if wrt != "upper":
            loss.check_use("lower", evaluation.lower)
        return evaluation

    def lower(self, index: int = 0, at: Point | None = None, wrt: Wrt = "both", *, trains: bool = False) -> Evaluation:
        """Evaluate G on lower batch ``index``; a single batch serves every index. One call of the loss.

        ``trains`` marks the gradient of a real lower step: buffers move even if the batch was evaluated before.
        """
        index, batch = self._lower_batch(index)
        loss = self.lower_loss
        evaluation = self._evaluate(loss, ("lower", index), batch, at, wrt, trains)
        if wrt != "upper":
            loss.check_use("lower", evaluation.lower)
        if wrt != "lower":
            loss.check_use("upper", evaluation.upper)
        return evaluation

    def refuse_hooks(self) -> None:
        """A hook on a variable makes of its gradient something that no product is the derivative of."""
        for name, tensor in self._evaluator.named_variables:
            if tensor._backward_hooks:
                raise ClosureError(
                    f"{self.owner}: a gradient hook is registered on {name} (register_hook). {self.owner} takes "
                    "derivatives of gradients, which a hook changes and no route follows. Clip or mask in a "
                    "register_step_pre_hook of the torch optimizer, scale inside the loss, or use BOME or EBOMLC."
                )

    def check_dependence(self, product: Vector) -> None:
        """Refuse a lower loss that depends on no upper variable; its mixed derivative alone may well be absent."""
        if all(part is None for part in product):
            self.lower(wrt="upper")

    @contextmanager
    def lower_graph(
        self,
        index: int,
        at: Point | None = None,
        substitute: Point | None = None,
        *,
        current: bool = False,
        trains: bool = False,
    ) -> Iterator[Graph]:
        """Build the graph of G, and its aux, for derivatives of higher order, to be taken inside the ``with``.

        Args:
            index: Which lower batch, as in :meth:`lower`.
            at: Values to swap in.
            substitute: Instead, tensors to put in the places of the lower variables: dual tensors, or a graph.
            current: Whether these have the current values, so that buffers move as in :meth:`lower`.
            trains: Whether a real lower step is taken along the gradient, as there.
        """
        index, batch = self._lower_batch(index)
        with self._graph(self.lower_loss, ("lower", index), batch, at, substitute, current, trains) as graph:
            yield graph

    @contextmanager
    def upper_graph(self, substitute: Point, *, current: bool = False) -> Iterator[Graph]:
        """Build the graph of F with other tensors in the places of the lower variables, as in :meth:`lower_graph`.

        ``current``: as there.
        """
        with self._graph(self.upper_loss, "upper", self._upper_batch, None, substitute, current) as graph:
            yield graph

    @contextmanager
    def _graph(
        self,
        loss: Loss,
        key: Any,
        batch: Any,
        at: Point | None,
        substitute: Point | None,
        current: bool = False,
        trains: bool = False,
    ) -> Iterator[Graph]:
        # Copies: a training-mode BatchNorm would write tangents into the user's own buffers, and a kept graph may hold
        # what the next evaluation changes.
        copied = substitute is not None and not current
        with self._prepared(key, at, current=current, trains=trains, copied=copied), plain_attention():
            if substitute is None:
                graph = loss(batch, self._devices)
            else:
                frozen = not any(value.requires_grad for value in substitute)
                with self._places.holding(substitute, copy_buffers=copied):
                    graph = loss(batch, self._devices, frozen=frozen)
            yield graph

    def _apart(self, aux: Any) -> Any:
        """Return ``aux`` with copies of what is a variable or a buffer, or a view of one: those will move."""
        if aux is None:
            return None

        def apart(leaf: Any) -> Any:
            own = isinstance(leaf, Tensor) and leaf.layout == torch.strided
            return leaf.clone() if own and leaf.untyped_storage().data_ptr() in self._live else leaf

        return tree_map(apart, aux)

    @cached_property
    def _live(self) -> set[int]:
        modules = [module for module, _ in self._evaluator.modules]
        buffers = [buffer for module in modules for buffer in module.buffers()]
        return {x.untyped_storage().data_ptr() for x in (*self._evaluator.variables, *buffers)}

    @cached_property
    def _places(self) -> Places:
        return Places([module for module, _ in self._evaluator.modules], self.lower_level.tensors)

    def _lower_batch(self, index: int) -> tuple[int, Any]:
        index = min(index, len(self._lower_batches) - 1)
        return index, self._lower_batches[index]

    def _evaluate(
        self, loss: Loss, key: Any, batch: Any, at: Point | None, wrt: Wrt, trains: bool = False
    ) -> Evaluation:
        shortcut = f"{loss.name}, forward-only"
        if wrt == "upper" and shortcut not in self.verification.routes:
            try:
                found = self._evaluate_as(loss, key, batch, at, wrt, trains, freeze=True)
            except RuntimeError as error:
                if not any(mark in str(error) for mark in NO_GRAPH_INSIDE):
                    raise
                self.verification.routes[shortcut] = "gradients on"  # it differentiates inside: nothing is wrong
            else:
                return self._verified(shortcut, found, loss, key, batch, at) if self.comparing else found
        found = self._evaluate_inspected(loss, key, batch, at, wrt, trains)
        self.verification.held(loss.name, self.replay.held_count(key))
        return found

    def _evaluate_inspected(
        self, loss: Loss, key: Any, batch: Any, at: Point | None, wrt: Wrt, trains: bool
    ) -> Evaluation:
        """Evaluate plainly; in a look, see that the call changed nothing, and that a second one gives the same."""
        if not self.comparing or loss.name in self._inspected:
            return self._evaluate_as(loss, key, batch, at, wrt, trains)
        self._inspected.add(loss.name)
        modules = [module for module, _ in self._evaluator.modules]
        named = {id(x): name for name, x in self._evaluator.named_variables}
        tensors = {id(x): x for x in self._evaluator.variables}
        for module in modules:
            for name, x in module.named_parameters():
                named.setdefault(id(x), f"{name} of {type(module).__name__}")
                tensors[id(x)] = x
        watched = [(named[key], x) for key, x in tensors.items()]
        with inspected(loss.name, watched, set(map(id, self._evaluator.variables)), batch):
            found = self._evaluate_as(loss, key, batch, at, wrt, trains)
        try:
            with self.replay.silently(), self._prepared(key, at, current=at is None):
                again, _ = loss(batch, self._devices)
        except (RuntimeError, MemoryError) as error:
            self._unverified(loss.name, error)
            return found
        if bool(value_gap(found.value, again) > rounding(found.value.dtype)):
            self.verification.say(
                f"{loss.name} returned {float(found.value):.7g}, and then {float(again):.7g} for the same batch, "
                "variables and random state, so that differences of it, and its slopes, mean nothing. Usual causes: "
                "random numbers of numpy, Python or a torch.Generator of one's own, a counter, a batch or a module "
                "(not named in other=) that the loss changes. Draw such numbers outside the loss, in the batch."
            )
        return found

    def _verified(
        self, shortcut: str, found: Evaluation, loss: Loss, key: Any, batch: Any, at: Point | None
    ) -> Evaluation:
        """Compare a forward-only evaluation with the one that has every flag on, which replaces it if they differ."""
        try:
            with self.replay.silently():
                plain = self._evaluate_inspected(loss, key, batch, at, "upper", False)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._unverified(shortcut, error)
            return found
        gap = _gap(found, plain)
        if not self.verification.suspects(shortcut, gap, rounding(self.dtype)):
            return found

        def in_float64() -> float:
            with self.in_float64() as wide:
                point = None if at is None else [x.double() for x in at]
                wide_key, wide_batch = (
                    (key, wide._upper_batch) if key == "upper" else (key, wide._lower_batches[key[1]])
                )
                a, b = (
                    wide._evaluate_as(loss, wide_key, wide_batch, point, "upper", False, freeze=freeze)
                    for freeze in (False, True)
                )
                return float(_gap(a, b))

        if self.differs(shortcut, float(gap), in_float64):
            self.verification.routes[shortcut] = "gradients on"
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
            if out_of_memory(error):
                self._unverified(name, error)
            if gap > BLATANT:
                return True
            self.verification.say(
                f"{name}: differs from plain autograd by {gap:.1e}, and whether that is noise of a low precision could "
                f"not be decided in float64 ({type(error).__name__}: {error}). Nothing was changed. Compare with "
                "bilevel.check_directions."
            )
            self.verification.clear(name, gap)
            return False
        if wide > limit:
            return True
        self.verification.clear(name, gap)
        return False

    def _unverified(self, what: str, error: BaseException) -> None:
        if not out_of_memory(error):
            raise error
        self.verification.say(f"{what}: not verified, for want of memory. Nothing else is affected.")

    def _evaluate_as(
        self,
        loss: Loss,
        key: Any,
        batch: Any,
        at: Point | None,
        wrt: Wrt,
        trains: bool = False,
        *,
        freeze: bool = False,
    ) -> Evaluation:
        """Call the loss, and differentiate; ``freeze``: with the lower variables' flags off."""
        upper = list(self.upper_level.tensors) if wrt != "lower" else []
        lower = list(self.lower_level.tensors) if wrt != "upper" else []
        with self._prepared(key, at, current=at is None, freeze=freeze, trains=trains):
            since = sequence_number() if self.checking else 0
            value, aux = loss(batch, self._devices, frozen=not lower)
            if self.checking:
                self._refuse_captured(loss, value, since)
            with explained(loss.name):
                gradients = torch.autograd.grad(value, upper + lower, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None and gradient.layout != torch.strided:
                raise ClosureError(
                    f"{loss.name} gives {self._names(wrt)[index]} a gradient of layout {gradient.layout}; directions "
                    "are dense. Usual cause: Embedding(sparse=True). Build the layer with sparse=False."
                )
        return Evaluation(loss.number(value), gradients[: len(upper)], gradients[len(upper) :], self._apart(aux))

    def _names(self, wrt: Wrt) -> list[str]:
        upper = [f"upper variable {name}" for name in self.upper_level.names]
        lower = [f"lower variable {name}" for name in self.lower_level.names]
        return {"both": upper + lower, "upper": upper, "lower": lower}[wrt]

    def _refuse_captured(self, loss: Loss, value: Tensor, since: int) -> None:
        variables = (*self.upper_level.tensors, *self.lower_level.tensors)
        names = captured(value, since, dict(zip(map(id, variables), self._names("both"), strict=True)))
        if names:
            raise ClosureError(
                f"{loss.name} reads {', '.join(names)} through a tensor that was computed outside the call, so it "
                "would be evaluated at the wrong point when the variable moves. Compute that tensor inside the loss, "
                "from the variable itself."
            )

    @contextmanager
    def _prepared(
        self,
        key: Any,
        at: Point | None,
        *,
        current: bool,
        freeze: bool = False,
        trains: bool = False,
        copied: bool = False,
    ) -> Iterator[None]:
        """Surround one evaluation: replay what the batch's first one saw, swap ``at`` in and out.

        ``copied`` says that the evaluation gets copies of the buffers.
        """
        variables = [*self.upper_level.tensors, *self.lower_level.tensors]
        parameters = self.lower_level.tensors
        replayed = self.replay.evaluation(key, current=current, trains=trains, copied=copied)
        with replayed, torch.enable_grad():
            # An autocast region around the step would go on to serve casts of the values before the exchange.
            torch.clear_autocast_cache()
            if at is not None:
                exchange(parameters, at)
            try:
                if freeze:
                    # Without gradients for the lower variables this is forward-only through the lower model.
                    for parameter in parameters:
                        parameter.requires_grad_(False)
                yield
            finally:
                for variable in variables:
                    if not variable.requires_grad:
                        variable.requires_grad_(True)
                if at is not None:
                    exchange(parameters, at)
                torch.clear_autocast_cache()


def _gap(a: Evaluation, b: Evaluation) -> Tensor:
    """Return the larger of the gaps of values and of upper gradients."""
    gradients = vector_gap(a.upper, b.upper)
    return torch.maximum(value_gap(a.value, b.value).to(gradients.device, gradients.dtype), gradients)
