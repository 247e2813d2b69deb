"""Coarse to fine: what the coarse network learns, in closed form, and that nothing else of the program changes."""

from __future__ import annotations

import pytest
import torch
from ideal import FORMULATIONS, NORMALIZER, PRIOR, IdealNetwork
from programs import FEW, TINY, Call, is_message

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM, IDDPM
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.inference.export import save_program
from vecfield_diffusion.models.cascade import Cascade, averaged
from vecfield_diffusion.models.energy import pool
from vecfield_diffusion.physics.grid import Grid

SIZES = {"coarse": [8, 8], "channels": [8], "blocks": 1, "attention": [], "embedding": 16}
H, W = PRIOR.shape[1:]


class Linear(torch.nn.Module):
    """A matrix on the averaged field, in the place of the coarse network."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, x, noise):
        return (x[:, :2].flatten(1) @ self.matrix.T).view(len(x), 2, *x.shape[2:])


class Function(torch.nn.Module):
    """A function, in the place of a network."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def averages():
    """P, `(d / 4, d)`."""
    return torch.stack([pool(e.view(1, 2, H, W), 2).flatten() for e in torch.eye(2 * H * W).double()], dim=1)


def expected_terms(cascade, diffusion, s):
    """The expected loss over x0 ~ N(0, S) and noise at level s, with the coarse term and without, of linear networks.

    The loss is a quadratic form: its expectation is the sum over the basis S^(1/2) e_i and the unit noise.
    """
    size = 2 * H * W
    x0 = torch.cat([PRIOR.vectors * PRIOR.eigenvalues.sqrt(), torch.zeros(size, size).double()], dim=1).T
    noise = torch.cat([torch.zeros(size, size), torch.eye(size)]).double()
    x0, noise = (values.reshape(-1, 2, H, W) for values in (x0, noise))
    valid = torch.ones(H, W, dtype=torch.bool)
    given = Observation.none(2 * size, valid, torch.float64)
    t = diffusion.time(torch.full((2 * size,), s, dtype=torch.float64))
    denoiser = Denoiser(cascade, diffusion, NORMALIZER)
    losses = [denoising_loss(denoiser, x0, given.valid, given, t, noise, training=way).sum() for way in (True, False)]
    return losses, (diffusion.weight(t[:1])).item()


@pytest.mark.parametrize("s", [0.3, 2.0])
@pytest.mark.parametrize("name", ["edm", "flow", "vp"])
def test_the_coarse_term_is_least_at_the_denoiser_of_the_averaged_field(name, s):
    """E[P x0 | P z] of a Gaussian field with noise of level s / 2; the fine network ignores it and is exact as ever."""
    diffusion = FORMULATIONS[name]()
    cascade = Cascade(7, cells=2, **SIZES).double()
    P = averages()
    covariance = P @ PRIOR.vectors @ torch.diag(PRIOR.eigenvalues) @ PRIOR.vectors.T @ P.T
    unit = torch.eye(len(P), dtype=torch.float64)
    gain = covariance @ torch.linalg.inv(covariance + s**2 / 4 * unit)
    c_in, _, c_out, c_skip = Denoiser(cascade, diffusion, NORMALIZER)._scalars(
        torch.tensor([s], dtype=torch.float64), torch.float64
    )
    cascade.coarse = Linear((gain - c_skip * unit) / (c_out * c_in))
    ideal = IdealNetwork(diffusion)
    cascade.fine = Function(lambda x, noise: ideal(x[:, :7], noise))
    (whole, fine), weight = expected_terms(cascade, diffusion, s)
    exact = torch.trace(covariance - gain @ covariance) / len(P)
    assert (whole - fine).item() == pytest.approx(weight * exact.item(), rel=1e-6)
    (slope,) = torch.autograd.grad(whole - fine, cascade.coarse.matrix)
    assert slope.abs().max() < 1e-8 * weight
    trace = PRIOR.eigenvalues - PRIOR.eigenvalues**2 / (PRIOR.eigenvalues + s**2)
    assert fine.item() == pytest.approx(weight * trace.mean().item(), rel=1e-6)


def test_the_fine_network_sees_the_estimate_of_the_coarse_one_at_every_cell():
    torch.manual_seed(0)
    cascade = Cascade(7, cells=3, **SIZES)
    seen = {}
    cascade.coarse = Function(lambda x, noise: x[:, 3:5] + 1)
    cascade.fine = Function(lambda x, noise: seen.setdefault("x", x)[:, :2])
    x = torch.randn(2, 7, 7, 8)
    out = cascade(x, torch.zeros(2))
    assert out.shape == (2, 4, 7, 8) and torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(seen["x"][:, :7], x) and torch.equal(seen["x"][:, 7:], out[:, 2:])
    for square in ((slice(3, 6), slice(3, 6)), (slice(6, 7), slice(6, 8))):
        means = x[:, 3:5, *square].mean((2, 3), keepdim=True)
        torch.testing.assert_close(out[:, 2:, *square], (means + 1).expand_as(out[:, 2:, *square]))


def test_averaging_twice_is_averaging_once():
    x = torch.randn(2, 3, 2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(averaged(averaged(x, 3), 3), averaged(x, 3))


@pytest.mark.parametrize("learned", [2, 4])
def test_both_networks_learn(learned):
    """The fine one by the denoising loss, the coarse one by its own error, also beside a learned variance."""
    torch.manual_seed(0)
    diffusion = IDDPM() if learned == 4 else EDM()
    cascade = Cascade(7, learned, cells=2, **SIZES)
    x0, noise = torch.randn(2, 3, 2, 6, 8)
    given = Observation.none(3, torch.ones(6, 8, dtype=torch.bool))
    t = diffusion.sample_times(3, torch.Generator().manual_seed(0))
    denoiser = Denoiser(cascade, diffusion, NORMALIZER)
    denoising_loss(denoiser, x0, given.valid, given, t, noise, training=True).sum().backward()
    for network in (cascade.coarse, cascade.fine):
        assert network.head[-1].weight.grad.abs().sum() > 0


def test_sizes_that_there_are_not():
    with pytest.raises(ValueError, match="cells must be in"):
        Cascade(7, cells=1)


def test_it_is_exported_as_a_program(tmp_path):
    """Which compares what it gives with the denoiser, for more than one size of batch."""
    denoiser = Denoiser(Cascade(7, cells=2, **SIZES), EDM(), NORMALIZER).eval().requires_grad_(False)
    save_program(tmp_path / "cascade.pt2", denoiser, Grid(torch.ones(H, W, dtype=torch.bool), 1.0, 1.0))
    assert (tmp_path / "cascade.pt2").stat().st_size > 0


# The program.

SMALL = ["model=cascade", "model.coarse=[8,8]", "model.channels=[8,8]", "model.embedding=16", "trainer.score_cases=0"]


@pytest.mark.parametrize("options", [[], ["dataset.frames=2", "dataset.trajectory=4"]], ids=["snapshots", "sequences"])
def test_it_trains_and_fills_as_any_network(run: Call, options: list[str], request: pytest.FixtureRequest) -> None:
    name = f"name={request.node.callspec.id}"
    few = ["trainer.max_steps=2", "trainer.validate_every=2"]
    assert run("train", *TINY, *SMALL, *options, *few, name)[::2] == (0, "")
    for inpainting in ("conditional", "mmps"):
        filled = run("infer", f"ckpt=outputs/train/{name[5:]}", *FEW, f"inpainting={inpainting}", "name=filled")
        assert filled[::2] == (0, "")


def test_squares_of_one_cell_are_refused_in_one_line(run: Call) -> None:
    is_message(run("train", *TINY, *SMALL, "model.cells=1", "name=odd"), "model.cells", "must be in [2, 64]")
