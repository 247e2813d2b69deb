"""A network for what a Gaussian field misses.

The mean of x0 given a noisy field z = x0 + s eps and observations y has a closed form where x0 is Gaussian. With the
covariance of the training fields it is optimal interpolation that has z as further data, g(z, s, y): at high noise the
usual one, at low noise a Wiener filter. Let c(s, y) be the standard deviation of its error. The denoiser is

    D(z, s, y) = g + c F((z - g) / s, y, g, (y - g) / c; s)

for any formulation. With F = 0 it samples the Gaussian posterior; what is learned is what sets the fields apart from
Gaussian ones. The scalars c_skip and c_out of Karras et al. (NeurIPS 2022, table 1) are the case of white fields and no
observations; Wang & Vastola (TMLR 2024) measured that learned denoisers are nearly Gaussian over most noise levels.

The covariance is V L V^T of orthonormal modes V, and something simple beside them: see `Waves` and `Eigenfields`. Data
with weights w of the cells give the coefficients of the modes the posterior precision

    L^-1 + V^T w V = d^-1 (I + d V^T w V d) d^-1,    d = sqrt(L).

No eigenvalue of what is factorised is below 1: float32 is enough.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from vecfield_diffusion.models.base import Known, Parametrization, Preconditioned, Scalars, column
from vecfield_diffusion.models.unet import UNet

FIELD = 2  # channels of the noisy field; what is known follows
#: The least c, in standard deviations of the data: observations may leave nothing to be found.
FLOOR = 1e-3
#: Products of modes that float32 leaves, at most.
ROUNDED = 1e-5


#: The mean of x0 `(B, 2, H, W)`, and the mean variance of its error `(B,)`.
Posterior = tuple[Tensor, Tensor]


class Modes(nn.Module, ABC):
    """A Gaussian field known by its modes. Its buffers take the size of what is loaded: the data decide on the number.

    `self(z, s, y, observed, error, valid)` is the posterior:

    Arguments:
        z: The noisy field `(B, 2, H, W)`, 0 outside the domain.
        s: The standard deviation of its noise, `(B,)`.
        y: The measured values `(B, 2, H, W)`, 0 where there are none.
        observed: The measured cells, boolean `(B, 1, H, W)`.
        error: The standard deviation of their error, `(B, 1, H, W)`.
        valid: The cells of the domain, boolean `(B, 1, H, W)`.
    """

    #: Whether all cells of the rectangle must belong to the domain.
    fills_domain: bool = False
    #: Random vectors that estimate the trace of the posterior covariance, to a few hundredths.
    PROBES = 16

    @abstractmethod
    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> Posterior:
        """See the class."""

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            if (given := state.get(prefix + name)) is not None and given.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(given.shape))
        super()._load_from_state_dict(state, prefix, *rest)

    @classmethod
    def solve(cls, gram: Tensor, variances: Tensor, right: Tensor, which: Tensor | None) -> tuple[Tensor, Tensor]:
        """The posterior mean of the coefficients `(B, K)`, and the trace of their covariance `(B,)`.

        Arguments:
            gram: V^T w V of every system, `(U, K, K)`; it is overwritten.
            variances: The diagonal of L, `(K,)`.
            right: V^T w of the data, `(B, K)`.
            which: The system of each sample, `(B,)`; None where each has its own.
        """
        d = variances.sqrt()
        gram.mul_(d[:, None]).mul_(d).diagonal(dim1=1, dim2=2).add_(1.0)
        factor = torch.linalg.cholesky(gram)
        probes = d[:, None] * signs(len(d), cls.PROBES, d.dtype, d.device)
        half = torch.linalg.solve_triangular(factor, probes.expand(len(factor), -1, -1), upper=False)
        trace = half.square().sum(dim=(1, 2)) / cls.PROBES
        if which is None:
            return torch.cholesky_solve((d * right)[..., None], factor)[..., 0] * d, trace
        # Members share their system: a copy of it for each would take longer than to solve it.
        parts = [torch.cholesky_solve((d * right[which == u]).mT, factor[u]).mT * d for u in range(len(factor))]
        order = torch.cat([(which == u).nonzero()[:, 0] for u in range(len(factor))])
        return torch.cat(parts)[order.argsort()], trace[which]


@lru_cache(maxsize=8)
def signs(n: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random signs `(n, count)`, always the same: a posterior has the same spread whenever it is asked for."""
    drawn = torch.randint(2, (n, count), generator=torch.Generator().manual_seed(0))
    return (2 * drawn - 1).to(device, dtype)


class Waves(Modes):
    """A homogeneous field on a doubly periodic grid: the modes are waves times the eigenvectors of its spectrum.

    The K strongest are estimated together, from y and z. The rest is estimated from z alone, by the Wiener filter
    P / (P + s^2); to the strong ones it is a further error of y. Scattered cells alias all of it, of variance e a
    value; where a share r of the cells is observed densely, the waves just beyond the last one leak into the gaps. With
    l the largest variance of the rest, (1 - r) e + r l / 4 is within a few hundredths of the best for pixels and
    blocks alike (on turbulence, 700 to 1200 modes).

    Arguments:
        spectrum: P(k), Hermitian and non-negative, `(2, 2, H, W)` complex: the covariance of the Fourier transform of
            unit norm.
        modes: The number K at most; waves that carry 1e-4 of the variance together are left out in any case.
    """

    fills_domain = True
    #: The number of modes K that is taken, at most, and the share of the variance that they may leave out.
    MODES, LEFT_OUT = 1000, 1e-4

    def __init__(self, spectrum: Tensor | None = None, modes: int = MODES) -> None:
        super().__init__()
        spectrum = torch.zeros(2, 2, 1, 1, dtype=torch.complex128) if spectrum is None else spectrum
        # Real and in float64, as checkpoints keep it: half precision would make gradients of what has none.
        power = torch.view_as_real(spectrum.to(torch.complex128).permute(2, 3, 0, 1)).flatten(2)
        self.register_buffer("power", power.contiguous())
        self.register_buffer("modes", torch.tensor(modes))
        self.tables: dict[tuple[torch.dtype, torch.device], Table] = {}

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.tables = {}

    def table(self, like: Tensor) -> Table:
        """What follows from the spectrum, in the type and on the device of a real tensor."""
        key = (like.dtype, like.device)
        if key not in self.tables:
            spectrum = torch.view_as_complex(self.power.double().unflatten(2, (2, 2, 2)).contiguous())
            self.tables[key] = Table.of(spectrum.cpu(), int(self.modes), self.LEFT_OUT).to(like)
        return self.tables[key]

    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> Posterior:
        """See `Modes`."""
        table, noise = self.table(z), s[:, None].square()
        share = observed.to(z).mean(dim=(2, 3), keepdim=True)
        leak = torch.lerp(table.left_out, table.rest.max() / 4, share).clamp(min=least(table.variances))
        weight = torch.where(observed, 1 / (error.square() + leak), 0.0)
        right = table.analyse(weight * y + z / noise[:, :, None, None])
        kinds, which = alike(torch.cat([weight.flatten(1), 1 / noise], dim=1))
        gram = table.gram(kinds[:, :-1].unflatten(1, z.shape[2:]))
        gram.diagonal(dim1=1, dim2=2).add_(kinds[:, -1:])
        coefficients, trace = self.solve(gram, table.variances, right, which)
        mean, rest = table.synthesise(coefficients), table.rest / (table.rest + noise[:, :, None])  # (B, 2, n)
        mean = mean + table.filter(z, rest)
        values = z[0].numel()
        return mean, (trace + (rest * noise[:, :, None]).sum(dim=(1, 2))) / values


@dataclass(frozen=True)
class Table:
    """What `Waves` computes with. A wave k that is not its own conjugate makes two real modes, of cosines and sines.

    Arguments:
        wave: Where the K / 2 waves are in a flattened transform, `(n,)`.
        vector: Their unit eigenvectors, complex `(n, 2)`.
        factor: sqrt(2), or 1 for a wave that is its own conjugate, `(n,)`.
        variances: Of the real modes: cosines, then sines, `(2 n,)`; 0 for a sine that vanishes.
        minus: Where the wave k_b - k_a is, `(n, n)`.
        plus: Where k_b + k_a is, `(n, n)`.
        basis: All eigenvectors, complex `(2, 2, H W)`: component, index.
        rest: The variances of those that are not among the modes, `(2, H W)`, else 0.
        left_out: Their mean a value, a number.
        shape: (H, W).
    """

    wave: Tensor
    vector: Tensor
    factor: Tensor
    variances: Tensor
    minus: Tensor
    plus: Tensor
    basis: Tensor
    rest: Tensor
    left_out: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, spectrum: Tensor, modes: int, left_out: float) -> Self:
        """From the spectrum `(H, W, 2, 2)`."""
        shape, size = spectrum.shape[:2], spectrum.shape[0] * spectrum.shape[1]
        y, x = (each.flatten() for each in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        opposite = (-y % shape[0]) * shape[1] + -x % shape[1]
        cells = torch.arange(size)
        own = opposite == cells
        values, basis = torch.linalg.eigh(spectrum.reshape(size, 2, 2))
        values = values.clamp(min=0.0)
        basis[own] = torch.linalg.eigh(spectrum.reshape(size, 2, 2)[own].real)[1].to(basis)
        # Of a wave and its conjugate the first stands for both.
        first = (cells <= opposite)[:, None].expand(size, 2)
        ranked = torch.where(first, values, -1.0).flatten().argsort(descending=True, stable=True)[: int(first.sum())]
        energy = torch.where(own[:, None], 1.0, 2.0).mul(values).flatten()[ranked]
        enough = int((energy.cumsum(0) < (1 - left_out) * values.sum()).sum()) + 1
        ranked = ranked[: min(enough, max(modes // 2, 1))]
        wave, index = ranked // 2, ranked % 2
        vector = basis[wave, :, index]
        strength = values[wave, index]
        rest = values.clone()
        rest[wave, index] = 0.0
        rest[opposite[wave], index] = 0.0

        def at(sign: int) -> Tensor:
            rows, columns = (each[wave][None, :] + sign * each[wave][:, None] for each in (y, x))
            return rows % shape[0] * shape[1] + columns % shape[1]

        return cls(
            wave,
            vector,
            torch.where(own[wave], 1.0, 2.0).to(strength).sqrt(),
            torch.cat([strength, torch.where(own[wave], 0.0, strength)]),
            at(-1),
            at(1),
            basis.permute(1, 2, 0).contiguous(),
            rest.T.contiguous(),
            rest.sum() / (2 * size),
            tuple(shape),
        )

    def to(self, like: Tensor) -> Table:
        """In the type and on the device of a real tensor."""

        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            kind = like.dtype.to_complex() if value.is_complex() else like.dtype
            return value.to(like.device, kind if value.is_complex() or value.is_floating_point() else value.dtype)

        return Table(*(cast(getattr(self, each.name)) for each in fields(self)))

    def gram(self, weight: Tensor) -> Tensor:
        """V^T w V, `(U, K, K)`, for weights `(U, H, W)`: transforms of the weights at sums and differences of waves."""
        m = torch.fft.fft2(weight).flatten(1).conj().resolve_conj() / (self.shape[0] * self.shape[1])
        n, pair = len(self.wave), self.factor[:, None] * self.factor / 2
        near = m[:, self.minus.flatten()].unflatten(1, (n, n)) * (pair * (self.vector.conj() @ self.vector.T))
        far = m[:, self.plus.flatten()].unflatten(1, (n, n)) * (pair * (self.vector @ self.vector.T))
        both, gram = near + far, weight.new_empty(len(weight), 2 * n, 2 * n)
        gram[:, :n, :n], gram[:, n:, n:] = both.real, (near - far).real
        gram[:, :n, n:] = -both.imag
        gram[:, n:, :n] = -both.imag.mT
        return gram

    def analyse(self, field: Tensor) -> Tensor:
        """V^T of fields `(B, 2, H, W)`, `(B, K)`."""
        waves = torch.fft.fft2(field, norm="ortho").flatten(2)[:, :, self.wave]
        c = torch.einsum("kc,bck->bk", self.vector.conj(), waves) * self.factor
        return torch.cat([c.real, c.imag], dim=1)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """V times coefficients `(B, K)`, `(B, 2, H, W)`."""
        real, imaginary = coefficients.chunk(2, dim=1)
        c = torch.complex(real, imaginary) * self.factor
        waves = c.new_zeros(len(c), 2, self.shape[0] * self.shape[1])
        waves = waves.index_add(2, self.wave, torch.einsum("bk,kc->bck", c, self.vector))
        return torch.fft.ifft2(waves.unflatten(2, self.shape), norm="ortho").real

    def filter(self, field: Tensor, share: Tensor) -> Tensor:
        """Fields `(B, 2, H, W)` with each eigenvector of each wave times its `share` `(B, 2, H W)`."""
        waves = torch.fft.fft2(field, norm="ortho").flatten(2)
        parts = torch.einsum("cin,bcn->bin", self.basis.conj(), waves) * share
        waves = torch.einsum("cin,bin->bcn", self.basis, parts)
        return torch.fft.ifft2(waves.unflatten(2, self.shape), norm="ortho").real


def least(variances: Tensor) -> Tensor:
    """The least variance of a measurement that rounding leaves room for beside the variances of the modes."""
    return 4 * torch.finfo(variances.dtype).eps * variances.max()


def alike(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The different rows of `(B, n)`, and which of them each is, `(B,)`; None where all stand for themselves.

    So they do on a GPU, which would have to wait for the number of rows, and solves many systems as fast as few.
    """
    if rows.device.type != "cpu":
        return rows, None
    kinds, which = torch.unique(rows, dim=0, return_inverse=True)
    return (rows, None) if len(kinds) == len(rows) else (kinds, which)


class Eigenfields(Modes):
    """Any field on a rectangle of cells: modes of its covariance, and a white part beside them in every cell.

    The posterior is exact, but that float32 leaves measurements an error of 1e-3 of the largest mode. In each cell y
    and z together are one value m of the variance p = 1 / (1/s^2 + 1/error^2); it measures the modes with the variance
    nugget + p, and what is left of it is shared between the white part and the noise.

    Arguments:
        modes: V, `(K, 2, H, W)`, orthonormal.
        variances: The diagonal of L, `(K,)`.
        nugget: The white variance.
    """

    #: The number of modes K that is taken.
    MODES = 500

    def __init__(self, modes: Tensor | None = None, variances: Tensor | None = None, nugget: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("modes", torch.zeros(1, 2, 1, 1) if modes is None else modes)
        self.register_buffer("variances", torch.zeros(1) if variances is None else variances)
        self.register_buffer("nugget", torch.tensor(nugget, dtype=torch.float32))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        flat = self.modes.flatten(1).double()
        miss = (flat @ flat.T - torch.eye(len(flat), dtype=flat.dtype, device=flat.device)).abs().max()
        if miss > ROUNDED:  # stored in half precision: what is solved counts on V^T V = I
            vectors, triangle = torch.linalg.qr(flat.T)
            upright = (vectors * triangle.diagonal().sign()).T.reshape(self.modes.shape)
            self.modes = upright.to(self.modes)

    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> Posterior:
        """See `Modes`."""
        noise, square = s[:, None, None, None].square(), error.square()
        p = torch.where(observed, noise * square / (noise + square), noise)
        m = torch.where(observed, (square * z + noise * y) / (noise + square), z)
        nugget, modes, variances = (each.to(z.dtype) for each in (self.nugget, self.modes, self.variances))
        total = (nugget + p).clamp(min=least(variances))
        weight, white = (torch.where(valid, each, 0.0) for each in (1 / total, nugget / total))
        kinds, which = alike(weight.flatten(1))
        basis = modes.flatten(1)
        coefficients, trace = self.solve(self.gram(basis, kinds), variances, (weight * m).flatten(1) @ basis.T, which)
        smooth = (coefficients @ basis).unflatten(1, z.shape[1:])
        mean = smooth + white * (m - smooth)
        cells = valid.sum(dim=(1, 2, 3)).clamp(min=1)
        beside = (white * p).sum(dim=(1, 2, 3)) / cells
        kept = torch.where(valid, 1 - white, 0.0).square().sum(dim=(1, 2, 3)) / cells
        return torch.where(valid, mean, 0.0), kept * trace / (2 * cells) + beside

    @staticmethod
    def gram(basis: Tensor, weight: Tensor) -> Tensor:
        """V^T w V, `(U, K, K)`, for V^T `(K, 2 H W)` and weights of the cells `(U, H W)`."""
        if basis.device.type != "cpu":
            return torch.stack([(basis * row.repeat(2)) @ basis.T for row in weight])
        gram = torch.zeros(len(weight), len(basis), len(basis), dtype=basis.dtype)
        for row, into in zip(weight, gram, strict=True):
            # V^T V is the identity: only cells of another weight than most take work.
            most = row.mode().values
            other = (row != most).repeat(2)
            part = basis[:, other]
            torch.mm(part * (row - most).repeat(2)[other], part.T, out=into)
            into.diagonal().add_(most)
        return gram


class GaussianResidual(nn.Module, Parametrization):
    """The posterior of a Gaussian field, and a UNet for what it misses.

    Arguments:
        in_channels: Channels of the noisy field and of what is known, C.
        out_channels: Channels of the output of `forward`.
        periodic: Whether y and x close on themselves.
        channels: See `UNet`.
        blocks: See `UNet`.
        attention: See `UNet`.
        embedding: See `UNet`.
        patch: See `UNet`.
        dropout: See `UNet`.

    Attributes:
        field: The Gaussian field; None until `learn`, or until it is loaded.

    Raises:
        ValueError: Sizes that make no network; see `UNet`.
    """

    traceable = False  # it solves a system of its own for each observation
    needs_noise = "model=gaussian builds on noisy fields, which diffusion=regression has none of"

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        channels: Sequence[int] = (64, 96, 128),
        blocks: int = 2,
        attention: Sequence[int] = (-1,),
        embedding: int = 256,
        patch: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (channels, blocks, attention, embedding, patch, dropout)
        self.network = UNet(in_channels + 2 * FIELD, out_channels, periodic, *sizes)
        self.field = None

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        kinds = {"field.power": Waves, "field.nugget": Eigenfields}
        found = [kind for name, kind in kinds.items() if prefix + name in state]
        if found and not isinstance(self.field, found[0]):
            self.field = found[0]().to(next(self.parameters()).device)
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def fills_domain(self) -> bool:
        """Whether the field is one of waves, which have no gaps."""
        return self.field is not None and self.field.fills_domain

    def learn(self, field: Callable[[], Modes]) -> None:
        """Takes the Gaussian field `field()`, which training leaves as it is."""
        self.field = field().to(next(self.parameters()).device)

    def precondition(self, z: Tensor, s: Tensor, known: Known, scalars: Callable[[Tensor], Scalars]) -> Preconditioned:
        """See `Parametrization`; of the formulation c_noise alone enters."""
        mean, c = self.posterior(z, s, known.y, known.observed, known.error, known.valid)
        innovation = torch.where(known.observed, (known.y - mean) / column(c), 0.0)
        noise = torch.where(known.valid, (z - mean) / column(s), 0.0)
        channels = torch.cat([noise, known.channels, mean, innovation], dim=1)
        return Preconditioned(mean, c, channels, scalars(s).c_noise)

    def weight(self, s: Tensor, out: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """1 / c^2, the squared error of F."""
        return out**-2

    def posterior(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> Posterior:
        """g, `(B, 2, H, W)`, and c, `(B,)`; arguments as for `Modes`.

        Raises:
            ValueError: No field was learnt.
        """
        if self.field is None:
            raise ValueError("field must be learnt first, or loaded")
        mean, variance = self.field(z, s, y, observed, error, valid)
        return mean, variance.clamp(min=FLOOR**2).sqrt()

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """`(B, C + 4, H, W)`: (z - g) / s, what is known, g, (y - g) / c; and the level `(B,)`, to the raw output."""
        return self.network(x, noise)
