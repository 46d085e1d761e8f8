"""Random crops and mirror images of a whole batch at once, on the device that holds the images.

An image is padded by reflection, cropped back to its size at a random place and mirrored with probability 1/2. Written
as one gather: padding, cropping and mirroring only say from which row and column each pixel comes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crop_and_flip(pixels: Tensor, index: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Return augmented copies of ``pixels[index]``, shape (batch, channels, height, width).

    Args:
        pixels: All images, (images, channels, height, width), of any dtype.
        index: Which images, (batch,).
        generator: Random stream on the device of ``pixels``.
        padding: Width of the reflected border; the crop moves by up to this many pixels each way.
    """
    batch, device = len(index), pixels.device
    height, width = pixels.shape[-2:]
    shift = torch.randint(-padding, padding + 1, (2, batch, 1), device=device, generator=generator)
    mirrored = torch.randint(0, 2, (batch, 1), device=device, generator=generator).bool()
    rows = _reflect(shift[0] + torch.arange(height, device=device), height)
    columns = _reflect(shift[1] + torch.arange(width, device=device), width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    picked = pixels[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions outside 0 .. size-1 back inside, without repeating the border."""
    return size - 1 - (size - 1 - position.abs()).abs()
