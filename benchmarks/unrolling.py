"""MW-Net's step through k virtual lower steps, by several libraries and by hand.

The upper variables are a network that weighs each noisy sample by its loss; the lower ones those of a classifier::

    w_0 = w,  w_{t+1} = w_t - lr grad_w G(w_t, alpha),  G = mean_i v_i l_i(w),  v_i = V_alpha(l_i, a constant)
    alpha <- Adam along d/dalpha of the clean loss at w_k;  then w <- SGD step on G with the new weights

Everybody keeps BatchNorm's running statistics out of the virtual steps in the way that is theirs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import bilevel
from benchmarks.problem import Batch

RATE, MOMENTUM, WEIGHT_DECAY, META_RATE = 0.1, 0.9, 5e-4, 1e-3  # of MW-Net's CIFAR script
Model = Callable[[Tensor], Any]


class Weigher(nn.Module):
    """MW-Net's V: from the loss of a sample to its weight, 1-100-1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        weights: Tensor = self.layers(losses[:, None])
        return weights.squeeze(1)


class Reweighting:
    """Networks and torch optimizers; ``step`` is one step of MW-Net. A subclass says who differentiates."""

    def __init__(self, network: Callable[[], nn.Module], steps: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.classifier, self.weigher, self.steps = network().to(dtype), Weigher().to(dtype), steps
        self.sgd = torch.optim.SGD(self.classifier.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.adam = torch.optim.Adam(self.weigher.parameters(), lr=META_RATE)
        self.prepare()

    def prepare(self) -> None:
        """Make what lives as long as the training."""

    def upper(self, model: Model, clean: Batch) -> Tensor:
        """Return F."""
        return functional.cross_entropy(model(clean.inputs)[0], clean.labels)

    def lower(self, model: Model, noisy: Batch) -> Tensor:
        """Return G."""
        each = functional.cross_entropy(model(noisy.inputs)[0], noisy.labels, reduction="none")
        return (self.weigher(each.detach()) * each).mean()

    def hypergradient(self, clean: Batch, noisy: Batch) -> tuple[Tensor, ...]:
        """Return the derivative of F after the virtual steps."""
        raise NotImplementedError

    def step(self, clean: Batch, noisy: Batch) -> None:
        """Move the weigher along the hypergradient, then the classifier with the new weights."""
        for p, g in zip(self.weigher.parameters(), self.hypergradient(clean, noisy), strict=True):
            p.grad = g
        self.adam.step()
        self.sgd.zero_grad()
        w = list(self.classifier.parameters())
        for p, g in zip(w, torch.autograd.grad(self.lower(self.classifier, noisy), w), strict=True):
            p.grad = g
        self.sgd.step()

    def resident(self) -> list[Tensor]:
        """Return every tensor that stays between steps."""
        held = [t for m in (self.classifier, self.weigher) for t in (*m.parameters(), *m.buffers())]
        held += [t.grad for t in held if t.grad is not None]
        states = [s.values() for o in (self.sgd, self.adam) for s in o.state.values()]
        return held + [t for values in states for t in values if isinstance(t, Tensor)]


class ByHand(Reweighting):
    """The usual way: ``create_graph=True`` in every virtual step, then one reverse pass through all of them."""

    def hypergradient(self, clean: Batch, noisy: Batch) -> tuple[Tensor, ...]:
        with statistics_frozen(self.classifier):
            w = dict(self.classifier.named_parameters())

            def model(x: Tensor) -> Any:
                return functional_call(self.classifier, w, (x,))

            for _ in range(self.steps):
                gradients = torch.autograd.grad(self.lower(model, noisy), list(w.values()), create_graph=True)
                w = {name: p - RATE * g for (name, p), g in zip(w.items(), gradients, strict=True)}
            return torch.autograd.grad(self.upper(model, clean), list(self.weigher.parameters()))


class Library(Reweighting):
    """`bilevel.Unrolled`."""

    differentiate: Any = "adjoint"
    checks: Mapping[str, Any] = {"verify": "never"}  # as between two looks

    def prepare(self) -> None:
        self.optimizer = bilevel.Unrolled(
            lambda clean: self.upper(self.classifier, clean),
            lambda noisy: self.lower(self.classifier, noisy),
            upper=self.weigher,
            lower=self.classifier,
            upper_optimizer=self.adam,
            lower_optimizer=self.sgd,
            inner_steps=self.steps,
            inner_step="gradient",
            differentiate=self.differentiate,
            **self.checks,
        )

    def hypergradient(self, clean: Batch, noisy: Batch) -> tuple[Tensor, ...]:
        return tuple(self.optimizer.directions(clean, noisy).upper.values())

    def step(self, clean: Batch, noisy: Batch) -> None:
        self.optimizer.step(clean, noisy)


class LibraryGraph(Library):
    """The same with ``differentiate="graph"``."""

    differentiate = "graph"


class LibraryUnchecked(LibraryGraph):
    """The same without the check for NaN and without the copy that takes a failed step back."""

    checks: Mapping[str, Any] = {"on_nonfinite": "ignore", "atomic": False, "verify": "never"}


class Higher(Reweighting):
    """higher, through its patched copy of the classifier."""

    def prepare(self) -> None:
        self.higher = importlib.import_module("higher")
        self.virtual = torch.optim.SGD(self.classifier.parameters(), lr=RATE)

    def hypergradient(self, clean: Batch, noisy: Batch) -> tuple[Tensor, ...]:
        with (
            statistics_frozen(self.classifier),
            self.higher.innerloop_ctx(self.classifier, self.virtual, copy_initial_weights=False) as (model, optimizer),
        ):
            for _ in range(self.steps):
                optimizer.step(self.lower(model, noisy))
            return torch.autograd.grad(self.upper(model, clean), list(self.weigher.parameters()))


class TorchOpt(Reweighting):
    """TorchOpt's MetaSGD, and its way to put the classifier back."""

    def prepare(self) -> None:
        self.torchopt = importlib.import_module("torchopt")

    def hypergradient(self, clean: Batch, noisy: Batch) -> tuple[Tensor, ...]:
        with statistics_frozen(self.classifier):
            optimizer = self.torchopt.MetaSGD(self.classifier, lr=RATE)
            before = self.torchopt.extract_state_dict(self.classifier, by="reference")
            for _ in range(self.steps):
                optimizer.step(self.lower(self.classifier, noisy))
            found = torch.autograd.grad(self.upper(self.classifier, clean), list(self.weigher.parameters()))
            self.torchopt.recover_state_dict(self.classifier, before)
        return found


EVERYBODY: dict[str, type[Reweighting]] = {
    "bilevel, adjoint": Library,
    "bilevel, graph": LibraryGraph,
    "bilevel, unchecked": LibraryUnchecked,
    "by hand": ByHand,
    "higher": Higher,
    "torchopt": TorchOpt,
}


def present() -> dict[str, type[Reweighting]]:
    """Return those that can be run here: other libraries only where they are installed."""
    peers = (Higher, TorchOpt)
    return {name: kind for name, kind in EVERYBODY.items() if kind not in peers or importlib.util.find_spec(name)}


@contextlib.contextmanager
def statistics_frozen(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch, and leave its running statistics and its counter alone."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True
