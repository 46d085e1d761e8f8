"""An ablation: the clean gradient as the released code of EBOMLC takes it, with its sign and scale.

Where the method wants the gradient of the upper loss in w, that code puts the change that SGD would make,

    -lr (momentum * buffer + grad_w F + weight_decay * w),

which points the other way. This is a defect: use it to see what it does, never to train. The gradient in alpha is F's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.label_correction import LabelCorrection


class UpdateForGradient:
    """The upper loss with its value, its gradient in alpha, and SGD's change of w where its gradient in w should be."""

    def __init__(self, losses: LabelCorrection, network: nn.Module, descent: torch.optim.SGD) -> None:
        self.losses, self.network, self.descent = losses, network, descent

    def __call__(self, clean: Batch) -> Tensor:
        losses, (group,) = self.losses, self.descent.param_groups
        logits, features = losses.classifier(clean.inputs)
        corrected = losses.corrector(features.detach(), clean.given)
        for_alpha = losses.mixed(logits.detach(), corrected, clean.labels, losses.rho)
        for_w: Tensor = losses.mixed(logits, corrected.detach(), clean.labels, losses.rho)
        for w in self.network.parameters():
            for_w = for_w + 0.5 * group["weight_decay"] * w.square().sum()
            if (buffer := self.descent.state[w].get("momentum_buffer")) is not None:
                for_w = for_w + group["momentum"] * (buffer * w).sum()
        rate: float = group["lr"]
        return for_alpha - rate * (for_w - for_w.detach())
