"""How good directions are under autocast: ``python -m benchmarks.low_precision``.

Every method on one small network, in float32 and with the losses under autocast: the cosine of both directions, and the
relative distance. Beside it what autocast itself explains: the distance of the plain gradients of F and G. Medians over
``--seeds`` networks and batches. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel

# So large that the constraint is active, and the upper direction not 0.
ACTIVE = {"barrier": bilevel.barrier.GradientNorm(10.0)}
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "BOME": (bilevel.BOME, ACTIVE),
    "BOME, T = 5": (bilevel.BOME, {"inner_steps": 5, **ACTIVE}),
    "BOME, unrolled, by difference": (bilevel.BOME, {"value_gradient": "unrolled", "product": "difference", **ACTIVE}),
    "EBOMLC": (bilevel.EBOMLC, {"delta": 10.0}),
    "EBOMLC, difference": (bilevel.EBOMLC, {"delta": 10.0, "value_gradient": "difference"}),
    "Unrolled": (bilevel.Unrolled, {}),
    "Unrolled, k = 3": (bilevel.Unrolled, {"inner_steps": 3}),
    "Unrolled, k = 3, by difference": (
        bilevel.Unrolled,
        {"inner_steps": 3, "differentiate": "adjoint", "product": "difference"},
    ),
    "EMLC": (bilevel.EMLC, {}),
    "EMLC, by difference": (bilevel.EMLC, {"product": "difference"}),
    "MLC": (bilevel.MLC, {}),
    "MLC, by difference": (bilevel.MLC, {"product": "difference"}),
    "Implicit, Neumann(3)": (bilevel.Implicit, {"solver": bilevel.Neumann(3)}),
    "Implicit, by difference": (bilevel.Implicit, {"solver": bilevel.Neumann(3), "product": "difference"}),
    "FiniteDifference": (bilevel.FiniteDifference, {}),
    "SAMA": (bilevel.SAMA, {}),
    "VPBGD": (bilevel.VPBGD, {}),
    "F2SA": (bilevel.F2SA, {"penalty": 10.0, "inner_steps": 3}),
    "F2SA, p = 2": (bilevel.F2SA, {"penalty": 10.0, "inner_steps": 3, "p": 2}),
    "BVFSM": (bilevel.BVFSM, {"inner_steps": 2, "value_steps": 2}),
    "PDBO": (bilevel.PDBO, {}),
    "GPBGD": (bilevel.GPBGD, {}),
    "SOBA": (bilevel.SOBA, {}),
    "MASOBA": (bilevel.MASOBA, {}),
    "SABA": (bilevel.SABA, {"upper_rows": 1, "lower_rows": 1}),
    "MEHA": (bilevel.MEHA, {}),
    "BSG1": (bilevel.BSG1, {}),
}


class Scene:
    """A perceptron below, a corrector of its targets above, some steps into training."""

    def __init__(self, seed: int, dtype: torch.dtype | None, scaler: torch.amp.GradScaler | None = None) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.corrector = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 10))
        self.dtype, self.scaler = dtype, scaler
        teacher = nn.Linear(20, 10)
        x = torch.randn(2, 64, 20)
        label = teacher(3 * x).argmax(-1).detach()
        noisy = torch.where(torch.rand(64) < 0.4, torch.randint(10, (64,)), label[1])
        self.batches = list(zip(x, nn.functional.one_hot(torch.stack([label[0], noisy]), 10).float(), strict=True))
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):  # a model of some training, whose gradients of F and G differ
            sgd.zero_grad()
            cross_entropy(self.model(x[1]), self.batches[1][1]).backward()
            sgd.step()

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """F: cross-entropy on clean labels."""
        x, label = batch
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return cross_entropy(self.model(x), label)

    def lower_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """G: cross-entropy on corrected labels."""
        x, label = batch
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return cross_entropy(self.model(x), self.corrector(label).softmax(1))

    def directions(self, method: Callable[..., Any], options: Mapping[str, Any]) -> bilevel.Directions[Any]:
        """Return the directions of the first step."""
        extra = {} if self.scaler is None else {"scaler": self.scaler}
        optimizer = method(
            self.upper_loss,
            self.lower_loss,
            upper=self.corrector,
            lower=self.model,
            upper_optimizer=torch.optim.SGD(self.corrector.parameters(), lr=0.01),
            lower_optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1),
            verify="never",
            **options,
            **extra,
        )
        batches = [bilevel.Indexed(0, batch) for batch in self.batches]
        found: bilevel.Directions[Any] = optimizer.directions(*batches)
        return found

    def gradients(self) -> dict[str, Tensor]:
        """Plain gradients of F and G: what autocast does to them nothing can undo."""
        found = {}
        for name, loss, batch in (("F", self.upper_loss, self.batches[0]), ("G", self.lower_loss, self.batches[1])):
            tensors = [*self.model.parameters(), *self.corrector.parameters()]
            gradients = torch.autograd.grad(loss(batch), tensors, allow_unused=True)
            found[name] = torch.cat([g.flatten() for g in gradients if g is not None])
        return found


def flat(named: Mapping[str, Tensor]) -> Tensor:
    """Return named tensors as one."""
    return torch.cat([x.flatten().double() for x in named.values()]) if named else torch.zeros(0).double()


def apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the cosine, and the distance relative to ``b``."""
    a, b = a.double(), b.double()
    return float(torch.dot(a, b) / (a.norm() * b.norm())), float((a - b).norm() / b.norm())


def compared(name: str, dtype: torch.dtype, seeds: int, *, scaled: bool = False) -> dict[str, tuple[float, float]]:
    """Return cosine and distance of each level's direction: medians over seeds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        method, options = ROWS[name]
        exact = Scene(seed, None).directions(method, options)
        rough = Scene(seed, dtype, scaler).directions(method, options)
        for level in ("upper", "lower"):
            if getattr(exact, level):
                found.setdefault(level, []).append(apart(flat(getattr(rough, level)), flat(getattr(exact, level))))
    return {level: (median(c for c, _ in rows), median(d for _, d in rows)) for level, rows in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scaler", action="store_true", help="with a GradScaler")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="names of rows")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(f"torch {torch.__version__}, autocast to {options.dtype}, medians of {options.seeds} seeds\n")
    seeds = range(options.seeds)
    plain = [(Scene(seed, dtype).gradients(), Scene(seed, None).gradients()) for seed in seeds]
    for name in ("F", "G"):
        print(f"plain gradient of {name}: distance {median(apart(a[name], b[name])[1] for a, b in plain):.1e}")
    print("\n| method | upper: cosine, distance | lower: cosine, distance |\n| --- | --- | --- |")
    for name in options.rows:
        found = compared(name, dtype, options.seeds, scaled=options.scaler)
        cells = [f"{found[x][0]:.4f}, {found[x][1]:.1e}" if x in found else "" for x in ("upper", "lower")]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
