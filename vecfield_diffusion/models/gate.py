"""How far the output of a network counts beside an estimate that stands without it, by noise level.

A network that builds on an estimate g of its own may be worse than g where it has learned its few training fields by
heart. Its denoiser is therefore

    D = g + a(s) c F,    0 <= a(s) <= 1,

with the factor a that validation asks for (`training/gating.py`): linear in ln s between knots, constant beyond them.
With a = 0 the denoiser is g, and with a = 1 that of a network without a gate, to the bit. In training a is 1, or a
network that was found of no use could never become of any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Below this a factor is as good as none.
LITTLE = 0.01


class Gate(nn.Module):
    """A factor in [0, 1] by noise level; 1 at all levels until it is set.

    Attributes:
        levels: ln s of the knots, ascending, `(K,)`.
        factors: The factors there, `(K,)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("levels", torch.zeros(1))
        self.register_buffer("factors", torch.ones(1))

    @property
    def fitted(self) -> bool:
        """Whether the factors were ever set."""
        return len(self.levels) > 1

    def forward(self, s: Tensor) -> Tensor:
        """Returns the factors at noise levels `s`, `(B,)`; all 1 in training."""
        if self.training or not self.fitted:
            return torch.ones_like(s)
        below, share = places(s.log(), self.levels)
        factors = self.factors.to(s.dtype)
        return factors[below].lerp(factors[below + 1], share)

    def set(self, levels: Tensor, factors: Tensor) -> None:
        """Takes the factors `(K,)` at `levels`, ln s, ascending, two or more.

        Raises:
            ValueError: A factor outside [0, 1], or levels that do not ascend.
        """
        if not ((factors >= 0) & (factors <= 1)).all():
            raise ValueError(f"factors must be in [0, 1], got {factors.tolist()}")
        if len(levels) < 2 or levels.shape != factors.shape or not (levels.diff() > 0).all():
            raise ValueError(f"levels must be two or more, ascending, one for each factor, got {levels.tolist()}")
        self.levels, self.factors = (values.to(self.levels) for values in (levels, factors))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within the block all factors are 1."""
        before = self.training
        self.train()
        try:
            yield
        finally:
            self.train(before)

    def sentence(self) -> str:
        """Returns in words where the network helps; empty where the factors were never set."""
        if not self.fitted:
            return ""
        if bool((self.factors < LITTLE).all()):
            return (
                "the network helps at no noise level: validation is no better than with its Gaussian part alone, which "
                "is what the denoiser gives (factor 0)"
            )
        levels = (self.levels.exp().tolist(), self.factors.tolist())
        said = ", ".join(f"{factor:.2f} at {s:.2g}" for s, factor in zip(*levels, strict=True))
        used = self.levels[self.factors >= LITTLE].exp()
        return (
            f"the network helps at noise levels {used[0]:.2g} to {used[-1]:.2g} std; factors on its output by "
            f"validation: {said}"
        )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes as many knots as there are; a state of before there were any has the factor 1."""
        fresh = Gate()
        for name, value in fresh.state_dict().items():
            stored = state.setdefault(prefix + name, value)
            setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state, prefix, *rest)


def places(x: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where values `x` lie among `knots`, ascending: the knot below, and the share of the way to the next.

    Values beyond the ends are at the ends.
    """
    knots = knots.to(x.dtype)
    x = x.clamp(knots[0], knots[-1])
    below = (torch.searchsorted(knots, x.contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
    return below, ((x - knots[below]) / (knots[below + 1] - knots[below])).clamp(0, 1)


def hats(x: Tensor, knots: Tensor) -> Tensor:
    """Returns the weights `(N, K)` with which knots enter the linear interpolation at `x`, `(N,)`; rows add up to 1."""
    below, share = places(x, knots)
    weights = x.new_zeros(len(x), len(knots))
    weights.scatter_(1, below[:, None], 1 - share[:, None])
    return weights.scatter_(1, below[:, None] + 1, share[:, None])
