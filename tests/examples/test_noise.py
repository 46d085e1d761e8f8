"""Transition matrices against the published ones, and sampling against its expectation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.noisy_labels import cifar
from examples.noisy_labels.data import archives, noise, pools
from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.run.settings import Settings

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


def test_instance_dependent_noise_follows_the_image_and_the_rate() -> None:
    classes, each = 10, 400
    source = generator(3, "pixels")
    labels = torch.arange(classes).repeat_interleave(each)
    pixels = torch.rand(classes * each, 3, 4, 4, generator=source)
    given = noise.instance_dependent(pixels, labels, 0.4, classes, generator(1, "noise"))
    # Wrong with probability q_i, q_i around 0.4: standard error sqrt(.4 * .6 / 4000) = 0.008.
    assert noise.realised_rate(labels, given) == pytest.approx(0.4, abs=0.03)
    again = noise.instance_dependent(pixels, labels, 0.4, classes, generator(1, "noise"))
    assert torch.equal(given, again)
    # The same image 400 times: its class's projection names one mistake nearly always (scores of deviation 7), where
    # noise that depends on the class alone would spread as the class does.
    same = pixels[:1].expand(each, -1, -1, -1)
    of_one = noise.instance_dependent(same, labels[:each], 0.4, classes, generator(1, "noise"))
    mistakes = of_one[of_one != 0].bincount(minlength=classes).double()
    of_all = given[:each][given[:each] != 0].bincount(minlength=classes).double()
    assert mistakes.max() / mistakes.sum() > 0.6 > of_all.max() / of_all.sum()


# --- full-size label vectors: 50,000 training labels, 2 % of them trusted, as the published protocol has it ----------

# CIFAR-100's superclass of each class, in alphabetical order of the classes: aquatic mammals 0, fish 1, flowers 2, ...
COARSE = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 "
    "5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 "
    "16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)
SUPERCLASSES = torch.tensor([int(one) for one in COARSE.split()])
PROTOCOLS = [
    *[(classes, protocol) for classes in (10, 100) for protocol in noise.PROTOCOLS if protocol != "hierarchical"],
    (100, "hierarchical"),
]
# Share of wrong labels as a multiple of the rate, with balanced classes.
FACTORS = {(10, "uniform"): 0.9, (100, "uniform"): 0.99, (10, "asymmetric"): 0.5, (100, "asymmetric"): 0.4}


def full_task(classes: int, protocol: str, rate: float, **options: object) -> Task:
    """Deal and corrupt 60,000 labels without images, through the very code that a run takes."""
    labels = torch.arange(60_000) % classes
    groups = SUPERCLASSES if classes == 100 else None
    names = tuple(map(str, range(classes)))
    pool = pools.Pool(torch.zeros(60_000, 1), labels, torch.arange(50_000, 60_000), names, (0.0,), (1.0,), groups)
    settings = Settings(dataset=f"cifar{classes}", noise=protocol, rate=rate, **options)  # type: ignore[arg-type]
    return pools.corrupted(pool, settings, torch.device("cpu"))


def test_superclasses_are_those_of_cifar100() -> None:
    assert torch.bincount(SUPERCLASSES).tolist() == [5] * 20


REAL = os.environ.get("BILEVEL_DATA")


@pytest.mark.skipif(
    REAL is None or archives.find("cifar100", [Path(REAL)]) is None,
    reason="BILEVEL_DATA names no folder with CIFAR-100",
)
def test_superclasses_are_those_of_the_archive() -> None:
    pool = pools.cifar("cifar100", REAL)
    assert pool.groups is not None
    assert torch.equal(pool.groups, SUPERCLASSES)


@pytest.mark.parametrize(("classes", "protocol"), PROTOCOLS)
def test_realised_rate_of_a_full_data_set(classes: int, protocol: str) -> None:
    task = full_task(classes, protocol, 0.4)
    assert (len(task.clean), len(task.noisy), len(task.test), task.overlap) == (1000, 49_000, 10_000, 0)
    assert torch.bincount(task.labels[task.clean]).tolist() == [1000 // classes] * classes
    matrix = noise.matrix(protocol, 0.4, classes, SUPERCLASSES if classes == 100 else None)
    expected = 0.4 * FACTORS.get((classes, protocol), 1.0)
    assert wrong(matrix) == pytest.approx(expected, abs=1e-12)
    per_class = 1 - matrix.diagonal()
    sigma = ((per_class * (1 - per_class)).mean().item() / 49_000) ** 0.5
    assert abs(noise.realised_rate(task.true_labels, task.noisy_labels) - expected) < 3 * sigma
    # Every class by itself: 100 tests at once, hence four sigma.
    counts = torch.bincount(task.true_labels, minlength=classes)
    shares = torch.bincount(task.true_labels[task.noisy_labels != task.true_labels], minlength=classes) / counts
    assert ((shares - per_class).abs() <= 4 * (per_class * (1 - per_class) / counts).sqrt()).all()
    assert (matrix[task.true_labels, task.noisy_labels] > 0).all()


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("classes", [10, 100])
def test_uniform_rates_of_the_published_tables(classes: int, rate: float) -> None:
    sigma = (0.25 / 49_000) ** 0.5
    included = full_task(classes, "uniform", rate)
    expected = rate * (1 - 1 / classes)
    assert noise.realised_rate(included.true_labels, included.noisy_labels) == pytest.approx(expected, abs=3 * sigma)
    excluded = full_task(classes, "uniform", rate, exclude_true=True)
    assert noise.realised_rate(excluded.true_labels, excluded.noisy_labels) == pytest.approx(rate, abs=3 * sigma)
    assert torch.equal(included.noisy, excluded.noisy), "the split has a stream of its own"


def test_flip_makes_two_thirds_of_one_class_wrong() -> None:
    task = full_task(10, "flip", 0.4)
    frogs = task.noisy_labels == 6
    assert (task.true_labels[frogs] != 6).double().mean().item() == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize(("protocol", "touched"), [("asymmetric", 40), ("hierarchical", 100)])
def test_noise_of_cifar100_stays_in_its_superclass(protocol: str, touched: int) -> None:
    task = full_task(100, protocol, 0.4)
    assert torch.equal(SUPERCLASSES[task.noisy_labels], SUPERCLASSES[task.true_labels])
    assert len(task.true_labels[task.noisy_labels != task.true_labels].unique()) == touched
    per_superclass = torch.bincount(SUPERCLASSES[task.true_labels[task.noisy_labels != task.true_labels].unique()])
    assert per_superclass.tolist() == [touched // 20] * 20


def test_the_maps_do_not_depend_on_the_seed_of_the_run() -> None:
    for protocol in ("flip", "flip2", "asymmetric"):
        first, second = (full_task(100, protocol, 1.0, seed=seed) for seed in (1, 2))
        maps = [
            {(a, b) for a, b in zip(t.true_labels.tolist(), t.noisy_labels.tolist(), strict=True)}
            for t in (first, second)
        ]
        assert maps[0] == maps[1]


def test_parts_drawn_independently_would_leak() -> None:
    # What published loaders do: every part shuffles the images of each class anew and takes its share.
    stream = torch.Generator().manual_seed(0)
    leaked = 0
    for _ in range(10):
        trusted = torch.randperm(5000, generator=stream)[:100]
        noisy = torch.randperm(5000, generator=stream)[100:]
        leaked += int(torch.isin(trusted, noisy).sum())
    # Each of 1,000 trusted images is among the noisy ones with probability 0.98.
    sigma = (1000 * 0.98 * 0.02) ** 0.5
    assert abs(leaked - 980) < 3 * sigma
    assert full_task(10, "uniform", 0.4).overlap == 0


@pytest.mark.parametrize("classes", [10, 100])
def test_a_run_prints_realised_rate_and_overlap(classes: int) -> None:
    task = full_task(classes, "uniform", 0.4)
    realised = 100 * noise.realised_rate(task.true_labels, task.noisy_labels)
    assert cifar.describe(task, "the setting") == (
        f"the setting: 49000 noisy images ({realised:.2f} % of the labels are wrong), "
        "1000 trusted, 10000 test; overlap 0"
    )


def test_a_transition_matrix_of_ones_own_is_followed(tmp_path: Path) -> None:
    """Three kinds of rows: kept, always another class, and a coin."""
    rows = torch.eye(10, dtype=torch.float64)
    rows[3], rows[4] = torch.eye(10, dtype=torch.float64)[7], (rows[4] + rows[5]) / 2
    file = tmp_path / "my_noise.csv"
    file.write_text("\n".join(",".join(f"{p:.2f}" for p in row) for row in rows.tolist()))
    settings = Settings(dataset="digits", noise="matrix", transition=str(file), network="mlp")
    task = pools.load(settings, torch.device("cpu"))
    given = {one: task.noisy_labels[task.true_labels == one] for one in range(10)}
    assert all(bool((given[one] == one).all()) for one in (0, 1, 2, 5, 6, 7, 8, 9))
    assert bool((given[3] == 7).all())
    share = (given[4] == 5).double().mean().item()
    assert set(given[4].tolist()) == {4, 5}
    assert abs(share - 0.5) < 3 * (0.25 / len(given[4])) ** 0.5
    assert "my_noise" in settings.folder_name
    assert settings.title == "digits noise of my_noise.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,0.5\n0,1\n0.1,0.9", "is 3 x 2, expected 2 x 2"),
        ("1,0\n0.6,0.5", r"line 2 is 0\.6, 0\.5; probabilities are at least 0 and sum to 1"),
        ("1,0\n-0.1,1.1", "line 2 is"),
        ("1,0\nnan,1", "line 2 is"),
        ("a,b\n0,1", "Write numbers with commas"),
        ("1,0\n1", "Write numbers with commas"),
    ],
)
def test_a_wrong_transition_matrix_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "noise.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        noise.read(file, 2)


@pytest.mark.parametrize("options", [{"noise": "matrix"}, {"transition": "noise.csv"}])
def test_a_transition_matrix_and_its_noise_go_together(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="goes together with --noise matrix"):
        Settings(**options)  # type: ignore[arg-type]
