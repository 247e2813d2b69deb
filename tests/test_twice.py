"""Layers that are differentiated twice give what torch's own give, values and both derivatives."""

import pytest
import torch
from torch.nn import functional as F

from vecfield_diffusion.models.layers import Unwrap, Wrap, WrappedSiLU
from vecfield_diffusion.models.twice import twice_differentiable
from vecfield_diffusion.models.unet import UNet


def tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def convolution(x, weight, bias):
    return torch.conv2d(x, weight, bias, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)


def pointwise(x, weight, bias):
    return F.conv2d(x, weight[:, :, :1, :1], bias, 2, groups=2)


CASES = {
    "convolution": (convolution, (6, 2, 3, 3), (6,)),
    "pointwise": (pointwise, (6, 2, 3, 3), (6,)),
    "normalisation": (lambda x, weight, bias: F.group_norm(x, 2, weight, bias), (4,), (4,)),
    "normalisation alone": (lambda x: F.group_norm(x, 2),),
    "of a layer": (lambda x, weight, bias: F.layer_norm(x, (6,), weight, bias), (6,), (6,)),
    "of two axes": (lambda x: F.layer_norm(x, (5, 6)),),
    "silu": (F.silu,),
}


def derivatives(function, x, *parameters):
    """The value, the gradient by x of a function of it, and the derivative of one of that by all."""
    value = function(x, *parameters)
    (first,) = torch.autograd.grad(value.sin().square().sum(), x, create_graph=True)
    weights = torch.linspace(-1, 2, first.numel(), dtype=torch.float64).view(first.shape)
    second = torch.autograd.grad((first * weights).sum(), (x, *parameters))
    return [value, first, *second]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_torch(case, order):
    function, *shapes = CASES[case]
    x = tensor(2, 4, 5, 6).detach().contiguous(memory_format=order).requires_grad_()
    parameters = [tensor(*shape, seed=k) for k, shape in enumerate(shapes, start=1)]
    expected = derivatives(function, x, *parameters)
    with twice_differentiable():
        got = derivatives(function, x, *parameters)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("periodic", [(True, True), (False, True)])
def test_wrapping_can_be_differentiated_twice(periodic):
    x, y = tensor(1, 2, 3, 4), tensor(1, 2, 3 + 2 * periodic[0], 6)
    assert torch.autograd.gradgradcheck(lambda x: Wrap.apply(x, periodic).sin(), x)
    assert torch.autograd.gradcheck(lambda y: Unwrap.apply(y, periodic), y)
    assert torch.autograd.gradgradcheck(lambda x: WrappedSiLU.apply(x, periodic), x)


def test_a_whole_network_with_attention():
    """In double precision, against torch's own derivatives; all layers that are replaced are in use."""
    torch.manual_seed(0)
    net = UNet(3, channels=[8, 16], blocks=1, attention=[0, 1], embedding=16, periodic=(True, False)).double()
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.2)
    x, noise = tensor(2, 3, 6, 8), torch.tensor([0.3, -1.0], dtype=torch.float64)

    def loss():
        (gradient,) = torch.autograd.grad(net(x, noise).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(net.parameters()))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = loss()
    with twice_differentiable():
        got = loss()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_autocast_lowers_convolutions_as_it_does_torchs():
    net, x = torch.nn.Conv2d(2, 3, 3), torch.ones(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(x)
        with twice_differentiable():
            assert torch.equal(net(x), plain)
    assert plain.dtype == torch.bfloat16


def test_outside_the_block_all_is_as_before():
    with pytest.raises(KeyError), twice_differentiable():
        raise KeyError
    y = torch.nn.Conv2d(2, 3, 3)(torch.ones(1, 2, 4, 4))
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
