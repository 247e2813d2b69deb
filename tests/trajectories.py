"""Exact answers for sequences: Gaussian fields in space and time, and networks that see frame by frame."""

from __future__ import annotations

import torch
from oracle import GaussianPrior
from torch import Tensor, nn

from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.guidance.linear import LinearObservation
from vecfield_diffusion.models.unet import last


class Trajectories(GaussianPrior):
    """A divergence-free field whose waves travel along x and fade, each an Ornstein-Uhlenbeck process in time.

    The covariance of a wave k between frames a time t apart is `P(k) exp(-t / tau(k) - i kx speed t)`, tau(k) falling
    with |k|. It is not separable, and time has a direction.

    Arguments:
        frames: T.
        height: Rows.
        width: Columns, odd: the shortest wave of an even number cannot travel.
        memory: tau of the longest wave, in frames; 0 makes the frames independent.
        speed: That of the waves, in cells a frame over 2 pi / width.
    """

    def __init__(
        self, frames: int = 4, height: int = 4, width: int = 5, memory: float = 3.0, speed: float = 0.7
    ) -> None:
        ky = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)[:, None]
        kx = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)[None, :]
        size = (ky**2 + kx**2).sqrt()
        amplitude = torch.where(size > 0, size.clamp(min=1) ** -3, 0.0)
        noise = torch.fft.fft2(torch.eye(height * width, dtype=torch.float64).view(-1, height, width))

        def maps(lag: int) -> Tensor:
            fade = torch.exp(-lag * (size / memory + 1j * kx * speed)) if memory else torch.tensor(1.0 * (lag == 0))
            psi = noise * amplitude * fade
            return torch.fft.ifft2(torch.stack([-1j * ky * psi, 1j * kx * psi], dim=1)).real.flatten(1)

        lags = [maps(0).T @ maps(lag) for lag in range(frames)]  # of a frame and the one `lag` later
        rows = [[lags[j - i] if j >= i else lags[i - j].T for j in range(frames)] for i in range(frames)]
        covariance = torch.cat([torch.cat(row, dim=1) for row in rows])
        self.shape = (frames, 2, height, width)
        self.covariance = covariance / covariance.diagonal().mean()
        self.eigenvalues, self.vectors = torch.linalg.eigh(self.covariance)
        assert self.eigenvalues.min() > -1e-12  # it is a covariance
        self.eigenvalues = self.eigenvalues.clamp(min=0)

    def matrix(self, rows: LinearObservation, sample: int) -> Tensor:
        """A of one sample, `(K, d)`."""
        units = torch.eye(self.size, dtype=torch.float64).view(-1, 1, *self.shape)
        units = units.expand(-1, len(rows.y), *self.shape)
        return torch.stack([rows.forward(unit)[sample] for unit in units], dim=1)

    def given(self, z: Tensor, s: Tensor, rows: LinearObservation) -> Tensor:
        """The mean of x0 given fields `z` at levels `(B,)` and flat linear observations, by one dense solve of all."""
        out = []
        for sample, (one, level) in enumerate(zip(z, s, strict=True)):
            a = torch.cat([self.matrix(rows, sample), torch.eye(self.size, dtype=torch.float64)])
            errors = torch.cat([rows.sigma[sample], level.expand(self.size)]).square()
            cross = self.covariance @ a.T
            data = torch.cat([rows.y[sample], one.flatten()])
            out.append((cross @ torch.linalg.solve(a @ cross + errors.diag(), data)).view(self.shape))
        return torch.stack(out)


class ByFrame(nn.Module):
    """A network of snapshots that sees each frame of a sequence by itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.network(x, noise)
        return self.network(last(x.flatten(0, 1)), noise.repeat_interleave(x.shape[1])).unflatten(0, x.shape[:2])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(n: int, shape: tuple[int, ...], missing: int | None = 1, land: bool = False) -> Observation:
    """A third of the cells of sequences `(T, 2, H, W)`, some components alone, errors by cell; a frame is missing."""
    frames, _, height, width = shape
    valid = torch.ones(n, frames, 1, height, width, dtype=torch.bool)
    valid[..., :1, :2] = not land
    observed = (draw(n, frames, 1, height, width, seed=1) > 0.4) & valid
    single = (draw(n, *shape, seed=2) > 1.3) & ~observed & valid
    if missing is not None:
        observed[:, missing], single[:, missing] = False, False
    y = torch.where(observed | single, draw(n, *shape, seed=3), torch.nan)
    sigma = 0.05 + 0.2 * draw(n, frames, 1, height, width, seed=4).abs()
    return Observation(y, observed, sigma, valid, single=single)


def frames_of(observation: Observation) -> Observation:
    """The same frames, each a snapshot."""
    lead = observation.y.shape[:2]
    return observation.apply(lambda tensor: tensor.expand(*lead, *tensor.shape[2:]).flatten(0, 1))
