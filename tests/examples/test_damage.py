"""Files that were damaged, lost or could not be written: one clear line, nothing loaded, nothing half written."""

from __future__ import annotations

import io
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from examples.noisy_labels import cifar, own_data
from examples.noisy_labels.report import model, pictures
from examples.noisy_labels.run import checkpoint, files
from examples.noisy_labels.run.log import Log
from own_worlds import points, write, write_trusted

SHORT = ["--dataset", "digits", "--method", "ebomlc", "--epochs", "2", "--log-interval", "5"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "label_heatmap", "contact_sheet"):
        monkeypatch.setattr(pictures, name, lambda *_: None)


def sound() -> bytes:
    """A checkpoint with tensors that are long, short, and of integers."""
    generator = torch.Generator().manual_seed(0)
    content = {"weight": torch.randn(3000, generator=generator), "step": torch.tensor(7), "rate": 0.1, "epoch": 3}
    archive = io.BytesIO()
    torch.save(content, archive)
    return checkpoint.sealed(archive.getvalue())


def flipped(data: bytes, source: random.Random) -> bytes:
    place, bit = source.randrange(len(data)), source.randrange(8)
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def zeroed(data: bytes, source: random.Random) -> bytes:
    """A block that a disk never wrote; blocks that were zero before are no damage."""
    begin, size = source.randrange(len(data) - 600), source.choice([16, 64, 512])
    return data[:begin] + bytes(size) + data[begin + size :]


def moved(data: bytes, source: random.Random) -> bytes:
    place = source.randrange(1, len(data))
    return data[place:] + data[:place]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit": flipped,
    "cut at the end": lambda data, source: data[: source.randrange(len(data))],
    "cut at the beginning": lambda data, source: data[source.randrange(1, len(data)) :],
    "more at the end": lambda data, source: data + source.randbytes(source.randrange(1, 200)),
    "zeros": zeroed,
    "turned": moved,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_checkpoint_is_loaded(damage: str) -> None:
    data, source, done = sound(), random.Random(11), 0
    assert checkpoint.opened(data, Path("c.pt")) == data[: -checkpoint.SEAL_BYTES]
    while done < 120:
        damaged = DAMAGES[damage](data, source)
        if damaged == data:
            continue
        with pytest.raises(ValueError, match=r"^Checkpoint\(c.pt\): [^\n]*Nothing of it was read\.[^\n]*$"):
            checkpoint.opened(damaged, Path("c.pt"))
        done += 1


def test_every_bit_of_the_seal_counts() -> None:
    data = sound()
    for place in range(len(data) - checkpoint.SEAL_BYTES, len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x20  # also what turns a small letter of the digest into a capital one
        with pytest.raises(ValueError, match="Nothing of it was read"):
            checkpoint.opened(bytes(damaged), Path("c.pt"))


def archive_of_zip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data.pkl", b"no pickle")
    return packed.getvalue()


def saved_by_torch() -> bytes:
    packed = io.BytesIO()
    torch.save({"run": {}, "log": {}, "device": "cpu", "options": {}, "samples": ""}, packed)
    return packed.getvalue()


FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (bytes, "is empty"),
    "text": (lambda: b"these are my notes\n" * 40, "does not end with the SHA-256 of a checkpoint"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(400), "does not end with the SHA-256"),
    "zip": (archive_of_zip, "does not end with the SHA-256"),
    "an older version's": (saved_by_torch, "It was cut off, is of an older version, or of another program"),
    "sealed text": (lambda: checkpoint.sealed(b"notes"), "is whole, and cannot be read"),
    "sealed zip": (lambda: checkpoint.sealed(archive_of_zip()), "is whole, and cannot be read"),
    "one value": (lambda: sealed_value(torch.ones(3)), "is whole, and holds no run"),
    "another program's": (lambda: sealed_value({"weights": torch.ones(3)}), "is whole, and holds no run"),
}


def sealed_value(value: object) -> bytes:
    packed = io.BytesIO()
    torch.save(value, packed)
    return checkpoint.sealed(packed.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the digits."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "label_heatmap", "contact_sheet"):
            patch.setattr(pictures, name, lambda *_: None)
        folder = tmp_path_factory.mktemp("trained")
        assert cifar.main([*SHORT, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Resume; expect one line, exit code 1, and no changed file. Return the line."""
    before = contents(folder)
    capsys.readouterr()
    assert cifar.main(["--resume", "--out", str(folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert contents(folder) == before
    return lines[0]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint_is_named_and_nothing_is_touched(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, rule = FOREIGN[name]
    (run / checkpoint.NAME).write_bytes(content())
    assert rule in refused(run, capsys)


def test_a_changed_bit_stops_the_program(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / checkpoint.NAME
    file.write_bytes(flipped(file.read_bytes(), random.Random(3)))
    assert f"Checkpoint({file}): " in refused(run, capsys)


def test_a_checkpoint_of_other_options_is_not_this_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = json.loads((run / "config.json").read_text()) | {"lr": 0.3}  # as one changed bit can make of 0.1
    (run / "config.json").write_text(json.dumps(options))
    assert "was trained with --lr 0.1, and config.json beside it has --lr 0.3" in refused(run, capsys)


def test_a_log_with_a_changed_record_is_not_continued(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text.replace('"epoch": 1', '"epoch": 3', 1))
    assert "is not what it was at the checkpoint: its SHA-256 differs" in refused(run, capsys)


def test_a_lost_checkpoint_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / checkpoint.NAME).unlink()
    said = refused(run, capsys)
    assert f"{run / checkpoint.NAME} is gone, and log.jsonl beside it tells of training" in said
    assert cifar.main([*SHORT, "--overwrite", "--out", str(run)]) == 0


@pytest.mark.thorough
def test_own_data_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = points(), tmp_path / "run"
    command = [
        "--table",
        str(write(tmp_path / "t.csv", rows)),
        "--trusted",
        str(write_trusted(tmp_path / "c.csv", rows)),
    ]
    assert own_data.main([*command, "--epochs", "2", "--batch-size", "20", "--out", str(out)]) == 0
    file = out / checkpoint.NAME
    whole = file.read_bytes()
    for damaged, rule in (
        (flipped(whole, random.Random(5)), "Nothing of it was read"),
        (None, "is gone, and log.jsonl"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        before = contents(out)
        capsys.readouterr()
        assert own_data.main(["--resume", "--out", str(out)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert rule in line
        assert contents(out) == before
    (out / model.NAME).write_bytes(flipped((out / model.NAME).read_bytes(), random.Random(5)))
    with pytest.raises(ValueError, match="Nothing of it was read"):
        model.load(out / model.NAME)


# --- a full disk ---


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Refuse to let any file grow beyond so many bytes, as a full disk would."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit the size of files")


@FULL
@pytest.mark.parametrize("size", [0, 1000, 100_000])  # not even the configuration; not a log; not a checkpoint
def test_a_full_disk_gives_one_line_and_leaves_nothing_half_written(
    size: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    with largest_file(size):
        code = cifar.main([*SHORT, "--out", str(new)])
    assert code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (File too large)" in line
    assert "Make room or choose another --out" in line
    for file in new.iterdir():
        assert not file.name.endswith(files.UNFINISHED)
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".jsonl":
            for record in file.read_text().splitlines():
                json.loads(record)


@FULL
def test_a_disk_that_becomes_full_keeps_the_last_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / checkpoint.NAME).read_bytes()
    longer = checkpoint.load(run / checkpoint.NAME)
    with largest_file(len(before) // 2), pytest.raises(OSError, match=r"checkpoint.pt: cannot be written \(File too"):
        checkpoint.save(run / checkpoint.NAME, longer)
    assert (run / checkpoint.NAME).read_bytes() == before
    assert cifar.main(["--resume", "--out", str(run)]) == 0


@FULL
def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.write("start", words="a" * 20)
    before = log.file.read_bytes()
    with largest_file(len(before) + 9), pytest.raises(OSError, match="cannot be written"):
        log.write("step", words="b" * 20)
    assert log.file.read_bytes() == before
