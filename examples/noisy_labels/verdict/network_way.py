"""Training networks as a way to correct labels: label correction by EBOMLC, or plain training for images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from examples.noisy_labels.data.samples import Samples
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.run.own_run import Run
from examples.noisy_labels.verdict.problem import UNKNOWN, Problem

Array = np.ndarray


class NetworkWay:
    """A way that trains networks anew for each problem it is asked about.

    Args:
        options: What is trained and how; resolved.
        inputs: Features or images of all samples.
        corrects: Whether the corrector's answer counts, or the classifier's alone.
        watch: Is called after each step, and may raise to stop.

    Attributes:
        run: The last training.
    """

    run: Run

    def __init__(
        self,
        options: Options,
        inputs: Tensor,
        *,
        corrects: bool = True,
        watch: Callable[[Run], None] = lambda run: None,
    ) -> None:
        self.options, self.inputs, self.corrects, self.watch = options, inputs, corrects, watch

    def __call__(self, problem: Problem) -> Array:
        samples = samples_of(problem, self.inputs)
        random = torch.get_rng_state()
        try:
            self.run = Run(self.options.resolved(len(samples.noisy)), samples)
            while self.run.epoch < self.run.epochs:
                while self.run.step < len(self.run.noisy):
                    self.run.advance()
                    self.watch(self.run)
                self.run.end_epoch()
        finally:
            torch.set_rng_state(random)
        return answers(self.run, corrects=self.corrects)


def answers(run: Run, *, corrects: bool = True) -> Array:
    """Return the run's probabilities for all samples; without a given label, its classifier's."""
    samples = run.samples
    classifier, corrected = run.probabilities(torch.arange(len(samples.labels), device=samples.labels.device))
    told = samples.voted.unsqueeze(1) & torch.tensor(corrects, device=samples.labels.device)
    return np.asarray(torch.where(told, corrected, classifier).double().cpu().numpy())


def samples_of(problem: Problem, inputs: Tensor) -> Samples:
    """Return the samples of a problem: those without any label are held out, and nothing is trained on them."""
    trusted, voted = problem.trusted, problem.voted
    positions = [np.flatnonzero(one) for one in (~trusted & voted, trusted, ~trusted & ~voted)]
    noisy, checked, neither = (torch.from_numpy(one).to(inputs.device) for one in positions)
    return Samples(
        ids=tuple(map(str, range(len(problem.truth)))),
        names=problem.names,
        inputs=inputs,
        votes=torch.from_numpy(problem.votes).float().to(inputs.device),
        labels=torch.from_numpy(np.where(trusted, problem.truth, UNKNOWN)).to(inputs.device),
        noisy=noisy,
        trusted=checked,
        held_out=neither,
    )
