"""A homogeneous Gaussian field on a periodic rectangle: its modes are waves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from vecfield_diffusion.ellipses import blocks
from vecfield_diffusion.models.modes import Factors, MeanVariance, Modes, alike, least, of_samples


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

    fills_domain = draws = True
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

    def _forget(self) -> None:
        super()._forget()
        self.tables = {}

    def table(self, like: Tensor) -> Table:
        """Returns what follows from the spectrum, in the type and on the device of a real tensor."""
        key = (like.dtype, like.device)
        if key not in self.tables:
            spectrum = torch.view_as_complex(self.power.double().unflatten(2, (2, 2, 2)).contiguous())
            self.tables[key] = Table.of(spectrum.cpu(), int(self.modes), self.LEFT_OUT).to(like)
        return self.tables[key]

    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> MeanVariance:
        """See `Modes`."""
        table, noise = self.table(z), s[:, None].square()
        leak = self.leak(table, observed)
        weight = torch.where(observed, inverse(blocks(error), leak), 0.0)
        right = table.analyse(times(weight, y) + z / noise[:, :, None, None])
        kinds, which = alike(torch.cat([weight.flatten(1), 1 / noise], dim=1))
        factor, trace = self.systems(kinds, lambda rows: self.system(table, rows, z.shape[2:]))
        coefficients, trace = self.solve(factor, table.variances, right, which), of_samples(trace, which)
        mean, rest = table.synthesise(coefficients), table.rest / (table.rest + noise[:, :, None])  # (B, 2, n)
        mean = mean + table.filter(z, rest)
        values = z[0].numel()
        return mean, (trace + (rest * noise[:, :, None]).sum(dim=(1, 2))) / values

    def system(self, table: Table, rows: Tensor, shape: Sequence[int]) -> tuple[Factors, Tensor]:
        """Returns the factor and the trace of systems, by the weights of the cells and 1 / s^2, `(U, H W + 1)`."""
        weights, which = alike(rows[:, :-1])
        grams = table.gram(weights.unflatten(1, (-1, *shape)))
        if which is None:
            return self.levels(table, grams, rows[:, -1:])
        factors: dict[int, Tensor] = {}
        traces = torch.empty_like(rows[:, -1])
        for number, gram in enumerate(grams):  # the levels of one mask, as a flow map asks for
            own = (which == number).nonzero()[:, 0]
            found, traces[own] = self.levels(table, gram.repeat(len(own), 1, 1), rows[own, -1:])
            factors |= zip(own.tolist(), found, strict=True)
        return [factors[k] for k in range(len(rows))], traces

    def levels(self, table: Table, gram: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factor and the trace of systems V^T w V, `(U, K, K)`, overwritten, and 1 / s^2, `(U, 1)`."""
        gram.diagonal(dim1=1, dim2=2).add_(precision)
        factor = self.factorised(gram, table.variances)
        return factor, self.trace(factor, table.variances)

    def leak(self, table: Table, observed: Tensor) -> Tensor:
        """Returns the variance `(B, 1, 1, 1)` that the rest adds to the errors of the measurements."""
        share = observed.to(table.rest).mean(dim=(2, 3), keepdim=True)
        return torch.lerp(table.left_out, table.rest.max() / 4, share).clamp(min=least(table.variances))

    def draw(self, noise: Tensor, leaked: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """See `Modes`."""
        table = self.table(noise)
        strong = table.synthesise(table.variances.sqrt() * table.analyse(noise))
        seen = strong + self.leak(table, observed).sqrt() * leaked
        return strong + table.filter(noise, table.rest.sqrt()), seen

    def whiten(self, z: Tensor, s: Tensor, valid: Tensor) -> Tensor:
        """See `Modes`."""
        table = self.table(z)
        return table.filter(z, (table.every + s[:, None, None].square()).rsqrt())

    def log_determinant(self, s: Tensor, valid: Tensor) -> Tensor:
        """See `Modes`."""
        return (self.table(s.double()).every + s.double()[:, None, None].square()).log().sum(dim=(1, 2))


def inverse(block: Tensor, more: Tensor) -> Tensor:
    """Returns (R + more I)^-1 of covariances of as many channels as `ellipses.blocks` gives, in as many."""
    if block.shape[-3] < 3:
        return 1 / (block + more)
    u, v, covariance = block.split(1, dim=-3)
    u, v = u + more, v + more
    return torch.cat([v, u, -covariance], dim=-3) / (u * v - covariance.square())


def times(block: Tensor, fields: Tensor) -> Tensor:
    """Returns such symmetric matrices times vectors `(B, 2, H, W)`."""
    if block.shape[-3] < 3:
        return block * fields
    own, across = block.split((2, 1), dim=-3)
    return own * fields + across * fields.flip(-3)


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
        every: Their variances, `(2, H W)`.
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
    every: Tensor
    rest: Tensor
    left_out: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, spectrum: Tensor, modes: int, left_out: float) -> Self:
        """From the spectrum `(H, W, 2, 2)`."""
        shape, size = spectrum.shape[:2], spectrum.shape[0] * spectrum.shape[1]
        y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
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
            rows, columns = (axis[wave][None, :] + sign * axis[wave][:, None] for axis in (y, x))
            return rows % shape[0] * shape[1] + columns % shape[1]

        return cls(
            wave,
            vector,
            torch.where(own[wave], 1.0, 2.0).to(strength).sqrt(),
            torch.cat([strength, torch.where(own[wave], 0.0, strength)]),
            at(-1),
            at(1),
            basis.permute(1, 2, 0).contiguous(),
            values.T.contiguous(),
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

        return Table(*(cast(getattr(self, field.name)) for field in fields(self)))

    def gram(self, weight: Tensor) -> Tensor:
        """Returns V^T w V, `(U, K, K)`: the transforms of w at sums and differences of waves.

        Arguments:
            weight: w, `(U, C, H, W)`: of both components, of each, or these and what is off the diagonal of 2x2 blocks.
        """
        m = torch.fft.fft2(weight).flatten(2).conj().resolve_conj() / (self.shape[0] * self.shape[1])
        n, pair = len(self.wave), self.factor[:, None] * self.factor / 2
        near, far = (
            sum(
                m[:, entry, at.flatten()].unflatten(1, (n, n)) * (pair * products)
                for entry, products in enumerate(self.products(vector, weight.shape[1]))
            )
            for vector, at in ((self.vector.conj(), self.minus), (self.vector, self.plus))
        )
        both, gram = near + far, weight.new_empty(len(weight), 2 * n, 2 * n)
        gram[:, :n, :n], gram[:, n:, n:] = both.real, (near - far).real
        gram[:, :n, n:] = -both.imag
        gram[:, n:, :n] = -both.imag.mT
        return gram

    def products(self, vector: Tensor, entries: int) -> list[Tensor]:
        """Returns what each entry of w is multiplied by, `(n, n)`, for eigenvectors or their conjugates `(n, 2)`."""
        if entries == 1:
            return [vector @ self.vector.T]
        u, v = ((left[:, None], right) for left, right in zip(vector.T, self.vector.T, strict=True))
        both = [u[0] * u[1], v[0] * v[1], u[0] * v[1] + v[0] * u[1]]
        return both[:entries]

    def analyse(self, field: Tensor) -> Tensor:
        """Returns V^T of fields `(B, 2, H, W)`, `(B, K)`."""
        waves = torch.fft.fft2(field, norm="ortho").flatten(2)[:, :, self.wave]
        c = torch.einsum("kc,bck->bk", self.vector.conj(), waves) * self.factor
        return torch.cat([c.real, c.imag], dim=1)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """Returns V times coefficients `(B, K)`, `(B, 2, H, W)`."""
        real, imaginary = coefficients.chunk(2, dim=1)
        c = torch.complex(real, imaginary) * self.factor
        waves = c.new_zeros(len(c), 2, self.shape[0] * self.shape[1])
        waves = waves.index_add(2, self.wave, torch.einsum("bk,kc->bck", c, self.vector))
        return torch.fft.ifft2(waves.unflatten(2, self.shape), norm="ortho").real

    def filter(self, field: Tensor, share: Tensor) -> Tensor:
        """Returns fields `(B, 2, H, W)` with each eigenvector of each wave times its `share` `(B, 2, H W)`."""
        waves = torch.fft.fft2(field, norm="ortho").flatten(2)
        parts = torch.einsum("cin,bcn->bin", self.basis.conj(), waves) * share
        waves = torch.einsum("cin,bin->bcn", self.basis, parts)
        return torch.fft.ifft2(waves.unflatten(2, self.shape), norm="ortho").real
