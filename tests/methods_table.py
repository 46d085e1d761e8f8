"""The methods under contract, the small problem they are tested on, and a record of all that a step may change.

A new method joins by one row in ``CASES``: its class and options, and how often its docstring says that it calls the
losses. The tests that run over the table need nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.barrier import Value
from bilevel.penalty import Linear

INPUTS, HIDDEN, CLASSES, SAMPLES = 4, 8, 3, 6


@dataclass(frozen=True)
class Case:
    """One row: a method with one set of options.

    Attributes:
        method: The class.
        calls: The documented calls of the losses by ``directions``, in order, as a function of ``inner_steps``:
            ``L`` a call of the lower loss, ``l`` one without a graph through the lower module, ``U`` one of the upper
            loss.
        options: The options, beside the losses, the levels and their optimizers.
        then: The calls that ``step`` makes beyond those of ``directions``.
        trains: The number of real lower steps that ``step`` takes before it looks at F, as a function of
            ``inner_steps``. Contract 3 has buffers move once for each; else once per step.
        gives_lower: Whether ``directions`` answers for the lower level too.
        upper_at: Where F is evaluated: at the ``current`` point, ``ahead`` of it after virtual lower steps, or
            ``after`` real ones.
        ordinary: Whether the real lower steps are those of a training loop on G alone.
    """

    method: type[bilevel.BilevelOptimizer]
    calls: Callable[[int], str]
    options: Mapping[str, Any] = field(default_factory=dict)
    then: str = ""
    trains: Callable[[int], int] = lambda steps: 0
    gives_lower: bool = True
    upper_at: Literal["current", "ahead", "after"] = "current"
    ordinary: bool = True

    @property
    def inner_steps(self) -> int:
        return int(self.options.get("inner_steps", 1))

    @property
    def directions_calls(self) -> str:
        return self.calls(self.inner_steps)

    @property
    def step_calls(self) -> str:
        return self.directions_calls + self.then

    def calls_of(self, verb: str) -> str:
        """Return the documented calls of ``step`` or ``directions``."""
        return self.step_calls if verb == "step" else self.directions_calls

    @property
    def real_steps(self) -> int:
        return self.trains(self.inner_steps)


def barrier_calls(steps: int) -> str:
    """G along the walk, G at its end with the gradient in alpha alone, F."""
    return steps * "L" + "lU"


def two_gradients(steps: int) -> str:
    """The same, with both gradients at the end."""
    return steps * "L" + "LU"


def with_products(steps: int) -> str:
    """One Hessian product, of one call, for each inner step."""
    return steps * "L" + "L" + steps * "L" + "U"


def with_differences(steps: int) -> str:
    """One Hessian product, of two calls, for each inner step."""
    return steps * "L" + "L" + steps * "LL" + "U"


def walk_and_back(steps: int) -> str:
    """The walk, F at its end, then one Hessian product for each step, the first of which needs that of alpha alone."""
    return steps * "L" + "U" + (steps - 1) * "L" + "l"


def walk_and_back_by_double_backward(steps: int) -> str:
    return steps * "L" + "U" + steps * "L"


def train_and_upper_products(steps: int) -> str:
    """Real steps, F, then a mixed product for each."""
    return steps * "L" + "U" + steps * "l"


def train_and_difference(steps: int) -> str:
    """Real steps, F, then two gradients in alpha alone."""
    return steps * "L" + "Ull"


def from_a_point_of_its_own(steps: int) -> str:
    """G at the current point, a walk from elsewhere, G at its end with the gradient in alpha alone, F."""
    return "L" + steps * "L" + "lU"


def two_copies(steps: int) -> str:
    """Steps of w along both losses, steps of a copy along G; both losses at w, G at the copy, in alpha alone."""
    return steps * "LU" + steps * "L" + "llU"


def two_copies_along_both(steps: int) -> str:
    """The same, with both losses along the copy's steps and at its end."""
    return 2 * steps * "LU" + "llUU"


def value_then_barrier(steps: int) -> str:
    """G at w, one step of the copy, G at it in alpha alone; steps of w along both losses; both at w, in alpha alone."""
    return "L" + "Ll" + "U" + (steps - 1) * "LU" + "lU"


def envelope(steps: int) -> str:
    """G at w, and at the copy; F at w; after the step, G at the copy and at w, and F, in alpha alone."""
    return "LLUllU"


def train_and_ratio(steps: int) -> str:
    """Real steps, F, and G where they end."""
    return steps * "L" + "UL"


def one_product(steps: int) -> str:
    """A gradient of G, its Hessian along v, F."""
    return "LLU"


BOME, EBOMLC = bilevel.BOME, bilevel.EBOMLC
LOOK_FIRST: dict[str, Any] = {"then": "L", "gives_lower": False, "upper_at": "ahead"}
TRAIN_FIRST: dict[str, Any] = {"trains": lambda steps: steps, "gives_lower": False, "upper_at": "after"}
# The same, with F at the current point too, before the real steps, which it takes part in.
ALONG_BOTH: dict[str, Any] = {"trains": lambda steps: steps, "gives_lower": False, "ordinary": False}

BARRIER_CASES: dict[str, Case] = {
    "bome": Case(BOME, barrier_calls),
    "bome-3": Case(BOME, barrier_calls, {"inner_steps": 3, "inner_lr": 0.05}),
    "bome-value": Case(BOME, barrier_calls, {"barrier": Value(0.3), "inner_steps": 2}),
    "bome-difference": Case(BOME, two_gradients, {"value_gradient": "difference", "inner_steps": 2}),
    "bome-preview": Case(BOME, barrier_calls, {"inner_step": "optimizer", "inner_steps": 2}),
    "bome-inner": Case(BOME, two_gradients, {"step_from": "lookahead", "value_gradient": "difference"}),
    "bome-unrolled": Case(BOME, with_products, {"value_gradient": "unrolled", "inner_steps": 2}),
    "bome-unrolled-reverse": Case(
        BOME, with_products, {"value_gradient": "unrolled", "inner_steps": 2, "product": "reverse"}
    ),
    "bome-capped": Case(BOME, barrier_calls, {"multiplier_max": 0.1, "eps": 0.0, "cutoff": 0.0}),
    "ebomlc": Case(EBOMLC, barrier_calls),
    "ebomlc-inner": Case(EBOMLC, two_gradients, {"value_gradient": "difference", "step_from": "lookahead"}),
    "ebomlc-preview": Case(EBOMLC, barrier_calls, {"inner_step": "optimizer", "xi": 1.0}),
    "ebomlc-unrolled": Case(EBOMLC, with_differences, {"value_gradient": "unrolled", "product": "difference"}),
}

CASES: dict[str, Case] = {
    **BARRIER_CASES,
    "unrolled": Case(bilevel.Unrolled, walk_and_back, {"inner_steps": 2, "differentiate": "adjoint"}, **LOOK_FIRST),
    "unrolled-reverse": Case(
        bilevel.Unrolled,
        walk_and_back_by_double_backward,
        {"inner_steps": 2, "differentiate": "adjoint", "product": "reverse"},
        **LOOK_FIRST,
    ),
    "unrolled-graph": Case(
        bilevel.Unrolled, lambda steps: steps * "L" + "U", {"inner_steps": 2, "differentiate": "graph"}, **LOOK_FIRST
    ),
    "unrolled-real": Case(
        bilevel.Unrolled, walk_and_back, {"inner_steps": 2, "virtual": False, "differentiate": "adjoint"}, **TRAIN_FIRST
    ),
    "unrolled-forward": Case(
        bilevel.Unrolled, lambda steps: steps * "L" + "U", {"inner_steps": 2, "differentiate": "forward"}, **LOOK_FIRST
    ),
    "unrolled-real-graph": Case(
        bilevel.Unrolled,
        lambda steps: steps * "L" + "U",
        {"inner_steps": 2, "virtual": False, "differentiate": "graph"},
        **TRAIN_FIRST,
    ),
    "emlc": Case(bilevel.EMLC, train_and_upper_products, **TRAIN_FIRST),
    "emlc-2": Case(bilevel.EMLC, train_and_upper_products, {"inner_steps": 2}, **TRAIN_FIRST),
    "mlc": Case(bilevel.MLC, lambda steps: "LUl", upper_at="ahead"),
    "finite-difference": Case(bilevel.FiniteDifference, lambda steps: "LUll", **LOOK_FIRST),
    "implicit": Case(
        bilevel.Implicit,
        lambda steps: steps * "L" + "U" + "L",  # the graph of the series, its residual and the mixed product
        {"solver": bilevel.Neumann(1), "product": "reverse", "warm_start": False},
        **TRAIN_FIRST,
    ),
    "sama": Case(bilevel.SAMA, train_and_difference, {"inner_steps": 2}, **TRAIN_FIRST),
    "vpbgd": Case(bilevel.VPBGD, from_a_point_of_its_own, {"penalty": Linear(0.5, slope=1.0)}),
    "vpbgd-current": Case(bilevel.VPBGD, barrier_calls, {"start": "current", "inner_steps": 2, "normalise": False}),
    "f2sa": Case(bilevel.F2SA, two_copies, {"inner_steps": 1}, **ALONG_BOTH),
    "f2sa-2": Case(bilevel.F2SA, two_copies_along_both, {"inner_steps": 2, "p": 2, "penalty": 3.0}, **ALONG_BOTH),
    "bvfsm": Case(
        bilevel.BVFSM, value_then_barrier, {"inner_steps": 1, "value_steps": 1, "penalty": 2.0}, **ALONG_BOTH
    ),
    "bvfsm-paper": Case(
        bilevel.BVFSM,
        value_then_barrier,
        {"inner_steps": 1, "value_steps": 1, "argument": "paper", "slack": 1.0},
        **ALONG_BOTH,
    ),
    "pdbo": Case(bilevel.PDBO, from_a_point_of_its_own),
    "pdbo-current": Case(bilevel.PDBO, barrier_calls, {"start": "current", "inner_steps": 2, "dual_lr": 5.0}),
    "gpbgd": Case(bilevel.GPBGD, one_product, {"product": "reverse"}),
    "gpbgd-forward": Case(bilevel.GPBGD, one_product, {"product": "forward", "normalise": False, "penalty": 0.5}),
    "meha": Case(bilevel.MEHA, envelope, {"gamma": 0.5}, **ALONG_BOTH),
    "saba": Case(bilevel.SABA, one_product, {"upper_rows": 1, "lower_rows": 1, "product": "reverse"}),
    "bsg1": Case(bilevel.BSG1, train_and_ratio, {"inner_steps": 2, "eps": 1e-4}, **TRAIN_FIRST),
    "soba": Case(bilevel.SOBA, one_product, {"product": "reverse"}),
    "soba-forward": Case(bilevel.SOBA, one_product, {"product": "forward", "system_lr": 0.05}),
    "masoba": Case(bilevel.MASOBA, one_product, {"theta": 0.3, "product": "reverse"}),
}


def over(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


every_case = over(CASES)
every_barrier_case = over(BARRIER_CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Classifier(nn.Module):
    """The lower level: a frozen stem, BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.stem.requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(self.norm(self.hidden(self.stem(x).tanh())).tanh())
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class Corrector(nn.Module):
    """The upper level: features and a given label in, soft targets out, with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN + CLASSES, 5)
        self.norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, features: Tensor, label: Tensor) -> Tensor:
        mixed = self.norm(self.mix(torch.cat([features, label], 1))).tanh()
        return self.out(mixed).softmax(1)


class Teacher(nn.Module):
    """A module of neither level, with BatchNorm and dropout, that both losses call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUTS)
        self.out = nn.Linear(INPUTS, CLASSES)
        self.dropout = nn.Dropout(0.2)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.norm(x))).softmax(1)


@dataclass
class Call:
    """One call of a loss: which one, on what, and whether the lower module took part in a graph."""

    side: str
    batch: Any
    graph: bool


class Problem:
    """Label correction in miniature: it uses everything that the contracts speak of, and notes each call of a loss.

    ``after_call``, if set, is called at the end of each call with the call's index and the loss, and returns the loss.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifier = Classifier().to(dtype)
            self.corrector = Corrector().to(dtype)
            self.teacher = Teacher().to(dtype)
        self.dtype = dtype
        self.modules = {"classifier": self.classifier, "corrector": self.corrector, "teacher": self.teacher}
        self.lower_optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.classifier.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2
        )
        self.upper_optimizer: torch.optim.Optimizer = torch.optim.Adam(self.corrector.parameters(), lr=1e-2)
        self.calls: list[Call] = []
        self.after_call: Callable[[int, Tensor], Tensor] | None = None
        self._draw = torch.Generator().manual_seed(seed + 1)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Fresh inputs and one-hot labels."""
        x = torch.randn(SAMPLES, INPUTS, generator=self._draw, dtype=torch.float64).to(self.dtype)
        label = torch.randint(CLASSES, (SAMPLES,), generator=self._draw)
        return x, torch.eye(CLASSES, dtype=self.dtype)[label]

    def batches(self, lower: int = 1) -> list[tuple[Tensor, Tensor]]:
        """An upper batch, and ``lower`` lower ones."""
        return [self.batch() for _ in range(1 + lower)]

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        x, label = batch
        features = self.classifier.features(x)
        logits = self.classifier.head(features)
        mixture = 0.3 * logits.softmax(1) + 0.7 * self.corrector(features.detach(), label)
        loss = -(label * mixture.log()).sum(1).mean() + 0.1 * cross_entropy(logits, self.teacher(x))
        return self._note("U", batch, logits, loss)

    def lower_loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        x, label = batch
        features = self.classifier.features(x)
        logits = self.classifier.head(features)
        targets = self.corrector(bilevel.hold(features.detach()), label)
        loss = cross_entropy(logits, targets) + 0.1 * cross_entropy(logits, self.teacher(x))
        return self._note("L", batch, logits, loss)

    def optimizer(self, case: Case, **changes: Any) -> Any:
        """Build the optimizer of a row; ``changes`` override any argument."""
        arguments: dict[str, Any] = {
            "upper": self.corrector,
            "lower": self.classifier,
            "upper_optimizer": self.upper_optimizer,
            "lower_optimizer": self.lower_optimizer,
            "other": self.teacher,
            **case.options,
            **changes,
        }
        losses = [arguments.pop("upper_loss", self.upper_loss), arguments.pop("lower_loss", self.lower_loss)]
        return case.method(*losses, **arguments)

    def lived_in(self) -> Problem:
        """Give every tensor a gradient and every optimizer a state, as a training loop before the first step would."""
        draw = torch.Generator().manual_seed(99)
        for optimizer in (self.lower_optimizer, self.upper_optimizer):
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=self.dtype)
            frozen = [(p, p.grad) for g in optimizer.param_groups for p in g["params"] if not p.requires_grad]
            for parameter, _ in frozen:
                parameter.grad = None
            optimizer.step()
            for parameter, grad in frozen:
                parameter.grad = grad  # stale: left over from before the freezing
        self.classifier.dropout.eval()  # flags that differ inside one module
        self.classifier.dropout.train()
        self.corrector.out.eval()
        return self

    def parameters(self) -> dict[str, Tensor]:
        """Return all parameters by name: the tensors themselves."""
        return {f"{m}.{n}": p for m, module in self.modules.items() for n, p in module.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """Return all buffers by name: the tensors themselves."""
        return {f"{m}.{n}": b for m, module in self.modules.items() for n, b in module.named_buffers()}

    def _note(self, side: str, batch: Any, logits: Tensor, loss: Tensor) -> tuple[Tensor, dict[str, Any]]:
        index = len(self.calls)
        self.calls.append(Call(side, batch, logits.requires_grad))
        if self.after_call is not None:
            loss = self.after_call(index, loss)
        return loss, {"call": index, "logits": logits}


def bits(value: Any) -> Any:
    """Something comparable with ``==`` that tells any two values apart that differ in a bit; NaN equals itself."""
    if isinstance(value, Tensor):
        data = value.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return (str(value.dtype), tuple(value.shape), tuple(value.stride()), data)
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings and sequences to (path, leaf)."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        yield path, value


class Record:
    """Everything that a step could change, as it was when the record was made."""

    def __init__(self, problem: Problem, *optimizers: torch.optim.Optimizer) -> None:
        found: list[tuple[str, Any]] = []
        for name, tensor in (*problem.parameters().items(), *problem.buffers().items()):
            found += [(name, tensor), (f"{name}.grad", tensor.grad), (f"{name}.requires_grad", tensor.requires_grad)]
        for key, module in problem.modules.items():
            found += [(f"{key}.{name}.training", part.training) for name, part in module.named_modules()]
        for side, optimizer in enumerate(optimizers or (problem.upper_optimizer, problem.lower_optimizer)):
            found += leaves(optimizer.state_dict(), f"optimizer {side}")
            held = [p for group in optimizer.param_groups for p in group["params"]]
            found += [(f"optimizer {side} holds {index}", tensor) for index, tensor in enumerate(held)]
        found += [("random.torch", torch.get_rng_state()), ("random.python", random.getstate())]
        found += leaves(list(np.random.get_state()), "random.numpy")  # noqa: NPY002 (the state that users seed)
        self._objects = dict(found)
        self._bits = {path: bits(value) for path, value in found}

    def differences(self, other: Record) -> list[str]:
        """Return the paths whose bits differ, or where another tensor object took the place."""
        paths = [*self._bits, *(path for path in other._bits if path not in self._bits)]
        return [path for path in paths if self._differs(other, path)]

    def _differs(self, other: Record, path: str) -> bool:
        if path not in self._bits or path not in other._bits or self._bits[path] != other._bits[path]:
            return True
        mine, theirs = self._objects[path], other._objects[path]
        # The state of a torch optimizer is its own: there a copy of the same bits may take a tensor's place.
        free = path.startswith("random") or ".state." in path
        return isinstance(mine, Tensor) and not free and mine is not theirs


def assert_same(
    found: Mapping[str, Tensor] | Sequence[Tensor], expected: Mapping[str, Tensor] | Sequence[Tensor]
) -> None:
    """Assert that two groups of tensors agree bit for bit."""
    a, b = dict(leaves(found, "")), dict(leaves(expected, ""))
    assert [path for path in {**a, **b} if path not in a or path not in b or bits(a[path]) != bits(b[path])] == []
