"""`ours-barrier`: `ours` in which the dynamic barrier weighs trusted against noisy images, step by step.

With G the loss of the noisy images and F that of the trusted ones, a step goes along

    grad G + lambda grad F,     lambda = min(1, relu(delta |grad F|^2 - <grad G, grad F>) / |grad F|^2)

the direction nearest to grad G along which F falls at least at the rate delta |grad F|^2. It is BOME's direction
(:mod:`bilevel.barrier`) for the simplest of bilevel problems: of all classifiers that are right on trusted images, the
one that explains the noisy labels best. Where noisy images teach what trusted ones ask for, lambda is 0 and nothing is
learned by heart; where the two contradict each other, as while T still says that a wrong label is right, trusted images
win. A constant weight has to choose between the two.

The bound keeps trusted images that are known by heart, whose gradient is next to nothing, from being weighed without
end. A step costs one more backward pass than one of `ours`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.barrier import GradientNorm, Products, multiplier
from examples.noisy_labels.recipes.ours import Ours
from examples.noisy_labels.recipes.recipe import Scalars

BARRIER = GradientNorm(0.1)
LARGEST = 1.0


class OursBarrier(Ours):
    """`ours` with another weight of the trusted images."""

    def backward(self, lower_loss: Tensor, upper_loss: Tensor) -> Scalars:
        """Leave the direction in the classifier's gradients, and return the multiplier."""
        weights = list(self.classifier.parameters())
        of_noisy = torch.autograd.grad(lower_loss, weights, retain_graph=True)
        of_trusted = torch.autograd.grad(upper_loss, weights)
        inner = torch.stack([(f * g).sum() for f, g in zip(of_noisy, of_trusted, strict=True)]).sum()
        squared = torch.stack([(g * g).sum() for g in of_trusted]).sum()
        products = Products(
            upper=torch.zeros_like(inner), lower=inner, squared_norm=squared, value=torch.zeros_like(inner)
        )
        weight = multiplier(BARRIER, products, maximum=LARGEST)
        for one, f, g in zip(weights, of_noisy, of_trusted, strict=True):
            one.grad = f + weight * g
        return {"multiplier": weight}
