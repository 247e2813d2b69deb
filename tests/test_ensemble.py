"""Cases and ensembles: one seed gives one field, whatever it is computed beside."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import GaussianPrior
from torch import Tensor, nn

from vecfield_diffusion.data.fields import Fields, MemoryReader
from vecfield_diffusion.data.masks import Empty, Full, Pixels
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import DDPM, EDM, Interpolant
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.evaluation.physical import divergence_rms
from vecfield_diffusion.guidance.cfg import ClassifierFree
from vecfield_diffusion.guidance.inpainting import Conditional, RePaint
from vecfield_diffusion.guidance.physics import NoPhysics, Physics
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.guidance.sensors import Component
from vecfield_diffusion.inference.cases import Cases, make_cases
from vecfield_diffusion.inference.ensemble import member_noise, member_seed, sample_ensemble
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.samplers.base import Sampler
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler, Heun

PRIOR = GaussianPrior()
HEIGHT, WIDTH = PRIOR.shape[1:]
LAND = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
LAND[:2, :3] = False
STD, MEAN = 0.3, 1.5


class Shrink(nn.Module):
    """A network whose denoiser D = c_skip x + c_out F works cell by cell: no arithmetic is shared between samples."""

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return torch.tanh(x[:, :2]) * x[:, 4:5] + 0.1 * noise[:, None, None, None] + x[:, 5:7].sum(1, keepdim=True)


def denoiser(network: nn.Module | None = None, diffusion: nn.Module | None = None) -> Denoiser:
    normalizer = Normalizer(torch.full((2, HEIGHT, WIDTH), MEAN), STD)
    return Denoiser(network or Shrink(), diffusion or EDM(sigma_max=20.0), normalizer).eval()


def fields(n: int = 6, valid: Tensor = LAND, seed: int = 0) -> Fields:
    """Random fields with gaps of their own."""
    rng = np.random.default_rng(seed)
    velocity = (MEAN + STD * rng.standard_normal((n, 2, HEIGHT, WIDTH))).astype(np.float32)
    velocity[:, :, 4, 4] = np.nan
    velocity[1, 0, 3] = np.nan
    grid = Grid(valid, 1000.0, 1000.0)
    return Fields(MemoryReader(velocity), n, grid, np.arange(WIDTH), np.arange(HEIGHT), "memory", ("u", "v"))


def sample(cases: Cases, sampler: Sampler | None = None, **changes: object) -> Tensor:
    """Members of `cases` with the cell-by-cell denoiser, and Heun with noise in every step."""
    parts = dict(inpainting=Conditional(), physics=NoPhysics(), network=denoiser(), members=4, seed=3, batch=64)
    parts |= changes
    network = parts.pop("network")
    sampler = sampler or Heun(5, S_churn=10.0)
    observation = cases.observation(network.normalizer, torch.device("cpu"))
    names = ("inpainting", "physics", "guidance", "sensor")
    method = Method(sampler, **{name: parts.pop(name) for name in names if name in parts})
    return sample_ensemble(network, method, observation, cases.grid, numbers=cases.numbers, **parts)


# Ensembles.


def test_hard_physics_leaves_no_divergence_and_the_observed_values() -> None:
    """With exact observations, too: they are put in first and held."""
    cases = make_cases(fields(valid=torch.ones_like(LAND)), [0], Pixels(0.1), seed=1)
    out = sample(cases, Euler(3), physics=Physics("hard"), members=2)
    plain = sample(cases, Euler(3), members=2)
    everywhere = torch.ones(1, 1, HEIGHT, WIDTH, dtype=torch.bool)
    assert divergence_rms(out, cases.grid, everywhere) < 1e-4 * divergence_rms(plain, cases.grid, everywhere)
    seen = cases.observed.expand(1, 2, HEIGHT, WIDTH)
    torch.testing.assert_close(out[0][seen], cases.truth[seen], rtol=1e-5, atol=1e-5)


def test_guidance_reaches_the_sampler() -> None:
    """Classifier-free with scale 0 is the network that is told nothing; observed cells are put in afterwards."""
    cases = make_cases(fields(), [0], Pixels(0.3), seed=1, sigma_obs=0.01)
    guided = sample(cases, Euler(3), guidance=ClassifierFree(0.0))
    prior = sample(replace(cases, observed=torch.zeros_like(cases.observed)), Euler(3))
    torch.testing.assert_close(guided, prior, equal_nan=True)
    assert not torch.allclose(guided, sample(cases, Euler(3)), equal_nan=True)


def test_steps_below_the_error_of_the_observation_are_taken_once() -> None:
    """Three steps twice, but for those to levels under sigma_y, and the last."""
    calls = []
    cases = make_cases(fields(), [0], Pixels(0.3), seed=1, sigma_obs=STD * 0.5)
    levels = EDM(sigma_max=20.0).levels(6)
    sample(cases, Euler(6), inpainting=RePaint(2), members=1, progress=calls.append)
    above = int((levels[1:] > 0.5).sum())
    assert len(calls) == 6 + above


def test_repaint_depends_on_neither_the_batch_nor_the_errors_of_what_is_not_observed() -> None:
    """Observations of different errors, together and each by itself; any error where nothing is observed."""
    whole = make_cases(fields(), [0, 2, 5], Pixels(0.3), seed=1)
    sigma = torch.tensor([0.0, 0.5, 0.2])[:, None, None, None] * STD * torch.ones(1, 1, HEIGHT, WIDTH)
    whole = replace(whole, sigma_obs=sigma)
    options = {"inpainting": RePaint(3), "members": 2}
    together = sample(whole, Euler(6), **options)
    for place in range(3):
        alone = sample(whole[[place]], Euler(6), **options)
        assert torch.equal(together[:, place].nan_to_num(), alone[:, 0].nan_to_num())
    elsewhere = replace(whole, sigma_obs=torch.where(whole.observed | whole.single, sigma, 9.0))
    assert torch.equal(together.nan_to_num(), sample(elsewhere, Euler(6), **options).nan_to_num())


def test_a_sensor_tells_its_component_and_nothing_else() -> None:
    """The v that was not measured, NaN or not, changes nothing; the u that was does."""
    cases = make_cases(fields(valid=torch.ones_like(LAND)), [0], Pixels(0.3), seed=1, sigma_obs=0.01)
    how = {"inpainting": MMPS(k_max=3), "sensor": Component("u"), "members": 1}
    base = sample(cases, Euler(3), **how)
    for component, changes in ((1, False), (0, True)):
        y = cases.y.clone()
        y[:, component] += 0.5
        out = sample(replace(cases, y=y), Euler(3), **how)
        assert bool((out - base).abs().max() > 1e-3) is changes


def test_the_interpolant_starts_from_noise_around_its_guess() -> None:
    class Start(Euler):
        def step(self, denoise, z, s, r, noise, memory):
            return z if r > 0 else (z + 0 * denoise(z, s))

    cases = make_cases(fields(), [0, 2], Pixels(0.3), seed=1)
    interpolant = Interpolant(sigma_min=1e-7, sigma_max=1e-6)
    network = denoiser(diffusion=interpolant)
    observation = cases.observation(network.normalizer, torch.device("cpu"))
    guess = network.normalizer.denormalize(interpolant.with_background(observation, cases.grid).background)
    out = sample(cases, Start(2), network=network, members=1)[0]
    hidden = cases.hidden.expand_as(out)
    torch.testing.assert_close(out[hidden], guess[hidden], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inpainting", [Conditional(), RePaint(1)], ids=["conditional", "replacement"])
def test_fields_do_not_depend_on_the_batch(inpainting: object) -> None:
    cases = make_cases(fields(), [0, 2], Pixels(0.3), seed=1)
    whole = sample(cases, inpainting=inpainting)
    assert whole.shape == (4, 2, 2, HEIGHT, WIDTH)
    for batch in (1, 3, 8):
        assert torch.equal(sample(cases, inpainting=inpainting, batch=batch).nan_to_num(), whole.nan_to_num())


def test_nor_does_a_real_network_beyond_rounding() -> None:
    torch.manual_seed(0)
    network = UNet(in_channels=7, channels=[8, 16], blocks=1, attention=[-1], embedding=16)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    cases = make_cases(fields(), [0, 2], Pixels(0.3), seed=1)
    eight, ones = (sample(cases, Euler(6), network=denoiser(network), batch=batch) for batch in (8, 1))
    torch.testing.assert_close(eight, ones, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert (eight[0] - eight[1]).nan_to_num().abs().max() > 0.1


def test_more_members_and_other_cases_leave_a_field_as_it_is() -> None:
    several = make_cases(fields(), [0, 2, 5], Pixels(0.3), seed=1)
    one = make_cases(fields(), [2], Pixels(0.3), seed=1)
    whole, part = sample(several, members=6), sample(one, members=2)
    assert torch.equal(whole[:2, 1:2].nan_to_num(), part.nan_to_num())


def test_members_cases_and_seeds_differ() -> None:
    cases = make_cases(fields(), [0, 2], Empty(), seed=1)
    first, again, other = sample(cases), sample(cases), sample(cases, seed=4)
    assert torch.equal(first.nan_to_num(), again.nan_to_num())
    drawn = torch.cat([first.flatten(0, 1), other.flatten(0, 1)])[..., LAND].flatten(1)
    assert (torch.cdist(drawn, drawn) + torch.eye(16) > 0.1).all()


def test_no_numbers_mean_0_1_2() -> None:
    observation = Observation.none(2, LAND)
    ends = [
        sample_ensemble(
            denoiser(), Method(Euler(3), Conditional()), observation, Grid(LAND), members=2, seed=0, numbers=given
        )
        for given in (None, [0, 1])
    ]
    assert torch.equal(ends[0].nan_to_num(), ends[1].nan_to_num())


@pytest.mark.parametrize("diffusion", [EDM(sigma_max=20.0), DDPM()], ids=["edm", "ddpm"])
@pytest.mark.parametrize("sampler", [Euler(4), Heun(4), DPMpp2M(4)], ids=["euler", "heun", "dpmpp_2m"])
def test_exact_observations_are_kept_and_land_is_nan(sampler: Sampler, diffusion: nn.Module) -> None:
    cases = make_cases(fields(), [0, 1], Pixels(0.4), seed=1)
    for inpainting in (Conditional(), RePaint(1)):
        members = sample(cases, sampler, network=denoiser(diffusion=diffusion), inpainting=inpainting)
        expected = cases.truth.expand_as(members)
        observed = cases.observed.expand_as(members)
        torch.testing.assert_close(members[observed], expected[observed], rtol=3e-7, atol=0)
        assert torch.equal(members.isfinite(), LAND.expand_as(members))


def test_observations_with_an_error_are_not_copied() -> None:
    cases = make_cases(fields(), [0], Full(), seed=1, sigma_obs=0.1)
    members = sample(cases)
    known = cases.observed.expand_as(members)
    assert ((members - cases.y).abs()[known] > 1e-4).double().mean() > 0.9


def test_the_ensemble_of_an_exact_denoiser_has_the_exact_spread() -> None:
    """With D the posterior mean of a Gaussian prior the members are draws of it: variance 1 in normalised units."""

    class Exact(Denoiser):
        def forward(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
            return PRIOR.denoise(z.double(), s.double()).float()

    network = Exact(Shrink(), EDM(sigma_max=300.0), Normalizer(torch.zeros(2, HEIGHT, WIDTH), STD))
    observation = Observation.none(1, torch.ones_like(LAND))
    method = Method(DPMpp2M(48), Conditional())
    members = sample_ensemble(network, method, observation, Grid(torch.ones_like(LAND)), members=600, seed=0)
    assert members.var(0).mean().sqrt().item() == pytest.approx(STD, rel=0.03)


def test_progress_counts_every_evaluation_of_every_field() -> None:
    cases = make_cases(fields(), [0, 2], Pixels(0.3), seed=1)
    told: list[int] = []
    sampler = Heun(5)
    sample(cases, sampler, members=3, batch=4, progress=told.append)
    assert sum(told) == 6 * sampler.evaluations and set(told) == {4, 2}


def test_physics_works_on_physical_units_and_by_sample() -> None:
    """Guidance lowers the divergence, of each sample by itself, though the toy pulls every cell its own way."""
    cases = make_cases(fields(), [0, 2], Empty(), seed=1)
    where = LAND.expand(2, 1, -1, -1)
    plain, guided = (sample(cases, Heun(18), physics=physics) for physics in (NoPhysics(), Physics("gradient", 1.0)))
    assert divergence_rms(guided, cases.grid, where) < divergence_rms(plain, cases.grid, where)
    ones = sample(cases, Heun(18), physics=Physics("gradient", 1.0), batch=1)
    torch.testing.assert_close(guided, ones, equal_nan=True, rtol=1e-5, atol=1e-6)


# Seeds.


def test_seeds_are_mixed_and_fit_into_int64() -> None:
    seeds = [member_seed(seed, case, member) for seed in range(6) for case in range(12) for member in range(40)]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**63
    bits = (np.array(seeds)[:, None] >> np.arange(63)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 5 / (2 * np.sqrt(len(seeds)))
    noise = member_noise(seeds[:400], (2, HEIGHT, WIDTH), torch.zeros(1))().flatten(1).double()
    correlation = (noise @ noise.T / noise.shape[1])[~torch.eye(400, dtype=torch.bool)]
    assert correlation.abs().max() < 6 / np.sqrt(noise.shape[1])
    assert correlation.std().item() == pytest.approx(1 / np.sqrt(noise.shape[1]), rel=0.05)


def test_noise_goes_on_with_each_generator() -> None:
    draw = member_noise([5, 6], (2, 3, 4), torch.zeros(1, dtype=torch.float64))
    first, second = draw(), draw()
    generator = torch.Generator().manual_seed(6)
    for each in (first, second):
        assert torch.equal(each[1], torch.randn(2, 3, 4, dtype=torch.float64, generator=generator))


# Cases.


def test_a_case_depends_on_seed_and_snapshot_alone() -> None:
    options = dict(mask=Pixels([0.1, 0.6]), seed=5, sigma_obs=0.2, add_error=True)
    several, one = make_cases(fields(), [4, 0, 2], **options), make_cases(fields(), [2], **options)
    assert torch.equal(several.observed[2:], one.observed)
    assert torch.equal(several.y[2:].nan_to_num(), one.y.nan_to_num())
    other = make_cases(fields(), [2], **(options | {"seed": 6}))
    assert not torch.equal(other.observed, one.observed)
    assert not torch.equal(several.observed[0], several.observed[1])


def test_an_error_is_added_only_when_asked_for() -> None:
    data = fields(60)
    exact, told = (make_cases(data, range(60), Full(), seed=0, sigma_obs=0.2, add_error=add) for add in (False, True))
    known = exact.observed.expand_as(exact.y)
    assert torch.equal(exact.y[known], exact.truth[known])
    error = (told.y - told.truth)[known]
    assert error.std().item() == pytest.approx(0.2, rel=0.03) and abs(error.mean().item()) < 0.01
    assert torch.equal(told.truth.nan_to_num(), exact.truth.nan_to_num())
    for cases in (exact, told):
        sigma = cases.observation(denoiser().normalizer, torch.device("cpu")).sigma_y
        torch.testing.assert_close(sigma, torch.full((60, 1, 1, 1), 0.2 / STD))


def test_regions_part_the_known_cells() -> None:
    cases = make_cases(fields(), [0, 1], Pixels(0.5), seed=1)
    known = cases.truth.isfinite().all(1, keepdim=True)
    assert torch.equal(cases.hidden | cases.observed, known)
    assert not (cases.hidden & cases.observed).any()
    assert not known[..., ~LAND].any() and not known[..., 4, 4].any() and not known[1, :, 3].any()
    assert torch.equal(cases.y.isfinite().all(1, keepdim=True), cases.observed)


def test_another_domain_than_that_of_the_file_goes_first() -> None:
    """A file that measures where the network knows land: those cells are neither observed, nor known, nor scored."""
    cases = make_cases(fields(valid=torch.ones_like(LAND)), [0, 2], Pixels(0.5), seed=1, grid=Grid(LAND))
    for part in (cases.observed, cases.hidden, cases.truth.isfinite()):
        assert not part[..., ~LAND].any()
    assert cases.hidden.any()


def test_what_the_network_is_told_is_normalised_and_has_no_nan() -> None:
    cases = make_cases(fields(), [0, 1], Pixels(0.5), seed=1)
    given = cases.observation(denoiser().normalizer, torch.device("cpu"))
    known = cases.observed | cases.single
    assert cases.single.any() and not (cases.single & cases.observed).any() and not cases.single.all(dim=1).any()
    assert torch.equal(given.single, cases.single)
    torch.testing.assert_close(given.y[known] * STD + MEAN, cases.truth[known])
    assert (given.y[~known] == 0).all() and (given.sigma_y == 0).all()
    assert torch.equal(given.valid, LAND.expand(2, 1, -1, -1)) and torch.equal(given.observed, cases.observed)


def test_a_snapshot_that_measured_nothing_is_a_case_without_observations() -> None:
    """As the storm set has one; the cases beside it are what they are alone."""
    source = fields()
    source.reader.array[2] = np.nan
    cases = make_cases(source, [1, 2, 3], Pixels(0.3), seed=5)
    assert not cases.observed[1].any() and not cases.hidden[1].any()
    for place, index in ((0, 1), (2, 3)):
        alone = make_cases(source, [index], Pixels(0.3), seed=5)
        assert alone.observed.any() and torch.equal(cases.observed[place], alone.observed[0])
