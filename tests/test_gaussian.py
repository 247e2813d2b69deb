"""What a Gaussian field misses: the posterior beside the dense one, and the denoiser that is built on it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from ideal import FORMULATIONS, NORMALIZER
from programs import FEW, SMALL, TINY, Call, is_message

from vecfield_diffusion.diffusion.base import HEADS
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.few_steps import CRPS, Consistency
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.evaluation.covariance import Homogeneous
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.inference.export import load_weights, save_weights
from vecfield_diffusion.models.gaussian import Eigenfields, GaussianResidual, Modes, Waves
from vecfield_diffusion.models.modes import quadrature
from vecfield_diffusion.programs.trained import load_trained

H, W = 6, 8
D = 2 * H * W
LEVELS = [0.05, 1.0, 20.0]
LAND = torch.ones(H, W, dtype=torch.bool)
LAND[:2, :3] = False
SIZES = {"channels": [8, 8], "blocks": 1, "attention": [], "embedding": 16}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_spectrum():
    """Of a homogeneous field with correlated components, a mean flow and power in the shortest waves, too."""
    white = torch.randn(200, 2, H, W, dtype=torch.float64, generator=seeded())
    mixed = white + 0.7 * white.flip(1).roll((1, 2), (2, 3))
    k = torch.fft.fftfreq(H, 1 / H)[:, None] ** 2 + torch.fft.fftfreq(W, 1 / W) ** 2
    waves = torch.fft.fft2(mixed, norm="ortho") / (1 + k.double())
    return torch.einsum("nchw,ndhw->cdhw", waves, waves.conj()) / 200


def homogeneous_covariance(spectrum):
    """C[(c, r), (d, q)] = the inverse transform of P_cd at r - q."""
    offsets = torch.fft.ifft2(spectrum).real
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))
    down, right = (row[:, None] - row) % H, (column[:, None] - column) % W
    return torch.cat([torch.cat([offsets[c, d][down, right] for d in range(2)], dim=1) for c in range(2)])


def eigenfields():
    """Five modes and a white part around land, and their covariance."""
    inside = LAND.expand(2, H, W).flatten()
    basis = torch.linalg.qr(torch.randn(int(inside.sum()), 5, dtype=torch.float64, generator=seeded(1)))[0]
    modes = torch.zeros(5, D, dtype=torch.float64)
    modes[:, inside] = basis.T
    variances = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    field = Eigenfields(modes.view(5, 2, H, W), variances)
    field.nugget = torch.tensor(0.1, dtype=torch.float64)
    return field, modes.T @ torch.diag(variances) @ modes + 0.1 * torch.diag(inside.double())


def data(valid, n=3, seed=2):
    """Noisy fields, observations with an error of each cell, and which cells have one."""
    generator = seeded(seed)
    z, y = (torch.randn(n, 2, H, W, dtype=torch.float64, generator=generator) * valid for _ in range(2))
    observed = (torch.rand(n, 1, H, W, generator=generator) < 0.4) & valid
    error = 0.1 + torch.rand(n, 1, H, W, dtype=torch.float64, generator=generator)
    return z, torch.where(observed, y, 0.0), observed, error, valid.expand(n, 1, H, W)


def dense(covariance, z, s, y, observed, error):
    """The posterior of one sample by the joint system of all data: mean `(2, H, W)`, covariance, gain for z."""
    seen = observed.expand(2, H, W).flatten()
    rows = torch.cat([torch.eye(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)[seen]])
    noise = torch.cat([torch.full((D,), s**2, dtype=torch.float64), error.expand(2, H, W).flatten()[seen] ** 2])
    gain = covariance @ rows.T @ torch.linalg.inv(rows @ covariance @ rows.T + torch.diag(noise))
    mean = gain @ torch.cat([z.flatten(), y.flatten()[seen]])
    return mean.view(2, H, W), covariance - gain @ rows @ covariance, gain[:, :D]


def fields(monkeypatch):
    """Both fields, all modes of them taken, with their covariances and domains."""
    monkeypatch.setattr(Waves, "LEFT_OUT", 0.0)
    monkeypatch.setattr(Waves, "PROBES", 20000)
    spectrum, everywhere = random_spectrum(), torch.ones(H, W, dtype=torch.bool)
    field, covariance = eigenfields()
    return {
        "waves": (Waves(spectrum, 10**6), homogeneous_covariance(spectrum), everywhere),
        "eigenfields": (field, covariance, LAND),
    }


@pytest.mark.parametrize("kind", ["waves", "eigenfields"])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "members"])
def test_the_posterior_is_that_of_the_joint_system(kind, shared, monkeypatch):
    """Also where samples share what is observed, as the members of an ensemble do."""
    field, covariance, valid = fields(monkeypatch)[kind]
    for s in LEVELS:
        z, y, observed, error, domain = data(valid)
        if shared:
            observed, error, y = observed[[1, 0, 1]], error[[1, 0, 1]], y[[1, 0, 1]]
        mean, variance = field(z, torch.full((3,), s, dtype=torch.float64), y, observed, error, domain)
        for i in range(3):
            exact, spread, _ = dense(covariance, z[i], s, y[i], observed[i], error[i])
            torch.testing.assert_close(mean[i], exact, rtol=1e-9, atol=1e-9)
            rounding = 0.03 if kind == "waves" else 1e-9
            torch.testing.assert_close(variance[i], spread.trace() / (2 * valid.sum()), rtol=rounding, atol=0.0)


def flow_map(covariance, z, s, y, observed, error):
    """m + (C / (C + s^2))^(1/2) (z - m) of one sample, for the dense posterior N(m, C) given y."""
    mean, spread, _ = dense(covariance, torch.zeros_like(z), 1e8, y, observed, error)
    values, vectors = torch.linalg.eigh((spread + spread.T) / 2)
    values = values.clamp(min=0.0)
    root = vectors @ torch.diag((values / (values + s**2)).sqrt()) @ vectors.T
    return mean + (root @ (z - mean).flatten()).view_as(z)


@pytest.mark.parametrize("kind", ["waves", "eigenfields"])
def test_the_flow_map_is_that_of_the_dense_posterior(kind, monkeypatch):
    """With many nodes to rounding; with as many as are taken to a hundredth of what is not known."""
    field, covariance, valid = fields(monkeypatch)[kind]
    monkeypatch.setattr(Waves, "PROBES", 1)
    for s in LEVELS:
        z, *given = data(valid)
        exact = torch.stack([flow_map(covariance, z[i], s, *(part[i] for part in given[:3])) for i in range(3)])
        for nodes, near in ((Modes.NODES, 0.01), (100, 1e-7)):
            with monkeypatch.context() as patch:
                if nodes == 100:
                    patch.setattr(Modes, "NODES", nodes)
                    patch.setattr("vecfield_diffusion.models.modes.quadrature", partial(quadrature, low=1e-8, top=20.0))
                got = field.flow(z, torch.full((3,), s, dtype=torch.float64), *given)
            torch.testing.assert_close(got, exact, rtol=0.0, atol=near * min(s, 1.0))


def test_the_levels_of_the_flow_map_converge_as_the_sum_over_w_does():
    """Of modes of any variance; the sum in steps of h is off by 4 exp(-pi^2 / h) at most, as are its weights."""
    s, c = torch.tensor([0.3, 40.0, 1e4], dtype=torch.float64), torch.logspace(-1, 3, 50, dtype=torch.float64)[:, None]
    exact, before = (c / (c + s**2)).sqrt(), torch.ones(3, dtype=torch.float64)
    for nodes in (15, 20, 25, 30):
        levels, weights = quadrature(s, nodes, low=1e-6, top=9.0)
        assert torch.equal(levels[-1], s) and torch.allclose(weights.sum(dim=0), torch.ones_like(s))
        off = ((weights * c[..., None, :] / (c[..., None, :] + levels**2)).sum(dim=1) / exact - 1).abs().amax(dim=0)
        h = (9.0 - (1e-6 * s.clamp(max=1) / s).log()) / (nodes - 1)
        assert (off < 8.1 * torch.exp(-(math.pi**2) / h)).all() and (off < before).all(), (nodes, off)
        before = off


@pytest.mark.parametrize("exact", [True, False])
def test_the_deviation_is_that_of_the_valid_cells(exact, monkeypatch):
    """Modes that go on over land, and an error of some cells alone: against the diagonal of the dense posterior."""
    monkeypatch.setattr(Eigenfields, "EXACT", 128 if exact else 0)
    monkeypatch.setattr(Eigenfields, "VECTORS", 20000)
    modes = torch.linalg.qr(torch.randn(D, 6, dtype=torch.float64, generator=seeded(4)))[0].T
    variances = torch.tensor([20.0, 9.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    field = Eigenfields(modes.view(6, 2, H, W), variances)
    field.nugget = torch.tensor(0.3, dtype=torch.float64)
    domain = torch.arange(H * W).view(H, W) % 5 < 3  # two cells of five are land
    covariance = modes.T @ torch.diag(variances) @ modes + 0.3 * torch.eye(D, dtype=torch.float64)
    inside = domain.expand(2, H, W).flatten()
    covariance = covariance * inside * inside[:, None]
    z, y, observed, error, valid = data(domain)
    for s in LEVELS:
        _, variance = field(z, torch.full((3,), s, dtype=torch.float64), y, observed, error, valid)
        for i in range(3):
            _, spread, _ = dense(covariance, z[i], s, y[i], observed[i], error[i])
            exact_value = spread.trace() / (2 * domain.sum())
            torch.testing.assert_close(variance[i], exact_value, rtol=1e-9 if exact else 0.03, atol=0.0)


def test_a_field_of_before_keeps_the_deviation_that_its_network_learned_with():
    """The state of a field without the mark: nothing else changes, and it is kept when saved again."""
    modes = torch.linalg.qr(torch.randn(D, 6, dtype=torch.float64, generator=seeded(4)))[0].T.reshape(6, 2, H, W)
    field = Eigenfields(modes, torch.linspace(5, 1, 6, dtype=torch.float64), 0.5)
    z, *given = data(torch.arange(H * W).view(H, W) % 5 < 3)
    state = {name: value for name, value in field.state_dict().items() if name != "over_valid"}
    before = Eigenfields().double()
    before.load_state_dict(state)
    s = torch.ones(3, dtype=torch.float64)
    ours, theirs = field(z, s, *given), before(z, s, *given)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    assert ((ours[1] / theirs[1]).log().abs() > 0.02).all()
    again = Eigenfields().double()
    again.load_state_dict(before.state_dict())
    assert torch.equal(again(z, s, *given)[1], theirs[1])


def test_products_of_a_mask_are_remembered_while_nothing_is_trained():
    field, _ = eigenfields()
    z, y, observed, _, domain = data(LAND)  # two products of each mask: one kind of cells of three needs none
    error = torch.full((3, 1, 1, 1), 0.3, dtype=torch.float64)
    for s in (0.1, 1.0, 10.0):
        given = (z, torch.full((3,), s, dtype=torch.float64), y, observed, error, domain)
        fresh = field.train()(*given)
        assert len(field.remembered) == (0 if s == 0.1 else 4)
        for ours, theirs in zip(field.eval()(*given), fresh, strict=True):
            assert torch.equal(ours, theirs)
    field.REMEMBERED = 2
    field(z, torch.ones(3).double(), y, observed.flip(3) & domain, error, domain)
    assert len(field.remembered) == 2


@pytest.mark.parametrize("kind", ["waves", "eigenfields"])
def test_training_factorises_a_system_once_for_all_snapshots_that_ask_for_it(kind, monkeypatch):
    field, _, valid = fields(monkeypatch)[kind]
    z, y, observed, error, domain = data(valid)
    levels, factorise, found = torch.tensor([0.1, 1.0, 10.0]).double(), field.factorised, []
    monkeypatch.setattr(field, "factorised", lambda gram, d: found.append(len(gram)) or factorise(gram, d))
    kept = (observed, error, domain)
    exact = field.eval()(z, levels, y, *kept), field(-z, levels, 2 * y, *kept)
    field.train()
    found.clear()
    for _ in range(2):
        for given, expected in zip(((z, levels, y, *kept), (-z, levels, 2 * y, *kept)), exact, strict=True):
            for ours, theirs in zip(field(*given), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert found == [3]
    field(z, levels * torch.tensor([1, 2, 1]).double(), y, *kept)
    assert found == [3, 1]  # one level is another
    field.load_state_dict(field.state_dict())
    field(z, levels, y, *kept)
    assert found == [3, 1] and len(field.solved) == 4
    field.SYSTEMS = 2  # but never fewer than those of a batch
    field(z, levels * 3, y, *kept)
    assert found == [3, 1, 3] and len(field.solved) == 3
    field.load_state_dict(
        {name: 2 * value if value.is_floating_point() else value for name, value in field.state_dict().items()}
    )
    assert not field.solved


def test_few_waves_leave_the_rest_to_the_wiener_filter(monkeypatch):
    """Exact without observations however few are estimated together; with them, the better the more they are."""
    monkeypatch.setattr(Waves, "LEFT_OUT", 0.0)
    spectrum = random_spectrum()
    covariance = homogeneous_covariance(spectrum)
    z, y, observed, error, domain = data(torch.ones(H, W, dtype=torch.bool))
    s = torch.full((3,), 0.7, dtype=torch.float64)
    misses = []
    for modes in (4, 20, 40, 104):
        few = Waves(spectrum, modes)
        assert len(few.table(z).variances) == min(modes, len(Waves(spectrum, 10**6).table(z).variances))
        mean, variance = few(z, s, 0 * y, torch.zeros_like(observed), error, domain)
        exact, spread, _ = dense(covariance, z[0], 0.7, y[0], torch.zeros_like(observed[0]), error[0])
        torch.testing.assert_close(mean[0], exact, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(variance[0], spread.trace() / D, rtol=1e-9, atol=0.0)
        exact = torch.stack([dense(covariance, z[i], 0.7, y[i], observed[i], error[i])[0] for i in range(3)])
        misses.append((few(z, s, y, observed, error, domain)[0] - exact).square().mean().sqrt().item())
    assert misses[0] > 2 * misses[1] > 4 * misses[2] > 1e6 * misses[3]


def test_what_leaks_from_the_rest_counts_as_an_error_of_dense_observations(monkeypatch):
    """Beside the exact posterior mean in a gap of a smooth field; with the scattered part of the error it is off."""
    n = 24
    k = torch.fft.fftfreq(n, 1 / n)[:, None] ** 2 + torch.fft.fftfreq(n, 1 / n) ** 2
    spectrum = torch.exp(-k.double() / 8) * torch.eye(2, dtype=torch.float64)[:, :, None, None]
    spectrum = spectrum.to(torch.complex128) * n**2 / spectrum[0, 0].sum()
    x0 = torch.randn(8, 2, n, n, dtype=torch.float64, generator=seeded())
    x0 = torch.fft.ifft2(torch.fft.fft2(x0) * spectrum[0, 0].sqrt()).real
    observed = torch.ones(8, 1, n, n, dtype=torch.bool)
    observed[..., 6:14, 6:14] = False
    given = (torch.where(observed, x0, 0.0), observed, torch.full((8, 1, 1, 1), 1e-3, dtype=torch.float64))
    s = torch.full((8,), 1e4, dtype=torch.float64)

    def miss(field):
        mean = field(torch.zeros_like(x0), s, *given, torch.ones_like(observed))[0]
        return (mean - x0)[:, :, 6:14, 6:14].square().mean().sqrt()

    few = Waves(spectrum, 120)
    table = few.table(x0)
    with_leak = miss(few)
    few.tables = {(x0.dtype, x0.device): replace(table, rest=table.rest.clamp(max=1e-12))}
    assert with_leak < 0.7 * miss(few)


def test_waves_stay_where_the_field_has_none():
    """A spectrum without divergence gives means without divergence, whatever the data."""
    ky, kx = torch.fft.fftfreq(H, 1 / H)[:, None].expand(H, W), torch.fft.fftfreq(W, 1 / W).expand(H, W)
    t = torch.stack([-ky, kx]).double()
    t[:, H // 2], t[:, :, W // 2] = 0.0, 0.0  # derivatives of the shortest waves vanish
    spectrum = (t[:, None] * t * torch.exp(-(kx**2 + ky**2) / 8)).to(torch.complex128)
    z, y, observed, error, domain = data(torch.ones(H, W, dtype=torch.bool))
    mean, _ = Waves(spectrum, 12)(z, torch.full((3,), 0.3, dtype=torch.float64), y, observed, error, domain)
    waves = torch.fft.fft2(mean)
    torch.testing.assert_close(waves[:, 0] * kx + waves[:, 1] * ky, 0 * waves[:, 0], rtol=0, atol=1e-9)
    assert mean.std() > 0.1


def test_rounding_does_not_break_a_steep_spectrum(monkeypatch):
    """Eigenvalues over eleven decades, all taken, and exact observations, in the precision of training."""
    monkeypatch.setattr(Waves, "LEFT_OUT", 0.0)
    k = torch.fft.fftfreq(32, 1 / 32)[:, None] ** 2 + torch.fft.fftfreq(32, 1 / 32) ** 2
    spectrum = 1e4 * (1 + k.double()) ** -4 * torch.eye(2, dtype=torch.float64)[:, :, None, None]
    field = Waves(spectrum.to(torch.complex128), 2048)
    observed = torch.rand(4, 1, 32, 32, generator=seeded()) < torch.tensor([0.0, 0.1, 0.9, 1.0]).view(4, 1, 1, 1)
    x0 = torch.fft.fft2(torch.randn(4, 2, 32, 32, generator=seeded(1)), norm="ortho") * spectrum[0, 0].sqrt()
    x0 = torch.fft.ifft2(x0, norm="ortho").real.float()
    for s in (0.1, 10.0):
        z = x0 + s * torch.randn(x0.shape, generator=seeded(2))
        given = (
            z,
            torch.full((4,), s),
            torch.where(observed, x0, 0.0),
            observed,
            torch.zeros(4, 1, 1, 1),
            observed | True,
        )
        mean, variance = field(*given)
        exact, spread = field(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
        off = (mean - exact).square().mean(dim=(1, 2, 3)).sqrt()
        assert (off < 0.1 + 0.5 * spread.sqrt()).all(), (s, off, spread.sqrt())
        assert (variance > 0).all()


def test_modes_of_half_precision_and_no_nugget(tmp_path):
    """Smooth fields mostly observed without error: from a file the mean is off by a part of its error at most."""
    n, generator = 24, seeded(3)
    fields = torch.fft.fft2(torch.randn(64, 2, n, n, dtype=torch.float64, generator=generator))
    k = torch.fft.fftfreq(n, 1 / n)[:, None] ** 2 + torch.fft.fftfreq(n, 1 / n) ** 2
    fields = torch.fft.ifft2(fields * (1 + k.double()) ** -2.0).real
    fields = fields / fields.std()
    covariance = Homogeneous.of(
        fields.numpy(), np.zeros((2, n, n)), np.ones((n, n), dtype=bool), (True, True), nugget=0.0
    )
    modes, variances, nugget = covariance.leading(200, (n, n))
    field = Eigenfields(torch.from_numpy(modes).float(), torch.from_numpy(variances).float(), nugget)
    model = network(field, dtype=torch.float32)
    save_weights(tmp_path / "half.safetensors", {"ema": model.state_dict()}, "float16")
    fresh = GaussianResidual(7, 2, (True, True), **SIZES)
    fresh.load_state_dict(load_weights(tmp_path / "half.safetensors")["ema"])
    x0 = fields[:4].float()
    observed = torch.rand(4, 1, n, n, generator=generator) < torch.tensor([0.1, 0.6, 0.9, 1.0]).view(4, 1, 1, 1)
    z = x0 + 30 * torch.randn(x0.shape, generator=generator)
    given = (torch.where(observed, x0, 0.0), observed, torch.zeros(4, 1, 1, 1), torch.ones_like(observed))
    exact = Eigenfields(torch.from_numpy(modes), torch.from_numpy(variances), nugget)
    exact.nugget = torch.tensor(nugget, dtype=torch.float64)
    fine = (tensor.double() if tensor.is_floating_point() else tensor for tensor in (z, torch.full((4,), 30.0), *given))
    best = exact(*fine)
    for residual in (model, fresh):
        mean, c = residual.posterior(z, torch.full((4,), 30.0), *given)
        off = (mean - best[0]).square().mean(dim=(1, 2, 3)).sqrt()
        assert mean.isfinite().all() and (off < 0.02 + 0.5 * best[1].sqrt()).all(), (off, best[1].sqrt())


# The denoiser.


def network(field, diffusion=None, head=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    channels = 7 if diffusion is None else 7 + 2 * diffusion.coupled
    network = GaussianResidual(channels, 2, (True, True), **SIZES)
    network.learn(lambda: field)
    if head:
        torch.nn.init.normal_(network.network.head[-1].weight, std=head)
    network.network.to(dtype)
    return network


def observation(y, observed, error, domain):
    return Observation(torch.where(observed, y, torch.nan), observed, error, domain)


@pytest.mark.parametrize("prediction", HEADS)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_without_training_every_formulation_has_the_gaussian_posterior(name, prediction, monkeypatch):
    field, covariance, valid = fields(monkeypatch)["eigenfields"]
    diffusion = FORMULATIONS[name](prediction=prediction)
    denoiser = Denoiser(network(field, diffusion), diffusion, NORMALIZER)
    z, *given = data(valid)
    told = observation(*given)
    if diffusion.coupled:
        told = Observation(told.y, told.observed, told.sigma_y, told.valid, background=torch.zeros_like(z))
    levels = torch.tensor([0.05, 1.0, 0.9 * diffusion.sigma_max], dtype=torch.float64)
    got = denoiser(torch.where(given[3], z, torch.nan), levels, told)
    for i, s in enumerate(levels.tolist()):
        exact = dense(covariance, z[i], s, *(tensor[i] for tensor in given[:3]))[0]
        torch.testing.assert_close(got[i], exact, rtol=1e-9, atol=1e-9)


def test_without_training_a_network_of_few_steps_draws_from_the_gaussian_posterior(monkeypatch):
    """In one evaluation: the law of what comes of a basis of all noise, against the dense posterior."""
    field, covariance, valid = fields(monkeypatch)["waves"]
    monkeypatch.setattr(Modes, "NODES", 40)
    monkeypatch.setattr(Waves, "PROBES", 1)
    _, y, observed, error, domain = (part[:1].expand(D, -1, -1, -1) for part in data(valid))
    told, basis = observation(y, observed, error, domain), torch.eye(D, dtype=torch.float64).view(D, 2, H, W)
    exact, spread, _ = dense(covariance, torch.zeros(2, H, W), 1e8, y[0], observed[0], error[0])
    for diffusion in (Consistency(EDM(sigma_max=1e4)), CRPS()):
        denoiser = Denoiser(network(field), diffusion, NORMALIZER)
        mean, _ = diffusion.generate(denoiser, told, torch.zeros_like(basis))
        torch.testing.assert_close(mean[0], exact, rtol=0, atol=1e-3)  # but for what z = 0 tells
        maps = (diffusion.generate(denoiser, told, basis)[0] - mean).flatten(1)
        torch.testing.assert_close(maps.T @ maps, spread, rtol=0, atol=1e-3 * float(spread.diagonal().max()))


def test_the_network_is_shown_numbers_of_unit_size_and_its_output_counts_in_c(monkeypatch):
    field, _, valid = fields(monkeypatch)["eigenfields"]
    model = network(field)
    z, *given = data(valid)
    s = torch.tensor(LEVELS, dtype=torch.float64)
    mean, c = model.posterior(z, s, *given)
    seen = {}

    def forward(x, noise):
        seen["x"], seen["noise"] = x, noise
        return torch.ones_like(x[:, :2])

    monkeypatch.setattr(model, "forward", forward)
    told = observation(*given)
    got = Denoiser(model, EDM(), NORMALIZER)(z, s, told)
    scale = c.view(-1, 1, 1, 1)
    torch.testing.assert_close(got, torch.where(given[3], mean + scale, 0.0))
    y, observed = given[:2]
    for part, expected in zip(
        seen["x"].split([2, 5, 2, 2], dim=1),
        ((z - mean) / s.view(-1, 1, 1, 1), told.channels(), mean, torch.where(observed, (y - mean) / scale, 0.0)),
        strict=True,
    ):
        torch.testing.assert_close(part, expected)
    torch.testing.assert_close(seen["noise"], s.log() / 4)


def test_the_loss_of_a_gaussian_field_is_one_before_training(monkeypatch):
    """At every level, observed or not: the output is measured in the deviation of what is left."""
    field, covariance, valid = fields(monkeypatch)["waves"]
    denoiser, n = Denoiser(network(field), EDM(), NORMALIZER), 400
    values, vectors = torch.linalg.eigh(covariance)
    white = torch.randn(n, D, dtype=torch.float64, generator=seeded(3))
    x0 = (white * values.clamp(min=0).sqrt() @ vectors.T).view(n, 2, H, W)
    monkeypatch.setattr(Modes, "PROBES", 500)
    _, _, observed, _, domain = (tensor.expand(n, -1, -1, -1) for tensor in data(valid, 1))
    observed = observed & (torch.arange(n) % 2 == 0).view(n, 1, 1, 1)
    error = torch.full((n, 1, 1, 1), 0.2, dtype=torch.float64)
    y = x0 + 0.2 * torch.randn(x0.shape, dtype=torch.float64, generator=seeded(4))
    for s in LEVELS:
        t = torch.full((n,), s, dtype=torch.float64)
        noise = torch.randn(x0.shape, dtype=torch.float64, generator=seeded(5))
        loss = denoising_loss(denoiser, x0, domain, Observation(y, observed, error, domain), t, noise)
        for half in (loss[::2], loss[1::2]):
            assert abs(half.mean() - 1) < 4 * half.std() / len(half) ** 0.5 + 0.01


def test_the_posterior_has_derivatives(monkeypatch):
    """The Jacobian by z is the gain of the joint system: what mmps, pigdm and likelihoods ask for."""
    for kind in ("waves", "eigenfields"):
        field, covariance, valid = fields(monkeypatch)[kind]
        denoiser = Denoiser(network(field), EDM(), NORMALIZER)
        z, *given = data(valid, 1)
        s = torch.ones(1, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda z, d=denoiser, g=given, s=s: d(z, s, observation(*g)), z)
        gain = dense(covariance, z[0], 1.0, *(tensor[0] for tensor in given[:3]))[2]
        torch.testing.assert_close(jacobian.reshape(D, D), gain, rtol=1e-9, atol=1e-9)


def test_mmps_on_the_prior_is_the_posterior(monkeypatch):
    """Told nothing, with the observations as rows."""
    field, covariance, valid = fields(monkeypatch)["waves"]
    denoiser = Denoiser(network(field), EDM(), NORMALIZER)
    z, y, observed, _, domain = data(valid)
    error = torch.full((3, 1, 1, 1), 0.3, dtype=torch.float64)
    s = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    got = MMPS(k_max=200, tolerance=1e-12).bind(denoiser, Observation(y, observed, error, domain))(z, s)
    for i in range(3):
        exact = dense(covariance, z[i], s[i].item(), y[i], observed[i], error[i])[0]
        torch.testing.assert_close(got[i], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["waves", "eigenfields"])
def test_the_field_is_kept_with_the_weights(kind, tmp_path, monkeypatch):
    """Also in a file of half precision: what has no divergence has none afterwards."""
    field, _, valid = fields(monkeypatch)[kind]
    model = network(field, head=0.1, dtype=torch.float32)
    save_weights(tmp_path / "half.safetensors", {"ema": model.state_dict()}, "float16")
    z, *given = (tensor.float() if tensor.is_floating_point() else tensor for tensor in data(valid))
    for state, tolerance in ((model.state_dict(), 0.0), (load_weights(tmp_path / "half.safetensors")["ema"], 5e-3)):
        fresh = GaussianResidual(7, 2, (True, True), **SIZES)
        fresh.load_state_dict(state)
        for ours, theirs in zip(
            model.posterior(z, torch.ones(3), *given), fresh.posterior(z, torch.ones(3), *given), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if kind == "waves":
        assert torch.equal(fresh.field.power, model.field.power)


def test_without_a_field_there_is_no_posterior():
    z, *given = data(LAND)
    with pytest.raises(ValueError, match="field must be learnt"):
        GaussianResidual(7, 2, **SIZES).posterior(z, torch.ones(3), *given)


# The programs.

MODEL = ["model=gaussian", "model.blocks=1", *SMALL]


def test_a_network_beyond_the_gaussian_trains_resumes_and_fills(place: Path, run: Call) -> None:
    given = [*TINY, *MODEL, "trainer.warmup=0", "trainer.checkpoint_minutes=1000"]
    for name, steps in (("part", 2), ("part", 4), ("gaussian", 4)):
        assert run("train", *given, f"name={name}", f"trainer.max_steps={steps}")[::2] == (0, "")
    cpu = torch.device("cpu")
    part, whole = (load_trained(f"outputs/train/{name}", cpu).denoiser for name in ("part", "gaussian"))
    assert isinstance(whole.network.field, Waves)
    assert all(
        torch.equal(value, part.network.state_dict()[name]) for name, value in whole.network.state_dict().items()
    )
    for inpainting in ("conditional", "mmps"):
        assert run("infer", "ckpt=outputs/train/gaussian", f"inpainting={inpainting}", "name=f", *FEW)[::2] == (0, "")
        with xr.open_dataset(place / "outputs" / "infer" / "f" / "fields.nc") as data:
            assert np.isfinite(data["u_members"].values).all()
    assert run("evaluate", "ckpt=outputs/train/gaussian", "masks=[block]", "cases=2", *FEW)[::2] == (0, "")


@pytest.mark.parametrize("overrides", ["window=[12,8]", "diffusion=iddpm diffusion.learned_variance=true"])
def test_it_goes_with_windows_and_learned_variances(place: Path, run: Call, overrides: str) -> None:
    given = [*TINY, *MODEL, *overrides.split(), "name=with", "trainer.max_steps=2", "trainer.validate_every=2"]
    shutil.rmtree("outputs/train/with", ignore_errors=True)
    assert run("train", *given)[::2] == (0, "")
    field = load_trained("outputs/train/with", torch.device("cpu")).denoiser.network.field
    assert isinstance(field, Eigenfields if "window" in overrides else Waves)
    assert run("infer", "ckpt=outputs/train/with", "inpainting=conditional", *FEW)[::2] == (0, "")


def test_it_does_not_go_with_a_regression(place: Path, run: Call) -> None:
    is_message(run("train", *TINY, *MODEL, "diffusion=regression", "name=r"), "diffusion=regression", "model=gaussian")
