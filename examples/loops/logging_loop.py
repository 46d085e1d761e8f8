"""TensorBoard and Weights & Biases, both without a network: ``python -m examples.loops.logging_loop``.

``stats.as_dict()`` is a dictionary of floats, and waits for the device: call it every so many steps.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
import wandb
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import bilevel
from examples.loops.problem import Weighted, data, told_apart


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="TensorBoard and W&B.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--every", type=int, default=5, help="steps from one look at the stats to the next")
    parser.add_argument("--folder", type=Path, default=Path("runs/logging"))
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    trusted, noisy, right = data()
    model = Weighted()
    optimizer = bilevel.BOME(
        model.upper_loss,
        model.lower_loss,
        upper=model.weights,
        lower=model.classifier,
        upper_optimizer=torch.optim.Adam([model.weights], lr=0.1),
        lower_optimizer=torch.optim.SGD(model.classifier.parameters(), lr=0.3),
    )
    batch = list(trusted.tensors)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project="bilevel", dir=arguments.folder, mode="offline")  # `wandb sync` sends it when you want
    with SummaryWriter(arguments.folder / "tensorboard") as board:
        loader = DataLoader(noisy, batch_size=40, shuffle=True)
        batches = itertools.chain.from_iterable(loader for _ in range(arguments.epochs))
        for step, noisy_batch in enumerate(batches):
            stats = optimizer.step(batch, noisy_batch)
            if step % arguments.every == 0:
                numbers = stats.as_dict()
                for name, value in numbers.items():
                    board.add_scalar(name, value, step)
                board.add_histogram("weights", model.weights.detach().sigmoid(), step)
                run.log(numbers, step=step)
    run.finish()
    print(told_apart(model.weights, right))


if __name__ == "__main__":
    main()
