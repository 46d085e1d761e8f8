"""Accelerate: ``accelerate launch -m examples.loops.accelerate_loop``, or ``python -m``.

Models, loaders and optimizers are prepared as always; the method takes the prepared optimizers, and the torch
optimizers out of them. So every ``step`` steps, also under ``gradient_accumulation_steps``, where the wrapper would
leave steps out without a word. To accumulate, hand several batches to a loss that averages over them
(``--accumulate``): that is exact for every method, as directions are not linear in gradients.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

import bilevel
from examples.loops.problem import Batch, Weighted, data, told_apart


def main(argv: Sequence[str] | None = None) -> tuple[int, Weighted]:
    parser = argparse.ArgumentParser(description="Accelerate.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    arguments = parser.parse_args(argv)

    set_seed(0)
    accelerator = Accelerator()
    trusted, noisy, right = data()
    model = Weighted()
    model, upper, lower, trusted_loader, noisy_loader = accelerator.prepare(
        model,
        torch.optim.Adam([model.weights], lr=0.1),
        torch.optim.SGD(model.classifier.parameters(), lr=0.3, momentum=0.9),
        DataLoader(trusted, batch_size=len(trusted)),
        DataLoader(noisy, batch_size=40 // arguments.accumulate, shuffle=True),
    )
    model = accelerator.unwrap_model(model)

    def lower_loss(batches: Sequence[Batch]) -> Tensor:
        return torch.stack([model.lower_loss(batch) for batch in batches]).mean()

    method = bilevel.Unrolled(
        model.upper_loss,
        lower_loss,
        upper=model.weights,
        lower=model.classifier,
        upper_optimizer=upper,
        lower_optimizer=lower,
    )
    accelerator.register_for_checkpointing(method)  # accelerator.save_state writes the method's state too
    trusted_batches = itertools.cycle(trusted_loader)

    moved = 0
    for _ in range(arguments.epochs):
        for batches in zip(*[iter(noisy_loader)] * arguments.accumulate, strict=True):
            moved += method.step(next(trusted_batches), batches).upper_moved
    accelerator.print(f"{moved} upper steps; {told_apart(model.weights, right)}")
    return moved, model


if __name__ == "__main__":
    main()
