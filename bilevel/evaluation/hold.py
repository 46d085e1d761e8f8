"""``hold``: a value of a batch's first evaluation, given again to its later evaluations in the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compiler import eager
from ..errors import ClosureError


@dataclass
class Held:
    """The tensors that a batch's first evaluation held, in the order of its calls of :func:`hold`."""

    values: list[Tensor] = field(default_factory=list)
    cursor: int | None = None  # None while recording

    def visit(self, tensor: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            raise ClosureError(
                "hold(tensor): called during a backward pass, which recomputes a checkpointed function "
                "(torch.utils.checkpoint) that holds. Call hold outside of the checkpointed function, and pass what it "
                "returns in."
            )
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


_active: ContextVar[Held | None] = ContextVar("bilevel_held", default=None)


@contextmanager
def holding(held: Held) -> Iterator[None]:
    """Let :func:`hold` record into ``held``, or read from it, during one evaluation."""
    token = _active.set(held)
    try:
        yield
    finally:
        _active.reset(token)
    if held.cursor is not None and held.cursor != len(held.values):
        raise ClosureError(
            f"hold(tensor): a look-ahead evaluation held {held.cursor} tensors, the batch's first evaluation "
            f"{len(held.values)}. The loss branches on something that changes between its calls. Call hold the same "
            "way in every call."
        )


@eager  # a trace would freeze what is held
def _replayed(tensor: Tensor) -> Tensor:
    held = _active.get()
    return tensor if held is None else held.visit(tensor)


def hold(tensor: Tensor) -> Tensor:
    """Hold a value fixed at the current point while the losses are looked at around it.

    Inside a loss, during ``step``, ``directions`` and ``check_directions``: the first evaluation of a batch gets
    ``tensor.detach()``, every later evaluation of that batch in the same step gets the same values again, whatever the
    variables are then. So a held value is a constant of the step: no gradient flows through it. Outside a step it is
    the identity, gradient included.

    Use it for the features of the lower model that an upper module reads (otherwise what it computes would differ
    between the look-ahead point and the current one), and for targets that dropout must not touch.

    Args:
        tensor: Any tensor that is computed inside the loss.

    Returns:
        A tensor of the same shape, dtype and device.

    Raises:
        TypeError: ``tensor`` is not a tensor.
        ClosureError: A later evaluation calls ``hold`` another number of times than the first, or with another shape;
            or it is called in a checkpointed function, whose recomputation would call it again.

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
    return _replayed(tensor)
