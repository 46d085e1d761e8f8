"""Every method of the papers learns something, and the bilevel ones are what their library class says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from examples.noisy_labels.data import pools
from examples.noisy_labels.recipes.enhanced_label_correction import EnhancedLabelCorrection
from examples.noisy_labels.recipes.label_correction import split
from examples.noisy_labels.recipes.learning_to_reweight import LearningToReweight
from examples.noisy_labels.recipes.meta_label_correction import MetaLabelCorrection
from examples.noisy_labels.recipes.meta_weight_net import MetaWeightNet
from examples.noisy_labels.run import command_line, compare
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.run.training import Run

METHODS = ("mlc", "emlc", "emlc-one-step", "l2rw", "mwnet", "pmwnet", "coteaching-plus", "dividemix")


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_the_digits(method: str) -> None:
    torch.set_num_threads(1)
    arguments = ["--dataset", "digits", "--noise", "flip", "--rate", "0.2", "--epochs", "15", "--method", method]
    outcome, task, probabilities = compare.train_once(command_line.parse(arguments).settings)
    assert outcome.accuracy > 0.6  # guessing: 0.1; measured on two seeds: 0.79 to 0.97
    assert probabilities.shape == (len(task.noisy), 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(task.noisy)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["mlc", "emlc", "emlc-one-step", "l2rw", "mwnet"])
def test_the_library_finds_its_directions_right(method: str) -> None:
    # Not pmwnet: the derivative of a draw is that of its distribution, which differences at a fixed seed do not show.
    settings = Settings(
        method=method, dataset="digits", network="mlp", noise="flip", augment=False, clean_fraction=0.04, batch_size=20
    )
    run = Run(settings, pools.load(settings, torch.device("cpu")))
    for _ in range(3):
        run.advance()
    noisy, clean, recipe = next(run.noisy), next(run.clean), run.recipe
    batches: tuple[Any, ...] = (clean, noisy)
    if isinstance(recipe, MetaLabelCorrection):
        upper, joining = split(clean, recipe.mix_clean)
        batches = (upper, (noisy, joining))
    elif isinstance(recipe, EnhancedLabelCorrection):
        batches = (recipe.corrupted(clean), *recipe.parts(noisy))
    elif isinstance(recipe, LearningToReweight):
        recipe.weights.data.zero_()  # as every step begins
    assert isinstance(recipe, MetaLabelCorrection | EnhancedLabelCorrection | LearningToReweight | MetaWeightNet)
    report = bilevel.check_directions(recipe.bilevel, *batches)
    assert report.verdict == "all passed", report
