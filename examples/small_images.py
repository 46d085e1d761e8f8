"""Small labelled images with a known share of random labels: scikit-learn's digits, or Fashion-MNIST from a folder."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
IMAGES, LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
DIGITS = tuple("0123456789")
FASHION = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@dataclass(frozen=True)
class Data:
    """Training images with given and true labels; trusted images, images that say when to stop, test images.

    An image is a row of standardised pixels in float64.
    """

    x: Tensor
    given: Tensor
    true: Tensor
    upper: Batch
    select: Batch
    test: Batch
    names: tuple[str, ...]


def load(folder: Path | None, seed: int, *, noise: float) -> Data:
    """Split the images and replace a share ``noise`` of the training labels by random ones, which may be the same.

    Args:
        folder: Holds Fashion-MNIST's four files, gzipped or not; None: the digits.
        seed: Of the split and the labels.
        noise: Expected share of replaced labels; 0.9 of them are wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    if folder is None:
        digits = load_digits()
        x, y = torch.from_numpy(digits.data), torch.from_numpy(digits.target)
        test, held, names = 500, 100, DIGITS
        order = torch.randperm(len(x), generator=generator)
    else:  # the test images stay what they are; 10 : 1 : 1 of the others, as in BOME's paper
        (tested, asked), (trained, answers) = (
            (read_idx(folder / IMAGES.format(part)), read_idx(folder / LABELS.format(part)))
            for part in ("t10k", "train")
        )
        x, y = torch.cat([tested, trained]).flatten(1), torch.cat([asked, answers])
        test, held, names = len(tested), len(trained) // 12, FASHION
        order = torch.cat([torch.arange(test), test + torch.randperm(len(trained), generator=generator)])
    sizes = [test, held, held, len(x) - test - 2 * held]
    images, labels = x[order].double().split(sizes), y[order].long().split(sizes)
    mean, deviation = images[3].mean(), images[3].std() + 1e-4
    batches = [((part - mean) / deviation, answer) for part, answer in zip(images, labels, strict=True)]
    train, true = batches[3]
    replaced = torch.rand(len(true), generator=generator) < noise
    given = torch.where(replaced, torch.randint(10, true.shape, generator=generator), true)
    return Data(train, given, true, upper=batches[1], select=batches[2], test=batches[0], names=names)


def fashion_folder() -> Path | None:
    """Return the folder with Fashion-MNIST that BILEVEL_DATA names or contains, if it does."""
    root = Path(os.environ.get("BILEVEL_DATA", ""))
    places = (root, root / "fashion-mnist", root / "FashionMNIST" / "raw") if root.name else ()
    return next((place for place in places if list(place.glob(IMAGES.format("train") + "*"))), None)


def accuracy(model: nn.Module, batch: Batch) -> float:
    """Return the share of right answers."""
    return float((model(batch[0]).argmax(1) == batch[1]).double().mean())


def read_idx(file: Path) -> Tensor:
    """Read one idx file of bytes, or ``file.gz``: a magic number, a big-endian size per dimension, the bytes."""
    packed = file.with_name(f"{file.name}.gz")
    if not file.is_file() and not packed.is_file():
        raise FileNotFoundError(
            f"{file}: not there, nor with .gz. The folder must hold Fashion-MNIST's four idx files."
        )
    content = file.read_bytes() if file.is_file() else gzip.decompress(packed.read_bytes())
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{file}: is no idx file of bytes, which starts with 0, 0, 8. Download it again.")
    dimensions = content[3]
    sizes = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes).copy())
