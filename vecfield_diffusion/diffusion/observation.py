"""What is known about a field: the values, where they were measured, how well, and where the domain is.

An observation conditions a sample: `y = x0 + sigma_y eps` on the cells where `observed` is True. It is held in
normalised units on the grid, so that a network can read it as channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vecfield_diffusion.axes import column


@dataclass(frozen=True)
class Observation:
    """A batch of observations of snapshots, as the shapes below have it.

    Of sequences, all have a further axis after that of the batch: the frames, T or 1 long. A missing frame is one of
    which nothing is observed.

    Arguments:
        y: The measured values, normalised, `(B, 2, H, W)`; anything, NaN included, where not observed.
        observed: The cells that were measured, boolean `(B, 1, H, W)`.
        sigma_y: The standard deviation of the measurement error, normalised: one a sample `(B, 1, 1, 1)`, one a cell
            `(B, 1, H, W)`, or one a value `(B, 2, H, W)`; with `(B, 3, H, W)` the root of the covariance of both
            components of a cell (`ellipses.py`).
        valid: The cells of the domain, boolean `(B, 1, H, W)`.
        background: A first guess of the field, normalised, `(B, 2, H, W)`, for formulations that are coupled to one.
        single: Values measured where the other component was not, boolean `(B, 2, H, W)`. A network does not see them;
            they count as linear observations.
        context: What a network is conditioned on beside the observation, such as earlier fields, `(B, C, H, W)`.
    """

    y: Tensor
    observed: Tensor
    sigma_y: Tensor
    valid: Tensor
    background: Tensor | None = None
    single: Tensor | None = None
    context: Tensor | None = None

    #: The number of channels that `channels` makes without background and context.
    CHANNELS = 5

    @classmethod
    def none(cls, n: int, valid: Tensor, dtype: torch.dtype = torch.float32, frames: int = 1) -> Observation:
        """Nothing observed on the domain `valid` `(H, W)`: what an unconditional sample is conditioned on.

        Of `n` snapshots, or with `frames` above 1 of `n` sequences.
        """
        lead = (n,) if frames == 1 else (n, frames)
        valid = valid.expand(*lead, 1, *valid.shape[-2:])
        zero = column(torch.zeros(n, dtype=dtype, device=valid.device), valid)
        return cls(zero.expand(*lead, 2, *valid.shape[-2:]), torch.zeros_like(valid), zero, valid)

    def channels(self) -> Tensor:
        """Returns what a network sees, `(B, 5, H, W)`: the values, observed, valid, the error; 0 where not observed.

        Two more follow with a background, then those of the context.
        """
        # Select, never multiply: 0 * NaN is NaN.
        y = torch.where(self.observed, self.y, 0.0)
        error = torch.where(self.observed, self.error, 0.0)
        parts = [y, self.observed.to(y.dtype), self.valid.to(y.dtype), error, self.background, self.context]
        return torch.cat([part for part in parts if part is not None], dim=-3)

    @property
    def error(self) -> Tensor:
        """`sigma_y` with one channel: the root mean square of both components where they differ."""
        one = self.sigma_y.shape[-3] == 1
        return self.sigma_y if one else (self.sigma_y.square().sum(dim=-3, keepdim=True) / 2).sqrt()

    @property
    def known(self) -> Tensor:
        """The measured values, boolean `(B, 1, H, W)`, or `(B, 2, H, W)` where some components are missing."""
        return self.observed if self.single is None else self.observed | self.single

    def forget(self, samples: Tensor) -> Observation:
        """Returns the same, with nothing observed in the samples marked True in `(B,)`; the context stays."""
        samples = column(samples, self.y)
        background = None if self.background is None else torch.where(samples, 0.0, self.background)
        single = None if self.single is None else self.single & ~samples
        return replace(self, observed=self.observed & ~samples, background=background, single=single)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Observation:
        """Returns the observation with `function` applied to each of its tensors."""
        values = (getattr(self, field.name) for field in fields(self))
        return Observation(*(None if value is None else function(value) for value in values))

    def nothing(self) -> Observation:
        """Returns the same with nothing observed in any sample: what the unconditional prior is conditioned on."""
        return self.forget(torch.ones(len(self), dtype=torch.bool, device=self.valid.device))

    def concatenate(self, other: Observation) -> Observation:
        """Returns the samples of both, one after the other; tensors of the same shapes but for the batch."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Observation(*(None if first is None else torch.cat([first, second]) for first, second in pairs))

    def to(self, device: torch.device | str) -> Observation:
        """Returns the same on `device`."""
        return self.apply(lambda tensor: tensor.to(device))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: slice | Tensor) -> Observation:
        """The samples that `index` selects."""
        return self.apply(lambda tensor: tensor[index])
