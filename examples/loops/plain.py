"""Plain PyTorch, with everything that a loop usually has: ``python -m examples.loops.plain``.

Shuffled loaders, a schedule of the learning rate, a clipped lower gradient, a validation after each epoch, and a
checkpoint from which the run goes on as if it had not stopped (``--resume``).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import bilevel
from examples.loops.problem import Weighted, data, told_apart


def main(argv: Sequence[str] | None = None) -> Weighted:
    parser = argparse.ArgumentParser(description="Plain PyTorch.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    trusted, noisy, right = data()
    model = Weighted()
    trusted_batches = itertools.cycle(DataLoader(trusted, batch_size=len(trusted)))
    noisy_loader = DataLoader(noisy, batch_size=40, shuffle=True)

    lower_optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.3, momentum=0.9)
    optimizer = bilevel.Unrolled(
        model.upper_loss,
        model.lower_loss,
        upper=model.weights,
        lower=model.classifier,
        upper_optimizer=torch.optim.Adam([model.weights], lr=0.1),
        lower_optimizer=lower_optimizer,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(lower_optimizer, T_max=30)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    first = 0
    if arguments.resume:
        state = torch.load(arguments.checkpoint)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        first = state["epoch"]

    for epoch in range(first, arguments.epochs):
        for batch in noisy_loader:
            stats = optimizer.step(next(trusted_batches), batch)
        scheduler.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: {stats.as_dict()}")  # the one place that waits for the device
        state = {name: part.state_dict() for name, part in parts.items()}
        temporary = arguments.checkpoint.with_suffix(".tmp")
        torch.save({**state, "epoch": epoch + 1, "random": torch.get_rng_state()}, temporary)
        temporary.replace(arguments.checkpoint)
    print(told_apart(model.weights, right))
    return model


if __name__ == "__main__":
    main()
