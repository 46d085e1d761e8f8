"""What the names of the methods stand for, and that their options arrive where they act."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
from benchmarks import noisy_labels_table
from examples.noisy_labels.recipes import methods
from examples.noisy_labels.recipes.meta_label_correction import MetaLabelCorrection
from examples.noisy_labels.recipes.methods import PRINTED, RECIPES
from examples.noisy_labels.recipes.models import Corrector, corrector
from examples.noisy_labels.run import command_line
from examples.noisy_labels.run.settings import Settings
from fake_images import blank_task

DIGITS: dict[str, Any] = {"dataset": "digits", "network": "mlp"}
CPU = torch.device("cpu")


def test_a_name_decides_what_is_not_said() -> None:
    released = Settings(method="ebomlc-released", mixture="log")
    assert (released.value_gradient, released.step_from, released.inner_step) == (
        "difference",
        "lookahead",
        "optimizer",
    )
    assert (released.mix_clean, released.corrector_features, released.corrector) == (0.5, "recomputed", "released")
    assert released.mixture == "log"
    assert Settings().value_gradient == "value_function"
    assert (Settings(method="mlc-d").rho, Settings(method="mlc-d").delta) == (1.0, 0.5)


def test_every_recipe_decides_the_same_options() -> None:
    assert all(recipe.keys() == PRINTED.keys() for recipe in RECIPES.values())


@pytest.mark.parametrize(
    "option",
    [
        {"value_gradient": "unrolled"},
        {"step_from": "lookahead"},
        {"inner_step": "optimizer"},
        {"multiplier_max": 0.3},
    ],
)
@pytest.mark.parametrize("method", ["ebomlc", "mlc-d"])
def test_options_reach_the_optimizer(method: str, option: dict[str, Any]) -> None:
    recipe = methods.build(Settings(method=method, **option, **DIGITS), blank_task())
    assert isinstance(recipe, MetaLabelCorrection)
    ((name, value),) = option.items()
    assert getattr(recipe.bilevel, name) == value


def test_constants_reach_the_optimizer() -> None:
    recipe = methods.build(Settings(delta=0.7, xi=0.3, **DIGITS), blank_task())
    assert isinstance(recipe, MetaLabelCorrection)
    assert (recipe.bilevel.barrier, recipe.bilevel.damping) == (bilevel.barrier.Aligned(0.7), 0.3)
    plain = methods.build(Settings(method="mlc-d", delta=0.7, inner_steps=3, **DIGITS), blank_task())
    assert isinstance(plain, MetaLabelCorrection)
    assert (plain.bilevel.barrier, plain.bilevel.inner_steps) == (bilevel.barrier.GradientNorm(0.7), 3)


def test_the_released_corrector_has_dropout_batch_statistics_and_a_wide_embedding() -> None:
    torch.manual_seed(0)
    released, plain = corrector("released", 64, 10), corrector("mlc", 64, 10)
    kinds = [type(layer).__name__ for layer in released.layers]
    assert kinds == ["Linear", "Tanh", "Dropout", "Linear", "Tanh", "BatchNorm1d", "Linear"]
    assert [type(layer).__name__ for layer in plain.layers] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert released.embedding.weight.std().item() == pytest.approx(1, rel=0.1)
    assert plain.embedding.weight.abs().max() <= (6 / (10 + 128)) ** 0.5
    assert isinstance(plain, Corrector)


def test_the_corrector_may_follow_the_schedule() -> None:
    for decays, expected in ((True, [1e-3, 1e-3, 1e-4, 1e-5]), (False, [1e-3] * 4)):
        settings = Settings(meta_lr=1e-3, meta_decay=decays, epochs=9, milestones=(2, 3), **DIGITS)
        recipe = methods.build(settings, blank_task())
        assert isinstance(recipe, MetaLabelCorrection)
        rates = []
        for _ in range(4):
            rates.append(recipe.bilevel.upper_optimizer.param_groups[0]["lr"])
            for optimizer in (recipe.bilevel.lower_optimizer, recipe.bilevel.upper_optimizer):
                optimizer.step()  # without gradients it moves nothing
            recipe.end_epoch()
        assert rates == pytest.approx(expected)
        other = methods.build(settings, blank_task())
        other.load_state_dict(recipe.state_dict())
        assert other.schedule.last_epoch == 4


def test_another_method_decides_anew_what_the_saved_one_had_decided(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    Settings(method="ebomlc-released", rho=0.3, **DIGITS).save(file)
    same = command_line.parse(["--config", str(file)]).settings
    assert (same.value_gradient, same.rho) == ("difference", 0.3)
    other = command_line.parse(["--config", str(file), "--method", "ebomlc"]).settings
    assert (other.value_gradient, other.mixture, other.rho) == ("value_function", "probability", 0.3)
    every = command_line.parse(["--config", str(file), "--compare", "--out", str(tmp_path / "c")])
    assert every.variant(method="ebomlc").value_gradient == "value_function"
    assert every.variant(method="ebomlc-released").value_gradient == "difference"


def test_the_saved_configuration_is_resolved(tmp_path: Path) -> None:
    Settings(method="ebomlc-released").save(tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in PRINTED} == RECIPES["ebomlc-released"]


@pytest.mark.parametrize("variant", [name for table in noisy_labels_table.TABLES.values() for name in table])
def test_the_variants_of_the_measured_tables_are_settings(variant: str) -> None:
    arguments = ["--preset", "quick", *noisy_labels_table.VARIANTS[variant]]
    settings = command_line.parse(arguments).settings
    assert variant.startswith(settings.method)
    assert (settings.step_from == "lookahead") == ("w1" in variant or "released" in variant)
    assert (settings.delta * settings.xi == 0.125) == ("printed constants" in variant)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mix_clean": 1.0}, r"--mix-clean 1\.0: must be at least 0 and below 1"),
        ({"method": "magic"}, "must be one of ce, clean"),
        ({"corrector_features": "frozen"}, "must be one of held, recomputed"),
        ({"multiplier_max": -1.0}, r"--multiplier-max -1\.0: must be at least 0"),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Settings(**options)
