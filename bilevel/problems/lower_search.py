"""The lowest value of a lower loss by search, without gradients: what answers are checked against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Formula = Callable[[Tensor, Tensor], Tensor]

REACH = 10.0  # where a variable without bounds is searched: this far around 0 and around the starts
SAMPLES, KEPT, ROUNDS, SHRINK = 8192, 8, 40, 0.65


def lowest(
    loss: Formula, alpha: Tensor, starts: Sequence[Tensor], bounds: tuple[Tensor, Tensor] | None
) -> tuple[float, Tensor]:
    """Return the smallest ``loss(alpha, w)`` found, and its w.

    Quasi-random points over the whole box; then, around the best eight, normal ones closer and closer. Nothing of the
    library takes part.

    Args:
        loss: Of flat values along the first dimension; further dimensions are points.
        alpha: Flat.
        starts: Flat points to begin with as well.
        bounds: Of w; None, or infinite: around 0 and the starts.
    """
    size = starts[0].numel()
    begin = torch.stack([start.to(torch.float64) for start in starts], 1)
    reach = torch.full((size, 1), REACH, dtype=torch.float64)
    low, high = torch.minimum(-reach, begin - reach).amin(1), torch.maximum(reach, begin + reach).amax(1)
    if bounds is not None:
        low = torch.where(bounds[0].flatten().isfinite(), bounds[0].flatten().to(low), low)
        high = torch.where(bounds[1].flatten().isfinite(), bounds[1].flatten().to(high), high)
    low, high = low[:, None], high[:, None]
    alpha = alpha.to(torch.float64)[:, None]
    sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=0).draw(SAMPLES, dtype=torch.float64).T
    points = torch.cat([begin, low + (high - low) * sobol], 1).clamp(low, high)
    generator = torch.Generator().manual_seed(0)
    width = (high - low) * 0.5 * SAMPLES ** (-1 / size) * 2
    centres = points[:, torch.nan_to_num(loss(alpha, points), nan=torch.inf).argsort()[:KEPT]]
    for _ in range(ROUNDS):
        noise = torch.randn(64, size, KEPT, generator=generator, dtype=torch.float64)
        around = (centres + width * noise).clamp(low, high)
        around = torch.cat([centres[None], around])  # candidate, coordinate, centre
        values = loss(alpha[..., None], around.movedim(0, 1))  # of candidates and centres
        values = torch.nan_to_num(values, nan=torch.inf)
        chosen = values.argmin(0)
        centres = torch.stack([around[c, :, i] for i, c in enumerate(chosen.tolist())], 1)
        width = width * SHRINK
    values = loss(alpha, centres)
    best = int(values.argmin())
    return float(values[best]), centres[:, best]
