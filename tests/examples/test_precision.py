"""bfloat16 inside the networks, float32 everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.noisy_labels.data import pools
from examples.noisy_labels.recipes.models import Corrector, ResNet
from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.run import evaluation
from examples.noisy_labels.run.settings import METHODS, Settings
from examples.noisy_labels.run.training import Run

DIGITS: dict[str, Any] = {"dataset": "digits", "network": "mlp", "noise": "flip", "augment": False}
CPU = torch.device("cpu")


def test_networks_compute_in_bfloat16_and_answer_in_float32() -> None:
    torch.manual_seed(0)
    network, x = ResNet(10, blocks=1, width=4), torch.randn(8, 3, 16, 16)
    logits, features = mixed_precision(network, "bf16")(x)
    for mine, exact in zip((logits, features), network(x), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, mine.bfloat16().float())  # that is what was computed
        torch.testing.assert_close(mine, exact, rtol=0.05, atol=0.05)
        assert not torch.equal(mine, exact)
    assert mixed_precision(network, "off") is network


def test_the_corrector_answers_with_probabilities_of_full_precision() -> None:
    torch.manual_seed(0)
    corrector, features, given = Corrector(5, 10), torch.randn(50, 5), torch.arange(50) % 10
    probabilities = mixed_precision(corrector, "bf16")(features, given)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(50), rtol=0, atol=1e-6)  # bfloat16: off by 1e-3
    torch.testing.assert_close(probabilities, corrector(features, given), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_has_nearly_the_numbers_of_float32(method: str) -> None:
    found = {}
    for amp in ("off", "bf16"):
        settings = Settings(method=method, amp=amp, clean_fraction=0.04, delta=1.0, xi=1.0, **DIGITS)
        run = Run(settings, pools.load(settings, CPU))
        found[amp] = run.advance()
        for network in run.recipe.networks.values():
            assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    for name in set(found["off"]) & {"upper_loss", "lower_loss"}:
        assert found["bf16"][name].dtype == torch.float32
        torch.testing.assert_close(found["bf16"][name], found["off"][name], rtol=0.01, atol=0)
        assert found["bf16"][name] != found["off"][name]


@pytest.mark.thorough
def test_training_in_bfloat16_is_about_as_good() -> None:
    accuracies = {}
    for amp in ("off", "bf16"):
        settings = Settings(
            amp=amp, clean_fraction=0.04, delta=1.0, xi=1.0, meta_lr=3e-3, epochs=6, batch_size=50, **DIGITS
        )
        run = Run(settings, pools.load(settings, CPU))
        while run.epoch < settings.epochs:
            while run.step < len(run.noisy):
                run.advance()
            run.end_epoch()
        accuracies[amp] = evaluation.accuracy(run.recipe, run.task)
    assert accuracies["off"] > 0.8
    assert accuracies["bf16"] == pytest.approx(accuracies["off"], abs=0.05)
