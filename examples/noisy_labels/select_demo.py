"""How the settings of the demo were chosen: ``python -m examples.noisy_labels.select_demo [--noise uniform]``.

Each method is tried with several learning rates and lengths on development seeds, which the demo does not report;
its best pair, by mean test accuracy, goes into ``settings.DIGITS_BY_METHOD``. Takes about five minutes on one core.
"""

from __future__ import annotations

import sys
from statistics import mean

import torch

from examples.noisy_labels.run import command_line
from examples.noisy_labels.run.compare import METHODS, train_once

DEVELOPMENT_SEEDS = (101, 102, 103, 104, 105)
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
EPOCHS = (5, 10, 30, 60)


def main(arguments: list[str]) -> None:
    """Print the mean test accuracy of every pair, and the best pair of each method."""
    torch.set_num_threads(1)
    command = command_line.parse(["--dataset", "digits", *arguments])
    print(f"{command.settings.title}: mean test accuracy in %, seeds {DEVELOPMENT_SEEDS}")
    print("method".ljust(10), *(f"{lr:g}/{epochs}".rjust(8) for lr in LEARNING_RATES for epochs in EPOCHS), "  best")
    for method in METHODS:
        scores = {}
        for lr in LEARNING_RATES:
            for epochs in EPOCHS:
                changes = {"method": method, "lr": lr, "epochs": epochs}
                runs = [train_once(command.variant(seed=seed, **changes))[0] for seed in DEVELOPMENT_SEEDS]
                scores[lr, epochs] = 100 * mean(run.accuracy for run in runs)
        lr, epochs = max(scores, key=lambda pair: scores[pair])
        cells = (f"{score:.1f}".rjust(8) for score in scores.values())
        print(method.ljust(10), *cells, f"  lr {lr:g}, {epochs} epochs", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
