"""The pins of constraints.txt hold for every interpreter and system that the package is made for."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PINS = [Requirement(line) for line in TEXT.splitlines() if not line.startswith("#")]

# The oldest of every minor version: whatever holds there holds for the later ones of the same minor version.
INTERPRETERS = ["3.11.0", "3.12.0", "3.13.0", "3.14.0"]
# Systems for which torch has wheels: uv's name, and what the markers of a pin see.
SYSTEMS = {
    "x86_64-manylinux_2_28": {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64"},
    "aarch64-manylinux_2_28": {"sys_platform": "linux", "os_name": "posix", "platform_machine": "aarch64"},
    "aarch64-apple-darwin": {"sys_platform": "darwin", "os_name": "posix", "platform_machine": "arm64"},
    "x86_64-pc-windows-msvc": {"sys_platform": "win32", "os_name": "nt", "platform_machine": "AMD64"},
}
# What torch's Linux builds bring beside it; a constraints file that named it would have to be renewed for each build.
CUDA = re.compile(r"(cuda|nvidia|triton)\b")


def applies(marker: Marker | None, interpreter: str, system: str = "x86_64-manylinux_2_28") -> bool:
    if marker is None:
        return True
    python = {"python_full_version": interpreter, "python_version": interpreter.rpartition(".")[0]}
    return marker.evaluate({**SYSTEMS[system], **python, "platform_python_implementation": "CPython"})


def version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} is no pin"
    return specifier.version


def pinned(interpreter: str, system: str) -> dict[str, str]:
    """Version of each distribution that the file allows there."""
    found: dict[str, str] = {}
    for pin in PINS:
        if applies(pin.marker, interpreter, system):
            name = canonicalize_name(pin.name)
            assert name not in found, f"two pins of {name} on Python {interpreter}"
            found[name] = version(pin)
    return found


def resolve(*options: str) -> dict[str, str]:
    """What would be installed for development, by uv, which installs nothing here; without a network, a skip."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--all-extras"]
    command += [*options, "--constraints", "constraints.txt", "pyproject.toml"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if re.search("Failed to fetch|[Nn]etwork|error sending request", result.stderr):
        pytest.skip("resolving needs a package index, and none was reached")
    assert result.returncode == 0, result.stderr
    lines = [line.partition(";")[0].strip() for line in result.stdout.splitlines()]
    return dict(line.split("==") for line in lines if not CUDA.match(line))


def test_pip_can_read_the_file_as_constraints() -> None:
    # An option (an index, say), a path or a build of one's own machine ("+cpu") would follow everybody who uses it.
    for pin in PINS:
        assert pin.url is None
        assert not pin.extras
        assert "+" not in version(pin)
    assert not any(CUDA.match(pin.name) for pin in PINS)
    assert [str(pin) for pin in PINS if pin.name == "torch"] == ["torch==2.13.0"]


# What some systems alone need: consoles, and how processes are started and talked to.
WINDOWS, MAC, UNIX = {"cffi", "colorama", "pycparser"}, {"appnope"}, {"pexpect", "ptyprocess"}
BROWSER = {"httpx2-jsfetch"}  # Python compiled for browsers, which torch is not


@pytest.mark.parametrize("interpreter", INTERPRETERS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_distributions_are_pinned_everywhere(interpreter: str, system: str) -> None:
    everywhere = {canonicalize_name(pin.name) for pin in PINS} - WINDOWS - MAC - UNIX - BROWSER
    platform = SYSTEMS[system]["sys_platform"]
    extra = {"win32": WINDOWS, "darwin": MAC | UNIX, "linux": UNIX}[platform]
    assert set(pinned(interpreter, system)) == everywhere | extra


@pytest.mark.parametrize("interpreter", INTERPRETERS)
def test_a_pinned_version_admits_the_interpreter(interpreter: str) -> None:
    """As far as it can be told offline: what is installed here in its pinned version says which Pythons it is for."""
    told, refused = 0, []
    for pin in PINS:
        try:
            distribution = metadata.distribution(pin.name)
        except metadata.PackageNotFoundError:  # for another system
            continue
        if distribution.version.partition("+")[0] != version(pin) or not applies(pin.marker, interpreter):
            continue
        told += 1
        if interpreter not in SpecifierSet(distribution.metadata.get("Requires-Python", "")):
            refused.append(f"{pin} needs Python {distribution.metadata['Requires-Python']}")
    assert refused == []
    assert told > 0


@pytest.fixture(scope="module")
def everywhere() -> dict[str, str]:
    """What is installed on any interpreter and system; without a package index, the one skip for all that need it."""
    return resolve("--universal", "--python-version", INTERPRETERS[0])


@pytest.mark.environment
def test_all_that_is_installed_anywhere_is_pinned(everywhere: dict[str, str]) -> None:
    assert set(everywhere) == {canonicalize_name(pin.name) for pin in PINS}


@pytest.mark.environment
@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=[] if "x86_64-manylinux" in name else pytest.mark.slow) for name in SYSTEMS]
)
@pytest.mark.usefixtures("everywhere")
def test_the_pins_resolve(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", "14.0")  # the oldest for which torch has a wheel
    options = ["--python-platform", system, "--only-binary", ":all:"]
    options += ["--no-binary", "antlr4-python3-runtime"]  # of hydra: pure Python, and never had a wheel
    with ThreadPoolExecutor() as together:  # they wait for the index rather than for the processor
        resolved = together.map(lambda python: resolve("--python-version", python, *options), INTERPRETERS)
    # The versions that are installed there are the pinned ones, and each has a wheel.
    assert dict(zip(INTERPRETERS, resolved, strict=True)) == {
        interpreter: pinned(interpreter, system) for interpreter in INTERPRETERS
    }
