"""Checkpoints from which a run continues with the same numbers as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from examples.noisy_labels.files import replacing

NAME = "checkpoint.pt"


def save(file: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that, killed at any moment, either the old or the new one is there, whole."""
    with replacing(file) as stream:
        torch.save(content, stream)


def load(file: Path) -> dict[str, Any]:
    """Read a checkpoint into the host's memory; whoever takes a part of it moves it to its device.

    Only tensors and plain values are accepted, so a foreign file cannot run code. Loading to the device instead would
    put Adam's step counter there too, and Adam would wait for the device at every step to read it.
    """
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content
