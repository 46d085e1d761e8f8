"""Checkpoints from which a run continues with the same numbers as if it had never stopped.

A checkpoint ends with the SHA-256 of all that is before it, and nothing of it is read before that is found right: a bit
that a disk or a cable has changed would otherwise become another weight without a word. `torch.load` reads these files
too, because what stands behind its archive is no matter to it, but then nothing is verified.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from examples.noisy_labels.run.files import replacing

NAME = "checkpoint.pt"
SEAL = b"\nbilevel checkpoint, SHA-256 of all before this line: "  # then the digest, in hexadecimal, and a line feed
SEAL_BYTES = len(SEAL) + 64 + 1


def save(file: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that, killed at any moment, either the old or the new one is there, whole."""
    archive = io.BytesIO()  # torch turns what a full disk answers into errors of its own
    torch.save(content, archive)
    with replacing(file) as stream:
        stream.write(sealed(archive.getvalue()))


def load(file: Path, *parts: str) -> dict[str, Any]:
    """Read a checkpoint into the host's memory; whoever takes a part of it moves it to its device.

    Only tensors and plain values are accepted, so a foreign file cannot run code. Loading to the device instead would
    put Adam's step counter there too, and Adam would wait for the device at every step to read it.

    Args:
        file: The checkpoint.
        parts: Names that it must hold: a sound file may be another program's.

    Raises:
        ValueError: The file is damaged or none of ours.
    """
    archive = opened(file.read_bytes(), file)
    try:
        content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as problem:  # whatever torch, pickle and zip raise; the text names what is not accepted
        text = " ".join(str(problem).split())
        rule = f"is whole, and cannot be read ({type(problem).__name__}: {text})"
        raise ValueError(f"Checkpoint({file}): {rule}. It is of another version, or was not made by a run.") from None
    lacking = [name for name in parts if not isinstance(content, dict) or name not in content]
    if lacking or not isinstance(content, dict):
        rule = f"is whole, and holds no {lacking[0] if lacking else 'named parts'}"
        raise ValueError(f"Checkpoint({file}): {rule}. It is another program's. Put back the run's own.")
    return content


def sealed(archive: bytes) -> bytes:
    """Return the bytes with their SHA-256 behind them."""
    return archive + SEAL + hashlib.sha256(archive).hexdigest().encode() + b"\n"


def opened(data: bytes, file: Path) -> bytes:
    """Return what was sealed, if it is what was sealed."""
    archive, seal = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
    if data and data == sealed(archive):
        return archive
    if not data:
        rule, cause = "is empty", "Most often a disk was full, or a copy was cut off"
    elif seal.startswith(SEAL):
        rule, cause = "is not what was written: its SHA-256 differs", "A disk, a cable or a copy has changed it"
    else:
        rule = "does not end with the SHA-256 of a checkpoint"
        cause = "It was cut off, is of an older version, or of another program"
    advice = "Nothing of it was read. Put back a copy, or start anew: --overwrite replaces a run"
    raise ValueError(f"Checkpoint({file}): {rule}. {cause}. {advice}.")
