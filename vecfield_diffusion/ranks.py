"""Which of several processes of one command this is, as torchrun numbers them in the environment."""

from __future__ import annotations

import os

#: What torchrun sets: the name of the launch, the number of the process, that on its machine, and how many there are.
LAUNCH, RANK, LOCAL_RANK, WORLD_SIZE = "TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"


def rank() -> int:
    """Returns the number of this process among those that were launched together; 0 of one that runs alone."""
    return _number(RANK, 0)


def local_rank() -> int:
    """Returns its number among those on the same machine."""
    return _number(LOCAL_RANK, 0)


def world_size() -> int:
    """Returns how many processes were launched together; 1 where this one runs alone."""
    return _number(WORLD_SIZE, 1)


def together() -> bool:
    """Returns whether this process is one of several with the same command, of torchrun or of SLURM."""
    return world_size() > 1 or "SLURM_ARRAY_TASK_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _number(name: str, alone: int) -> int:
    """A number that torchrun set. Other programs set such names, too: they count beside that of a launch alone."""
    return int(os.environ.get(name, alone)) if LAUNCH in os.environ else alone
