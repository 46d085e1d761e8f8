"""What the weight rho of equation (9) mixes on a trusted image.

With p the classifier's and g the corrector's probabilities, z the classifier's logits and y the label:

- ``probability``: -log(rho p[y] + (1 - rho) g[y]), the default: both terms are on one scale;
- ``log``: -rho log p[y] - (1 - rho) log g[y]: neither network can excuse the other;
- ``logits``: cross-entropy of softmax(rho z + (1 - rho) log g), whose gradient in z is proportional to rho;
- ``code``: cross-entropy of softmax(rho z + (1 - rho) g), as released: g, between 0 and 1, is added to logits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

SMALLEST_PROBABILITY = 1e-12  # below it the logarithm is cut off, with gradient zero


def _probabilities(logits: Tensor, corrected: Tensor, labels: Tensor, rho: float) -> Tensor:
    p, g = _of_label(functional.softmax(logits, dim=1), labels), _of_label(corrected, labels)
    return -(rho * p + (1 - rho) * g).clamp_min(SMALLEST_PROBABILITY).log().mean()


def _logarithms(logits: Tensor, corrected: Tensor, labels: Tensor, rho: float) -> Tensor:
    p, g = _of_label(functional.softmax(logits, dim=1), labels), _of_label(corrected, labels)
    p, g = p.clamp_min(SMALLEST_PROBABILITY), g.clamp_min(SMALLEST_PROBABILITY)
    return -(rho * p.log() + (1 - rho) * g.log()).mean()


def _logits(logits: Tensor, corrected: Tensor, labels: Tensor, rho: float) -> Tensor:
    # Logarithms of the corrector's probabilities are its logits up to a constant, which cross-entropy takes out again.
    its_logits = corrected.clamp_min(SMALLEST_PROBABILITY).log()
    return functional.cross_entropy(rho * logits + (1 - rho) * its_logits, labels)


def _as_in_the_code(logits: Tensor, corrected: Tensor, labels: Tensor, rho: float) -> Tensor:
    return functional.cross_entropy(rho * logits + (1 - rho) * corrected, labels)


def _of_label(probabilities: Tensor, labels: Tensor) -> Tensor:
    return probabilities.gather(1, labels.unsqueeze(1))


MIXTURES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "probability": _probabilities,
    "log": _logarithms,
    "logits": _logits,
    "code": _as_in_the_code,
}
