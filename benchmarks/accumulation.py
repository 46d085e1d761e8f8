"""Peak memory of a step on one batch, whole and in micro-batches: ``python -m benchmarks.accumulation``.

A convolutional network whose activations outweigh its parameters learns from labels that a small network corrects.
The numbers are those of the joined batch (``tests/methods/test_microbatches.py``). Prints a table in
Markdown; ``--device cuda`` measures with CUDA's own counter.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel

from .memory import peak_bytes

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "BOME": (bilevel.BOME, {}),
    "EBOMLC": (bilevel.EBOMLC, {}),
    "EMLC": (bilevel.EMLC, {}),
    "Unrolled, k = 1": (bilevel.Unrolled, {}),
    "Unrolled, k = 2, adjoint": (bilevel.Unrolled, {"inner_steps": 2, "differentiate": "adjoint"}),
    "Implicit, 3 terms": (bilevel.Implicit, {"solver": bilevel.Neumann(2)}),
    "FiniteDifference": (bilevel.FiniteDifference, {}),
}


def measured(name: str, size: int, parts: int, device: torch.device) -> float:
    """Return the peak of one step in MiB."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)).to(device)
    corrector = nn.Sequential(nn.Linear(10, 10), nn.Softmax(1)).to(device)

    def upper_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        return cross_entropy(model(x), label)

    def lower_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        return cross_entropy(model(x), corrector(nn.functional.one_hot(label, 10).float()))

    method, options = METHODS[name]
    optimizer = method(
        upper_loss,
        lower_loss,
        upper=corrector,
        lower=model,
        upper_optimizer=torch.optim.SGD(corrector.parameters(), lr=0.1),
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        verify="never",  # no look in the middle of the measurement
        **options,
    )
    batches = [(torch.randn(size, 3, 32, 32, device=device), torch.randint(10, (size,), device=device)) for _ in "ab"]
    how = {"microbatches": parts} if parts > 1 else {}
    optimizer.step(*batches, **how)
    resident = [*model.parameters(), *corrector.parameters(), *(x for batch in batches for x in batch)]
    peak = peak_bytes(lambda: optimizer.step(*batches, **how), resident, device)
    return peak / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="samples in a batch")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, {device}, batches of {options.size}; MiB at the peak\n")
    print("| method | " + " | ".join(f"{parts} part{'s' * (parts > 1)}" for parts in options.parts) + " |")
    print("| --- |" + " --- |" * len(options.parts))
    for name in METHODS:
        cells = [measured(name, options.size, parts, device) for parts in options.parts]
        print(f"| {name} | " + " | ".join(f"{peak:.1f}" for peak in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
