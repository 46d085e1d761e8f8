"""Image files of any size and kind as one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from examples.noisy_labels.data.table import Table


def folder_as_table(folder: Path) -> Table:
    """List the images of a folder, as ``file`` and ``label``: the folder they are in. Hidden files are left out."""
    Image.init()
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in Image.EXTENSION)
    files = sorted(file for file in found if not any(part.startswith(".") for part in file.parts))
    if not files:
        raise ValueError(f"Images({folder}): there is no image in it. Put those of a class into a folder of its name.")
    for file in files:
        if len(file.parts) < 2:
            rule = f"{file} is in no folder, and the folders' names are the labels"
            raise ValueError(f"Images({folder}): {rule}. Move it, or give the labels with --table.")
    cells = {"file": [file.as_posix() for file in files], "label": [file.parts[0] for file in files]}
    return Table(folder, pandas.DataFrame(cells, index=range(1, len(files) + 1)))


def read(files: Iterable[Path], size: int) -> Tensor:
    """Return uint8 (images, 3, size, size). Images are cropped around the centre to a square, then resized."""
    return torch.stack([_read(file, size) for file in files])


def _read(file: Path, size: int) -> Tensor:
    if not file.is_file():
        raise FileNotFoundError(f"Images({file}): there is no such file. Files are looked for in --images.")
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            opaque = upright.convert("RGBA") if "transparency" in upright.info else upright
            square = ImageOps.fit(opaque.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        rule = f"cannot be read as an image ({str(problem).replace(str(file), file.name)})"
        raise ValueError(f"Images({file}): {rule}. Replace or remove it.") from None
    return torch.from_numpy(np.array(square)).movedim(-1, 0).contiguous()
