"""How processes speak to each other: small messages that all of them send at the same place of a step.

Every operation on numbers follows such a message. A process that failed sends one too, with its cause, so that nobody
waits for numbers that will never come; and processes that are not at the same place find out before they mix numbers
that do not belong together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ProcessError

WELL, FAILED, LEAVING = range(3)
TEXT = 2048  # bytes of a cause that are passed on


class Left(BaseException):  # no Exception: what catches errors of a loss must not go on alone
    """The processes do not go on together; ``error`` is what the caller of the step sees."""

    def __init__(self, error: ProcessError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Traffic:
    """What one process has sent so far.

    Attributes:
        messages: Agreements, of 64 bytes each.
        reductions: Collective operations on numbers: one for each evaluation and each product.
        bytes: How many bytes of numbers this process gave into them.

    Example:
        >>> from bilevel.processes.channel import Traffic
        >>> Traffic().bytes
        0
    """

    messages: int = 0
    reductions: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Answer:
    """What all processes said: whether any raised its flag, and the smallest and the largest of each count."""

    flag: bool
    lowest: tuple[int, int]
    highest: tuple[int, int]


class Channel:
    """The messages of one group of processes."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()
        self._control = _on_the_host(group)

    def exchange(
        self,
        what: str,
        *,
        error: BaseException | None = None,
        leaving: bool = False,
        flag: bool = False,
        counts: tuple[int, int] = (0, 0),
    ) -> Answer:
        """Say ``what`` this process does, and hear that all do the same.

        Args:
            what: The place in the step, the same on all processes.
            error: What went wrong here. It is raised by the caller; on the others here.
            leaving: Whether this process ends the step because of it, so that nothing more will come.
            flag: A yes or no; the answer is whether anybody said yes.
            counts: Two numbers that are to be compared.

        Raises:
            Left: They do not do the same, one has left, or one does not answer.
            Exception: One failed here, in a way that all may recover from alike: of the same kind as there.
        """
        code = WELL if error is None else LEAVING if leaving else FAILED
        mark = int.from_bytes(blake2b(what.encode(), digest_size=7).digest(), "big")
        first, second = counts
        said = [code, int(flag), mark, -mark, first, -first, second, -second]
        heard = self._largest(said)
        if heard[0] != WELL or heard[2] != -heard[3]:
            self._explain(what, code, error, heard[0])
        return Answer(bool(heard[1]), (-heard[5], -heard[7]), (heard[4], heard[6]))

    def union(self, present: Sequence[bool]) -> list[bool]:
        """Return which of some tensors any process has."""
        marks = torch.tensor(present, dtype=torch.uint8)
        with _answered():
            dist.all_reduce(marks, dist.ReduceOp.MAX, self._control)
        return [bool(mark) for mark in marks.tolist()]

    def add(self, numbers: Tensor) -> None:
        """Replace ``numbers`` by their sum over the processes."""
        self.traffic.reductions += 1
        self.traffic.bytes += numbers.numel() * numbers.element_size()
        with _answered():
            dist.all_reduce(numbers, dist.ReduceOp.SUM, self.group)

    def of_the_first(self, numbers: Tensor) -> Tensor:
        """Return the numbers of the first process."""
        found = numbers.clone()
        self.traffic.reductions += 1
        self.traffic.bytes += numbers.numel() * numbers.element_size()
        with _answered():
            dist.broadcast(found, group=self.group, group_src=0)
        return found

    def gathered(self, block: Tensor) -> list[Tensor]:
        """Return the blocks of all processes, of one size and on the host, in the order of their ranks."""
        found = [torch.empty_like(block) for _ in range(self.size)]
        with _answered():
            dist.all_gather(found, block, group=self._control)
        return found

    def texts(self, text: str) -> list[str]:
        """Return a short text of each process."""
        told = text.encode()[:TEXT]
        block = torch.zeros(TEXT, dtype=torch.uint8)
        if told:
            block[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        return [bytes(x.tolist()).rstrip(b"\0").decode(errors="ignore") for x in self.gathered(block)]

    def _largest(self, said: list[int]) -> list[int]:
        numbers = torch.tensor(said, dtype=torch.int64)
        self.traffic.messages += 1
        with _answered():
            dist.all_reduce(numbers, dist.ReduceOp.MAX, self._control)
        heard: list[int] = numbers.tolist()
        return heard

    def _explain(self, what: str, code: int, error: BaseException | None, worst: int) -> None:
        """Pass on what is wrong, and raise what this process is to do about it, if it does not raise its own error."""
        kind = "" if error is None else f"{type(error).__module__}|{type(error).__qualname__}"
        told = self.texts(f"{code}|{kind}|{what}|{error}" if error is not None else f"{code}|||{what}")
        parts = [text.split("|", 4 if text[0] != str(WELL) else 3) for text in told]
        if worst == WELL:
            places = "; ".join(f"process {rank} is at {part[3]}" for rank, part in enumerate(parts))
            raise Left(
                ProcessError(
                    f"the processes do different things: {places}. Usual causes: one of them skips a call, or a loss "
                    "or a method decides by numbers that only one process has. Make the same calls on all of them."
                )
            )
        culprit = next(rank for rank, part in enumerate(parts) if int(part[0]) == worst)
        _, module, name, _, text = parts[culprit]
        if worst == LEAVING:
            if code != LEAVING:
                raise Left(ended(culprit, name, text)) from error
        elif error is None:
            raise _echo(culprit, module, name, text)


def ended(rank: int, kind: str, text: str) -> ProcessError:
    """Phrase the error of a process that ends because of another one."""
    return ProcessError(
        f"process {rank} raised {kind}: {text} [This ended the call on every process; what had moved is taken back as "
        "far as contract 2 promises. Look at that process's own traceback.]"
    )


def _echo(rank: int, module: str, name: str, text: str) -> Exception:
    """Return the error of another process, of the same kind if that is a kind that takes a text."""
    kind = getattr(sys.modules.get(module), name, None)
    error: Exception = RuntimeError(text)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            error = kind(text)
        except Exception:  # a kind of the user's, with arguments of its own
            error = RuntimeError(text)
    error.__dict__["raised_by"] = (rank, name, text)
    return error


@contextmanager
def _answered() -> Iterator[None]:
    """Say that a process does not answer, in the place of what the backend says."""
    try:
        yield
    except RuntimeError as error:
        line = str(error).strip().partition("\n")[0]
        raise Left(
            ProcessError(
                f"another process ended, or did not answer within the group's time-out ({line}). Usual causes: it "
                "raised outside of a step, was killed, or makes fewer calls. Look at its own error first."
            )
        ) from error


def _on_the_host(group: Any) -> Any:
    """Return a group of the same processes that speaks without an accelerator, which would be waited for."""
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        ranks = dist.get_process_group_ranks(group)
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=True, timeout=_time_out(group))
    return group


def _time_out(group: Any) -> Any:
    """Return how long a group waits for an answer; None, torch's default, where it does not tell."""
    try:
        return group._get_backend(torch.device(torch.accelerator.current_accelerator() or "cpu")).options._timeout
    except (AttributeError, RuntimeError):
        return None
