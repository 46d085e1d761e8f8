"""What a finished run leaves behind: the end line, its numbers as JSON, and the table of corrected labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from examples.noisy_labels.data import table as tables
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes.recipe import Recipe
from examples.noisy_labels.run import evaluation
from examples.noisy_labels.run.files import replacing
from examples.noisy_labels.run.log import Log, Record
from examples.noisy_labels.run.settings import Settings

RESULT = "result.json"  # written last: where it is, the run is finished
TRANSITION = "transition.csv"
SUSPECTS = 32  # on the contact sheet
Writer = Callable[[], None]


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
        "wrong": task.wrong,
        "epochs": len(epochs),
        "test_accuracy": last["test_accuracy"],
        "own": {name: last[name] for name in evaluation.RECOVERY},
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
    right, recovered, broken = (100 * shares[name] for name in evaluation.RECOVERY)
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


def write_corrected_labels(file: Path, task: Task, probabilities: Tensor, opinions: Tensor) -> None:
    """Write a CSV, one row per noisy image, in the order of the data set.

    Columns: ``index`` in the official order; ``given`` and ``corrected`` class by name; ``probability`` of the latter;
    ``suspicion``, the rank of the image when sorted by how improbable its given label is, 1 being the most suspicious.
    """
    probability, corrected = probabilities.max(1)
    columns = {
        "index": task.noisy.tolist(),
        "given": [task.names[i] for i in task.noisy_labels.tolist()],
        "corrected": [task.names[i] for i in corrected.tolist()],
        "probability": probability.tolist(),
        "suspicion": suspicion_rank(opinions, task.noisy_labels).tolist(),
    }
    tables.write(file, columns)


def draw(folder: Path, task: Task, log: Log, title: str, probabilities: Tensor, opinions: Tensor) -> list[Writer]:
    """Return what draws each picture of the run."""
    from examples.noisy_labels.report import pictures  # matplotlib takes a second to import

    true, given, corrected = task.true_labels, task.noisy_labels, probabilities.argmax(1)
    wrong = int((true != given).sum())
    numbers = {"test_accuracy": len(task.test), "right": len(true), "recovered": wrong, "broken": len(true) - wrong}
    drawn = (("given", given), ("corrected", corrected))
    labels = [
        pictures.Labels(true, one, "true class", f"{name} label", headline(name, true, one)) for name, one in drawn
    ]
    suspects = suspicion_rank(opinions, given).argsort()[:SUSPECTS]
    caught = int((given[suspects] != true[suspects]).sum())
    found = f"{caught} of these {len(suspects)} given labels are wrong. ✓: corrected to the true class"
    sheet = [_suspect(task, one, int(corrected[one])) for one in suspects.tolist()]
    return [
        lambda: pictures.curves(folder / "curves.png", log.epochs(), title, numbers, wrong / len(true)),
        lambda: pictures.label_heatmap(folder / "labels.png", labels, task.names, title),
        lambda: pictures.contact_sheet(
            folder / "suspicious.png",
            [pictures.Suspect(*one) for one in sheet],
            f"The most suspicious labels, {title}\n{found}; ✗: not",
        ),
    ]


def headline(name: str, true: Tensor, labels: Tensor) -> str:
    """Return how many of some labels are right."""
    return f"{name} labels: {100 * (labels == true).double().mean().item():.1f} % right"


def _suspect(task: Task, one: int, corrected: int) -> tuple[Tensor, str, bool]:
    """Return a noisy image, the words about its labels, and whether it was corrected to a wrong class."""
    place, true = int(task.noisy[one]), int(task.true_labels[one])
    given, now, truth = (task.names[i].replace("_", " ") for i in (int(task.noisy_labels[one]), corrected, true))
    words = f"image {place}\ngiven: {given}\nnow: {now} {'✓' if corrected == true else '✗'}"
    return task.samples[place], words if corrected == true else f"{words}\ntrue: {truth}", corrected != true


def suspicion_rank(probabilities: Tensor, given: Tensor) -> Tensor:
    """Rank images by the probability of their given label, the least probable first, from 1 on."""
    of_given = probabilities.gather(1, given.unsqueeze(1)).squeeze(1)
    order = of_given.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1, device=order.device)
    return rank
