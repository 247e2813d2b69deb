"""Quality flags decide what counts as measured: of QARTOD and of Copernicus, several together, told with counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from programs import is_message

from vecfield_diffusion import commands
from vecfield_diffusion.config.ending import guarded
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.readers.quality import BAD_CODE, GOOD_CODE, UNKNOWN_CODE, meanings
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.programs.gaussian import open_series

QARTOD = {
    "flag_values": np.array([1, 2, 3, 4, 9], "i1"),
    "flag_meanings": "pass not_evaluated suspect fail missing_data",
}
COPERNICUS = {
    "flag_values": "0b, 1b, 2b, 3b, 4b, 8b, 9b",
    "flag_meanings": "no_qc_performed good_data probably_good_data bad_data_that_are_potentially_correctable bad_data "
    "interpolated_value missing_value",
}
DIMS = ("time", "lat", "lon")
#: The flags of the first cells: two of QARTOD, and what they say together.
FIRST = [1, 1, 2, 2, 1, 3, 4, 2]
SECOND = [1, 2, 2, 3, 4, 1, 1, 1]
SAID = [GOOD_CODE, GOOD_CODE, UNKNOWN_CODE, BAD_CODE, BAD_CODE, BAD_CODE, BAD_CODE, GOOD_CODE]


def radar(**changes: object) -> xr.Dataset:
    """Two hours of 3 x 4 cells; the flags stand in the first hour, the second is good all over, u lacks one value."""
    flags = np.ones((2, 2, 3, 4), dtype="i1")
    flags[0, 0].flat[:8], flags[1, 0].flat[:8] = FIRST, SECOND
    u = np.arange(24.0).reshape(2, 3, 4) / 10
    u[0].flat[7] = np.nan
    labels = {"units": "m s-1", "ancillary_variables": "qc_first, qc_second note"}
    data = xr.Dataset(
        {
            "u": (DIMS, u, labels),
            "v": (DIMS, 2 + np.arange(24.0).reshape(2, 3, 4) / 10, labels),
            "qc_first": (DIMS, flags[0], QARTOD),
            "qc_second": (DIMS, flags[1], QARTOD),
            "note": (DIMS, np.zeros((2, 3, 4)), {"flag_values": [0, 1], "flag_meanings": "hidden observed"}),
        },
        {
            "time": np.datetime64("2024-01-01", "ns") + np.arange(2) * np.timedelta64(1, "h"),
            "lat": ("lat", np.arange(3.0), {"units": "degrees_north"}),
            "lon": ("lon", np.arange(4.0), {"units": "degrees_east"}),
        },
    )
    return data.assign(**changes)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("quality", "codes"), [("good", {GOOD_CODE}), ("good_or_unknown", {GOOD_CODE, UNKNOWN_CODE}), ("all", {0, 1, 2})]
)
def test_flags_decide_what_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quality: str, codes: set[int], stored: bool
) -> None:
    source: xr.Dataset | str = radar()
    if stored:
        source.to_netcdf(tmp_path / "f.nc", engine="h5netcdf", encoding={"qc_first": {"_FillValue": np.int8(25)}})
        source = str(tmp_path / "f.nc")
    fields = open_fields(source, quality=quality)
    read = fields.read([0, 1], partial=True).numpy()
    kept = np.array([code in codes for code in SAID])
    np.testing.assert_array_equal(np.isfinite(read[0, 1].ravel()[:8]), kept)
    np.testing.assert_array_equal(np.isfinite(read[0, 0].ravel()[:7]), kept[:7])
    assert np.isfinite(read[1]).all() and np.isfinite(read[0, :, 2]).all()
    out = capsys.readouterr().out
    if quality == "all":
        assert "the quality flags qc_first, qc_second are not applied: dataset.quality=good keeps what is good" in out
    else:
        left = 8 if quality == "good_or_unknown" else 10
        assert f"(qc_first, qc_second) call 37 values of both components good, 2 unknown, 8 bad: {left} are left" in out


@pytest.mark.parametrize(
    ("attrs", "codes"),
    [
        (QARTOD, {1: GOOD_CODE, 2: UNKNOWN_CODE, 3: BAD_CODE, 4: BAD_CODE, 9: BAD_CODE}),
        (
            COPERNICUS,
            {0: UNKNOWN_CODE, 1: GOOD_CODE, 2: GOOD_CODE, 3: BAD_CODE, 4: BAD_CODE, 8: UNKNOWN_CODE, 9: BAD_CODE},
        ),
        (
            {
                "flag_values": [0, 1, 3, 5],
                "flag_meanings": "no_quality_control good_value probably_bad_value changed_value",
            },
            {0: UNKNOWN_CODE, 1: GOOD_CODE, 3: BAD_CODE, 5: GOOD_CODE},
        ),
        ({"flag_meanings": "good bad"}, {}),
        ({"flag_values": [1], "flag_meanings": "good bad"}, {}),
        ({"flag_values": "one, two", "flag_meanings": "good bad"}, {}),
        ({"units": "1"}, {}),
    ],
)
def test_what_flags_mean(attrs: dict, codes: dict[int, int]) -> None:
    assert meanings(attrs) == codes


def test_a_file_without_flags_is_not_silently_taken_whole() -> None:
    bare = radar(qc_first=(DIMS, np.ones((2, 3, 4), "i1")), qc_second=(DIMS, np.ones((2, 3, 4), "i1")))
    with pytest.raises(UserError, match="dataset.quality=good: u names no flags"):
        open_fields(bare, quality="good")
    with pytest.raises(ValueError, match="quality must be one of all, good_or_unknown, good"):
        open_fields(radar(), quality="fine")


def test_a_filled_series_takes_what_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    job = open_series(commands.infer.config("ckpt=none", "quality=good"), source=radar())
    seen = job.cases([0]).observed[0, -1].numpy().ravel()
    np.testing.assert_array_equal(seen[:7], np.array(SAID[:7]) == GOOD_CODE)
    capsys.readouterr()
    bare = radar(qc_first=(DIMS, np.ones((2, 3, 4), "i1")), qc_second=(DIMS, np.ones((2, 3, 4), "i1")))
    code = guarded(lambda: open_series(commands.infer.config("ckpt=none", "quality=good"), source=bare) and 0)
    is_message((code, *capsys.readouterr()), "quality=good: u names no flags", "Leave it out")
