"""The recipes against the same mathematics written out with plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.noisy_labels.data import pools
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes import methods
from examples.noisy_labels.recipes.label_correction import LabelCorrection
from examples.noisy_labels.recipes.label_correction import split as split_batch
from examples.noisy_labels.recipes.meta_label_correction import MetaLabelCorrection
from examples.noisy_labels.recipes.models import Corrector, Perceptron
from examples.noisy_labels.recipes.supervised import Supervised
from examples.noisy_labels.run.settings import METHODS, Settings
from examples.noisy_labels.run.training import Run
from fake_images import blank_task

OPTIONS: dict[str, Any] = {"dataset": "digits", "network": "mlp", "noise": "flip", "augment": False}


def problem() -> tuple[Perceptron, Corrector, Batch, Batch]:
    """A small classifier and corrector in float64, a clean and a noisy batch."""
    torch.manual_seed(1)
    classifier, corrector = Perceptron(4, inputs=6, hidden=5, features=3).double(), Corrector(3, 4, width=4).double()
    true, given = torch.arange(7) % 4, torch.arange(9) % 4
    clean = Batch(torch.randn(7, 6, dtype=torch.float64), true, true)
    noisy = Batch(torch.randn(9, 6, dtype=torch.float64), given, given)
    return classifier, corrector, clean, noisy


def test_upper_loss_is_equation_9() -> None:
    classifier, corrector, clean, _ = problem()
    loss = LabelCorrection(classifier, corrector, rho=0.2).upper_loss(clean)
    logits, features = classifier(clean.inputs)
    expected = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(clean.labels.tolist()):
        p = logits[i].exp() / logits[i].exp().sum()
        g = corrector(features[i : i + 1], clean.labels[i : i + 1])[0]
        expected = expected - (0.2 * p[label] + 0.8 * g[label]).log() / 7
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_upper_loss_may_mix_logarithms_and_show_other_labels() -> None:
    classifier, corrector, clean, _ = problem()
    shown = clean.labels.flip(0)
    losses = LabelCorrection(classifier, corrector, rho=0.2, mixture="log")
    logits, features = classifier(clean.inputs)
    right = (torch.arange(7), clean.labels)
    expected = -(0.2 * logits.log_softmax(1)[right] + 0.8 * corrector(features, shown)[right].log()).mean()
    torch.testing.assert_close(losses.upper_loss(clean._replace(given=shown)), expected, rtol=1e-10, atol=0)


def test_upper_loss_with_rho_one_is_cross_entropy() -> None:
    classifier, corrector, clean, _ = problem()
    loss = LabelCorrection(classifier, corrector, rho=1.0).upper_loss(clean)
    log_p = classifier(clean.inputs)[0].log_softmax(1)
    torch.testing.assert_close(loss, -log_p[torch.arange(7), clean.labels].mean())


@pytest.mark.parametrize("mixture", ["logits", "code"])
def test_upper_loss_may_mix_logits(mixture: str) -> None:
    """With the corrector's logits, or with its probabilities among logits, as in the released code."""
    classifier, corrector, clean, _ = problem()
    losses = LabelCorrection(classifier, corrector, rho=0.2, mixture=mixture)
    logits, features = classifier(clean.inputs)
    corrected = corrector.layers(torch.cat([features, corrector.embedding(clean.labels)], dim=1))
    corrected = corrected if mixture == "logits" else corrected.softmax(1)
    expected = torch.zeros((), dtype=torch.float64)
    for z, g, label in zip(logits, corrected, clean.labels.tolist(), strict=True):
        mixed = 0.2 * z + 0.8 * g
        expected = expected - (mixed[label].exp() / mixed.exp().sum()).log() / 7
    torch.testing.assert_close(losses.upper_loss(clean), expected, rtol=1e-12, atol=0)


def test_trusted_images_may_join_the_lower_loss_in_a_mean_over_all_images() -> None:
    classifier, corrector, clean, noisy = problem()
    upper, joining = split_batch(clean, 0.5)
    assert joining is not None
    assert (len(upper.labels), len(joining.labels)) == (3, 4)
    loss = LabelCorrection(classifier, corrector, rho=0.2).lower_loss(noisy, joining)
    logits, features = classifier(noisy.inputs)
    soft = corrector(features, noisy.labels)
    hard = nn.functional.one_hot(clean.labels[3:], 4)
    both = torch.cat([logits, classifier(clean.inputs[3:])[0]])
    expected = -(torch.cat([soft, hard]) * both.log_softmax(1)).sum() / 13
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert split_batch(clean, 0.0) == (clean, None)
    assert len(split_batch(clean, 0.99)[0].labels) == 1  # the upper loss is never left without images


def test_lower_loss_is_cross_entropy_with_soft_labels() -> None:
    classifier, corrector, _, noisy = problem()
    loss = LabelCorrection(classifier, corrector, rho=0.2).lower_loss(noisy)
    logits, features = classifier(noisy.inputs)
    soft = corrector(features, noisy.labels)
    expected = -(soft * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_soft_labels_carry_the_gradient_to_the_corrector_and_not_to_the_features() -> None:
    """Guards against a detached target, which would silently leave the corrector without the noisy data."""
    classifier, corrector, _, noisy = problem()
    loss = LabelCorrection(classifier, corrector, rho=0.2).lower_loss(noisy)
    to_corrector = torch.autograd.grad(loss, list(corrector.parameters()), retain_graph=True)
    assert all(gradient.abs().max() > 1e-8 for gradient in to_corrector)
    got = torch.autograd.grad(loss, classifier.last_hidden.weight)[0]
    logits, features = classifier(noisy.inputs)
    constant = corrector(features, noisy.labels).detach()
    expected = torch.autograd.grad(-(constant * logits.log_softmax(1)).sum(1).mean(), classifier.last_hidden.weight)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reading", ["ebomlc", "ebomlc-difference"])
def test_ebomlc_moves_as_the_printed_equations(reading: str) -> None:
    classifier, corrector, clean, noisy = problem()
    settings = Settings(method=reading, lr=0.3, momentum=0.0, weight_decay=0.0, delta=0.7, xi=0.5, rho=0.2, **OPTIONS)
    w, a = list(classifier.parameters()), list(corrector.parameters())
    start_w, start_a = [p.detach().clone() for p in w], [p.detach().clone() for p in a]

    # Equations (8)-(14), written down once more. w1 is a constant, the features are those at w.
    logits, features = classifier(noisy.inputs)
    features = features.detach()
    lower = soft_cross_entropy(logits, corrector(features, noisy.labels))
    g_w, g_a = split(torch.autograd.grad(lower, w + a), len(w))
    with torch.no_grad():
        for p, g in zip(w, g_w, strict=True):
            p -= 0.3 * g
    ahead = soft_cross_entropy(classifier(noisy.inputs)[0], corrector(features, noisy.labels))
    h_w, h_a = split(torch.autograd.grad(ahead, w + a), len(w))
    with torch.no_grad():
        for p, value in zip(w, start_w, strict=True):
            p.copy_(value)
    q_a = [one - other for one, other in zip(g_a, h_a, strict=True)]
    q_w = g_w if reading == "ebomlc" else [one - other for one, other in zip(g_w, h_w, strict=True)]
    logits, features = classifier(clean.inputs)
    mixture = 0.2 * logits.softmax(1) + 0.8 * corrector(features.detach(), clean.labels)
    upper = -mixture[torch.arange(7), clean.labels].log().mean()
    f_w, f_a = split(torch.autograd.grad(upper, w + a), len(w))
    square, product = dot(q_w, q_w) + dot(q_a, q_a), dot(f_w, q_w)
    beta = 0.5 * torch.relu((0.7 * square - product) / (square + 1e-8))
    assert beta > 0, "the case must exercise the barrier"

    recipe = MetaLabelCorrection(settings, classifier, corrector)
    numbers = recipe.step(noisy, clean)
    torch.testing.assert_close(numbers["upper_loss"], upper.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(numbers["constraint"], (lower - ahead).detach(), rtol=1e-9, atol=0)
    for p, before, f, q in zip(w, start_w, f_w, q_w, strict=True):
        torch.testing.assert_close(p.detach(), before - 0.3 * (f + beta * q), rtol=1e-10, atol=1e-13)
    # The first step of Adam: its moments are the gradient and its square, so it moves by lr * sign, up to eps.
    for p, before, f, q in zip(a, start_a, f_a, q_a, strict=True):
        direction = f + beta * q
        expected = before - settings.meta_lr * direction / (direction.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("noisy_part", "clean_part"), [(True, False), (False, True), (True, True)])
def test_supervised_methods_add_their_cross_entropies(noisy_part: bool, clean_part: bool) -> None:
    classifier, _, clean, noisy = problem()
    method = {(True, False): "ce", (False, True): "clean", (True, True): "ce-clean"}[noisy_part, clean_part]
    settings = Settings(method=method, lr=0.3, momentum=0.0, weight_decay=0.0, **OPTIONS)
    parts = [batch for batch, wanted in ((clean, clean_part), (noisy, noisy_part)) if wanted]
    losses = [-classifier(x)[0].log_softmax(1)[torch.arange(len(y)), y].mean() for x, y, _ in parts]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(classifier.parameters()))
    expected = [p.detach() - 0.3 * g for p, g in zip(classifier.parameters(), gradients, strict=True)]
    Supervised(settings, classifier).step(noisy, clean)
    for p, want in zip(classifier.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=0)


def test_learning_rate_drops_where_it_was_published() -> None:
    assert Settings().decay_epochs == [80, 100]
    recipe = methods.build(Settings(epochs=6, lr=1.0, method="ce", **OPTIONS), blank_task())
    assert isinstance(recipe, Supervised)
    rates = []
    for _ in range(6):
        rates.append(recipe.schedule.get_last_lr()[0])
        recipe.descent.step()  # without gradients it moves nothing
        recipe.end_epoch()
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.01])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_the_same_weights_and_trains(method: str) -> None:
    settings = Settings(method=method, clean_fraction=0.04, **OPTIONS)
    run = Run(settings, pools.load(settings, torch.device("cpu")))
    torch.manual_seed(settings.seed)
    expected = Perceptron(10)
    start = {name: copy.deepcopy(network.state_dict()) for name, network in run.recipe.networks.items()}
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in start["classifier"].items())
    for _ in range(5):
        numbers = run.advance()
        assert all(torch.isfinite(number) for number in numbers.values())
    for name, network in run.recipe.networks.items():
        moved = [not torch.equal(value, start[name][key]) for key, value in network.state_dict().items()]
        assert all(moved), f"a part of the {name} was not trained"


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def split(gradients: tuple[Tensor, ...], first: int) -> tuple[list[Tensor], list[Tensor]]:
    return list(gradients[:first]), list(gradients[first:])


def dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(one, other, strict=True)]).sum()
