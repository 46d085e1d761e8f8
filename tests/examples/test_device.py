"""Training on an accelerator: nothing waits for it within a step, and what diverged is noticed all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from examples.noisy_labels import cifar
from examples.noisy_labels.data import pools
from examples.noisy_labels.run import accelerator, checkpoint
from examples.noisy_labels.run.settings import METHODS, Settings
from examples.noisy_labels.run.training import Run

SMALL = {"network": "small", "train_images": 120, "clean_fraction": 0.25, "batch_size": 20, "epochs": 2}


def cifar_run(folder: Path, device: str = "cpu", **options: Any) -> Run:
    chosen = Settings(data=str(folder), device=device, **SMALL | options)
    return Run(chosen, pools.load(chosen, torch.device(device)))


class WaitedError(AssertionError):
    """Something asked for a value that an accelerator would first have to compute."""


class Watch(TorchDispatchMode):
    """Refuses every operation that would wait for an accelerator, if its tensors were there.

    Adam's step counters are let through: torch keeps them on the host, whatever the device of the parameters. So are
    copies that name a layout: with one, forward mode makes a tensor of a zero tangent, on the device of the tensor.
    """

    READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "item")
    COPIES = ("_to_copy", "copy_")

    def __init__(self, run: Run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        bilevel = getattr(run.recipe, "bilevel", None)
        optimizers = [bilevel.upper_optimizer, bilevel.lower_optimizer] if bilevel else [run.recipe.optimizer]
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        self.counters = {id(state["step"]) for state in states if "step" in state}
        self.operations = 0
        self.stays = False  # within a call of `to` that names the tensor's own device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        self.operations += 1
        if id(args[0] if args else None) not in self.counters:
            named = kwargs.get("device") is not None and kwargs.get("layout") is None and not self.stays
            if name in self.READS or (name in self.COPIES and named):
                raise WaitedError(str(func))
            if name.startswith("index") and any(one is not None and one.dtype == torch.bool for one in _indices(args)):
                raise WaitedError(f"{func} with a mask")  # its result has as many entries as the mask has ones
        return func(*args, **kwargs)


def _indices(args: Any) -> list[Any]:
    return [one for one in args[1] if isinstance(one, Tensor)] if len(args) > 1 and isinstance(args[1], list) else []


@contextmanager
def watched(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Refuse reads on the host, of torch's operations and of the methods that lead to Python and numpy."""
    watch = Watch(run)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"):
            patch.setattr(Tensor, name, _guarded(getattr(Tensor, name), name, watch))
        patch.setattr(torch.Tensor, "to", _guarded_to(Tensor.to, watch))
        with watch:
            yield watch


def _guarded(original: Callable[..., Any], name: str, watch: Watch) -> Callable[..., Any]:
    def guarded(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _get_current_dispatch_mode() is not None and id(self) not in watch.counters:
            raise WaitedError(name)
        return original(self, *args, **kwargs)

    return guarded


def _guarded_to(original: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    """Let a tensor change its dtype on its own device, as long as that is not named by a word."""

    def guarded(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = [one for one in (*args, kwargs.get("device")) if isinstance(one, torch.device | str)]
        if any(isinstance(one, str) or one != self.device for one in places):
            raise WaitedError(f"to({places[0]})")
        watch.stays, before = bool(places), watch.stays
        try:
            return original(self, *args, **kwargs)
        finally:
            watch.stays = before

    return guarded


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing(method: str, cifar10_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cifar_run(cifar10_folder, method=method, on_nonfinite="ignore", corrupt_clean=0.5)
    for _ in range(8):  # looks, at steps 1, 2, 4 and 8, read values
        run.advance()
    with watched(run, monkeypatch) as watch:
        for _ in range(6):  # both sets of images are shuffled anew on the way
            run.advance()
    assert watch.operations > 6 * 50
    assert run.step == 14


def test_a_step_on_divided_images_waits_for_nothing(cifar10_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cifar_run(cifar10_folder, method="dividemix")
    run.advance()
    run.end_epoch()  # warmed up; the images are divided between two epochs
    with watched(run, monkeypatch):
        for _ in range(6):
            run.advance()


def test_the_watch_sees_what_it_should(cifar10_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cifar_run(cifar10_folder, on_nonfinite="raise")
    run.advance()
    with watched(run, monkeypatch), pytest.raises(WaitedError):
        run.advance()  # documented: "raise" waits once a step
    value, mask = torch.ones(1), torch.tensor([True])
    methods = [methodcaller(name) for name in ("item", "tolist", "cpu", "numpy", "nonzero", "unique")]
    for read in (float, bool, int, *methods, methodcaller("to", "meta"), lambda x: x[mask], torch.nonzero):
        with watched(run, monkeypatch), pytest.raises(WaitedError):
            read(value)
        read(value)  # and nothing stays forbidden


def test_numbers_are_read_at_once(cifar10_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cifar_run(cifar10_folder)
    numbers = run.advance()
    expected, reads = {name: pytest.approx(value.item()) for name, value in numbers.items()}, []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, n=name, read=original: (reads.append(n), read(self))[1])
    assert run.read(numbers) == expected
    assert reads == ["tolist"], "one transfer for the record of the log and all checks"


def test_images_and_weights_are_channels_last(cifar10_folder: Path) -> None:
    for augment in (True, False):
        run = cifar_run(cifar10_folder, augment=augment)
        assert next(run.noisy).inputs.is_contiguous(memory_format=torch.channels_last)
        plain = cifar_run(cifar10_folder, augment=augment, channels_last=False)
        assert next(plain.noisy).inputs.is_contiguous()
    run.advance()
    weights = [weight for weight in run.recipe.classifier.parameters() if weight.dim() == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(weight.grad is not None and weight.grad.stride() == weight.stride() for weight in weights)


def test_the_order_in_memory_changes_rounding_only(cifar10_folder: Path) -> None:
    runs = [cifar_run(cifar10_folder, channels_last=last) for last in (True, False)]
    for run in runs:
        run.recipe.classifier.double()
        run.recipe.networks["corrector"].double()
        inputs = run.task.inputs
        object.__setattr__(run.task, "inputs", lambda *asked, inputs=inputs: inputs(*asked).double())
    last, first = (run.advance() for run in runs)
    for name, value in first.items():
        torch.testing.assert_close(last[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ce", "ebomlc"])
def test_a_run_that_diverges_unasked_stops_at_the_log_interval(
    method: str,
    cifar10_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    command = ["--data", str(cifar10_folder), "--method", method, "--network", "small", "--train-images", "120"]
    command += ["--clean-fraction", "0.25", "--batch-size", "20", "--epochs", "3", "--log-interval", "1"]
    advance = Run.advance

    def poisoned(run: Run) -> dict[str, Tensor]:
        numbers = advance(run)
        if (run.epoch, run.step) == (1, 2):  # the loss was finite, the direction was not
            next(iter(run.recipe.classifier.parameters())).data[0] = torch.nan
        return numbers

    monkeypatch.setattr(Run, "advance", poisoned)
    assert cifar.main([*command, "--on-nonfinite", "ignore", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"Run({method}): a weight is nan in epoch 2. It diverged. Try a smaller --lr." in said
    assert "checkpoint.pt holds the last checkpoint before it" in said
    kept = checkpoint.load(out / checkpoint.NAME)["run"]
    assert kept["progress"]["epoch"] == 1
    assert all(weight.isfinite().all() for weight in kept["recipe"]["classifier"].values())


def test_no_checkpoint_of_a_diverged_run_is_written(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between two log records, in the last step of an epoch: the epoch's losses are all finite.
    advance = Run.advance

    def poisoned(run: Run) -> dict[str, Tensor]:
        numbers = advance(run)
        if run.step == len(run.noisy):
            next(iter(run.recipe.classifier.parameters())).data[0] = torch.inf
        return numbers

    monkeypatch.setattr(Run, "advance", poisoned)
    command = ["--data", str(cifar10_folder), "--method", "ce", "--network", "small", "--train-images", "120"]
    command += ["--clean-fraction", "0.25", "--batch-size", "20", "--log-interval", "1000"]
    assert cifar.main([*command, "--out", str(tmp_path / "run")]) == 1
    kept = checkpoint.load(tmp_path / "run" / checkpoint.NAME)["run"]  # the first one, from before the first step
    assert (kept["progress"]["epoch"], kept["progress"]["step"]) == (0, 0)
    assert all(weight.isfinite().all() for weight in kept["recipe"]["classifier"].values())


def test_the_policy_follows_the_device() -> None:
    assert [Settings().policy(device) for device in ("cpu", "cuda")] == ["raise", "ignore"]
    assert Settings(on_nonfinite="raise").policy("cuda") == "raise"
    assert Settings(on_nonfinite="ignore").policy("cpu") == "ignore"


@pytest.mark.parametrize("deterministic", [True, False])
def test_switches_are_set_for_cuda_and_put_back(deterministic: bool) -> None:
    # The switches exist without a GPU; what they do there, only a GPU shows.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def switches() -> list[bool]:
        asked = torch.are_deterministic_algorithms_enabled()
        return [cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, asked]

    before = switches()
    options = Settings(deterministic=deterministic, tf32=not deterministic)
    with accelerator.prepared(options, torch.device("cuda")):
        expected = [deterministic, not deterministic, not deterministic, not deterministic, deterministic]
        assert switches() == expected
    assert switches() == before
    with accelerator.prepared(options, torch.device("cpu")):
        assert switches() == before


def test_a_checkpoint_is_read_into_host_memory(cifar10_folder: Path, tmp_path: Path) -> None:
    # On CUDA, a step counter of Adam on the device would be read back at every step.
    run = cifar_run(cifar10_folder)
    run.advance()
    checkpoint.save(tmp_path / checkpoint.NAME, {"run": run.state_dict()})
    state = checkpoint.load(tmp_path / checkpoint.NAME)["run"]["recipe"]["optimizer"]["upper_optimizer"]["state"]
    assert {entry["step"].device.type for entry in state.values()} == {"cpu"}


# --- with a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("resumed", [False, True])
def test_no_synchronisation_on_cuda(method: str, resumed: bool, cifar10_folder: Path) -> None:
    run = cifar_run(cifar10_folder, "cuda", method=method)
    with accelerator.prepared(run.settings, torch.device("cuda")):
        for _ in range(3):
            run.advance()
        if resumed:
            state = run.state_dict()
            run = cifar_run(cifar10_folder, "cuda", method=method)
            run.load_state_dict(state)
            run.advance()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(12):
                run.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert run.read(run.sums)


@pytest.mark.gpu
def test_a_resumed_run_on_cuda_repeats_the_numbers(cifar10_folder: Path, tmp_path: Path) -> None:
    whole = cifar_run(cifar10_folder, "cuda", epochs=3)
    with accelerator.prepared(whole.settings, torch.device("cuda")):
        for _ in range(5):
            whole.advance()
        checkpoint.save(tmp_path / checkpoint.NAME, {"run": whole.state_dict()})
        expected = [whole.read(whole.advance()) for _ in range(5)]
        resumed = cifar_run(cifar10_folder, "cuda", epochs=3)
        resumed.load_state_dict(checkpoint.load(tmp_path / checkpoint.NAME)["run"])
        assert [resumed.read(resumed.advance()) for _ in range(5)] == expected
