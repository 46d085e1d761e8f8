"""The workflows run what the project promises: its Pythons, its oldest torch, its commands, other CPUs' kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import variations

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SYSTEMS = {"ubuntu-latest", "macos-latest", "windows-latest"}

pytestmark = pytest.mark.skipif(not FILES, reason="the source archive has no workflows")


def workflow(name: str) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return loaded


def commands(name: str) -> list[str]:
    jobs = workflow(name)["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_the_tests_run_on_all_that_is_promised() -> None:
    matrix = workflow("tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert set(matrix["os"]) == SYSTEMS
    promised = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert matrix["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"
    (floor,) = PROJECT["dependencies"]
    assert matrix["torch"] == ["pinned", floor.removeprefix("torch>=") + ".0"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_once_a_week(path: Path) -> None:
    # YAML 1.1 reads the key "on" as the truth value.
    (schedule,) = workflow(path.name)[True]["schedule"]
    minute, hour, day, month, weekday = schedule["cron"].split()
    assert minute.isdigit()
    assert hour.isdigit()
    assert weekday.isdigit()
    assert (day, month) == ("*", "*")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_the_commands_name_exists(path: Path) -> None:
    said = commands(path.name)
    assert said
    for line in said:
        words = line.split()
        if words[:2] == ["python", "-m"]:
            assert find_spec(words[2]), line
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
        for file in re.findall(r"(?:^| |WORKSPACE/)(tests/\w+\.py|constraints\.txt)", line):
            assert (ROOT / file).is_file(), line
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert extra in PROJECT["optional-dependencies"], line


def test_the_checks_are_those_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    plain = re.search(r"`make test`.*?```console\n(.*?)```", text, re.DOTALL)
    assert plain is not None
    wanted = {line.removeprefix(".venv/bin/") for line in plain[1].splitlines() if "venv .venv" not in line}
    assert {line for line in wanted if "pip install" not in line} <= set(commands("tests.yml"))


# --- variations.py --------------------------------------------------------------------------------------------------


def test_a_processor_gets_no_kernels_that_it_lacks() -> None:
    assert variations.capabilities("DEFAULT") == ["DEFAULT"]
    assert variations.capabilities("AVX2") == ["DEFAULT", "AVX2"]
    assert variations.capabilities("AVX512") == ["DEFAULT", "AVX2", "AVX512"]
    assert variations.capabilities("SVE256") == ["DEFAULT", "SVE256"]


@pytest.mark.environment
def test_a_variation_arrives_in_torch() -> None:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    for capability in variations.capabilities(torch.backends.cpu.get_cpu_capability()):
        chosen = {**os.environ, **variations.environment(capability, threads=1)}
        run = subprocess.run([sys.executable, "-c", code], env=chosen, check=True, capture_output=True, text=True)
        assert run.stdout.split() == [capability, "1"]


@pytest.mark.environment
def test_a_failing_variation_fails_the_whole(capfd: pytest.CaptureFixture[str]) -> None:
    runs = len(variations.THREADS) * len(variations.capabilities(torch.backends.cpu.get_cpu_capability()))
    assert variations.main(["--version"]) == 0
    assert variations.main(["--no-such-option"]) == runs
    said = capfd.readouterr().out
    assert said.count(" passed\n") == said.count(" FAILED (exit 4)\n") == runs
