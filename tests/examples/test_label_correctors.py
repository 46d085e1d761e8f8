"""`mlc` and `emlc` against their papers' lines, written out with plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from examples.noisy_labels import recipes
from examples.noisy_labels.batches import Batch
from examples.noisy_labels.models import Corrector, Perceptron
from examples.noisy_labels.recipes import MetaLabelCorrection
from examples.noisy_labels.settings import Settings

OPTIONS: dict[str, Any] = {"dataset": "digits", "network": "mlp", "noise": "flip", "augment": False}
CPU = torch.device("cpu")


def classifier() -> Perceptron:
    torch.manual_seed(1)
    return Perceptron(4, pixels=6, hidden=5, features=3).double()


def batch(images: int) -> Batch:
    labels = torch.arange(images) % 4
    return Batch(torch.randn(images, 6, dtype=torch.float64), labels, labels)


# --- mlc --------------------------------------------------------------------------------------------------------------


def test_mlc_previews_the_whole_step_of_sgd_and_trains_with_the_old_labels() -> None:
    network, corrector = classifier(), Corrector(3, 4, width=4).double()
    settings = Settings(method="mlc", lr=0.3, momentum=0.9, weight_decay=0.01, **OPTIONS)
    recipe = MetaLabelCorrection(settings, network, corrector)
    w, a = dict(network.named_parameters()), list(corrector.parameters())
    buffers = [torch.zeros_like(p) for p in w.values()]
    squares = [torch.zeros_like(p) for p in a]
    moments = [torch.zeros_like(p) for p in a]
    for step in (1, 2, 3):
        noisy, clean = batch(9), batch(7)
        logits, features = network(noisy.inputs)
        soft = corrector(features.detach(), noisy.labels)
        hard = -network(clean.inputs[3:])[0].log_softmax(1)[torch.arange(4), clean.labels[3:]]
        lower = (hard.sum() - (soft * logits.log_softmax(1)).sum()) / 13
        d = torch.autograd.grad(lower, list(w.values()), create_graph=True)
        ahead, next_buffers = {}, []
        for (name, p), g, buffer in zip(w.items(), d, buffers, strict=True):
            moved = 0.9 * buffer + g + 0.01 * p.detach()
            ahead[name] = p.detach() - 0.3 * moved
            next_buffers.append(moved.detach())
        log_p = functional_call(network, ahead, clean.inputs[:3])[0].log_softmax(1)
        upper = -log_p[torch.arange(3), clean.labels[:3]].mean()
        meta = torch.autograd.grad(upper, a)
        expected = [value.detach() for value in ahead.values()]
        corrected = []
        for p, g, m, v in zip(a, meta, moments, squares, strict=True):  # Adam; amsgrad's maximum is exact for growing v
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            corrected.append(
                p.detach() - settings.meta_lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            )
        numbers = recipe.step(noisy, clean)
        buffers = next_buffers
        torch.testing.assert_close(numbers["upper_loss"], upper.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(numbers["lower_loss"], lower.detach(), rtol=1e-10, atol=0)
        for p, want in zip(w.values(), expected, strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-13)
        for p, want in zip(a, corrected, strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=0, atol=2e-5)  # of a step of 3e-4
        if step == 1:
            for p, want in zip(a, corrected, strict=True):
                torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("options", "steps"), [({}, 1), ({"inner_steps": 3}, 3)])
def test_mlc_moves_its_corrector_every_k_steps(options: dict[str, Any], steps: int) -> None:
    recipe = recipes.build(Settings(method="mlc", **options, **OPTIONS), 10, CPU)
    moved = []
    for _ in range(6):
        before = [p.detach().clone() for p in recipe.networks["corrector"].parameters()]
        images = torch.randn(8, 1, 8, 8)
        recipe.step(*[Batch(images, torch.arange(8), torch.arange(8))] * 2)
        after: list[Tensor] = list(recipe.networks["corrector"].parameters())
        moved.append(not all(torch.equal(one, other) for one, other in zip(before, after, strict=True)))
    assert moved == [(step + 1) % steps == 0 for step in range(6)]
