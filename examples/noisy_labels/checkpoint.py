"""Checkpoints from which a run continues with the same numbers as if it had never stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"


def save(file: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that, killed at any moment, either the old or the new one is there, whole."""
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)


def load(file: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted, so a foreign file cannot run code."""
    content: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    return content
