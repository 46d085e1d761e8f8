"""What an evaluation touches besides its result: random state, buffers, training flags, held tensors.

Within a step every evaluation of a batch must be the same function of the variables. So the first evaluation of a batch
records where it started from, the later ones start from there again, and only evaluations at the current point leave a
trace: dropout masks cancel in ``Q``, and BatchNorm statistics move once a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .buffers import Buffers, Kind, Snapshot
from .hold import Held, holding

Policy = Literal["once", "every", "never"]


class RandomState:
    """Torch's random state on the CPU and on the given devices, as it was when this object was made."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {d: _generator(d, "get_rng_state") for d in devices if d.type not in ("cpu", "meta")}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            _generator(device, "set_rng_state", state)


def _generator(device: torch.device, verb: str, *arguments: Any) -> Any:
    function = getattr(torch.get_device_module(device), verb)
    return function(*arguments) if device.type == "mps" else function(*arguments, device)


class Replay:
    """The bookkeeping of one step: where each batch's first evaluation started, and what may stay changed."""

    def __init__(
        self,
        devices: Iterable[torch.device],
        modules: Sequence[tuple[nn.Module, Policy]],
        variables: Sequence[Tensor] = (),
    ) -> None:
        self._device_list = list(devices)
        self._start_random = RandomState(self._device_list)
        parts = [(part, policy) for module, policy in modules for part in module.modules()]
        self._buffers = Buffers((part for part, policy in parts if policy == "once"), variables)
        self._frozen = Buffers((part for part, policy in parts if policy == "never"), variables)
        self._free = Buffers((part for part, policy in parts if policy == "every"), variables)
        self._start = [(group, group.snapshot()) for group in (self._buffers, self._frozen, self._free)]
        self._standing: Snapshot | None = self._start[0][1]
        self._last_move: Snapshot | None = None
        self._first: dict[Hashable, tuple[RandomState, Snapshot, list[Tensor]]] = {}
        self._moved: set[Hashable] = set()  # batches that were evaluated at the current point
        self._silent = False
        self._together: _Together | None = None
        self._trained = False  # since the last evaluation along whose gradient a real step could be taken
        self._flags = [(part, part.training) for part, _ in parts]
        # Old-style weight and spectral norm: a hook computes an attribute of the module from its parameters, anew in
        # each forward.
        hooked = [part for part, _ in parts if part._forward_pre_hooks]
        self._computed = [
            (part, name, value)
            for part in {id(part): part for part in hooked}.values()
            for name, value in vars(part).items()
            if isinstance(value, Tensor)
        ]

    @property
    def training(self) -> tuple[bool, ...]:
        """The training flags of all modules, as the step began."""
        return tuple(training for _, training in self._flags)

    def held_count(self, batch: Hashable) -> int:
        """Return how often the first evaluation of ``batch`` called ``hold``."""
        return len(self._first[batch][2]) if batch in self._first else 0

    @contextmanager
    def evaluation(
        self, batch: Hashable, *, current: bool, trains: bool = False, copied: bool = False
    ) -> Iterator[None]:
        """Surround one evaluation of ``batch``: what it starts from, and what of its traces stays.

        Args:
            batch: Which batch; its first evaluation records what later ones start from.
            current: Whether it is at the current point, and not at a look-ahead one.
            trains: Whether a real lower step may be taken along its gradient.
            copied: Whether the modules hold copies of their buffers meanwhile, so that there is little to put back.

        ============================================ ================================ ===============================
        evaluation                                   random state and held values     buffers (policy ``"once"``)
        ============================================ ================================ ===============================
        a batch's first, current                     recorded, and move               recorded, and move where no
                                                                                      earlier loss moved them
        a batch's first, look-ahead                  recorded, and move               recorded, and put back
        a later one                                  as the first one began           as the first one began, put back
        the next that trains after a real step       the batch's first one's, if any  as they stand, and move again
        ============================================ ================================ ===============================
        """
        trains = self._trains_anew(trains and current)
        random, standing = RandomState(self._device_list), self._standing_buffers()
        free = self._free.snapshot() if self._silent else None
        if again := batch in self._first:
            first_random, first_buffers, values = self._first[batch]
            first_random.restore()
            rewound = not trains and first_buffers is not standing
            if rewound:
                self._buffers.restore(first_buffers)
            held = Held(values, cursor=0)
        else:
            rewound, held = False, Held()
            self._first[batch] = (random, standing, held.values)
        try:
            with holding(held):
                yield
        except BaseException:
            if not again:  # nothing that later evaluations could start from
                del self._first[batch]
                random.restore()
            raise
        finally:
            self._restore_flags()
            self._restore_computed()
            if not copied:
                self._frozen.restore(self._start[1][1])
            if free is not None:
                self._free.restore(free)
            if again:
                random.restore()
            if copied and not rewound:
                self._buffers.remove_created()
            elif not trains and (not current or batch in self._moved):
                self._buffers.restore(standing)
            else:
                self._buffers.remember_created(anew=trains)
                if len(self._buffers):
                    self._moved.add(batch)
                    if self._together is None or self._together.ends(self._buffers, standing):
                        self._move_buffers(standing, each_time=trains)
            self._buffers.restore_created()

    @contextmanager
    def together(self, weights: Sequence[float]) -> Iterator[None]:
        """Let the next evaluations, one for each weight, be those of one batch in parts.

        Where they move buffers, each begins where the first one did, and their mean stays: the running mean of a
        BatchNorm is then that of the joined batch.
        """
        self._together = _Together(weights)
        try:
            yield
        finally:
            self._together = None

    def _trains_anew(self, trains: bool) -> bool:
        """Whether this evaluation is the next that trains after a real step; all its parts are."""
        together = self._together
        if together is not None and together.trains is not None:
            return together.trains
        anew = trains and self._trained and not self._silent
        if anew:
            self._trained = False
        if together is not None:
            together.trains = anew
        return anew

    @contextmanager
    def silently(self) -> Iterator[None]:
        """Let evaluations leave no trace at all, whatever the policies say: those that only compare."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def follow(self, other: Replay) -> None:
        """Begin where the first evaluations of ``other`` began, and hold what they held: for the same step again, in
        float64.
        """
        for batch, (random, buffers, values) in other._first.items():
            self._first[batch] = (random, buffers, [x.double() if x.is_floating_point() else x for x in values])

    def point_moved(self) -> None:
        """A real lower step was taken: at the new point the next evaluation that trains moves the buffers again."""
        self._trained = True

    def point_rewound(self) -> None:
        """The lower variables are back where they were, to walk the same way once more: nothing moves again."""
        self._trained = False

    def undo_buffers(self) -> None:
        """Take back every move of the buffers since the step began."""
        for group, snapshot in self._start:
            group.restore(snapshot)

    def undo(self) -> None:
        """Take back everything since the step began."""
        self.undo_buffers()
        self._start_random.restore()
        self._restore_flags()
        self._restore_computed()

    def _standing_buffers(self) -> Snapshot:
        if self._standing is None:
            self._standing = self._buffers.snapshot()
        return self._standing

    def _move_buffers(self, standing: Snapshot, *, each_time: bool) -> None:
        """An evaluation at the current point ended: what it moved stays, unless an earlier one had moved it already."""
        if self._last_move is not None:
            self._buffers.note_moves(self._last_move, standing)
            if not each_time:
                self._buffers.keep_noted(standing)
        self._last_move = standing
        self._standing = None

    def _restore_computed(self) -> None:
        for part, name, value in self._computed:
            part.__dict__[name] = value

    def _restore_flags(self) -> None:
        for part, training in self._flags:
            if part.training != training:
                part.training = training


class _Together:
    """The buffers of an evaluation in parts: the weighted mean of what each part made of where they stood."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.trains: bool | None = None
        whole = sum(weights)
        self._weights = [weight / whole for weight in weights]
        self._index = 0
        self._mean: dict[Kind, Tensor] = {}

    def ends(self, buffers: Buffers, standing: Snapshot) -> bool:
        """A part has moved the buffers from ``standing``; put them back there, or after the last part to the mean."""
        moved, weight = buffers.snapshot(), self._weights[self._index]
        for kind, values in moved.values.items():
            before = standing.values.get(kind)
            if values.is_floating_point() and before is not None and before.shape == values.shape:
                mean = self._mean.get(kind, before)
                # What no part moved stays, bit for bit: it may be infinite, as masks are.
                self._mean[kind] = torch.where(values == before, mean, mean + weight * (values - before))
            else:  # counters: each part moved them by one from the same beginning
                self._mean[kind] = values
        self._index += 1
        if self._index < len(self._weights):
            buffers.restore(standing)
            return False
        buffers.restore(Snapshot(moved.objects, moved.kinds, self._mean))
        return True
