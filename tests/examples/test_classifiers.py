"""The networks: shapes, sizes, first weights."""

from __future__ import annotations

import pytest
import torch

from examples.noisy_labels.recipes.models import Corrector, Perceptron, ResidualBlock, ResNet, classifier


@pytest.mark.parametrize(("name", "shape"), [("resnet32", (3, 32, 32)), ("small", (3, 32, 32)), ("mlp", (1, 8, 8))])
def test_classifiers_return_logits_and_features(name: str, shape: tuple[int, ...]) -> None:
    network = classifier(name, 7)
    logits, features = network(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    assert features.shape == (4, network.features)
    torch.testing.assert_close(logits, network.head(features))


def test_resnet32_is_the_published_size() -> None:
    network = ResNet(10)
    # 464,154 = convolutions 432 + 23,040 + 87,552 + 350,208 - 0 shortcuts, batch norms 2,272, head 650.
    assert sum(parameter.numel() for parameter in network.parameters()) == 464_154
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in network.modules()) == 31  # + the head = 32 layers
    assert network.features == 64


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = ResidualBlock(4, 8, stride=2)
    torch.nn.init.zeros_(block.second_norm.weight)  # leaves the shortcut alone
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].sum() == y[:, 6:].sum() == 0


def test_convolutions_start_as_he_proposed() -> None:
    torch.manual_seed(0)
    weight = ResNet(10).stages[-1].second.weight
    # Kaiming normal: standard deviation sqrt(2 / fan_in), fan_in = 64 * 9; 36,864 draws.
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_corrector_is_the_meta_network_of_mlc() -> None:
    corrector = Corrector(features=64, classes=10)
    features, given = torch.randn(5, 64), torch.tensor([0, 1, 2, 3, 9])
    answer = corrector(features, given)
    layers = corrector.layers
    hidden = torch.cat([features, corrector.embedding.weight[given]], 1)
    hidden = torch.tanh(hidden @ layers[0].weight.T + layers[0].bias)
    hidden = torch.tanh(hidden @ layers[2].weight.T + layers[2].bias)
    torch.testing.assert_close(answer, torch.softmax(hidden @ layers[4].weight.T + layers[4].bias, 1))
    assert corrector.embedding.weight.shape == (10, 128)
    assert layers[0].weight.shape == (128, 192)
    bound = (6 / (10 + 128)) ** 0.5  # Xavier uniform
    assert corrector.embedding.weight.abs().max() <= bound
    assert layers[0].weight.std().item() == pytest.approx((2 / (192 + 128)) ** 0.5, rel=0.05)  # Xavier normal


def test_perceptron_takes_images() -> None:
    assert Perceptron(10)(torch.randn(2, 1, 8, 8))[0].shape == (2, 10)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="must be resnet32, small or mlp"):
        classifier("vit", 10)
