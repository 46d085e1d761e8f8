"""`coteaching-plus` and `dividemix` against their papers' formulas on constructed numbers."""

from __future__ import annotations

import copy
from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from examples.noisy_labels.data import pools
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes import divide_mix
from examples.noisy_labels.recipes.co_teaching import CoTeachingPlus, choose
from examples.noisy_labels.recipes.divide_mix import DivideMix
from examples.noisy_labels.recipes.loss_mixture import LossMixture
from examples.noisy_labels.recipes.models import Perceptron
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.run.training import Run

PLAIN: dict[str, Any] = {"dataset": "digits", "network": "mlp", "lr": 0.3, "momentum": 0.0, "weight_decay": 0.0}

FOUR: Any = SimpleNamespace(names=range(4))  # tasks of which only the classes are asked
HUNDRED: Any = SimpleNamespace(names=range(100))


def network() -> Perceptron:
    return Perceptron(4, inputs=6, hidden=5, features=3).double()


def batch(images: int) -> Batch:
    labels = torch.randint(4, (images,))
    return Batch(torch.randn(images, 6, dtype=torch.float64), labels, labels)


def moved(one: nn.Module, loss: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, list(one.parameters()))
    return [p.detach() - 0.3 * g for p, g in zip(one.parameters(), gradients, strict=True)]


def assert_weights(one: Perceptron, expected: list[Tensor]) -> None:
    for p, want in zip(one.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-13)


# --- coteaching-plus --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "keep", "chosen"),
    [
        ([1, 1, 1, 1, 1], 1.0, [1, 1, 1, 1, 1]),
        ([1, 1, 1, 1, 1], 0.6, [0, 1, 1, 0, 1]),  # the three smallest of five
        ([1, 0, 1, 1, 0], 0.7, [0, 0, 1, 1, 0]),  # two of three candidates: 2.1, rounded down
        ([1, 0, 0, 0, 0], 0.5, [1, 0, 0, 0, 0]),  # at least one
        ([0, 0, 0, 0, 0], 0.6, [1, 1, 1, 1, 1]),  # none: the whole batch
    ],
)
def test_small_losses_are_chosen_among_the_candidates(candidates: list[int], keep: float, chosen: list[int]) -> None:
    losses, mask = torch.tensor([0.9, 0.1, 0.3, 0.7, 0.2]), torch.tensor(candidates).bool()
    assert choose(losses, mask, keep=keep).tolist() == chosen


def test_the_share_that_is_dropped_grows_to_the_share_of_wrong_labels() -> None:
    recipe = CoTeachingPlus(Settings(method="coteaching-plus", epochs=80, **PLAIN), network(), network(), 0.36, FOUR)
    rates, late = [], []
    for _ in range(10):
        rates.append(recipe.rate)
        late.append(recipe.schedule.last_epoch >= recipe.disagree_from)
        recipe.descent.step()  # without gradients it moves nothing
        recipe.end_epoch()
    assert rates == pytest.approx([0, 0.09, 0.18, 0.27, 0.36, 0.36, 0.36, 0.36, 0.36, 0.36])  # over 10 of 200 epochs
    assert late == [False] * 8 + [True] * 2  # from 20 of 200 on
    hundred = Settings(method="coteaching-plus", dataset="cifar100")
    assert CoTeachingPlus(hundred, network(), network(), 0, HUNDRED).disagree_from == 3  # 5 / 200 of 120


@pytest.mark.parametrize("late", [False, True])
def test_each_network_learns_what_the_other_finds_easy(late: bool) -> None:
    torch.manual_seed(4)
    pair, noisy = [network(), network()], batch(30)
    with torch.no_grad():
        for one in pair:  # first weights as these predict nearly the same class everywhere
            one.head.weight.mul_(5)
            one.head.bias.zero_()
    recipe = CoTeachingPlus(Settings(method="coteaching-plus", epochs=20, **PLAIN), *pair, wrong=0.4, task=FOUR)
    for _ in range(3 if late else 1):
        recipe.descent.step()
        recipe.end_epoch()
    answers = [one(noisy.inputs)[0] for one in pair]
    losses = [-one.log_softmax(1)[torch.arange(30), noisy.labels] for one in answers]
    differ = [i for i in range(30) if answers[0][i].argmax() != answers[1][i].argmax()]
    assert 5 < len(differ) < 30, "the case must have both"
    allowed = differ if late else list(range(30))
    count = int(0.6 * len(allowed))  # the whole 0.4 are dropped after 10 / 200 of 20 epochs
    easy = [sorted(allowed, key=lambda i, k=k: losses[k][i].item())[:count] for k in (0, 1)]
    assert easy[0] != easy[1], "the exchange must show"
    expected = [moved(pair[k], losses[k][easy[1 - k]].mean()) for k in (0, 1)]
    numbers = recipe.step(noisy, batch(3))
    for one, want in zip(pair, expected, strict=True):
        assert_weights(one, want)
    mean = (losses[0][easy[1]].mean() + losses[1][easy[0]].mean()) / 2
    torch.testing.assert_close(numbers["lower_loss"], mean.detach())
    assert numbers["share_used"].item() == pytest.approx(count / 30)


def test_networks_that_agree_learn_the_whole_batch() -> None:
    torch.manual_seed(3)
    pair, noisy = [network(), network()], batch(12)
    pair[1].load_state_dict(pair[0].state_dict())
    recipe = CoTeachingPlus(Settings(method="coteaching-plus", epochs=20, **PLAIN), *pair, wrong=0.4, task=FOUR)
    for _ in range(3):
        recipe.descent.step()
        recipe.end_epoch()
    loss = -pair[0](noisy.inputs)[0].log_softmax(1)[torch.arange(12), noisy.labels].mean()
    expected = moved(pair[0], loss)
    recipe.step(noisy, batch(3))
    for one in pair:
        assert_weights(one, expected)


# --- dividemix --------------------------------------------------------------------------------------------------------

DIGITS: dict[str, Any] = {**PLAIN, "noise": "flip", "augment": False, "batch_size": 40, "epochs": 10}


def dividemix(**options: Any) -> Run:
    settings = Settings(method="dividemix", **DIGITS | options)
    return Run(settings, pools.load(settings, torch.device("cpu")))


def test_the_posterior_is_that_of_the_fitted_mixture() -> None:
    torch.manual_seed(0)
    losses = torch.cat([0.2 + 0.1 * torch.randn(600).abs(), 2.0 + 0.4 * torch.randn(400)])[torch.randperm(1000)]
    mixture = LossMixture()
    assert not mixture.right(losses).any(), "before it is fitted, no label is believed"
    mixture.fit(losses)
    between = ((losses - losses.min()) / (losses.max() - losses.min())).double().unsqueeze(1).numpy()
    reference = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(between)
    expected = reference.predict_proba(between)[:, reference.means_.argmin()]
    torch.testing.assert_close(mixture.right(losses), torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-5)
    assert mixture.means[0] < mixture.means[1]
    assert (mixture.right(losses) > 0.5).double().mean().item() == pytest.approx(0.6, abs=0.01)


def test_a_mixture_of_equal_losses_is_finite() -> None:
    mixture = LossMixture()
    mixture.fit(torch.ones(20))
    assert mixture.right(torch.ones(20)).isfinite().all()


def test_sharpening_mixing_and_the_loss_of_a_mixed_batch() -> None:
    sharp = divide_mix.sharpen(torch.tensor([[0.5, 0.3, 0.2]]))
    torch.testing.assert_close(sharp, torch.tensor([[25, 9, 4]]) / 38)  # squares, normalised
    inputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for one in (0.2, 0.8):  # the larger share stays with what was first
        mixed, soft = divide_mix.mix_up(inputs, targets, torch.tensor(one), torch.tensor([1, 0]))
        torch.testing.assert_close(mixed, torch.tensor([[1.4], [2.6]]))
        torch.testing.assert_close(soft, torch.tensor([[0.8, 0.2], [0.2, 0.8]]))
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]).log()
    targets = torch.tensor([[0.8, 0.2], [1.0, 0.0], [0.25, 0.75]])
    supervised = -(0.8 * log(0.75) + 0.2 * log(0.25))
    # The mean probabilities are 1/2, so that the last term is 0; two rows of two squares: .25 + .25 + 0 + 0.
    assert divide_mix.mix_match(logits, targets, 1, 10.0).item() == pytest.approx(supervised + 10 * 0.5 / 4)
    same = torch.tensor([[0.9, 0.1]]).repeat(2, 1)
    lopsided = divide_mix.mix_match(same.log(), same, 1, 1.0)
    entropy = -(0.9 * log(0.9) + 0.1 * log(0.1))
    assert lopsided.item() == pytest.approx(entropy + 0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1))
    assert divide_mix.negative_entropy(logits[:1]).item() == pytest.approx(0.75 * log(0.75) + 0.25 * log(0.25))


@pytest.mark.parametrize("noise", ["uniform", "flip"])
def test_dividemix_warms_up_with_a_penalty_unless_the_noise_is_uniform(noise: str) -> None:
    run = dividemix(noise=noise)
    noisy = next(run.noisy)
    pair = list(run.recipe.networks.values())
    expected = []
    for one in pair:
        log_p = one(noisy.inputs)[0].log_softmax(1)
        loss = -log_p[torch.arange(40), noisy.labels].mean()
        if noise != "uniform":
            loss = loss + (log_p.exp() * log_p).sum(1).mean()
        expected.append(moved(one, loss))
    run.recipe.step(noisy, next(run.clean))
    for one, want in zip(pair, expected, strict=True):
        for p, value in zip(one.parameters(), want, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-4, atol=1e-6)


def divided() -> tuple[Run, DivideMix]:
    """A run of one epoch, after which the images are divided."""
    run = dividemix()
    recipe = run.recipe
    assert isinstance(recipe, DivideMix)
    while run.step < len(run.noisy):
        run.advance()
    run.end_epoch()
    return run, recipe


def test_each_network_gets_what_the_others_losses_have_divided() -> None:
    run, recipe = divided()
    pair = list(recipe.networks.values())
    for k in (0, 1):
        with torch.no_grad():
            logits = pair[1 - k](run.task.inputs(run.task.noisy))[0]
        belief = recipe.mixtures[1 - k].right(-logits.log_softmax(1)[torch.arange(len(logits)), run.task.noisy_labels])
        labelled, unlabelled = recipe.divided[k]
        expected = run.task.noisy[belief > 0.5]
        assert 100 < len(expected) < 1100, "the case must have both"
        assert set(labelled.index.tolist()) == set(expected.tolist())
        assert set(unlabelled.index.tolist()) == set(run.task.noisy.tolist()) - set(expected.tolist())
        place = {image: i for i, image in enumerate(run.task.noisy.tolist())}
        where = [place[image] for image in labelled.index.tolist()]
        assert torch.equal(labelled.labels, run.task.noisy_labels[where])
        torch.testing.assert_close(labelled.belief, belief[where])
        assert (labelled.size, unlabelled.size) == (20, 20)


def test_an_epoch_that_believes_all_labels_leaves_a_batch_of_each_kind() -> None:
    run, recipe = divided()
    for belief, sizes in ((1.0, (len(run.task.noisy) - 20, 20)), (0.0, (20, len(run.task.noisy) - 20))):
        recipe.belief = torch.full_like(recipe.belief, belief)
        recipe._divide()
        assert [tuple(len(part.index) for part in parts) for parts in recipe.divided] == [sizes, sizes]


def test_dividemix_moves_as_its_paper_says() -> None:
    run, recipe = divided()
    pair = list(recipe.networks.values())
    recipe.steps = 5
    # 16 / 300 of ten epochs of 31 steps: the weight has grown for 5 of 16.53 of them.
    weight = 25 * 5 / (16 / 300 * 10 * 31)
    batches = [[next(part) for part in parts] for parts in copy.deepcopy(recipe.divided)]
    state = torch.get_rng_state()
    expected = []
    for k, (labelled, unlabelled) in enumerate(batches):
        with torch.no_grad():
            own, other = pair[k], pair[1 - k]
            # Without augmentation the two views are one, and the networks have no statistics of batches.
            assert torch.equal(labelled.first, labelled.second)
            p = own(labelled.first)[0].softmax(1)
            refined = torch.stack([(1 - w) * row for w, row in zip(labelled.belief, p, strict=True)])
            for row, w, y in zip(refined, labelled.belief, labelled.labels, strict=True):
                row[y] += w
            guessed = (own(unlabelled.first)[0].softmax(1) + other(unlabelled.first)[0].softmax(1)) / 2
            refined, guessed = (x**2 / (x**2).sum(1, keepdim=True) for x in (refined, guessed))
        inputs = torch.cat([labelled.first, labelled.first, unlabelled.first, unlabelled.first])
        targets = torch.cat([refined, refined, guessed, guessed])
        share = torch.distributions.Beta(4.0, 4.0).sample()
        share, order = max(share, 1 - share), torch.randperm(80)
        log_p = own(share * inputs + (1 - share) * inputs[order])[0].log_softmax(1)
        soft = share * targets + (1 - share) * targets[order]
        loss = -(soft * log_p)[:40].sum(1).mean() + weight * (log_p.exp() - soft)[40:].square().mean()
        loss = loss + (0.1 * (0.1 / log_p.exp().mean(0)).log()).sum()
        expected.append(moved(own, loss))
    torch.set_rng_state(state)
    recipe.step(next(run.noisy), next(run.clean))
    for one, want in zip(pair, expected, strict=True):
        for p, value in zip(one.parameters(), want, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-3, atol=1e-5)


def test_dividemix_corrects_as_far_as_its_mixtures_believe() -> None:
    run, recipe = divided()
    inputs, given = run.task.inputs(run.task.noisy[:6]), run.task.noisy_labels[:6]
    logits = [one(inputs)[0] for one in recipe.networks.values()]
    beliefs = [recipe.mixtures[k].right(-one.log_softmax(1)[torch.arange(6), given]) for k, one in enumerate(logits)]
    belief, p = (beliefs[0] + beliefs[1]) / 2, ((logits[0] + logits[1]) / 2).softmax(1)
    answer = recipe.correct(inputs, given)
    for i, y in enumerate(given.tolist()):
        for c in range(10):
            wanted = (1 - belief[i]) * p[i, c] + (belief[i] if c == y else 0)
            torch.testing.assert_close(answer[i, c], wanted)
    torch.testing.assert_close(recipe.predict(inputs), p)
