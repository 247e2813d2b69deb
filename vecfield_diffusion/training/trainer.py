"""The training loop.

Time is counted in steps and samples. Everything random in step k follows from the seed and k, so the state of a run is
its weights, their average, the optimizer and the counters: run the same command again and it goes on as if it had never
stopped, bit for bit on a CPU with one number of threads (OMP_NUM_THREADS). Only `max_minutes` together with `cooldown`
ties the learning rate to the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.losses import DENOISING, Objective, Penalty, denoising_loss
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.memory import FULL, is_full
from vecfield_diffusion.progress import bar
from vecfield_diffusion.signals import Interrupted, interruptible
from vecfield_diffusion.threads import Fixed, Tuner, allowed, chosen
from vecfield_diffusion.training.batches import Batch, Batches, prefetched
from vecfield_diffusion.training.checkpoint import make_folder
from vecfield_diffusion.training.counters import Counters
from vecfield_diffusion.training.distributed import SingleProcess
from vecfield_diffusion.training.ema import EMA
from vecfield_diffusion.training.loggers import JSONLines, Logger, NoLogger
from vecfield_diffusion.training.memory import check_memory, out_of_memory
from vecfield_diffusion.training.run_state import RunState
from vecfield_diffusion.training.settings import Trainer
from vecfield_diffusion.training.validation import GatedLoss, headline, loss_by_level, where_it_helps
from vecfield_diffusion.training.weights import Means, Weights


@dataclass
class TrainingRun:
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
        score: `(picture path) -> scores` of a small ensemble, which it also draws where a path is given; None skips it.
        penalty: What is added to the loss for the estimate, on the device of the denoiser.
        processes: Those that take the steps together; see `training/distributed.py`.
        objective: The weights of the terms of the loss, and the terms.

    Attributes:
        untrained: After training, what to know where less than half of the steps were done; see `Trainer`.
    """

    trainer: Trainer
    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    batches: Batches
    validation: Batches
    folder: Path
    logger: Logger
    identity: dict[str, Any]
    score: Callable[[Path | None], dict[str, float]] | None = None
    penalty: Penalty | None = None
    objective: Objective = DENOISING
    counters: Counters = field(default_factory=Counters)
    processes: SingleProcess = field(default_factory=SingleProcess)

    def __post_init__(self) -> None:
        self.processes.check(self.trainer.batch_size, self.trainer.accumulate)
        self.device = next(self.denoiser.parameters()).device
        self.weights = Weights(self.denoiser, self.optimizer, self.trainer.ema, self.processes)
        self.state = RunState(self.folder / "checkpoints", self.identity, self.weights, self.processes)
        self.module = self.processes.module(self.denoiser, self.loss)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scores: dict[str, float] = {}
        self.losses: list[Tensor] = []  # since the last line of the log
        self.signal: int | None = None
        self.untrained = ""

    @cached_property
    def gated(self) -> GatedLoss | None:
        """The validation loss of a network with a gate."""
        gate = self.denoiser.parametrization.gate
        return None if gate is None else GatedLoss(self.validation, self.trainer.validation_batches)

    @property
    def ema(self) -> EMA:
        """The averaged weights."""
        return self.weights.ema

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.state.last

    @property
    def best(self) -> Path:
        """The checkpoint with the smallest validation loss."""
        return self.state.best

    def progress(self) -> dict[str, Any]:
        """Returns what checkpoints hold of a run beside its weights."""
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        return {"counters": vars(self.counters), "scores": self.scores, "losses": losses}

    def resume(self) -> bool:
        """Goes on from the last checkpoint, where there is one.

        Raises:
            UserError: It cannot be read, is of another network, optimizer or data, or is missing beside the best one.
        """
        try:
            state = self.state.load()
            if state is None:
                return False
            self.counters = Counters.of(state["counters"])
            self.scores, self.losses = dict(state["scores"]), list(state["losses"].to(self.device))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason, place = " ".join(str(error).split()), self.state.newest_parts() or self.last
            raise UserError(
                f"{place} does not fit this run ({reason}). Remove it, or choose another name=..."
            ) from error
        return True

    def train(self) -> dict[str, float]:
        """Trains to the end and returns the last validation scores.

        Raises:
            Interrupted: A signal came; the state was saved.
            UserError: The loss is no longer finite, and the last good checkpoint is kept; or the memory is too small.
        """
        for folder in (self.folder / "checkpoints", self.folder / "samples"):
            make_folder(folder)
        lines = JSONLines(self.folder / "metrics.jsonl", self.counters.step) if self.processes.first else NoLogger()
        batches = self.processes.share(self.batches)
        try:
            with interruptible(self.stop), prefetched(batches, self.counters.step, self.device) as stream:
                self.loop(stream, lines)
        except FULL as error:
            if not is_full(error):
                raise
            raise UserError(out_of_memory(self.trainer.batch_size, self.trainer.accumulate, self.device)) from error
        finally:
            lines.close()
        self.untrained = self.trainer.untrained(self.counters)
        if self.counters.stopped:
            print(f"stopped: {self.trainer.patience} validations, trainer.patience=, without a smaller loss")
        if self.untrained:
            print(f"note: {self.untrained}")
        if self.gated is not None and self.best.exists() and self.processes.first:
            print(where_it_helps(self.best, self.denoiser))
        return self.scores

    def stop(self, number: int) -> None:
        """Ends the run after the step under way, as a signal asks."""
        self.signal = number

    def loop(self, batches: Iterator[Batch], lines: JSONLines | NoLogger) -> None:
        """Steps until the end or a signal."""
        trainer, counters, tuner, processes = self.trainer, self.counters, self.tuner(), self.processes
        clock = saved = time.monotonic()
        start = counters.step
        with bar(trainer.max_steps * trainer.batch_size, "samples", done=counters.samples) as progress:
            counters.stopped = trainer.waited(counters)
            while trainer.progress(counters) < 1 and not counters.stopped and processes.heard(self.signal) is None:
                batch = next(batches)
                if counters.step == start and processes.count == 1:
                    check_memory(self.denoiser, batch, trainer.accumulate)
                if counters.step == 0 and self.gated is not None:  # the Gaussian part alone may be the best
                    progress.write(self.validate(lines))
                    clock = time.monotonic()
                tuner.start()
                self.losses.append(self.step(batch))
                if found := tuner.stop():
                    progress.write(found)
                now = time.monotonic()
                counters.minutes, due = processes.agreed(
                    counters.minutes + (now - clock) / 60, now - saved > 60 * trainer.checkpoint_minutes, self.signal
                )
                clock = now
                share = trainer.progress(counters)
                progress.update(trainer.batch_size, share=share)
                done = share >= 1
                if counters.step % trainer.log_every == 0 or done:
                    loss = self.finite()
                    self.losses = []
                    progress.update(0, share=share, loss=f"{loss:.4f}")
                    self.log(lines, {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"]})
                if counters.step % trainer.validate_every == 0 or done:
                    self.finite()
                    progress.write(self.validate(lines))
                    clock = time.monotonic()
                    counters.stopped = trainer.waited(counters)
                    done = done or counters.stopped
                if done or due:
                    self.finite()
                    self.state.save(self.last, self.progress()) if done else self.state.keep(self.progress())
                    saved = time.monotonic()
        if (signal := processes.heard(self.signal)) is not None:
            if counters.step > start:
                self.finite()
                self.state.keep(self.progress())
            raise Interrupted(signal)

    def tuner(self) -> Tuner | Fixed:
        """Returns what finds the number of threads; beside a GPU, or where the user chose one, nothing does."""
        most = allowed()
        if self.device.type != "cpu" or chosen() or most == 1:
            return Fixed()
        return Tuner(most, torch.set_num_threads)

    def step(self, batch: Batch) -> Tensor:
        """Takes one step of the optimizer and returns the loss, still on the device."""
        trainer, counters, processes = self.trainer, self.counters, self.processes
        factor = trainer.rate(counters)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        self.denoiser.train()
        torch.manual_seed(processes.seed(counters.step))  # dropout draws from the global state
        total = torch.zeros((), device=self.device)
        size, means = len(batch.t) // trainer.accumulate, Means(self.denoiser.parametrization.tracked)
        for first in range(0, len(batch.t), size):
            part = batch[first : first + size]
            with means.part(), processes.gathering(self.module, last=first + size == len(batch.t)):
                loss = self.module(part, training=True, penalty=self.penalty).mean() / trainer.accumulate
                loss.backward()
            total += loss.detach()
        norm = processes.whole(torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), trainer.grad_clip))
        self.optimizer.step()
        means.take(processes)
        counters.step += 1
        counters.samples += trainer.batch_size
        self.ema.update(self.denoiser.network, trainer.batch_size, counters.samples)
        return processes.mean(total) + 0 * norm  # a gradient that is not finite is as bad as such a loss

    def loss(self, batch: Batch, training: bool = False, penalty: Penalty | None = None) -> Tensor:
        """Returns the loss of every sample of a batch, `(B,)`; see `denoising_loss`. Of training it has all terms."""
        known = (batch.x0, batch.measured, batch.observation, batch.t, batch.noise)
        objective = self.objective if training else DENOISING
        return denoising_loss(self.denoiser, *known, training=training, penalty=penalty, objective=objective)

    def finite(self) -> float:
        """Returns the mean of the losses since the last line of the log; the device is waited for here alone."""
        if not self.losses:
            return 0.0
        loss = torch.stack(self.losses).mean().item()
        if not math.isfinite(loss):
            raise UserError(self.counters.not_finite(self.last))
        return loss

    def validate(self, lines: JSONLines | NoLogger) -> str:
        """Returns the loss on fixed batches, by noise level too, and the scores of a small ensemble.

        With averaged weights.

        Returns:
            The scores in words.
        """
        gate = self.denoiser.parametrization.gate
        with self.ema.applied(self.denoiser.network):
            values = self.validation_loss()
            found = None if gate is None else {name: value.cpu().clone() for name, value in gate.state_dict().items()}
            picture = self.folder / "samples" / f"{self.counters.step:07d}.png"
            if self.score is not None:
                values |= self.score(picture if self.processes.first else None)
        values, found = self.processes.told((values, found))
        if gate is not None and found is not None:
            gate.load_state_dict(found)
            self.ema.adopt(self.denoiser.network, gate)
        self.scores = values
        self.log(lines, values)
        if picture.exists() and self.processes.first:
            self.logger.picture(picture, self.counters.step)
        if self.counters.improve(values["val/loss"]):
            if not self.last.exists():  # the best alone is nothing to go on from
                self.state.save(self.last, self.progress())
            self.state.save(self.best, self.progress())
        said = ", ".join(f"{name} {value:.4g}" for name, value in headline(values).items())
        return f"step {self.counters.step}: {said}"

    def validation_loss(self) -> dict[str, float]:
        """Returns the mean loss over the validation batches, the same each time, and that of bins of noise levels.

        The gate of a network that has one is set.
        """
        if self.gated is not None:
            return self.gated(self.denoiser, self.device)
        batches = (self.validation(k).to(self.device) for k in range(self.trainer.validation_batches))
        return loss_by_level(self.loss, self.denoiser.diffusion, batches)

    def log(self, lines: JSONLines | NoLogger, values: dict[str, float]) -> None:
        """The same numbers to all loggers."""
        values = {"samples": self.counters.samples, "minutes": round(self.counters.minutes, 3), **values}
        lines.log(values, self.counters.step)
        self.logger.log(values, self.counters.step)
