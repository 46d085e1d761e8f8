"""Sample weights learned by several processes, which step as one on the joined batch.

    torchrun --nproc-per-node 2 examples/processes.py            # two processes of this machine
    python examples/processes.py                                 # the same numbers by one

``--batch`` counts the samples of the joined batch: each process takes its equal part of every batch, so that the number
of processes changes nothing but the time. The run ends with one line that is the same whatever their number is.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel

SAMPLES, TRUSTED, WRONG, INPUTS = 480, 40, 0.3, 10


def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two classes, of which a part of the labels is wrong: inputs, given labels, true labels."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, INPUTS, generator=draw, dtype=torch.float64)
    true = (x @ torch.randn(INPUTS, generator=draw, dtype=torch.float64) > 0).double()
    wrong = torch.rand(SAMPLES, generator=draw) < WRONG
    return x, torch.where(wrong, 1 - true, true), true


def part_of(rows: Tensor, rank: int, processes: int) -> Tensor:
    """Return the rows of a joined batch that a process takes."""
    return rows.chunk(processes)[rank]


def train(batch: int, steps: int, rank: int, processes: int) -> tuple[float, float]:
    """Train, and return the accuracy and the sum of the weights; the same on all processes, whatever their number."""
    torch.manual_seed(0)  # everywhere the same first values
    x, given, true = data(seed=0)  # the first labels are trusted
    model = nn.Linear(INPUTS, 1).double()
    weights = torch.zeros(SAMPLES, dtype=torch.float64, requires_grad=True)

    def upper_loss(rows: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(model(x[rows]).squeeze(1), true[rows])

    def lower_loss(rows: Tensor) -> Tensor:
        each = binary_cross_entropy_with_logits(model(x[rows]).squeeze(1), given[rows], reduction="none")
        return (torch.sigmoid(weights[rows]) * each).mean()

    optimizer = bilevel.Unrolled(
        upper_loss,
        lower_loss,
        upper=weights,
        lower=model,
        upper_optimizer=torch.optim.Adam([weights], lr=0.3),
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        process_group=dist.group.WORLD if processes > 1 else False,
    )
    draw = torch.Generator().manual_seed(1)  # the same joined batches on every process
    for _ in range(steps):
        trusted = torch.randint(TRUSTED, (batch,), generator=draw)
        noisy = torch.randint(TRUSTED, SAMPLES, (batch,), generator=draw)
        optimizer.step(part_of(trusted, rank, processes), part_of(noisy, rank, processes))
    if optimizer.processes is not None and rank == 0:
        sent = optimizer.processes.traffic
        print(f"each process sent {sent.bytes / steps / 1e3:.1f} kB a step in {sent.reductions / steps:.1f} reductions")
    right = ((model(x).squeeze(1) > 0).double() == true).double().mean()
    return float(right), float(weights.detach().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=48, help="samples of a joined batch (default 48)")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if options.batch % processes != 0:
        parser.error(f"--batch {options.batch} is no multiple of the {processes} processes; equal parts are needed")
    if processes > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if processes > 1 else 0
    if rank == 0:
        share = options.batch // processes
        print(f"joined batches of {options.batch}: {share} samples on each of {processes} process(es)")
    accuracy, total = train(options.batch, options.steps, rank, processes)
    if rank == 0:
        print(f"accuracy {accuracy:.3f}, sum of the weights {total:.6f}")
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
