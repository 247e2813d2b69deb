"""How long to train, in which batches, and how often to look: the settings of a run, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vecfield_diffusion.training.counters import Counters


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
        condition_dropout: The share of samples without observations.
        sigma_obs: The largest error of an observation in training, in standard deviations of the data.
        validate_every: Steps between validations.
        patience: Stop where the validation loss has not fallen for so many validations; `auto` chooses by the number of
            fields, see `programs/small.py`.
        validation_batches: Batches of a validation, the same each time.
        score_cases: Validation snapshots that are filled with the sampler at each validation; 0 skips it.
        score_members: Ensemble members of each.
        log_every: Steps between lines of the log.
        checkpoint_minutes: Minutes between checkpoints.
        devices: Processes on this machine that share every batch out; torchrun starts its own.
        strategy: What they keep: `ddp` all weights each, `fsdp` a part of them, of their moments and averages.

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
    patience: int | Literal["auto"] | None = "auto"
    validation_batches: int = 4
    score_cases: int = 8
    score_members: int = 4
    log_every: int = 50
    checkpoint_minutes: float = 5.0
    devices: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        counts = ("max_steps", "batch_size", "accumulate", "validate_every", "validation_batches", "log_every")
        for name in (*counts, "devices"):
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
        if isinstance(self.patience, int) and self.patience < 1:
            raise ValueError(f"patience must be >= 1, null or auto, got {self.patience}")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes must be > 0 or null, got {self.max_minutes}")

    def progress(self, counters: Counters) -> float:
        """Returns the share of the run that is done: by steps or by time, whichever is further."""
        return max(counters.step / self.max_steps, counters.minutes / self.max_minutes if self.max_minutes else 0.0)

    def untrained(self, counters: Counters) -> str:
        """Returns what to know of a run that ended before half of its steps; see `Counters`."""
        return counters.untrained(self.max_steps)

    def waited(self, counters: Counters) -> bool:
        """Returns whether the validation loss has not fallen for `patience` validations."""
        since = counters.step - counters.best_step
        return isinstance(self.patience, int) and since >= self.patience * self.validate_every

    def rate(self, counters: Counters) -> float:
        """Returns the factor on the learning rate: a linear rise at the start, a linear fall at the end."""
        rise = min(1.0, (counters.samples + self.batch_size) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (1 - self.progress(counters)) / self.cooldown) if self.cooldown else 1.0
        return rise * max(fall, 0.0)
