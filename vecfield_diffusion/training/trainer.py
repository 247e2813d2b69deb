"""The training loop.

Time is counted in steps and samples. Everything random in step k follows from the seed and k, so the state of a run is
its weights, their average, the optimizer and the counters: run the same command again and it goes on, bit for bit on a
CPU, as if it had never stopped. Only `max_minutes` together with `cooldown` ties the learning rate to the clock.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.losses import Penalty, denoising_loss
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.training.batches import Batch, Batches
from vecfield_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from vecfield_diffusion.training.ema import EMA
from vecfield_diffusion.training.loggers import JSONLines, Logger


class Stopped(Exception):
    """The run was asked to stop by a signal; its state is saved. `signal` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@dataclass
class Counters:
    """How far a run is."""

    step: int = 0
    samples: int = 0
    minutes: float = 0.0
    best: float = math.inf


@dataclass
class Trainer:
    """How to train.

    Arguments:
        max_steps: Optimizer steps.
        max_minutes: Stop after this many minutes of training, resumed ones included, whatever `max_steps` says.
        batch_size: Samples of a step.
        accumulate: Parts that a batch is worked on in, one after another, where memory is short.
        warmup: Samples over which the learning rate rises from zero.
        cooldown: The last share of the run over which the learning rate falls to zero; 0 keeps it. A run whose end
            has been moved falls from another point.
        grad_clip: The largest norm of the gradient.
        ema: Half-life of the averaged weights in samples.
        precision: `bf16` or `float32` for the network; `auto` takes bf16 where the processor computes in it.
        condition_dropout: The share of samples that are told no observation.
        sigma_obs: The largest error of an observation in training, in standard deviations of the data.
        validate_every: Steps between validations.
        validation_batches: Batches of a validation, the same each time.
        score_cases: Validation snapshots that are filled with the sampler at each validation; 0 skips it.
        score_members: Ensemble members of each.
        log_every: Steps between lines of the log.
        checkpoint_minutes: Minutes between checkpoints.

    Raises:
        ValueError: A number out of range.
    """

    max_steps: int = 20000
    max_minutes: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    warmup: int = 3000
    cooldown: float = 0.0
    grad_clip: float = 1.0
    ema: float = 50000
    precision: Literal["auto", "bf16", "float32"] = "auto"
    condition_dropout: float = 0.1
    sigma_obs: float = 0.1
    validate_every: int = 1000
    validation_batches: int = 4
    score_cases: int = 8
    score_members: int = 4
    log_every: int = 50
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulate", "validate_every", "validation_batches", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("condition_dropout", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("grad_clip", "checkpoint_minutes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("warmup", "ema", "sigma_obs", "score_cases"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.score_members < 2:
            raise ValueError(f"score_members must be >= 2, a spread needs two, got {self.score_members}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size={self.batch_size}, got {self.accumulate}")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes must be > 0 or null, got {self.max_minutes}")

    def progress(self, counters: Counters) -> float:
        """The share of the run that is done: by steps or by time, whichever is further."""
        return max(counters.step / self.max_steps, counters.minutes / self.max_minutes if self.max_minutes else 0.0)

    def rate(self, counters: Counters) -> float:
        """The factor on the learning rate: a linear rise at the start, a linear fall at the end."""
        rise = min(1.0, (counters.samples + self.batch_size) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (1 - self.progress(counters)) / self.cooldown) if self.cooldown else 1.0
        return rise * max(fall, 0.0)


@dataclass
class Run:
    """One run of a trainer in a folder: the state, the loop, what is written.

    Arguments:
        trainer: How to train.
        denoiser: What to train, on its device.
        optimizer: Of the denoiser's parameters.
        batches: The training batches.
        validation: The validation batches.
        folder: The run folder.
        logger: A further logger.
        identity: What every checkpoint holds beside the state of training: configuration, grid, statistics.
        score: `(picture path) -> scores` of a small ensemble, which it also draws; None skips it.
        penalty: What is added to the loss for the estimate, on the device of the denoiser.
    """

    trainer: Trainer
    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    batches: Batches
    validation: Batches
    folder: Path
    logger: Logger
    identity: dict[str, Any]
    score: Callable[[Path], dict[str, float]] | None = None
    penalty: Penalty | None = None
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.device = next(self.denoiser.parameters()).device
        self.ema = EMA(self.denoiser.network, self.trainer.ema)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scores: dict[str, float] = {}
        self.losses: list[Tensor] = []  # since the last line of the log
        self.signal: int | None = None

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "checkpoints" / "last.pt"

    def save(self, path: Path) -> None:
        """Writes a checkpoint."""
        state = {
            "network": self.denoiser.network.state_dict(),
            "diffusion": self.denoiser.diffusion.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": vars(self.counters),
            "scores": self.scores,
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.zeros(0),
        }
        save_checkpoint(path, {**self.identity, **state})

    def resume(self) -> bool:
        """Goes on from the last checkpoint, where there is one.

        Raises:
            UserError: It cannot be read, or is of another network or optimizer.
        """
        if not self.last.exists():
            return False
        state = load_checkpoint(self.last)
        before, now = state.get("data") or {}, self.identity.get("data") or {}
        if any(now.get(key) != value for key, value in before.items()):  # an older run may know less of its data
            raise UserError(
                f"{self.last}: the data have changed since this run began: {before} then, {now} now. "
                f"Restore them, or choose another name=... for a new run"
            )
        try:
            self.denoiser.network.load_state_dict(state["network"])
            self.denoiser.diffusion.load_state_dict(state.get("diffusion", {}))
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.counters = Counters(**state["counters"])
            self.scores, self.losses = state["scores"], list(state["losses"].to(self.device))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.last} does not fit this run ({reason}). Remove it, or choose another name=..."
            ) from error
        return True

    def train(self) -> dict[str, float]:
        """Trains to the end and returns the last validation scores.

        Raises:
            Stopped: A signal came; the state was saved.
            UserError: The loss is no longer finite; the last good checkpoint is kept.
        """
        for folder in (self.folder / "checkpoints", self.folder / "samples"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"the folder {folder} cannot be made: {error.strerror}") from error
        lines = JSONLines(self.folder / "metrics.jsonl", self.counters.step)
        try:
            with self.signals(), self.prefetched() as batches:
                self.loop(batches, lines)
        finally:
            lines.close()
        return self.scores

    def loop(self, batches: Iterator[Batch], lines: JSONLines) -> None:
        """Steps until the end or a signal."""
        trainer, counters = self.trainer, self.counters
        total = trainer.max_steps * trainer.batch_size
        bar = tqdm(
            total=total, initial=counters.samples, unit=" samples", unit_scale=True, disable=None, smoothing=0.05
        )
        clock = saved = time.monotonic()
        start = counters.step
        with bar:
            while trainer.progress(counters) < 1 and self.signal is None:
                self.losses.append(self.step(next(batches)))
                now = time.monotonic()
                counters.minutes += (now - clock) / 60
                clock = now
                bar.update(trainer.batch_size)
                done = trainer.progress(counters) >= 1
                if counters.step % trainer.log_every == 0 or done:
                    loss = self.finite()
                    self.losses = []
                    bar.set_postfix(loss=f"{loss:.4f}")
                    self.log(lines, {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"]})
                if counters.step % trainer.validate_every == 0 or done:
                    self.finite()
                    self.validate(lines)
                    clock = time.monotonic()
                if done or now - saved > 60 * trainer.checkpoint_minutes:
                    self.finite()
                    self.save(self.last)
                    saved = time.monotonic()
        if self.signal is not None:
            if counters.step > start:
                self.finite()
                self.save(self.last)
            raise Stopped(self.signal)

    def step(self, batch: Batch) -> Tensor:
        """One step of the optimizer; returns the loss, still on the device."""
        trainer, counters = self.trainer, self.counters
        factor = trainer.rate(counters)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        self.denoiser.train()
        torch.manual_seed(counters.step)  # dropout draws from the global state
        total = torch.zeros((), device=self.device)
        size = trainer.batch_size // trainer.accumulate
        for first in range(0, trainer.batch_size, size):
            part = batch[first : first + size]
            given = (part.x0, part.measured, part.observation, part.t, part.noise)
            loss = denoising_loss(self.denoiser, *given, training=True, penalty=self.penalty).mean()
            loss = loss / trainer.accumulate
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), trainer.grad_clip)
        self.optimizer.step()
        counters.step += 1
        counters.samples += trainer.batch_size
        self.ema.update(self.denoiser.network, trainer.batch_size, counters.samples)
        return total + 0 * norm  # a gradient that is not finite spoils the weights as much as such a loss

    def finite(self) -> float:
        """The mean of the losses since the last line of the log; the device is waited for here alone."""
        if not self.losses:
            return 0.0
        loss = torch.stack(self.losses).mean().item()
        if not math.isfinite(loss):
            kept = f"The last good checkpoint is kept: {self.last}" if self.last.exists() else "No checkpoint was kept"
            raise UserError(
                f"the loss is no longer finite at step {self.counters.step}. {kept}. "
                "Lower optimizer.lr or trainer.grad_clip, or use trainer.precision=float32"
            )
        return loss

    def validate(self, lines: JSONLines) -> None:
        """The loss on fixed batches, by noise level too, and the scores of a small ensemble; with averaged weights."""
        with self.averaged():
            values = self.validation_loss()
            picture = self.folder / "samples" / f"{self.counters.step:07d}.png"
            if self.score is not None:
                values |= self.score(picture)
        self.scores = values
        self.log(lines, values)
        said = ", ".join(f"{name} {value:.4g}" for name, value in headline(values).items())
        tqdm.write(f"step {self.counters.step}: {said}")
        if picture.exists():
            self.logger.picture(picture, self.counters.step)
        if values["val/loss"] < self.counters.best:
            self.counters.best = values["val/loss"]
            self.save(self.folder / "checkpoints" / "best.pt")

    @torch.no_grad()
    def validation_loss(self, bins: int = 4) -> dict[str, float]:
        """The mean loss over the validation batches, and in bins of ln s."""
        losses, levels = [], []
        for k in range(self.trainer.validation_batches):
            batch = self.validation(k).to(self.device)
            losses.append(
                denoising_loss(self.denoiser, batch.x0, batch.measured, batch.observation, batch.t, batch.noise)
            )
            levels.append(self.denoiser.diffusion.level(batch.t))
        loss, level = torch.cat(losses).cpu(), torch.cat(levels).cpu()
        diffusion = self.denoiser.diffusion
        ends = math.log10(diffusion.sigma_min), math.log10(diffusion.sigma_max)
        edges = torch.logspace(*ends, bins + 1, dtype=torch.float64)
        places = torch.bucketize(level.double(), edges[1:-1])
        values = {"val/loss": loss.mean().item()}
        for place in places.unique().tolist():
            low, high = edges[place], edges[place + 1]
            values[f"val/loss_s{low:.2g}_{high:.2g}"] = loss[places == place].mean().item()
        return values

    def log(self, lines: JSONLines, values: dict[str, float]) -> None:
        """The same numbers to all loggers."""
        values = {"samples": self.counters.samples, "minutes": round(self.counters.minutes, 3), **values}
        lines.log(values, self.counters.step)
        self.logger.log(values, self.counters.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The denoiser with averaged weights."""
        network = self.denoiser.network
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(self.ema.state_dict())
        network.eval()
        try:
            yield
        finally:
            network.load_state_dict(weights)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the loop after the step under way; a second Ctrl-C ends it at once."""

        def handle(number: int, frame: object) -> None:
            self.signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, handle)
        except ValueError:
            before = {}  # not the main thread: signals belong to whoever started us
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def prefetched(self) -> Iterator[Iterator[Batch]]:
        """The batches from the present step on; beside a GPU a thread makes the next while one is worked on."""
        first = self.counters.step
        if self.device.type == "cpu":
            yield (self.batches(k) for k in itertools.count(first))
            return
        with ThreadPoolExecutor(1) as pool:

            def stream() -> Iterator[Batch]:
                ahead = pool.submit(self.batches, first)
                for k in itertools.count(first + 1):
                    batch, ahead = ahead.result(), pool.submit(self.batches, k)
                    yield batch.to(self.device)

            yield stream()


def headline(scores: dict[str, float]) -> dict[str, float]:
    """The scores that one compares runs by: all but the losses of single bins of noise, which differ between runs."""
    return {name: value for name, value in scores.items() if not name.startswith("val/loss_")}


def network_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that the network computes in under autocast, None for float32.

    `auto` is bf16 where the hardware multiplies in it: GPUs of compute capability 8 and up, processors with
    AVX512-BF16 or AMX (measured 1.5 to 2.3 times faster in training, losses equal to 2e-4).
    """
    if precision == "float32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else None
