"""Where the numbers go while a network trains.

JSON lines are always written: they need nothing and survive a kill. A further logger takes the same numbers elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import netrc
import os
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.errors import UserError


class Logger(Protocol):
    """Takes numbers and pictures; `open` comes first, `close` always last. `open` prints where they are to be seen."""

    def open(self, folder: Path, name: str, config: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class NoLogger:
    """Nothing beyond the JSON lines."""

    def open(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Nothing to open."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Nothing to write."""

    def picture(self, path: Path, step: int) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to close."""


class WandbLogger:
    """Weights & Biases. Without an account, and without a network, the run is kept offline in the run folder.

    Arguments:
        project: The project that runs are filed under.
        mode: `online`, `offline`, or `auto`: online where an API key is set.
    """

    def __init__(self, project: str = "vecfield_diffusion", mode: str = "auto") -> None:
        if mode not in ("auto", "online", "offline"):
            raise ValueError(f"mode must be auto, online or offline, got {mode!r}")
        self.project, self.mode = project, mode

    def open(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Starts the run, or goes on with the one of this name."""
        try:
            import wandb
        except ImportError as error:
            raise UserError("logger=wandb needs the package wandb: pip install wandb") from error
        mode = ("online" if has_account() else "offline") if self.mode == "auto" else self.mode
        # The same folder on the same machine is the same run.
        identity = hashlib.sha256(f"{platform.node()}:{folder.absolute()}".encode()).hexdigest()[:16]
        options = dict(project=self.project, name=name, id=identity, resume="allow", dir=str(folder), config=config)
        # Online without a network hangs for over a minute unless it is set otherwise.
        settings = wandb.Settings(init_timeout=15, silent=True)
        try:
            self.run = wandb.init(mode=mode, settings=settings, **options)
        except wandb.errors.Error as error:
            print(f"wandb cannot be reached ({error}); the run is kept offline in {folder / 'wandb'}")
            self.run = wandb.init(mode="offline", settings=settings, **options)
        self.wandb = wandb
        if not self.run.offline and self.run.url:  # offline, asking for it is a warning
            print(f"wandb: {self.run.url}")
        else:
            folder = Path(self.run.dir).parent
            print(f"wandb: offline, in {folder}; to send it there: wandb sync {shlex.quote(str(folder))}")

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers at a step."""
        self.run.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        """Logs a picture file."""
        self.run.log({"samples": self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Ends the run, so that the next job of a sweep starts its own."""
        self.run.finish()


def has_account() -> bool:
    """Returns whether a key for wandb is at hand, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoardLogger:
    """TensorBoard event files in the run folder."""

    def open(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Opens the event file."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logger=tensorboard needs the package tensorboard: pip install 'vecfield-diffusion[tensorboard]'"
            ) from error
        place = folder / "tensorboard"
        self.writer = SummaryWriter(str(place))
        print(f"tensorboard: in {place}; to look at it: tensorboard --logdir {shlex.quote(str(place))}")
        self.writer.add_text("config", json.dumps(config, indent=2))

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        """Logs a picture file."""
        self.writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Writes out what is left."""
        self.writer.close()


class JSONLines:
    """`metrics.jsonl`: one line a record, each written out at once.

    Arguments:
        path: The file.
        step: Where the run goes on from; later lines, of a run that went further than its checkpoint, are dropped.

    Raises:
        UserError: A file that holds something other than such lines, or that cannot be read or written.
    """

    def __init__(self, path: Path, step: int) -> None:
        try:
            kept = [line for at, line in records(path) if at <= step] if path.exists() else []
            with replacing(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))
            self.file = path.open("a", buffering=1)
        except OSError as error:
            raise UserError(f"{path} cannot be read and written: {error.strerror or error}") from error

    def log(self, values: dict[str, float], step: int) -> None:
        """Writes a line."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def records(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the step of each line of a `metrics.jsonl`, and the line; a last one that was cut short is left out.

    Raises:
        UserError: A line that is no record.
    """
    *whole, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*whole, last], 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            at = record["step"]
            if type(at) is not int:
                raise TypeError(at)
        except (ValueError, TypeError, LookupError) as error:
            if number > len(whole):
                return  # of a run that was killed while writing
            raise UserError(
                f"{path}: line {number} is no record of a run. Move the file away to go on without its history, or "
                "choose another name=..."
            ) from error
        yield at, line.decode()
