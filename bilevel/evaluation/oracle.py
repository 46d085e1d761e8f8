"""The oracle: what a method asks. Two losses around the current point, and real lower steps; who opens one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batches import unpacked
from ..levels import Level
from ..processes.group import refuse_apart
from ..processes.joined import several
from ..shards import is_shard
from ..vectors import Vector
from .evaluations import Side, Subject
from .inspection import count_samples, refuse_accumulation_hooks, refuse_one_shot, refuse_shared_memory
from .losses import Loss
from .replay import Policy, Replay
from .verification import Verification, Verify
from .verified import VerifiedEvaluations


class Moves(Protocol):
    """Who takes real lower steps, and takes them back: ``optimizer/moves.py``."""

    def train(self, direction: Vector, loss: Tensor | None = None) -> None: ...

    def keep_beginning(self) -> None: ...

    def rewind(self) -> None: ...

    def retrace(self, direction: Vector) -> None: ...

    def end_retracing(self) -> None: ...


class Evaluator:
    """Two losses over two levels; :meth:`oracle` opens the look around the current point that one step takes."""

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
        self.upper_loss = Loss(owner, "upper_loss", upper_loss, needs_upper=False)
        self.lower_loss = Loss(owner, "lower_loss", lower_loss)
        self.upper = upper
        self.lower = lower
        self.modules = modules
        self.subject = Subject(owner, self.upper_loss, self.lower_loss, upper, lower, [m for m, _ in modules])
        self.verification = Verification(verify)
        refuse_shared_memory(owner, self.subject.named_variables)

    def forget_checks(self) -> None:
        """The set of variables changed: what was found out about the closures no longer holds."""
        refuse_shared_memory(self.subject.owner, self.subject.named_variables)
        self.verification.forget()

    @contextmanager
    def oracle(
        self,
        upper_batches: Sequence[Any],
        lower_batches: Sequence[Any],
        *,
        kind: type[Oracle] | None = None,
        verifies: bool = True,
    ) -> Iterator[Oracle]:
        """Look around the current point; whatever goes wrong inside, everything is as before afterwards.

        ``kind``: another class of oracle. ``verifies``: whether this is a step that counts for :class:`Verification`.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a bilevel step needs gradients, but runs under torch.inference_mode(). Leave that context first."
            )
        for side, batches in (("upper", upper_batches), ("lower", lower_batches)):
            for batch in batches:
                refuse_one_shot(self.subject.owner, side, batch)
        if any(tensor._post_accumulate_grad_hooks for tensor in self.subject.variables):
            refuse_accumulation_hooks(self.subject.owner, self.subject.named_variables)
        devices = self.subject.devices
        replay = Replay(devices, self.modules, self.subject.variables)
        kinds = sorted({device.type for device in devices})
        if verifies:
            self.verification.begin((replay.training, *(torch.is_autocast_enabled(kind) for kind in kinds)))
        self._begin_together(upper_batches, lower_batches)
        try:
            yield (kind or Oracle)(self, replay, upper_batches, lower_batches, verifies=verifies)
        except BaseException:
            replay.undo()
            raise
        if verifies:
            self.verification.end()

    def _begin_together(self, upper_batches: Sequence[Any], lower_batches: Sequence[Any]) -> None:
        """Of several processes, compare what they begin with."""
        processes, owner = several(), self.subject.owner
        if processes is None:
            return
        if self.verification.due:
            refuse_apart(owner, processes, [(n, x) for n, x in self.subject.named_variables if not is_shard(x)])
        sizes = (count_samples(upper_batches), count_samples(lower_batches))
        heard = processes.agree(f"{owner}: {len(upper_batches)} and {len(lower_batches)} batches", counts=sizes)
        for side, least, most in zip(("upper", "lower"), heard.lowest, heard.highest, strict=True):
            if least != most:
                self.verification.say_of(
                    f"the {side} batches",
                    f"{owner}: the {side} batches of the processes hold {least} to {most} samples. Every process "
                    "counts the same in the mean, so that the samples of a small batch count more. Usual cause: the "
                    "last batch of an epoch. Give all of them batches of one size (drop_last=True), or multiply each "
                    "loss by its number of samples times the number of processes over the number of all samples.",
                )


class Oracle(VerifiedEvaluations):
    """What a method asks: the two losses around the current point, on the batches of one step.

    ``oracle.upper(...)`` and ``oracle.lower(...)`` are the losses and their gradients, at any point;
    ``oracle.point()`` is the current one; ``oracle.train(direction)`` really moves the lower variables (``directions``
    takes it back). What else is asked of it, products and walks, is in :mod:`bilevel.hypergradient`. Every shortcut is
    compared with plain autograd of the closure (``verified.py``).

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> with bilevel.testing.oracle(problem) as oracle:
        ...     f, g = oracle.upper(), oracle.lower(oracle.point() * 0.5, wrt="upper")
        >>> len(f.lower), len(g.lower)
        (1, 0)
    """

    def __init__(
        self,
        evaluator: Evaluator,
        replay: Replay,
        upper_batches: Sequence[Any],
        lower_batches: Sequence[Any],
        *,
        verifies: bool = True,
    ) -> None:
        lower, self._lower_numbers = unpacked(lower_batches)
        upper, self._upper_numbers = unpacked(upper_batches)
        super().__init__(evaluator, replay, upper, lower, verifies=verifies)
        self.moves: Moves | None = None

    def train(self, direction: Vector) -> None:
        """Take a real lower step: ``direction`` is handed to the lower torch optimizer, hooks included.

        ``directions`` takes it back, and ``step`` as well if something fails later and the method is ``atomic``. The
        next :meth:`lower` at the new point moves the buffers again, as a training loop does.

        Raises:
            NonFiniteError: Under ``on_nonfinite="raise"``, before anything moved.
        """
        self._real_moves().train(direction, self.latest_lower)
        self.replay.point_moved()

    @contextmanager
    def retracing(self) -> Iterator[Callable[[Vector], None]]:
        """Put the lower variables back where they were, and walk the real steps once more, without keeping points.

        Call what it gives with the direction of each step in turn; rates that hooks changed are as they were at each,
        and in the end. :meth:`keep_beginning` must have been called before the first step.
        """
        moves = self._real_moves()
        self.replay.point_rewound()
        moves.rewind()
        try:
            yield moves.retrace
        finally:
            moves.end_retracing()
            self.replay.point_rewound()

    def keep_beginning(self) -> None:
        """Copy the lower variables and their optimizer's state before the first real step, for :meth:`retracing`."""
        self._real_moves().keep_beginning()

    def lower_index(self, batch: int = 0) -> int:
        """Return the number of a lower batch that was passed as ``Indexed``."""
        return self._number("lower", self._lower_numbers, batch)

    def upper_index(self, batch: int = 0) -> int:
        """Return the number of an upper batch that was passed as ``Indexed``."""
        return self._number("upper", self._upper_numbers, batch)

    def _number(self, side: Side, numbers: list[int | None], batch: int) -> int:
        number = numbers[min(batch, len(numbers) - 1)] if numbers else None
        processes = several()
        if processes is not None:
            known = -1 if number is None else number
            heard = processes.agree(f"{self.owner}: the number of a batch", counts=(known, 0))
            if heard.lowest != heard.highest:
                raise ValueError(
                    f"{self.owner}.step: the processes gave {side} batches of the numbers {heard.lowest[0]} to "
                    f"{heard.highest[0]}, and a row of the table belongs to one joined batch. Give the parts of one "
                    "batch the same number on all processes (a sampler that splits each batch, not the data set)."
                )
        if number is None:
            raise TypeError(
                f"{self.owner}.step: the {side} batch has no number, and this method keeps a table with a row for "
                "each. Pass bilevel.Indexed(number, batch)."
            )
        return number

    def _real_moves(self) -> Moves:
        if self.moves is None:
            raise RuntimeError("oracle.train: this oracle only looks; real steps are taken in step and directions.")
        return self.moves
