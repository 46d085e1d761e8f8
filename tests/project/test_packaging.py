"""What users install: the wheel holds the library and nothing else, and needs nothing but torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

import bilevel
from pages import blocks

pytestmark = pytest.mark.environment

ROOT = Path(__file__).parents[2]

# Run with -I in an interpreter of its own, it stands in for an environment in which torch alone was installed: what
# neither Python nor torch brings cannot be imported.
ALONE = """
import importlib.machinery
import sys

class TorchAlone(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in refused else super().find_spec(name, path, target)

refused = set(sys.argv[2].split(","))
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = TorchAlone
sys.path.insert(0, sys.argv[1])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel built from it, as for a release; no network is used."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def torch_and_its_requirements() -> set[str]:
    """Names of the distributions that ``pip install torch`` brings."""
    names: set[str] = set()
    queue = ["torch"]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in names:
            continue
        names.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        queue += [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    return names


def refused() -> set[str]:
    """Top-level modules installed here that would not be there with torch alone."""
    allowed = torch_and_its_requirements()
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & allowed
    }


# Torch says while it is imported that numpy is missing; a program that imports torch before bilevel has to let it.
NO_NUMPY = "Failed to initialize NumPy"


def alone(wheel: zipfile.ZipFile, folder: Path, code: str, *filters: str) -> subprocess.CompletedProcess[str]:
    """Run code with torch alone, where a warning that no filter lets pass is an error."""
    wheel.extractall(folder)
    warnings = [part for filter_ in ("error", *filters) for part in ("-W", filter_)]
    command = [sys.executable, "-I", *warnings, "-c", ALONE + code, str(folder), ",".join(refused())]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_the_wheel_holds_the_library_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bilevel").rglob("*.py")}
    assert files == source | {"bilevel/py.typed"}


def test_the_metadata_is_what_was_decided(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    fields = Parser().parsestr(wheel.read(name).decode())
    assert fields["Name"] == "bilevel"
    assert fields["Version"] == bilevel.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line] == ["torch>=2.11"]
    assert set(fields.get_all("Provides-Extra", [])) == {
        "browser",
        "comparison",
        "dev",
        "docs",
        "examples",
        "jupyter",
        "loops",
        "parquet",
        "progress",
        "tensorboard",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_the_source_archive_holds_no_data(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert {"README.md", "LICENSE", "pyproject.toml", "tests/methods_table.py", "bilevel/py.typed"} <= set(members)
    # Sources, texts, and the pictures and tables that the docs show.
    kinds = {"", ".py", ".typed", ".md", ".toml", ".txt", ".cff", ".png", ".svg", ".json", ".jsonl"}
    kinds |= {".css", ".js", ".woff2", ".ipynb", ".yaml"}  # the documentation's own, its notebooks; hydra's, conda's
    assert {name for name in members if Path(name).suffix not in kinds} == set()
    assert {name for name, member in members.items() if member.size > 500_000} == set()


def test_it_imports_without_the_extras(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    result = alone(wheel, tmp_path, "import bilevel; print(bilevel.__version__, bilevel.__file__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [bilevel.__version__, str(tmp_path / "bilevel" / "__init__.py")]


def test_every_method_steps_without_the_extras_and_without_a_warning(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    result = alone(wheel, tmp_path, (ROOT / "tests" / "one_step.py").read_text(encoding="utf-8"))
    assert result.returncode == 0, result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["True"] * 8


def test_the_warning_of_torch_is_the_one_that_is_let_pass(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """As long as torch alone gives it; then ``bilevel.without_numpy`` has something to do."""
    assert NO_NUMPY in alone(wheel, tmp_path, "import torch").stderr
    result = alone(wheel, tmp_path, "import bilevel; import torch; print(torch.__version__)")
    assert (result.returncode, result.stderr) == (0, "")


def test_the_readme_snippet_runs_without_the_extras(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    result = alone(wheel, tmp_path, blocks(ROOT / "README.md")[0].parsed, f"ignore:{NO_NUMPY}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["numpy", "sklearn", "matplotlib", "tqdm", "pytest"])
def test_the_extras_are_refused_in_these_tests(wheel: zipfile.ZipFile, tmp_path: Path, module: str) -> None:
    result = alone(wheel, tmp_path, f"import {module}")
    assert f"No module named '{module}'" in result.stderr
