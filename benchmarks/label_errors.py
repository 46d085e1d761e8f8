"""Who finds the wrong labels of a crowd: the flagship's rank of suspicion, cleanlab's scores, or the vote itself.

    python -m benchmarks.label_errors            # writes docs/results/label_errors.json and .txt; two minutes
    python -m benchmarks.label_errors --select   # how the contestants' settings were chosen, on other seeds

The data are those of ``examples/noisy_labels/crowd.py``: 1,797 digits, five annotators who each saw 40 % of them, 100
trusted images. What is ranked are the majority labels of the 1,697 other images; true labels only measure. Everyone is
given the votes and the trusted labels:

- **majority**: the share of votes against the majority;
- **cleanlab, trusted classifier**: label quality (self-confidence) from a classifier that learned the trusted images
  alone, so that its probabilities are out of sample without further ado;
- **cleanlab, cross-validated**: the same from five-fold cross-validation, as cleanlab asks for: each classifier learned
  the vote shares of the other folds and all trusted images;
- **cleanlab, CROWDLAB**: its method for several annotators, with the cross-validated probabilities and all votes;
- **bilevel**: `ebomlc` as ``own_data.py`` trains it, with nothing held out.

All classifiers are the same network with the same optimizer. Chosen on the development seeds, by average precision
(``--select``): for cleanlab's classifiers, whose quality depends on when training stops, learning rate and epochs; for
bilevel the corrector's learning rate and what the rank is made from.

cleanlab names wrong labels but leaves their correction to the user. Here a label that it flags
(``find_label_issues``) becomes the class that the classifier finds most probable; CROWDLAB has a consensus of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

import bilevel
from benchmarks.noisy_labels_table import processor
from examples.noisy_labels import crowd
from examples.noisy_labels.crowd import Crowd
from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.data.samples import Samples, make
from examples.noisy_labels.data.task import UNKNOWN
from examples.noisy_labels.run import evaluation
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.run.training import Run, train_at_once

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SEEDS = tuple(range(1, 9))  # reported
DEVELOPMENT_SEEDS = (101, 102, 103)  # chosen with
FOLDS = 5
RATES, EPOCHS, META_RATES = (0.03, 0.1), (3, 5, 10, 20, 40), (1e-3, 3e-3)
# Learning rate and epochs of cleanlab's classifiers, best on the development seeds.
CROSS_VALIDATED, TRUSTED_ALONE = (0.03, 5), (0.03, 40)
QUANTITIES = {"precision": "average precision", "auroc": "AUROC", "right": "labels right"}


@dataclass(frozen=True)
class Judgement:
    """What a contestant says about the images that are not trusted, in their order.

    Args:
        quality: The lower, the more suspicious is the majority label.
        corrected: The label it would put.
    """

    quality: Tensor
    corrected: Tensor


@dataclass(frozen=True)
class Outcome:
    """How good a judgement was on one seed."""

    contestant: str
    seed: int
    precision: float
    auroc: float
    right: float
    wrong: float  # share of majority labels that are wrong: what precision has by chance


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all contestants on all seeds and write the table."""
    parser = argparse.ArgumentParser(prog="label_errors", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default=SEEDS, type=lambda text: tuple(map(int, text.split(","))), metavar="N,N,...")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="[docs/results]")
    parser.add_argument("--epochs", type=int, help="other than chosen, for all, to see that it runs")
    parser.add_argument("--select", action="store_true", help="print what the settings were chosen from")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tiny networks gain nothing from threads
    if given.select:
        select()
        return 0
    outcomes = [
        judged(name, seed, made, judge(made, samples_of(made), seed, given.epochs))
        for seed in given.seeds
        for made in [crowd.make(seed)]
        for name, judge in CONTESTANTS.items()
    ]
    content = {
        "command": "python -m benchmarks.label_errors",
        "setting": "digits with five annotators, examples/noisy_labels/crowd.py",
        "machine": {"processor": processor(), "threads": 1},
        "versions": {
            "bilevel": bilevel.__version__,
            "cleanlab": metadata.version("cleanlab"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "outcomes": [vars(outcome) for outcome in outcomes],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "label_errors.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.out / "label_errors.txt").write_text(table(outcomes) + "\n")
    print(table(outcomes))
    return 0


def samples_of(made: Crowd) -> Samples:
    """Return a crowd as `own_data.py` would read it from its files, with nothing held out."""
    labels = torch.full_like(made.true, UNKNOWN)
    labels[made.trusted] = made.true[made.trusted]
    return make(
        made.pixels.double(),
        made.counts,
        labels,
        soft=True,
        ids=tuple(crowd.names(made)),
        names=tuple(map(str, range(crowd.CLASSES))),
        noisy=torch.where(labels == UNKNOWN)[0],
        clean=made.trusted,
        test=made.trusted.new_empty(0),
    )


def judged(contestant: str, seed: int, made: Crowd, judgement: Judgement) -> Outcome:
    """Measure a judgement against the truth."""
    noisy = samples_of(made).noisy
    wrong = made.majority[noisy] != made.true[noisy]
    suspicion = -judgement.quality.double().numpy()
    return Outcome(
        contestant,
        seed,
        precision=float(average_precision_score(wrong.numpy(), suspicion)),
        auroc=float(roc_auc_score(wrong.numpy(), suspicion)),
        right=(judgement.corrected == made.true[noisy]).double().mean().item(),
        wrong=wrong.double().mean().item(),
    )


def by_majority(made: Crowd, samples: Samples, seed: int, epochs: int | None) -> Judgement:
    """Trust a label the more, the more agree with it."""
    shares = samples.noisy_labels
    return Judgement(shares.max(1).values, shares.argmax(1))


def by_bilevel(made: Crowd, samples: Samples, seed: int, epochs: int | None) -> Judgement:
    """Train as `own_data.py` does."""
    options = Options(table="crowd.csv", trusted="trusted.csv", hold_out=0.0, seed=seed, epochs=epochs)
    probabilities = evaluation.opinions(trained(options, samples).recipe, samples, samples.noisy)
    return Judgement(of_majority(probabilities, samples), probabilities.argmax(1))


def by_trusted_classifier(made: Crowd, samples: Samples, seed: int, epochs: int | None) -> Judgement:
    """Let cleanlab score the labels by a classifier that never saw them."""
    rate, chosen = TRUSTED_ALONE
    return scored(trusted_alone(samples, seed, rate, epochs or chosen), samples)


def by_cross_validation(made: Crowd, samples: Samples, seed: int, epochs: int | None) -> Judgement:
    """Let cleanlab score the labels by cross-validated probabilities."""
    rate, chosen = CROSS_VALIDATED
    return scored(cross_validated(samples, seed, rate, epochs or chosen), samples)


def by_crowdlab(made: Crowd, samples: Samples, seed: int, epochs: int | None) -> Judgement:
    """Let CROWDLAB weigh annotators and cross-validated probabilities."""
    import pandas
    from cleanlab.multiannotator import get_label_quality_multiannotator

    rate, chosen = CROSS_VALIDATED
    probabilities = cross_validated(samples, seed, rate, epochs or chosen).numpy()
    votes = made.votes[samples.noisy].double()
    frame = pandas.DataFrame(votes.where(votes >= 0, torch.nan).numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # annotators who share no image with others, and the like
        best, majority = (
            get_label_quality_multiannotator(frame, probabilities, consensus_method=method, verbose=False)
            for method in ("best_quality", "majority_vote")
        )
    # Its majority breaks ties by the probabilities; the label that is judged here is the first of the tied. Where they
    # differ it prefers another label: quality 0, which on the development seeds ranked better than 1 - its score.
    agrees = majority["label_quality"]["consensus_label"].to_numpy() == samples.majority[samples.noisy].numpy()
    quality = majority["label_quality"]["consensus_quality_score"].to_numpy()
    quality = np.where(agrees, quality, 0.0)
    corrected = torch.from_numpy(best["label_quality"]["consensus_label"].to_numpy().astype(np.int64))
    return Judgement(torch.from_numpy(quality), corrected)


Contestant = Callable[[Crowd, Samples, int, int | None], Judgement]
CONTESTANTS: dict[str, Contestant] = {
    "majority": by_majority,
    "cleanlab, trusted classifier": by_trusted_classifier,
    "cleanlab, cross-validated": by_cross_validation,
    "cleanlab, CROWDLAB": by_crowdlab,
    "bilevel": by_bilevel,
}


def trained(options: Options, samples: Samples) -> Run:
    """Train without log and checkpoint."""
    return train_at_once(Run(options.resolved(len(samples.noisy)), samples))


def trusted_alone(samples: Samples, seed: int, rate: float, epochs: int) -> Tensor:
    """Return probabilities of the noisy samples from a classifier of the trusted ones."""
    options = Options(table="-", trusted="-", method="clean", seed=seed, lr=rate, epochs=epochs)
    return evaluation.predictions(trained(options, samples).recipe, samples, samples.noisy)


def cross_validated(samples: Samples, seed: int, rate: float, epochs: int) -> Tensor:
    """Return out-of-sample probabilities of the noisy samples; all classifiers learn the trusted ones too."""
    options = Options(table="-", trusted="-", method="ce-clean", seed=seed, lr=rate, epochs=epochs)
    order = torch.randperm(len(samples.noisy), generator=generator(seed, "folds"))
    probabilities = torch.zeros(len(samples.noisy), len(samples.names))
    for fold in order.chunk(FOLDS):
        others = order[~torch.isin(order, fold)].sort().values
        run = trained(options, replace(samples, noisy=samples.noisy[others]))
        probabilities[fold] = evaluation.predictions(run.recipe, samples, samples.noisy[fold])
    return probabilities


def scored(probabilities: Tensor, samples: Samples) -> Judgement:
    """Return cleanlab's label quality, and its predicted class where it flags the label."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    given = samples.majority[samples.noisy]
    quality = get_label_quality_scores(given.numpy(), probabilities.numpy())
    flagged = torch.from_numpy(find_label_issues(given.numpy(), probabilities.numpy(), n_jobs=1))
    return Judgement(torch.from_numpy(quality), torch.where(flagged, probabilities.argmax(1), given))


def of_majority(probabilities: Tensor, samples: Samples) -> Tensor:
    """Return the probability of each majority label."""
    return probabilities.gather(1, samples.majority[samples.noisy].unsqueeze(1)).squeeze(1)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table: mean and standard deviation over seeds, in %."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    head = ["contestant", *QUANTITIES.values(), "bilevel more precise on"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    reference = {outcome.seed: outcome.precision for outcome in outcomes if outcome.contestant == "bilevel"}
    for contestant in dict.fromkeys(outcome.contestant for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.contestant == contestant]
        cells = [_spread([getattr(row, quantity) for row in rows]) for quantity in QUANTITIES]
        ahead = f"{sum(reference[row.seed] > row.precision for row in rows)} of {len(seeds)} seeds"
        lines.append(f"| {' | '.join([contestant, *cells, '' if contestant == 'bilevel' else ahead])} |")
    wrong = 100 * mean(outcome.wrong for outcome in outcomes)
    lines += [
        "",
        f"In %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}. Of the majority labels "
        f"{wrong:.1f} % are wrong, which is also the average precision of a random order.",
    ]
    return "\n".join(lines)


def select() -> None:
    """Print what each candidate reaches on the development seeds."""
    worlds = [(seed, made, samples_of(made)) for seed in DEVELOPMENT_SEEDS for made in [crowd.make(seed)]]

    def show(name: str, judgements: list[Judgement]) -> None:
        pairs = zip(worlds, judgements, strict=True)
        outcomes = [judged(name, seed, made, one) for (seed, made, _), one in pairs]
        cells = (f"{words} {_spread([getattr(o, name) for o in outcomes])}" for name, words in QUANTITIES.items())
        print(name.ljust(48), ", ".join(cells), flush=True)

    for maker in (cross_validated, trusted_alone):
        for rate, epochs in product(RATES, EPOCHS):
            name = f"cleanlab, {maker.__name__}, rate {rate:g}, {epochs} epochs"
            show(name, [scored(maker(samples, seed, rate, epochs), samples) for seed, _, samples in worlds])
    for meta_rate in META_RATES:
        parts: dict[str, list[Judgement]] = {"classifier": [], "corrector": [], "their mean": []}
        for seed, _, samples in worlds:
            options = Options(table="-", trusted="-", seed=seed, meta_lr=meta_rate)
            classifier, both = trained(options, samples).probabilities(samples.noisy)
            for name, one in zip(parts, (classifier, 2 * both - classifier, both), strict=True):
                parts[name].append(Judgement(of_majority(one, samples), one.argmax(1)))
        for name, judgements in parts.items():
            show(f"bilevel, meta rate {meta_rate:g}, {name}", judgements)


def _spread(values: Sequence[float]) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{100 * mean(values):.1f} ± {100 * spread:.1f}"


if __name__ == "__main__":
    sys.exit(main())
