"""Labels that people gave: CIFAR-10N and CIFAR-100N (Wei et al., ICLR 2022).

The files hold several columns of labels and one of true labels, in the order of the Python archives. The official
binary archives are said to be in another order, which would silently turn human noise into random noise. So a column is
used only if the true labels equal those of the images, one by one.

Beside the released ``.pt`` files, ``.npz`` files with the same columns are read (``cifar10n.npz``: arrays ``clean``,
``aggre``, ``worse``, ``random1``, ...; ``cifar100n.npz``: ``clean``, ``noisy``), in the folder of the data or in its
folder ``cifar-n``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILES = {"cifar10": ("CIFAR-10_human.pt", "cifar10n.npz"), "cifar100": ("CIFAR-100_human.pt", "cifar100n.npz")}
SUBFOLDER = "cifar-n"
COLUMNS = {
    "aggre": "aggre_label",
    "worse": "worse_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
    "noisy": "noisy_label",  # the one column of CIFAR-100N
}
_RELEASED = {"clean": "clean_label", **COLUMNS}  # the short names of the .npz files
TERMS = (
    "CIFAR-N labels: http://noisylabels.com, licence CC BY-NC 4.0: not for commercial use. "
    "Cite Wei et al., Learning with Noisy Labels Revisited, ICLR 2022."
)


def read(dataset: str, folders: list[Path], column: str, true: Tensor) -> Tensor:
    """Return one column of human labels for the training images, whose true labels are given for the check.

    ``true`` may be the first part of the training set, where only some training batches are there.
    """
    names = FILES[dataset]
    places = [place for folder in folders for place in (folder, folder / SUBFOLDER)]
    file = next((place / name for place in places for name in names if (place / name).is_file()), None)
    if file is None:
        looked = ", ".join(map(str, folders))
        advice = f"Put the file of noisylabels.com there (or {names[1]})."
        raise ValueError(f"human_labels({names[0]}): not found in {looked}. {advice}")
    content = _load(file)
    clean = _column(content, "clean_label", file)
    labels = _column(content, COLUMNS[column], file)
    if len(clean) < len(true) or not torch.equal(clean[: len(true)], true.cpu()):
        same = (clean[: len(true)] == true[: len(clean)].cpu()).double().mean().item()
        rule = f"its true labels agree with those of the images in {100 * same:.1f} % of the cases"
        advice = "The images are in another order: use the Python archive (cifar-10-batches-py, cifar-100-python)."
        raise ValueError(f"human_labels({file}): {rule}, and must in all. {advice}")
    return labels[: len(true)]


def _column(content: dict[str, Any], name: str, file: Path) -> Tensor:
    if name not in content:
        labels = ", ".join(key for key in content if "label" in key)
        raise ValueError(f"human_labels({file}): has no column {name}, but {labels}. Choose another --human-column.")
    return torch.as_tensor(np.asarray(content[name]).astype(np.int64))


def _load(file: Path) -> dict[str, Any]:
    """Read the dictionary of arrays, allowing numpy arrays of integers and nothing else."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as columns:
            return {_RELEASED.get(name, name): columns[name] for name in columns.files}
    rebuild = np.empty(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("uint8", "int32", "int64")]
    arrays: list[Any] = [
        np.ndarray,
        np.dtype,
        *kinds,
        (rebuild, "numpy.core.multiarray._reconstruct"),
        (rebuild, "numpy._core.multiarray._reconstruct"),
    ]
    with torch.serialization.safe_globals(arrays):
        content: dict[str, Any] = torch.load(file, weights_only=True)
    return content
