"""Parameters of which each process holds a shard (``torch.distributed.fsdp.fully_shard``): the part that is here.

What is computed with is the part: elementwise arithmetic on parts is that on the whole, and inner products are summed
over the processes (``vectors.py``). FSDP hands out gradients in the backward pass alone, averaged, as shards in
``.grad``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_shard(tensor: object) -> bool:
    """Whether a tensor is a ``DTensor``: one process's share of a larger one, or a copy that others have too."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def part_of(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is here, in the same memory; of a whole one itself."""
    if not is_shard(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def like_whole(part: Tensor, variable: Tensor) -> Tensor:
    """Return a part as what ``.grad`` of its variable must be."""
    if not is_shard(variable):
        return part
    whole: Any = variable
    made: Tensor = type(whole.data).from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return made


def group_of_shards(tensor: Tensor) -> Any | None:
    """Return the group over which a tensor is sharded, along one dimension of one mesh; None if it is otherwise."""
    whole: Any = tensor
    if whole.device_mesh.ndim != 1 or not all(type(place).__name__ == "Shard" for place in whole.placements):
        return None
    return whole.device_mesh.get_group()


def gradients_by_backward(value: Tensor, variables: Sequence[Tensor], held: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the parts of gradients by ``.backward()``; what ``held`` tensors had in ``.grad`` is put back."""
    before = [(x, x.grad) for x in {id(x): x for x in (*variables, *held)}.values()]
    for x, _ in before:
        x.grad = None
    try:
        value.backward()
        return [None if x.grad is None else part_of(x.grad).detach() for x in variables]
    finally:
        for x, grad in before:
            x.grad = grad
