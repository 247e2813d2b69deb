"""A trained run to work on, and a way to call the programs."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: what is equal to the last bit needs one number

import pytest
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image
from programs import PROGRAMS, TINY, Call, process

from vecfield_diffusion.config.ending import guarded
from vecfield_diffusion.evaluation import report
from vecfield_diffusion.evaluation.plots import figure_inpainting, style
from vecfield_diffusion.programs import pictures


@pytest.fixture(scope="session")
def first_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `place` is a copy of: a training takes ten seconds, a copy none. Processes of xdist share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            done = process(folder, "train", *TINY, "name=run")
            assert done.returncode == 0, done.stderr
            assert "outputs/train/run: 10 steps" in done.stdout
            assert "next: python infer.py ckpt=outputs/train/run mask=block" in done.stdout
    return folder


@pytest.fixture(scope="module")
def place(first_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `python train.py name=run` was typed once."""
    return shutil.copytree(first_place, tmp_path_factory.mktemp("place"), dirs_exist_ok=True)


@pytest.fixture
def rendered() -> None:
    """What a test asks for that looks at pictures."""


def undrawn(path: Path, *given: object, **options: object) -> None:
    """Takes what `figure_inpainting` takes and draws nothing of it."""
    inspect.signature(figure_inpainting).bind(path, *given, **options)
    style.save(Figure(), path)


@pytest.fixture(autouse=True)
def not_rendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty but for tests that are `rendered`: to lay out and paint takes most of a program's time."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(style, "paint", lambda figure, to, kind: Image.new("L", (1, 1)).save(to, kind))
        monkeypatch.setattr(pictures, "figure_inpainting", undrawn)
        monkeypatch.setattr(report, "embedded", lambda draw: dict.fromkeys(("wide", "narrow"), "data:image/png,"))


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """A program in this process and in that folder: exit code, standard output, standard error."""
    monkeypatch.chdir(place)

    def call(program: str, *overrides: str) -> tuple[int, str, str]:
        main, job = PROGRAMS[program]

        def work() -> int:
            again = ("overwrite=true",) if program == "infer" else ()  # tests share names of results
            config = main.config(*again, *overrides)
            job(config, Path("outputs") / program / config["name"])
            return 0

        capsys.readouterr()
        code = guarded(work)
        return code, *capsys.readouterr()

    return call


#: What starts programs, trains or samples for long, what takes most time first: left out of `make quick`.
SLOW = (
    *("programs", "distributed", "choices", "files_filled", "evaluate", "report", "work_items", "commands"),
    *("series_pieces", "residual", "docs", "library", "series_combined", "ahead", "inspection", "gaussian"),
    *("field_likelihood", "series_filled", "export", "calibration", "series_public", "start", "drift", "cascade"),
    *("sweeps", "gating", "few_steps", "readme", "calibrate", "config", "trained", "training_room", "run_folder"),
    *("plausible", "posterior", "losses", "gaussian_energy", "standards", "combinations", "projection"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow modules, and puts them first: no process is to wait at the end for one long module."""
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in order:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))
