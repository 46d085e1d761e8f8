"""`dividemix`: DivideMix (Li, Socher and Hoi, ICLR 2020, arXiv 2002.07394), by its code.

Two networks are warmed up on all given labels. Then, before each epoch, the images are divided: two normal
distributions are fitted to the losses of one network (`loss_mixture.py`), w is the probability that a label is right,
and where w > 0.5 the image is labelled for the *other* network, else unlabelled. That network learns, with b images of
each kind and two views of each image (u, v: over both views):

    refined     t = sharpen(w onehot(y) + (1 - w) mean_u p(u))                                labelled, p its own
    guessed     q = sharpen(mean of p(u) over the views and both networks)                    unlabelled
    sharpen(p) = p^(1/T) / sum p^(1/T)
    MixUp       x <- l x + (1 - l) x_shuffled, the same with t and q;  l = max(m, 1 - m), m ~ Beta(4, 4) for the batch
    loss        cross-entropy of what was labelled first + lambda(t) mean square error of the probabilities of the rest
                + sum_c 1/C log((1/C) / mean p(x)[c])
    lambda(t)   rises from 0 to 25 over 16 of 300 epochs

Warm-up adds the mean of sum_c p_c log p_c unless the noise is uniform, as the code does for asymmetric noise. It uses
no trusted images. Accuracy is that of the mean of both networks' logits. A label is corrected by w onehot(y) +
(1 - w) p with the mean of both networks' w; the paper reports accuracies alone, so that rule is ours.

Deviations: two PreAct-ResNet-18, rate 0.02, batches of 64 and 300 epochs there; network, rate, schedule, batch size and
epochs of all methods here (``--lr 0.02``). b is half of the batch size and an epoch has as many steps as for all
methods; there one shows each labelled image once. Warm-up is 1/10 of the epochs, as on CIFAR-100; it is 1/30 on
CIFAR-10, which is one epoch of thirty. Both networks move at once, where one waits for the other's epoch there. Either
kind has at least b images, the likeliest. At a rate of 0.9 the code averages losses over five epochs; not here. Crops
are padded by reflection, as in all methods here, and not by zeros.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes.decoding import blend
from examples.noisy_labels.recipes.loss_mixture import LossMixture
from examples.noisy_labels.recipes.recipe import Scalars
from examples.noisy_labels.recipes.two_networks import TwoNetworks
from examples.noisy_labels.recipes.views import ViewBatches, Views
from examples.noisy_labels.run.settings import Settings

THRESHOLD = 0.5
TEMPERATURE = 0.5
CONCENTRATION = 4.0  # of the Beta distribution
UNLABELLED_WEIGHT = 25.0  # lambda
WARM_UP = 1 / 10  # as shares of all epochs
WEIGHT_GROWS_FOR = 16 / 300
CHUNK = 500  # images per forward pass when losses are taken; only memory depends on it


class DivideMix(TwoNetworks):
    """Two networks, each with its mixture of losses, and with batches that the other's mixture has divided."""

    needs = ("second", "task")

    def __init__(self, settings: Settings, network: nn.Module, second: nn.Module, task: Task) -> None:
        super().__init__(settings, network, second)
        self.settings, self.task = settings, task
        self.size = max(1, min(settings.batch_size, len(task.noisy)) // 2)
        self.warm_up = max(1, round(WARM_UP * settings.epochs))
        steps = max(1, len(task.noisy) // settings.batch_size)
        self.weight_grows_for = WEIGHT_GROWS_FOR * settings.epochs * steps
        self.steps = 0  # since the warm-up
        self.mixtures = [LossMixture().to(task.samples.device) for _ in range(2)]
        self.belief = torch.zeros(2, len(task.noisy), device=task.samples.device)  # w by each network
        self.divided: list[tuple[ViewBatches, ViewBatches]] = []  # labelled and unlabelled, for each network
        self.concentration = torch.tensor(CONCENTRATION, device=task.samples.device)
        self.classify = self._together

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        if self.schedule.last_epoch < self.warm_up:
            return {"lower_loss": self.descend([self._warm_up_loss(k, noisy) for k in (0, 1)])}
        weight = UNLABELLED_WEIGHT * min(self.steps / self.weight_grows_for, 1.0)
        self.steps += 1
        batches = [(next(labelled), next(unlabelled)) for labelled, unlabelled in self.divided]
        return {"lower_loss": self.descend([self._loss(k, *batches[k], weight) for k in (0, 1)])}

    def end_epoch(self) -> None:
        """Move the schedules on and divide the images anew."""
        super().end_epoch()
        self.belief = torch.stack([self._fitted(k) for k in (0, 1)])
        self._divide()

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return w onehot(y) + (1 - w) p."""
        beliefs = [self.mixtures[k].right(cross_entropies(self.logits(k, inputs), given)) for k in (0, 1)]
        return blend(self.predict(inputs), given, torch.stack(beliefs).mean(0))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes."""
        batches = [[part.state_dict() for part in parts] for parts in self.divided]
        return super().state_dict() | {"belief": self.belief, "batches": batches, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.steps, self.belief = state["steps"], state["belief"].to(self.belief)
        if state["batches"]:
            self._divide()
        for parts, states in zip(self.divided, state["batches"], strict=True):
            for part, one in zip(parts, states, strict=True):
                part.load_state_dict(one)

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | {f"mixture_{k}": mixture for k, mixture in enumerate(self.mixtures)}

    def _together(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of both networks' logits, and the first one's features."""
        (first, features), (second, _) = (call(inputs) for call in self.calls)
        return (first + second) / 2, features

    @torch.no_grad()
    def _fitted(self, which: int) -> Tensor:
        """Fit a network's mixture to its losses of all noisy images as they are, and return w."""
        self.pair.eval()
        parts = zip(self.task.noisy.split(CHUNK), self.task.noisy_labels.split(CHUNK), strict=True)
        images = ((self.task.inputs(index), given) for index, given in parts)
        losses = torch.cat([cross_entropies(self.logits(which, inputs), given) for inputs, given in images])
        self.pair.train()
        self.mixtures[which].fit(losses)
        return self.mixtures[which].right(losses)

    def _divide(self) -> None:
        self.divided = []
        for which, belief in enumerate(self.belief.flip(0)):  # that of the other network
            order = belief.argsort(descending=True, stable=True)
            labelled = int((belief > THRESHOLD).sum().clamp(self.size, len(order) - self.size))
            kinds = {"labelled": order[:labelled], "unlabelled": order[labelled:]}
            batches = [
                ViewBatches(
                    self.task,
                    part,
                    belief,
                    size=self.size,
                    seed=self.settings.seed,
                    purpose=f"{kind} images of network {which}, epoch {self.schedule.last_epoch}",
                    augment=self.settings.augment,
                )
                for kind, part in kinds.items()
            ]
            self.divided.append((batches[0], batches[1]))

    def _warm_up_loss(self, which: int, noisy: Batch) -> Tensor:
        logits = self.logits(which, noisy.inputs)
        loss = functional.cross_entropy(logits, noisy.labels)
        return loss if self.settings.noise == "uniform" else loss + negative_entropy(logits)

    def _loss(self, which: int, labelled: Views, unlabelled: Views, weight: float) -> Tensor:
        refined, guessed = self._targets(which, labelled, unlabelled)
        inputs = torch.cat([labelled.first, labelled.second, unlabelled.first, unlabelled.second])
        targets = torch.cat([refined, refined, guessed, guessed])
        four = self.concentration
        one = torch.distributions.Beta(four, four, validate_args=False).sample()
        inputs, targets = mix_up(inputs, targets, one, torch.randperm(len(inputs), device=inputs.device))
        return mix_match(self.logits(which, inputs), targets, 2 * len(refined), weight)

    @torch.no_grad()
    def _targets(self, which: int, labelled: Views, unlabelled: Views) -> tuple[Tensor, Tensor]:
        """Return t and q; the other network judges as in use, with its running statistics."""
        own, other = self.calls[which], self.pair[1 - which]
        other.eval()
        views = (unlabelled.first, unlabelled.second)
        guesses = [functional.softmax(self.logits(k, view), dim=1) for k in (which, 1 - which) for view in views]
        other.train()
        predicted = [functional.softmax(own(view)[0], dim=1) for view in (labelled.first, labelled.second)]
        refined = blend(torch.stack(predicted).mean(0), labelled.labels, labelled.belief)
        return sharpen(refined), sharpen(torch.stack(guesses).mean(0))


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each image."""
    return functional.cross_entropy(logits, labels, reduction="none")


def negative_entropy(logits: Tensor) -> Tensor:
    """Return the mean of sum_c p_c log p_c."""
    log_p = functional.log_softmax(logits, dim=1)
    return (log_p.exp() * log_p).sum(1).mean()


def sharpen(probabilities: Tensor) -> Tensor:
    """Return probabilities to the power 1/T, normalised."""
    return functional.normalize(probabilities ** (1 / TEMPERATURE), p=1, dim=1)


def mix_up(inputs: Tensor, targets: Tensor, one: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets mixed with those in another order; what was first keeps the larger share."""
    share = torch.maximum(one, 1 - one)
    return share * inputs + (1 - share) * inputs[order], share * targets + (1 - share) * targets[order]


def mix_match(logits: Tensor, targets: Tensor, labelled: int, weight: float) -> Tensor:
    """Return the loss of a mixed batch, of which the first images are the ``labelled`` ones."""
    supervised = functional.cross_entropy(logits[:labelled], targets[:labelled])
    errors = functional.softmax(logits[labelled:], dim=1) - targets[labelled:]
    classes, mean = logits.shape[1], functional.softmax(logits, dim=1).mean(0)
    spread = (-math.log(classes) - mean.log()).mean()
    return supervised + weight * errors.square().mean() + spread
