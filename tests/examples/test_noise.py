"""Transition matrices against the published ones, and sampling against its expectation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.noisy_labels import noise
from examples.noisy_labels.randomness import generator

GROUPS = torch.arange(100) % 20  # any assignment of 100 classes to 20 superclasses of 5

# What GLC, MW-Net and MLC draw with numpy's legacy seed 1: airplane -> frog, automobile -> truck, bird -> frog, ...
FLIP = [6, 9, 6, 0, 0, 1, 8, 6, 2, 4]
FLIP2 = [(9, 3), (4, 8), (1, 8), (8, 4), (2, 5), (7, 4), (9, 2), (8, 5), (6, 5), (5, 4)]

MATRICES = {
    "uniform": noise.uniform(0.4, 10),
    "uniform, true class excluded": noise.uniform(0.4, 10, exclude_true=True),
    "flip": noise.flip(0.4, 10),
    "flip, 100 classes": noise.flip(0.4, 100),
    "flip2": noise.flip2(0.4, 10),
    "pairflip": noise.pairflip(0.4, 10),
    "asymmetric": noise.asymmetric(0.4),
    "asymmetric, 100 classes": noise.asymmetric(0.4, GROUPS),
    "hierarchical": noise.hierarchical(0.4, GROUPS),
}
# Share of wrong labels at rate 0.4 with balanced classes. Uniform: 0.4 * 9 / 10. Asymmetric: 5 of 10 classes, or 2 of
# the 5 classes of every superclass.
EXPECTED_RATE = {
    "uniform": 0.36,
    "asymmetric": 0.2,
    "asymmetric, 100 classes": 0.16,
}


def wrong(matrix: Tensor) -> float:
    return 1 - matrix.diagonal().mean().item()


@pytest.mark.parametrize("name", MATRICES)
def test_rows_are_distributions(name: str) -> None:
    matrix = MATRICES[name]
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", MATRICES)
def test_expected_rate(name: str) -> None:
    assert wrong(MATRICES[name]) == pytest.approx(EXPECTED_RATE.get(name, 0.4), abs=1e-12)


@pytest.mark.parametrize(("classes", "expected"), [(10, (0.18, 0.36, 0.54, 0.72)), (100, (0.198, 0.396, 0.594, 0.792))])
def test_uniform_noise_spares_the_true_class(classes: int, expected: tuple[float, ...]) -> None:
    rates = [wrong(noise.uniform(rate, classes)) for rate in (0.2, 0.4, 0.6, 0.8)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_flip_map_is_the_published_one() -> None:
    matrix = noise.flip(0.4, 10) - 0.6 * torch.eye(10, dtype=torch.float64)
    assert matrix.argmax(1).tolist() == FLIP
    assert (matrix > 1e-12).sum(1).eq(1).all()


def test_flip_map_of_100_classes_has_62_targets() -> None:
    matrix = noise.flip(0.4, 100)
    assert len((matrix - torch.diag(matrix.diagonal())).argmax(1).unique()) == 62


def test_flip2_map_is_the_published_one() -> None:
    matrix = noise.flip2(0.4, 10)
    for source, targets in enumerate(FLIP2):
        assert matrix[source, list(targets)].tolist() == pytest.approx([0.2, 0.2])


def test_asymmetric_noise_confuses_similar_classes() -> None:
    matrix = noise.asymmetric(0.3)
    pairs = {(i, j) for i in range(10) for j in range(10) if i != j and matrix[i, j] > 0}
    assert pairs == {(9, 1), (2, 0), (4, 7), (3, 5), (5, 3)}


@pytest.mark.parametrize("name", ["asymmetric, 100 classes", "hierarchical"])
def test_noise_stays_in_its_superclass(name: str) -> None:
    outside = GROUPS[:, None] != GROUPS[None, :]
    assert MATRICES[name][outside].sum() == 0


def test_hierarchical_noise_reaches_the_four_others() -> None:
    matrix = noise.hierarchical(0.4, GROUPS)
    assert matrix[0, [20, 40, 60, 80]].tolist() == pytest.approx([0.1] * 4)


@pytest.mark.parametrize("name", MATRICES)
def test_realised_transitions_are_within_three_sigma(name: str) -> None:
    matrix, images = MATRICES[name], 40_000
    true = torch.arange(images) % len(matrix)
    given = noise.corrupt(true, matrix, generator(1, "noise"))
    rate = wrong(matrix)
    # The sum of independent draws: its variance is that of the classes, averaged.
    variance = (matrix.diagonal() * (1 - matrix.diagonal())).mean().item() / images
    assert abs(noise.realised_rate(true, given) - rate) < 3 * variance**0.5
    assert (matrix[true, given] > 0).all(), "a transition of probability 0 was drawn"


def test_each_target_gets_its_share() -> None:
    matrix = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.1, 0.0, 0.9]], dtype=torch.float64)
    true = torch.arange(30_000) % 3
    given = noise.corrupt(true, matrix, generator(3, "noise"))
    shares = torch.stack([torch.bincount(given[true == i], minlength=3) / 10_000 for i in range(3)])
    sigma = (matrix * (1 - matrix) / 10_000).sqrt()
    assert ((shares - matrix).abs() <= 3 * sigma).all()


def test_noise_depends_on_the_seed_only() -> None:
    true, matrix = torch.arange(1000) % 10, MATRICES["uniform"]
    first = noise.corrupt(true, matrix, generator(1, "noise"))
    torch.rand(5)
    assert torch.equal(first, noise.corrupt(true, matrix, generator(1, "noise")))
    assert not torch.equal(first, noise.corrupt(true, matrix, generator(2, "noise")))


@pytest.mark.parametrize(
    ("protocol", "classes", "exclude_true", "message"),
    [
        ("flip", 10, True, "never draws the true class"),
        ("hierarchical", 10, False, "Only CIFAR-100"),
        ("asymmetric", 12, False, "CIFAR-10 and CIFAR-100 only"),
        ("salt", 10, False, "must be one of uniform, flip"),
    ],
)
def test_impossible_noise_is_refused(protocol: str, classes: int, exclude_true: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise.matrix(protocol, 0.4, classes, exclude_true=exclude_true)
