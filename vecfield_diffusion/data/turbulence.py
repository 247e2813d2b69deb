"""Decaying two-dimensional incompressible turbulence, made where it is needed.

The vorticity `w` of an incompressible flow on the doubly periodic square of side 2 pi obeys

    dw/dt + div(u w) = -nu (-lap)^p w,        u = (-d psi/dy, d psi/dx),    lap psi = w.

It is solved by Fourier modes with the 2/3 rule against aliasing and fourth-order Runge-Kutta; the viscous term is
integrated exactly (Canuto et al., Spectral Methods, 2006, ch. 3 and appendix D). Random phases around wavenumber
`k_peak` decay until the vorticity has gathered in coherent vortices (McWilliams, J. Fluid Mech. 146, 1984). Such fields
are far from Gaussian: the kurtosis of the vorticity, 3 at the start, has passed 6.

A set holds one snapshot of each flow or, where time matters, trajectories: runs of snapshots of one flow, `interval`
apart, from the end of the decay on. Time is measured in turnovers of the eddies of the start, 1 / k_peak at unit RMS
component; 11.8 h with the sizes of the defaults. The vortices that have formed turn more slowly: with the defaults the
correlation of the velocity with itself is .98 after 1, .94 after 2, .82 after 4 and .58 after 8 turnovers, that of the
vorticity .91, .75, .50 and .26, while the RMS component falls by .4 % in 12.

Their Gaussian twin is a set of independent fields of a random stream function, homogeneous and Gaussian, whose power at
every wavenumber is the mean over the flows. Each field is white noise times the root of that power, so that phases and
amplitudes are both random: phases alone, at the amplitudes of the mean or of one flow, would give fields that are
Gaussian at a point but not jointly. Where the law is Gaussian to the last, optimal interpolation with its covariance is
the posterior (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, eq. 2.23-24) and no method does
better; what a method gains on the flows beyond that on their twin, it gains by what is not Gaussian in them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.generated import made
from vecfield_diffusion.data.law import Law
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.pool import one_each

#: Flows solved at once: few enough for their spectra to stay in the cache of a core.
BATCH = 8
#: Snapshots of a trajectory, where sequences are asked for and no number is given.
TRAJECTORY = 16


@dataclass(frozen=True)
class Turbulence:
    """The solver on a square of side 2 pi; velocities are in units of their RMS component at the start.

    Arguments:
        resolution: Cells along each axis.
        k_peak: The wavenumber at which the initial field has its energy.
        viscosity: nu.
        order: The power p of the Laplacian; 1 is Newtonian, larger ones dissipate at the smallest scales alone.
        duration: The time of decay in units of 1 / k_peak, about the turnover time of the initial eddies.
        courant: The cells that a flow of 4 RMS crosses in a step.
    """

    resolution: int
    k_peak: float = 8.0
    viscosity: float = 3e-10
    order: int = 4
    duration: float = 40.0
    courant: float = 1.0

    def wavenumbers(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """`(ky (H, 1), kx (1, W / 2 + 1))` of the half-complex transform."""
        n = self.resolution
        return torch.fft.fftfreq(n, 1 / n, dtype=dtype)[:, None], torch.fft.rfftfreq(n, 1 / n, dtype=dtype)[None, :]

    def velocity(self, w: Tensor) -> Tensor:
        """The velocity `(n, 2, H, W)` of spectral vorticity `(n, H, W / 2 + 1)`."""
        return self.fields(w)[:, :2]

    def fields(self, w: Tensor) -> Tensor:
        """u, v and vorticity `(n, 3, H, W)` of spectral vorticity."""
        ky, kx = self.wavenumbers(w.real.dtype)
        square = ky**2 + kx**2
        psi = -w / torch.where(square > 0, square, math.inf)
        return torch.fft.irfft2(torch.stack([-1j * ky * psi, 1j * kx * psi, w], dim=1), s=(self.resolution,) * 2)

    def vorticity(self, velocity: Tensor) -> Tensor:
        """The spectral vorticity `(n, H, W / 2 + 1)` of velocities `(n, 2, H, W)`."""
        ky, kx = self.wavenumbers(velocity.dtype)
        u, v = torch.fft.rfft2(velocity).unbind(1)
        return 1j * kx * v - 1j * ky * u

    def gaussian(self, power: Tensor, noise: Tensor) -> Tensor:
        """Spectral vorticity `(n, H, W / 2 + 1)` of Gaussian fields.

        Arguments:
            power: The mean |w|^2 at every wavenumber, `(H, W / 2 + 1)`.
            noise: White noise of unit variance, `(n, H, W)`.
        """
        return torch.fft.rfft2(noise) * (power / self.resolution**2).sqrt()

    def advection(self, w: Tensor) -> Tensor:
        """-div(u w), de-aliased."""
        ky, kx = self.wavenumbers(w.real.dtype)
        u, v, vorticity = self.fields(w).unbind(1)
        flux = torch.fft.rfft2(torch.stack([u * vorticity, v * vorticity], dim=1))
        kept = (ky.abs() < self.resolution / 3) & (kx < self.resolution / 3)
        return torch.where(kept, -1j * (kx * flux[:, 0] + ky * flux[:, 1]), 0)

    def start(self, generators: list[torch.Generator]) -> Tensor:
        """Spectral vorticity `(n, H, W / 2 + 1)` of random phases, one generator each, RMS component 1."""
        ky, kx = self.wavenumbers()
        k = (ky**2 + kx**2).sqrt()
        ratio = k / self.k_peak
        # The shell around k_peak, empty at the mean and falling steeply beyond; vorticity has k^2 the energy.
        amplitude = torch.sqrt(ratio**6 / (1 + ratio**18) * k)
        amplitude = torch.where(k < self.resolution / 3, amplitude, 0.0)
        w = torch.fft.rfft2(self.noise(generators)) * amplitude
        return w / self.velocity(w).square().mean(dim=(1, 2, 3)).sqrt()[:, None, None]

    def noise(self, generators: list[torch.Generator]) -> Tensor:
        """White noise of unit variance `(n, H, W)`, one generator each."""
        return torch.stack([torch.randn(self.resolution, self.resolution, generator=g) for g in generators])

    def decay(
        self,
        w: Tensor,
        time: float | None = None,
        steps: int | None = None,
        stop: threading.Event | None = None,
    ) -> Tensor:
        """Integrates spectral vorticity over `time` (default: the whole duration) in equal steps, or until `stop`."""
        time = self.duration / self.k_peak if time is None else time
        steps = steps or math.ceil(time / (self.courant * 2 * math.pi / self.resolution / 4))
        dt = time / steps
        ky, kx = self.wavenumbers(w.real.dtype)
        half = torch.exp(-self.viscosity * (ky**2 + kx**2) ** self.order * dt / 2)
        for _ in range(steps):
            if stop is not None and stop.is_set():
                break
            k1 = self.advection(w)
            k2 = self.advection(half * (w + dt / 2 * k1))
            k3 = self.advection(half * w + dt / 2 * k2)
            k4 = self.advection(half * (half * w + dt * k3))
            w = half**2 * (w + dt / 6 * k1) + dt / 6 * (2 * half * (k2 + k3) + k4)
        return w

    def snapshots(
        self, number: int, seed: int, *, frames: int = 1, interval: float = 1.0, first: int = 0
    ) -> Iterator[Tensor]:
        """Blocks of decayed flows, `(n, 2, H, W)`; flow i depends on `seed` and i alone.

        Arguments:
            number: The snapshots in all, run after run; the last run may be cut short.
            seed: Of the flows.
            frames: The snapshots of a run, which follow the decay.
            interval: The turnovers between them.
            first: Where to begin, a snapshot that begins a block.
        """
        ended = threading.Event()
        flows = -(-number // frames)

        def block(first: int) -> Tensor:
            w = self.decay(
                self.start([generator(seed, i) for i in range(first, min(first + BATCH, flows))]), stop=ended
            )
            states = [w]
            for _ in range(frames - 1):
                states.append(self.decay(states[-1], interval / self.k_peak, stop=ended))
            return torch.stack([self.velocity(w) for w in states], dim=1).flatten(0, 1)[: number - first * frames]

        # The transforms are twice as fast left alone.
        with one_each() as mapped:
            try:
                yield from mapped(block, range(first // frames, flows, BATCH))
            finally:
                ended.set()


def generator(seed: int, i: int) -> torch.Generator:
    """The random numbers of flow `i`."""
    return torch.Generator().manual_seed(seed * 1_000_003 + i)


def coarsen(velocity: Tensor, resolution: int) -> Tensor:
    """Fields `(n, 2, H, H)` on a grid of `resolution` cells, by cutting the Fourier series; stays divergence-free."""
    size, half = velocity.shape[-1], resolution // 2
    if resolution == size:
        return velocity
    # Below the new Nyquist wavenumber alone: a cosine there has no sine beside it, and no derivative.
    spectrum = torch.fft.rfft2(velocity)[..., :half]
    kept = torch.zeros(*velocity.shape[:2], resolution, half + 1, dtype=spectrum.dtype)
    kept[..., :half, :half] = spectrum[..., :half, :]
    kept[..., half + 1 :, :half] = spectrum[..., size - half + 1 :, :]
    return torch.fft.irfft2(kept, s=(resolution, resolution)) * (resolution / size) ** 2


def open_turbulence(
    resolution: int = 64,
    snapshots: int = 1024,
    seed: int = 0,
    solver_resolution: int = 64,
    k_peak: float = 8.0,
    viscosity: float = 3e-10,
    order: int = 4,
    duration: float = 40.0,
    side: float = 640e3,
    speed: float = 0.3,
    twin: bool = False,
    trajectory: int | None = None,
    interval: float = 1.0,
    frames: int = 1,
    stride: int = 1,
    folder: str = "outputs/data",
) -> Fields:
    """Snapshots of decaying turbulence, each from a flow of its own, or trajectories; made once, kept as a native file.

    Arguments:
        resolution: Cells along each axis of the stored fields, even.
        snapshots: The number of fields, and of independent flows where each is one snapshot.
        seed: The seed of the initial fields.
        solver_resolution: Cells along each axis of the solver, at least `resolution`.
        k_peak: The wavenumber of the initial energy.
        viscosity: Of the solver, in its own units.
        order: The power of the Laplacian.
        duration: The time of decay, in turnovers.
        side: The side of the square in metres.
        speed: The RMS velocity component at the start in m s-1.
        twin: Gaussian fields with the mean spectrum of those flows, as many, in place of them; of trajectories with
            their mean covariance in time, too.
        trajectory: The snapshots of each flow, a run; by default 1, and 16 or as many as a sequence takes if `frames`
            is more than 1.
        interval: The turnovers from one snapshot of a trajectory to the next.
        frames: The frames of a sequence, which is one sample; 1 for single snapshots.
        stride: The snapshots from one frame of a sequence to the next.
        folder: Where the file is kept.

    Raises:
        ValueError: A number out of range, or a flow that the time step did not resolve.
    """
    if resolution < 8 or resolution % 2:
        raise ValueError(f"resolution must be even and >= 8, got {resolution}")
    if solver_resolution < resolution:
        raise ValueError(f"solver_resolution must be >= resolution={resolution}, got {solver_resolution}")
    if snapshots < 1:
        raise ValueError(f"snapshots must be >= 1, got {snapshots}")
    if not interval > 0:
        raise ValueError(f"interval must be > 0, got {interval}")
    reach = (frames - 1) * stride + 1
    run = (1 if frames == 1 else max(TRAJECTORY, reach)) if trajectory is None else trajectory
    if run < max(1, reach):
        raise ValueError(f"trajectory must be >= {max(1, reach)}, which one sequence takes, got {run}")
    solver = Turbulence(solver_resolution, k_peak, viscosity, order, duration)
    recipe = {
        **asdict(solver),
        "stored": resolution,
        "snapshots": snapshots,
        "seed": seed,
        "side": side,
        "speed": speed,
        **({"trajectory": run, "interval": interval} if run > 1 else {}),
    }
    path = made(Path(folder), "turbulence", recipe, lambda first: flows(solver, recipe, first))
    law = Law(viscosity=in_metres(solver, side, speed), order=order)
    if twin:
        fields, recipe = open_fields(str(path)), {**recipe, "twin": True}
        path = made(Path(folder), "turbulence_twin", recipe, lambda first: twins(fields, recipe, first))
        law = Law(spectrum=partial(twin_spectrum, fields) if run == 1 else None)
    return replace(open_fields(str(path), frames=frames, stride=stride), law=law)


def in_metres(solver: Turbulence, side: float, speed: float) -> float:
    """Returns nu in m^(2 order) s-1 for a square of `side` metres and an RMS component of `speed` m s-1."""
    length = side / (2 * math.pi)
    return solver.viscosity * length ** (2 * solver.order) * speed / length


def flows(solver: Turbulence, recipe: dict[str, float], first: int = 0) -> Iterator[Tensor]:
    """Blocks `(n, 2, H, W)` of the flows of `recipe` as they are stored, from snapshot `first` on."""
    run = {"frames": int(recipe.get("trajectory", 1)), "interval": recipe.get("interval", 1.0), "first": first}
    for velocity in solver.snapshots(int(recipe["snapshots"]), int(recipe["seed"]), **run):
        if not bool(velocity.isfinite().all()):
            raise ValueError(f"the flow outran the time step: raise viscosity={recipe['viscosity']}")
        yield coarsen(velocity, int(recipe["stored"])) * recipe["speed"]


def twins(fields: Fields, recipe: dict[str, float], first: int = 0) -> Iterator[Tensor]:
    """Blocks `(n, 2, H, W)` of the Gaussian twin of `fields`; field i depends on their spectrum, the seed and i."""
    if "trajectory" in recipe:
        yield from twins_in_time(fields, recipe, first)
        return
    solver, power = Turbulence(int(recipe["stored"])), mean_power(fields)
    for block in in_blocks(len(fields))[first // BATCH :]:
        # Negative numbers: flow i began with the noise of i, of which its long waves may keep a trace.
        noise = solver.noise([generator(int(recipe["seed"]), -1 - i) for i in block])
        yield solver.velocity(solver.gaussian(power, noise.double())).float()


def in_blocks(number: int) -> list[range]:
    """Returns the numbers of the snapshots of each block."""
    return [range(start, min(start + BATCH, number)) for start in range(0, number, BATCH)]


def mean_power(fields: Fields) -> Tensor:
    """Returns the mean |w|^2 of the spectral vorticity of square fields at every wavenumber, `(H, W / 2 + 1)`."""
    solver = Turbulence(fields.shape[0])
    blocks = (fields.read(block).double() for block in in_blocks(len(fields)))
    return sum(solver.vorticity(block).abs().square().sum(dim=0) for block in blocks) / len(fields)


def twin_spectrum(fields: Fields) -> Tensor:
    """Returns P(k) of the Gaussian twin of single snapshots `fields`; see `Law`.

    With `u = (i ky, -i kx) w / k^2` the covariance of both components is `|w|^2 / k^4` times their products.
    """
    size = fields.shape[0]
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    ky, kx = torch.meshgrid(k, k, indexing="ij")
    square = ky**2 + kx**2
    half = mean_power(fields)
    # The other half of the waves are conjugates, of the same power.
    whole = torch.cat([half, half[(-torch.arange(size)) % size, 1 : size - half.shape[1] + 1].flip(1)], dim=1)
    strength = whole / size**2 / torch.where(square > 0, square, math.inf) ** 2
    direction = torch.stack([ky, -kx])
    return (strength * direction * direction[:, None]).to(torch.complex128)


def twins_in_time(fields: Fields, recipe: dict[str, float], first: int = 0) -> Iterator[Tensor]:
    """Blocks of the Gaussian twin of trajectories, a run each, `(T, 2, H, W)`, stationary in time.

    The spectral vorticity of each wave is a stationary Gaussian series, whose covariance at each lag is the mean over
    all pairs of snapshots of a run so far apart. Its spectrum over twice the length of a run, not below 0, times white
    noise gives the series.
    """
    number, solver, frames = len(fields), Turbulence(int(recipe["stored"])), int(recipe["trajectory"])
    runs = [range(start, min(start + frames, number)) for start in range(0, number, frames)]
    products, pairs = 0.0, torch.zeros(2 * frames, dtype=torch.float64)
    for run in runs:
        w = torch.fft.fft(solver.vorticity(fields.read(run).double()), 2 * frames, dim=0)
        products = products + torch.fft.ifft(w.abs().square(), dim=0)
        there = torch.fft.fft(torch.ones(len(run), dtype=torch.float64), 2 * frames).abs().square()
        pairs += torch.fft.ifft(there).real
    covariance = torch.where(pairs > 0.5, 1 / pairs.clamp(min=0.5), 0.0)[:, None, None] * products
    power = torch.fft.fft(covariance, dim=0).real.clamp(min=0)
    power *= (covariance[0].real / power.mean(dim=0).clamp(min=1e-300)).clamp(max=1.0)
    root = (power / solver.resolution**2).sqrt()
    for i, run in enumerate(runs):
        if run.start < first:
            continue
        noise = torch.randn(
            2 * frames, *fields.shape, generator=generator(int(recipe["seed"]), -1 - i), dtype=torch.float64
        )
        w = torch.fft.ifft(torch.fft.fft(torch.fft.rfft2(noise), dim=0) * root, dim=0)
        yield solver.velocity(w[: len(run)]).float()
