"""What variables, batches and losses must not be or do: refused by name, before it makes an answer wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ClosureError, message
from ..microbatches import parts_of
from ..shards import part_of
from .verification import out_of_memory

CURES = {
    "variable": (
        "Usual causes: Embedding(max_norm=), a momentum encoder or an averaged copy that is updated in the forward. "
        "Do it between the steps."
    ),
    "batch": "Make a new tensor instead: x = x + noise, not x += noise.",
    "gradient": (
        "It calls .backward(), which adds to .grad, or zero_grad(). Use torch.autograd.grad(..., create_graph=True) "
        "inside a loss, and return the loss itself."
    ),
}

# How torch says that reentrant checkpointing cannot serve torch.autograd.grad.
REENTRANT = ("Checkpointing is not compatible with .grad()", "use_reentrant=True")


@contextmanager
def explained(loss: str) -> Iterator[None]:
    """Say what to do where torch says what it cannot do."""
    try:
        yield
    except RuntimeError as error:
        if any(mark in str(error) for mark in REENTRANT):
            raise ClosureError(
                f"{loss} uses reentrant checkpointing, through which torch cannot differentiate for chosen variables. "
                "Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
            ) from error
        if "backward through the graph a second time" in str(error):
            raise ClosureError(
                f"{loss} keeps a tensor that it computed in an earlier call, and differentiates it again. Compute it "
                "anew in each call."
            ) from error
        raise


def refuse_one_shot(owner: str, side: str, batch: Any) -> None:
    """A loss is called several times on a batch: an iterator would be empty the second time."""
    inside = [
        part for micro in parts_of(batch) for part in (micro, *(micro if isinstance(micro, (tuple, list)) else ()))
    ]
    for part in inside:
        if isinstance(part, Iterator):
            raise TypeError(
                f"{owner}.step: the {side} batch is or holds a {type(part).__name__}, which is empty after its first "
                "use, and a loss is called several times on a batch. Pass what next(iterator) returns, or a list."
            )


def refuse_accumulation_hooks(owner: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Nothing is ever accumulated into ``.grad`` here, so that such a hook would silently never be called."""
    for name, tensor in named:
        if tensor._post_accumulate_grad_hooks:
            raise ClosureError(
                f"{owner}: a hook is registered on the accumulated gradient of {name} "
                "(register_post_accumulate_grad_hook), which would never be called: directions are computed without "
                ".backward(). Usual cause: an optimizer that steps in the backward pass. Use one that steps from .grad."
            )


def refuse_shared_memory(owner: str, named: list[tuple[str, Tensor]]) -> None:
    """Two variables in the same memory would be moved twice, by turns."""
    found = [(_range(tensor), name, tensor) for name, tensor in named]
    ranges = sorted((entry for entry in found if entry[0] is not None), key=lambda entry: entry[0] or ("", 0, 0))
    for (first, name, one), (second, other, two) in pairwise(ranges):
        if first is not None and second is not None and first[0] == second[0] and second[1] < first[2]:
            if one is two or _interleaved(one, two):  # one tensor in both levels: other checks speak of it
                continue
            side, _, which = other.partition(" variable ")
            advice = (
                f"shares memory with {name}, so that each would move the other. Usual cause: weights tied through "
                ".data, or views of one tensor. Tie the module's attributes (the same Parameter), or move the one "
                "tensor and take its parts inside the losses."
            )
            raise ValueError(message(owner, side, which, advice))


def _range(tensor: Tensor) -> tuple[str, int, int] | None:
    """Return the device and the first and last address of a tensor's elements."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.numel() == 0:
        return None
    start = tensor.data_ptr()
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (str(tensor.device), start, start + length * tensor.element_size()) if start else None


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage have no element in common although their ranges overlap."""
    if a.dtype != b.dtype or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    marks = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return not bool(marks.as_strided(b.shape, b.stride(), b.storage_offset()).any())


@contextmanager
def inspected(loss: str, named: Iterable[tuple[str, Tensor]], moved: set[int], batch: Any) -> Iterator[None]:
    """Surround a call of ``loss`` that must change none of the ``named`` tensors, their ``.grad``, nor the ``batch``.

    What it did change is put back, as far as there are copies: of the batch, of the variables (whose ids are
    ``moved``), and of the other parameters where these are no larger.
    """
    named = [(name, tensor) for name, tensor in named if not tensor.is_inference()]
    budget = sum(tensor.numel() for _, tensor in named if id(tensor) in moved)
    others = sum(tensor.numel() for _, tensor in named if id(tensor) not in moved)
    watched: list[_Watched] = []
    try:
        for name, tensor in named:
            kept = id(tensor) in moved or others <= budget
            watched.append(_Watched("variable", name, tensor, kept))
            if tensor.grad is not None:
                watched.append(_Watched("gradient", f"the gradient of {name}", tensor.grad, kept))
        watched += [_Watched("batch", "a tensor of its batch", x, True) for x in tensors_of(batch)]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        watched.clear()
    gradients = [(name, tensor, tensor.grad) for name, tensor in named]
    try:
        yield
    finally:
        changed = [entry for entry in watched if entry.restored()]
        fresh = [name for name, tensor, grad in gradients if tensor.grad is not grad]
        for _, tensor, grad in gradients:
            if tensor.grad is not grad:
                tensor.grad = grad
    if changed or fresh:
        kind = "gradient" if fresh else changed[0].kind
        name = f"the gradient of {fresh[0]}" if fresh else changed[0].name
        raise changed_in_place(loss, name, kind)


def changed_in_place(loss: str, name: str, kind: str) -> ClosureError:
    """Phrase the error about a loss that changes what it is called on."""
    return ClosureError(
        f"{loss} changes {name} in place, so that it is another function each time it is called. {CURES[kind]}"
    )


class _Watched:
    """A tensor, the count of its changes in place, and its values."""

    def __init__(self, kind: str, name: str, tensor: Tensor, kept: bool) -> None:
        self.kind, self.name = kind, name
        tensor = part_of(tensor)
        self._tensor, self._version = tensor, tensor._version
        self._values = tensor.detach().clone() if kept else None

    def restored(self) -> bool:
        """Put the values back if they changed, and say so."""
        changed = self._tensor._version != self._version
        if self._values is not None:  # what is written through .data, or by numpy, does not count as a change
            changed = changed or bool(_differ(self._tensor.detach(), self._values))
            if changed:
                self._tensor.data.copy_(self._values)
        return changed


def _differ(a: Tensor, b: Tensor) -> Tensor:
    different = a != b
    if a.is_floating_point() or a.is_complex():
        different = different & ~(a.isnan() & b.isnan())
    return different.any()


def count_samples(batches: Sequence[Any]) -> int:
    """Return how many samples some batches seem to hold: the lengths of their first tensors; 0 where there is none."""
    plain = [getattr(batch, "batch", batch) for batch in batches]  # of one that knows its number
    firsts = (next((x for x in tensors_of(batch) if x.dim() > 0), None) for batch in plain)
    return sum(x.shape[0] for x in firsts if x is not None)


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch: in containers, dataclasses, and objects with attributes."""
    if is_dataclass(batch) and not isinstance(batch, type):
        return [x for entry in fields(batch) for x in tensors_of(getattr(batch, entry.name))]
    found = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not found and hasattr(batch, "__dict__") and not isinstance(batch, torch.nn.Module):
        found = [leaf for leaf in tree_leaves(dict(vars(batch))) if isinstance(leaf, Tensor)]
    return [x for x in found if not x.is_inference() and x.layout == torch.strided]
