"""Random images in the place of CIFAR's."""

from __future__ import annotations

import numpy as np
import torch

from examples.noisy_labels.data.task import Task

PER_CLASS = 6


def fake_images(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random images of every class, in shuffled order."""
    source = np.random.default_rng(seed)
    labels = source.permutation(np.arange(classes).repeat(PER_CLASS)).astype(np.uint8)
    return source.integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8), labels


def blank_task() -> Task:
    """Return a task of the digits' shape: two black images of each class are trusted, and two noisy."""
    labels = torch.arange(40) % 10
    clean, noisy, none = torch.arange(20), torch.arange(20, 40), torch.arange(0)
    names = tuple(map(str, range(10)))
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    return Task(torch.zeros(40, 1, 8, 8), labels, labels.clone(), clean, noisy, none, names, zero, one)
