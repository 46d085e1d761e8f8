"""`ebomlc_cifar.py`, the method in one file: its first steps are the program's, number by number."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

from examples import ebomlc_cifar
from examples.noisy_labels.data import pools
from examples.noisy_labels.run import command_line
from examples.noisy_labels.run.training import Run

SCRIPT = Path(ebomlc_cifar.__file__)
CPU = torch.device("cpu")


def test_it_is_short_and_needs_little() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    needed = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            needed |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            needed.add((node.module or "").split(".")[0])
    assert needed - set(sys.stdlib_module_names) == {"torch", "numpy", "tqdm", "bilevel"}


def test_its_constants_are_those_of_the_paper_preset() -> None:
    settings = command_line.parse(["--preset", "paper", "--method", "ebomlc"]).settings
    ours = ebomlc_cifar
    assert (settings.noise, settings.rate, settings.seed) == (ours.NOISE, ours.RATE, ours.SEED)
    assert (settings.epochs, tuple(settings.decay_epochs), settings.batch_size) == (
        ours.EPOCHS,
        ours.MILESTONES,
        ours.BATCH,
    )
    assert (settings.lr, settings.momentum, settings.weight_decay) == (
        ours.LEARNING_RATE, ours.MOMENTUM, ours.WEIGHT_DECAY,
    )  # fmt: skip
    assert (settings.delta, settings.xi, settings.rho) == (ours.DELTA, ours.XI, ours.RHO)
    assert (settings.meta_lr, settings.clean_fraction) == (ours.META_LEARNING_RATE, ours.TRUSTED)
    assert settings.network == "resnet32"


@pytest.mark.thorough
@pytest.mark.parametrize("noise", ["uniform", "flip"])
def test_its_first_steps_are_the_programs(noise: str, cifar10_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 120 images: a sixth of them trusted, batches of 15, so that both sets begin a second pass within ten steps.
    for name, value in (("NOISE", noise), ("TRUSTED", 0.167), ("BATCH", 15)):
        monkeypatch.setattr(ebomlc_cifar, name, value)
    command = ["--preset", "paper", "--data", str(cifar10_folder), "--noise", noise, "--clean-fraction", "0.167"]
    settings = command_line.parse([*command, "--batch-size", "15", "--device", "cpu"]).settings
    task = pools.load(settings, CPU)
    run = Run(settings, task)

    pixels, labels, test_pixels, test_labels = ebomlc_cifar.read(cifar10_folder)
    trusted, noisy = ebomlc_cifar.split(labels)
    given = ebomlc_cifar.corrupt(labels[noisy])
    assert torch.equal(trusted, task.clean)
    assert torch.equal(noisy, task.noisy)
    assert torch.equal(given, task.noisy_labels)
    assert torch.equal(test_labels, task.labels[task.test])
    assert torch.equal(test_pixels, task.samples[task.test])

    problem = ebomlc_cifar.LabelCorrection(CPU)
    trusted_batches = ebomlc_cifar.batches(pixels[trusted], labels[trusted], "clean batches")
    noisy_batches = ebomlc_cifar.batches(pixels[noisy], given, "noisy batches")
    for _ in range(10):
        ours = problem.optimizer.step(next(trusted_batches), next(noisy_batches))
        theirs = run.advance()
        for name in ("upper_loss", "lower_loss", "multiplier", "constraint"):
            assert getattr(ours, name).item() == theirs[name].item(), name
    for mine, network in (
        (problem.classifier, run.recipe.classifier),
        (problem.corrector, run.recipe.networks["corrector"]),
    ):
        for one, other in zip(mine.parameters(), network.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.program
def test_it_runs_to_its_last_line(
    cifar10_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("EPOCHS", 2), ("MILESTONES", (1,)), ("TRUSTED", 0.167), ("BATCH", 50), ("BLOCKS", 1)):
        monkeypatch.setattr(ebomlc_cifar, name, value)
    monkeypatch.setattr(sys, "argv", ["ebomlc_cifar.py", str(cifar10_folder)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ebomlc_cifar.main()
    number = r"\d+\.\d"
    assert re.fullmatch(
        rf"ebomlc on CIFAR-10, uniform 40 %, seed 1: test accuracy {number} %, labels right {number} % before and "
        rf"{number} % after; recovered {number} %, broken {number} %",
        capsys.readouterr().out.splitlines()[-1],
    )
    with pytest.raises(SystemExit, match=r"holds no data_batch_1\.bin"):
        ebomlc_cifar.read(cifar10_folder / "nowhere")
