"""The classifiers and the corrector.

Every classifier returns its logits and the features from which its last layer computes them; the corrector reads those
features, so its width depends on the classifier's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.recipes.precision import at_least_float32


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters: subsampled, padded with zero channels (option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(x)))
        hidden = self.second_norm(self.second(hidden))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return functional.relu(hidden + shortcut)


class ResNet(nn.Module):
    """Residual network for small images (He et al., 2016): three stages, the width doubled and the size halved twice.

    Args:
        classes: Number of logits.
        blocks: Residual blocks per stage; 5 give ResNet-32.
        width: Channels of the first stage.
        stem_stride: Stride of the first convolution; 2 makes everything four times cheaper.
    """

    def __init__(self, classes: int, blocks: int = 5, width: int = 16, stem_stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        channels_in = width
        for channels, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for block in range(blocks):
                stages.append(ResidualBlock(channels_in, channels, stride if block == 0 else 1))
                channels_in = channels
        self.stages = nn.Sequential(*stages)
        self.features = 4 * width
        self.head = nn.Linear(self.features, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.relu(self.stem_norm(self.stem(x)))
        features = self.stages(hidden).mean((2, 3))
        return self.head(features), features


class Perceptron(nn.Module):
    """Two hidden layers, for tables, and for the digits as 64 numbers."""

    def __init__(self, classes: int, inputs: int = 64, hidden: int = 128, features: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.last_hidden = nn.Linear(hidden, features)
        self.features = features
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.relu(self.hidden(x.flatten(1)))
        features = functional.relu(self.last_hidden(hidden))
        return self.head(features), features


class Corrector(nn.Module):
    """Meta network of MLC: from an image's features and its given label to a distribution over its true label.

    Of several annotators the given label is a share of each class, and what enters is the mean of the embeddings. If
    there was one vote, or all agree, that is the embedding of the label.

    Args:
        features: Number of features.
        classes: Number of labels.
        width: Size of the label's embedding and of the hidden layers.
        dropout: Share of the first hidden layer that is dropped; 0.3 in the code of EBOMLC.
        batch_norm: Whether the second hidden layer is normalised over the batch, as in the code of EBOMLC.
        normal_embedding: Draw the embedding from N(0, 1), as there, instead of Xavier's narrower uniform distribution.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        width: int = 128,
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        normal_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        layers: list[nn.Module] = [nn.Linear(features + width, width), nn.Tanh()]
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(width, width), nn.Tanh()]
        layers += [nn.BatchNorm1d(width)] if batch_norm else []
        self.layers = nn.Sequential(*layers, nn.Linear(width, classes))
        if not normal_embedding:
            nn.init.xavier_uniform_(self.embedding.weight)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, given: Tensor) -> Tensor:
        embedded = self.embedding(given) if given.ndim == 1 else given @ self.embedding.weight
        joined = torch.cat([features, embedded], dim=1)
        return functional.softmax(at_least_float32(self.layers(joined)), dim=1)


def corrector(name: str, features: int, classes: int) -> Corrector:
    """Build a corrector by the name it has on the command line."""
    match name:
        case "mlc":
            return Corrector(features, classes)
        case "released":
            return Corrector(features, classes, dropout=0.3, batch_norm=True, normal_embedding=True)
    raise ValueError(f"corrector({name!r}): must be mlc or released.")


def classifier(network: str, classes: int, inputs: int = 64) -> ResNet | Perceptron:
    """Build a classifier by the name it has on the command line; ``inputs`` counts what a perceptron reads."""
    match network:
        case "resnet32":
            return ResNet(classes)
        case "small":
            return ResNet(classes, blocks=1, stem_stride=2)
        case "mlp":
            return Perceptron(classes, inputs)
    raise ValueError(f"classifier({network!r}): must be resnet32, small or mlp.")
