"""The command for the GPU, on tiny networks of the CPU: it trains, goes on, counts and writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_run
from examples.noisy_labels import cifar
from examples.noisy_labels.report import pictures
from examples.noisy_labels.run.settings import Settings

TINY = ["--network", "small", "--train-images", "80", "--clean-fraction", "0.25", "--batch-size", "20"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "label_heatmap", "contact_sheet"):
        monkeypatch.setattr(pictures, name, lambda *_: None)


def test_it_trains_and_writes_what_it_measured(cifar10_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = ["--data", str(cifar10_folder), "--device", "cpu", "--runs", str(tmp_path / "runs")]
    command += ["--output", str(output), *TINY, "--epochs", "2"]
    assert gpu_run.main(command) == 0
    content = json.loads(output.read_text())
    assert content["setting"] == "cifar10 uniform 40 %"
    assert content["device"] == "cpu"
    assert list(content["methods"]) == ["ce", "ebomlc"]
    for result in content["methods"].values():
        assert (result["noisy"], result["clean"], result["overlap"], result["epochs"]) == (60, 20, 0, 2)
        assert result["noisy images per second"] == pytest.approx(60 / result["seconds per epoch"])
        assert [record["epoch"] for record in result["log"]] == [1, 2]
        assert result["peak bytes on the device"] is None, "a CPU has no such counter"
    assert "multiplier" in content["methods"]["ebomlc"]["log"][-1]
    saved = json.loads((tmp_path / "runs" / "ebomlc" / "config.json").read_text())
    differs = {name for name, value in saved.items() if name != "method" and value != _default(name)}
    assert differs == {"data", "device", "network", "train_images", "clean_fraction", "batch_size", "epochs"}
    before = content["methods"]["ce"]["log"]
    assert gpu_run.main(command) == 0, "started again, it finds that all is done"
    assert json.loads(output.read_text())["methods"]["ce"]["log"] == before


def _default(name: str) -> object:
    value = getattr(Settings(), name)
    return list(value) if isinstance(value, tuple) else value


def test_an_interrupted_run_is_no_result(cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "main", lambda _: 75)
    with pytest.raises(SystemExit, match="75"):
        gpu_run.main(["--data", str(cifar10_folder), "--device", "cpu", "--runs", str(tmp_path), *TINY])


def test_estimates_are_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = gpu_run.blank_images()
    part = torch.cat([torch.arange(200), torch.arange(50_000, 50_100)])
    small = type(whole)(whole.pixels[part], whole.labels[part], torch.arange(200, 300), *list(vars(whole).values())[3:])
    monkeypatch.setattr(gpu_run, "blank_images", lambda: small)
    options = ["--network", "small", "--batch-size", "20", "--clean-fraction", "0.2"]
    assert gpu_run.main(["--estimate", "--device", "cpu", *options]) == 0
    plain, bilevel = (next(iter(json.loads(line).values())) for line in capsys.readouterr().out.splitlines())
    # Three forward and two backward passes against one each; a backward pass is two forward ones, save for the first
    # layer, whose inputs need no gradient, and the corrector comes on top.
    ratio = bilevel["operations per step"] / plain["operations per step"]
    assert 7 / 3 - 0.05 < ratio < 7 / 3 + 0.1
    assert bilevel["launches per step"] > 2 * plain["launches per step"]
    assert plain["steps per epoch"] == 160 // 20
    assert bilevel["bytes alive at once in a step"] >= plain["bytes alive at once in a step"] > 300 * 3072
    total = plain["operations per step"] * 8 + plain["operations of an epoch's evaluation"]
    assert plain["operations of the whole run"] == 120 * total


@pytest.mark.gpu
def test_on_a_gpu_memory_and_waits_are_measured(cifar10_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = ["--data", str(cifar10_folder), "--runs", str(tmp_path / "runs"), "--output", str(output), *TINY]
    assert gpu_run.main([*command, "--epochs", "1"]) == 0
    for result in json.loads(output.read_text())["methods"].values():
        assert result["peak bytes on the device"] > 0
        assert result[f"host waits in {gpu_run.WATCHED_STEPS} steps"] == 0
