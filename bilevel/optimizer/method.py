"""What an author of a method has: two levels, an oracle to ask, options that are checked, and state as values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Generic, Literal, Required, TypedDict, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..checks.check import Check
from ..checks.checker import Checker, method_checks
from ..directions import Directions, Reduction, S, Stats
from ..errors import choice, message
from ..evaluation.oracle import Evaluator, Oracle
from ..evaluation.replay import Policy
from ..evaluation.scaling import Scaling
from ..evaluation.verification import Verify
from ..feasible import FeasibleSet, Projected
from ..levels import Level, Variables, check_disjoint
from ..lower_hyperparameters import LowerHyperparameters
from ..lower_steps import GradientDescent, InnerStep, OptimizerStep, Rule, check_followed, current_rates
from ..processes.group import Group, processes_of, refuse_apart, refuse_other_shards
from ..processes.joined import Processes, acting
from ..projection import Projections
from ..settings import Fixed, Settable, Setting, chosen, counted, numeric
from ..shards import is_shard
from . import orders
from .hooks import VIRTUAL, HookWatch
from .method_state import LevelState, MethodState, NumberState, Remembered, ScalarState, StateStart
from .moves import OnNonFinite
from .table_state import TableState

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
    scaler: torch.amp.GradScaler | None
    process_group: Group
    upper_projection: Projections | None
    lower_projection: Projections | None


class Method(Settable, ABC, Generic[S]):
    """The side of :class:`bilevel.BilevelOptimizer` that authors of methods use; see there for the arguments."""

    order: orders.Order = orders.AT_ONCE  # in which order the two levels move
    walks_virtually: ClassVar[bool] = False  # whether lower steps are taken that move nothing
    knows_shards: ClassVar[bool] = False  # whether variables may be sharded: first derivatives alone, all at once
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
    scaler = Fixed[torch.amp.GradScaler | None]()
    upper_projection, lower_projection = Fixed[Projections | None](), Fixed[Projections | None]()
    verify = Setting[Verify](chosen("auto", "always", "never"))
    process_group = Fixed[Group]()

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
        scaler: torch.amp.GradScaler | None = None,
        process_group: Group = None,
        upper_projection: Projections | None = None,
        lower_projection: Projections | None = None,
    ) -> None:
        owner = type(self).__name__
        self.on_nonfinite = on_nonfinite
        self.verify = verify
        for argument, policy in (("upper_buffers", upper_buffers), ("lower_buffers", lower_buffers)):
            choice(owner, argument, policy, ("once", "every", "never"))
        shards = self.knows_shards
        self._upper = Level(owner, "upper", upper, upper_optimizer, may_shard=shards)
        self._lower = Level(
            owner, "lower", lower, lower_optimizer, may_maximize=self.follows_maximize, may_shard=shards
        )
        check_disjoint(self._upper, self._lower)
        self.__dict__.update(upper_projection=upper_projection, lower_projection=lower_projection)
        self._upper_set = FeasibleSet(owner, self._upper, upper_projection)
        self._lower_set = FeasibleSet(owner, self._lower, lower_projection)
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
        self.__dict__["scaler"] = scaler
        self._scaling = None if scaler is None else Scaling(owner, scaler)
        self._hooks = HookWatch(owner, self._lower)
        self._learned: LowerHyperparameters | None = None  # what the lower groups hold, if upper variables say so
        self.__dict__["process_group"] = process_group
        self._processes: Processes | None = None
        self._join_processes()

    def _join_processes(self) -> None:
        """Find out whether other processes take the steps too, at first or since a group was made."""
        owner = type(self).__name__
        self._processes = processes_of(owner, self.process_group)
        if self._processes is None and not (self._upper.sharded or self._lower.sharded):
            return
        named = self._evaluator.subject.named_variables
        refuse_other_shards(owner, self._processes, [(n, x) for n, x in named if is_shard(x)])
        if self._processes is not None:
            with acting(self._processes, owner):
                refuse_apart(owner, self._processes, [(n, x) for n, x in named if not is_shard(x)])

    @property
    def upper_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer of the upper level, as it was passed, without a wrapper."""
        return self._upper.optimizer

    @property
    def lower_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer of the lower level, as it was passed, without a wrapper."""
        return self._lower.optimizer

    @property
    def processes(self) -> Processes | None:
        """The processes that take every step together, and what this one has sent; None: this one steps alone."""
        return self._processes

    @property
    def lower_batches(self) -> int:
        """How many lower batches :meth:`step` takes, if not a single one for all inner steps."""
        return max(self.inner_steps, 1)

    @property
    def ignores_clipping(self) -> str | None:
        """What a clip by a hook of the lower optimizer makes wrong, said once it acts; None: nothing.

        Virtual steps do not follow it; but a rate of their own was chosen for what it is.
        """
        return VIRTUAL if self.walks_virtually and self.inner_lr is None else None

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

        With ``inner_step="optimizer"`` it is the step that the lower optimizer would take from its real state. The
        projection of the lower level, if there is one, is part of it.
        """
        if self.inner_step == "optimizer":
            check_followed(type(self).__name__, self.lower_optimizer, 'inner_step="gradient" for gradient descent')
            return self.projected(OptimizerStep(self._lower, self.inner_lr))
        return self.projected(GradientDescent(self.lower_rates(self.inner_lr)))

    def projected(self, rule: Rule) -> Rule:
        """Return the lower step that is followed by the projection of the lower level, if there is one."""
        return Projected(rule, self._lower_set) if self._lower_set.bounded else rule

    def lower_rates(self, rate: float | None = None) -> list[float | Tensor]:
        """Return the current learning rate of each lower variable, or ``rate`` for all if it is given."""
        return current_rates(self._lower, rate)

    def lower_groups(self) -> list[dict[str, Any]]:
        """Return the lower optimizer's parameter group of each lower variable."""
        return self._lower.groups()

    @property
    def upper_level(self) -> Level:
        """The upper variables: their names, tensors, modules and torch optimizer."""
        return self._upper

    @property
    def lower_level(self) -> Level:
        """The same of the lower variables."""
        return self._lower

    @property
    def upper_set(self) -> FeasibleSet:
        """The set that the upper variables stay in."""
        return self._upper_set

    @property
    def lower_set(self) -> FeasibleSet:
        """The set that the lower variables stay in."""
        return self._lower_set

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

    def number_state(self, name: str, start: float, *, reduction: Reduction | None = None) -> NumberState:
        """Declare a number that steps compute, such as a multiplier: a 0-dim tensor, at first ``start``."""
        return self._declared(NumberState(name, self._lower, start, reduction))

    def table_state(self, name: str, rows: int, *, like: Literal["upper", "lower"] = "lower") -> TableState:
        """Declare a table with a row like the variables of a level for each of ``rows`` batches of a data set."""
        return self._declared(TableState(name, self._lower if like == "lower" else self._upper, rows))

    def _declared(self, entry: E) -> E:
        self._state.declare(entry)
        return entry
