"""The log's numbers for TensorBoard, if it is installed: ``pip install -e ".[tensorboard]"``.

The log is the record; this is a second view of it. A resumed run deletes the event files that an earlier process left
and writes the points of the kept log again, so that every point is there once, whatever reads them. A TensorBoard that
is open meanwhile is told by ``purge_step`` to forget what it has seen.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

FOLDER = "tensorboard"


class Board:
    """Writes the records of a `Log` as scalars: ``step/...`` over training steps, ``epoch/...`` over epochs.

    Args:
        folder: Folder of the event files.
        steps_per_epoch: For the steps' horizontal axis.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, steps_per_epoch: int) -> None:
        require()
        from torch.utils.tensorboard import SummaryWriter  # not everybody has it

        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.steps_per_epoch = steps_per_epoch
        self.writer = SummaryWriter(str(folder), purge_step=0)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()

    def add(self, record: dict[str, Any]) -> None:
        """Add the numbers of a record of the log; those of other events than steps and epochs have no axis."""
        event = record["event"]
        if event not in ("step", "epoch"):
            return
        epoch = record["epoch"]
        position = (epoch - 1) * self.steps_per_epoch + record["step"] if event == "step" else epoch
        for name, value in record.items():
            if name not in ("event", "epoch", "step"):
                self.writer.add_scalar(f"{event}/{name}", value, position)


def require() -> None:
    """Complain at once, and not after hours, if TensorBoard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401  # imports the package tensorboard
    except ImportError as missing:
        advice = (
            'Install it (pip install tensorboard, or this checkout with ".[tensorboard]"), or leave the option out.'
        )
        raise ValueError(f"--tensorboard: the package tensorboard cannot be imported ({missing}). {advice}") from None
