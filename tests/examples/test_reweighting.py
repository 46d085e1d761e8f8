"""`l2rw`, `mwnet` and `pmwnet` against closed forms and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.recipes.learning_to_reweight import LearningToReweight
from examples.noisy_labels.recipes.meta_weight_net import MetaWeightNet
from examples.noisy_labels.recipes.models import Perceptron
from examples.noisy_labels.recipes.probabilistic_weight_net import PosteriorNet, ProbabilisticWeightNet, draw
from examples.noisy_labels.run.settings import Settings

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
    network, noisy, clean = Perceptron(4, inputs=6, hidden=5, features=3).double(), batch(9), batch(5)
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


# --- pmwnet -----------------------------------------------------------------------------------------------------------


def test_draws_are_of_the_beta_distribution_and_so_are_their_derivatives() -> None:
    count = 40_000
    a, b = (torch.full((count,), value, dtype=torch.float64, requires_grad=True) for value in (2.0, 3.0))
    v = draw(a, b, generator(1, "test"))
    # Mean 2/5 and variance ab / (a + b)^2 (a + b + 1) = 1/25: a standard error of .001.
    assert v.mean().item() == pytest.approx(0.4, abs=0.006)
    assert v.var().item() == pytest.approx(0.04, abs=0.002)
    # The mean of dv/da is d/da a / (a + b) = b / (a + b)^2 = 3/25, that of dv/db is -2/25.
    of_a, of_b = torch.autograd.grad(v.sum(), [a, b])
    assert of_a.mean().item() == pytest.approx(0.12, abs=0.004)
    assert of_b.mean().item() == pytest.approx(-0.08, abs=0.004)
    assert torch.equal(draw(a, b, generator(1, "test")), v)
    assert draw(torch.tensor([1e-3] * 9), torch.tensor([1e-3] * 9), generator(1, "test")).isfinite().all()


def test_pmwnet_moves_as_its_paper_says() -> None:
    torch.manual_seed(0)
    network = Perceptron(4, inputs=6, hidden=5, features=3).double()
    settings = Settings(method="pmwnet", **PLAIN | {"momentum": 0.9, "weight_decay": 0.01})
    recipe = ProbabilisticWeightNet(settings, network)
    net = recipe.networks["weights"]
    assert isinstance(net, PosteriorNet)
    w, theta = dict(network.named_parameters()), list(net.parameters())
    buffers = [torch.zeros_like(p) for p in w.values()]
    moments, squares = ([torch.zeros_like(p) for p in theta] for _ in range(2))

    def losses(parameters: dict[str, Tensor], images: Batch) -> Tensor:
        logits, _ = functional_call(network, parameters, images.inputs)
        return -logits.log_softmax(1)[torch.arange(len(images.labels)), images.labels]

    def posterior(values: list[Tensor], of: Tensor) -> list[Tensor]:
        hidden = [(of[:, None] @ values[k].T + values[k + 1]).relu() for k in (0, 4)]
        pairs = zip(hidden, (2, 6), strict=True)
        return [(1 + (h @ values[k].T + values[k + 1]).exp()).log().squeeze(1) + 1e-3 for h, k in pairs]

    def divergence(a: Tensor, b: Tensor, prior_a: Tensor, prior_b: Tensor) -> Tensor:
        """KL of Beta(a, b) from the prior: log B(a', b') / B(a, b) + (a - a') psi(a) + ... - (...) psi(a + b)."""

        def log_beta(x: Tensor, y: Tensor) -> Tensor:
            return x.lgamma() + y.lgamma() - (x + y).lgamma()

        shifted = (prior_a - a + prior_b - b) * (a + b).digamma()
        moved = (a - prior_a) * a.digamma() + (b - prior_b) * b.digamma()
        return log_beta(prior_a, prior_b) - log_beta(a, b) + moved + shifted

    before: list[Tensor] | None = None
    for step in (1, 2, 3):
        noisy, clean = batch(9), batch(5)
        each = losses(w, noisy)
        of = each.detach()
        prior = [torch.ones(9, dtype=torch.float64)] * 2 if before is None else posterior(before, of)
        a, b = posterior(theta, of)
        weights = draw(a, b, generator(settings.seed, f"weights {step - 1}"))
        gradient = torch.autograd.grad((weights * each).mean(), list(w.values()), create_graph=True)
        ahead = {name: p.detach() - 0.3 * g for (name, p), g in zip(w.items(), gradient, strict=True)}
        upper = losses(ahead, clean).mean() + 1e-3 * divergence(a, b, *prior).mean()
        meta = torch.autograd.grad(upper, theta)
        before = [p.detach().clone() for p in theta]
        new = []
        for p, g, m, s in zip(theta, meta, moments, squares, strict=True):  # Adam
            d = g + 1e-4 * p.detach()
            m.mul_(0.9).add_(0.1 * d)
            s.mul_(0.999).add_(0.001 * d * d)
            new.append(p.detach() - 1e-3 * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8))
        a, b = posterior(new, of)
        trained = torch.autograd.grad((a / (a + b) * losses(w, noisy)).mean(), list(w.values()))
        expected = []
        for p, g, buffer in zip(w.values(), trained, buffers, strict=True):
            buffer.mul_(0.9).add_(g + 0.01 * p.detach())
            expected.append(p.detach() - 0.3 * buffer)

        numbers = recipe.step(noisy, clean)
        torch.testing.assert_close(numbers["upper_loss"], upper.detach(), rtol=1e-9, atol=0)
        for p, want in zip([*theta, *w.values()], [*new, *expected], strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=1e-7, atol=1e-10)
