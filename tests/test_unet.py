"""The UNet: symmetry of periodic domains, sizes of any kind, the noise level, what is refused."""

import pytest
import torch

from vecfield_diffusion.models.layers import Attention, Conv3x3, FourierEmbedding, TimeAttention, Wrap, WrappedSiLU
from vecfield_diffusion.models.residual import Residual
from vecfield_diffusion.models.unet import UNet, last, load_snapshots


def network(**options):
    torch.manual_seed(0)
    small = dict(in_channels=3, channels=[8, 16], blocks=1, embedding=16)
    net = UNet(**{**small, **options}).double()
    for value in net.parameters():  # the last layers start as zero and would hide everything
        if value.abs().sum() == 0:
            torch.nn.init.normal_(value, std=0.1)
    return net.eval()


def call(net, x):
    return net(x, torch.linspace(-1, 1, len(x), dtype=x.dtype))


@pytest.mark.parametrize("patch", [1, 2])
def test_shifts_of_a_periodic_field_shift_the_output(patch):
    """By multiples of the stride; zero padding along either axis would break it."""
    net = network(periodic=(True, True), patch=patch)
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    shifted = call(net, x.roll((8, 4), (-2, -1)))
    torch.testing.assert_close(shifted, call(net, x).roll((8, 4), (-2, -1)))


@pytest.mark.parametrize("periodic", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("patch", [2, 3])
def test_the_first_layer_is_the_stem_of_patches(patch, periodic):
    net = network(periodic=periodic, patch=patch)
    x = torch.randn(2, 3, 4 * patch, 5 * patch, dtype=torch.float64)
    torch.testing.assert_close(net.first(x), net.stem(torch.nn.functional.pixel_unshuffle(x, patch)))


def test_only_the_periodic_axis_wraps():
    net = network(periodic=(False, True), attention=[])
    x = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    base = call(net, x)
    torch.testing.assert_close(call(net, x.roll(4, -1)), base.roll(4, -1))
    assert not torch.allclose(call(net, x.roll(4, -2)), base.roll(4, -2))


@pytest.mark.parametrize("shape", [(41, 81), (51, 102), (16, 16), (1, 7)])
@pytest.mark.parametrize("periodic", [(False, False), (True, True)])
def test_any_size_comes_back_whole(shape, periodic):
    net = network(periodic=periodic, channels=[8, 8, 8], patch=2)
    assert call(net, torch.randn(2, 3, *shape, dtype=torch.float64)).shape == (2, 2, *shape)


def test_padding_is_cropped_at_the_end_of_the_axes():
    """A size that needs no padding is untouched; one that does equals the padded field, cropped."""
    net = network(attention=[])
    x = torch.randn(1, 3, 7, 8, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    torch.testing.assert_close(call(net, x), call(net, padded)[:, :, :7])


def test_samples_of_a_batch_do_not_mix():
    net = network()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    noise = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    together = net(x, noise)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], net(x[i : i + 1], noise[i : i + 1]))


def test_noise_level_matters():
    net = network()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64).expand(2, -1, -1, -1)
    low, high = net(x, torch.tensor([-1.5, 1.5], dtype=torch.float64))
    assert (low - high).abs().max() > 1e-3


def test_starts_as_zero_so_that_the_denoiser_starts_as_its_skip():
    net = UNet(3, channels=[8, 16], blocks=1, embedding=16)
    assert net(torch.randn(2, 3, 16, 16), torch.zeros(2)).abs().max() == 0


def test_gradients_reach_every_parameter():
    net = network(attention=[0, 1])
    call(net.train(), torch.randn(2, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in net.parameters())


def test_convolution_wraps_like_a_circle():
    conv = Conv3x3(1, 1, (True, True)).double()
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    big = torch.nn.functional.conv2d(x.tile(1, 1, 3, 3), conv.weight, conv.bias)
    torch.testing.assert_close(conv(x), big[..., 4:9, 5:11])


@pytest.mark.parametrize("periodic", [(True, True), (True, False), (False, True)])
def test_wrapping_and_its_gradient(periodic):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    rows, columns = (int(closed) for closed in periodic)
    expected = torch.nn.functional.pad(x, (columns, columns, rows, rows), mode="circular")
    torch.testing.assert_close(Wrap.apply(x, periodic), expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda x: Wrap.apply(x, periodic), x)
    active = torch.nn.functional.silu(expected)
    torch.testing.assert_close(WrappedSiLU.apply(x, periodic), active, rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: WrappedSiLU.apply(x, periodic), x)
    weights = torch.randn_like(active)
    (plain,) = torch.autograd.grad((weights * torch.nn.functional.silu(expected)).sum(), x)
    (ours,) = torch.autograd.grad((weights * WrappedSiLU.apply(x, periodic)).sum(), x)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-14)


def test_attention_is_softmax_of_scaled_products():
    layer = Attention(8, head=8).double()
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).view(3, 8, 6).transpose(1, 2)
    mixed = torch.softmax(q @ k.T / 8**0.5, dim=-1) @ v
    expected = x + layer.out(mixed.T.reshape(1, 8, 2, 3))
    torch.testing.assert_close(layer(x), expected)


def test_embedding_tells_levels_apart():
    embed = FourierEmbedding(64).double()
    values = torch.linspace(-2, 2, 50, dtype=torch.float64)
    angles = values[:, None] * embed.frequencies.double()
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert torch.pdist(features).min() > 1e-2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"channels": []}, "channels"),
        ({"blocks": 0}, "blocks must be >= 1"),
        ({"patch": 0}, "patch must be >= 1"),
        ({"attention": [2]}, "attention names resolution 2"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_sizes_that_make_no_network_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        network(**options)


# Sequences.


def test_frames_as_channels_are_those_of_one_field():
    net = network(frames=4)
    torch.manual_seed(0)
    field = UNet(12, 8, channels=[8, 16], blocks=1, embedding=16).double()
    field.load_state_dict(net.state_dict())
    x = torch.randn(2, 4, 3, 16, 24, dtype=torch.float64)
    assert torch.equal(call(net, x), call(field, last(x.flatten(1, 2))).unflatten(1, (4, 2)))


def attending(**options):
    """A network of snapshots, and one of sequences that has gone on from it."""
    alone, net = network(**options), network(frames=4, time="attention", **options)
    for layer in (*net.time_down, *net.time_up):
        torch.nn.init.zeros_(layer.out.weight)
        torch.nn.init.zeros_(layer.out.bias)
    load_snapshots(net, alone.state_dict())
    return alone, net


@pytest.mark.parametrize("frames", [1, 4, 7])
def test_attention_along_time_begins_as_the_network_of_snapshots(frames):
    """Bit for bit, for any number of frames."""
    alone, net = attending(patch=2, periodic=(False, True))
    x, noise = torch.randn(2, frames, 3, 15, 24, dtype=torch.float64), torch.tensor([-1.0, 0.5], dtype=torch.float64)
    each = alone(last(x.flatten(0, 1)), noise.repeat_interleave(frames))
    assert torch.equal(net(x, noise), each.unflatten(0, (2, frames)))
    fresh = UNet(3, channels=[8, 16], blocks=1, embedding=16, frames=4, time="attention")
    assert all(layer.out.weight.abs().max() == 0 for layer in (*fresh.time_down, *fresh.time_up))
    snapshots = UNet(3, channels=[8, 16], blocks=1, embedding=16, frames=1, time="attention")
    assert snapshots.state_dict().keys() == alone.state_dict().keys()


def test_frames_of_a_sequence_meet_and_those_of_others_do_not():
    net = network(frames=4, time="attention")
    x, noise = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64), torch.tensor([-1.0, 0.5], dtype=torch.float64)
    out = net(x, noise)
    x[0, 3] += 1
    changed = (net(x, noise) - out).abs().flatten(2).amax(dim=2)
    assert (changed[0] > 1e-3).all() and (changed[1] == 0).all()
    call(net.train(), x).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in net.parameters())


def test_a_head_takes_from_the_frame_at_its_lag():
    """Logits of the lags alone, one by far the largest: a frame gets what the one after it holds, at its own cell."""
    layer = TimeAttention(8, frames=3, head=8).double()
    layer.norm = torch.nn.Identity()
    with torch.no_grad():
        layer.qkv.weight[:16].zero_()
        layer.qkv.weight[16:] = layer.out.weight[:] = torch.eye(8, dtype=torch.float64)[..., None, None]
        layer.qkv.bias.zero_()
        layer.lags.copy_(torch.tensor([[-1e3, -1e3, -1e3, 1e3, -1e3]]))
    x = torch.randn(2, 4, 8, 5, 6, dtype=torch.float64)
    out = layer(x.flatten(0, 1), 4).unflatten(0, (2, 4))
    torch.testing.assert_close(out[:, :3], x[:, :3] + x[:, 1:])


def test_at_the_start_heads_look_at_different_lags():
    lags = TimeAttention(32, frames=3).lags
    assert lags.argmax(1).tolist() == [2, 1, 3, 0] and lags.max(1).values.tolist() == [0] * 4


@pytest.mark.parametrize("time", ["channels", "attention"])
def test_a_regression_and_what_it_misses_of_sequences(time):
    options = dict(channels=[8], blocks=1, attention=[], embedding=8)
    net = Residual(7, frames=3, time=time, **options).double()
    x = torch.randn(2, 3, 9, 8, 9, dtype=torch.float64)
    assert net.mean(x[..., 4:, :, :]).shape == call(net, x).shape == (2, 3, 2, 8, 9)
    if time == "attention":
        load_snapshots(net, Residual(7, **options).state_dict())


@pytest.mark.parametrize(
    ("net", "state"),
    [
        (dict(frames=4), dict()),
        (dict(frames=4, time="attention"), dict(blocks=2)),
        (dict(frames=4, time="attention", blocks=2), dict()),
    ],
)
def test_what_cannot_go_on_from_snapshots_is_refused(net, state):
    with pytest.raises(ValueError, match="model.time=attention and the same sizes"):
        load_snapshots(network(**net), network(**state).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames must be in"),
        ({"frames": 101}, "frames must be in"),
        ({"time": "conv"}, "time must be one of channels, attention, got conv"),
    ],
)
def test_what_makes_no_network_of_sequences_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        network(**change)
