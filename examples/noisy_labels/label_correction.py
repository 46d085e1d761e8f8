"""The two losses of meta label correction.

A classifier `f` with weights w gives an image x the logits f_w(x) and the features h(x); a corrector `g` with weights
alpha gives a distribution over the true label, from the features and the given label.

    upper, on trusted images:  F = -mean log( rho softmax(f_w(x))[y] + (1 - rho) g_alpha(h(x), y)[y] )     (9)
    lower, on noisy images:    G = -mean sum_c g_alpha(h(x'), y')[c] log softmax(f_w(x'))[c]

(9) is equation 9 of Nguyen and Ta (arXiv 2605.17833), mixing probabilities. The paper writes "outputs"; mixing logits
with probabilities, as its code does, would compare two scales. Mixing logarithms instead,

    F = -mean( rho log softmax(f_w(x))[y] + (1 - rho) log g_alpha(h(x), y~)[y] ),

lets neither network excuse the other. With rho = 1, both are plain cross-entropy, as in MLC.

In (9) the corrector is told the very label that it has to answer: copying it is the best it can do on trusted images,
and what it learns about wrong labels comes from the lower loss alone. Showing it labels y~ that are partly drawn at
random (`Batch.shown`) takes that way out.

Features are those of the current classifier, without gradient. They are held: while the lower loss is evaluated at a
look-ahead point, the corrector still sees the features from before it, and both evaluations use the same soft labels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

import bilevel
from examples.noisy_labels.batches import Batch

SMALLEST_PROBABILITY = 1e-12  # below it the logarithm is cut off, with gradient zero


class LabelCorrection:
    """The losses as closures for a bilevel optimizer: `upper_loss` for clean and `lower_loss` for noisy batches."""

    def __init__(
        self, classifier: nn.Module, corrector: nn.Module, *, rho: float, mixture: str = "probability"
    ) -> None:
        self.classifier, self.corrector, self.rho = classifier, corrector, rho
        self.mixed = _mixed_logarithms if mixture == "log" else _mixed_probabilities

    def upper_loss(self, clean: Batch) -> Tensor:
        """Return F."""
        logits, features = self.classifier(clean.inputs)
        if self.rho == 1:
            return functional.cross_entropy(logits, clean.labels)
        right = clean.labels.unsqueeze(1)
        predicted = functional.softmax(logits, dim=1).gather(1, right)
        corrected = self.corrector(features.detach(), clean.shown).gather(1, right)
        return -self.mixed(predicted, corrected, self.rho).mean()

    def lower_loss(self, noisy: Batch) -> Tensor:
        """Return G. The soft labels keep their graph: through them alone the lower loss reaches the corrector."""
        logits, features = self.classifier(noisy.inputs)
        soft_labels = self.corrector(bilevel.hold(features.detach()), noisy.shown)
        return functional.cross_entropy(logits, soft_labels)


def _mixed_probabilities(predicted: Tensor, corrected: Tensor, rho: float) -> Tensor:
    return (rho * predicted + (1 - rho) * corrected).clamp_min(SMALLEST_PROBABILITY).log()


def _mixed_logarithms(predicted: Tensor, corrected: Tensor, rho: float) -> Tensor:
    p, g = predicted.clamp_min(SMALLEST_PROBABILITY), corrected.clamp_min(SMALLEST_PROBABILITY)
    return rho * p.log() + (1 - rho) * g.log()
