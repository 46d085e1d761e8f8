"""The real moves of one step: lower steps inside it, then its directions; and the way back if something fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ..directions import Directions, T
from ..evaluation.replay import Replay
from ..evaluation.scaling import Scaling
from ..feasible import FeasibleSet
from ..levels import Level
from ..lower_hyperparameters import LowerHyperparameters, tensors_of
from ..vectors import Tensors, Vector
from .apply import are_finite, checked, match, set_values, step_along
from .hooks import HookWatch
from .method_state import MethodState
from .undo import GroupsCopy, LevelCopy

OnNonFinite = Literal["raise", "skip", "ignore"]


@dataclass(frozen=True)
class Moved:
    """What is moved, and by which rules.

    Attributes:
        owner: The class that errors name.
        upper: The upper level.
        lower: The lower level.
        state: What the method remembers.
        hooks: The watch over hooks of the lower optimizer.
        on_nonfinite: What a number that is not finite does.
        atomic: Whether moves are taken back if something fails after the first one.
        ignores_clipping: What a clip by a hook makes wrong, or None.
        scaling: The loss scale, which decides about overflows; or None.
        upper_set: What the upper variables stay in.
        lower_set: What the lower variables stay in.
        hyperparameters: What the lower optimizer's groups are to hold in each real step, computed from the upper
            variables, or None.
    """

    owner: str
    upper: Level
    lower: Level
    state: MethodState
    hooks: HookWatch
    on_nonfinite: OnNonFinite
    atomic: bool
    ignores_clipping: str | None
    upper_set: FeasibleSet
    lower_set: FeasibleSet
    hyperparameters: LowerHyperparameters | None = None
    scaling: Scaling | None = None


class SkippedStep(Exception):
    """A real lower step was not finite under ``on_nonfinite="skip"``."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss


class Moves:
    """Moves both levels by their torch optimizers.

    Args:
        moved: What, and how.
        replay: The bookkeeping of the step; None: directions are applied that were computed before.
        looking: Whether everything is taken back in the end, as in ``directions``; nothing is then refused.
    """

    def __init__(self, moved: Moved, replay: Replay | None, *, looking: bool = False) -> None:
        self._moved, self._replay, self._looking = moved, replay, looking
        self._atomic = moved.atomic or looking
        self._copies_taken: list[LevelCopy] = []
        self._began = False  # whether anything moved yet
        self._remembered: dict[str, Any] = {}  # what undoes the commit of the method's state
        self._beginning: LevelCopy | None = None
        self._groups: list[GroupsCopy] = []  # before each real step, then at the end: hooks may change rates
        self._retraced = 0

    def train(self, direction: Vector, loss: Tensor | None = None) -> None:
        """Take a real lower step, if it is finite; ``loss`` is what it comes from."""
        seen: dict[str, Tensors] = {"the direction of a lower step": direction}
        learned = self._moved.hyperparameters
        groups = [] if learned is None else learned.groups()
        if groups:
            seen["lower_hyperparameters"] = tensors_of(groups)
        if not self._looking and not self._are_finite({"lower_loss": [loss]} | seen):
            raise SkippedStep(_loss_of(loss, direction))
        self._save(self._moved.lower)
        if learned is not None:
            learned.write(groups)
        if self._beginning is not None:
            self._groups.append(GroupsCopy(self._moved.lower))
        self._train_along(direction.clone() if self._is_rewritten() else direction)

    def apply(self, directions: Directions[T], *, several: bool = False) -> T:
        """Hand directions to the torch optimizers, if they are finite, and remember their state; ``several``:
        this is one of several moves of the step, which go back together.
        """
        moved = self._moved
        upper = match(moved.owner, moved.upper, directions.upper)
        lower = match(moved.owner, moved.lower, directions.lower)
        state = moved.state.fitted(directions.state)
        if not self._are_finite(checked(directions)):
            self.undo()
            return replace(directions.stats, upper_moved=False, skipped=True)
        if self._began or several:
            self._save(moved.upper)
        if directions.start is not None:
            set_values(moved.lower, directions.start)
        self._began = True
        if directions.upper:
            step_along(moved.upper, upper)
            moved.upper_set.settle(upper)
        if directions.lower:
            self._train_along(lower)
        self._remembered = moved.state.commit(state)
        return replace(directions.stats, upper_moved=bool(directions.upper))

    def undo(self) -> None:
        """Take back the moves of this step, as far as there are copies, and those of the buffers."""
        if self._replay is not None:
            self._replay.undo_buffers()
        if not self._copies_taken:
            return
        for copy in reversed(self._copies_taken):
            copy.restore()
        self._moved.state.put_back(self._remembered)
        self._copies_taken.clear()
        self._remembered, self._began = {}, False

    @property
    def undone(self) -> bool:
        """Whether nothing of this step is left in the variables."""
        return not self._began

    def keep_beginning(self) -> None:
        self._beginning = LevelCopy(self._moved.lower)

    def rewind(self) -> None:
        if self._beginning is None:
            raise RuntimeError("oracle.retracing: call oracle.keep_beginning() before the first real step.")
        self._groups.append(GroupsCopy(self._moved.lower))
        self._beginning.restore()
        self._retraced = 0

    def retrace(self, direction: Vector) -> None:
        if not self._looking and not self._are_finite({"the direction of a lower step": direction}):
            raise SkippedStep(_loss_of(None, direction))
        self._groups[self._retraced].restore()
        step_along(self._moved.lower, direction)
        self._moved.lower_set.settle(direction)
        self._retraced += 1

    def end_retracing(self) -> None:
        self._groups[-1].restore()

    def _save(self, level: Level) -> None:
        """Copy a level before its first move of this step."""
        if self._atomic and all(level is not copy.level for copy in self._copies_taken):
            self._copies_taken.append(LevelCopy(level))
        self._began = True

    def _train_along(self, direction: Tensors) -> None:
        """Step and project."""
        self._step_along(direction)
        self._moved.lower_set.settle(direction)

    def _step_along(self, direction: Tensors) -> None:
        """Step, and say once if hooks make it another step than the method thinks."""
        lower = self._moved.lower
        if self._moved.on_nonfinite == "ignore" and any(x.device.type != "cpu" for x in lower.tensors):
            step_along(lower, direction)  # nothing may be read back from the device
            return
        with self._moved.hooks(direction, self._moved.ignores_clipping):
            step_along(lower, direction)

    def _is_rewritten(self) -> bool:
        """Whether a step may write into the direction, which the method may need later: by a hook, or an optimizer that
        is not torch's.
        """
        optimizer = self._moved.lower.optimizer
        foreign = not type(optimizer).__module__.startswith("torch.optim.") or hasattr(optimizer, "grad_scale")
        return foreign or bool(optimizer._optimizer_step_pre_hooks)

    def _are_finite(self, checks: Mapping[str, Tensors]) -> bool:
        """Apply ``on_nonfinite`` to the named vectors; False means that the step is to be skipped."""
        policy, scaling = self._moved.on_nonfinite, self._moved.scaling
        if scaling is not None:
            if scaling.fits([tensor for vector in checks.values() for tensor in vector]):
                return True
            if scaling.may_be_lowered:
                scaling.overflowed = True
                return False
        if policy == "ignore":
            return True
        kept = self._moved.atomic or not self._began
        left = "nothing was moved" if kept else "earlier moves of this step stay (atomic=False)"
        return are_finite(self._moved.owner, checks, policy == "raise", left)


def _loss_of(loss: Tensor | None, direction: Vector) -> Tensor:
    """Return the loss, or NaN where it is not known."""
    if loss is not None:
        return loss
    like = next(x for x in direction if x is not None)
    return like.new_full((), float("nan"))
