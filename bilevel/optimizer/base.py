"""``BilevelOptimizer``: a method, and the torch optimizers that move the variables along its directions."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

from ..batches import MISSING, sorted_batches
from ..compiler import eager
from ..directions import Directions, S, T
from ..errors import count, message
from ..evaluation.oracle import Oracle
from ..evaluation.scaling import Scaling
from ..levels import check_disjoint
from ..microbatches import split_batch
from ..processes.joined import acting, settled
from ..wrappers import unwrapped
from .checkpoint import Parts, load_together, saved
from .method import Common, Method
from .moves import Moved, Moves, SkippedStep

__all__ = ["BilevelOptimizer", "Common"]


class BilevelOptimizer(Method[S], ABC):
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
        process_group: The ``torch.distributed`` group whose processes take every step together, each with its part of
            the batches: both losses are then the means over them, and the numbers those of one process on the joined
            batch. Default None: the default group, if one is initialised, which a warning says; False: each steps
            alone.
        upper_projection: The set that the upper variables stay in: one of :mod:`bilevel.projection`, any function from
            tensor to tensor that gives the nearest point, applied to each variable, or a mapping from variables (a
            parameter, its name, a module) to these. Applied after each of their moves; they start inside.
        lower_projection: The same for the lower variables, after each real and each virtual step; see the page on
            constraints for what it makes of each method.
        verify: Whether fast routes are compared with plain autograd of your closures: ``"auto"`` (default) in looks, at
            steps 1, 2, 4, ..., 1024, 2048, ... and after changes; ``"always"`` in every step; ``"never"``, which calls
            no loss beyond the documented number.
        scaler: A ``torch.amp.GradScaler``, for losses under autocast to float16. Derivatives are scaled, and unscaled
            before anything is computed from them; a step that overflows is skipped, whatever ``on_nonfinite`` says,
            and lowers the scale. The scaler is this optimizer's own: it calls ``update``, and ``state_dict`` has it.
    """

    @eager
    def step(self, *batches: Any, upper: Any = MISSING, lower: Any = MISSING, microbatches: int | None = None) -> S:
        """Take one step: directions at the current point, handed to the two torch optimizers.

        Args:
            batches: The upper batch, then one lower batch for all inner steps or exactly ``inner_steps`` of them. A
                loss gets its batch untouched; a side without a batch is called without arguments.
            upper: The upper batch, by name.
            lower: One lower batch, by name.
            microbatches: Split each batch into so many parts, which the losses see one after another: the numbers of
                the whole batch at the memory of one part. :class:`bilevel.MicroBatches` in place of a batch says the
                parts themselves.

        Returns:
            The stats of the step.

        Raises:
            TypeError: A wrong number of batches.
            ClosureError: A loss broke its contract; nothing changed.
            NonFiniteError: Under ``on_nonfinite="raise"``; nothing changed.
        """
        looking = self._oracle(batches, upper, lower, microbatches=microbatches)
        with self._acting("step"), looking as oracle, self._moving(oracle) as moves:
            oracle.scaling = scaling = self._begun_scaling()
            try:
                stats = self.order.step(self.compute, oracle, moves)
            except SkippedStep as bad:
                moves.undo()
                stats = cast(S, self.stats_class.unknown(bad.loss))
            settled(f"{type(self).__name__}.step: its end")
        return stats if scaling is None else self._scaled(scaling, stats)

    @eager
    def directions(
        self, *batches: Any, upper: Any = MISSING, lower: Any = MISSING, microbatches: int | None = None
    ) -> Directions[S]:
        """Compute what :meth:`step` would hand to the torch optimizers, and move nothing.

        Parameters, buffers, ``.grad``, optimizer state, random state, ``requires_grad`` and training flags are as
        before, bit for bit. So a loop of ``apply(directions(...))`` draws the same dropout masks each time, unless
        something else draws in between; ``step`` goes on with the random state.
        """
        looking = self._oracle(batches, upper, lower, microbatches=microbatches)
        with self._acting("directions"), looking as oracle, self._looking(oracle):
            oracle.scaling = scaling = self._begun_scaling()
            answer = self.compute(oracle)
            stats = answer.stats
            if scaling is not None:
                stats = replace(stats, skipped=not scaling.fits([]), loss_scale=scaling.scale)
            settled(f"{type(self).__name__}.directions: its end")
        return replace(answer, stats=stats, mark=self._state.mark())

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
        with self._acting("apply"):
            scaling = self._begun_scaling()
            if scaling is not None and directions.stats.skipped:  # an overflow was found when they were taken
                scaling.overflowed = True
                stats = directions.stats
            else:
                stats = Moves(self._moved(), None).apply(own)
            settled(f"{type(self).__name__}.apply: its end")
        return stats if scaling is None else self._scaled(scaling, stats)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state of both torch optimizers and of the method; modules are saved by their own
        ``state_dict``.

        Unlike torch's, it shares no tensor with the running optimizers: later steps leave it as it is. Of several
        processes, all call it and each gets the same: the random states of all are in it.
        """
        with self._acting("state_dict"):
            found = saved(self._parts())
            settled(f"{type(self).__name__}.state_dict: its end")
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; a state that does not fit is refused and changes nothing.

        Of several processes, all load the same; each gets its own random state back.

        Raises:
            ValueError: The state is of another method, of a newer format, or does not fit the optimizers.
        """
        with self._acting("load_state_dict"):
            load_together(self._parts(), state_dict)
            settled(f"{type(self).__name__}.load_state_dict: its end")

    def _parts(self) -> Parts:
        owner, verification = type(self).__name__, self._evaluator.verification
        return Parts(owner, self._upper, self._lower, self._state, verification, self._processes, self._scaling)

    def _begun_scaling(self) -> Scaling | None:
        """Return the loss scale, where there is one in use, at the beginning of a step."""
        scaling = self._scaling
        if scaling is None or not scaling.scaler.is_enabled():
            return None
        scaling.begin([*self._upper.tensors, *self._lower.tensors])
        return scaling

    @staticmethod
    def _scaled(scaling: Scaling, stats: T) -> T:
        """The step ended: let the scaler know."""
        found = replace(stats, loss_scale=scaling.scale)
        scaling.end()
        return found

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
            self._upper_set,
            self._lower_set,
            self._learned,
            self._scaling if self._scaling is not None and self._scaling.scaler.is_enabled() else None,
        )

    @contextmanager
    def _acting(self, verb: str) -> Iterator[None]:
        """Surround a call that all processes of the group make; after one that failed they compare themselves."""
        if self._processes is None and self.process_group is None:
            self._join_processes()  # the default group may be younger than this optimizer
        try:
            with acting(self._processes, f"{type(self).__name__}.{verb}"):
                yield
        except BaseException:
            if self._processes is not None:
                self._evaluator.verification.look_again()
            raise

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
        microbatches: int | None = None,
        kind: type[Oracle] = Oracle,
        verifies: bool = True,
    ) -> Iterator[Oracle]:
        owner = type(self).__name__
        uppers, lowers = sorted_batches(f"{owner}.step", batches, upper, lower, self.lower_batches)
        if microbatches is not None:
            count(f"{owner}.step", "microbatches", microbatches, minimum=1)
            uppers, lowers = ([split_batch(batch, microbatches) for batch in side] for side in (uppers, lowers))
        self._refresh()
        self._evaluator.verification.mode = self.verify
        looking = self._evaluator.oracle(uppers, lowers, kind=kind, verifies=verifies)
        with looking as oracle, unwrapped(owner, sharded=self._upper.sharded or self._lower.sharded):
            yield oracle

    def _refresh(self) -> None:
        """Pick up variables that were frozen, unfrozen or added to an optimizer since the last step, or refuse them."""
        for level, feasible in ((self._upper, self._upper_set), (self._lower, self._lower_set)):
            if level.refresh():
                self._evaluator.forget_checks()
                feasible.refresh()
        # Each time: what was refused once must not pass the next time, when it is no longer a change.
        check_disjoint(self._upper, self._lower)
