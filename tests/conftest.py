"""A trained run to work on, and a way to call the programs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: what is equal to the last bit needs one number

import pytest
from programs import PROGRAMS, TINY, Call, process

from vecfield_diffusion.config.ending import guarded


@pytest.fixture(scope="session")
def first_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `place` is a copy of: a training takes ten seconds, a copy none."""
    folder = tmp_path_factory.mktemp("first")
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


#: What starts programs, trains or samples for long: left out of `make quick`.
SLOW = (
    *("programs", "choices", "files_filled", "evaluate", "combinations", "report", "residual", "library", "config"),
    *("posterior", "gaussian", "projection", "trained", "training_room", "calibrate", "export", "plausible"),
    *("run_folder", "calibration", "field_likelihood", "series_filled", "readme", "few_steps", "distributed"),
    "work_items",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow modules."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)
