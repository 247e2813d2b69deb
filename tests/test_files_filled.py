"""Files of users, filled as they would type it: which times, which errors, points, components, windows, the past."""

import json
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import xarray as xr
from programs import FEW, ROOT, SMALL, is_message, trained_in

from vecfield_diffusion import progress
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.programs import fill as filling
from vecfield_diffusion.programs import pictures

NAMES = {"ugos": "eastward_sea_water_velocity", "vgos": "northward_sea_water_velocity"}
WINDOW = ["debug=fast", *SMALL, "dataset=file", "trainer.batch_size=2", "trainer.max_steps=2"]


def radar(folder, name="radar.nc", **changes):
    """Five hours of a gappy netCDF of the size of the network, packed, with errors, in degrees, rows southward."""
    rng = np.random.default_rng(0)
    values = 0.2 * rng.standard_normal((2, 5, 16, 16))
    values[:, :, 4:9, 2:8] = np.nan
    values[1, 2] = np.nan  # an hour without v
    lat = np.linspace(40.0, 34.0, 16)
    time = np.datetime64("2022-02-21T12", "ns") + np.arange(5) * np.timedelta64(6, "h")
    data = xr.Dataset(
        {
            "ugos": (("time", "latitude", "longitude"), values[0], {"units": "m s-1", "long_name": "to the east"}),
            "vgos": (("time", "latitude", "longitude"), values[1], {"units": "m s-1", "long_name": "to the north"}),
            "u_err": (("time", "latitude", "longitude"), 0.01 + 0.02 * rng.random((5, 16, 16))),
            "v_err": (("latitude", "longitude"), 0.01 + 0.02 * rng.random((16, 16))),
        },
        {"time": time, "latitude": lat, "longitude": np.arange(16) * 0.4 + 286.0},
        {"title": "an hour of radar", "history": "made by hand"},
    )
    data["latitude"].attrs["units"], data["longitude"].attrs["units"] = "degrees_north", "degrees_east"
    (folder / name).unlink(missing_ok=True)  # an earlier test may have it open
    packing = {"dtype": "int16", "scale_factor": -1e-4, "_FillValue": -32768}
    data.assign(**changes).to_netcdf(folder / name, engine="h5netcdf", encoding={"ugos": packing, "vgos": packing})
    return data


@pytest.fixture(scope="module")
def trained(place):
    """A network for files of this kind: odd in no way but its rows."""
    data, rng = radar(place), np.random.default_rng(5)
    data = data.assign({name: (data[name].dims, 0.2 * rng.standard_normal((5, 16, 16))) for name in ("ugos", "vgos")})
    for name in ("ugos", "vgos"):
        data[name].attrs |= {"units": "m s-1", "standard_name": NAMES[name]}
    many = xr.concat([data.assign_coords(time=data.time + np.timedelta64(30 * k, "h")) for k in range(8)], "time")
    many.to_netcdf(place / "many.nc", engine="h5netcdf")
    options = ["dataset.path=many.nc", "mean_field=false", "splits.guard=0", "name=net"]
    trained_in(place, *WINDOW, *options)
    return place


def fill(run, place, name, *overrides):
    code, out, err = run("infer", "ckpt=outputs/train/net", f"name={name}", *FEW, *overrides)
    assert (code, err) == (0, ""), err
    with xr.open_dataset(place / "outputs" / "infer" / name / "fields.nc") as data:
        return out, data.load()


def test_the_output_is_a_file_of_the_same_kind(trained, run):
    """Every time, the input's names, order of rows, coordinates and attributes; what was measured is kept."""
    given = radar(trained)
    out, data = fill(run, trained, "whole", "input=radar.nc")
    assert data["ugos"].dims == ("time", "latitude", "longitude") and data["ugos"].shape == (5, 16, 16)
    for name in ("time", "latitude", "longitude"):
        np.testing.assert_array_equal(data[name], given[name])
    assert data["ugos"].attrs["units"] == "m s-1"
    assert data.attrs["title"] == "an hour of radar" and "made by hand" in data.attrs["history"]
    assert np.isfinite(data["ugos"]).all()
    for name, other in (("ugos", "vgos"), ("vgos", "ugos")):
        known = np.isfinite(given[name]).values
        np.testing.assert_allclose(data[name].values[known], given[name].values[known], atol=1e-4)
        np.testing.assert_allclose(data[f"{name}_std"].values[known], 0.0, atol=1e-6)
        alone = known & np.isnan(given[other].values)
        code = {"ugos": 2, "vgos": 3}[name]
        np.testing.assert_array_equal(data["observed"].values == code, alone)
    assert "inpainting=mmps for 1 of 5 snapshots: some cells lack one component" in out


@pytest.mark.parametrize(
    ("chosen", "hours"),
    [("1", [1]), ("[3,0]", [3, 0]), ("1:4", [1, 2, 3]), ("::2", [0, 2, 4]), ("all", list(range(5))), ("-1", [4])]
    + [("2022-02-22", [2, 3, 4]), ("2022-02-21T18", [1])],
)
def test_times(trained, run, chosen, hours):
    given = radar(trained)
    _, data = fill(run, trained, "times", "input=radar.nc", f"time={chosen}", "inpainting=conditional")
    np.testing.assert_array_equal(data["time"], given["time"][hours])


@pytest.mark.parametrize("chosen", ["7:9", "2021-05", "soon", "0:5:0"])
def test_times_that_there_are_not(trained, run, chosen):
    radar(trained)
    done = run("infer", "ckpt=outputs/train/net", *FEW, "input=radar.nc", f"time={chosen}", "name=bad")
    expected = "there are 5, from" if chosen[0] == "2" else "all, a range such as 0:5, or a date; there are dates from"
    is_message(done, f"time={chosen}", expected, "2022-02-21T12:00 to 2022-02-22T12:00")


def test_errors_of_the_file(trained, run):
    """A cell measured without error is kept, one whose error is not known is not observed."""
    given = radar(trained)
    error = np.full((5, 16, 16), 0.05)
    error[:, 0, 0], error[:, 0, 1] = 0.0, np.nan
    given = radar(trained, error=(("time", "latitude", "longitude"), error))
    _, data = fill(run, trained, "errors", "input=radar.nc", "time=0", "sigma_obs=error", "members=4")
    assert data["observed"][0, 0, 0] == 1 and data["observed"][0, 0, 1] == 0
    np.testing.assert_allclose(data["ugos"][0, 0, 0], given["ugos"][0, 0, 0], atol=1e-4)
    assert data["ugos_std"][0, 0, 0] < 1e-6 < data["ugos_std"][0, 10, 10]
    _, both = fill(run, trained, "two", "input=radar.nc", "time=0", "sigma_obs=[u_err,v_err]")
    assert (both["observed"][0, 0, :] == 1).all()
    done = run("infer", "ckpt=outputs/train/net", *FEW, "input=radar.nc", "sigma_obs=u_er", "name=bad")
    is_message(done, "no variable 'u_er'", "u_err")


def test_some_of_what_was_observed_can_be_hidden_and_scored(trained, run):
    given = radar(trained)
    _, data = fill(run, trained, "hide", "input=radar.nc", "time=[0,1]", "hide=0.2")
    known = np.isfinite(given["ugos"][:2]).values & np.isfinite(given["vgos"][:2]).values
    observed = data["observed"].values == 1
    assert (observed & ~known).sum() == 0 and observed.sum() == 2 * (known[0].sum() - round(0.2 * known[0].sum()))
    scores = json.loads((trained / "outputs" / "infer" / "hide" / "metrics.json").read_text())
    hidden = known & ~observed
    error = np.stack([data[n].values[hidden] - given[n][:2].values[hidden] for n in ("ugos", "vgos")])
    assert scores["hidden"]["rmse_component"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-3)


def test_an_interrupted_run_goes_on(trained, run, monkeypatch, capsys):
    """What was finished is not computed again, and the file is what it is without the interruption."""
    radar(trained)
    options = ["input=radar.nc", "time=all", "batch=2", "inpainting=conditional"]
    _, whole = fill(run, trained, "undisturbed", *options)
    real, calls = filling.fill_cases, []

    def breaks(config, **given):
        calls.append(given["cases"].numbers)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
        return real(config, **given)

    monkeypatch.setattr(filling, "fill_cases", breaks)
    with pytest.raises(SystemExit) as stop:
        run("infer", "ckpt=outputs/train/net", "name=broken", *FEW, *options)
    assert stop.value.code == 130
    assert "stopped by Ctrl-C: 3 of 5 snapshots are kept; the same command goes on" in capsys.readouterr().err
    out, again = fill(run, trained, "broken", *options)
    assert "going on: 3 of 5 snapshots are finished" in out
    assert calls == [[0], [1], [2], [3], [3], [4]]
    for name in whole.data_vars:
        np.testing.assert_array_equal(again[name], whole[name])


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_keeps_what_is_finished(trained, run, number, code, name):
    """The process ends by itself, says how to go on, and the same command does."""
    radar(trained)
    given = ["ckpt=outputs/train/net", f"name=signal{code}", "input=radar.nc", "members=2", "batch=2"]
    given += ["inpainting=conditional", "sampler.steps=100"]
    folder = trained / "outputs" / "infer" / f"signal{code}"
    work = subprocess.Popen(
        [sys.executable, str(ROOT / "infer.py"), *given], cwd=trained, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not list(folder.glob(".parts/fields.nc/*.npz")):
        assert work.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    work.send_signal(number)
    _, err = work.communicate(timeout=60)
    assert work.returncode == code
    assert (
        f"stopped by {name}: " in err.decode() and "of 5 snapshots are kept; the same command goes on" in err.decode()
    )
    assert "Traceback" not in err.decode()
    assert not list(folder.glob("**/*.tmp")) and not (folder / "fields.nc").exists()
    code, out, err = run("infer", *given)
    assert (code, err) == (0, "") and "of 5 snapshots are finished" in out


def test_points_of_a_table(trained, run):
    """Drifters, gathered in the cells of the grid, with their errors; called what the training data are."""
    rows = ["lon,lat,u,v,error,time", "-74.0,40.0,0.1,0.2,0.03,2022-02-21", "286.01,40.02,0.3,0.2,0.03,2022-02-21"]
    rows += ["-70.0,36.0,0.5,-0.2,0.05,2022-02-21", "10.0,0.0,1,1,0.1,2022-02-21"]
    (trained / "drifters.csv").write_text("\n".join(rows))
    out, data = fill(run, trained, "points", "input=drifters.csv", "sigma_obs=error")
    assert "1 outside" in out and data.sizes["time"] == 1
    assert (data["observed"] > 0).sum() == 2 and data["observed"][0, 0, 0] == 1
    assert [data[name].attrs["standard_name"] for name in ("u", "v")] == [*NAMES.values()]
    out, data = fill(run, trained, "exactly", "input=drifters.csv")
    np.testing.assert_allclose(data["u"][0, 0, 0], 0.2, atol=1e-5)
    assert "sigma_obs=error" in out


def test_the_picture_has_the_date_and_what_a_radar_read(trained, run, monkeypatch):
    """In the kind of file that is asked for; and without a terminal long work says how far it is."""
    given, drawn = radar(trained), {}
    bearing = np.full((16, 16), 90.0)
    radar(trained, "beam.nc", vr=(given.ugos.dims, given.ugos.values), head=(given.ugos.dims[1:], bearing))
    monkeypatch.setattr(pictures, "figure_inpainting", lambda path, *_, **options: drawn.update(options, path=path))
    monkeypatch.setattr(progress, "bar", lambda *args, **options: progress.Progress(*args, every=0.01, **options))
    given = ["ckpt=outputs/train/net", "input=beam.nc", "time=1", "figure=figure.pdf", "members=2", "sampler.steps=4"]
    beam = ["sensor=radial", "sensor.velocity=[vr]", "sensor.bearing=[head]"]
    code, _, err = run("infer", *given, *beam, "name=beam")
    assert code == 0 and "filling: " in err and " evaluations" in err and "snapshot 1 of 1" in err
    assert drawn["date"] == "2022-02-21 18:00" and drawn["path"].name == "figure.pdf"
    read = drawn["readings"]["vr"].numpy()
    known = np.isfinite(read[0])
    assert known.any() and not known[4:9, 2:8].any() and np.abs(read[1][known]).max() < 1e-6
    np.testing.assert_allclose(read[0][known], radar(trained)["ugos"].values[1][known], atol=1e-3)
    monkeypatch.undo()
    monkeypatch.chdir(trained)
    fill(run, trained, "pdf", *given[1:4])
    assert (trained / "outputs/infer/pdf/figure.pdf").read_bytes()[:5] == b"%PDF-"
    is_message(
        run("infer", *given[:2], "figure=figure.bmp", "name=bmp"), "figure=figure.bmp", ".png or .pdf or .svg or"
    )


def test_radial_velocities_of_a_file(trained, run):
    """A file with what two radars measured along their beams, and no velocity."""
    given = radar(trained).isel(time=[0])
    bearing = np.stack([np.full((16, 16), 60.0), np.linspace(0, 359, 256).reshape(16, 16)])
    truth = np.nan_to_num(given["ugos"].values), np.nan_to_num(given["vgos"].values)
    seen = xr.Dataset(coords=given.coords)
    for k in range(2):
        radians = np.deg2rad(bearing[k])
        value = truth[0] * np.sin(radians) + truth[1] * np.cos(radians)
        value[:, :, : 4 + 4 * k] = np.nan
        seen[f"vr{k}"] = (("time", "latitude", "longitude"), value, {"units": "m s-1"})
        seen[f"b{k}"] = (("latitude", "longitude"), bearing[k])
    seen.to_netcdf(trained / "beams.nc", engine="h5netcdf")
    how = ["input=beams.nc", "sensor=radial", "sensor.velocity=[vr0,vr1]", "sensor.bearing=[b0,b1]", "sampler.steps=8"]
    out, data = fill(run, trained, "beams", *how, "inpainting.k_max=64", "inpainting=mmps")
    assert "hidden" not in json.loads((trained / "outputs" / "infer" / "beams" / "metrics.json").read_text())
    np.testing.assert_array_equal(data["observed"][0].values == 1, np.isfinite(seen["vr0"][0]).values)
    odd = seen.copy(deep=True)
    odd["vr0"][0, 9, 9] = -9999.0
    odd.to_netcdf(trained / "odd_beams.nc", engine="h5netcdf")
    out, other = fill(run, trained, "odd_beams", "input=odd_beams.nc", *how[1:], "inpainting=mmps")
    assert "note: left out: 1 cell in 1 snapshot, such as 0: values up to" in out and other["observed"][0, 9, 9] == 0
    u, v = data["u"][0].values, data["v"][0].values
    for k in range(2):
        known = np.isfinite(seen[f"vr{k}"][0].values)
        along = u * np.sin(np.deg2rad(bearing[k])) + v * np.cos(np.deg2rad(bearing[k]))
        assert np.abs(along - seen[f"vr{k}"][0].values)[known].mean() < 0.05


def test_a_network_of_windows_fills_fields_of_any_size(trained, run):
    rng = np.random.default_rng(1)
    velocity = rng.standard_normal((24, 2, 20, 36)).astype(np.float32)
    velocity[:, :, 3:8, 5:11] = np.nan
    write_hdf5(trained / "large.h5", velocity, 1e3, 1e3, "open", "periodic", units="m s-1")
    options = ["dataset.path=large.h5", "splits.guard=0", "mean_field=false", "name=windows", "window=[16,16]"]
    code, out, err = run("train", *WINDOW, *options)
    assert code == 0, err
    code, out, err = run("infer", "ckpt=outputs/train/windows", "name=large", "mask=swath", *FEW, "time=[0,1]")
    assert (code, err) == (0, "") and "in windows of 16x16 cells" in out
    write_hdf5(trained / "other.h5", velocity[:2, :, :, :30], 1e3, 1e3, "open", "open", units="m s-1")
    code, out, err = run("infer", "ckpt=outputs/train/windows", "name=other", "input=other.h5", "mask=swath", *FEW)
    assert (code, err) == (0, "")
    with xr.open_dataset(trained / "outputs" / "infer" / "other" / "fields.nc") as data:
        assert data["u"].shape == (2, 20, 30) and np.isnan(data["u"][:, 3:8, 5:11]).all()
        assert np.isfinite(data["u"].values[:, 8:]).all()
    done = run("train", *WINDOW, "dataset.path=large.h5", "name=bad", "window=[64,16]")
    is_message(done, "window=[64, 16]", "20x36")


def test_the_past_is_told(trained, run):
    """The network sees earlier snapshots of the file that it fills, and works without them where there are none."""
    rng = np.random.default_rng(2)
    with h5py.File(trained / "past.h5", "w") as file:
        file["u"], file["v"] = rng.standard_normal((2, 24, 16, 16))
        file["depth"] = rng.random((16, 16))
    given = ["dataset.path=past.h5", "dataset.history=[1,2]", "dataset.context=[depth]", "splits.guard=0", "name=past"]
    code, _, err = run("train", *WINDOW, *given)
    assert code == 0, err
    told = {}
    for name, extra in (("masked", []), ("whole", ["history=whole"])):
        code, out, err = run("infer", "ckpt=outputs/train/past", f"name={name}", "mask=pixels", *FEW, *extra)
        assert (code, err) == (0, "")
        with xr.open_dataset(trained / "outputs" / "infer" / name / "fields.nc") as data:
            told[name] = data["u"].values
    assert np.abs(told["masked"] - told["whole"]).max() > 1e-6
    done = run("train", *WINDOW, "dataset.path=past.h5", "dataset.context=[dept]", "splits.guard=0", "name=bad")
    is_message(done, "no variable 'dept'", "depth")
    code, _, err = run("evaluate", "ckpt=outputs/train/past", "cases=2", "masks=[pixels]", *FEW)
    assert code == 0, err


@pytest.mark.parametrize("time", [1, 2])
def test_auto_decides_for_each_snapshot_by_itself(trained, run, time):
    """A snapshot with a lone component is filled by mmps, and those beside it are filled as they are alone."""
    radar(trained)
    out, together = fill(run, trained, "together", "input=radar.nc", "time=all", "members=1", "batch=1")
    assert "inpainting=mmps for 1 of 5 snapshots: some cells lack one component" in out
    assert "inpainting=conditional for 4 of 5 snapshots" in out or "inpainting=mmps: " in out
    out, alone = fill(run, trained, "alone", "input=radar.nc", f"time={time}", "members=1", "batch=1")
    assert ("inpainting=mmps: some cells" in out) == (time == 2)
    for name in ("ugos_members", "vgos_members", "observed"):
        np.testing.assert_array_equal(together[name].isel(time=[time]), alone[name])


def values_of(trained, **changes):
    """radar.nc with other values of the component ugos."""
    given = radar(trained)
    given["ugos"] = given["ugos"].copy()
    for (hour, row, column), value in changes.pop("cells").items():
        given["ugos"][hour, row, column] = value
    path = trained / "odd.nc"
    path.unlink(missing_ok=True)
    given.to_netcdf(path, engine="h5netcdf")
    return given


@pytest.mark.parametrize("value", [1e33, -9999.0, 1e20, np.inf])
def test_absurd_observations_are_left_out_counted_and_named(trained, run, value):
    """The snapshot is filled as if the cell had not been measured, and the others as ever."""
    options = ["input=odd.nc", "time=[0,1]", "inpainting=conditional"]
    values_of(trained, cells={(1, 2, 3): np.nan})
    _, expected = fill(run, trained, "gap", *options)
    values_of(trained, cells={(1, 2, 3): value})
    out, data = fill(run, trained, "absurd", *options)
    if np.isfinite(value):  # what is no number is a gap by itself
        assert "note: left out: 1 cell in 1 snapshot, such as 1: values up to" in out
    assert data["observed"][1, 2, 3] == (0 if np.isfinite(value) else 3) and np.isfinite(data["ugos_members"]).all()
    np.testing.assert_array_equal(data["vgos_members"][:, 0], expected["vgos_members"][:, 0])
    inside = np.ones((16, 16), dtype=bool)
    inside[2, 3] = False
    for name in ("ugos", "vgos"):  # the lone vgos of the gap counts, that of an absurd pair does not
        assert np.abs(data[name][1].values[inside]).max() < 3


@pytest.mark.parametrize(("factor", "said"), [(100.0, "times the"), (1e-3, "times the")])
def test_a_magnitude_far_from_the_training_data_is_a_question(trained, run, factor, said):
    given = radar(trained).isel(time=[0])
    for name in ("ugos", "vgos"):
        given[name] = (given[name].dims, factor * given[name].values, {"units": "m s-1"})
    (trained / "fast.nc").unlink(missing_ok=True)
    given.to_netcdf(trained / "fast.nc", engine="h5netcdf")
    done = run("infer", "ckpt=outputs/train/net", *FEW, "input=fast.nc", "name=bad")
    is_message(done, "fast.nc has velocities of about", said, "units='cm s-1'", "magnitude=any")
    if factor < 1:
        fill(run, trained, "slow", "input=fast.nc", "magnitude=any")


def test_a_result_of_another_command_is_not_overwritten(trained, run):
    radar(trained)
    options = ["input=radar.nc", "time=0", "overwrite=false"]
    _, first = fill(run, trained, "mine", *options)
    _, again = fill(run, trained, "mine", *options)
    np.testing.assert_array_equal(first["ugos_members"], again["ugos_members"])
    path = trained / "outputs" / "infer" / "mine" / "fields.nc"
    before = path.read_bytes()
    done = run("infer", "ckpt=outputs/train/net", "name=mine", *FEW, *options, "seed=1")
    is_message(done, "fields.nc is the result of another command", "name=...", "overwrite=true")
    assert path.read_bytes() == before
    _, other = fill(run, trained, "mine", *options, "seed=1", "overwrite=true")
    assert np.abs(other["ugos_members"].values - first["ugos_members"].values).max() > 1e-3


def test_the_output_goes_where_it_is_sent(trained, run):
    radar(trained)
    code, out, err = run(
        "infer", "ckpt=outputs/train/net", "name=sent", *FEW, "input=radar.nc", "time=0", "output=place/filled.nc"
    )
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (trained / "place").iterdir())
    assert names == ["filled.json", "filled.nc", "filled.png"]
    assert not (trained / "outputs" / "infer" / "sent").exists()
    is_message(run("infer", "ckpt=outputs/train/net", *FEW, "output=filled.grib"), "output=filled.grib", ".nc")
    before = (trained / "radar.nc").read_bytes()
    done = run("infer", "ckpt=outputs/train/net", *FEW, "input=radar.nc", f"output=../{trained.name}/radar.nc")
    is_message(done, "this is the input", "Give another file")
    assert (trained / "radar.nc").read_bytes() == before


def test_two_processes_do_not_write_one_file(trained, run):
    """The second ends with a message while the first is alive; the lock of a dead process is no lock."""
    radar(trained)
    folder = trained / "outputs" / "infer" / "both"
    folder.mkdir(parents=True)
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom vecfield_diffusion.inference.locks import owned\n"
        "with owned(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(folder / "fields.nc")], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        done = run("infer", "ckpt=outputs/train/net", "name=both", *FEW, "input=radar.nc", "time=0")
        is_message(done, "another process is writing fields.nc", "name=...")
    finally:
        holder.kill()
        holder.wait()
    for name in ("fields.nc", "metrics.json", "figure.png"):
        (folder / f".{name}.{holder.pid}.tmp").write_bytes(b"half")
    fill(run, trained, "both", "input=radar.nc", "time=0")
    assert sorted(path.name for path in folder.iterdir()) == ["fields.nc", "figure.png", "metrics.json"]


def test_the_output_of_a_native_file_is_read_again(trained, run):
    """Its own attributes are not those of the format; flags and texts of others are kept as numbers and text."""
    rng = np.random.default_rng(3)
    velocity = 0.2 * rng.standard_normal((2, 2, 16, 16))
    velocity[0, :, 3:6, 3:6] = np.nan
    write_hdf5(trained / "native.h5", velocity, 1e3, -1e3, units="m/s")
    with h5py.File(trained / "native.h5", "a") as file:
        file.attrs["quality"] = True
    _, data = fill(run, trained, "native", "input=native.h5")
    again = open_fields(str(trained / "outputs" / "infer" / "native" / "fields.nc"))
    np.testing.assert_array_equal(again.read([0, 1])[:, 0], data["u"])


def test_variables_in_a_group(trained, run):
    """The output has their names, and none of the group's."""
    given = radar(trained)
    given[["ugos", "vgos"]].to_netcdf(trained / "group.nc", engine="h5netcdf", group="forecast")
    names = ["names=[forecast/ugos,forecast/vgos]", "time=0"]
    code, _, err = run("infer", "ckpt=outputs/train/net", "name=group", *FEW, "input=group.nc", *names)
    assert (code, err) == (0, "")
    with xr.open_dataset(trained / "outputs" / "infer" / "group" / "fields.nc") as data:
        assert data["ugos"].dims == ("time", "latitude", "longitude") and "ugos_std" in data


def test_another_place_and_a_domain_of_ones_own(trained, run):
    """Fields of the same size elsewhere keep their own domain; cells never measured are inside where one says so."""
    given = radar(trained)
    moved = given.isel(time=[0]).assign_coords(longitude=given["longitude"] + 30.0)
    moved.to_netcdf(trained / "moved.nc", engine="h5netcdf")
    done = run("infer", "ckpt=outputs/train/net", *FEW, "input=moved.nc", "name=bad")
    is_message(done, "nothing to fill", "domain=FILE")
    np.save(trained / "domain.npy", np.ones((16, 16), dtype=bool))
    _, data = fill(run, trained, "domain", "input=moved.nc", "domain=domain.npy")
    assert np.isfinite(data["ugos"]).all() and (data["observed"] == 0).any()
    wet = np.isfinite(given["ugos"][0]).values
    _, data = fill(run, trained, "moved", "input=moved.nc", "mask=pixels")
    np.testing.assert_array_equal(np.isfinite(data["ugos"][0]), wet)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("bin=0", ("bin must be > 0",)),
        ("overlap=-0.1", ("overlap must be in [0, 1)",)),
        ("inpainting=repaint sigma_obs=u_err", ("repaint takes one error",)),
    ],
)
def test_what_makes_no_sense(trained, run, overrides, parts):
    radar(trained)
    is_message(
        run("infer", "ckpt=outputs/train/net", *FEW, "input=radar.nc", "name=bad", *overrides.split(" ")), *parts
    )
