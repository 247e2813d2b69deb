"""The transformer: positions, shifts of periodic domains, sizes of any kind, sequences, what is refused."""

import math

import pytest
import torch
from test_unet import call

from vecfield_diffusion.config.build import build
from vecfield_diffusion.config.program import option
from vecfield_diffusion.models.dit import SPAN, DiT, positions, rotated


def network(**options):
    torch.manual_seed(0)
    small = dict(in_channels=3, width=24, depth=2, heads=2, patch=2, embedding=16)
    net = DiT(**{**small, **options}).double()
    for value in net.parameters():  # what starts as zero would hide everything
        if value.abs().sum() == 0:
            torch.nn.init.normal_(value, std=0.1)
    return net.eval()


def field(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_shifts_of_a_periodic_field_by_patches_shift_the_output():
    net, x = network(periodic=(True, True)), field(2, 3, 8, 12)
    torch.testing.assert_close(call(net, x.roll((4, 2), (-2, -1))), call(net, x).roll((4, 2), (-2, -1)))


def test_only_the_periodic_axis_closes():
    net, x = network(periodic=(False, True)), field(1, 3, 8, 12)
    base = call(net, x)
    torch.testing.assert_close(call(net, x.roll(4, -1)), base.roll(4, -1))
    assert not torch.allclose(call(net, x.roll(4, -2)), base.roll(4, -2), rtol=1e-3)


@pytest.mark.parametrize("periodic", [(False, False), (True, False)])
@pytest.mark.parametrize("shape", [(7, 9), (1, 5), (8, 8)])
def test_any_size_comes_back_whole(shape, periodic):
    assert call(network(periodic=periodic, patch=4), field(2, 3, *shape)).shape == (2, 2, *shape)


def test_a_size_between_is_the_next_one_cropped():
    net, x = network(), field(1, 3, 7, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    torch.testing.assert_close(call(net, x), call(net, padded)[:, :, :7])


def test_samples_of_a_batch_do_not_mix_and_their_level_matters():
    net, x = network(), field(3, 3, 8, 8)
    noise = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    together = net(x, noise)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], net(x[i : i + 1], noise[i : i + 1]))
    assert (net(x, noise + 1) - together).abs().max() > 1e-3


def test_starts_as_zero_and_every_parameter_learns():
    net = DiT(3, width=24, depth=2, heads=2, patch=2, embedding=16)
    assert net(torch.randn(2, 3, 8, 8), torch.zeros(2)).abs().max() == 0
    net = network().train()
    call(net, field(2, 3, 8, 8)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in net.parameters())


def test_attention_depends_on_how_far_tokens_are_apart_alone():
    """<q turned at i, k turned at j> is the same for all i - j; along a closed axis modulo its size."""
    q, k = field(2, 12).unbind()
    for sizes, closed in (((7,), (False,)), ((7,), (True,))):
        angles = positions(sizes, closed, 6, torch.device("cpu"))
        products = rotated(q.expand(7, 12), angles) @ rotated(k.expand(7, 12), angles).T
        for lag in range(7):
            along = torch.diagonal(products, lag)
            torch.testing.assert_close(along, along[:1].expand_as(along))
            if closed[0] and lag:
                torch.testing.assert_close(torch.diagonal(products, lag - 7)[0], along[0])
        assert products[0].std() > 0.1


def test_angles_of_two_axes_stand_side_by_side():
    angles = positions((3, 4), (True, False), 5, torch.device("cpu")).view(3, 4, 5)
    torch.testing.assert_close(angles[1, 2, :3], 2 * math.pi * torch.tensor([1.0, 2.0, 3.0]).double() / 3)
    torch.testing.assert_close(angles[1, 2, 3:], 2 * SPAN ** -torch.tensor([0.0, 0.5]).double())


def test_frames_as_channels_are_those_of_one_field():
    net, alone = network(frames=4), network(in_channels=12, out_channels=8)
    alone.load_state_dict(net.state_dict())
    x = field(2, 4, 3, 8, 8)
    torch.testing.assert_close(call(net, x), call(alone, x.flatten(1, 2)).unflatten(1, (4, 2)))


def test_frames_attend_to_one_another_whatever_their_number():
    net, x = network(frames=4, time="attention"), field(1, 4, 3, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(call(net, x)[:, 1].sum(), x)
    assert (gradient.abs().sum((0, 2, 3, 4)) > 0).all()
    assert call(net, field(1, 6, 3, 8, 8)).shape == (1, 6, 2, 8, 8)
    moved = call(net, x.roll(1, 1))  # an order of frames that counts, but no first one
    assert not torch.allclose(moved, call(net, x).roll(1, 1), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"width": 0}, "width must be in"),
        ({"width": 26}, "width must be a multiple of 2"),
        ({"width": 4}, "4 features or more a head"),
        ({"width": 12, "heads": 3, "frames": 2, "time": "attention"}, "6 features or more a head"),
        ({"depth": 0}, "depth must be in"),
        ({"heads": -1}, "heads must be in"),
        ({"patch": 0}, "patch must be in"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"frames": 0}, "frames must be in"),
        ({"time": "never"}, "time must be one of"),
    ],
)
def test_sizes_that_make_no_network_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        network(**options)


def test_the_option_is_made_of_its_file():
    assert isinstance(build(option("model", "dit"), "model", in_channels=7), DiT)
