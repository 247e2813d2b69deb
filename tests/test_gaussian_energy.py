"""The energy around a Gaussian field: closed forms of the field, the gradient of the whole, checkpoints, commands."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ideal import FORMULATIONS, NORMALIZER
from programs import FEW, SMALL, TINY, Call, is_message
from test_energy import check_score, seen, woken
from test_gaussian import LAND, D, H, W, dense, eigenfields, homogeneous_covariance, random_spectrum

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.models.gaussian import Waves
from vecfield_diffusion.models.gaussian_energy import GaussianEnergy

SIZES = {"channels": [8, 8], "blocks": 1, "attention": [], "embedding": 16}


def waves():
    spectrum = random_spectrum()
    return Waves(spectrum), homogeneous_covariance(spectrum), torch.ones(H, W, dtype=torch.bool)


def on_land():
    """Modes of the whole rectangle, of which the domain is a part."""
    field, _ = eigenfields()
    basis = torch.linalg.qr(torch.randn(D, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    field.modes = basis.T.reshape(5, 2, H, W).contiguous()
    covariance = basis @ torch.diag(field.variances.double()) @ basis.T
    inside = LAND.expand(2, H, W).flatten()
    covariance = covariance + field.nugget.double() * torch.eye(D, dtype=torch.float64)
    return field, torch.where(inside & inside[:, None], covariance, 0.0), LAND


FIELDS = {"waves": waves, "land": on_land}


def denoiser_of(field, diffusion=None, awake=False):
    network = GaussianEnergy(7, **SIZES).double()
    network.learn(lambda: field.double())
    network = woken(network) if awake else network.eval().requires_grad_(False)
    return Denoiser(network, diffusion or EDM(sigma_max=80.0), NORMALIZER)


def drawn(valid, levels=(0.01, 0.7, 30.0)):
    s = torch.tensor(levels, dtype=torch.float64)
    z = torch.randn(len(s), 2, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    z = torch.where(valid, z * (1 + s).view(-1, 1, 1, 1), 0.0)
    return z, s, Observation.none(len(s), valid, torch.float64)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_a_new_one_is_minus_the_logarithm_of_the_density_and_its_denoiser(kind, name):
    """By the dense covariance in the domain, at levels where noise is all and where it is nothing."""
    field, covariance, valid = FIELDS[kind]()
    denoiser, (z, s, observation) = denoiser_of(field, FORMULATIONS[name]()), drawn(valid)
    inside = valid.expand(2, H, W).flatten()
    covariance = covariance[inside][:, inside]
    estimate, energy = denoiser(z, s, observation), denoiser.energy(z, s, observation)
    for k in range(len(s)):
        law = torch.distributions.MultivariateNormal(
            torch.zeros(int(inside.sum()), dtype=torch.float64),
            covariance + s[k] ** 2 * torch.eye(int(inside.sum()), dtype=torch.float64),
        )
        row = z[k].flatten()[inside]
        assert energy[k].item() == pytest.approx(-law.log_prob(row).item(), rel=1e-6)
        exact = covariance @ torch.linalg.solve(law.covariance_matrix, row)
        torch.testing.assert_close(estimate[k].flatten()[inside], exact, rtol=1e-6, atol=1e-6)
        assert not estimate[k].flatten()[~inside].any()


@pytest.mark.parametrize("kind", FIELDS)
def test_the_score_is_minus_the_gradient_of_the_energy(kind):
    field, _, valid = FIELDS[kind]()
    z, s, observation = seen(shape=(H, W))
    inside = valid.expand_as(observation.valid)
    given = Observation(observation.y, observation.observed & inside, observation.sigma_y, inside)
    check_score(denoiser_of(field, awake=True), z, s, given)


def test_mmps_with_a_new_one_is_exact_and_needs_no_guard():
    """The posterior mean given the noisy field and a third of the cells, by the dense system of both."""
    field, covariance, valid = waves()
    denoiser, (z, s, _) = denoiser_of(field), drawn(valid, (0.05, 0.7, 30.0))
    observed = torch.rand(3, 1, H, W, generator=torch.Generator().manual_seed(5)) < 0.3
    y = torch.randn(3, 2, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    error = torch.full((3, 1, H, W), 0.1, dtype=torch.float64)
    given = Observation(torch.where(observed, y, 0.0), observed, error, valid.expand(3, 1, H, W))
    method = MMPS(k_max=400, tolerance=1e-10)
    found = method.bind(denoiser, given)(z, s)
    for k in range(3):
        exact = dense(covariance, z[k], s[k].item(), given.y[k], observed[k], error[k])[0]
        torch.testing.assert_close(found[k], exact, rtol=1e-6, atol=1e-6)
    assert method.guard == 0


@torch.no_grad()
def test_what_the_network_adds_is_of_the_order_of_the_square_of_the_level():
    field, _, valid = waves()
    plain, awake = denoiser_of(field), denoiser_of(field, awake=True)
    z, s, observation = drawn(valid, (1e-3, 1e-2))
    z = z[:1].expand_as(z)
    added = (awake(z, s, observation) - plain(z, s, observation)).flatten(1).norm(dim=1)
    assert math.log10(added[1] / added[0]) == pytest.approx(2, abs=0.1)


def test_weights_bring_their_field():
    field, _, valid = waves()
    one, other = denoiser_of(field, awake=True), Denoiser(GaussianEnergy(7, **SIZES).double(), EDM(), NORMALIZER)
    other.load_state_dict(one.state_dict())
    given = drawn(valid)
    torch.testing.assert_close(other.eval().energy(*given), one.energy(*given), rtol=0, atol=0)


def test_frames_are_refused_and_proposals_are_those_of_the_field():
    with pytest.raises(ValueError, match="frames must be 1"):
        GaussianEnergy(7, frames=2, **SIZES)
    denoiser, (z, _, observation) = denoiser_of(waves()[0]), drawn(LAND | True)
    torch.testing.assert_close(denoiser.reference(observation).centre(z), torch.zeros_like(z), rtol=0, atol=1e-6)


MODEL = ["model=energy_gaussian", "model.blocks=1", *SMALL, "loss.dual=1", "trainer.max_steps=2"]


@pytest.mark.parametrize("window", [[], ["window=[12,8]"]], ids=["whole", "windows"])
def test_it_trains_fills_and_says_how_probable_fields_are(place: Path, run: Call, window: list[str]) -> None:
    name = "windows" if window else "whole"
    assert run("train", *TINY, *MODEL, *window, "trainer.validate_every=2", f"name={name}")[::2] == (0, "")
    given = [f"ckpt=outputs/train/{name}", "name=mine", *FEW]
    assert run("infer", *given, "inpainting=mmps")[::2] == (0, "")
    if window:
        return
    code, out, err = run("infer", *given, "mask=none", "likelihood=energy", "sampler=pcn", "sampler.corrections=1")
    assert (code, err) == (0, "") and "log-likelihood" in out and "white noise" not in out


def test_sequences_are_refused_in_one_line(run: Call) -> None:
    sequences = ["dataset.frames=2", "dataset.trajectory=4"]
    is_message(run("train", *TINY, *MODEL, *sequences, "name=odd"), "frames", "must be 1")
