"""What a finished run leaves behind for people: the table of corrected labels and the end line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.noisy_labels.data import table as tables
from examples.noisy_labels.data.samples import Samples
from examples.noisy_labels.report.results import suspicion_rank
from examples.noisy_labels.run.files import replacing
from examples.noisy_labels.run.log import Log
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.verdict.judging import Outcome

LOOK_FIRST, SUSPECTS = 3, 32  # samples in the end line, and on the contact sheet


@dataclass(frozen=True)
class Corrected:
    """The labels of the samples that nobody checked, in their order.

    Args:
        labels: Position of the class.
        probability: Of that label.
        suspicion: Rank by how improbable the given label is, from 1 on.
        actions: keep, change or check; None without a verdict.
    """

    labels: list[int]
    probability: list[float]
    suspicion: list[int]
    actions: list[str] | None = None


def corrected(samples: Samples, probabilities: Tensor) -> Corrected:
    """Return the most probable labels."""
    probability, labels = probabilities.max(1)
    suspicion = suspicion_rank(probabilities, samples.majority[samples.noisy])
    return Corrected(labels.tolist(), probability.tolist(), suspicion.tolist())


def of_outcome(samples: Samples, outcome: Outcome) -> Corrected:
    """Return the labels of the way that was taken."""
    rows = samples.noisy.cpu().numpy()
    labels = outcome.labels[rows]
    probability = outcome.probabilities[rows, labels]
    actions = [str(one) for one in outcome.actions[rows]]
    return Corrected(labels.tolist(), probability.tolist(), outcome.suspicion[rows].tolist(), actions)


def write_corrected_labels(file: Path, samples: Samples, labels: Corrected, *, votes: bool) -> None:
    """Write a CSV or Parquet file, one row per sample that is not trusted, in the order of the user's file.

    Args:
        file: Where to write.
        samples: All samples.
        labels: Their labels.
        votes: Whether to add a column with the votes, such as ``cat:2 dog:1``.
    """
    columns: dict[str, Sequence[Any]] = {
        "id": [samples.ids[i] for i in samples.noisy.tolist()],
        "given": [samples.names[i] for i in samples.majority[samples.noisy].tolist()],
        "corrected": [samples.names[i] for i in labels.labels],
        "probability": labels.probability,
        "suspicion": labels.suspicion,
    }
    if labels.actions is not None:
        columns["action"] = labels.actions
    if votes:
        counts = samples.votes[samples.noisy].long().tolist()
        named = [[f"{name}:{n}" for name, n in zip(samples.names, row, strict=True) if n] for row in counts]
        columns["votes"] = [" ".join(one) for one in named]
    tables.write(file, columns)


def write_check_next(file: Path, samples: Samples, outcome: Outcome) -> None:
    """Write the samples to check next, the least sure first, with the label that they would get."""
    chosen = outcome.check_next.tolist()
    given = samples.majority.tolist()
    columns: dict[str, Sequence[Any]] = {
        "id": [samples.ids[i] for i in chosen],
        "given": [samples.names[given[i]] for i in chosen],
        "corrected": [samples.names[outcome.labels[i]] for i in chosen],
        "probability": [float(outcome.probabilities[i, outcome.labels[i]]) for i in chosen],
    }
    tables.write(file, columns)


def write_verdict(folder: Path, outcome: Outcome) -> None:
    """Write the verdict as text and as JSON."""
    with replacing(folder / "verdict.txt") as stream:
        stream.write(f"{outcome.report}\n".encode())
    with replacing(folder / "verdict.json") as stream:
        stream.write((json.dumps(outcome.report.to_dict(), indent=1) + "\n").encode())


def most_suspicious(samples: Samples, labels: Corrected, number: int) -> list[tuple[int, str, str]]:
    """Return positions, given and corrected label of the samples whose given label is the least probable."""
    given, noisy = samples.majority[samples.noisy].tolist(), samples.noisy.tolist()
    order = sorted(range(len(noisy)), key=lambda i: labels.suspicion[i])[:number]
    return [(noisy[i], samples.names[given[i]], samples.names[labels.labels[i]]) for i in order]


def draw(folder: Path, samples: Samples, labels: Corrected, log: Log, options: Options, way: str) -> None:
    """Draw the curves of training, which labels became which, and of images the most suspicious ones."""
    from examples.noisy_labels.report import pictures  # matplotlib takes a second to import

    told = int(samples.has_given[samples.test].sum())
    numbers = {"test_accuracy": len(samples.test), "right": told, "given_right": told}
    of_method, title = (f"{name} on {options.title}, seed {options.seed}" for name in (options.method, way))
    pictures.curves(folder / "curves.png", log.epochs(), of_method, numbers)
    given, corrected = samples.majority[samples.noisy].cpu(), torch.tensor(labels.labels)
    headline = f"{int((given != corrected).sum())} of {len(given)} labels changed"
    heatmap = pictures.Labels(given, corrected, "given label", "corrected label", headline)
    pictures.label_heatmap(folder / "labels.png", [heatmap], samples.names, title)
    if samples.samples.ndim == 4:
        chosen = most_suspicious(samples, labels, SUSPECTS)
        sheet = [
            pictures.Suspect(samples.samples[i], "\n".join(map(pictures.short, (samples.ids[i], f"{given} →", new))))
            for i, given, new in chosen
        ]
        headline = f"{title}: the most suspicious labels, id and given → corrected"
        pictures.contact_sheet(folder / "suspicious.png", sheet, headline)


def describe(samples: Samples, source: str) -> str:
    """Return how many samples of which kind there are."""
    votes = samples.votes[samples.noisy]
    line = (
        f"{source}: {len(samples.noisy)} samples to correct, {len(samples.clean)} trusted, "
        f"{len(samples.test)} held out, {len(samples.names)} classes"
    )
    if votes.sum() > len(votes):
        several = votes.sum(1) > 1
        disagree = (votes > 0).sum(1)[several] > 1
        line += (
            f"; {votes.sum().item() / len(votes):.2f} votes a sample, annotators disagree on "
            f"{100 * disagree.double().mean().item():.1f} % of those with several"
        )
    return line


def end_line(options: Options, samples: Samples, labels: Corrected, log: Log, outcome: Outcome | None) -> str:
    """Return what came out, and what to look at first."""
    last = log.epochs()[-1]
    given = samples.majority[samples.noisy].tolist()
    changed = sum(new != old for new, old in zip(labels.labels, given, strict=True))
    held_out = len(samples.test)
    parts = [f"{changed} of {len(samples.noisy)} labels changed"]
    if held_out:
        accuracy = last["test_accuracy"]
        # Of a share near 0 or 1 the plain standard error would be 0: two successes and two failures are added.
        centre = (accuracy * held_out + 2) / (held_out + 4)
        error = 100 * math.sqrt(centre * (1 - centre) / (held_out + 4))
        parts.append(f"held-out accuracy {100 * accuracy:.1f} % (standard error {error:.1f}, {held_out} samples)")
    elif outcome is None:
        parts.append("nothing held out, so nothing is known about its accuracy")
    if outcome is None and "right" in last:
        parts.append(f"labels of held-out samples: {_of(last, 'given_right')} right as given, {_of(last, 'right')} now")
    if outcome is not None:
        parts.append(outcome.report.summary())
    suspects = most_suspicious(samples, labels, LOOK_FIRST)
    first = ", ".join(f"{samples.ids[i]} ({old} -> {new})" for i, old, new in suspects)
    advice = f"Look first at suspicion 1, 2, 3 in corrected_labels.csv: {first}"
    if outcome is None and last.get("right", 1.0) < last.get("given_right", 0.0):
        advice = f"Fewer of the held-out labels are right than as given: ask for a verdict (--folds 5). {advice}"
    way = options.method if outcome is None else outcome.report.way
    return f"{way} on {options.title}, seed {options.seed}: {'; '.join(parts)}. {advice}"


def _of(record: dict[str, Any], name: str) -> str:
    return f"{100 * record[name]:.1f} %"
