"""The floors of the house: imports go down, no two files stand in a circle, and each outside library has its room."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vecfield_diffusion"
NAME = PACKAGE.name

#: From the ground up: rooms, or single files of a room, which go before it.
FLOORS = [
    {"errors", "atomic", "axes", "ellipses", "memory", "progress", "resources", "signals", "threads", "pool", "ranks"},
    {"models", "physics"},
    {"diffusion", "data"},
    {"samplers"},
    {"guidance"},
    {"training", "inference", "evaluation"},
    # What makes objects of nodes, and what reads the folder of a sweep, know neither Hydra nor the command line.
    {"config/build", "config/schema", "config/kinds", "config/sources", "config/moved", "config/sweep"},
    {"programs"},
    {"config", "commands"},
    {"library", "__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

#: Where a library may be imported; one that is not listed may be imported wherever the room is not a pure one.
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
#: What torch has none of: sparse factorisations.
SOLVERS = {"scipy": ["physics/factored.py"]}

#: What may be imported inside a function, and why.
OPTIONAL = {
    "wandb": "takes seconds to import, and logger=wandb alone needs it",
    "torch.utils.tensorboard": "an extra of the package",
    "tensorboard": "an extra of the package",
    "cartopy": "an extra of the package",
    "joblib": "an extra of the package",
}

# What offends today. Take off what is mended; nothing may be put on.
INSIDE_TODAY = set()
TYPES_TODAY = set()
UP_TODAY = set()
CIRCLES_TODAY = set()


def imports(source: str, package: str) -> Iterator[str]:
    """The dotted names that a module of `package` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        yield from _named(node, package)


def _named(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        parent = parts[: len(parts) - node.level + 1] if node.level else []
        yield from (".".join([*parent, *filter(None, [node.module]), alias.name]) for alias in node.names)


def package_of(file: str) -> str:
    """The package that a file, named relative to ours, lies in."""
    return ".".join([NAME, *Path(file).parent.parts])


def level(file: str) -> int:
    """The floor of a file."""
    stem = file.removesuffix(".py")
    return LEVEL[stem] if stem in LEVEL else LEVEL[stem.partition("/")[0]]


def target(name: str) -> str | None:
    """The file that an imported name of this package lies in; None for a fact of the package such as its version."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py").relative_to(PACKAGE).as_posix()
        if (path / "__init__.py").is_file():
            return (path / "__init__.py").relative_to(PACKAGE).as_posix()
    return None if parts in ([], ["__version__"]) else "__init__.py"


def faults(file: str, source: str) -> list[str]:
    """What a file, named relative to the package, imports that it may not."""
    found = []
    for name in imports(source, package_of(file)):
        top = name.partition(".")[0]
        if top == NAME:
            other = target(name)
            if other is not None and level(other) > level(file) and (file, other) not in UP_TODAY:
                found.append(f"{file} imports {name}, from a floor above")
        elif top not in sys.stdlib_module_names:
            allowed = ROOMS.get(top)
            pure = file.startswith(PURE) and top not in ("torch", "numpy") and file not in SOLVERS.get(top, ())
            if pure or (allowed is not None and not file.startswith(tuple(allowed))):
                found.append(f"{file} imports {top}")
    return found


def inside(source: str, package: str = NAME) -> list[str]:
    """What a module imports inside its functions, but for what is optional."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [name for inner in ast.walk(node) for name in _named(inner, package)]
    return sorted({name for name in found if not any(f"{name}.".startswith(f"{free}.") for free in OPTIONAL)})


def for_types_alone(source: str) -> bool:
    """Whether a module imports names that only a type checker sees."""
    tests = [node.test for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    return any(ast.unparse(test).rpartition(".")[2] == "TYPE_CHECKING" for test in tests)


def circle(sources: Mapping[str, str], free: set[tuple[str, str]] = frozenset()) -> list[str]:
    """Files that import each other in a circle, wherever in them the imports stand; empty where there is none."""
    graph = {}
    for file, source in sources.items():
        wanted = {target(name) for name in imports(source, package_of(file)) if name.partition(".")[0] == NAME}
        graph[file] = {other for other in wanted - {None, file} if (file, other) not in free}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


FILES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))
SOURCES = {file: (PACKAGE / file).read_text() for file in FILES}


@pytest.mark.parametrize("file", FILES)
def test_imports_keep_the_floors(file: str) -> None:
    assert faults(file, SOURCES[file]) == []


@pytest.mark.parametrize("file", sorted(set(FILES) - INSIDE_TODAY))
def test_no_import_inside_a_function_but_of_what_is_optional(file: str) -> None:
    assert inside(SOURCES[file], package_of(file)) == []


@pytest.mark.parametrize("file", sorted({file for file in FILES if file.startswith("programs/")} - TYPES_TODAY))
def test_programs_import_what_they_name(file: str) -> None:
    assert not for_types_alone(SOURCES[file])


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(SOURCES, CIRCLES_TODAY) == []


def test_what_was_mended_is_off_the_lists() -> None:
    def imported(file: str) -> set[str | None]:
        names = imports(SOURCES.get(file, ""), package_of(file))
        return {target(name) for name in names if name.partition(".")[0] == NAME}

    assert {file for file in INSIDE_TODAY if not inside(SOURCES.get(file, ""), package_of(file))} == set()
    assert {file for file in TYPES_TODAY if not for_types_alone(SOURCES.get(file, ""))} == set()
    assert {(file, other) for file, other in UP_TODAY if other not in imported(file)} == set()
    assert not CIRCLES_TODAY or circle(SOURCES) != []


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
        ("training/trainer.py", "from vecfield_diffusion.config.build import build"),
        ("inference/ensemble.py", "import xarray as xr"),
        ("evaluation/report.py", "from vecfield_diffusion.programs import train"),
        ("programs/train.py", "from vecfield_diffusion.config.program import option"),
        ("programs/train.py", "import vecfield_diffusion.commands"),
        ("config/build.py", "from vecfield_diffusion.programs.train import train"),
        ("config/schema.py", "from .overrides import Composer"),
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
        ("programs/train.py", "from vecfield_diffusion.config.build import build\nfrom ..config import sweep"),
        ("commands.py", "from vecfield_diffusion.config.program import Program\nfrom .programs import train"),
    ],
)
def test_an_import_that_goes_down_is_allowed(file: str, source: str) -> None:
    assert faults(file, source) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ndef f(): pass", []),
        ("def f():\n    import torch", ["torch"]),
        ("class A:\n    def f(self):\n        if x:\n            from .b import c", [f"{NAME}.b.c"]),
        ("def f():\n    def g():\n        import a.b", ["a.b"]),
        ("def f():\n    import wandb\n    from torch.utils.tensorboard import SummaryWriter", []),
        ("def f():\n    import wandbish", ["wandbish"]),
        ("if TYPE_CHECKING:\n    import torch", []),
    ],
)
def test_an_import_inside_a_function_is_seen(source: str, found: list[str]) -> None:
    assert inside(source) == found


@pytest.mark.parametrize("place", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_a_circle_is_seen_wherever_its_imports_stand(place: str) -> None:
    files = {
        "errors.py": f"from {NAME} import atomic",
        "atomic.py": place.format(f"from {NAME}.commands import infer"),
        "commands.py": "from .errors import UserError",
    }
    assert set(circle(files)) == set(files)
    assert circle(files | {"commands.py": f"from {NAME} import __version__"}) == []
    assert circle(files, {("errors.py", "atomic.py")}) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if TYPE_CHECKING:\n    import a", True),
        ("if typing.TYPE_CHECKING:\n    pass", True),
        ("if x:\n    pass", False),
    ],
)
def test_names_for_types_alone_are_seen(source: str, found: bool) -> None:
    assert for_types_alone(source) == found
