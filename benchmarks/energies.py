"""What an energy costs: `python benchmarks/energies.py [--threads 1] [--rounds 15] [--size 64] [--batch 4]`.

A plain network, and the one that is the gradient of its energy, of the same sizes: one step of training (the loss and
its gradient by the weights) and one evaluation without gradients. All run in turns, so that a noisy machine slows all;
the median and the quartiles of the ratio to the plain network in the same round count. Memory is what a step keeps for
its gradient. `torch's own` has the second derivatives that torch composes of elementary ones, in place of those of
`models/twice.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.diffusion.losses import denoising_loss
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.models import energy
from vecfield_diffusion.models.dit import DiT
from vecfield_diffusion.models.energy import DiTEnergy, UNetEnergy
from vecfield_diffusion.models.gaussian import AroundField, Waves
from vecfield_diffusion.models.gaussian_energy import GaussianEnergy
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.training.batches import Batch
from vecfield_diffusion.training.memory import kept_bytes

UNET = {"channels": [32, 64, 96], "blocks": 1, "embedding": 128}  # that of unet_tiny
TRANSFORMER = {"width": 128, "depth": 4, "heads": 4, "patch": 4}
#: Each network beside the plain one of its size, which comes first; whether torch's own second derivatives are used.
GROUPS = {
    "UNet": {
        "plain": (lambda **more: UNet(7, **UNET, **more), False),
        "inner": (lambda **more: UNetEnergy(7, **UNET, **more), False),
        "squares": (lambda **more: UNetEnergy(7, form="squares", **UNET, **more), False),
        "3 scales": (lambda **more: UNetEnergy(7, scales=3, **UNET, **more), False),
        "gaussian": (lambda **more: GaussianEnergy(7, **UNET, **more), False),
        "torch's own": (lambda **more: UNetEnergy(7, **UNET, **more), True),
    },
    "DiT": {
        "plain": (lambda **more: DiT(7, **TRANSFORMER, **more), False),
        "inner": (lambda **more: DiTEnergy(7, **TRANSFORMER, **more), False),
        "torch's own": (lambda **more: DiTEnergy(7, **TRANSFORMER, **more), True),
    },
}


@contextlib.contextmanager
def torchs_own() -> Iterator[None]:
    """Within the block, second derivatives are those that torch has."""
    with mock.patch.object(energy, "twice_differentiable", lambda: sdpa_kernel(SDPBackend.MATH)):
        yield


class Contender:
    """A network with its data, and the two things that are timed."""

    def __init__(self, make: Callable[..., torch.nn.Module], own: bool, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if options.bf16 else None
        network = make(periodic=(True, True)).to(memory_format=torch.channels_last)
        if isinstance(network, AroundField):
            white = torch.eye(2, dtype=torch.complex128)[:, :, None, None]
            network.learn(lambda: Waves(white.expand(2, 2, options.size, options.size)))
        self.denoiser = Denoiser(network, EDM(sigma_max=80.0), Normalizer(torch.zeros(2, 1, 1), 1.0), dtype)
        x0, noise = torch.randn(2, options.batch, 2, options.size, options.size)
        observation = Observation.none(options.batch, torch.ones(options.size, options.size, dtype=torch.bool))
        t = self.denoiser.diffusion.sample_times(options.batch, torch.Generator().manual_seed(0))
        self.batch = Batch(x0, observation.valid, observation, t, noise)
        self.own = torchs_own if own else contextlib.nullcontext

    def step(self) -> None:
        """One step of training, without the optimizer's."""
        batch = self.batch
        self.denoiser.zero_grad(set_to_none=True)
        loss = denoising_loss(self.denoiser, batch.x0, batch.measured, batch.observation, batch.t, batch.noise)
        loss.mean().backward()

    @torch.no_grad()
    def evaluation(self) -> None:
        """One evaluation, as a sampler makes it."""
        self.denoiser.requires_grad_(False)
        self.denoiser(self.batch.x0, torch.ones(len(self.batch.x0)), self.batch.observation)
        self.denoiser.requires_grad_(True)

    def seconds(self, name: str) -> float:
        """Returns how long one of both takes."""
        with self.own():
            start = time.perf_counter()
            getattr(self, name)()
            return time.perf_counter() - start

    def kept(self) -> float:
        """Returns what a step keeps for its gradient, in MB."""
        with self.own():
            return kept_bytes(self.denoiser, self.batch) / 1e6


def quartiles(values: list[float]) -> str:
    """Returns the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def compare(
    title: str, group: dict[str, tuple[Callable[..., torch.nn.Module], bool]], options: argparse.Namespace
) -> None:
    """Prints one line for each contender of a group."""
    contenders = {name: Contender(make, own, options) for name, (make, own) in group.items()}
    names = ("step", "evaluation")
    times: dict[str, dict[str, list[float]]] = {name: {what: [] for what in names} for name in contenders}
    for k in range(options.rounds + 1):
        for name, contender in contenders.items():
            for what in names:
                seconds = contender.seconds(what)
                if k:  # the first round warms up
                    times[name][what].append(seconds)
    plain = times["plain"]
    milliseconds, kept = 1e3 * statistics.median(plain["step"]), contenders["plain"].kept()
    print(f"{title}: a plain step {milliseconds:.0f} ms, kept {kept:.0f} MB")
    for name, contender in contenders.items():
        if name != "plain":
            ratios = {what: [a / b for a, b in zip(times[name][what], plain[what], strict=True)] for what in names}
            kept = contender.kept() / contenders["plain"].kept()
            print(
                f"  {name:12} "
                + ", ".join(f"{what} x {quartiles(ratios[what])}" for what in names)
                + f", kept x {kept:.1f}"
            )


def main() -> None:
    """Measures all groups."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("threads", 1), ("rounds", 15), ("size", 64), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bf16", action="store_true", help="networks in bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for title, group in GROUPS.items():
        compare(title, group, options)


if __name__ == "__main__":
    main()
