"""Step hooks of the lower optimizer, watched: do they clip or project, which virtual steps and derivatives ignore?

What counts is what a hook does, not that it is there: a counter, a logger, a clip above the gradient or a clamp whose
bound is not active change nothing.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ..evaluation.verification import on_host
from ..levels import Level
from ..shards import part_of
from ..vectors import Tensors

PROJECTED = (
    "a post-step hook of the lower optimizer moved the lower variables (clamping?). Such a projection is unknown to "
    "the derivative, which is that of the problem without it: right only while no bound is active. Pass it as "
    "lower_projection= instead (bilevel.projection)."
)
CLIPPED = "a pre-step hook of the lower optimizer changed the gradient (clipping?), which {} Clip inside the loss, {}."
VIRTUAL = CLIPPED.format(
    "virtual steps do not follow: they are as long as the gradient before it, maybe many times too long.",
    "give the virtual step a rate of its own (inner_lr=), lower the rate, or take real steps (Unrolled(virtual=False))",
)
ONLY_REAL = CLIPPED.format("the real steps follow and the derivative does not.", "or lower the rate")
# On a device that must not be waited for, what was found is read at these steps only, as a look would.
READ_EVERY = 1024


class HookWatch:
    """Compares gradients before and after the pre-hooks of a step, and variables before and after the post-hooks."""

    def __init__(self, owner: str, level: Level) -> None:
        self._owner, self._level = owner, level
        self._found: dict[str, Tensor] = {}
        self._said: set[str] = set()
        self._steps = 0

    @contextmanager
    def __call__(self, direction: Tensors, clipped: str | None) -> Iterator[None]:
        """Surround one step along ``direction``; ``clipped`` is what a clip makes wrong, None if nothing."""
        optimizer = self._level.optimizer
        before = clipped is not None and "clipped" not in self._said and bool(optimizer._optimizer_step_pre_hooks)
        after = "projected" not in self._said and bool(optimizer._optimizer_step_post_hooks)
        if not (before or after):
            yield
            return
        handles: list[Any] = []
        given = [None if x is None else x.detach().clone() for x in direction] if before else []
        stepped: list[Tensor] = []

        def compare(*_: Any) -> None:
            self._note("clipped", given, [x.grad if x.grad is None else part_of(x.grad) for x in self._level.tensors])

        def snapshot(*_: Any) -> None:
            stepped[:] = [x.detach().clone() for x in self._level.parts]

        try:
            if before:
                handles.append(optimizer.register_step_pre_hook(compare))  # behind the user's
            if after:
                handles.append(optimizer.register_step_post_hook(snapshot))
                hooks = cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks)
                hooks.move_to_end(handles[-1].id, last=False)  # before the user's
            yield
        finally:
            for handle in handles:
                handle.remove()
        if after and stepped:
            self._note("projected", stepped, self._level.parts)
        self._report({"clipped": clipped or "", "projected": PROJECTED})

    def _note(self, kind: str, old: Tensors, new: Tensors) -> None:
        """Remember, on the device, whether anything differs; NaN is another error's business."""
        for a, b in zip(old, new, strict=True):
            if a is None:
                continue
            found = torch.ones((), dtype=torch.bool, device=a.device)
            if b is not None:
                found = ((a != b.detach()) & ~a.isnan()).any()
            known = self._found.get(kind)
            self._found[kind] = found if known is None else known | found.to(known.device)

    def _report(self, advice: dict[str, str]) -> None:
        self._steps += 1
        reads = self._steps & (self._steps - 1) == 0 or self._steps % READ_EVERY == 0
        for kind, found in list(self._found.items()):
            if on_host(found) if found.device.type == "cpu" else reads and bool(found):
                del self._found[kind]
                self._said.add(kind)
                warnings.warn(f"{self._owner}: {advice[kind]}", stacklevel=6)
