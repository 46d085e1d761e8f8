"""Readers of the official CIFAR archives, unpacked: the binary layout and the Python pickles.

Binary records are label bytes (CIFAR-10: one; CIFAR-100: coarse, fine) and 3,072 pixel bytes, planes R, G, B, row by
row. The pickles are opened by an unpickler that knows numpy arrays and nothing else, so that a manipulated file cannot
run code. Sizes and label ranges are checked; a folder that holds some of CIFAR-10's training batches only is accepted.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PIXELS = 3 * 32 * 32


class ArchiveError(ValueError):
    """A folder holds no readable CIFAR archive, or a damaged one."""


@dataclass(frozen=True)
class Records:
    """Images and labels of one part (training or test) of an archive, in the order of its files."""

    pixels: np.ndarray  # uint8 (images, 3, 32, 32)
    labels: np.ndarray  # int64 (images,)
    coarse: np.ndarray | None = None  # superclass of each image, CIFAR-100 only


@dataclass(frozen=True)
class Layout:
    """Where one data set keeps its parts in one of the two layouts."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    binary: bool
    classes: int


LAYOUTS = {
    "cifar10": (
        Layout(
            "cifar-10-batches-bin",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test_batch.bin",
            "batches.meta.txt",
            binary=True,
            classes=10,
        ),
        Layout(
            "cifar-10-batches-py",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test_batch",
            "batches.meta",
            binary=False,
            classes=10,
        ),
    ),
    "cifar100": (
        Layout("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", binary=True, classes=100),
        Layout("cifar-100-python", ("train",), "test", "meta", binary=False, classes=100),
    ),
}


def find(dataset: str, folders: list[Path]) -> tuple[Path, Layout] | None:
    """Return the first folder, or known subfolder of one, that holds a training and a test file of the data set."""
    for folder in folders:
        for layout in LAYOUTS[dataset]:
            for candidate in (folder / layout.folder, folder):
                if (candidate / layout.train[0]).is_file() and (candidate / layout.test).is_file():
                    return candidate, layout
    return None


def read(folder: Path, layout: Layout) -> tuple[Records, Records]:
    """Read the training and the test part."""
    files = [folder / name for name in layout.train if (folder / name).is_file()]
    reader = _binary if layout.binary else _pickled
    parts = [reader(file, layout.classes) for file in files]
    coarse = [part.coarse for part in parts if part.coarse is not None]
    train = Records(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate(coarse) if coarse else None,
    )
    return train, reader(folder / layout.test, layout.classes)


def class_names(folder: Path, layout: Layout) -> tuple[str, ...]:
    """Return the names of the classes, or their numbers where the archive's list of names is missing."""
    file, names = folder / layout.names, []
    if file.is_file() and layout.binary:
        names = file.read_text().split()
    elif file.is_file():
        meta = _load(file)
        names = [name.decode() for name in meta.get(b"label_names", meta.get(b"fine_label_names", []))]
    return tuple(names) if len(names) == layout.classes else tuple(str(i) for i in range(layout.classes))


def _binary(file: Path, classes: int) -> Records:
    label_bytes = 1 if classes == 10 else 2
    raw = np.fromfile(file, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % (label_bytes + PIXELS):
        rule = f"its {len(raw)} bytes are not a whole number of records of {label_bytes + PIXELS} bytes"
        raise ArchiveError(f"archive({file}): {rule}. The download was probably cut off. Fetch it again.")
    rows = raw.reshape(-1, label_bytes + PIXELS)
    coarse = rows[:, 0].astype(np.int64) if label_bytes == 2 else None
    return _checked(file, rows[:, label_bytes:], rows[:, label_bytes - 1].astype(np.int64), coarse, classes)


def _pickled(file: Path, classes: int) -> Records:
    content = _load(file)
    try:
        labels = np.asarray(content[b"labels" if classes == 10 else b"fine_labels"], dtype=np.int64)
        coarse = np.asarray(content[b"coarse_labels"], dtype=np.int64) if classes == 100 else None
        pixels = content[b"data"]
    except KeyError as missing:
        raise ArchiveError(f"archive({file}): has no entry {missing}. Fetch the archive again.") from None
    return _checked(file, pixels, labels, coarse, classes)


def _checked(file: Path, pixels: np.ndarray, labels: np.ndarray, coarse: np.ndarray | None, classes: int) -> Records:
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        rule = f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 ({len(labels)}, {PIXELS})"
        raise ArchiveError(f"archive({file}): {rule}. Fetch the archive again.")
    for values, limit in ((labels, classes), (coarse, 20)):
        if values is not None and (values.min() < 0 or values.max() >= limit):
            raise ArchiveError(f"archive({file}): a label is not in 0..{limit - 1}. Fetch the archive again.")
    return Records(np.ascontiguousarray(pixels).reshape(-1, 3, 32, 32), labels, coarse)


class _ArraysOnly(pickle.Unpickler):
    """Knows the names that a pickled numpy array needs, and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return np.empty(0).__reduce__()[0]  # the function under both its old and its new address
            case ("numpy", "ndarray"):
                return np.ndarray
            case ("numpy", "dtype"):
                return np.dtype
            case ("_codecs", "encode"):  # how Python 3 writes bytes into the old format
                return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _load(file: Path) -> dict[bytes, Any]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError) as problem:
        rule = f"is no pickle of plain arrays ({problem})"
        raise ArchiveError(f"archive({file}): {rule}. Fetch the archive again, from its official page.") from None
    return content if isinstance(content, dict) else {}
