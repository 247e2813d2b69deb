"""Every command of the README and the docs runs, page by page, on small files and runs that stand for those named."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from vecfield_diffusion import commands
from vecfield_diffusion.config.overrides import Composer
from vecfield_diffusion.config.program import CONF, Program

ROOT = Path(__file__).parents[1]
PAGES = {
    path.parent.name if path.name == "README.md" and path.parent != ROOT else path.stem: path.read_text()
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *(ROOT / folder / "README.md" for folder in ("pretrained", "benchmarks")),
    )
}

#: Cells along each axis of the files that stand for those named.
SIDE = 14
#: What makes a configuration small: the most of each whole number, and what stands for the rest where a page sets it.
SMALLER: dict[str, Any] = {
    "trainer": {
        **{"max_steps": 1, "batch_size": 2, "devices": 1, "validation_batches": 1, "score_cases": 1},
        **{"score_members": 2, "warmup": 2},
    },
    "model": {
        **{"channels": [8, 8], "coarse": [8, 8], "embedding": 16, "blocks": 1},
        **{"width": 16, "depth": 1, "heads": 2},
    },
    "dataset": {"resolution": SIDE, "solver_resolution": SIDE, "snapshots": 40, "duration": 2.0},
    "splits": {"train": 0.4, "validation": 0.3, "test": 0.3, "guard": 0},
    "sampler": {"steps": 2},
    **{"window": [SIDE - 1, SIDE - 1], "members": 2, "cases": 4, "likelihood_steps": 2},
}
#: Commands that are not run, only read where their plugin is, and where what they start is tested.
STARTED_ELSEWHERE = {
    r"hydra/(launcher|sweeper)=": "launchers and sweepers of the extra `sweep`, and SLURM: test_sweeps.py",
    r"model=foreign": "a network of diffusers, which no extra but `bench` installs: test_foreign.py",
}
#: What stands for a file, all with the same series.
FILES = ("my.nc", "radar.nc", "radials.nc", "swath.nc", "sea.nc", "currents.nc", "archive.nc", "FILE")
FILES += ("archive/month_0.nc",)
#: What stands for trained runs: the command that trains it, and the places it is found at.
RUNS = {
    "train.py dataset.path=my.nc model=gaussian name=mine": ("outputs/train/run",),
    "train.py dataset.path=my.nc model=gaussian dataset.frames=5 name=series": (),
    "train.py name=flows": ("RUN", "pretrained/turbulence"),
}


def blocks(text: str) -> list[tuple[str, str]]:
    """The language and the lines of each block of code."""
    return re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)


def lines(block: str) -> list[str]:
    """The commands of a block, those that a scheduler starts by themselves."""
    block = re.sub(r'--wrap "([^"]*)"', r"\n\1\n", block.replace("\\\n", ""))
    found = re.findall(r"(?:(?:python|torchrun(?: --\S+)*) +(?:scripts/)?\w+\.py|\bvecfield-\w+) [^#\n&]*", block)
    return [line.strip() for line in found]


def in_text(text: str) -> list[str]:
    """The commands that stand within a line of text, which may go on in the next one."""
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for span in spans for line in lines(span.replace("\n", " "))]


def of_page(text: str) -> list[str]:
    """The commands of a page, once each."""
    found = [*(line for _, block in blocks(text) for line in lines(block)), *in_text(text)]
    return [line for line in dict.fromkeys(found) if "..." not in line]


def parsed(command: str) -> tuple[Program, list[str]]:
    """The command behind a script or a door of the package, and what follows it."""
    words = shlex.split(re.sub(r"\$\w+", "0", command))  # variables of a shell
    place = next(place for place, word in enumerate(words) if re.search(r"\.py$|^vecfield-", word))
    name = re.fullmatch(r"(?:scripts/)?(\w+?)(?:_data)?\.py|vecfield-(\w+)", words[place]).expand(r"\1\2")
    return getattr(commands, name), words[place + 1 :]


def plugins_are_here(command: str) -> bool:
    """Whether the launcher and the sweeper that a command names are installed."""
    names = re.findall(r"hydra/(launcher|sweeper)=([a-z]+)", command)
    if names and importlib.util.find_spec("hydra_plugins") is None:
        return False
    return all(importlib.util.find_spec(f"hydra_plugins.hydra_{name}_{kind}") for kind, name in names)


def configurations(program: Program, overrides: list[str]) -> list[dict[str, Any]]:
    """What a command asks for: one, or of a sweep all."""
    if "-m" not in overrides:
        return [program.config(*overrides)]
    variants = Composer(CONF, program.name).variants([word for word in overrides if word != "-m"])
    return [program.config(*variant) for variant in variants]


def smaller(node: dict[str, Any], most: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with what `SMALLER` says."""

    def of(key: str, value: Any) -> Any:
        if key not in most or not value:
            return value
        if isinstance(most[key], dict):
            return smaller(value, most[key])
        return min(value, most[key]) if isinstance(value, int) else most[key]

    return {key: of(key, value) for key, value in node.items()}


def in_small(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that asks for little: five times of a file, the first of several masks, two baselines."""
    most = SMALLER
    if isinstance(config.get("baselines"), list):
        config = config | {"baselines": config["baselines"][-2:]}
    if config.get("ckpt") == "none":  # which no sampler is for
        most = {key: value for key, value in SMALLER.items() if key != "sampler"}
    if config.get("input") and config.get("time", "") is None:
        config = config | {"time": "0:5"}
    return smaller(config | ({"masks": config["masks"][:1]} if "masks" in config else {}), most)


def work(program: Program, config: dict[str, Any], done: dict[str, Path]) -> None:
    """Does what the program would, in small; what was done under another name, or for another file, is copied.

    A run that is there already is trained anew: pages call alternatives by one name.
    """
    config, folder = in_small(config), Path("outputs") / program.name / str(config.get("name", ""))
    asked = json.dumps([program.name, {key: value for key, value in config.items() if key != "name"}], default=str)
    asked = re.sub("|".join(map(re.escape, FILES)), "FILE", asked)
    if asked in done or program.name == "train":
        shutil.rmtree(folder, ignore_errors=True)
    if asked in done:
        shutil.copytree(done[asked], folder)
        return
    module, _, name = program.job.partition(":")
    getattr(importlib.import_module(module), name)(config, folder)
    if program.folder:
        assert any(folder.iterdir())
        done[asked] = shutil.copytree(folder, Path("done") / str(len(done)))


def sea(first: str, step: str, lon: np.ndarray, lat: np.ndarray) -> xr.Dataset:
    """Waves that travel, with gaps and a corner of land, and all that a page may ask a file for."""
    rng = np.random.default_rng(0)
    hours, rows, columns = np.meshgrid(np.arange(64), np.arange(SIDE), np.arange(SIDE), indexing="ij")
    u = 0.3 * np.sin(0.5 * rows + 0.4 * columns - 0.2 * hours) + 0.02 * rng.standard_normal(hours.shape)
    v = 0.3 * np.cos(0.4 * rows - 0.5 * columns + 0.2 * hours) + 0.02 * rng.standard_normal(hours.shape)
    gone = (rng.random(hours.shape) < 0.8) | (rows + columns < 3)
    u, v = np.where(gone, np.nan, u), np.where(gone, np.nan, v)
    axes, shape = ("time", "lat", "lon"), hours.shape
    flags = {"flag_values": np.array([1, 4], np.int8), "flag_meanings": "good bad"}
    whole, speed = np.ones(shape), {"units": "m s-1"}
    towards = (f"{way}_sea_water_velocity" for way in ("eastward", "northward"))
    u, v = ((values, speed | {"standard_name": next(towards), "ancillary_variables": "qc"}) for values in (u, v))
    given = {"u": u, "v": v, "qc": (np.where(rng.random(shape) < 0.05, 4, 1).astype(np.int8), flags)}
    given |= {"u_err": (0.05 * whole, {}), "v_err": (0.04 * whole, {}), "uv_covariance": (0.001 * whole, {})}
    given |= {
        "EWCS": (0.05 * whole, speed),
        "NSCS": (0.04 * whole, speed),
        "CCOV": (0.001 * whole, {"units": "m2 s-2"}),
    }
    given |= {name: (whole, {"units": "1"}) for name in ("DOPx", "DOPy")}
    given |= {"vr": u, "head": (90 * whole, {"units": "degree"})}
    given |= {"adt": (0.1 * u[0], {"units": "m"}), "bathymetry": (100 * whole, {"units": "m"})}
    return xr.Dataset(
        {name: (axes, values, attrs) for name, (values, attrs) in given.items()},
        {
            "time": xr.date_range(first, periods=64, freq=step),
            "lat": ("lat", lat, {"units": "degrees_north"}),
            "lon": ("lon", lon, {"units": "degrees_east"}),
        },
    )


@pytest.fixture(scope="module")
def done() -> dict[str, Path]:
    """The folder of each configuration that ran: some differ in what is made small alone."""
    return {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, done: dict[str, Path]) -> Path:
    """A folder with the files and the runs that pages name without making them."""
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cells = np.arange(SIDE)
        sea("2022-02-21", "3h", -74 + 0.05 * cells, 39 + 0.025 * cells).to_netcdf("my.nc")
        sea("2002-01-01", "D", 16.0 + 0.25 * cells, -39 + 0.25 * cells).to_netcdf("globcurrent_agulhas_2002.nc")
        Path("archive").mkdir()
        for name in FILES[1:]:
            shutil.copy("my.nc", name)
        np.save("my_mask.npy", np.arange(SIDE**2).reshape(SIDE, SIDE) % 3 == 0)
        rng = np.random.default_rng(0)
        table = {"lon": rng.uniform(-74, -73.4, 50), "lat": rng.uniform(39, 39.3, 50), "error": 0.05}
        table |= {"u": rng.normal(0, 0.2, 50), "v": rng.normal(0, 0.2, 50)}
        table["time"] = pd.Timestamp("2022-02-21") + pd.to_timedelta(rng.integers(0, 48, 50), "h")
        pd.DataFrame(table).to_csv("drifters.csv", index=False)
        for command, places in RUNS.items():
            program, overrides = parsed(command)
            (config,) = configurations(program, overrides)
            work(program, config, done)
            for place in places:
                shutil.copytree(Path("outputs", "train", config["name"]), place)
    return folder


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if of_page(text)])
def test_the_commands_of_a_page_run(
    page: str, place: Path, done: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, as they stand there, in small; of a sweep all are composed, the first and the last one run."""
    monkeypatch.chdir(place)
    for command in of_page(PAGES[page]):
        try:
            program, overrides = parsed(command)
            if plugins_are_here(command):
                asked = configurations(program, overrides)
            if any(re.search(pattern, command) for pattern in STARTED_ELSEWHERE):
                continue
            for config in asked[:: max(1, len(asked) - 1)]:
                work(program, config, done)
        except BaseException as error:
            error.add_note(f"{page}: {command}")
            raise
