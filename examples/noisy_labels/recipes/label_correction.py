"""The two losses of meta label correction.

A classifier `f` with weights w gives an image x the logits f_w(x) and the features h(x); a corrector `g` with weights
alpha gives a distribution over the true label, from the features and the given label.

    upper, on trusted images:  F = -mean log( rho softmax(f_w(x))[y] + (1 - rho) g_alpha(h(x), y)[y] )     (9)
    lower, on noisy images:    G = -mean sum_c g_alpha(h(x'), y')[c] log softmax(f_w(x'))[c]

(9) is equation 9 of Nguyen and Ta (arXiv 2605.17833), which writes "outputs"; `mixtures.py` has what that may
mean. With rho = 1, all are plain cross-entropy, as in MLC.

In (9) the corrector is told the very label that it has to answer: copying it is the best it can do on trusted images,
and what it learns about wrong labels comes from the lower loss alone. Showing it labels that are partly drawn at random
(`Batch.given`) takes that way out.

Features are those of the current classifier, without gradient. They are held: while the lower loss is evaluated at a
look-ahead point, the corrector still sees the features from before it, and both evaluations use the same soft labels.
Recomputed features, as in the released code, make the soft labels differ too.

Trusted images may join the lower loss with their hard labels, as in the code of MLC and EBOMLC; G is then the mean over
all images.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

import bilevel
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.mixtures import MIXTURES


class LabelCorrection:
    """The losses as closures for a bilevel optimizer: `upper_loss` for clean and `lower_loss` for noisy batches.

    Args:
        classifier: Maps images to logits and features.
        corrector: Maps features and given labels to probabilities.
        rho: Weight of the classifier in the upper loss.
        mixture: What rho mixes: a name in `MIXTURES`.
        features: ``held``: those at the current classifier, in all evaluations of a step; or ``recomputed``.
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], tuple[Tensor, Tensor]],
        corrector: Callable[[Tensor, Tensor], Tensor],
        *,
        rho: float,
        mixture: str = "probability",
        features: str = "held",
    ) -> None:
        self.classifier, self.corrector, self.rho = classifier, corrector, rho
        self.mixed = MIXTURES[mixture]
        self.held = features == "held"

    def upper_loss(self, clean: Batch) -> Tensor:
        """Return F."""
        logits, features = self.classifier(clean.inputs)
        if self.rho == 1:
            return functional.cross_entropy(logits, clean.labels)
        corrected = self.corrector(features.detach(), clean.given)
        return self.mixed(logits, corrected, clean.labels, self.rho)

    def lower_loss(self, noisy: Batch, trusted: Batch | None = None) -> Tensor:
        """Return G. The soft labels keep their graph: through them alone the lower loss reaches the corrector."""
        logits, features = self.classifier(noisy.inputs)
        seen = bilevel.hold(features.detach()) if self.held else features.detach()
        loss = functional.cross_entropy(logits, self.corrector(seen, noisy.given))
        if trusted is None:
            return loss
        hard = functional.cross_entropy(self.classifier(trusted.inputs)[0], trusted.labels)
        share = len(trusted.labels) / (len(noisy.labels) + len(trusted.labels))
        return (1 - share) * loss + share * hard


def first_part(images: int, share: float) -> int:
    """Return how many images of a clean batch `split` leaves the upper loss."""
    return max(1, int((1 - share) * images))


def split(clean: Batch, share: float) -> tuple[Batch, Batch | None]:
    """Split a clean batch: the first images for the upper loss, at least one, a ``share`` of them for the lower."""
    first = first_part(len(clean.labels), share)
    if first == len(clean.labels):
        return clean, None
    return Batch(*(part[:first] for part in clean)), Batch(*(part[first:] for part in clean))
