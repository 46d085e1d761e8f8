"""From the user's files to samples. Everything is checked here, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from examples.noisy_labels.data import features, images, labels
from examples.noisy_labels.data import samples as own
from examples.noisy_labels.data import table as tables
from examples.noisy_labels.data.features import Encoding
from examples.noisy_labels.data.labels import Known
from examples.noisy_labels.data.samples import Samples, hold_out
from examples.noisy_labels.data.table import Table
from examples.noisy_labels.data.task import UNKNOWN
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.verdict.problem import Problem

LISTED = 6  # features in a note


@dataclass(frozen=True)
class Data:
    """What was read.

    Args:
        samples: The samples, on the CPU.
        encoding: How features became numbers, None for images.
        notes: What the user should know about his data, a line each.
        problem: The labels, annotator by annotator, and which of the trusted ones may judge.
    """

    samples: Samples
    encoding: Encoding | None
    notes: tuple[str, ...]
    problem: Problem


@dataclass(frozen=True)
class Parts:
    """The labels of all rows: votes, what each annotator answered, the trusted class or `UNKNOWN`, and the parts."""

    names: tuple[str, ...]
    votes: torch.Tensor
    annotations: np.ndarray
    labels: torch.Tensor
    noisy: torch.Tensor
    clean: torch.Tensor
    test: torch.Tensor


def read(options: Options) -> Data:
    """Read table, images and trusted ids."""
    folder = None if options.images is None else Path(options.images)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"Images({folder}): there is no such folder.")
    if folder is not None and options.table is None:
        table = images.folder_as_table(folder)
    else:
        table = tables.read(Path(options.table or ""), delimiter=options.delimiter, encoding=options.encoding)
    ids = labels.identifiers(table, options)
    columns = labels.label_columns(table, options)
    trusted = labels.known_labels(options.trusted, "Trusted", table, ids, options)
    test = {} if options.test is None else labels.known_labels(options.test, "Test", table, ids, options)
    if both := sorted(set(trusted) & set(test)):
        rule = f"{ids[both[0]]!r} is trusted, that is trained on, and for testing"
        raise ValueError(
            f"Test({options.test}): {rule}. A sample can be one of both; with neither list change --hold-out."
        )
    parts, notes = _labelled(table, ids, columns, trusted, test, options)
    problem = _problem(table, ids, parts, list(test), options)
    encoding = None
    if folder is not None:
        files = table.column(options.file_column, "file_column")
        inputs = images.read((folder / Path(file.replace("\\", "/")) for file in files), options.image_size)
    else:
        used = _features(table, columns, options)
        encoding = features.fit(table, options, used, torch.cat([parts.noisy, parts.clean]).tolist())
        inputs = encoding.encode(table)
        listed = list(encoding.numeric) + [f"{name} (one-hot)" for name in encoding.categories]
        more = f", ... and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
        notes.insert(0, f"features: {', '.join(listed[:LISTED])}{more}")
    samples = own.make(
        inputs, parts.votes, parts.labels, soft=options.annotators is not None, ids=tuple(ids), names=parts.names,
        noisy=parts.noisy, clean=parts.clean, test=parts.test, memory_format=options.memory_format,
    )  # fmt: skip
    return Data(samples, encoding, tuple(notes), problem)


def _labelled(
    table: Table, ids: Sequence[str], columns: tuple[str, ...], trusted: Known, test: Known, options: Options
) -> tuple[Parts, list[str]]:
    """Return the labels and parts of all rows, and notes."""
    rows, known = len(table), trusted | test
    cells = [table.column(name, "label") for name in columns]
    # All labels at once, so that 3 in one column and 3.0 in another are one class.
    flat = labels.canonical([cell for column in cells for cell in column] + list(known.values()))
    given = [flat[i * rows : (i + 1) * rows] for i in range(len(columns))]
    known = dict(zip(known, flat[len(columns) * rows :], strict=True))
    names = labels.class_names({one for one in flat if one})
    if len(names) < 2:
        rule = f"the labels name {len(names)} class{'es' if len(names) != 1 else ''} ({', '.join(names)})"
        raise ValueError(
            f"Table({table.file.name}, {', '.join(columns)}): {rule}, and two are needed. Is it the column?"
        )
    votes = labels.count_votes(given, names)
    position = {name: i for i, name in enumerate(names)} | {"": UNKNOWN}
    annotations = np.array([[position[cell] for cell in column] for column in given]).T.copy()
    answers = torch.full((rows,), UNKNOWN)
    for row, name in known.items():
        answers[row] = position[name]
    noisy = torch.where(answers == UNKNOWN)[0]
    for row in noisy[votes[noisy].sum(1) == 0][:1].tolist():
        rule = f"{ids[row]!r} has no label in {', '.join(columns)} and is not trusted"
        raise ValueError(f"Table({table.where(row)}): {rule}. Give it a label, or take the row out.")
    if len(noisy) == 0:
        rule = "all samples are trusted, so there is nothing to correct"
        raise ValueError(f"Table({table.file.name}): {rule}. Trust only those whose labels were checked.")
    kept, aside = torch.tensor(sorted(trusted), dtype=torch.long), torch.tensor(sorted(test), dtype=torch.long)
    for i, name in enumerate(names):
        if not (answers[kept] == i).any():
            rule = f"no sample of the class {name!r} is trusted ({int((votes[:, i] > 0).sum())} rows have this label)"
            advice = "Check a few and add them to the trusted ones, or correct the label if it is misspelt"
            raise ValueError(f"Trusted(class {name!r}): {rule}. {advice}.")
    if options.test is None:
        kept, aside = hold_out(answers, kept, options.held_out_share, options.seed)
    notes = []
    checked = torch.cat([kept, aside])
    checked = checked[votes[checked].sum(1) > 0]
    if len(checked) and bool((votes[checked].argmax(1) == answers[checked]).all()):
        # They come from the same column, or that column was corrected: as examples of mistakes they would mislead.
        votes[checked] = 0
        annotations[checked.numpy()] = UNKNOWN
        notes.append(
            "the given labels of all trusted samples are right: they do not show which mistakes are made, so the "
            f"corrector is told a random label for {100 * options.corrupt_clean:.0f} % of them"
        )
    return Parts(names, votes, annotations, answers, noisy, kept, aside), notes


def _problem(table: Table, ids: Sequence[str], parts: Parts, test: list[int], options: Options) -> Problem:
    """Return the labels as the ways to correct them see them; samples of ``--test`` teach and judge nothing here."""
    truth, judging = parts.labels.numpy().copy(), np.ones(len(ids), dtype=bool)
    truth[test], annotations = UNKNOWN, parts.annotations.copy()
    annotations[test] = UNKNOWN
    groups = None
    if options.groups is not None:
        groups = np.unique(table.column(options.groups, "groups"), return_inverse=True)[1]
    if options.suspicious is not None:
        for row in labels.rows_named(options.suspicious, "Suspicious", table, ids, options):
            if truth[row] == UNKNOWN:
                rule = f"{ids[row]!r} is not trusted. Only samples that were checked can be named here"
                raise ValueError(f"Suspicious({options.suspicious}): {rule}.")
            judging[row] = False
    return Problem(parts.names, annotations, truth, judging, groups)


def _features(table: Table, columns: tuple[str, ...], options: Options) -> list[str]:
    """Return the columns that are features, categorical ones included."""
    for role, names in (("ignore", options.ignore), ("features", options.features)):
        for name in names or ():
            table.column(name, role)
    used = {*columns, options.trusted_column, options.groups, options.id or "id"}
    if options.features is not None:
        if wrong := sorted(set(options.features) & used):
            rule = "is a label or an id, and would give the answer away"
            raise ValueError(f"--features {wrong[0]}: {rule}. Leave it out.")
        return list(options.features)
    left_out = used | set(options.ignore or ()) | set(table.unnamed)
    return [name for name in table.columns if name not in left_out]
