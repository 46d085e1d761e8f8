"""The verdict of a run on own data: the simple ways beside what was trained, with answers kept over interruptions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.noisy_labels.data.samples import Samples
from examples.noisy_labels.run import checkpoint
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.run.training import Run, Running
from examples.noisy_labels.verdict import classifiers, folds, judging, ways
from examples.noisy_labels.verdict.cross_validation import out_of_fold
from examples.noisy_labels.verdict.judging import Outcome
from examples.noisy_labels.verdict.network_way import NetworkWay, answers
from examples.noisy_labels.verdict.problem import UNKNOWN, Problem
from examples.noisy_labels.verdict.ways import Evidence, Way

Array = np.ndarray
NAME = "verdict.pt"
IMAGE_FOLDS = 3  # of the images' classifier, whose training is dear


class Answers:
    """Answers of networks, kept in a file: a run that was stopped does not train them again.

    Args:
        file: Where they are kept.
        key: Names samples and options; answers of others are not taken.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key, self.kept = file, key, dict[str, torch.Tensor]()
        if file.is_file():
            content = checkpoint.load(file, "key", "answers")
            self.kept = content["answers"] if content["key"] == key else {}

    def of(self, name: str, problem: Problem, way: Way) -> Array:
        """Return the answer of a way to a problem."""
        asked = f"{name} {hashlib.sha256(problem.truth.tobytes() + problem.annotations.tobytes()).hexdigest()}"
        if asked not in self.kept:
            self.kept[asked] = torch.from_numpy(way(problem))
            checkpoint.save(self.file, {"key": self.key, "answers": self.kept})
        return np.asarray(self.kept[asked].numpy())


def trainings(options: Options) -> float:
    """Return how many trainings of networks the verdict takes, each as long as the first one."""
    if not options.folds:
        return 0
    return options.folds if options.images is None else 2 * options.folds + IMAGE_FOLDS


def judge(running: Running, samples: Samples, problem: Problem) -> Outcome:
    """Judge what was trained beside the simple ways, and correct the labels with the winner.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came. What is finished is kept.
    """
    run, moment = running.run, "while the ways were judged"
    options = run.settings
    assert isinstance(options, Options)
    key = f"{samples.digest()} {sorted(options.decisive().items())}"
    kept = Answers(running.folder / NAME, hashlib.sha256(key.encode()).hexdigest())
    steps = round(trainings(options) * run.epochs * len(run.noisy))
    with tqdm(desc="verdict", total=steps, unit="step", leave=False, disable=None) as bar:

        def watch(_: Run) -> None:
            bar.update()
            running.stop_if_asked(moment)

        def network(method: str) -> Way:
            chosen = dataclasses.replace(options, method=method)
            way = NetworkWay(chosen, samples.samples, watch=watch)
            return lambda asked: kept.of(method, asked, way)

        def asking(name: str, fold: int) -> None:
            bar.set_postfix_str(name if fold < 0 else f"{name}, fold {fold + 1}")
            running.stop_if_asked(moment)

        chosen = _simple(options, samples.samples, problem, network, asking)
        chosen[options.method] = network(options.method)
        return judging.judge(
            problem,
            chosen,
            folds=options.folds,
            precision=options.precision,
            check=options.check,
            seed=options.seed,
            way=options.way,
            finished={options.method: answers(run, samples)},
            watch=asking,
        )


def _simple(
    options: Options,
    samples: Tensor,
    problem: Problem,
    network: Callable[[str], Way],
    asking: Callable[[str, int], None],
) -> dict[str, Way]:
    """Return the simple ways: of tables by scikit-learn, of images by networks."""
    if options.images is None:
        inputs = samples.double().cpu().numpy()
        makers = classifiers.makers(options.classifier, options.seed)
        predicted = {}
        for name, make in makers.items():
            asking(name, -1)
            predicted[name] = out_of_fold(problem, inputs, make, options.seed)
        return ways.simple(Evidence(inputs, predicted, makers), options.seed)
    of_images = ways.simple(Evidence(None, {"classifier": _of_images(problem, network("ce"), options, asking)}, {}), 0)
    first = {"given": of_images.pop("given"), "trusted": network("clean")}
    return first | of_images


def _of_images(problem: Problem, train: Way, options: Options, asking: Callable[[str, int], None]) -> Array:
    """Return the probabilities of a network for images whose labels it has not seen."""
    fold = folds.assign(problem.given, problem.groups, IMAGE_FOLDS, options.seed)
    predicted = np.empty((len(fold), problem.classes))
    for one in range(IMAGE_FOLDS):
        asking("classifier", one)
        inside = fold == one
        unseen = problem.hiding(inside)
        annotations = np.where(inside[:, None], UNKNOWN, problem.annotations)
        predicted[inside] = train(dataclasses.replace(unseen, annotations=annotations))[inside]
    return predicted
