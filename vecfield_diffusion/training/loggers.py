"""Where the numbers go while a network trains.

JSON lines are always written: they need nothing and survive a kill. A further logger takes the same numbers elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import netrc
import os
import platform
from pathlib import Path
from typing import Any, Protocol

from vecfield_diffusion.atomic import replacing
from vecfield_diffusion.errors import UserError


class Logger(Protocol):
    """Takes numbers and pictures; `open` comes first, `close` always last."""

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
        # Online without a network hangs for over a minute unless told otherwise.
        settings = wandb.Settings(init_timeout=15, silent=True)
        try:
            self.run = wandb.init(mode=mode, settings=settings, **options)
        except wandb.errors.Error as error:
            print(f"wandb cannot be reached ({error}); the run is kept offline in {folder / 'wandb'}")
            self.run = wandb.init(mode="offline", settings=settings, **options)
        self.wandb = wandb

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
    """Whether a key for wandb is at hand, in the environment or in ~/.netrc."""
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
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", json.dumps(config, indent=2))

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs numbers at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, path: Path, step: int) -> None:
        """Logs a picture file."""
        import numpy as np
        from PIL import Image

        self.writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Writes out what is left."""
        self.writer.close()


class JSONLines:
    """`metrics.jsonl`: one line a record, each written out at once.

    Arguments:
        path: The file.
        step: Where the run goes on from; later lines, of a run that went further than its checkpoint, are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while writing
                if record["step"] <= step:
                    kept.append(line + "\n")
        with replacing(path) as temporary:
            temporary.write_text("".join(kept))
        self.file = path.open("a", buffering=1)

    def log(self, values: dict[str, float], step: int) -> None:
        """Writes a line."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
