"""The floors of the house: imports go down, and each outside library has its room."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vecfield_diffusion"

FLOORS = [
    {"errors", "atomic", ""},
    {"models", "physics"},
    {"diffusion", "data"},
    {"samplers"},
    {"guidance"},
    {"training", "inference", "evaluation"},
    {"config", "programs", "commands", "library"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Where a library may be imported; one that is not listed may be imported wherever the room is not a pure one.
ROOMS = {
    "hydra": ["config/"],
    "omegaconf": ["config/"],
    "h5py": ["data/"],
    "xarray": ["data/", "inference/files.py", "inference/template.py", "programs/", "library.py"],
    "h5netcdf": ["data/", "inference/files.py"],
    "wandb": ["training/loggers.py"],
    "tensorboard": ["training/loggers.py"],
}
PURE = ("physics/", "diffusion/", "models/", "samplers/", "guidance/")


def imports(source: str, package: str) -> Iterator[str]:
    """The dotted names that a module of `package` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            parent = parts[: len(parts) - node.level + 1] if node.level else []
            yield from (".".join([*parent, *filter(None, [node.module]), alias.name]) for alias in node.names)


def faults(file: str, source: str) -> list[str]:
    """What a file, named relative to the package, imports that it may not."""
    room = file.partition("/")[0] if "/" in file else file.removesuffix(".py").replace("__init__", "")
    package = ".".join(["vecfield_diffusion", *Path(file).parent.parts])
    found = []
    for name in imports(source, package):
        top, _, rest = name.partition(".")
        if top == "vecfield_diffusion":
            # A name of the package itself, such as its version, belongs to the lowest floor.
            other = rest.partition(".")[0]
            if LEVEL.get(other, 0) > LEVEL[room]:
                found.append(f"{file} imports {name}, from a floor above")
        elif top not in sys.stdlib_module_names:
            allowed = ROOMS.get(top)
            pure = file.startswith(PURE) and top not in ("torch", "numpy")
            if pure or (allowed is not None and not file.startswith(tuple(allowed))):
                found.append(f"{file} imports {top}")
    return found


FILES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_keep_the_floors(file: str) -> None:
    assert faults(file, (PACKAGE / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("physics/grid.py", "from vecfield_diffusion.diffusion import denoiser"),
        ("physics/grid.py", "from ..data.fields import Fields"),
        ("physics/grid.py", "def f():\n    import scipy.sparse"),
        ("samplers/heun.py", "from vecfield_diffusion import guidance"),
        ("errors.py", "from .physics import grid"),
        ("atomic.py", "from .data import fields"),
        ("training/trainer.py", "from omegaconf import OmegaConf"),
        ("training/trainer.py", "import wandb"),
        ("inference/ensemble.py", "import xarray as xr"),
        ("evaluation/report.py", "from vecfield_diffusion.programs import train"),
    ],
)
def test_an_import_that_goes_up_is_seen(file: str, source: str) -> None:
    assert len(faults(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("config/program.py", "import hydra\nfrom vecfield_diffusion.errors import UserError"),
        ("physics/grid.py", "import math, numpy, torch.fft\nfrom ..errors import UserError"),
        ("data/hdf5.py", "import h5py\nfrom vecfield_diffusion.atomic import replacing"),
        ("inference/files.py", "import xarray\nfrom ..data import fields\nfrom .. import __version__"),
        ("training/loggers.py", "import wandb"),
    ],
)
def test_an_import_that_goes_down_is_allowed(file: str, source: str) -> None:
    assert faults(file, source) == []
