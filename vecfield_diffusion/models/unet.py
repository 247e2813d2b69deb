"""A UNet for fields of any size: residual blocks at several resolutions, conditioned on the noise level.

Down the left side the field is halved and the channels grow, up the right side each block joins what the left side had
at its resolution (Ronneberger et al., MICCAI 2015; residual blocks with adaptive group normalisation as Dhariwal &
Nichol, NeurIPS 2021). The first layer may gather `patch` x `patch` cells into channels, so that a fine grid costs no
more than a coarse one. Sizes that the strides do not divide are padded inside and cropped again.

The frames of a sequence are the channels of one field, for which all layers are made (`time=channels`), or they share
the layers of a network of snapshots, and after the blocks of each resolution every cell attends along time
(`time=attention`). The latter begins as the network of snapshots, whose weights it can go on from.

It may commute with flips and quarter turns, and continue fields across walls by their mirror image: see
`models/equivariant.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vecfield_diffusion.models.equivariant import MIRRORS, commuting, continued, folded, vectors_of
from vecfield_diffusion.models.layers import Attention, Conv3x3, FourierEmbedding, TimeAttention, groups, zero
from vecfield_diffusion.models.symmetry import Action, Generator

#: How the frames of a sequence meet; see the module.
Time = Literal["channels", "attention"]
#: How a field goes on across walls: by zeros, or by its mirror image.
Walls = Literal["zero", "mirror"]
#: The most resolutions, and the most blocks at each and cells in a patch: beyond what any field or memory could fill.
RESOLUTIONS, LARGEST = 16, 100


class Sizes(TypedDict, total=False):
    """The arguments of `UNet` that a network which is made of some passes on to each as they are."""

    channels: list[int]
    blocks: int
    attention: list[int]
    embedding: int
    patch: int


class ResidualBlock(nn.Module):
    """Two convolutions with the noise level entering as scale and shift, added to a skip connection.

    Arguments:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        embedding: Features of the noise-level embedding.
        periodic: Whether y and x close on themselves.
        dropout: Probability of dropping a feature in training.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding: int, periodic: tuple[bool, bool], dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups(in_channels), in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels, periodic)
        self.modulate = nn.Linear(embedding, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups(out_channels), out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(Conv3x3(out_channels, out_channels, periodic))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1.of_silu(self.norm1(x))
        y = torch.addcmul(shift, self.norm2(y), 1 + scale)
        drops = self.training and self.dropout.p > 0
        return self.skip(x) + (self.conv2(self.dropout(F.silu(y))) if drops else self.conv2.of_silu(y))


class Halved(nn.Sequential):
    """Four cells gathered into channels and a layer on them, which is one convolution: 2x2 with a stride of 2."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self[1]
        return F.conv2d(x, layer.weight.view(len(layer.weight), -1, 2, 2), layer.bias, stride=2)


class UNet(nn.Module):
    """`(B, in_channels, H, W)` and a number `(B,)` to `(B, out_channels, H, W)`.

    Of sequences, with `frames` T above 1, `(B, T, in_channels, H, W)` to `(B, T, out_channels, H, W)`.

    Arguments:
        in_channels: Channels of the input: the field and what conditions it.
        out_channels: Channels of the output.
        periodic: Whether y and x close on themselves.
        channels: Channels at each resolution, each half the one before.
        blocks: Residual blocks at each resolution, on each side.
        attention: Which resolutions attend, by their index in `channels`; -1 is the coarsest.
        embedding: Features of the noise-level embedding.
        patch: Cells along each axis that the first layer gathers into one.
        dropout: Probability of dropping a feature in training.
        frames: The frames of a sequence; 1 for snapshots.
        time: How frames meet; see the module. Any number of frames may attend.
        equivariant: Symmetries that the network commutes with, and all that follow from them.
        walls: How a field goes on across walls: by zeros, or by its mirror image.
        mirrored: Whether y and x end at walls, for `walls=mirror`.

    Raises:
        ValueError: No resolutions, blocks or patch, attention at a resolution that does not exist, or channels that
            are no vectors where `equivariant` or `walls` asks for them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        channels: list[int] = (64, 96, 128),
        blocks: int = 2,
        attention: list[int] = (-1,),
        embedding: int = 256,
        patch: int = 1,
        dropout: float = 0.0,
        frames: int = 1,
        time: Time = "channels",
        equivariant: Sequence[Generator] = (),
        walls: Walls = "zero",
        mirrored: tuple[bool, bool] = (False, False),
    ) -> None:
        super().__init__()
        check_sizes(channels, blocks, attention, patch, dropout)
        check_time(frames, time)
        self.mirrored = mirrored if walls == "mirror" else (False, False)
        special = bool(equivariant) or any(self.mirrored)
        if special and out_channels != 2:
            raise ValueError("equivariant and walls=mirror go with a network of the mean alone, not a learned variance")
        vectors = vectors_of(in_channels, frames if time == "channels" else 1) if special else []
        self.frames, self.folds = frames, frames > 1 and time == "channels"
        if self.folds:
            in_channels, out_channels = frames * in_channels, frames * out_channels
        attend = {index % len(channels) for index in attention}
        periodic = tuple(closed or wall for closed, wall in zip(periodic, self.mirrored, strict=True))
        self.periodic, self.patch, self.stride = periodic, patch, patch * 2 ** (len(channels) - 1)

        def stage(widths: list[tuple[int, int]], level: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleList(
                    [
                        ResidualBlock(a, b, embedding, periodic, dropout),
                        Attention(b) if level in attend else nn.Identity(),
                    ]
                )
                for a, b in widths
            )

        self.embed = FourierEmbedding(embedding)
        self.stem = Conv3x3(in_channels * patch**2, channels[0], periodic)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        for level, c in enumerate(channels):
            self.down.append(stage([(c, c)] * blocks, level))
            self.up.append(stage([(2 * c, c)] + [(c, c)] * (blocks - 1), level))
        for fine, coarse in zip(channels, channels[1:], strict=False):
            self.shrink.append(Halved(nn.PixelUnshuffle(2), nn.Conv2d(4 * fine, coarse, 1)))
            self.grow.append(nn.Sequential(nn.Conv2d(coarse, 4 * fine, 1), nn.PixelShuffle(2)))
        self.head = nn.Sequential(
            nn.GroupNorm(groups(channels[0]), channels[0]),
            nn.SiLU(),
            zero(Conv3x3(channels[0], out_channels * patch**2, periodic)),
        )
        attending = channels if frames > 1 and not self.folds else ()
        self.time_down, self.time_up = (nn.ModuleList(TimeAttention(c, frames) for c in attending) for _ in range(2))
        pairs = range(0, out_channels, 2)
        self.of_input, self.of_output = (
            Action.of_vectors(MIRRORS, *given) for given in ((in_channels, vectors), (out_channels, pairs))
        )
        self.commuting = commuting(self, equivariant, vectors, len(pairs)) if equivariant else None
        if self.commuting is not None and self.commuting.turns and (periodic[0] != periodic[1]):
            raise ValueError("equivariant with turns or transposes needs the same boundary along x and y")

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        if self.commuting is None:
            return self.of_sequences(x, noise)
        weights = {f"network.{name}": value for name, value in self.commuting.weights(self).items()}
        return functional_call(Raw(self), weights, (x, noise))

    def of_sequences(self, x: Tensor, noise: Tensor) -> Tensor:
        """Returns the output of snapshots or sequences with the weights as they are."""
        if torch.is_autocast_enabled(x.device.type):  # as the first layer takes it: half as much to move until then
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.frames == 1:
            return self.of_fields(x, noise)
        samples, frames = x.shape[:2]
        if self.folds:
            return self.of_fields(last(x.flatten(1, 2)), noise).unflatten(1, (frames, -1))
        folded = self.of_fields(last(x.flatten(0, 1)), noise.repeat_interleave(frames), frames)
        return folded.unflatten(0, (samples, frames))

    def of_fields(self, x: Tensor, noise: Tensor, frames: int = 1) -> Tensor:
        """Returns the output of fields `(N, C, H, W)`, `frames` after one another being those of one sequence."""
        x = continued(x, self.mirrored, self.of_input)
        h, w = x.shape[-2:]
        embedding = self.embed(noise)
        x, (top, left) = self.pad(x)
        x = self.first(x)
        skips = []
        for level, blocks in enumerate(self.down):
            x = self.shrink[level - 1](x) if level else x
            for block, attend in blocks:
                x = attend(block(x, embedding))
            x = self.time_down[level](x, frames) if self.time_down else x
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.grow[level](x) if level < len(self.grow) else x
            x = torch.cat([x, skips[level]], dim=1)
            for block, attend in self.up[level]:
                x = attend(block(x, embedding))
            x = self.time_up[level](x, frames) if self.time_up else x
        out = F.pixel_shuffle(self.head(x), self.patch)[..., top : top + h, left : left + w]
        return folded(out, self.mirrored, self.of_output)

    def first(self, x: Tensor) -> Tensor:
        """Returns the stem of patches gathered into channels: a convolution by their stride, which moves no cell."""
        cells = self.patch
        if cells == 1:
            return self.stem(x)
        beyond = [cells * closed for closed in self.periodic]
        if any(beyond):
            x = last(F.pad(x, (beyond[1], beyond[1], beyond[0], beyond[0]), mode="circular"))
        kernel, padding = F.pixel_shuffle(self.stem.weight, cells), [cells - wrapped for wrapped in beyond]
        return F.conv2d(x, kernel, self.stem.bias, stride=cells, padding=padding)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pads both axes to multiples of the stride, wrapped on both sides where periodic, else with zeros at the end.

        Returns:
            The field, and where its first row and column have gone.
        """
        start = [0, 0]
        for i, periodic in enumerate(self.periodic):
            axis, size, more = i - 2, x.shape[i - 2], -x.shape[i - 2] % self.stride
            if more and periodic:
                start[i] = more // 2
                x = x.index_select(axis, (torch.arange(size + more, device=x.device) - start[i]) % size)
            elif more:
                x = F.pad(x, (0, 0, 0, more) if axis == -2 else (0, more))
        return x, (start[0], start[1])


class Raw(nn.Module):
    """A UNet with whatever weights it is given."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.network.of_sequences(x, noise)


def check_sizes(channels: list[int], blocks: int, attention: list[int], patch: int, dropout: float) -> None:
    """Raises ValueError for sizes that make no network, before anything is made of them."""
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must name at least one positive width, got {list(channels)[:8]}")
    if len(channels) > RESOLUTIONS:
        raise ValueError(
            f"channels must name at most {RESOLUTIONS} resolutions, got {len(channels)}: each is half the one before"
        )
    for name, value in (("blocks", blocks), ("patch", patch)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
        if value > LARGEST:
            raise ValueError(f"{name} must be <= {LARGEST}, got {value}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    for index in attention:
        if not -len(channels) <= index < len(channels):
            raise ValueError(f"attention names resolution {index}, but channels has {len(channels)}")


def check_time(frames: int, time: Time) -> None:
    """Raises ValueError for a number of frames, or a way in which they meet, that there is not."""
    if not 1 <= frames <= LARGEST:
        raise ValueError(f"frames must be in [1, {LARGEST}], got {frames}")
    if time not in get_args(Time):
        raise ValueError(f"time must be one of {', '.join(get_args(Time))}, got {time}")


def last(x: Tensor) -> Tensor:
    """Returns `(N, C, H, W)` with the channels last in memory, which convolutions are fastest with."""
    return x.contiguous(memory_format=torch.channels_last)


def load_snapshots(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the weights of a network of snapshots into one of sequences, which then begins as that network.

    Arguments:
        network: One whose UNets have `time=attention`; their layers along time stay the identity that they start as.
        state: The `state_dict` of the same network with `frames=1`.

    Raises:
        ValueError: Weights that the network has no place for, or others that are lacking.
    """
    layers = (name for name, module in network.named_modules() if isinstance(module, TimeAttention))
    along = tuple(f"{name}." for name in layers)
    own = network.state_dict().keys()
    lacking = sorted(name for name in own - state.keys() if not name.startswith(along))
    beyond = sorted(state.keys() - own)
    if not along or lacking or beyond:
        fault = f"{(lacking + beyond)[0]} in one of both alone" if lacking or beyond else "no layers along time"
        raise ValueError(f"a network of snapshots goes on with model.time=attention and the same sizes, got {fault}")
    network.load_state_dict(state, strict=False)
