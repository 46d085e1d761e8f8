"""Fetch a CIFAR archive from its authors' page, with a progress bar; its hash is checked before it is unpacked.

The fetching is torch's own (`torch.hub`): it writes beside the file, checks the hash and renames.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Source:
    """An archive on the web and its SHA-256."""

    url: str
    sha256: str


SOURCES = {
    "cifar10": Source(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    "cifar100": Source(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
}


def fetch(dataset: str, folder: Path) -> None:
    """Download and unpack the binary archive of a data set into a folder; about 165 MiB, 180 MiB unpacked.

    An archive that is in the folder already, with the right hash, is taken instead. Killed at any moment, no half of a
    data set is left where it would be found.

    Raises:
        ValueError: The file that came has another hash. It is deleted. Or it holds what no data set needs: a link, or a
            path that leads out of the folder.
        OSError: The network or the disk failed.
    """
    source = SOURCES[dataset]
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / source.url.rsplit("/", 1)[1]
    if not (archive.is_file() and _sha256(archive) == source.sha256):
        try:
            torch.hub.download_url_to_file(source.url, str(archive), hash_prefix=source.sha256, progress=True)
        except RuntimeError as problem:  # what torch.hub raises on a wrong hash, after deleting the file
            rule = f"the file is not the published one ({problem})"
            advice = "Try again, or fetch it by hand and give --data."
            raise ValueError(f"download({source.url}): {rule}. {advice}") from None
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{archive.name}.") as name:
        unpacked = Path(name)
        with tarfile.open(archive) as content:
            _unpack(content, unpacked)
        for one in unpacked.iterdir():
            place = folder / one.name
            if place.is_dir():
                shutil.rmtree(place)  # no complete data set, or nothing had been fetched
            one.replace(place)
    archive.unlink()


def _unpack(content: tarfile.TarFile, folder: Path) -> None:
    """Write plain files and folders; tarfile's own filter for this is missing in Python 3.11.0 to 3.11.3."""
    for member in content:
        place = (folder / member.name).resolve()
        if not place.is_relative_to(folder.resolve()) or not (member.isfile() or member.isdir()):
            rule = "an archive holds plain files in folders, none of them outside"
            advice = "It is not the published one. Fetch it from its authors' page."
            raise ValueError(f"download({member.name}): {rule}. {advice}")
        (place if member.isdir() else place.parent).mkdir(parents=True, exist_ok=True)
        source = content.extractfile(member)
        if source is not None:  # None: a folder
            with source, place.open("wb") as stream:
                shutil.copyfileobj(source, stream)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
