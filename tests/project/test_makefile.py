"""An interpreter that cannot make the environment is refused in one sentence, before anything is made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.environment,
    pytest.mark.skipif(os.name == "nt" or shutil.which("make") is None, reason="needs make and a POSIX shell"),
]


def make(python: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """``make install`` as far as the commands it would run."""
    command = ["make", "-n", "install", f"PYTHON={python}", f"VENV={folder / 'venv'}"]
    # Without what an outer make, which may be running this test, hands down.
    environment = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def interpreter(folder: Path, prelude: str) -> Path:
    """This interpreter, after something was done to it: a script that takes ``-c CODE``."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{prelude}\n$2"\n')
    path.chmod(0o755)
    return path


def test_an_interpreter_as_it_should_be_is_taken(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "pass")
    result = make(python, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{python} -m venv ")


@pytest.mark.parametrize(
    "prelude",
    [
        "import sys; sys.version_info = (3, 10, 14)",
        "import sys; sys.modules['ensurepip'] = None",  # as Debian ships it
    ],
)
def test_an_unfit_interpreter_is_refused(prelude: str, tmp_path: Path) -> None:
    python = interpreter(tmp_path, prelude)
    result = make(python, tmp_path)
    assert result.returncode != 0
    assert f'needs Python 3.11 or newer with its venv module, and "{python}" is not one' in result.stderr
    assert "apt-get install python3-venv" in result.stderr


def test_a_missing_interpreter_is_refused(tmp_path: Path) -> None:
    result = make(tmp_path / "nowhere", tmp_path)
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
