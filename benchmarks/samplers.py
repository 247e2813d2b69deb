"""What a sampler costs beyond its denoiser: `python benchmarks/samplers.py [--threads 1 2] [--rounds 30]`.

The denoiser returns a tensor made beforehand, and so does `torch.randn`, for all: what is left is the sampler,

    (time of a run - time of its calls of the denoiser alone) / calls.

Other libraries (the `bench` extra) run in the same process, in turns, so that a noisy machine slows all: the median
over the rounds counts, and that of the ratio to ours in the same round. What may be prepared for many runs (levels,
`set_timesteps`) is not timed. Two more columns are counted in a run of their own: the memory made per evaluation, in
units of the state, and how often per evaluation Python reads the value of a tensor, which waits for the device that the
tensor is on.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vecfield_diffusion.diffusion.formulations import EDM
from vecfield_diffusion.samplers.adaptive import Adaptive
from vecfield_diffusion.samplers.base import Sampler
from vecfield_diffusion.samplers.deterministic import DPMpp2M, Euler, Heun, Midpoint
from vecfield_diffusion.samplers.stochastic import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    HeunSDE,
    Langevin,
    PredictorCorrector,
)

SHAPE = (16, 2, 64, 64)
STEPS = 64
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
#: The operators that hand the value of a tensor, or a shape that depends on it, to Python.
READS = ("_local_scalar_dense", "nonzero", "equal")


class StandIn:
    """A denoiser, and a source of noise, that costs nothing: the same tensor every time. Calls are counted."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x_hat, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        self.noise = {dtype: noise.to(dtype) for dtype in (torch.float32, torch.float64)}
        self.fraction = torch.full(SHAPE, 0.5)
        self.calls = 0

    def __call__(self, z: Tensor, s: Tensor) -> Tensor:
        self.calls += 1
        return self.x_hat

    def moments(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """As `LevelDenoiser.moments`."""
        self.calls += 1
        return self.x_hat, self.fraction

    def draw(self) -> Tensor:
        """Our noise function."""
        return self.noise[torch.float32]

    def replaces_randn(self) -> AbstractContextManager[object]:
        """A context in which torch's normal noise is the prepared one."""
        stack = ExitStack()
        stack.enter_context(mock.patch.object(torch, "randn", lambda *shape, **options: self.draw()))
        stack.enter_context(mock.patch.object(torch, "randn_like", lambda z, **options: self.noise[z.dtype]))
        return stack


@dataclass(frozen=True)
class Entry:
    """One row: `run` is timed, less its calls of `denoise`; `prepare`, before each run, is not."""

    method: str
    name: str
    run: Callable[[], object]
    denoise: Callable[[Tensor, Tensor], object]
    prepare: Callable[[], object] = lambda: None


class Counter(TorchDispatchMode):
    """Counts the bytes of new tensors as large as the state and the reads of tensors' values."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.reads += func.overloadpacket.__name__ in READS
        known = {t.untyped_storage().data_ptr() for t in tensors((*args, *(kwargs or {}).values()))}
        for made in tensors((out,)):
            if made.numel() >= math.prod(SHAPE) and made.untyped_storage().data_ptr() not in known:
                self.bytes += made.nbytes
        return out


def tensors(values: tuple[Any, ...] | list[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors(value)


def one_pass(stand_in: StandIn) -> Iterator[Entry]:
    """The least that a step can cost: one pass over the state."""

    def run() -> None:
        for _ in range(STEPS):
            torch.lerp(stand_in(stand_in.x_hat, stand_in.x_hat), stand_in.draw(), 0.5)

    yield Entry("one pass", "torch.lerp", run, stand_in)


def ours(stand_in: StandIn) -> Iterator[Entry]:
    """Every sampler of this package."""
    samplers: dict[str, Sampler] = {
        "euler": Euler(STEPS),
        "ddim": DDIM(STEPS),
        "heun": Heun(STEPS),
        "midpoint": Midpoint(STEPS),
        "dpmpp_2m": DPMpp2M(STEPS),
        "ddim eta=1": DDIM(STEPS, eta=1.0),
        "ddpm": Ancestral(STEPS),
        "ddpm learned": Ancestral(STEPS, variance="learned"),
        "edm_stochastic": Heun(STEPS, S_churn=40.0, S_min=0.05, S_max=50.0, S_noise=1.003),
        "euler_maruyama": EulerMaruyama(STEPS),
        "heun_sde": HeunSDE(STEPS),
        "predictor_corrector": PredictorCorrector(STEPS),
        "langevin": Langevin(STEPS),
        "adaptive": Adaptive(),
    }
    path = EDM(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    for method, sampler in samplers.items():
        run = partial(sampler.sample, stand_in, path.levels(sampler.steps), stand_in.draw)
        yield Entry(method, "ours", run, stand_in)


def edm_loops(stand_in: StandIn) -> Iterator[Entry]:
    """The algorithms of Karras et al. (NeurIPS 2022) as they are commonly written: levels as tensors, state in float64.

    In float32, too, to tell the form of the loop from its precision.
    """
    levels = EDM(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX).levels(STEPS)
    for method, options in (
        ("euler", {"second": False}),
        ("heun", {}),
        ("edm_stochastic", {"S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}),
    ):
        for dtype in (torch.float32, torch.float64):
            run = partial(edm_loop, stand_in, levels, dtype, **options)
            yield Entry(method, f"EDM-style loop, {str(dtype).removeprefix('torch.')}", run, stand_in)


def edm_loop(
    denoise: StandIn,
    levels: Tensor,
    dtype: torch.dtype,
    second: bool = True,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
) -> Tensor:
    """Algorithm 1 or, with churn, 2; without `second` the Euler steps alone. The denoiser works in float32."""
    n = len(levels) - 1
    z = denoise.draw().to(dtype) * levels[0]
    for i, (s, r) in enumerate(pairwise(levels)):
        q = s
        if S_churn > 0:
            gamma = min(S_churn / n, math.sqrt(2) - 1) if S_min <= s <= S_max else 0.0
            q = s + gamma * s
            z = z + (q**2 - s**2).sqrt() * S_noise * torch.randn_like(z)
        slope = (z - denoise(z.float(), q).to(dtype)) / q
        new = z + (r - q) * slope
        if second and i < n - 1:
            other = (new - denoise(new.float(), r).to(dtype)) / r
            new = z + (r - q) * (0.5 * slope + 0.5 * other)
        z = new
    return z


def diffusers_loops(stand_in: StandIn) -> Iterator[Entry]:
    """The schedulers of diffusers, in the loop of its documentation, without clipping.

    They are told that the network predicts x0 where they can be, which saves them the conversion.
    """
    diffusers = importlib.import_module("diffusers")
    x0, edm = {"prediction_type": "sample"}, {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX}
    unclipped = {**x0, "clip_sample": False}
    for method, name, options, arguments in (
        ("euler", "EulerDiscreteScheduler", x0, {}),
        ("euler", "EDMEulerScheduler", edm, {"pred_original_sample": stand_in.x_hat}),
        ("ddim", "DDIMScheduler", unclipped, {}),
        ("heun", "HeunDiscreteScheduler", x0, {}),
        ("midpoint", "KDPM2DiscreteScheduler", {}, {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", x0, {}),
        ("dpmpp_2m", "EDMDPMSolverMultistepScheduler", edm, {}),
        ("ddim eta=1", "DDIMScheduler", unclipped, {"eta": 1.0}),
        ("ddpm", "DDPMScheduler", unclipped, {}),
    ):
        scheduler = getattr(diffusers, name)(**options)
        run = partial(scheduler_loop, scheduler, stand_in, **arguments)
        yield Entry(method, f"diffusers {name}", run, stand_in, partial(scheduler.set_timesteps, STEPS))
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=SIGMA_MAX)
    scheduler.set_timesteps(STEPS)
    scheduler.set_sigmas(STEPS)
    yield Entry(
        "predictor_corrector", "diffusers ScoreSdeVeScheduler", partial(score_loop, scheduler, stand_in), stand_in
    )


def scheduler_loop(scheduler: Any, denoise: StandIn, **arguments: Any) -> Tensor:
    """Scale the input, call the model, step."""
    z = denoise.draw() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = denoise(scheduler.scale_model_input(z, t), t)
        z = scheduler.step(output, t, z, **arguments).prev_sample
    return z


def score_loop(scheduler: Any, denoise: StandIn) -> Tensor:
    """Correct, then predict, each with a score of its own."""
    z = denoise.draw() * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i] * torch.ones(len(z))
        z = scheduler.step_correct(denoise(z, sigma), z).prev_sample
        z = scheduler.step_pred(denoise(z, sigma), t, z).prev_sample
    return z


def azula_samplers(stand_in: StandIn) -> Iterator[Entry]:
    """The samplers of azula on its variance-exploding path."""
    samplers, noise, denoise = (importlib.import_module(f"azula.{name}") for name in ("sample", "noise", "denoise"))

    class Posterior(nn.Module):
        schedule = noise.VESchedule(SIGMA_MIN, SIGMA_MAX)

        def forward(self, z: Tensor, t: Tensor) -> Any:
            return denoise.DiracPosterior(stand_in(z, t))

    posterior = Posterior()
    for method, name, options in (
        ("euler", "EulerSampler", {}),
        ("ddim", "DDIMSampler", {}),
        ("heun", "HeunSampler", {}),
        ("dpmpp_2m", "xEABSampler", {"order": 2}),
        ("ddim eta=1", "DDIMSampler", {"eta": 1.0}),
        ("ddpm", "DDPMSampler", {}),
        ("euler_maruyama", "ItoSampler", {}),
        ("predictor_corrector", "PCSampler", {}),
    ):
        sampler = getattr(samplers, name)(posterior, steps=STEPS, silent=True, **options)
        yield Entry(method, f"azula {name}", partial(azula_run, sampler, stand_in), posterior)


def azula_run(sampler: Any, stand_in: StandIn) -> Tensor:
    """A run from its first state."""
    return sampler(stand_in.draw() * SIGMA_MAX)


def entries(stand_in: StandIn) -> list[Entry]:
    """All rows, ours first within a method; a library that is not installed is named and left out."""
    rows = [*one_pass(stand_in), *ours(stand_in), *edm_loops(stand_in)]
    for build in (diffusers_loops, azula_samplers):
        try:
            rows += build(stand_in)
        except ImportError as error:
            print(f"left out, see the `bench` extra: {error}")
    order = list(dict.fromkeys(row.method for row in rows))
    return sorted(rows, key=lambda row: order.index(row.method))


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def count(entry: Entry, stand_in: StandIn) -> tuple[int, float, float]:
    """Calls of a run, and per call the memory made in units of the state and the values read."""
    stand_in.calls = 0
    entry.prepare()
    with Counter() as counter:
        entry.run()
    return stand_in.calls, counter.bytes / stand_in.x_hat.nbytes / stand_in.calls, counter.reads / stand_in.calls


def overhead(entry: Entry, stand_in: StandIn, calls: int) -> float:
    """Microseconds per evaluation beyond the denoiser, measured once."""

    def bare() -> None:
        for _ in range(calls):
            entry.denoise(stand_in.x_hat, stand_in.x_hat)

    entry.prepare()
    return (seconds(entry.run) - seconds(bare)) / calls * 1e6


@torch.no_grad()
def measure(threads: int, rounds: int) -> None:
    """Prints the table for a number of threads."""
    torch.set_num_threads(threads)
    stand_in = StandIn()
    rows = entries(stand_in)
    with stand_in.replaces_randn():
        counts = [count(row, stand_in) for row in rows]
        times = [
            [overhead(row, stand_in, calls) for row, (calls, _, _) in zip(rows, counts, strict=True)]
            for _ in range(rounds)
        ]
    print(f"\nthreads: {torch.get_num_threads()}, rounds: {rounds}, torch {torch.__version__}\n")
    print("| method | sampler | us per evaluation | ratio to ours | memory made | values read |")
    print("|---|---|---|---|---|---|")
    results = zip(rows, counts, zip(*times, strict=True), strict=True)
    for method, group in groupby(results, key=lambda result: result[0].method):
        table = list(group)
        for row, (_, made, reads), spent in table:
            ratio = statistics.median(a / b for a, b in zip(spent, table[0][2], strict=True))
            print(
                f"| {method} | {row.name} | {statistics.median(spent):.0f} | {ratio:.1f} | {made:.1f} | {reads:.1f} |"
            )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads, a table each")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each sampler")
    arguments = parser.parse_args()
    for threads in arguments.threads:
        measure(threads, arguments.rounds)


if __name__ == "__main__":
    main()
