"""How settings are chosen without test images and true labels: ``python -m examples.noisy_labels.select_settings``.

    python -m examples.noisy_labels.select_settings --data FOLDER            # about an hour of one core
    python -m examples.noisy_labels.select_settings --report                 # the table of what is finished

Whoever has noisy labels has trusted images, and nothing else to judge by. So on development seeds, which no table
reports, a method is trained on ``--images`` of the data and 2 % of trusted ones, as in the preset ``quick``, and the
other trusted images of the whole data set are split into two halves:

planted  They join the noisy images, under labels drawn from an estimate of the noise. Whether they are corrected is the
         question that a method is asked, with all that training on wrong labels does to it.
held     No method sees them. They measure the classifier.

The estimate: ``em`` is trained on the noisy images without planted ones, its predictions get the temper at which the
held-out trusted images are likeliest, and T is the likeliest matrix for noisy images that were not trained on.

The criterion is the mean of both shares, over noise and seeds. Each method gets three settings. Nothing here reads test
images, or true labels of noisy images: ``--report`` works on the saved numbers alone. Every finished run is written at
once, so the command may be killed and started again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from examples.noisy_labels.data import noise, pools
from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes import decoding
from examples.noisy_labels.recipes.ours import Temper
from examples.noisy_labels.run import command_line, declaration, evaluation
from examples.noisy_labels.run.files import replacing
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.run.training import Run, train_at_once

DEVELOPMENT_SEEDS = (101, 102)
NOISE = ("uniform:0.4", "flip:0.4")
IMAGES, EPOCHS = 5000, 10
UNSEEN = 8000  # noisy images, not trained on, from which the noise is estimated
TEMPER_STEPS = 300
WEIGHTS = ({"clean_weight": 0.03}, {"clean_weight": 0.1}, {"clean_weight": 0.3})
GRID: dict[str, tuple[dict[str, Any], ...]] = {
    "ours": WEIGHTS,
    "em": WEIGHTS,
    "glc": WEIGHTS,
    "ce-mixed": WEIGHTS,
    "ebomlc": ({}, {"mixture": "log"}, {"mixture": "log", "corrupt_clean": 0.5}),
}
RESULT = Path(__file__).parents[2] / "docs" / "results" / "select_settings.json"


@dataclass(frozen=True)
class Trial:
    """A method with one of its settings, in one world."""

    method: str
    setting: dict[str, Any]
    noise: str
    seed: int

    @property
    def name(self) -> str:
        """Return what the trial is known by in the file of results."""
        return f"{self.method} {words(self.setting)} | {self.noise} | seed {self.seed}"


@dataclass(frozen=True)
class World:
    """What methods are trained on, and where in it the planted images are."""

    task: Task  # its test images are the held-out trusted ones
    planted: Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not finished, seed by seed, and print the table."""
    options = _options(arguments)
    about = {"images": options.images, "epochs": options.epochs, "dataset": options.dataset}
    try:
        results = read(options.output, about)
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    worlds: dict[tuple[str, int], World] = {}
    for trial in [] if options.report else trials(options.methods, options.noise, options.seeds):
        if trial.name in results:
            continue
        settings = resolved(trial, options)
        place = (trial.noise, trial.seed)
        if place not in worlds:
            worlds = {place: world(settings, options.images)}  # trials of one world follow each other
        results[trial.name] = scores(settings, worlds[place])
        with replacing(options.output) as stream:
            stream.write((json.dumps({**about, "runs": results}, indent=1) + "\n").encode())
        print(trial.name, results[trial.name], flush=True)
    print(table(results, options))
    return 0


def trials(methods: Sequence[str], noises: Sequence[str], seeds: Sequence[int]) -> Iterator[Trial]:
    """Yield all trials, seed by seed and world by world."""
    for seed, kind, method in product(seeds, noises, methods):
        for setting in GRID[method]:
            yield Trial(method, setting, kind, seed)


def resolved(trial: Trial, options: argparse.Namespace) -> Settings:
    """Return the settings of a trial: those of the preset ``quick`` but for the images, which `world` takes."""
    kind, _, value = trial.noise.partition(":")
    explicit = {"method": trial.method, "noise": kind, "seed": trial.seed, "dataset": options.dataset, **trial.setting}
    explicit |= {"train_images": None, "test_images": None, "epochs": options.epochs, "device": options.device}
    explicit |= {"human_column": value} if kind == "human" else {"rate": float(value)}
    return command_line.resolve(explicit | ({"data": options.data} if options.data else {}), "quick")


def world(settings: Settings, images: int) -> World:
    """Deal the trusted images of the whole data set into trained, planted and held ones."""
    task = pools.load(settings, command_line.device(settings.device))
    classes, stream = len(task.names), generator(settings.seed, "selection")
    device = task.samples.device
    order = torch.randperm(len(task.noisy), generator=stream).to(device)
    clean, labels = task.clean.cpu(), task.labels.cpu()
    per_class = max(1, round(settings.clean_fraction * images / classes))
    trained, rest = pools.take(labels, clean, classes, per_class, stream)
    planted, held = pools.take(labels, rest, classes, len(rest) // classes // 2, stream)
    chosen, unseen = order[: images - len(trained)], order[images - len(trained) :][:UNSEEN]
    noisy = replace(task, clean=trained.to(device), noisy=task.noisy[chosen], test=held.to(device))
    transition = estimate(settings, noisy, task.noisy[unseen], task.noisy_labels[unseen])
    given = task.given.clone()
    given[planted.to(device)] = noise.corrupt(labels[planted], transition.cpu(), stream).to(device)
    joined = torch.cat([noisy.noisy, planted.to(device)])
    return World(replace(noisy, noisy=joined, given=given), torch.arange(len(chosen), len(joined), device=device))


def estimate(settings: Settings, task: Task, unseen: Tensor, given: Tensor) -> Tensor:
    """Return the likeliest transition matrix for noisy images that a model of the others has not seen."""
    run = train_at_once(Run(replace(settings, method="em", clean_weight=0.03), task))
    with torch.no_grad():
        logs = {
            name: evaluation.predictions(run.recipe, task, index).clamp_min(1e-12).log()
            for name, index in (("held", task.test), ("unseen", unseen))
        }
        temper = Temper().to(logs["held"].device)
        for _ in range(TEMPER_STEPS):
            temper.learn(logs["held"], task.labels[task.test])
        return decoding.likeliest_transition(temper(logs["unseen"]), given)


def scores(settings: Settings, world: World) -> dict[str, float]:
    """Train, and return the share of planted images that are corrected and of held images that are recognised."""
    run = train_at_once(Run(settings, world.task))
    answers = evaluation.corrected_labels(run.recipe, world.task)[world.planted].argmax(1)
    planted = (answers == world.task.true_labels[world.planted]).double().mean().item()
    return {"planted": round(planted, 4), "held": round(evaluation.accuracy(run.recipe, world.task), 4)}


def table(results: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """Return a line for each setting, with the mean over what is finished, the best of each method marked."""
    lines = [f"{'method':10}{'setting':36}{'runs':>5}{'planted':>9}{'held':>7}{'mean':>7}   in %"]
    for method in options.methods:
        rows = []
        for setting in GRID[method]:
            names = [Trial(method, setting, *place).name for place in product(options.noise, options.seeds)]
            own = [results[name] for name in names if name in results]
            if own:
                planted, held = (100 * mean(one[part] for one in own) for part in ("planted", "held"))
                rows.append((words(setting), len(own), planted, held, (planted + held) / 2))
        complete = len({row[1] for row in rows}) == 1 and len(rows) == len(GRID[method])
        best = max((row[4] for row in rows), default=None)
        for text, runs, planted, held, both in rows:
            mark = "  <- best" if complete and both == best else ""
            lines.append(f"{method:10}{text:36}{runs:5}{planted:9.1f}{held:7.1f}{both:7.1f}{mark}")
    return "\n".join(lines)


def words(setting: dict[str, Any]) -> str:
    """Return a setting in words."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "as in methods.py"


def read(file: Path, about: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the runs of an earlier call.

    Raises:
        ValueError: They are of other sizes.
    """
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        runs: dict[str, dict[str, float]] = content.pop("runs")
    except (ValueError, KeyError, AttributeError, TypeError) as problem:
        raise ValueError(f"--output {file}: holds no results of this program ({problem}). Name another file.") from None
    if content != about:
        rule = f"holds runs of {content}, and these would be of {about}"
        raise ValueError(f"select_settings({file}): {rule}. Use another --output.")
    return runs


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="select_settings.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    parser.add_argument("--methods", type=declaration.words, default=tuple(GRID), metavar="NAME,...")
    parser.add_argument("--noise", type=declaration.words, default=NOISE, metavar="KIND:RATE,...")
    parser.add_argument("--seeds", type=declaration.integers, default=DEVELOPMENT_SEEDS, metavar="N,...")
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar10")
    parser.add_argument("--images", type=declaration.at_least(20), default=IMAGES, help=f"to train on [{IMAGES}]")
    parser.add_argument("--epochs", type=declaration.at_least(1), default=EPOCHS, help=f"[{EPOCHS}]")
    parser.add_argument("--data", help="folder that holds the archives [$BILEVEL_DATA, then ./data]")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--output", type=Path, default=RESULT, help="where results are and go")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    for method in options.methods:
        if method not in GRID:
            parser.error(f"--methods {method}: must be of {', '.join(GRID)}")
    try:
        for trial in trials(options.methods[:1], options.noise, options.seeds):
            resolved(trial, options)
    except ValueError as problem:
        parser.error(str(problem))
    return options


if __name__ == "__main__":
    sys.exit(main())
