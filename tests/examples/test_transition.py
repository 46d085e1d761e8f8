"""`em`, `glc`, `ce-mixed` and Bayes' rule against the same mathematics written out, and what they promise."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.noisy_labels.data import pools
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes import decoding, methods
from examples.noisy_labels.recipes.expectation_maximization import Counts, ExpectationMaximization
from examples.noisy_labels.recipes.gold_loss_correction import GoldLossCorrection
from examples.noisy_labels.recipes.mixed import Mixed
from examples.noisy_labels.recipes.models import Perceptron
from examples.noisy_labels.recipes.supervised import Supervised
from examples.noisy_labels.run import evaluation
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.run.training import Run
from fake_images import blank_task

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"dataset": "digits", "network": "mlp", "lr": 0.3, "momentum": 0.0, "weight_decay": 0.0}
DIGITS: dict[str, Any] = {"dataset": "digits", "network": "mlp", "noise": "flip", "augment": False}
DIGITS |= {"clean_fraction": 0.04}


def problem() -> tuple[Perceptron, Batch, Batch]:
    """A small classifier in float64, a clean and a noisy batch of four classes; two of the clean images are taken."""
    torch.manual_seed(2)
    true, given = torch.arange(7) % 4, torch.arange(10) % 4
    clean = Batch(torch.randn(7, 6, dtype=torch.float64), true, true)
    noisy = Batch(torch.randn(10, 6, dtype=torch.float64), given, given)
    return Perceptron(4, inputs=6, hidden=5, features=3).double(), clean, noisy


def random_transition(classes: int) -> Tensor:
    return (torch.randn(classes, classes, dtype=torch.float64) + 2 * torch.eye(classes)).softmax(1)


# --- Bayes' rule ------------------------------------------------------------------------------------------------------


def test_bayes_rule_entry_by_entry() -> None:
    torch.manual_seed(0)
    predicted, transition = torch.randn(5, 3, dtype=torch.float64).softmax(1), random_transition(3)
    given = torch.tensor([0, 1, 2, 1, 0])
    answer = decoding.bayes(predicted, transition, given)
    for i, y in enumerate(given.tolist()):
        joint = [predicted[i, k].item() * transition[k, y].item() for k in range(3)]
        assert answer[i].tolist() == pytest.approx([one / sum(joint) for one in joint], rel=1e-12)


def test_bayes_rule_of_the_impossible_is_finite() -> None:
    assert decoding.bayes(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([1])).isfinite().all()


def test_the_likeliest_matrix_of_sure_predictions_is_their_table_of_counts() -> None:
    predicted = torch.eye(2)[[0, 0, 0, 1, 1]]
    answer = decoding.likeliest_transition(predicted, torch.tensor([0, 0, 1, 1, 0]))
    torch.testing.assert_close(answer, torch.tensor([[2 / 3, 1 / 3], [0.5, 0.5]], dtype=torch.float64))


def test_the_likeliest_matrix_is_a_maximum_and_near_the_one_that_made_the_labels() -> None:
    torch.manual_seed(0)
    predicted, transition = (3 * torch.randn(4000, 3, dtype=torch.float64)).softmax(1), random_transition(3)
    true = torch.multinomial(predicted, 1).squeeze(1)  # so that the predictions are calibrated
    given = torch.multinomial(transition[true], 1).squeeze(1)
    answer = decoding.likeliest_transition(predicted, given)

    def likelihood(matrix: Tensor) -> float:
        return (predicted @ matrix).gather(1, given.unsqueeze(1)).log().sum().item()

    # About 1,300 labels a row: a standard error of at most .014 where predictions are sure, some times that here.
    torch.testing.assert_close(answer, transition, rtol=0, atol=0.1)
    for other in (transition, random_transition(3), 0.99 * answer + 0.01 / 3):
        assert likelihood(answer) > likelihood(other)


def test_the_matrix_of_trusted_images_is_a_mean_over_each_class() -> None:
    torch.manual_seed(0)
    predicted, labels = torch.randn(6, 3).softmax(1), torch.tensor([2, 0, 1, 2, 2, 0])
    answer = decoding.transition_on_trusted(predicted, labels)
    for k in range(3):
        torch.testing.assert_close(answer[k], predicted[labels == k].mean(0))


@pytest.mark.parametrize(
    ("method", "source"), [("ce", "trusted"), ("clean", "likelihood"), ("ebomlc", "likelihood"), ("em", "counted")]
)
def test_every_method_is_decoded_by_a_matrix_that_it_can_have(method: str, source: str) -> None:
    settings = Settings(method=method, **DIGITS)
    run = Run(settings, pools.load(settings, CPU))
    run.advance()
    probabilities, transition = evaluation.labels_by_bayes(run.recipe, run.task)
    assert run.recipe.transition_from == source
    torch.testing.assert_close(transition.sum(1).float(), torch.ones(10))
    torch.testing.assert_close(probabilities.sum(1).float(), torch.ones(len(run.task.noisy)))
    if method == "em":  # its own rule is this rule
        torch.testing.assert_close(probabilities, evaluation.corrected_labels(run.recipe, run.task))


# --- ce-mixed ---------------------------------------------------------------------------------------------------------


def moved(classifier: Perceptron, loss: Tensor, lr: float) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, list(classifier.parameters()))
    return [p.detach() - lr * g for p, g in zip(classifier.parameters(), gradients, strict=True)]


def assert_weights(classifier: Perceptron, expected: list[Tensor]) -> None:
    for p, want in zip(classifier.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-13)


def test_mixed_training_weighs_the_trusted_images() -> None:
    classifier, clean, noisy = problem()
    of_noisy = -classifier(noisy.inputs)[0].log_softmax(1)[torch.arange(10), noisy.labels].mean()
    # A fifth of the noisy batch: the first two.
    of_clean = -classifier(clean.inputs[:2])[0].log_softmax(1)[torch.arange(2), clean.labels[:2]].mean()
    expected = moved(classifier, of_noisy + 0.25 * of_clean, 0.3)
    numbers = Mixed(Settings(method="ce-mixed", clean_weight=0.25, **PLAIN), classifier).step(noisy, clean)
    assert_weights(classifier, expected)
    assert numbers["upper_loss"].item() == pytest.approx(of_clean.item(), rel=1e-12)


def test_the_weight_of_trusted_images_reaches_ce_clean() -> None:
    for weight in (1.0, 0.1):
        settings = Settings(method="ce-clean", clean_weight=weight, **DIGITS)
        recipe = methods.build(settings, blank_task())
        assert isinstance(recipe, Supervised)
        assert recipe.clean_weight == weight
    assert (Settings(method="ce-clean").clean_weight, Settings(method="em").clean_weight) == (1.0, 0.03)
    with pytest.raises(ValueError, match=r"--clean-weight -1\.0: must be at least 0"):
        Settings(method="em", clean_weight=-1.0)


# --- em ---------------------------------------------------------------------------------------------------------------


def test_two_steps_of_em_are_its_equations() -> None:
    classifier, clean, noisy = problem()
    settings = Settings(method="em", clean_weight=0.25, **PLAIN)
    w, e = copy.deepcopy(classifier), copy.deepcopy(classifier)
    recipe = ExpectationMaximization(settings, classifier, SimpleNamespace(names=range(4), noisy=range(50)))  # type: ignore[arg-type]
    first = torch.full((4, 4), 0.55 / 3, dtype=torch.float64).fill_diagonal_(0.45)
    counts = 50 / 4 * first
    torch.testing.assert_close(recipe.counts.counts, counts.float())
    recipe.counts.prior, recipe.counts.counts = first, counts.clone()
    for t in (1, 2):
        transition = (counts + first) / (counts + first).sum(1, keepdim=True)
        p = e(noisy.inputs)[0].softmax(1).detach()
        m = torch.stack([p[i] * transition[:, y] for i, y in enumerate(noisy.labels.tolist())])
        m = m / m.sum(1, keepdim=True)
        counts = 0.8 * counts  # 10 of 50 images are new
        for i, y in enumerate(noisy.labels.tolist()):
            counts[:, y] += m[i]
        of_noisy = -(m * w(noisy.inputs)[0].log_softmax(1)).sum(1).mean()
        of_clean = -w(clean.inputs[:2])[0].log_softmax(1)[torch.arange(2), clean.labels[:2]].mean()
        expected = moved(w, of_noisy + 0.25 * of_clean, 0.3)
        rate = t / (t + 10)
        with torch.no_grad():
            for p_w, p_e, value in zip(w.parameters(), e.parameters(), expected, strict=True):
                p_w.copy_(value)
                p_e.mul_(rate).add_((1 - rate) * value)
        recipe.step(noisy, clean)
        assert_weights(classifier, expected)
        torch.testing.assert_close(recipe.counts.counts, counts, rtol=1e-10, atol=0)
        assert isinstance(recipe.averaged, Perceptron)
        assert_weights(recipe.averaged, [value.detach() for value in e.parameters()])


def test_counts_keep_the_number_of_images_and_never_starve() -> None:
    torch.manual_seed(0)
    counts = Counts(5, 200)
    for _ in range(300):
        given = torch.randint(0, 4, (20,))  # no image has the last label, and the posterior is sure that none is of it
        counts.add(torch.eye(5)[given], given)
    assert counts.counts.sum().item() == pytest.approx(200, rel=1e-4)
    assert (counts.transition > 0).all()
    torch.testing.assert_close(counts.transition.sum(1), torch.ones(5))
    assert counts.transition[:4, :4].diagonal().min() > 0.95


def test_em_and_glc_have_one_gradient() -> None:
    # Where the posterior is that of the classifier itself, the M step goes the way of the corrected loss.
    torch.manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    transition, given = random_transition(3), torch.tensor([0, 1, 2, 2, 1, 0])
    m = decoding.bayes(logits.softmax(1).detach(), transition, given)
    (of_em,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, m), logits)
    recipe = methods.build(glc_settings(), pools.load(glc_settings(), CPU))
    assert isinstance(recipe, GoldLossCorrection)
    recipe.estimate = transition
    loss = recipe.noisy_loss(logits, Batch(logits, given, given))
    written = -torch.stack([(logits[i].softmax(0) @ transition[:, y]).log() for i, y in enumerate(given)]).mean()
    torch.testing.assert_close(loss, written, rtol=1e-9, atol=0)
    (of_glc,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(of_em, of_glc, rtol=1e-8, atol=1e-12)


def test_em_recovers_labels_of_digits() -> None:
    settings = Settings(method="em", epochs=10, **DIGITS)
    run = Run(settings, pools.load(settings, CPU))
    while run.epoch < run.epochs:
        while run.step < len(run.noisy):
            run.advance()
        run.end_epoch()
    scores = evaluation.recovery(evaluation.corrected_labels(run.recipe, run.task), run.task)
    assert scores["recovered"] > 0.25  # .50 when it was written
    assert scores["broken"] < 0.05  # .00


# --- glc --------------------------------------------------------------------------------------------------------------


def glc_settings(**options: Any) -> Settings:
    return Settings(method="glc", **DIGITS | {"epochs": 2, "milestones": (1, 2)} | options)


def epoch(run: Run) -> None:
    while run.step < len(run.noisy):
        run.advance()
    run.end_epoch()


def test_glc_estimates_on_trusted_images_and_starts_again() -> None:
    settings = glc_settings()
    run = Run(settings, pools.load(settings, CPU))
    first = copy.deepcopy(run.recipe.classifier.state_dict())
    assert isinstance(run.recipe, GoldLossCorrection)
    assert run.epochs == 4
    epoch(run)
    assert run.recipe.schedule.get_last_lr()[0] == pytest.approx(0.01)
    epoch(run)
    # Phase 1 is cross-entropy on the noisy images, the same steps as `ce`.
    plain = Run(Settings(method="ce", **DIGITS | {"epochs": 2, "milestones": (1, 2)}), run.task)
    for _ in range(2):
        epoch(plain)
    trained = run.recipe.classifier.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in plain.recipe.classifier.state_dict().items())
    inputs, labels = run.task.inputs(run.task.clean), run.task.labels[run.task.clean]
    answers = plain.recipe.classifier(inputs)[0].softmax(1)
    run.recipe._begin_second_phase()  # what the next step does first
    for k in range(10):
        torch.testing.assert_close(run.recipe.estimate[k], answers[labels == k].mean(0).detach())
    restarted = run.recipe.classifier.state_dict()
    assert all(torch.equal(value, restarted[key]) for key, value in first.items())
    assert run.recipe.schedule.get_last_lr()[0] == run.recipe.descent.param_groups[0]["lr"] == 0.1
    assert run.recipe.descent.state_dict()["state"] == {}


def test_glc_begins_its_second_phase_by_itself() -> None:
    settings = glc_settings(epochs=1, milestones=(1,))
    run = Run(settings, pools.load(settings, CPU))
    assert isinstance(run.recipe, GoldLossCorrection)
    assert "upper_loss" not in run.advance()
    epoch(run)
    assert run.recipe.phase == 1
    assert "upper_loss" in run.advance()
    assert run.recipe.phase == 2
    assert not torch.equal(run.recipe.transition, torch.eye(10))
