"""How the networks are moved: by label correction, or by plain training for comparison.

- ``ebomlc``: label correction by `bilevel.EBOMLC`;
- ``ce``: the classifier learns the votes as they are, disagreement as soft labels;
- ``clean``: it learns the trusted labels alone;
- ``ce-clean``: it learns both, with equal weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

import bilevel
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.label_correction import LabelCorrection
from examples.noisy_labels.recipes.own_networks import Normalised, VoteCorrector
from examples.noisy_labels.run.options import Options


class Method:
    """A classifier, a corrector, and what moves them. The plain methods leave the corrector alone."""

    def __init__(self, options: Options, classifier: Normalised, corrector: VoteCorrector) -> None:
        self.name, self.classifier, self.corrector = options.method, classifier, corrector
        self.descent = torch.optim.SGD(
            classifier.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.schedule = MultiStepLR(self.descent, options.drops, gamma=0.1)
        self.optimizer: torch.optim.Optimizer | bilevel.EBOMLC = self.descent
        if self.name == "ebomlc":
            losses = LabelCorrection(classifier, corrector, rho=options.rho, mixture=options.mixture)
            self.optimizer = bilevel.EBOMLC(
                losses.upper_loss,
                losses.lower_loss,
                upper=corrector,
                lower=classifier,
                upper_optimizer=torch.optim.Adam(corrector.parameters(), lr=options.meta_lr, amsgrad=True),
                lower_optimizer=self.descent,
                delta=options.delta,
                xi=options.xi,
            )

    def step(self, noisy: Batch, trusted: Batch) -> dict[str, Tensor]:
        """Take one training step; return numbers to log, still on the device."""
        if isinstance(self.optimizer, bilevel.EBOMLC):
            stats = self.optimizer.step(trusted, noisy)
            return {name: getattr(stats, name) for name in ("upper_loss", "lower_loss", "multiplier")}
        losses = {}
        if self.name in ("clean", "ce-clean"):
            losses["upper_loss"] = functional.cross_entropy(self.classifier(trusted.inputs)[0], trusted.labels)
        if self.name in ("ce", "ce-clean"):
            losses["lower_loss"] = functional.cross_entropy(self.classifier(noisy.inputs)[0], noisy.labels)
        self.descent.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.descent.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def predict(self, inputs: Tensor) -> Tensor:
        """Return the classifier's probabilities, which do not look at the given labels."""
        return functional.softmax(self.classifier(inputs)[0], dim=1)

    def correct(self, inputs: Tensor, shown: Tensor) -> Tensor:
        """Return the probability of each class to be the true one, given the sample and its votes."""
        if self.name != "ebomlc":
            return self.predict(inputs)
        corrected: Tensor = self.corrector(self.classifier(inputs)[1], shown)
        return corrected

    def train(self, mode: bool) -> None:
        """Switch both networks between training and evaluation."""
        self.classifier.train(mode)
        self.corrector.train(mode)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "classifier": self.classifier,
            "corrector": self.corrector,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }
