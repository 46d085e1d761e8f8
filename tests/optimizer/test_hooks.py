"""Step hooks of the lower optimizer: said once what virtual steps and derivatives ignore, and only where it acts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "BOME": ("BOME", {}),
    "BOME preview": ("BOME", {"inner_step": "optimizer"}),
    "EBOMLC": ("EBOMLC", {}),
    "Unrolled": ("Unrolled", {}),
    "Unrolled real": ("Unrolled", {"virtual": False}),
    "EMLC": ("EMLC", {}),
    "EMLC replay": ("EMLC", {"memory": "replay", "inner_steps": 2}),
    "MLC": ("MLC", {}),
    "FiniteDifference": ("FiniteDifference", {}),
    "SAMA": ("SAMA", {}),
    "Implicit": ("Implicit", {}),
}
every_method = pytest.mark.parametrize("name", METHODS)
REAL = {"Unrolled real", "EMLC", "EMLC replay", "SAMA"}


def bounded(name: str, w: float = 0.9, lr: float = 0.1, **more: Any) -> tuple[Any, Tensor, Tensor]:
    """F=(a-.5)²+w², G=(w-a-2)²: with w kept in [0, 1] it stays at 1, and the answer is a = 0.5."""
    method, options = METHODS[name]
    low, up = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (w, 0.0))
    optimizer = getattr(bilevel, method)(
        lambda: (up - 0.5) ** 2 + low**2,
        lambda: (low - up - 2) ** 2,
        upper=up,
        lower=low,
        upper_optimizer=torch.optim.SGD([up], lr=0.1),
        lower_optimizer=torch.optim.SGD([low], lr=lr),
        **options,
        **more,
    )
    return optimizer, low, up


def messages(optimizer: Any, steps: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step()
    return [str(entry.message) for entry in seen]


@pytest.mark.thorough
@pytest.mark.parametrize("behind", [False, True], ids=["in place", "through .data"])
@every_method
def test_an_active_clamp_is_said_once(name: str, behind: bool) -> None:
    optimizer, w, a = bounded(name, 3.0 if name == "EBOMLC" else 0.9)  # EBOMLC comes from above only

    def project(*_: Any) -> None:
        if behind:
            w.data.clamp_(0, 1)
        else:
            with torch.no_grad():
                w.clamp_(0, 1)

    optimizer.lower_optimizer.register_step_post_hook(project)
    (text,) = messages(optimizer, 300)
    assert text.startswith(f"{METHODS[name][0]}: a post-step hook of the lower optimizer moved the lower variables")
    if name != "EBOMLC":
        assert abs(a.item() - 0.5) > 0.05  # why it is said


@every_method
def test_an_idle_clamp_and_an_idle_clip_are_silent(name: str) -> None:
    optimizer, w, _ = bounded(name)
    optimizer.lower_optimizer.register_step_post_hook(lambda *_: w.data.clamp_(-100, 100) and None)
    optimizer.lower_optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_([w], 1e3))
    assert messages(optimizer) == []
    assert len(optimizer.lower_optimizer._optimizer_step_pre_hooks) == 1
    assert len(optimizer.lower_optimizer._optimizer_step_post_hooks) == 1


@every_method
def test_a_clip_that_acts_is_said_once_also_when_registered_later(name: str) -> None:
    optimizer, w, _ = bounded(name)
    optimizer.step()
    optimizer.lower_optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_([w], 1e-3))
    found = messages(optimizer)
    if name == "Implicit":  # the derivative at a solution does not know how it was reached
        assert found == []
        return
    (text,) = found
    assert text.startswith(f"{METHODS[name][0]}: a pre-step hook of the lower optimizer changed the gradient")
    assert ("the derivative does not" if name in REAL else "virtual steps do not follow") in text


@pytest.mark.parametrize("name", ["BOME", "EBOMLC", "Unrolled", "FiniteDifference"])
def test_a_virtual_step_with_a_rate_of_its_own_is_no_matter(name: str) -> None:
    optimizer, w, _ = bounded(name, inner_lr=1e-3)
    optimizer.lower_optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_([w], 1e-3))
    assert messages(optimizer) == []


@every_method
def test_schedulers_counters_and_averages_are_silent(name: str) -> None:
    optimizer, w, _ = bounded(name)
    lower, calls = optimizer.lower_optimizer, []
    lower.register_step_pre_hook(lambda *_: calls.append(w.item()))
    lower.register_step_post_hook(lambda *_: calls.append(w.item()))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(lower, T_max=10)
    swa = torch.optim.swa_utils.SWALR(lower, swa_lr=0.05)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
            scheduler.step()
            swa.step()
    assert [str(entry.message) for entry in seen if "hook" in str(entry.message)] == []
    assert calls


def test_schedulers_register_no_hook() -> None:
    optimizer, _, _ = bounded("BOME")
    torch.optim.lr_scheduler.StepLR(optimizer.lower_optimizer, 1)
    assert not optimizer.lower_optimizer._optimizer_step_pre_hooks
    assert not optimizer.lower_optimizer._optimizer_step_post_hooks


def scaled(side: str, factor: Any) -> bilevel.BOME:
    w, a = (torch.tensor(x, requires_grad=True) for x in (1.0, 0.5))
    change = {"upper": lambda x: x, "lower": lambda x: x} | {side: factor}
    return bilevel.BOME(
        lambda: change["upper"]((w - 1) ** 2 + a**2),
        lambda: change["lower"]((w - a) ** 2),
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=1e-3),
        lower_optimizer=torch.optim.SGD([w], lr=1e-3),
    )


@pytest.mark.parametrize("after", [lambda x: x, lambda x: x / 4, lambda x: (x, 1)], ids=["alone", "averaged", "aux"])
@pytest.mark.parametrize("side", ["upper", "lower"])
def test_a_scaled_loss_is_refused(side: str, after: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    optimizer = scaled(side, lambda x: after(scaler.scale(x)))
    with pytest.raises(bilevel.ClosureError, match=rf"{side}_loss returned GradScaler.scale"):
        optimizer.step()


@pytest.mark.parametrize(
    "factor",
    [
        lambda x: x * 0.5,
        lambda x: x * 512.0,
        lambda x: x * torch.tensor(3.0),
        lambda x: torch.tensor(65536.0) * x,
        lambda x: torch.amp.GradScaler("cpu", enabled=False).scale(x),
    ],
    ids=["half", "number", "weight", "power of two", "disabled"],
)
@pytest.mark.parametrize("side", ["upper", "lower"])
def test_a_loss_times_something_else_is_not_refused(side: str, factor: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # alive, in use elsewhere
    optimizer = scaled(side, factor)
    optimizer.verify = "never"  # 65536 in float32 is not what is tried here
    optimizer.step()
