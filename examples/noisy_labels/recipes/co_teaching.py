"""`coteaching-plus`: Co-teaching+ (Yu, Han, Yao, Niu, Tsang and Sugiyama, ICML 2019, arXiv 1901.04215).

A network learns images with a wrong label last, so a small loss speaks for the label; and two networks filter out each
other's mistakes as long as they differ. In epoch e, on one batch for both networks:

    D       = the whole batch if e < E, else the images for which the two predict different classes
    S_k     = the (1 - rate(e)) |D| images of D that have the smallest loss in network k,  rate(e) = tau min(e / E', 1)
    w_k    <- SGD's step on the mean loss of network k over S_(other network)
    where nobody differs: on its mean loss over the whole batch

It is told tau, the share of wrong labels (not which ones are wrong); no other method here is. It uses no trusted
images. Reported is the first network's accuracy, and what it predicts is the corrected label.

Deviations: E, E' and the rest of the schedule keep their share of all epochs, 20 and 10 of 200 (on CIFAR-100 E is 5 of
200). Network, SGD, schedule, batch size and augmentation are those of all methods here; there it is Adam at 1e-3 that
falls to 0 from epoch 80 on, a small network, batches of 128 and no augmentation. The code hands softmax to
cross-entropy, which takes the softmax once more, and divides mean losses by the number of images again: plain means of
cross-entropy here. At least one image is kept. Trained from epoch 0 on, there from 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes.recipe import Scalars
from examples.noisy_labels.recipes.two_networks import TwoNetworks
from examples.noisy_labels.run.settings import Training

DISAGREE_FROM = {100: 5 / 200}  # classes: E as a share of all epochs
DISAGREE_FROM_ELSEWHERE = 20 / 200
RATE_GROWS_FOR = 10 / 200  # E'


class CoTeachingPlus(TwoNetworks):
    """Two networks that choose for each other what to learn.

    Args:
        settings: Options.
        network, second: The networks.
        wrong: tau, the share of wrong labels.
        task: The images.
    """

    needs = ("second", "wrong", "task")

    def __init__(self, settings: Training, network: nn.Module, second: nn.Module, wrong: float, task: Task) -> None:
        super().__init__(settings, network, second)
        share = DISAGREE_FROM.get(len(task.names), DISAGREE_FROM_ELSEWHERE)
        self.wrong = wrong
        self.disagree_from = max(1, round(share * settings.epochs))
        self.rate_grows_for = max(1.0, RATE_GROWS_FOR * settings.epochs)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        logits = [self.logits(k, noisy.inputs) for k in (0, 1)]
        losses = [functional.cross_entropy(one, noisy.labels, reduction="none") for one in logits]
        differ = logits[0].argmax(1) != logits[1].argmax(1)
        if self.schedule.last_epoch < self.disagree_from:
            differ = torch.ones_like(differ)
        chosen = [choose(one.detach(), differ, keep=1 - self.rate) for one in losses]
        means = [(one * other).sum() / other.sum() for one, other in zip(losses, reversed(chosen), strict=True)]
        return {"lower_loss": self.descend(means), "share_used": torch.stack(chosen).mean()}

    @property
    def rate(self) -> float:
        """Return the share that is dropped in this epoch."""
        return self.wrong * min(self.schedule.last_epoch / self.rate_grows_for, 1.0)


def choose(losses: Tensor, candidates: Tensor, *, keep: float) -> Tensor:
    """Return 1 for the share ``keep`` of the candidates that has the smallest losses, else 0; no candidates: all 1."""
    count = (keep * candidates.sum().double()).floor().clamp(min=1)
    order = losses.masked_fill(~candidates, torch.inf).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.where(candidates.any(), rank < count, True).to(losses.dtype)
