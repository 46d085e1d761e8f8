"""Loss scaling: gradients of half precision are computed at a scale where they do not underflow, and unscaled at once.

A ``GradScaler`` of torch says the scale; here it is applied. Whatever is differentiated starts from the scale instead
of 1 and is divided by it in float32 before anything is computed from it, so that inner products, multipliers and
products know nothing of it. Whether all was finite is noted on the device. At the end of the step the scaler hears of
it: an overflow lowers the scale, enough steps without one raise it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import message
from ..processes.joined import agreed
from ..vectors import Tensors, add_scaled, all_finite

# Below the smallest number of float16 no scale is the cause of an overflow.
SMALLEST = 2.0**-24


class Scaling:
    """The loss scale of a method, from step to step.

    Args:
        owner: The class that errors name.
        scaler: Torch's scaler, which keeps the scale.
    """

    def __init__(self, owner: str, scaler: torch.amp.GradScaler) -> None:
        if not isinstance(scaler, torch.amp.GradScaler):
            advice = 'must be a torch.amp.GradScaler, such as torch.amp.GradScaler("cuda").'
            raise TypeError(message(owner, "scaler", type(scaler).__name__, advice))
        self._owner, self.scaler = owner, scaler
        self.scale: Tensor = torch.ones(())
        self.overflowed = False  # whether the step that ends was skipped because of it
        self._finite: Tensor | None = None
        self._carrier: torch.optim.Optimizer | None = None

    def begin(self, variables: Sequence[Tensor]) -> None:
        """A step begins.

        Raises:
            ValueError: Variables are in float16, so that unscaled gradients would underflow in them.
        """
        if any(x.dtype == torch.float16 for x in variables):
            advice = "is for variables in float32 under torch.autocast; some are float16. Keep them in float32."
            raise ValueError(message(self._owner, "scaler", "...", advice))
        device = variables[0].device
        self.scale = self.scaler.scale(torch.ones((), device=device))
        self.overflowed, self._finite = False, None

    def cotangent(self, value: Tensor) -> Tensor:
        """Return what the derivative of a loss starts from instead of 1."""
        return self.scale.to(value.device, value.dtype)

    def unscaled(self, gradients: Tensors) -> Tensors:
        """Return gradients without the scale, and note whether they are finite."""
        finite = all_finite(gradients)
        if finite is not None:
            before = self._finite
            self._finite = finite if before is None else before & finite.to(before.device, non_blocking=True)
        inverse = self.scale.double().reciprocal() if self.scale.device.type != "mps" else self.scale.reciprocal()
        return add_scaled([None] * len(gradients), inverse, gradients)

    def fits(self, vectors: Tensors) -> bool:
        """Whether all gradients of the step so far, and these vectors, are finite; waits for the device once."""
        found = [x for x in (self._finite, all_finite(vectors)) if x is not None]
        return not agreed(not all(bool(x) for x in found), "whether all is finite at this scale")

    @property
    def may_be_lowered(self) -> bool:
        """Whether the scale may be the cause of an overflow; waits for the device."""
        return float(self.scale) >= SMALLEST

    def end(self) -> None:
        """The step ended: let the scaler know whether it overflowed."""
        if self._carrier is None:
            # A scaler hears of infinities in the gradients of an optimizer: this one's says what was found out here.
            self._carrier = torch.optim.SGD([torch.zeros((), device=self.scale.device, requires_grad=True)], lr=0.0)
        (carried,) = self._carrier.param_groups[0]["params"]
        carried.grad = torch.full_like(carried, torch.inf if self.overflowed else 0.0)
        self.scaler.unscale_(self._carrier)
        self.scaler.update()

    def state(self) -> dict[str, Any]:
        """Return the state of the scaler."""
        return dict(self.scaler.state_dict())

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state`."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))
