"""The programs of ``examples/loops`` run, learn what they should, and keep what their pages promise."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from examples.loops import from_betty, from_torchopt, plain
from examples.loops.problem import WRONG, Weighted, data
from examples.noisy_labels.run.command_line import parse

ROOT = Path(__file__).parents[2]
LOOPS = ROOT / "examples" / "loops"
pytestmark = pytest.mark.program

# What other libraries warn of, in their own code.
ignored = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)


def program(name: str, *needed: str) -> ModuleType:
    """A program of ``examples/loops``, or a skip that says what it would need."""
    for library in needed:
        pytest.importorskip(library, reason=f"needs {library}: the extra 'loops'", exc_type=ImportError)
    return importlib.import_module(f"examples.loops.{name}")


def apart(weights: Tensor, right: Tensor) -> float:
    """How much more a sample with the right label weighs than one with a wrong label."""
    learned = weights.detach().sigmoid()
    return float(learned[right].mean() - learned[~right].mean())


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_the_problem_is_as_its_first_line_says() -> None:
    trusted, noisy, right = data()
    assert len(trusted) == 40
    assert len(noisy) == len(right) == 240
    assert abs(1 - right.float().mean() - WRONG) < 0.1


def test_plain_pytorch_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = plain.main(["--checkpoint", str(tmp_path / "whole.pt")])
    assert apart(whole.weights, data()[2]) > 0.4
    part = ["--checkpoint", str(tmp_path / "part.pt")]
    plain.main([*part, "--epochs", "11"])
    assert same(plain.main([*part, "--resume"]), whole)


def by_hand(epochs: int) -> Weighted:
    """What Lightning's program must come to: the same steps in a loop of two lines."""
    module = program("lightning_loop", "lightning")
    module.seed_everything(0, verbose=False)
    trusted, noisy, _ = data()
    model = Weighted()
    method = bilevel.Unrolled(
        model.upper_loss,
        model.lower_loss,
        upper=model.weights,
        lower=model.classifier,
        upper_optimizer=torch.optim.Adam([model.weights], lr=0.1),
        lower_optimizer=torch.optim.SGD(model.classifier.parameters(), lr=0.3, momentum=0.9),
    )
    for _ in range(epochs):
        for batch in torch.utils.data.DataLoader(noisy, batch_size=40):
            method.step(list(trusted.tensors), batch)
    return model


@ignored
def test_lightning_counts_calls_back_and_resumes(tmp_path: Path) -> None:
    module = program("lightning_loop", "lightning")
    trainer, whole = module.main(["--epochs", "4", "--folder", str(tmp_path / "whole")])
    assert trainer.global_step == 2 * 4 * 6  # two optimizers, four epochs, six batches
    assert same(whole.model, by_hand(4))
    folder = ["--folder", str(tmp_path / "part")]
    module.main(["--epochs", "2", *folder])
    trainer, part = module.main(["--epochs", "4", *folder, "--resume"])
    assert trainer.global_step == 2 * 4 * 6
    assert same(part.model, whole.model)


@ignored
def test_lightnings_steps_end_a_run_and_write_checkpoints(tmp_path: Path) -> None:
    """What is counted in steps: the end of training, and a callback's checkpoints."""
    module = program("lightning_loop", "lightning")
    every = module.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer = module.Trainer(
        max_steps=12, accelerator="cpu", callbacks=[every], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module.Reweighting(), module.DataLoader(data()[1], batch_size=40))
    assert trainer.global_step == 12
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=12.ckpt", "step=4.ckpt", "step=8.ckpt"]


@ignored
def test_accelerate_leaves_no_step_out() -> None:
    module = program("accelerate_loop", "accelerate")
    moved, model = module.main([])
    assert moved == 30 * 6
    assert apart(model.weights, data()[2]) > 0.4


@ignored
def test_accelerates_accumulation_does_not_reach_a_step() -> None:
    """Under ``gradient_accumulation_steps=2`` the prepared optimizer itself leaves every second step out."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: the extra 'loops'")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    parameter, alpha = (torch.zeros(1, requires_grad=True) for _ in range(2))
    upper, lower = accelerator.prepare(torch.optim.SGD([alpha], lr=0.1), torch.optim.SGD([parameter], lr=0.1))
    method = bilevel.BOME(
        lambda: (parameter - 1).square().sum(),
        lambda: (parameter - alpha).square().sum(),
        upper=alpha,
        lower=parameter,
        upper_optimizer=upper,
        lower_optimizer=lower,
    )
    values = []
    for _ in range(4):
        with accelerator.accumulate():
            assert bool(method.step().upper_moved)
        values.append(parameter.item())
    assert len(set(values)) == 4
    accelerator.gradient_state._set_sync_gradients(False)
    parameter.grad = torch.ones(1)
    before = parameter.item()
    lower.step()
    assert parameter.item() == before  # which is why the wrapper is taken off


@ignored
def test_accelerate_accumulates_inside_the_loss() -> None:
    module = program("accelerate_loop", "accelerate")
    _, whole = module.main(["--epochs", "2"])
    moved, halves = module.main(["--epochs", "2", "--accumulate", "2"])
    assert moved == 2 * 6
    # The same samples in the same order: two halves of twenty are a batch of forty.
    assert halves.weights.allclose(whole.weights, atol=1e-4)


@ignored
def test_lora_adapters_find_the_texts_that_count() -> None:
    module = program("transformers_lora", "transformers", "peft")
    learned, noisy = module.main(["--steps", "20"])
    assert learned[~noisy].mean() > learned[noisy].mean() + 0.1


@ignored
def test_compiled_models_are_learned_like_others() -> None:
    module = program("compile_loop")
    model = module.main(["--epochs", "6"])
    assert apart(model.weights, data()[2]) > 0.1


def run(name: str, *arguments: str, folder: Path) -> str:
    """A program of its own, as a user starts it; without a network, so that nothing can be sent."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", f"examples.loops.{name}", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_loggers_write_without_a_network(tmp_path: Path) -> None:
    for library in ("wandb", "tensorboard"):
        pytest.importorskip(library, reason=f"needs {library}: the extra 'loops'")
    run("logging_loop", "--epochs", "1", folder=tmp_path)
    folder = tmp_path / "runs" / "logging"
    assert list((folder / "tensorboard").glob("events.*"))
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_hydra_makes_methods_from_names(tmp_path: Path) -> None:
    if importlib.util.find_spec("hydra") is None:
        pytest.skip("needs hydra: the extra 'loops'")
    names: dict[str, Any] = {"bome": "BOME", "unrolled": "Unrolled"}
    out = run("hydra_loop", "--multirun", "method=bome,unrolled", "epochs=1", folder=tmp_path)
    assert [line.partition(":")[0] for line in out.splitlines() if "mean weight" in line] == list(names.values())


def test_every_program_has_a_page_that_shows_it() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "loops").glob("*.md"))
    shown = [path.name for path in LOOPS.iterdir() if path.suffix in {".py", ".slurm"} and path.name != "__init__.py"]
    assert len(shown) >= 9
    assert [name for name in shown if f"examples/loops/{name}" not in pages] == []


def test_the_job_script_is_a_shell_script_that_names_real_options() -> None:
    text = (LOOPS / "job.slurm").read_text(encoding="utf-8")
    (command,) = [line for line in text.splitlines() if line.startswith("srun python")]
    options = command.split()[3:]
    assert not any(option.startswith("$") for option in options)
    assert ("--resume", "auto") in itertools.pairwise(options)
    options[options.index("cuda")] = "cpu"  # whatever this machine has
    parse(options)


def test_the_port_of_bettys_tutorial_learns() -> None:
    losses, strength = from_betty.main(steps=20)
    assert losses[-1] < 0.75 * losses[0]
    assert strength.min() >= 1e-8


def test_the_port_of_torchopts_tutorial_gives_its_number() -> None:
    assert from_torchopt.main().item() == -28  # 2 a x - 4 x³ at a = 1, x = 2


@pytest.mark.parametrize(("name", "there"), [("from_betty", 86), ("from_torchopt", 17)])
def test_the_lines_of_the_ports_are_counted_right(name: str, there: int) -> None:
    """``main``, and the imports of torch and of the library."""
    lines = [line.strip() for line in (LOOPS / f"{name}.py").read_text(encoding="utf-8").splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("def main"))
    last = next(i for i, line in enumerate(lines) if line.startswith("if __name__"))
    code = [line for line in lines[first:last] if line and not line.startswith("#")]
    imports = [line for line in lines[:first] if re.match(r"(from|import) (torch|bilevel)", line)]
    assert f"| {there} | {len(code) + len(imports)} |" in (ROOT / "docs" / "loops" / "ports.md").read_text("utf-8")
