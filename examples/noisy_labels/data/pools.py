"""CIFAR and the digits, split into trusted, noisy and test images that share none.

All images of a data set are one uint8 tensor; the parts are positions in it. Every class is shuffled once and then
split, so the parts are disjoint by construction and the trusted set has the same number of images of each class. Much
published code draws the parts independently instead, which puts nearly all trusted images into the noisy set too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.noisy_labels.data import archives, download, human_labels, noise
from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.run.settings import Settings

DIGITS_TEST_IMAGES = 500
CIFAR_MEAN, CIFAR_STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


class DataNotFoundError(FileNotFoundError):
    """The images are not on this machine."""


@dataclass(frozen=True)
class Pool:
    """All images of a data set, and which of them its authors set aside for testing."""

    pixels: Tensor  # uint8 (images, channels, height, width)
    labels: Tensor  # int64 (images,)
    official_test: Tensor | None  # positions, or None where the authors gave no test set
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: Tensor | None = None  # superclass of each class


def load(settings: Settings, device: torch.device) -> Task:
    """Read the images, split them into parts and corrupt the labels of the noisy part."""
    if settings.transition is not None:  # the small file first: a mistake in it is told before the images are read
        noise.read(Path(settings.transition).expanduser(), settings.classes)
    pool = digits() if settings.dataset == "digits" else cifar(settings.dataset, settings.data)
    return corrupted(pool, settings, device)


def corrupted(pool: Pool, settings: Settings, device: torch.device) -> Task:
    """Split images into parts, corrupt the labels of the noisy part and bring all to the device."""
    clean, noisy, test = split(pool, settings)
    given = pool.labels.clone()
    given[noisy] = noisy_labels(pool, noisy, settings)
    mean, std = (torch.tensor(one).view(1, -1, 1, 1) for one in (pool.mean, pool.std))
    order = settings.memory_format
    return Task(pool.pixels, pool.labels, given, clean, noisy, test, pool.names, mean, std, order).to(device)


def noisy_labels(pool: Pool, noisy: Tensor, settings: Settings) -> Tensor:
    """Return the noisy labels of the images at the positions ``noisy``."""
    if settings.noise == "human":
        training = pool.labels if pool.official_test is None else pool.labels[: int(pool.official_test[0])]
        places = folders(settings.data)
        return human_labels.read(settings.dataset, places, settings.human_column, training)[noisy]
    classes = len(pool.names)
    if settings.noise == "instance":
        source = generator(settings.seed, "noise")
        return noise.instance_dependent(pool.pixels[noisy], pool.labels[noisy], settings.rate, classes, source)
    if settings.transition is not None:
        transition = noise.read(Path(settings.transition).expanduser(), classes)
    else:
        transition = noise.matrix(settings.noise, settings.rate, classes, pool.groups, settings.exclude_true)
    return noise.corrupt(pool.labels[noisy], transition, generator(settings.seed, "noise"))


def split(pool: Pool, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Split the pool into clean, noisy and test positions, each sorted."""
    classes, candidates, test = len(pool.names), torch.arange(len(pool.labels)), pool.official_test
    stream = generator(settings.seed, "split")
    if test is None:
        per_class = DIGITS_TEST_IMAGES // classes
        test, candidates = take(pool.labels, candidates, classes, per_class, stream)
    else:
        candidates = candidates[~torch.isin(candidates, test)]
    if settings.train_images is not None:
        candidates, _ = take(pool.labels, candidates, classes, settings.train_images // classes, stream)
    per_class = max(1, round(settings.clean_fraction * len(candidates) / classes))
    clean, noisy = take(pool.labels, candidates, classes, per_class, stream)
    if len(noisy) == 0:
        rule = f"all {len(clean)} training images are trusted, and none is left to correct"
        raise ValueError(f"--clean-fraction {settings.clean_fraction}: {rule}. Trust a smaller share.")
    return clean, noisy, test[: settings.test_images]


def take(
    labels: Tensor, candidates: Tensor, classes: int, per_class: int, stream: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Take ``per_class`` random candidates of each class; return them and the remaining ones."""
    taken, left = [], []
    for one in range(classes):
        members = candidates[labels[candidates] == one]
        if len(members) < per_class:
            rule = f"class {one} has only {len(members)} images"
            raise ValueError(f"split({per_class} images per class): {rule}. Ask for fewer, or read the whole data set.")
        members = members[torch.randperm(len(members), generator=stream)]
        taken.append(members[:per_class])
        left.append(members[per_class:])
    return torch.cat(taken).sort().values, torch.cat(left).sort().values


def digits() -> Pool:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of 0 .. 16."""
    from sklearn.datasets import load_digits  # heavy, and only this data set needs it

    bunch = load_digits()
    pixels = torch.as_tensor(bunch.images).to(torch.uint8).unsqueeze(1)
    names = tuple(str(i) for i in range(10))
    return Pool(pixels, torch.as_tensor(bunch.target).long(), None, names, mean=(4.884,), std=(6.017,))


def cifar(dataset: str, folder: str | None) -> Pool:
    """Read CIFAR-10 or CIFAR-100 from an unpacked official archive; training images come first, in official order."""
    places = folders(folder)
    found = archives.find(dataset, places)
    if found is None:
        raise DataNotFoundError(_not_found(dataset, places))
    train, test = archives.read(*found)
    pixels = torch.cat([torch.from_numpy(train.pixels), torch.from_numpy(test.pixels)])
    labels = torch.cat([torch.from_numpy(train.labels), torch.from_numpy(test.labels)])
    official_test = torch.arange(len(train.labels), len(labels))
    names = archives.class_names(*found)
    return Pool(pixels, labels, official_test, names, CIFAR_MEAN, CIFAR_STD, _superclasses(train, len(names)))


def fetch_if_missing(dataset: str, folder: str | None) -> None:
    """Download a CIFAR archive into the folder, or into ./data, unless it is found already."""
    if dataset in download.SOURCES and archives.find(dataset, folders(folder)) is None:
        download.fetch(dataset, Path(folder or "data").expanduser())


def folders(named: str | None) -> list[Path]:
    """Return where to look for data: the named folder, or else those that are looked into by default."""
    places = [named] if named else [os.environ.get("BILEVEL_DATA"), "data"]
    return [Path(place).expanduser() for place in places if place]


def _superclasses(train: archives.Records, classes: int) -> Tensor | None:
    if train.coarse is None:
        return None
    groups = torch.full((classes,), -1)
    groups[torch.from_numpy(train.labels)] = torch.from_numpy(train.coarse)
    return groups


def _not_found(dataset: str, places: list[Path]) -> str:
    name = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[dataset]
    subfolders = " or ".join(layout.folder for layout in archives.LAYOUTS[dataset])
    looked = ", ".join(str(place) for place in places)
    return (
        f"{name} was not found (looked in: {looked}). Two ways out:\n"
        f"  --data FOLDER      the folder that holds {subfolders} (or set BILEVEL_DATA);\n"
        f"                     with --download it is fetched from its authors' page, about 165 MiB\n"
        f"  --dataset digits   scikit-learn's handwritten digits, always there"
    )
