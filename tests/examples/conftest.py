"""Small stand-ins for the CIFAR archives, in the official layouts."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from fake_images import fake_images


@pytest.fixture
def cifar10_folder(tmp_path: Path) -> Path:
    """CIFAR-10, binary layout, two training batches and the test batch, 60 images each."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, name in enumerate(("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")):
        pixels, labels = fake_images(10, seed)
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / name)
    return tmp_path


@pytest.fixture
def cifar10_pickles(tmp_path: Path) -> Path:
    """The same images in the Python layout."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        pixels, labels = fake_images(10, seed)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2))
    return tmp_path


@pytest.fixture
def cifar100_folder(tmp_path: Path) -> Path:
    """CIFAR-100, binary layout; class i belongs to superclass i mod 20."""
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for seed, name in enumerate(("train.bin", "test.bin")):
        pixels, labels = fake_images(100, seed)
        np.concatenate([labels[:, None] % 20, labels[:, None], pixels], axis=1).tofile(folder / name)
    return tmp_path
