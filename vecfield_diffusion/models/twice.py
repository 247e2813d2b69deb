"""Layers whose derivative by their input is itself differentiated at the price of a derivative.

The gradient of an energy is the derivative of a network, and training differentiates that once more. torch can, but it
composes the second derivative of convolutions, normalisations and SiLU of many elementary passes over memory, and has
none of its fused attention. Each of them is linear in the gradient that comes in, with an adjoint that is a kernel
which torch has:

    convolution     g -> W^T g          adjoint: the convolution; by the weights: their gradient for the input v
    normalisation   g -> P g / sigma    adjoint: itself, for the projector P = I - 1 1^T / K - n n^T / K is symmetric
    SiLU            g -> silu'(x) g     adjoint: itself

with n the normalised input, of K values of standard deviation sigma. `twice_differentiable` puts these in their place
for whatever network runs inside it. The values and the first derivative are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class Convolution(torch.autograd.Function):
    """A convolution. Its gradient with a graph, the first of two derivatives, is that by the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.biased = how, bias is not None
        return torch.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rest = (None,) * len(ctx.how)
        if torch.is_grad_enabled():
            return Transposed.apply(g, weight, x.shape, ctx.how), None, None, *rest
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.biased and ctx.needs_input_grad[2]]
        return *convolution_gradients(g, x, weight, ctx.how, wanted), *rest


class Transposed(torch.autograd.Function):
    """The gradient of a convolution by its input, `W^T g`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, shape: torch.Size, how: Sequence[Any]) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.how = how
        # Of the input of the convolution its shape alone counts.
        like = g.new_empty(()).expand(shape)
        return convolution_gradients(g, like, weight, how, [True, False, False])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        wanted = [False, ctx.needs_input_grad[1], False]
        by_weight = convolution_gradients(g, v, weight, ctx.how, wanted)[1] if wanted[1] else None
        return torch.conv2d(v, weight, None, *ctx.how), by_weight, None, None


def convolution_gradients(
    g: Tensor, x: Tensor, weight: Tensor, how: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients by input, weight and bias that are wanted."""
    stride, padding, dilation, groups = how
    sizes = (weight.shape[:1], stride, padding, dilation, False, [0, 0], groups, list(wanted))
    return aten.convolution_backward(g, x, weight, *sizes)


class Normalisation(torch.autograd.Function):
    """Group normalisation. Its gradient with a graph is that by the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        x, sizes = in_order(x), (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, scale = aten.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, mean, scale, weight)
        ctx.sizes = sizes
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return Projection.apply(g, x, mean, scale, weight, ctx.sizes), None, None, None, None
        wanted = [bool(ctx.needs_input_grad[k]) for k in (0, 2, 3)]
        g = in_order(g, like=x)
        by_x, by_weight, by_bias = aten.native_group_norm_backward(g, x, mean, scale, weight, *ctx.sizes, wanted)
        return by_x, None, by_weight, by_bias, None


class Projection(torch.autograd.Function):
    """The gradient of a normalisation by its input, `P (w g) / sigma`, with w the weight of each channel."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, sizes: Sequence[int]
    ) -> Tensor:
        g = in_order(g, like=x)
        projected = aten.native_group_norm_backward(g, x, mean, scale, weight, *sizes, [True, False, False])[0]
        ctx.save_for_backward(g, x, mean, scale, weight, projected)
        ctx.sizes = sizes
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x, mean, scale, weight, projected = ctx.saved_tensors
        v = in_order(v, like=x)
        back = aten.native_group_norm_backward(v, x, mean, scale, None, *ctx.sizes, [True, False, False])[0]
        per = ctx.sizes[1] // ctx.sizes[3]

        def spread(values: Tensor) -> Tensor:
            """A number for each group as one for each channel, `(N, C, 1, ...)`."""
            values = values.repeat_interleave(per, dim=1).to(x.dtype)
            return values.view(*values.shape, *(1 for _ in x.shape[2:]))

        def mean_over(values: Tensor) -> Tensor:
            """The mean over each group, `(N, groups)`, of sums over each channel `(N, C)`."""
            return values.unflatten(1, (-1, per)).sum(-1) / (per * ctx.sizes[2])

        mean, scale = mean.view(len(x), -1), scale.view(len(x), -1)
        normal = torch.addcmul(spread(-mean * scale), x, spread(scale))
        weighted = channel_sums(g, normal) if weight is None else weight * channel_sums(g, normal)
        shares = (mean_over(values) for values in (channel_sums(v, projected), channel_sums(v, normal), weighted))
        both, by_v, by_g = (spread(-scale * share) for share in shares)
        by_x = (normal * both).addcmul_(projected, by_v).addcmul_(back, by_g)
        by_weight = None if weight is None else channel_sums(g, back).sum(0).to(weight.dtype)
        by_g = back if weight is None else back * weight.view(-1, *(1 for _ in x.shape[2:])).to(back.dtype)
        return by_g, by_x, None, None, by_weight, None


def in_order(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Returns `x` in the order of memory that torch's kernel takes it in, that of `like`."""
    order = (x if like is None else like).is_contiguous(memory_format=torch.channels_last) if x.ndim == 4 else False
    last = order and x.device.type == "cpu"
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def channel_sums(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sum of `a b` over each channel, `(N, C)`."""
    return (a * b).flatten(2).sum(-1)


class SiLU(torch.autograd.Function):
    """x sigmoid(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Slope.apply(g, *ctx.saved_tensors)


class Slope(torch.autograd.Function):
    """The gradient of SiLU, `g silu'(x)`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return aten.silu_backward(g, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        share = torch.sigmoid(x)
        # silu'' = sigmoid' (2 + x (1 - 2 sigmoid)), sigmoid' = sigmoid (1 - sigmoid)
        bend = torch.addcmul(x, x, share, value=-2).add_(2).mul_(share).mul_(1 - share)
        return aten.silu_backward(v, x), bend.mul_(g).mul_(v)


# In the place of torch's own.


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d`."""
    if isinstance(padding, str):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return Convolution.apply(input, weight, bias, pair(stride), pair(padding), pair(dilation), groups)


def pair(value: int | Sequence[int]) -> list[int]:
    """Returns a number for each of two axes."""
    return [value, value] if isinstance(value, int) else list(value)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm`."""
    # Autocast on a GPU normalises in float32, on a CPU in the type of the input.
    wide = torch.is_autocast_enabled("cuda") and input.device.type == "cuda"
    return Normalisation.apply(input.float() if wide else input, num_groups, weight, bias, eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`: over the last axis it is the normalisation of one group."""
    if len(normalized_shape) != 1:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return group_norm(input.reshape(-1, input.shape[-1], 1), 1, weight, bias, eps).view(input.shape)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`."""
    return SiLU.apply(input)


REPLACED: Mapping[Callable[..., Tensor], Callable[..., Tensor]] = {
    torch.conv2d: conv2d,
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
    F.silu: silu,
}


class Replacing(TorchFunctionMode):
    """Calls of torch's functions go to those of this module."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within the block, networks are made of the layers of this module and of attention that has both derivatives."""
    with Replacing(), sdpa_kernel(SDPBackend.MATH):
        yield
