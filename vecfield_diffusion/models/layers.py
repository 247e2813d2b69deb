"""Layers that the networks share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vecfield_diffusion.models.twice import Slope

aten = torch.ops.aten
Zeroed = TypeVar("Zeroed", nn.Conv2d, nn.Linear)


class Wrap(torch.autograd.Function):
    """Pads each periodic axis by one cell of its other end.

    The same numbers as `torch.nn.functional.pad(mode="circular")`, whose gradient copies the whole array for each edge.
    Here the array is copied once each way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, periodic: tuple[bool, bool]) -> Tensor:
        ctx.periodic = periodic
        out = around(x, periodic)
        inside(out, periodic).copy_(x)
        return closed(out, periodic)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Unwrap.apply(gradient, ctx.periodic), None


class Unwrap(torch.autograd.Function):
    """The adjoint of `Wrap`, whose own adjoint is `Wrap`: so may gradients be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, periodic: tuple[bool, bool]) -> Tensor:
        ctx.periodic = periodic
        inner = inside(gradient, periodic).clone(memory_format=order_of(gradient))
        return with_edges(inner, gradient, periodic, lambda edge, _: edge)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None]:
        return Wrap.apply(x, ctx.periodic), None


def order_of(x: Tensor) -> torch.memory_format:
    """Returns how `(N, C, H, W)` lies in memory: with the channels last, or first."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def around(x: Tensor, periodic: tuple[bool, bool]) -> Tensor:
    """Returns memory for what `Wrap` makes of `x`."""
    sizes = [size + 2 * closed for size, closed in zip(x.shape[-2:], periodic, strict=True)]
    return torch.empty((*x.shape[:-2], *sizes), dtype=x.dtype, device=x.device, memory_format=order_of(x))


def closed(out: Tensor, periodic: tuple[bool, bool]) -> Tensor:
    """Returns a wrapped field of which the cells inside are given, with its edges."""
    if periodic[1]:
        rows = out.narrow(-2, int(periodic[0]), out.shape[-2] - 2 * periodic[0])
        rows[..., 0], rows[..., -1] = rows[..., -2], rows[..., 1]
    if periodic[0]:
        out[..., 0, :], out[..., -1, :] = out[..., -2, :], out[..., 1, :]
    return out


def inside(x: Tensor, periodic: tuple[bool, bool]) -> Tensor:
    """Returns the cells that `Wrap` has wrapped."""
    for axis, closed in zip((-2, -1), periodic, strict=True):
        x = x.narrow(axis, 1, x.shape[axis] - 2) if closed else x
    return x


def folded(row: Tensor) -> Tensor:
    """Returns a wrapped row `(..., W + 2)` with its ends added to the cells that they came from, `(..., W)`."""
    inner = row[..., 1:-1].clone()
    inner[..., -1].add_(row[..., 0])
    inner[..., 0].add_(row[..., -1])
    return inner


def with_edges(
    inner: Tensor, gradient: Tensor, periodic: tuple[bool, bool], part: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """Returns what cells are given by their own gradient and by that of their copies at the edges, added in place.

    Arguments:
        inner: What the gradient of the cells themselves comes to.
        gradient: That of a wrapped field.
        periodic: Whether y and x close on themselves.
        part: `(edge, index) -> what is added`, linear in the gradient of an edge, of the cells with an index.
    """
    first, last = gradient[..., 0, :], gradient[..., -1, :]
    if periodic[1]:
        rows = inside(gradient, (periodic[0], False))
        for to, edge in ((-1, 0), (0, -1)):
            inner[..., to].add_(part(rows[..., edge], (..., to)))
        first, last = folded(first), folded(last)
    if periodic[0]:
        for to, edge in ((-1, first), (0, last)):
            inner[..., to, :].add_(part(edge, (..., to, slice(None))))
    return inner


class WrappedSiLU(torch.autograd.Function):
    """`Wrap` of x sigmoid(x), which is written where it is wrapped, without a copy either way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, periodic: tuple[bool, bool]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.periodic = periodic
        out = around(x, periodic)
        aten.silu.out(x, out=inside(out, periodic))
        return closed(out, periodic)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,), periodic = ctx.saved_tensors, ctx.periodic
        if torch.is_grad_enabled():
            return Slope.apply(Unwrap.apply(gradient, periodic), x), None
        out = aten.silu_backward(inside(gradient, periodic), x)
        return with_edges(out, gradient, periodic, lambda edge, at: aten.silu_backward(edge, x[at])), None


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size: circular along periodic axes, zero-padded along the others.

    Arguments:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        periodic: Whether y and x close on themselves.
    """

    def __init__(self, in_channels: int, out_channels: int, periodic: tuple[bool, bool]) -> None:
        super().__init__(in_channels, out_channels, 3, padding=tuple(int(not closed) for closed in periodic))
        self.periodic = periodic

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Wrap.apply(x, self.periodic) if any(self.periodic) else x)

    def of_silu(self, x: Tensor) -> Tensor:
        """Returns the convolution of x sigmoid(x)."""
        return super().forward(WrappedSiLU.apply(x, self.periodic) if any(self.periodic) else F.silu(x))


class FourierEmbedding(nn.Module):
    """`(B,)` numbers to `(B, width)` features of sine and cosine, then two layers.

    Frequencies are geometric, from `1 / span` to 1 in radians per unit (Vaswani et al., NeurIPS 2017, section 3.5).

    Arguments:
        width: Features of the output.
        span: The longest period over 2 pi; about the range of the number that is embedded.
    """

    def __init__(self, width: int, span: float = 1000.0) -> None:
        super().__init__()
        half = width // 2
        # On the device meta, which a checkpoint is checked on, torch works arange out by importing its compiler.
        order = torch.arange(half, dtype=torch.float64, device="cpu")
        frequencies = torch.exp(-math.log(span) * order / half)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * half, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, value: Tensor) -> Tensor:
        angle = value[:, None] * self.frequencies
        return self.layers(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.layers[0].weight.dtype))


class Attention(nn.Module):
    """Self-attention over the cells, added to its input (Vaswani et al., NeurIPS 2017).

    Arguments:
        channels: Channels of input and output.
        head: Channels of one head, where they divide `channels`.
    """

    def __init__(self, channels: int, head: int = 32) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // head))
        self.norm = nn.GroupNorm(groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(n, h * w, 3, self.heads, c // self.heads)
        # The features of a cell lie together: torch's kernel takes two to three times as long for any other order.
        y = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return x + self.out(y.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the attention of `(N, heads, cells, features)`.

    On a CPU it is taken in float32: the gradient of torch's kernel takes longer in bf16.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class TimeAttention(nn.Module):
    """Attention of every cell along the frames of a sequence, added to its input.

    What a frame takes from another depends on how far apart they are, by a number for each lag and head that is added
    to the logits (Shaw et al., NAACL 2018; Raffel et al., JMLR 2020, section 2.1). At the start every head looks at one
    lag - none, a frame before, a frame after, two before, ... - and the layer is the identity.

    Arguments:
        channels: Channels of input and output.
        frames: The frames of a sequence, at least; lags beyond are taken for the largest.
        head: Channels of one head, where they divide `channels`.
    """

    def __init__(self, channels: int, frames: int, head: int = 8) -> None:
        super().__init__()
        self.heads, self.frames = math.gcd(channels, max(1, channels // head)), frames
        self.norm = nn.GroupNorm(groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))
        lags = torch.arange(2 * frames - 1)
        preferred = lags[(lags - (frames - 1)).abs().argsort(stable=True)[torch.arange(self.heads) % len(lags)]]
        self.lags = nn.Parameter(-(lags - preferred[:, None]).abs().float())

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Returns `(B T, C, H, W)` of the same, the `frames` T of a sequence following one another."""
        c, h, w = x.shape[1:]
        qkv = self.qkv(self.norm(x)).view(-1, frames, 3, self.heads, c // self.heads, h * w)
        # Sequences of T vectors of a head, one for each cell.
        q, k, v = qkv.permute(2, 0, 5, 3, 1, 4).flatten(1, 2).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(frames, x.device).to(q.dtype))
        y = y.view(-1, h * w, self.heads, frames, c // self.heads).permute(0, 3, 2, 4, 1).reshape(-1, c, h, w)
        return x + self.out(y)

    def bias(self, frames: int, device: torch.device) -> Tensor:
        """Returns what is added to the logits, `(heads, T, T)`: for each frame, of each frame that it looks at."""
        places = torch.arange(frames, device=device)
        lag = (places - places[:, None]).clamp(1 - self.frames, self.frames - 1)
        return self.lags[:, lag + self.frames - 1]


def groups(channels: int) -> int:
    """Returns groups of a GroupNorm: about 16 channels each, and a divisor of `channels`."""
    return math.gcd(channels, max(1, channels // 16))


def zero(layer: Zeroed) -> Zeroed:
    """Returns the layer with all parameters zero, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
