"""Checkpoints of weights that are shared out: each process writes the parts that it keeps, and nothing is gathered.

They lie in a folder named after the step, in the format of torch.distributed.checkpoint, and appear under that name
when all of them are written. Any number of processes reads them, each the parts that it keeps.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from vecfield_diffusion.errors import UserError
from vecfield_diffusion.training.checkpoint import UNREADABLE, save_checkpoint
from vecfield_diffusion.training.distributed import SingleProcess
from vecfield_diffusion.training.run_state import STATE
from vecfield_diffusion.training.weights import Weights

#: What the description of the parts, a pickle, may name: its own classes, and those of shapes, types and paths.
PLAIN = {
    "torch.distributed.checkpoint.metadata": {
        *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
}


class _Described(pickle.Unpickler):
    """Reads the description of parts, and no code."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a pickle names, where that is plain."""
        if name in PLAIN.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a description")


class _Reader(FileSystemReader):
    """Reads parts, and no code."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Returns the description of the parts."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Described(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save(target: Path, weights: Weights, state: Mapping[str, Any], processes: SingleProcess) -> None:
    """Writes a checkpoint; all processes take part.

    Arguments:
        target: Its folder, which does not exist.
        weights: What this process keeps.
        state: What else there is, the same at all of them.
        processes: Those that train.

    Raises:
        UserError: The folder cannot be written; an older checkpoint is as it was.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        processes.told(None)
        with _quiet():
            writer = FileSystemWriter(temporary)
            dcp.save(weights.tensors(), storage_writer=writer, no_dist=processes.count == 1)
    except (OSError, CheckpointException) as error:
        raise UserError(
            f"{target}: the checkpoint could not be written ({_reason(error)}); an older one is as it was. "
            "Make room or choose another folder with hydra.run.dir=..."
        ) from error
    if processes.first:
        save_checkpoint(temporary / STATE, {**state, "groups": weights.groups()})
        os.replace(temporary, target)


def load(place: Path, weights: Weights, state: Mapping[str, Any], processes: SingleProcess) -> None:
    """Takes the weights from a checkpoint, of however many processes; all processes take part.

    Arguments:
        place: The checkpoint.
        weights: What is to be laid out as this process keeps it.
        state: What is in its file `STATE`.
        processes: Those that train.

    Raises:
        LookupError, ValueError: It is damaged, or of another network or optimizer.
    """
    reader = _Reader(place)

    def read(tensors: dict[str, Tensor]) -> None:
        with _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=processes.count == 1)

    try:
        described = reader.read_metadata().state_dict_metadata.items()
        kept = {name: torch.empty(one.size, dtype=one.properties.dtype, device="meta") for name, one in described}
        weights.fill(kept, state["groups"], read)
    except (CheckpointException, AttributeError, *UNREADABLE) as error:
        raise ValueError(_reason(error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block torch does not say that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """Returns what went wrong in one line: of many processes, at the first where something did."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    inner = next((failure[0] for _, failure in sorted(failures.items())), error)
    return " ".join(str(inner).split()) or type(inner).__name__
