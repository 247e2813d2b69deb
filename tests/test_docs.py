"""The site: its tutorial runs, its reference has every option; the recipe of conda asks for what the package does."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


def test_the_tutorial_fills_its_file(tmp_path, monkeypatch, capsys):
    """A third of its hours: in space and time the hidden field is found better than from the hour alone."""
    monkeypatch.chdir(tmp_path)
    make, fill = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)
    exec(make.replace("72", "24"), {})
    scope = {}
    exec(fill.replace("members=16", "members=4"), scope)
    rows = re.findall(r"^(space and time|snapshot alone) +([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    errors = {name: float(error) for name, error in rows}
    assert errors["space and time"] < 0.7 * errors["snapshot alone"]
    assert scope["filled"].u.shape == (24, 24, 32) and 0 <= float((scope["speed"] > 0.5).mean()) < 0.2


@pytest.fixture
def options(monkeypatch):
    """The module that writes the reference."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "options", raising=False)
    import options

    return options


def test_the_reference_has_every_option_and_key(options, tmp_path):
    """Each with the comment that stands beside it in the configuration."""
    options.write(tmp_path)
    text = (tmp_path / "groups.md").read_text()
    for file in (ROOT / "conf").glob("*/*.yaml"):
        group, option = file.parent.name, file.stem
        if group == "hydra":
            continue
        (part,) = re.findall(rf"^### {group}={option}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
        for key, value in (yaml.safe_load(file.read_text()) or {}).items():
            plain = not isinstance(value, dict) and key not in ("_target_", "defaults")
            assert not plain or f"`{key}`" in part or f"`{group}.{key}`" in part, (group, option, key)
    assert "| `sampler.eta` | `0.0` | the share of fresh noise, 0 to 1" in text
    page = (tmp_path / "commands.md").read_text()
    assert set(re.findall(r"^## (\w+)", page, re.MULTILINE)) == set(options.COMMANDS)
    assert re.search(r"\| `members` \| `16` \| fields drawn for each snapshot \|", page)


def test_the_recipe_is_that_of_the_package():
    """conda has other names for three of them, and Python itself beside."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    recipe = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text())
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base", "cf-xarray": "cf_xarray"}
    needed = {re.sub(r"^[\w-]+", lambda found: names.get(found[0], found[0]), line) for line in project["dependencies"]}
    assert {line.replace(" ", "") for line in recipe["requirements"]["run"]} == needed | {
        f"python{project['requires-python']}"
    }
    points = dict(line.split(" = ") for line in recipe["build"]["python"]["entry_points"])
    assert points == project["scripts"]
    version = re.search(r'__version__ = "(.*)"', (ROOT / "vecfield_diffusion" / "__init__.py").read_text())[1]
    assert recipe["context"]["version"] == version
