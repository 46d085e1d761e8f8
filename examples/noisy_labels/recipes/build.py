"""The methods at work: what each one trains, on which images, and how it moves.

`methods.py` says what the names mean. A recipe is all that the training loop knows of a method; a new one is a set of
options there, or a class or a case in `build`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from examples.noisy_labels.data import noise
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.pools import Task
from examples.noisy_labels.recipes import meta_label_correction, models
from examples.noisy_labels.recipes.co_teaching import CoTeachingPlus
from examples.noisy_labels.recipes.divide_mix import DivideMix
from examples.noisy_labels.recipes.enhanced_label_correction import EnhancedLabelCorrection, Teacher
from examples.noisy_labels.recipes.expectation_maximization import ExpectationMaximization
from examples.noisy_labels.recipes.gold_loss_correction import GoldLossCorrection
from examples.noisy_labels.recipes.label_correction import LabelCorrection, split
from examples.noisy_labels.recipes.learning_to_reweight import LearningToReweight
from examples.noisy_labels.recipes.meta_weight_net import MetaWeightNet
from examples.noisy_labels.recipes.mixed import Mixed
from examples.noisy_labels.recipes.ours import Ours
from examples.noisy_labels.recipes.ours_barrier import OursBarrier
from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.recipes.probabilistic_weight_net import ProbabilisticWeightNet
from examples.noisy_labels.recipes.recipe import Recipe, Scalars, decay, descent
from examples.noisy_labels.recipes.released_sign import UpdateForGradient
from examples.noisy_labels.run.settings import Settings

NUMBERS = ("upper_loss", "lower_loss", "multiplier", "constraint")  # of a bilevel step, as far as the method has them


class Supervised(Recipe):
    """Ordinary training of the classifier on the noisy images, on the clean ones, or on both."""

    def __init__(self, settings: Settings, network: nn.Module, *, noisy: bool, clean: bool) -> None:
        self.noisy, self.clean, self.clean_weight = noisy, clean, settings.clean_weight
        self.transition_from = "likelihood" if clean else "trusted"
        self.descent = descent(settings, network)
        super().__init__(
            {"classifier": network}, self.descent, {"schedule": decay(settings, self.descent)}, settings.amp
        )

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        losses = {}
        if self.clean:
            losses["upper_loss"] = functional.cross_entropy(self.classify(clean.inputs)[0], clean.labels)
        if self.noisy:
            losses["lower_loss"] = functional.cross_entropy(self.classify(noisy.inputs)[0], noisy.labels)
        weights = {"upper_loss": self.clean_weight if self.noisy else 1.0, "lower_loss": 1.0}
        self.descent.zero_grad()
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        self.descent.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return the classifier's own opinion: these methods have no corrector and forget the given label."""
        return self.predict(inputs)


class MetaLabelCorrection(Recipe):
    """A classifier and a corrector, moved together by a bilevel optimizer."""

    def __init__(self, settings: Settings, network: nn.Module, corrector: nn.Module) -> None:
        lower = descent(settings, network)
        upper = torch.optim.Adam(corrector.parameters(), lr=settings.meta_lr, amsgrad=True)
        self.mix_clean = settings.mix_clean
        self.bilevel = bilevel_optimizer(settings, network, corrector, upper, lower)
        schedules = {"schedule": decay(settings, lower)}
        if settings.meta_decay:
            schedules["meta_schedule"] = decay(settings, upper)
        networks = {"classifier": network, "corrector": corrector}
        super().__init__(networks, self.bilevel, schedules, settings.amp)
        self.corrected = mixed_precision(corrector, settings.amp)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        upper, joining = split(clean, self.mix_clean)
        stats = self.bilevel.step(upper, (noisy, joining))
        return {name: getattr(stats, name) for name in NUMBERS if hasattr(stats, name)}

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        probabilities: Tensor = self.corrected(self.classify(inputs)[1], given)
        return probabilities


def build(settings: Settings, classes: int, device: torch.device, task: Task | None = None) -> Recipe:
    """Build the networks with first weights that depend on the seed alone, and the recipe around them.

    Args:
        settings: Options.
        classes: Number of labels.
        device: Where the networks shall be.
        task: The images; only some methods ask for them.
    """
    torch.manual_seed(settings.seed)  # first weights are drawn on the CPU, so they are the same on every device
    network = models.classifier(settings.network, classes)
    corrector = models.corrector(settings.corrector, network.features, classes)
    network, corrector = network.to(device), corrector.to(device)
    match settings.method:
        case "ce":
            return Supervised(settings, network, noisy=True, clean=False)
        case "clean":
            return Supervised(settings, network, noisy=False, clean=True)
        case "ce-clean":
            return Supervised(settings, network, noisy=True, clean=True)
        case "ce-mixed":
            return Mixed(settings, network)
        case "em" | "ours" | "ours-barrier" | "glc" | "coteaching-plus" | "dividemix":
            if task is None:
                raise ValueError(f"build(task=None): {settings.method} has to know the images. Hand it the task.")
            if settings.method == "em":
                return ExpectationMaximization(settings, network, classes, len(task.noisy))
            if settings.method == "ours":
                return Ours(settings, network, classes, len(task.noisy))
            if settings.method == "ours-barrier":
                return OursBarrier(settings, network, classes, len(task.noisy))
            if settings.method == "glc":
                return GoldLossCorrection(settings, network, task)
            second = models.classifier(settings.network, classes).to(device)
            if settings.method == "dividemix":
                return DivideMix(settings, network, second, task)
            return CoTeachingPlus(settings, network, second, noise.realised_rate(task.true, task.given))
        case "emlc" | "emlc-one-step":
            teacher = Teacher(models.classifier(settings.network, classes), network.features, classes).to(device)
            return EnhancedLabelCorrection(settings, network, teacher)
        case "l2rw":
            return LearningToReweight(settings, network)
        case "mwnet":
            return MetaWeightNet(settings, network)
        case "pmwnet":
            return ProbabilisticWeightNet(settings, network)
    return MetaLabelCorrection(settings, network, corrector)


def bilevel_optimizer(
    settings: Settings,
    network: nn.Module,
    corrector: nn.Module,
    upper: torch.optim.Optimizer,
    lower: torch.optim.SGD,
) -> bilevel.BOME | bilevel.EBOMLC | bilevel.MLC:
    """Wrap the two losses and the two torch optimizers in the bilevel method that the settings name."""
    losses = LabelCorrection(
        mixed_precision(network, settings.amp),
        mixed_precision(corrector, settings.amp),
        rho=settings.rho,
        mixture=settings.mixture,
        features=settings.features,
    )

    upper_loss: Callable[[Batch], Tensor] = losses.upper_loss
    if settings.clean_gradient == "released":
        upper_loss = UpdateForGradient(losses, network, lower)

    def lower_loss(parts: tuple[Batch, Batch | None]) -> Tensor:
        return losses.lower_loss(*parts)

    common: dict[str, Any] = {
        "upper": corrector,
        "lower": network,
        "upper_optimizer": upper,
        "lower_optimizer": lower,
        "upper_buffers": settings.buffers,
        "lower_buffers": settings.buffers,
        "on_nonfinite": settings.policy(next(network.parameters()).device.type),
    }
    if settings.method == "mlc":
        return meta_label_correction.optimizer(upper_loss, lower_loss, inner_steps=settings.inner_steps, **common)
    options = common | {
        "value_gradient": settings.value_gradient,
        "step_from": settings.step_from,
        "inner_step": settings.inner_step,
        "multiplier_max": settings.multiplier_max,
    }
    if settings.method == "mlc-d":
        barrier = bilevel.barrier.GradientNorm(settings.delta)
        return bilevel.BOME(upper_loss, lower_loss, inner_steps=settings.inner_steps, barrier=barrier, **options)
    return bilevel.EBOMLC(upper_loss, lower_loss, delta=settings.delta, xi=settings.xi, **options)
