"""`ours`: online EM (`em`) whose counts forget at the right pace, and which looks at each image twice.

EM for labels climbs slowly where classes are mistaken for one another: while T says that a wrong label is right, the
classifier learns it, and its predictions then confirm T. Three changes, in this order of effect:

Memory. `em` remembers one pass over the data, so T can move once a pass, however many steps that is. Here the counts
    remember a share of the images seen so far, from 100 images a class up to one pass:

        memory(t) = min(N, max(100 K, share * t b))         C <- C memory(t) / memory(t - 1), then as in `em`

    Early counts, of a classifier that knows nothing yet, are forgotten at once, and late ones average over many: the
    decreasing step sizes of online EM (Cappé and Moulines, 2009).
Two views. Each noisy image is cropped and mirrored twice, m is the posterior of the mean prediction, and both views
    are trained on it: agreement between views, as in semi-supervised learning. The mean of two predictions is less sure
    than either, and counts of its posterior lean to the given labels; so C counts each view's own posterior.
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

from examples.noisy_labels.batches import Batch
from examples.noisy_labels.decoding import bayes
from examples.noisy_labels.expectation_maximization import ExpectationMaximization
from examples.noisy_labels.recipe import Scalars
from examples.noisy_labels.settings import Settings

FEWEST_A_CLASS = 100  # images that the counts remember at least


class Ours(ExpectationMaximization):
    """Online EM with growing memory, two views of each noisy image, and mirrored answers."""

    def __init__(self, settings: Settings, network: nn.Module, classes: int, images: int) -> None:
        super().__init__(settings, network, classes, images)
        self.share, self.images, self.seen = settings.memory, images, 0
        self.fewest = min(images, FEWEST_A_CLASS * classes)
        self.mirror = settings.augment
        self.views = 2 if settings.augment else 1
        self.counts.remember(self.fewest)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        self.seen += len(noisy.labels) // self.views
        self.counts.remember(min(self.images, max(self.fewest, self.share * self.seen)))
        return super().step(noisy, clean)

    def noisy_loss(self, logits: Tensor, noisy: Batch) -> Tensor:
        """Take the expectation over all views of an image and return the loss that w shall minimise on each."""
        given = noisy.labels.view(self.views, -1)[0]
        with torch.no_grad():
            predicted = self.predict_view(noisy.inputs)
            of_views = bayes(predicted, self.transition, noisy.labels)
            of_images = bayes(self._mean(predicted), self.transition, given)
            self.counts.add(self._mean(of_views), given)
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
