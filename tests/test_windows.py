"""Windows over fields larger than those of the network."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise, product

import pytest
import torch
from ideal import NORMALIZER
from oracle import gaussian_law
from torch import Tensor, nn

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import DDPM, EDM, IDDPM, Interpolant
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.cfg import AutoGuidance, ClassifierFree, Energy, NoGuidance
from vecfield_diffusion.guidance.inpainting import Conditional, RePaint
from vecfield_diffusion.guidance.physics import NoPhysics, Physics
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.inference.ensemble import sample_ensemble
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.windows import Windowed, starts
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.samplers.base import BoundDenoiser
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler
from vecfield_diffusion.samplers.stochastic import Ancestral

SIDES = [(False, False), (True, True), (False, True)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everywhere(n: int, height: int, width: int) -> Observation:
    """Nothing observed, no land."""
    return Observation.none(n, torch.ones(height, width, dtype=torch.bool), torch.float64)


def one(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


class Spy:
    """Any denoiser, here one whose cells depend on their place in the window; keeps what it was given."""

    def __init__(self, function=None):
        self.function, self.calls = function or self.placed, []

    def __call__(self, z, s, observation):
        self.calls.append((z, s, observation))
        return self.function(z, s, observation)

    @staticmethod
    def placed(z, s, observation):
        """Nonlinear, by sample, different in every cell of a window, told all that is observed."""
        place = torch.arange(z[0, 0].numel(), dtype=z.dtype).view(z.shape[-2:]).cos()
        y = torch.where(observation.observed, observation.y, 0.0)
        away = z.roll((1, 2), dims=(2, 3))
        return torch.tanh(place * z + 0.3 * away) * s[:, None, None, None] + place * y + observation.sigma_y


# Geometry.


@pytest.mark.parametrize("periodic", SIDES)
@pytest.mark.parametrize("overlap", [0, 1, 3, 7, 0.25, 0.7])
@pytest.mark.parametrize("shape", [(8, 11), (9, 12), (17, 23), (31, 40), (5, 23), (5, 7)])
def test_weights_add_up_to_one(shape, overlap, periodic):
    z = draw(3, 2, *shape)
    identity = Windowed(lambda z, s, observation: z, (8, 11), overlap, periodic, batch=7)
    torch.testing.assert_close(identity(z, one(3), everywhere(3, *shape)), z, atol=2e-15, rtol=1e-15)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("length", [20, 21, 33, 64, 97])
@pytest.mark.parametrize("overlap", [0, 5, 15])
def test_windows_overlap_as_asked_and_lie_evenly(length, overlap, periodic):
    first = starts(length, 20, overlap, periodic)
    steps = [b - a for a, b in pairwise([*first, first[0] + length] if periodic and len(first) > 1 else first)]
    assert first[0] == 0 and max(steps, default=0) <= 20 - overlap
    assert max(steps, default=0) - min(steps, default=0) <= 1
    if not periodic:
        assert first[-1] + 20 == length
    span = length if periodic else length - 20
    assert length == 20 or len(steps) == -(-span // (20 - overlap))  # no more windows than needed


def test_long_overlaps_of_large_windows_are_finite():
    """The taper over a thousand cells: its ends would be exp(-2000)."""
    z = draw(1, 2, 1, 3000)
    windowed = Windowed(lambda z, s, observation: z, (1, 1200), 0.9)
    torch.testing.assert_close(windowed(z, one(1), everywhere(1, 1, 3000)), z, atol=1e-14, rtol=0)


@pytest.mark.parametrize("periodic", SIDES)
def test_a_field_of_the_size_of_a_window_is_left_to_the_denoiser(periodic):
    z, seen = draw(3, 2, 8, 11), observed(3, 8, 11)
    expected = torch.where(seen.valid, Spy.placed(z, one(3), seen), 0.0)
    assert torch.equal(Windowed(Spy(), (8, 11), 3, periodic)(z, one(3), seen), expected)


def observed(n: int, height: int, width: int) -> Observation:
    """Some cells, two errors, a coast; NaN where nothing was measured."""
    seen = draw(n, 1, height, width, seed=1) > 0.5
    valid = torch.ones(n, 1, height, width, dtype=torch.bool)
    valid[..., :2, :3] = False
    y = torch.where(seen, draw(n, 2, height, width, seed=2), torch.nan)
    return Observation(y, seen & valid, 0.1 + draw(n, 1, 1, 1, seed=3).abs(), valid)


def test_a_smaller_field_is_filled_up_with_land():
    spy, z, seen = Spy(), draw(2, 2, 5, 14), observed(2, 5, 14)
    out = Windowed(spy, (8, 11), 3)(z, one(2), seen)
    assert out.shape == z.shape
    for given, _, told in spy.calls:
        assert given.shape[-2:] == told.valid.shape[-2:] == told.y.shape[-2:] == (8, 11)
        assert not told.valid[..., 5:, :].any() and not told.observed[..., 5:, :].any()
        assert told.valid[..., 2:5, :].all() and (given[..., 5:, :] == 0).all()
    identity = Windowed(lambda z, s, observation: z, (8, 11), 3)
    torch.testing.assert_close(identity(z, one(2), seen), torch.where(seen.valid, z, 0.0))


def test_a_roll_by_one_stride_rolls_the_result():
    """Across the seam as anywhere: 24 rows in 4 windows 6 apart, 20 columns in 4 windows 5 apart."""
    z, seen = draw(2, 2, 24, 20), observed(2, 24, 20)
    windowed = Windowed(Spy(), (8, 7), 2, (True, True))
    out = windowed(z, one(2), seen)
    assert len(windowed.denoiser.calls) == 1 and len(windowed.denoiser.calls[0][0]) == 2 * 4 * 4

    def difference(down: int, across: int) -> Tensor:
        def move(tensor: Tensor) -> Tensor:
            return tensor.roll((down, across), dims=(2, 3)) if tensor.shape[-1] > 1 else tensor

        return (windowed(move(z), one(2), seen.apply(move)) - move(out)).abs().max()

    assert difference(6, -5) < 1e-14 and difference(12, 10) < 1e-14
    assert difference(5, -5) > 0.1 and difference(6, -4) > 0.1


# What windows are told.


def test_windows_hold_what_the_field_holds():
    """Cut by hand, window by window; numbers for a whole sample stay what they are, None stays None."""
    spy, z = Spy(), draw(2, 2, 12, 11)
    seen = observed(2, 12, 11)
    absent = [field.name for field in fields(seen) if getattr(seen, field.name) is None]
    full = replace(seen, **{name: draw(2, 3, 12, 11, seed=4 + i) for i, name in enumerate(absent)})
    s = torch.tensor([0.5, 2.0], dtype=torch.float64)
    Windowed(spy, (8, 11), 4, batch=1)(z, s, full)
    assert len(spy.calls) == 4
    for call, (sample, top) in zip(spy.calls, [(0, 0), (1, 0), (0, 4), (1, 4)], strict=True):
        given, level, told = call
        rows = slice(top, top + 8)
        assert torch.equal(given[0], z[sample, :, rows]) and level.item() == s[sample]
        for name in ("y", "observed", "valid", *absent):
            expected = getattr(full, name)[sample : sample + 1, :, rows]
            torch.testing.assert_close(getattr(told, name), expected, equal_nan=True, atol=0, rtol=0)
        assert torch.equal(told.sigma_y, seen.sigma_y[sample : sample + 1])
    spy.calls.clear()
    Windowed(spy, (8, 11), 4)(z, s, seen)
    assert absent and all(getattr(spy.calls[0][2], name) is None for name in absent)


def test_one_observation_may_serve_all_samples():
    z, seen = draw(3, 2, 12, 14), observed(1, 12, 14)
    windowed = Windowed(Spy(), (8, 11), 4)
    each = torch.cat([windowed(z[i : i + 1], one(1), seen) for i in range(3)])
    torch.testing.assert_close(windowed(z, one(3), seen), each, atol=1e-15, rtol=1e-14)


def test_another_observation_is_cut_anew():
    """The last one is kept for all steps of a sampler; others, also for more samples, are what they are alone."""
    z, cases = draw(3, 2, 17, 23), [observed(3, 17, 23), everywhere(3, 17, 23), observed(1, 17, 23)]
    windowed, smaller = (Windowed(Spy(), size, 3) for size in ((8, 11), (20, 11)))
    for seen in [cases[k] for k in (0, 1, 0, 0, 2)]:
        for kept in (windowed, smaller):
            for n in (3, 1) if len(seen) == 1 else (3,):
                fresh = Windowed(Spy(), kept.size, 3)
                assert torch.equal(kept(z[:n], one(n), seen), fresh(z[:n], one(n), seen))


def test_nothing_depends_on_the_batch():
    z, seen = draw(3, 2, 19, 26), observed(3, 19, 26)
    whole = Windowed(Spy(), (8, 11), 5, (False, True), batch=1000)(z, one(3), seen)
    for batch in (1, 2, 7, 64):
        spy = Spy()
        assert torch.equal(Windowed(spy, (8, 11), 5, (False, True), batch=batch)(z, one(3), seen), whole)
        assert max(len(given) for given, _, _ in spy.calls) == batch or len(spy.calls) == 1


def test_samples_of_a_window_follow_one_another():
    """Members of one observation are told the same in a window, which a Gaussian part solves for once."""
    spy, z = Spy(), draw(3, 2, 12, 14)
    Windowed(spy, (8, 11), 4, batch=3)(z, one(3), observed(1, 12, 14))
    starts_of = [(row, column) for row in (0, 4) for column in (0, 3)]
    for (given, _, told), (row, column) in zip(spy.calls, starts_of, strict=True):
        assert torch.equal(given, z[..., row : row + 8, column : column + 11])
        assert torch.equal(told.valid, told.valid[:1].expand_as(told.valid))


def test_windows_of_land_are_not_computed():
    """Land in one sample and not in the other; the result is that of computing them all."""
    z, seen = draw(2, 2, 32, 24), everywhere(2, 32, 24)
    valid = seen.valid.clone()
    valid[0, :, :16] = False
    spy = Spy()
    out = Windowed(spy, (8, 8), 0)(z, one(2), replace(seen, valid=valid))
    assert sum(len(given) for given, _, _ in spy.calls) == 6 + 12
    expected = torch.where(valid, Windowed(Spy(), (8, 8), 0)(z, one(2), seen), 0.0)
    assert torch.equal(out, expected)
    nowhere = Windowed(Spy(), (8, 8), 0)(z, one(2), replace(seen, valid=torch.zeros_like(valid)))
    assert torch.equal(nowhere, torch.zeros_like(z))


def test_what_land_holds_does_not_matter():
    seen = observed(2, 19, 26)
    z = draw(2, 2, 19, 26)
    torch.manual_seed(0)
    windowed = Windowed(denoiser(UNet(7, channels=[8], blocks=1, attention=[], embedding=8)), (8, 11), 5)
    dirty = torch.where(seen.valid, z, torch.nan)
    with torch.no_grad():
        z, dirty, seen = z.float(), dirty.float(), seen.apply(lambda t: t.float() if t.is_floating_point() else t)
        assert torch.equal(windowed(dirty, one(2), seen), windowed(z, one(2), seen))


@pytest.mark.parametrize(("periodic", "batch"), [((False, False), 100), ((False, True), 3)])
def test_derivatives(periodic, batch):
    """First and second, in z, against finite differences; of one batch of windows, and of several."""
    z, seen, s = draw(2, 2, 4, 5).requires_grad_(), observed(2, 4, 5), one(2) * 0.7
    windowed = Windowed(Spy(), (3, 3), 1, periodic, batch=batch)
    assert torch.autograd.gradcheck(lambda z: windowed(z, s, seen), z)
    assert torch.autograd.gradgradcheck(lambda z: windowed(z, s, seen)[:, :1, 2:], z)


def test_derivatives_hold_one_batch_in_memory():
    """More than one batch of windows are computed again, a batch at a time."""
    for batch, calls in ((8, 1), (1, 2)):
        spy = Spy(lambda z, s, observation: z.sin().cos())
        z = draw(1, 2, 16, 8).requires_grad_()
        x_hat = Windowed(spy, (8, 8), 0, batch=batch)(z, one(1), everywhere(1, 16, 8))
        (gradient,) = torch.autograd.grad(x_hat.sum(), z)
        assert sum(len(given) for given, _, _ in spy.calls) == 2 * calls
        torch.testing.assert_close(gradient, -z.sin().sin() * z.cos())


# Exact posterior means.


def covariance(n: int, length: float) -> Tensor:
    """Of a field along a line with exponential correlation."""
    place = torch.arange(n, dtype=torch.float64)
    return torch.exp(-(place[:, None] - place).abs() / length)


def exact(n: int, length: float):
    """The posterior mean of lines `(B, 2, 1, n)`, given these n cells alone: what a network of this size can know."""
    eigenvalues, vectors = torch.linalg.eigh(covariance(n, length))

    def denoise(z: Tensor, s: Tensor, observation: Observation | None = None) -> Tensor:
        return (z @ vectors * (eigenvalues / (eigenvalues + s[:, None, None, None] ** 2))) @ vectors.T

    return denoise


def error(n: int, size: int, overlap: int, length: float, s: float) -> float:
    """The root mean square difference of windowed and exact posterior mean over all fields: no Monte Carlo."""
    unit, level = torch.eye(n, dtype=torch.float64)[:, None, None].expand(n, 2, 1, n), s * one(n)
    windowed = Windowed(exact(size, length), (1, size), (overlap + 0.5) / size, batch=10_000)
    maps = (windowed(unit, level, everywhere(n, 1, n)) - exact(n, length)(unit, level))[:, 0, 0]
    return (maps.T @ (covariance(n, length) + s**2 * torch.eye(n)) @ maps).diagonal().mean().sqrt().item()


def test_the_error_falls_quickly_with_the_overlap():
    for s in (0.3, 1.0, 3.0, 10.0):
        errors = [error(48 + 3 * (48 - overlap), 48, overlap, 2.0, s) for overlap in (0, 8, 16, 24)]
        assert errors[2] < 1e-3 and errors[3] < 3e-4
        assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 4 and errors[3] < errors[2] / 2.5


def seam_index(denoise: BoundDenoiser, n: int, seams: list[range]) -> float:
    """RMS jump of samples from a cell to the next: the largest in the `seams` over that of the others.

    Of the exact law of the samples: the covariance that DPM-Solver++(2M) gives them, by one run on all unit vectors.
    """
    _, law = gaussian_law(DPMpp2M(24), denoise, karras(0.002, 80.0, 24), (1, 1, n))
    jump = law.diagonal()[1:] + law.diagonal()[:-1] - 2 * law.diagonal(1)
    near = torch.zeros(n - 1, dtype=torch.bool)
    for seam in seams:
        near[list(seam)] = True
    return (jump[near].max() / jump[~near].mean()).sqrt().item()


@pytest.mark.parametrize(("overlap", "n"), [(8, 80), (16, 80), (0, 96)])
def test_samples_have_no_seams(overlap, n):
    """From where a window begins to where the one before ends, jumps are those of the interior; without overlap not."""
    windowed = Windowed(exact(32, 4.0), (1, 32), (overlap + 0.5) / 32, batch=10_000)
    seams = [range(begin - 1, end + 32) for end, begin in pairwise(starts(n, 32, overlap, False))]
    index = seam_index(lambda z, s: windowed(z, s, everywhere(len(z), 1, n))[:, :1], n, seams)
    assert (index > 1.5) if overlap == 0 else (abs(index - 1) < 0.01)


# In the place of a denoiser.


class Cellwise(nn.Module):
    """A network that works cell by cell: windows change nothing."""

    def __init__(self, out_channels: int = 2) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        out = torch.tanh(x[:, :2]) * x[:, 4:5] + 0.1 * noise[:, None, None, None] + x[:, 5:7].sum(1, keepdim=True)
        return out if self.out_channels == 2 else torch.cat([out, x[:, :2].cos()], dim=1)


def denoiser(network: nn.Module | None = None, diffusion: nn.Module | None = None) -> Denoiser:
    return Denoiser(network or Cellwise(), diffusion or EDM(sigma_max=20.0), NORMALIZER, torch.bfloat16).eval()


def weaker() -> AutoGuidance:
    return AutoGuidance("", 1.5).loaded(Windowed(denoiser(), (8, 8), 2))


@pytest.mark.parametrize(
    ("diffusion", "parts"),
    [
        (EDM(sigma_max=20.0), {}),
        (DDPM(), {"inpainting": RePaint(2), "sampler": Ancestral(4)}),
        (EDM(sigma_max=20.0), {"inpainting": MMPS(k_max=2)}),
        (EDM(sigma_max=20.0), {"guidance": ClassifierFree(1.5), "physics": Physics("gradient", 0.5)}),
        (EDM(sigma_max=20.0), {"guidance": Energy(lambda u: u.square().sum((1, 2, 3))), "inpainting": MMPS(k_max=2)}),
        (EDM(sigma_max=20.0), {"guidance": weaker()}),
        (Interpolant(), {}),
        (IDDPM(learned_variance=True), {"sampler": Ancestral(4, variance="learned")}),
    ],
    ids=["conditional", "repaint", "mmps", "cfg", "energy", "autoguidance", "interpolant", "learned variance"],
)
def test_it_serves_as_a_denoiser(diffusion, parts):
    """Ensembles of a network that works cell by cell are the same with windows as without, by every method."""
    parts = {"sampler": Euler(4), "inpainting": Conditional(), "physics": NoPhysics(), "guidance": NoGuidance()} | parts
    network = denoiser(Cellwise(4 if diffusion.learned_variance else 2), diffusion)
    seen = observed(2, 13, 18).apply(lambda t: t.float() if t.is_floating_point() else t)
    seen = replace(seen, valid=seen.valid[:1].expand(2, -1, -1, -1), y=torch.where(seen.observed, seen.y, 0.0))
    ends = [
        sample_ensemble(
            each,
            Method(**parts),
            seen,
            Grid(seen.valid[0, 0], boundary_x="periodic"),
            members=2,
            seed=3,
        )
        for each in (network, Windowed(network, (8, 8), 3, (False, True), batch=5))
    ]
    assert torch.equal(ends[0].isfinite(), ends[1].isfinite()) and (ends[0][0] - ends[0][1]).nan_to_num().std() > 0.1
    scale = ends[0].nan_to_num().abs().max().item()
    torch.testing.assert_close(*ends, atol=1e-4 * scale, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("learned", [False, True])
def test_moments_are_blended_alike(learned):
    network = denoiser(Cellwise(4 if learned else 2), IDDPM(learned_variance=learned))
    z, s = draw(2, 2, 13, 18), torch.tensor([0.4, 3.0], dtype=torch.float64)
    seen = observed(2, 13, 18)
    mean, fraction = network.moments(z, s, seen)
    blended = Windowed(network, (8, 8), 3, (False, True)).moments(z, s, seen)
    torch.testing.assert_close(blended[0], mean)
    if learned:
        torch.testing.assert_close(blended[1], torch.where(seen.valid, fraction, 0.0))
    else:
        assert blended[1] is fraction is None


def test_in_float32_is_the_same_without_autocast():
    windowed = Windowed(denoiser(), (8, 8), 3, (False, True), batch=5)
    plain = windowed.in_float32()
    assert windowed.autocast is torch.bfloat16 and plain.autocast is None
    mine, its = ({k: v for k, v in vars(each).items() if k != "denoiser"} for each in (windowed, plain))
    assert mine == its and plain.denoiser.network is windowed.denoiser.network
    assert windowed.diffusion is windowed.denoiser.diffusion and windowed.normalizer is NORMALIZER


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (0, 8)}, "size must be >= 1"),
        ({"overlap": 8}, "overlap must be >= 0 and less"),
        ({"overlap": 1.0}, "overlap must be >= 0 and less"),
        ({"overlap": -1}, "overlap must be >= 0"),
        ({"batch": 0}, "batch must be >= 1"),
    ],
)
def test_what_makes_no_windows_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Windowed(**({"denoiser": Spy(), "size": (8, 8)} | change))


# In time.


def nothing_seen(n: int, frames: int, height: int, width: int) -> Observation:
    """Nothing observed of sequences, no land."""
    snapshots = everywhere(n, height, width)
    return snapshots.apply(lambda tensor: tensor[:, None].expand(-1, frames, *tensor.shape[1:]))


def sequences_seen(n: int, frames: int, height: int, width: int) -> Observation:
    """Some cells of sequences, an error for each sample, a coast, a missing frame."""
    seen = draw(n, frames, 1, height, width, seed=1) > 0.5
    seen[:, 2] = False
    valid = torch.ones(n, frames, 1, height, width, dtype=torch.bool)
    valid[..., :2, :3] = False
    y = torch.where(seen, draw(n, frames, 2, height, width, seed=2), torch.nan)
    return Observation(y, seen & valid, 0.1 + draw(n, 1, 1, 1, 1, seed=3).abs(), valid)


def placed_in_time(z: Tensor, s: Tensor, observation: Observation) -> Tensor:
    """Nonlinear, different in every cell and frame of a window, told all that is observed."""
    place = torch.arange(z[0, :, 0].numel(), dtype=z.dtype).view(z.shape[1], 1, *z.shape[-2:]).cos()
    y = torch.where(observation.observed, observation.y, 0.0)
    away = z.roll((1, 1, 2), dims=(1, 3, 4))
    return torch.tanh(place * z + 0.3 * away) * s.view(-1, 1, 1, 1, 1) + place * y + observation.sigma_y


@pytest.mark.parametrize("overlap", [0, 2, 0.5, (3, 1, 0.25)])
@pytest.mark.parametrize("frames", [1, 4, 5, 11])
def test_weights_of_windows_in_time_add_up_to_one(frames, overlap):
    z = draw(2, frames, 2, 7, 9)
    identity = Windowed(lambda z, s, observation: z, (4, 5, 6), overlap, (False, True), batch=7)
    torch.testing.assert_close(identity(z, one(2), nothing_seen(2, frames, 7, 9)), z, atol=2e-15, rtol=1e-15)


def test_windows_in_time_hold_what_the_frames_hold():
    """Cut by hand; a missing frame stays missing, and numbers for a whole sample stay what they are."""
    spy, z, seen = Spy(placed_in_time), draw(2, 10, 2, 5, 6), sequences_seen(2, 10, 5, 6)
    s = torch.tensor([0.5, 2.0], dtype=torch.float64)
    Windowed(spy, (4, 5, 6), (1, 0, 0), batch=1)(z, s, seen)
    assert len(spy.calls) == 6
    for call, (first, sample) in zip(spy.calls, product((0, 3, 6), range(2)), strict=True):
        given, level, told = call
        frames = slice(first, first + 4)
        assert torch.equal(given[0], z[sample, frames]) and level.item() == s[sample]
        for name in ("y", "observed", "valid"):
            expected = getattr(seen, name)[sample : sample + 1, frames]
            torch.testing.assert_close(getattr(told, name), expected, equal_nan=True, atol=0, rtol=0)
        assert torch.equal(told.sigma_y, seen.sigma_y[sample : sample + 1])


def test_a_window_with_no_length_in_time_has_all_frames():
    spy, z, seen = Spy(placed_in_time), draw(2, 3, 2, 9, 6), sequences_seen(2, 3, 9, 6)
    out = Windowed(spy, (5, 6), 2)(z, one(2), seen)
    assert torch.equal(out, Windowed(placed_in_time, (3, 5, 6), (0, 2, 0))(z, one(2), seen))
    assert all(given.shape[1:] == (3, 2, 5, 6) for given, _, _ in spy.calls)
    with pytest.raises(ValueError, match="need fields with 3 axes"):
        Windowed(Spy(), (4, 5, 6))(z[:, 0], one(2), seen)


def test_fewer_frames_than_a_window_has_are_filled_up_with_none():
    spy, z, seen = Spy(placed_in_time), draw(2, 3, 2, 5, 6), sequences_seen(2, 3, 5, 6)
    out = Windowed(spy, (5, 5, 6), 2)(z, one(2), seen)
    ((given, _, told),) = spy.calls
    assert out.shape == z.shape and given.shape == told.y.shape == (2, 5, 2, 5, 6)
    assert not told.valid[:, 3:].any() and not told.observed[:, 3:].any() and (given[:, 3:] == 0).all()
    assert torch.equal(told.valid[:, :3], seen.valid)


def test_nothing_depends_on_the_batch_in_time():
    z, seen = draw(2, 9, 2, 7, 9), sequences_seen(2, 9, 7, 9)
    whole = Windowed(placed_in_time, (4, 5, 6), (2, 1, 3), (False, True), batch=1000)(z, one(2), seen)
    for batch in (1, 7):
        assert torch.equal(Windowed(placed_in_time, (4, 5, 6), (2, 1, 3), (False, True), batch)(z, one(2), seen), whole)
    assert torch.autograd.gradcheck(
        lambda z: Windowed(placed_in_time, (2, 2, 2), 1, batch=5)(z, one(1), sequences_seen(1, 3, 3, 3)),
        draw(1, 3, 2, 3, 3).requires_grad_(),
    )


class Steady:
    """Fields `(2, 1, 2)` of two parts that forget at different rates, as their windows of any number of frames know."""

    CELLS = 4

    def __init__(self) -> None:
        mixing = draw(2, self.CELLS, self.CELLS, seed=7)
        self.parts = [(part @ part.T / self.CELLS, memory) for part, memory in zip(mixing, (0.6, 1.2), strict=True)]

    def covariance(self, frames: int) -> Tensor:
        place = torch.arange(frames, dtype=torch.float64)
        lag = (place[:, None] - place).abs()
        return sum(torch.kron(torch.exp(-lag / memory), part.contiguous()) for part, memory in self.parts)

    def posterior(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Mean `(B, d)` and covariance `(B, d, d)` given what is observed of the frames."""
        n, frames = observation.y.shape[:2]
        prior, size = self.covariance(frames), frames * self.CELLS
        shown = observation.observed.expand(-1, -1, 2, -1, -1).reshape(n, size).double()
        y = torch.where(observation.observed, observation.y, 0.0).reshape(n, size, 1)
        weight = shown / observation.sigma_y.expand(observation.y.shape).reshape(n, size).square()
        posterior = torch.linalg.solve(torch.eye(size, dtype=torch.float64) + prior * weight[:, None], prior)
        return (posterior @ (weight[..., None] * y))[..., 0], posterior

    def __call__(self, z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        """The mean of x0 given z and what is observed."""
        mean, covariance = self.posterior(observation)
        noise = s.square()[:, None, None] * torch.eye(z[0].numel(), dtype=z.dtype)
        away = torch.linalg.solve(covariance + noise, (z.flatten(1) - mean)[..., None])
        return (mean + (covariance @ away)[..., 0]).view_as(z)


def test_a_sequence_of_five_windows_has_the_posterior_of_all_frames():
    """Correlations fit into the overlap. Mean and spread of samples, in closed form, against the dense posterior."""
    field, size, overlap = Steady(), 10, 5
    frames = size + 4 * (size - overlap)
    observed = draw(1, frames, 1, 1, 2, seed=1) > 0.7
    observed[:, [7, 8, 15]] = False
    seen = Observation(
        draw(1, frames, 2, 1, 2, seed=2), observed, 0.1 * torch.ones(1, 1, 1, 1, 1).double(), observed | True
    )
    windowed, calls = Windowed(field, (size, 1, 2), (overlap, 0, 0), batch=10_000), 48
    assert len(starts(frames, size, overlap, False)) == 5

    def denoise(z: Tensor, s: Tensor) -> Tensor:
        return windowed(z, s, seen)

    mean, law = gaussian_law(DPMpp2M(calls), denoise, karras(0.002, 200.0, calls), (frames, 2, 1, 2))
    exact, covariance = (part[0] for part in field.posterior(seen))
    spread = covariance.diagonal().sqrt()
    assert ((mean - exact).abs() / spread).max() < 0.03
    ratio = law.diagonal().sqrt() / spread
    assert ratio.min() > 0.98 and ratio.max() < 1.03
    assert spread.max() > 3 * spread.min()  # of what is observed and of what is not


@pytest.mark.parametrize(("overlap", "n"), [(8, 80), (0, 96)])
def test_samples_have_no_seams_in_time(overlap, n):
    """As in space: from one frame to the next members change no more or less where windows meet."""
    line = exact(32, 4.0)

    def denoise(z: Tensor, s: Tensor, observation: Observation) -> Tensor:
        return line(z.movedim(1, -1)[..., 0, :], s).unsqueeze(-2).movedim(-1, 1)

    windowed = Windowed(denoise, (32, 1, 1), (overlap, 0, 0), batch=10_000)
    seams = [range(begin - 1, end + 32) for end, begin in pairwise(starts(n, 32, overlap, False))]

    def along(z: Tensor, s: Tensor) -> Tensor:
        """Of lines `(B, 1, 1, n)`, n frames of one cell."""
        frames = z.movedim(-1, 1)[..., None].expand(-1, -1, 2, -1, -1)
        return windowed(frames, s, nothing_seen(len(z), n, 1, 1))[:, :, :1, :, 0].movedim(1, -1)

    index = seam_index(along, n, seams)
    assert (index > 1.5) if overlap == 0 else (abs(index - 1) < 0.01)
