"""What a finished run leaves behind for people: the table of corrected labels and the end line."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.noisy_labels.files import replacing
from examples.noisy_labels.log import Log
from examples.noisy_labels.own.options import Options
from examples.noisy_labels.own.samples import Samples
from examples.noisy_labels.results import suspicion_rank

SHOWN = 3  # samples in the end line


def write_corrected_labels(file: Path, samples: Samples, probabilities: Tensor, *, votes: bool) -> None:
    """Write a CSV, one row per noisy sample, in the order of the user's file.

    Args:
        file: Where to write.
        samples: All samples.
        probabilities: Of each class to be the true one, (noisy samples, classes).
        votes: Whether to add a column with the votes, such as ``cat:2 dog:1``.
    """
    given = samples.given[samples.noisy]
    probability, corrected = probabilities.max(1)
    counts = samples.votes[samples.noisy].long().tolist()
    columns: list[list[Any]] = [
        [samples.ids[i] for i in samples.noisy.tolist()],
        [samples.names[i] for i in given.tolist()],
        [samples.names[i] for i in corrected.tolist()],
        [f"{p:.4f}" for p in probability.tolist()],
        suspicion_rank(probabilities, given).tolist(),
    ]
    head = ["id", "given", "corrected", "probability", "suspicion"]
    if votes:
        head.append("votes")
        named = [[f"{name}:{n}" for name, n in zip(samples.names, row, strict=True) if n] for row in counts]
        columns.append([" ".join(one) for one in named])
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(head)
    writer.writerows(zip(*columns, strict=True))
    with replacing(file) as stream:
        stream.write(text.getvalue().encode())


def most_suspicious(samples: Samples, probabilities: Tensor, number: int) -> list[tuple[int, str, str]]:
    """Return positions, given and corrected label of the samples whose given label is the least probable."""
    given = samples.given[samples.noisy]
    order = suspicion_rank(probabilities, given).argsort()[:number].tolist()
    corrected = probabilities.argmax(1).tolist()
    return [(int(samples.noisy[i]), samples.names[int(given[i])], samples.names[corrected[i]]) for i in order]


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


def end_line(options: Options, samples: Samples, probabilities: Tensor, log: Log) -> str:
    """Return what came out, and what to look at first."""
    last = log.epochs()[-1]
    changed = int((probabilities.argmax(1) != samples.given[samples.noisy]).sum())
    held_out = len(samples.held_out)
    parts = [f"{changed} of {len(samples.noisy)} labels changed"]
    if held_out:
        accuracy = last["test_accuracy"]
        # Of a share near 0 or 1 the plain standard error would be 0: two successes and two failures are added.
        centre = (accuracy * held_out + 2) / (held_out + 4)
        error = 100 * math.sqrt(centre * (1 - centre) / (held_out + 4))
        parts.append(f"held-out accuracy {100 * accuracy:.1f} % (standard error {error:.1f}, {held_out} samples)")
    else:
        parts.append("nothing held out, so nothing is known about its accuracy")
    if "right" in last:
        parts.append(f"labels of held-out samples: {_of(last, 'given_right')} right as given, {_of(last, 'right')} now")
    first = ", ".join(
        f"{samples.ids[i]} ({given} -> {new})" for i, given, new in most_suspicious(samples, probabilities, SHOWN)
    )
    advice = f"Look first at suspicion 1, 2, 3 in corrected_labels.csv: {first}"
    if last.get("right", 1.0) < last.get("given_right", 0.0):
        advice = f"Correction made the held-out labels worse: keep the given ones, and see the docs. {advice}"
    return f"{options.method} on {options.source}, seed {options.seed}: {'; '.join(parts)}. {advice}"


def _of(record: dict[str, Any], name: str) -> str:
    return f"{100 * record[name]:.1f} %"
