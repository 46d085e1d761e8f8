"""Independent random streams of one run, each named by what it decides.

A single global generator would couple everything: one more draw for the split would move the label noise and the first
weights too. With named streams, two methods run with one seed see the same split, the same noise, the same first
weights and the same order of images, so that their differences can be compared seed by seed.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the stream that belongs to a seed and a purpose, for example ``generator(1, "split")``."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def global_state() -> dict[str, Tensor | list[Tensor]]:
    """Return torch's global random states, which dropout and the initialisation of layers draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_global_state(state: dict[str, Tensor | list[Tensor]]) -> None:
    """Put back what `global_state` returned."""
    cpu, cuda = state["cpu"], state["cuda"]
    torch.set_rng_state(torch.as_tensor(cpu).cpu())
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.as_tensor(one).cpu() for one in cuda])
