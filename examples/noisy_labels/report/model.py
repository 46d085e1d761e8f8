"""The trained model as one file: networks, class names, standardisation, and how columns become numbers.

Example::

    from examples.noisy_labels.report.model import load

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
from examples.noisy_labels.recipes import models
from examples.noisy_labels.recipes.models import Corrector, Perceptron, ResNet
from examples.noisy_labels.run import checkpoint
from examples.noisy_labels.run.evaluation import CHUNK
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.run.training import Run

NAME = "model.pt"
FORMAT = 2


@dataclass(frozen=True)
class Model:
    """A trained classifier and, if there is one, corrector.

    Args:
        names: Names of the classes, in the order of the probabilities.
        classifier: From standardised inputs to logits and features.
        corrector: From features and given labels to probabilities; None for methods without one.
        mean, std: What standardises inputs, as read.
        encoding: How columns become numbers, None for images.
        image_size: Width and height of images.
    """

    names: tuple[str, ...]
    classifier: ResNet | Perceptron
    corrector: Corrector | None
    mean: Tensor
    std: Tensor
    encoding: Encoding | None
    image_size: int

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Return the classifier's probabilities (samples, classes) for inputs as `read_table` or `images.read` give."""
        return self.correct(inputs, None)

    @torch.no_grad()
    def correct(self, inputs: Tensor, given: Tensor | None) -> Tensor:
        """Return probabilities of the true class, given inputs and labels: classes, or shares of votes."""
        parts = []
        for at in torch.arange(len(inputs)).split(CHUNK):
            logits, seen = self.classifier((inputs[at].to(self.mean) - self.mean) / self.std)
            predicted = functional.softmax(logits, dim=1)
            if given is not None and self.corrector is not None:
                predicted = (predicted + self.corrector(seen, given[at].to(self.mean.device))) / 2
            parts.append(predicted)
        return torch.cat(parts)

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


def save(file: Path, run: Run, settings: Options, encoding: Encoding | None) -> None:
    """Write the model: tensors and plain values only."""
    networks, task = run.recipe.networks, run.task
    corrector = networks.get("corrector")
    content = {
        "format": FORMAT,
        "names": list(task.names),
        "network": settings.network,
        "corrector_network": settings.corrector,
        "image_size": settings.image_size,
        "encoding": None if encoding is None else encoding.to_dict(),
        "mean": task.mean,
        "std": task.std,
        "classifier": networks.get("averaged", run.recipe.classifier).state_dict(),
        "corrector": None if corrector is None else corrector.state_dict(),
    }
    checkpoint.save(file, content)


def load(file: str | Path, device: str = "cpu") -> Model:
    """Read a model; nothing but tensors and plain values is accepted, so a foreign file cannot run code."""
    content = checkpoint.load(Path(file), "format")
    if content["format"] != FORMAT:
        rule = f"the format is {content['format']}, and must be {FORMAT}"
        raise ValueError(f"Model({file}): {rule}. Is it a model.pt of this version?")
    names, mean, std = tuple(content["names"]), content["mean"].to(device), content["std"].to(device)
    classifier = models.classifier(content["network"], len(names), mean.numel())
    classifier.load_state_dict(content["classifier"])
    corrector = None
    if content["corrector"] is not None:
        corrector = models.corrector(content["corrector_network"], classifier.features, len(names))
        corrector.load_state_dict(content["corrector"])
        corrector.to(device).eval()
    encoding = content["encoding"]
    if encoding is not None:
        categories = {name: tuple(known) for name, known in encoding["categories"].items()}
        encoding = Encoding(**encoding | {"numeric": tuple(encoding["numeric"]), "categories": categories})
    return Model(names, classifier.to(device).eval(), corrector, mean, std, encoding, content["image_size"])
