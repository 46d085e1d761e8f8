"""A small data set labelled by a crowd, made from a seed: ``python examples/noisy_labels/crowd.py --out FOLDER``.

The images are scikit-learn's 1,797 handwritten digits, as 64 numbers a row. The crowd is made up: annotators differ in
skill, in general and from class to class, most of their mistakes go to a digit that looks alike, so that they often
agree on the same wrong answer, and each of them saw only a part of the images. Written are

- ``crowd.csv``: ``id``, 64 pixels, and a column for each annotator, empty where he was not asked;
- ``trusted.csv``: ``id`` and ``label`` of a few images whose label is known;
- ``truth.csv``: ``id`` and ``label`` of all images, only for measuring: no method may read it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from examples.noisy_labels.data import noise, pools
from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.run.declaration import at_least
from examples.noisy_labels.run.files import refuse_unusable

CLASSES, FEWEST_A_CLASS = 10, 174  # images of the rarest digit
LOOKALIKE = {0: 6, 1: 7, 2: 7, 3: 8, 4: 9, 5: 3, 6: 0, 7: 1, 8: 3, 9: 4}
TO_LOOKALIKE = 0.7  # share of the mistakes that go to the digit that looks alike; the others go anywhere
BEST_SKILL, WORST_SKILL = 0.9, 0.5  # the annotators lie evenly between them
SPREAD_OVER_CLASSES = 0.1  # standard deviation, over the classes, of how often one annotator is right


@dataclass(frozen=True)
class Crowd:
    """Images and what the crowd calls them.

    Args:
        pixels: (images, 64), from 0 to 16.
        votes: (images, annotators), the class, or -1 where an annotator was not asked.
        true: (images,), the true class; only ``trusted`` may be used for training.
        trusted: Positions of the images whose true class is known.
        skills: (annotators, classes), how often an annotator is right on a class.
    """

    pixels: Tensor
    votes: Tensor
    true: Tensor
    trusted: Tensor
    skills: Tensor

    @property
    def counts(self) -> Tensor:
        """Return how many votes each class of each image has got, (images, classes)."""
        counts = torch.zeros(len(self.votes), CLASSES)
        for votes in self.votes.T:
            asked = votes >= 0
            counts[asked, votes[asked]] += 1
        return counts

    @property
    def majority(self) -> Tensor:
        """Return the class with the most votes; of several, the first."""
        return self.counts.argmax(1)


def make(seed: int, *, annotators: int = 5, coverage: float = 0.4, trusted_per_class: int = 10) -> Crowd:
    """Draw annotators, their votes and the trusted images. Each image is seen by one annotator at least."""
    pool = pools.digits()
    stream = generator(seed, "crowd")
    skills = torch.linspace(BEST_SKILL, WORST_SKILL, annotators).unsqueeze(1).expand(-1, CLASSES)
    skills = (skills + SPREAD_OVER_CLASSES * torch.randn(annotators, CLASSES, generator=stream)).clamp(0.2, 0.98)
    asked = torch.rand(len(pool.labels), annotators, generator=stream) < coverage
    someone = torch.randint(annotators, (len(pool.labels), 1), generator=stream)
    nobody = ~asked.any(1, keepdim=True)
    asked = asked | (nobody & (torch.arange(annotators) == someone))
    votes = torch.stack([noise.corrupt(pool.labels, confusion(one), stream) for one in skills], dim=1)
    everything = torch.arange(len(pool.labels))
    trusted, _ = pools.take(pool.labels, everything, CLASSES, trusted_per_class, stream)
    return Crowd(pool.pixels.flatten(1), votes.where(asked, -1), pool.labels, trusted, skills)


def confusion(skill: Tensor) -> Tensor:
    """Return how an annotator answers: rows are true classes, columns answers."""
    anywhere = (1 - TO_LOOKALIKE) / (CLASSES - 2)
    matrix = torch.full((CLASSES, CLASSES), anywhere, dtype=torch.float64)
    for one, other in LOOKALIKE.items():
        matrix[one, other] = TO_LOOKALIKE
    matrix = matrix.fill_diagonal_(0) * (1 - skill.double()).unsqueeze(1)
    return matrix + torch.diag(skill.double())


def write(crowd: Crowd, folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = names(crowd)
    asked = [f"annotator_{i + 1}" for i in range(crowd.votes.shape[1])]
    head = ["id", *(f"pixel_{i}" for i in range(crowd.pixels.shape[1])), *asked]
    pairs = zip(ids, crowd.pixels.tolist(), crowd.votes.tolist(), strict=True)
    rows = ([name, *pixels, *("" if vote < 0 else vote for vote in votes)] for name, pixels, votes in pairs)
    _write(folder / "crowd.csv", head, rows)
    true = crowd.true.tolist()
    _write(folder / "trusted.csv", ["id", "label"], ([ids[i], true[i]] for i in crowd.trusted.tolist()))
    _write(folder / "truth.csv", ["id", "label"], zip(ids, true, strict=True))


def names(crowd: Crowd) -> list[str]:
    """Return the identifier of each image."""
    return [f"digit{i:04d}" for i in range(len(crowd.true))]


def describe(crowd: Crowd) -> str:
    """Return what the crowd is like, in a few lines."""
    asked = crowd.votes >= 0
    per_image = asked.sum(1)
    several = per_image > 1
    disagree = ((crowd.counts > 0).sum(1) > 1) & several
    wrong = crowd.majority != crowd.true
    lines = [
        f"{len(crowd.true)} images, {len(crowd.trusted)} trusted; {per_image.double().mean():.2f} votes an image",
        f"annotators disagree on {_percent(disagree[several])} of the images with several votes",
        f"the majority is wrong on {_percent(wrong)} of the images, on {_percent(wrong[~disagree])} of the undisputed",
    ]
    for i, votes in enumerate(crowd.votes.T):
        right = (votes == crowd.true)[asked[:, i]]
        per_class = ", ".join(f"{100 * skill:.0f}" for skill in crowd.skills[i].tolist())
        lines.append(
            f"annotator_{i + 1}: {len(right)} votes, {_percent(right)} right; skill by class in %: {per_class}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a crowd, say what it is like and write its files."""
    parser = argparse.ArgumentParser(prog="crowd.py", description="Write a small data set labelled by a made-up crowd.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; without it nothing is written")
    parser.add_argument("--seed", type=at_least(0), default=1, help="decides the crowd and the trusted images [1]")
    parser.add_argument("--annotators", type=at_least(1), default=5, help="how many people [5]")
    parser.add_argument("--trusted-per-class", type=at_least(1), default=10, help="known labels of each class [10]")
    parser.add_argument("--describe", action="store_true", help="print what the crowd is like")
    given = parser.parse_args(arguments)
    if given.out is None and not given.describe:
        parser.error("nothing to do: give --out FOLDER, --describe or both")
    try:
        if given.out is not None:
            refuse_unusable(given.out)
    except ValueError as problem:
        parser.error(str(problem))
    if given.trusted_per_class > FEWEST_A_CLASS:
        parser.error(f"--trusted-per-class {given.trusted_per_class}: must be at most {FEWEST_A_CLASS}")
    crowd = make(given.seed, annotators=given.annotators, trusted_per_class=given.trusted_per_class)
    if given.describe:
        print(describe(crowd))
    if given.out is not None:
        write(crowd, given.out)
        print(f"written: {given.out / 'crowd.csv'}, trusted.csv, truth.csv")
    return 0


def _percent(which: Tensor) -> str:
    return f"{100 * which.double().mean().item():.1f} %"


def _write(file: Path, head: list[str], rows: Iterable[Iterable[Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(head)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
