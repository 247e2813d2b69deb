"""What a run goes on from: its checkpoints, written and found.

`last.pt` and `best.pt` hold whole weights, for any number of processes and for inference. Where each process keeps a
part of the weights, what is saved on the way lies in `shards/STEP` in parts, which are never gathered (`shards.py`),
until `last.pt` is written anew, at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from vecfield_diffusion.training.checkpoint import last_state, load_checkpoint, refuse_changed, save_checkpoint
from vecfield_diffusion.training.distributed import SingleProcess
from vecfield_diffusion.training.weights import Weights

#: Beside the parts of weights: the counters, the configuration and all else that is no part of one.
STATE = "state.pt"
#: What parts are written and read by; torch.distributed.checkpoint takes its time to import.
SHARDS = "vecfield_diffusion.training.shards"


class RunState:
    """The checkpoints of a run.

    Arguments:
        folder: Where they lie, `checkpoints` of the run.
        identity: What every checkpoint holds beside the state of training; see `TrainingRun`.
        weights: What is trained.
        processes: Those that train it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], weights: Weights, processes: SingleProcess) -> None:
        self.last, self.best, self.shards = folder / "last.pt", folder / "best.pt", folder / "shards"
        self.identity, self.weights, self.processes = identity, weights, processes

    def save(self, path: Path, progress: Mapping[str, Any]) -> None:
        """Writes a checkpoint of whole weights; the first process does.

        Arguments:
            path: `last` or `best`.
            progress: The counters, and what else changes on the way beside the weights.
        """
        state = self.weights.state_dict()
        if self.processes.first:
            save_checkpoint(path, {**self.identity, **state, **progress})
            if path == self.last:  # parts would be taken for what is newest
                shutil.rmtree(self.shards, ignore_errors=True)

    def keep(self, progress: Mapping[str, Any]) -> None:
        """Writes what a run goes on from: `last`, beside which parts are enough where that costs less; see `save`."""
        if not self.processes.sharded or not self.processes.told(self.last.exists()):
            self.save(self.last, progress)
            return
        place = self.shards / f"{progress['counters']['step']:08d}"
        if self.processes.told(place.exists()):  # written already, at this very step
            return
        import_module(SHARDS).save(place, self.weights, {**self.identity, **progress}, self.processes)
        for other in self.shards.iterdir() if self.processes.first else ():
            if other != place:
                shutil.rmtree(other, ignore_errors=True)

    def newest_parts(self) -> Path | None:
        """Returns the last checkpoint in parts; None where there is none that is newer than `last`."""
        found = [place for place in self.shards.glob("*") if place.name.isdigit()]
        return max(found, key=lambda place: int(place.name), default=None)

    def load(self) -> dict[str, Any] | None:
        """Takes the weights from what is newest, and returns the rest of it; None where the run begins.

        Raises:
            UserError: It cannot be read, is of other data, or is missing beside the best one.
            LookupError, TypeError, ValueError, AttributeError, RuntimeError: It is of another network or optimizer.
        """
        if (place := self.newest_parts()) is not None:
            state = load_checkpoint(place / STATE)
            refuse_changed(place, state, self.identity)
            import_module(SHARDS).load(place, self.weights, state, self.processes)
            return state
        state = last_state(self.last, self.best, self.identity)
        if state is not None:
            self.weights.load_state_dict(state)
        return state
