"""Training networks as a way to correct labels: label correction by a recipe, or plain training for images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from examples.noisy_labels.data.samples import Samples, make
from examples.noisy_labels.run import evaluation
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.run.training import Run, train_at_once
from examples.noisy_labels.verdict.problem import UNKNOWN, Problem

Array = np.ndarray


class NetworkWay:
    """A way that trains networks anew for each problem it is asked about.

    Args:
        options: What is trained and how.
        inputs: Features or images of all samples.
        watch: Is called after each step, and may raise to stop.

    Attributes:
        run: The last training.
    """

    run: Run

    def __init__(self, options: Options, inputs: Tensor, *, watch: Callable[[Run], None] = lambda run: None) -> None:
        self.options, self.inputs, self.watch = options, inputs, watch

    def __call__(self, problem: Problem) -> Array:
        samples = samples_of(problem, self.inputs, self.options)
        with torch.random.fork_rng(devices=[]):
            self.run = train_at_once(Run(self.options.resolved(len(samples.noisy)), samples), self.watch)
        return answers(self.run, samples)


def answers(run: Run, samples: Samples) -> Array:
    """Return the run's probabilities for all samples; without a given label, its classifier's."""
    everyone = torch.arange(len(samples.labels), device=samples.labels.device)
    predicted = evaluation.predictions(run.recipe, samples, everyone)
    told = torch.where(samples.has_given)[0]
    predicted[told] = evaluation.opinions(run.recipe, samples, told)
    return np.asarray(predicted.double().cpu().numpy())


def samples_of(problem: Problem, inputs: Tensor, options: Options) -> Samples:
    """Return the samples of a problem: those without any label are for testing, and nothing is trained on them."""
    trusted, voted = problem.trusted, problem.voted
    noisy, clean, neither = (
        torch.from_numpy(np.flatnonzero(one)).to(inputs.device)
        for one in (~trusted & voted, trusted, ~trusted & ~voted)
    )
    return make(
        inputs,
        torch.from_numpy(problem.votes).float().to(inputs.device),
        torch.from_numpy(np.where(trusted, problem.truth, UNKNOWN)).to(inputs.device),
        soft=problem.annotations.shape[1] > 1,
        ids=tuple(map(str, range(len(problem.truth)))),
        names=problem.names,
        noisy=noisy,
        clean=clean,
        test=neither,
        memory_format=options.memory_format,
    )
