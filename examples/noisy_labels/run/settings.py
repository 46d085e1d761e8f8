"""Everything that decides a run: one table of options, from which the command line and the saved configuration come.

`Training` is what both programs share, whatever is trained on; `Settings` adds CIFAR, the digits and their noise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from examples.noisy_labels.data.human_labels import COLUMNS
from examples.noisy_labels.data.noise import PROTOCOLS
from examples.noisy_labels.recipes.methods import PRINTED, RECIPES
from examples.noisy_labels.recipes.mixtures import MIXTURES
from examples.noisy_labels.recipes.precision import CHOICES
from examples.noisy_labels.run.declaration import LARGEST_SEED, check, option, plain, written
from examples.noisy_labels.run.files import replacing

METHODS = tuple(RECIPES)
DATASETS = ("cifar10", "cifar100", "digits")
NOISE_OF_ONE_DATASET = {
    "asymmetric": ("cifar10", "cifar100"),
    "hierarchical": ("cifar100",),
    "human": ("cifar10", "cifar100"),
}
NETWORKS = ("resnet32", "small", "mlp")


def by_method(name: str, description: str, choices: tuple[str, ...] | None = None, **kind: Any) -> Any:
    """Declare a field that the method decides unless it is set; `Training` fills it in."""
    return option(None, f"{description} [{PRINTED[name]}]", choices, **kind)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The options of training, which both programs share."""

    headings: ClassVar[dict[str, str]] = {  # first option of a group: its title in --help
        "method": "method, network and training",
        "delta": "losses and bilevel step (defaults: those of ebomlc; other methods have their own)",
        "seed": "device and log",
    }
    free_on_resume: ClassVar[set[str]] = {"device", "log_interval", "on_nonfinite", "tensorboard"}  # no number's matter
    checkpoints: ClassVar[int] = 1000  # at most so many, and as many lines of progress, evenly over the epochs

    method: str = option("ebomlc", "what is trained; see methods.py", METHODS)
    network: str = option("resnet32", "classifier", NETWORKS)
    augment: bool = option(True, "random crops and mirror images", kind=bool)
    batch_size: int = option(100, "samples per batch, of the noisy and of the clean set", kind=int, within="[1, inf)")
    epochs: int = option(
        120, "passes over the noisy set; every method takes the same number of steps", kind=int, within="[1, inf)"
    )
    milestones: tuple[int, ...] | None = option(
        None,
        "epochs after which the learning rate is divided by 10 [2/3 and 5/6 of the epochs]",
        kind=tuple,
        within="[1, inf)",
        items=int,
    )
    lr: float = option(0.1, "learning rate of the classifier's SGD", kind=float, within="(0, inf)")
    momentum: float = option(0.9, "momentum of the classifier's SGD", kind=float, within="[0, 1)")
    weight_decay: float = option(5e-4, "weight decay of the classifier's SGD", kind=float, within="[0, inf)")
    meta_lr: float = option(3e-4, "learning rate of the corrector's Adam", kind=float, within="(0, inf)")
    delta: float = by_method("delta", "strength of the barrier", kind=float, within="[0, inf)")
    xi: float = option(0.5, "damping of the multiplier (ebomlc)", kind=float, within="[0, inf)")
    rho: float = by_method(
        "rho", "weight of the classifier in the mixture on clean samples", kind=float, within="[0, 1]"
    )
    mixture: str = by_method("mixture", "what rho mixes; see mixtures.py", tuple(MIXTURES))
    corrupt_clean: float = option(
        0.0,
        "share of random labels told to the corrector, for clean samples whose mistaken label is not known",
        kind=float,
        within="[0, 1]",
    )
    mix_clean: float = by_method(
        "mix_clean",
        "share of each clean batch that joins the lower loss instead of the upper",
        kind=float,
        within="[0, 1)",
    )
    value_gradient: str = by_method(
        "value_gradient", "how Q is differentiated in w", ("value_function", "difference", "unrolled")
    )
    step_from: str = by_method(
        "step_from", "where the step on w starts: at w or at the look-ahead", ("current", "lookahead")
    )
    inner_step: str = by_method(
        "inner_step", "look-ahead: a gradient step, or SGD's with momentum and weight decay", ("gradient", "optimizer")
    )
    inner_steps: int = by_method(
        "inner_steps",
        "look-ahead steps (mlc-d; ebomlc takes one); lower steps for an upper one (mlc, emlc)",
        kind=int,
        within="[1, inf)",
    )
    corruption: str = option(
        "random", "of every second trusted label that the gate is told (emlc)", ("none", "random", "adversarial")
    )
    multiplier_max: float | None = option(None, "largest multiplier, before xi [none]", kind=float, within="[0, inf)")
    clean_gradient: str = option(
        "gradient",
        "released: the defect of ebomlc's code, to see what it does; see released_sign.py",
        ("gradient", "released"),
    )
    corrector_features: str = by_method(
        "corrector_features",
        "what the corrector sees at the look-ahead: features from before, or new",
        ("held", "recomputed"),
    )
    corrector: str = by_method("corrector", "network that corrects; see models.py", ("mlc", "released"))
    meta_decay: bool = option(False, "the corrector's learning rate falls with the classifier's", kind=bool)
    buffers: str = by_method(
        "buffers", "when BatchNorm's averages move: once a step, or in every evaluation", ("once", "every")
    )
    clean_weight: float = by_method(
        "clean_weight",
        "weight of the trusted samples' loss (ce-clean, ce-mixed, glc, em, ours)",
        kind=float,
        within="[0, inf)",
    )
    memory: float = option(
        0.1, "share of the samples seen so far that the counts of T remember (ours)", kind=float, within="(0, 1]"
    )
    seed: int = option(
        1, "decides parts, noise, first weights, order and crops", kind=int, within=f"[0, {LARGEST_SEED}]"
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes CUDA if there is one")
    amp: str = option("off", "precision inside the networks; losses and weights stay float32", CHOICES)
    channels_last: bool = option(True, "images and weights of a convolution network in channels-last order", kind=bool)
    tf32: bool = option(True, "CUDA multiplies float32 with TF32's 10 bits of mantissa", kind=bool)
    deterministic: bool = option(
        True, "CUDA kernels that repeat bit for bit; off: cuDNN tries which is fastest", kind=bool
    )
    on_nonfinite: str = option(
        "auto",
        "NaN in a bilevel step: raise at once, or ignore until the next log record [raise on CPU]",
        ("auto", "raise", "ignore"),
    )
    tensorboard: bool = option(False, "write the log's numbers for TensorBoard too", kind=bool)
    log_interval: int = option(50, "steps between two step records in the log", kind=int, within="[1, inf)")

    def __post_init__(self) -> None:
        for name, value in RECIPES.get(str(self.method), PRINTED).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the class is frozen for everyone else
        check(self)
        chosen = list(self.milestones or ())
        if chosen and (chosen != sorted(set(chosen)) or (self.epochs and chosen[-1] > self.epochs)):
            rule = f"must rise, and none be behind the last of {self.epochs} epochs"
            raise ValueError(f"{written('milestones', self.milestones)}: {rule}.")

    @property
    def title(self) -> str:
        """Return what is trained on in a few words, without the method and the seed."""
        raise NotImplementedError

    @property
    def folder_name(self) -> str:
        """Return a folder name that tells runs of different methods, settings and seeds apart."""
        raise NotImplementedError

    @property
    def decay_epochs(self) -> list[int]:
        """Return the epochs after which the learning rate is divided by 10: of 120 epochs, the published 80 and 100."""
        return list(self.milestones or (2 * self.epochs // 3, 5 * self.epochs // 6))

    def policy(self, device: str) -> Literal["raise", "ignore"]:
        """Return what a bilevel step does about NaN and infinity on a kind of device.

        Asking costs nothing on the CPU. An accelerator would have to be waited for, once a step, so there the training
        loop looks at the log interval and before each checkpoint.
        """
        if self.on_nonfinite == "auto":
            return "raise" if device == "cpu" else "ignore"
        return "raise" if self.on_nonfinite == "raise" else "ignore"

    @property
    def memory_format(self) -> torch.memory_format:
        """Return the order in which images and weights lie in memory."""
        convolutions = self.network != "mlp"
        return torch.channels_last if self.channels_last and convolutions else torch.contiguous_format

    def save(self, file: Path) -> None:
        """Write the configuration as JSON, one option a line."""
        with replacing(file) as stream:
            stream.write((json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    def decisive(self, also_free: Iterable[str] = ()) -> dict[str, Any]:
        """Return the options on which the numbers of a run depend."""
        free = {*self.free_on_resume, *also_free}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """The resolved configuration of a run on CIFAR or the digits. It can be repeated from that alone."""

    headings: ClassVar[dict[str, str]] = Training.headings | {"dataset": "images and labels"}
    free_on_resume: ClassVar[set[str]] = Training.free_on_resume | {"data"}

    dataset: str = option("cifar10", "which images; digits come with scikit-learn", DATASETS)
    data: str | None = option(None, "folder of the unpacked archive [$BILEVEL_DATA, then ./data]")
    noise: str = option(
        "uniform", "how labels are corrupted; see noise.py", (*PROTOCOLS, "instance", "human", "matrix")
    )
    transition: str | None = option(None, "CSV file with a row of label probabilities for each class (matrix noise)")
    human_column: str = option("worse", "which labels of CIFAR-N (human noise)", tuple(COLUMNS))
    rate: float = option(0.4, "noise rate", kind=float, within="[0, 1]")
    exclude_true: bool = option(False, "uniform noise never draws the true class", kind=bool)
    clean_fraction: float = option(
        0.02, "share of the training images whose labels are trusted", kind=float, within="(0, 1)"
    )
    train_images: int | None = option(
        None, "use a balanced subset of so many training images", kind=int, within="[1, inf)"
    )
    test_images: int | None = option(None, "use the first test images only", kind=int, within="[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exclude_true and self.noise != "uniform":
            rule = f"{self.noise} noise never draws the true class. Use it with uniform."
            raise ValueError(f"--exclude-true: {rule}")
        if (self.noise == "matrix") != (self.transition is not None):
            rule = "goes together with --noise matrix, which needs it. Give both or neither."
            raise ValueError(f"{written('transition', self.transition)}: {rule}")
        if self.dataset not in NOISE_OF_ONE_DATASET.get(self.noise, DATASETS):
            made_for = " and ".join(NOISE_OF_ONE_DATASET[self.noise])
            rule = f"exists for {made_for} only. Use flip or pairflip."
            raise ValueError(f"--noise {self.noise}: {rule}")
        if self.noise == "human" and (self.human_column == "noisy") != (self.dataset == "cifar100"):
            rule = "CIFAR-100N has the one column noisy, and CIFAR-10N has all the others"
            raise ValueError(f"--human-column {self.human_column}: {rule}.")
        if self.train_images is not None and self.train_images < 2 * self.classes:
            rule = f"must be at least {2 * self.classes}: a trusted and a noisy one of each of {self.classes} classes"
            raise ValueError(f"--train-images {self.train_images}: {rule}.")

    def refuse_misfit(self) -> None:
        """Refuse a network that cannot read the images."""
        if (self.network == "mlp") != (self.dataset == "digits"):
            rule = f"does not fit {self.dataset}. The digits have 8 x 8 pixels and take mlp, CIFAR takes the others"
            raise ValueError(f"--network {self.network}: {rule}.")

    @property
    def classes(self) -> int:
        """Return the number of labels."""
        return 100 if self.dataset == "cifar100" else 10

    @property
    def title(self) -> str:
        """Return the setting in a few words, without the method and the seed."""
        if self.noise == "human":
            return f"{self.dataset} human labels ({self.human_column})"
        if self.transition is not None:
            return f"{self.dataset} noise of {Path(self.transition).name}"
        kind = "uniform, true class excluded," if self.exclude_true else self.noise
        return f"{self.dataset} {kind} {100 * self.rate:g} %"

    @property
    def folder_name(self) -> str:
        """Return a folder name that tells runs of different methods, settings and seeds apart."""
        kind = f"{self.noise}{'-excluded' if self.exclude_true else ''}{self.rate:g}"
        kind = f"human-{self.human_column}" if self.noise == "human" else kind
        kind = kind if self.transition is None else f"matrix-{Path(self.transition).stem}"
        return f"{self.dataset}-{kind}-{self.method}-seed{self.seed}"


def from_dict(values: dict[str, Any]) -> Settings:
    """Build settings from what JSON gives back: lists become tuples, unknown names are refused."""
    return Settings(**plain(Settings, values))


def without_method(saved: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a saved configuration what its method alone decided, so that another method decides anew.

    What presets set stays: it was decided for all methods.
    """
    recipe, shared = RECIPES.get(saved.get("method", ""), {}), set().union(*PRESETS.values())
    return {name: one for name, one in saved.items() if name in shared or name not in recipe or one != recipe[name]}


# paper: the published protocol. quick: two to four minutes on one CPU core; medium: all images, a quarter of an hour or
# more. In so few steps the paper's constants, by which the noisy images weigh delta * xi = 0.125, leave the classifier
# half trained, so both let them weigh 1.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {"network": "small", "train_images": 5000, "test_images": 2000, "epochs": 30, "delta": 1.0, "xi": 1.0},
    "medium": {"network": "small", "epochs": 30, "delta": 1.0, "xi": 1.0},
    "digits": {
        "network": "mlp",
        "noise": "flip",
        "clean_fraction": 0.04,  # 5 trusted images of each digit
        "augment": False,
        "meta_lr": 3e-3,
        "delta": 1.0,
        "xi": 1.0,
    },
}

# Each method's best pair on the development seeds of select_demo.py, so that none is compared at another's optimum.
DIGITS_BY_METHOD: dict[str, dict[str, Any]] = {
    "ce": {"lr": 0.3, "epochs": 10},
    "clean": {"lr": 0.01, "epochs": 30},
    "ce-clean": {"lr": 0.1, "epochs": 5},
    "ebomlc": {"lr": 0.1, "epochs": 30},
}
# With the preset's meta_lr, chosen for ebomlc, the corrector of mlc runs away before the classifier has learned much.
DIGITS_META_LR = {"mlc": 3e-4}  # as published


def preset(name: str, dataset: str, method: str) -> dict[str, Any]:
    """Return the options that a preset sets. The digits have one of their own, whatever the name."""
    if dataset != "digits":
        return PRESETS[name]
    chosen = PRESETS["digits"] | DIGITS_BY_METHOD.get(method, DIGITS_BY_METHOD["ebomlc"])
    return chosen | ({"meta_lr": DIGITS_META_LR[method]} if method in DIGITS_META_LR else {})
