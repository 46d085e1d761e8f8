"""What a run is judged by: accuracy on the test images, and how many noisy labels came out right.

Label recovery is measured on all noisy images, against true labels that no method has seen:

- ``right``: share of all corrected labels that are the true ones,
- ``recovered``: the same among images whose given label was wrong,
- ``broken``: share of images whose given label was right and whose corrected label is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from examples.noisy_labels.data import Task
from examples.noisy_labels.recipes import Recipe

CHUNK = 500  # images per forward pass; only speed and memory depend on it


@torch.no_grad()
def accuracy(recipe: Recipe, task: Task) -> float:
    """Return the share of test images that the classifier gets right."""
    right = torch.zeros((), device=task.pixels.device)
    with evaluating(recipe):
        for index in task.test.split(CHUNK):
            logits, _ = recipe.classify(task.inputs(task.pixels[index]))
            right += (logits.argmax(1) == task.labels[index]).sum()
    return right.item() / len(task.test)


@torch.no_grad()
def corrected_labels(recipe: Recipe, task: Task) -> Tensor:
    """Return the probabilities (noisy images, classes) that each class is the true one."""
    with evaluating(recipe):
        parts = [
            recipe.correct(task.inputs(task.pixels[index]), given)
            for index, given in zip(task.noisy.split(CHUNK), task.given.split(CHUNK), strict=True)
        ]
    return torch.cat(parts)


def recovery(probabilities: Tensor, task: Task) -> dict[str, float]:
    """Return ``right``, ``recovered`` and ``broken``; see the head of this file."""
    right = probabilities.argmax(1) == task.true
    wrong_given = task.given != task.true
    return {
        "right": _share(right, torch.ones_like(right)),
        "recovered": _share(right, wrong_given),
        "broken": _share(~right, ~wrong_given),
    }


@contextmanager
def evaluating(recipe: Recipe) -> Iterator[None]:
    """Switch the networks to evaluation, and back to what they were."""
    before = {name: network.training for name, network in recipe.networks.items()}
    try:
        for network in recipe.networks.values():
            network.eval()
        yield
    finally:
        for name, network in recipe.networks.items():
            network.train(before[name])


def _share(hits: Tensor, among: Tensor) -> float:
    """Return the share of hits, or 0 where there is nothing to hit, for example no wrong label at noise rate 0."""
    return (hits & among).sum().item() / max(1, int(among.sum()))
