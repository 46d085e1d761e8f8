"""What a finished run leaves behind for people: the table of corrected labels and the end line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.noisy_labels.data.parquet import PARQUET, write_parquet
from examples.noisy_labels.data.samples import Samples
from examples.noisy_labels.report.results import suspicion_rank
from examples.noisy_labels.run.files import replacing
from examples.noisy_labels.run.log import Log
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.verdict.judging import Outcome

SHOWN = 3  # samples in the end line


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
    suspicion = suspicion_rank(probabilities, samples.given[samples.noisy])
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
        "given": [samples.names[i] for i in samples.given[samples.noisy].tolist()],
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
    _write(file, columns)


def write_check_next(file: Path, samples: Samples, outcome: Outcome) -> None:
    """Write the samples to check next, the least sure first, with the label that they would get."""
    chosen = outcome.check_next.tolist()
    given = samples.given.tolist()
    columns: dict[str, Sequence[Any]] = {
        "id": [samples.ids[i] for i in chosen],
        "given": [samples.names[given[i]] for i in chosen],
        "corrected": [samples.names[outcome.labels[i]] for i in chosen],
        "probability": [float(outcome.probabilities[i, outcome.labels[i]]) for i in chosen],
    }
    _write(file, columns)


def write_verdict(folder: Path, outcome: Outcome) -> None:
    """Write the verdict as text and as JSON."""
    with replacing(folder / "verdict.txt") as stream:
        stream.write(f"{outcome.report}\n".encode())
    with replacing(folder / "verdict.json") as stream:
        stream.write((json.dumps(outcome.report.to_dict(), indent=1) + "\n").encode())


def most_suspicious(samples: Samples, labels: Corrected, number: int) -> list[tuple[int, str, str]]:
    """Return positions, given and corrected label of the samples whose given label is the least probable."""
    given, noisy = samples.given[samples.noisy].tolist(), samples.noisy.tolist()
    order = sorted(range(len(noisy)), key=lambda i: labels.suspicion[i])[:number]
    return [(noisy[i], samples.names[given[i]], samples.names[labels.labels[i]]) for i in order]


def describe(samples: Samples, source: str) -> str:
    """Return how many samples of which kind there are."""
    votes = samples.votes[samples.noisy]
    line = (
        f"{source}: {len(samples.noisy)} samples to correct, {len(samples.trusted)} trusted, "
        f"{len(samples.held_out)} held out, {len(samples.names)} classes"
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
    given = samples.given[samples.noisy].tolist()
    changed = sum(new != old for new, old in zip(labels.labels, given, strict=True))
    held_out = len(samples.held_out)
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
    first = ", ".join(f"{samples.ids[i]} ({old} -> {new})" for i, old, new in most_suspicious(samples, labels, SHOWN))
    advice = f"Look first at suspicion 1, 2, 3 in corrected_labels.csv: {first}"
    if outcome is None and last.get("right", 1.0) < last.get("given_right", 0.0):
        advice = f"Fewer of the held-out labels are right than as given: ask for a verdict (--folds 5). {advice}"
    way = options.method if outcome is None else outcome.report.way
    return f"{way} on {options.source}, seed {options.seed}: {'; '.join(parts)}. {advice}"


def _of(record: dict[str, Any], name: str) -> str:
    return f"{100 * record[name]:.1f} %"


def _write(file: Path, columns: dict[str, Sequence[Any]]) -> None:
    """Write columns as Parquet or CSV, as the file is called; probabilities in CSV with four digits."""
    if file.suffix == PARQUET:
        write_parquet(file, columns)
        return
    written = [
        [f"{one:.4f}" for one in values] if name == "probability" else values for name, values in columns.items()
    ]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*written, strict=True))
    with replacing(file) as stream:
        stream.write(text.getvalue().encode())
