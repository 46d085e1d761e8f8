"""What a method answers with: directions for the levels, and the numbers that were seen on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from .errors import message
from .vectors import Vector, without_aliasing


class Evaluated(Protocol):
    """A loss that was evaluated: :class:`bilevel.evaluation.evaluations.Evaluation`."""

    @property
    def value(self) -> Tensor: ...

    @property
    def aux(self) -> Any: ...


@dataclass(frozen=True)
class Stats:
    """The numbers of one step, as 0-dim tensors on the device; :meth:`as_dict` gives floats.

    Attributes:
        upper_loss: F at the current point.
        lower_loss: G at the current point, on the first lower batch.
        upper_moved: Whether this step moved the upper variables.
        skipped: Whether ``on_nonfinite="skip"``, or an overflow under a ``scaler``, dropped the step.
        upper_aux: What the upper loss returned beside its value at the current point, detached.
        lower_aux: The same for the lower loss.
        loss_scale: The scale of this step's derivatives, where there is a ``scaler``.

    Example:
        >>> import torch, bilevel
        >>> bilevel.Stats(upper_loss=torch.tensor(2.0), lower_loss=torch.tensor(1.0)).as_dict()["upper_loss"]
        2.0
    """

    upper_loss: Tensor
    lower_loss: Tensor
    upper_moved: bool = False
    skipped: bool = False
    upper_aux: Any = None
    lower_aux: Any = None
    loss_scale: Tensor | None = None

    @classmethod
    def of(cls, upper: Evaluated, lower: Evaluated, **numbers: Any) -> Self:
        """Return the stats of a step from the evaluations of F and G, and the method's own numbers.

        Example:
            >>> import bilevel
            >>> problem = bilevel.problems.quadratic(seed=0)
            >>> with bilevel.testing.oracle(problem) as oracle:
            ...     stats = bilevel.HypergradientStats.of(oracle.upper(), oracle.lower(), product="forward")
            >>> stats.product
            'forward'
        """
        return cls(upper_loss=upper.value, lower_loss=lower.value, upper_aux=upper.aux, lower_aux=lower.aux, **numbers)

    @classmethod
    def unknown(cls, lower_loss: Tensor) -> Self:
        """Return the stats of a step that was skipped while it was computed: NaN for every number without a default."""
        nan = torch.full_like(lower_loss, float("nan"))
        needed = [entry.name for entry in fields(cls) if entry.default is MISSING and entry.default_factory is MISSING]
        numbers: dict[str, Any] = dict.fromkeys(needed, nan)
        return cls(**{**numbers, "lower_loss": lower_loss, "skipped": True})

    def as_dict(self) -> dict[str, float]:
        """Return every number as a float under its name: the only place that waits for the device.

        Flags become 0.0 or 1.0. An ``aux`` that is a scalar appears under its name, one that is a mapping contributes
        its scalars as ``upper_aux/key``; everything else in ``aux`` is left out.
        """
        numbers: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Mapping):
                numbers.update({f"{entry.name}/{key}": item for key, item in value.items()})
            else:
                numbers[entry.name] = value
        found = {name: value for name, value in numbers.items() if _is_number(value)}
        scalars = [name for name, value in found.items() if isinstance(value, Tensor)]
        for device in {found[name].device for name in scalars}:
            here = [name for name in scalars if found[name].device == device]
            wide = torch.float32 if device.type == "mps" else torch.float64
            values = torch.stack([found[name].detach().reshape(()).to(wide) for name in here]).tolist()
            found.update(zip(here, values, strict=True))
        return {name: float(value) for name, value in found.items()}


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (bool, int, float))


if TYPE_CHECKING:
    import typing_extensions  # where a type variable has a default; Python has it from 3.13 on

    S = typing_extensions.TypeVar("S", bound=Stats, covariant=True, default=Stats)
else:
    S = TypeVar("S", bound=Stats, covariant=True)
T = TypeVar("T", bound=Stats)

NamedTensors = Mapping[str, Tensor]
Rows = Mapping[int, NamedTensors]  # rows of a table, by number
StateValue = NamedTensors | Rows | Tensor | int
Reduction = Literal["mean", "same"]


@dataclass(frozen=True)
class Mark:
    """Which state of which optimizer directions were taken from; how each value goes together over several tasks."""

    owner: int
    version: int
    reductions: Mapping[str, Reduction | None]


@dataclass(frozen=True)
class Directions(Generic[S]):
    """What ``step`` hands to the two torch optimizers: for each level, named tensors in parameter order.

    A method builds it from vectors, and users read it by name. A variable that neither loss uses is absent; its
    ``.grad`` becomes None.

    Attributes:
        upper: Descent directions of the upper variables; none: they stay as they are.
        lower: Descent directions of the lower variables (none for methods that train them otherwise).
        stats: The numbers seen on the way.
        start: Values of the lower variables that the lower step starts from instead of the current ones, or None.
        state: What the method will remember once these directions have moved the variables, by name: tensors by
            variable, a number, or rows of a table by number. ``step`` and ``apply`` commit it; empty for most
            methods.
        mark: Which state they were taken from; ``apply`` refuses them once it has moved on.

    Example:
        >>> import torch, bilevel
        >>> stats = bilevel.Stats(torch.tensor(1.0), torch.tensor(1.0))
        >>> tasks = [bilevel.Directions({"a": torch.ones(1) * k}, stats=stats) for k in (1, 3)]
        >>> bilevel.Directions.mean(tasks).upper
        {'a': tensor([2.])}
    """

    upper: Mapping[str, Tensor]
    lower: Mapping[str, Tensor]
    stats: S
    start: Mapping[str, Tensor] | None
    state: Mapping[str, StateValue]
    mark: Mark | None = field(repr=False, compare=False)

    def __init__(
        self,
        upper: Vector | NamedTensors = MappingProxyType({}),
        lower: Vector | NamedTensors = MappingProxyType({}),
        stats: S | None = None,
        *,
        start: Vector | NamedTensors | None = None,
        state: Mapping[str, Any] = MappingProxyType({}),
        mark: Mark | None = None,
    ) -> None:
        if stats is None:
            raise TypeError(message("Directions", "stats", None, "must be the numbers of the step: a Stats."))
        values = {
            "upper": _named(upper),
            "lower": _named(lower),
            "stats": stats,
            "start": None if start is None else _named(start),
            "state": {name: _remembered(value) for name, value in state.items()},
            "mark": mark,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def mean(several: list[Directions[T]]) -> Directions[T]:
        """Average the directions of several tasks, taken at one point; stats are those of the last, with mean losses.

        What the method remembers is averaged where its declaration says that the mean is right (estimates that are
        linear in the directions), and must agree where it says so (counters).

        Raises:
            ValueError: The list is empty, names differ, a lower start is among them (starts of different tasks cannot
                be averaged), they were taken before and after a step, or the method's state has no mean.
        """
        if not several:
            raise ValueError("Directions.mean(several=[]): needs at least one. Collect directions in a list first.")
        if any(d.start is not None for d in several):
            advice = 'lower steps start from different points. Use step_from="current" to average tasks.'
            raise ValueError(f"Directions.mean(several=...): {advice}")
        last = several[-1]
        for d in several:
            if list(d.upper) != list(last.upper) or list(d.lower) != list(last.lower):
                raise ValueError(
                    "Directions.mean(several=...): the names differ. Average directions of one optimizer only."
                )
        stats = replace(
            last.stats,
            upper_loss=torch.stack([d.stats.upper_loss for d in several]).mean(),
            lower_loss=torch.stack([d.stats.lower_loss for d in several]).mean(),
            skipped=any(d.stats.skipped for d in several),
        )
        upper, lower = _mean([d.upper for d in several]), _mean([d.lower for d in several])
        return Directions(upper, lower, stats=stats, state=_mean_state(several), mark=last.mark)


def _named(values: Vector | NamedTensors) -> NamedTensors:
    """Name the tensors of a vector; as ``.grad``, two of them must not share memory."""
    return values.like(without_aliasing(values)).named() if isinstance(values, Vector) else values


def _remembered(value: Any) -> StateValue:
    """Name what a method remembers: a vector, rows of a table, or what is named already."""
    if isinstance(value, Vector):
        return value.detach().named()
    if isinstance(value, Mapping) and any(isinstance(row, Vector) for row in value.values()):
        return {index: _named(row.detach()) for index, row in value.items()}
    found: StateValue = value.detach() if isinstance(value, Tensor) else value
    return found


def _mean(several: Sequence[NamedTensors]) -> dict[str, Tensor]:
    return {name: torch.stack([named[name] for named in several]).mean(0) for name in several[-1]}


def _mean_state(several: Sequence[Directions[Any]]) -> dict[str, StateValue]:
    """Reduce each value of the state as its declaration says."""
    last, where = several[-1], "Directions.mean(several=...):"
    if any(list(d.state) != list(last.state) for d in several):
        raise ValueError(f"{where} the methods' states differ. Average directions of one optimizer only.")
    if last.state and any(d.mark != last.mark for d in several):
        advice = "were taken before and after the method's state moved. Take them all between two steps."
        raise ValueError(f"{where} they {advice}")
    reduced: dict[str, StateValue] = {}
    for name, value in last.state.items():
        values = [d.state[name] for d in several]
        reduction = None if last.mark is None else last.mark.reductions.get(name)
        if isinstance(value, Mapping) and reduction == "mean":
            named: list[Any] = [v for v in values if isinstance(v, Mapping)]
            if any(list(v) != list(value) for v in named):
                raise ValueError(f"{where} the variables in the state {name} differ. Average tasks with the same ones.")
            reduced[name] = _mean(named)
        elif isinstance(value, Tensor) and reduction == "mean":
            reduced[name] = torch.stack([v for v in values if isinstance(v, Tensor)]).mean()
        elif isinstance(value, int) and reduction == "same":
            if any(v != value for v in values):
                raise ValueError(f"{where} the state {name} differs. Take them all between two steps.")
            reduced[name] = value
        else:
            raise ValueError(f"{where} the state {name} declares no mean. Apply the directions one by one.")
    return reduced
