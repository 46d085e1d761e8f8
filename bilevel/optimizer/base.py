"""``BilevelOptimizer``: the state, the checks and the torch optimizers around a method's mathematics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar, Generic, Literal, Required, TypedDict, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from ..batches import several
from ..checks.check import Check
from ..checks.checker import Checker, method_checks
from ..compiler import eager
from ..directions import Directions, Reduction, S, Stats, T
from ..errors import choice, message
from ..evaluation.losses import MISSING
from ..evaluation.oracle import Evaluator, Oracle
from ..evaluation.replay import Policy
from ..evaluation.verification import Verify
from ..levels import Level, Variables, check_disjoint
from ..lower_steps import GradientDescent, InnerStep, OptimizerStep, Rule, check_followed, current_rates
from ..settings import Fixed, Setting, chosen, counted, numeric
from ..wrappers import unwrapped, warn_of_processes
from . import orders
from .apply import check_groups, check_state
from .hooks import HookWatch
from .method_state import LevelState, MethodState, Remembered, ScalarState, StateStart, TableState
from .moves import Moved, Moves, OnNonFinite, SkippedStep

Losses = Callable[..., Any]
E = TypeVar("E", bound=Remembered[Any])


class Common(TypedDict, total=False):
    """The keyword arguments that every method passes on to :class:`BilevelOptimizer`, which documents them."""

    upper: Required[Variables]
    lower: Required[Variables]
    upper_optimizer: Required[torch.optim.Optimizer]
    lower_optimizer: Required[torch.optim.Optimizer]
    on_nonfinite: OnNonFinite
    other: nn.Module | Iterable[nn.Module]
    upper_buffers: Policy
    lower_buffers: Policy
    verify: Verify


class BilevelOptimizer(ABC, Generic[S]):
    """Moves upper variables ``alpha`` to lower ``F(w, alpha)`` where ``w`` (approximately) minimises ``G(w, alpha)``.

    A method is a subclass with :meth:`compute`: it asks an oracle about the two losses around the current point and
    answers with directions. Everything else (which tensors, where closures are evaluated, what may change, the torch
    optimizers, checkpoints) is here. "Write your own method" in the docs builds one.

    Args:
        upper_loss: F, a closure that takes the upper batch and returns a scalar tensor or ``(scalar, aux)``.
        lower_loss: G, the same for a lower batch.
        upper: The upper variables: an ``nn.Module``, a ``Parameter``, or an iterable of them.
        lower: The lower variables.
        upper_optimizer: The torch optimizer that moves the upper variables.
        lower_optimizer: The torch optimizer that moves the lower variables.
        on_nonfinite: What a NaN or an infinity in a loss or a direction does: ``"raise"`` (default: silence hides
            divergence), ``"skip"`` the step, or ``"ignore"`` it. The first two move nothing, and cost one
            synchronisation with the device per step.
        other: Further modules that the closures use (averaged teachers, frozen extractors), whose buffers look-ahead
            evaluations must leave alone.
        upper_buffers: When the buffers of the upper modules (BatchNorm statistics) move: ``"once"`` a step, by the
            first loss at the current point that calls the module, the lower loss first; in ``"every"`` evaluation;
            ``"never"``.
        lower_buffers: The same for the lower modules.
        verify: Whether fast routes are compared with plain autograd of your closures: ``"auto"`` (default) in looks, at
            steps 1, 2, 4, ..., 1024, 2048, ... and after changes; ``"always"`` in every step; ``"never"``, which calls
            no loss beyond the documented number.
    """

    order: orders.Order = orders.AT_ONCE  # in which order the two levels move
    follows_maximize: ClassVar[bool] = False  # whether a lower optimizer may walk uphill
    stats_class: ClassVar[type[Stats]] = Stats  # what compute returns, from the type argument of the class

    # What many methods have; a class that has it takes it in its constructor and documents it.
    inner_steps = Setting[int](counted(1), default=1)
    inner_lr = Setting[float | None](numeric(0.0, exclusive=True, optional=True), default=None)
    inner_step = Setting[InnerStep](chosen("gradient", "optimizer"), default="gradient")
    atomic = Setting[bool](chosen(True, False), default=True)

    on_nonfinite = Setting[OnNonFinite](chosen("raise", "skip", "ignore"))
    upper_loss, lower_loss, upper, lower, other = Fixed[Any](), Fixed[Any](), Fixed[Any](), Fixed[Any](), Fixed[Any]()
    upper_buffers, lower_buffers = Fixed[Any](), Fixed[Any]()
    verify = Setting[Verify](chosen("auto", "always", "never"))

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__dict__.get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, Stats):
                    cls.stats_class = argument

    def __init__(
        self,
        upper_loss: Losses,
        lower_loss: Losses,
        *,
        upper: Variables,
        lower: Variables,
        upper_optimizer: torch.optim.Optimizer,
        lower_optimizer: torch.optim.Optimizer,
        on_nonfinite: OnNonFinite = "raise",
        other: nn.Module | Iterable[nn.Module] = (),
        upper_buffers: Policy = "once",
        lower_buffers: Policy = "once",
        verify: Verify = "auto",
    ) -> None:
        owner = type(self).__name__
        self.on_nonfinite = on_nonfinite
        self.verify = verify
        for argument, policy in (("upper_buffers", upper_buffers), ("lower_buffers", lower_buffers)):
            choice(owner, argument, policy, ("once", "every", "never"))
        self._upper = Level(owner, "upper", upper, upper_optimizer)
        self._lower = Level(owner, "lower", lower, lower_optimizer, may_maximize=self.follows_maximize)
        check_disjoint(self._upper, self._lower)
        extra = [other] if isinstance(other, nn.Module) or not isinstance(other, Iterable) else list(other)
        for item in extra:
            if not isinstance(item, nn.Module):
                advice = "must be modules. Tensors need no mention: nothing moves them."
                raise TypeError(message(owner, "other", type(item).__name__, advice))
        modules: list[tuple[nn.Module, Policy]] = [(module, lower_buffers) for module in self._lower.modules]
        modules += [(module, upper_buffers) for module in self._upper.modules]
        modules += [(module, "once") for module in extra]
        self._evaluator = Evaluator(owner, upper_loss, lower_loss, self._upper, self._lower, modules, verify)
        self._state = MethodState()
        self._warned_of_processes = False
        self._hooks = HookWatch(owner, self._lower)

    @property
    def upper_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer of the upper level, as it was passed."""
        return self._upper.optimizer

    @property
    def lower_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer of the lower level, as it was passed."""
        return self._lower.optimizer

    @property
    def lower_batches(self) -> int:
        """How many lower batches :meth:`step` takes, if not a single one for all inner steps."""
        return max(self.inner_steps, 1)

    @property
    def ignores_clipping(self) -> str | None:
        """What a clip by a hook of the lower optimizer makes wrong, said once it acts; None: nothing."""
        return None

    @abstractmethod
    def compute(self, oracle: Oracle) -> Directions[S]:
        """Ask ``oracle`` about the two losses around the current point, and answer with directions.

        It may be called at any time, and any number of times: everything that it changes goes through ``oracle.train``,
        which can be taken back, and ``Directions.state``, which is committed when the step is taken.
        """

    def checks(self, checker: Checker) -> Iterator[Check]:
        """What ``check_directions`` compares, one by one.

        By default the gradients of both losses with finite differences; and the directions, and the tensors that the
        method remembers, with those of :meth:`compute` when its oracle answers by plain autograd of the closures alone.
        """
        return method_checks(checker, self.compute, lambda oracle: (oracle.lower(), oracle.upper()))

    def inner_rule(self) -> Rule:
        """Return the virtual lower step: gradient descent at ``inner_lr``, or at the lower optimizer's current rates.

        With ``inner_step="optimizer"`` it is the step that the lower optimizer would take from its real state.
        """
        if self.inner_step == "optimizer":
            check_followed(type(self).__name__, self.lower_optimizer, 'inner_step="gradient" for gradient descent')
            return OptimizerStep(self._lower, self.inner_lr)
        return GradientDescent(self.lower_rates(self.inner_lr))

    def lower_rates(self, rate: float | None = None) -> list[float | Tensor]:
        """Return the current learning rate of each lower variable, or ``rate`` for all if it is given."""
        return current_rates(self._lower, rate)

    def lower_groups(self) -> list[dict[str, Any]]:
        """Return the lower optimizer's parameter group of each lower variable."""
        return self._lower.groups()

    @property
    def upper_names(self) -> tuple[str, ...]:
        """The names of the upper variables, in the order of vectors."""
        return self._upper.names

    @property
    def lower_names(self) -> tuple[str, ...]:
        """The names of the lower variables, in the order of vectors."""
        return self._lower.names

    def upper_state(
        self, name: str, *, start: StateStart = "nothing", reduction: Reduction | None = None
    ) -> LevelState:
        """Declare tensors like the upper variables that the method remembers from step to step.

        Args:
            name: Their name in ``Directions.state`` and in ``state_dict``.
            start: What they are at first: ``"nothing"`` (None for each variable), ``"zeros"``, or the ``"variables"``.
            reduction: ``"mean"`` if :meth:`Directions.mean` may average them over tasks; None: it refuses.
        """
        return self._declared(LevelState(name, self._upper, start, reduction))

    def lower_state(
        self, name: str, *, start: StateStart = "nothing", reduction: Reduction | None = None
    ) -> LevelState:
        """Declare tensors like the lower variables; see :meth:`upper_state`."""
        return self._declared(LevelState(name, self._lower, start, reduction))

    def scalar_state(self, name: str, start: int = 0, *, reduction: Reduction | None = "same") -> ScalarState:
        """Declare an integer, such as a counter; ``"same"``: tasks that are averaged must agree on it."""
        return self._declared(ScalarState(name, start, reduction))

    def table_state(self, name: str, rows: int, *, like: Literal["upper", "lower"] = "lower") -> TableState:
        """Declare a table with a row like the variables of a level for each of ``rows`` batches of a data set."""
        return self._declared(TableState(name, self._lower if like == "lower" else self._upper, rows))

    @eager
    def step(self, *batches: Any, upper: Any = MISSING, lower: Any = MISSING) -> S:
        """Take one step: directions at the current point, handed to the two torch optimizers.

        Args:
            batches: The upper batch, then one lower batch for all inner steps or exactly ``inner_steps`` of them. A
                loss gets its batch untouched; a side without a batch is called without arguments.
            upper: The upper batch, by name.
            lower: One lower batch, by name.

        Returns:
            The stats of the step.

        Raises:
            TypeError: A wrong number of batches.
            ClosureError: A loss broke its contract; nothing changed.
            NonFiniteError: Under ``on_nonfinite="raise"``; nothing changed.
        """
        with self._oracle(batches, upper, lower) as oracle, self._moving(oracle) as moves:
            try:
                return self.order.step(self.compute, oracle, moves)
            except SkippedStep as bad:
                moves.undo()
                return cast(S, self.stats_class.unknown(bad.loss))

    @eager
    def directions(self, *batches: Any, upper: Any = MISSING, lower: Any = MISSING) -> Directions[S]:
        """Compute what :meth:`step` would hand to the torch optimizers, and move nothing.

        Parameters, buffers, ``.grad``, optimizer state, random state, ``requires_grad`` and training flags are as
        before, bit for bit.
        """
        with self._oracle(batches, upper, lower) as oracle, self._looking(oracle):
            answer = self.compute(oracle)
            return replace(answer, mark=self._state.mark())

    @eager
    def apply(self, directions: Directions[T]) -> T:
        """Write ``directions`` into ``.grad`` and step both torch optimizers; a non-finite direction is treated as in
        :meth:`step`.

        Every ``.grad`` that the optimizers hold is replaced; afterwards ``.grad`` holds the direction. Tensors are
        copied, so hooks that clip in place leave ``directions`` as they are. What the method remembers is committed
        as in :meth:`step`.

        Raises:
            ValueError: They do not fit, or a step has moved the method's state since they were taken.
        """
        if not isinstance(directions, Directions):
            advice = "must be what directions(...) returned, or Directions.mean of several."
            raise TypeError(message(f"{type(self).__name__}.apply", "directions", type(directions).__name__, advice))
        self._refresh()
        if directions.state and self._state.is_stale(directions.mark):
            advice = (
                "were taken before another step moved the method's state, or from another optimizer. "
                "Take directions(...) anew after each step."
            )
            raise ValueError(message(f"{type(self).__name__}.apply", "directions", "...", advice))
        own = replace(
            directions,
            upper={name: d.clone() for name, d in directions.upper.items()},
            lower={name: d.clone() for name, d in directions.lower.items()},
            state=deepcopy(dict(directions.state)),
        )
        return Moves(self._moved(), None).apply(own)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state of both torch optimizers and of the method; modules are saved by their own
        ``state_dict``.

        Unlike torch's, it shares no tensor with the running optimizers: later steps leave it as it is.
        """
        return {
            "format": 1,
            "method": type(self).__name__,
            "upper_optimizer": deepcopy(self._upper.optimizer.state_dict()),
            "lower_optimizer": deepcopy(self._lower.optimizer.state_dict()),
            "state": self._state.copy(),
            "verification": self._evaluator.verification.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; a state that does not fit is refused and changes nothing.

        Raises:
            ValueError: The state is of another method, of a newer format, or does not fit the optimizers.
        """
        owner = f"{type(self).__name__}.load_state_dict"
        expected = {"format", "method", "upper_optimizer", "lower_optimizer", "state", "verification"}
        if not isinstance(state_dict, Mapping) or set(state_dict) != expected:
            found = sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            advice = f"must have the keys {sorted(expected)}. A module's state? Pass the result of state_dict()."
            raise ValueError(message(owner, "state_dict", found, advice))
        if state_dict["format"] != 1:
            advice = "is a format that this version of bilevel does not know. Update bilevel."
            raise ValueError(message(owner, "format", state_dict["format"], advice))
        if state_dict["method"] != type(self).__name__:
            advice = f"is the state of another method; this optimizer is {type(self).__name__}."
            raise ValueError(message(owner, "method", state_dict["method"], advice))
        try:
            state = self._state.loaded(deepcopy(state_dict["state"]))
        except Exception as error:
            advice = f"does not fit ({error}). Name and shape the variables as they were when the state was saved."
            raise ValueError(message(owner, "state", "...", advice)) from error
        before = [(level.optimizer, level.optimizer.state_dict()) for level in (self._upper, self._lower)]
        try:
            # Copies, because torch keeps the tensors it is given and would write into the caller's checkpoint.
            for level in (self._upper, self._lower):
                loaded = deepcopy(state_dict[f"{level.side}_optimizer"])
                check_groups(level.optimizer, loaded)
                level.optimizer.load_state_dict(loaded)
                check_state(level.optimizer)
                level.check_direction()
            self._evaluator.verification.load(state_dict["verification"])
            self._state.commit(state)
        except Exception as error:
            for optimizer, state in before:
                optimizer.load_state_dict(state)
            advice = f"does not fit ({error}). Build the torch optimizers as they were when the state was saved."
            raise ValueError(message(owner, "state_dict", "...", advice)) from error

    def _declared(self, entry: E) -> E:
        self._state.declare(entry)
        return entry

    def _moved(self) -> Moved:
        return Moved(
            type(self).__name__,
            self._upper,
            self._lower,
            self._state,
            self._hooks,
            self.on_nonfinite,
            self.atomic,
            self.ignores_clipping,
        )

    @contextmanager
    def _moving(self, oracle: Oracle) -> Iterator[Moves]:
        """Let a step move the variables; what it moved is taken back if it fails."""
        oracle.moves = moves = Moves(self._moved(), oracle.replay)
        try:
            yield moves
        except BaseException:
            moves.undo()
            raise

    @contextmanager
    def _looking(self, oracle: Oracle) -> Iterator[None]:
        """Let the method move what it likes, and take it back."""
        oracle.moves = moves = Moves(self._moved(), oracle.replay, looking=True)
        try:
            yield
        finally:
            moves.undo()
            oracle.replay.undo()

    @contextmanager
    def _oracle(
        self,
        batches: Sequence[Any],
        upper: Any = MISSING,
        lower: Any = MISSING,
        *,
        kind: type[Oracle] = Oracle,
        verifies: bool = True,
    ) -> Iterator[Oracle]:
        upper_batch, lower_batches = self._sort_batches(batches, upper, lower)
        self._refresh()
        if not self._warned_of_processes:
            self._warned_of_processes = True
            warn_of_processes(type(self).__name__)
        self._evaluator.verification.mode = self.verify
        looking = self._evaluator.oracle(several(upper_batch), lower_batches, kind=kind, verifies=verifies)
        with looking as oracle, unwrapped(type(self).__name__):
            yield oracle

    def _sort_batches(self, batches: Sequence[Any], upper: Any, lower: Any) -> tuple[Any, list[Any]]:
        owner = f"{type(self).__name__}.step"
        rest = list(batches)
        if upper is not MISSING and rest:
            raise TypeError(
                f"{owner}: got upper= and {len(rest)} positional batch(es). Pass them by position or by name."
            )
        upper_batch = rest.pop(0) if rest else upper
        if lower is not MISSING and rest:
            raise TypeError(f"{owner}: got lower= and {len(rest)} positional lower batch(es). Pass lower batches once.")
        lower_batches = rest if lower is MISSING else [lower]
        expected = self.lower_batches
        if len(lower_batches) not in (0, 1, expected):
            allowed = (
                "1 lower batch"
                if expected == 1
                else f"1 lower batch for all inner steps or exactly {expected}, one each"
            )
            raise TypeError(
                f"{owner}: got {len(lower_batches)} lower batches, expected {allowed} (inner_steps={expected})."
            )
        return upper_batch, lower_batches

    def _refresh(self) -> None:
        """Pick up variables that were frozen, unfrozen or added to an optimizer since the last step, or refuse them."""
        for level in (self._upper, self._lower):
            if level.refresh():
                self._evaluator.forget_checks()
        # Each time: what was refused once must not pass the next time, when it is no longer a change.
        check_disjoint(self._upper, self._lower)
