"""Simulation-based calibration (Talts et al., 2018, arXiv 1804.06788) of posterior samples.

Draw x0 from the prior, y from x0 and members from the posterior given y: x0 is then one more member, so its rank among
them, in any projection, is uniform on 0 to `MEMBERS`. This needs no formula of the posterior. The number of
replications is such that members a quarter too narrow, or too wide, are refused in every projection.
"""

import pytest
import torch
from oracle import GaussianConditional, GaussianPrior
from scipy.stats import chisquare

from vecfield_diffusion.diffusion.base import karras
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.samplers.deterministic import DPMpp2M

PRIOR = GaussianPrior(4, 5)
SIGMA, REPLICATIONS, MEMBERS, BINS = 0.1, 1000, 15, 8
STEPS = 32
#: The share of the cells that is observed: below and above the one where MMPS takes more iterations.
SHARES = {"few": 0.1, "many": 0.4}


class Simulated:
    """Truths of the prior, and their observations at the same cells."""

    def __init__(self, share):
        generator, (_, height, width) = torch.Generator().manual_seed(20), PRIOR.shape
        order = torch.randperm(height * width, generator=generator).view(height, width)
        self.mask = order < round(share * height * width)
        white = torch.randn(REPLICATIONS, PRIOR.size, dtype=torch.float64, generator=generator)
        self.x0 = white * PRIOR.eigenvalues.sqrt() @ PRIOR.vectors.T
        self.y = self.x0 + SIGMA * torch.randn(self.x0.shape, dtype=torch.float64, generator=generator)
        noise = torch.randn(REPLICATIONS * MEMBERS, *PRIOR.shape, dtype=torch.float64, generator=generator)
        self.noise = lambda: noise
        directions = torch.randn(3, PRIOR.size, dtype=torch.float64, generator=generator)
        seen, hidden = self.mask.flatten().nonzero()[0, 0], (~self.mask).flatten().nonzero()[0, 0]
        cells = torch.eye(PRIOR.size, dtype=torch.float64)[torch.stack([seen, hidden, hidden + height * width])]
        self.projections = torch.cat([directions, cells])

    def members(self, name):
        """`(REPLICATIONS, MEMBERS, d)`."""
        denoiser = {"exact": self.exact, "mmps": self.mmps}[name]()
        with torch.no_grad():
            x = DPMpp2M(STEPS).sample(denoiser, karras(0.002, 80.0, STEPS), self.noise)
        return x.view(REPLICATIONS, MEMBERS, -1)

    def exact(self):
        """The conditional denoiser."""
        seen = self.mask.flatten().repeat(2)
        gains, covariance = PRIOR.posterior(seen, torch.eye(int(seen.sum()), dtype=torch.float64), SIGMA)
        mean = (self.y[:, seen] @ gains.T).repeat_interleave(MEMBERS, dim=0).view(-1, *PRIOR.shape)
        centred = GaussianConditional(torch.zeros(PRIOR.size, dtype=torch.float64), covariance)
        centred.eigenvalues = centred.eigenvalues.clamp(min=0)
        return lambda z, s: mean + centred(z - mean, s)

    def mmps(self):
        """MMPS, as it comes."""
        y = self.y.repeat_interleave(MEMBERS, dim=0).view(-1, *PRIOR.shape)
        observed = self.mask.expand(len(y), 1, *self.mask.shape)
        error = torch.full((len(y), 1, 1, 1), SIGMA, dtype=torch.float64)
        return MMPS().bind(PRIOR.denoise, Observation(y, observed, error, torch.ones_like(observed)))

    def p_values(self, members):
        """The probability of a histogram of ranks as uneven as this one, or more, by projection."""
        truth, drawn = self.x0 @ self.projections.T, members @ self.projections.T
        ranks = (drawn < truth[:, None]).sum(dim=1)
        counts = [torch.bincount(column * BINS // (MEMBERS + 1), minlength=BINS) for column in ranks.T]
        return [chisquare(count.numpy()).pvalue for count in counts]


@pytest.fixture(scope="module", params=[(share, name) for share in SHARES for name in ("exact", "mmps")], ids="-".join)
def drawn(request):
    share, name = request.param
    simulated = Simulated(SHARES[share])
    return simulated, simulated.members(name)


def test_the_truth_is_one_more_member(drawn):
    simulated, members = drawn
    assert min(simulated.p_values(members)) > 1e-3


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_members_a_quarter_too_narrow_or_too_wide_are_refused(drawn, factor):
    simulated, members = drawn
    centre = members.mean(dim=1, keepdim=True)
    assert max(simulated.p_values(centre + factor * (members - centre))) < 1e-3


def test_a_shift_of_half_a_standard_deviation_is_refused(drawn):
    """In every cell, the spread being left as it is."""
    simulated, members = drawn
    deviation = (members - members.mean(dim=1, keepdim=True)).square().mean(dim=(0, 1)).sqrt()
    assert max(simulated.p_values(members + deviation / 2)[3:]) < 1e-3
