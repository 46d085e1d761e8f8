"""What a run is judged by: accuracy on the test samples, and how many noisy labels came out right.

Label recovery is measured on all noisy samples, against true labels that no method has seen:

- ``right``: share of all corrected labels that are the true ones,
- ``recovered``: the same among samples whose given label was wrong,
- ``broken``: share of samples whose given label was right and whose corrected label is wrong.

Of own data the true labels of noisy samples are not known. Of those that are held out, ``right`` and ``given_right``
are the shares of labels that are right after correction and before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes.decoding import bayes, likeliest_transition, transition_on_trusted
from examples.noisy_labels.recipes.recipe import Recipe

CHUNK = 500  # samples per forward pass; only speed and memory depend on it
RECOVERY = ("right", "recovered", "broken")


def scores(recipe: Recipe, task: Task) -> dict[str, float]:
    """Return all that can be measured after an epoch."""
    measured = {}
    if len(task.test):
        measured["test_accuracy"] = accuracy(recipe, task)
    if task.wrong is not None:
        return measured | recovery(corrected_labels(recipe, task), task)
    if len(told := task.test[task.has_given[task.test]]):
        true, given = task.labels[told], classes_of(task.given[told])
        answers = _over(recipe, task, told, task.given[told], recipe.opinion).argmax(1)
        measured |= {"given_right": _share(given == true), "right": _share(answers == true)}
    return measured


def accuracy(recipe: Recipe, task: Task) -> float:
    """Return the share of test samples that the classifier gets right."""
    logits = _over(recipe, task, task.test, task.test, lambda inputs, _: recipe.classify(inputs)[0])
    return _share(logits.argmax(1) == task.labels[task.test])


def corrected_labels(recipe: Recipe, task: Task) -> Tensor:
    """Return the probabilities (noisy samples, classes) that each class is the true one."""
    return _over(recipe, task, task.noisy, task.noisy_labels, recipe.correct)


def opinions(recipe: Recipe, task: Task, index: Tensor) -> Tensor:
    """Return the probabilities of each class by all that the method knows about the samples at these positions."""
    return _over(recipe, task, index, task.given[index], recipe.opinion)


def labels_by_bayes(recipe: Recipe, task: Task) -> tuple[Tensor, Tensor]:
    """Return the labels by Bayes' rule, as `corrected_labels` does, and the transition matrix; see `decoding.py`."""
    predicted, transition = predictions(recipe, task, task.noisy), recipe.transition
    if transition is None and recipe.transition_from == "trusted":
        labels = task.labels[task.clean]
        transition = transition_on_trusted(predictions(recipe, task, task.clean), labels)
    elif transition is None:
        transition = likeliest_transition(predicted, task.noisy_labels)
    return bayes(predicted, transition, task.noisy_labels), transition


def predictions(recipe: Recipe, task: Task, index: Tensor) -> Tensor:
    """Return the probabilities of each class, given the samples at these positions alone."""
    return _over(recipe, task, index, index, lambda inputs, _: recipe.predict(inputs))


def recovery(probabilities: Tensor, task: Task) -> dict[str, float]:
    """Return ``right``, ``recovered`` and ``broken``; see the head of this file."""
    right = probabilities.argmax(1) == task.true_labels
    wrong_given = task.noisy_labels != task.true_labels
    return {"right": _share(right), "recovered": _share(right[wrong_given]), "broken": _share(~right[~wrong_given])}


def classes_of(given: Tensor) -> Tensor:
    """Return given labels as classes: of shares the largest, of several the first."""
    return given if given.ndim == 1 else given.argmax(1)


@torch.no_grad()
def _over(
    recipe: Recipe, task: Task, index: Tensor, labels: Tensor, answer: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Evaluate samples without augmentation, part by part."""
    with evaluating(recipe):
        parts = zip(index.split(CHUNK), labels.split(CHUNK), strict=True)
        return torch.cat([answer(task.inputs(one), given) for one, given in parts])


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


def _share(hits: Tensor) -> float:
    """Return the share of hits, or 0 where there is nothing to hit, for example no wrong label at noise rate 0."""
    return hits.double().mean().item() if len(hits) else 0.0
