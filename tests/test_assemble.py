"""What is refused before a network meets data that it was not trained for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import DDPM, EDM
from vecfield_diffusion.diffusion.normalizer import Normalizer, Statistics
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.windows import Windowed
from vecfield_diffusion.models.base import Parametrization
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs import fitted
from vecfield_diffusion.programs import trained as assemble
from vecfield_diffusion.programs.method import Observed
from vecfield_diffusion.programs.run_folder import describe
from vecfield_diffusion.programs.source import times
from vecfield_diffusion.samplers.deterministic import Euler


def fields(shape=(4, 6), units="m s-1", dx=1000.0, dy=1000.0, length=10):
    grid = Grid(torch.ones(shape, dtype=torch.bool), dx=dx, dy=dy)
    reader = MemoryReader(np.zeros((length, 2, *shape), dtype=np.float32))
    return Fields(reader, length, grid, np.arange(shape[1]), np.arange(shape[0]), "my.nc", ("u", "v"), units=units)


TRAINED = SimpleNamespace(
    grid=fields().grid,
    units="m s-1",
    path="run/best.pt",
    files=[],
    split={"test": range(7, 10)},
    config={"dataset": {"_target_": "vecfield_diffusion.data.hdf5.open_hdf5"}, "trainer": {"sigma_obs": 0.1}},
    statistics=Statistics(0.5, 1.0, 10.0, 0.0, 0.0),
    denoiser=SimpleNamespace(normalizer=Normalizer(torch.zeros(2, 4, 6), 0.5)),
)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (fields(dy=-1000.0), "run the other way"),
    ],
)
def test_data_of_another_kind_are_refused(other, match):
    with pytest.raises(UserError, match=match):
        fitted.check_grid(other, TRAINED)


def test_held_out_data_are_in_the_units_of_the_network(monkeypatch):
    """A network that was trained in cm/s finds the same file, which is read in m/s now, in cm/s."""
    old = SimpleNamespace(**{**vars(TRAINED), "units": "cm s-1"})
    known = fields()
    known.reader.array[:] = 0.0625
    monkeypatch.setattr(assemble, "build", lambda *args, **options: known)
    found, _ = assemble.held_out(old, "test")
    assert found.units == "cm s-1" and (found.read([7]) == 6.25).all()


def trained_on(mean=0.0, boundary="open", window=None):
    grid = Grid(torch.ones(4, 6, dtype=torch.bool), 1000.0, 1000.0, boundary, boundary)
    normalizer = Normalizer(torch.full((2, 4, 6), mean), 0.5)
    denoiser = Denoiser(torch.nn.Identity(), EDM(sigma_max=10.0), normalizer)
    statistics = Statistics(0.5, 1.0, 10.0, 0.0, 0.0)
    config = {"window": window, "dataset": {}}
    return assemble.Trained(denoiser, grid, statistics, "m s-1", {}, config, "run/best.pt", 1)


@pytest.mark.parametrize(
    ("trained", "match"),
    [(trained_on(mean=1.0), "mean_field=false"), (trained_on(boundary="periodic"), "window=")],
)
def test_networks_that_know_their_own_domain_alone(trained, match):
    with pytest.raises(UserError, match=match):
        fitted.fit_size(trained, fields(shape=(12, 18)))


def test_a_network_meets_larger_fields_in_windows():
    """Of its own size, or of the windows that it was trained on; and fields of its size whole."""
    same = trained_on(mean=1.0, boundary="periodic")
    assert fitted.fit_size(same, fields()).denoiser is same.denoiser
    larger = fitted.fit_size(trained_on(), fields(shape=(12, 18)))
    assert larger.denoiser.size == (4, 6) and larger.grid.shape == (12, 18)
    assert larger.denoiser.normalizer.std == 0.5 and not larger.denoiser.normalizer.mean.any()
    cut = fitted.fit_size(trained_on(mean=1.0, boundary="periodic", window=[2, 3]), fields())
    assert cut.denoiser.size == (2, 3) and cut.denoiser.periodic == (True, True)
    assert (cut.denoiser.normalizer.mean == 1.0).all()


class Wide(Parametrization, torch.nn.Identity):
    """A network that takes fields twice as large as those of its training."""

    largest = (4, 12)


@pytest.mark.parametrize(
    ("boundary", "shape", "size"),
    [
        ("open", (4, 6), None),  # one window
        ("open", (4, 10), None),
        ("open", (12, 18), (4, 12)),
        ("periodic", (4, 6), (2, 3)),
    ],
)
def test_windows_are_as_large_as_field_and_network_allow(boundary, shape, size):
    trained = trained_on(boundary=boundary, window=[2, 3])
    trained.denoiser.network = Wide()
    found = fitted.fit_size(
        trained, replace(fields(shape), grid=Grid(torch.ones(shape).bool(), 1e3, 1e3, boundary, boundary)), batch=64
    ).denoiser
    if size is None:
        assert not isinstance(found, Windowed)
    else:
        assert found.size == size and found.batch == 64 * 6 // (size[0] * size[1])


def test_another_spacing_is_noted(capsys):
    fitted.check_grid(fields(dx=1020.0), TRAINED)
    assert capsys.readouterr().out == ""
    fitted.check_grid(fields(dx=2000.0), TRAINED)
    assert capsys.readouterr().out == "note: cells of 2000 x 1000 m in my.nc, of 1000 x 1000 m in the training data\n"


@pytest.mark.parametrize("length", [10, 12])
def test_unseen_snapshots_are_those_that_training_kept_aside(monkeypatch, length):
    """Of a file that has grown since, too."""
    monkeypatch.setattr(assemble, "build", lambda *args, **options: fields(length=length))
    assert assemble.held_out(TRAINED, "test")[1] == range(7, 10)


def test_a_file_that_has_lost_them_is_refused(monkeypatch):
    monkeypatch.setattr(assemble, "build", lambda *args, **options: fields(length=9))
    with pytest.raises(UserError, match="has 9 snapshots now, but run/best.pt keeps 7 to 9 for test"):
        assemble.held_out(TRAINED, "test")


def test_what_a_run_remembers_of_its_data():
    split = {"train": range(0, 6), "test": range(7, 10)}
    found = describe(fields(), split)
    assert len(found.pop("fingerprint")) == 16
    assert found == {"length": 10, "units": "m s-1", "split": {"train": [0, 6], "test": [7, 10]}}


def test_worse_observations_than_training_saw_are_noted(capsys):
    observed = torch.tensor([[[[True, False]]]])
    sigma = torch.tensor([[[[0.05, 0.3]], [[torch.nan, 0.3]]]])  # what is not observed has no error that counts
    (seen,) = Observed.of(SimpleNamespace(observed=observed, single=observed & False, sigma_obs=sigma[None, :, 0]))
    assert seen.error == pytest.approx(0.05) and not seen.single
    assemble.check_error(seen.error, TRAINED)
    assert capsys.readouterr().out == ""
    assemble.check_error(0.2, TRAINED)
    assert "sigma_obs=0.2 is more than the 0.05 m s-1 that training reached" in capsys.readouterr().out


def test_more_levels_than_a_chain_has_are_refused():
    with pytest.raises(UserError, match="sampler.steps must be <= T=8"):
        Method(Euler(9), Conditional()).check(DDPM(T=8))


@pytest.mark.parametrize("chosen", [2031, [3, 99], "2031-01", "nonsense"])
def test_a_time_outside_is_told_which_dates_there_are(chosen):
    dated = replace(fields(), time=np.datetime64("2022-02-01") + np.arange(10))
    with pytest.raises(UserError, match="2022-02-01 to 2022-02-10"):
        times(chosen, dated, range(10))
