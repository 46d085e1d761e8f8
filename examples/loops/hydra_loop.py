"""hydra: the method and its options from a configuration: ``python -m examples.loops.hydra_loop method=sama``.

The configuration names classes; what only a program has (losses, variables, optimizers) is given when it is made.
``--multirun method=unrolled,sama,bome`` compares methods; ``method.inner_steps=3`` changes an option, and an option
that the method does not have is an error where it is made.
"""

from __future__ import annotations

import itertools

import hydra
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from examples.loops.problem import Weighted, data, told_apart


@hydra.main(config_path="conf", config_name="config", version_base=None)
def main(config: DictConfig) -> None:
    torch.manual_seed(config.seed)
    trusted, noisy, right = data()
    model = Weighted()
    method = hydra.utils.instantiate(
        config.method,
        model.upper_loss,
        model.lower_loss,
        upper=model.weights,
        lower=model.classifier,
        upper_optimizer=hydra.utils.instantiate(config.upper_optimizer, [model.weights]),
        lower_optimizer=hydra.utils.instantiate(config.lower_optimizer, model.classifier.parameters()),
    )
    trusted_batches = itertools.cycle(DataLoader(trusted, batch_size=len(trusted)))
    for _ in range(config.epochs):
        for batch in DataLoader(noisy, batch_size=40, shuffle=True):
            method.step(next(trusted_batches), batch)
    print(f"{type(method).__name__}: {told_apart(model.weights, right)}")


if __name__ == "__main__":
    main()
