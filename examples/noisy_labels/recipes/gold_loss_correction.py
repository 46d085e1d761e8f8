"""`glc`: Gold Loss Correction (Hendrycks, Mazeika, Wilson and Gimpel, NeurIPS 2018).

Phase 1 trains a classifier p' on the noisy images alone. What it answers on trusted images of class k is what labels
that class was given:

    T[k] = mean of p'(. | x) over the trusted images of class k

Phase 2 starts again from the first weights and trains on all images, each counting once:

    loss of a noisy image    -log sum_k p_w(k | x) T[k, y]
    loss of a trusted image  -log p_w(y | x)

Deviations from the paper and its code: the network and the schedule of all other methods here (there a WRN-40-2, 75
epochs a phase and a rate that falls with every step); trusted images are drawn apart and weighted by ``clean_weight``
instead of being shuffled among the noisy ones; momentum starts at zero again in phase 2, where the code keeps it. The
base-rate adjustment and the calibration that the paper tries are left out. Its labels are the classifier's predictions;
Bayes' rule with T is reported beside them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes.decoding import transition_on_trusted
from examples.noisy_labels.recipes.mixed import Mixed
from examples.noisy_labels.recipes.recipe import Scalars
from examples.noisy_labels.run.settings import Training

CHUNK = 500  # trusted images per forward pass; only memory depends on it


class GoldLossCorrection(Mixed):
    """Two phases, each of all epochs."""

    phases = 2
    needs = ("task",)
    transition_from = "trusted"

    def __init__(self, settings: Training, network: nn.Module, task: Task) -> None:
        super().__init__(settings, network)
        self.task, self.epochs, self.phase = task, settings.epochs, 1
        self.estimate = torch.eye(len(task.names), device=task.samples.device)
        self.restarted: dict[str, Any] = {"classifier": network, "optimizer": self.descent, "schedule": self.schedule}
        self.first = {name: copy.deepcopy(part.state_dict()) for name, part in self.restarted.items()}

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        if self.phase == 1 and self.schedule.last_epoch == self.epochs:
            self._begin_second_phase()
        if self.phase == 2:
            return super().step(noisy, clean)
        loss = functional.cross_entropy(self.classify(noisy.inputs)[0], noisy.labels)
        self.descent.zero_grad()
        loss.backward()
        self.descent.step()
        return {"lower_loss": loss.detach()}

    def noisy_loss(self, logits: Tensor, noisy: Batch) -> Tensor:
        """Return the corrected loss, in logarithms, which do not underflow."""
        of_given = self.estimate[:, noisy.labels].T
        return -torch.logsumexp(functional.log_softmax(logits, dim=1) + (of_given + 1e-12).log(), dim=1).mean()

    @property
    def transition(self) -> Tensor:
        """Return T; the identity before it has been estimated."""
        return self.estimate

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes. The first weights follow from the seed."""
        return super().state_dict() | {"phase": self.phase, "estimate": self.estimate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.phase, self.estimate = state["phase"], state["estimate"].to(self.estimate.device)

    @torch.no_grad()
    def _begin_second_phase(self) -> None:
        self.classifier.eval()
        trusted = self.task.clean
        parts = [self.predict(self.task.inputs(index)) for index in trusted.split(CHUNK)]
        self.classifier.train()
        self.estimate = transition_on_trusted(torch.cat(parts), self.task.labels[trusted])
        for name, part in self.restarted.items():
            part.load_state_dict(copy.deepcopy(self.first[name]))
        self.phase = 2
