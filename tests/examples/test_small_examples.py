"""The small examples: each runs with ``--smoke``, gives the answer that is known, and writes its picture."""

from __future__ import annotations

import gzip
import math
import runpy
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor
from torch.func import functional_call

from examples import (
    hyper_cleaning,
    learned_regularisation,
    learning_rates,
    maml_sinusoids,
    reweighting,
    small_images,
    toys,
)

Main = Callable[[list[str]], dict[str, float]]


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BILEVEL_DATA", raising=False)


def smoke(main: Main, out: Path, picture: str, *more: str) -> dict[str, float]:
    """Run an example in a folder that does not exist yet, and check its picture."""
    found = main(["--smoke", "--out", str(out / "new"), *more])
    assert [file.name for file in (out / "new").iterdir()] == [picture]
    pixels = imread(out / "new" / picture)
    assert pixels.shape[0] > 150
    assert pixels.shape[1] > 400
    assert len({tuple(colour) for colour in pixels[::3, ::3, :3].reshape(-1, 3).tolist()}) > 10, "nothing was drawn"
    return found


@pytest.mark.program
def test_toys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distances = smoke(toys.main, tmp_path, "toys.png")
    assert distances["degenerate"] < 1e-4
    assert distances["minimax"] == pytest.approx(0.049, abs=1e-3)  # of the paper's code after its 200 steps
    assert distances["coreset"] < 0.2
    assert capsys.readouterr().out.splitlines()[-1].startswith("toys: largest distance to the solution")


def test_both_players_of_the_minimax_toy_spiral_outwards() -> None:
    radius = (toys.both_descend(100) ** 2).sum(1) ** 0.5
    assert (radius[1:] > radius[:-1]).all()


@pytest.mark.program
def test_hyper_cleaning_lies_between_trusted_only_and_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = smoke(hyper_cleaning.main, tmp_path, "thrown_out.png")
    assert found["noisy + upper"] < found["upper only"] < found["BOME"] < found["clean + upper"]
    assert found["F1"] > 0.9
    assert "501 of 1097 training labels wrong" in capsys.readouterr().out


@pytest.mark.program
def test_learned_regularisation_beats_the_grid(tmp_path: Path) -> None:
    found = smoke(learned_regularisation.main, tmp_path, "strengths.png")
    assert found["told"] < found["Implicit"] < 0.5 * found["grid"]
    assert found["told"] < found["Unrolled"] < 0.5 * found["grid"]
    assert found["Implicit hypergradient"] < 0.02 < found["Unrolled hypergradient"] < 0.3


def test_the_closed_form_fit_is_the_minimum() -> None:
    problem = learned_regularisation.random_problem(seed=7)
    v = torch.linspace(-2, 1, learned_regularisation.FEATURES, dtype=torch.float64)
    w = problem.fit(v).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.lower_loss(w, v), w)
    assert gradient.abs().max() < 1e-12


@pytest.mark.program
def test_learned_rates_are_as_good_as_a_grid(tmp_path: Path) -> None:
    found = smoke(learning_rates.main, tmp_path, "learning_rates.png")
    assert found["learned"] < 1.02 * found["grid"]
    assert found["learned, by layer"] < 1.02 * found["grid"]
    assert found["accuracy, while training"] > found["accuracy, too slow"] + 0.05


def test_the_plain_run_of_the_rates_is_the_one_that_is_differentiated() -> None:
    """F of ``directions`` is that of ``torch.optim.SGD`` with the same numbers, for one group and for two."""
    task = learning_rates.Task(1)
    for groups in (1, 2):
        (pairs, seen) = learning_rates.tuned(task, groups, runs=1)
        assert task.judged(learning_rates.run(task, pairs, task.batches)) == pytest.approx(seen[0], rel=1e-10)


@pytest.mark.program
def test_reweighting_finds_the_right_labels(tmp_path: Path) -> None:
    found = smoke(reweighting.main, tmp_path, "weights.png")
    assert found["distance"] < 1e-12, "weights are the positive parts of the inner products"
    assert found["plain on right"] == pytest.approx(0.543, abs=0.005), "the share of right labels"
    assert found["L2RW on right"] > 0.6
    assert found["MW-Net on right"] > 0.8
    assert min(found["L2RW"], found["MW-Net"]) > found["trusted only"] - 0.02


@pytest.mark.program
def test_maml_adapts_below_the_floor_of_fixed_functions(tmp_path: Path) -> None:
    found = smoke(maml_sinusoids.main, tmp_path, "maml.png")
    assert found["later"] < found["after"] < maml_sinusoids.FLOOR < found["before"]


def test_the_floor_of_fixed_functions() -> None:
    phase = math.pi * (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    amplitude = 0.1 + 4.9 * (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    x = -5 + 10 * (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    sines = torch.sin(x[:, None] - phase)
    variance = amplitude.square().mean() * sines.square().mean(1) - (amplitude.mean() * sines.mean(1)).square()
    assert variance.mean().item() == pytest.approx(maml_sinusoids.FLOOR, abs=1e-3)


def test_the_direction_of_maml_is_the_derivative_through_one_step() -> None:
    torch.manual_seed(0)
    initial, task = maml_sinusoids.network(), maml_sinusoids.Task(torch.Generator().manual_seed(0))
    found = maml_sinusoids.maml(initial).directions(task.others, task.seen).upper
    start = {name: p.detach().requires_grad_() for name, p in initial.named_parameters()}

    def error(values: dict[str, Tensor], batch: small_images.Batch) -> Tensor:
        return (functional_call(initial, values, (batch[0],)) - batch[1]).square().mean()

    slopes = torch.autograd.grad(error(start, task.seen), list(start.values()), create_graph=True)
    after = {name: p - maml_sinusoids.RATE * slope for (name, p), slope in zip(start.items(), slopes, strict=True)}
    expected = torch.autograd.grad(error(after, task.others), list(start.values()))
    assert all(d.allclose(e, rtol=1e-4, atol=1e-6) for d, e in zip(found.values(), expected, strict=True))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A stand-in for Fashion-MNIST, in its files: 360 + 80 images, one bright row per class, half of them gzipped."""
    folder = tmp_path / "root" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, count in (("train", 360), ("t10k", 80)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 28, 28), generator=torch.Generator().manual_seed(count))
        images[torch.arange(count), 2 * labels] = 200
        image_bytes = struct.pack(">4i", 2051, count, 28, 28) + bytes(images.flatten().tolist())
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(image_bytes))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(labels.tolist()))
    return folder


def test_fashion_mnist_is_read_as_it_was_written(fashion: Path) -> None:
    data = small_images.load(fashion, seed=1, noise=0.5)
    assert data.x.shape == (300, 784)
    assert (len(data.upper[1]), len(data.select[1])) == (30, 30)
    assert data.test[1].tolist() == [k % 10 for k in range(80)], "test images stay what they are"
    brightest = data.x.reshape(-1, 28, 28).mean(2).argmax(1)
    assert torch.equal(brightest, 2 * data.true), "images and labels belong together"
    assert 0.3 < (data.given != data.true).double().mean() < 0.6
    assert data.names[9] == "boot"


@pytest.mark.program
def test_hyper_cleaning_on_the_files_of_fashion_mnist(fashion: Path, tmp_path: Path) -> None:
    found = smoke(hyper_cleaning.main, tmp_path / "out", "thrown_out.png", "--data", str(fashion))
    assert found["BOME"] > 0.9, "the classes are easy"
    assert found["F1"] > 0.9


def test_which_folder_is_taken(fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_images.fashion_folder() is None
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))  # holds other data
    assert small_images.fashion_folder() is None
    for named in (fashion, fashion.parent):
        monkeypatch.setenv("BILEVEL_DATA", str(named))
        assert small_images.fashion_folder() == fashion


def test_a_missing_or_damaged_file_is_named(fashion: Path) -> None:
    (fashion / "t10k-labels-idx1-ubyte").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte: is no idx file"):
        small_images.load(fashion, seed=1, noise=0.5)
    (fashion / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte: not there"):
        small_images.load(fashion, seed=1, noise=0.5)


def test_an_example_that_uses_another_file_starts_as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["hyper_cleaning.py", "--help"])
    monkeypatch.setattr("sys.path", ["the script's folder", *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(hyper_cleaning.__file__, run_name="__main__")
    assert stop.value.code == 0
    assert sys.path[0] == str(Path(__file__).parents[2])
