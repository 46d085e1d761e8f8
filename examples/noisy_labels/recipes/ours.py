"""`ours`: online EM (`em`) whose counts forget at the right pace, and which looks at each image twice.

EM for labels climbs slowly where classes are mistaken for one another: while T says that a wrong label is right, the
classifier learns it, and its predictions then confirm T. Four changes:

Memory. `em` remembers one pass over the data, so T can move once a pass, however many steps that is. Here the counts
    remember a share of the images seen so far, from 100 images a class up to one pass:

        memory(t) = min(N, max(100 K, share * t b))         C <- C memory(t) / memory(t - 1), then as in `em`

    Early counts, of a classifier that knows nothing yet, are forgotten at once, and late ones average over many: the
    decreasing step sizes of online EM (Cappé and Moulines, 2009).
Two views. Each noisy image is cropped and mirrored twice, m is the posterior of the mean prediction, and both views
    are trained on it: agreement between views, as in semi-supervised learning. The mean of two predictions is less sure
    than either, and counts of its posterior lean to the given labels; so C counts each view's own posterior.
Temper. Predictions that are less sure than they should be make T drift to the identity. So C counts the posterior of
    p^tau, normalised, where tau is the temper at which trusted images of the same pass are likeliest. They are trained
    on, each counting once as noisy ones do, and so are as well known to the classifier as those. The targets m are not
    tempered.
Mirrored answers. Corrected labels come from the mean prediction of an image and its mirror image.

Everything else is `em`, and trusted images are used in the same way. A step costs two passes of the classifier and two
of its averaged copy, about what a step of EBOMLC takes. Without augmentation there is one view, and nothing to mirror.

It is not bilevel. What was tried of that kind, and did no good, is in `docs/examples/our_recipe.md`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes.decoding import bayes
from examples.noisy_labels.recipes.expectation_maximization import ExpectationMaximization
from examples.noisy_labels.recipes.mixed import TRUSTED_SHARE
from examples.noisy_labels.recipes.recipe import Scalars
from examples.noisy_labels.run.settings import Training

FEWEST_A_CLASS = 100  # images that the counts remember at least
TEMPER_RATE = 0.1  # step size of log tau
LARGEST_LOG_TEMPER = 1.0  # while nothing is known yet, trusted images say little


class Temper(nn.Module):
    """tau, by stochastic gradient steps on the cross-entropy of tempered predictions of trusted images."""

    log: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log", torch.zeros(()))

    def forward(self, logs: Tensor) -> Tensor:
        """Return probabilities in proportion to p^tau, from log p."""
        return functional.softmax(self.log.exp() * logs, dim=1)

    def learn(self, logs: Tensor, labels: Tensor) -> None:
        """Take a step; the gradient in log tau is tau times (mean of log p under p^tau - log p of the label)."""
        expected, of_label = (self(logs) * logs).sum(1), logs.gather(1, labels.unsqueeze(1)).squeeze(1)
        self.log.sub_(TEMPER_RATE * self.log.exp() * (expected - of_label).mean())
        self.log.clamp_(-LARGEST_LOG_TEMPER, LARGEST_LOG_TEMPER)


class Ours(ExpectationMaximization):
    """Online EM with growing memory, two views of each noisy image, tempered counts, and mirrored answers."""

    trusted: Batch  # those of the step

    def __init__(self, settings: Training, network: nn.Module, task: Task) -> None:
        super().__init__(settings, network, task)
        self.share, self.images, self.seen = settings.memory, len(task.noisy), 0
        self.fewest = min(self.images, FEWEST_A_CLASS * len(task.names))
        self.mirror = settings.augment
        self.views = 2 if settings.augment else 1
        self.counts.remember(self.fewest)
        self.temper = Temper().to(self.counts.counts.device)
        self.networks["temper"] = self.temper

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        self.seen += len(noisy.labels) // self.views
        self.counts.remember(min(self.images, max(self.fewest, self.share * self.seen)))
        trusted = max(1, round(TRUSTED_SHARE * len(noisy.labels)))
        self.trusted = Batch(*(part[:trusted] for part in clean))
        return super().step(noisy, clean) | {"temper": self.temper.log.exp()}

    def noisy_loss(self, logits: Tensor, noisy: Batch) -> Tensor:
        """Take the expectation over all views of an image and return the loss that w shall minimise on each."""
        given = noisy.labels.view(self.views, -1)[0]
        with torch.no_grad():
            answers, _ = self.predict_averaged(torch.cat([noisy.inputs, self.trusted.inputs]))
            logs = functional.log_softmax(answers, dim=1)
            of_noisy, of_trusted = logs.split([len(noisy.labels), len(self.trusted.labels)])
            self.temper.learn(of_trusted, self.trusted.labels)
            counted = bayes(self.temper(of_noisy), self.transition, noisy.labels)
            of_images = bayes(self._mean(of_noisy.exp()), self.transition, given)
            self.counts.add(self._mean(counted), given)
        return functional.cross_entropy(logits, of_images.repeat(self.views, 1))

    def predict_view(self, inputs: Tensor) -> Tensor:
        """Return the averaged copy's probabilities of images as they are."""
        return super().predict(inputs)

    def predict(self, inputs: Tensor) -> Tensor:
        """Return the mean of the averaged copy's probabilities of images and their mirror images."""
        predicted = self.predict_view(inputs)
        return (predicted + self.predict_view(inputs.flip(3))) / 2 if self.mirror else predicted

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes."""
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.seen = state["seen"]
        self.counts.images = min(self.images, max(self.fewest, self.share * self.seen))

    def _mean(self, of_views: Tensor) -> Tensor:
        """Average over the views of each image."""
        return of_views.view(self.views, -1, of_views.shape[1]).mean(0)
