"""``torch.compile``: compile the models, not the step: ``python -m examples.loops.compile_loop``.

First-order methods take compiled models as they are. A second derivative does not pass through compiled code, so a
method that needs one takes ``product="difference"``, or the lower model uncompiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import bilevel
from examples.loops.problem import Batch, Weighted, data, told_apart


def main(argv: Sequence[str] | None = None) -> Weighted:
    parser = argparse.ArgumentParser(description="torch.compile.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--backend", default="aot_eager", help="inductor is faster, and needs a compiler of C++")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    trusted, noisy, right = data()
    model = Weighted()
    compiled: nn.Module = torch.compile(model.classifier, backend=arguments.backend)  # type: ignore[assignment]

    def upper_loss(batch: Batch) -> torch.Tensor:
        return cross_entropy(compiled(batch[0]), batch[1])

    def lower_loss(batch: Batch) -> torch.Tensor:
        x, y, number = batch
        each = cross_entropy(compiled(x), y, reduction="none")
        return (model.weights[number].sigmoid() * each).mean()

    optimizer = bilevel.FiniteDifference(
        upper_loss,
        lower_loss,
        upper=model.weights,
        lower=model.classifier,
        upper_optimizer=torch.optim.Adam([model.weights], lr=0.1),
        lower_optimizer=torch.optim.SGD(model.classifier.parameters(), lr=0.3),
    )
    trusted_batch = list(trusted.tensors)
    for _ in range(arguments.epochs):
        for batch in DataLoader(noisy, batch_size=40, shuffle=True):
            optimizer.step(trusted_batch, batch)
    print(told_apart(model.weights, right))
    return model


if __name__ == "__main__":
    main()
