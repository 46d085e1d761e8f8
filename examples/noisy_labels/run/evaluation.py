"""What a run is judged by: accuracy on the test images, and how many noisy labels came out right.

Label recovery is measured on all noisy images, against true labels that no method has seen:

- ``right``: share of all corrected labels that are the true ones,
- ``recovered``: the same among images whose given label was wrong,
- ``broken``: share of images whose given label was right and whose corrected label is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from examples.noisy_labels.data.pools import Task
from examples.noisy_labels.recipes.decoding import bayes, likeliest_transition, transition_on_trusted
from examples.noisy_labels.recipes.recipe import Recipe

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
    return _over(recipe, task, task.noisy, task.given, recipe.correct)


@torch.no_grad()
def labels_by_bayes(recipe: Recipe, task: Task) -> tuple[Tensor, Tensor]:
    """Return the labels by Bayes' rule, as `corrected_labels` does, and the transition matrix; see `decoding.py`."""
    predicted, transition = predictions(recipe, task, task.noisy), recipe.transition
    if transition is None and recipe.transition_from == "trusted":
        labels = task.labels[task.clean]
        transition = transition_on_trusted(predictions(recipe, task, task.clean), labels)
    elif transition is None:
        transition = likeliest_transition(predicted, task.given)
    return bayes(predicted, transition, task.given), transition


@torch.no_grad()
def predictions(recipe: Recipe, task: Task, index: Tensor) -> Tensor:
    """Return the probabilities of each class, given the images at these positions alone."""
    return _over(recipe, task, index, index, lambda inputs, _: recipe.predict(inputs))


def recovery(probabilities: Tensor, task: Task) -> dict[str, float]:
    """Return ``right``, ``recovered`` and ``broken``; see the head of this file."""
    right = probabilities.argmax(1) == task.true
    wrong_given = task.given != task.true
    return {
        "right": _share(right, torch.ones_like(right)),
        "recovered": _share(right, wrong_given),
        "broken": _share(~right, ~wrong_given),
    }


def _over(
    recipe: Recipe, task: Task, index: Tensor, labels: Tensor, answer: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Evaluate images without augmentation, part by part."""
    with evaluating(recipe):
        parts = zip(index.split(CHUNK), labels.split(CHUNK), strict=True)
        return torch.cat([answer(task.inputs(task.pixels[one]), given) for one, given in parts])


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
