"""Every method takes steps, with an installed bilevel and nothing but torch: ``python -W error tests/one_step.py``."""

import bilevel  # before torch, which says that numpy is missing: bilevel lets that pass

# isort: split
import torch
from torch import nn


def loss_after_three_steps(method):
    """Move a model and the weights of its samples, save, load, and move again."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    weigh, model = nn.Linear(1, 1), nn.Linear(3, 2)

    def each():
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    optimizer = method(
        lambda: each()[:4].mean(),
        lambda: (torch.sigmoid(weigh(x[4:, :1])).squeeze(1) * each()[4:]).mean(),
        upper=weigh,
        lower=model,
        upper_optimizer=torch.optim.Adam(weigh.parameters()),
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    for _ in range(3):
        stats = optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.apply(optimizer.directions())
    return stats.as_dict()["upper_loss"]


for method in (
    bilevel.BOME,
    bilevel.EBOMLC,
    bilevel.Unrolled,
    bilevel.EMLC,
    bilevel.MLC,
    bilevel.Implicit,
    bilevel.FiniteDifference,
    bilevel.SAMA,
):
    print(method.__name__, loss_after_three_steps(method) > 0)
