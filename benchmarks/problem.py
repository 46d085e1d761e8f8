"""Meta label correction, as a user of the library writes it down: batches and two losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

import bilevel

RHO, DELTA, XI = 0.2, 0.25, 0.5  # weights of the classifier in F, of the barrier, of its multiplier; the paper's
SMALLEST_PROBABILITY = 1e-12

Network = nn.Module  # from images to (logits, features)


class Batch(NamedTuple):
    """Images and their labels, trusted or noisy."""

    inputs: Tensor
    labels: Tensor


Loss = Callable[[Batch], Tensor]


def losses(classifier: Network, corrector: nn.Module) -> tuple[Loss, Loss]:
    """Return F, on a clean batch, and G, on a noisy one.

    Of an image x the classifier gives probabilities p(x) and features h(x), the corrector g soft labels::

        F = -mean log( rho p(x)[y] + (1 - rho) g(h(x), y)[y] )
        G = -mean sum_c g(h(x'), y')[c] log p(x')[c]

    Through the features no gradient flows, and G's are held in its look-ahead.
    """

    def upper_loss(clean: Batch) -> Tensor:
        logits, features = classifier(clean.inputs)
        corrected = corrector(features.detach(), clean.labels)
        mixture: Tensor = RHO * functional.softmax(logits, 1) + (1 - RHO) * corrected
        return -mixture.gather(1, clean.labels.unsqueeze(1)).clamp_min(SMALLEST_PROBABILITY).log().mean()

    def lower_loss(noisy: Batch) -> Tensor:
        logits, features = classifier(noisy.inputs)
        soft_labels = corrector(bilevel.hold(features.detach()), noisy.labels)
        return functional.cross_entropy(logits, soft_labels)

    return upper_loss, lower_loss
