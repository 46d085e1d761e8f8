"""`em`: online expectation-maximisation for labels whose noise depends on the class.

The true label k of a noisy image x is hidden, its given label y is drawn from row k of a transition matrix T. Each step

    E   m(k) ∝ p(k | x) T[k, y]                              the posterior of the true label, p from an averaged copy
    M   C[k, y] <- (1 - b / N) C[k, y] + sum of m(k)         over the b images of the batch whose given label is y
        T = rows of C + prior, normalised
        w: a step on -mean sum_k m(k) log p_w(k | x) + clean_weight * cross-entropy of trusted images
    e <- r e + (1 - r) w,  r = min(.99, t / (t + 10))        the averaged copy, after step t

and a label is corrected to the largest m. It is not bilevel, and has no network that could learn to copy: the given
label enters through T alone, and T is counted over all images.

Kin: Dawid and Skene (1979) estimate annotators' confusion matrices by EM; Bekker and Goldberger (2016) do so with a
network for p, in batch EM; LCCN (Yao et al., 2019) samples T and the true labels instead of taking expectations;
running counts for sums over all data are online EM (Cappé and Moulines, 2009); an averaged copy as the teacher is the
mean teacher (Tarvainen and Valpola, 2017). With p = p_w, the gradient of w's loss is that of GLC's: see
`gold_loss_correction.py`.

Choices of ours: C forgets at the rate at which images come by, so that it holds about one pass over the data whatever
their number and that of the classes; the prior keeps one image a class at its first value, so that no entry of T
starves; trusted images are not counted. In training the copy normalises by the statistics of the batch; running
ones, as in use, were tried and recovered fewer labels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes.decoding import bayes
from examples.noisy_labels.recipes.mixed import Mixed
from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.recipes.recipe import Scalars
from examples.noisy_labels.run.settings import Training

FIRST_DIAGONAL = 0.45  # of T: the given label is the likeliest, and the classifier may still overrule it
LONGEST_AVERAGE = 0.99  # r; less in the first steps, when the first weights are to be forgotten


class Counts(nn.Module):
    """C: how often each class has been given each label, as far as the posterior knows."""

    counts: Tensor
    prior: Tensor

    def __init__(self, classes: int, images: float) -> None:
        super().__init__()
        self.images = images
        elsewhere = (1 - FIRST_DIAGONAL) / (classes - 1)
        first = torch.full((classes, classes), elsewhere).fill_diagonal_(FIRST_DIAGONAL)
        self.register_buffer("prior", first, persistent=False)
        self.register_buffer("counts", first * images / classes)

    def add(self, posterior: Tensor, given: Tensor) -> None:
        """Forget as many images as are added, and add them."""
        self.counts.mul_(1 - len(given) / self.images).index_add_(1, given, posterior.T.to(self.counts))

    def remember(self, images: float) -> None:
        """Hold so many images from now on, without a change of T but for the prior."""
        self.counts.mul_(images / self.images)
        self.images = images

    @property
    def transition(self) -> Tensor:
        """Return T."""
        return functional.normalize(self.counts + self.prior, p=1, dim=1)


class ExpectationMaximization(Mixed):
    """Classifier, averaged copy, and counts."""

    transition_from = "counted"
    needs = ("task",)

    def __init__(self, settings: Training, network: nn.Module, task: Task) -> None:
        classes, images = len(task.names), len(task.noisy)
        averaged = copy.deepcopy(network).requires_grad_(False)
        self.counts = Counts(classes, images).to(next(network.parameters()).device)
        super().__init__(settings, network, averaged=averaged, counts=self.counts)
        self.averaged, self.steps = averaged, 0
        self.predict_averaged = mixed_precision(averaged, settings.amp)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        numbers = super().step(noisy, clean)
        self._follow()
        return numbers | {"transition_diagonal": self.transition.diagonal().mean()}

    def noisy_loss(self, logits: Tensor, noisy: Batch) -> Tensor:
        """Take the expectation and return the loss that w shall minimise."""
        with torch.no_grad():
            posterior = self.correct(noisy.inputs, noisy.labels)
            self.counts.add(posterior, noisy.labels)
        return functional.cross_entropy(logits, posterior)

    def predict(self, inputs: Tensor) -> Tensor:
        """Return the averaged copy's probabilities."""
        return functional.softmax(self.predict_averaged(inputs)[0], dim=1)

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return m."""
        return bayes(self.predict(inputs), self.transition, given)

    @property
    def transition(self) -> Tensor:
        """Return T."""
        return self.counts.transition

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes."""
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.steps = state["steps"]

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averaged copy towards the classifier. Its batch statistics are its own: it sees all noisy images."""
        self.steps += 1
        rate = min(LONGEST_AVERAGE, self.steps / (self.steps + 10))
        pairs = zip(self.averaged.parameters(), self.classifier.parameters(), strict=True)
        for average, new in pairs:
            average.lerp_(new, 1 - rate)
