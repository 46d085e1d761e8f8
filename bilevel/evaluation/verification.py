"""Trust in shortcuts: a fast route is used only as far as it was compared with plain autograd on this very closure.

Plain autograd of the closure as it stands is the truth. What it never does to a closure (dual tensors, evaluations
without gradients for the lower variables, other tensors in the places of parameters, central differences) is verified
in two layers:

* at every step by identities that are nearly free: the slope of G along v that a route sees is ``<grad_w G, v>``;
* in *looks*, at steps 1, 2, 4, ..., 1024, 2048, 3072, ... and after whatever could change a closure's meaning, by
  comparison with plain autograd itself.

A suspicion is decided in float64. Here is when looks are due, what was found, and how far numbers may be apart;
``oracle.py`` and ``hypergradient/mode_choice.py`` do the comparing.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..processes.joined import agreed
from ..vectors import Tensors, dot, squared_norm, subtract

Verify = Literal["auto", "always", "never"]
LONGEST = 1024  # steps between two looks, at the most

# Relative gaps that rounding explains: of the slope of a loss, and of a product. Autocast explains more (5e-3), which
# is what float64 is asked for.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUNDING_BELOW = 3e-2
# The same where a central difference is compared, whose truncation is no fault of the closure.
TRUNCATION = {torch.float64: 1e-4, torch.float32: 1e-2}
TRUNCATION_BELOW = 1e-1
# What float64 must agree to; and what is believed where float64 cannot be asked.
DECIDED = 1e-5
BLATANT = 5e-2
READERS: dict[torch.dtype, Any] = {
    torch.float64: ctypes.c_double,
    torch.float32: ctypes.c_float,
    torch.bool: ctypes.c_bool,
}


class Verification:
    """When looks are due, what they found out, and what was said about it.

    Attributes:
        mode: ``"auto"``, ``"always"`` (every step is a look) or ``"never"`` (no loss is called for it).
        steps: Steps, and calls of ``directions``, that ended well.
        choices: Which right way has replaced which shortcut. Part of a checkpoint, so that a resumed run computes the
            same numbers.
        due: Whether the current step is a look.
        in_half: The losses that compute in half precision, and in float32 where differences are taken. Part of a
            checkpoint too.
        unrepeatable: The losses that gave two values for the same call. Nothing can be compared with them.
    """

    def __init__(self, mode: Verify) -> None:
        self.mode = mode
        self.steps = 0
        self.choices: dict[str, str] = {}
        self.due = True
        self.in_half: set[str] = set()
        self.unrepeatable: set[str] = set()
        self._forced = False
        self._signature: object = None
        self._holds: dict[str, int] = {}
        self._noise: dict[str, float] = {}
        self._cleared: set[str] = set()
        self._said: set[str] = set()
        self._waiting: list[tuple[Tensor, Any]] = []

    @property
    def comparing(self) -> bool:
        """Whether losses may be called for comparison in the current step."""
        return self.due and self.mode != "never"

    def begin(self, signature: object) -> None:
        """A step begins; ``signature`` changes where the closures may mean something else than before."""
        number = self.steps + 1
        scheduled = number & (number - 1) == 0 if number <= LONGEST else number % LONGEST == 0
        changed = self._signature is not None and signature != self._signature
        self._signature = signature
        due = self._forced or scheduled or changed or self.mode == "always" or self._heard_of_a_suspicion()
        self.due = agreed(due, "the beginning")
        if self.due:
            self._cleared.clear()

    def end(self) -> None:
        """The step ended well."""
        self.steps += 1
        self._forced = False

    def look_again(self) -> None:
        """Make the next step a look: something was loaded, or the variables changed."""
        self._forced = True

    def forget(self) -> None:
        """The set of variables changed: what was found out about the closures no longer holds."""
        self.choices.clear()
        self.in_half.clear()
        self._noise.clear()
        self._holds.clear()
        self._said.clear()
        self.unrepeatable.clear()
        self.look_again()

    def holds_differ(self, loss: str, count: int) -> bool:
        """Whether a batch's first evaluation of ``loss`` called ``hold`` another number of times than the last one."""
        differs = self._holds.setdefault(loss, count) != count
        self._holds[loss] = count
        return differs

    def look_now(self) -> None:
        """Make the rest of this step a look."""
        if not self.due:
            self.due = True
            self._cleared.clear()

    def suspects(self, name: str, gap: Tensor, allowed: float) -> bool:
        """Whether ``gap`` is more than is ``allowed``, or than was found to be noise.

        On an accelerator, between looks, the answer is not waited for: it makes the next step a look.
        """
        if name in self._cleared:
            return False
        limit = max(allowed, 4 * self._noise.get(name, 0.0))
        if gap.device.type == "cpu":
            return agreed(on_host(gap) > limit)  # False where the gap is NaN: contract 6 speaks of that
        if self.due:
            return agreed(bool(gap > limit))
        self._wait_for(gap > limit)
        return False

    def clear(self, name: str, gap: float) -> None:
        """A suspicion was unfounded: a gap of this size is noise, and until the next look no other is looked into."""
        self._cleared.add(name)
        if gap < math.inf:  # else an overflow, or NaN, which is no measure of noise
            self._noise[name] = max(gap, self._noise.get(name, 0.0))

    def say(self, text: str) -> None:
        """Warn, once."""
        self.say_of(text, text)

    def say_of(self, subject: str, text: str) -> None:
        """Warn, once of a subject, whatever the numbers in the text."""
        if subject not in self._said:
            self._said.add(subject)
            warnings.warn(text, stacklevel=3)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs in order to go on with the same numbers."""
        half = {"in_half": sorted(self.in_half)} if self.in_half else {}
        return {"steps": self.steps, "choices": dict(self.choices), **half}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state`; the next step is a look."""
        steps, choices = state["steps"], state["choices"]
        if not isinstance(steps, int) or not all(isinstance(x, str) for x in (*choices, *choices.values())):
            raise ValueError("the verification's state holds something else than a counter and choices")
        self.steps, self.choices = steps, dict(choices)
        self.in_half = set(state.get("in_half", ()))
        self.look_again()

    def _wait_for(self, flag: Tensor) -> None:
        if flag.device.type == "cuda":
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(flag.device))
            self._waiting.append((host, event))

    def _heard_of_a_suspicion(self) -> bool:
        arrived = [host for host, event in self._waiting if event.query()]
        self._waiting = [(host, event) for host, event in self._waiting if not event.query()]
        return any(bool(host) for host in arrived)


def rounding(dtype: torch.dtype) -> float:
    """Return the relative gap that rounding explains between two exact routes."""
    return ROUNDING.get(dtype, ROUNDING_BELOW)


def truncation(dtype: torch.dtype) -> float:
    """Return the relative gap that a central difference may show."""
    return TRUNCATION.get(dtype, TRUNCATION_BELOW)


def coarsest(tensors: Tensors) -> torch.dtype:
    """Return the dtype of the fewest digits among ``tensors``."""
    return max((x.dtype for x in tensors if x is not None), key=lambda dtype: torch.finfo(dtype).eps)


def on_host(value: Tensor) -> float:
    """Read a number of the host's own memory: that waits for nothing, and takes a tenth of the time of ``item``."""
    if value.dtype not in READERS:
        return float(value)
    return float(READERS[value.dtype].from_address(value.data_ptr()).value)


def slopes_agree(slope: Tensor, gradient: Tensors, direction: Tensors, allowed: float) -> bool:
    """Whether ``slope`` is so nearly ``<g, v>`` that nothing else need be asked; False on an accelerator."""
    expected = dot(gradient, direction)
    if slope.device.type != "cpu" or expected.device.type != "cpu":
        return False
    wanted = on_host(expected)
    return not agreed(not abs(on_host(slope) - wanted) <= allowed * abs(wanted))


def slope_gap(slope: Tensor, gradient: Tensors, direction: Tensors, value: Tensor) -> Tensor:
    """Return ``|slope - <g, v>| / (|g| |v|)``: measured against what could be, not against a result that may cancel.

    At a minimum g is the rounding of what cancelled there; the loss's ``value`` says how large that may be, for
    variables of order one.
    """
    expected = dot(gradient, direction)
    steepness = squared_norm(gradient).sqrt() + 1e-3 * value.detach().abs().to(expected.device, expected.dtype)
    scale = steepness * squared_norm(direction).sqrt()
    difference = (slope.detach().to(expected.device, expected.dtype) - expected).abs()
    return torch.where(scale > 0, difference / torch.where(scale > 0, scale, 1.0), 0.0 * difference)


def vector_gap(a: Tensors, b: Tensors, floor: Tensor | float = 0.0) -> Tensor:
    """Return ``|a - b|`` relative to the larger of the two, or to ``floor`` where both are smaller."""
    difference = squared_norm(subtract(a, b)).sqrt()
    scale = torch.maximum(squared_norm(a), squared_norm(b)).sqrt()
    scale = torch.maximum(scale, torch.as_tensor(floor, dtype=scale.dtype, device=scale.device))
    return torch.where(scale > 0, difference / torch.where(scale > 0, scale, 1.0), 0.0 * difference)


def value_gap(a: Tensor, b: Tensor) -> Tensor:
    """Return ``|a - b|`` relative to the larger of two losses."""
    a, b = a.detach().double() if a.device.type != "mps" else a.detach().float(), b.detach().to(a.device)
    scale = torch.maximum(a.abs(), b.abs().to(a.dtype))
    return torch.where(scale > 0, (a - b).abs() / torch.where(scale > 0, scale, 1.0), 0.0 * scale)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
