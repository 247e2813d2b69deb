"""How a denoiser is made of the raw output of a network.

Whatever network F there is, the denoiser is

    D(z, s, y) = skip + out F(channels; noise),

with a field `skip` that needs no network, and the number `out` by which the output counts. Which they are is the
parametrization. That of a plain network has scalars alone (Karras et al., NeurIPS 2022, equation 7),

    skip = c_skip x_t,    out = c_out,    channels = [c_in x_t, what is known],    noise = c_noise.

A network that builds on an estimate of its own (`Residual`, `GaussianResidual`) is a parametrization itself. Training
minimises the squared error of F, which is that of D with the weight 1 / out^2.

Shapes are those of snapshots. Sequences have a further axis, of the frames, after that of the batch: `(B, T, 2, H, W)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vecfield_diffusion.axes import column
from vecfield_diffusion.models.gate import Gate
from vecfield_diffusion.models.modes import Kept
from vecfield_diffusion.models.reference import GaussianReference


class Conditions(NamedTuple):
    """What a sample is conditioned on, as tensors in normalised units.

    Arguments:
        y: The measured values `(B, 2, H, W)`, 0 where there are none.
        observed: The measured cells, boolean `(B, 1, H, W)`.
        error: Their errors, `(B, C, H, W)` as `ellipses.py` has them, 0 where there are none.
        valid: The cells of the domain, boolean `(B, 1, H, W)`.
        channels: All of this and what else the network is conditioned on, `(B, C, H, W)`.
        mean: The mean of the field given what is known, `(B, 2, H, W)`, of networks that predict it.
        ends: Whether the network gives the ends of paths, one field each, and not the mean of all.
    """

    y: Tensor
    observed: Tensor
    error: Tensor
    valid: Tensor
    channels: Tensor
    mean: Tensor | None = None
    ends: bool = False


class Scalars(NamedTuple):
    """The preconditioning of a formulation at levels s, `(B,)` each, in the variable z = x_t / alpha."""

    c_in: Tensor
    c_noise: Tensor
    c_out: Tensor
    c_skip: Tensor


class Preconditioned(NamedTuple):
    """`skip` `(B, 2, H, W)`, `out` `(B,)`, `channels` `(B, C, H, W)` and `noise` `(B,)`; see the top of this module."""

    skip: Tensor
    out: Tensor
    channels: Tensor
    noise: Tensor


class Parametrization:
    """The parametrization by scalars, of a network that has none of its own; and the base of all others."""

    #: Whether the network predicts the mean of the field given what is known, see `mean`.
    predicts_mean: bool = False
    #: Whether the denoiser is the gradient of an energy, see `energy`.
    has_energy: bool = False
    #: Cells along each axis of the squares over which a network estimates the averaged field as well; 0 for none. Its
    #: output then has two more channels, that of the average copied to the cells.
    coarse_cells: int = 0
    #: Whether torch.export can write the denoiser as a program.
    traceable: bool = True
    #: Why the network does not go with a formulation without noise; empty where it does.
    needs_noise: str = ""

    @property
    def gate(self) -> Gate | None:
        """The factor on the output by noise level, of a network whose `skip` is an estimate without it; else None."""
        return None

    @property
    def fills_domain(self) -> bool:
        """Whether the network works only where all cells of the rectangle belong to the domain."""
        return False

    @property
    def largest(self) -> tuple[int, int] | None:
        """The largest fields that the network takes whole, `(H, W)`; None for those that it was trained on alone."""
        return None

    @property
    def keeps(self) -> Kept | None:
        """What is solved for once and serves many samples, so that training uses it several times; None for nothing."""
        return None

    @property
    def tracked(self) -> Sequence[Tensor]:
        """What `track` changes, in place and linearly in its argument: means over parts are those of their data."""
        return ()

    def learn(self, field: Callable[[], Any]) -> None:
        """Takes in the Gaussian field with the covariance of the training data, `field()`; here none is needed."""

    def prepare(self, known: Conditions) -> None:
        """Takes in observations that training will come back to; here nothing is solved for."""

    def reference(self, y: Tensor, observed: Tensor, error: Tensor, valid: Tensor) -> GaussianReference | None:
        """Returns a Gaussian law that resembles that of the fields given an observation; None where none is known.

        Arguments are those of `GaussianReference`.
        """
        return None

    def track(self, square: Tensor) -> None:
        """Takes in the mean square of x0 - `mean` over a training batch; here nothing depends on it."""

    def mean(self, channels: Tensor) -> Tensor:
        """Returns the mean of the field given what is known, `(B, 2, H, W)` from `(B, C, H, W)`.

        Raises:
            NotImplementedError: The network does not predict it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not predict the mean")

    def precondition(
        self, z: Tensor, s: Tensor, known: Conditions, scalars: Callable[[Tensor], Scalars]
    ) -> Preconditioned:
        """Returns what makes the denoiser of the network.

        Arguments:
            z: The noisy fields `(B, 2, H, W)`, 0 outside the domain.
            s: Their noise levels, `(B,)`.
            known: What the samples are conditioned on.
            scalars: The preconditioning of the formulation at given levels `(B,)`.
        """
        c = scalars(s)
        # c_in scales the noisy state alone: at high noise it would drown the observations.
        channels = torch.cat([column(c.c_in, z) * z, known.channels], dim=-3)
        return Preconditioned(column(c.c_skip, z) * z, c.c_out, channels, c.c_noise)

    def energy(
        self, z: Tensor, s: Tensor, known: Conditions, scalars: Callable[[Tensor], Scalars], top: Tensor
    ) -> Tensor:
        """Returns the energy in nats, `(B,)` in float64, whose gradient by `z` is (z - D) / s^2.

        Arguments:
            z: As for `precondition`.
            s: As for `precondition`.
            known: As for `precondition`.
            scalars: As for `precondition`.
            top: The largest level of the formulation, `(1,)`, at which fields are as good as noise.

        Raises:
            NotImplementedError: The denoiser is not the gradient of one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no energy")

    def weight(self, s: Tensor, out: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the weight of the squared error of D in the loss, `(B,)`, at levels `s` in float64.

        Arguments:
            s: The noise levels, `(B,)`.
            out: `out` at these levels.
            plain: The weight of the formulation at given levels, 1 / c_out^2 for a formulation that has no other.
        """
        return plain(s)


#: The parametrization of every network that is none itself.
BY_SCALARS = Parametrization()
