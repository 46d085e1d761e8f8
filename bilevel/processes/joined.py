"""Losses that are means over processes, and branches that all take alike; in one process all of this is nothing.

Between :func:`acting` and its end, what the library computes from a loss goes through :func:`averaged`, and what it
decides by a number through :func:`agreed`. Outside, and without a group, both return what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..shards import is_shard, part_of
from .channel import Answer, Channel, Left, Traffic, ended

Tensors = Sequence[Tensor | None]
COARSE = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Share:
    """What one process computed of a mean.

    Attributes:
        numbers: Scalars.
        vector: One tensor or nothing for each of some variables.
        flag: Whether something is news on this process; of the result: on any.
        rest: What stays with the process.
    """

    numbers: Sequence[Tensor] = ()
    vector: Tensors = ()
    flag: bool = False
    rest: Any = None


class Processes:
    """The processes that take every step together, as an optimizer's attribute ``processes``.

    Attributes:
        group: The ``torch.distributed`` group.
        rank: Which of them this is.
        size: How many there are.
        channel: How they speak to each other.
    """

    def __init__(self, group: Any) -> None:
        self.channel = Channel(group)
        self._left = False
        self.group = group
        self.rank, self.size = self.channel.rank, self.channel.size

    @property
    def traffic(self) -> Traffic:
        """Messages, reductions and bytes that this process has sent."""
        return self.channel.traffic

    def agree(self, what: str, flag: bool = False, counts: tuple[int, int] = (0, 0)) -> Answer:
        """Hear whether any process raises its flag, and how far counts are apart."""
        return self.channel.exchange(what, flag=flag, counts=counts)

    def average(self, what: str, compute: Callable[[], Share], like: Sequence[Tensor]) -> Share:
        """Return the mean of what all processes computed; what went wrong on one is raised on all.

        ``like``: the variables, in whose places a process without a tensor has zeros.
        """
        try:
            share = compute()
        except Exception as error:
            if not hasattr(error, "raised_by"):  # else all have heard it meanwhile
                self.channel.exchange(what, error=error)
            raise
        vector = [None if x is None else x.detach() for x in share.vector]
        present = [x is not None for x in vector]
        numbers = [x.detach() for x in share.numbers]
        held = int("0" + "".join("01"[has] for has in present), 2) % ((1 << 61) - 1)
        kinds = [str(x.dtype) for x in numbers]
        like = like[: len(vector)]
        layout = f"{what} ({kinds}, {sum(x.numel() for x in like)} elements)"
        answer = self.channel.exchange(layout, flag=share.flag, counts=(held, 0))
        if answer.lowest != answer.highest:
            present = self.channel.union(present)
            vector = [
                torch.zeros_like(part_of(variable)) if x is None and has else x
                for x, has, variable in zip(vector, present, like, strict=True)
            ]
        # The parts of a sharded gradient are means already, and each process has another one.
        whole: list[Tensor | None] = [None if is_shard(v) else x for x, v in zip(vector, like, strict=True)]
        found = self._mean([*numbers, *whole])
        size = len(numbers)
        means = [x for x in found[:size] if x is not None]
        given = [x if is_shard(v) else mean for x, v, mean in zip(vector, like, found[size:], strict=True)]
        return replace(share, numbers=means, vector=given, flag=answer.flag)

    def sum(self, what: str, number: Tensor) -> Tensor:
        """Return the sum of a number over the processes."""
        self.agree(what)
        found = number.detach().clone()
        self.channel.add(found)
        return found

    def first_difference(self, what: str, tensors: Sequence[Tensor]) -> tuple[int, int] | None:
        """Return which tensor differs from the first process's on which process, or None."""
        self.agree(f"{what} of {[tuple(x.shape) for x in tensors]}")
        mine = len(tensors)
        for indices in _by_kind(tensors, widen=False).values():
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices])
            theirs = self.channel.of_the_first(flat)
            if not torch.equal(flat, theirs):
                parts = theirs.split([tensors[i].numel() for i in indices])
                differ = (i for i, x in zip(indices, parts, strict=True) if not torch.equal(tensors[i].reshape(-1), x))
                mine = min(mine, next(differ, mine))
        found = [int(x) for x in torch.cat(self.channel.gathered(torch.tensor([mine]))).tolist()]
        which = min(found)
        return None if which == len(tensors) else (which, found.index(which))

    def leave(self, what: str, error: BaseException) -> None:
        """Tell the others that this process ends the call because of an error."""
        self.channel.exchange(what, error=error, leaving=True)

    def _mean(self, tensors: Tensors) -> list[Tensor | None]:
        """Reduce tensors together, one operation for each device and type; halves are added in float32."""
        result = list(tensors)
        for (_, dtype), indices in _by_kind(tensors).items():
            given = [x for x in (tensors[i] for i in indices) if x is not None]
            flat = torch.cat([x.reshape(-1).to(dtype) for x in given])
            self.channel.add(flat)
            flat.div_(self.size)
            for i, x, part in zip(indices, given, flat.split([x.numel() for x in given]), strict=True):
                result[i] = part.view(x.shape).to(x.dtype)
        return result


_active: ContextVar[Processes | None] = ContextVar("bilevel_processes", default=None)


@contextmanager
def acting(processes: Processes | None, what: str) -> Iterator[None]:
    """Surround a call that all processes make together: what one raises ends it on all.

    What comes through calls :func:`settled` as the last thing that may fail.
    """
    if processes is None and _active.get() is None:
        yield
        return
    token = _active.set(processes)
    if processes is not None:
        processes._left = False
    try:
        yield
    except Left as left:
        raise left.error from left.__cause__
    except BaseException as error:
        if processes is None or processes._left:
            raise
        try:
            processes.leave(what, error)
        except Left as left:  # the others are not even there any more
            raise error from left.error
        told: tuple[int, str, str] | None = getattr(error, "raised_by", None)
        if told is not None:
            raise ended(*told) from error
        raise
    finally:
        _active.reset(token)


def settled(what: str) -> None:
    """Hear that all processes came through, after which none of them takes anything back."""
    processes = _active.get()
    if processes is not None:
        processes.agree(what)
        processes._left = True


def several() -> Processes | None:
    """Return the processes of the call that is under way, if it is one of several processes."""
    return _active.get()


def agreed(flag: bool, what: str = "a decision") -> bool:
    """Whether the flag is raised on any process; where no group is, the flag itself."""
    processes = _active.get()
    return flag if processes is None else processes.agree(what, flag).flag


def summed(number: Tensor) -> Tensor:
    """Return the sum of what the processes have of a number; where no group is, the number."""
    processes = _active.get()
    return number if processes is None else processes.sum("an inner product", number)


def averaged(what: str, compute: Callable[[], Share], like: Sequence[Tensor] = ()) -> Share:
    """Return the mean over the processes of what ``compute`` returns; where no group is, just that.

    Args:
        what: The place in the step, the same on all processes.
        compute: Computes this process's share; what it raises on one process is raised on all.
        like: The variables that the vector belongs to, and maybe more.
    """
    processes = _active.get()
    return compute() if processes is None else processes.average(what, compute, like)


def _by_kind(tensors: Tensors, *, widen: bool = True) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, x in enumerate(tensors):
        if x is not None:
            dtype = torch.float32 if widen and x.dtype in COARSE else x.dtype
            kinds.setdefault((x.device, dtype), []).append(index)
    return kinds
