"""Shortcuts against plain autograd: losses that can tell them apart get the right answer, an error, or a warning.

The reference is ``torch.autograd.grad`` of the closure as it stands, with ``create_graph`` where a formula needs a
derivative of a gradient. Nothing of the library computes it.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel.evaluation.inspection import tensors_of
from bilevel.evaluation.precision import widened
from bilevel.evaluation.verification import LONGEST, Verification, slope_gap, value_gap, vector_gap

RATE = 0.1
Batch = tuple[Tensor, Tensor]


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.first(x)))
        return logits


class Weigher(nn.Module):
    """A weight for each sample, from its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        weights: Tensor = self.layers(losses[:, None])[:, 0]
        return weights


class Scene:
    """A student below, a weigher above; ``kind`` says what the lower loss does that a shortcut could miss."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.student, self.weigher = Student().to(device, dtype), Weigher().to(device, dtype)
        self.clean = (torch.randn(20, 4, dtype=dtype).to(device), torch.randint(3, (20,)).to(device))
        self.noisy = (torch.randn(20, 4, dtype=dtype).to(device), torch.randint(3, (20,)).to(device))
        self.calls = 0
        self.kept = list(self.student.parameters())
        self._lower: Callable[[Tensor, Tensor], Tensor] = getattr(self, f"_{kind}")

    def upper_loss(self, batch: Batch) -> Tensor:
        return cross_entropy(self.student(batch[0]), batch[1])

    def lower_loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        return self._lower(*batch)

    def optimizer(self, method: type[Any], **options: Any) -> Any:
        arguments = {
            "upper": self.weigher,
            "lower": self.student,
            "upper_optimizer": torch.optim.SGD(self.weigher.parameters(), lr=0.01),
            "lower_optimizer": torch.optim.SGD(self.student.parameters(), lr=RATE),
            **options,
        }
        return method(self.upper_loss, self.lower_loss, **arguments)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.student(x), y, reduction="none")

    def weights(self, losses: Tensor) -> Tensor:
        return self.weigher(bilevel.hold(losses.detach()))

    def weighed(self, losses: Tensor) -> Tensor:
        return (self.weights(losses) * losses).mean()

    # What autograd sees, and a shortcut may not.

    def _ordinary(self, x: Tensor, y: Tensor) -> Tensor:
        return self.weighed(self.losses(x, y))

    def _no_grad(self, x: Tensor, y: Tensor) -> Tensor:
        losses = self.losses(x, y)
        with torch.no_grad():
            seen = self.losses(x, y)
        return (self.weigher(seen) * losses).mean()

    def _grad_mode(self, x: Tensor, y: Tensor) -> Tensor:
        losses = self.losses(x, y)
        with torch.set_grad_enabled(False):
            scale = self.student(x).square().mean()
        return self.weighed(losses) * (1 + scale)

    def _detached(self, x: Tensor, y: Tensor) -> Tensor:
        losses = self.losses(x, y)
        return (self.weigher(losses.detach()) * losses).mean()

    def _straight_through(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.student.first(x))
        rounded = hidden + (hidden.round() - hidden).detach()
        losses = cross_entropy(self.student.last(rounded), y, reduction="none")
        return self.weighed(losses)

    def _condition(self, x: Tensor, y: Tensor) -> Tensor:
        losses = self.losses(x, y)
        weights = self.weights(losses)
        penalty = sum((p.square().sum() for p in self.student.parameters() if p.requires_grad), x.new_zeros(()))
        return (weights * losses).mean() + weights.mean() * penalty

    def _kept_later(self, x: Tensor, y: Tensor) -> Tensor:
        losses = self.losses(x, y)
        weights = self.weights(losses)
        parameters = self.kept if self.calls > 1000 else list(self.student.parameters())
        return (weights * losses).mean() + weights.mean() * sum(p.square().sum() for p in parameters)

    def _activation_hook(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.student.first(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: 0.5 * gradient)
        return self.weighed(cross_entropy(self.student.last(hidden), y, reduction="none"))

    def _logits(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.student(x) * self.weigher(x[:, 0])[:, None], y)

    def _inputs(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.student(x + self.weigher(x[:, 0])[:, None]), y)

    def _attention(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.student.first(x))
        scores = (hidden @ hidden.T) * self.weigher(x[:, 0])
        return cross_entropy(self.student.last(scores.softmax(-1) @ hidden), y)

    def _penalty(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.weighed(self.losses(x, y))
        slopes = torch.autograd.grad(loss, list(self.student.parameters()), create_graph=True)
        return loss + 0.1 * sum((g.square().sum() for g in slopes), x.new_zeros(()))

    def _input_penalty(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        loss = self.weighed(self.losses(x, y))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()

    def _jvp(self, x: Tensor, y: Tensor) -> Tensor:
        losses = self.losses(x, y)
        weights = self.weights(losses)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch loads its scripted rules
            _, slope = torch.func.jvp(self.student, (x,), (torch.ones_like(x),))
        return (weights * losses).mean() + 0.1 * weights.mean() * slope.square().mean()

    def _kind_of_parameter(self, x: Tensor, y: Tensor) -> Tensor:
        losses = self.losses(x, y)
        weights = self.weights(losses)
        found = [p for p in self.student.parameters() if isinstance(p, nn.Parameter) and p.is_leaf]
        return (weights * losses).mean() + weights.mean() * sum((p.square().sum() for p in found), x.new_zeros(()))


SHORTCUTS = {
    "BOME": (bilevel.BOME, {"barrier": bilevel.barrier.GradientNorm(100.0)}),  # so that grad q counts
    "EBOMLC": (bilevel.EBOMLC, {"delta": 100.0}),
    "Unrolled": (bilevel.Unrolled, {"differentiate": "adjoint"}),
    "Unrolled by differences": (bilevel.Unrolled, {"product": "difference"}),
    "EMLC": (bilevel.EMLC, {}),
    "MLC": (bilevel.MLC, {}),
    "FiniteDifference": (bilevel.FiniteDifference, {}),
    "Unrolled, k = 3": (bilevel.Unrolled, {"inner_steps": 3}),
    "Unrolled, k = 3, adjoint": (bilevel.Unrolled, {"inner_steps": 3, "differentiate": "adjoint"}),
    "SAMA": (bilevel.SAMA, {"radius": 1e-3}),
    "Implicit": (bilevel.Implicit, {"solver": bilevel.Neumann(2)}),
}
KINDS = [name.removeprefix("_") for name in vars(Scene) if name.startswith("_") and not name.startswith("__")]


def flat(vector: Any) -> Tensor:
    return torch.cat([x.reshape(-1).double() for x in vector if x is not None])


def slopes(value: Tensor, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    found = torch.autograd.grad(value, inputs, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def by_plain_autograd(name: str, scene: Scene) -> Tensor:
    """The upper direction from the paper's formula, for SGD of rate ``RATE``; the scene ends as it began."""
    w, alpha = list(scene.student.parameters()), list(scene.weigher.parameters())
    kept = [x.detach().clone() for x in w]

    def descend() -> None:
        for x, g in zip(w, slopes(scene.lower_loss(scene.noisy), w), strict=True):
            x.data.sub_(RATE * g)

    def product(v: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        gradient = slopes(scene.lower_loss(scene.noisy), w, create_graph=True)
        pairs = [(g, x) for g, x in zip(gradient, v, strict=True) if g.requires_grad]
        found = torch.autograd.grad([g for g, _ in pairs], inputs, [x for _, x in pairs], allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]

    try:
        if name in ("BOME", "EBOMLC"):
            held = torch.Tensor()  # what a held value is: fixed at the current point
            scene.weights = lambda losses: scene.weigher(held)  # type: ignore[method-assign]
            held = scene.losses(*scene.noisy).detach()
            g = slopes(scene.lower_loss(scene.noisy), w + alpha)
            f = slopes(scene.upper_loss(scene.clean), w + alpha)
            descend()
            ahead = slopes(scene.lower_loss(scene.noisy), alpha)
            q = [*g[: len(w)], *(a - b for a, b in zip(g[len(w) :], ahead, strict=True))]
            fq, qq = float(flat(f) @ flat(q)), float(flat(q) @ flat(q))
            fq_upper = float(flat(f[len(w) :]) @ flat(q[len(w) :]))
            phi = 100.0 * qq + (fq_upper if name == "EBOMLC" else 0.0)
            weight = max(phi - fq, 0.0) / (qq + 1e-8) * (0.5 if name == "EBOMLC" else 1.0)
            return flat(f[len(w) :]) + weight * flat(q[len(w) :])
        points = []
        for _ in range(3 if "k = 3" in name else 1):
            points.append([x.detach().clone() for x in w])
            descend()
        if name == "Implicit":
            f = slopes(scene.upper_loss(scene.clean), w)
            p = [RATE * x for x in f]
            for _ in range(2):
                p = [x + RATE * (b - hx) for x, b, hx in zip(p, f, product(p, w), strict=True)]
            return -flat(product(p, alpha))
        bar = slopes(scene.upper_loss(scene.clean), w)
        if name == "SAMA":
            return -flat(product(bar, alpha))
        total = torch.zeros((), dtype=torch.float64)
        for point in reversed(points):
            for x, value in zip(w, point, strict=True):
                x.data.copy_(value)
            total = total - RATE * flat(product(bar, alpha))
            bar = [b - RATE * hb for b, hb in zip(bar, product(bar, w), strict=True)]
        return total
    finally:
        for x, value in zip(w, kept, strict=True):
            x.data.copy_(value)


# Where nothing held changes between the evaluations of a walk: its closed form calls ``hold`` anew at each point.
ONE_POINT = ("Unrolled", "Unrolled by differences", "EMLC", "MLC", "FiniteDifference")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kept_later"])
@pytest.mark.parametrize("name", SHORTCUTS)
def test_the_answer_is_that_of_plain_autograd(name: str, kind: str) -> None:
    if kind == "straight_through" and name in ("BOME", "EBOMLC", "Implicit", "SAMA"):
        pytest.skip("rounding at two points: the reference has another held value")
    method, options = SHORTCUTS[name]
    scene = Scene(kind, torch.float64)
    optimizer = scene.optimizer(method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of falling back: test_a_disagreement_is_told_once
        found = flat(optimizer.directions(scene.clean, scene.noisy).upper.values())
    holds = kind in ("ordinary", "grad_mode", "condition", "activation_hook", "jvp", "penalty", "input_penalty")
    holds = holds or kind in ("straight_through", "kind_of_parameter")
    if holds and name not in (*ONE_POINT, "BOME", "EBOMLC"):
        # The held value of a batch is that of its first point. Hold it in the reference too.
        held = scene.losses(*scene.noisy).detach()
        if kind == "straight_through":
            return
        scene.weigher.register_forward_pre_hook(lambda module, inputs: (held,))
    expected = by_plain_autograd(name, scene)
    # SAMA's and FiniteDifference's own truncation, of the second order in their radius.
    tolerance = {"FiniteDifference": 2e-3, "SAMA": 1e-5, "Unrolled by differences": 1e-6}.get(name, 1e-9)
    assert (found - expected).norm() < tolerance * expected.norm()
    assert expected.norm() > 1e-5


# What each shortcut cannot serve, and what its warning must say.
TOLD = [
    ("no_grad", "EMLC", "Forward mode gives lower_loss another derivative.*torch.no_grad.*back to double backward"),
    ("grad_mode", "MLC", "Forward mode gives lower_loss another derivative"),
    ("condition", "BOME", "another function where its lower variables need no gradient.*requires_grad"),
    ("condition", "EBOMLC", "another function where its lower variables need no gradient"),
    ("condition", "FiniteDifference", "another function where its lower variables need no gradient"),
    ("condition", "Unrolled", "Forward mode gives lower_loss another derivative"),
    ("activation_hook", "Unrolled", "Forward mode gives lower_loss another derivative.*hook"),
    ("activation_hook", "SAMA", "A difference of lower_loss is another derivative"),
    ("detached", "FiniteDifference", r"A difference of lower_loss.*bilevel\.hold"),
    ("detached", "SAMA", r"A difference of lower_loss.*bilevel\.hold"),
    ("detached", "Unrolled by differences", r"A difference of lower_loss.*bilevel\.hold"),
    ("straight_through", "FiniteDifference", "A difference of lower_loss"),
    ("logits", "EMLC", "no forward-mode product: softmax"),
    ("inputs", "Unrolled", "no forward-mode product: softmax"),
    ("attention", "MLC", "no forward-mode product: softmax"),
    ("penalty", "EMLC", "no forward-mode product: "),
    ("jvp", "EMLC", "no forward-mode product: Nested forward mode"),
    (
        "kind_of_parameter",
        "Unrolled, k = 3",
        'lower_loss is another function of tensors that take.*differentiate="adjoint"',
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "name", "words"), TOLD)
def test_a_disagreement_is_told_once(kind: str, name: str, words: str, dtype: torch.dtype) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene(kind, dtype)
    optimizer = scene.optimizer(method, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(scene.clean, scene.noisy)
    found = [str(warning.message) for warning in caught]
    assert re.search(f"(?s){words}", found[0])
    assert len(found) == 1 + (kind == "kind_of_parameter")  # of the graph, and of the adjoint's own shortcut
    for _ in range(8):  # warnings are errors
        optimizer.step(scene.clean, scene.noisy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHORTCUTS)
def test_an_ordinary_loss_hears_nothing_and_keeps_its_shortcuts(name: str, dtype: torch.dtype) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary", dtype)
    optimizer = scene.optimizer(method, verify="always", **options)
    for _ in range(20):
        optimizer.step(scene.clean, scene.noisy)
    assert optimizer.state_dict()["verification"] == {"steps": 20, "choices": {}}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_relu_networks_whose_units_sit_on_their_kink_keep_their_shortcuts(name: str) -> None:
    # Dead inputs and biases of 0: pre-activations of exactly 0, where a difference sees half of each side.
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    scene.student.first.bias.data.zero_()
    scene.student.forward = lambda x: scene.student.last(torch.relu(scene.student.first(x)))  # type: ignore[method-assign]
    scene.noisy[0][:10] = 0.0
    optimizer = scene.optimizer(method, **options)
    for _ in range(4):
        optimizer.directions(scene.clean, scene.noisy)
    assert optimizer.state_dict()["verification"]["choices"] == {}


def test_parameters_kept_outside_are_found_between_looks() -> None:
    # From some call on the loss reads a list; forward mode would answer as if the penalty were not there.
    scene = Scene("kept_later", torch.float64)
    optimizer = scene.optimizer(bilevel.EMLC, product="auto")
    for _ in range(9):
        optimizer.step(scene.clean, scene.noisy)
    scene.calls = 10_000
    with pytest.warns(UserWarning, match="Forward mode gives lower_loss another derivative"):
        found = flat(optimizer.directions(scene.clean, scene.noisy).upper.values())  # the tenth: no look
    expected = by_plain_autograd("EMLC", scene)
    assert (found - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("mode", ["auto", "graph"])
def test_the_kept_graph_finds_them_at_every_step(mode: Any) -> None:
    scene = Scene("kept_later", torch.float64)
    optimizer = scene.optimizer(bilevel.Unrolled, inner_steps=3, differentiate=mode)
    for _ in range(2):
        optimizer.directions(scene.clean, scene.noisy)
    scene.calls = 10_000
    if mode == "graph":
        with pytest.raises(bilevel.ClosureError, match=r"reads first\.weight.* other than from a module"):
            optimizer.directions(scene.clean, scene.noisy)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = optimizer.directions(scene.clean, scene.noisy)
    assert "reads first.weight" in str(caught[0].message)
    assert answer.stats.product == "reverse"


# --- when looks are due --------------------------------------------------------------------------------------------


def looks(verification: Verification, steps: int, signature: Callable[[int], object] = lambda n: 0) -> list[int]:
    found = []
    for number in range(1, steps + 1):
        verification.begin(signature(number))
        if verification.due:
            found.append(number)
        verification.end()
    return found


def test_looks_are_at_powers_of_two_and_then_every_1024() -> None:
    found = looks(Verification("auto"), 4 * LONGEST)
    assert found == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096]


def test_a_change_of_signature_is_a_look() -> None:
    assert looks(Verification("auto"), 8, lambda n: n > 5) == [1, 2, 4, 6, 8]


def test_every_step_may_be_a_look_and_none() -> None:
    always, never = Verification("always"), Verification("never")
    assert looks(always, 5) == [1, 2, 3, 4, 5]
    for _ in range(3):
        never.begin(0)
        assert not never.comparing
        never.end()


def test_a_step_that_failed_is_looked_at_again() -> None:
    verification = Verification("auto")
    looks(verification, 2)
    for _ in range(2):
        verification.begin(0)
        verification.end()
    assert verification.steps == 4
    verification.begin(0)  # the fifth fails
    verification.begin(0)
    assert not verification.due


@pytest.mark.parametrize("change", ["training", "hold", "load", "unfreeze", "autocast"])
def test_what_could_change_the_meaning_of_a_closure_is_a_look(change: str) -> None:
    scene = Scene("ordinary")
    optimizer = scene.optimizer(bilevel.BOME, inner_steps=1)
    if change == "unfreeze":
        scene.student.first.bias.requires_grad_(False)
    for _ in range(4):
        optimizer.step(scene.clean, scene.noisy)
    scene.calls = 0
    optimizer.step(scene.clean, scene.noisy)
    bare = scene.calls
    assert bare == 2
    if change == "training":
        scene.student.eval()
    elif change == "hold":
        weighed = scene.weighed
        scene.weighed = lambda losses: weighed(losses) + 0 * bilevel.hold(losses).sum()  # type: ignore[method-assign]
    elif change == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    elif change == "unfreeze":
        scene.student.first.bias.requires_grad_(True)
    scene.calls = 0
    with torch.autocast("cpu", enabled=change == "autocast"):
        optimizer.step(scene.clean, scene.noisy)
    assert scene.calls > bare


def test_calls_in_looks_and_between() -> None:
    """As documented: for BOME with one inner step, G once more at both points, F once more."""
    scene = Scene("ordinary")
    optimizer = scene.optimizer(bilevel.BOME)
    counts = []
    for _ in range(5):
        scene.calls = 0
        optimizer.step(scene.clean, scene.noisy)
        counts.append(scene.calls)
    assert counts == [4, 4, 2, 4, 2]


@pytest.mark.parametrize("name", ["EMLC", "FiniteDifference", "BOME"])
def test_a_resumed_run_takes_the_routes_of_the_first(name: str) -> None:
    method, options = SHORTCUTS[name]
    kind = "condition" if name == "BOME" else "no_grad"
    straight, resumed = Scene(kind), Scene(kind)
    one = straight.optimizer(method, **options)
    with pytest.warns(UserWarning, match="lower_loss"):
        one.step(straight.clean, straight.noisy)
    for _ in range(4):
        one.step(straight.clean, straight.noisy)
    resumed.student.load_state_dict(straight.student.state_dict())
    resumed.weigher.load_state_dict(straight.weigher.state_dict())
    other = resumed.optimizer(method, **options)
    other.load_state_dict(one.state_dict())
    assert other.state_dict()["verification"] == one.state_dict()["verification"]
    assert other.state_dict()["verification"]["choices"] != {}
    for _ in range(6):  # without a warning: the route is known
        one.step(straight.clean, straight.noisy)
        other.step(resumed.clean, resumed.noisy)
    for a, b in zip(straight.weigher.parameters(), resumed.weigher.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("verification", [{}, {"steps": "1", "choices": {}}, {"steps": 1, "choices": {"a": 1}}])
def test_a_state_of_another_form_is_refused(verification: Any) -> None:
    optimizer = Scene("ordinary").optimizer(bilevel.BOME)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.load_state_dict({**state, "verification": verification})
    assert optimizer.state_dict()["verification"] == state["verification"]


def test_never_calls_no_loss_beyond_the_documented_number() -> None:
    scene = Scene("no_grad")
    optimizer = scene.optimizer(bilevel.EMLC, verify="never")
    for count in range(1, 9):
        optimizer.step(scene.clean, scene.noisy)
        assert scene.calls == 2 * count


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BOME\(verify='often'\): must be one of 'auto', 'always', 'never'"):
        Scene("ordinary").optimizer(bilevel.BOME, verify="often")


# --- on an accelerator ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHORTCUTS)
def test_steps_between_looks_wait_for_nothing(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary", device="cuda")
    optimizer = scene.optimizer(method, on_nonfinite="ignore", **options)
    for _ in range(4):
        optimizer.step(scene.clean, scene.noisy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):  # steps 5 to 7
                optimizer.step(scene.clean, scene.noisy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_suspicion_between_looks_makes_the_next_step_a_look() -> None:
    scene = Scene("kept_later", device="cuda")
    optimizer = scene.optimizer(bilevel.EMLC)
    for _ in range(9):
        optimizer.step(scene.clean, scene.noisy)
    scene.calls = 10_000
    optimizer.step(scene.clean, scene.noisy)  # the tenth: its answer is not waited for
    torch.cuda.synchronize()
    with pytest.warns(
        UserWarning, match="other than from a module given as lower=|Forward mode gives lower_loss another"
    ):
        optimizer.step(scene.clean, scene.noisy)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kept_later"])
@pytest.mark.parametrize("name", SHORTCUTS)
def test_cuda_gives_the_directions_of_the_cpu(name: str, kind: str) -> None:
    method, options = SHORTCUTS[name]
    answers = []
    for device in ("cpu", "cuda"):
        scene = Scene(kind, torch.float64, device)
        optimizer = scene.optimizer(method, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            answers.append(flat(optimizer.directions(scene.clean, scene.noisy).upper.values()).cpu())
    assert (answers[0] - answers[1]).norm() < 1e-6 * answers[0].norm()


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EMLC", "MLC", "Unrolled", "Implicit", "BOME"])
def test_autocast_is_noise_and_no_disagreement(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    losses = scene.losses

    def under_autocast(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses(x, y).float()

    scene.losses = under_autocast  # type: ignore[method-assign]
    optimizer = scene.optimizer(method, verify="always", **options)
    for _ in range(4):
        optimizer.step(scene.clean, scene.noisy)
    assert optimizer.state_dict()["verification"]["choices"] == {}


def test_differences_that_are_rounding_are_told_to_be_noise() -> None:
    scene = Scene("ordinary")
    optimizer = scene.optimizer(bilevel.FiniteDifference, radius=1e-6)  # some digits of float32 are left: one
    with pytest.warns(UserWarning, match="is error of the precision"):
        optimizer.step(scene.clean, scene.noisy)
    assert optimizer.state_dict()["verification"]["choices"] == {}


def test_data_that_a_closure_captured_is_widened_for_a_decision() -> None:
    # float32 images around a network that is float64 for the moment.
    scene = Scene("no_grad")
    x, y = scene.noisy
    lower = scene.lower_loss
    optimizer = bilevel.EMLC(
        lambda: scene.upper_loss(scene.clean),
        lambda: lower((x, y)),
        upper=scene.weigher,
        lower=scene.student,
        upper_optimizer=torch.optim.SGD(scene.weigher.parameters(), lr=0.01),
        lower_optimizer=torch.optim.SGD(scene.student.parameters(), lr=RATE),
    )
    with pytest.warns(UserWarning, match="Forward mode gives lower_loss another derivative"):
        optimizer.directions()
    assert {p.dtype for p in scene.student.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("size", "words"),
    [(1e-3, "could not be decided in float64.*no kernel.*Nothing was changed"), (0.5, "another function")],
)
def test_what_float64_cannot_decide_switches_only_where_it_is_blatant(size: float, words: str) -> None:
    scene = Scene("ordinary")
    lower = scene.lower_loss

    def refuses_float64(batch: Batch) -> Tensor:
        if batch[0].dtype == torch.float64:
            raise RuntimeError("no kernel for float64")
        return lower(batch) * (1.0 if next(iter(scene.student.parameters())).requires_grad else 1 + size)

    scene.lower_loss = refuses_float64  # type: ignore[method-assign]
    optimizer = scene.optimizer(bilevel.BOME)
    with pytest.warns(UserWarning, match=words):
        optimizer.directions(scene.clean, scene.noisy)
    assert (optimizer.state_dict()["verification"]["choices"] == {}) == (size < 0.05)


def test_want_of_memory_is_told_once_and_no_error() -> None:
    scene = Scene("ordinary")
    lower = scene.lower_loss
    calls = 0

    def runs_out(batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:  # the repetition
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lower(batch)

    scene.lower_loss = runs_out  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="lower_loss: not verified, for want of memory"):
        scene.optimizer(bilevel.BOME).step(scene.clean, scene.noisy)


def test_the_gaps_are_measured_against_what_could_be() -> None:
    g, v = [torch.tensor([3.0, 4.0])], [torch.tensor([4.0, -3.0])]  # orthogonal: the slope cancels
    zero, one = torch.zeros(()), torch.ones(())
    assert slope_gap(zero, g, v, zero).item() == 0.0
    assert slope_gap(one, g, v, zero).item() == pytest.approx(1 / 25)
    assert slope_gap(one, [None], [None], zero).item() == 0.0  # nothing to compare
    assert vector_gap(g, [torch.tensor([3.0, 4.5])]).item() == pytest.approx(0.5 / (9 + 4.5**2) ** 0.5)
    assert vector_gap([None], [None]).item() == 0.0
    assert vector_gap([1e-9 * torch.ones(1)], [torch.zeros(1)], floor=1.0).item() == pytest.approx(1e-9)
    assert value_gap(one, 2 * one).item() == 0.5
    assert value_gap(zero, zero).item() == 0.0


def test_batches_of_any_structure_are_widened_and_searched() -> None:
    @dataclass(frozen=True)
    class Images:
        x: Tensor
        y: Tensor

    class Bag:
        def __init__(self) -> None:
            self.x = torch.ones(2)

    images = Images(torch.ones(2), torch.ones(2, dtype=torch.long))
    wide = widened({"a": [images], "b": images})
    assert widened(images).x.dtype == torch.float64
    assert widened(images).y.dtype == torch.long
    assert images.x.dtype == torch.float32
    assert wide["b"] is images  # torch's containers alone are looked into
    assert len(tensors_of(images)) == 2
    assert len(tensors_of(Bag())) == 1
    assert len(tensors_of({"a": [torch.ones(1)], "b": 3})) == 1


# --- what is refused by name ---------------------------------------------------------------------------------------

every_shortcut = pytest.mark.parametrize("name", ["BOME", "EMLC", "Unrolled, k = 3", "SAMA"])


@every_shortcut
def test_a_batch_that_is_changed_in_place(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    lower = scene.lower_loss
    scene.lower_loss = lambda batch: lower((batch[0].mul_(0.9), batch[1]))  # type: ignore[method-assign]
    kept = scene.noisy[0].clone()
    with pytest.raises(bilevel.ClosureError, match=r"lower_loss changes a tensor of its batch in place.*x \+ noise"):
        scene.optimizer(method, **options).step(scene.clean, scene.noisy)
    assert torch.equal(scene.noisy[0], kept)


@every_shortcut
def test_an_iterator_as_a_batch(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    optimizer = scene.optimizer(method, **options)
    for batch in (iter([scene.noisy]), (x for x in [1]), (zip([1], [2], strict=True), scene.noisy[1])):
        with pytest.raises(TypeError, match=rf"{method.__name__}.step: the lower batch is or holds a .*next\(iterator"):
            optimizer.step(scene.clean, batch)


@every_shortcut
def test_a_parameter_that_a_forward_changes(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    scene.student.table = nn.Embedding(3, 4, max_norm=0.5)
    kept = scene.student.table.weight.detach().clone()
    lower = scene.lower_loss
    scene.lower_loss = lambda batch: lower((scene.student.table(batch[1]), batch[1]))  # type: ignore[method-assign]
    with pytest.raises(bilevel.ClosureError, match=r"changes lower variable table.weight in place.*max_norm"):
        scene.optimizer(method, **options).step(scene.clean, scene.noisy)
    assert torch.equal(scene.student.table.weight, kept)


@every_shortcut
def test_an_averaged_teacher_that_the_loss_updates(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene, teacher = Scene("ordinary"), Student().requires_grad_(False)
    lower = scene.lower_loss

    def follows(batch: Batch) -> Tensor:
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), scene.student.parameters(), strict=True):
                p.lerp_(q, 0.1)
        return lower(batch) + (scene.student(batch[0]) - teacher(batch[0])).square().mean()

    scene.lower_loss = follows  # type: ignore[method-assign]
    with pytest.raises(bilevel.ClosureError, match=r"changes parameter first.weight of Student in place"):
        scene.optimizer(method, other=teacher, **options).step(scene.clean, scene.noisy)
    with pytest.warns(UserWarning, match=r"lower_loss returned .*, and then .*other="):
        scene.optimizer(method, **options).step(scene.clean, scene.noisy)


@every_shortcut
def test_a_clamp_that_no_version_counter_sees(name: str) -> None:
    # WGAN's clipping, written through .data.
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    lower = scene.lower_loss

    def clips(batch: Batch) -> Tensor:
        for parameter in scene.student.parameters():
            parameter.data.clamp_(-0.1, 0.1)
        return lower(batch)

    scene.lower_loss = clips  # type: ignore[method-assign]
    kept = [p.detach().clone() for p in scene.student.parameters()]
    with pytest.raises(bilevel.ClosureError, match=r"changes lower variable first.weight in place"):
        scene.optimizer(method, **options).step(scene.clean, scene.noisy)
    assert all(map(torch.equal, kept, scene.student.parameters()))


@every_shortcut
def test_a_tensor_that_is_kept_from_one_call_to_the_next(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    kept: dict[str, Tensor] = {}

    def keeps(batch: Batch) -> Tensor:
        if not kept:
            kept["hidden"] = scene.student.first(batch[0])
        logits = scene.student.last(torch.tanh(kept["hidden"]))
        return scene.weighed(cross_entropy(logits, batch[1], reduction="none"))

    scene.lower_loss = keeps  # type: ignore[method-assign]
    with pytest.raises(bilevel.ClosureError, match=r"first.weight.* through a tensor that was computed outside"):
        scene.optimizer(method, **options).step(scene.clean, scene.noisy)


@every_shortcut
def test_random_numbers_of_python_are_told_and_switch_nothing(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    lower = scene.lower_loss
    scene.lower_loss = lambda batch: lower(batch) * (1 + random.random())  # type: ignore[method-assign]
    optimizer = scene.optimizer(method, **options)
    with pytest.warns(UserWarning, match=r"lower_loss returned .*, and then .*numpy, Python"):
        optimizer.step(scene.clean, scene.noisy)
    for _ in range(4):  # said once
        optimizer.step(scene.clean, scene.noisy)
    assert optimizer.state_dict()["verification"]["choices"] == {}


@every_shortcut
def test_a_loss_that_goes_backward_itself(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    lower = scene.lower_loss

    def goes_backward(batch: Batch) -> Tensor:
        lower(batch).backward()
        return lower(batch)

    scene.lower_loss = goes_backward  # type: ignore[method-assign]
    scene.student.first.weight.grad = torch.ones(8, 4)
    with pytest.raises(bilevel.ClosureError, match=r"calls \.backward\(\).*torch\.autograd\.grad"):
        scene.optimizer(method, **options).step(scene.clean, scene.noisy)
    assert torch.equal(scene.student.first.weight.grad, torch.ones(8, 4))
    assert scene.student.last.weight.grad is None
    assert scene.weigher.layers[0].weight.grad is None


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_gradient_hook_on_a_variable(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    optimizer = scene.optimizer(method, **options)
    handle = scene.student.first.weight.register_hook(lambda gradient: 0.5 * gradient)
    if method in (bilevel.BOME, bilevel.EBOMLC):  # first order: the hooked gradient is the gradient
        optimizer.step(scene.clean, scene.noisy)
    else:
        with pytest.raises(bilevel.ClosureError, match=r"gradient hook is registered on lower variable first\.weight"):
            optimizer.step(scene.clean, scene.noisy)
    handle.remove()
    scene.student.first.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(bilevel.ClosureError, match=r"accumulated gradient of lower variable first\.weight"):
        optimizer.step(scene.clean, scene.noisy)


def test_variables_in_the_same_memory() -> None:
    scene = Scene("ordinary")
    scene.student.twin = nn.Linear(4, 8)
    scene.student.twin.weight.data = scene.student.first.weight.data
    with pytest.raises(ValueError, match=r"BOME\(lower=twin.weight\): shares memory with lower variable first.weight"):
        scene.optimizer(bilevel.BOME)
    flat_memory = torch.arange(6.0)
    parts = [flat_memory[:3].detach().requires_grad_(), flat_memory[3:].detach().requires_grad_()]
    combs = [flat_memory[::2].detach().requires_grad_(), flat_memory[1::2].detach().requires_grad_()]
    for a, b in (parts, combs):  # neighbours, and combs that mesh: one storage, no common element
        optimizer = bilevel.BOME(
            lambda b=b: (b - 1).square().sum(),
            lambda a=a, b=b: (b - a).square().sum(),
            upper=a,
            lower=b,
            upper_optimizer=torch.optim.SGD([a], lr=0.1),
            lower_optimizer=torch.optim.SGD([b], lr=0.1),
        )
        assert optimizer.step().upper_moved


def test_variables_that_are_registered_as_buffers_move_as_variables() -> None:
    for method, options in SHORTCUTS.values():
        scene = Scene("ordinary")
        scene.student.register_buffer("scale", torch.ones(3, requires_grad=True))
        scene.student.forward = lambda x, s=scene.student: s.last(torch.tanh(s.first(x))) * s.scale  # type: ignore[method-assign]
        moved = [*scene.student.parameters(), scene.student.scale]
        optimizer = scene.optimizer(
            method,
            lower=[scene.student, ("scale", scene.student.scale)],
            lower_optimizer=torch.optim.SGD(moved, lr=RATE),
            **options,
        )
        optimizer.step(scene.clean, scene.noisy)
        assert not torch.equal(scene.student.scale, torch.ones(3))


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_loss_and_an_aux_that_are_variables_keep_the_values_they_had(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    at: list[float] = []

    def upper_loss(batch: Batch) -> tuple[Tensor, Any]:
        w = scene.student.last.weight
        at.append(w[0, 0].item())
        return w[0, 0], {"w": w, "row": w[1], "buffer": scene.student.first.bias.detach()}

    scene.upper_loss = upper_loss  # type: ignore[method-assign, assignment]
    stats = scene.optimizer(method, verify="never", **options).step(scene.clean, scene.noisy)
    assert stats.upper_loss.item() == at[-1]
    assert stats.upper_aux["w"][0, 0].item() == at[-1]
    stats.upper_aux["row"].zero_()
    assert scene.student.last.weight[1].abs().sum() > 0


def test_hold_must_be_called_as_often_in_every_evaluation() -> None:
    scene = Scene("ordinary")

    def fewer(losses: Tensor) -> Tensor:
        held = bilevel.hold(losses.detach()) if scene.calls % 2 else losses.detach()
        return (scene.weigher(held) * losses).mean()

    scene.weighed = fewer  # type: ignore[method-assign]
    with pytest.raises(bilevel.ClosureError, match=r"held 0 tensors, the batch's first evaluation 1"):
        scene.optimizer(bilevel.BOME).step(scene.clean, scene.noisy)


def test_hold_inside_a_checkpoint_is_blamed_on_the_checkpoint() -> None:
    scene = Scene("ordinary")
    lower = scene.lower_loss
    scene.lower_loss = lambda batch: checkpoint(lower, batch, use_reentrant=False)  # type: ignore[method-assign]
    with pytest.raises(bilevel.ClosureError, match=r"hold\(tensor\): called during a backward pass.*checkpoint"):
        scene.optimizer(bilevel.BOME).step(scene.clean, scene.noisy)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_lower_loss_whose_mixed_derivative_is_absent(name: str) -> None:
    # F = (w - 1)^2 + (a - 1)^2, G = (w - 3)^2 + a^2: G does depend on a, its gradient in w does not.
    method, options = SHORTCUTS[name]
    a, w = torch.tensor(2.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    optimizer = method(
        lambda: (w - 1) ** 2 + (a - 1) ** 2,
        lambda: (w - 3) ** 2 + a**2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        **options,
    )
    found = optimizer.directions().upper["0"].item()
    if method in (bilevel.BOME, bilevel.EBOMLC):
        assert found == pytest.approx(2.0)  # grad q is 0 in a: G(w) and G(w_1) have the same one
    else:
        assert found == pytest.approx(2.0)  # 2 (a - 1)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_lower_loss_without_any_upper_variable_is_refused(name: str) -> None:
    method, options = SHORTCUTS[name]
    scene = Scene("ordinary")
    scene.lower_loss = lambda batch: scene.losses(*batch).mean()  # type: ignore[method-assign]
    with pytest.raises(bilevel.ClosureError, match="lower_loss does not depend on any upper variable"):
        scene.optimizer(method, **options).step(scene.clean, scene.noisy)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_values_is_named(count: int) -> None:
    scene = Scene("ordinary")
    lower = scene.lower_loss
    scene.lower_loss = lambda batch: (lower(batch),) * count  # type: ignore[method-assign]
    with pytest.raises(bilevel.ClosureError, match=rf"returned a tuple of {count} values.*into one aux"):
        scene.optimizer(bilevel.BOME).step(scene.clean, scene.noisy)


def test_a_step_inside_a_compiled_function_runs_as_it_is_written() -> None:
    scenes = [Scene("ordinary"), Scene("ordinary")]
    one, other = (scene.optimizer(bilevel.EMLC) for scene in scenes)

    @torch.compile(backend="eager")
    def epoch(clean: Batch, noisy: Batch) -> Tensor:
        stats = one.step((clean[0] * 1.0, clean[1]), noisy)
        return stats.upper_loss * 2

    compiled = torch.compile(other.step, backend="eager")
    for _ in range(3):
        twice = epoch(scenes[0].clean, scenes[0].noisy)
        assert torch.equal(twice, 2 * compiled(scenes[1].clean, scenes[1].noisy).upper_loss)


def test_a_compiled_loss_is_named_where_it_cannot_be_differentiated_twice() -> None:
    scene = Scene("ordinary")
    scene.student.forward = torch.compile(scene.student.forward, backend="aot_eager")  # type: ignore[method-assign]
    with pytest.raises(bilevel.ClosureError, match=r"compiled function \(torch.compile\)"):
        scene.optimizer(bilevel.Unrolled, product="reverse").step(scene.clean, scene.noisy)
