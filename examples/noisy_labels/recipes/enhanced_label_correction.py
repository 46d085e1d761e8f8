"""`emlc`: Enhanced Meta Label Correction (Taraday and Baskin, ICCV 2023, arXiv 2305.12961).

A student f_w is what you want in the end. Its teacher has a network p_a of its own and a gate r_a that sees the
teacher's features and the given label y', embedded in 128 numbers, and says how far y' is to be believed:

    q_a(x', y') = r_a(x', y') onehot(y') + (1 - r_a(x', y')) p_a(x')                    the corrected label
    G(w, a)     = -mean sum_c q_a(x', y')[c] log softmax(f_w(x'))[c]                    on noisy images
    F(w, a)     = META + CE + BCE                                                       on trusted images (12)
      META = mean cross-entropy of the student,  CE = mean cross-entropy of p_a,
      BCE  = mean binary cross-entropy of r_a(x, s) for s = y,  where every second label s is corrupted

Each step takes k SGD steps of the student on G, with a batch each, and then one of the teacher along

    grad_a F(w_k, a) + lr/n sum_tau (1 - lr)^(k-1-tau) sum_i [J_w(log f_w(x_i)) grad_w F]^T J_a(q_a(x_i, y_i))     (11)

at w_tau: :class:`bilevel.EMLC`. k (``--inner-steps``) is 5 as in the paper's runs on CIFAR; in ``emlc-one-step`` it is
1, and the derivative is exact (10). Corruption (``--corruption``): ``random`` labels, uniform over all classes, or
``adversarial`` ones, the wrong class that the teacher finds likeliest; ``none``: no label is corrupted, and no BCE.
Labels are corrected to the largest q; the accuracy is the student's.

Deviations: all starts from random weights, where the paper has one self-supervised network for both sides and trains 15
epochs; network, batch size, rate and schedule are those of all methods here (there ResNet-34 or 50, batch 128, rate
0.02), and the teacher's rate falls with the student's; its SGD has no momentum and no weight decay, as there. Trusted
images are cropped and mirrored, not AutoAugmented. The code turns BCE off for CIFAR, pairs the products of (11) in the
wrong order for k > 1 and divides by k once more; the equations are what is computed here. Whether a label that was
drawn at random and happens to be right counts as corrupted is left open: here it does not. An epoch is as many whole
steps of k batches as it has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes.decoding import blend
from examples.noisy_labels.recipes.models import Perceptron, ResNet
from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.recipes.recipe import Recipe, Scalars, decay, descent
from examples.noisy_labels.run.settings import Training

WIDTH = 128  # of the embedding and of the gate's hidden layer


class Gate(nn.Module):
    """From features and a label to the logit of how far the label is to be believed."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, WIDTH)
        self.layers = nn.Sequential(nn.Linear(features + WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, features: Tensor, given: Tensor) -> Tensor:
        """Return one logit for each image."""
        logits: Tensor = self.layers(torch.cat([features, self.embedding(given)], dim=1))
        return logits.squeeze(1)


class Teacher(nn.Module):
    """A network of its own, and the gate; ``EnhancedLabelCorrection`` puts their answers together."""

    def __init__(self, network: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.network, self.gate = network, Gate(features, classes)


class EnhancedLabelCorrection(Recipe):
    """Student and teacher, moved by `bilevel.EMLC`."""

    needs = ("second", "task")

    def __init__(self, settings: Training, network: nn.Module, second: ResNet | Perceptron, task: Task) -> None:
        self.classes = len(task.names)
        teacher = Teacher(second, second.features, self.classes).to(next(network.parameters()).device)
        self.corruption, self.noisy_batches = settings.corruption, settings.inner_steps
        lower = descent(settings, network)
        upper = torch.optim.SGD(teacher.parameters(), lr=settings.lr)
        self.bilevel = bilevel.EMLC(
            self.upper_loss,
            self.lower_loss,
            upper=teacher,
            lower=network,
            upper_optimizer=upper,
            lower_optimizer=lower,
            inner_steps=settings.inner_steps,
            on_nonfinite=settings.policy(next(network.parameters()).device.type),
        )
        schedules = {"schedule": decay(settings, lower), "teacher_schedule": decay(settings, upper)}
        super().__init__({"classifier": network, "teacher": teacher}, self.bilevel, schedules, settings.amp)
        self.teach = mixed_precision(teacher.network, settings.amp)
        self.believe = mixed_precision(teacher.gate, settings.amp)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        stats = self.bilevel.step(self.corrupted(clean), *self.parts(noisy))
        return {"upper_loss": stats.upper_loss, "lower_loss": stats.lower_loss, **stats.upper_aux}

    def parts(self, noisy: Batch) -> list[Batch]:
        """Return the k batches of the student's steps."""
        parts = zip(*(part.tensor_split(self.noisy_batches) for part in noisy), strict=True)
        return [Batch(*part) for part in parts]

    def corrupted(self, clean: Batch) -> Batch:
        """Corrupt what the gate is told of every second image, at random if that is asked for."""
        if self.corruption != "random":
            return clean
        drawn = torch.randint_like(clean.labels, self.classes)
        return clean._replace(given=torch.where(every_second(clean.labels), drawn, clean.labels))

    def lower_loss(self, noisy: Batch) -> Tensor:
        """Return G."""
        return functional.cross_entropy(self.classify(noisy.inputs)[0], self.correct(noisy.inputs, noisy.labels))

    def upper_loss(self, clean: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return F = META + CE + BCE, and what is logged of it."""
        meta = functional.cross_entropy(self.classify(clean.inputs)[0], clean.labels)
        logits, features = self.teach(clean.inputs)
        supervised = functional.cross_entropy(logits, clean.labels)
        if self.corruption == "none":
            return meta + supervised, {"teacher_loss": supervised}
        given = adversarial(logits, clean.labels) if self.corruption == "adversarial" else clean.given
        belief, right = self.believe(features, given), (given == clean.labels).to(logits.dtype)
        gate = functional.binary_cross_entropy_with_logits(belief, right)
        return meta + supervised + gate, {"teacher_loss": supervised, "gate_loss": gate}

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return q."""
        logits, features = self.teach(inputs)
        return blend(functional.softmax(logits, dim=1), given, self.believe(features, given).sigmoid())


def every_second(labels: Tensor) -> Tensor:
    """Return which items of a batch are corrupted."""
    return torch.arange(len(labels), device=labels.device) % 2 == 1


def adversarial(logits: Tensor, labels: Tensor) -> Tensor:
    """Put the likeliest wrong class in the place of every second label."""
    wrong = logits.detach().scatter(1, labels.unsqueeze(1), -torch.inf).argmax(1)
    return torch.where(every_second(labels), wrong, labels)
