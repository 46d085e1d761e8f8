"""Test accuracies in % that Nguyen and Ta (arXiv 2605.17833) print, to stand beside measured ones.

They are of ResNet-32 after 120 epochs on all images, chosen as the paper does; other presets train much less.
"""

from __future__ import annotations

from examples.noisy_labels.run.settings import Settings

UNIFORM, FLIP = (0.0, 0.2, 0.4, 0.6, 0.8), (0.2, 0.4)
# method and data set: uniform noise of the rates above, then flip noise.
TABLES: dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("ebomlc", "cifar10"): ((92.92, 92.18, 89.58, 83.51, 76.02), (90.74, 90.54)),
    ("mlc", "cifar10"): ((92.76, 89.01, 86.08, 82.08, 74.10), (89.39, 87.12)),
    ("ebomlc", "cifar100"): ((67.13, 62.92, 58.15, 50.04, 35.41), (64.86, 58.11)),
}


def accuracy(settings: Settings) -> float | None:
    """Return the published accuracy of a method in a setting, or None where there is none."""
    if settings.noise not in ("uniform", "flip") or settings.exclude_true:
        return None
    uniform, flip = TABLES.get((settings.method, settings.dataset), ((), ()))
    rates, values = (UNIFORM, uniform) if settings.noise == "uniform" else (FLIP, flip)
    return dict(zip(rates, values, strict=False)).get(settings.rate)
