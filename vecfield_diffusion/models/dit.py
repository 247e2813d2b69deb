"""A transformer for fields of any size: squares of cells attend to one another, conditioned on the noise level.

Each `patch` x `patch` cells are one token; blocks of attention and of two layers on each token follow one another, and
the noise level scales, shifts and weighs what each adds (adaptive norm that starts as zero: Peebles & Xie, ICCV 2023).
The first and the last layer look at the neighbours of a patch, too, which tells where the border is and leaves no
seams. What a token takes from another depends on how far apart they are (rotary embeddings, Su et al., 2021), so that
a network serves other sizes of field than its own; along a periodic axis the angles close on themselves, and a shift
by whole patches shifts the output.

The frames of a sequence are the channels of one field (`time=channels`), or the tokens of all frames attend to one
another and each frame has what it is conditioned on (`time=attention`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vecfield_diffusion.models.foreign import margins, pad
from vecfield_diffusion.models.layers import Conv3x3, FourierEmbedding, zero
from vecfield_diffusion.models.unet import LARGEST, Time, check_time, last

#: The longest period of the angles along an axis that is not periodic, over that of a step, and 2 pi.
SPAN = 100.0
#: The most blocks and the most features: beyond what any field or memory could fill.
DEEPEST, WIDEST = 100, 16384


class TransformerBlock(nn.Module):
    """Attention over all tokens, and two layers on each, both added by weights that start as zero.

    Arguments:
        width: Features of a token.
        heads: Heads of the attention, a divisor of the width.
        embedding: Features of the noise-level embedding.
        dropout: Probability of dropping a hidden feature in training.
    """

    def __init__(self, width: int, heads: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = zero(nn.Linear(embedding, 6 * width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, embedding: Tensor, angles: Tensor) -> Tensor:
        scale, shift, share, scale2, shift2, share2 = self.modulate(embedding)[:, None].chunk(6, dim=-1)
        x = x + share * self.attend(modulated(x, scale, shift), angles)
        return x + share2 * self.layers(modulated(x, scale2, shift2))

    def attend(self, x: Tensor, angles: Tensor) -> Tensor:
        """Returns what tokens `(B, N, width)` take from one another, with angles `(N, width / heads / 2)`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v)
        return self.out(y.transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """`(B, in_channels, H, W)` and a number `(B,)` to `(B, out_channels, H, W)`.

    Of sequences, with `frames` T above 1, `(B, T, in_channels, H, W)` to `(B, T, out_channels, H, W)`.

    Arguments:
        in_channels: Channels of the input: the field and what conditions it.
        out_channels: Channels of the output.
        periodic: Whether y and x close on themselves.
        width: Features of a token.
        depth: Blocks.
        heads: Heads of the attention; each has width / heads features, an even number.
        patch: Cells along each axis that make a token.
        embedding: Features of the noise-level embedding.
        dropout: Probability of dropping a feature in training.
        frames: The frames of a sequence; 1 for snapshots.
        time: How frames meet; see the module. Any number of frames may attend.

    Raises:
        ValueError: Sizes that make no network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        periodic: tuple[bool, bool] = (False, False),
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        patch: int = 4,
        embedding: int = 128,
        dropout: float = 0.0,
        frames: int = 1,
        time: Time = "channels",
    ) -> None:
        super().__init__()
        check_time(frames, time)
        check_sizes(width, depth, heads, patch, dropout, axes=2 if frames == 1 or time == "channels" else 3)
        self.frames, self.folds = frames, frames > 1 and time == "channels"
        if self.folds:
            in_channels, out_channels = frames * in_channels, frames * out_channels
        self.periodic, self.patch, self.rotations = tuple(periodic), patch, width // heads // 2
        self.embed = FourierEmbedding(embedding)
        self.stem = Conv3x3(in_channels * patch**2, width, periodic)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, embedding, dropout) for _ in range(depth))
        self.modulate = zero(nn.Linear(embedding, 2 * width))
        self.head = zero(Conv3x3(width, out_channels * patch**2, periodic))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        if self.frames == 1:
            return self.of_fields(x[:, None], noise)[:, 0]
        if self.folds:
            return self.of_fields(x.flatten(1, 2)[:, None], noise)[:, 0].unflatten(1, (x.shape[1], -1))
        return self.of_fields(x, noise)

    def of_fields(self, x: Tensor, noise: Tensor) -> Tensor:
        """Returns the output of fields `(B, T, C, H, W)` whose tokens all attend to one another."""
        (samples, frames), (h, w) = x.shape[:2], x.shape[-2:]
        embedding = self.embed(noise)
        around = margins((h, w), self.patch, self.periodic)
        x, ((top, _), (left, _)) = pad(x.flatten(0, 1), around, self.periodic, "zero"), around
        x = self.stem(F.pixel_unshuffle(last(x), self.patch))
        rows, columns = x.shape[-2:]
        sizes, closed = (
            ((rows, columns), self.periodic) if frames == 1 else ((frames, rows, columns), (False, *self.periodic))
        )
        angles = positions(sizes, closed, self.rotations, x.device)
        x = x.unflatten(0, (samples, frames)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        for block in self.blocks:
            x = block(x, embedding, angles)
        scale, shift = self.modulate(embedding)[:, None].chunk(2, dim=-1)
        x = modulated(x, scale, shift).unflatten(1, (frames, rows, columns)).flatten(0, 1).permute(0, 3, 1, 2)
        out = F.pixel_shuffle(self.head(x), self.patch)[..., top : top + h, left : left + w]
        return out.unflatten(0, (samples, frames))


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Returns tokens `(B, N, C)`, each normalised over its features, scaled and shifted."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


def positions(sizes: Sequence[int], periodic: Sequence[bool], rotations: int, device: torch.device) -> Tensor:
    """Returns the angles `(N, rotations)` of the tokens of a grid, an equal share of them for each axis.

    Arguments:
        sizes: Tokens along each axis.
        periodic: Which axes close on themselves: their angles are multiples of 2 pi over the period.
        rotations: The number of angles of a token.
        device: Where they are needed.
    """
    shares = [len(part) for part in torch.arange(rotations).tensor_split(len(sizes))]
    along = []
    for axis, (size, closed, share) in enumerate(zip(sizes, periodic, shares, strict=True)):
        steps = torch.arange(share, dtype=torch.float64, device=device)
        rates = 2 * math.pi * (1 + steps) / size if closed else SPAN ** (-steps / share)
        angles = torch.arange(size, device=device)[:, None] * rates
        shape = [size if axis == i else 1 for i in range(len(sizes))]
        along.append(angles.view(*shape, share).expand(*sizes, share))
    return torch.cat(along, dim=-1).flatten(0, -2)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Returns vectors `(..., N, D)`, their halves turned together by angles `(N, D / 2)`."""
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)


def check_sizes(width: int, depth: int, heads: int, patch: int, dropout: float, axes: int) -> None:
    """Raises ValueError for sizes that make no network, before anything is made of them."""
    for name, value, most in (
        ("width", width, WIDEST),
        ("depth", depth, DEEPEST),
        ("heads", heads, WIDEST),
        ("patch", patch, LARGEST),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be in [1, {most}], got {value}")
    if width % (2 * heads) or width // heads < 2 * axes:
        raise ValueError(
            f"width must be a multiple of 2 * heads={2 * heads}, with {2 * axes} features or more a head, got {width}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
