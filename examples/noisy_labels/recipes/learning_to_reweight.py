"""`l2rw`: Learning to Reweight Examples (Ren, Zeng, Yang and Urtasun, ICML 2018, arXiv 1803.09050).

Each batch gets weights of its own, which start at 0 and take one step of the meta-gradient. Equations 9 to 12:

    w'(eps)  = w - lr grad_w sum_i eps_i l_i(w)
    u_i      = max(-d/d eps_i mean trusted cross-entropy at w'(eps), 0)          at eps = 0
    v_i      = u_i / sum_j u_j,  or 0 if they are all 0
    w       <- SGD's step on sum_i v_i l_i(w)

At eps = 0 the step goes nowhere, w'(0) = w, so u_i is the positive part of lr <grad l_i(w), grad F(w)>, and lr leaves v
as it is. :class:`bilevel.Unrolled` computes it, with eps as the upper variables: SGD with rate 1 moves them from 0 to
-d F / d eps, and a hook after it takes the positive part and normalises.

Deviations: network, schedule and weight decay of all methods here (there 80,000 steps, weight decay 2e-4, 100 trusted
images); the final model is not trained on trusted images once more, which is optional there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.recipe import Scalars
from examples.noisy_labels.recipes.reweighting import Reweighting
from examples.noisy_labels.run.settings import Training


class LearningToReweight(Reweighting):
    """A classifier, and weights that live for one step."""

    def __init__(self, settings: Training, network: nn.Module) -> None:
        first = next(network.parameters())
        self.weights = first.new_zeros(settings.batch_size).requires_grad_()
        optimizer = torch.optim.SGD([self.weights], lr=1.0)
        optimizer.register_step_post_hook(self._normalise)
        super().__init__(settings, network, self.weights, optimizer, inner_lr=1.0)

    def lower_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return G, a sum and not a mean, and the loss of each image."""
        losses = self.losses(batch)
        return (self.weights[: len(losses)] * losses).sum(), losses

    @torch.no_grad()
    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        self.weights.zero_()
        with torch.enable_grad():
            stats = self.bilevel.step(clean, noisy)
        weights, losses = self.weights[: len(noisy.labels)], stats.lower_aux
        used = (weights > 0).to(losses.dtype).mean()
        return {"upper_loss": stats.upper_loss, "lower_loss": (weights * losses).sum(), "share_used": used}

    @torch.no_grad()
    def _normalise(self, *_: Any) -> None:
        total = self.weights.relu_().sum()
        self.weights.div_(torch.where(total > 0, total, 1.0))
