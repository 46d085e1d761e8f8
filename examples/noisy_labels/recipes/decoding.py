"""Labels by Bayes' rule: decoding apart from training.

Methods differ in how they train a classifier and in how they correct labels. To tell the two apart, every method is
reported by its own rule and by this one, which sees the image, the given label and a transition matrix:

    m(k) ∝ p(k | x) T[k, y]         T[k, y]: the probability that class k is given the label y

Where a method estimates T, it is that T. Where trusted images took no part in training, what the classifier answers on
them is what labels their classes are given, as in GLC. Else T is the one that makes the given labels likeliest: the sum
of log sum_k p(k | x) T[k, y] over all noisy images is concave in T, and EM climbs it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ITERATIONS = 200


def bayes(predicted: Tensor, transition: Tensor, given: Tensor) -> Tensor:
    """Return m: one row an image.

    Args:
        predicted: p(k | x), one row an image.
        transition: T.
        given: The given label of each image.
    """
    joint = predicted * transition[:, given].T.to(predicted)
    return joint / joint.sum(1, keepdim=True).clamp_min(torch.finfo(joint.dtype).tiny)


def blend(predicted: Tensor, given: Tensor, belief: Tensor) -> Tensor:
    """Return belief * onehot(given) + (1 - belief) * predicted: one row an image, each with a belief of its own."""
    share = belief.to(predicted).unsqueeze(1)
    return ((1 - share) * predicted).scatter_add(1, given.unsqueeze(1), share)


def transition_on_trusted(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return T from what a classifier trained on noisy labels predicts on trusted images of every class."""
    of_class = torch.zeros_like(predicted[:1]).repeat(predicted.shape[1], 1).index_add_(0, labels, predicted)
    return functional.normalize(of_class, p=1, dim=1)


def likeliest_transition(predicted: Tensor, given: Tensor) -> Tensor:
    """Return the T under which the given labels are likeliest, given predictions of the true ones."""
    classes = predicted.shape[1]
    predicted = predicted.double()  # thousands of small terms are added
    transition = predicted.new_full((classes, classes), 0.5 / classes).add_(0.5 * torch.eye(classes).to(predicted))
    for _ in range(ITERATIONS):
        counts = torch.zeros_like(transition).index_add_(1, given, bayes(predicted, transition, given).T)
        transition = functional.normalize(counts, p=1, dim=1)
    return transition
