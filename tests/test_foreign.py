"""Networks of other libraries: what they are called with, what comes back, sizes, and what is refused."""

from __future__ import annotations

import copy
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from vecfield_diffusion import commands
from vecfield_diffusion.config.build import build
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.models.foreign import Foreign
from vecfield_diffusion.models.unet import UNet

X = torch.randn(3, 7, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LEVEL = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64)


class Recorder(nn.Module):
    """Keeps what it is called with and returns the first two channels of `image`."""

    def forward(self, image, extra=None, time=None):
        self.seen = {"image": image, "extra": extra, "time": time}
        return image[:, :2]


class Conv(nn.Module):
    """A 3x3 convolution that pads with zeros, as a network does that knows nothing of the period."""

    def __init__(self, channels=7, out=2, bias=True):
        super().__init__()
        self.layer = nn.Conv2d(channels, out, 3, padding=1, bias=bias, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x)


class Labelled(nn.Module):
    """`image[:, :2] + 10 label + time`, so that each argument can be read off the output."""

    def forward(self, image, label, time):
        assert label.dtype == torch.int64 and label.shape == (len(image),)
        return image[:, :2] + (10 * label + time)[:, None, None, None]


class Strided(nn.Module):
    """Means of 4x4 cells, spread out again: refuses sizes that are no multiples of 4, or above 8 rows."""

    def forward(self, x):
        assert x.shape[-2] % 4 == 0 and x.shape[-1] % 4 == 0 and x.shape[-2] <= 8
        return F.interpolate(F.avg_pool2d(x[:, :2], 4), scale_factor=4)


class Projection(nn.Module):
    """A vector from the condition, with weights of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, condition):
        return self.layer(condition.amax(dim=(-2, -1)))


class Shifted(nn.Module):
    def forward(self, x, shift):
        return x + shift[:, :, None, None]


def foreign(network, arguments, **options):
    return Foreign(network, arguments, **{"in_channels": 7, **options})


# What the network is called with.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("input", X),
        ("field", X[:, :2]),
        ("condition", X[:, 2:]),
        ("level", LEVEL),
        ("vector", X[:, 2:].sum(dim=3).sum(dim=2) / 24),
        ("token", (X[:, 2:].sum(dim=3).sum(dim=2) / 24)[:, None, :]),
        (4, torch.tensor([4, 4, 4])),
        (lambda condition: condition[:, :1] ** 2, X[:, 2:3] ** 2),
    ],
)
def test_each_source_arrives_under_its_name(source, expected):
    network = foreign(Recorder(), {"extra": source, "image": "field"})
    torch.testing.assert_close(network(X, LEVEL), X[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(network.network.seen["extra"], expected)
    assert network.network.seen["time"] is None


def test_the_level_has_the_type_of_the_field():
    """A sampler's levels are float64; a network in float32 refuses a mixture."""
    network = foreign(Recorder(), {"time": "level", "image": "input"})
    network(X.float(), LEVEL)
    assert network.network.seen["time"].dtype == torch.float32


def test_class_labels_fixed_and_computed():
    fixed = foreign(Labelled(), {"image": "field", "label": 3, "time": "level"})
    torch.testing.assert_close(fixed(X, LEVEL), X[:, :2] + 30 + LEVEL[:, None, None, None])
    # The label of a sample: the channel of the condition that is largest at its first cell.
    computed = foreign(
        Labelled(), {"image": "field", "label": lambda condition: condition[:, :, 0, 0].argmax(1), "time": "level"}
    )
    labels = torch.tensor([max(range(5), key=lambda channel: sample[2 + channel, 0, 0].item()) for sample in X])
    assert len(labels.unique()) > 1
    torch.testing.assert_close(computed(X, LEVEL), X[:, :2] + (10 * labels + LEVEL)[:, None, None, None])


def test_the_condition_as_an_image_of_its_own_equals_concatenation():
    class Two(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, noisy, *, context):
            return self.conv(torch.cat([noisy, context], dim=1))

    conv = Conv()
    apart = foreign(Two(conv), {"noisy": "field", "context": "condition"}, multiple=5)
    torch.testing.assert_close(apart(X, LEVEL), foreign(conv, {"x": "input"}, multiple=5)(X, LEVEL))


def test_a_module_among_the_sources_is_part_of_the_network():
    """Its weights train, are saved and restored, and the trial leaves no gradient behind."""
    network = foreign(Shifted(), {"x": "field", "shift": Projection()})
    layer = network.arguments["shift"].layer
    expected = X[:, :2] + F.linear(X[:, 2:].amax((-2, -1)), layer.weight, layer.bias)[:, :, None, None]
    torch.testing.assert_close(network(X, LEVEL), expected)
    assert {id(value) for value in network.parameters()} == {id(layer.weight), id(layer.bias)}
    assert layer.weight.grad is None
    network(X, LEVEL).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((2,), 3 * 24.0, dtype=torch.float64))

    other = foreign(Shifted(), {"x": "field", "shift": Projection()})
    assert not torch.equal(other(X, LEVEL), network(X, LEVEL))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(X, LEVEL), network(X, LEVEL))
    assert torch.equal(copy.deepcopy(network)(X, LEVEL), network(X, LEVEL))


# What comes back.


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x[:, :2])


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda field: field, None),
        (lambda field: SimpleNamespace(sample=field), "sample"),
        (lambda field: {"values": field}, "values"),
        (lambda field: (None, field), 1),
        (lambda field: [field], -1),
    ],
)
def test_the_output_is_found_in_what_is_returned(wrap, output):
    network = foreign(Returns(wrap), {"x": "input"}, output=output, multiple=5)
    torch.testing.assert_close(network(X, LEVEL), X[:, :2], rtol=0, atol=0)


def test_more_channels_may_come_back():
    network = foreign(Conv(out=4), {"x": "input"}, out_channels=4)
    torch.testing.assert_close(network(X, LEVEL), network.network(X), rtol=0, atol=0)


def test_gradients_flow_through_padding():
    """With a convolution of ones each cell counts as often as it has neighbours, itself included, in the output."""
    conv = Conv(bias=False)
    nn.init.ones_(conv.layer.weight)
    x = X.clone().requires_grad_()
    foreign(conv, {"x": "input"}, multiple=8)(x, LEVEL).sum().backward()
    rows, columns = torch.tensor([2.0, 3, 3, 2]), torch.tensor([2.0, 3, 3, 3, 3, 2])
    torch.testing.assert_close(x.grad, (2 * rows[:, None] * columns).double().expand(3, 7, 4, 6))
    assert conv.layer.weight.grad.abs().min() > 0


# Sizes.


def padded(x, periodic, **options):
    network = foreign(Recorder(), {"image": "input"}, periodic=periodic, in_channels=x.shape[1], **options)
    torch.testing.assert_close(network(x, LEVEL[: len(x)]), x[:, :2], rtol=0, atol=0)
    return network.network.seen["image"]


def test_padding_by_hand():
    """Two rows of three cells, filled up to multiples of 4."""
    x = torch.tensor([[0.0, 1, 2], [3, 4, 5]], dtype=torch.float64).expand(1, 2, 2, 3)
    zero = [[0, 1, 2, 0], [3, 4, 5, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    edge = [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]
    wrapped_y = [[3, 4, 5, 0], [0, 1, 2, 0], [3, 4, 5, 0], [0, 1, 2, 0]]
    both_halo = [[5, 3, 4, 5, 3], [2, 0, 1, 2, 0], [5, 3, 4, 5, 3], [2, 0, 1, 2, 0]]
    for expected, periodic, options in [
        (zero, (False, False), {"multiple": 4}),
        (edge, (False, False), {"multiple": 4, "padding": "edge"}),
        (wrapped_y, (True, False), {"multiple": 4}),
        (zero, (False, False), {"multiple": 4, "halo": 3}),  # open axes have nothing to continue with
    ]:
        got = padded(x, periodic, **options)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64).expand(1, 2, 4, 4))
    got = padded(x, (True, True), halo=1)  # one row and one column on each side
    torch.testing.assert_close(got, torch.tensor(both_halo, dtype=torch.float64).expand(1, 2, 4, 5))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 16), (9, 3)])
@pytest.mark.parametrize("periodic", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("halo", [0, 3])
def test_every_size_becomes_a_multiple_and_comes_back(shape, periodic, halo):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    for padding in ("zero", "edge"):
        seen = padded(x, periodic, multiple=8, padding=padding, halo=halo)
        for size, whole, closed in zip(shape, seen.shape[-2:], periodic, strict=True):
            least = size + 2 * halo * closed
            assert whole % 8 == 0 and least <= whole < least + 8


@pytest.mark.parametrize("periodic", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("options", [{"halo": 1}, {"halo": 1, "multiple": 8}, {"halo": 9}])
def test_a_halo_makes_a_convolution_circular(periodic, options):
    """On odd sizes, against torch's circular padding; along open axes zeros are what the layer itself pads with."""
    conv, x = Conv(), torch.randn(2, 7, 5, 7, dtype=torch.float64)
    wide = F.pad(x, (1, 1, 0, 0), mode="circular" if periodic[1] else "constant")
    wide = F.pad(wide, (0, 0, 1, 1), mode="circular" if periodic[0] else "constant")
    expected = F.conv2d(wide, conv.layer.weight, conv.layer.bias)
    network = foreign(conv, {"x": "input"}, periodic=periodic, **options)
    torch.testing.assert_close(network(x, LEVEL[:2]), expected)


@pytest.mark.parametrize("periodic", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(8, 8), (9, 15), (5, 6)])
def test_our_own_network_wrapped_is_itself(periodic, shape):
    """The UNet pads by the same rule, so that padding it before changes nothing, wherever the size leads."""
    torch.manual_seed(0)
    own = UNet(7, 2, periodic, channels=[8, 8, 8], blocks=1, attention=[], embedding=8).double()
    nn.init.normal_(own.head[-1].weight)
    network = foreign(own, {"x": "input", "noise": "level"}, periodic=periodic, multiple=4)
    x = torch.randn(3, 7, *shape, dtype=torch.float64)
    torch.testing.assert_close(network(x, LEVEL), own(x, LEVEL))


def test_what_a_function_makes_of_the_cells_is_padded_too():
    """A summary is made of the field as it is; an image is brought to the size of the field."""
    network = foreign(Recorder(), {"image": "input", "extra": lambda condition: condition[:, :1], "time": "vector"})
    network.multiple = 8
    network(X, LEVEL)
    seen = network.network.seen
    assert seen["extra"].shape == (3, 1, 8, 8)
    torch.testing.assert_close(seen["extra"], seen["image"][:, 2:3])
    torch.testing.assert_close(seen["time"], X[:, 2:].mean((-2, -1)))


def test_a_summary_that_looks_like_a_field_is_left_alone():
    """On a field of 1x5 cells a token is 1x5 too."""
    network = foreign(Recorder(), {"image": "input", "extra": "token"}, multiple=8)
    network(X[:, :, :1, :5], LEVEL)
    assert network.network.seen["image"].shape == (3, 7, 8, 8) and network.network.seen["extra"].shape == (3, 1, 5)


# The trial.


def test_the_trial_leaves_no_trace():
    """Modes come back part by part, statistics of batches stay, no random number is drawn, no graph is made."""
    graphs = []
    network = nn.Sequential(nn.BatchNorm2d(7), nn.Dropout(0.5), nn.Conv2d(7, 2, 1))
    network.register_forward_hook(lambda module, given, result: graphs.append(result.requires_grad))
    network[0].eval()
    network[0].running_mean.fill_(3.0)
    state, before = torch.get_rng_state(), copy.deepcopy(network.state_dict())
    wrapped = foreign(network, {"input": "input"})
    assert [part.training for part in (wrapped, network, *network)] == [True, True, False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert graphs == [False]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_modes_come_back_after_a_trial_that_fails():
    network = Conv(channels=9)
    with pytest.raises(ValueError, match="refuses"):
        foreign(network, {"x": "input"})
    assert network.training and network.layer.training


def test_a_network_of_one_size_alone_is_tried_on_it():
    with pytest.raises(ValueError, match=r"^network refuses x \(2, 7, 32, 32\) .*set trial=\[rows,columns\]"):
        foreign(Strided(), {"x": "input"})
    network = foreign(Strided(), {"x": "input"}, trial=(7, 10), multiple=4)
    x = torch.ones(2, 7, 7, 10, dtype=torch.float64)
    # Of the last blocks 3 of 4 rows, and 2 of 4 columns, lie within the field; the others are zeros.
    expected = torch.outer(torch.tensor([1.0] * 4 + [0.75] * 3), torch.tensor([1.0] * 8 + [0.5] * 2)).double()
    torch.testing.assert_close(network(x, LEVEL[:2]), expected.expand(2, 2, 7, 10))


def test_lazy_layers_learn_their_channels_in_the_trial():
    network = foreign(nn.Sequential(nn.LazyConv2d(2, 1)), {"input": "input"}, in_channels=9)
    assert network.network[0].weight.shape == (2, 9, 1, 1)


class Indexed(nn.Module):
    """A table of 1000 noise levels, which takes whole numbers alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 2)

    def forward(self, x, t):
        return x[:, :2] + self.table(t)[:, :, None, None]


@pytest.mark.parametrize(
    ("network", "arguments", "options", "message"),
    [
        (3, {"x": "input"}, {}, "network must be a torch.nn.Module, got int"),
        (Conv(), {"x": "inptu"}, {}, "arguments must give x one of .*, got 'inptu'. Did you mean 'input'?"),
        (Conv(), {"x": True}, {}, "arguments must give x one of .*, got True"),
        (Conv(), {"x": 0.5}, {}, "arguments must give x one of .*, got 0.5"),
        (Conv(), {"x": "condition"}, {}, "arguments must hand over the field, as input or field, got {'x': 'cond"),
        (Conv(), {"x": "input", "z": "level"}, {}, "arguments must be those of Conv (x): .*'z'"),
        (Labelled(), {"image": "input"}, {}, "arguments must be those of Labelled (image, label, time): .*'label'"),
        (
            Conv(),
            {"x": "field"},
            {},
            "network refuses x (2, 2, 32, 32) .*RuntimeError: .*to have 7 channels, but got 2",
        ),
        (Conv(9), {"x": "input"}, {}, "network refuses x (2, 7, 32, 32) .*to have 9 channels, but got 7"),
        (Indexed(), {"x": "input", "t": "level"}, {}, "network refuses x (2, 7, 32, 32), t (2,) .*indices"),
        (Indexed(), {"x": "input", "t": 1000}, {}, "network refuses .*IndexError"),
        (Conv(out=3), {"x": "input"}, {}, "network must return (2, 2, 32, 32) for x (2, 7, 32, 32), got Tensor (2, 3,"),
        (
            nn.MaxPool2d(2),
            {"input": "input"},
            {"in_channels": 2},
            "network must return (2, 2, 32, 32) .*(2, 2, 16, 16)",
        ),
        (nn.Upsample(scale_factor=2), {"input": "input"}, {"in_channels": 2}, "network must return .*(2, 2, 64, 64)"),
        (Returns(lambda x: (x, x)), {"x": "input"}, {}, "output must lead to a tensor .*, got tuple of 2"),
        (Returns(lambda x: {"a": x}), {"x": "input"}, {}, "output must lead to a tensor .*, got dict (a)"),
        (Returns(lambda x: {"a": x}), {"x": "input"}, {"output": "b"}, "output 'b' is not in the dict (a)"),
        (Returns(lambda x: (x,)), {"x": "input"}, {"output": 1}, "output 1 is not in the tuple of 1"),
        (Returns(SimpleNamespace), {"x": "input"}, {"output": "b"}, "network refuses .*TypeError"),
        (Returns(lambda x: x), {"x": "input"}, {"output": "b"}, "output 'b' is not in the Tensor (2, 2, 32, 32)"),
        (
            Recorder(),
            {"image": "input", "extra": lambda condition: condition[:, 5]},
            {},
            "arguments: a function fails .*IndexError",
        ),
        (Conv(), {"x": "input"}, {"in_channels": 1}, "in_channels must be >= 2, got 1"),
        (Conv(), {"x": "input"}, {"multiple": 0}, "multiple must be >= 1, got 0"),
        (Conv(), {"x": "input"}, {"halo": -1}, "halo must be >= 0, got -1"),
        (Conv(), {"x": "input"}, {"trial": (8, 0)}, "trial must be >= 1, got 0"),
        (Conv(), {"x": "input"}, {"padding": "wrap"}, "padding must be one of zero, edge, got 'wrap'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(network, arguments, options, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(ValueError, match=f"^{pattern}"):
        foreign(network, arguments, **options)


# From a configuration.

STRANGERS = """
import torch
from torch import nn
class Sum(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Conv2d(width, 2, 1)
    def forward(self, sample, y):
        return (self.layer(sample) + y[:, None, None, None],)
class Share:
    def __init__(self, channel):
        self.channel = channel
    def __call__(self, condition):
        return condition[:, self.channel].mean(dim=(-2, -1)).round().long()
"""

NODE = """
_target_: vecfield_diffusion.models.foreign.Foreign
network: {_target_: strangers.Sum, width: 7}
arguments:
  sample: input
  y: {_target_: strangers.Share, channel: 2}
output: 0
multiple: 8
"""


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text(STRANGERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield yaml.safe_load(NODE)
    sys.modules.pop("strangers", None)


@pytest.mark.parametrize("permission", [{"trusted": True}, {"trust": ["strangers"]}])
def test_built_from_a_configuration(strangers, permission):
    network = build(strangers, "model", in_channels=7, periodic=(True, False), **permission)
    x = X.float()
    expected = network.network.layer(x) + x[:, 4].mean((-2, -1)).round()[:, None, None, None]
    torch.testing.assert_close(network(x, LEVEL), expected)
    assert network.periodic == (True, False)


def test_a_checkpoint_names_strangers_only_if_they_are_trusted(strangers):
    with pytest.raises(UserError, match=r"^model\.network\._target_=strangers\.Sum: .*add trust=\[strangers\]$"):
        build(strangers, "model", in_channels=7)
    function = {**strangers, "network": {"_target_": "torch.nn.Identity"}}
    with pytest.raises(UserError, match=r"^model\.arguments\.y\._target_=strangers\.Share: "):
        build(function, "model", in_channels=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": {"x": "input"}}, r"^model\.arguments: must be those of Sum \(sample, y\): "),
        ({"arguments": {"sample": "inputs", "y": 3}}, r"^model\.arguments=.*: expected a mapping .*token"),
        ({"output": None}, r"^model\.output: must lead to a tensor \(2, 2, 32, 32\), got tuple of 1"),
        ({"output": 2}, r"^model\.output: 2 is not in the tuple of 1"),
        ({"multiple": 0}, r"^model\.multiple: must be >= 1, got 0$"),
        ({"padding": "edges"}, r"^model\.padding=edges: expected one of zero, edge, got 'edges'"),
        (
            {"network": {"_target_": "strangers.Sum", "width": 6}},
            r"^model\.network: refuses sample \(2, 7, 32, 32\), y",
        ),
        ({"network": {"_target_": "strangers.Sum"}}, r"^model\.network: .*missing 1 required .*'width'"),
    ],
)
def test_mistakes_in_a_configuration_name_the_key(strangers, change, message):
    with pytest.raises(UserError, match=message):
        build(strangers | change, "model", trusted=True, in_channels=7)


def test_the_option_takes_its_network_from_the_command_line():
    """`model=foreign` with what it must be given; without, one is told so."""
    with pytest.raises(UserError, match=r"^model\.(network|arguments)= is missing"):
        commands.train.config("model=foreign")
    config = commands.train.config(
        "model=foreign",
        "model.network={_target_: torch.nn.Conv2d, in_channels: 7, out_channels: 2, kernel_size: 1}",
        "model.arguments={input: input}",
        "model.multiple=8",
    )
    network = build(config["model"], "model", in_channels=7, periodic=(False, False))
    torch.testing.assert_close(network(X.float(), LEVEL), network.network(X.float()))


# diffusers, where it is installed.

SMALL = {
    "in_channels": 7,
    "out_channels": 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
NODES = {
    "UNet2DModel": {
        "network": SMALL
        | {
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"],
            "num_class_embeds": 4,
            "attention_head_dim": 4,
        },
        "arguments": {"sample": "input", "timestep": "level", "class_labels": 3},
    },
    "UNet2DConditionModel": {
        "network": SMALL
        | {
            "in_channels": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 5,
            "attention_head_dim": 4,
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 5,
        },
        "arguments": {
            "sample": "field",
            "timestep": "level",
            "encoder_hidden_states": "token",
            "class_labels": "vector",
        },
    },
}


@pytest.mark.parametrize("name", NODES)
def test_networks_of_diffusers(name):
    """Built as from a checkpoint that one trusts; the answer equals the library's own call on the padded field."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    node = {
        "_target_": "vecfield_diffusion.models.foreign.Foreign",
        "network": {"_target_": f"diffusers.{name}", **NODES[name]["network"]},
        "arguments": NODES[name]["arguments"],
        "output": "sample",
        "multiple": 2,
    }
    wrapped = build(node, "model", trust=["diffusers"], in_channels=7).eval()
    x, level = torch.randn(3, 7, 9, 11), torch.tensor([-1.5, 0.0, 2.0])
    mean = x[:, 2:].mean((-2, -1))
    whole = F.pad(x, (0, 1, 0, 1))
    with torch.no_grad():
        if name == "UNet2DModel":
            answer = wrapped.network(whole, level, class_labels=torch.tensor([3, 3, 3])).sample
        else:
            answer = wrapped.network(whole[:, :2], level, mean[:, None], class_labels=mean).sample
        torch.testing.assert_close(wrapped(x, level), answer[..., :9, :11])
        assert (wrapped(x, level) - wrapped(torch.cat([x[:, :2], x[:, 2:] + 1], dim=1), level)).abs().max() > 1e-4
        assert (wrapped(x, level) - wrapped(x, level + 1)).abs().max() > 1e-4
    with pytest.raises(UserError, match=r"^model\.output: must lead to a tensor \(2, 2, 32, 32\), got UNet2D\w*Output"):
        build(node | {"output": None}, "model", trust=["diffusers"], in_channels=7)
    with pytest.raises(UserError, match=r"^model\.network: refuses sample "):
        network = node["network"] | {"in_channels": 3}
        build(node | {"network": network}, "model", trust=["diffusers"], in_channels=7)
