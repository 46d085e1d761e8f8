"""`mwnet`: Meta-Weight-Net (Shu et al., NeurIPS 2019, arXiv 1902.07379), by its code for ResNet-32.

A small network V gives each noisy image the weight V(l) in (0, 1) for its loss l; the loss is data here, without
gradient. Each step:

    G(w, a) = 1/n sum_i V_a(l_i) l_i(w),     V_a(l) = sigmoid(W_2 relu(W_1 l + b_1) + b_2), 100 hidden units
    w^(a)   = w - lr grad_w G(w, a)                          plain gradient descent, at the current rate
    a      <- Adam(a, grad_a of the mean trusted cross-entropy at w^(a))          1e-3, weight decay 1e-4, constant
    w      <- SGD's step on G(w, new a)

:class:`bilevel.Unrolled` with ``inner_step="gradient"`` is these lines. The weights are not normalised, as in the code
for ResNet-32 (that for WRN-28-10 lets them sum to 1).

Deviations: the virtual step's effect on BatchNorm's averages is none here and thrown away there; the last epoch is
reported and not the best; parts are disjoint whatever the seed, there for seed 1 alone.
"""

from __future__ import annotations

from torch import Tensor, nn

import bilevel
from bilevel.processes.joined import Share, averaged
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.recipes.recipe import Scalars
from examples.noisy_labels.recipes.reweighting import Reweighting, WeightNet, adam
from examples.noisy_labels.run.settings import Training


class MetaWeightNet(Reweighting):
    """Classifier and weight net."""

    shares_batches = True

    def __init__(self, settings: Training, network: nn.Module) -> None:
        weights = WeightNet(nn.Sigmoid()).to(next(network.parameters()))
        self.weigh = mixed_precision(weights, settings.amp)
        super().__init__(settings, network, weights, adam(weights), weights=weights)

    def lower_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return G and the mean weight."""
        losses = self.losses(batch)
        weights = self.weigh(bilevel.hold(losses.detach()))
        return (weights * losses).mean(), weights.mean()

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        stats = self.bilevel.step(clean, noisy)
        (weight,) = averaged("the mean weight", lambda: Share([stats.lower_aux])).numbers
        return {"upper_loss": stats.upper_loss, "lower_loss": stats.lower_loss, "weight": weight}
