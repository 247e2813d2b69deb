"""README and docs are true: their code runs, what they name is there, the length of the README is kept."""

import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vecfield_diffusion import commands
from vecfield_diffusion.programs import infer, train

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}


def blocks(text: str) -> list[tuple[str, str]]:
    """The language and the lines of each block of code."""
    return re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)


BLOCKS = blocks(TEXT)


def test_make_has_the_targets_that_the_readme_names():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"^make (\w+)", TEXT, re.MULTILINE))
    assert named == {"demo", "test"} and named <= set(targets)


def test_every_option_that_the_table_names_exists():
    rows = re.findall(r"^\| (`[^|]*) \| (`[^|]*) \|", TEXT, re.MULTILINE)
    for groups, options in rows:
        names = re.findall(r"`(\w+)`", options)
        files = {
            path.stem for group in re.findall(r"`(\w+)`", groups) for path in (ROOT / "conf" / group).glob("*.yaml")
        }
        assert set(names) <= files, (groups, set(names) - files)


def test_pictures_and_length():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert all((page.parent / path).is_file() for path in re.findall(r"\]\(([^)#]+)", page.read_text())), page
    assert len(TEXT.splitlines()) <= 165


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A network trained for a few steps on a few small flows."""
    folder = tmp_path_factory.mktemp("readme")
    small = ["resolution=16", "snapshots=60", "solver_resolution=32", "viscosity=1e-6", "order=2", "duration=5"]
    overrides = [f"dataset.{key}" for key in (*small, f"folder={folder}")]
    train.train(commands.train.config("debug=fast", "trainer.score_cases=0", *overrides), folder / "run")
    return folder / "run"


def test_library_example_runs(run_folder):
    """Members are a first dimension, `u` is their mean, and what was observed without error is kept."""
    (code,) = [block for language, block in BLOCKS if language == "python" and "vf.load" in block]
    scope = {}
    exec(code.replace("outputs/train/demo", str(run_folder)), scope)
    filled, prior, scores = scope["filled"], scope["prior"], scope["scores"]
    assert dict(filled.u_members.sizes) == {"member": 8, "time": 1, "y": 16, "x": 16}
    np.testing.assert_allclose(filled.u, filled.u_members.mean("member"), atol=1e-6)
    np.testing.assert_allclose(filled.u_std, filled.u_members.std("member", ddof=1), atol=1e-6)
    observed = filled.observed.values == 1
    np.testing.assert_allclose(filled.u.values[observed], filled.u_truth.values[observed], atol=1e-6)
    assert (filled.u_std.values[observed] == 0).all() and (filled.u_std.values[~observed] > 0).all()
    assert prior.u_members.sizes["member"] == 4 and set(scores["mask"]) == {"block"}


@pytest.mark.parametrize("name", ["Trigonometric", "Affine"])
def test_own_formulations_train_from_the_command_line(run_folder, tmp_path, monkeypatch, name):
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["extending"], re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    own = ["diffusion=custom", f"diffusion._target_=mine.{name}", "diffusion.t_max=0.99"]
    small = ["resolution=16", "snapshots=60", "solver_resolution=32", "viscosity=1e-6", "order=2", "duration=5"]
    overrides = [f"dataset.{key}" for key in (*small, f"folder={run_folder.parent}")]
    config = commands.train.config("debug=fast", "trainer.score_cases=0", "trainer.max_steps=2", *overrides, *own)
    assert math.isfinite(train.train(config, tmp_path / "run")["val/loss"])


def test_own_sampler_runs_from_the_command_line(run_folder, tmp_path, monkeypatch):
    """The example of the README, named by `_target_`; it converges on dz/ds = (z - D) / s."""
    (code,) = [block for language, block in BLOCKS if language == "python" and "class Ralston" in block]
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.chdir(tmp_path)
    chosen = ["sampler=euler", "sampler._target_=mine.Ralston", "sampler.steps=4", "members=2"]
    config = commands.infer.config(f"ckpt={run_folder}", "mask=block", *chosen)
    infer.infer(config, tmp_path / "filled")
    assert {"fields.nc", "figure.png", "metrics.json"} <= set(os.listdir(tmp_path / "filled"))
    ralston = sys.modules["mine"].Ralston
    errors = []
    for steps in (32, 64):
        levels = torch.linspace(2, 0.5, steps + 1, dtype=torch.float64)
        z = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
        x = ralston(steps).sample(lambda z, s: z / (1 + s.view(-1, 1, 1, 1) ** 2), levels, lambda z=z: z)
        errors.append(abs(x.item() - (1.25 / 5) ** 0.5))
    assert math.log2(errors[0] / errors[1]) > 1.8  # three on a Gaussian prior, two in general
