"""The Gaussian field of sequences beside dense posteriors over all frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ideal import FORMULATIONS, NORMALIZER
from oracle import gaussian_law
from test_spacetime import H, L, T, W, components, dense, land, ornstein_uhlenbeck, random, travelling

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.evaluation.spacetime import PrincipalComponents, SpaceTime, Stationary, Sum
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.inference.export import load_weights, save_weights
from vecfield_diffusion.models import measured
from vecfield_diffusion.models import product_modes as module
from vecfield_diffusion.models.conjugate_gradients import Split
from vecfield_diffusion.models.gaussian import GaussianResidual
from vecfield_diffusion.models.measured import Known, interpolate
from vecfield_diffusion.models.product_modes import ProductModes
from vecfield_diffusion.models.stationary import Values
from vecfield_diffusion.programs.gaussian_field import cut, product_modes, sequence_field, spaced
from vecfield_diffusion.samplers.deterministic import Heun

LEVELS = [0.05, 1.0, 20.0]
SIZES = {"channels": [8, 8], "blocks": 1, "attention": [], "embedding": 16}
EVERYWHERE = np.ones((H, W), dtype=bool)


def white(lags: np.ndarray) -> np.ndarray:
    """The same with a white part, so that errors of 0 are possible."""
    out = lags.copy()
    out[0, [0, 1], [0, 1], 0, 0] *= 1.05
    return out


def priors() -> dict[str, SpaceTime]:
    mean, scale = random(2, H, W, seed=1), np.broadcast_to(1 + 0.3 * random(1, H, W, seed=2) ** 2, (2, H, W))
    return {
        "ornstein-uhlenbeck around land": Stationary(white(ornstein_uhlenbeck()), 0 * mean, land()),
        "travelling, of local variance": Stationary(white(travelling()), mean, land(), scale),
        "components": Sum(components(), Stationary(0.1 * white(travelling()), mean, EVERYWHERE, scale)),
    }


PRIORS = priors()


@pytest.fixture(autouse=True)
def all_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProductModes, "LEFT_OUT", 0.0)
    monkeypatch.setattr(ProductModes, "POINTS", 10**6)


def data(valid: np.ndarray, n: int = 3, frames: int = T, seed: int = 2) -> tuple[torch.Tensor, ...]:
    """Noisy fields, observations with an error of each cell and a frame without any, and the domain."""
    generator = torch.Generator().manual_seed(seed)
    domain = torch.from_numpy(valid).expand(n, frames, 1, H, W)
    z, y = (torch.randn(n, frames, 2, H, W, dtype=torch.float64, generator=generator) * domain for _ in range(2))
    observed = (torch.rand(n, frames, 1, H, W, generator=generator) < 0.4) & domain
    observed[:, frames // 2] = False
    error = 0.1 + torch.rand(n, frames, 1, H, W, dtype=torch.float64, generator=generator)
    return z, torch.where(observed, y, 0.0), observed, error, domain


def posterior(prior: SpaceTime, s: float, z, y, observed, error, valid) -> tuple[torch.Tensor, ...]:
    """Of one sample by the joint system of all data: mean and variance of each value, gain for z."""
    frames = len(z)
    covariance, size = torch.from_numpy(dense(prior, frames)), z.numel()
    inside, seen = (part.expand(frames, 2, H, W).flatten() for part in (valid, observed))
    mean = torch.from_numpy(prior.mean).expand(frames, 2, H, W).flatten()
    rows = torch.cat([torch.eye(size, dtype=torch.float64)[chosen] for chosen in (inside, seen)])
    noise = torch.cat(
        [
            torch.full((int(inside.sum()),), s**2, dtype=torch.float64),
            error.expand(frames, 2, H, W).flatten()[seen] ** 2,
        ]
    )
    gain = covariance @ rows.T @ torch.linalg.inv(rows @ covariance @ rows.T + torch.diag(noise))
    found = mean + gain @ (torch.cat([z.flatten()[inside], y.flatten()[seen]]) - rows @ mean)
    variance = (covariance - gain @ rows @ covariance).diagonal()
    full = torch.zeros(size, size, dtype=torch.float64)
    full[:, inside] = gain[:, : int(inside.sum())]
    return found.view_as(z), variance[inside].mean(), full


def exact_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of what is hidden by one probe for each value: nothing is left to chance."""
    monkeypatch.setattr(measured, "PROBES", T * 2 * H * W)
    monkeypatch.setattr(measured, "signs", lambda n, count, *kind: n**0.5 * torch.eye(n, dtype=torch.float64))


def levels(s: float, n: int = 3) -> torch.Tensor:
    return torch.full((n,), s, dtype=torch.float64)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("budget", [10**6, 20], ids=["all values", "few values"])
def test_the_posterior_is_the_dense_one_over_all_frames(kind, budget, monkeypatch):
    """Also where there are more values than one system takes."""
    monkeypatch.setattr(module, "SPARSE", budget)
    monkeypatch.setattr(Split, "TOLERANCE", 1e-13)
    exact_trace(monkeypatch)
    prior = PRIORS[kind]
    field, given = product_modes(prior, T), data(prior.valid)
    for s in LEVELS:
        mean, variance = field(given[0], levels(s), *given[1:])
        for i in range(3):
            parts = [part[i] for part in given]
            exact, spread, _ = posterior(prior, s, *parts)
            inside = parts[-1].expand_as(exact)
            torch.testing.assert_close(mean[i][inside], exact[inside], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(variance[i], spread, rtol=1e-8, atol=0.0)
            assert (mean[i][~inside] == 0).all()


@pytest.mark.parametrize("kind", PRIORS)
def test_float32_is_the_same_to_rounding(kind):
    """What an observation says is solved for in float64 whatever the noisy field is."""
    field, given = product_modes(PRIORS[kind], T), data(PRIORS[kind].valid)
    field.modes.fill_(20)
    rough = [part.float() if part.is_floating_point() else part for part in given]
    for s in (1e-3, *LEVELS):
        exact = field(rough[0].double(), levels(s), *(p.double() if p.is_floating_point() else p for p in rough[1:]))
        for ours, theirs in zip(field(rough[0], levels(s).float(), *rough[1:]), exact, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_snapshots_are_sequences_of_one_frame():
    prior = PRIORS["travelling, of local variance"]
    z, *given = (part[:, 0] for part in data(prior.valid, frames=1))
    mean, variance = product_modes(prior, 1)(z, levels(0.5), *given)
    for i in range(3):
        exact, spread, _ = posterior(prior, 0.5, z[i, None], *(part[i, None] for part in given))
        torch.testing.assert_close(mean[i], torch.where(given[-1][i], exact[0], 0.0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(variance[i], spread, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("kind", PRIORS)
def test_with_few_modes_y_alone_still_has_its_dense_posterior(kind):
    """At high noise; and the more modes, the nearer to the posterior below."""
    prior = PRIORS[kind]
    given, misses = data(prior.valid), []
    for modes in (8, 60, 10**6):
        field = product_modes(prior, T)
        field.modes.fill_(modes)
        z = torch.from_numpy(prior.mean) + 1e6 * given[0]
        mean, variance = field(z * given[-1], levels(1e6), *given[1:])
        below, _ = field(given[0], levels(1.0), *given[1:])
        exact = [posterior(prior, 1e6, *(part[i] for part in (z, *given[1:]))) for i in range(3)]
        misses.append(0.0)
        for i in range(3):
            inside = given[-1][i].expand_as(below[i])
            torch.testing.assert_close(mean[i][inside], exact[i][0][inside], rtol=0, atol=1e-4)
            torch.testing.assert_close(variance[i], exact[i][1], rtol=1e-4, atol=0.0)
            lower = posterior(prior, 1.0, *(part[i] for part in given))[0]
            misses[-1] += (below[i] - lower)[inside].square().mean().item() ** 0.5
    assert misses[0] > misses[1] > 1e6 * misses[2]


def test_the_deviation_by_some_of_the_values_is_off_by_a_few_hundredths(monkeypatch):
    monkeypatch.setattr(ProductModes, "POINTS", 64)
    prior = PRIORS["ornstein-uhlenbeck around land"]
    field, given = product_modes(prior, T), data(prior.valid)
    field.modes.fill_(60)
    _, variance = field(given[0], levels(1e3), *given[1:])
    for i in range(3):
        spread = posterior(prior, 1e3, *(part[i] for part in given))[1]
        assert abs(variance[i].sqrt() / spread.sqrt() - 1) < 0.05


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", PRIORS)
def test_all_of_many_values_count_with_few_modes(kind, together, monkeypatch):
    """The mean is the dense one, and so is the mean variance of what is hidden; errors of u and v belong together."""
    monkeypatch.setattr(Split, "TOLERANCE", 1e-12)
    monkeypatch.setattr(Split, "TILE", 40)
    prior = PRIORS[kind]
    _, y, _, error, domain = (part[0] for part in data(prior.valid, 1))
    exact_trace(monkeypatch)
    observed = domain.clone()
    observed[:, :, 1:3, 1:4] = False
    field = product_modes(prior, T)
    field.modes.fill_(8)
    learnt = field.prior()
    noise, anomaly = (error / field.scale).square(), torch.where(observed, (y - field.mean) / field.scale, 0.0)
    hidden = (domain & ~observed).expand_as(y)
    errors = noise.expand_as(y).flatten().diag()
    if together:
        u, v = torch.arange(y.numel()).view(y.shape).unbind(1)
        errors[v, v], errors[u, v], errors[v, u] = 1.5 * noise[:, 0], 0.8 * noise[:, 0], 0.8 * noise[:, 0]
        noise = torch.cat([noise, 1.5 * noise, 0.8 * noise], dim=1)
    anomalies = torch.stack([anomaly, torch.where(observed, 1.0, 0.0).expand_as(y).cumsum(dim=0)])
    known = Known(anomalies, observed[:, 0], noise, domain[:, 0])
    found = interpolate(learnt.covariance, known, Values.where(hidden), learnt.functions, most=20)
    bare = Stationary(field.lags.numpy(), 0 * prior.mean, prior.valid)
    if len(field.components):
        unscaled = PrincipalComponents(
            (field.components / field.scale).numpy(), field.component_lags.numpy(), 0 * prior.mean, prior.valid
        )
        bare = Sum(unscaled, bare)
    full, seen = torch.from_numpy(dense(bare, T)), observed.expand_as(y).flatten()
    gain = full[:, seen] @ torch.linalg.inv(full[seen][:, seen] + errors[seen][:, seen])
    means = anomalies.flatten(1)[:, seen] @ gain.mT
    torch.testing.assert_close(found.mean.flatten(1), means, rtol=0, atol=1e-8)
    variance = (full - gain @ full[seen]).diagonal()[hidden.flatten()].mean()
    torch.testing.assert_close(found.variance.mean(), variance, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("s", LEVELS)
def test_what_is_hidden_of_white_fields_keeps_its_variance(s):
    """With a few modes, each a cell that is measured, and no errors: a hidden value is its noisy one, filtered."""
    lags = np.zeros((T, 2, 2, 2 * H, W))
    lags[0, [0, 1], [0, 1], 0, 0] = 2.0
    field = product_modes(Stationary(lags, np.zeros((2, H, W)), EVERYWHERE), T)
    z, y, observed, _, domain = data(EVERYWHERE)
    field.modes.fill_(8)
    modes = field.prior().table.field(torch.ones(1, 8, dtype=torch.float64))[:, :, :1] != 0
    observed = observed | modes
    mean, variance = field(z, levels(s), y, observed, torch.zeros(3, T, 1, H, W), domain)
    filtered = 2.0 / (2.0 + s**2)
    # An error of 0 counts as 1e-9 of the variance, beside s^2 at the least.
    torch.testing.assert_close(mean, torch.where(observed, y, filtered * z), rtol=0, atol=1e-8 * (1 + 2 / s**2))
    hidden = 1 - observed.double().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(variance, hidden * filtered * s**2, rtol=1e-6, atol=0.0)


def test_the_variance_of_cells_is_that_of_the_modes():
    field = product_modes(PRIORS["components"], T)
    field.modes.fill_(40)
    table, root = field.prior().table, torch.from_numpy(random(40, 40))
    fields = table.field(root.T.contiguous())
    torch.testing.assert_close(
        table.spread(root @ root.T), fields.square().sum(dim=0).mean(dim=1), rtol=1e-10, atol=0.0
    )


def test_what_is_measured_everywhere_is_not_taken_for_known_exactly(monkeypatch):
    """Where few modes, for more values than count, claim more than there is: the deviation is that of the error."""
    monkeypatch.setattr(module, "SPARSE", 40)
    prior = PRIORS["ornstein-uhlenbeck around land"]
    _, y, _, _, domain = data(prior.valid, 1)
    field, error = product_modes(prior, T), torch.full((1, T, 1, H, W), 0.1, dtype=torch.float64)
    field.modes.fill_(4)
    _, variance = field(y, levels(20.0, 1), y, domain, error, domain)
    assert 0.5 < variance.sqrt().item() / 0.1 < 2


def test_an_observation_is_solved_for_once(monkeypatch):
    """Whatever the level and the member; and what is remembered is bounded."""
    prior, solved = PRIORS["ornstein-uhlenbeck around land"], []
    field, (z, *given) = product_modes(prior, T), data(prior.valid)
    right = module.interpolate

    def counted(*arguments, **options):
        solved.append(1)
        return right(*arguments, **options)

    monkeypatch.setattr(module, "interpolate", counted)
    first = field(z, levels(0.3), *given)[0]
    field(z.flip(0), levels(2.0), *given)
    assert len(solved) == 3
    again = field(z[[0, 0, 1]], levels(0.3), *(part[[0, 0, 1]] for part in given))[0]
    assert len(solved) == 3 and torch.equal(again[2], first[1])
    field.load_state_dict({name: value.clone() for name, value in field.state_dict().items()})
    field(z, levels(0.3), *given)
    assert len(solved) == 3
    moved = [*given[:2], given[2] + 0.1, given[3]]
    field(z, levels(0.3), *moved)
    assert len(solved) == 6
    monkeypatch.setattr(ProductModes, "REMEMBERED", 2)
    alike = [given[0] + 1, *(part[:1].expand_as(part) for part in given[1:])]
    field.prepare(*alike)
    assert len(solved) == 7  # together
    assert len(field.remembered) == 3  # those of a batch, however many
    one = field(z[:1], levels(0.3, 1), given[0][:1] + 1, *(part[:1] for part in given[1:]))[0]
    torch.testing.assert_close(one[0], field(z, levels(0.3), *alike)[0][0])
    assert len(solved) == 7
    field.load_state_dict(field.state_dict() | {"mean": field.mean + 1})
    assert not field.remembered


# The denoiser.


def network(field: ProductModes, diffusion=None, dtype=torch.float64) -> GaussianResidual:
    torch.manual_seed(0)
    frames = len(field.lags)
    channels = 7 if diffusion is None else 7 + 2 * diffusion.coupled
    model = GaussianResidual(channels, 2, (False, True), **SIZES, frames=frames)
    model.learn(lambda: field)
    return model.to(dtype)


def observation(y, observed, error, domain) -> Observation:
    return Observation(torch.where(observed, y, torch.nan), observed, error, domain)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_without_training_every_formulation_has_the_gaussian_posterior(name):
    prior, diffusion = PRIORS["travelling, of local variance"], FORMULATIONS[name]()
    denoiser = Denoiser(network(product_modes(prior, T), diffusion), diffusion, NORMALIZER)
    z, *given = data(prior.valid)
    told = observation(*given)
    if diffusion.coupled:
        told = Observation(told.y, told.observed, told.sigma_y, told.valid, background=torch.zeros_like(z))
    s = torch.tensor([0.05, 1.0, 0.9 * diffusion.sigma_max], dtype=torch.float64)
    got = denoiser(torch.where(given[-1], z, torch.nan), s, told)
    for i in range(3):
        exact = posterior(prior, s[i].item(), z[i], *(part[i] for part in given))[0]
        torch.testing.assert_close(got[i], torch.where(given[-1][i], exact, 0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("modes", [10**6, 40])
def test_the_jacobian_is_the_gain_and_symmetric(modes):
    """Symmetric with few modes, too: an estimate by a covariance, if not by that of the field."""
    prior = PRIORS["travelling, of local variance"]
    field = product_modes(prior, T)
    field.modes.fill_(modes)
    denoiser = Denoiser(network(field), EDM(), NORMALIZER)
    z, *given = data(prior.valid, 1)
    told = observation(*given)
    jacobian = torch.autograd.functional.jacobian(lambda z: denoiser(z, levels(1.0, 1), told), z)
    jacobian = jacobian.reshape(z.numel(), z.numel())
    torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-9, atol=1e-9)
    if modes > 40:
        gain = posterior(prior, 1.0, *(part[0] for part in (z, *given)))[2]
        inside = given[-1][0].expand(T, 2, H, W).flatten()
        torch.testing.assert_close(jacobian[inside], gain[inside], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("s", [1e-3, 0.05, 1.0, 20.0])
def test_with_few_modes_nothing_of_z_is_made_larger(kind, s):
    """Whatever the variance of a cell: where the gain exceeds 1 the steps of a sampler grow."""
    prior = PRIORS[kind]
    field = product_modes(prior, T)
    field.modes.fill_(8)
    z, *given = data(prior.valid, 1)
    gain = torch.autograd.functional.jacobian(lambda z: field(z, levels(s, 1), *given)[0], z)
    values = torch.linalg.eigvalsh(gain.reshape(z.numel(), z.numel()))
    assert values.min() > -1e-9 and 0.01 / (1 + s**2) < values.max() < 1


def test_a_sampler_draws_from_the_posterior_of_the_sequence():
    """Mean and covariance of its samples, from one run: those of the dense posterior."""
    frames, prior = 2, PRIORS["ornstein-uhlenbeck around land"]
    prior = Stationary(prior.lags, random(2, H, W, seed=1), EVERYWHERE)
    denoiser = Denoiser(network(product_modes(prior, frames)), EDM(), NORMALIZER)
    _, *given = data(prior.valid, 1, frames)
    given[1][:, 1] = True  # measured in the other frame alone

    def bound(z, s):
        told = observation(*(part.expand(len(z), *part.shape[1:]) for part in given))
        return denoiser(z, s.expand(len(z)), told)

    schedule = torch.cat([torch.logspace(3, -2, 80, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    mean, covariance = gaussian_law(Heun(80), bound, schedule, (frames, 2, H, W))
    nothing = (torch.zeros(frames, 2, H, W).double(), *(part[0] for part in given))
    exact, _, _ = posterior(prior, 1e6, *nothing)
    full = torch.from_numpy(dense(prior, frames))
    seen = given[1][0].expand(frames, 2, H, W).flatten()
    noise = torch.diag(given[2][0].expand(frames, 2, H, W).flatten()[seen] ** 2)
    left = full - full[:, seen] @ torch.linalg.inv(full[seen][:, seen] + noise) @ full[seen]
    deviation = left.diagonal().sqrt()
    assert ((mean - exact.flatten()) / deviation).abs().max() < 0.01
    assert ((covariance.diagonal().sqrt() / deviation) - 1).abs().max() < 0.02


def test_mmps_on_the_prior_is_the_posterior():
    """Told nothing, with the observations as rows."""
    prior = PRIORS["ornstein-uhlenbeck around land"]
    denoiser = Denoiser(network(product_modes(prior, T)), EDM(), NORMALIZER)
    z, y, observed, _, domain = data(prior.valid)
    error = torch.full((3, 1, 1, 1, 1), 0.3, dtype=torch.float64)
    s = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    got = MMPS(k_max=200, tolerance=1e-12).bind(denoiser, Observation(y, observed, error, domain))(z, s)
    for i in range(3):
        parts = (z[i], y[i], observed[i], error[i], domain[i])
        exact = torch.where(domain[i], posterior(prior, s[i].item(), *parts)[0], 0.0)
        torch.testing.assert_close(got[i], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PRIORS)
def test_the_field_is_kept_with_the_weights(kind, tmp_path: Path):
    """In double precision, whatever that of the network: also in a file of half precision."""
    field = product_modes(PRIORS[kind], T)
    model = network(field, dtype=torch.float32)
    save_weights(tmp_path / "half.safetensors", {"ema": model.state_dict()}, "float16")
    z, *given = (part.float() if part.is_floating_point() else part for part in data(PRIORS[kind].valid))
    s = torch.ones(3)
    for state in (model.state_dict(), load_weights(tmp_path / "half.safetensors")["ema"]):
        fresh = GaussianResidual(7, 2, (False, True), **SIZES, frames=T)
        fresh.load_state_dict(state)
        assert fresh.field.lags.dtype == torch.float64
        for ours, theirs in zip(model.posterior(z, s, *given), fresh.posterior(z, s, *given), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == torch.float32


# What is learnt.


def test_lags_of_sequences_a_stride_apart():
    lags = np.arange(1.0, 8.0)[:, None]
    np.testing.assert_array_equal(spaced(lags, 3, 2)[:, 0], [1, 3, 5])
    np.testing.assert_array_equal(spaced(lags, 5, 2)[:, 0], [1, 3, 5, 7, 0])


def test_a_window_has_the_covariance_of_the_domain():
    """Wherever it lies: the window of 3 x 3 cells in the dense covariance of all."""
    prior = Stationary(white(travelling()), np.zeros((2, H, W)), EVERYWHERE)
    inside = Stationary(cut(prior.lags, (3, 3)), np.zeros((2, 3, 3)), np.ones((3, 3), dtype=bool))
    field = product_modes(inside, 2)
    size = 2 * 2 * 9
    unit = torch.eye(size, dtype=torch.float64).view(size, 2, 2, 3, 3)
    ours = field.prior().covariance.apply(unit).flatten(1)
    whole = torch.from_numpy(dense(prior, 2)).view(2, 2, H, W, 2, 2, H, W)
    for top, left in ((0, 0), (1, 2)):
        rows, columns = slice(top, top + 3), slice(left, left + 3)
        part = whole[:, :, rows, columns, :, :, rows, columns].reshape(size, size)
        torch.testing.assert_close(ours, part, rtol=0, atol=1e-12)


def test_a_field_of_windows_is_one_of_larger_fields():
    """Up to where its covariance is known it has their dense posterior; as windows it has that of these."""
    prior = Stationary(white(travelling()), np.zeros((2, H, W)), land())
    field = ProductModes(torch.from_numpy(cut(spaced(prior.lags, T, 1), (H, W))), (3, 3))
    assert field.largest == (H, W)
    z, *given = data(prior.valid)
    mean, variance = field(z, levels(1.0), *given)
    torch.testing.assert_close(mean, product_modes(prior, T)(z, levels(1.0), *given)[0], rtol=0, atol=1e-12)
    for i in range(3):
        exact, spread, _ = posterior(prior, 1.0, z[i], *(part[i] for part in given))
        inside = given[-1][i].expand_as(exact)
        torch.testing.assert_close(mean[i][inside], exact[inside], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(variance[i], spread, rtol=1e-8, atol=0.0)
    small = ProductModes(torch.from_numpy(cut(spaced(prior.lags, T, 1), (3, 3))), (3, 3))
    z, *given = (part[..., :3, 1:4] for part in (z, *given))
    for ours, theirs in zip(*(kind(z, levels(1.0), *given) for kind in (field, small)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="fields must be of"):
        small(
            *(part.repeat(*(1,) * (part.ndim - 1), 2) if part.ndim > 1 else part for part in (z, levels(1.0), *given))
        )


def test_it_is_learnt_from_a_series_with_gaps(capsys):
    """The kind is chosen and printed; a field of windows is homogeneous, and a mean that varies counts as a part."""
    prior = Stationary(white(ornstein_uhlenbeck(8)), np.zeros((2, H, W)), EVERYWHERE)
    series = prior.draw(200, np.random.default_rng(0)) + 3.0
    series[50] = np.nan
    series[:, :, 0, 0][np.random.default_rng(1).random(200) < 0.3] = np.nan
    whole = sequence_field(series, EVERYWHERE, (False, True), frames=3, stride=2)
    assert "field in space and time of 200 frames" in capsys.readouterr().out
    assert whole.lags.shape == (3, 2, 2, 2 * H, W) and abs(whole.mean.mean() - 3) < 0.5
    part = sequence_field(series, EVERYWHERE, (False, True), frames=3, window=(3, 4))
    assert "local variance" not in capsys.readouterr().out.partition("(")[0]
    assert part.lags.shape == (3, 2, 2, 2 * H, 8) and part.largest == (H, 4)
    assert not part.mean.any() and (part.scale == 1).all()
    mean = part.lags[:, [0, 1], [0, 1], 0, 0] - whole.lags[:1, [0, 1], [0, 1], 0, 0]
    assert (mean[0] > 6).all()  # 9 of the mean


def test_the_covariance_ends_where_the_lags_do():
    assert L < T  # the priors above have a lag at which nothing is left
    field = product_modes(PRIORS["ornstein-uhlenbeck around land"], T)
    assert not field.lags[L:].any() and field.lags[L - 1].any()
