"""Networks that are the gradient of an energy.

A network F, whatever it is, makes a potential of the scaled noisy field x = c_in z,

    inner      phi = <x, F(x, known; noise)>
    squares    phi = |x|^2 / 2 - |x - F|^2 / 2 = <x, F> - |F|^2 / 2

and what comes out is its gradient by x (Salimans & Ho, EBM workshop at ICLR 2021; Du et al., ICML 2023). A denoiser by
scalars is then a gradient field for every formulation and prediction, D = c_skip z + c_out grad phi, and with d values
in the domain

    U(z, s) = (|z|^2 / 2 - c_skip |z|^2 / 2 - (c_out / c_in) phi(c_in z)) / s^2
              + d / 2 ln(2 pi (1 + s^2)) + d (a(ln s) - a(ln s_max)),

an energy in nats whose gradient is minus the score, -grad U = (D - z) / s^2, exactly: the Jacobian of D is symmetric,
and the integral of the score around any loop is 0. The last line does not depend on z. It makes U = -ln p of white
noise where the network adds nothing; a is learned by `diffusion/dual.py` alone, without which energies of
different levels, observations or models have free constants between them.

Of several networks, number k has the field averaged over squares of 2^k cells, and the potentials are added up, each
times 4^k so that its gradient is as large as F; averaging is linear, and autograd brings the gradient back by its
adjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vecfield_diffusion.axes import by_frame, column, total
from vecfield_diffusion.models.base import Conditions, Parametrization, Scalars
from vecfield_diffusion.models.dit import DiT
from vecfield_diffusion.models.layers import FourierEmbedding
from vecfield_diffusion.models.twice import twice_differentiable
from vecfield_diffusion.models.unet import Sizes, Time, UNet

FIELD = 2  # channels of the noisy field; what is known follows
#: How a potential is made of a network; see the module.
Form = Literal["inner", "squares"]
#: Features of the noise level that the normaliser is made of.
FEATURES = 64
#: The range of ln s, about.
SPAN = 20.0


class Energy(nn.Module, Parametrization):
    """`(B, C, H, W)` and a number `(B,)` to the gradient of a potential, `(B, 2, H, W)`; and the energy of a denoiser.

    Further channels of the output of the first network, such as those of a learned variance, are passed on.

    Arguments:
        networks: `(x (B, C, H, W), noise (B,)) -> (B, 2, H, W)`, or of sequences; number k is that of scale 2^k.
        form: How the potential is made of them; see the module.

    Raises:
        ValueError: Another form, or no network.
    """

    has_energy = True
    needs_noise = "the energy of a model is that of noisy fields, which diffusion=regression has none of"

    def __init__(self, networks: Sequence[nn.Module], form: Form = "inner") -> None:
        super().__init__()
        if form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form}")
        if not networks:
            raise ValueError("networks must be one or more, got none")
        self.networks, self.form = nn.ModuleList(networks), form
        self.embed = FourierEmbedding(FEATURES, SPAN)
        self.constant = nn.Linear(FEATURES, 1)
        nn.init.zeros_(self.constant.weight)
        nn.init.zeros_(self.constant.bias)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Returns the gradient of the potential by the field, and whatever further channels there are.

        With gradients enabled it has a graph, and can be differentiated once more.
        """
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            field = x.narrow(-3, 0, FIELD)
            field = field if again and field.requires_grad else field.detach().requires_grad_()
            phi, beside = self.potential(field, x.narrow(-3, FIELD, x.shape[-3] - FIELD), noise, again)
            (gradient,) = torch.autograd.grad(phi.sum(), field, create_graph=again)
        if not beside.numel():
            return gradient
        return torch.cat([gradient, (beside if again else beside.detach()).to(gradient.dtype)], dim=-3)

    def potential(self, field: Tensor, known: Tensor, noise: Tensor, again: bool = True) -> tuple[Tensor, Tensor]:
        """Returns phi, `(B,)` in float64, and the further channels of the output.

        Arguments:
            field: x, `(B, 2, H, W)`.
            known: The channels of what is known, `(B, C - 2, H, W)`.
            noise: What the networks are told of the level, `(B,)`.
            again: Whether the gradient is to be differentiated once more.
        """
        phi, beside = torch.zeros((), dtype=torch.float64, device=field.device), field[..., :0, :, :]
        with twice_differentiable() if again else nullcontext():
            for k, network in enumerate(self.networks):
                x, seen = (field, known) if k == 0 else (pool(field, 2**k), pool(known, 2**k))
                output = network(channels(x, seen), noise)
                phi = phi + 4**k * self.of_output(x, output.narrow(-3, 0, FIELD).to(x.dtype))
                beside = output.narrow(-3, FIELD, output.shape[-3] - FIELD) if k == 0 else beside
        return phi, beside

    def of_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Returns the potential `(B,)` that the output of one network makes."""
        return inner(x if self.form == "inner" else x - output / 2, output)

    def energy(
        self, z: Tensor, s: Tensor, known: Conditions, scalars: Callable[[Tensor], Scalars], top: Tensor
    ) -> Tensor:
        """See `Parametrization`."""
        c = scalars(s)
        phi, _ = self.potential(column(c.c_in, z) * z, known.channels, c.c_noise, torch.is_grad_enabled())
        square, wide = inner(z, z), s.double()
        quadratic = square / 2 - c.c_skip.double() * square / 2 - c.c_out.double() / c.c_in.double() * phi
        values = FIELD * total(known.valid.expand(*z.shape[:-3], 1, *z.shape[-2:])).double()
        level = (2 * torch.pi * (1 + wide.square())).log() / 2
        return quadratic / wide.square() + values * (level + self.normaliser(s, top))

    def normaliser(self, s: Tensor, top: Tensor) -> Tensor:
        """Returns a(ln s) - a(ln top), `(B,)` in float64."""
        here, there = (self.constant(self.embed(level.log()))[:, 0].double() for level in (s, top))
        return here - there


class UNetEnergy(Energy):
    """The energy that UNets make.

    Arguments:
        in_channels: Channels of the noisy field and of what is known, C.
        out_channels: 2, and those of a learned variance.
        periodic: Whether y and x close on themselves.
        form: How the potential is made of the output; see the module.
        scales: UNets, each on the field at half the resolution of the one before.
        dropout: See `UNet`.
        frames: See `UNet`.
        time: See `UNet`.
        sizes: See `UNet`.

    Raises:
        ValueError: Sizes that make no network; see `UNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        form: Form = "inner",
        scales: int = 1,
        dropout: float = 0.0,
        frames: int = 1,
        time: Time = "channels",
        **sizes: Unpack[Sizes],
    ) -> None:
        check_scales(scales)
        sizes |= dict(dropout=dropout, frames=frames, time=time)
        outputs = [out_channels] + [FIELD] * (scales - 1)
        super().__init__([UNet(in_channels, out, periodic, **sizes) for out in outputs], form)


class DiTEnergy(Energy):
    """The energy that transformers make.

    Arguments:
        in_channels: Channels of the noisy field and of what is known, C.
        out_channels: 2, and those of a learned variance.
        periodic: Whether y and x close on themselves.
        form: How the potential is made of the output; see the module.
        scales: Transformers, each on the field at half the resolution of the one before.
        width: See `DiT`.
        depth: See `DiT`.
        heads: See `DiT`.
        patch: See `DiT`.
        embedding: See `DiT`.
        dropout: See `DiT`.
        frames: See `DiT`.
        time: See `DiT`.

    Raises:
        ValueError: Sizes that make no network; see `DiT`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        form: Form = "inner",
        scales: int = 1,
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        patch: int = 4,
        embedding: int = 128,
        dropout: float = 0.0,
        frames: int = 1,
        time: Time = "channels",
    ) -> None:
        check_scales(scales)
        sizes = (width, depth, heads, patch, embedding, dropout, frames, time)
        outputs = [out_channels] + [FIELD] * (scales - 1)
        super().__init__([DiT(in_channels, out, periodic, *sizes) for out in outputs], form)


def check_scales(scales: int) -> None:
    """Raises ValueError for a number of scales that there cannot be."""
    if not 1 <= scales <= 8:
        raise ValueError(f"scales must be in [1, 8], got {scales}")


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Returns the inner product of each sample, `(B,)` in float64."""
    return total((a * b).double())


def pool(fields: Tensor, cells: int) -> Tensor:
    """Returns fields `(..., C, H, W)` averaged over squares of cells, those at the end over what there is."""
    return by_frame(lambda field: F.avg_pool2d(field, cells, ceil_mode=True), fields)


def channels(field: Tensor, known: Tensor) -> Tensor:
    """Returns both together, snapshots in the order of memory that convolutions are fastest with."""
    both = torch.cat([field, known], dim=-3)
    return both.contiguous(memory_format=torch.channels_last) if both.ndim == 4 else both
