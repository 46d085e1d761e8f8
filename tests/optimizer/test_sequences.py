"""Random sequences of calls: directions move nothing, errors change nothing, checkpoints go on to the same numbers."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from methods_table import CASES, Case, Problem, Record, assert_same, bits, leaves

pytestmark = pytest.mark.filterwarnings("ignore:hessian product by difference:UserWarning")
CALLS = ("step", "step", "directions", "apply", "resume", "train or eval", "raise", "freeze", "rate", "verify")
SEEDS = 100


class Interrupted(Exception):
    pass


class Sequence:
    """A problem, an optimizer, and what may happen to them."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.case: Case = CASES[self.draw.choice(list(CASES))]
        self.problem = Problem(self.draw.choice([torch.float32, torch.float64]), seed=seed).lived_in()
        self.optimizer: Any = self.problem.optimizer(self.case, verify=self.verify())

    def verify(self) -> str:
        return self.draw.choice(["auto", "always", "never"])

    def call(self, name: str) -> None:
        batches = self.problem.batches(self.draw.choice([1, max(self.case.inner_steps, 1)]))
        match name:
            case "step":
                self.optimizer.step(*batches)
            case "directions":
                before, state = Record(self.problem), self.state()
                self.optimizer.directions(*batches)
                assert Record(self.problem).differences(before) == []
                assert self.state() == state
            case "apply":
                self.optimizer.apply(self.optimizer.directions(*batches))
            case "resume":
                self.goes_on_from_a_checkpoint(batches)
            case "train or eval":
                self.problem.classifier.train(not self.problem.classifier.training)
            case "raise":
                self.raises(batches)
            case "freeze":
                bias = self.problem.classifier.hidden.bias
                bias.requires_grad_(not bias.requires_grad)
            case "rate":
                self.problem.lower_optimizer.param_groups[0]["lr"] = self.draw.choice([0.01, 0.1])
            case "verify":
                self.optimizer.verify = self.verify()

    def state(self) -> Any:
        state = self.optimizer.state_dict()
        del state["verification"]  # looks are counted
        return bits(dict(leaves(state, "")))

    def raises(self, batches: list[Any]) -> None:
        at = self.draw.randint(0, 6)
        self.problem.calls.clear()

        def after(index: int, loss: Tensor) -> Tensor:
            if index == at:
                raise Interrupted
            return loss

        self.problem.after_call = after
        before = Record(self.problem)
        try:
            self.optimizer.step(*batches)
        except Interrupted:
            assert Record(self.problem).differences(before) == []
        self.problem.after_call = None

    def goes_on_from_a_checkpoint(self, batches: list[Any]) -> None:
        twin = Problem(self.problem.dtype)
        for name, module in twin.modules.items():
            own = self.problem.modules[name]
            module.load_state_dict(own.state_dict())
            for theirs, mine in zip(module.parameters(), own.parameters(), strict=True):
                theirs.requires_grad_(mine.requires_grad)
            for part, other in zip(module.modules(), own.modules(), strict=True):
                part.training = other.training
        for side in ("lower_optimizer", "upper_optimizer"):
            getattr(twin, side).load_state_dict(deepcopy(getattr(self.problem, side).state_dict()))
        fresh = twin.optimizer(self.case, verify=self.optimizer.verify)
        fresh.load_state_dict(self.optimizer.state_dict())
        random_state = torch.get_rng_state()
        self.optimizer.step(*batches)
        torch.set_rng_state(random_state)
        fresh.step(*batches)
        assert_same(self.problem.parameters(), twin.parameters())
        assert_same(self.problem.buffers(), twin.buffers())
        assert bits(dict(leaves(fresh.state_dict(), ""))) == bits(dict(leaves(self.optimizer.state_dict(), "")))


def run(seed: int) -> None:
    torch.manual_seed(seed)
    sequence = Sequence(seed)
    for _ in range(sequence.draw.randint(3, 9)):
        sequence.call(sequence.draw.choice(CALLS))


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(10, SEEDS, 10))]
)
def test_random_sequences(first: int) -> None:
    for seed in range(first, first + 10):
        run(seed)


@pytest.mark.slow
def test_many_random_sequences() -> None:
    for seed in range(SEEDS, 2000):
        run(seed)
