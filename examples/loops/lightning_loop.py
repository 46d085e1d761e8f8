"""Lightning, with manual optimization: ``python -m examples.loops.lightning_loop``.

Give the method the optimizers that ``self.optimizers()`` returns: they are moved through Lightning, which so counts
(``global_step``, by two for each step of ours: it counts every optimizer), logs, calls back and writes checkpoints.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import bilevel
from examples.loops.problem import Batch, Weighted, data, told_apart


class Reweighting(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # directions are no gradients of one loss
        self.model = Weighted()
        self.saved: dict[str, Any] | None = None

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        upper = torch.optim.Adam([self.model.weights], lr=0.1)
        lower = torch.optim.SGD(self.model.classifier.parameters(), lr=0.3, momentum=0.9)
        return [upper, lower]

    def on_train_start(self) -> None:  # Lightning has wrapped, placed and restored everything
        upper, lower = self.optimizers()
        self.method = bilevel.Unrolled(
            self.model.upper_loss,
            self.model.lower_loss,
            upper=self.model.weights,
            lower=self.model.classifier,
            upper_optimizer=upper,
            lower_optimizer=lower,
        )
        if self.saved is not None:
            self.method.load_state_dict(self.saved)
        trusted, _, _ = data()
        batches = DataLoader(trusted, batch_size=len(trusted))
        self.trusted = itertools.cycle([part.to(self.device) for part in batch] for batch in batches)

    def training_step(self, batch: Batch, index: int) -> None:
        stats = self.method.step(next(self.trusted), batch)
        self.log_dict({"upper_loss": stats.upper_loss, "lower_loss": stats.lower_loss}, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bilevel"] = self.method.state_dict()  # what the method itself remembers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["bilevel"]


def main(argv: Sequence[str] | None = None) -> tuple[Trainer, Reweighting]:
    parser = argparse.ArgumentParser(description="Lightning.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    arguments = parser.parse_args(argv)

    seed_everything(0, verbose=False)
    _, noisy, right = data()
    module = Reweighting()
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        default_root_dir=arguments.folder,
        callbacks=[ModelCheckpoint(arguments.folder, every_n_epochs=1, save_last=True, enable_version_counter=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resumed = str(arguments.folder / "last.ckpt") if arguments.resume else None
    trainer.fit(module, DataLoader(noisy, batch_size=40), ckpt_path=resumed)
    print(f"global step {trainer.global_step}; {told_apart(module.model.weights, right)}")
    return trainer, module


if __name__ == "__main__":
    main()
