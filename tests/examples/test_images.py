"""Reading archives, dealing images into disjoint parts, augmentation and batches."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from examples.noisy_labels.data import archives, download, pools
from examples.noisy_labels.data.augment import crop_and_flip
from examples.noisy_labels.data.batches import Batches
from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.run.settings import Settings
from fake_images import PER_CLASS, fake_images

CPU = torch.device("cpu")


def settings(folder: Path | None = None, **options: object) -> Settings:
    return Settings(data=str(folder) if folder else None, **options)  # type: ignore[arg-type]


def test_binary_archive_is_read_as_written(cifar10_folder: Path) -> None:
    pool = pools.cifar("cifar10", str(cifar10_folder))
    parts = [fake_images(10, seed) for seed in range(3)]  # the archive: two training batches, then the test batch
    pixels = np.concatenate([part[0] for part in parts]).reshape(-1, 3, 32, 32)
    assert np.array_equal(pool.pixels.numpy(), pixels)
    assert pool.labels.tolist() == np.concatenate([part[1] for part in parts]).tolist()
    assert pool.official_test is not None
    assert pool.official_test.tolist() == list(range(120, 180))


def test_both_layouts_hold_the_same(cifar10_folder: Path, cifar10_pickles: Path) -> None:
    folders = [cifar10_folder / "cifar-10-batches-bin", cifar10_pickles / "cifar-10-batches-py"]
    binary, pickled = (pools.cifar("cifar10", str(folder)) for folder in folders)
    assert torch.equal(binary.pixels, pickled.pixels)
    assert torch.equal(binary.labels, pickled.labels)


def test_cifar100_has_superclasses(cifar100_folder: Path) -> None:
    pool = pools.cifar("cifar100", str(cifar100_folder))
    assert pool.groups is not None
    assert pool.groups.tolist() == [i % 20 for i in range(100)]
    task = pools.load(settings(cifar100_folder, dataset="cifar100", noise="hierarchical", clean_fraction=0.2), CPU)
    assert (pool.groups[task.noisy_labels] == pool.groups[task.true_labels]).all()


def test_a_pickle_that_runs_code_is_refused(cifar10_pickles: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("echo this must not run",)

    file = cifar10_pickles / "cifar-10-batches-py" / "data_batch_1"
    file.write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}))
    with pytest.raises(archives.ArchiveError, match=r"\.system"):
        pools.cifar("cifar10", str(cifar10_pickles))


def test_a_cut_off_file_is_refused(cifar10_folder: Path) -> None:
    file = cifar10_folder / "cifar-10-batches-bin" / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(archives.ArchiveError, match="whole number of records of 3073 bytes"):
        pools.cifar("cifar10", str(cifar10_folder))


def test_an_impossible_label_is_refused(cifar10_folder: Path) -> None:
    file = cifar10_folder / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    with pytest.raises(archives.ArchiveError, match=r"a label is not in 0\.\.9"):
        pools.cifar("cifar10", str(cifar10_folder))


def test_missing_images_name_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(
        pools.DataNotFoundError, match=r"CIFAR-10 was not found(.|\n)*--data FOLDER(.|\n)*--dataset digits"
    ):
        pools.cifar("cifar10", str(tmp_path))


def test_the_folder_may_come_from_the_environment(cifar10_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILEVEL_DATA", str(cifar10_folder))
    assert len(pools.cifar("cifar10", None).labels) == 180


@pytest.mark.parametrize("seed", [1, 2])
def test_parts_share_no_image(seed: int) -> None:
    task = pools.load(settings(dataset="digits", noise="flip", clean_fraction=0.04, seed=seed), CPU)
    assert task.overlap == 0
    assert len(task.clean) + len(task.noisy) + len(task.test) == 1797
    assert torch.bincount(task.labels[task.clean]).tolist() == [5] * 10
    assert torch.bincount(task.labels[task.test]).tolist() == [50] * 10


def test_a_subset_is_balanced(cifar10_folder: Path) -> None:
    task = pools.load(settings(cifar10_folder, train_images=80, test_images=40, clean_fraction=0.25), CPU)
    assert torch.bincount(task.labels[task.clean]).tolist() == [2] * 10
    assert torch.bincount(task.true_labels).tolist() == [6] * 10
    assert task.test.tolist() == list(range(120, 160)), "training images must not be tested on"


def test_more_images_than_there_are_is_refused(cifar10_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"has only {2 * PER_CLASS} images"):
        pools.load(settings(cifar10_folder, train_images=200), CPU)


def test_split_and_noise_depend_on_the_seed_alone() -> None:
    first, again, other = (
        pools.load(settings(dataset="digits", method=method, seed=seed), CPU)
        for method, seed in (("ce", 1), ("ebomlc", 1), ("ebomlc", 2))
    )
    assert torch.equal(first.noisy, again.noisy)
    assert torch.equal(first.given, again.given)
    assert not torch.equal(first.clean, other.clean)


def test_overlapping_parts_cannot_be_built() -> None:
    task = pools.load(settings(dataset="digits"), CPU)
    with pytest.raises(ValueError, match="in two of clean, noisy and test"):
        Task(**(vars(task) | {"test": torch.cat([task.test, task.clean[:1]])}))


def test_every_augmented_image_is_a_crop_of_the_padded_one() -> None:
    pixels = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    index = torch.arange(2).repeat(100)
    augmented = crop_and_flip(pixels, index, generator(1, "crops"), padding=2)
    padded = pad(pixels, (2, 2, 2, 2), mode="reflect")
    crops = [padded[:, :, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    allowed = torch.stack(crops + [crop.flip(3) for crop in crops])  # (50, 2, 3, 8, 8)
    found = (augmented[None] == allowed[:, index]).flatten(2).all(2)
    assert found.any(0).all(), "an image that no shift and mirroring gives"
    assert found.any(1).sum() > 45, "nearly all of the 50 ways should occur among 200 draws"


def test_augmentation_keeps_the_kind_of_pixels() -> None:
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    augmented = crop_and_flip(pixels, torch.tensor([4, 0]), generator(1, "crops"))
    assert (augmented.shape, augmented.dtype) == ((2, 3, 32, 32), torch.uint8)


def batches(size: int = 100, augment: bool = True, corrupt: float = 0.0) -> Batches:
    task = pools.load(settings(dataset="digits"), CPU)
    random = torch.full((len(task.noisy),), corrupt) if corrupt else None
    options = {"size": size, "augment": augment, "corrupt": random}
    return Batches(task, task.noisy, task.noisy_labels, seed=1, purpose="noisy batches", **options)  # type: ignore[arg-type]


def test_a_pass_takes_each_image_once() -> None:
    loader = batches(size=100, augment=False)
    seen = [next(loader) for _ in range(len(loader))]
    expected = loader.task.inputs(loader.index[loader.order[:1200]])
    assert len(seen) == 1247 // 100
    assert torch.equal(torch.cat([batch.inputs for batch in seen]), expected)
    assert loader.order.sort().values.tolist() == list(range(len(loader.index)))


def test_batches_pair_images_with_their_labels() -> None:
    loader = batches(augment=False)
    batch = next(loader)
    chosen = loader.order[:100]
    assert torch.equal(batch.labels, loader.task.noisy_labels[chosen])
    assert torch.equal(batch.inputs, loader.task.inputs(loader.task.noisy[chosen]))


def test_given_labels_may_be_corrupted_on_purpose() -> None:
    assert torch.equal(next(batches()).given, next(batches()).labels)
    loader = batches(corrupt=0.5)
    different = torch.cat([batch.given != batch.labels for batch, _ in zip(loader, range(120), strict=False)])
    # Half of the labels are drawn anew, of which one in ten is the same again: 45 %, with sigma 0.0045 in 12,000.
    assert different.double().mean().item() == pytest.approx(0.45, abs=3 * 0.0045)


def test_a_small_part_is_one_batch() -> None:
    loader = batches(size=5000)
    assert (len(loader), len(next(loader).labels)) == (1, len(loader.index))


def test_batches_continue_where_they_were_saved() -> None:
    loader, resumed = batches(), batches()
    for _ in range(17):  # beyond the end of a pass
        next(loader)
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in loader.state_dict().items()
    }
    expected = [next(loader) for _ in range(15)]
    resumed.load_state_dict(state)
    for want in expected:
        got = next(resumed)
        assert torch.equal(got.inputs, want.inputs)
        assert torch.equal(got.labels, want.labels)


@pytest.mark.skipif("BILEVEL_DATA" not in os.environ, reason="BILEVEL_DATA names no folder with CIFAR-10")
def test_real_cifar10() -> None:
    task = pools.load(Settings(), CPU)
    assert task.overlap == 0
    assert len(task.names) == 10
    share = torch.bincount(task.labels, minlength=10) / len(task.labels)
    assert (share - 0.1).abs().max() < 0.02, "the archive's classes are balanced"
    # The published channel means; a subset of 1,000 images is within a few grey levels.
    means = task.samples.double().mean((0, 2, 3))
    torch.testing.assert_close(means, torch.tensor([125.3, 123.0, 113.9], dtype=torch.float64), rtol=0, atol=4.0)


def human_file(folder: Path, **columns: np.ndarray) -> None:
    torch.save(columns, folder / "CIFAR-10_human.pt")


def test_human_labels_are_taken_for_the_noisy_images(cifar10_folder: Path) -> None:
    true = pools.cifar("cifar10", str(cifar10_folder)).labels[:120].numpy()
    worse = np.random.default_rng(0).integers(0, 10, 200)
    human_file(cifar10_folder, clean_label=np.concatenate([true, np.zeros(80, np.int64)]), worse_label=worse)
    task = pools.load(settings(cifar10_folder, noise="human", clean_fraction=0.2), CPU)
    assert task.noisy_labels.tolist() == worse[task.noisy.numpy()].tolist()


def test_human_labels_in_another_order_are_refused(cifar10_folder: Path) -> None:
    true = pools.cifar("cifar10", str(cifar10_folder)).labels[:120].numpy()
    true[[0, 1]] = true[[1, 0]] if true[0] != true[1] else (true[0] + 1) % 10
    human_file(cifar10_folder, clean_label=true, worse_label=true)
    with pytest.raises(ValueError, match=r"agree with those of the images in 98\.3 % of the cases"):
        pools.load(settings(cifar10_folder, noise="human", clean_fraction=0.2), CPU)


def test_human_labels_that_are_not_there(cifar10_folder: Path) -> None:
    options = settings(cifar10_folder, noise="human", clean_fraction=0.2)
    with pytest.raises(ValueError, match=r"CIFAR-10_human\.pt\): not found"):
        pools.load(options, CPU)
    true = pools.cifar("cifar10", str(cifar10_folder)).labels[:120].numpy()
    human_file(cifar10_folder, clean_label=true, aggre_label=true)
    with pytest.raises(ValueError, match="has no column worse_label, but clean_label, aggre_label"):
        pools.load(options, CPU)


def test_human_labels_are_read_from_an_npz_too(cifar10_folder: Path) -> None:
    true = pools.cifar("cifar10", str(cifar10_folder)).labels[:120].numpy()
    aggre = np.random.default_rng(0).integers(0, 10, 120).astype(np.uint8)
    (cifar10_folder / "cifar-n").mkdir()
    np.savez(cifar10_folder / "cifar-n" / "cifar10n.npz", clean=true.astype(np.uint8), aggre=aggre)
    options = settings(cifar10_folder, noise="human", human_column="aggre", clean_fraction=0.2)
    task = pools.load(options, CPU)
    assert task.noisy_labels.tolist() == aggre[task.noisy.numpy()].tolist()
    with pytest.raises(ValueError, match="has no column worse_label, but clean_label, aggre_label"):
        pools.load(dataclasses.replace(options, human_column="worse"), CPU)


def served(cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str | None = None) -> Path:
    """Let the download find an archive of the fake images on this machine; return the folder to download into."""
    archive = tmp_path / "web" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as content:
        content.add(cifar10_folder / "cifar-10-batches-bin", "cifar-10-batches-bin")
    digest = sha256 or hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(download.SOURCES, "cifar10", download.Source(archive.as_uri(), digest))
    return tmp_path / "downloaded"


def test_a_download_is_unpacked_and_found(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served(cifar10_folder, tmp_path, monkeypatch)
    download.fetch("cifar10", folder)
    assert len(pools.cifar("cifar10", str(folder)).labels) == 180
    assert not list(folder.glob("*.tar.gz"))


def test_a_download_with_another_hash_is_refused(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served(cifar10_folder, tmp_path, monkeypatch, sha256="0" * 64)
    with pytest.raises(ValueError, match="is not the published one"):
        download.fetch("cifar10", folder)
    assert not list(folder.iterdir())


def test_an_archive_that_is_there_is_not_fetched_again(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served(cifar10_folder, tmp_path, monkeypatch)
    folder.mkdir()
    shutil.copy(tmp_path / "web" / "cifar-10-binary.tar.gz", folder)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    download.fetch("cifar10", folder)
    assert len(pools.cifar("cifar10", str(folder)).labels) == 180


def test_an_archive_that_was_cut_off_is_fetched_again(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = served(cifar10_folder, tmp_path, monkeypatch)
    folder.mkdir()
    (folder / "cifar-10-binary.tar.gz").write_bytes(b"half")
    download.fetch("cifar10", folder)
    assert len(pools.cifar("cifar10", str(folder)).labels) == 180
    assert "100%" in capsys.readouterr().err, "progress is shown"


def test_unpacking_that_was_killed_leaves_nothing_to_be_found(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half of CIFAR-10's training batches would be taken for a small data set.
    folder = served(cifar10_folder, tmp_path, monkeypatch)
    unpack = download._unpack

    def killed(content: tarfile.TarFile, path: Path) -> None:
        unpack(content, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_unpack", killed)
        with pytest.raises(KeyboardInterrupt):
            download.fetch("cifar10", folder)
    with pytest.raises(pools.DataNotFoundError):
        pools.cifar("cifar10", str(folder))
    download.fetch("cifar10", folder)
    assert len(pools.cifar("cifar10", str(folder)).labels) == 180


@pytest.mark.parametrize("way", ["a path up", "an absolute path", "a link"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, secret = tmp_path / "cifar-10-binary.tar.gz", tmp_path / "secret"
    secret.write_text("kept")
    with tarfile.open(archive, "w:gz") as content:
        member = tarfile.TarInfo({"a path up": "../../secret", "an absolute path": str(secret)}.get(way, "link"))
        if way == "a link":
            member.type, member.linkname = tarfile.SYMTYPE, str(secret)
        content.addfile(member)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(download.SOURCES, "cifar10", download.Source(archive.as_uri(), digest))
    with pytest.raises(ValueError, match="plain files in folders, none of them outside"):
        download.fetch("cifar10", tmp_path / "folder")
    assert secret.read_text() == "kept"
    assert [path.suffix for path in (tmp_path / "folder").iterdir()] == [".gz"]


def test_every_way_to_unpickle_is_restricted() -> None:
    # Each module that reads pickles, and how: torch.load takes weights only, and pickle.load is not called at all.
    for file in Path(pools.__file__).parents[1].rglob("*.py"):
        text = file.read_text()
        assert "pickle.load" not in text, file
        assert "allow_pickle=True" not in text, file
        assert text.count("torch.load(") == text.count("weights_only=True"), file
