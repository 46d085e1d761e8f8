"""`l2rw` and `mwnet` against closed forms and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from examples.noisy_labels.batches import Batch
from examples.noisy_labels.learning_to_reweight import LearningToReweight
from examples.noisy_labels.meta_weight_net import MetaWeightNet
from examples.noisy_labels.models import Perceptron
from examples.noisy_labels.settings import Settings

PLAIN: dict[str, Any] = {"dataset": "digits", "network": "mlp", "lr": 0.3, "momentum": 0.0, "weight_decay": 0.0}


class Linear(nn.Module):
    """Logits that are linear in the image, which is its own features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


def batch(images: int, classes: int = 4) -> Batch:
    labels = torch.randint(classes, (images,))
    return Batch(torch.randn(images, 6, dtype=torch.float64), labels, labels)


# --- l2rw -------------------------------------------------------------------------------------------------------------


def test_l2rw_weights_are_the_positive_parts_of_inner_products_of_gradients() -> None:
    torch.manual_seed(0)
    network, noisy, clean = Linear().double(), batch(9), batch(5)
    recipe = LearningToReweight(Settings(method="l2rw", batch_size=9, **PLAIN), network)
    recipe.step(batch(9), batch(5))  # what the weights were before plays no part
    # The gradient of cross-entropy in the logits is softmax - onehot =: e, so that of a linear layer is e x^T and e,
    # and the inner product of two images' gradients is <e, e'> (<x, x'> + 1).
    errors = [functional.softmax(network(b.inputs)[0], 1) - functional.one_hot(b.labels, 4) for b in (noisy, clean)]
    products = (errors[0] @ errors[1].T) * (noisy.inputs @ clean.inputs.T + 1)
    similar = products.mean(1).clamp(min=0).detach()
    assert 0 < int((similar > 0).sum()) < 9, "the case must have both signs"
    weights = similar / similar.sum()
    losses = functional.cross_entropy(network(noisy.inputs)[0], noisy.labels, reduction="none")
    gradients = torch.autograd.grad((weights * losses).sum(), list(network.parameters()))
    expected = [p.detach() - 0.3 * g for p, g in zip(network.parameters(), gradients, strict=True)]

    numbers = recipe.step(noisy, clean)
    torch.testing.assert_close(recipe.weights.detach(), weights, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(numbers["lower_loss"], (weights * losses).sum().detach(), rtol=1e-10, atol=0)
    for p, want in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-13)


def test_l2rw_of_images_that_all_do_harm_moves_nothing() -> None:
    torch.manual_seed(0)
    network, inputs = Linear().double(), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    # Class 0 as given, class 1 in truth: <e, e'> = (1/4 - 1) / 4 + 1/4 (1/4 - 1) + 2 / 16 = -1/4 at weights 0.
    noisy, clean = (Batch(inputs, torch.full((3,), label), torch.full((3,), label)) for label in (0, 1))
    noisy = noisy._replace(inputs=inputs[:1].repeat(3, 1))
    clean = clean._replace(inputs=inputs[:1].repeat(3, 1))
    recipe = LearningToReweight(Settings(method="l2rw", batch_size=3, **PLAIN), network)
    numbers = recipe.step(noisy, clean)
    assert recipe.weights.tolist() == [0, 0, 0]
    assert numbers["share_used"] == 0
    assert all(not p.any() for p in network.parameters())


def test_l2rw_takes_batches_that_are_smaller_than_the_batch_size() -> None:
    torch.manual_seed(0)
    recipe = LearningToReweight(Settings(method="l2rw", batch_size=20, **PLAIN), Linear().double())
    recipe.step(batch(9), batch(5))
    assert recipe.weights.sum().item() == pytest.approx(1)
    assert not recipe.weights[9:].any()


# --- mwnet ------------------------------------------------------------------------------------------------------------


def test_mwnet_moves_as_its_paper_says() -> None:
    torch.manual_seed(0)
    network, noisy, clean = Perceptron(4, pixels=6, hidden=5, features=3).double(), batch(9), batch(5)
    recipe = MetaWeightNet(Settings(method="mwnet", **PLAIN | {"momentum": 0.9, "weight_decay": 0.01}), network)
    net = recipe.networks["weights"]
    w, a = dict(network.named_parameters()), list(net.parameters())

    def losses(parameters: dict[str, Tensor], images: Batch) -> Tensor:
        logits, _ = functional_call(network, parameters, images.inputs)
        return -logits.log_softmax(1)[torch.arange(len(images.labels)), images.labels]

    def weights(values: list[Tensor], of: Tensor) -> Tensor:
        hidden = (of[:, None] @ values[0].T + values[1]).relu()
        return (hidden @ values[2].T + values[3]).sigmoid().squeeze(1)

    each = losses(w, noisy)
    lower = (weights(a, each.detach()) * each).mean()
    gradient = torch.autograd.grad(lower, list(w.values()), create_graph=True)
    ahead = {name: p.detach() - 0.3 * g for (name, p), g in zip(w.items(), gradient, strict=True)}  # no momentum
    upper = losses(ahead, clean).mean()
    meta = torch.autograd.grad(upper, a)
    # The first step of Adam, whose weight decay of 1e-4 is added to the gradient: lr * sign, up to eps.
    directions = [g + 1e-4 * p.detach() for p, g in zip(a, meta, strict=True)]
    new = [p.detach() - 1e-3 * d / (d.abs() + 1e-8) for p, d in zip(a, directions, strict=True)]
    each = losses(w, noisy)
    trained = torch.autograd.grad((weights(new, each.detach()) * each).mean(), list(w.values()))
    expected = [p.detach() - 0.3 * (g + 0.01 * p.detach()) for p, g in zip(w.values(), trained, strict=True)]

    found = recipe.bilevel.directions(clean, noisy).upper
    for got, want in zip(found.values(), meta, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)
    numbers = recipe.step(noisy, clean)
    torch.testing.assert_close(numbers["upper_loss"], upper.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(numbers["lower_loss"], lower.detach(), rtol=1e-10, atol=0)
    for p, want in zip([*a, *w.values()], [*new, *expected], strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-8, atol=1e-12)
