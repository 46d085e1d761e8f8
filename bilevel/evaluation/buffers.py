"""The buffers of modules (BatchNorm statistics): snapshots, and which modules' buffers moved, without synchronising."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ClosureError

Kind = tuple[torch.device, torch.dtype]


@dataclass
class Snapshot:
    """The buffers' tensor objects, which of them are of each kind, and each kind's values, flattened."""

    objects: list[Tensor]
    kinds: dict[Kind, list[int]]
    values: dict[Kind, Tensor]


class Buffers:
    """The buffers of modules, without their children's; snapshots cost one copy and one kernel per device and dtype."""

    def __init__(self, modules: Iterable[nn.Module], variables: Iterable[Tensor] = ()) -> None:
        parts = {id(part): part for part in modules}
        seen = set(map(id, variables))  # a variable that is registered as a buffer moves as a variable
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
        self._created: dict[int, tuple[Tensor, Tensor]] = {}  # by place in _absent: the buffer, and its value then
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
        self.remove_created()
        for kind, which in snapshot.kinds.items():
            _scatter([snapshot.objects[i] for i in which], snapshot.values[kind])

    def remove_created(self) -> None:
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

    def remember_created(self, *, anew: bool) -> None:
        """Remember the buffers that a loss made where there was None; ``anew``: also those remembered before."""
        for place, (module, name) in enumerate(self._absent):
            buffer = module._buffers[name]
            if buffer is not None and (anew or place not in self._created):
                self._created[place] = (buffer, buffer.detach().clone())

    def restore_created(self) -> None:
        """Put the remembered ones back, as they were then."""
        for place, (buffer, value) in self._created.items():
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
