"""``check_method``: every method of the library keeps the contracts, and each contract notices who breaks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from bilevel import Directions, Oracle, Stats
from bilevel.optimizer import orders
from bilevel.testing import CONTRACTS, ContractError, Subject

SUBJECTS = {
    "BOME": Subject(bilevel.BOME, {"inner_steps": 2}, calls=4),
    "BOME, three starts": Subject(bilevel.BOME, {"starts": 3}, calls=12),
    "EBOMLC": Subject(bilevel.EBOMLC, calls=3),
    "EBOMLC, from w_1": Subject(bilevel.EBOMLC, {"value_gradient": "difference", "step_from": "lookahead"}, calls=3),
    "Unrolled": Subject(bilevel.Unrolled, calls=3),
    "Unrolled, adjoint": Subject(bilevel.Unrolled, {"differentiate": "adjoint"}, calls=4),
    "Unrolled, graph": Subject(bilevel.Unrolled, {"inner_steps": 2}, calls=4),
    "Unrolled, real": Subject(bilevel.Unrolled, {"inner_steps": 2, "virtual": False}, calls=3),
    "EMLC": Subject(bilevel.EMLC, {"inner_steps": 2}, calls=5),
    "EMLC, replayed": Subject(bilevel.EMLC, {"inner_steps": 2, "memory": "replay"}, calls=7),
    "MLC": Subject(bilevel.MLC, {"inner_steps": 2}, calls=4),
    "Implicit": Subject(bilevel.Implicit, {"solver": bilevel.Neumann(1)}, calls=4),
    "FiniteDifference": Subject(bilevel.FiniteDifference, calls=5),
    "SAMA": Subject(bilevel.SAMA, {"inner_steps": 2}, calls=5),
    "VPBGD": Subject(bilevel.VPBGD, {"inner_steps": 2}, calls=5),
    "VPBGD, three starts": Subject(bilevel.VPBGD, {"inner_steps": 2, "starts": 3}, calls=16),
    "PDBO, two starts": Subject(bilevel.PDBO, {"starts": 2}, calls=10),
    "F2SA": Subject(bilevel.F2SA, {"inner_steps": 2}, calls=9),
    "F2SA, central": Subject(bilevel.F2SA, {"inner_steps": 2, "p": 2}, calls=12),
    "BVFSM": Subject(bilevel.BVFSM, {"inner_steps": 2, "value_steps": 3}, calls=10),
    "PDBO": Subject(bilevel.PDBO, {"inner_steps": 2}, calls=5),
    "GPBGD": Subject(bilevel.GPBGD, {"product": "reverse"}, calls=3),
    "SOBA": Subject(bilevel.SOBA, calls=3),
    "MASOBA": Subject(bilevel.MASOBA, calls=3),
    "SABA": Subject(bilevel.SABA, {"upper_rows": 1, "lower_rows": 1}, calls=3),
    "MEHA": Subject(bilevel.MEHA, calls=6),
    "BSG1": Subject(bilevel.BSG1, {"inner_steps": 2}, calls=4),
}


@pytest.mark.thorough
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())
@pytest.mark.parametrize("contract", CONTRACTS, ids=[contract.__name__ for contract in CONTRACTS])
def test_the_librarys_methods_keep_the_contracts(contract: Any, subject: Subject) -> None:
    contract(subject)


class Descent(bilevel.BilevelOptimizer[Stats]):
    """The simplest method there is; its subclasses below do one thing wrong each."""

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        f, g = oracle.upper(), oracle.lower()
        return Directions(upper=f.upper + g.upper, lower=f.lower + g.lower, stats=Stats(f.value, g.value))


class MovesTheVariables(Descent):
    def compute(self, oracle: Oracle) -> Directions[Stats]:
        answer = super().compute(oracle)
        oracle.lower_level.tensors[0].data.mul_(0.9)
        return answer


class RemembersByItself(Descent):
    times = 0

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        self.times += 1
        f = oracle.upper()
        g = oracle.lower()
        return Directions(upper=self.times * f.upper, lower=g.lower, stats=Stats(f.value, g.value))


class MovesTwice(Descent):
    """Along its lower direction, and then once more."""

    order = orders.LOOK_THEN_TRAIN


class SwallowsErrors(Descent):
    def compute(self, oracle: Oracle) -> Directions[Stats]:
        try:
            return super().compute(oracle)
        except KeyError:
            nothing = torch.zeros(())
            return Directions(stats=Stats(nothing, nothing))


class ReplacesNaN(Descent):
    def compute(self, oracle: Oracle) -> Directions[Stats]:
        f, g = oracle.upper(), oracle.lower()
        upper = f.upper.like(None if x is None else x.nan_to_num() for x in f.upper)
        lower = g.lower.like(None if x is None else x.nan_to_num() for x in g.lower)
        return Directions(upper=upper, lower=lower, stats=Stats(f.value.nan_to_num(), g.value.nan_to_num()))


class CallsEverySecondTime(Descent):
    def __init__(self, *losses: Any, **common: Any) -> None:
        super().__init__(*losses, **common)
        self.turn = self.scalar_state("turn")

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        answer = super().compute(oracle)
        if self.turn.value % 2:
            oracle.lower()
        return Directions(answer.upper, answer.lower, answer.stats, state={"turn": self.turn.value + 1})


class RoundsItsGradients(Descent):
    """As a shortcut of its own would: right by plain autograd, and not here."""

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        answer = super().compute(oracle)
        scale = 1.0 if oracle.plain else 1.01
        return Directions({n: scale * x for n, x in answer.upper.items()}, answer.lower, answer.stats)


(RESUMED,) = (contract for contract in CONTRACTS if contract.__name__ == "a_resumed_run_goes_on")
BROKEN = {
    "directions change nothing": MovesTheVariables,
    "a second look gave other directions": RemembersByItself,
    "a step is its directions applied": MovesTwice,
    "the error of call 1 was swallowed": SwallowsErrors,
    "NaN from call 1 on was not noticed": ReplacesNaN,
    "calls are as documented": CallsEverySecondTime,
    "directions are right": RoundsItsGradients,
}


def test_the_simplest_method_keeps_them() -> None:
    bilevel.testing.check_method(Descent, calls=2)


@pytest.mark.parametrize("told", BROKEN)
def test_a_method_that_breaks_one_is_told(told: str) -> None:
    with pytest.raises(ContractError, match=told):
        bilevel.testing.check_method(BROKEN[told])


def test_state_that_is_not_declared_is_lost_on_resuming() -> None:
    class Averages(Descent):
        """Its average lives in an attribute, which no checkpoint knows; asked twice it gives the same."""

        average: Any = None

        def compute(self, oracle: Oracle) -> Directions[Stats]:
            answer = super().compute(oracle)
            before = self.average
            if oracle.moves is not None and not oracle.moves._looking:
                self.average = answer.upper
            mixed = {n: x + (0.0 if before is None else 0.5 * before[n]) for n, x in answer.upper.items()}
            return Directions(mixed, answer.lower, answer.stats)

    with pytest.raises(ContractError, match="a resumed run goes on: different"):
        RESUMED(Subject(Averages))
