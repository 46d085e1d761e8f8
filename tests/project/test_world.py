"""What stands around the code: forms, recipes and badges say what the project says of itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


@pytest.mark.skipif(not FORMS.is_dir(), reason="the source archive has no forms")
@pytest.mark.parametrize("name", ["bug.yml", "idea.yml"])
def test_forms_have_what_a_form_needs(name: str) -> None:
    form = yaml.safe_load((FORMS / name).read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    parts = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in parts}) == len(parts) >= 2
    assert all(part["attributes"]["label"] for part in parts)
    assert any(part.get("validations", {}).get("required") for part in parts)


def test_the_conda_recipe_asks_for_what_the_package_asks_for() -> None:
    text = (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("{%")]
    recipe = yaml.safe_load("\n".join(lines).replace("{{ version }}", "0"))
    (torch,) = PROJECT["dependencies"]
    assert set(recipe["requirements"]["run"]) == {
        f"python {PROJECT['requires-python']}",
        torch.replace("torch", "pytorch ", 1),
    }
    about = recipe["about"]
    assert (about["license"], about["summary"]) == (PROJECT["license"], PROJECT["description"])
    assert (about["home"], about["doc_url"]) == (PROJECT["urls"]["Homepage"], PROJECT["urls"]["Documentation"])


def test_the_badges_are_true() -> None:
    """Each is an image of something that exists: a workflow, the documentation, what pyproject.toml says."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    badges = re.findall(r"\[!\[([^\]]+)\]\(([^)]+)\)\]\(([^)]+)\)", text)
    assert len(badges) == 4
    said = {name: (image, link) for name, image, link in badges}
    workflow = re.search(r"workflows/([\w.]+)/badge\.svg", said["tests"][0])
    assert workflow is not None
    assert not FORMS.is_dir() or (ROOT / ".github" / "workflows" / workflow[1]).is_file()
    assert PROJECT["requires-python"].removeprefix(">=") + "+" in said["python"][0].replace("%2B", "+")
    assert PROJECT["dependencies"][0].partition(">=")[2] + "+" in said["torch"][0].replace("%2B", "+")
    assert "readthedocs" in said["documentation"][0]


def test_read_the_docs_builds_what_make_docs_builds() -> None:
    path = ROOT / ".readthedocs.yaml"
    if not path.is_file():
        pytest.skip("the source archive has no settings of a service")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert settings["sphinx"] == {"configuration": "docs/conf.py", "fail_on_warning": True}
    assert ".[docs]" in settings["build"]["jobs"]["install"][1]
