"""`ours` against its equations written out, and what it promises."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.data import pools
from examples.noisy_labels.data.batches import Batch, Batches
from examples.noisy_labels.recipes import decoding
from examples.noisy_labels.recipes.ours import Ours, Temper
from examples.noisy_labels.recipes.ours_barrier import OursBarrier
from examples.noisy_labels.run import evaluation
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.run.training import Run

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"method": "ours", "dataset": "digits", "network": "mlp", "lr": 0.3, "momentum": 0.0}
PLAIN |= {"weight_decay": 0.0, "memory": 0.5}
DIGITS: dict[str, Any] = {"method": "ours", "dataset": "digits", "network": "mlp", "noise": "flip", "augment": False}
DIGITS |= {"clean_fraction": 0.04}


class Linear(nn.Module):
    """Logits of tiny images of one channel, which are their own features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x.flatten(1)), x.flatten(1)


def problem(classes: int) -> tuple[Linear, Batch, Batch]:
    """Five noisy images in two views, and two trusted ones, all in float64."""
    torch.manual_seed(3)
    given, true = (torch.arange(5) % classes).repeat(2), torch.arange(2)
    noisy, clean = torch.randn(10, 1, 2, 2, dtype=torch.float64), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    return Linear(classes).double(), Batch(noisy, given, given), Batch(clean, true, true)


def images_of(classes: int, images: int) -> Any:
    """Stand for a task of which only sizes are asked."""
    return SimpleNamespace(names=range(classes), noisy=range(images))


def posterior(p: Tensor, transition: Tensor, given: Tensor) -> Tensor:
    m = torch.stack([p[i] * transition[:, y] for i, y in enumerate(given.tolist())])
    return m / m.sum(1, keepdim=True)


def test_two_steps_are_the_equations() -> None:
    classes, images = 3, 1000
    classifier, noisy, clean = problem(classes)
    w, e = copy.deepcopy(classifier), copy.deepcopy(classifier)
    recipe = Ours(Settings(clean_weight=0.25, **PLAIN), classifier, images_of(classes, images))
    first = torch.full((3, 3), 0.55 / 2, dtype=torch.float64).fill_diagonal_(0.45)
    recipe.counts.prior, recipe.counts.counts = first, 300 / classes * first
    counts = 300 / classes * first  # 100 a class
    log_temper = torch.zeros((), dtype=torch.float64)
    recipe.temper.log = log_temper.clone()
    recipe.seen = 598  # so that memory is the fewest in the first step, and half of all that was seen in the second
    for t, memory in ((1, 301.5), (2, 304.0)):
        counts = counts * memory / counts.sum()
        transition = (counts + first) / (counts + first).sum(1, keepdim=True)
        p = e(noisy.inputs)[0].softmax(1).detach()
        log_temper.requires_grad_()
        of_trusted = functional.cross_entropy(log_temper.exp() * e(clean.inputs)[0].detach(), clean.labels)
        log_temper = (log_temper - 0.1 * torch.autograd.grad(of_trusted, log_temper)[0]).detach()
        q = p ** log_temper.exp()
        q = q / q.sum(1, keepdim=True)
        given = noisy.labels[:5]
        m = posterior((p[:5] + p[5:]) / 2, transition, given)
        counted = (posterior(q[:5], transition, given) + posterior(q[5:], transition, given)) / 2
        counts = counts * (1 - 5 / memory)
        for i, y in enumerate(given.tolist()):
            counts[:, y] += counted[i]
        logs = w(noisy.inputs)[0].log_softmax(1)
        of_noisy = -(m * (logs[:5] + logs[5:]) / 2).sum(1).mean()
        of_clean = functional.cross_entropy(w(clean.inputs)[0], clean.labels)
        gradients = torch.autograd.grad(of_noisy + 0.25 * of_clean, list(w.parameters()))
        rate = t / (t + 10)
        with torch.no_grad():
            for p_w, p_e, g in zip(w.parameters(), e.parameters(), gradients, strict=True):
                p_w -= 0.3 * g
                p_e.mul_(rate).add_((1 - rate) * p_w)
        recipe.step(noisy, clean)
        torch.testing.assert_close(recipe.counts.counts, counts, rtol=1e-9, atol=0)
        torch.testing.assert_close(recipe.temper.log, log_temper, rtol=1e-9, atol=0)
        assert log_temper.abs() > 1e-4
        for own, expected in zip(recipe.classifier.parameters(), w.parameters(), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)
        for own, expected in zip(recipe.averaged.parameters(), e.parameters(), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


def test_the_temper_is_the_one_that_calibrates() -> None:
    torch.manual_seed(0)
    logs = (2 * torch.randn(4000, 3)).log_softmax(1)
    labels = torch.multinomial((1.5 * logs).softmax(1), 1).squeeze(1)
    temper = Temper()
    for _ in range(30):
        for part, of_part in zip(logs.split(100), labels.split(100), strict=True):
            temper.learn(part, of_part)
    assert temper.log.exp().item() == pytest.approx(1.5, abs=0.15)
    torch.testing.assert_close(temper(logs), (temper.log.exp() * logs).softmax(1))
    for sign in (1, -1):  # whoever is always right, or wrong, does not send it to infinity
        for _ in range(100):
            temper.learn(sign * torch.eye(3), torch.arange(3))
        assert temper.log.item() == sign


def test_the_barrier_is_the_nearest_direction_on_which_the_trusted_loss_falls() -> None:
    classifier, _, _ = problem(2)
    recipe = OursBarrier(Settings(**PLAIN), classifier, images_of(2, 100))
    weights = torch.cat([p.detach().flatten() for p in classifier.parameters()])
    torch.manual_seed(0)
    g = torch.randn_like(weights)
    for along, expected in ((0.05, 0.05), (0.3, 0.0), (-0.4, 0.5), (-3.0, 1.0)):  # of f on g; delta is .1
        across = torch.randn_like(weights)
        f = across - (across @ g) / (g @ g) * g + along * g

        def linear(slope: Tensor) -> Tensor:
            return torch.cat([p.flatten() for p in classifier.parameters()]) @ slope

        recipe.descent.zero_grad()
        numbers = recipe.backward(linear(f), linear(g))
        assert numbers["multiplier"].item() == pytest.approx(expected, abs=1e-7)
        left = torch.cat([p.grad.flatten() for p in classifier.parameters() if p.grad is not None])
        torch.testing.assert_close(left, f + expected * g, rtol=1e-6, atol=1e-7)


def test_answers_do_not_depend_on_which_side_is_left() -> None:
    classifier, noisy, _ = problem(3)
    recipe = Ours(Settings(**PLAIN), classifier, images_of(3, 100))
    mirrored = noisy.inputs.flip(3)
    torch.testing.assert_close(recipe.predict(noisy.inputs), recipe.predict(mirrored))
    torch.testing.assert_close(recipe.correct(noisy.inputs, noisy.labels), recipe.correct(mirrored, noisy.labels))
    assert not torch.allclose(recipe.predict_view(noisy.inputs), recipe.predict_view(mirrored))
    plain = Ours(Settings(**PLAIN | {"augment": False}), classifier, images_of(3, 100))
    assert torch.equal(plain.predict(noisy.inputs), plain.predict_view(noisy.inputs))


@pytest.mark.parametrize(("classes", "images"), [(3, 1000), (3, 120)])
def test_memory_grows_to_one_pass(classes: int, images: int) -> None:
    classifier, noisy, clean = problem(classes)
    recipe = Ours(Settings(**PLAIN), classifier, images_of(classes, images))
    held = []
    for _ in range(600):
        recipe.step(noisy, clean)
        held.append(recipe.counts.counts.sum().item())
    least = min(images, 300)
    assert held[0] == pytest.approx(least, rel=1e-4)
    assert held[299] == pytest.approx(min(images, 750), rel=1e-3)  # half of 300 batches of 5
    assert held[599] == pytest.approx(images, rel=1e-3)
    torch.testing.assert_close(recipe.transition.sum(1), torch.ones(classes))


def test_views_are_the_same_images_cropped_twice() -> None:
    settings = Settings(**DIGITS)
    task = pools.load(settings, CPU)
    options: dict[str, Any] = {"size": 20, "seed": 1, "purpose": "noisy batches"}
    once = next(Batches(task, task.noisy, task.noisy_labels, augment=False, **options))
    twice = next(Batches(task, task.noisy, task.noisy_labels, augment=False, views=2, **options))
    assert torch.equal(twice.inputs, once.inputs.repeat(2, 1, 1, 1))
    assert torch.equal(twice.labels, once.labels.repeat(2))
    cropped = next(Batches(task, task.noisy, task.noisy_labels, augment=True, views=2, **options))
    assert torch.equal(cropped.labels, twice.labels)
    assert not torch.equal(cropped.inputs[:20], cropped.inputs[20:])


def test_a_run_takes_the_views_that_the_recipe_asks_for() -> None:
    settings = Settings(**DIGITS)
    task = pools.load(settings, CPU)
    assert Run(settings, task).noisy.views == 1, "without augmentation a second view says nothing new"
    assert Run(Settings(**DIGITS | {"augment": True}), task).noisy.views == 2
    assert Run(Settings(**DIGITS | {"method": "em", "augment": True}), task).noisy.views == 1


def test_its_rule_is_bayes_rule_with_its_counts() -> None:
    settings = Settings(**DIGITS)
    run = Run(settings, pools.load(settings, CPU))
    run.advance()
    probabilities, transition = evaluation.labels_by_bayes(run.recipe, run.task)
    torch.testing.assert_close(probabilities, evaluation.corrected_labels(run.recipe, run.task))
    assert isinstance(run.recipe, Ours)
    assert torch.equal(transition, run.recipe.counts.transition)
    inputs = run.task.inputs(run.task.noisy)
    with evaluation.evaluating(run.recipe):
        expected = decoding.bayes(run.recipe.predict(inputs), transition, run.task.noisy_labels)
    torch.testing.assert_close(probabilities, expected)


def test_it_recovers_labels_of_digits() -> None:
    settings = Settings(epochs=10, **DIGITS)
    run = Run(settings, pools.load(settings, CPU))
    while run.epoch < run.epochs:
        while run.step < len(run.noisy):
            run.advance()
        run.end_epoch()
    scores = evaluation.recovery(evaluation.corrected_labels(run.recipe, run.task), run.task)
    assert scores["recovered"] > 0.25  # .53 when it was written
    assert scores["broken"] < 0.05  # .00
