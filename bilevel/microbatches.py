"""Micro-batches: one batch in parts, which losses see one after another, at the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .batches import MISSING, Batches, Indexed
from .errors import choice, count, message
from .vectors import Tensors

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, init=False)
class MicroBatches:
    """A batch in parts: ``step(MicroBatches(parts), lower)`` has the numbers of the joined batch, at the memory of one.

    Wherever a step evaluates or differentiates the loss on this batch, it does so on one part after another, no two
    graphs alive at once, and adds up. So inner products, multipliers and products see what they would see of the joined
    batch. It takes the place of any batch: of the upper one, of each lower one, in ``Batches`` and in ``Indexed``.

    Args:
        parts: The micro-batches, each as the loss takes it.
        weights: How much each part counts, >= 0; default: by its size, which is the first dimension of its first
            tensor. Say it where a loss is no mean over that dimension (a mean over tokens: the numbers of tokens).
        reduction: ``"mean"`` (default): the loss is a mean over its batch, and the weights are divided by their sum.
            ``"sum"``: it is a sum over its batch, whose parts count 1 each, or as ``weights`` says. What it adds that
            does not depend on the batch, such as a penalty on weights, is then counted once a part.

    Raises:
        TypeError, ValueError: No parts, weights that do not fit, or sizes that cannot be told.

    Example:
        >>> import torch, bilevel
        >>> batch = bilevel.MicroBatches([torch.ones(6, 2), torch.ones(2, 2)])
        >>> batch.weights
        (0.75, 0.25)
    """

    parts: tuple[Any, ...]
    weights: tuple[float, ...]
    reduction: Reduction

    def __init__(
        self, parts: Iterable[Any], *, weights: Iterable[float] | None = None, reduction: Reduction = "mean"
    ) -> None:
        choice("MicroBatches", "reduction", reduction, ("mean", "sum"))
        if isinstance(parts, Tensor) or not isinstance(parts, Iterable):
            advice = "must be a list of micro-batches. To split one batch, MicroBatches.split(batch, 4)."
            raise TypeError(message("MicroBatches", "parts", type(parts).__name__, advice))
        found = tuple(parts)
        if not found:
            raise ValueError(message("MicroBatches", "parts", "[]", "needs at least one micro-batch."))
        for part in found:
            if isinstance(part, (Batches, Indexed, MicroBatches)):
                kind = type(part).__name__
                advice = f"must be what the loss takes. Put MicroBatches into {kind}, not the other way round."
                raise TypeError(message("MicroBatches", "parts", kind, advice))
        if weights is None:
            sizes = [1.0] * len(found) if reduction == "sum" else [float(_size(part)) for part in found]
        else:
            sizes = [float(weight) for weight in weights]
        if len(sizes) != len(found) or not all(isfinite(x) and x >= 0 for x in sizes) or sum(sizes) == 0:
            advice = f"must be {len(found)} numbers >= 0, one for each part, not all 0."
            raise ValueError(message("MicroBatches", "weights", sizes, advice))
        whole = sum(sizes) if reduction == "mean" else 1.0
        object.__setattr__(self, "parts", found)
        object.__setattr__(self, "weights", tuple(x / whole for x in sizes))
        object.__setattr__(self, "reduction", reduction)

    def mapped(self, function: Callable[[Any], Any]) -> MicroBatches:
        """Return these micro-batches with ``function`` applied to each."""
        made = copy(self)
        object.__setattr__(made, "parts", tuple(function(part) for part in self.parts))
        return made

    @classmethod
    def split(cls, batch: Any, count_: int, /) -> MicroBatches:
        """Split every tensor of a batch into so many parts along its first dimension, as equal as can be.

        Numbers and 0-dim tensors go into each part.

        Raises:
            TypeError, ValueError: There is nothing to split, tensors differ in their first dimension, or the batch
                holds what cannot be split.

        Example:
            >>> import torch, bilevel
            >>> batch = bilevel.MicroBatches.split((torch.ones(5, 2), torch.zeros(5)), 2)
            >>> [x.shape[0] for x, _ in batch.parts]
            [3, 2]
        """
        owner = "MicroBatches.split"
        count(owner, "count", count_, minimum=1)
        leaves, shape = tree_flatten(batch)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, bool, int, float, type(None))):
                advice = "is no tensor, tuple, list or dict of them. Split it yourself: MicroBatches([first, second])."
                raise TypeError(message(owner, "batch", type(leaf).__name__, advice))
        sizes = list(dict.fromkeys(x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim() > 0))
        if len(sizes) != 1 or sizes[0] < count_:
            shown = f"first dimensions {sizes}"
            advice = (
                f"must have tensors of one first dimension, at least {count_}. Split it yourself: "
                "MicroBatches([first, second])."
            )
            raise ValueError(message(owner, "batch", shown, advice))
        columns = [x.tensor_split(count_) if isinstance(x, Tensor) and x.dim() > 0 else [x] * count_ for x in leaves]
        return cls([tree_unflatten([column[i] for column in columns], shape) for i in range(count_)])


def split_batch(batch: Any, parts: int) -> Any:
    """Return a batch of ``step`` in so many parts; what is in parts already, or missing, as it is."""
    if batch is MISSING or isinstance(batch, MicroBatches):
        return batch
    if isinstance(batch, Batches):
        return Batches(*(split_batch(x, parts) for x in batch.batches))
    if isinstance(batch, Indexed):
        return Indexed(batch.index, split_batch(batch.batch, parts))
    return MicroBatches.split(batch, parts)


def parts_of(batch: Any) -> tuple[Any, ...]:
    """Return what the loss is called on, one after another."""
    return batch.parts if isinstance(batch, MicroBatches) else (batch,)


def weights_of(batch: Any) -> tuple[float, ...]:
    """Return how much each of :func:`parts_of` counts."""
    return batch.weights if isinstance(batch, MicroBatches) else (1.0,)


class Sum:
    """A weighted sum of vectors, one after another, in float32 or better: the joined batch would add no worse."""

    def __init__(self) -> None:
        self._total: list[Tensor | None] | None = None
        self._dtypes: list[torch.dtype | None] = []

    def add(self, weight: float, vector: Tensors) -> None:
        """Add ``weight * vector``."""
        if self._total is None:
            self._total, self._dtypes = [None] * len(vector), [None] * len(vector)
        sums, terms = [], []
        for index, x in enumerate(vector):
            if x is None:
                continue
            wide, total = x.detach().to(torch.promote_types(x.dtype, torch.float32)), self._total[index]
            self._dtypes[index] = x.dtype
            if total is None:
                self._total[index] = wide * weight
            else:
                sums.append(total)
                terms.append(wide)
        if sums:
            torch._foreach_add_(sums, terms, alpha=weight)

    @property
    def total(self) -> Tensors:
        """The sum, each tensor in the dtype of its terms."""
        return [
            x if x is None or dtype is None else x.to(dtype)
            for x, dtype in zip(self._total or [], self._dtypes, strict=True)
        ]


def joined(values: Sequence[Any], batch: Any) -> Any:
    """Join what the loss returned beside its value on each part: what it would return on the joined batch, mostly.

    Leaf by leaf: floating-point scalars are added up with the weights of the parts, integer ones as they are (counts);
    tensors are concatenated along their first dimension; of anything else there is a list.
    """
    if not isinstance(batch, MicroBatches) or len(values) == 1:
        return values[0]
    flat = [tree_flatten(value) for value in values]
    shape = flat[0][1]
    if any(other != shape for _, other in flat):
        return list(values)
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return tree_unflatten([_joined_leaf(list(column), batch.weights) for column in columns], shape)


def _joined_leaf(column: list[Any], weights: Sequence[float]) -> Any:
    if all(x is None for x in column):
        return None
    if all(isinstance(x, float) for x in column):
        return sum(weight * x for weight, x in zip(weights, column, strict=True))
    if not all(isinstance(x, Tensor) and x.layout == torch.strided for x in column):
        return column
    if all(x.dim() == 0 for x in column):
        if column[0].is_floating_point():
            total = Sum()
            for weight, x in zip(weights, column, strict=True):
                total.add(weight, [x])
            return total.total[0]
        return torch.stack(column).sum() if column[0].dtype != torch.bool else column
    if all(x.dim() > 0 and x.shape[1:] == column[0].shape[1:] for x in column):
        return torch.cat(column)
    return column


def _size(part: Any) -> int:
    """Return the first dimension of the first tensor in a batch: in containers, dataclasses, and objects."""
    if is_dataclass(part) and not isinstance(part, type):
        part = [getattr(part, entry.name) for entry in fields(part)]
    leaves = tree_leaves(part)
    if not any(isinstance(leaf, Tensor) for leaf in leaves) and hasattr(part, "__dict__"):
        leaves = tree_leaves(dict(vars(part)))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    advice = "holds no tensor with a first dimension, so that its size is not known. Pass weights= with the sizes."
    raise TypeError(message("MicroBatches", "parts", type(part).__name__, advice))
