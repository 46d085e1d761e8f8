"""What an evaluation touches besides its result: random state, buffers, training flags, held tensors.

Within a step every evaluation of a batch must be the same function of the variables. So the first evaluation of a batch
records where it started from, the later ones start from there again, and only evaluations at the current point leave a
trace: dropout masks cancel in ``Q``, and BatchNorm statistics move once a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import ClosureError

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


Kind = tuple[torch.device, torch.dtype]


@dataclass
class Snapshot:
    """The buffers' tensor objects, which of them are of each kind, and each kind's values, flattened."""

    objects: list[Tensor]
    kinds: dict[Kind, list[int]]
    values: dict[Kind, Tensor]


class Buffers:
    """The buffers of modules, without their children's; snapshots cost one copy and one kernel per device and dtype."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = {id(part): part for part in modules}
        seen: set[int] = set()
        self._places: list[tuple[nn.Module, str]] = []
        self._owners: list[int] = []
        self._absent = [(part, name) for part in parts.values() for name, b in part._buffers.items() if b is None]
        for owner, part in enumerate(parts.values()):
            for name, buffer in part._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    self._places.append((part, name))
                    self._owners.append(owner)
        self._moved: dict[torch.device, Tensor] = {}
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # by place in _absent: the buffer, and its value then
        self._element_owners: dict[Kind, Tensor] = {}

    def __len__(self) -> int:
        return len(self._places)

    def snapshot(self) -> Snapshot:
        objects = self._live()
        kinds = _by_kind(objects)
        values = {kind: torch.cat([objects[i].detach().reshape(-1) for i in which]) for kind, which in kinds.items()}
        return Snapshot(objects, kinds, values)

    def restore(self, snapshot: Snapshot) -> None:
        """Put the objects back (a forward may rebind a buffer) and their values into them."""
        for (module, name), tensor in zip(self._places, snapshot.objects, strict=True):
            if module._buffers[name] is not tensor:
                module._buffers[name] = tensor
        self.unmake()
        for kind, which in snapshot.kinds.items():
            _scatter([snapshot.objects[i] for i in which], snapshot.values[kind])

    def unmake(self) -> None:
        """Take away what a loss made where there was None."""
        for module, name in self._absent:
            module._buffers[name] = None

    def note_moves(self, before: Snapshot, after: Snapshot) -> None:
        """Remember, on the device, which modules' buffers differ between two snapshots."""
        self._check_shapes(before, after)
        for kind in before.kinds:
            index = self._owner_index(before, kind)
            moved = self._moved.setdefault(
                kind[0], torch.zeros(1 + max(self._owners), dtype=torch.int64, device=kind[0])
            )
            moved.index_add_(0, index, (before.values[kind] != after.values[kind]).long())

    def keep_noted(self, standing: Snapshot) -> None:
        """Give modules that moved earlier their ``standing`` values back; leave the others as they are now."""
        now = self.snapshot()
        self._check_shapes(standing, now)
        for kind, which in now.kinds.items():
            if kind[0] in self._moved:
                moved = self._moved[kind[0]][self._owner_index(now, kind)] > 0
                merged = torch.where(moved, standing.values[kind], now.values[kind])
                _scatter([now.objects[i] for i in which], merged)

    def note_made(self, *, anew: bool) -> None:
        """Remember the buffers that a loss made where there was None; ``anew``: also those remembered before."""
        for place, (module, name) in enumerate(self._absent):
            buffer = module._buffers[name]
            if buffer is not None and (anew or place not in self._made):
                self._made[place] = (buffer, buffer.detach().clone())

    def keep_made(self) -> None:
        """Put the remembered ones back, as they were then."""
        for place, (buffer, value) in self._made.items():
            module, name = self._absent[place]
            module._buffers[name] = buffer
            buffer.data.copy_(value)

    def _live(self) -> list[Tensor]:
        live: list[Tensor] = []
        for module, name in self._places:
            buffer = module._buffers[name]
            if buffer is None:
                raise ClosureError(
                    f"{type(module).__name__}.{name}: a loss removed this buffer. Keep buffers in place."
                )
            live.append(buffer)
        return live

    def _owner_index(self, snapshot: Snapshot, kind: Kind) -> Tensor:
        """Return the owner of each element of the flattened ``kind``, which is the same for all snapshots of a step."""
        if kind not in self._element_owners:
            which = snapshot.kinds[kind]
            sizes = torch.tensor([snapshot.objects[i].numel() for i in which])
            owners = torch.repeat_interleave(torch.tensor([self._owners[i] for i in which]), sizes)
            self._element_owners[kind] = owners.to(kind[0], non_blocking=True)
        return self._element_owners[kind]

    def _check_shapes(self, before: Snapshot, after: Snapshot) -> None:
        for (module, name), old, new in zip(self._places, before.objects, after.objects, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ClosureError(
                    f"{type(module).__name__}.{name}: a loss changed this buffer from {tuple(old.shape)} {old.dtype} "
                    f"to {tuple(new.shape)} {new.dtype}. Buffers must keep shape and dtype within a step."
                )


def _by_kind(tensors: Sequence[Tensor]) -> dict[Kind, list[int]]:
    kinds: dict[Kind, list[int]] = {}
    for index, tensor in enumerate(tensors):
        # An expanded buffer cannot be written in place, neither by a loss nor here: its object is all there is to keep.
        if not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    return kinds


def _scatter(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_([t.data for t in tensors], [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])


@dataclass
class _Held:
    """The tensors that a batch's first evaluation held, in the order of its calls of :func:`hold`."""

    values: list[Tensor] = field(default_factory=list)
    cursor: int | None = None  # None while recording

    def visit(self, tensor: Tensor) -> Tensor:
        if self.cursor is None:
            # A copy: the closure may go on to change its own tensor in place (an in-place ReLU, say).
            self.values.append(tensor.detach().clone())
            return tensor.detach()
        if self.cursor >= len(self.values) or self.values[self.cursor].shape != tensor.shape:
            raise ClosureError(
                "hold(tensor): a look-ahead evaluation held other tensors than the batch's first evaluation. "
                "The loss branches on something that changes between its calls. Call hold the same way in every call."
            )
        self.cursor += 1
        return self.values[self.cursor - 1].clone()


_active: ContextVar[_Held | None] = ContextVar("bilevel_held", default=None)


def _replayed(tensor: Tensor) -> Tensor:
    held = _active.get()
    return tensor if held is None else held.visit(tensor)


_reader: Callable[[Tensor], Tensor] = _replayed


def _shield_from_compiler() -> None:
    """Make a compiled loss break its graph at :func:`hold`: a trace would freeze what is held.

    Only once the compiler is loaded, because asking for it loads it, which takes longer than importing this library.
    """
    global _reader
    if _reader is _replayed and "torch._dynamo" in sys.modules:
        _reader = torch.compiler.disable(_replayed)


def hold(tensor: Tensor) -> Tensor:
    """Hold a value fixed at the current point while the losses are looked at around it.

    Inside a loss, during ``step``, ``directions`` and ``check_directions``: the first evaluation of a batch gets
    ``tensor.detach()``, every later evaluation of that batch in the same step gets the same values again, whatever the
    variables are then. So a held value is a constant of the step: no gradient flows through it. Outside a step it is
    the identity, gradient included.

    Use it for the features that a label corrector reads (otherwise the targets at the look-ahead point would differ
    from those at the current one), and for targets that dropout must not touch.

    Args:
        tensor: Any tensor that is computed inside the loss.

    Returns:
        A tensor of the same shape, dtype and device.

    Raises:
        TypeError: ``tensor`` is not a tensor.
        ClosureError: A later evaluation calls ``hold`` more often than the first, or with another shape.

    Example:
        >>> import torch, bilevel
        >>> x = torch.ones(2, requires_grad=True)
        >>> bilevel.hold(x) is x  # outside a step
        True
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"hold(tensor={type(tensor).__name__}): must be a tensor. Hold the parts of a structure one by one."
        )
    return _reader(tensor)


class Replay:
    """The bookkeeping of one step: where each batch's first evaluation started, and what may stay changed."""

    def __init__(self, devices: Iterable[torch.device], modules: Sequence[tuple[nn.Module, Policy]]) -> None:
        _shield_from_compiler()
        self._device_list = list(devices)
        self._start_random = RandomState(self._device_list)
        parts = [(part, policy) for module, policy in modules for part in module.modules()]
        self._buffers = Buffers(part for part, policy in parts if policy == "once")
        self._frozen = Buffers(part for part, policy in parts if policy == "never")
        self._free = Buffers(part for part, policy in parts if policy == "every")
        self._start = [(group, group.snapshot()) for group in (self._buffers, self._frozen, self._free)]
        self._standing: Snapshot | None = self._start[0][1]
        self._last_move: Snapshot | None = None
        self._first: dict[Hashable, tuple[RandomState, Snapshot, list[Tensor]]] = {}
        self._moved: set[Hashable] = set()  # batches that were evaluated at the current point
        self._flags = [(part, part.training) for part, _ in parts]

    @contextmanager
    def evaluation(
        self, batch: Hashable, *, current: bool, trains: bool = False, copied: bool = False
    ) -> Iterator[None]:
        """Surround one evaluation of ``batch``; ``current`` says whether it is at the current point.

        ``trains`` marks the gradient of a real lower step: buffers go on from where they stand, and move each time.
        ``copied`` says that the modules hold copies of their buffers meanwhile, so that there is little to put back.
        """
        random, standing = RandomState(self._device_list), self._standing_buffers()
        if again := batch in self._first:
            first_random, first_buffers, values = self._first[batch]
            first_random.restore()
            rewound = not trains and first_buffers is not standing
            if rewound:
                self._buffers.restore(first_buffers)
            held = _Held(values, cursor=0)
        else:
            rewound, held = False, _Held()
            self._first[batch] = (random, standing, held.values)
        token = _active.set(held)
        try:
            yield
        finally:
            _active.reset(token)
            self._restore_flags()
            if not copied:
                self._frozen.restore(self._start[1][1])
            if again:
                random.restore()
            if copied and not rewound:
                self._buffers.unmake()
            elif not trains and (not current or batch in self._moved):
                self._buffers.restore(standing)
            else:
                self._buffers.note_made(anew=trains)
                if len(self._buffers):
                    self._moved.add(batch)
                    self._move_buffers(standing, each_time=trains)
            self._buffers.keep_made()

    def undo_buffers(self) -> None:
        """Take back every move of the buffers since the step began."""
        for group, snapshot in self._start:
            group.restore(snapshot)

    def undo(self) -> None:
        """Take back everything since the step began."""
        self.undo_buffers()
        self._start_random.restore()
        self._restore_flags()

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

    def _restore_flags(self) -> None:
        for part, training in self._flags:
            if part.training != training:
                part.training = training
