"""How tests call the programs: in a process of its own or in this one, with networks that train in a second."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vecfield_diffusion import commands
from vecfield_diffusion.programs import evaluate, infer, train

ROOT = Path(__file__).parents[1]
FLOWS = ["resolution=16", "solver_resolution=32", "snapshots=48", "viscosity=1e-6", "order=2", "duration=5"]
TINY = ["debug=fast", *(f"dataset.{key}" for key in FLOWS)]
SMALL = ["model.channels=[8,8]", "model.embedding=16", "trainer.score_cases=0"]
FEW = ["members=2", "sampler.steps=2"]
PROGRAMS = {"train": (commands.train, train.train), "infer": (commands.infer, infer.infer)}
PROGRAMS |= {"evaluate": (commands.evaluate, evaluate.evaluate)}

Call = Callable[..., tuple[int, str, str]]


def process(folder: Path, program: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, in `folder`."""
    command = [sys.executable, str(ROOT / f"{program}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **options
    )  # fmt: skip


def trained_in(folder: Path, *overrides: str) -> None:
    """Trains in this process and in `folder`, before any test has a fixture for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = commands.train.config(*overrides)
        train.train(config, Path("outputs/train") / config["name"])


def is_message(done: subprocess.CompletedProcess[str] | tuple[int, str, str], *parts: str) -> None:
    """Fails unless a program ended with 1 and one line that holds `parts`."""
    code, err = (done.returncode, done.stderr) if isinstance(done, subprocess.CompletedProcess) else done[::2]
    assert code == 1, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(part in err for part in parts), (err, parts)
