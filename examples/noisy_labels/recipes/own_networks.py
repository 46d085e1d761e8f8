"""The networks: those of the flagship, for inputs of any width and for votes instead of one label."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.recipes.models import Corrector, Perceptron, ResNet


class Normalised(nn.Module):
    """A classifier with its standardisation, so that the two are never separated.

    Args:
        network: Returns logits and features.
        mean, std: What is subtracted from the inputs, and what they are then divided by.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: ResNet | Perceptron, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network, self.features = network, network.features
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = self.network((x.to(self.mean.dtype) - self.mean) / self.std)
        return logits, features


class VoteCorrector(Corrector):
    """The corrector, told the distribution of the votes instead of one label.

    What enters is the mean of the embeddings of the classes that were voted for. If there was one vote, or all agree,
    that is the plain corrector.
    """

    def forward(self, features: Tensor, given: Tensor) -> Tensor:
        joined = torch.cat([features, given @ self.embedding.weight], dim=1)
        return functional.softmax(self.layers(joined), dim=1)


def classifier(network: str, shape: tuple[int, ...], classes: int) -> ResNet | Perceptron:
    """Build the classifier for inputs of a shape, without the batch dimension."""
    match network:
        case "mlp":
            return Perceptron(classes, pixels=torch.Size(shape).numel())
        case "small":
            return ResNet(classes, blocks=1, stem_stride=2)
        case "resnet32":
            return ResNet(classes)
    raise ValueError(f"classifier({network!r}): must be mlp, small or resnet32.")


def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature, or of each channel of images; 1 where nothing varies."""
    if inputs.ndim == 2:
        mean, std = inputs.double().mean(0), inputs.double().std(0, correction=0)
    else:
        # In integers: exact, without a copy of all images in floating point.
        count = inputs.numel() / inputs.shape[1]
        total = inputs.sum((0, 2, 3), dtype=torch.int64).double()
        squares = torch.stack([one.long().square().sum((1, 2)) for one in inputs]).sum(0).double()
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    return mean.float(), std.where(std > 0, 1.0).float()
