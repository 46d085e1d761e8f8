"""What the name of a method stands for: a class, and a choice of options, each of which can be set otherwise.

Without a corrector:

- ``ce``: cross-entropy on the noisy labels as given.
- ``clean``: cross-entropy on the trusted images alone.
- ``ce-clean``: the sum of both: EBOMLC with rho = 1, a corrector that copies, and a multiplier of 1.
- ``ce-mixed``: cross-entropy on all images, of which each counts about once; see mixed.py.
- ``glc``: Gold Loss Correction: a transition matrix estimated on the trusted images; see gold_loss_correction.py.
- ``em``: online EM for the true labels and a transition matrix; see expectation_maximization.py.
- ``ours``: the same with counts that forget faster at first, and two views of each image; see ours.py;
  ``ours-barrier``: in which the dynamic barrier weighs trusted against noisy images; see ours_barrier.py.

With one:

- ``ebomlc``: EBOMLC as printed, in the value-function reading: grad_w Q = grad_w G(w), step from w.
- ``ebomlc-difference``: the reading of its proofs: grad_w Q = grad_w G(w) - grad_w G(w1), step from w.
- ``ebomlc-released``: what the authors' released code computes, with the clean gradient as a gradient (the code
  flips its sign, scales it by the learning rate and adds the momentum buffer to it).
- ``mlc-d``: MLC by plain BOME: rho = 1, no damping, several look-ahead steps on one batch.
- ``mlc``: Meta Label Correction, as in its code; see meta_label_correction.py.
- ``emlc``: Enhanced Meta Label Correction: a teacher with a gate, five lower steps for an upper one;
  ``emlc-one-step``: the same with one; see enhanced_label_correction.py.

Sample weights from trusted images:

- ``l2rw``: Learning to Reweight: new weights for each batch; see learning_to_reweight.py.
- ``mwnet``: Meta-Weight-Net: a network from the loss to the weight; see meta_weight_net.py.
- ``pmwnet``: Probabilistic Meta-Weight-Net: a distribution for each weight; see probabilistic_weight_net.py.

Two networks, no trusted images:

- ``coteaching-plus``: Co-teaching+: each learns what the other finds easy; see co_teaching.py.
- ``dividemix``: DivideMix: images divided into labelled and unlabelled ones by their loss; see divide_mix.py.

``docs/examples/paper_and_code.md`` says what is printed, what the code does, and how these differ from both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from examples.noisy_labels.data.task import Task
    from examples.noisy_labels.recipes.recipe import Recipe
    from examples.noisy_labels.run.settings import Training

# The printed equations, and where they are silent, the choice that changes least.
PRINTED: dict[str, Any] = {
    "delta": 0.25,
    "rho": 0.2,
    "value_gradient": "value_function",
    "step_from": "current",
    "inner_step": "gradient",
    "mixture": "probability",
    "corrector_features": "held",
    "mix_clean": 0.0,
    "corrector": "mlc",
    "buffers": "once",
    "clean_weight": 1.0,
    "inner_steps": 5,
}
EACH_COUNTS_ONCE = PRINTED | {"clean_weight": 0.03}  # about the trusted images' share

RECIPES: dict[str, dict[str, Any]] = {
    "ce": PRINTED,
    "clean": PRINTED,
    "ce-clean": PRINTED,
    "ce-mixed": EACH_COUNTS_ONCE,
    "glc": EACH_COUNTS_ONCE,
    "em": EACH_COUNTS_ONCE,
    "ours": EACH_COUNTS_ONCE,
    "ours-barrier": PRINTED,
    "ebomlc": PRINTED,
    "ebomlc-difference": PRINTED | {"value_gradient": "difference"},
    "ebomlc-released": PRINTED
    | {
        "value_gradient": "difference",
        "step_from": "lookahead",
        "inner_step": "optimizer",
        "mixture": "code",
        "corrector_features": "recomputed",
        "mix_clean": 0.5,
        "corrector": "released",
        "buffers": "every",
        "clean_weight": 1.0,
    },
    "mlc-d": PRINTED | {"delta": 0.5, "rho": 1.0},  # delta is not printed for it; the released code has 0.5
    "mlc": PRINTED | {"rho": 1.0, "inner_steps": 1, "mix_clean": 0.5},
    "emlc": PRINTED,
    "emlc-one-step": PRINTED | {"inner_steps": 1},
    "l2rw": PRINTED,
    "mwnet": PRINTED,
    "pmwnet": PRINTED,
    "coteaching-plus": PRINTED,
    "dividemix": PRINTED,
}

# Module and class, imported when they are asked for; methods that are not here are of `meta_label_correction.py`.
CLASSES = {
    "ce": "supervised.Supervised",
    "clean": "supervised.Supervised",
    "ce-clean": "supervised.Supervised",
    "ce-mixed": "mixed.Mixed",
    "glc": "gold_loss_correction.GoldLossCorrection",
    "em": "expectation_maximization.ExpectationMaximization",
    "ours": "ours.Ours",
    "ours-barrier": "ours_barrier.OursBarrier",
    "emlc": "enhanced_label_correction.EnhancedLabelCorrection",
    "emlc-one-step": "enhanced_label_correction.EnhancedLabelCorrection",
    "l2rw": "learning_to_reweight.LearningToReweight",
    "mwnet": "meta_weight_net.MetaWeightNet",
    "pmwnet": "probabilistic_weight_net.ProbabilisticWeightNet",
    "coteaching-plus": "co_teaching.CoTeachingPlus",
    "dividemix": "divide_mix.DivideMix",
}


def recipe_class(method: str) -> type[Recipe]:
    """Return the class that trains by a method."""
    module, _, name = CLASSES.get(method, "meta_label_correction.MetaLabelCorrection").partition(".")
    found: type[Recipe] = getattr(importlib.import_module(f"examples.noisy_labels.recipes.{module}"), name)
    return found


def build(settings: Training, task: Task) -> Recipe:
    """Build the networks with first weights that depend on the seed alone, and the recipe around them."""
    from examples.noisy_labels.recipes import models  # settings import this file for the names alone

    torch.manual_seed(settings.seed)  # first weights are drawn on the CPU, so they are the same on every device
    classes, device = len(task.names), task.samples.device
    inputs = task.samples[0].numel()
    network = models.classifier(settings.network, classes, inputs)
    corrector = models.corrector(settings.corrector, network.features, classes)

    def second() -> nn.Module:
        return models.classifier(settings.network, classes, inputs).to(device)

    parts: dict[str, Callable[[], Any]] = {
        "corrector": lambda: corrector.to(device),
        "second": second,
        "task": lambda: task,
        "wrong": lambda: task.wrong,
    }
    kind: Any = recipe_class(settings.method)
    recipe: Recipe = kind(settings, network.to(device), *(parts[name]() for name in kind.needs))
    return recipe
