"""Training steps beside other libraries: `python benchmarks/training.py [--samples 3200,6400] [overrides of train.py]`.

Networks of about 1.5 M parameters take training steps in turns (forward, loss, backward, AdamW), so that a noisy
machine slows all alike; libraries that are not installed are left out (`pip install -e .[bench]`). Printed are samples
a second, the ratio to azula's UNet within a round, its median and quartiles, and the share of the peak: floating-point
operations a second over those of the fastest 3x3 convolution, forward and backward, among several sizes. `train.py` is
the whole step: a batch made, preconditioning, gradients clipped, averages kept. Each `--network NAME` takes one; with
`--compile` they are compiled by torch as well, which takes minutes.

With `--samples` each network then learns from as many samples, the same for all, at one learning rate, and its losses
on fixed validation batches are printed; ours are periodic where the data are. The time of one thread is that of its
processor, which others on the machine do not change much.

With `--gaussian` a training of `model=gaussian` is timed instead, beside that of its UNet alone on the same input,
which no batch is made for: new batches, whose systems are factorised, those that use them again (`training/reuse.py`),
and the samples a second of both in their proportions over those of the UNet alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vecfield_diffusion.commands import train as main
from vecfield_diffusion.models.layers import FourierEmbedding
from vecfield_diffusion.models.unet import UNet, last
from vecfield_diffusion.programs.train import prepare
from vecfield_diffusion.training.ema import EMA
from vecfield_diffusion.training.trainer import TrainingRun

#: Features of the level's embedding in azula's UNet.
EMBEDDING = 128
#: Channels and cells along each axis of the convolutions that the peak is sought among.
CONVOLUTIONS = ((32, 64), (64, 32), (64, 64), (96, 16), (128, 16), (128, 32))
#: The type that a network computes in, by its name.
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}


class Azula(nn.Module):
    """azula's UNet with its own defaults, its blocks modulated by an embedding of the level."""

    def __init__(self, channels: int, periodic: bool = False) -> None:
        super().__init__()
        from azula.nn.unet import UNet as Peer

        sizes = dict(hid_channels=(32, 64, 128), hid_blocks=(1, 2, 1), mod_features=EMBEDDING, periodic=periodic)
        self.embed, self.network = FourierEmbedding(EMBEDDING), Peer(channels, 2, **sizes)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.network(x, self.embed(level))


class Diffusers(nn.Module):
    """The UNet2DModel of diffusers, attention at the coarsest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        sizes = dict(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=16, attention_head_dim=32)
        kinds = dict(
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
        self.network = UNet2DModel(in_channels=channels, out_channels=2, **sizes, **kinds)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.network(x, level).sample


class DenoisingDiffusion(nn.Module):
    """The Unet of denoising-diffusion-pytorch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from denoising_diffusion_pytorch import Unet as Peer

        self.network = Peer(20, channels=channels, out_dim=2, dim_mults=(1, 2, 4))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.network(x, level)


#: Other libraries' networks by the name of the package, the first installed being what ratios are taken to.
PEERS: dict[str, Callable[[int], nn.Module]] = {
    "azula": Azula,
    "azula, periodic": partial(Azula, periodic=True),
    "diffusers": Diffusers,
    "denoising_diffusion_pytorch": DenoisingDiffusion,
}
#: Ours by name, as settings of `UNet`, that train.py takes as `model.*`.
OURS: dict[str, dict[str, Any]] = {
    "here": dict(channels=[32, 64, 128], blocks=1, embedding=192),
    "here, patch=2": dict(channels=[48, 80, 128], blocks=1, embedding=96, patch=2),
}


def installed() -> dict[str, Callable[[int], nn.Module]]:
    """Returns the peers that can be imported, and says which cannot."""
    found = {name: make for name, make in PEERS.items() if importlib.util.find_spec(name.split(",")[0])}
    for name in PEERS.keys() - found.keys():
        print(f"{name}: not installed, left out")
    return found


def chosen(made: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns those of some networks that the options name; all where they name none."""
    return {name: made[name] for name in options.network or made}


def networks(channels: int) -> dict[str, nn.Module]:
    """Returns all networks by name, of `channels` channels of input."""
    made = {name: make(channels) for name, make in installed().items()}
    for name, sizes in OURS.items():
        made[name] = UNet(channels, periodic=(False, False), **sizes)
        made[f"{name}, periodic"] = UNet(channels, periodic=(True, True), **sizes)
    return made


def clock() -> float:
    """Returns seconds: those of the processor where one thread works, else those that pass."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(work: Callable[[], object]) -> float:
    """Returns how long some work takes."""
    begun = clock()
    work()
    return clock() - begun


def training_step(network: nn.Module, batch: int, channels: int, side: int, kind: torch.dtype | None) -> Callable:
    """Returns a function that takes a step of a network on one batch."""
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    x, level = last(torch.randn(batch, channels, side, side)), torch.rand(batch)
    target = torch.randn(batch, 2, side, side)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", kind, enabled=kind is not None):
            output = network(x, level)
        F.mse_loss(output.float(), target).backward()
        optimizer.step()

    return step


def operations(step: Callable[[], None]) -> int:
    """Returns the floating-point operations of a step in convolutions and products of matrices."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


class Convolution(NamedTuple):
    """A convolution forward and backward, and the operations that it takes."""

    work: Callable[[], None]
    operations: int


def convolution(channels: int, side: int, batch: int, kind: torch.dtype | None) -> Convolution:
    """Returns a 3x3 convolution."""
    kind = kind or torch.float32
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(kind, memory_format=torch.channels_last)
    x = last(torch.randn(batch, channels, side, side, dtype=kind)).requires_grad_()
    gradient = last(torch.randn(batch, channels, side, side, dtype=kind))

    def work() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(gradient)

    return Convolution(work, 3 * 2 * 9 * channels**2 * side**2 * batch)


def run_of(overrides: Sequence[str], folder: Path) -> TrainingRun:
    """Returns a training of train.py."""
    return prepare(main.config("trainer.score_cases=0", *overrides), folder)


def as_overrides(sizes: dict[str, Any]) -> list[str]:
    """Returns settings of our network as train.py takes them."""
    return ["model=unet_tiny", *(f"model.{name}={str(value).replace(' ', '')}" for name, value in sizes.items())]


def whole_step(run: TrainingRun) -> Callable[[], None]:
    """Returns a function that takes the next step of a training, batch included."""
    return lambda: run.step(run.batches(run.counters.step)).item()


def compare(options: argparse.Namespace, run: TrainingRun) -> None:
    """Prints the table of speed, for each precision."""
    channels, side = next(iter(run.denoiser.network.stem.parameters())).shape[1], run.batches(0).x0.shape[-1]
    for precision, kind in PRECISIONS.items():
        made = chosen(networks(channels), options)
        sizes = {name: sum(weight.numel() for weight in network.parameters()) for name, network in made.items()}
        steps = {name: training_step(network, options.batch, channels, side, kind) for name, network in made.items()}
        flops = {name: operations(step) for name, step in steps.items()}
        ours, others = next(iter(OURS)), {}
        if ours in made:
            run.denoiser.autocast = kind
            others[f"{ours}, train.py"] = ours, whole_step(run)
        for name in made if options.compile else ():
            step = training_step(torch.compile(made[name]), options.batch, channels, side, kind)
            others[f"{name}, compiled"] = name, step
        for name, (like, step) in others.items():
            steps[name], sizes[name], flops[name] = step, sizes[like], flops[like]
        peaks = [convolution(c, cells, options.batch, kind) for c, cells in CONVOLUTIONS]
        for work in (*steps.values(), *(peak.work for peak in peaks)):
            work()
        times: dict[str, list[float]] = {name: [] for name in steps}
        speeds: list[list[float]] = []
        for _ in range(options.rounds):
            for name, step in steps.items():
                times[name].append(seconds(step))
            speeds.append([peak.operations / seconds(peak.work) for peak in peaks])
        peak = max(median(column) for column in zip(*speeds, strict=True))
        print(f"{precision}, batch {options.batch} of {side}x{side}, peak {peak / 1e9:.0f} GFLOP/s")
        table(times, sizes, flops, options.batch, peak)


def table(times: dict[str, list[float]], sizes: dict[str, int], flops: dict[str, int], batch: int, peak: float) -> None:
    """Prints a line for each network."""
    base = times[next(iter(times))]
    print(
        f"| {'network':24} | parameters | samples/s | ratio (quartiles) | GFLOP a sample | of the peak |\n"
        + "|---" * 6
        + "|"
    )
    for name, found in times.items():
        ratios = [theirs / own for theirs, own in zip(base, found, strict=True)]
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rate = batch / median(found)
        print(
            f"| {name:24} | {sizes[name] / 1e6:.2f} M | {rate:.1f} | {middle:.2f} ({low:.2f}-{high:.2f}) "
            f"| {flops[name] / batch / 1e9:.2f} | {100 * rate * flops[name] / batch / peak:.0f} % |",
            flush=True,
        )


def losses(options: argparse.Namespace, overrides: list[str], folder: Path) -> None:
    """Prints the losses of each network after as many samples."""
    numbers = [int(number) // options.batch for number in options.samples.split(",")]
    runs = {
        name: run_of([*overrides, *as_overrides(sizes)], folder / f"ours{k}")
        for k, (name, sizes) in enumerate(OURS.items())
    }
    first = next(iter(runs.values()))
    channels = next(iter(first.denoiser.network.stem.parameters())).shape[1]
    for name, make in installed().items():
        runs[name] = with_network(first, make(channels))
    runs = chosen(runs, options)
    for name, run in runs.items():
        taken = 0.0
        for steps in numbers:
            begun = clock()
            for k in range(run.counters.step, steps):
                run.step(run.batches(k))
            taken += clock() - begun
            with run.ema.applied(run.denoiser.network):
                found = run.validation_loss()["val/loss"]
            print(
                f"{name:24} validation loss {found:.4f} after {run.counters.samples} samples, {taken:.0f} s", flush=True
            )


def with_network(run: TrainingRun, network: nn.Module) -> TrainingRun:
    """Returns the same training with another network, and an optimizer and counters of its own."""
    old = run.denoiser
    denoiser = type(old)(network, old.diffusion, old.normalizer, old.autocast)
    settings = {key: run.optimizer.defaults[key] for key in ("lr", "betas", "weight_decay", "fused")}
    optimizer = type(run.optimizer)(denoiser.parameters(), **settings)
    return replace(run, denoiser=denoiser, optimizer=optimizer, counters=type(run.counters)())


def around_gaussian(options: argparse.Namespace, run: TrainingRun) -> None:
    """Prints what a training around a Gaussian field takes beside its network alone."""
    network, given = run.denoiser.network.network, []
    network.register_forward_pre_hook(lambda module, inputs: given.append([part.detach() for part in inputs]))
    step, kind = whole_step(run), run.denoiser.autocast
    times: dict[str, list[float]] = {"new": [], "again": [], "alone": []}
    times["new"] = [seconds(step) for _ in range(run.batches.pool)]
    inputs = given[0]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, fused=True)
    average = EMA(network, run.trainer.ema)

    def alone() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", kind, enabled=kind is not None):
            output = network(*inputs)
        output.float().square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), run.trainer.grad_clip)
        optimizer.step()
        average.update(network, run.trainer.batch_size, run.counters.samples)

    alone()
    for _ in range(options.rounds):
        times["again"].append(seconds(step))
        times["alone"].append(seconds(alone))
        given.clear()
    new, again, own = (median(found) for found in times.values())
    uses = run.batches.uses * run.batches.together
    share = 1 / uses
    whole = share * new + (1 - share) * again
    shape = " x ".join(map(str, inputs[0].shape))
    print(
        f"{shape} in {kind or torch.float32}: {len(times['new'])} new batches {new:.2f} s, again {1e3 * again:.0f} ms "
        f"({uses} uses), UNet alone {1e3 * own:.0f} ms; samples/s over those of the UNet {own / whole:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", default="")
    parser.add_argument("--gaussian", action="store_true")
    parser.add_argument("--network", action="append", metavar="NAME")
    parser.add_argument("--compile", action="store_true")
    options, rest = parser.parse_known_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        if options.gaussian:
            around_gaussian(options, run_of(rest, Path(place)))
            sys.exit()
        rest = [f"trainer.batch_size={options.batch}", *rest]
        if options.rounds:
            compare(options, run_of([*rest, *as_overrides(next(iter(OURS.values())))], Path(place) / "speed"))
        if options.samples:
            losses(options, rest, Path(place))
