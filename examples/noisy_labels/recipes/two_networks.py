"""Two networks that teach each other: what `coteaching-plus` and `dividemix` share.

They differ in their first weights alone, and in what each makes the other learn. One SGD moves both at once. The
``classifier``, which has the first weights of all other methods, is the first of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.recipes.recipe import Recipe, decay, descent
from examples.noisy_labels.run.settings import Training


class TwoNetworks(Recipe):
    """The networks, and a step along the sum of their losses."""

    def __init__(self, settings: Training, network: nn.Module, second: nn.Module) -> None:
        self.pair = nn.ModuleList([network, second])
        self.descent = descent(settings, self.pair)
        networks = {"classifier": network, "second": second}
        super().__init__(networks, self.descent, {"schedule": decay(settings, self.descent)}, settings.amp)
        self.calls = [mixed_precision(one, settings.amp) for one in (network, second)]

    def logits(self, which: int, inputs: Tensor) -> Tensor:
        """Return the logits of the first network, 0, or the second, 1."""
        logits: Tensor = self.calls[which](inputs)[0]
        return logits

    def descend(self, losses: list[Tensor]) -> Tensor:
        """Let each network take a step along its own loss; return their mean."""
        total = torch.stack(losses).sum()
        self.descent.zero_grad()
        total.backward()
        self.descent.step()
        return total.detach() / len(losses)
