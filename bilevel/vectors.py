"""Arithmetic on groups of tensors.

A gradient or a direction of one level is a :class:`Vector`: one tensor per variable, in parameter order, or ``None``
where a loss does not use the variable. ``None`` counts as zero in sums and products, and stays ``None`` in results, so
that an unused variable keeps ``.grad`` None all the way to the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from .processes.joined import summed

Tensors = Sequence[Tensor | None]
Scalar = float | Tensor

# Tensors are flattened together up to this many elements: few kernel launches for many small tensors, and a bounded
# temporary (8 MiB a vector in float64) for large ones.
CHUNK = 1 << 20


class Vector(Sequence[Tensor | None]):
    """One tensor or nothing per variable of a level, in parameter order: what equations add, scale and multiply.

    It is never changed. ``a + b``, ``a - b``, ``s * a`` and ``-a`` are new vectors (a product by a number is taken when
    it is needed first, so that ``a + s * b`` is one pass); ``a.dot(b)``, ``a.norm()`` and ``a.squared_norm()`` are
    0-dim tensors, accumulated in float64 where the device has it. A variable without a tensor counts as zero.

    Args:
        tensors: One tensor, or None, for each variable.
        names: The variables' names; default: their numbers.

    Raises:
        ValueError: There are more or fewer names than tensors, or vectors of different levels are added.

    Cost:
        A foreach kernel or two per operation, whatever the number of tensors; nothing is synchronised.

    Example:
        >>> import torch
        >>> from bilevel import Vector
        >>> a, b = Vector([torch.ones(2), None]), Vector([torch.ones(2), torch.ones(1)])
        >>> (a + 0.5 * b)[0], a.dot(b).item()
        (tensor([1.5000, 1.5000]), 2.0)
    """

    __slots__ = ("_factor", "_shards", "_tensors", "names")

    def __init__(self, tensors: Iterable[Tensor | None], names: Sequence[str] | None = None) -> None:
        self._tensors: tuple[Tensor | None, ...] = tuple(tensors)
        self._factor: Scalar | None = None
        self._shards: Sequence[bool] = ()  # which entries are parts, of which other processes have the rest
        self.names = tuple(map(str, range(len(self._tensors)))) if names is None else tuple(names)
        if len(self.names) != len(self._tensors):
            raise ValueError(f"Vector(names=...): {len(self.names)} names for {len(self._tensors)} tensors.")

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor | None]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor | None] | None:
        return self._taken()[index]

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter(self._taken())

    def __add__(self, other: Tensors) -> Vector:
        if isinstance(other, Vector):
            if self._factor is not None and other._factor is None:
                return self.like(add_scaled(other._tensors, self._factor, self._tensors))
            if other._factor is not None:
                return self.like(add_scaled(self._taken(), other._factor, other._tensors))
        return self.like(add_scaled(self._taken(), 1.0, other))

    __radd__ = __add__

    def __sub__(self, other: Tensors) -> Vector:
        if isinstance(other, Vector) and other._factor is not None:
            return self.like(add_scaled(self._taken(), -other._factor, other._tensors))
        return self.like(add_scaled(self._taken(), -1.0, other))

    def __mul__(self, scale: Scalar) -> Vector:
        scaled = self.like(self._taken())
        scaled._factor = scale
        return scaled

    __rmul__ = __mul__

    def __truediv__(self, scale: Scalar) -> Vector:
        return self * (1.0 / scale)

    def __neg__(self) -> Vector:
        return self * -1.0

    def __repr__(self) -> str:
        return f"Vector({self.named()!r})"

    def dot(self, other: Tensors) -> Tensor:
        """Return ``sum_i <a_i, b_i>``."""
        return self.dots(other)[0]

    def dots(self, *others: Tensors) -> list[Tensor]:
        """Return ``a.dot(b)`` for each ``b``, with one reading of ``a``: cheaper than one after another."""
        if not any(self._shards):
            return dots(self, *others)
        parts = dots(*([x if s else None for x, s in zip(v, self._shards, strict=True)] for v in (self, *others)))
        wholes = dots(*([None if s else x for x, s in zip(v, self._shards, strict=True)] for v in (self, *others)))
        return [summed(part) + whole.to(part.device) for part, whole in zip(parts, wholes, strict=True)]

    def squared_norm(self) -> Tensor:
        """Return ``sum_i |a_i|^2``."""
        return self.dots(self)[0]

    def norm(self) -> Tensor:
        """Return ``sqrt(sum_i |a_i|^2)``."""
        return self.squared_norm().sqrt()

    def detach(self) -> Vector:
        """Return the same values without a graph."""
        return self.like(x if x is None else x.detach() for x in self)

    def clone(self) -> Vector:
        """Return a copy of the values: for a point that is to be remembered, as the variables will move."""
        return self.like(x if x is None else x.detach().clone() for x in self)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name, without the variables that have none."""
        return {name: x for name, x in zip(self.names, self, strict=True) if x is not None}

    def like(self, tensors: Iterable[Tensor | None]) -> Vector:
        """Return other tensors as a vector of the same variables."""
        made = Vector.__new__(Vector)
        made._tensors, made._factor, made.names, made._shards = tuple(tensors), None, self.names, self._shards
        return made

    def sharded(self, shards: Sequence[bool]) -> Vector:
        """Return it with a mark at each entry that is a part, of which other processes have the rest."""
        made = self.like(self._taken())
        made._shards = shards
        return made

    def _taken(self) -> tuple[Tensor | None, ...]:
        """The tensors, with the factor multiplied in."""
        if self._factor is not None:
            nothing = [None] * len(self._tensors)
            self._tensors, self._factor = tuple(add_scaled(nothing, self._factor, self._tensors)), None
        return self._tensors


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Float64 wherever the device has it: squares of float32 values then neither overflow nor lose digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def dot(a: Tensors, b: Tensors) -> Tensor:
    """Return the inner product ``sum_i <a_i, b_i>`` as a 0-dim tensor in the accumulation dtype.

    The result stays on the device of the first pair; nothing is synchronised.
    """
    return dots(a, b)[0]


def dots(a: Tensors, *others: Tensors) -> list[Tensor]:
    """Return ``sum_i <a_i, b_i>`` for each ``b`` of ``others``, as :func:`dot` does; ``a`` is read and widened once."""
    gaps = {tuple(x is None or y is None for x, y in zip(a, b, strict=True)) for b in others}
    if len(gaps) > 1:
        return [dot(a, b) for b in others]
    used = [i for i, absent in enumerate(next(iter(gaps))) if not absent]
    if not used:
        device = next((x.device for b in (a, *others) for x in b if x is not None), torch.device("cpu"))
        return [torch.zeros((), dtype=accumulation_dtype(device), device=device) for _ in others]
    totals: list[Tensor] = []
    for parts in _chunks(_present(a, used), [_present(b, used) for b in others]):
        found = [torch.dot(parts[0], part) for part in parts[1:]]
        totals = (
            [t + x.to(t.device, non_blocking=True) for t, x in zip(totals, found, strict=True)] if totals else found
        )
    return totals


def squared_norm(a: Tensors) -> Tensor:
    """Return ``sum_i |a_i|^2``, accumulated as in :func:`dot`."""
    return dot(a, a)


def subtract(a: Tensors, b: Tensors) -> list[Tensor | None]:
    """Return ``a - b``."""
    return add_scaled(a, -1.0, b)


def add_scaled(a: Tensors, scale: Scalar, b: Tensors) -> list[Tensor | None]:
    """Return ``a + scale * b``; a tensor ``scale`` follows each term to its device and never widens its dtype."""
    if len(a) != len(b):
        raise ValueError(f"add_scaled: got vectors of {len(a)} and {len(b)} variables. Is one of the other level?")
    result = list(a)
    present = [i for i, y in enumerate(b) if y is not None]
    if isinstance(scale, float) and abs(scale) == 1.0 and _alike(a, b, present):
        combine = torch._foreach_add if scale > 0 else torch._foreach_sub
        for indices in _by_device(b, present).values():
            for i, x in zip(indices, combine(_present(a, indices), _present(b, indices)), strict=True):
                result[i] = x
        return result
    for device, indices in _by_device(b, present).items():
        factor = scale.to(device, non_blocking=True) if isinstance(scale, Tensor) else scale
        terms = _present(b, indices)
        # .to: a float64 scale would promote a variable that is 0-dim itself.
        products = [p.to(y.dtype) for p, y in zip(torch._foreach_mul(terms, factor), terms, strict=True)]
        sums = [k for k, i in enumerate(indices) if a[i] is not None]
        if sums:
            torch._foreach_add_([products[k] for k in sums], _present(a, [indices[k] for k in sums]))
        for product, i in zip(products, indices, strict=True):
            result[i] = product
    return result


def without_aliasing(a: Tensors) -> list[Tensor | None]:
    """Return ``a``, with a copy of every tensor that is expanded or shares memory with another.

    Autograd gives one tensor to two variables that are added, and an expanded one to a variable that is summed. As
    ``.grad`` they would be changed twice, or fail, where a user's hook clips in place.
    """
    result = list(a)
    seen: set[int] = set()
    for index, x in enumerate(a):
        if x is not None:
            storage = x.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != x.numel() * x.element_size():
                result[index] = x.clone()
            seen.add(storage.data_ptr())
    return result


def all_finite(a: Tensors) -> Tensor | None:
    """Return a 0-dim bool: is every entry finite? ``None`` for a vector without tensors."""
    present = [i for i, x in enumerate(a) if x is not None and x.numel() > 0]
    verdict: Tensor | None = None
    for indices in _by_device(a, present).values():
        # The largest magnitude is finite exactly if all are, and cannot overflow as a sum of squares would. Not as an
        # infinity norm: on the CPU its kernel takes four times as long.
        peaks = torch._foreach_max(torch._foreach_abs(_present(a, indices)))
        finite = torch.isfinite(torch.stack(peaks)).all()
        verdict = finite if verdict is None else verdict & finite.to(verdict.device, non_blocking=True)
    return verdict


def exchange(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Exchange the values of two groups of tensors in place, bit for bit, with one chunk of temporary memory.

    An exchange instead of a copy is what keeps barrier methods at one extra copy of the lower variables: while the
    look-ahead values sit in the parameters, the current ones sit where the look-ahead values came from.
    """
    for group in _groups(a):
        # .data leaves the version counters alone: values are back before any graph of the caller's can notice.
        left = [a[i].data for i in group]
        right = [b[i].data for i in group]
        kept = [x.clone() for x in left]
        torch._foreach_copy_(left, right)
        torch._foreach_copy_(right, kept)


def place(a: Sequence[Tensor], b: Sequence[Tensor]) -> Callable[[], None]:
    """Put the values of ``b`` into ``a`` in place; return what puts the old ones back, bit for bit.

    Up to one chunk the old values are kept meanwhile. Beyond it they are exchanged, which takes twice the copies and no
    memory.
    """
    if sum(x.numel() for x in a) > CHUNK:
        exchange(a, b)
        return lambda: exchange(a, b)
    own = [x.data for x in a]  # as in exchange
    kept = [x.clone() for x in own]
    torch._foreach_copy_(own, [x.detach() for x in b])
    return lambda: torch._foreach_copy_(own, kept)


def present(a: Tensors) -> list[Tensor]:
    """Return a vector without gaps as a list: a point, where every variable has a value."""
    return [x for x in a if x is not None]


def _alike(a: Tensors, b: Tensors, indices: Sequence[int]) -> bool:
    """Whether sums of these pairs are of the second one's dtype and shape, device by device."""
    for i in indices:
        x, y = a[i], b[i]
        if x is None or y is None or x.dtype != y.dtype or x.device != y.device or x.shape != y.shape:
            return False
    return True


def _present(a: Tensors, indices: Sequence[int]) -> list[Tensor]:
    return [x for x in (a[i] for i in indices) if x is not None]


def _by_device(a: Tensors, indices: Sequence[int]) -> dict[torch.device, list[int]]:
    """Sort ``indices`` of present tensors by device: a foreach kernel takes a tensor scalar of one device only."""
    devices: dict[torch.device, list[int]] = {}
    for i in indices:
        x = a[i]
        if x is not None:
            devices.setdefault(x.device, []).append(i)
    return devices


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Split the indices of ``tensors`` into runs of one device and at most ``CHUNK`` elements (or a single tensor)."""
    run: list[int] = []
    size = 0
    for index, tensor in enumerate(tensors):
        if run and (size + tensor.numel() > CHUNK or tensor.device != tensors[run[0]].device):
            yield run
            run, size = [], 0
        run.append(index)
        size += tensor.numel()
    if run:
        yield run


def _chunks(a: list[Tensor], others: list[list[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield all flattened in chunks, in the accumulation dtype; ``a`` itself among the others is not read again."""
    for group in _groups(a):
        chosen = [[tensors[i] for i in group] for tensors in others]
        again = [all(a[i] is x for i, x in zip(group, tensors, strict=True)) for tensors in chosen]
        others_flat = (_flattened(tensors) for tensors, is_a in zip(chosen, again, strict=True) if not is_a)
        for first, *rest in zip(_flattened([a[i] for i in group]), *others_flat, strict=True):
            remaining = iter(rest)
            yield (first, *(first if is_a else next(remaining) for is_a in again))


def _flattened(group: list[Tensor]) -> Iterator[Tensor]:
    """Yield one group as one tensor, or a group of a single large tensor in chunks."""
    dtype = accumulation_dtype(group[0].device)
    if len(group) > 1:
        # Joined first, because one conversion is cheaper than many (mixed dtypes are widened without loss); by the
        # function that joins in C++, as a view of each from here is a third of the inner product.
        with torch.no_grad():
            joined: Tensor = torch._utils._flatten_dense_tensors(group)
        yield joined.to(dtype)
    else:
        yield from (part.to(dtype) for part in group[0].detach().reshape(-1).split(CHUNK))
