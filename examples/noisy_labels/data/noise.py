"""Label noise: transition matrices of the published protocols, and sampling from them.

Entry ``[i, j]`` of a matrix is the probability that an image of class ``i`` is given the label ``j``. Each given label
is drawn independently, so the realised rate differs a little from the expected one; print it with `realised_rate`.

The maps of `flip`, `flip2` and `asymmetric` for 100 classes come from numpy's legacy generator with seed 1, whatever
the seed of the run, because the published tables were made that way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PROTOCOLS = ("uniform", "flip", "flip2", "pairflip", "asymmetric", "hierarchical")

PUBLISHED_SEED = 1

# automobile 1, bird 2, cat 3, deer 4, dog 5, horse 7, airplane 0, truck 9: who is mistaken for whom in CIFAR-10.
SIMILAR_IN_CIFAR10 = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


def uniform(rate: float, classes: int, *, exclude_true: bool = False) -> Tensor:
    """With probability ``rate`` the label is drawn anew from all classes, the true one included.

    The expected share of wrong labels is therefore ``rate * (classes - 1) / classes``: 36 % at rate 0.4 and ten
    classes. With ``exclude_true`` the new label is one of the other classes, and the share is ``rate``.
    """
    if exclude_true:
        others = torch.full((classes, classes), rate / (classes - 1), dtype=torch.float64)
        return others.fill_diagonal_(1 - rate)
    return (1 - rate) * torch.eye(classes, dtype=torch.float64) + rate / classes


def flip(rate: float, classes: int) -> Tensor:
    """Each class is mistaken for one other class. The map is fixed and no permutation: targets may coincide."""
    source = np.random.RandomState(PUBLISHED_SEED)
    return _moved(rate, classes, {i: [int(source.choice(_others(i, classes)))] for i in range(classes)})


def flip2(rate: float, classes: int) -> Tensor:
    """Each class is mistaken for two other classes, with probability ``rate / 2`` each."""
    source = np.random.RandomState(PUBLISHED_SEED)
    targets = {i: source.choice(_others(i, classes), 2, replace=False).tolist() for i in range(classes)}
    return _moved(rate, classes, targets)


def pairflip(rate: float, classes: int) -> Tensor:
    """Each class is mistaken for the next one."""
    return _moved(rate, classes, {i: [(i + 1) % classes] for i in range(classes)})


def asymmetric(rate: float, groups: Tensor | None = None) -> Tensor:
    """Classes are mistaken for similar ones.

    Without ``groups``: CIFAR-10's truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog; half of the
    classes are touched, so the expected share of wrong labels is ``rate / 2``. With ``groups``, the superclass of each
    of CIFAR-100's classes: in every superclass two classes are mistaken for two others, hence ``0.4 * rate``.
    """
    if groups is None:
        return _moved(rate, 10, {i: [j] for i, j in SIMILAR_IN_CIFAR10.items()})
    source = np.random.RandomState(PUBLISHED_SEED)
    targets: dict[int, list[int]] = {}
    for members in _members(groups):
        first, second, for_first, for_second = source.choice(len(members), 4, replace=False)
        targets |= {members[first]: [members[for_first]], members[second]: [members[for_second]]}
    return _moved(rate, len(groups), targets)


def hierarchical(rate: float, groups: Tensor) -> Tensor:
    """Each class is mistaken for any other class of its superclass, ``groups[class]``."""
    targets = {i: [j for j in members if j != i] for members in _members(groups) for i in members}
    return _moved(rate, len(groups), targets)


def matrix(
    protocol: str, rate: float, classes: int, groups: Tensor | None = None, exclude_true: bool = False
) -> Tensor:
    """Return the transition matrix of a protocol chosen by its name on the command line."""
    if exclude_true and protocol != "uniform":
        raise ValueError(f"noise(exclude_true=True): {protocol} noise never draws the true class. Use it with uniform.")
    match protocol:
        case "uniform":
            return uniform(rate, classes, exclude_true=exclude_true)
        case "flip":
            return flip(rate, classes)
        case "flip2":
            return flip2(rate, classes)
        case "pairflip":
            return pairflip(rate, classes)
        case "asymmetric" if groups is not None or classes == 10:
            return asymmetric(rate, groups)
        case "asymmetric":
            raise ValueError("noise(asymmetric): defined for the classes of CIFAR-10 and CIFAR-100 only.")
        case "hierarchical" if groups is not None:
            return hierarchical(rate, groups)
        case "hierarchical":
            raise ValueError("noise(hierarchical): needs classes in superclasses. Only CIFAR-100 has them.")
    raise ValueError(f"noise({protocol}): must be one of {', '.join(PROTOCOLS)}.")


def read(file: Path, classes: int) -> Tensor:
    """Read a transition matrix: one line of comma-separated probabilities for each true class.

    Raises:
        ValueError: It is not of ``classes`` rows and columns, or a row is no distribution.
    """
    owner = f"noise({file})"
    try:
        found = np.loadtxt(file, delimiter=",", ndmin=2)
    except OSError:
        raise FileNotFoundError(f"{owner}: there is no such file, or it cannot be read.") from None
    except ValueError as problem:
        raise ValueError(f"{owner}: {problem}. Write numbers with commas between them, without a heading.") from None
    if found.shape != (classes, classes):
        shape = " x ".join(map(str, found.shape))
        raise ValueError(f"{owner}: is {shape}, expected {classes} x {classes}. Write a line for each true class.")
    # Within what rounding to two digits may leave; `corrupt` divides by the sum.
    bad = np.flatnonzero((found < 0).any(1) | ~(np.abs(found.sum(1) - 1) <= 0.01))
    if len(bad):
        row = ", ".join(f"{p:g}" for p in found[bad[0]])
        raise ValueError(f"{owner}: line {bad[0] + 1} is {row}; probabilities are at least 0 and sum to 1. Mend it.")
    return torch.from_numpy(found)


def corrupt(labels: Tensor, transition: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a given label for each true label."""
    cumulative = transition.cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    draws = torch.rand(len(labels), 1, dtype=torch.float64, generator=generator)
    # Counting "<=" never selects a class of probability 0, which torch.multinomial does not promise.
    return (cumulative[labels] <= draws).sum(1)


def instance_dependent(pixels: Tensor, labels: Tensor, rate: float, classes: int, generator: torch.Generator) -> Tensor:
    """Draw given labels whose noise depends on the image: algorithm 2 of Xia et al., NeurIPS 2020.

    Image ``i`` is mistaken with a probability ``q_i`` of its own, drawn from a normal distribution around ``rate`` with
    deviation 0.1, cut to [0, 1]. For which other class is drawn from ``softmax(x_i W_y)``, where ``W_y`` is a random
    matrix (pixels x classes) of the image's class ``y``: similar images of a class are mistaken for the same classes.
    A rate below 0.3 comes out a little higher than asked, and one above 0.7 lower, as the normal distribution is cut.

    Args:
        pixels: Images of the labels, (n, channels, height, width), of any scale: they are standardised.
        labels: True labels, (n,).
        rate: Mean of the probabilities of a mistake.
        classes: Number of labels.
        generator: Where all draws come from, on the CPU.
    """
    mistaken = torch.empty(len(labels), dtype=torch.float64)
    torch.nn.init.trunc_normal_(mistaken, rate, 0.1, 0.0, 1.0, generator=generator)
    rows = torch.zeros(len(labels), classes, dtype=torch.float64)
    for label in range(classes):  # class by class: 100 matrices of 3,072 x 100 need not be there at once
        members = torch.where(labels == label)[0]
        weights = torch.randn(pixels[0].numel(), classes, dtype=torch.float64, generator=generator)
        images = pixels[members].flatten(1).double()
        images = images - images.mean(1, keepdim=True)
        images = images / images.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        scores = (images @ weights).index_fill(1, torch.tensor([label]), -torch.inf)
        rows[members] = mistaken[members, None] * scores.softmax(1)
        rows[members, label] = 1 - mistaken[members]
    return corrupt(torch.arange(len(labels)), rows, generator)


def realised_rate(true: Tensor, given: Tensor) -> float:
    """Return the share of labels that are wrong."""
    return (true != given).double().mean().item()


def _moved(rate: float, classes: int, targets: dict[int, list[int]]) -> Tensor:
    """Move ``rate`` of the mass of each class to its targets, in equal parts."""
    result = torch.eye(classes, dtype=torch.float64)
    for source, destinations in targets.items():
        result[source, source] = 1 - rate
        for destination in destinations:
            result[source, destination] += rate / len(destinations)
    return result


def _others(one: int, classes: int) -> np.ndarray:
    return np.array([i for i in range(classes) if i != one])


def _members(groups: Tensor) -> list[list[int]]:
    return [torch.where(groups == group)[0].tolist() for group in range(int(groups.max()) + 1)]
