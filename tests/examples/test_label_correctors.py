"""`mlc` and `emlc` against their papers' lines, written out with plain autograd."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes import methods
from examples.noisy_labels.recipes.enhanced_label_correction import EnhancedLabelCorrection, Teacher, adversarial
from examples.noisy_labels.recipes.meta_label_correction import MetaLabelCorrection
from examples.noisy_labels.recipes.models import Corrector, Perceptron
from examples.noisy_labels.run.settings import Settings
from fake_images import blank_task

OPTIONS: dict[str, Any] = {"dataset": "digits", "network": "mlp", "noise": "flip", "augment": False}
CPU = torch.device("cpu")


def classifier() -> Perceptron:
    torch.manual_seed(1)
    return Perceptron(4, inputs=6, hidden=5, features=3).double()


def batch(images: int) -> Batch:
    labels = torch.arange(images) % 4
    return Batch(torch.randn(images, 6, dtype=torch.float64), labels, labels)


# --- mlc --------------------------------------------------------------------------------------------------------------


def test_mlc_previews_the_whole_step_of_sgd_and_trains_with_the_old_labels() -> None:
    network, corrector = classifier(), Corrector(3, 4, width=4).double()
    settings = Settings(method="mlc", lr=0.3, momentum=0.9, weight_decay=0.01, **OPTIONS)
    recipe = MetaLabelCorrection(settings, network, corrector)
    w, a = dict(network.named_parameters()), list(corrector.parameters())
    buffers = [torch.zeros_like(p) for p in w.values()]
    squares = [torch.zeros_like(p) for p in a]
    moments = [torch.zeros_like(p) for p in a]
    for step in (1, 2, 3):
        noisy, clean = batch(9), batch(7)
        logits, features = network(noisy.inputs)
        soft = corrector(features.detach(), noisy.labels)
        hard = -network(clean.inputs[3:])[0].log_softmax(1)[torch.arange(4), clean.labels[3:]]
        lower = (hard.sum() - (soft * logits.log_softmax(1)).sum()) / 13
        d = torch.autograd.grad(lower, list(w.values()), create_graph=True)
        ahead, next_buffers = {}, []
        for (name, p), g, buffer in zip(w.items(), d, buffers, strict=True):
            moved = 0.9 * buffer + g + 0.01 * p.detach()
            ahead[name] = p.detach() - 0.3 * moved
            next_buffers.append(moved.detach())
        log_p = functional_call(network, ahead, clean.inputs[:3])[0].log_softmax(1)
        upper = -log_p[torch.arange(3), clean.labels[:3]].mean()
        meta = torch.autograd.grad(upper, a)
        expected = [value.detach() for value in ahead.values()]
        corrected = []
        for p, g, m, v in zip(a, meta, moments, squares, strict=True):  # Adam; amsgrad's maximum is exact for growing v
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            corrected.append(
                p.detach() - settings.meta_lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            )
        numbers = recipe.step(noisy, clean)
        buffers = next_buffers
        torch.testing.assert_close(numbers["upper_loss"], upper.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(numbers["lower_loss"], lower.detach(), rtol=1e-10, atol=0)
        for p, want in zip(w.values(), expected, strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-13)
        for p, want in zip(a, corrected, strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=0, atol=2e-5)  # of a step of 3e-4
        if step == 1:
            for p, want in zip(a, corrected, strict=True):
                torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("options", "steps"), [({}, 1), ({"inner_steps": 3}, 3)])
def test_mlc_moves_its_corrector_every_k_steps(options: dict[str, Any], steps: int) -> None:
    recipe = methods.build(Settings(method="mlc", **options, **OPTIONS), blank_task())
    moved = []
    for _ in range(6):
        before = [p.detach().clone() for p in recipe.networks["corrector"].parameters()]
        images = torch.randn(8, 1, 8, 8)
        recipe.step(*[Batch(images, torch.arange(8), torch.arange(8))] * 2)
        after: list[Tensor] = list(recipe.networks["corrector"].parameters())
        moved.append(not all(torch.equal(one, other) for one, other in zip(before, after, strict=True)))
    assert moved == [(step + 1) % steps == 0 for step in range(6)]


# --- emlc -------------------------------------------------------------------------------------------------------------

EMLC: dict[str, Any] = {**OPTIONS, "lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}


def emlc(**options: Any) -> EnhancedLabelCorrection:
    student = classifier()
    second, task = Perceptron(4, inputs=6, hidden=5, features=3), SimpleNamespace(names="abcd")
    recipe = EnhancedLabelCorrection(Settings(**EMLC | {"method": "emlc"} | options), student, second, task)  # type: ignore[arg-type]
    recipe.networks["teacher"].double()
    return recipe


def test_emlc_corrects_as_far_as_its_gate_believes() -> None:
    recipe, images, given = emlc(), torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    teacher = recipe.networks["teacher"]
    assert isinstance(teacher, Teacher)
    answer = recipe.correct(images, given)
    logits, features = teacher.network(images)
    for i, y in enumerate(given.tolist()):
        seen = torch.cat([features[i], teacher.gate.embedding.weight[y]])
        hidden = (teacher.gate.layers[0].weight @ seen + teacher.gate.layers[0].bias).relu()
        r = 1 / (1 + (-(teacher.gate.layers[2].weight @ hidden + teacher.gate.layers[2].bias)).exp())
        p = logits[i].exp() / logits[i].exp().sum()
        expected = [(1 - r) * p[c] + (r if c == y else 0) for c in range(4)]
        torch.testing.assert_close(answer[i], torch.cat(expected), rtol=1e-10, atol=0)


def test_emlc_shows_its_gate_corrupted_labels() -> None:
    labels = torch.arange(4000) % 4
    clean = Batch(torch.zeros(1), labels, labels)
    torch.manual_seed(0)
    drawn = emlc(corruption="random").corrupted(clean).given
    assert torch.equal(drawn[::2], labels[::2])
    # 2,000 draws from four classes: a standard deviation of .01 around .25.
    assert torch.bincount(drawn[1::2]).tolist() == pytest.approx([500] * 4, abs=100)
    assert (drawn[1::2] == labels[1::2]).double().mean().item() == pytest.approx(0.25, abs=0.05)
    for other in ("none", "adversarial"):
        assert emlc(corruption=other).corrupted(clean) is clean
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(4, 1)
    attacked = adversarial(logits, torch.tensor([1, 1, 0, 0]))
    assert attacked.tolist() == [1, 2, 0, 1]  # the likeliest wrong one, for every second


@pytest.mark.parametrize("corruption", ["none", "random", "adversarial"])
@pytest.mark.parametrize("steps", [1, 3])
def test_emlc_moves_as_its_paper_says(corruption: str, steps: int) -> None:
    recipe = emlc(inner_steps=steps, corruption=corruption)
    student, teacher = recipe.networks["classifier"], recipe.networks["teacher"]
    assert isinstance(teacher, Teacher)
    w, a = list(student.parameters()), list(teacher.parameters())
    noisy, clean = batch(4 * steps), batch(7)
    start = [p.detach().clone() for p in w]

    # The student's steps, with momentum and weight decay; the products of (11), by double backward, at each point.
    points, buffers = [], [torch.zeros_like(p) for p in w]
    for part in range(steps):
        points.append([p.detach().clone() for p in w])
        images, labels = noisy.inputs[4 * part : 4 * part + 4], noisy.labels[4 * part : 4 * part + 4]
        lower = -(recipe.correct(images, labels).detach() * student(images)[0].log_softmax(1)).sum(1).mean()
        for p, g, buffer in zip(w, torch.autograd.grad(lower, w), buffers, strict=True):
            buffer.mul_(0.9).add_(g + 0.01 * p.detach())
            p.data.sub_(0.3 * buffer)
    reached = [p.detach().clone() for p in w]
    torch.manual_seed(5)
    shown = recipe.corrupted(clean).given
    meta = -student(clean.inputs)[0].log_softmax(1)[torch.arange(7), clean.labels].mean()
    of_student = torch.autograd.grad(meta, w)
    logits, features = teacher.network(clean.inputs)
    total = meta.detach() - logits.log_softmax(1)[torch.arange(7), clean.labels].mean()
    if corruption == "adversarial":
        shown = clean.labels.clone()
        for i in (1, 3, 5):
            shown[i] = next(c for c in logits[i].argsort(descending=True).tolist() if c != clean.labels[i])
    if corruption != "none":
        r = teacher.gate(features, shown).sigmoid()
        total = total - torch.where(shown == clean.labels, r, 1 - r).log().mean()
    expected = [torch.zeros_like(p) if g is None else g for p, g in zip(a, grads(total, a), strict=True)]
    for part, point in enumerate(points):
        for p, value in zip(w, point, strict=True):
            p.data.copy_(value)
        images, labels = noisy.inputs[4 * part : 4 * part + 4], noisy.labels[4 * part : 4 * part + 4]
        lower = -(recipe.correct(images, labels) * student(images)[0].log_softmax(1)).sum(1).mean()
        of_lower = torch.autograd.grad(lower, w, create_graph=True)
        inner = torch.stack([(one * other).sum() for one, other in zip(of_lower, of_student, strict=True)]).sum()
        for one, g in zip(expected, torch.autograd.grad(inner, a, allow_unused=True), strict=True):
            one.sub_(0.3 * 0.7 ** (steps - 1 - part) * (0 if g is None else g))
    for p, value in zip(w, start, strict=True):
        p.data.copy_(value)
    wanted = [p.detach() - 0.3 * g for p, g in zip(a, expected, strict=True)]

    torch.manual_seed(5)
    numbers = recipe.step(noisy, clean)
    torch.testing.assert_close(numbers["upper_loss"], total.detach(), rtol=1e-9, atol=0)
    for p, want in zip([*w, *a], [*reached, *wanted], strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-8, atol=1e-11)


def grads(loss: Tensor, variables: list[Any]) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, variables, allow_unused=True)
    return found
