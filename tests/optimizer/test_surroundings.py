"""Steps where programs take them: in threads, beside a forked data loader, inside and around compiled code."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from bilevel import ClosureError
from methods_table import CASES

Batch = tuple[Tensor, Tensor]
FIRST_ORDER = ["bome-3", "ebomlc", "finite-difference", "sama", "vpbgd", "f2sa-2", "bvfsm", "pdbo", "meha", "bsg1"]
PRODUCTS = ["emlc-2", "mlc"]  # forward mode, which goes through compiled code


class Scene:
    """A perceptron, compiled or not, and a corrector."""

    def __init__(self, name: str, *, backend: str | None = None, of: str = "model", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.corrector = nn.Linear(3, 3)
        for x in (*self.model.parameters(), *self.corrector.parameters()):
            x.data = torch.randn(x.shape, generator=generator) / 3
        self.called: Any = torch.compile(self.model, backend=backend) if backend and of == "model" else self.model
        losses = [self.upper_loss, self.lower_loss]
        if backend and of == "losses":
            losses = [torch.compile(loss, backend=backend) for loss in losses]
        case = CASES[name]
        self.steps = case.inner_steps
        self.optimizer: Any = case.method(
            *losses,
            upper=self.corrector,
            lower=self.model,
            upper_optimizer=torch.optim.SGD(self.corrector.parameters(), lr=0.1),
            lower_optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9),
            **case.options,
        )
        self.batches = [
            (torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(2)
        ]

    def upper_loss(self, batch: Batch) -> Tensor:
        x, label = batch
        return cross_entropy(self.called(x), label)

    def lower_loss(self, batch: Batch) -> Tensor:
        x, label = batch
        return cross_entropy(self.called(x), self.corrector(one_hot(label, 3).float()).softmax(1))

    def trained(self, count: int = 3) -> list[Tensor]:
        for _ in range(count):
            self.optimizer.step(*self.batches)
        return self.parameters()

    def parameters(self) -> list[Tensor]:
        return [x.detach().clone() for x in (*self.model.parameters(), *self.corrector.parameters())]


@pytest.mark.thorough
@pytest.mark.parametrize("name", [*FIRST_ORDER, *PRODUCTS])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("of", ["model", "losses"])
def test_a_compiled_model_gives_the_numbers_of_the_model(name: str, backend: str, of: str) -> None:
    torch.compiler.reset()
    if name in PRODUCTS and (backend, of) == ("aot_eager", "losses"):
        # Its autograd function has neither a second derivative nor a forward-mode rule: said by name.
        with pytest.raises(ClosureError, match="calls a compiled function"):
            Scene(name, backend=backend, of=of).trained()
        return
    compiled = Scene(name, backend=backend, of=of).trained()
    # The same operations, up to those that a compiler decomposes: a few units of float32.
    torch.testing.assert_close(compiled, Scene(name).trained(), rtol=1e-5, atol=1e-6)


def test_a_compiled_closure_that_may_not_break_is_told_why() -> None:
    scene = Scene("ebomlc")

    def epoch(clean: Batch, noisy: Batch) -> Tensor:
        return scene.optimizer.step(clean, noisy).upper_loss * 2

    with pytest.raises(Exception, match="bilevel evaluates losses at several points"):
        torch.compile(epoch, backend="eager", fullgraph=True)(*scene.batches)


@pytest.mark.parametrize("name", ["ebomlc", "emlc", "unrolled", "unrolled-graph", "implicit"])
def test_two_threads_with_an_optimizer_each_do_not_disturb_each_other(name: str) -> None:
    """Forward mode and the choice of attention kernels are the process's in torch; random numbers are not drawn."""
    alone = [Scene(name, seed=seed).trained(20) for seed in (0, 1)]
    scenes = [Scene(name, seed=seed) for seed in (0, 1)]
    found: dict[int, Any] = {}
    barrier = threading.Barrier(2)

    def train(which: int) -> None:
        barrier.wait()
        try:
            found[which] = scenes[which].trained(20)
        except Exception as error:
            found[which] = error

    threads = [threading.Thread(target=train, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert not isinstance(found[which], Exception), found[which]
        assert all(a.equal(b) for a, b in zip(found[which], alone[which], strict=True))


@pytest.mark.environment
def test_a_forked_data_loader_gives_the_batches_of_this_process() -> None:
    if "fork" not in torch.multiprocessing.get_all_start_methods():
        pytest.skip("processes are not forked on this platform")
    runs = []
    for workers in (0, 2):
        scene = Scene("emlc")
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(torch.randn(24, 5, generator=generator), torch.randint(3, (24,), generator=generator))
        context = {"multiprocessing_context": "fork"} if workers else {}
        for noisy in DataLoader(data, batch_size=6, num_workers=workers, **context):
            scene.optimizer.step(scene.batches[0], noisy)
        runs.append(scene.parameters())
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
