"""``ebomlc-released`` against a transcript of the authors' step, in plain autograd and float64.

The transcript exists twice: with the clean gradient as the released code takes it, an SGD update with its sign and
scale, and as a gradient. The recipe is the second, and the first as an ablation; the tests also say exactly what
differs between the two.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.meta_label_correction import MetaLabelCorrection
from examples.noisy_labels.recipes.models import Corrector
from examples.noisy_labels.run.settings import Settings

RATE, MOMENTUM, DECAY, META_RATE, DELTA, XI, RHO = 0.3, 0.9, 5e-2, 1e-2, 0.7, 0.5, 0.2
SETTINGS = Settings(
    method="ebomlc-released",
    dataset="digits",
    lr=RATE,
    momentum=MOMENTUM,
    weight_decay=DECAY,
    meta_lr=META_RATE,
    delta=DELTA,
    xi=XI,
    rho=RHO,
)


class Student(nn.Module):
    """A classifier with batch statistics, so that it matters which images share a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(self.norm(self.hidden(x)))
        return self.head(features), features


def networks(dropout: float = 0.0) -> tuple[Student, Corrector]:
    torch.manual_seed(3)
    corrector = Corrector(5, 4, width=4, dropout=dropout, batch_norm=True, normal_embedding=True)
    return Student().double(), corrector.double()


def batches(step: int) -> tuple[Batch, Batch]:
    stream = torch.Generator().manual_seed(step)
    noisy, clean = (torch.randint(4, (n,), generator=stream) for n in (12, 9))
    x, z = (torch.randn(n, 6, dtype=torch.float64, generator=stream) for n in (12, 9))
    return Batch(x, noisy, noisy), Batch(z, clean, clean)


@dataclass
class Seen:
    """What one step of the transcript saw, before the optimizers moved."""

    upper_loss: Tensor
    lower_loss: Tensor
    constraint: Tensor
    multiplier: Tensor
    clean_gradient: list[Tensor]  # what is called gF in 5.4: for w
    clean_gradient_upper: list[Tensor]
    start: list[Tensor]  # w1
    difference: list[Tensor]  # grad_w Q
    difference_upper: list[Tensor]


class Transcript:
    """The released step, line by line; ``as_update`` says how it takes the clean gradient in w."""

    def __init__(self, student: Student, corrector: Corrector, *, as_update: bool) -> None:
        self.student, self.corrector, self.as_update = student, corrector, as_update
        self.w, self.a = list(student.parameters()), list(corrector.parameters())
        self.sgd = torch.optim.SGD(self.w, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
        self.adam = torch.optim.Adam(self.a, lr=META_RATE, amsgrad=True)

    def step(self, noisy: Batch, clean: Batch) -> Seen:
        half = len(clean.labels) // 2
        # 1. The mixture of logits and probabilities on the first half, as if it were logits.
        logits, features = self.student(clean.inputs[:half])
        mixed = RHO * logits + (1 - RHO) * self.corrector(features.detach(), clean.labels[:half])
        upper = negative_log_likelihood(mixed, clean.labels[:half])
        f_w, f_a = self.gradients(upper)
        # 2. In the code the gradient becomes the change that SGD would make.
        gradient = [moved - w.detach() for w, moved in zip(self.w, self.ahead(f_w), strict=True)]
        gradient = gradient if self.as_update else f_w
        # 3. The lower loss at w, and the whole of SGD's step on it, which is never taken back.
        lower = self.lower(noisy, clean, half)
        g_w, g_a = self.gradients(lower)
        start = self.ahead(g_w)
        with torch.no_grad():
            for w, value in zip(self.w, start, strict=True):
                w.copy_(value)
        # 4. The lower loss there, with soft labels from the features there.
        beyond = self.lower(noisy, clean, half)
        h_w, h_a = self.gradients(beyond)
        q_w = [g - h for g, h in zip(g_w, h_w, strict=True)]
        q_a = [g - h for g, h in zip(g_a, h_a, strict=True)]
        # 5. The multiplier.
        square = product(q_w, q_w) + product(q_a, q_a)
        beta = XI * torch.relu(DELTA * square - product(q_w, gradient)) / (square + 1e-8)
        # 7. Both optimizers step; that of w from w1. (6 concerns CIFAR-100 alone.)
        for w, q, f in zip(self.w, q_w, gradient, strict=True):
            w.grad = beta * q + f
        for a, q, f in zip(self.a, q_a, f_a, strict=True):
            a.grad = beta * q + f
        self.sgd.step()
        self.adam.step()
        constraint = (lower - beyond).detach()
        return Seen(upper.detach(), lower.detach(), constraint, beta, gradient, f_a, start, q_w, q_a)

    def lower(self, noisy: Batch, clean: Batch, half: int) -> Tensor:
        """The mean over noisy images with soft labels and the second half of the clean ones with hard labels."""
        logits, features = self.student(noisy.inputs)
        soft = self.corrector(features.detach(), noisy.labels)
        noisy_sum = -(soft * logits.log_softmax(1)).sum()
        clean_logits, clean_labels = self.student(clean.inputs[half:])[0], clean.labels[half:]
        clean_sum = len(clean_labels) * negative_log_likelihood(clean_logits, clean_labels)
        return (noisy_sum + clean_sum) / (len(noisy.labels) + len(clean_labels))

    def ahead(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Where SGD would go from here, with its momentum and its weight decay."""
        points = []
        for w, gradient in zip(self.w, gradients, strict=True):
            buffer = self.sgd.state[w].get("momentum_buffer", torch.zeros_like(w))
            points.append((w - RATE * (MOMENTUM * buffer + gradient + DECAY * w)).detach())
        return points

    def gradients(self, loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        both = torch.autograd.grad(loss, self.w + self.a)
        return list(both[: len(self.w)]), list(both[len(self.w) :])

    def copy(self, *, as_update: bool) -> Transcript:
        """The same networks in the same state, with the clean gradient taken in another way."""
        other = Transcript(*copy.deepcopy((self.student, self.corrector)), as_update=as_update)
        other.sgd.load_state_dict(copy.deepcopy(self.sgd.state_dict()))
        other.adam.load_state_dict(copy.deepcopy(self.adam.state_dict()))
        return other


@pytest.mark.parametrize("clean_gradient", ["gradient", "released"])
def test_the_recipe_takes_the_step_of_the_transcript(clean_gradient: str) -> None:
    expected = Transcript(*networks(), as_update=clean_gradient == "released")
    student, corrector = networks()
    recipe = MetaLabelCorrection(replace(SETTINGS, clean_gradient=clean_gradient), student, corrector)
    multipliers = []
    for step in range(8):
        numbers, seen = recipe.step(*batches(step)), expected.step(*batches(step))
        for name in ("upper_loss", "lower_loss", "constraint", "multiplier"):
            close(numbers[name], getattr(seen, name))
        for network, reference in ((student, expected.student), (corrector, expected.corrector)):
            for parameter, want in zip(network.parameters(), reference.parameters(), strict=True):
                close(parameter.detach(), want.detach())
        multipliers.append(seen.multiplier.item())
    for mine, theirs in (
        (recipe.bilevel.lower_optimizer, expected.sgd),
        (recipe.bilevel.upper_optimizer, expected.adam),
    ):
        states = zip(mine.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True)
        for state, want in states:
            assert state.keys() == want.keys()
            for name, value in want.items():
                close(state[name], value)
    # The case must exercise the barrier: sometimes active, and then not merely xi * delta.
    assert max(multipliers) > 0
    assert max(abs(multiplier - XI * DELTA) for multiplier in multipliers if multiplier > 0) > 0.01


def test_the_released_code_differs_in_the_clean_gradient_and_what_follows_from_it() -> None:
    repaired = Transcript(*networks(), as_update=False)
    for step in range(3):  # so that momentum is there
        repaired.step(*batches(step))
    released = repaired.copy(as_update=True)
    w = [value.detach().clone() for value in repaired.w]
    buffers = [repaired.sgd.state[value]["momentum_buffer"].clone() for value in repaired.w]
    ours, theirs = repaired.step(*batches(3)), released.step(*batches(3))
    for name in ("upper_loss", "lower_loss", "constraint"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    for name in ("start", "difference", "difference_upper", "clean_gradient_upper"):
        assert all(torch.equal(x, y) for x, y in zip(getattr(ours, name), getattr(theirs, name), strict=True))
    for mine, found, value, buffer in zip(ours.clean_gradient, theirs.clean_gradient, w, buffers, strict=True):
        close(found, -RATE * (MOMENTUM * buffer + mine + DECAY * value))
    assert ours.multiplier != theirs.multiplier
    for i, (mine, found) in enumerate(zip(repaired.w, released.w, strict=True)):
        weighted = (theirs.multiplier - ours.multiplier) * ours.difference[i]
        close(found - mine, -RATE * (weighted + theirs.clean_gradient[i] - ours.clean_gradient[i]))


def test_the_released_code_climbs_the_clean_loss() -> None:
    """From the first step on, without momentum: what it hands to SGD points against the gradient."""
    noisy, clean = batches(0)
    ours = Transcript(*networks(), as_update=False).step(noisy, clean)
    theirs = Transcript(*networks(), as_update=True).step(noisy, clean)
    w = [value.detach() for value in networks()[0].parameters()]
    decayed = [gradient + DECAY * value for gradient, value in zip(ours.clean_gradient, w, strict=True)]
    assert product(theirs.clean_gradient, decayed) < 0
    assert product(theirs.clean_gradient, ours.clean_gradient) < 0


def test_dropout_masks_of_the_look_ahead_are_those_of_the_first_evaluation() -> None:
    """At a learning rate below all rounding the look-ahead stays where it is; other masks would make a Q."""
    student, corrector = networks(dropout=0.3)
    recipe = MetaLabelCorrection(replace(SETTINGS, lr=1e-30), student, corrector)
    noisy, clean = batches(0)
    assert recipe.step(noisy, clean)["constraint"] == 0
    features = student(noisy.inputs)[1].detach()
    assert not torch.equal(corrector(features, noisy.labels), corrector(features, noisy.labels))


def test_statistics_move_in_every_pass_as_in_the_released_code() -> None:
    student, corrector = networks()
    recipe = MetaLabelCorrection(SETTINGS, student, corrector)
    recipe.step(*batches(0))
    (norm,) = (layer for layer in corrector.layers if isinstance(layer, nn.BatchNorm1d))
    assert student.norm.num_batches_tracked == 5  # noisy and clean at w, the same at w1, and the upper half
    assert norm.num_batches_tracked == 3
    # Batch statistics are used in training, so when the running ones move changes no other number.
    other_student, other_corrector = networks()
    other = MetaLabelCorrection(replace(SETTINGS, buffers="once"), other_student, other_corrector)
    other.step(*batches(0))
    assert all(torch.equal(x, y) for x, y in zip(student.parameters(), other_student.parameters(), strict=True))
    assert not torch.equal(student.norm.running_mean, other_student.norm.running_mean)


@pytest.mark.parametrize(("mine", "index"), [("upper", 0), ("lower", 1)])
def test_the_first_half_judges_and_the_second_joins(mine: str, index: int) -> None:
    """Moving an image of one half changes the loss of that half only."""
    student, corrector = networks()
    noisy, clean = batches(0)
    before = MetaLabelCorrection(SETTINGS, *copy.deepcopy((student, corrector))).step(noisy, clean)
    image = 3 if mine == "upper" else 4  # of nine: four for the upper loss, five join the lower
    inputs = clean.inputs.clone()
    inputs[image] += 1
    after = MetaLabelCorrection(SETTINGS, student, corrector).step(noisy, clean._replace(inputs=inputs))
    changed = [before[name] != after[name] for name in ("upper_loss", "lower_loss")]
    assert changed == [index == 0, index == 1]


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()


def product(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(one, other, strict=True)]).sum()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-10, atol=1e-12)
