"""A Gaussian field by its modes, and its posterior.

The covariance is V L V^T of orthonormal modes V, and something simple beside them: see `Waves` and `Eigenfields`. Data
with weights w of the cells give the coefficients of the modes the posterior precision

    L^-1 + V^T w V = d^-1 (I + d V^T w V d) d^-1,    d = sqrt(L).

No eigenvalue of what is factorised is below 1: float32 is enough.

**The flow map.** The probability-flow ODE takes z at level s to the end of its path, which for the posterior N(m, C)
given y is f(z) = m + (C / (C + s^2))^(1/2) (z - m). For any c >= 0

    (c / (c + s^2))^(1/2) = 2 / pi  integral over theta from 0 to pi / 2 of  c / (c + s^2 sin(theta)^2),

so that f(z) is the mean over theta of the posterior means g(z, s sin(theta)) at lower levels: no root is taken of C,
whatever it is made of. With tan(theta) = e^w the integrand is analytic for |Im w| < pi / 2, and the sum over w in steps
of h is off by a share of 4 exp(-pi^2 / h) at most (Trefethen & Weideman, SIAM Review 2014).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

#: Cholesky factors of systems, `(U, K, K)`, or one by one, where a copy of all would take longer than to solve them.
Factors = Tensor | Sequence[Tensor]
#: What training solves for once: the system of a mask, an error and a level, or all that an observation says.
Kept = Literal["systems", "observations"]
#: The mean of x0 `(B, 2, H, W)`, and the mean variance of its error `(B,)`.
MeanVariance = tuple[Tensor, Tensor]


class Modes(nn.Module, ABC):
    """A Gaussian field known by its modes. Its buffers take the size of what is loaded: the data decide on the number.

    `self(z, s, y, observed, error, valid)` is the posterior:

    Arguments:
        z: The noisy field `(B, 2, H, W)`, 0 outside the domain.
        s: The standard deviation of its noise, `(B,)`.
        y: The measured values `(B, 2, H, W)`, 0 where there are none.
        observed: The measured cells, boolean `(B, 1, H, W)`.
        error: Their errors, `(B, C, H, W)` as `ellipses.py` has them.
        valid: The cells of the domain, boolean `(B, 1, H, W)`.
    """

    #: Whether all cells of the rectangle must belong to the domain.
    fills_domain: bool = False
    #: What is solved for once in training and serves many samples: see `training/reuse.py`.
    keeps: Kept = "systems"
    #: Whether it has draws, see `draw`.
    draws: bool = False
    #: The largest fields that it takes, `(H, W)`; None for those of its own size alone.
    largest: tuple[int, int] | None = None
    #: Random vectors that estimate the trace of the posterior covariance, to a few hundredths.
    PROBES = 16
    #: Levels that the flow map takes the mean over.
    NODES = 11
    #: Systems that are remembered in training, at most; a flow map asks for more.
    SYSTEMS = 128

    def __init__(self) -> None:
        super().__init__()
        self.solved: dict[bytes, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def forward(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> MeanVariance:
        """See the class."""

    def flow(self, z: Tensor, s: Tensor, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> Tensor:
        """Returns the ends of the paths of the probability-flow ODE through z at levels s, `(B, 2, H, W)`; see the top.

        Arguments are those of the posterior.
        """
        levels, weights = (part.to(s.dtype) for part in quadrature(s.double(), self.NODES))
        count = len(levels)
        self.SYSTEMS = max(self.SYSTEMS, 64 * count)  # of 32 samples at two levels
        parts = (part.expand(len(z), *part.shape[1:]) for part in (z, y, observed, error, valid))
        z, *known = (part.repeat(count, *(1,) * (part.ndim - 1)) for part in parts)
        means, _ = self(z, levels.flatten(), *known)
        return torch.einsum("qb,qb...->b...", weights, means.unflatten(0, levels.shape))

    def prepare(self, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> None:
        """Solves for observations that will be asked for, shapes as for the posterior; here none is remembered."""

    def draw(self, noise: Tensor, leaked: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a draw of the field without data, and what its measurements see, `(B, 2, H, W)` both.

        `self` is the exact posterior of the draw given what is seen and an error of the measurements.

        Arguments:
            noise: Unit normal noise, `(B, 2, H, W)`; the draw is linear in it.
            leaked: Other such noise, of what `self` counts as an error of the measurements.
            observed: The measured cells, boolean `(B, 1, H, W)`.

        Raises:
            NotImplementedError: The field has no draws.
        """
        raise NotImplementedError(f"{type(self).__name__} has no draws")

    def whiten(self, z: Tensor, s: Tensor, valid: Tensor) -> Tensor:
        """Returns (S + s^2)^(-1/2) z, S the covariance of the field in the cells `valid`, `(B, 2, H, W)`.

        Raises:
            NotImplementedError: The eigenvalues of the field are not known.
        """
        raise NotImplementedError(f"{type(self).__name__} has no eigenvalues")

    def log_determinant(self, s: Tensor, valid: Tensor) -> Tensor:
        """Returns ln det(S + s^2), `(B,)` in float64; see `whiten`."""
        raise NotImplementedError(f"{type(self).__name__} has no eigenvalues")

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # Every validation loads averages and what they are of: the same field, of which all is remembered.
        before = {name: buffer.clone() for name, buffer in self.named_buffers(recurse=False)}
        for name, buffer in before.items():
            if (given := state.get(prefix + name)) is not None and given.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(given.shape))
        super()._load_from_state_dict(state, prefix, *rest)
        if not all(torch.equal(buffer, before[name]) for name, buffer in self.named_buffers(recurse=False)):
            self._forget()

    def _forget(self) -> None:
        """Drops all that follows from another field."""
        self.solved = {}

    def systems(
        self, rows: Tensor, solve: Callable[[Tensor], tuple[Factors, Tensor]], seen: bytes = b""
    ) -> tuple[Factors, Tensor]:
        """Returns the factors, `(K, K)`, and the trace `(U,)` of the system of every row `(U, n)`, by `solve(rows)`.

        Training on a CPU comes back to the same systems (`training/reuse.py`), and remembers them. `seen` tells those
        of modes that were turned from others.
        """
        if not self.training or rows.device.type != "cpu":
            return solve(rows)
        keys = [hashlib.sha256(seen + row.numpy().tobytes()).digest() for row in rows]
        new = [number for number, key in enumerate(keys) if key not in self.solved]
        if new:
            self.solved |= zip((keys[number] for number in new), zip(*solve(rows[new]), strict=True), strict=True)
        found = {key: self.solved.pop(key) for key in keys}
        self.solved |= found  # those used last are last
        for old in list(self.solved)[: -max(self.SYSTEMS, len(found))]:
            del self.solved[old]
        factors, traces = zip(*found.values(), strict=True)
        return factors, torch.stack(traces)

    @staticmethod
    def factorised(gram: Tensor, variances: Tensor) -> Tensor:
        """Returns the Cholesky factor of every system, `(U, K, K)`.

        Arguments:
            gram: V^T w V of every system, `(U, K, K)`; it is overwritten.
            variances: The diagonal of L, `(K,)`.
        """
        d = variances.sqrt()
        gram.mul_(d[:, None]).mul_(d).diagonal(dim1=1, dim2=2).add_(1.0)
        return torch.linalg.cholesky(gram)

    @staticmethod
    def solve(factors: Factors, variances: Tensor, right: Tensor, which: Tensor | None) -> Tensor:
        """Returns the posterior mean of the coefficients, `(B, K)`.

        Arguments:
            factors: Of every system, `(K, K)`.
            variances: The diagonal of L, `(K,)`.
            right: V^T w of the data, `(B, K)`.
            which: The system of each sample, `(B,)`; None where each has its own.
        """
        d = variances.sqrt()
        if isinstance(factors, Tensor) and which is None and right.device.type != "cpu":
            return torch.cholesky_solve((d * right)[..., None], factors)[..., 0] * d
        which = torch.arange(len(right)) if which is None else which
        out = torch.empty_like(right)
        # One after another, and triangles as they are: a copy of a factor takes longer than to solve its system.
        for number, factor in enumerate(factors):
            own = which == number
            half = torch.linalg.solve_triangular(factor, (d * right[own]).mT, upper=False)
            out[own] = torch.linalg.solve_triangular(factor.mT, half, upper=True).mT * d
        return out

    @classmethod
    def trace(cls, factor: Tensor, variances: Tensor) -> Tensor:
        """Returns the trace of the posterior covariance of the coefficients, estimated to a few hundredths, `(U,)`."""
        d = variances.sqrt()
        probes = d[:, None] * signs(len(d), cls.PROBES, d.dtype, d.device)
        half = torch.linalg.solve_triangular(factor, probes.expand(len(factor), -1, -1), upper=False)
        return half.square().sum(dim=(1, 2)) / cls.PROBES


@lru_cache(maxsize=8)
def signs(n: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns random signs `(n, count)`, always the same: a posterior has the same spread whenever it is asked for."""
    drawn = torch.randint(2, (n, count), generator=torch.Generator().manual_seed(0))
    return (2 * drawn - 1).to(device, dtype)


def quadrature(s: Tensor, nodes: int, low: float = 0.01, top: float = 2.5) -> tuple[Tensor, Tensor]:
    """Returns levels and weights, `(nodes, B)`, of the mean over s sin(theta), theta even in [0, pi / 2].

    See the top of this module. What lies below the first node and beyond the last counts with these.

    Arguments:
        s: The levels, `(B,)`.
        nodes: Their number, 2 or more.
        low: The first level over the smaller of s and 1: a deviation that the field is not resolved below.
        top: w of the last node, which stands for s itself.
    """
    first = (low * s.clamp(max=1.0) / s).log()
    h = (top - first) / (nodes - 1)
    w = first + h * torch.arange(nodes, dtype=s.dtype, device=s.device)[:, None]
    weights = h / (math.pi * w.cosh())
    weights[0] += 2 * h * first.exp() / (math.pi * h.expm1())
    weights[-1] = 1 - weights[:-1].sum(dim=0)
    levels = s * (1 + (-2 * w).exp()).rsqrt()
    levels[-1] = s
    return levels, weights


def least(variances: Tensor) -> Tensor:
    """Returns the least variance of a measurement that rounding leaves room for beside the variances of the modes."""
    return 4 * torch.finfo(variances.dtype).eps * variances.max()


def alike(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the different rows of `(B, n)`, and which of them each is, `(B,)`; None where all stand for themselves.

    So they do on a GPU, which would have to wait for the number of rows, and solves many systems as fast as few.
    """
    if rows.device.type != "cpu":
        return rows, None
    kinds, which = torch.unique(rows, dim=0, return_inverse=True)
    return (rows, None) if len(kinds) == len(rows) else (kinds, which)


def of_samples(values: Tensor, which: Tensor | None) -> Tensor:
    """Returns what belongs to each sample, `(B,)`, of a value for every system, `(U,)`; see `alike`."""
    return values if which is None else values[which]
