"""What cannot be meant is refused with one line, named as on the command line, before any data are read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from examples.noisy_labels import cifar, own_data
from examples.noisy_labels.data import own as reading
from examples.noisy_labels.data import pools

DIGITS = ["--dataset", "digits"]
TABLE = ["--table", "t.csv", "--trusted", "c.csv"]

CIFAR: list[tuple[list[str], str]] = [
    (["--train-images", "-4"], "--train-images -4: must be at least 1"),
    (["--train-images", "0"], "--train-images 0: must be at least 1"),
    (
        ["--train-images", "19"],
        "--train-images 19: must be at least 20: a trusted and a noisy one of each of 10 classes",
    ),
    (["--dataset", "cifar100", "--train-images", "199"], "must be at least 200"),
    (["--test-images", "-1"], "--test-images -1: must be at least 1"),
    (["--test-images", "0"], "--test-images 0: must be at least 1"),
    (["--test-images", "1.5"], "invalid int value"),
    (["--clean-fraction", "0"], "--clean-fraction 0.0: must be above 0 and below 1"),
    (["--clean-fraction", "1"], "--clean-fraction 1.0: must be above 0 and below 1"),
    (["--clean-fraction", "nan"], "--clean-fraction nan: must be a finite number"),
    (["--rate", "-0.1"], "--rate -0.1: must be between 0 and 1"),
    (["--rate", "inf"], "--rate inf: must be a finite number"),
    (["--milestones", "-1"], "--milestones -1: must be at least 1"),
    (["--milestones", "0,3"], "must be at least 1"),
    (["--milestones", "5,3"], "--milestones 5,3: must rise"),
    (["--milestones", "3,3"], "--milestones 3,3: must rise"),
    (["--epochs", "4", "--milestones", "3,5"], "none be behind the last of 4 epochs"),
    (["--milestones", "3,x"], "must be integers with commas between them, not '3,x'"),
    (["--milestones", ","], "must be integers with commas between them"),
    (["--momentum", "2"], "--momentum 2.0: must be at least 0 and below 1"),
    (["--momentum", "1"], "--momentum 1.0: must be at least 0 and below 1"),
    (["--weight-decay", "-1"], "--weight-decay -1.0: must be at least 0"),
    (["--lr", "0"], "--lr 0.0: must be above 0"),
    (["--lr", "-0.1"], "--lr -0.1: must be above 0"),
    (["--lr", "inf"], "--lr inf: must be a finite number"),
    (["--meta-lr", "0"], "--meta-lr 0.0: must be above 0"),
    (["--delta", "-1"], "--delta -1.0: must be at least 0"),
    (["--xi", "-1"], "--xi -1.0: must be at least 0"),
    (["--xi", "nan"], "--xi nan: must be a finite number"),
    (["--rho", "1.1"], "--rho 1.1: must be between 0 and 1"),
    (["--mix-clean", "1"], "--mix-clean 1.0: must be at least 0 and below 1"),
    (["--multiplier-max", "-1"], "--multiplier-max -1.0: must be at least 0"),
    (["--clean-weight", "-1"], "--clean-weight -1.0: must be at least 0"),
    (["--inner-steps", "0"], "--inner-steps 0: must be at least 1"),
    (["--batch-size", "-5"], "--batch-size -5: must be at least 1"),
    (["--log-interval", "0"], "--log-interval 0: must be at least 1"),
    (["--seed", "-1"], "--seed -1: must be between 0 and"),
    (["--seed", "99999999999999999999999"], "must be between 0 and"),
    ([*DIGITS, "--network", "resnet32"], "--network resnet32: does not fit digits"),
    ([*DIGITS, "--network", "small"], "--network small: does not fit digits"),
    (["--network", "mlp"], "--network mlp: does not fit cifar10"),
    (["--device", "foo"], "--device foo: must be auto, cpu, cuda or one of several GPUs"),
    (["--device", "meta"], "--device meta: must be auto, cpu, cuda"),
    (["--device", ""], "--device : must be auto, cpu, cuda"),
    (["--device", "cuda:99"], "--device cuda:99: torch sees"),
    (["--data", ""], "--data: is empty"),
    (["--noise", "human", "--dataset", "cifar100"], "--human-column worse: CIFAR-100N has the one column noisy"),
    (["--noise", "human", "--human-column", "noisy"], "--human-column noisy: CIFAR-100N has the one column noisy"),
    (["--noise", "human", *DIGITS], "exists for cifar10 and cifar100 only"),
    (["--noise", "matrix"], "goes together with --noise matrix"),
    (["--resume", "--compare"], "--resume: --compare keeps no checkpoints"),
    (["--seeds", "1,2"], "--seeds: are those of --compare"),
    (["--compare", "--seeds", "1,1"], "--seeds 1,1: a seed is there twice"),
    (["--compare", "--seeds", "1,-2"], "--seed -2: must be between 0 and"),
    (["--compare", "--seeds", "1;2"], "must be integers with commas between them, not '1;2'"),
    (["--out", "file"], "--out file: {here}/file is a file, not a folder"),
    (["--out", "file/deeper/run"], "{here}/file is a file, not a folder"),
    (["--config", "."], "Is a directory"),
]

OWN: list[tuple[list[str], str]] = [
    (["--hold-out", "1"], "--hold-out 1.0: must be at least 0 and below 1"),
    (["--hold-out", "nan"], "--hold-out nan: must be a finite number"),
    (["--epochs", "-1"], "--epochs -1: must be at least 1"),
    (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["--momentum", "2"], "--momentum 2.0: must be at least 0 and below 1"),
    (["--meta-lr", "0"], "--meta-lr 0.0: must be above 0"),
    (["--weight-decay", "-1"], "--weight-decay -1.0: must be at least 0"),
    (["--delta", "-1"], "--delta -1.0: must be at least 0"),
    (["--xi", "-0.5"], "--xi -0.5: must be at least 0"),
    (["--corrupt-clean", "2"], "--corrupt-clean 2.0: must be between 0 and 1"),
    (["--image-size", "4"], "--image-size 4: must be between 8 and 1024"),
    (["--image-size", "100000"], "--image-size 100000: must be between 8 and 1024"),
    (["--seed", "-1"], "--seed -1: must be between 0 and"),
    (["--device", "foo"], "--device foo: must be auto, cpu, cuda"),
    (["--label", ""], "--label: is empty"),
    (["--annotators", "a", "b", "a"], "--annotators a b a: a column is named twice"),
    (["--features", "x", "x"], "--features x x: a column is named twice"),
    (["--features", "x", "y", "--ignore", "y"], "--features y: is named in --ignore too"),
    (["--categorical", "y", "--ignore", "y"], "--categorical y: is named in --ignore too"),
    (["--label", "y", "--features", "x", "y"], "--features y: is a label, and would give the answer away"),
    (["--folds", "1"], "--folds 1: must be at least 2"),
    (["--precision", "0"], "--precision 0.0: must be above 0 and below 1"),
    (["--groups", "g", "--images", "photos", "--config", "c.json"], "No such file"),
    (["--out", "file"], "--out file: {here}/file is a file, not a folder"),
]

CONFIGURATIONS: list[tuple[Any, str]] = [
    ([1, 2], "--config c.json: holds a list, and must hold an object"),
    ("words", "--config c.json: holds a str, and must hold an object"),
    (None, "--config c.json: holds a NoneType, and must hold an object"),
    ({"epochs": "3"}, "--epochs 3: must be an integer"),
    ({"epochs": 3.0}, "--epochs 3.0: must be an integer"),
    ({"epochs": True}, "--epochs True: must be an integer"),
    ({"epochs": [3]}, "--epochs 3: must be an integer"),
    ({"lr": "0.1"}, "--lr 0.1: must be a finite number"),
    ({"lr": math.nan}, "--lr nan: must be a finite number"),
    ({"lr": 10**400}, "must be a finite number"),
    ({"lr": None}, "--lr None: must be a finite number"),
    ({"augment": "yes"}, "--augment yes: must be true or false"),
    ({"augment": 1}, "--augment 1: must be true or false"),
    ({"method": ["ce"]}, "--method ce: must be a text"),
    ({"network": None}, "--network None: must be a text"),
    ({"seed": {"a": 1}}, "must be an integer"),
    ({"colour": "red"}, "--colour: no such option"),
]

CIFAR_CONFIGURATIONS: list[tuple[Any, str]] = [
    ({"milestones": 3}, "--milestones 3: must be a list"),
    ({"milestones": []}, "--milestones : must be a list, with something in it"),
    ({"milestones": ["3"]}, "--milestones 3: must be an integer"),
    ({"dataset": ["digits"]}, "--dataset digits: must be a text"),
    ({"device": 3}, "--device 3: "),
]
OWN_CONFIGURATIONS: list[tuple[Any, str]] = [
    ({"annotators": "ann"}, "--annotators ann: must be a list"),
    ({"annotators": [1]}, "--annotators 1: must be a text"),
    ({"table": 3}, "--table 3: must be a text"),
]


@pytest.fixture(autouse=True)
def _nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_reading(*_: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(pools, "load", no_reading)
    monkeypatch.setattr(reading, "read", no_reading)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")


def refused(program: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        program.main(arguments)
    shown = capsys.readouterr().err
    *_, last = shown.splitlines()
    assert message.replace("{here}", str(Path.cwd())) in last
    assert ": error: " in last, "the mistake is one line, the last one"
    assert "Traceback" not in shown
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"), CIFAR, ids=lambda one: " ".join(one) if isinstance(one, list) else ""
)
def test_cifar_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(cifar, arguments, message, capsys)


@pytest.mark.parametrize(("arguments", "message"), OWN, ids=lambda one: " ".join(one) if isinstance(one, list) else "")
def test_own_data_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(own_data, [*TABLE, *arguments], message, capsys)


@pytest.mark.parametrize(("values", "message"), CONFIGURATIONS + CIFAR_CONFIGURATIONS)
def test_cifar_refuses_a_configuration(values: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.json").write_text(json.dumps(values))
    refused(cifar, ["--config", "c.json"], message, capsys)


@pytest.mark.parametrize(("values", "message"), CONFIGURATIONS + OWN_CONFIGURATIONS)
def test_own_data_refuses_a_configuration(values: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.json").write_text(json.dumps(values))
    refused(own_data, [*([] if "table" in str(values) else TABLE), "--config", "c.json"], message, capsys)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"lr: 0.1", b"[" * 100_000])
@pytest.mark.parametrize("program", [cifar, own_data])
def test_a_file_that_is_no_json_is_named(program: Any, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.json").write_bytes(content)
    refused(program, ["--config", "c.json"], "--config c.json: is no JSON", capsys)


def test_what_a_preset_says_counts_when_a_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.noisy_labels.run import command_line

    command_line.parse(["--preset", "quick"]).settings.save(Path("config.json"))
    assert command_line.parse(["--resume", "--preset", "quick", "--out", "."]).resume
    command = ["--resume", "--preset", "medium", "--out", "."]
    refused(cifar, command, "the saved run has --train-images 5000, not --train-images None", capsys)
