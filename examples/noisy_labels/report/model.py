"""The trained model as one file: networks, class names, standardisation, and how columns become numbers.

Example::

    from examples.noisy_labels.own.model import load

    model = load("runs/crowd/model.pt")
    model.predict_table("new.csv")  # class names; model.predict_images([...]) for images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.noisy_labels.data import images
from examples.noisy_labels.data import table as tables
from examples.noisy_labels.data.features import Encoding
from examples.noisy_labels.recipes import own_networks as networks
from examples.noisy_labels.recipes.own_networks import Normalised, VoteCorrector
from examples.noisy_labels.run import checkpoint
from examples.noisy_labels.run.own_run import CHUNK, Run

NAME = "model.pt"
FORMAT = 1


@dataclass(frozen=True)
class Model:
    """A trained classifier and, if there is one, corrector.

    Args:
        names: Names of the classes, in the order of the probabilities.
        classifier: From inputs, as read, to logits and features.
        corrector: From features and shares of votes to probabilities; None for methods without one.
        encoding: How columns become numbers, None for images.
        image_size: Width and height of images.
    """

    names: tuple[str, ...]
    classifier: Normalised
    corrector: VoteCorrector | None
    encoding: Encoding | None
    image_size: int

    @torch.no_grad()
    def probabilities(self, inputs: Tensor) -> Tensor:
        """Return the classifier's probabilities (samples, classes) for inputs as `read_table` or `images.read` give."""
        device = self.classifier.mean.device
        parts = [functional.softmax(self.classifier(part.to(device))[0], dim=1) for part in inputs.split(CHUNK)]
        return torch.cat(parts)

    @torch.no_grad()
    def correct(self, inputs: Tensor, shares: Tensor) -> Tensor:
        """Return probabilities of the true class, given inputs and shares of votes, as in ``corrected_labels.csv``."""
        classifier = self.probabilities(inputs)
        if self.corrector is None:
            return classifier
        device = self.classifier.mean.device
        parts = [
            self.corrector(self.classifier(one.to(device))[1], votes.to(device))
            for one, votes in zip(inputs.split(CHUNK), shares.split(CHUNK), strict=True)
        ]
        return (classifier + torch.cat(parts)) / 2

    def read_table(self, file: str | Path, *, delimiter: str | None = None, encoding: str = "utf-8-sig") -> Tensor:
        """Return the features in a CSV file; it needs the columns that the model was trained on, in any order."""
        if self.encoding is None:
            raise ValueError("Model.read_table: the model was trained on images. Use predict_images.")
        return self.encoding.encode(tables.read(Path(file), delimiter=delimiter, encoding=encoding))

    def predict(self, inputs: Tensor) -> list[str]:
        """Return the most probable class of each input."""
        return [self.names[i] for i in self.probabilities(inputs).argmax(1).tolist()]

    def predict_table(self, file: str | Path, **reading: Any) -> list[str]:
        """Return the most probable class of each row of a CSV file."""
        return self.predict(self.read_table(file, **reading))

    def predict_images(self, files: Sequence[str | Path]) -> list[str]:
        """Return the most probable class of each image file."""
        if self.encoding is not None:
            raise ValueError("Model.predict_images: the model was trained on a table. Use predict_table.")
        return self.predict(images.read(map(Path, files), self.image_size))


def save(file: Path, run: Run, encoding: Encoding | None) -> None:
    """Write the model: tensors and plain values only."""
    corrector = run.method.corrector.state_dict() if run.options.method == "ebomlc" else None
    content = {
        "format": FORMAT,
        "names": list(run.samples.names),
        "network": run.options.network,
        "method": run.options.method,
        "shape": list(run.samples.inputs.shape[1:]),
        "image_size": run.options.image_size,
        "encoding": None if encoding is None else encoding.to_dict(),
        "classifier": run.method.classifier.state_dict(),
        "corrector": corrector,
    }
    checkpoint.save(file, content)


def load(file: str | Path, device: str = "cpu") -> Model:
    """Read a model; nothing but tensors and plain values is accepted, so a foreign file cannot run code."""
    content = checkpoint.load(Path(file))
    if content.get("format") != FORMAT:
        rule = f"the format is {content.get('format')}, and must be {FORMAT}"
        raise ValueError(f"Model({file}): {rule}. Is it a model.pt of this version?")
    names, weights = tuple(content["names"]), content["classifier"]
    network = networks.classifier(content["network"], tuple(content["shape"]), len(names))
    corrector = None if content["corrector"] is None else VoteCorrector(network.features, len(names))
    classifier = Normalised(network, weights["mean"], weights["std"])
    classifier.load_state_dict(weights)
    if corrector is not None:
        corrector.load_state_dict(content["corrector"])
        corrector.to(device).eval()
    encoding = content["encoding"]
    if encoding is not None:
        categories = {name: tuple(known) for name, known in encoding["categories"].items()}
        encoding = Encoding(**encoding | {"numeric": tuple(encoding["numeric"]), "categories": categories})
    return Model(names, classifier.to(device).eval(), corrector, encoding, content["image_size"])
