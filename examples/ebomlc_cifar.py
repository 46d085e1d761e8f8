"""EBOMLC on CIFAR-10 with noisy labels, in one file to read and to copy. It needs torch, numpy, tqdm and bilevel.

    python examples/ebomlc_cifar.py FOLDER

FOLDER holds cifar-10-batches-bin, the binary archive of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked. The
protocol is that of Nguyen and Ta (arXiv 2605.17833): 98 % of the training images get noisy labels, 2 % are trusted; a
classifier is trained on labels that a corrector makes of the noisy ones, and the corrector by what that does to the
classifier. About an hour on a GPU. The first steps give the numbers of the whole program at the same seed,
`examples/noisy_labels/cifar.py --preset paper`, which also keeps logs, goes on where it was stopped and compares
methods; a test holds the two together.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import bilevel

CLASSES, SEED = 10, 1
NOISE, RATE = "uniform", 0.4  # or "flip": each class is mistaken for one other
TRUSTED = 0.02  # share of the training images
EPOCHS, MILESTONES, BATCH = 120, (80, 100), 100
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4  # of the classifier's SGD
META_LEARNING_RATE = 3e-4  # of the corrector's Adam
DELTA, XI, RHO = 0.25, 0.5, 0.2  # strength of the barrier, damping of the multiplier, mixture in (9)
BLOCKS, WIDTH, EMBEDDING, PADDING = 5, 16, 128, 4  # five blocks a stage are ResNet-32
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)

Batch = tuple[Tensor, Tensor]  # images and labels


# --- images, split and noise ------------------------------------------------------------------------------------------


def stream(purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a random stream of its own for each purpose, so that one more draw here moves nothing there."""
    digest = hashlib.sha256(f"{SEED}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def read(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pixels and labels of the training images, and of the test images."""
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"

    def records(files: list[Path]) -> tuple[Tensor, Tensor]:
        rows = np.concatenate([np.fromfile(file, dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32) for file in files])
        pixels = torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32))
        return pixels, torch.from_numpy(rows[:, 0].astype(np.int64))

    training = sorted(folder.glob("data_batch_*.bin"))
    if not training:
        sys.exit(f"{folder}: holds no data_batch_1.bin. Name the folder with cifar-10-batches-bin, unpacked.")
    return *records(training), *records([folder / "test_batch.bin"])


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Deal the images into trusted and noisy ones: as many trusted ones of each class, and none in both."""
    source, trusted, noisy = stream("split"), [], []
    number = max(1, round(TRUSTED * len(labels) / CLASSES))
    for one in range(CLASSES):
        members = (labels == one).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=source)]
        trusted.append(members[:number])
        noisy.append(members[number:])
    return torch.cat(trusted).sort().values, torch.cat(noisy).sort().values


def transition() -> Tensor:
    """Return T[i, j], the probability that class i is given the label j."""
    if NOISE == "uniform":  # drawn anew from all classes, the true one included: 36 % wrong at rate 0.4
        return (1 - RATE) * torch.eye(CLASSES, dtype=torch.float64) + RATE / CLASSES
    source = np.random.RandomState(1)  # the published map of flips is this generator's
    matrix = (1 - RATE) * torch.eye(CLASSES, dtype=torch.float64)
    for i in range(CLASSES):
        matrix[i, int(source.choice([j for j in range(CLASSES) if j != i]))] += RATE
    return matrix


def corrupt(labels: Tensor) -> Tensor:
    """Draw a given label for each true one."""
    cumulative = transition().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    draws = torch.rand(len(labels), 1, dtype=torch.float64, generator=stream("noise"))
    return (cumulative[labels] <= draws).sum(1)


def inputs(pixels: Tensor) -> Tensor:
    """Normalise pixels."""
    mean, std = (torch.tensor(one, device=pixels.device).view(1, -1, 1, 1) for one in (MEAN, STD))
    return (pixels.to(memory_format=torch.channels_last).float() - mean) / std


def crop_and_flip(pixels: Tensor, source: torch.Generator) -> Tensor:
    """Move each image by up to four pixels each way, reflecting at the border, and mirror half of them."""
    batch, device, size = len(pixels), pixels.device, pixels.shape[-1]
    shift = torch.randint(-PADDING, PADDING + 1, (2, batch, 1), device=device, generator=source)
    mirrored = torch.randint(0, 2, (batch, 1), device=device, generator=source).bool()
    rows, columns = shift[0] + torch.arange(size, device=device), shift[1] + torch.arange(size, device=device)
    rows, columns = (size - 1 - (size - 1 - one.abs()).abs() for one in (rows, columns))
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(batch, device=device)[:, None, None]
    return pixels[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(pixels: Tensor, labels: Tensor, purpose: str) -> Iterator[Batch]:
    """Return augmented batches without end; each pass is in an order of its own and drops what fills no batch."""
    source, size = stream(purpose, pixels.device), min(BATCH, len(labels))
    while True:
        order = torch.randperm(len(labels), device=pixels.device, generator=source)
        for chosen in order.split(size)[: len(labels) // size]:
            yield inputs(crop_and_flip(pixels[chosen], source)), labels[chosen]


# --- the two networks -------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut without parameters: subsampled, padded with zero channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.stride, self.new = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(x)))
        hidden = self.second_norm(self.second(hidden))
        before = self.new // 2
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new - before))
        return functional.relu(hidden + shortcut)


class ResNet(nn.Module):
    """ResNet-32 for small images; returns logits and the features that the last layer and the corrector read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, 1, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(WIDTH)
        stages: list[nn.Module] = []
        channels_in = WIDTH
        for channels, stride in ((WIDTH, 1), (2 * WIDTH, 2), (4 * WIDTH, 2)):
            for block in range(BLOCKS):
                stages.append(ResidualBlock(channels_in, channels, stride if block == 0 else 1))
                channels_in = channels
        self.stages = nn.Sequential(*stages)
        self.features = 4 * WIDTH
        self.head = nn.Linear(self.features, CLASSES)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.relu(self.stem_norm(self.stem(x)))
        features = self.stages(hidden).mean((2, 3))
        return self.head(features), features


class Corrector(nn.Module):
    """From an image's features and its given label to a distribution over its true label."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, EMBEDDING)
        self.layers = nn.Sequential(
            nn.Linear(features + EMBEDDING, EMBEDDING),
            nn.Tanh(),
            nn.Linear(EMBEDDING, EMBEDDING),
            nn.Tanh(),
            nn.Linear(EMBEDDING, CLASSES),
        )
        nn.init.xavier_uniform_(self.embedding.weight)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, given: Tensor) -> Tensor:
        logits: Tensor = self.layers(torch.cat([features, self.embedding(given)], dim=1))
        return logits.softmax(dim=1)


# --- the bilevel problem ----------------------------------------------------------------------------------------------


class LabelCorrection:
    """Classifier f with weights w, corrector g with weights alpha, and what moves them; y' is a noisy label.

    upper, on trusted images:  F = -mean log( rho softmax(f_w(x))[y] + (1 - rho) g_alpha(h(x), y)[y] )     (9)
    lower, on noisy images:    G = -mean sum_c g_alpha(h(x'), y')[c] log softmax(f_w(x'))[c]
    """

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(SEED)
        self.classifier = ResNet()
        self.corrector = Corrector(self.classifier.features).to(device)
        self.classifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        lower = torch.optim.SGD(
            self.classifier.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.optimizer = bilevel.EBOMLC(
            self.upper_loss,
            self.lower_loss,
            upper=self.corrector,
            lower=self.classifier,
            upper_optimizer=torch.optim.Adam(self.corrector.parameters(), lr=META_LEARNING_RATE, amsgrad=True),
            lower_optimizer=lower,
            delta=DELTA,
            xi=XI,
        )
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(lower, list(MILESTONES), gamma=0.1)

    def upper_loss(self, trusted: Batch) -> Tensor:
        """Return F, equation (9): classifier or corrector must find the right class."""
        x, y = trusted
        logits, features = self.classifier(x)
        p, g = logits.softmax(dim=1), self.corrector(features.detach(), y)
        mixed = RHO * p.gather(1, y.unsqueeze(1)) + (1 - RHO) * g.gather(1, y.unsqueeze(1))
        loss: Tensor = -mixed.clamp_min(1e-12).log().mean()
        return loss

    def lower_loss(self, noisy: Batch) -> Tensor:
        """Return G: the classifier learns the corrected labels, which are differentiable in the corrector."""
        x, given = noisy
        logits, features = self.classifier(x)
        seen = bilevel.hold(features.detach())  # the look-ahead must not change what the corrector sees
        return functional.cross_entropy(logits, self.corrector(seen, given))


@torch.no_grad()
def evaluate(problem: LabelCorrection, pixels: Tensor, given: Tensor | None = None) -> Tensor:
    """Return the classifier's classes, or with given labels the corrector's."""
    problem.classifier.eval()
    answers = []
    for index in torch.arange(len(pixels), device=pixels.device).split(500):
        logits, features = problem.classifier(inputs(pixels[index]))
        answers.append((logits if given is None else problem.corrector(features, given[index])).argmax(1))
    problem.classifier.train()
    return torch.cat(answers)


def main() -> None:
    """Train, and print how it went."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, labels, test_pixels, test_labels = (one.to(device) for one in read(Path(sys.argv[1])))
    trusted, noisy = (one.to(device) for one in split(labels.cpu()))
    true = labels[noisy]
    given = corrupt(true.cpu()).to(device)
    problem = LabelCorrection(device)
    trusted_batches = batches(pixels[trusted], labels[trusted], "clean batches")
    noisy_batches = batches(pixels[noisy], given, "noisy batches")
    for epoch in range(EPOCHS):
        for _ in tqdm(range(len(noisy) // BATCH), desc=f"epoch {epoch + 1}/{EPOCHS}", leave=False):
            stats = problem.optimizer.step(next(trusted_batches), next(noisy_batches))
        problem.schedule.step()
        accuracy = (evaluate(problem, test_pixels) == test_labels).double().mean().item()
        tqdm.write(f"epoch {epoch + 1}: test accuracy {100 * accuracy:.1f} %, losses {stats.upper_loss:.3f} "
                   f"(trusted) and {stats.lower_loss:.3f} (noisy), multiplier {stats.multiplier:.2f}")  # fmt: skip
    before, corrected = given == true, evaluate(problem, pixels[noisy], given) == true
    print(
        f"ebomlc on CIFAR-10, {NOISE} {100 * RATE:g} %, seed {SEED}: test accuracy {100 * accuracy:.1f} %, "
        f"labels right {100 * before.double().mean():.1f} % before and {100 * corrected.double().mean():.1f} % after; "
        f"recovered {100 * corrected[~before].double().mean():.1f} %, "
        f"broken {100 * (~corrected[before]).double().mean():.1f} %"
    )


if __name__ == "__main__":
    main()
