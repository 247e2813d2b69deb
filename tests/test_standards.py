"""A filled file is understood by those who did not write it: CF 1.8, ACDD 1.3, members in files of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from programs import is_message
from test_series_filled import config, pair, series

from vecfield_diffusion import commands
from vecfield_diffusion.config.ending import guarded
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.inference.files import FieldsWriter, members_beside
from vecfield_diffusion.inference.metadata import UNSTATED, iso_duration
from vecfield_diffusion.inference.template import Buffer
from vecfield_diffusion.programs.gaussian import Series, open_series
from vecfield_diffusion.programs.layout import layout

T = 24
#: The checker of IOOS, where it is installed.
CHECKER = shutil.which("compliance-checker", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SAID = {"metadata.creator": "Ann", "metadata.depth": 0.5, "metadata.licence": "CC-BY-4.0"}


def described(**attrs: str) -> xr.Dataset:
    """A series with degrees that say so, as a file of the sea has them."""
    data = series(T).assign_attrs(attrs)
    for name, units in (("lat", "degrees_north"), ("lon", "degrees_east")):
        data[name].attrs["units"] = units
    return data.rename(day="time")


def job_of(data: xr.Dataset, **keywords: object) -> Series:
    return open_series(config(members=3, **keywords), source=data)


def fields_of(job: Series, times: int = T) -> dict[str, np.ndarray]:
    """What an ensemble could be, with some of it known."""
    rng, shape = np.random.default_rng(0), (2, *job.grid.shape)
    members = rng.standard_normal((job.config["members"], times, *shape)).astype(np.float32)
    return {"members": members, "observed": rng.random((times, 1, *shape[1:])) < 0.5, "truth": members[0]}


def written(path: Path, job: Series, **options: bool) -> xr.Dataset:
    """The file of it, open and loaded."""
    writer = FieldsWriter.of(path, layout(job, **options), "key")
    writer.write(list(range(T)), **fields_of(job))
    writer.finish()
    with xr.open_dataset(path) as data:
        return data.load()


def complaints(path: Path) -> list[str]:
    """What the checker of IOOS finds wrong with a file, its recommendations, too."""
    answer = path.with_suffix(".json")
    command = [CHECKER, "-t", "cf:1.8", "-t", "acdd:1.3", "-c", "normal", "-f", "json", "-o", str(answer), str(path)]
    subprocess.run(command, capture_output=True, timeout=60)
    found = json.loads(answer.read_text())
    assert set(found) == {"cf:1.8", "acdd:1.3"} and all(part["possible_points"] > 20 for part in found.values())
    checks = [check for part in found.values() for of in ("high_priorities", "medium_priorities") for check in part[of]]
    return [message for check in checks for message in check["msgs"]]


@pytest.mark.skipif(CHECKER is None, reason="the compliance checker is not installed: pip install compliance-checker")
def test_the_checker_of_ioos_finds_nothing(tmp_path: Path) -> None:
    """In mean, spread, members, truth and products that CF has names for, nor in the file of one member.

    Without a depth it misses that alone, and the standard names of a probability and of the strain, which CF lacks.
    """
    named = "[quantiles,direction,energy,vorticity]"
    written(tmp_path / "one.nc", job_of(described(), products=named, **SAID))
    written(tmp_path / "two.nc", job_of(described(), **SAID), split=True)
    written(tmp_path / "three.nc", job_of(described(), products="[strain]", exceed="{speed:0.5}"))
    assert complaints(tmp_path / "one.nc") == complaints(tmp_path / "two_member_001.nc") == []
    missing = {line for line in complaints(tmp_path / "three.nc") if "vertical" not in line}
    assert missing == {"standard_name"}


def test_where_and_when_and_who(tmp_path: Path) -> None:
    """Of what was filled, not of the whole input, whose own claims are taken where they still hold."""
    given = {"summary": "Made by hand.", "institution": "here", "acknowledgment": "thanks", "creator_name": "Bob"}
    stale = {"geospatial_lat_min": "-90", "time_coverage_start": "1900", "id": "theirs", "date_created": "1900"}
    data = written(tmp_path / "f.nc", job_of(described(**given, **stale), **SAID))
    attrs = data.attrs
    assert (attrs["geospatial_lat_min"], attrs["geospatial_lon_max"]) == (data.lat.min(), data.lon.max())
    assert attrs["geospatial_bounds"].startswith(f"POLYGON (({data.lat.values[0]:.9g} {data.lon.values[0]:.9g}, ")
    start, end = data.time.values[[0, -1]].astype("datetime64[s]")
    assert (attrs["time_coverage_start"], attrs["time_coverage_end"]) == (f"{start}Z", f"{end}Z")
    assert (attrs["time_coverage_duration"], attrs["time_coverage_resolution"]) == ("P23D", "P1D")
    assert attrs["creator_name"] == attrs["publisher_name"] == "Ann" and attrs["license"] == "CC-BY-4.0"
    assert (attrs["institution"], attrs["acknowledgement"]) == ("here", "thanks")
    assert attrs["creator_email"] == UNSTATED and attrs["id"].startswith("vecfield_diffusion-")
    assert "3 fields" in attrs["summary"] and attrs["summary"].endswith("Filled from: Made by hand.")
    assert data.depth == 0.5 and attrs["geospatial_vertical_positive"] == "down"
    assert data.lat.attrs["long_name"] == "latitude" and data.time.encoding["dtype"] == np.float64


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "PT0S"), (86400, "P1D"), (3600 * 30, "P1DT6H"), (1200, "PT20M"), (86400 * 400 + 61, "P400DT1M1S")],
)
def test_durations(seconds: float, text: str) -> None:
    assert iso_duration(seconds) == text


def test_a_dataset_in_memory_is_the_file(tmp_path: Path) -> None:
    """Coordinates as coordinates, the same attributes; written by xarray, it is understood as the file is."""
    job = job_of(described(), **SAID, products="[energy]")
    data = written(tmp_path / "f.nc", job)
    buffer = Buffer(layout(job))
    buffer.write(list(range(T)), **fields_of(job))
    memory = buffer.finish()
    assert set(memory.coords) == set(data.coords) and list(memory.data_vars) != []
    assert {name: memory[name].attrs.keys() for name in memory.variables} == {
        name: data[name].attrs.keys() for name in data.variables
    }
    memory.to_netcdf(tmp_path / "again.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "again.nc") as again:
        assert set(again.coords) == set(data.coords)
        assert again["ueast"].attrs["cell_methods"] == "ensemble: mean"


def test_the_mean_is_what_a_filled_file_is_read_as(tmp_path: Path) -> None:
    """Though quantiles, members and truth have its standard name; filled once more, its methods are not said twice."""
    data = written(tmp_path / "f.nc", job_of(described(), products="[quantiles]"))
    fields = open_fields(str(tmp_path / "f.nc"))
    assert fields.names == ("ueast", "vnorth")
    np.testing.assert_array_equal(fields.read(range(T)).numpy(), np.moveaxis(pair(data), 0, 0))
    again = written(tmp_path / "g.nc", open_series(config(members=3), source=str(tmp_path / "f.nc")))
    assert again["ueast"].attrs["cell_methods"] == "ensemble: mean"
    assert again["ueast"].attrs["ancillary_variables"] == "ueast_std observed"


def test_members_in_files_of_their_own(tmp_path: Path) -> None:
    """Each with the plain names; those of a larger ensemble before are gone."""
    job, path = job_of(described()), tmp_path / "f.nc"
    (tmp_path / "f_member_003.nc").touch()
    data, whole = written(path, job, split=True), written(tmp_path / "whole.nc", job)
    assert "ueast_members" not in data and "member" not in data.dims
    np.testing.assert_array_equal(data["ueast_std"], whole["ueast_std"])
    files = members_beside(path)
    assert [file.name for file in files] == ["f_member_000.nc", "f_member_001.nc", "f_member_002.nc"]
    for number, file in enumerate(files):
        fields = open_fields(str(file))
        assert fields.names == ("ueast", "vnorth")
        np.testing.assert_array_equal(fields.read(range(T)).numpy(), pair(whole, "_members")[number])
        with xr.open_dataset(file) as member:
            assert member.attrs["realization_index"] == number and set(member.data_vars) == {
                *("ueast", "vnorth", "observed", "valid"),
            }
            assert member["ueast"].attrs["standard_name"] == "eastward_sea_water_velocity"
            assert "cell_methods" not in member["ueast"].attrs and "ensemble" not in member.coords


def test_what_is_no_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    code = guarded(lambda: commands.infer.config("ckpt=none", "metadata.creater=Ann") and 0)
    is_message((code, *capsys.readouterr()), "metadata.creater", "metadata.creator")
