"""One EBOMLC step of meta label correction, written out by hand with the fewest passes, and one plain training step.

It is the opponent of `bilevel.EBOMLC` in `step_time.py`, so it takes every short cut that this one problem allows:
soft labels are computed once and serve both evaluations of the lower loss, the corrector's part of grad Q is one
backward pass through the corrector alone, the look-ahead weights are put in by pointer, inner products stay in the
dtype of the model, and nothing is checked: not the losses, not for NaN, not what happens if a closure raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.problem import DELTA, RHO, SMALLEST_PROBABILITY, XI, Batch, Network


class ByHand:
    """`bilevel.EBOMLC` in its default reading, for one classifier and one corrector only."""

    def __init__(
        self,
        classifier: Network,
        corrector: nn.Module,
        sgd: torch.optim.Optimizer,
        adam: torch.optim.Optimizer,
    ) -> None:
        self.classifier, self.corrector, self.sgd, self.adam = classifier, corrector, sgd, adam
        self.w: list[Tensor] = list(classifier.parameters())
        self.alpha: list[Tensor] = list(corrector.parameters())
        self.norms = [part for part in classifier.modules() if isinstance(part, _BatchNorm)]

    def step(self, clean: Batch, noisy: Batch) -> None:
        """Move both networks once."""
        # G at w: the one evaluation that moves the BatchNorm statistics.
        logits, features = self.classifier(noisy.inputs)
        soft_labels = self.corrector(features.detach(), noisy.labels)
        q_w = torch.autograd.grad(functional.cross_entropy(logits, soft_labels.detach()), self.w)

        with self._statistics_frozen():
            # G at w_1, forward only: grad_alpha Q needs the logits of both points, and one pass back through the
            # corrector.
            with torch.no_grad(), self._weights(torch._foreach_sub(self.w, q_w, alpha=self.sgd.param_groups[0]["lr"])):
                ahead, _ = self.classifier(noisy.inputs)
            moved = functional.log_softmax(ahead, 1) - functional.log_softmax(logits.detach(), 1)
            q_alpha = torch.autograd.grad((soft_labels * moved).sum() / len(moved), self.alpha)

            # F at w, on the clean batch.
            logits, features = self.classifier(clean.inputs)
        corrected = self.corrector(features.detach(), clean.labels)
        mixture = RHO * functional.softmax(logits, 1) + (1 - RHO) * corrected
        loss = -mixture.gather(1, clean.labels.unsqueeze(1)).clamp_min(SMALLEST_PROBABILITY).log().mean()
        f = torch.autograd.grad(loss, self.w + self.alpha)
        f_w, f_alpha = f[: len(self.w)], f[len(self.w) :]

        flat_q, flat_f = _flat(q_w), _flat(f_w)
        squared = flat_q.dot(flat_q) + sum(part.square().sum() for part in q_alpha)
        weight = XI * torch.relu(DELTA * squared - flat_f.dot(flat_q)) / (squared + 1e-8)
        _step(self.sgd, self.w, f_w, weight, q_w)
        _step(self.adam, self.alpha, f_alpha, weight, q_alpha)

    @contextmanager
    def _weights(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the classifier compute with other weights, without a copy."""
        own = [parameter.data for parameter in self.w]
        for parameter, value in zip(self.w, values, strict=True):
            parameter.data = value
        yield
        for parameter, value in zip(self.w, own, strict=True):
            parameter.data = value

    @contextmanager
    def _statistics_frozen(self) -> Iterator[None]:
        """Let BatchNorm normalise by the batch, and leave its running statistics and its counter alone."""
        for norm in self.norms:
            norm.track_running_stats = False
        yield
        for norm in self.norms:
            norm.track_running_stats = True


class Plain:
    """Ordinary training of the classifier on the noisy labels: what a step costs without a second level."""

    def __init__(self, classifier: Network, sgd: torch.optim.Optimizer) -> None:
        self.classifier, self.sgd = classifier, sgd

    def step(self, clean: Batch, noisy: Batch) -> None:
        """Move the classifier once; the clean batch is not used."""
        self.sgd.zero_grad()
        functional.cross_entropy(self.classifier(noisy.inputs)[0], noisy.labels).backward()
        self.sgd.step()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _step(
    optimizer: torch.optim.Optimizer,
    variables: list[Tensor],
    f: tuple[Tensor, ...],
    weight: Tensor,
    q: tuple[Tensor, ...],
) -> None:
    """Let the torch optimizer move ``variables`` along ``f + weight q``."""
    for variable, direction in zip(variables, torch._foreach_add(f, torch._foreach_mul(q, weight)), strict=True):
        variable.grad = direction
    optimizer.step()
