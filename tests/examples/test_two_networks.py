"""`coteaching-plus` and `dividemix` against their papers' formulas on constructed numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from examples.noisy_labels.batches import Batch
from examples.noisy_labels.co_teaching import CoTeachingPlus, choose
from examples.noisy_labels.models import Perceptron
from examples.noisy_labels.settings import Settings

PLAIN: dict[str, Any] = {"dataset": "digits", "network": "mlp", "lr": 0.3, "momentum": 0.0, "weight_decay": 0.0}


def network() -> Perceptron:
    return Perceptron(4, pixels=6, hidden=5, features=3).double()


def batch(images: int) -> Batch:
    labels = torch.randint(4, (images,))
    return Batch(torch.randn(images, 6, dtype=torch.float64), labels, labels)


def moved(one: Perceptron, loss: Tensor) -> list[Tensor]:
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
    recipe = CoTeachingPlus(Settings(method="coteaching-plus", epochs=80, **PLAIN), network(), network(), 0.36)
    rates, late = [], []
    for _ in range(10):
        rates.append(recipe.rate)
        late.append(recipe.schedule.last_epoch >= recipe.disagree_from)
        recipe.descent.step()  # without gradients it moves nothing
        recipe.end_epoch()
    assert rates == pytest.approx([0, 0.09, 0.18, 0.27, 0.36, 0.36, 0.36, 0.36, 0.36, 0.36])  # over 10 of 200 epochs
    assert late == [False] * 8 + [True] * 2  # from 20 of 200 on
    hundred = Settings(method="coteaching-plus", dataset="cifar100")
    assert CoTeachingPlus(hundred, network(), network(), 0).disagree_from == 3  # 5 / 200 of 120


@pytest.mark.parametrize("late", [False, True])
def test_each_network_learns_what_the_other_finds_easy(late: bool) -> None:
    torch.manual_seed(4)
    pair, noisy = [network(), network()], batch(30)
    with torch.no_grad():
        for one in pair:  # first weights as these predict nearly the same class everywhere
            one.head.weight.mul_(5)
            one.head.bias.zero_()
    recipe = CoTeachingPlus(Settings(method="coteaching-plus", epochs=20, **PLAIN), *pair, wrong=0.4)
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
    recipe = CoTeachingPlus(Settings(method="coteaching-plus", epochs=20, **PLAIN), *pair, wrong=0.4)
    for _ in range(3):
        recipe.descent.step()
        recipe.end_epoch()
    loss = -pair[0](noisy.inputs)[0].log_softmax(1)[torch.arange(12), noisy.labels].mean()
    expected = moved(pair[0], loss)
    recipe.step(noisy, batch(3))
    for one in pair:
        assert_weights(one, expected)
