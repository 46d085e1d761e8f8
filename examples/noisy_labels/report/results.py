"""What a finished run leaves behind: the end line, its numbers as JSON, and the table of corrected labels."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from examples.noisy_labels.data import noise
from examples.noisy_labels.data.pools import Task
from examples.noisy_labels.recipes.recipe import Recipe
from examples.noisy_labels.run import evaluation
from examples.noisy_labels.run.files import replacing
from examples.noisy_labels.run.log import Log, Record
from examples.noisy_labels.run.settings import Settings

RESULT = "result.json"  # written last: where it is, the run is finished
TRANSITION = "transition.csv"
RECOVERY = ("right", "recovered", "broken")


def summary(settings: Settings, task: Task, recipe: Recipe, log: Log, transition: Tensor, bayes: Tensor) -> Record:
    """Return the numbers of a finished run.

    ``own`` is label recovery by the method's own rule, ``bayes`` by Bayes' rule, with a transition matrix that was
    ``counted`` by the method, estimated on ``trusted`` images, or the one of largest ``likelihood``; see `decoding.py`.

    Args:
        settings, task, recipe, log: The run.
        transition: The matrix of Bayes' rule.
        bayes: Its labels, as probabilities.
    """
    epochs = log.epochs()
    last, seconds = epochs[-1], [record["seconds"] for record in epochs]
    return {
        "method": settings.method,
        "setting": settings.title,
        "seed": settings.seed,
        "noisy": len(task.noisy),
        "clean": len(task.clean),
        "test": len(task.test),
        "wrong": noise.realised_rate(task.true, task.given),
        "epochs": len(epochs),
        "test_accuracy": last["test_accuracy"],
        "own": {name: last[name] for name in RECOVERY},
        "bayes": evaluation.recovery(bayes, task),
        "transition_from": recipe.transition_from,
        "transition_diagonal": transition.diagonal().mean().item(),
        "seconds": sum(seconds),
        "seconds_per_epoch": median(seconds),
    }


def end_line(settings: Settings, numbers: Record) -> str:
    """Return one line: method, setting, test accuracy, labels right before and after by both rules, time per epoch."""
    return (
        f"{settings.method} on {settings.title}, seed {settings.seed}: "
        f"test accuracy {100 * numbers['test_accuracy']:.1f} %, "
        f"labels right {100 * (1 - numbers['wrong']):.1f} % before and {_recovery(numbers['own'])} after, "
        f"by Bayes' rule {_recovery(numbers['bayes'])}, "
        f"{numbers['seconds'] / numbers['epochs']:.1f} s per epoch"
    )


def _recovery(shares: dict[str, float]) -> str:
    right, recovered, broken = (100 * shares[name] for name in RECOVERY)
    return f"{right:.1f} % (wrong ones recovered {recovered:.1f} %, right ones broken {broken:.1f} %)"


def write_summary(file: Path, numbers: Record) -> None:
    """Write the numbers as JSON."""
    with replacing(file) as stream:
        stream.write((json.dumps(numbers, indent=1) + "\n").encode())


def write_transition(file: Path, transition: Tensor) -> None:
    """Write a transition matrix as CSV, one row a true class, as ``--noise matrix`` reads it."""
    rows = "\n".join(",".join(f"{share:.8f}" for share in row) for row in transition.tolist())
    with replacing(file) as stream:
        stream.write((rows + "\n").encode())


def write_corrected_labels(file: Path, task: Task, probabilities: Tensor) -> None:
    """Write a CSV, one row per noisy image, in the order of the data set.

    Columns: ``index`` in the official order; ``given`` and ``corrected`` class by name; ``probability`` of the latter;
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
    names = task.names
    writer.writerows([index, names[given], names[new], f"{p:.4f}", rank] for index, given, new, p, rank in rows)
    with replacing(file) as stream:
        stream.write(text.getvalue().encode())


def suspicion_rank(probabilities: Tensor, given: Tensor) -> Tensor:
    """Rank images by the probability of their given label, the least probable first, from 1 on."""
    of_given = probabilities.gather(1, given.unsqueeze(1)).squeeze(1)
    order = of_given.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1, device=order.device)
    return rank
