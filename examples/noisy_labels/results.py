"""What a finished run leaves behind for people: the end line and the table of corrected labels."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from examples.noisy_labels.data import Task
from examples.noisy_labels.files import replacing
from examples.noisy_labels.log import Log
from examples.noisy_labels.settings import Settings


def end_line(settings: Settings, log: Log) -> str:
    """Return one line: method, setting, test accuracy, label recovery, time per epoch."""
    epochs = log.epochs()
    last = epochs[-1]
    seconds = sum(record["seconds"] for record in epochs) / len(epochs)
    return (
        f"{settings.method} on {settings.title}, seed {settings.seed}: "
        f"test accuracy {100 * last['test_accuracy']:.1f} %, labels right {100 * last['right']:.1f} % "
        f"(wrong ones recovered {100 * last['recovered']:.1f} %, right ones broken {100 * last['broken']:.1f} %), "
        f"{seconds:.1f} s per epoch"
    )


def write_corrected_labels(file: Path, task: Task, probabilities: Tensor) -> None:
    """Write a CSV, one row per noisy image, in the order of the data set.

    Columns: ``index`` in the official order; ``given`` and ``corrected`` label; ``probability`` of the corrected label;
    ``suspicion``, the rank of the image when sorted by how improbable its given label is, 1 being the most suspicious.
    """
    probability, corrected = probabilities.max(1)
    rows = zip(
        task.noisy.tolist(),
        task.given.tolist(),
        corrected.tolist(),
        probability.tolist(),
        suspicion_rank(probabilities, task.given).tolist(),
        strict=True,
    )
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["index", "given", "corrected", "probability", "suspicion"])
    writer.writerows([index, given, new, f"{p:.4f}", rank] for index, given, new, p, rank in rows)
    with replacing(file) as stream:
        stream.write(text.getvalue().encode())


def suspicion_rank(probabilities: Tensor, given: Tensor) -> Tensor:
    """Rank images by the probability of their given label, the least probable first, from 1 on."""
    of_given = probabilities.gather(1, given.unsqueeze(1)).squeeze(1)
    order = of_given.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1, device=order.device)
    return rank
